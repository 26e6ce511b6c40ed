//! What is known about files: attributes, extended attributes, the file system.

use base::files::{self, Speed};
use rustix::fs::{FileType, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags};
use rustix::io::Errno;

use super::handles::Handle;
use super::server::{Call, MUCH, Server};
use super::wire::{Answer, DONE, Out, Reply, Stop, Words, set};

/// Bytes of the value of an extended attribute, or of all names, at the most (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const LONGEST: u32 = 64 << 10;
/// Whose extended attributes are shared. Access lists (`system.`) are not: the guest's kernel would not keep to them.
const SHARED: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];

fn is_shared(name: &[u8]) -> bool {
    SHARED.iter().any(|prefix| name.starts_with(prefix))
}

impl Server {
    pub(super) fn attr(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let (flags, _, handle) = (words.u32()?, words.u32()?, words.u64()?);
        let about = if flags & 1 != 0 {
            files::about(&self.handle(call, handle, Speed::Disk)?.file)?
        } else {
            self.known(call)?;
            files::about(self.place(call)?)?
        };
        Ok(Out::default().attr_out(&about, self.valid()).reply())
    }

    /// `struct fuse_kstatfs`.
    pub(super) fn about_system(&self, call: &Call<'_>) -> Answer {
        self.known(call)?;
        let about = rustix::fs::fstatfs(self.place(call)?)?;
        let small = |number: i64| u32::try_from(number).unwrap_or(0);
        let mut out = Out::default();
        out.u64(about.f_blocks).u64(about.f_bfree).u64(about.f_bavail).u64(about.f_files).u64(about.f_ffree);
        out.u32(small(about.f_bsize)).u32(small(about.f_namelen)).u32(small(about.f_frsize));
        out.0.resize(80, 0);
        Ok(out.reply())
    }

    /// An answer of unknown length: how long it is for a driver that has no room, or all of it.
    fn sized(value: Vec<u8>, len: usize, size: u32) -> Answer {
        if size == 0 {
            return Ok(Out::default().u32(u32::try_from(len).unwrap_or(u32::MAX)).u32(0).reply());
        }
        if u32::try_from(value.len()).is_ok_and(|len| len <= size) {
            Ok(Reply::Bytes(value))
        } else {
            Err(Stop::Refused(Errno::RANGE))
        }
    }

    pub(super) fn attribute(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let (size, _, name) = (words.u32()?, words.u32()?, words.text()?);
        if !is_shared(name) {
            return Err(Stop::Refused(Errno::OPNOTSUPP));
        }
        self.known_in_memory(call)?;
        let room = usize::try_from(size.min(LONGEST)).unwrap_or(0);
        let (len, value) = files::attribute(self.place(call)?, name, room)?;
        Self::sized(value, len, size)
    }

    pub(super) fn attributes(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let size = words.u32()?;
        self.known_in_memory(call)?;
        let all = files::attributes(self.place(call)?)?;
        let shared: Vec<u8> = all
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| is_shared(name))
            .flatten()
            .copied()
            .collect();
        let len = shared.len();
        Self::sized(shared, len, size)
    }

    /// `struct fuse_setattr_in`: permissions, owner, length and times, each if its bit is set.
    pub(super) fn set_attr(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        self.writable()?;
        self.known_in_memory(call)?;
        let (valid, _, handle, size) = (words.u32()?, words.u32()?, words.u64()?, words.u64()?);
        let (_owner, accessed, modified, _) = (words.u64()?, words.u64()?, words.u64()?, words.u64()?);
        let (accessed_ns, modified_ns, _) = (words.u32()?, words.u32()?, words.u32()?);
        let (mode, _, user, group) = (words.u32()?, words.u32()?, words.u32()?, words.u32()?);
        let has = |bit: u32| valid & bit != 0;
        // A file that has lost its name is still open.
        let handle =
            if has(set::HANDLE) { Some(self.handles.get_of(call.header.node, handle)?) } else { None };
        let file = match &handle {
            Some(handle) => handle.file.clone(),
            None => self.place(call)?,
        };
        if has(set::MODE) {
            files::set_mode(&file, mode)?;
        }
        if has(set::USER | set::GROUP) {
            files::set_owner(&file, has(set::USER).then_some(user), has(set::GROUP).then_some(group))?;
        }
        if has(set::SIZE) {
            self.set_size(call, handle.as_deref(), size, has(set::KILL_SUIDGID))?;
        }
        if has(set::ACCESSED | set::MODIFIED) {
            let time = |given: u32, now: u32, (seconds, nanoseconds): (u64, u32)| Timespec {
                tv_sec: seconds.cast_signed(),
                tv_nsec: match (has(given), has(now)) {
                    (false, _) => UTIME_OMIT,
                    (true, true) => UTIME_NOW,
                    (true, false) => nanoseconds.into(),
                },
            };
            let last_access = time(set::ACCESSED, set::ACCESSED_NOW, (accessed, accessed_ns));
            let last_modification = time(set::MODIFIED, set::MODIFIED_NOW, (modified, modified_ns));
            files::set_times(&file, &Timestamps { last_access, last_modification })?;
        }
        let about = files::about(&file)?;
        Ok(Out::default().attr_out(&about, self.valid()).reply())
    }

    fn set_size(&self, call: &Call<'_>, handle: Option<&Handle>, size: u64, drop_rights: bool) -> Answer<()> {
        if self.nodes.known(call.header.node)?.kind != FileType::RegularFile {
            return Err(Stop::Refused(Errno::INVAL));
        }
        let opened;
        let file = match handle {
            Some(handle) => &*handle.file,
            None => {
                opened = files::open(self.place(call)?, OFlags::WRONLY)?;
                &opened
            }
        };
        // Much that is in memory is not given up at once.
        if call.at_once && files::about(file)?.stx_size > MUCH {
            return Err(Stop::Waits);
        }
        if drop_rights {
            self.drop_privileges(file)?;
        }
        Ok(rustix::fs::ftruncate(file, size)?)
    }

    pub(super) fn set_attribute(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        self.writable()?;
        let (size, flags, name) = (words.u32()?, words.u32()?, words.text()?);
        let value = words.bytes(size)?;
        if !is_shared(name) {
            return Err(Stop::Refused(Errno::OPNOTSUPP));
        }
        self.known_in_memory(call)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Stop::Refused(Errno::INVAL))?;
        files::set_attribute(self.place(call)?, name, value, flags)?;
        Ok(DONE)
    }

    pub(super) fn remove_attribute(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        self.writable()?;
        let name = words.text()?;
        if !is_shared(name) {
            return Err(Stop::Refused(Errno::OPNOTSUPP));
        }
        self.known_in_memory(call)?;
        files::remove_attribute(self.place(call)?, name)?;
        Ok(DONE)
    }
}
