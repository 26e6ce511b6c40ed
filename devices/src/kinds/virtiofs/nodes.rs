//! The files that the driver knows: each a node with a number, found again by its place, or by its name where there are more
//! of them than descriptors.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};

use base::files::{self, Name, Reach, Speed};
use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use super::wire::{Answer, ROOT, Stop};

/// Directories between a node and the shared one at the most: more than a host's tree has, and a bound for one that has been
/// knotted by moves on both sides.
const DEPTH: usize = 4096;
/// Places given up in one go.
const TRIM: usize = 64;

/// The place of a file, held open.
pub type Place = Arc<OwnedFd>;

/// Which file of the host a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub dev: (u32, u32),
    pub ino: u64,
    pub mount: u64,
}

impl Key {
    pub fn of(about: &Statx) -> Key {
        Key { dev: (about.stx_dev_major, about.stx_dev_minor), ino: about.stx_ino, mount: about.stx_mnt_id }
    }
}

/// When a file was made: a second file with the number of a first that is gone was made later.
type Birth = (i64, u32);

fn birth(about: &Statx) -> Birth {
    (about.stx_btime.tv_sec, about.stx_btime.tv_nsec)
}

/// By which a file that has changed is known: modified, changed, size.
pub type Stamp = [(i64, u32); 3];

struct Node {
    key: Key,
    birth: Birth,
    kind: FileType,
    /// Where it was found last.
    parent: u64,
    name: Box<[u8]>,
    /// How often the driver has been told of it, less what it forgot.
    lookups: u64,
    /// Nodes that were found in it.
    children: u64,
    place: Option<Place>,
    /// Its place was used since it was last considered for being given up.
    used: bool,
    /// What it was like when it was last opened.
    seen: Option<Stamp>,
}

#[derive(Default)]
struct Table {
    nodes: HashMap<u64, Node>,
    by_key: HashMap<Key, u64>,
    last: u64,
    /// Nodes with places, those that may be given up first at the front; and some that are gone.
    queue: VecDeque<u64>,
    places: usize,
    speeds: HashMap<(u32, u32), Speed>,
}

/// How much the driver may make us keep.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Nodes.
    pub nodes: usize,
    /// Places held open.
    pub places: usize,
}

/// All nodes.
pub struct Nodes {
    root: Place,
    limits: Limits,
    table: Mutex<Table>,
    /// Held to move and remove names by many, and by one who has to rely on names.
    moves: RwLock<()>,
}

/// What is known of a node without asking the host.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    pub kind: FileType,
    pub key: Key,
    pub speed: Speed,
}

const STALE: Stop = Stop::Refused(Errno::STALE);

impl Table {
    /// Whether `node` is `above` or lies below it, as far as the names go.
    fn is_below(&self, mut node: u64, above: u64) -> bool {
        for _ in 0..DEPTH {
            if node == above || node == ROOT {
                return node == above;
            }
            let Some(next) = self.nodes.get(&node) else { return false };
            node = next.parent;
        }
        true
    }

    /// Takes note of where a node was found.
    fn locate(&mut self, id: u64, parent: u64, name: &[u8]) {
        let Some(node) = self.nodes.get(&id) else { return };
        if id == ROOT || node.parent == parent && *node.name == *name {
            return;
        }
        // Of two moves only the later is known yet: the older place still leads there.
        if node.kind == FileType::Directory && self.is_below(parent, id) {
            return;
        }
        let Some(new) = self.nodes.get_mut(&parent) else { return };
        new.children = new.children.saturating_add(1);
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let old = std::mem::replace(&mut node.parent, parent);
        node.name = name.into();
        if let Some(old) = self.nodes.get_mut(&old) {
            old.children = old.children.saturating_sub(1);
        }
    }

    /// Drops a node that nobody knows and nobody is in, and those above it of which that becomes true.
    fn drop_unknown(&mut self, mut id: u64, places: &mut Vec<Place>) {
        while id != ROOT
            && let Some(node) = self.nodes.get(&id)
            && (node.lookups, node.children) == (0, 0)
        {
            let Some(node) = self.nodes.remove(&id) else { return };
            if self.by_key.get(&node.key) == Some(&id) {
                self.by_key.remove(&node.key);
            }
            if let Some(place) = node.place {
                self.places = self.places.saturating_sub(1);
                places.push(place);
            }
            id = node.parent;
            if let Some(parent) = self.nodes.get_mut(&id) {
                parent.children = parent.children.saturating_sub(1);
            }
        }
        // What is gone stays in the queue until it is looked at.
        if self.queue.len() > self.places.saturating_mul(2).saturating_add(TRIM) {
            let nodes = &self.nodes;
            self.queue.retain(|id| nodes.get(id).is_some_and(|node| node.place.is_some()));
        }
    }

    fn put(&mut self, id: u64, place: Place) {
        if let Some(node) = self.nodes.get_mut(&id)
            && node.place.is_none()
        {
            node.place = Some(place);
            node.used = true;
            self.places = self.places.saturating_add(1);
            self.queue.push_back(id);
        }
    }

