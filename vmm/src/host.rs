//! The Linux host: opens files, streams and pseudo-terminals for devices, and says well what it cannot open.

pub mod elsewhere;
mod network;
pub mod program;
pub mod share;
pub mod switchboard;
mod vhost;

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base::fail::{barred, remedy_to_read, why_of};
use base::host::vhost::{Back, Vhost};
use base::host::{Access, Answers, Host, Keepsakes, Screen, Stream, Tap, kernel_entropy};
use base::memory::Memory;
use base::sys::signals;
use base::{Doing, Fail, Result, Why};
use rustix::fs::{Access as Rights, Mode, OFlags, fcntl_setfl};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::stdio::stdout;
use rustix::termios::{OptionalActions, tcgetattr, tcgetwinsize, tcsetattr};

use self::switchboard::Switchboard;
use crate::log;
use crate::terminal::{self, Raw};

/// The host this process runs on. The terminal is restored when it goes out of scope.
#[derive(Debug, Default)]
pub struct LinuxHost {
    stdio_taken: AtomicBool,
    raw: Mutex<Option<Raw>>,
    /// Our own ends of pseudo-terminals: while one is open, a reader may come and go without a hang-up.
    peers: Mutex<Vec<OwnedFd>>,
    /// Ways out by role, where a machine lives more than once: each life goes on where the one before stopped.
    kept: Option<Mutex<HashMap<String, OwnedFd>>>,
    /// Who answers the guest's calls.
    switchboard: Switchboard,
    /// What else devices keep from one life to the next.
    keepsakes: Option<Keepsakes>,
}

impl Host for LinuxHost {
    fn open(&self, role: &str, path: &Path, access: Access) -> Result<File> {
        if access.create {
            return self.keep(role, || open(role, path, access).map(OwnedFd::from)).map(File::from);
        }
        open(role, path, access)
    }

    fn could_make(&self, role: &str, path: &Path) -> Result<()> {
        let place = path.parent().filter(|place| !place.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // The slash tells a directory from a file.
        let made = rustix::fs::access(place.join(""), Rights::WRITE_OK | Rights::EXEC_OK);
        let access = Access { write: true, keep: true, ..Access::default() };
        made.map_err(|cause| unopened(role, path, access, cause.into()))
    }

    fn scratch(&self, role: &str) -> Result<File> {
        let places = match std::env::var_os("TMPDIR") {
            Some(place) => vec![place.into()],
            None => vec![PathBuf::from("/var/tmp"), PathBuf::from("/tmp")],
        };
        for place in &places {
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            match rustix::fs::open(place, flags, Mode::RUSR | Mode::WUSR) {
                Ok(file) => return Ok(file.into()),
                Err(cause) => ::log::debug!("make {role} in {}: {cause}", place.display()),
            }
        }
        // Not every file system has files without a name (9p, NFS).
        base::host::memory(role)
    }

    fn keepsakes(&self) -> Option<&Keepsakes> {
        self.keepsakes.as_ref()
    }

    fn stdio(&self, role: &str) -> Result<Stream> {
        let doing = || format!("give standard input and output to {role}");
        if self.stdio_taken.swap(true, Ordering::SeqCst) {
            return Err(Fail::new(Why::Usage, doing())
                .because("something else has them")
                .hint("only one device can be on stdio, and none beside a command"));
        }
        let output = self.keep(role, || {
            share::output().map_err(|cause| {
                Fail::new(Why::Host, doing()).because(cause).hint("start mayfly with an open standard output")
            })
        })?;
        let (input, terminal) = self.input();
        Ok(Stream { input, output, terminal })
    }

    fn screen(&self) -> Option<Screen> {
        let size = || tcgetwinsize(stdout()).ok().map(|size| (size.ws_col, size.ws_row));
        size()?;
        // A host that has no descriptor for it has no screen: its size is a convenience.
        let changed = signals::divert(&[libc::SIGWINCH]).ok()?;
        Some(Screen { size: Box::new(size), changed })
    }

    fn pty(&self, role: &str) -> Result<Stream> {
        let doing = |cause: io::Error| {
            Fail::new(Why::Host, format!("make a pseudo-terminal for {role}"))
                .because(cause)
                .hint("is /dev/pts mounted?")
        };
        let master = self.keep(role, || {
            let (master, peer, name) = open_pty().map_err(doing)?;
            lock(&self.peers).push(peer);
            log::tell(&format!("{role} is on {name}"));
            Ok(master)
        })?;
        let input = Some(master.try_clone().map_err(doing)?);
        Ok(Stream { input, output: master, terminal: false })
    }

    fn tap(&self, role: &str, name: Option<&str>, queues: usize) -> Result<Tap> {
        network::tap(role, name, queues)
    }

    fn vhost(&self, role: &str, back: Back, memory: &Memory) -> Result<Box<dyn Vhost>> {
        vhost::open(role, back, memory)
    }

    fn expect_descriptors(&self, count: u64) {
        network::expect_descriptors(count);
    }

    fn answers(&self) -> Answers {
        let switchboard = self.switchboard.clone();
        Arc::new(move |port| switchboard.take(port))
    }

    fn random(&self, data: &mut [u8]) -> io::Result<()> {
        kernel_entropy(data)
    }
}

impl LinuxHost {
    /// A host for a machine that may live more than once.
    pub fn for_lives() -> LinuxHost {
        LinuxHost {
            kept: Some(Mutex::default()),
            keepsakes: Some(Keepsakes::default()),
            ..LinuxHost::default()
        }
    }

