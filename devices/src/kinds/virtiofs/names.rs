//! Names made, moved and removed.

use std::os::fd::OwnedFd;

use base::files::{self, Name, as_owner};
use rustix::fs::{FileType, OFlags, RenameFlags, Statx};
use rustix::io::Errno;

use super::handles::Handle;
use super::nodes::Place;
use super::server::{Call, MUCH, Server};
use super::wire::{Answer, DONE, KILL_SUIDGID_AT_OPEN, Out, Reply, Stop, Words};

/// Bytes that a symbolic link says at the most (`PATH_MAX`).
const TARGET_BYTES: usize = 4095;

impl Server {
    /// Whether names may change; the place of the directory that the request is about.
    fn parent(&self, call: &Call<'_>) -> Answer<Place> {
        self.writable()?;
        let known = self.known_in_memory(call)?;
        if known.kind != FileType::Directory {
            return Err(Stop::Refused(Errno::NOTDIR));
        }
        self.place(call)
    }

    /// # Errors
    /// The share is only to be read.
    pub(super) fn writable(&self) -> Answer<()> {
        if self.rules.readonly { Err(Stop::Refused(Errno::ROFS)) } else { Ok(()) }
    }

    /// Runs `make` as who asks.
    fn make<T>(call: &Call<'_>, make: impl FnOnce() -> files::Result<T>) -> Answer<T> {
        Ok(as_owner(Some((call.header.uid, call.header.gid)), make)??)
    }

    /// What a lookup says of what was made.
    fn made(&self, call: &Call<'_>, parent: &Place, name: Name<'_>) -> Answer {
        let (node, about, flags) = self.find((call.header.node, parent), name, call.reach())?;
        Ok(Out::default().entry(node, &about, flags, self.valid()).reply())
    }

    pub(super) fn make_directory(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let (mode, _mask, name) = (words.u32()?, words.u32()?, words.name()?);
        let parent = self.parent(call)?;
        Self::make(call, || files::create_directory(&parent, name, mode))?;
        self.made(call, &parent, name)
    }

    pub(super) fn make_node(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let (mode, device) = (words.u32()?, words.u32()?);
        let (_mask, _, name) = (words.u32()?, words.u32()?, words.name()?);
        let parent = self.parent(call)?;
        match FileType::from_raw_mode(mode) {
            FileType::RegularFile => {
                drop(Self::make(call, || files::create(&parent, name, OFlags::WRONLY, mode))?);
            }
            kind @ (FileType::Fifo | FileType::Socket) => {
                Self::make(call, || files::create_node(&parent, name, kind, mode))?;
            }
            // What overlayfs puts where a file was removed.
            FileType::CharacterDevice if device == 0 => {
                Self::make(call, || files::create_node(&parent, name, FileType::CharacterDevice, mode))?;
            }
            // One made here would be a device of the host.
            FileType::CharacterDevice | FileType::BlockDevice => return Err(Stop::Refused(Errno::PERM)),
            _ => return Err(Stop::Refused(Errno::INVAL)),
        }
        self.made(call, &parent, name)
    }

    pub(super) fn make_link(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let (name, target) = (words.name()?, words.text()?);
        if target.len() > TARGET_BYTES {
            return Err(Stop::Refused(Errno::NAMETOOLONG));
        }
        let parent = self.parent(call)?;
        Self::make(call, || files::create_link(&parent, name, target))?;
        self.made(call, &parent, name)
    }

    /// Makes a file and opens it, or opens the one that is there.
    pub(super) fn create(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let (flags, mode, _mask, how) = (words.u32()?, words.u32()?, words.u32()?, words.u32()?);
        let name = words.name()?;
        let host_flags = self.host_flags(flags)?;
        let parent = self.parent(call)?;
        self.handles.room()?;
        let made = Self::make(call, || files::create(&parent, name, host_flags - OFlags::TRUNC, mode));
        let (file, node, about) = match made {
            Ok(file) => {
                let place = files::place_of(&file)?;
                let about = files::about(&place)?;
                let node = self.nodes.found(call.header.node, name.bytes(), place, &about)?;
                (file, node, about)
            }
            Err(Stop::Refused(Errno::EXIST)) if flags & OFlags::EXCL.bits() == 0 => {
                let found = self.open_found(call, &parent, name, host_flags)?;
                if host_flags.contains(OFlags::TRUNC) && how & KILL_SUIDGID_AT_OPEN != 0 {
                    self.drop_privileges(&found.0)?;
                }
                found
            }
            Err(stop) => return Err(stop),
        };
        self.opened_as(node, file, &about)
    }

