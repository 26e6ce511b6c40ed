//! The tree: a root file system as names and attributes in memory, with the bytes of its files put aside.
//!
//! Archives are unpacked into it, and nowhere else: an archive's `..`, links and devices never meet the host's own files.

use std::collections::BTreeMap;
use std::io;

/// Most bytes of all files of an image: more is a bomb.
pub const BYTES_MAX: u64 = 256 << 30;
/// Most names that an image gives to files, those that it takes away again counted: what a hostile one may take of memory.
const NAMES_MAX: usize = 2_000_000;
/// Most bytes of its names, texts of symbolic links and extended attributes.
const TEXT_MAX: usize = 1 << 30;
/// What an attribute takes in memory beside its bytes.
const ATTRIBUTE: usize = 64;
/// Longest name (`NAME_MAX`), and longest text of a symbolic link (`PATH_MAX`).
const NAME_MAX: usize = 255;
const LINK_MAX: usize = 4095;
/// Deepest directory: no path leads deeper, and walks down the tree are bounded by it.
const DEPTH_MAX: usize = 2048;
/// Most symbolic links on the way to one file, as in Linux.
const LINKS_MAX: usize = 40;

/// A node of the tree, by its place in it.
pub type Id = usize;
/// The top.
pub const TOP: Id = 0;

/// Attributes of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Permissions, with set-user-ID and its like: 12 bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change: seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    /// Extended attributes, by name.
    pub attributes: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Where the bytes of a file are: runs of blocks, in the order of the file; what lies between them is zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// Bytes of the file.
    pub len: u64,
    /// The runs.
    pub runs: Vec<Run>,
}

/// Blocks of a file that are neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first one's number in the file.
    pub logical: u32,
    /// The same in the image.
    pub physical: u32,
    /// How many.
    pub count: u32,
}

/// What a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file with these bytes.
    File(Content),
    /// A directory with these names.
    Directory(BTreeMap<Vec<u8>, Id>),
    /// A symbolic link with this text.
    Link(Vec<u8>),
    /// A character or block device.
    Device {
        /// It is a block device.
        block: bool,
        /// Its numbers.
        major: u32,
        /// The second one.
        minor: u32,
    },
    /// A pipe with a name.
    Fifo,
}

/// A node: a file of whatever kind.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Its attributes.
    pub meta: Meta,
    /// The layer that wrote it last.
    layer: u32,
    /// The last layer from which on nothing below is of an earlier one.
    cleared: u32,
}

/// A root file system.
#[derive(Clone, Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    /// The layer that is being applied.
    layer: u32,
    /// How many names, bytes of text and bytes of files there may still be.
    names: usize,
    text: usize,
    bytes: u64,
}

impl Default for Tree {
    fn default() -> Self {
        let kind = Kind::Directory(BTreeMap::new());
        let top = Node { kind, meta: directory_meta(), layer: 0, cleared: 0 };
        Tree { nodes: vec![top], layer: 0, names: NAMES_MAX, text: TEXT_MAX, bytes: BYTES_MAX }
    }
}

/// Attributes of a directory that nobody described.
fn directory_meta() -> Meta {
    Meta { mode: 0o755, ..Meta::default() }
}

