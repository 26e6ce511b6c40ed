//! Stock kernels: Debian's packages, fetched once, with the `vmlinux` packed inside each and the modules that a
//! small RAM disk needs.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A kernel as the distribution ships it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// For virtual machines: `linux-image-cloud-amd64`.
    Cloud,
    /// For everything: `linux-image-amd64`.
    Generic,
    /// With PREEMPT_RT: `linux-image-rt-amd64`.
    Rt,
}

impl Flavour {
    /// All of them.
    pub const ALL: [Flavour; 3] = [Flavour::Cloud, Flavour::Generic, Flavour::Rt];

    /// Its name in names of cases.
    pub fn name(self) -> &'static str {
        match self {
            Flavour::Cloud => "cloud",
            Flavour::Generic => "generic",
            Flavour::Rt => "rt",
        }
    }

    /// How Debian calls it: the end of its package's name.
    fn package(self) -> &'static str {
        match self {
            Flavour::Cloud => "cloud-amd64",
            Flavour::Generic => "amd64",
            Flavour::Rt => "rt-amd64",
        }
    }
}

/// A kernel on disk.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its directory: what the package holds.
    dir: PathBuf,
    /// Its release, as `uname -r` says it.
    pub release: String,
}

impl Kernel {
    /// Finds the kernel in the cache, or fetches it.
    ///
    /// # Errors
    /// There is no network, no `apt-get` (see `resources/kernel`), or no such package.
    pub fn fetch(flavour: Flavour) -> Result<Kernel, String> {
        let said = run(Command::new(crate::house::root().join("resources/kernel")).arg(flavour.package()))?;
        let dir = PathBuf::from(said.trim());
        let entries =
            fs::read_dir(dir.join("boot")).map_err(|cause| format!("read {}: {cause}", dir.display()))?;
        let release = entries
            .flatten()
            .find_map(|entry| Some(entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned()))
            .ok_or_else(|| format!("find boot/vmlinuz-* in {}", dir.display()))?;
        Ok(Kernel { dir, release })
    }

    /// A place beside it for what is made from it.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The bzImage, as shipped.
    pub fn bzimage(&self) -> PathBuf {
        self.dir.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// The ELF file packed inside the bzImage, unpacked once.
    ///
    /// # Errors
    /// The image is not packed with LZ4 or XZ, as Debian's are.
    pub fn vmlinux(&self) -> Result<PathBuf, String> {
        let path = self.dir.join("vmlinux");
        if !path.exists() {
            let image = fs::read(self.bzimage()).map_err(|cause| format!("read the bzImage: {cause}"))?;
            let fresh = self.dir.join(format!(".vmlinux-{}", std::process::id()));
            fs::write(&fresh, unpack(&image)?)
                .map_err(|cause| format!("write {}: {cause}", fresh.display()))?;
            fs::rename(&fresh, &path).map_err(|cause| format!("keep {}: {cause}", path.display()))?;
        }
        Ok(path)
    }

    /// The files of modules and of all they depend on, in the order to load them.
    ///
    /// # Errors
    /// There is no `depmod` or `modprobe` (package kmod).
    pub fn modules(&self, names: &[&str]) -> Result<Vec<PathBuf>, String> {
        let dir = self.dir.display().to_string();
        if !self.dir.join("lib/modules").join(&self.release).join("modules.dep").exists() {
            run(Command::new("/sbin/depmod").args(["-b", &dir, &self.release]))?;
        }
        let mut files: Vec<PathBuf> = Vec::new();
        for name in names {
            let said = run(Command::new("/sbin/modprobe").args([
                "-d",
                &dir,
                "-S",
                &self.release,
                "--show-depends",
                name,
            ]))?;
            let paths = said
                .lines()
                .filter_map(|line| line.strip_prefix("insmod "))
                .map(|path| PathBuf::from(path.trim()));
            for path in paths {
                if !files.contains(&path) {
                    files.push(path);
                }
            }
        }
        Ok(files)
    }
}

fn run(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|cause| format!("run {program}: {cause}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

/// The payload of a bzImage, unpacked: written apart from what is under test, so that each checks the other.
fn unpack(image: &[u8]) -> Result<Vec<u8>, String> {
    let word = |at: usize| -> Result<usize, String> {
        let bytes = image
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or("the bzImage is too short")?;
        usize::try_from(u32::from_le_bytes(bytes)).map_err(|cause| cause.to_string())
    };
    // Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length.
    let setup = (usize::from(*image.get(0x1f1).ok_or("the bzImage is too short")?) + 1) * 512;
    let (offset, len) = (word(0x248)?, word(0x24c)?);
    let payload =
        image.get(setup + offset..setup + offset + len).ok_or("the payload goes beyond the bzImage")?;
    let packed = &payload[..len - 4];
    let mut unpacked = Vec::new();
    if let Some(mut rest) = packed.strip_prefix(&[0x02, 0x21, 0x4c, 0x18]) {
        while let Some((len, after)) = rest.split_first_chunk::<4>() {
            let len = usize::try_from(u32::from_le_bytes(*len)).map_err(|cause| cause.to_string())?;
            let (block, next) = after.split_at_checked(len).ok_or("an LZ4 block goes beyond the payload")?;
            unpacked.extend(
                lz4_flex::block::decompress(block, 8 << 20)
                    .map_err(|cause| format!("unpack LZ4: {cause}"))?,
            );
            rest = next;
        }
    } else if packed.starts_with(b"\xfd7zXZ\0") {
        let mut reader = lzma_rust2::XzReader::new(packed, false);
        reader.read_to_end(&mut unpacked).map_err(|cause| format!("unpack XZ: {cause}"))?;
    } else {
        return Err("the payload is packed neither with LZ4 nor with XZ".into());
    }
    if unpacked.starts_with(b"\x7fELF") { Ok(unpacked) } else { Err("the payload is no ELF file".into()) }
}

/// The name of a module's file.
pub fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
