//! FUSE as it is spoken over the rings: version 7 of `include/uapi/linux/fuse.h`, whose numbers these are.

use base::files;
use rustix::fs::Statx;
use rustix::io::Errno;

/// Bytes of `struct fuse_in_header`, before each request.
pub const IN_HEADER: u64 = 40;
/// Bytes of `struct fuse_out_header`, before each answer.
pub const OUT_HEADER: u64 = 16;
/// Bytes of `struct fuse_write_in`, before the data of a write.
pub const WRITE_IN: u64 = 40;
/// The node of the shared directory itself.
pub const ROOT: u64 = 1;
/// The version spoken here; what came later is offered bit by bit, and declined.
pub const VERSION: (u32, u32) = (7, 37);
/// The oldest version of the driver: the first that had virtio-fs.
pub const OLDEST_MINOR: u32 = 31;

/// What a request asks for (`enum fuse_opcode`).
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
}

/// What both sides can, bits of the flags of INIT.
pub mod init {
    pub const ASYNC_READ: u32 = 1;
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const WRITEBACK_CACHE: u32 = 1 << 16;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const CACHE_SYMLINKS: u32 = 1 << 23;
    pub const SUBMOUNTS: u32 = 1 << 27;
    pub const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
    pub const INIT_EXT: u32 = 1 << 30;
    /// Of the second word of flags.
    pub const DIRECT_IO_ALLOW_MMAP: u32 = 1 << (36 - 32);
}

/// How a file is opened, bits of the answer to OPEN.
pub mod opened {
    pub const DIRECT_IO: u32 = 1;
    pub const KEEP_CACHE: u32 = 2;
    pub const CACHE_DIR: u32 = 8;
    /// Nothing is lost if nobody asks at the end.
    pub const NOFLUSH: u32 = 1 << 5;
}

/// `FUSE_OPEN_KILL_SUIDGID`: who opens the file has no right to keep what it gives to who runs it.
pub const KILL_SUIDGID_AT_OPEN: u32 = 1;

/// How bytes are written, flags of WRITE.
pub mod write {
    /// The driver sends a page of its cache.
    pub const FROM_CACHE: u32 = 1;
    /// As [`super::KILL_SUIDGID_AT_OPEN`].
    pub const KILL_SUIDGID: u32 = 4;
}

/// What SETATTR is to set.
pub mod set {
    pub const MODE: u32 = 1;
    pub const USER: u32 = 1 << 1;
    pub const GROUP: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ACCESSED: u32 = 1 << 4;
    pub const MODIFIED: u32 = 1 << 5;
    /// The file is named by its handle.
    pub const HANDLE: u32 = 1 << 6;
    pub const ACCESSED_NOW: u32 = 1 << 7;
    pub const MODIFIED_NOW: u32 = 1 << 8;
    /// As [`super::KILL_SUIDGID_AT_OPEN`].
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `FUSE_ATTR_SUBMOUNT`: the directory is on another file system than the one it is in.
pub const ATTR_SUBMOUNT: u32 = 1;

/// Why a request has no answer of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// This one cannot be done.
    Refused(Errno),
    /// None of its kind can: the driver need not ask again.
    Unknown,
    /// It cannot be done without waiting.
    Waits,
}

impl From<Errno> for Stop {
    fn from(error: Errno) -> Stop {
        // What the host does not know for one file, another may; the driver would never ask again.
        Stop::Refused(if error == Errno::NOSYS { Errno::OPNOTSUPP } else { error })
    }
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Stop {
        Stop::from(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

/// The answer to a request, or why there is none.
pub type Answer<T = Reply> = Result<T, Stop>;

/// What follows the header of an answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// No answer is wanted, not even a header.
    Silence,
    /// These bytes.
    Bytes(Vec<u8>),
    /// So many bytes, which are in guest memory already.
    Moved(u64),
}

/// That it has been done.
pub const DONE: Reply = Reply::Bytes(Vec::new());

/// `struct fuse_in_header`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub len: u32,
    pub op: u32,
    pub unique: u64,
    pub node: u64,
    pub uid: u32,
    pub gid: u32,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// It breaks off.
    pub fn read(bytes: &[u8]) -> Answer<Header> {
        let mut words = Words(bytes);
        let (len, op, unique, node) = (words.u32()?, words.u32()?, words.u64()?, words.u64()?);
        let (uid, gid, _pid, _more) = (words.u32()?, words.u32()?, words.u32()?, words.u32()?);
        Ok(Header { len, op, unique, node, uid, gid })
    }
}

/// The rest of a request, read from the front.
pub struct Words<'a>(pub &'a [u8]);