    fn forgotten(&self) -> usize {
        // Of all nodes but the root.
        self.nodes.len().saturating_sub(1).saturating_sub(self.places)
    }

    /// The next node whose place may be given up, with where it is said to be.
    fn candidate(&mut self) -> Option<(u64, Key, Place, Box<[u8]>)> {
        for _ in 0..TRIM {
            let id = self.queue.pop_front()?;
            let Some(node) = self.nodes.get_mut(&id).filter(|node| node.place.is_some()) else { continue };
            self.queue.push_back(id);
            if std::mem::take(&mut node.used) {
                continue;
            }
            let (key, parent, name) = (node.key, node.parent, node.name.clone());
            if let Some(parent) = self.nodes.get(&parent).and_then(|parent| parent.place.clone()) {
                return Some((id, key, parent, name));
            }
        }
        None
    }
}

impl Nodes {
    /// With no node but the shared directory, `root`.
    ///
    /// # Errors
    /// The host does not tell about it.
    pub fn new(root: OwnedFd, limits: Limits) -> files::Result<Nodes> {
        let about = files::about(&root)?;
        let nodes = Nodes { root: Arc::new(root), limits, table: Mutex::default(), moves: RwLock::new(()) };
        nodes.begin(&about);
        Ok(nodes)
    }

    fn begin(&self, about: &Statx) {
        let mut table = self.table();
        let key = Key::of(about);
        table.speeds.insert(key.dev, files::speed(&self.root));
        table.by_key.insert(key, ROOT);
        table.last = table.last.max(ROOT);
        let root = Node {
            key,
            birth: birth(about),
            kind: FileType::from_raw_mode(about.stx_mode.into()),
            parent: ROOT,
            name: Box::default(),
            lookups: 1,
            children: 0,
            place: Some(self.root.clone()),
            used: true,
            seen: None,
        };
        table.nodes.insert(ROOT, root);
    }

    /// Forgets all nodes.
    pub fn clear(&self) {
        let speed = files::speed(&self.root);
        let old = {
            let mut table = self.table();
            let root = table.nodes.remove(&ROOT);
            // Numbers go on: an old one is never taken for a new one.
            let old = std::mem::take(&mut *table);
            table.last = old.last;
            if let Some(mut root) = root {
                (root.lookups, root.children, root.seen) = (1, 0, None);
                table.by_key.insert(root.key, ROOT);
                table.speeds.insert(root.key.dev, speed);
                table.nodes.insert(ROOT, root);
            }
            old
        };
        // Closed while nobody waits for the table.
        drop(old);
    }

