//! Sockets and frames straight from and to guest RAM, without a copy of our own in between.

use std::ffi::c_int;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::AtomicU8;

use super::iovec::Iovecs;

/// Where bytes go that nobody wants again. The kernel writes here from any thread.
static BIN: [AtomicU8; 64 << 10] = [const { AtomicU8::new(0) }; 64 << 10];

/// `SO_PEEK_OFF`, asm-generic/socket.h.
const SO_PEEK_OFF: c_int = 42;

/// Pieces of the bin, `len` bytes in all, to be read into before the rest of a list.
pub(super) fn bin(len: u64) -> impl Iterator<Item = libc::iovec> {
    let mut left = usize::try_from(len).unwrap_or(usize::MAX);
    std::iter::from_fn(move || {
        let len = left.min(BIN.len());
        left -= len;
        (len > 0).then(|| libc::iovec { iov_base: BIN.as_ptr().cast_mut().cast(), iov_len: len })
    })
}

fn header(list: &Iovecs) -> libc::msghdr {
    let (list, count) = list.raw();
    // SAFETY: the structure is plain data for which zeros are a value.
    let mut header: libc::msghdr = unsafe { zeroed() };
    header.msg_iov = list.cast_mut();
    header.msg_iovlen = count as usize;
    header
}

fn moved(answer: isize) -> io::Result<usize> {
    usize::try_from(answer).map_err(|_| io::Error::last_os_error())
}

/// Looks at what a stream socket has received, from its beginning or from its peek offset, and leaves it there. It
/// never waits.
///
/// # Errors
/// As `recvmsg(2)`; `EAGAIN` if there is nothing.
pub fn peek(socket: impl AsFd, into: &Iovecs) -> io::Result<usize> {
    let mut header = header(into);
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the list is alive, and each piece is mapped writable memory of its length that nobody refers to: guest
    // RAM and the bin are only reached by the kernel and by volatile or atomic accesses.
    moved(unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &mut header, flags) })
}

/// Removes the first `len` bytes that a TCP socket has received, unseen; how many it did remove.
///
/// # Errors
/// As `recv(2)`.
pub fn discard(socket: impl AsFd, len: usize) -> io::Result<usize> {
    let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
    // SAFETY: with MSG_TRUNC a TCP socket counts the bytes and copies none (tcp(7)), so the pointer is not used.
    moved(unsafe { libc::recv(socket.as_fd().as_raw_fd(), std::ptr::null_mut(), len, flags) })
}

/// Sends what the list holds, as much of it as the socket takes now.
///
/// # Errors
/// As `sendmsg(2)`; `EAGAIN` if it takes nothing.
pub fn send(socket: impl AsFd, from: &Iovecs) -> io::Result<usize> {
    let header = header(from);
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the list is alive, and each piece is mapped readable memory of its length.
    moved(unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &header, flags) })
}

/// Sets where the next peek begins, counted from the first byte that has not been removed; it then moves on by itself.
///
/// # Errors
/// The kernel knows it only for other sockets (TCP: since Linux 6.9, over IPv6 since 6.11).
pub fn set_peek_offset(socket: impl AsFd, offset: i32) -> io::Result<()> {
    let len = libc::socklen_t::try_from(size_of::<c_int>()).map_err(io::Error::other)?;
    let value = (&raw const offset).cast();
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the value is alive during the call, which reads `len` bytes of it.
    let answer = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, SO_PEEK_OFF, value, len) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Reads one frame from a tap.
///
/// # Errors
/// As `readv(2)`.
pub fn read(tap: impl AsFd, into: &Iovecs) -> io::Result<usize> {
    let (list, count) = into.raw();
    // SAFETY: as for `peek`.
    moved(unsafe { libc::readv(tap.as_fd().as_raw_fd(), list, count.cast_signed()) })
}

/// Writes one frame to a tap.
///
/// # Errors
/// As `writev(2)`.
pub fn write(tap: impl AsFd, from: &Iovecs) -> io::Result<usize> {
    let (list, count) = from.raw();
    // SAFETY: as for `send`.
    moved(unsafe { libc::writev(tap.as_fd().as_raw_fd(), list, count.cast_signed()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use vm_memory::{Bytes, GuestAddress};

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    #[test]
    fn received_bytes_stay_until_they_are_discarded() {
        let (mut far, near) = pair();
        let memory = Memory::new(&[(0, 1 << 20)]).unwrap();
        far.write_all(b"abcdef").unwrap();
        near.peek(&mut [0; 6]).unwrap();
        let into = Iovecs::behind(2, &memory, [(0x1000, 2), (0x3000, 100)].into_iter()).unwrap();
        assert_eq!(peek(&near, &into).unwrap(), 6);
        assert_eq!(memory.ram().read_obj::<[u8; 3]>(GuestAddress(0x1000)).unwrap(), *b"cd\0");
        assert_eq!(memory.ram().read_obj::<[u8; 3]>(GuestAddress(0x3000)).unwrap(), *b"ef\0");
        assert_eq!(discard(&near, 4).unwrap(), 4);
        let mut rest = [0; 2];
        (&near).read_exact(&mut rest).unwrap();
        assert_eq!(rest, *b"ef");
    }

    #[test]
    fn guest_memory_is_sent_in_order() {
        let (mut far, near) = pair();
        let memory = Memory::new(&[(0, 1 << 20)]).unwrap();
        memory.ram().write_slice(b"worldhello ", GuestAddress(0x2000)).unwrap();
        let from = Iovecs::guest(&memory, [(0x2005, 6), (0x2000, 5)].into_iter()).unwrap();
        assert_eq!(send(&near, &from).unwrap(), 11);
        let mut said = [0; 11];
        far.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"hello world");
    }
}
