//! The files of a directory that is lent to someone who is not trusted: reached one name at a time from the directory on, and
//! never through a symbolic link of the host.
//!
//! A file is held by a descriptor of its place (`O_PATH`), which nobody can swap for another file. What a [`Name`] can
//! say is why a step leads nowhere but down.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, RenameFlags, ResolveFlags, Statx, StatxFlags, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;

pub use crate::sys::owner::as_owner;
use crate::sys::owner::is_masked;

/// An answer of the host, or its error number.
pub type Result<T> = std::result::Result<T, Errno>;

/// Bytes of a name at the most (`NAME_MAX`).
const NAME_BYTES: usize = 255;

/// The name of a file in its directory: one step down, never up and never two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a [u8]);

impl<'a> Name<'a> {
    /// # Errors
    /// `EINVAL`: it is no name, or one that leads elsewhere; `ENAMETOOLONG`.
    pub fn new(bytes: &'a [u8]) -> Result<Name<'a>> {
        let wrong = bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&0);
        if wrong || bytes.contains(&b'/') {
            return Err(Errno::INVAL);
        }
        if bytes.len() > NAME_BYTES { Err(Errno::NAMETOOLONG) } else { Ok(Name(bytes)) }
    }

    /// The bytes.
    pub fn bytes(self) -> &'a [u8] {
        self.0
    }
}

/// How long the files of a file system may let us wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speed {
    /// They are memory.
    Memory,
    /// They are on a disk of this host; what has been read is memory.
    Disk,
    /// Someone else answers: a server, a program, the kernel itself.
    Far,
}

/// How long the file system of `file` may let us wait.
pub fn speed(file: impl AsFd) -> Speed {
    const MEMORY: [i64; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6]; // tmpfs, ramfs, hugetlbfs
    const DISK: [i64; 9] = [
        0xef53,      // ext2, ext3, ext4
        0x5846_5342, // xfs
        0x9123_683e, // btrfs
        0x794c_7630, // overlay
        0xf2f5_2010, // f2fs
        0x2fc1_2fc1, // zfs
        0xca45_1a4e, // bcachefs
        0x7371_7368, // squashfs
        0xe0f5_e1e2, // erofs
    ];
    match rustix::fs::fstatfs(file) {
        Ok(about) if MEMORY.contains(&about.f_type) => Speed::Memory,
        Ok(about) if DISK.contains(&about.f_type) => Speed::Disk,
        _ => Speed::Far,
    }
}

/// How far a step may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// To what the kernel knows without waiting, on the same file system.
    Remembered,
    /// To what is on the same file system.
    Same,
    /// Into other file systems that are mounted there, too.
    Any,
}

/// Opens the place of `name` in `parent`, whatever is there, a symbolic link included.
///
/// # Errors
/// As `openat2(2)`; `EAGAIN`, `EXDEV`, `EINVAL`: it is beyond the reach.
pub fn step(parent: impl AsFd, name: Name<'_>, reach: Reach) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
    resolve |= match reach {
        Reach::Remembered => ResolveFlags::CACHED | ResolveFlags::NO_XDEV,
        Reach::Same => ResolveFlags::NO_XDEV,
        Reach::Any => ResolveFlags::empty(),
    };
    match rustix::fs::openat2(&parent, name.0, flags, Mode::empty(), resolve) {
        // Before Linux 5.6, or a sandbox that knows no openat2: one name, not followed, says the same.
        Err(Errno::NOSYS | Errno::PERM) if reach == Reach::Any => {
            rustix::fs::openat(&parent, name.0, flags, Mode::empty())
        }
        Err(Errno::NOSYS | Errno::PERM) => Err(Errno::AGAIN),
        answer => answer,
    }
}

const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);

/// What there is to know about an open file or place.
///
/// # Errors
/// As `statx(2)`.
pub fn about(file: impl AsFd) -> Result<Statx> {
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, WANTED)
}

