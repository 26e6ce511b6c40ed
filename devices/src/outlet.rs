//! The way out: bytes a guest has written, kept until the host takes them.
//!
//! Nobody ever waits in write(2): a writer that has nowhere to go keeps its bytes here and is told so, and a chip
//! with flow control then tells its guest to wait.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use base::{Fail, Result, Why};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};
use rustix::net::{SendFlags, send};

/// Bytes that may wait before a guest is told to wait itself.
pub const ROOM: usize = 64 << 10;
/// Bytes that may wait at all: a guest that ignores flow control must not eat the host's memory.
const LIMIT: usize = 1 << 20;
/// Bytes that go out before their line is complete.
const LONG_LINE: usize = 512;
/// Bytes in one write: as many as fit into a pipe that says it has room (`PIPE_BUF`).
const CHUNK: usize = 4096;
/// Bytes in one write to anything else that says it has room: a terminal says so from 256 free bytes on.
const SMALL_CHUNK: usize = 256;
/// Spans of patience at the end: a pipe that takes its least in each of them, a page, takes all that a guest which
/// heeds flow control leaves behind.
const SPANS: u32 = 20;

/// How a descriptor is kept from blocking its writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Patience {
    /// A regular file: takes everything at once.
    Taking,
    /// Non-blocking: answers at once.
    Answering,
    /// Asked not to block in each call, as sockets let one.
    Socket,
    /// The same for files that know it (pipes, since Linux 6.5); others are [`Patience::Asked`] from then on.
    Flagged(usize),
    /// It might block: asked before each write, which then has at most this many bytes.
    Asked(usize),
}

/// What came of a [`Outlet::flush`].
#[derive(Debug)]
pub enum Flow {
    /// All is written.
    Drained,
    /// The host takes no more at present.
    Stuck,
    /// Nobody will ever read it: the other end is closed. From now on everything is dropped.
    Closed,
    /// The host failed (a full disk). From now on everything is dropped.
    Broken(io::Error),
}

/// Why nothing is written any more. Kept to the end: whoever heard of it first may not have been listened to.
#[derive(Clone, Copy, Debug)]
enum Gone {
    /// The other end is closed.
    Closed,
    /// The host failed.
    Broken(Errno),
}

impl From<Gone> for Flow {
    fn from(gone: Gone) -> Flow {
        match gone {
            Gone::Closed => Flow::Closed,
            Gone::Broken(error) => Flow::Broken(error.into()),
        }
    }
}

/// Bytes on their way to a descriptor.
#[derive(Debug)]
pub struct Outlet {
    to: OwnedFd,
    patience: Patience,
    waiting: VecDeque<u8>,
    line_ended: bool,
    gone: Option<Gone>,
    forgetful: bool,
    lost: u64,
}

impl Outlet {
    /// A way out to `to`.
    ///
    /// # Errors
    /// The host does not tell what kind of file it is.
    pub fn new(to: OwnedFd) -> io::Result<Outlet> {
        let patience = match FileType::from_raw_mode(fstat(&to)?.st_mode) {
            FileType::RegularFile => Patience::Taking,
            _ if fcntl_getfl(&to)?.contains(OFlags::NONBLOCK) => Patience::Answering,
            FileType::Socket => Patience::Socket,
            FileType::Fifo => Patience::Flagged(CHUNK),
            _ => Patience::Flagged(SMALL_CHUNK),
        };
        let waiting = VecDeque::new();
        Ok(Outlet { to, patience, waiting, line_ended: false, gone: None, forgetful: false, lost: 0 })
    }

    /// Never asks a guest to wait: what nobody reads is forgotten, the oldest first. For a pseudo-terminal,
    /// which may have no reader yet.
    #[must_use]
    pub fn forgetful(mut self) -> Outlet {
        self.forgetful = true;
        self
    }

    /// The descriptor, to be waited for while the outlet is stuck.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.to.as_fd()
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether a guest may go on writing.
    pub fn has_room(&self) -> bool {
        self.forgetful || self.waiting.len() < ROOM
    }

