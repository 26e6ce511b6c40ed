//! The files of a raw disk: one, or one that takes all writes over one that stays as it is.
//!
//! Both files of an overlay have their bytes at the same offsets, and the upper one is sparse. All that is left to know
//! is which sectors are in it ([`Written`]). A sector is the least that a guest can write, so no write ever has to read
//! first, and nothing has to be laid out or looked up on the host's disk.

use std::cmp::Ordering;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;

use super::pool::in_memory;
use super::written::{SECTOR, Written};
use super::{Action, Job};

/// Bytes that one step copies where the guest's memory is not aligned as the host wants it: 128 jobs in flight hold
/// 32 MiB of copies at the most.
const BOUNCE: u64 = 256 << 10;

/// The files of a disk.
pub struct Layers {
    /// What takes the writes.
    top: File,
    below: Option<Below>,
    /// Alignment that the host demands of memory, offsets and lengths (`O_DIRECT`), in bytes; 1 if none.
    align: u64,
}

/// What lies under the file that is written to.
struct Below {
    file: File,
    size: u64,
    written: Written,
}

/// The size of a file or block device as it is now, in bytes.
///
/// # Errors
/// As the host answers.
pub fn size(mut file: &File) -> io::Result<u64> {
    let meta = file.metadata()?;
    if meta.file_type().is_block_device() { file.seek(SeekFrom::End(0)) } else { Ok(meta.len()) }
}

/// The smallest block that the host reads from `file`, which was opened with `O_DIRECT`. It is found by trying: what
/// `statx(2)` tells is not told by every file system and kernel.
fn smallest_block(mut file: &File) -> io::Result<u64> {
    let mut room = vec![0; 8192];
    let head = room.as_ptr().align_offset(4096);
    for block in [512, 1024, 2048, 4096] {
        let Some(room) = head.checked_add(block).and_then(|end| room.get_mut(head..end)) else { break };
        file.rewind()?;
        match file.read(room) {
            Ok(_) => return Ok(block as u64),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::Unsupported, "no block of up to 4096 bytes can be read directly"))
}

impl Layers {
    /// One file.
    pub fn one(file: File) -> Layers {
        Layers { top: file, below: None, align: 1 }
    }

    /// One file that was opened past the page cache.
    pub fn direct(file: File) -> io::Result<Layers> {
        let align = smallest_block(&file)?;
        Ok(Layers { top: file, below: None, align })
    }

    /// `top`, which is empty, takes what is written; the rest is read from `file`.
    pub fn over(file: File, top: File) -> io::Result<Layers> {
        let size = size(&file)?;
        top.set_len(size)?;
        Ok(Layers { top, below: Some(Below { file, size, written: Written::default() }), align: 1 })
    }

    /// The size of the disk now, in bytes.
    pub fn size(&self) -> io::Result<u64> {
        self.below.as_ref().map_or_else(|| size(&self.top), |below| Ok(below.size))
    }

    /// Makes the file longer, to `bytes`.
    pub fn grow(&self, bytes: u64) -> io::Result<()> {
        let invalid = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        if self.below.is_some() {
            return invalid("what the guest writes is thrown away, and the image is only read");
        }
        let about = self.top.metadata()?;
        match bytes.cmp(&about.len()) {
            _ if !about.is_file() => invalid("it is a block device"),
            Ordering::Less => invalid("the image is larger, and a disk does not shrink"),
            Ordering::Equal => Ok(()),
            Ordering::Greater => self.top.set_len(bytes),
        }
    }

    /// Bytes of the smallest block that can be read and written.
    pub fn block(&self) -> u64 {
        self.align.max(SECTOR)
    }

    /// Whether no job waits for anything.
    pub fn in_memory(&self) -> bool {
        in_memory(&self.top) && self.below.as_ref().is_none_or(|below| in_memory(&below.file))
    }

    /// Whether it goes with this process: then there is nothing to put on stable storage.
    pub fn throwaway(&self) -> bool {
        self.below.is_some()
    }

    /// The file that the next step of `job` goes to; the step is limited to what lies there.
    pub fn prepare(&self, job: &mut Job) -> BorrowedFd<'_> {
        job.iovecs.unlimit();
        let mut file = &self.top;
        if let (Action::Read, Some(below)) = (job.action, &self.below) {
            let (inside, until) = below.written.run(job.offset, job.len);
            if !inside {
                file = &below.file;
            }
            job.iovecs.limit(until);
        }
        let moves = matches!(job.action, Action::Read | Action::Write);
        if moves && self.align > 1 && !job.iovecs.aligned(self.align) {
            job.iovecs.bounce(BOUNCE, job.action == Action::Write);
        }
        file.as_fd()
    }

    /// Takes note that a step of `job` has changed `len` bytes from `offset`.
    pub fn changed(&self, offset: u64, len: u64) {
        if let Some(below) = &self.below {
            below.written.mark(offset, len);
        }
    }
}
