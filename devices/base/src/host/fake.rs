//! A host made up for tests: files in memory, pipes for streams, randomness that repeats.

mod vhost;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::pipe;

use super::vhost::{Back, Vhost};
use super::{
    Access, Answers, Dialer, Entropy, Host, Keepsakes, Listener, Screen, Stream, Tap, offload,
    open_directory, socket,
};
use crate::fail::{Doing, Fail, Result, Why};
use crate::memory::Memory;
pub use vhost::{Bell, Kernel};

/// Bytes in a file that a test opens without having made it.
pub const FILE_BYTES: u64 = 1 << 20;

/// A host that has every file, each of [`FILE_BYTES`] zeros, and keeps what is written to them.
#[derive(Debug, Default)]
pub struct FakeHost {
    files: Mutex<HashMap<PathBuf, File>>,
    /// The other ends of the streams handed out, so that writes to them do not fail.
    ends: Mutex<Vec<OwnedFd>>,
    /// The other ends of taps, in the order they were made.
    taps: Mutex<Vec<OwnedFd>>,
    drawn: Arc<AtomicU64>,
    /// Directories of the host that stand for those of a test.
    directories: Mutex<HashMap<PathBuf, PathBuf>>,
    /// Sockets listened on: the paths, and the names they have instead.
    sockets: Arc<Mutex<HashMap<PathBuf, String>>>,
    /// Sockets for whoever calls a port of this process, each handed out once.
    answering: Arc<Mutex<HashMap<u32, OwnedFd>>>,
    keepsakes: Option<Keepsakes>,
    /// Standard input is a terminal of this size.
    terminal: Option<Arc<Mutex<(u16, u16)>>>,
    /// Its kernel works rings.
    kernel: Option<Kernel>,
}

type Names = Mutex<HashMap<PathBuf, String>>;

/// The connection to what listens at `path`.
fn dial(names: &Names, path: &Path) -> std::io::Result<OwnedFd> {
    let name = names.lock().unwrap_or_else(PoisonError::into_inner).get(path).cloned();
    socket::dial_unnamed(&name.ok_or(std::io::ErrorKind::NotFound)?)
}

impl FakeHost {
    /// A host for a machine that lives more than once.
    pub fn for_lives() -> FakeHost {
        FakeHost { keepsakes: Some(Keepsakes::default()), ..FakeHost::default() }
    }

    /// A host whose standard input is a terminal of so many columns and rows.
    pub fn with_terminal(columns: u16, rows: u16) -> FakeHost {
        FakeHost { terminal: Some(Arc::new(Mutex::new((columns, rows)))), ..FakeHost::default() }
    }

    /// A host with this kernel, which works rings.
    pub fn with_vhost(kernel: &Kernel) -> FakeHost {
        FakeHost { kernel: Some(kernel.clone()), ..FakeHost::default() }
    }

    /// Changes the size of the terminal.
    ///
    /// # Errors
    /// Nobody looks at it.
    pub fn resize(&self, columns: u16, rows: u16) -> std::io::Result<()> {
        let terminal = self.terminal.as_ref().ok_or(std::io::ErrorKind::NotFound)?;
        *terminal.lock().unwrap_or_else(PoisonError::into_inner) = (columns, rows);
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = ends.last().ok_or(std::io::ErrorKind::NotFound)?;
        rustix::io::write(changed, b"!")?;
        Ok(())
    }

    /// The other ends of the first stream handed out: where to write its input, and where to read its output.
    ///
    /// # Errors
    /// None was.
    pub fn far_ends(&self) -> std::io::Result<(File, File)> {
        let ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        match ends.as_slice() {
            [input, output, ..] => Ok((input.try_clone()?.into(), output.try_clone()?.into())),
            _ => Err(std::io::ErrorKind::NotFound.into()),
        }
    }

    /// The file at `path`, to look into it or to change it.
    ///
    /// # Errors
    /// The kernel makes no memory files.
    pub fn file(&self, path: &Path) -> std::io::Result<File> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = files.get(path) {
            return file.try_clone();
        }
        let file = File::from(memfd_create("fake", MemfdFlags::CLOEXEC)?);
        file.set_len(FILE_BYTES)?;
        files.insert(path.to_owned(), file.try_clone()?);
        Ok(file)
    }

    /// Puts `file` at `path`.
    pub fn put(&self, path: &Path, file: File) {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), file);
    }

    /// Has the directory `path` of the made-up host be `real`, one of this host.
    pub fn put_directory(&self, path: &Path, real: &Path) {
        self.directories
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(path.to_owned(), real.to_owned());
    }

    /// Connects to the socket that a device listens on at `path`.
    ///
    /// # Errors
    /// None does.
    pub fn dial(&self, path: &Path) -> std::io::Result<OwnedFd> {
        dial(&self.sockets, path)
    }

    /// Has the guest's call to `port` answered by `socket`, once.
    pub fn answer(&self, port: u32, socket: OwnedFd) {
        self.answering.lock().unwrap_or_else(PoisonError::into_inner).insert(port, socket);
    }

    /// The other end of the tap's queue that was handed out first of those not taken yet.
    pub fn far_end(&self) -> Option<OwnedFd> {
        let mut taps = self.taps.lock().unwrap_or_else(PoisonError::into_inner);
        (!taps.is_empty()).then(|| taps.remove(0))
    }

    fn stream(&self, role: &str) -> Result<Stream> {
        let pair = || pipe().doing(Why::Host, || format!("make pipes for {role}"));
        let ((input, far_input), (far_output, output)) = (pair()?, pair()?);
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).extend([far_input, far_output]);
        Ok(Stream { input: Some(input), output, terminal: false })
    }
}

