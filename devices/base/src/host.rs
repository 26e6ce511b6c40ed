//! The host's objects, passed in: devices open nothing themselves, so a jail can hand out what it holds and a
//! test can hand out fakes.

pub mod fake;
pub mod socket;
pub mod vhost;

use std::any::Any;
use std::collections::HashMap;
use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};
use rustix::io::Errno;

use crate::fail::{Doing, Fail, Result, Why, why_of};
use crate::memory::Memory;
pub use crate::sys::tap::{Tap, is_name as is_tap_name, offload};
pub use socket::Listener;
use vhost::{Back, Vhost};

/// How a file is to be opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Open for writing too.
    pub write: bool,
    /// Create it if it is missing, empty it if not.
    pub create: bool,
    /// Past the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Create it if it is missing, keep what is in it if not; to be read as well.
    pub keep: bool,
}

/// A two-way stream of bytes to a person or a program: a terminal, a pseudo-terminal, a pair of pipes.
#[derive(Debug)]
pub struct Stream {
    /// Bytes for the guest; `None` when there is no input.
    pub input: Option<OwnedFd>,
    /// Bytes from the guest.
    pub output: OwnedFd,
    /// The input is the operator's terminal in raw mode, so the escape key has to be watched for.
    pub terminal: bool,
}

/// The operator's terminal as something to draw on.
pub struct Screen {
    /// Its columns and rows now, where it tells.
    pub size: Box<dyn Fn() -> Option<(u16, u16)> + Send>,
    /// Can be read after each change.
    pub changed: OwnedFd,
}

