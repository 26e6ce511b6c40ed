//! Unix sockets: one to listen on that leaves no file behind, and the way to those of others.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::fail::{Fail, Result, Why, why_of};

/// Connections that wait to be accepted; the host allows that many or fewer.
const BACKLOG: i32 = 4096;
/// The longest name of a socket, without the zero at its end (`unix(7)`).
pub const NAME_MAX: usize = 107;

/// A socket that listens, with whatever has to go when it goes (its file).
pub struct Listener {
    /// Non-blocking.
    pub socket: OwnedFd,
    _keep: Box<dyn Send>,
}

impl Listener {
    /// `socket`, and `keep` to be dropped with it.
    pub fn new(socket: OwnedFd, keep: impl Send + 'static) -> Listener {
        Listener { socket, _keep: Box::new(keep) }
    }
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// A non-blocking connection to the Unix stream socket at `path`.
///
/// # Errors
/// As `connect(2)`; `WouldBlock`: so many wait to be accepted there that the host takes no more now.
pub fn dial(path: &Path) -> io::Result<OwnedFd> {
    let socket = socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Listens at `path`. A socket that a killed program has left there is replaced, one that somebody listens on and any
/// other file are left alone.
///
/// # Errors
/// The path is in use, too long, or the host refuses; `role` says what the socket is for.
pub fn listen(role: &str, path: &Path) -> Result<Listener> {
    let doing = || format!("listen for {role} on {}", path.display());
    if path.as_os_str().len() > NAME_MAX {
        let fail = Fail::new(Why::Usage, doing())
            .because(format!("the name of a socket has at most {NAME_MAX} bytes"));
        return Err(fail.hint("name it relative to the directory mayfly is started in"));
    }
    // A thousand connections are soon there, and each is a descriptor.
    raise_limit();
    bind(path).map_err(|refusal| match refusal {
        Refusal::Alive => Fail::new(Why::Denied, doing())
            .because("another program listens there")
            .hint("choose another path, or end that program"),
        Refusal::Stranger => Fail::new(Why::Denied, doing())
            .because("there is a file that is no socket")
            .hint("choose another path"),
        Refusal::Host(cause) => {
            let fail = Fail::new(why_of(&cause), doing());
            let hint = match Errno::from_io_error(&cause) {
                Some(Errno::NOENT) => "make its directory first",
                Some(Errno::NXIO | Errno::OPNOTSUPP) => {
                    "its file system has no sockets: choose a place in /run or /dev/shm"
                }
                Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => "choose a directory you may write to",
                _ => return fail.because(cause),
            };
            fail.because(cause).hint(hint)
        }
    })
}

/// Why a path cannot be listened on.
enum Refusal {
    /// Somebody listens there.
    Alive,
    /// Something else is there.
    Stranger,
    /// The host refuses.
    Host(io::Error),
}

impl From<Errno> for Refusal {
    fn from(error: Errno) -> Self {
        Refusal::Host(error.into())
    }
}

fn bind(path: &Path) -> std::result::Result<Listener, Refusal> {
    // Two programs that find the same stale socket at the same time would each remove what the other has bound: one
    // of them waits. A file system without locks, or a directory that may not be read, goes without.
    let place = path.parent().filter(|place| !place.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let _lock = rustix::fs::open(place, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).inspect(lock);
    let socket = socket().map_err(Refusal::Host)?;
    let address = SocketAddrUnix::new(path)?;
    match rustix::net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            clear(path)?;
            rustix::net::bind(&socket, &address)?;
        }
        other => other?,
    }
    let file = SocketFile::new(path)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(Listener::new(socket, file))
}

/// Locks a directory, or gives up after a while: what follows takes microseconds, so whoever holds it for longer is
/// none of us.
fn lock(place: &OwnedFd) {
    for _ in 0..100 {
        if rustix::fs::flock(place, FlockOperation::NonBlockingLockExclusive) != Err(Errno::AGAIN) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Removes the socket at `path` if nobody listens on it.
fn clear(path: &Path) -> std::result::Result<(), Refusal> {
    let stat = rustix::fs::lstat(path)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(Refusal::Stranger);
    }
    match dial(path) {
        Err(cause) if cause.kind() == io::ErrorKind::ConnectionRefused => Ok(rustix::fs::unlink(path)?),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(cause) if cause.kind() != io::ErrorKind::WouldBlock => Err(Refusal::Host(cause)),
        _ => Err(Refusal::Alive),
    }
}

/// The file of a socket of ours; removed with it, unless somebody has put another one in its place.
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<SocketFile> {
        // The directory may be another one by the time the file is to be removed.
        let path = std::path::absolute(path)?;
        let stat = rustix::fs::lstat(&path)?;
        Ok(SocketFile { path, device: stat.st_dev, inode: stat.st_ino })
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Refusal::Host(error)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Ok(stat) = rustix::fs::lstat(&self.path)
            && (stat.st_dev, stat.st_ino) == (self.device, self.inode)
        {
            // What cannot be removed is recognised as stale by the next run.
            let _ = rustix::fs::unlink(&self.path);
        }
    }
}

/// Lets this process open as many files as the host allows it to: shells begin with 1024.
fn raise_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    }
}

