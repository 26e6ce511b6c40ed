//! Lists of pieces of guest RAM for the kernel to read from and write to, all at once or a part at a time.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::memory::Memory;

/// The most pieces that the kernel takes in one call (`UIO_MAXIOV`).
const MOST: usize = 1024;

/// Of the flags of [`Iovecs::read_at`]: what would wait is refused (`EAGAIN`).
pub const NOWAIT: i32 = libc::RWF_NOWAIT;
/// Of the flags of [`Iovecs::write_with`]: behind the end of the file, wherever that is.
pub const APPEND: i32 = libc::RWF_APPEND;

/// Aligned as any host wants it for direct I/O.
#[repr(align(4096))]
struct Zeros([u8; 64 << 10]);
static ZEROS: Zeros = Zeros([0; 64 << 10]);

/// Memory of ours that stands in for guest RAM in one step.
struct Bounce {
    /// What it is aligned to, and room for that.
    bytes: Vec<u8>,
    /// The aligned part.
    piece: [libc::iovec; 1],
    /// What the kernel has put there belongs into guest RAM.
    read: bool,
}

/// Pieces of guest RAM, or zeros, in the kernel's form.
pub struct Iovecs {
    list: Vec<libc::iovec>,
    /// The first one that has not been moved.
    at: usize,
    /// The one before which the next step ends.
    stop: usize,
    bounce: Option<Bounce>,
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
        Ok(Iovecs::of(list.collect::<io::Result<_>>()?, Some(memory.clone())))
    }

    /// `len` zeros, only to be written from.
    pub fn zeros(len: u64) -> Iovecs {
        let mut left = len;
        let piece = move || {
            let len = left.min(ZEROS.0.len() as u64);
            left -= len;
            let iov_len = usize::try_from(len).unwrap_or(0);
            (len > 0).then(|| libc::iovec { iov_base: ZEROS.0.as_ptr().cast_mut().cast(), iov_len })
        };
        Iovecs::of(std::iter::from_fn(piece).collect(), None)
    }

    fn of(list: Vec<libc::iovec>, memory: Option<Memory>) -> Iovecs {
        Iovecs { list, at: 0, stop: usize::MAX, bounce: None, _memory: memory }
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

    /// What the next step moves, if nothing bounces.
    fn step(&self) -> &[libc::iovec] {
        let stop = self.stop.min(self.list.len());
        let step = self.list.get(self.at..stop).unwrap_or_default();
        step.get(..MOST).unwrap_or(step)
    }

    /// What the kernel takes in the next call: pointer and count. It stays where it is until the next `advance`.
    pub(super) fn raw(&self) -> (*const libc::iovec, u32) {
        let pieces = self.bounce.as_ref().map_or(self.step(), |bounce| &bounce.piece);
        (pieces.as_ptr(), u32::try_from(pieces.len()).unwrap_or(0))
    }

    /// The next step may move all that is left.
    pub fn unlimit(&mut self) {
        self.stop = usize::MAX;
        self.bounce = None;
    }

    /// The next step moves `len` bytes at the most.
    pub fn limit(&mut self, len: u64) {
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        let mut at = self.at;
        while let Some(piece) = self.list.get_mut(at) {
            if left < piece.iov_len {
                if left > 0 {
                    let tail = libc::iovec {
                        iov_base: piece.iov_base.wrapping_byte_add(left),
                        iov_len: piece.iov_len - left,
                    };
                    piece.iov_len = left;
                    at = self.insert(at, tail);
                }
                break;
            }
            left -= piece.iov_len;
            at += 1;
        }
        self.stop = at;
    }

    /// Puts `tail` behind the piece at `at`; where it is now. What was moved makes room for it: a disk that was written to
    /// in patches would otherwise have a list grow by a piece for each sector of a request.
    fn insert(&mut self, at: usize, tail: libc::iovec) -> usize {
        let Some(moved) = self.at.checked_sub(1) else {
            self.list.insert(at + 1, tail);
            return at + 1;
        };
        self.list.copy_within(self.at..=at, moved);
        self.at = moved;
        if let Some(place) = self.list.get_mut(at) {
            *place = tail;
        }
        at
    }

    /// Whether each piece of the next step begins and ends at a multiple of `align` bytes.
    pub fn aligned(&self, align: u64) -> bool {
        let whole = |bytes: usize| (bytes as u64).is_multiple_of(align);
        self.step().iter().all(|piece| whole(piece.iov_base.addr()) && whole(piece.iov_len))
    }

    /// The next step moves at most `most` bytes, through aligned memory of ours; `write`: out of guest RAM.
    pub fn bounce(&mut self, most: u64, write: bool) {
        let len = self.len().min(most);
        self.limit(len);
        let len = usize::try_from(len).unwrap_or(0);
        let mut bytes = vec![0; len.saturating_add(4096)];
        let head = bytes.as_ptr().align_offset(4096);
        let Some(part) = bytes.get_mut(head..).and_then(|rest| rest.get_mut(..len)) else { return };
        if write {
            self.copy_out(part);
        }
        let piece = [libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: len }];
        self.bounce = Some(Bounce { bytes, piece, read: !write });
    }

    /// The next bytes as slices, as many as cover `len`.
    fn slices(&self, len: usize) -> impl Iterator<Item = VolatileSlice<'_>> {
        let mut left = len;
        self.rest().iter().map_while(move |piece| {
            let len = piece.iov_len.min(left);
            left -= len;
            // SAFETY: each piece is mapped memory of its length, which lives as long as `self`; it is guest RAM, only
            // reached by the kernel and by volatile accesses, or zeros, of which nothing but copies are made.
            (len > 0).then(|| unsafe { VolatileSlice::new(piece.iov_base.cast(), len) })
        })
    }

    /// Copies the next bytes to `to`; it goes on where it was until the next `advance`.
    pub fn copy_out(&self, to: &mut [u8]) {
        let mut done = 0;
        for slice in self.slices(to.len()) {
            done += slice.copy_to(to.get_mut(done..).unwrap_or_default());
        }
    }

    /// Copies `from` over the next bytes.
    pub fn copy_in(&mut self, from: &[u8]) {
        let mut done = 0;
        for slice in self.slices(from.len()) {
            let rest = from.get(done..).unwrap_or_default();
            slice.copy_from(rest);
            done += slice.len().min(rest.len());
        }
    }

    /// Takes note that the first `moved` bytes are done.
    pub fn advance(&mut self, moved: u64) {
        let mut moved = usize::try_from(moved).unwrap_or(usize::MAX);
        if let Some(bounce) = self.bounce.take()
            && bounce.read
        {
            let head = bounce.piece[0].iov_base.addr() - bounce.bytes.as_ptr().addr();
            let got = bounce.bytes.get(head..).and_then(|rest| rest.get(..moved));
            self.copy_in(got.unwrap_or_default());
        }
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

    /// The same with the given `RWF_` flags.
    ///
    /// # Errors
    /// As `pwritev2(2)`.
    pub fn write_with(&self, file: BorrowedFd<'_>, offset: u64, flags: i32) -> io::Result<usize> {
        let (list, count) = self.raw();
        let (count, offset) = (count.cast_signed(), offset.cast_signed());
        // SAFETY: the list is alive, and each piece is mapped readable memory of its length.
        let moved = unsafe { libc::pwritev2(file.as_raw_fd(), list, count, offset, flags) };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_that_is_cut_at_every_sector_does_not_grow() {
        let memory = Memory::new(&[(0, 1 << 20)]).unwrap();
        let parts = [(0, 0x1_0000), (0x2_0000, 0x300), (0x3_0000, 0xfd00)];
        let places = |list: &Iovecs| {
            let whole = list.step().iter();
            whole
                .flat_map(|piece| (0..piece.iov_len).map(|at| piece.iov_base.addr() + at))
                .collect::<Vec<_>>()
        };
        let mut list = Iovecs::guest(&memory, parts.into_iter()).unwrap();
        let (all, mut seen, mut steps) = (places(&list), Vec::<usize>::new(), (0..4).cycle());
        while !list.is_empty() {
            list.unlimit();
            let sector = 512 - seen.len() as u64 % 512;
            list.limit(sector);
            // Now and then the kernel moves less than it was given, or nothing at all.
            let step = places(&list);
            assert_eq!(step.len() as u64, list.len().min(sector));
            let moved = step.len().min([512, 100, 0, 511][steps.next().unwrap()]);
            seen.extend(&step[..moved]);
            list.advance(moved as u64);
            assert!(list.list.len() <= parts.len() + 1, "{} pieces", list.list.len());
        }
        assert!(seen == all, "every byte once, in order");
    }
}
