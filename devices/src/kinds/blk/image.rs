//! Opening of images: what the user said, never what the bytes suggest; every file through the host, and locked.

use std::fs::{File, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf, absolute};

use base::disk::qcow2::{self, Backing, Opening};
use base::disk::{Image, go_direct};
use base::host::{Access, Host};
use base::{Doing, Fail, Result, Why};

use super::request::SECTOR;
use super::{Format, Overlay, Spec};

/// Images below one another at the most. An image that stands on itself would go on for ever.
const DEEPEST: usize = 8;

/// Bytes of the host's list of locks that are read.
const LOCKS: u64 = 1 << 20;

/// Formats that a raw disk is unlikely to begin like.
const MAGICS: [(&[u8], &str); 4] =
    [(&qcow2::MAGIC, "qcow2"), (b"KDMV", "VMDK"), (b"vhdxfile", "VHDX"), (b"conectix", "VHD")];

/// Opens what `spec` asks for. An overlay that is thrown away goes with the machine, not with one life of it.
///
/// # Errors
/// A file cannot be opened, is used by another machine, or is not what the user says it is.
pub fn open(spec: &Spec, name: &str, host: &dyn Host) -> Result<Image> {
    let opener = Opener { name, host, backing: spec.backing, direct: spec.direct };
    match (&spec.overlay, host.keepsakes()) {
        (Overlay::Throwaway, Some(kept)) => kept.keep(&format!("{name} overlay"), || opener.image(spec)),
        _ => opener.image(spec),
    }
}

/// Opens and locks the files that `spec` names itself, and makes none. What they are is looked at as [`open`] does it,
/// what stands on what and what they stand on too.
///
/// # Errors
/// As [`open`].
pub fn claim(spec: &Spec, name: &str, host: &dyn Host) -> Result<Vec<File>> {
    // Whether it can be used past the page cache, the host that does it has to say.
    let opener = Opener { name, host, backing: spec.backing, direct: false };
    let path = Path::new(&spec.path);
    let file = opener.file(path, "image", spec.writes())?;
    let mut held = vec![file.try_clone().doing(Why::Host, || opener.doing(path))?];
    let format = spec.format.unwrap_or(Format::Raw);
    let Overlay::Kept(over) = &spec.overlay else {
        match format {
            Format::Qcow2 => drop(opener.qcow2(file, path, spec.writes(), DEEPEST)?),
            Format::Raw => opener.check_raw(&file, path, spec.format)?,
        }
        return Ok(held);
    };
    if format == Format::Raw {
        opener.check_raw(&file, path, spec.format)?;
    }
    let below = opener.below(file, path, format, DEEPEST)?;
    let over = Path::new(over);
    match opener.overlay(over, Access { write: true, ..Access::default() }) {
        Ok((file, bytes)) => {
            held.push(file.try_clone().doing(Why::Host, || opener.doing(over))?);
            // An empty one becomes an overlay when the machine begins.
            if bytes > 0 {
                opener.kept_on(file, over, &below, path, format)?;
            }
        }
        Err(fail) if missing(&fail) => host.could_make(&format!("{name} overlay"), over)?,
        Err(fail) => return Err(fail),
    }
    Ok(held)
}

fn missing(fail: &Fail) -> bool {
    let cause = std::error::Error::source(fail).and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::NotFound)
}

struct Opener<'a> {
    name: &'a str,
    host: &'a dyn Host,
    backing: bool,
    direct: bool,
}

fn word(format: Format) -> &'static str {
    match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    }
}

