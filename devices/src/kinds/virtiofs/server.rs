//! The server: what is asked of the shared directory, done on the host, from any thread.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base::clock::Clock;
use base::files::{self, Name, Reach, Speed};
use base::memory::Memory;
use base::meter::Counter;
use rustix::fs::{FileType, OFlags, Statx};
use rustix::io::Errno;

use super::Cache;
use super::handles::{Handle, Handles};
use super::nodes::{Known, Limits, Nodes, Place, Stamp};
use super::wire::{
    ATTR_SUBMOUNT, Answer, DONE, Header, KILL_SUIDGID_AT_OPEN, OLDEST_MINOR, OUT_HEADER, Out, Reply, Stop,
    VERSION, Words, init, op, opened,
};
use crate::virtio::Chain;

/// Bytes that one read or write moves at the most, and the same in pages.
pub const LARGEST: u32 = 1 << 20;
const PAGES: u16 = 256;
/// Requests that the driver may have under way in the background, and where it begins to hold back.
const BACKGROUND: (u16, u16) = (64, 48);
/// How long a file has to have rested for its stamp to tell of the next change: the steps of a file system's clock.
const REST: Duration = Duration::from_secs(1);

/// Bytes of a file in memory that are given up at once; more of them take longer than other devices should wait.
pub const MUCH: u64 = 16 << 20;

/// How the directory is shared.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub readonly: bool,
    pub cache: Cache,
    /// The driver is told where other file systems begin.
    pub submounts: bool,
}

/// Counters.
#[derive(Default)]
pub struct Counts {
    pub requests: Arc<Counter>,
    pub waited: Arc<Counter>,
    pub read_bytes: Arc<Counter>,
    pub write_bytes: Arc<Counter>,
    pub refused: Arc<Counter>,
}

/// A request, with all it needs to be done.
pub struct Call<'a> {
    pub header: Header,
    /// What follows the header; of a write, what comes before the data.
    pub body: &'a [u8],
    pub chain: &'a Chain,
    pub memory: &'a Memory,
    /// Only if it can be done without waiting.
    pub at_once: bool,
}

impl Call<'_> {
    /// How far a step in a directory in memory may go.
    pub fn reach(&self) -> Reach {
        if self.at_once { Reach::Same } else { Reach::Any }
    }

    /// The same in a directory on a disk.
    fn reach_of_disk(&self) -> Reach {
        if self.at_once { Reach::Remembered } else { Reach::Any }
    }
}

/// A shared directory.
pub struct Server {
    pub(super) nodes: Nodes,
    pub(super) handles: Handles,
    pub(super) rules: Rules,
    pub(super) speed: Speed,
    pub(super) counts: Counts,
    clock: Arc<dyn Clock>,
    /// The driver sends what programs write when it sees fit.
    pub(super) writeback: AtomicBool,
    /// The driver mounts other file systems in the tree as such.
    submounts: AtomicBool,
    /// Files to be closed where that may take its time.
    closing: Mutex<Vec<Closing>>,
}