    /// Whether a device has the standard streams of the process.
    pub fn has_lent_stdio(&self) -> bool {
        self.stdio_taken.load(Ordering::SeqCst)
    }

    /// Who answers the guest's calls.
    pub fn switchboard(&self) -> &Switchboard {
        &self.switchboard
    }

    /// Keeps the standard streams from devices: they are the command's.
    pub fn take_stdio(&self) {
        self.stdio_taken.store(true, Ordering::SeqCst);
    }

    /// Makes ready for the next life: everything may be asked for again, and output goes on where it stopped.
    pub fn begin_again(&self) {
        self.stdio_taken.store(false, Ordering::SeqCst);
    }

    /// The way out that `role` had in an earlier life, or a new one.
    fn keep(&self, role: &str, make: impl FnOnce() -> Result<OwnedFd>) -> Result<OwnedFd> {
        let Some(kept) = &self.kept else { return make() };
        let doing = || format!("keep the {role} for another life");
        let mut kept = lock(kept);
        if let Some(fd) = kept.get(role) {
            return fd.try_clone().doing(Why::Host, doing);
        }
        let fd = make()?;
        kept.insert(role.to_owned(), fd.try_clone().doing(Why::Host, doing)?);
        Ok(fd)
    }

    /// Standard input, and whether it is a terminal that is raw now.
    fn input(&self) -> (Option<OwnedFd>, bool) {
        // A closed one (`<&-`) is no input.
        let Ok((input, terminal)) = share::input() else { return (None, false) };
        if !terminal {
            return (Some(input), false);
        }
        // Raw since an earlier life, and in between: of keys that are pressed while it is not, the kernel keeps those
        // before the next one back.
        let mut held = lock(&self.raw);
        if held.is_some() {
            return (Some(input), true);
        }
        match terminal::enter() {
            Ok(Some(raw)) => {
                *held = Some(raw);
                (Some(input), true)
            }
            Ok(None) => {
                log::note("mayfly runs in the background: the guest gets no input from the terminal");
                (None, false)
            }
            Err(cause) => {
                log::note(&format!("the guest gets no input: set the terminal to raw mode: {cause}"));
                (None, false)
            }
        }
    }
}

/// Opens a file; what keeps it from being opened comes with the remedy.
fn open(role: &str, path: &Path, access: Access) -> Result<File> {
    let opened = if access.create { open_output(path, access) } else { open_image(path, access) };
    opened.map_err(|cause| unopened(role, path, access, cause))
}

/// The failure to open a file.
fn unopened(role: &str, path: &Path, access: Access, cause: io::Error) -> Fail {
    let writing = if access.write { " for writing" } else { "" };
    let hint = remedy(&cause, path, access);
    let fail = Fail::new(why_of(&cause), format!("open {role} {}{writing}", path.display())).because(cause);
    hint.into_iter().fold(fail, Fail::hint)
}

/// An output may be a FIFO or a terminal: neither the open nor a write is to wait for its other end.
fn open_output(path: &Path, access: Access) -> io::Result<File> {
    let flags = flags(access) | OFlags::NONBLOCK;
    OpenOptions::new().write(true).create(true).truncate(true).custom_flags(as_number(flags)).open(path)
}

/// A block device to be written is taken for ourselves, which the kernel refuses if it is mounted. What is none is
/// opened without waiting for its other end, should it have one.
fn open_image(path: &Path, access: Access) -> io::Result<File> {
    let about = match std::fs::metadata(path) {
        Err(error) if access.keep && error.kind() == io::ErrorKind::NotFound => {
            return OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        }
        about => about?,
    };
    if about.is_dir() {
        return Err(errno(libc::EISDIR));
    }
    let flags = flags(access);
    let open =
        |flags| OpenOptions::new().read(true).write(access.write).custom_flags(as_number(flags)).open(path);
    if about.file_type().is_block_device() {
        return open(if access.write { flags | OFlags::EXCL } else { flags });
    }
    let file = open(flags | OFlags::NONBLOCK)?;
    // For io_uring, a file in this mode may answer `EAGAIN` where it should wait for its disk.
    fcntl_setfl(&file, flags)?;
    Ok(file)
}

fn flags(access: Access) -> OFlags {
    if access.direct { OFlags::NOCTTY | OFlags::DIRECT } else { OFlags::NOCTTY }
}

/// Flags as the standard library takes them.
fn as_number(flags: OFlags) -> i32 {
    flags.bits().cast_signed()
}

/// A new pseudo-terminal: our end (non-blocking), the other end (raw, so that it echoes nothing), and its name.
fn open_pty() -> io::Result<(OwnedFd, OwnedFd, String)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    unlockpt(&master)?;
    let peer = ioctl_tiocgptpeer(&master, flags)?;
    let mut modes = tcgetattr(&peer)?;
    modes.make_raw();
    tcsetattr(&peer, OptionalActions::Now, &modes)?;
    fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK)?;
    let name = ptsname(&master, Vec::new())?.to_string_lossy().into_owned();
    Ok((master, peer, name))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// What helps against `cause`, if something is known.