    /// Whether it is time for a [`Outlet::flush`]: a line is complete, or long.
    pub fn is_due(&self) -> bool {
        self.line_ended || self.waiting.len() >= LONG_LINE
    }

    /// Bytes that had to be dropped because the guest wrote on although it was told to wait, or because nobody
    /// read them.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Takes a byte of the guest's.
    pub fn push(&mut self, byte: u8) {
        if self.gone.is_some() {
            return;
        }
        if self.forgetful && self.waiting.len() >= ROOM {
            self.waiting.pop_front();
            self.lost = self.lost.saturating_add(1);
        } else if self.waiting.len() >= LIMIT {
            self.lost = self.lost.saturating_add(1);
            return;
        }
        self.waiting.push_back(byte);
        self.line_ended |= byte == b'\n';
    }

    /// Writes what the host takes without anybody waiting.
    pub fn flush(&mut self) -> Flow {
        let flow = match self.write_out() {
            Ok(true) => Flow::Drained,
            Ok(false) => Flow::Stuck,
            Err(gone) => {
                self.gone = Some(gone);
                self.waiting.clear();
                gone.into()
            }
        };
        if self.waiting.is_empty() {
            self.line_ended = false;
        }
        flow
    }

    /// Whether all is written.
    fn write_out(&mut self) -> Result<bool, Gone> {
        loop {
            let (front, _) = self.waiting.as_slices();
            let asked = front.len().min(ROOM);
            if asked == 0 {
                return Ok(true);
            }
            match attempt(self.to.as_fd(), &mut self.patience, front.get(..asked).unwrap_or(front)) {
                Ok(written) => {
                    self.waiting.drain(..written.min(asked));
                    // A full pipe takes a part: asking again would only cost a call to hear `EAGAIN`.
                    let greedy = !matches!(self.patience, Patience::Taking | Patience::Asked(_));
                    if written == 0 || (written < asked && greedy) {
                        return Ok(false);
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                // The reader has gone, or the terminal has been hung up.
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(Gone::Closed),
                Err(Errno::IO) if self.patience != Patience::Taking => return Err(Gone::Closed),
                Err(error) => return Err(Gone::Broken(error)),
            }
        }
    }

    /// Writes everything, waiting for the host as long as it takes something within each span of `patience`, and for
    /// [`SPANS`] of them at most. Never [`Flow::Stuck`]; what went wrong earlier is told again.
    ///
    /// # Errors
    /// The host has not taken all in this time; the rest is lost.
    pub fn finish(&mut self, name: &str, patience: Duration) -> Result<Flow> {
        if self.lost > 0 && !self.forgetful {
            log::warn!(target: "guest", "{name}: {} bytes lost: the guest wrote on although it was told to wait", self.lost);
        }
        self.finish_by(name, patience, Instant::now() + patience.saturating_mul(SPANS))
    }

    fn finish_by(&mut self, name: &str, patience: Duration, end: Instant) -> Result<Flow> {
        let late = |left: usize, cause: &'static str| {
            Err(Fail::new(Why::Host, format!("write the last {left} bytes of {name}")).because(cause))
        };
        while matches!(self.flush(), Flow::Stuck) {
            if !can_write(self.to.as_fd(), patience) {
                return late(self.waiting.len(), "nobody takes them");
            }
            if Instant::now() >= end {
                return late(self.waiting.len(), "they are taken too slowly");
            }
        }
        Ok(self.gone.map_or(Flow::Drained, Flow::from))
    }
}

/// Writes what `fd` takes without making its writer wait.
fn attempt(fd: BorrowedFd<'_>, patience: &mut Patience, bytes: &[u8]) -> Result<usize, Errno> {
    match *patience {
        Patience::Taking | Patience::Answering => rustix::io::write(fd, bytes),
        Patience::Socket => send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
        Patience::Flagged(most) => {
            // An offset of all ones: where the file stands.
            match pwritev2(fd, &[IoSlice::new(bytes)], u64::MAX, ReadWriteFlags::NOWAIT) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    *patience = Patience::Asked(most);
                    attempt(fd, patience, bytes)
                }
                answer => answer,
            }
        }
        Patience::Asked(_) if !can_write(fd, Duration::ZERO) => Err(Errno::AGAIN),
        Patience::Asked(most) => rustix::io::write(fd, bytes.get(..most).unwrap_or(bytes)),
    }
}

