//! Unpacked kernels that are kept for the next run: to unpack one can take longer than all the rest of a start.
//!
//! A shelf is a directory with a file for each: the ELF file, and a trailer that tells a whole one from one that was cut.
//! What is on it can be made again at any time, so that nothing that goes wrong here is worth a failure.

use std::fs::{self, DirBuilder, File, FileTimes};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};

use super::elf::Elf;
use super::source::Source;

/// The end of a file that is whole; what the kernel says of ACPI follows.
const MARK: &[u8; 15] = b"mayfly kernel 1";
const TRAILER_LEN: usize = MARK.len() + 1;
/// So many are kept, those that were used last: each has some 40 to 80 MB.
const KEPT: usize = 4;
const CHUNK: usize = 1 << 20;

/// A kernel that was unpacked.
pub struct Unpacked {
    pub elf: Elf,
    pub source: Source,
    /// Whether its configuration has ACPI, if it has one.
    pub acpi: Option<bool>,
}

/// The place of one kernel on a shelf.
pub struct Shelf<'a> {
    dir: &'a Path,
    name: String,
}

impl<'a> Shelf<'a> {
    /// The place for what is packed in `image`.
    ///
    /// A file is known by its number, its length and its times: the time of its last change cannot be set back. Its
    /// device is left out, so that a host that sees it through a share finds what its own host has kept.
    pub fn new(dir: &'a Path, image: &File) -> Option<Shelf<'a>> {
        let about = image.metadata().ok()?;
        let name = format!(
            "{:x}-{:x}-{:x}.{:x}-{:x}.{:x}",
            about.ino(),
            about.len(),
            about.mtime(),
            about.mtime_nsec(),
            about.ctime(),
            about.ctime_nsec()
        );
        Some(Shelf { dir, name })
    }

    /// What is there, if it is whole.
    pub fn find(&self) -> Option<Unpacked> {
        let file = File::open(self.dir.join(&self.name)).ok()?;
        let len = file.metadata().ok()?.len().checked_sub(TRAILER_LEN as u64)?;
        let mut trailer = [0; TRAILER_LEN];
        file.read_exact_at(&mut trailer, len).ok()?;
        let acpi = match trailer.strip_prefix(MARK)? {
            b"y" => Some(true),
            b"n" => Some(false),
            _ => None,
        };
        let source = Source::File(Arc::new(file), len);
        let elf = Elf::parse(&source).ok()?;
        if let Source::File(file, _) = &source {
            // For who makes room. A reader may not be allowed to.
            let _ = file.set_times(FileTimes::new().set_modified(SystemTime::now()));
        }
        Some(Unpacked { elf, source, acpi })
    }

    /// Puts it there, whole or not at all, and makes room for it.
    pub fn keep(&self, unpacked: &Unpacked) {
        match self.put(unpacked) {
            Ok(()) => make_room(self.dir),
            Err(error) => log::debug!("no unpacked kernel is kept in {}: {error}", self.dir.display()),
        }
    }

    fn put(&self, unpacked: &Unpacked) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(self.dir)?;
        // It has no name before it is whole, so that nothing is left of one whose writer was killed.
        let flags = OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC;
        let mut file = File::from(open(self.dir, flags, Mode::RUSR | Mode::WUSR)?);
        for at in (0..unpacked.source.len()).step_by(CHUNK) {
            file.write_all(&unpacked.source.view(at, CHUNK)?)?;
        }
        file.write_all(MARK)?;
        file.write_all(match unpacked.acpi {
            Some(true) => b"y",
            Some(false) => b"n",
            None => b"?",
        })?;
        let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok(linkat(CWD, unnamed, CWD, self.dir.join(&self.name), AtFlags::SYMLINK_FOLLOW)?)
    }
}

/// Removes those that were not used for longest.
fn make_room(dir: &Path) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut kept: Vec<_> =
        entries.filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()))).collect();
    kept.sort();
    let surplus = kept.len().saturating_sub(KEPT);
    for (_, path) in kept.into_iter().take(surplus) {
        let _ = fs::remove_file(path);
    }
}
