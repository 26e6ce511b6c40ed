//! The bytes of files: straight between the file and guest memory.

use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use base::files::{self, Speed};
use base::sys::iovec::{APPEND, Iovecs, NOWAIT};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;

use super::handles::Handle;
use super::server::{Call, LARGEST, Server};
use super::wire::write::{FROM_CACHE, KILL_SUIDGID};
use super::wire::{Answer, DONE, IN_HEADER, OUT_HEADER, Out, Reply, Stop, WRITE_IN, Words};

/// Bytes that one request copies between files at the most: nothing ends such a request early.
const COPY: u64 = 64 << 20;

impl Server {
    pub(super) fn read(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let (handle, offset, size) = (words.u64()?, words.u64()?, words.u32()?);
        let handle = self.handle(call, handle, Speed::Disk)?;
        let room = call.chain.writable().len().saturating_sub(OUT_HEADER);
        let size = room.min(size.min(LARGEST).into());
        check_range(offset, size)?;
        let parts = call.chain.writable().parts(OUT_HEADER, size);
        let mut into = Iovecs::guest(call.memory, parts.map(|part| (part.addr.0, part.len)))?;
        // What waits for a disk is done by a thread, from the beginning.
        let flags = if call.at_once && handle.speed != Speed::Memory { NOWAIT } else { 0 };
        let mut moved = 0u64;
        while moved < size {
            match into.read_at(handle.file.as_fd(), offset.saturating_add(moved), flags) {
                Ok(0) => break,
                Ok(bytes) => {
                    into.advance(bytes as u64);
                    moved = moved.saturating_add(bytes as u64);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) if flags != 0 => return Err(Stop::Waits),
                // What came before the fault is there.
                Err(_) if moved > 0 => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.counts.read_bytes.add(moved);
        Ok(Reply::Moved(moved))
    }

    pub(super) fn flush(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let handle = self.handle(call, words.u64()?, Speed::Disk)?;
        // Only others keep errors of writes for the end.
        if handle.speed == Speed::Far {
            drop(rustix::io::dup(&handle.file)?);
        }
        Ok(DONE)
    }

    pub(super) fn seek(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let (handle, offset, whence) = (words.u64()?, words.u64()?, words.u32()?);
        let handle = self.handle(call, handle, Speed::Memory)?;
        let to = match whence {
            3 => SeekFrom::Data(offset),
            4 => SeekFrom::Hole(offset),
            _ => return Err(Stop::Refused(Errno::INVAL)),
        };
        let at = rustix::fs::seek(&handle.file, to)?;
        Ok(Out::default().u64(at).reply())
    }

    pub(super) fn write(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        self.writable()?;
        let (handle, offset, size, how) = (words.u64()?, words.u64()?, words.u32()?, words.u32()?);
        let (_owner, flags) = (words.u64()?, words.u32()?);
        let handle = self.handle(call, handle, Speed::Memory)?;
        let size = u64::from(size);
        let ahead = IN_HEADER.saturating_add(WRITE_IN);
        if size > LARGEST.into() || size > call.chain.readable().len().saturating_sub(ahead) {
            return Err(Stop::Refused(Errno::INVAL));
        }
        check_range(offset, size)?;
        if how & KILL_SUIDGID != 0 {
            self.drop_privileges(&handle.file)?;
        }
        // What a program appends goes behind what others have appended meanwhile. Pages that the driver sends have their
        // place.
        let append = flags & OFlags::APPEND.bits() != 0 && how & FROM_CACHE == 0;
        let append = if append && !self.writeback.load(Ordering::Relaxed) { APPEND } else { 0 };
        let parts = call.chain.readable().parts(ahead, size);
        let mut from = Iovecs::guest(call.memory, parts.map(|part| (part.addr.0, part.len)))?;
        let mut moved = 0u64;
        while moved < size {
            match from.write_with(handle.file.as_fd(), offset.saturating_add(moved), append) {
                Ok(0) => break,
                Ok(bytes) => {
                    from.advance(bytes as u64);
                    moved = moved.saturating_add(bytes as u64);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) if moved > 0 => break,
                Err(error) => return Err(error.into()),
            }
        }
        self.counts.write_bytes.add(moved);
        Ok(Out::default().u32(u32::try_from(moved).unwrap_or(0)).u32(0).reply())
    }

    pub(super) fn sync_file(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let (handle, flags) = (words.u64()?, words.u32()?);
        let handle = self.handle(call, handle, Speed::Memory)?;
        if flags & 1 != 0 {
            rustix::fs::fdatasync(&handle.file)?;
        } else {
            rustix::fs::fsync(&handle.file)?;
        }
        Ok(DONE)
    }

    pub(super) fn allocate(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        self.writable()?;
        // Even in memory it takes its time.
        if call.at_once {
            return Err(Stop::Waits);
        }
        let (handle, offset, len, mode) = (words.u64()?, words.u64()?, words.u64()?, words.u32()?);
        let known = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
        let mode = FallocateFlags::from_bits(mode).filter(|mode| known.contains(*mode));
        let mode = mode.ok_or(Stop::Refused(Errno::OPNOTSUPP))?;
        let handle = self.handle(call, handle, Speed::Far)?;
        rustix::fs::fallocate(&handle.file, mode, offset, len)?;
        Ok(DONE)
    }

    /// Copies between two files, on the host: by sharing the bytes where its file system does that.
    pub(super) fn copy(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        self.writable()?;
        if call.at_once {
            return Err(Stop::Waits);
        }
        let (from, mut at, to_node) = (words.u64()?, words.u64()?, words.u64()?);
        let (to, mut to_at, len, flags) = (words.u64()?, words.u64()?, words.u64()?, words.u64()?);
        if flags != 0 {
            return Err(Stop::Refused(Errno::INVAL));
        }
        let (from, to) = (self.handle(call, from, Speed::Far)?, self.handles.get_of(to_node, to)?);
        // A program that wants more asks again.
        let len = usize::try_from(len.min(COPY)).unwrap_or(0);
        let moved = rustix::fs::copy_file_range(&from.file, Some(&mut at), &to.file, Some(&mut to_at), len)?;
        Ok(Out::default().u32(u32::try_from(moved).unwrap_or(0)).u32(0).reply())
    }

    /// The handle `number` of the node that the request is about; to be used at once only if what it leads to is as fast as
    /// `slowest`.
    pub(super) fn handle(&self, call: &Call<'_>, number: u64, slowest: Speed) -> Answer<Arc<Handle>> {
        let handle = self.handles.get_of(call.header.node, number)?;
        let fast = handle.speed == Speed::Memory || handle.speed == slowest;
        if call.at_once && !fast { Err(Stop::Waits) } else { Ok(handle) }
    }

    /// Takes from a file the rights that it gives to who runs it: someone without rights of their own changes it.
    pub(super) fn drop_privileges(&self, file: &OwnedFd) -> Answer<()> {
        self.writable()?;
        let mode = u32::from(files::about(file)?.stx_mode);
        // Without the right of the group to run it, the second bit is a lock of old.
        let group = if mode & 0o010 != 0 { 0o2000 } else { 0 };
        let gone = mode & (0o4000 | group);
        if gone != 0 {
            files::set_mode(file, mode & !gone)?;
        }
        Ok(())
    }
}

/// Refuses what ends behind the last byte that a file can have: the kernel takes some of these numbers for others.
fn check_range(offset: u64, len: u64) -> Answer<()> {
    match offset.checked_add(len).map(i64::try_from) {
        Some(Ok(_)) => Ok(()),
        _ => Err(Stop::Refused(Errno::INVAL)),
    }
}