/// A complaint about an archive.
pub fn wrong(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// Bytes of an archive in a message.
pub fn shown(bytes: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(bytes).chars().take(200).collect();
    format!("`{}`", text.escape_debug())
}

/// The names of a path, from the top. A path that leads upwards is refused.
fn names(path: &[u8]) -> io::Result<Vec<&[u8]>> {
    let names: Vec<_> =
        path.split(|byte| *byte == b'/').filter(|name| !matches!(name, [] | [b'.'])).collect();
    if names.contains(&&b".."[..]) {
        return Err(wrong(format!("{} leads upwards", shown(path))));
    }
    match names.iter().find(|name| name.len() > NAME_MAX || name.contains(&0)) {
        Some(name) => Err(wrong(format!("{} is no name for a file", shown(name)))),
        None => Ok(names),
    }
}

impl Tree {
    /// The next layer begins: what it takes away is of those before.
    pub fn begin_layer(&mut self) {
        self.layer = self.layer.saturating_add(1);
    }

    /// A node.
    pub fn node(&self, id: Id) -> &Node {
        // Ids come from this tree, which never shrinks; the top is always there.
        self.nodes.get(id).unwrap_or(&self.nodes[TOP])
    }

    fn node_mut(&mut self, id: Id) -> &mut Node {
        let id = if id < self.nodes.len() { id } else { TOP };
        &mut self.nodes[id]
    }

    /// The names in a directory; none if it is something else.
    pub fn children(&self, id: Id) -> impl Iterator<Item = (&[u8], Id)> {
        let Kind::Directory(names) = &self.node(id).kind else { return Vec::new().into_iter() };
        names.iter().map(|(name, id)| (name.as_slice(), *id)).collect::<Vec<_>>().into_iter()
    }

    fn child(&self, dir: Id, name: &[u8]) -> Option<Id> {
        match &self.node(dir).kind {
            Kind::Directory(names) => names.get(name).copied(),
            _ => None,
        }
    }

    fn names_mut(&mut self, dir: Id) -> Option<&mut BTreeMap<Vec<u8>, Id>> {
        match &mut self.node_mut(dir).kind {
            Kind::Directory(names) => Some(names),
            _ => None,
        }
    }

    /// Counts a name and what comes with it.
    fn charge(&mut self, name: &[u8], kind: Option<&Kind>, meta: Option<&Meta>) -> io::Result<()> {
        let attributes = meta.into_iter().flat_map(|meta| &meta.attributes);
        let attributes = attributes.map(|(name, value)| ATTRIBUTE + name.len() + value.len()).sum::<usize>();
        let link = if let Some(Kind::Link(text)) = kind { text.len() } else { 0 };
        let few = || wrong(format!("it has more than {NAMES_MAX} files"));
        let long = || {
            let most = TEXT_MAX >> 30;
            wrong(format!("its names, links and extended attributes have more than {most} GiB"))
        };
        self.names = self.names.checked_sub(1).ok_or_else(few)?;
        self.text = self.text.checked_sub(name.len() + link + attributes).ok_or_else(long)?;
        Ok(())
    }

    /// Counts the bytes of a file.
    ///
    /// # Errors
    /// All files together have too many.
    pub fn charge_bytes(&mut self, len: u64) -> io::Result<()> {
        let bomb = || wrong(format!("its files have more than {} GiB", BYTES_MAX >> 30));
        self.bytes = self.bytes.checked_sub(len).ok_or_else(bomb)?;
        Ok(())
    }

    fn add(&mut self, parent: Id, name: &[u8], kind: Kind, meta: Meta) -> Id {
        // What is new holds nothing of earlier layers.
        self.nodes.push(Node { kind, meta, layer: self.layer, cleared: self.layer });
        let made = self.nodes.len() - 1;
        if let Some(names) = self.names_mut(parent) {
            names.insert(name.to_owned(), made);
        }
        made
    }

    fn add_directory(&mut self, parent: Id, name: &[u8]) -> io::Result<Id> {
        self.charge(name, None, None)?;
        Ok(self.add(parent, name, Kind::Directory(BTreeMap::new()), directory_meta()))
    }

    /// The directory that a path's last name is in, and that name; `None` for the top itself. Symbolic links on the way are
    /// followed within the tree. With `make`, directories that are missing are made; else `None` if one is.
    fn parent<'a>(&mut self, path: &'a [u8], make: bool) -> io::Result<Option<(Id, &'a [u8])>> {
        let names = names(path)?;
        let Some((last, before)) = names.split_last() else { return Ok(None) };
        // From the last to the first, so that the text of a link is put before what follows it.
        let mut rest: Vec<Vec<u8>> = before.iter().rev().map(|name| name.to_vec()).collect();
        let mut way = vec![TOP];
        let mut links = 0;
        while let Some(name) = rest.pop() {
            let here = way.last().copied().unwrap_or(TOP);
            if name == b".." {
                way.truncate((way.len() - 1).max(1));
                continue;
            }
            let next = match self.child(here, &name) {
                Some(next) => next,
                None if make => self.add_directory(here, &name)?,
                None => return Ok(None),
            };
            match &self.node(next).kind {
                Kind::Directory(_) => way.push(next),
                Kind::Link(text) => {
                    links += 1;
                    if links > LINKS_MAX || rest.len() > DEPTH_MAX {
                        return Err(wrong(format!("{} leads through too many links", shown(path))));
                    }
                    if text.starts_with(b"/") {
                        way.truncate(1);
                    }
                    let steps = text.split(|byte| *byte == b'/').filter(|step| !matches!(step, [] | [b'.']));
                    rest.extend(steps.rev().map(<[u8]>::to_vec));
                }
                _ => {
                    return Err(wrong(format!(
                        "{} leads through {}, no directory",
                        shown(path),
                        shown(&name)
                    )));
                }
            }
            if way.len() > DEPTH_MAX {
                return Err(wrong(format!("{} is too deep", shown(path))));
            }
        }
        Ok(Some((way.last().copied().unwrap_or(TOP), last)))
    }

    /// Puts a file in its place, instead of what is there. A directory keeps what it holds.
    ///
    /// # Errors
    /// The path makes no sense, or there is too much of something.
    pub fn put(&mut self, path: &[u8], kind: Kind, meta: Meta) -> io::Result<()> {
        if matches!(&kind, Kind::Link(text) if text.is_empty() || text.len() > LINK_MAX || text.contains(&0))
        {
            return Err(wrong(format!("the symbolic link {} has no text that is one", shown(path))));
        }
        let directory = matches!(kind, Kind::Directory(_));
        let place = self.parent(path, true)?;
        self.charge(place.map_or(&[][..], |(_, name)| name), Some(&kind), Some(&meta))?;
        let there = match place {
            Some((parent, name)) => self.child(parent, name),
            None => Some(TOP),
        };
        if let Some(there) = there.filter(|there| directory && self.is_directory(*there)) {
            let layer = self.layer;
            let node = self.node_mut(there);
            (node.meta, node.layer) = (meta, layer);
            return Ok(());
        }
        let Some((parent, name)) = place else {
            return Err(wrong("the top of the archive is no directory"));
        };
        self.add(parent, name, kind, meta);
        Ok(())
    }

    /// Gives a file a second name.
    ///
    /// # Errors
    /// There is no such file, or it is a directory.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> io::Result<()> {
        let missing = || wrong(format!("{} is a link to {}, which is not there", shown(path), shown(target)));
        let (parent, name) = self.parent(target, false)?.ok_or_else(missing)?;
        let there = self.child(parent, name).ok_or_else(missing)?;
        if self.is_directory(there) {
            return Err(wrong(format!("{} is a link to {}, a directory", shown(path), shown(target))));
        }
        let Some((parent, name)) = self.parent(path, true)? else {
            return Err(wrong("the top of the archive is no directory"));
        };
        self.charge(name, None, None)?;
        let layer = self.layer;
        self.node_mut(there).layer = layer;
        if let Some(names) = self.names_mut(parent) {
            names.insert(name.to_owned(), there);
        }
        Ok(())
    }

    /// Takes away what earlier layers have put at a path.
    ///
    /// # Errors
    /// The path makes no sense.
    pub fn remove(&mut self, path: &[u8]) -> io::Result<()> {
        let Some((parent, name)) = self.parent(path, false)? else { return Ok(()) };
        if let Some(there) = self.child(parent, name)
            && !self.prune(there)
            && let Some(names) = self.names_mut(parent)
        {
            names.remove(name);
        }
        Ok(())
    }

    /// Takes away what earlier layers have put into a directory.
    ///
    /// # Errors
    /// The path makes no sense.
    pub fn clear(&mut self, path: &[u8]) -> io::Result<()> {
        match self.find(path)? {
            Some(there) if self.is_directory(there) => {
                self.prune(there);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Takes away what is of earlier layers in and below a node; whether something of this layer remains. A layer walks
    /// through each directory once, however often it says so.
    fn prune(&mut self, id: Id) -> bool {
        let layer = self.layer;
        let node = self.node(id);
        let mut remains = node.layer == layer;
        let Kind::Directory(names) = &node.kind else { return remains };
        if node.cleared != layer {
            let children: Vec<Id> = names.values().copied().collect();
            let kept: std::collections::HashSet<Id> =
                children.into_iter().filter(|child| self.prune(*child)).collect();
            remains |= !kept.is_empty();
            self.node_mut(id).cleared = layer;
            if let Some(names) = self.names_mut(id) {
                names.retain(|_, child| kept.contains(child));
            }
            return remains;
        }
        remains || !names.is_empty()
    }

    /// The node at a path, if there is one; a symbolic link at its end is not followed.
    ///
    /// # Errors
    /// The path makes no sense.
    pub fn find(&mut self, path: &[u8]) -> io::Result<Option<Id>> {
        Ok(match self.parent(path, false)? {
            Some((parent, name)) => self.child(parent, name),
            None => names(path)?.is_empty().then_some(TOP),
        })
    }

    /// Sees to it that there is a directory at a path; an earlier file keeps its place.
    ///
    /// # Errors
    /// The path makes no sense.
    pub fn furnish(&mut self, path: &[u8]) -> io::Result<()> {
        match self.parent(path, true)? {
            Some((parent, name)) if self.child(parent, name).is_none() => {
                self.add_directory(parent, name).map(drop)
            }
            _ => Ok(()),
        }
    }

    fn is_directory(&self, id: Id) -> bool {
        matches!(self.node(id).kind, Kind::Directory(_))
    }

    /// How many nodes there have ever been.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }
}

#[cfg(test)]
mod tests;
