//! One job of a disk, and how it goes on after each answer of the kernel.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use rustix::io::Errno;

use super::Layers;
use crate::memory::Memory;
use crate::sys::iovec::Iovecs;

/// Steps that a job may take on the lane of its device. A guest can make jobs of tens of thousands.
pub const STEPS: usize = 32;

/// What to do to a range of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Read it into guest memory.
    Read,
    /// Write it from guest memory.
    Write,
    /// Put everything written so far on stable storage.
    Flush,
    /// The content is wanted no more: advice, which a file system may not take.
    Discard,
    /// Have it read as zeros.
    Zero {
        /// It may lose its place on the disk.
        unmap: bool,
    },
}

/// A job under way.
pub struct Job {
    pub(crate) action: Action,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) iovecs: Iovecs,
}

impl Job {
    pub(super) fn new(
        action: Action,
        offset: u64,
        len: u64,
        memory: &Memory,
        parts: impl Iterator<Item = (u64, u32)>,
    ) -> io::Result<Job> {
        let iovecs = Iovecs::guest(memory, parts)?;
        let moves = matches!(action, Action::Read | Action::Write);
        if moves && iovecs.len() != len {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "range and memory differ in length"));
        }
        Ok(Job { action, offset, len, iovecs })
    }

    /// The `fallocate` mode that does it; `None` if another call does.
    pub(crate) fn mode(&self) -> Option<FallocateFlags> {
        match self.action {
            Action::Discard | Action::Zero { unmap: true } => {
                Some(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE)
            }
            Action::Zero { unmap: false } => Some(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE),
            Action::Read | Action::Write | Action::Flush => None,
        }
    }

    /// Does the next step in this thread; bytes moved.
    fn step(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        match (self.action, self.mode()) {
            (Action::Read, _) => self.iovecs.read_at(file, self.offset, 0),
            (Action::Write, _) => self.iovecs.write_at(file, self.offset),
            (_, Some(mode)) => Ok(fallocate(file, mode, self.offset, self.len).map(|()| 0)?),
            (_, None) => Ok(fdatasync(file).map(|()| 0)?),
        }
    }

    /// Does all of it in this thread.
    pub(super) fn run(mut self, layers: &Layers) -> io::Result<()> {
        loop {
            let file = layers.prepare(&mut self);
            let answer = self.step(file);
            if let Some(end) = self.advance(answer, layers) {
                return end;
            }
        }
    }

    /// Does what needs no waiting: all of it if `prompt`, or else a read of what the page cache holds. The job comes back
    /// if that was not all, or is more than a few steps: an overlay that was written to in patches has a step for each.
    pub(super) fn try_run(mut self, layers: &Layers, prompt: bool) -> Result<io::Result<()>, Job> {
        for _ in 0..STEPS {
            let file = layers.prepare(&mut self);
            let answer = match self.action {
                _ if prompt => self.step(file),
                Action::Read => match self.iovecs.read_at(file, self.offset, libc::RWF_NOWAIT) {
                    Ok(moved @ 1..) => Ok(moved),
                    _ => break,
                },
                _ => break,
            };
            if let Some(end) = self.advance(answer, layers) {
                return Ok(end);
            }
        }
        Err(self)
    }

    /// Takes the kernel's answer to a step on the file that `layers` gave for it; `None` when another step is due.
    pub(crate) fn advance(&mut self, answer: io::Result<usize>, layers: &Layers) -> Option<io::Result<()>> {
        match (answer, self.action) {
            (Err(error), _) if error.kind() == io::ErrorKind::Interrupted => None,
            (Err(error), _) => self.refused(error),
            (Ok(_), Action::Flush | Action::Discard) => Some(Ok(())),
            (Ok(_), Action::Zero { .. }) => {
                layers.changed(self.offset, self.len);
                Some(Ok(()))
            }
            // The file has become shorter than it was when it was opened.
            (Ok(0), Action::Read) if self.len > 0 => Some(Err(io::ErrorKind::UnexpectedEof.into())),
            (Ok(0), Action::Write) if self.len > 0 => Some(Err(io::ErrorKind::WriteZero.into())),
            (Ok(moved), action) => {
                let moved = (moved as u64).min(self.len);
                if action == Action::Write {
                    layers.changed(self.offset, moved);
                }
                self.moved(moved);
                (self.len == 0).then_some(Ok(()))
            }
        }
    }

    /// Goes on behind the next `bytes`.
    pub(super) fn moved(&mut self, bytes: u64) {
        self.iovecs.advance(bytes);
        self.offset = self.offset.saturating_add(bytes);
        self.len = self.len.saturating_sub(bytes);
    }

    /// File systems and devices that cannot do it say so in several ways: then a discard is done, being advice, and
    /// zeros are written.
    fn refused(&mut self, error: io::Error) -> Option<io::Result<()>> {
        let cannot = [Errno::OPNOTSUPP, Errno::INVAL, Errno::NOSYS, Errno::NODEV]
            .iter()
            .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()));
        match self.action {
            Action::Discard if cannot => Some(Ok(())),
            Action::Zero { .. } if cannot => {
                self.action = Action::Write;
                self.iovecs = Iovecs::zeros(self.len);
                None
            }
            _ => Some(Err(error)),
        }
    }
}
