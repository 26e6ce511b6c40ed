//! Disks: virtio-blk on a raw file or block device (virtio 1.2, section 5.2).

mod device;
mod request;

use std::fs::{File, TryLockError};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use base::disk::{Backend, Disk};
use base::host::{Access, Host};
use base::{Doing, Fail, Result, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::catalog::{Body, Kind, Kit, Presence};
use device::{Blk, Source};
use request::SECTOR;

/// The kind.
pub struct This;

/// A disk of the guest: `/dev/vda` and so on, in the order given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The image file (raw) or block device; a whole number of 512-byte sectors. A block device that is mounted can only
    /// be used with readonly=on.
    pub path: String,
    /// on: the guest can only read, and several machines may share the file.
    #[serde(default)]
    pub readonly: bool,
    /// The serial number that the guest sees, 1 to 20 bytes of ASCII (default: the name of the device, `disk0`).
    #[serde(default)]
    pub id: Option<String>,
    /// How the host does the work: io_uring, threads, or io_uring if the host allows it (default: auto).
    #[serde(default)]
    pub io: Engine,
}

/// How the host does the work of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// io_uring if the host allows it, or else threads.
    #[default]
    Auto,
    /// io_uring; an error if the host does not allow it.
    Uring,
    /// Up to four threads.
    Threads,
}

/// Bytes of a serial number (section 5.2.6).
const ID_BYTES: usize = 20;

impl Kind for This {
    type Spec = Spec;
    const NAME: &'static str = "blk";
    const FLAG: &'static str = "disk";
    const SUMMARY: &'static str = "a disk on a raw file or block device (virtio-blk)";
    const BARE: &'static str = "path";
    const EXAMPLE: &'static str = "path=root.img,readonly=on";
    const PRESENCE: Presence = Presence::OnRequest;

    fn claim(spec: &Spec, name: &str, host: &dyn Host) -> Result<Option<File>> {
        image(spec, name, host).map(|(file, _)| Some(file))
    }

    fn build(spec: &Spec, kit: &Kit<'_>) -> Result<Body> {
        let id = serial_number(spec.id.as_deref().unwrap_or(kit.name), kit.name)?;
        let (file, sectors) = image(spec, kit.name, kit.host)?;
        let backend = match spec.io {
            Engine::Auto => Backend::Auto,
            Engine::Uring => Backend::Uring,
            Engine::Threads => Backend::Threads,
        };
        if backend == Backend::Uring {
            let probe = file.try_clone().and_then(|file| Disk::open(file, kit.memory, backend, 1, kit.name));
            probe
                .doing(Why::Unsupported, || format!("set up io_uring for {}", kit.name))
                .map_err(|fail| fail.hint("pass io=threads or io=auto"))?;
        }
        let source = Source { file, backend, name: kit.name.to_owned(), memory: kit.memory.clone() };
        Ok(Body::Virtio(Box::new(Blk::new(source, sectors, spec.readonly, id))))
    }
}

/// The image, opened and locked, and its sectors.
fn image(spec: &Spec, name: &str, host: &dyn Host) -> Result<(File, u64)> {
    let path = Path::new(&spec.path);
    let access = Access { write: !spec.readonly, ..Access::default() };
    let mut file = host.open(&format!("{name} image"), path, access)?;
    let sectors = sectors(&mut file, name, path)?;
    lock(&file, name, path, spec.readonly)?;
    Ok((file, sectors))
}

fn serial_number(text: &str, name: &str) -> Result<[u8; ID_BYTES]> {
    let mut id = [0; ID_BYTES];
    match id.get_mut(..text.len()) {
        Some(room) if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic()) => {
            room.copy_from_slice(text.as_bytes());
            Ok(id)
        }
        _ => Err(Fail::new(Why::Usage, format!("give {name} the serial number {text:?}"))
            .because(format!("it is not 1 to {ID_BYTES} bytes of printable ASCII"))),
    }
}

/// The size of the disk. A size that is no whole number of sectors is refused: a rounded one would hide the file's
/// last bytes or make it grow.
fn sectors(file: &mut File, name: &str, path: &Path) -> Result<u64> {
    let doing = || format!("use {} as image of {name}", path.display());
    let meta = file.metadata().doing(Why::Host, doing)?;
    let bytes = if meta.file_type().is_block_device() {
        file.seek(SeekFrom::End(0)).doing(Why::Host, doing)?
    } else if meta.is_file() {
        meta.len()
    } else {
        return Err(Fail::new(Why::Invalid, doing()).because("it is neither a file nor a block device"));
    };
    if bytes == 0 {
        let grow = format!("truncate -s 1G {}", path.display());
        return Err(Fail::new(Why::Invalid, doing()).because("it is empty").hint(grow));
    }
    if !bytes.is_multiple_of(SECTOR) {
        return Err(Fail::new(Why::Invalid, doing())
            .because(format!("its {bytes} bytes are no whole number of 512-byte sectors"))
            .hint(format!("truncate -s %512 {}", path.display())));
    }
    Ok(bytes / SECTOR)
}

/// Keeps two machines from writing to one disk, and one from writing to what another reads.
fn lock(file: &File, name: &str, path: &Path, shared: bool) -> Result<()> {
    match if shared { file.try_lock_shared() } else { file.try_lock() } {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            let hint = "stop the other machine, or pass readonly=on to all that share the disk";
            Err(Fail::new(Why::Denied, format!("lock {} for {name}", path.display()))
                .because("another process uses it")
                .hint(hint))
        }
        Err(TryLockError::Error(cause)) => {
            // A file system without locks: the user keeps two machines apart.
            log::warn!("{name}: {} cannot be locked: {cause}", path.display());
            Ok(())
        }
    }
}