/// Waits at most `patience` for `fd` to take something. An error counts: the write will name it.
fn can_write(fd: BorrowedFd<'_>, patience: Duration) -> bool {
    let limit = Timespec::try_from(patience).ok();
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    matches!(poll(&mut fds, limit.as_ref()), Ok(ready) if ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe, pipe_with};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn push(outlet: &mut Outlet, bytes: &[u8]) {
        bytes.iter().for_each(|byte| outlet.push(*byte));
    }

    fn read_all(from: &OwnedFd) -> Vec<u8> {
        let mut buffer = vec![0; 2 * LIMIT];
        let n = rustix::io::read(from, &mut buffer).unwrap();
        buffer.truncate(n);
        buffer
    }

    #[test]
    fn a_line_or_a_long_piece_is_due() {
        let (_from, to) = pipe().unwrap();
        let mut outlet = Outlet::new(to).unwrap();
        push(&mut outlet, b"half a line");
        assert!(!outlet.is_due());
        push(&mut outlet, b"\n");
        assert!(outlet.is_due());
        assert!(matches!(outlet.flush(), Flow::Drained));
        assert!(!outlet.is_due(), "a written line is not due again");
        push(&mut outlet, &[b'.'; LONG_LINE]);
        assert!(outlet.is_due());
    }

    #[test]
    fn a_full_pipe_never_blocks_and_loses_nothing() {
        for flags in [PipeFlags::empty(), PipeFlags::NONBLOCK] {
            let (from, to) = pipe_with(flags).unwrap();
            let mut outlet = Outlet::new(to).unwrap();
            let sent: Vec<u8> = (0..300_000u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
            push(&mut outlet, &sent);
            assert!(!outlet.has_room(), "{flags:?}");
            let mut seen = Vec::new();
            loop {
                let flow = outlet.flush();
                seen.extend(read_all(&from));
                match flow {
                    Flow::Drained => break,
                    Flow::Stuck => {}
                    other => panic!("{other:?}"),
                }
            }
            assert!(seen == sent, "{flags:?}: bytes lost or out of order");
            assert!(outlet.has_room());
            assert_eq!(outlet.lost(), 0);
        }
    }

    #[test]
    fn a_full_pipe_or_socket_that_others_share_never_blocks() {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let socket = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        for (from, to) in [pipe().unwrap(), socket] {
            let shared = rustix::io::fcntl_dupfd_cloexec(&to, 0).unwrap();
            let mut outlet = Outlet::new(to).unwrap();
            push(&mut outlet, &vec![b'x'; LIMIT]);
            assert!(matches!(outlet.flush(), Flow::Stuck));
            // Full, without a look at it before: as when another writer was faster.
            let mut patience = outlet.patience;
            let (tell, told) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                tell.send(attempt(outlet.to.as_fd(), &mut patience, b"y").map(|_| outlet))
            });
            let answer = told.recv_timeout(Duration::from_secs(20)).expect("the writer waits");
            assert_eq!(answer.err(), Some(Errno::AGAIN));
            assert!(
                !fcntl_getfl(&shared).unwrap().contains(OFlags::NONBLOCK),
                "the others' writes still wait"
            );
            drop(from);
            let mut outlet = Outlet::new(shared).unwrap();
            push(&mut outlet, b"anyone?\n");
            assert!(matches!(outlet.flush(), Flow::Closed));
        }
    }

    #[test]
    fn a_guest_that_ignores_flow_control_cannot_eat_the_memory_of_the_host() {
        let (_from, to) = pipe().unwrap();
        let mut outlet = Outlet::new(to).unwrap();
        push(&mut outlet, &vec![b'x'; LIMIT + 5]);
        assert_eq!((outlet.waiting.len(), outlet.lost()), (LIMIT, 5));
    }

    #[test]
    fn what_nobody_reads_is_forgotten_oldest_first_where_that_is_wanted() {
        let (_from, to) = pipe().unwrap();
        let mut outlet = Outlet::new(to).unwrap().forgetful();
        push(&mut outlet, b"old");
        push(&mut outlet, &vec![b'x'; ROOM]);
        assert!(outlet.has_room());
        assert_eq!((outlet.waiting.len(), outlet.lost()), (ROOM, 3));
    }

    #[test]
    fn a_closed_reader_is_told_apart_from_a_slow_one() {
        let (from, to) = pipe().unwrap();
        let mut outlet = Outlet::new(to).unwrap();
        drop(from);
        push(&mut outlet, b"anyone?\n");
        assert!(matches!(outlet.flush(), Flow::Closed));
        push(&mut outlet, b"no\n");
        assert!(outlet.is_empty() && outlet.has_room());
        assert!(matches!(outlet.flush(), Flow::Drained), "said once");
        let end = outlet.finish("serial output", Duration::ZERO).unwrap();
        assert!(matches!(end, Flow::Closed), "and at the end: {end:?}");
    }

    #[test]
    fn an_error_of_the_host_is_remembered_to_the_end() {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut outlet = Outlet::new(full.into()).unwrap();
        push(&mut outlet, b"a line\n");
        assert!(matches!(outlet.flush(), Flow::Broken(_)));
        push(&mut outlet, b"another\n");
        assert!(matches!(outlet.flush(), Flow::Drained));
        match outlet.finish("serial output", Duration::ZERO).unwrap() {
            Flow::Broken(error) => assert_eq!(error.kind(), io::ErrorKind::StorageFull),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_end_waits_for_a_reader_but_not_for_ever() {
        let (from, to) = pipe().unwrap();
        let mut outlet = Outlet::new(to).unwrap();
        push(&mut outlet, &vec![b'x'; 200_000]);
        let fail = outlet.finish("serial output", Duration::ZERO).unwrap_err().to_string();
        assert!(fail.starts_with("write the last ") && fail.ends_with(": nobody takes them"), "{fail}");
        let reader = std::thread::spawn(move || {
            let mut seen = 0;
            while seen < 200_000 {
                seen += read_all(&from).len();
            }
            seen
        });
        outlet.finish("serial output", Duration::from_secs(60)).unwrap();
        assert_eq!(reader.join().unwrap(), 200_000);
    }

    #[test]
    fn the_end_is_near_even_where_a_reader_takes_a_little_each_time() {
        let (from, to) = pipe().unwrap();
        let mut outlet = Outlet::new(to).unwrap();
        push(&mut outlet, &vec![b'x'; LIMIT]);
        assert!(matches!(outlet.flush(), Flow::Stuck));
        let over = Arc::new(AtomicBool::new(false));
        let heard = over.clone();
        let reader = std::thread::spawn(move || {
            let full = rustix::io::ioctl_fionread(&from).unwrap();
            while !heard.load(Ordering::SeqCst) {
                if rustix::io::ioctl_fionread(&from).unwrap() == full {
                    rustix::io::read(&from, &mut [0; 4096]).unwrap();
                }
                std::thread::yield_now();
            }
        });
        let fail = outlet.finish_by("serial output", Duration::from_secs(60), Instant::now()).unwrap_err();
        over.store(true, Ordering::SeqCst);
        reader.join().unwrap();
        assert!(fail.to_string().ends_with(": they are taken too slowly"), "{fail}");
    }

    #[test]
    fn a_regular_file_takes_all_at_once() {
        let file = tempfile::tempfile().unwrap();
        let mut outlet = Outlet::new(file.try_clone().unwrap().into()).unwrap();
        push(&mut outlet, &vec![b'x'; 100_000]);
        assert!(matches!(outlet.flush(), Flow::Drained));
        assert_eq!(file.metadata().unwrap().len(), 100_000);
    }
}