fn remedy(cause: &io::Error, path: &Path, access: Access) -> Option<String> {
    let shown = path.display();
    let makes = access.create || access.keep;
    Some(match cause.raw_os_error().unwrap_or(0) {
        libc::ENOENT | libc::ENOTDIR if makes => "make its directory first".to_owned(),
        libc::EACCES | libc::EPERM if makes => "choose another place, or make this one writable".to_owned(),
        libc::EACCES | libc::EPERM if access.write && barred(path).is_none() => match may_read(path) {
            true => "pass readonly=on, or make the file writable".to_owned(),
            false => {
                format!("make it readable, and writable unless you pass readonly=on: chmod a+rw {shown}")
            }
        },
        libc::EROFS if makes => "choose a place on a writable file system".to_owned(),
        libc::EROFS => "pass readonly=on, or copy the file to a writable file system".to_owned(),
        libc::EBUSY if access.write && !access.create => {
            format!("unmount it (findmnt {shown}) or end the program that has it, or pass readonly=on")
        }
        libc::EBUSY | libc::ETXTBSY => "another program holds it for itself: end that one first".to_owned(),
        libc::ENXIO => "nobody reads it: start its reader first".to_owned(),
        libc::EINVAL if access.direct => "its file system knows no O_DIRECT: leave that off".to_owned(),
        _ => return remedy_to_read(path, cause),
    })
}