    /// Opens what is there already, if it is a file: node, and what is known of it.
    fn open_found(
        &self,
        call: &Call<'_>,
        parent: &Place,
        name: Name<'_>,
        flags: OFlags,
    ) -> Answer<(OwnedFd, u64, Statx)> {
        let place = self.nodes.step(parent, name, call.reach())?;
        let about = files::about(&place)?;
        if call.at_once && flags.contains(OFlags::TRUNC) && about.stx_size > MUCH {
            return Err(Stop::Waits);
        }
        match FileType::from_raw_mode(about.stx_mode.into()) {
            FileType::RegularFile => {}
            FileType::Symlink => return Err(Stop::Refused(Errno::LOOP)),
            FileType::Directory => return Err(Stop::Refused(Errno::ISDIR)),
            _ => return Err(Stop::Refused(Errno::EXIST)),
        }
        // What is mounted there may be another's.
        let file = files::open(&place, flags | OFlags::NONBLOCK)?;
        let about = files::about(&place)?;
        let node = self.nodes.found(call.header.node, name.bytes(), place, &about)?;
        Ok((file, node, about))
    }

    /// The answer to CREATE: what a lookup and an open say.
    fn opened_as(&self, node: u64, file: OwnedFd, about: &Statx) -> Answer {
        let speed = self.nodes.known(node)?.speed;
        let how = self.opened(node, &file, speed);
        match self.handles.add(Handle::file(node, speed, file)) {
            Ok(handle) => Ok(Out::default().entry(node, about, 0, self.valid()).open(handle, how).reply()),
            Err(stop) => {
                // The driver is not told of it.
                self.forget_one(node);
                Err(stop)
            }
        }
    }

    /// A file without a name, which a link may get later.
    pub(super) fn create_nameless(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let (flags, mode) = (words.u32()?, words.u32()?);
        let host_flags = self.host_flags(flags)?;
        let parent = self.parent(call)?;
        self.handles.room()?;
        let exclusive = OFlags::from_bits_retain(flags) & OFlags::EXCL;
        let file = Self::make(call, || files::create_nameless(&parent, host_flags | exclusive, mode))?;
        let place = files::place_of(&file)?;
        let about = files::about(&place)?;
        // No file has this name, so its place is never given up.
        let node = self.nodes.found(call.header.node, b"", place, &about)?;
        self.opened_as(node, file, &about)
    }

    pub(super) fn link(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let (old, name) = (words.u64()?, words.name()?);
        let parent = self.parent(call)?;
        let place = self.nodes.place(old, call.at_once)?;
        files::link(&place, &parent, name)?;
        self.made(call, &parent, name)
    }

    pub(super) fn remove(&self, call: &Call<'_>, words: &mut Words<'_>, directory: bool) -> Answer {
        let name = words.name()?;
        let parent = self.parent(call)?;
        self.nodes.change(&[(&parent, name)], || files::remove(&parent, name, directory))?;
        Ok(DONE)
    }

    pub(super) fn rename(&self, call: &Call<'_>, words: &mut Words<'_>, with_flags: bool) -> Answer {
        let to_node = words.u64()?;
        let flags = if with_flags { (words.u32()?, words.u32()?).0 } else { 0 };
        let flags = RenameFlags::from_bits(flags).ok_or(Stop::Refused(Errno::INVAL))?;
        let (name, new_name) = (words.name()?, words.name()?);
        let parent = self.parent(call)?;
        let new_parent = self.nodes.place(to_node, call.at_once)?;
        let (from, to) = ((&parent, name), (&new_parent, new_name));
        let move_it = || match flags.contains(RenameFlags::WHITEOUT) {
            // The whiteout that is left belongs to who asks.
            true => Self::make(call, || files::rename(from, to, flags)),
            false => Ok(files::rename(from, to, flags)?),
        };
        self.nodes.change(&[from, to], move_it)?;
        Ok(DONE)
    }

    pub(super) fn sync(&self, call: &Call<'_>) -> Answer {
        if self.rules.readonly {
            return Ok(DONE);
        }
        self.known_in_memory(call)?;
        rustix::fs::syncfs(files::open_directory(self.place(call)?)?)?;
        Ok(Reply::Bytes(Vec::new()))
    }
}