impl Opener<'_> {
    fn image(&self, spec: &Spec) -> Result<Image> {
        let path = Path::new(&spec.path);
        let file = self.file(path, "image", spec.writes())?;
        match (&spec.overlay, spec.format) {
            (Overlay::Off, Some(Format::Qcow2)) => {
                let (image, below) = self.qcow2(file, path, spec.writes(), DEEPEST)?;
                Ok(image.image(below))
            }
            (Overlay::Off, format) => self.raw(file, path, format),
            (Overlay::Throwaway, Some(Format::Qcow2)) => {
                let below = self.below(file, path, Format::Qcow2, DEEPEST)?;
                let doing = || format!("make the overlay of {}", self.name);
                let top = self.host.scratch(&format!("the overlay of {}", self.name))?;
                let again = top.try_clone().doing(Why::Host, doing)?;
                qcow2::create(again, below.size(), None).doing(Why::Host, doing)?;
                Ok(Opening::new(top, true).doing(Why::Host, doing)?.image(Some(below)))
            }
            (Overlay::Throwaway, format) => {
                self.check_raw(&file, path, format)?;
                let top = self.host.scratch(&format!("the overlay of {}", self.name))?;
                Image::throwaway(file, top).doing(Why::Host, || format!("make the overlay of {}", self.name))
            }
            (Overlay::Kept(over), format) => {
                if format != Some(Format::Qcow2) {
                    self.check_raw(&file, path, format)?;
                }
                let format = format.unwrap_or(Format::Raw);
                let below = self.below(file, path, format, DEEPEST)?;
                self.kept(Path::new(over), below, path, format)
            }
        }
    }

    fn doing(&self, path: &Path) -> String {
        format!("use {} as image of {}", path.display(), self.name)
    }

    fn refuse(&self, path: &Path, cause: impl Into<String>, hint: impl Into<String>) -> Fail {
        Fail::new(Why::Invalid, self.doing(path)).because(cause.into()).hint(hint)
    }

    /// Opens a file that exists, and locks it.
    fn file(&self, path: &Path, role: &str, write: bool) -> Result<File> {
        let access = Access { write, ..Access::default() };
        let file = self.host.open(&format!("{} {role}", self.name), path, access)?;
        let meta = file.metadata().doing(Why::Host, || self.doing(path))?;
        if !meta.is_file() && !meta.file_type().is_block_device() {
            return Err(self.refuse(
                path,
                "it is neither a file nor a block device",
                "name an image file or a block device; what comes out of a pipe has to be put into a file first",
            ));
        }
        self.lock(&file, path, !write)?;
        Ok(file)
    }

    fn raw(&self, file: File, path: &Path, format: Option<Format>) -> Result<Image> {
        self.check_raw(&file, path, format)?;
        if !self.direct {
            return Ok(Image::raw(file));
        }
        let image = Image::direct(file)
            .doing(Why::Unsupported, || {
                format!("go past the page cache to {} for {}", path.display(), self.name)
            })
            .map_err(|fail| fail.hint("leave direct=on out: its file system does not do it"))?;
        let (bytes, block) = (image.size().doing(Why::Host, || self.doing(path))?, image.block());
        if !bytes.is_multiple_of(block) {
            let cause = format!("its {bytes} bytes are no whole number of the host's blocks of {block}");
            return Err(self.refuse(
                path,
                cause,
                format!("leave direct=on out, or: truncate -s %{block} {}", path.display()),
            ));
        }
        Ok(image)
    }

    /// Refuses what is no raw disk. A size that is no whole number of sectors is refused: a rounded one would hide the
    /// file's last bytes or make it grow. And a file that looks like another format: as a raw disk the guest would find
    /// rubbish on it, and its first write would destroy the image.
    fn check_raw(&self, file: &File, path: &Path, format: Option<Format>) -> Result<()> {
        let shown = path.display();
        let image = Image::raw(file.try_clone().doing(Why::Host, || self.doing(path))?);
        let bytes = image.size().doing(Why::Host, || self.doing(path))?;
        if bytes == 0 {
            return Err(self.refuse(path, "it is empty", format!("truncate -s 1G {shown}")));
        }
        if format.is_none() {
            let mut head = [0; 8];
            let read = file.read_at(&mut head, 0).doing(Why::Host, || self.doing(path))?;
            let head = head.get(..read).unwrap_or_default();
            if let Some((_, name)) = MAGICS.iter().find(|(magic, _)| head.starts_with(magic)) {
                let hint = match *name {
                    "qcow2" => {
                        "pass format=qcow2, or format=raw if its bytes are those of the disk".to_owned()
                    }
                    _ => format!(
                        "qemu-img convert -O raw {shown} disk.img; or pass format=raw if its bytes are those of the disk"
                    ),
                };
                return Err(self.refuse(path, format!("it looks like {name}, and no format was said"), hint));
            }
        }
        if !bytes.is_multiple_of(SECTOR) {
            let cause = format!("its {bytes} bytes are no whole number of 512-byte sectors");
            return Err(self.refuse(path, cause, format!("truncate -s %512 {shown}")));
        }
        Ok(())
    }

    fn check_qcow2(&self, file: &File, path: &Path) -> Result<()> {
        let mut magic = [0; 4];
        let read = file.read_at(&mut magic, 0).doing(Why::Host, || self.doing(path))?;
        if read < magic.len() || magic != qcow2::MAGIC {
            return Err(self.refuse(path, "it is no qcow2 image", "pass format=raw, or leave format out"));
        }
        Ok(())
    }

    /// Reads the head of a qcow2 image, and opens what it stands on if that is allowed.
    fn qcow2(
        &self,
        file: File,
        path: &Path,
        write: bool,
        depth: usize,
    ) -> Result<(Opening, Option<Backing>)> {
        let shown = path.display();
        self.check_qcow2(&file, path)?;
        if self.direct {
            go_direct(&file)
                .doing(Why::Unsupported, || format!("go past the page cache to {shown} for {}", self.name))
                .map_err(|fail| fail.hint("leave direct=on out: its file system does not do it"))?;
        }
        let opening = Opening::new(file, write).map_err(|cause| {
            let hint = match cause.kind() {
                io::ErrorKind::UnexpectedEof => "copy or make it again".to_owned(),
                _ => format!("qemu-img check {shown}"),
            };
            let cause = format!("as a qcow2 image it cannot be used: {}", broken(&cause));
            self.refuse(path, cause, hint)
        })?;
        if opening.size() == 0 || !opening.size().is_multiple_of(SECTOR) {
            let cause = format!("its {} bytes are no whole number of 512-byte sectors", opening.size());
            return Err(self.refuse(path, cause, format!("qemu-img resize -f qcow2 {shown} 1G")));
        }
        if opening.has_data_file() {
            let hint = format!("qemu-img convert -O qcow2 {shown} whole.qcow2");
            return Err(self.refuse(path, "its data are in another file, which is not supported", hint));
        }
        let below = match opening.backing() {
            None => None,
            Some((name, _)) if !self.backing => {
                let cause = format!("it stands on {name}, and backing files are not followed unasked");
                return Err(self.refuse(path, cause, "pass backing=on if you trust the image's maker"));
            }
            Some((name, format)) => Some(self.backing(path, name, format, depth)?),
        };
        Ok((opening, below))
    }

    /// Opens the file that the image at `path` names.
    fn backing(&self, path: &Path, name: &str, format: Option<&str>, depth: usize) -> Result<Backing> {
        let Some(depth) = depth.checked_sub(1) else {
            let cause = format!("more than {DEEPEST} images stand on one another");
            return Err(self.refuse(path, cause, "qemu-img convert them into one"));
        };
        let hint = |format: &str| format!("qemu-img rebase -u -F {format} -b {name} {}", path.display());
        let format = match format {
            Some("raw") => Format::Raw,
            Some("qcow2") => Format::Qcow2,
            Some(other) => {
                let cause =
                    format!("the format of its backing file {name} is {other}, which is not supported");
                return Err(self.refuse(path, cause, "qemu-img convert it to qcow2"));
            }
            None => {
                let cause = format!("it does not say what format its backing file {name} has");
                return Err(self.refuse(path, cause, hint("raw")));
            }
        };
        // `json:{...}`, `nbd://...`: QEMU's ways to name what is no file.
        let scheme = name.split('/').next().unwrap_or_default();
        if scheme.contains(':') {
            let cause = format!("its backing file {name} is no plain file");
            return Err(self.refuse(path, cause, hint("raw")));
        }
        let found: PathBuf = path.parent().unwrap_or(Path::new("")).join(name);
        let file = self.file(&found, "backing file", false)?;
        self.below(file, &found, format, depth)
    }

    /// An image to stand on.
    fn below(&self, file: File, path: &Path, format: Format, depth: usize) -> Result<Backing> {
        match format {
            Format::Raw => Backing::raw(file).doing(Why::Host, || self.doing(path)),
            Format::Qcow2 => {
                let (opening, below) = self.qcow2(file, path, false, depth)?;
                Ok(opening.below(below))
            }
        }
    }

    /// The overlay in the file `over`, which is made if it is missing or empty.
    fn kept(&self, over: &Path, below: Backing, base: &Path, format: Format) -> Result<Image> {
        let doing = || self.overlaying(over);
        let (file, bytes) = self.overlay(over, Access { write: true, keep: true, ..Access::default() })?;
        if bytes == 0 {
            let again = file.try_clone().doing(Why::Host, doing)?;
            let stands_on = (name_of(base), word(format));
            qcow2::create(again, below.size(), Some(stands_on)).doing(Why::Host, doing)?;
        }
        Ok(self.kept_on(file, over, &below, base, format)?.image(Some(below)))
    }

    fn overlaying(&self, over: &Path) -> String {
        format!("use {} as overlay of {}", over.display(), self.name)
    }

    /// Opens and locks the file of an overlay; also its size.
    fn overlay(&self, over: &Path, access: Access) -> Result<(File, u64)> {
        let file = self.host.open(&format!("{} overlay", self.name), over, access)?;
        let meta = file.metadata().doing(Why::Host, || self.overlaying(over))?;
        if !meta.is_file() {
            let fail = Fail::new(Why::Invalid, self.overlaying(over)).because("it is no file");
            return Err(fail.hint("name a file; one that is missing is made"));
        }
        self.lock(&file, over, false)?;
        Ok((file, meta.len()))
    }

    /// Reads the head of an overlay. The name that it has for its base is compared, never opened.
    fn kept_on(
        &self,
        file: File,
        over: &Path,
        below: &Backing,
        base: &Path,
        format: Format,
    ) -> Result<Opening> {
        let (shown, name) = (over.display(), name_of(base));
        let refuse = |cause: String, hint: String| {
            Err(Fail::new(Why::Invalid, self.overlaying(over)).because(cause).hint(hint))
        };
        let opening = match Opening::new(file, true) {
            Ok(opening) => opening,
            Err(cause) => {
                return refuse(
                    format!("as a qcow2 image it cannot be used: {}", broken(&cause)),
                    format!("qemu-img check {shown}; or name a file that does not exist yet"),
                );
            }
        };
        let made_for = opening.backing().map(|(name, format)| (name.to_owned(), format.map(str::to_owned)));
        if made_for != Some((name.clone(), Some(word(format).to_owned()))) {
            let made_for = made_for.map_or("no base".to_owned(), |(name, format)| {
                format!("{name} ({})", format.as_deref().unwrap_or("no format"))
            });
            return refuse(
                format!("it was made for {made_for}, not for {name} ({})", word(format)),
                format!(
                    "if only the name has changed: qemu-img rebase -u -F {} -b {name} {shown}",
                    word(format)
                ),
            );
        }
        if opening.size() != below.size() || opening.has_data_file() {
            return refuse(
                format!("its disk has {} bytes, that of its base {}", opening.size(), below.size()),
                "the base must stay as it was when the overlay was made; name a new file to begin again"
                    .to_owned(),
            );
        }
        Ok(opening)
    }

    /// Keeps two machines from writing to one disk, and one from writing to what another reads.
    fn lock(&self, file: &File, path: &Path, shared: bool) -> Result<()> {
        match if shared { file.try_lock_shared() } else { file.try_lock() } {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => {
                let fail = Fail::new(Why::Denied, format!("lock {} for {}", path.display(), self.name));
                Err(if self.is_ours(file) {
                    fail.because("this machine uses it already").hint(
                        "give each disk an image of its own, or pass readonly=on or overlay=on to all that share it",
                    )
                } else {
                    fail.because("another process uses it").hint(
                        "stop the other machine, or pass readonly=on or overlay=on to all that share the disk",
                    )
                })
            }
            Err(TryLockError::Error(cause)) => {
                // A file system without locks: the user keeps two machines apart.
                log::warn!(target: "guest", "{}: {} cannot be locked: {cause}", self.name, path.display());
                Ok(())
            }
        }
    }

    /// Whether this process has a lock on the file, as far as the host tells (`proc_locks(5)`): `1: FLOCK ADVISORY WRITE
    /// PID MAJOR:MINOR:INODE 0 EOF`.
    fn is_ours(&self, file: &File) -> bool {
        let mut list = String::new();
        let all = self.host.open("locks", Path::new("/proc/locks"), Access::default());
        let (Ok(all), Ok(meta)) = (all, file.metadata()) else { return false };
        if all.take(LOCKS).read_to_string(&mut list).is_err() {
            return false;
        }
        let (device, own) = (meta.dev(), std::process::id().to_string());
        let place =
            format!("{:02x}:{:02x}:{}", rustix::fs::major(device), rustix::fs::minor(device), meta.ino());
        list.lines().any(|line| {
            let mut words = line.split_ascii_whitespace().skip(4);
            words.next() == Some(&own) && words.next() == Some(&place)
        })
    }
}

/// The name of a base as an overlay has it.
fn name_of(base: &Path) -> String {
    absolute(base).unwrap_or_else(|_| base.to_owned()).display().to_string()
}

/// Why the head of an image cannot be read, in words.
fn broken(cause: &io::Error) -> String {
    match cause.kind() {
        // The words of a read that did not get as much as it wanted say nothing of an image.
        io::ErrorKind::UnexpectedEof if cause.get_ref().is_none() => "it is truncated".to_owned(),
        _ => cause.to_string(),
    }
}