    /// Whether no node is known but the shared directory.
    pub fn is_clear(&self) -> bool {
        self.table().nodes.len() <= 1
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a node.
    ///
    /// # Errors
    /// There is none of this number.
    pub fn known(&self, id: u64) -> Answer<Known> {
        let table = self.table();
        let node = table.nodes.get(&id).ok_or(STALE)?;
        let speed = table.speeds.get(&node.key.dev).copied().unwrap_or(Speed::Far);
        Ok(Known { kind: node.kind, key: node.key, speed })
    }

    /// The place of a node; opened by its name if it was given up.
    ///
    /// # Errors
    /// There is no such node, or its file is not where it was found any more.
    pub fn place(&self, id: u64, at_once: bool) -> Answer<Place> {
        {
            let mut table = self.table();
            let node = table.nodes.get_mut(&id).ok_or(STALE)?;
            node.used = true;
            if let Some(place) = &node.place {
                return Ok(place.clone());
            }
        }
        if at_once {
            return Err(Stop::Waits);
        }
        match self.reopen(id) {
            Err(Stop::Refused(Errno::NOENT | Errno::NOTDIR | Errno::STALE | Errno::LOOP)) => {
                // Someone may be moving it: once more, while nobody does.
                let _alone = self.moves.write().unwrap_or_else(PoisonError::into_inner);
                self.reopen(id).map_err(|stop| match stop {
                    Stop::Refused(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => STALE,
                    stop => stop,
                })
            }
            answer => answer,
        }
    }

    /// Opens a node's place by the names that lead to it from the nearest place that is open.
    fn reopen(&self, id: u64) -> Answer<Place> {
        let (mut names, mut at) = (Vec::new(), id);
        let (mut place, key, birth) = {
            let table = self.table();
            let wanted = table.nodes.get(&id).ok_or(STALE)?;
            loop {
                let node = table.nodes.get(&at).ok_or(STALE)?;
                if let Some(place) = &node.place {
                    break (place.clone(), wanted.key, wanted.birth);
                }
                if names.len() >= DEPTH {
                    return Err(STALE);
                }
                names.push(node.name.clone());
                at = node.parent;
            }
        };
        if names.is_empty() {
            return Ok(place);
        }
        while let Some(name) = names.pop() {
            place = Arc::new(self.step(&place, Name::new(&name)?, Reach::Any)?);
        }
        let about = files::about(&place)?;
        if (Key::of(&about), self::birth(&about)) != (key, birth) {
            return Err(STALE);
        }
        self.table().put(id, place.clone());
        Ok(place)
    }

    /// [`files::step`], with places given up where descriptors have run out.
    pub fn step(&self, parent: &Place, name: Name<'_>, reach: Reach) -> Answer<OwnedFd> {
        match files::step(parent, name, reach) {
            Err(Errno::AGAIN | Errno::XDEV | Errno::INVAL) if reach != Reach::Any => Err(Stop::Waits),
            Err(Errno::MFILE | Errno::NFILE) => {
                let half = self.table().places / 2;
                self.trim(half);
                Ok(files::step(parent, name, reach)?)
            }
            answer => Ok(answer?),
        }
    }

    /// Takes note of the file `place`, found as `name` in `parent`: its node, of which the driver is told now.
    ///
    /// # Errors
    /// There are too many, or the parent is gone.
    pub fn found(&self, parent: u64, name: &[u8], place: OwnedFd, about: &Statx) -> Answer<u64> {
        let key = Key::of(about);
        // Asked of the host with the table free: a server that is gone does not answer.
        let new = !self.table().speeds.contains_key(&key.dev);
        let speed = if new { files::speed(&place) } else { Speed::Far };
        let mut table = self.table();
        if let Some(&id) = table.by_key.get(&key)
            && let Some(node) = table.nodes.get_mut(&id)
        {
            // As long as its place is held, no other file has its number.
            if node.place.is_some() || node.birth == birth(about) {
                node.lookups = node.lookups.saturating_add(1);
                node.used = true;
                table.put(id, Arc::new(place));
                table.locate(id, parent, name);
                return Ok(id);
            }
            table.by_key.remove(&key);
        }
        if table.nodes.len() >= self.limits.nodes {
            return Err(Stop::Refused(Errno::NFILE));
        }
        let above = table.nodes.get_mut(&parent).ok_or(STALE)?;
        above.children = above.children.saturating_add(1);
        table.speeds.entry(key.dev).or_insert(speed);
        table.last = table.last.saturating_add(1);
        let id = table.last;
        let kind = FileType::from_raw_mode(about.stx_mode.into());
        let (birth, name) = (birth(about), name.into());
        let node = Node {
            key,
            birth,
            kind,
            parent,
            name,
            lookups: 1,
            children: 0,
            place: None,
            used: true,
            seen: None,
        };
        table.nodes.insert(id, node);
        table.by_key.insert(key, id);
        table.put(id, Arc::new(place));
        let full = table.places > self.limits.places;
        drop(table);
        if full {
            self.trim(self.limits.places);
        }
        Ok(id)
    }

    /// The driver forgets `count` of the times it was told of a node; places nobody needs any more.
    pub fn forget(&self, id: u64, count: u64, places: &mut Vec<Place>) {
        let mut table = self.table();
        if let Some(node) = table.nodes.get_mut(&id)
            && id != ROOT
        {
            node.lookups = node.lookups.saturating_sub(count);
            table.drop_unknown(id, places);
        }
    }

    /// Whether the file is as it was when it was last asked for, and will be known by `stamp` the next time; `None`: it may
    /// change once more without its stamp.
    pub fn unchanged(&self, id: u64, stamp: Stamp, settled: bool) -> bool {
        let mut table = self.table();
        let Some(node) = table.nodes.get_mut(&id) else { return false };
        let same = node.seen == Some(stamp);
        node.seen = settled.then_some(stamp);
        same
    }

    /// Gives up places, those that were not used for longest first, until no more than `left` are held. What is not to be
    /// found by its name keeps its place.
    fn trim(&self, left: usize) {
        // Not while names are moved: what was just seen there has to be there when its place has gone.
        let _alone = match self.moves.try_write() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let enough = left.saturating_sub(left / 16);
        let held = self.table().places.min(self.limits.places);
        for _ in 0..held.saturating_add(TRIM) {
            let candidate = {
                let mut table = self.table();
                if table.places <= enough {
                    return;
                }
                table.candidate()
            };
            let Some((id, key, parent, name)) = candidate else { continue };
            let there = Name::new(&name).and_then(|name| files::about_name(&parent, name));
            if there.is_ok_and(|about| Key::of(&about) == key) {
                let mut table = self.table();
                let place = table.nodes.get_mut(&id).and_then(|node| node.place.take());
                if place.is_some() {
                    table.places = table.places.saturating_sub(1);
                }
                drop(table);
                drop(place);
            }
        }
    }

    /// Moves or removes names by `change`: those in `names`, of files that may be known by nothing else, in which case
    /// they get places first.
    pub fn change<T>(&self, names: &[(&Place, Name<'_>)], change: impl FnOnce() -> T) -> T {
        {
            let _with_others = self.moves.read().unwrap_or_else(PoisonError::into_inner);
            if self.table().forgotten() == 0 {
                return change();
            }
        }
        let _alone = self.moves.write().unwrap_or_else(PoisonError::into_inner);
        for (parent, name) in names {
            let Ok(place) = files::step(parent, *name, Reach::Any) else { continue };
            let Ok(about) = files::about(&place) else { continue };
            let mut table = self.table();
            if let Some(&id) = table.by_key.get(&Key::of(&about)) {
                table.put(id, Arc::new(place));
            }
        }
        change()
    }
}

#[cfg(test)]
mod tests;