/// A way between the guest and programs of the host that a device will open.
#[derive(Clone, Copy, Debug)]
pub enum Door<'a> {
    /// These ports of the host lead into the guest.
    Ports(&'a [SocketAddr]),
    /// A Unix socket that is made there, and leads into the guest.
    Socket(&'a Path),
    /// The Unix socket of a program of the host, which the device connects to.
    Program(&'a Path),
}

/// Fills a buffer with random bytes, or says that the host has none to give.
pub type Entropy = Arc<dyn Fn(&mut [u8]) -> std::io::Result<()> + Send + Sync>;

/// Connects to the Unix stream socket at a path; what it gives does not block.
pub type Dialer = Arc<dyn Fn(&Path) -> std::io::Result<OwnedFd> + Send + Sync>;

/// Connects to whoever inside this process answers at a port of the host's; `None`: nobody does. What it gives does not
/// block.
pub type Answers = Arc<dyn Fn(u32) -> Option<OwnedFd> + Send + Sync>;

/// Random bytes from the host kernel's generator; waits at most once after the host's start, for its seed.
///
/// # Errors
/// As `getrandom(2)` answers.
pub fn kernel_entropy(mut data: &mut [u8]) -> std::io::Result<()> {
    use rustix::rand::{GetRandomFlags, getrandom};
    while !data.is_empty() {
        match getrandom(&mut *data, GetRandomFlags::empty()) {
            Ok(n) => data = data.get_mut(n..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Opens a file to read it. Waits for nothing: a pipe without a writer is open at once, and found to be no file.
///
/// # Errors
/// As the host answers.
pub fn open_to_read(path: &Path) -> std::io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// Opens a directory as a place; what keeps it from being opened comes with the remedy.
///
/// # Errors
/// As the host answers.
pub fn open_directory(role: &str, path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|cause| {
        let hint = match cause {
            Errno::NOENT if path.is_relative() => match std::env::current_dir() {
                Ok(here) => format!("check the name; it is looked for in {}", here.display()),
                Err(_) => "check the name".to_owned(),
            },
            Errno::NOENT => "check the name, or make the directory first".to_owned(),
            Errno::NOTDIR => "name a directory; a file is shared with the directory it is in".to_owned(),
            Errno::ACCESS | Errno::PERM => {
                "make the directories that lead to it searchable: chmod a+x".to_owned()
            }
            _ => String::new(),
        };
        let cause = std::io::Error::from(cause);
        let fail = Fail::new(why_of(&cause), format!("open {role} directory {}", path.display()));
        let fail = fail.because(cause);
        if hint.is_empty() { fail } else { fail.hint(hint) }
    })
}

/// What outlives one life of a machine that is started again after a reset: by role, whatever its owner needs.
#[derive(Default)]
pub struct Keepsakes(Mutex<HashMap<String, Box<dyn Any + Send>>>);

impl Keepsakes {
    /// What `role` had in an earlier life, or what `make` makes now.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn keep<T: Any + Send + Clone>(&self, role: &str, make: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = kept.get(role).and_then(|old| old.downcast_ref::<T>()) {
            return Ok(old.clone());
        }
        let new = make()?;
        kept.insert(role.to_owned(), Box::new(new.clone()));
        Ok(new)
    }
}

impl std::fmt::Debug for Keepsakes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keepsakes")
    }
}

/// An empty file in memory.
///
/// # Errors
/// The host is out of descriptors.
pub fn memory(role: &str) -> Result<File> {
    let made = memfd_create("mayfly", MemfdFlags::CLOEXEC).map(File::from);
    made.doing(Why::Host, || format!("make {role}"))
}

/// What a device may ask of the host.
pub trait Host: Send + Sync {
    /// Opens a file. Errors name the path, the cause and the remedy; `role` says what it is for
    /// (`disk0 image`).
    ///
    /// # Errors
    /// As the host answers.
    fn open(&self, role: &str, path: &Path, access: Access) -> Result<File>;

    /// Whether a file could be made at `path`, where there is none. Makes nothing.
    ///
    /// # Errors
    /// As [`Host::open`] with `keep` would answer.
    fn could_make(&self, role: &str, path: &Path) -> Result<()> {
        let _ = (role, path);
        Ok(())
    }

    /// Told, when a device is claimed, of a way between the guest and programs of the host that `role` will open.
    ///
    /// # Errors
    /// There cannot be such a way on the host that will run the machine.
    fn door(&self, role: &str, door: Door<'_>) -> Result<()> {
        let _ = (role, door);
        Ok(())
    }

    /// Opens a directory as a place (`O_PATH`), to go on from by [`crate::files`]. `role` says what it is for.
    ///
    /// # Errors
    /// As the host answers, with the remedy; it is no directory.
    fn directory(&self, role: &str, path: &Path) -> Result<OwnedFd> {
        open_directory(role, path)
    }

    /// An empty file without a name, for bytes that nobody is to find later: it goes with the last that has it open.
    ///
    /// # Errors
    /// As the host answers.
    fn scratch(&self, role: &str) -> Result<File> {
        memory(role)
    }

    /// Where devices keep what a reset of the machine must not lose; `None` where a machine has one life only.
    fn keepsakes(&self) -> Option<&Keepsakes> {
        None
    }

    /// The standard streams of the process, handed out once.
    ///
    /// # Errors
    /// Another device has them already.
    fn stdio(&self, role: &str) -> Result<Stream>;

    /// The operator's terminal, if there is one: how large it is.
    fn screen(&self) -> Option<Screen> {
        None
    }

    /// A new pseudo-terminal; tells the operator its name.
    ///
    /// # Errors
    /// As the host answers.
    fn pty(&self, role: &str) -> Result<Stream>;

    /// Listens on a Unix stream socket at `path`, which vanishes with the answer. `role` says who does.
    ///
    /// # Errors
    /// The path is in use, too long, or the host refuses.
    fn listen(&self, role: &str, path: &Path) -> Result<Listener> {
        socket::listen(role, path)
    }

    /// A way to the Unix sockets of others, for a device that connects to them as long as it lives.
    fn dialer(&self) -> Dialer {
        Arc::new(socket::dial)
    }

    /// A way to those inside this process whom the guest may call, for a device that carries its calls.
    fn answers(&self) -> Answers {
        Arc::new(|_| None)
    }

    /// Opens the tap interface called `name`, or makes one that goes with its descriptors.
    ///
    /// # Errors
    /// As the host answers; the remedy names the command that makes a tap for this user.
    fn tap(&self, role: &str, name: Option<&str>, queues: usize) -> Result<Tap> {
        let _ = (name, queues);
        Err(Fail::new(Why::Unsupported, format!("open a tap for {role}")).because("this host has none"))
    }

    /// Opens a part of the kernel that works rings in this memory.
    ///
    /// # Errors
    /// As the host answers, with the remedy.
    fn vhost(&self, role: &str, back: Back, memory: &Memory) -> Result<Box<dyn Vhost>> {
        let _ = memory;
        let doing = format!("open {} for {role}", back.path());
        Err(Fail::new(Why::Unsupported, doing).because("this host has none"))
    }

    /// Prepares for `count` more open descriptors, as far as the host's limits go.
    fn expect_descriptors(&self, count: u64) {
        let _ = count;
    }

    /// A share of the process's error stream.
    ///
    /// # Errors
    /// The process has none.
    fn stderr(&self) -> std::io::Result<OwnedFd> {
        std::io::stderr().as_fd().try_clone_to_owned()
    }

    /// A source of random bytes fit for keys, for a device that asks for them as long as it lives.
    fn entropy(&self) -> Entropy {
        Arc::new(kernel_entropy)
    }

    /// Fills `data` with random bytes fit for keys.
    ///
    /// # Errors
    /// The host has none to give yet.
    fn random(&self, data: &mut [u8]) -> std::io::Result<()>;
}