/// Whether this user may read the file at `path`.
fn may_read(path: &Path) -> bool {
    rustix::fs::access(path, Rights::READ_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::fs::{FileType, fcntl_getfl};

    const READ: Access = Access { write: false, create: false, direct: false, keep: false };
    const WRITE: Access = Access { write: true, ..READ };
    const OUTPUT: Access = Access { create: true, ..WRITE };

    fn refused(path: &Path, access: Access) -> String {
        LinuxHost::default().open("disk0 image", path, access).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_opened_is_named_with_cause_and_remedy() {
        let place = tempfile::tempdir().unwrap();
        let missing = place.path().join("none.img");
        assert_eq!(
            refused(&missing, READ),
            format!(
                "open disk0 image {}: No such file or directory\n  hint: check the name",
                missing.display()
            )
        );
        let text = refused(Path::new("none.img"), WRITE);
        assert!(
            text.starts_with("open disk0 image none.img for writing: No such file or directory\n"),
            "{text}"
        );
        assert!(text.contains("it is looked for in /"), "{text}");
        let text = refused(&missing.join("log"), OUTPUT);
        assert!(text.ends_with("hint: make its directory first"), "{text}");
        let host = LinuxHost::default();
        assert!(host.could_make("disk0 overlay", &missing).is_ok() && !missing.exists());
        std::fs::write(&missing, "").unwrap();
        for path in [place.path().join("no/a"), missing.join("a")] {
            let told = host.could_make("disk0 overlay", &path).unwrap_err().to_string();
            let access = Access { keep: true, ..WRITE };
            assert_eq!(told, host.open("disk0 overlay", &path, access).unwrap_err().to_string());
            assert!(told.ends_with("hint: make its directory first"), "{told}");
        }
        std::fs::remove_file(&missing).unwrap();
        for access in [READ, WRITE] {
            let text = refused(place.path(), access);
            assert!(text.ends_with("Is a directory\n  hint: name a file, not a directory"), "{text}");
        }
    }

    #[test]
    fn no_image_makes_us_wait_and_none_is_left_in_a_mode_of_its_own() {
        let place = tempfile::tempdir().unwrap();
        let fifo = place.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        let host = LinuxHost::default();
        for access in [READ, WRITE] {
            let file = host.open("disk0 image", &fifo, access).unwrap();
            assert!(!fcntl_getfl(file).unwrap().contains(OFlags::NONBLOCK), "{access:?}");
        }
    }

    #[test]
    fn a_block_device_is_written_by_one_alone() {
        let device = Path::new("/dev/loop7");
        let host = LinuxHost::default();
        let first = match host.open("disk0 image", device, WRITE) {
            Ok(first) => first,
            Err(fail) => return eprintln!("skipped: {fail}"),
        };
        let fail = host.open("disk1 image", device, WRITE).unwrap_err();
        assert_eq!(fail.why, Why::Denied);
        assert!(fail.to_string().contains("hint: unmount it (findmnt /dev/loop7)"), "{fail}");
        host.open("disk1 image", device, READ).unwrap();
        drop(first);
        host.open("disk0 image", device, WRITE).unwrap();
    }

    #[test]
    fn each_refusal_of_the_host_has_a_remedy() {
        let at = |path: &str, number, access| remedy(&errno(number), Path::new(path), access);
        let hint = |number, access| at("/a", number, access).unwrap_or_default();
        assert_eq!(hint(libc::EACCES, READ), "make it readable: chmod a+r /a");
        assert_eq!(
            at("/etc/passwd", libc::EACCES, WRITE).unwrap(),
            "pass readonly=on, or make the file writable"
        );
        assert_eq!(
            hint(libc::EACCES, WRITE),
            "make it readable, and writable unless you pass readonly=on: chmod a+rw /a"
        );
        assert_eq!(hint(libc::ENOTDIR, READ), "check the name");
        assert!(hint(libc::EROFS, WRITE).starts_with("pass readonly=on"));
        assert!(hint(libc::EBUSY, OUTPUT).contains("another program"));
        assert_eq!(hint(libc::EMFILE, READ), "");
    }

    #[test]
    fn an_output_is_emptied_and_a_fifo_without_reader_does_not_hold_us_up() {
        let place = tempfile::tempdir().unwrap();
        let log = place.path().join("log");
        std::fs::write(&log, "old").unwrap();
        LinuxHost::default().open("log", &log, OUTPUT).unwrap();
        assert_eq!(std::fs::read(&log).unwrap(), b"");
        let fifo = place.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(refused(&fifo, OUTPUT).ends_with("hint: nobody reads it: start its reader first"));
    }

    #[test]
    fn output_goes_on_in_the_next_life() {
        let place = tempfile::tempdir().unwrap();
        let log = place.path().join("log");
        std::fs::write(&log, "old").unwrap();
        let host = LinuxHost::for_lives();
        for _ in 0..2 {
            let output = host.open("serial output", &log, OUTPUT).unwrap();
            rustix::io::write(output, b"life\n").unwrap();
            host.begin_again();
        }
        assert_eq!(std::fs::read(&log).unwrap(), b"life\nlife\n");
        let [first, second] =
            [0, 1].map(|_| ptsname(host.pty("serial").unwrap().output, Vec::new()).unwrap());
        assert_eq!(first, second, "the reader of a pseudo-terminal need not look for another");
    }

    #[test]
    fn standard_streams_are_given_out_once() {
        let host = LinuxHost::default();
        host.stdio_taken.store(true, Ordering::SeqCst);
        let fail = host.stdio("console").unwrap_err();
        assert_eq!(fail.why, Why::Usage);
        assert!(fail.to_string().contains("something else has them"), "{fail}");
    }

    #[test]
    fn a_pseudo_terminal_carries_bytes_unchanged_and_outlives_its_readers() {
        let (master, _peer, name) = open_pty().unwrap();
        for _ in 0..2 {
            let reader = File::options().read(true).write(true).open(&name).unwrap();
            rustix::io::write(&master, b"\r\n\x03").unwrap();
            let mut seen = [0; 8];
            assert_eq!(rustix::io::read(&reader, &mut seen).unwrap(), 3);
            assert_eq!(seen[..3], *b"\r\n\x03");
            assert_eq!(rustix::io::read(&master, &mut seen), Err(rustix::io::Errno::AGAIN), "no echo");
        }
        let mut fds = [PollFd::new(&master, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&Timespec::default())).unwrap(), 0, "no hang-up when a reader leaves");
    }
}