/// Bytes that repeat in every run (a linear congruential generator, MMIX's numbers).
fn draw(state: &AtomicU64, data: &mut [u8]) {
    for byte in data {
        let next = |n: u64| n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let old = state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| Some(next(n)));
        let [top, ..] = old.unwrap_or_else(|n| n).to_be_bytes();
        *byte = top;
    }
}

impl Host for FakeHost {
    fn open(&self, role: &str, path: &Path, access: Access) -> Result<File> {
        let doing = || format!("open {role} {}", path.display());
        let file = self.file(path).doing(Why::Host, doing)?;
        // Opened anew, as a path would be: an open file description of its own, so that locks work.
        let again = format!("/proc/self/fd/{}", file.as_raw_fd());
        let opened = File::options().read(true).write(access.write).truncate(access.create).open(again);
        opened.map_err(|cause| Fail::new(Why::Host, doing()).because(cause))
    }

    /// One that no test has put there is empty, and stays so: it has been removed.
    fn directory(&self, role: &str, path: &Path) -> Result<OwnedFd> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        if let Some(real) = self.directories.lock().unwrap_or_else(PoisonError::into_inner).get(path) {
            return open_directory(role, real);
        }
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let place = std::env::temp_dir().join(format!("mayfly-fake-{}-{number}", std::process::id()));
        let doing = || format!("make a directory for {role}");
        std::fs::create_dir(&place).doing(Why::Host, doing)?;
        let opened = open_directory(role, &place);
        std::fs::remove_dir(&place).doing(Why::Host, doing)?;
        opened
    }

    fn keepsakes(&self) -> Option<&Keepsakes> {
        self.keepsakes.as_ref()
    }

    fn stdio(&self, role: &str) -> Result<Stream> {
        self.stream(role).map(|stream| Stream { terminal: self.terminal.is_some(), ..stream })
    }

    fn screen(&self) -> Option<Screen> {
        let terminal = self.terminal.clone()?;
        let (changed, change) = pipe().ok()?;
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).push(change);
        let size = move || Some(*terminal.lock().unwrap_or_else(PoisonError::into_inner));
        Some(Screen { size: Box::new(size), changed })
    }

    fn pty(&self, role: &str) -> Result<Stream> {
        self.stream(role)
    }

    fn listen(&self, role: &str, path: &Path) -> Result<Listener> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        // Names are the host's, so that other tests may run beside this one.
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let name = format!("mayfly-fake-{}-{number}", std::process::id());
        let doing = || format!("listen for {role} on {}", path.display());
        let listening = socket::listen_unnamed(&name).doing(Why::Host, doing)?;
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner).insert(path.to_owned(), name);
        Ok(Listener::new(listening, ()))
    }

    fn dialer(&self) -> Dialer {
        let sockets = self.sockets.clone();
        Arc::new(move |path| dial(&sockets, path))
    }

    fn answers(&self) -> Answers {
        let answering = self.answering.clone();
        Arc::new(move |port| answering.lock().unwrap_or_else(PoisonError::into_inner).remove(&port))
    }

    fn tap(&self, role: &str, name: Option<&str>, queues: usize) -> Result<Tap> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = || {
            let pair = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None);
            let (near, far) = pair.doing(Why::Host, || format!("make sockets for {role}"))?;
            self.taps.lock().unwrap_or_else(PoisonError::into_inner).push(far);
            Ok(near)
        };
        let queues = (0..queues).map(|_| pair()).collect::<Result<_>>()?;
        let offloads = offload::CSUM | offload::TSO4 | offload::TSO6 | offload::ECN | offload::USO;
        Ok(Tap { name: name.unwrap_or("fake0").to_owned(), queues, mtu: 1500, offloads })
    }

    fn vhost(&self, role: &str, back: Back, _: &Memory) -> Result<Box<dyn Vhost>> {
        match &self.kernel {
            Some(kernel) => Ok(kernel.open(back)),
            None => Err(Fail::new(Why::Missing, format!("open {} for {role}", back.path()))),
        }
    }

    fn stderr(&self) -> std::io::Result<OwnedFd> {
        self.file(Path::new("stderr")).map(OwnedFd::from)
    }

    fn entropy(&self) -> Entropy {
        let drawn = self.drawn.clone();
        Arc::new(move |data| {
            draw(&drawn, data);
            Ok(())
        })
    }

    fn random(&self, data: &mut [u8]) -> std::io::Result<()> {
        draw(&self.drawn, data);
        Ok(())
    }
}