/// Something to be closed.
pub enum Closing {
    Place(#[allow(dead_code, reason = "held to be dropped")] Place),
    Handle(#[allow(dead_code, reason = "held to be dropped")] Arc<Handle>),
}

impl Server {
    /// Shares `root`.
    ///
    /// # Errors
    /// The host does not tell about it.
    pub fn new(
        root: OwnedFd,
        rules: Rules,
        limits: Limits,
        handles: usize,
        clock: Arc<dyn Clock>,
    ) -> files::Result<Server> {
        let speed = files::speed(&root);
        Ok(Server {
            nodes: Nodes::new(root, limits)?,
            handles: Handles::new(handles),
            rules,
            speed,
            counts: Counts::default(),
            clock,
            writeback: AtomicBool::new(false),
            submounts: AtomicBool::new(false),
            closing: Mutex::default(),
        })
    }

    /// Forgets all that the driver has open and knows; what is to be closed.
    pub fn clear(&self) {
        self.nodes.clear();
        drop(self.handles.clear());
        drop(self.take_closing());
    }

    /// What is to be closed, where that may take its time.
    pub fn take_closing(&self) -> Vec<Closing> {
        std::mem::take(&mut *self.closing.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Closes now what is closed at once, and the rest later.
    pub(super) fn close(&self, closing: impl Iterator<Item = Closing>) {
        let small = |file: &Place| files::about(file).is_ok_and(|about| about.stx_size <= MUCH);
        let at_once = |closing: &Closing| match closing {
            Closing::Place(place) => self.speed == Speed::Memory && small(place),
            Closing::Handle(handle) => handle.speed == Speed::Memory && small(&handle.file),
        };
        let later: Vec<Closing> = closing.filter(|closing| !at_once(closing)).collect();
        if !later.is_empty() {
            self.closing.lock().unwrap_or_else(PoisonError::into_inner).extend(later);
        }
    }

    /// Does what is asked.
    pub fn serve(&self, call: &Call<'_>) -> Answer {
        let mut words = Words(call.body);
        let words = &mut words;
        match call.header.op {
            // Thousands of files are not closed at once.
            op::INIT | op::DESTROY if call.at_once && !self.nodes.is_clear() => Err(Stop::Waits),
            op::INIT => self.init(words),
            op::DESTROY => {
                self.clear();
                Ok(DONE)
            }
            op::FORGET | op::BATCH_FORGET => self.forget(call, words),
            op::LOOKUP => self.lookup(call, words),
            op::GETATTR => self.attr(call, words),
            op::READLINK => self.read_link(call),
            op::STATFS => self.about_system(call),
            op::OPEN => self.open(call, words),
            op::OPENDIR => self.open_directory(call),
            op::READ => self.read(call, words),
            op::READDIR => self.list(call, words, false),
            op::READDIRPLUS => self.list(call, words, true),
            op::RELEASE | op::RELEASEDIR => {
                let handle = self.handles.remove(words.u64()?);
                self.close(handle.into_iter().map(Closing::Handle));
                Ok(DONE)
            }
            op::FLUSH => self.flush(call, words),
            op::LSEEK => self.seek(call, words),
            op::GETXATTR => self.attribute(call, words),
            op::LISTXATTR => self.attributes(call, words),
            _ => self.serve_change(call, words),
        }
    }

    /// Does what is asked, if that changes something.
    fn serve_change(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        match call.header.op {
            op::WRITE => self.write(call, words),
            op::SETATTR => self.set_attr(call, words),
            op::CREATE => self.create(call, words),
            op::TMPFILE => self.create_nameless(call, words),
            op::MKNOD => self.make_node(call, words),
            op::MKDIR => self.make_directory(call, words),
            op::SYMLINK => self.make_link(call, words),
            op::LINK => self.link(call, words),
            op::UNLINK => self.remove(call, words, false),
            op::RMDIR => self.remove(call, words, true),
            op::RENAME => self.rename(call, words, false),
            op::RENAME2 => self.rename(call, words, true),
            op::FALLOCATE => self.allocate(call, words),
            op::COPY_FILE_RANGE => self.copy(call, words),
            op::FSYNC | op::FSYNCDIR => self.sync_file(call, words),
            op::SYNCFS => self.sync(call),
            op::SETXATTR => self.set_attribute(call, words),
            op::REMOVEXATTR => self.remove_attribute(call, words),
            _ => Err(Stop::Unknown),
        }
    }

    fn init(&self, words: &mut Words<'_>) -> Answer {
        let (major, minor, ahead, theirs) = (words.u32()?, words.u32()?, words.u32()?, words.u32()?);
        if major < VERSION.0 || major == VERSION.0 && minor < OLDEST_MINOR {
            return Err(Stop::Refused(Errno::PROTO));
        }
        // A driver that has let go of the device without a word knows nothing any more.
        self.clear();
        let mut ours = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::CACHE_SYMLINKS
            | init::HANDLE_KILLPRIV_V2
            | init::INIT_EXT;
        if self.rules.submounts {
            ours |= init::SUBMOUNTS;
        }
        if self.rules.cache != Cache::Always {
            ours |= init::AUTO_INVAL_DATA;
        } else if !self.rules.readonly {
            ours |= init::WRITEBACK_CACHE;
        }
        let both = ours & theirs;
        let more = if theirs & init::INIT_EXT != 0 { words.u32().unwrap_or(0) } else { 0 };
        self.writeback.store(both & init::WRITEBACK_CACHE != 0, Ordering::Relaxed);
        self.submounts.store(both & init::SUBMOUNTS != 0, Ordering::Relaxed);
        let mut out = Out::default();
        out.u32(VERSION.0).u32(minor.min(VERSION.1)).u32(ahead).u32(both);
        out.u16(BACKGROUND.0).u16(BACKGROUND.1).u32(LARGEST).u32(1); // and times in nanoseconds
        out.u16(PAGES).u16(0).u32(more & init::DIRECT_IO_ALLOW_MMAP);
        out.0.resize(64, 0);
        Ok(out.reply())
    }

    /// Takes back what the driver would have been told of a node.
    pub(super) fn forget_one(&self, node: u64) {
        let mut places = Vec::new();
        self.nodes.forget(node, 1, &mut places);
        self.close(places.into_iter().map(Closing::Place));
    }

    fn forget(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let mut places = Vec::new();
        if call.header.op == op::FORGET {
            self.nodes.forget(call.header.node, words.u64()?, &mut places);
        } else {
            let (count, _) = (words.u32()?, words.u32()?);
            for _ in 0..count {
                // As many as there are, whatever was said.
                let (Ok(node), Ok(times)) = (words.u64(), words.u64()) else { break };
                self.nodes.forget(node, times, &mut places);
            }
        }
        self.close(places.into_iter().map(Closing::Place));
        Ok(Reply::Silence)
    }

    /// What is known of the node that the request is about. Refused at once if its host may let us wait and we must not.
    pub(super) fn known(&self, call: &Call<'_>) -> Answer<Known> {
        let known = self.nodes.known(call.header.node)?;
        if call.at_once && known.speed == Speed::Far { Err(Stop::Waits) } else { Ok(known) }
    }

    /// The same for what waits for any disk.
    pub(super) fn known_in_memory(&self, call: &Call<'_>) -> Answer<Known> {
        let known = self.known(call)?;
        if call.at_once && known.speed != Speed::Memory { Err(Stop::Waits) } else { Ok(known) }
    }

    /// The place of the node that the request is about.
    pub(super) fn place(&self, call: &Call<'_>) -> Answer<Place> {
        self.nodes.place(call.header.node, call.at_once)
    }

    /// Seconds for which the driver may believe what it was told.
    pub(super) fn valid(&self) -> u64 {
        match self.rules.cache {
            Cache::Never => 0,
            Cache::Auto => 1,
            Cache::Always => 24 * 60 * 60,
        }
    }

    /// Looks up `name` in `parent`, and tells the driver of it: node, what is known, flags.
    pub(super) fn find(
        &self,
        (id, parent): (u64, &Place),
        name: Name<'_>,
        reach: Reach,
    ) -> Answer<(u64, Statx, u32)> {
        let place = self.nodes.step(parent, name, reach)?;
        let about = files::about(&place)?;
        let node = self.nodes.found(id, name.bytes(), place, &about)?;
        Ok((node, about, self.flags(id, node, &about)))
    }

    /// Whether the driver is told that a directory is on another file system than the one it is in: numbers of files say
    /// nothing across them.
    fn flags(&self, parent: u64, node: u64, about: &Statx) -> u32 {
        let directory = FileType::from_raw_mode(about.stx_mode.into()) == FileType::Directory;
        if !directory || !self.submounts.load(Ordering::Relaxed) {
            return 0;
        }
        match (self.nodes.known(parent), self.nodes.known(node)) {
            (Ok(parent), Ok(node))
                if (parent.key.dev, parent.key.mount) != (node.key.dev, node.key.mount) =>
            {
                ATTR_SUBMOUNT
            }
            _ => 0,
        }
    }

    fn lookup(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let name = words.name()?;
        let known = self.known(call)?;
        let parent = self.place(call)?;
        // What is in memory is there at once; of the rest, what the kernel remembers.
        let reach = if known.speed == Speed::Memory { call.reach() } else { call.reach_of_disk() };
        match self.find((call.header.node, &parent), name, reach) {
            Ok((node, about, flags)) => Ok(Out::default().entry(node, &about, flags, self.valid()).reply()),
            Err(Stop::Refused(Errno::NOENT)) if self.rules.cache == Cache::Always => {
                Ok(Out::default().no_entry(self.valid()).reply())
            }
            Err(stop) => Err(stop),
        }
    }

    fn read_link(&self, call: &Call<'_>) -> Answer {
        self.known(call)?;
        Ok(Reply::Bytes(files::read_link(self.place(call)?)?))
    }

    /// The flags to open a file with on the host, for those that a program of the guest gave.
    pub(super) fn host_flags(&self, flags: u32) -> Answer<OFlags> {
        let asked = OFlags::from_bits_retain(flags);
        let access = asked & OFlags::RWMODE;
        let truncate = asked & OFlags::TRUNC;
        if self.rules.readonly && (access != OFlags::RDONLY || !truncate.is_empty()) {
            return Err(Stop::Refused(Errno::ROFS));
        }
        if access == OFlags::RWMODE {
            return Err(Stop::Refused(Errno::INVAL));
        }
        // A driver that sends whole pages reads what is around the bytes that were written.
        let reads = access == OFlags::WRONLY && self.writeback.load(Ordering::Relaxed);
        Ok(truncate | if reads { OFlags::RDWR } else { access })
    }

    fn open(&self, call: &Call<'_>, words: &mut Words<'_>) -> Answer {
        let (flags, how) = (self.host_flags(words.u32()?)?, words.u32()?);
        let known = self.known(call)?;
        if !flags.is_empty() {
            // Writing may break a lease, truncating writes.
            self.known_in_memory(call)?;
        }
        let truncates = flags.contains(OFlags::TRUNC);
        // Some of the files that the kernel itself makes are read by waiting for what comes.
        let flags = if known.speed == Speed::Far { flags | OFlags::NONBLOCK } else { flags };
        // What else there is, the guest's kernel opens itself: here it might be a device, or wait for its other end.
        if known.kind != FileType::RegularFile {
            return Err(Stop::Refused(Errno::INVAL));
        }
        self.handles.room()?;
        let place = self.place(call)?;
        if truncates && call.at_once && files::about(&place)?.stx_size > MUCH {
            return Err(Stop::Waits);
        }
        let file = match files::open(&place, flags) {
            // Not to be read, which was our own wish.
            Err(Errno::ACCESS) if self.writeback.load(Ordering::Relaxed) && flags.contains(OFlags::RDWR) => {
                files::open(&place, (flags - OFlags::RDWR) | OFlags::WRONLY)?
            }
            answer => answer?,
        };
        if truncates && how & KILL_SUIDGID_AT_OPEN != 0 {
            self.drop_privileges(&file)?;
        }
        let how = self.opened(call.header.node, &file, known.speed);
        let handle = self.handles.add(Handle::file(call.header.node, known.speed, file))?;
        Ok(Out::default().open(handle, how).reply())
    }

    /// How the driver is to treat a file that was opened.
    pub(super) fn opened(&self, node: u64, file: &OwnedFd, speed: Speed) -> u32 {
        let last = if speed == Speed::Far { 0 } else { opened::NOFLUSH };
        let cache = match self.rules.cache {
            Cache::Never => opened::DIRECT_IO,
            Cache::Always => opened::KEEP_CACHE,
            Cache::Auto => {
                let Ok(about) = files::about(file) else { return 0 };
                let size = (about.stx_size.cast_signed(), 0);
                let [changed, modified] =
                    [&about.stx_ctime, &about.stx_mtime].map(|time| (time.tv_sec, time.tv_nsec));
                let stamp: Stamp = [changed, modified, size];
                let rested = self.clock.wall().saturating_sub(REST).as_secs();
                let settled = u64::try_from(changed.0.max(modified.0)).is_ok_and(|at| at < rested);
                if self.nodes.unchanged(node, stamp, settled) { opened::KEEP_CACHE } else { 0 }
            }
        };
        cache | last
    }

    fn open_directory(&self, call: &Call<'_>) -> Answer {
        let known = self.known(call)?;
        if known.kind != FileType::Directory {
            return Err(Stop::Refused(Errno::NOTDIR));
        }
        self.handles.room()?;
        let directory = files::open_directory(self.place(call)?)?;
        let how = if self.rules.cache == Cache::Always { opened::KEEP_CACHE | opened::CACHE_DIR } else { 0 };
        let handle = self.handles.add(Handle::directory(call.header.node, known.speed, directory))?;
        Ok(Out::default().open(handle, how).reply())
    }

    /// Lists a directory: `struct fuse_dirent` for each entry, behind what a lookup of it says if `plus`.
    fn list(&self, call: &Call<'_>, words: &mut Words<'_>, plus: bool) -> Answer {
        self.known_in_memory(call)?;
        let (handle, offset, size) = (words.u64()?, words.u64()?, words.u32()?);
        let handle = self.handle(call, handle, Speed::Memory)?;
        let room = call.chain.writable().len().saturating_sub(OUT_HEADER).min(size.min(LARGEST).into());
        let room = usize::try_from(room).unwrap_or(0);
        let parent = if plus { Some(self.place(call)?) } else { None };
        let mut listing = handle.listing()?;
        listing.seek(&handle.file, offset)?;
        let mut out = Out::default();
        while let Some(entry) = listing.peek(&handle.file)? {
            let start = out.0.len();
            let ahead = if plus { super::wire::ENTRY } else { 0 };
            let end = start.saturating_add(ahead).saturating_add(24).saturating_add(entry.name.len());
            let end = end.next_multiple_of(8);
            if end > room {
                break;
            }
            if let Some(parent) = &parent {
                // `.` and `..` are no names, and what is gone already is told of by its name alone.
                let found = Name::new(&entry.name).map_err(Stop::from);
                match found.and_then(|name| self.find((call.header.node, parent), name, call.reach())) {
                    Ok((node, about, flags)) => out.entry(node, &about, flags, self.valid()),
                    Err(_) => out.no_entry(0),
                };
            }
            out.u64(entry.ino).u64(entry.next);
            out.u32(u32::try_from(entry.name.len()).unwrap_or(0)).u32(entry.kind >> 12);
            out.0.extend(&*entry.name);
            out.0.resize(end, 0);
            listing.take();
        }
        Ok(out.reply())
    }
}
