//! Where the bytes of a kernel come from: a file, memory, or an unpacked payload.

use std::borrow::Cow;
use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use base::memory::Memory;
use base::sys::scratch::Scratch;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile, VolatileMemoryError};

const PAGE: u64 = 4096;
/// Below this, one read is cheaper than a mapping and the faults that come with it.
const WORTH_MAPPING: u64 = 256 << 10;

/// Bytes that can be read at an offset and brought into guest memory with as little copying as they allow.
pub enum Source {
    /// A regular file and its length when it was opened.
    File(Arc<File>, u64),
    /// Bytes in memory.
    Bytes(Arc<Vec<u8>>),
    /// Bytes in pages that can become guest memory.
    Scratch(Scratch),
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

impl Source {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Source::File(_, len) => *len,
            Source::Bytes(bytes) => bytes.len() as u64,
            Source::Scratch(scratch) => scratch.as_slice().len() as u64,
        }
    }

    /// The same bytes once more, so that loading leaves the kernel as it is. Scratch memory has one owner.
    pub fn share(&self) -> io::Result<Source> {
        match self {
            Source::File(file, len) => Ok(Source::File(file.clone(), *len)),
            Source::Bytes(bytes) => Ok(Source::Bytes(bytes.clone())),
            Source::Scratch(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn slice(&self, offset: u64, len: usize) -> io::Result<&[u8]> {
        let bytes = match self {
            Source::File(..) => &[],
            Source::Bytes(bytes) => bytes.as_slice(),
            Source::Scratch(scratch) => scratch.as_slice(),
        };
        usize::try_from(offset)
            .ok()
            .and_then(|start| bytes.get(start..start.checked_add(len)?))
            .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Fills `buffer` from `offset`.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Source::File(file, _) => file.read_exact_at(buffer, offset).map_err(ended),
            _ => {
                buffer.copy_from_slice(self.slice(offset, buffer.len())?);
                Ok(())
            }
        }
    }

    /// The bytes that [`Source::prefix`] has; not copied where they are in memory.
    pub fn view(&self, offset: u64, len: usize) -> io::Result<Cow<'_, [u8]>> {
        let left = usize::try_from(self.len().saturating_sub(offset)).unwrap_or(usize::MAX);
        match self {
            Source::File(..) => self.prefix(offset, len).map(Cow::Owned),
            _ => self.slice(offset, len.min(left)).map(Cow::Borrowed),
        }
    }

    /// At most `len` bytes from `offset`; fewer at the end.
    pub fn prefix(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let left = usize::try_from(self.len().saturating_sub(offset)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len.min(left)];
        if !bytes.is_empty() {
            self.read_at(offset, &mut bytes)?;
        }
        Ok(bytes)
    }

    /// Brings `len` bytes from `offset` to guest address `guest`, which has never been written: whole pages are
    /// mapped or moved when offset and address agree modulo the page size, the ragged ends are copied.
    ///
    /// A mapped file is to stay as it is while the guest runs: replaced by renaming it may be (as linkers and package
    /// tools do), but truncated in place it takes the guest's pages with it.
    pub fn fill(&mut self, memory: &Memory, guest: u64, offset: u64, len: u64) -> io::Result<()> {
        let overflow = || io::Error::from(io::ErrorKind::InvalidInput);
        let end = guest.checked_add(len).ok_or_else(overflow)?;
        let first = guest.checked_next_multiple_of(PAGE).ok_or_else(overflow)?;
        let last = end - end % PAGE;
        let congruent = guest % PAGE == offset % PAGE;
        let whole = last.saturating_sub(first);
        if matches!(self, Source::Bytes(_)) || !congruent || whole < WORTH_MAPPING {
            return self.copy(memory, guest, offset, len);
        }
        // Ragged ends first: moved pages are gone from the scratch memory.
        let head = first - guest;
        self.copy(memory, guest, offset, head)?;
        self.copy(memory, last, offset + (last - guest), end - last)?;
        let moved = match self {
            Source::File(file, _) => memory.map_file(first, file, offset + head, whole),
            Source::Scratch(scratch) => memory.adopt(first, scratch, offset + head, whole),
            Source::Bytes(_) => Ok(()),
        };
        // A file system that cannot be mapped, a kernel without MREMAP_DONTUNMAP: copying always works.
        moved.or_else(|_| self.copy(memory, first, offset + head, whole))
    }

    /// As [`Source::fill`], but into huge pages: what is in a file is copied.
    pub fn fill_huge(&mut self, memory: &Memory, guest: u64, offset: u64, len: u64) -> io::Result<()> {
        if let Source::File(file, _) = self
            && memory.copy_file(guest, file, offset, len).is_ok()
        {
            return Ok(());
        }
        self.fill(memory, guest, offset, len)
    }

    fn copy(&self, memory: &Memory, guest: u64, offset: u64, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        if len == 0 {
            return Ok(());
        }
        match self {
            Source::File(file, _) => read_into(memory, guest, file, offset, len),
            _ => memory
                .ram()
                .write_slice(self.slice(offset, len)?, GuestAddress(guest))
                .map_err(io::Error::other),
        }
    }
}

/// Reads `len` bytes of `file` from `offset` straight into guest memory.
pub fn read_into(memory: &Memory, guest: u64, file: &File, offset: u64, len: usize) -> io::Result<()> {
    let mut target = memory
        .ram()
        .get_slice(GuestAddress(guest), len)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "guest memory ends before"))?;
    let mut reader = file;
    reader.seek(SeekFrom::Start(offset))?;
    reader.read_exact_volatile(&mut target).map_err(|error| match error {
        VolatileMemoryError::IOError(error) => ended(error),
        other => io::Error::other(other),
    })
}

/// A file that became shorter than it was, in words.
fn ended(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(error.kind(), "it ended while it was being read"),
        _ => error,
    }
}
