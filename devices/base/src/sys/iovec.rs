//! Lists of pieces of guest RAM for the kernel to read from and write to.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::memory::Memory;

/// The most pieces that the kernel takes in one call (`UIO_MAXIOV`).
const MOST: usize = 1024;

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Pieces of guest RAM, or zeros, in the kernel's form.
pub struct Iovecs {
    list: Vec<libc::iovec>,
    /// The first one that has not been moved.
    at: usize,
    /// Keeps the RAM that the list points to mapped; none is needed for zeros.
    _memory: Option<Memory>,
}

// SAFETY: the list points into guest RAM, which any thread may use (it is only reached by the kernel and by volatile
// accesses), and which `_memory` keeps mapped wherever the list goes; or into a static.
unsafe impl Send for Iovecs {}

impl Iovecs {
    /// The pieces of guest memory named by address and length.
    ///
    /// # Errors
    /// One is not in guest memory.
    pub fn guest(memory: &Memory, parts: impl Iterator<Item = (u64, u32)>) -> io::Result<Iovecs> {
        let list = parts.map(|(addr, len)| {
            let len = usize::try_from(len).map_err(io::Error::other)?;
            let slice = GuestMemoryBackend::get_slice(memory.ram(), GuestAddress(addr), len);
            let slice = slice.map_err(|cause| io::Error::new(io::ErrorKind::InvalidInput, cause))?;
            Ok(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: len })
        });
        Ok(Iovecs { list: list.collect::<io::Result<_>>()?, at: 0, _memory: Some(memory.clone()) })
    }

    /// `len` zeros, only to be written from.
    pub fn zeros(len: u64) -> Iovecs {
        let mut left = len;
        let piece = move || {
            let len = left.min(ZEROS.len() as u64);
            left -= len;
            let iov_len = usize::try_from(len).unwrap_or(0);
            (len > 0).then(|| libc::iovec { iov_base: ZEROS.as_ptr().cast_mut().cast(), iov_len })
        };
        Iovecs { list: std::iter::from_fn(piece).collect(), at: 0, _memory: None }
    }

    /// Bytes left to move.
    pub fn len(&self) -> u64 {
        self.rest().iter().map(|piece| piece.iov_len as u64).sum()
    }

    /// Whether all has been moved.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn rest(&self) -> &[libc::iovec] {
        self.list.get(self.at..).unwrap_or_default()
    }

    /// What the kernel takes in the next call: pointer and count. It stays where it is until the next `advance`.
    pub(super) fn raw(&self) -> (*const libc::iovec, u32) {
        let count = self.rest().len().min(MOST);
        (self.rest().as_ptr(), u32::try_from(count).unwrap_or(0))
    }

    /// Takes note that the first `moved` bytes are done.
    pub fn advance(&mut self, moved: u64) {
        let mut moved = usize::try_from(moved).unwrap_or(usize::MAX);
        while let Some(piece) = self.list.get_mut(self.at) {
            let step = moved.min(piece.iov_len);
            piece.iov_base = piece.iov_base.wrapping_byte_add(step);
            piece.iov_len -= step;
            moved -= step;
            if piece.iov_len > 0 {
                return;
            }
            self.at += 1;
        }
    }

    /// Reads from `file` at `offset` with the given `RWF_` flags; bytes moved, maybe fewer than there is room for.
    ///
    /// # Errors
    /// As `preadv2(2)`.
    pub fn read_at(&self, file: BorrowedFd<'_>, offset: u64, flags: i32) -> io::Result<usize> {
        let (list, count) = self.raw();
        let (count, offset) = (count.cast_signed(), offset.cast_signed());
        // SAFETY: the list is alive, and each piece is mapped writable memory of its length that nobody refers to:
        // guest RAM is only reached by volatile accesses. Zeros are never read into: only writes are made of them.
        let moved = unsafe { libc::preadv2(file.as_raw_fd(), list, count, offset, flags) };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// Writes to `file` at `offset`; bytes moved, maybe fewer than there are.
    ///
    /// # Errors
    /// As `pwritev(2)`.
    pub fn write_at(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let (list, count) = self.raw();
        let (count, offset) = (count.cast_signed(), offset.cast_signed());
        // SAFETY: the list is alive, and each piece is mapped readable memory of its length.
        let moved = unsafe { libc::pwritev(file.as_raw_fd(), list, count, offset) };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// Receives from `socket` without waiting; bytes moved, 0 at the end of the stream.
    ///
    /// # Errors
    /// As `recvmsg(2)`; `WouldBlock`: nothing is there.
    pub fn receive(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut message = self.message();
        // SAFETY: the list is alive, and each piece is mapped writable memory of its length that nobody refers to (see
        // `read_at`).
        let moved = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// Sends to `socket` without waiting; bytes moved, maybe fewer than there are.
    ///
    /// # Errors
    /// As `sendmsg(2)`; `WouldBlock`: nothing is taken now.
    pub fn send(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let message = self.message();
        // SAFETY: the list is alive, and each piece is mapped readable memory of its length.
        let moved = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    fn message(&self) -> libc::msghdr {
        let (list, count) = self.raw();
        // SAFETY: all-zero is a valid `msghdr`: no address, no pieces, no ancillary data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = list.cast_mut();
        message.msg_iovlen = usize::try_from(count).unwrap_or(0);
        message
    }
}