/// The same of `name` in `parent`.
///
/// # Errors
/// As `statx(2)`.
pub fn about_name(parent: impl AsFd, name: Name<'_>) -> Result<Statx> {
    rustix::fs::statx(parent, name.0, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, WANTED)
}

/// The kernel's own link to an open file, for calls that take a path and no descriptor of a place.
fn link_to(file: &impl AsFd) -> String {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd())
}

/// Opens the file at `place` to be read or written. Only for files and directories: what else is opened there
/// might wait, or be a device.
///
/// # Errors
/// As `open(2)`.
pub fn open(place: impl AsFd, flags: OFlags) -> Result<OwnedFd> {
    let flags = (flags - OFlags::NOFOLLOW) | OFlags::CLOEXEC | OFlags::NOCTTY;
    rustix::fs::open(link_to(&place), flags, Mode::empty())
}

/// Opens the directory at `place` to be listed.
///
/// # Errors
/// As `open(2)`.
pub fn open_directory(place: impl AsFd) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(place, c".", flags, Mode::empty())
}

/// Opens the place of an open file.
///
/// # Errors
/// As `open(2)`.
pub fn place_of(file: impl AsFd) -> Result<OwnedFd> {
    rustix::fs::open(link_to(&file), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// Makes the file `name` in `parent`, which must not be there, and opens it with `flags`.
///
/// # Errors
/// As `open(2)`.
pub fn create(parent: impl AsFd, name: Name<'_>, flags: OFlags, mode: u32) -> Result<OwnedFd> {
    let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = rustix::fs::openat(parent, name.0, flags, Mode::from_raw_mode(mode & 0o7777))?;
    unmask(&file, mode)?;
    Ok(file)
}

/// Makes a file without a name on the file system of `parent`; unless `flags` has `EXCL`, [`link`] can give it one.
///
/// # Errors
/// As `open(2)`.
pub fn create_nameless(parent: impl AsFd, flags: OFlags, mode: u32) -> Result<OwnedFd> {
    let flags = flags | OFlags::TMPFILE | OFlags::CLOEXEC;
    let file = rustix::fs::openat(parent, c".", flags, Mode::from_raw_mode(mode & 0o7777))?;
    unmask(&file, mode)?;
    Ok(file)
}

/// Makes a directory.
///
/// # Errors
/// As `mkdir(2)`.
pub fn create_directory(parent: impl AsFd, name: Name<'_>, mode: u32) -> Result<()> {
    rustix::fs::mkdirat(&parent, name.0, Mode::from_raw_mode(mode & 0o7777))?;
    unmask_name(&parent, name, mode)
}

/// Gives what was just made the permissions that a mask has taken from it.
fn unmask(made: impl AsFd, mode: u32) -> Result<()> {
    if !is_masked() {
        return Ok(());
    }
    // Bits that came from the directory stay.
    let inherited = u32::from(about(&made)?.stx_mode) & 0o2000;
    set_mode(made, mode | inherited)
}

fn unmask_name(parent: impl AsFd, name: Name<'_>, mode: u32) -> Result<()> {
    if is_masked() { unmask(step(parent, name, Reach::Same)?, mode) } else { Ok(()) }
}

/// Makes a file of a kind that is not opened here: a pipe, a socket, a whiteout.
///
/// # Errors
/// As `mknod(2)`.
pub fn create_node(parent: impl AsFd, name: Name<'_>, kind: FileType, mode: u32) -> Result<()> {
    rustix::fs::mknodat(&parent, name.0, kind, Mode::from_raw_mode(mode & 0o7777), 0)?;
    unmask_name(&parent, name, mode)
}

/// Makes a symbolic link that says `target`.
///
/// # Errors
/// As `symlink(2)`.
pub fn create_link(parent: impl AsFd, name: Name<'_>, target: &[u8]) -> Result<()> {
    rustix::fs::symlinkat(target, parent, name.0)
}

/// What the symbolic link at `place` says.
///
/// # Errors
/// As `readlink(2)`.
pub fn read_link(place: impl AsFd) -> Result<Vec<u8>> {
    rustix::fs::readlinkat(place, c"", Vec::new()).map(std::ffi::CString::into_bytes)
}

/// Gives the file at `place` one more name.
///
/// # Errors
/// As `link(2)`.
pub fn link(place: impl AsFd, parent: impl AsFd, name: Name<'_>) -> Result<()> {
    // The kernel's link is followed, and leads to the file itself, even if that is a symbolic link.
    rustix::fs::linkat(CWD, link_to(&place), parent, name.0, AtFlags::SYMLINK_FOLLOW)
}

/// Removes a name: that of a directory, or of anything else.
///
/// # Errors
/// As `unlink(2)` and `rmdir(2)`.
pub fn remove(parent: impl AsFd, name: Name<'_>, directory: bool) -> Result<()> {
    let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
    rustix::fs::unlinkat(parent, name.0, flags)
}

/// Moves a file to another name.
///
/// # Errors
/// As `renameat2(2)`.
pub fn rename(from: (impl AsFd, Name<'_>), to: (impl AsFd, Name<'_>), flags: RenameFlags) -> Result<()> {
    if flags.is_empty() {
        return rustix::fs::renameat(from.0, from.1.0, to.0, to.1.0);
    }
    rustix::fs::renameat_with(from.0, from.1.0, to.0, to.1.0, flags)
}

/// Changes the permissions of the file at `place`.
///
/// # Errors
/// As `chmod(2)`.
pub fn set_mode(place: impl AsFd, mode: u32) -> Result<()> {
    rustix::fs::chmod(link_to(&place), Mode::from_raw_mode(mode & 0o7777))
}

/// Changes the owner or group of the file at `place`.
///
/// # Errors
/// As `chown(2)`; `EINVAL`: no number that an owner can have.
pub fn set_owner(place: impl AsFd, user: Option<u32>, group: Option<u32>) -> Result<()> {
    if user == Some(u32::MAX) || group == Some(u32::MAX) {
        return Err(Errno::INVAL);
    }
    let (user, group) = (user.map(Uid::from_raw), group.map(Gid::from_raw));
    rustix::fs::chownat(place, c"", user, group, AtFlags::EMPTY_PATH)
}

/// Changes the times of the file at `place`.
///
/// # Errors
/// As `utimensat(2)`.
pub fn set_times(place: impl AsFd, times: &Timestamps) -> Result<()> {
    rustix::fs::utimensat(CWD, link_to(&place), times, AtFlags::empty())
}

/// The value of an extended attribute, or how long it is where `room` is 0.
///
/// # Errors
/// As `getxattr(2)`.
pub fn attribute(place: impl AsFd, name: &[u8], room: usize) -> Result<(usize, Vec<u8>)> {
    if room == 0 {
        return Ok((rustix::fs::getxattr_query(link_to(&place), name)?, Vec::new()));
    }
    let mut value = vec![0; room];
    let len = rustix::fs::getxattr(link_to(&place), name, value.as_mut_slice())?;
    value.truncate(len);
    Ok((len, value))
}

/// Sets an extended attribute; `create`: it must not be there, `replace`: it must.
///
/// # Errors
/// As `setxattr(2)`.
pub fn set_attribute(place: impl AsFd, name: &[u8], value: &[u8], flags: XattrFlags) -> Result<()> {
    rustix::fs::setxattr(link_to(&place), name, value, flags)
}

/// The names of the extended attributes, each with a zero behind it.
///
/// # Errors
/// As `listxattr(2)`.
pub fn attributes(place: impl AsFd) -> Result<Vec<u8>> {
    /// `XATTR_LIST_MAX`.
    const MOST: usize = 64 << 10;
    let path = link_to(&place);
    if rustix::fs::listxattr_query(&path)? == 0 {
        return Ok(Vec::new());
    }
    let mut names = vec![0; MOST];
    let len = rustix::fs::listxattr(&path, names.as_mut_slice())?;
    names.truncate(len);
    Ok(names)
}

/// Removes an extended attribute.
///
/// # Errors
/// As `removexattr(2)`.
pub fn remove_attribute(place: impl AsFd, name: &[u8]) -> Result<()> {
    rustix::fs::removexattr(link_to(&place), name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn names_lead_one_step_down() {
        for wrong in [&b""[..], b".", b"..", b"a/b", b"/", b"a\0b", b"../x"] {
            assert_eq!(Name::new(wrong), Err(Errno::INVAL), "{wrong:?}");
        }
        assert_eq!(Name::new(&[b'a'; 256]), Err(Errno::NAMETOOLONG));
        assert!(Name::new(b"...").is_ok() && Name::new(&[0xff; 255]).is_ok());
    }

    #[test]
    fn links_are_places_and_are_never_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "content").unwrap();
        symlink("/etc", dir.path().join("out")).unwrap();
        let top = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let out = step(&top, Name::new(b"out").unwrap(), Reach::Any).unwrap();
        assert_eq!(FileType::from_raw_mode(about(&out).unwrap().stx_mode.into()), FileType::Symlink);
        assert_eq!(read_link(&out).unwrap(), b"/etc");
        assert_eq!(step(&out, Name::new(b"passwd").unwrap(), Reach::Any).unwrap_err(), Errno::NOTDIR);
        let second = Name::new(b"second").unwrap();
        link(&out, &top, second).unwrap();
        assert_eq!(std::fs::read_link(dir.path().join("second")).unwrap().to_str(), Some("/etc"));
        let flags = OFlags::RDWR;
        assert_eq!(create(&top, second, flags, 0o600).unwrap_err(), Errno::EXIST, "nor by a new file");
    }

    #[test]
    fn a_mask_that_cannot_be_taken_off_is_made_up_for() {
        let dir = tempfile::tempdir().unwrap();
        let top = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        // A thread that has not been made ready is one whose host refuses it a mask of its own.
        assert!(is_masked());
        let name = |text: &'static str| Name::new(text.as_bytes()).unwrap();
        drop(create(&top, name("file"), OFlags::RDWR, 0o666).unwrap());
        create_directory(&top, name("dir"), 0o777).unwrap();
        create_node(&top, name("pipe"), FileType::Fifo, 0o622).unwrap();
        for (name, mode) in [("file", 0o666), ("dir", 0o777), ("pipe", 0o622)] {
            let found = std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
            assert_eq!(found & 0o777, mode, "{name}");
        }
    }

    #[test]
    fn places_take_what_paths_take() {
        let dir = tempfile::tempdir().unwrap();
        let top = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let name = Name::new(b"file").unwrap();
        let file = as_owner(None, || create(&top, name, OFlags::RDWR, 0o666)).unwrap().unwrap();
        let found = std::fs::metadata(dir.path().join("file")).unwrap();
        assert_eq!(found.permissions().mode() & 0o777, 0o666, "no mask of this process is in the way");
        let place = place_of(&file).unwrap();
        assert_eq!(about(&place).unwrap().stx_ino, found.ino());
        set_mode(&place, 0o640).unwrap();
        rustix::fs::ftruncate(open(&place, OFlags::WRONLY).unwrap(), 12345).unwrap();
        let about = about_name(&top, name).unwrap();
        assert_eq!((about.stx_mode & 0o777, about.stx_size), (0o640, 12345));
        // The file system may not know them.
        if set_attribute(&place, b"user.a", b"value", XattrFlags::empty()).is_ok() {
            assert_eq!(attribute(&place, b"user.a", 100).unwrap(), (5, b"value".to_vec()));
            assert_eq!(attributes(&place).unwrap(), b"user.a\0");
            remove_attribute(&place, b"user.a").unwrap();
        }
        assert!(attribute(&place, b"user.a", 0).is_err());
    }
}
