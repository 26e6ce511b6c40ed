//! The way in: bytes from the host for a guest.
//!
//! Nobody ever waits in read(2). A descriptor that was ready a moment ago need not be now: another process may share it,
//! and take what was there.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{Errno, ReadWriteFlags, preadv2, read};
use rustix::net::{RecvFlags, recv};

/// How a descriptor is kept from blocking its reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// A regular file has everything; a non-blocking descriptor answers at once.
    Plain,
    /// Asked not to block in each call, as sockets let one.
    Socket,
    /// The same for files that know it (pipes, since Linux 6.5).
    Flagged,
    /// It might block: looked at right before each read.
    Asked,
}

/// Bytes on their way from a descriptor.
#[derive(Debug)]
pub struct Inlet {
    from: OwnedFd,
    /// Found out by the first read: most guests read nothing.
    way: Option<Way>,
}

impl Inlet {
    /// A way in from `from`.
    pub fn new(from: OwnedFd) -> Inlet {
        Inlet { from, way: None }
    }

    /// Reads what is there, at most a buffer full; 0 is the end.
    ///
    /// # Errors
    /// `EAGAIN`: nothing is there. Else as the host answers.
    pub fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Errno> {
        let way = match self.way {
            Some(way) => way,
            None => *self.way.insert(way_of(self.from.as_fd())?),
        };
        match way {
            Way::Plain => read(&self.from, buffer),
            Way::Socket => recv(&self.from, buffer, RecvFlags::DONTWAIT).map(|(n, _)| n),
            Way::Flagged => {
                // An offset of all ones: where the file stands.
                let asked =
                    preadv2(&self.from, &mut [IoSliceMut::new(buffer)], u64::MAX, ReadWriteFlags::NOWAIT);
                match asked {
                    Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                        self.way = Some(Way::Asked);
                        self.read(buffer)
                    }
                    answer => answer,
                }
            }
            Way::Asked if !can_read(self.from.as_fd()) => Err(Errno::AGAIN),
            Way::Asked => read(&self.from, buffer),
        }
    }
}

impl AsFd for Inlet {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.from.as_fd()
    }
}

fn way_of(fd: BorrowedFd<'_>) -> Result<Way, Errno> {
    Ok(match FileType::from_raw_mode(fstat(fd)?.st_mode) {
        FileType::RegularFile => Way::Plain,
        _ if fcntl_getfl(fd)?.contains(OFlags::NONBLOCK) => Way::Plain,
        FileType::Socket => Way::Socket,
        _ => Way::Flagged,
    })
}

fn can_read(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    // An error counts: the read will name it.
    !matches!(poll(&mut fds, Some(&Timespec::default())), Ok(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::fcntl_dupfd_cloexec;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use rustix::pipe::pipe;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    /// What a read gives that must not wait: in a thread of its own, so that waiting is a failure and no standstill.
    fn at_once(mut inlet: Inlet) -> (Inlet, Result<Vec<u8>, Errno>) {
        let (tell, told) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 16];
            let answer = inlet.read(&mut buffer).map(|n| buffer[..n].to_vec());
            let _ = tell.send((inlet, answer));
        });
        told.recv_timeout(Duration::from_secs(20)).expect("the reader waits")
    }

    #[test]
    fn what_another_reader_has_taken_is_not_waited_for() {
        let socket = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        for (from, to) in [pipe().unwrap(), socket] {
            let shared = fcntl_dupfd_cloexec(&from, 0).unwrap();
            let (inlet, answer) = at_once(Inlet::new(from));
            assert_eq!(answer, Err(Errno::AGAIN));
            rustix::io::write(&to, b"words").unwrap();
            let (inlet, answer) = at_once(inlet);
            assert_eq!(answer.unwrap(), b"words");
            assert!(
                !fcntl_getfl(&shared).unwrap().contains(OFlags::NONBLOCK),
                "the others' reads still wait"
            );
            // As where the kernel knows no other way.
            let (inlet, answer) = at_once(Inlet { way: Some(Way::Asked), ..inlet });
            assert_eq!(answer, Err(Errno::AGAIN));
            drop(to);
            assert_eq!(at_once(inlet).1.unwrap(), b"", "the end");
        }
    }

    #[test]
    fn files_and_devices_are_read_like_any_other() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, "text").unwrap();
        for (path, text) in [(file.path(), &b"text"[..]), (std::path::Path::new("/dev/null"), b"")] {
            let mut inlet = Inlet::new(std::fs::File::open(path).unwrap().into());
            let mut buffer = [0; 16];
            let n = inlet.read(&mut buffer).unwrap();
            assert_eq!(&buffer[..n], text, "{}", path.display());
        }
    }
}