impl<'a> Words<'a> {
    fn take<const N: usize>(&mut self) -> Answer<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Stop::Refused(Errno::INVAL))?;
        self.0 = rest;
        Ok(*first)
    }

    pub fn u32(&mut self) -> Answer<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Answer<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// The bytes up to a zero.
    pub fn text(&mut self) -> Answer<&'a [u8]> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(Stop::Refused(Errno::INVAL))?;
        let (text, rest) = self.0.split_at_checked(end).unwrap_or_default();
        self.0 = rest.get(1..).unwrap_or_default();
        Ok(text)
    }

    /// A name.
    pub fn name(&mut self) -> Answer<files::Name<'a>> {
        Ok(files::Name::new(self.text()?)?)
    }

    /// The first `len` bytes of what is left.
    pub fn bytes(&mut self, len: u32) -> Answer<&'a [u8]> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(Stop::Refused(Errno::INVAL))?;
        self.0 = rest;
        Ok(bytes)
    }
}

/// An answer under way.
#[derive(Debug, Default)]
pub struct Out(pub Vec<u8>);

impl Out {
    pub fn u16(&mut self, value: u16) -> &mut Out {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u32(&mut self, value: u32) -> &mut Out {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u64(&mut self, value: u64) -> &mut Out {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// `struct fuse_attr`, 88 bytes.
    pub fn attr(&mut self, about: &Statx, flags: u32) -> &mut Out {
        self.u64(about.stx_ino).u64(about.stx_size).u64(about.stx_blocks);
        let times = [&about.stx_atime, &about.stx_mtime, &about.stx_ctime];
        for time in times {
            self.u64(time.tv_sec.cast_unsigned());
        }
        for time in times {
            self.u32(time.tv_nsec);
        }
        self.u32(about.stx_mode.into()).u32(about.stx_nlink).u32(about.stx_uid).u32(about.stx_gid);
        self.u32(device_number(about.stx_rdev_major, about.stx_rdev_minor));
        self.u32(about.stx_blksize).u32(flags)
    }

    /// `struct fuse_attr_out`, 104 bytes.
    pub fn attr_out(&mut self, about: &Statx, valid: u64) -> &mut Out {
        self.u64(valid).u32(0).u32(0).attr(about, 0)
    }

    /// `struct fuse_entry_out`, 128 bytes.
    pub fn entry(&mut self, node: u64, about: &Statx, flags: u32, valid: u64) -> &mut Out {
        // Numbers of nodes are never used twice, so there is one generation.
        self.u64(node).u64(0).u64(valid).u64(valid).u32(0).u32(0).attr(about, flags)
    }

    /// An entry that says that there is nothing, for so many seconds.
    pub fn no_entry(&mut self, valid: u64) -> &mut Out {
        self.u64(0).u64(0).u64(valid);
        self.0.extend([0; ENTRY - 24]);
        self
    }

    /// `struct fuse_open_out`, 16 bytes.
    pub fn open(&mut self, handle: u64, flags: u32) -> &mut Out {
        self.u64(handle).u32(flags).u32(0)
    }

    pub fn reply(&mut self) -> Reply {
        Reply::Bytes(std::mem::take(&mut self.0))
    }
}

/// Bytes of `struct fuse_entry_out`.
pub const ENTRY: usize = 128;

/// A device number in the form that the kernel calls new.
fn device_number(major: u32, minor: u32) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_as_long_as_the_kernel_has_them() {
        let about = base::files::about(std::fs::File::open("/").unwrap()).unwrap();
        let len = |out: &mut Out| out.0.len();
        assert_eq!(len(Out::default().attr(&about, 0)), 88);
        assert_eq!(len(Out::default().attr_out(&about, 1)), 104);
        assert_eq!(len(Out::default().entry(1, &about, 0, 1)), ENTRY);
        assert_eq!(len(Out::default().no_entry(1)), ENTRY);
        assert_eq!(len(Out::default().open(1, 0)), 16);
        assert_eq!(device_number(8, 1), 0x801);
        assert_eq!(device_number(259, 0x12345), 0x1231_0345);
    }

    #[test]
    fn requests_that_break_off_are_refused() {
        assert!(Header::read(&[0; 39]).is_err() && Header::read(&[0; 40]).is_ok());
        let mut words = Words(b"a\0bc");
        assert_eq!(words.text().unwrap(), b"a");
        assert_eq!(words.text().unwrap_err(), Stop::Refused(Errno::INVAL));
        assert!(words.u32().is_err() && words.bytes(3).is_err());
        assert_eq!(words.bytes(2).unwrap(), b"bc");
        assert!(Words(b"..\0").name().is_err());
    }
}