/// A listening socket that has no file, for tests: its name is not in the file system.
pub(super) fn listen_unnamed(name: &str) -> io::Result<OwnedFd> {
    let socket = socket()?;
    rustix::net::bind(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// A connection to a socket of [`listen_unnamed`].
pub(super) fn dial_unnamed(name: &str) -> io::Result<OwnedFd> {
    let socket = socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
    Ok(socket)
}

/// Whether both directions of a connection have ended: the other side has closed it, and not only one half of it.
pub fn is_hung_up(socket: impl AsFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(&socket, PollFlags::empty())];
    let answer = poll(&mut fds, Some(&Timespec::default()));
    answer.is_ok() && fds.iter().any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(path: &Path) -> String {
        match listen("vsock", path) {
            Ok(_) => panic!("{} is listened on", path.display()),
            Err(fail) => fail.to_string(),
        }
    }

    #[test]
    fn a_socket_is_there_as_long_as_its_listener() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("v.sock");
        let listener = listen("vsock", &path).unwrap();
        dial(&path).unwrap();
        assert!(refused(&path).contains(": another program listens there\n  hint: "), "it is alive");
        dial(&path).expect("a refused second listener leaves the first alone");
        drop(listener);
        assert!(!path.exists(), "the file goes with the listener");
    }

    #[test]
    fn a_stale_socket_is_replaced_and_other_files_are_not() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("v.sock");
        // What a killed program leaves: the file without a listener.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let listener = listen("vsock", &path).unwrap();
        dial(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "mine").unwrap();
        assert!(refused(&path).contains(": there is a file that is no socket\n"));
        drop(listener);
        assert_eq!(std::fs::read(&path).unwrap(), b"mine", "a file put in its place stays");
    }

    #[test]
    fn what_cannot_be_is_said_with_its_remedy() {
        let place = tempfile::tempdir().unwrap();
        let text = refused(&place.path().join("none/v.sock"));
        assert!(text.ends_with(": No such file or directory\n  hint: make its directory first"), "{text}");
        let text = refused(Path::new(&"x".repeat(108)));
        assert!(text.contains("the name of a socket has at most 107 bytes\n  hint: "), "{text}");
        assert_eq!(dial(&place.path().join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_close_is_told_apart_from_a_half_close() {
        use rustix::net::{Shutdown, shutdown, socketpair};
        let flags = SocketFlags::CLOEXEC;
        let (here, there) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        shutdown(&there, Shutdown::Write).unwrap();
        assert!(!is_hung_up(&here));
        drop(there);
        assert!(is_hung_up(&here));
    }

    #[test]
    fn the_lock_is_no_file() {
        let place = tempfile::tempdir().unwrap();
        let listener = listen("vsock", &place.path().join("v.sock")).unwrap();
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 1);
        drop(listener);
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
    }
}
