//! Sockets and frames straight from and to guest RAM, without a copy of our own in between.

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsFd, AsRawFd};

use super::iovec::Iovecs;

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

/// Reads one frame from a tap.
///
/// # Errors
/// As `readv(2)`.
pub fn read(tap: impl AsFd, into: &Iovecs) -> io::Result<usize> {
    let (list, count) = into.raw();
    // SAFETY: the list is alive, and each piece is mapped writable memory of its length that nobody refers to: guest RAM is
    // only reached by the kernel and by volatile accesses.
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
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use vm_memory::{Bytes, GuestAddress};

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
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
