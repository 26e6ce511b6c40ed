//! A file system image, written without mounting anything: ext4, which nearly every kernel has built in.
//!
//! It has no journal: what a guest writes over it is thrown away. The bytes of files come first, in the order in which
//! they come in; directories follow, then bitmaps and tables of all groups together (`flex_bg`). What is zero is a hole of the
//! file. Documentation/filesystems/ext4 of the Linux kernel, to which the names here refer.

mod directory;
mod groups;
mod inode;
mod xattr;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use self::groups::Groups;
use super::layer::Store;
use super::tar::ended;
use super::tree::{Content, Id, Kind, Run, TOP, Tree, wrong};

/// Bytes of a block.
const BLOCK: usize = 4096;
/// Blocks for the superblock and the descriptors of as many groups as there can be: 512 GiB.
const RESERVED: u32 = 33;
/// Most blocks for files and directories.
const BLOCKS_MAX: u32 = 96 << 20;
/// Bytes that are written at once.
const BUFFER: usize = 1 << 20;
/// Bytes that have to be zero for a hole.
const CHUNK: usize = 64 << 10;
/// The first inode that is free for anyone (`s_first_ino`), and that of the root directory.
const FIRST: u32 = 11;
const ROOT: u32 = 2;

/// Writes at `at` of `to`, as far as there is room.
fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = to.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// The lower half of a number.
fn low(value: u32) -> [u8; 2] {
    let [a, b, ..] = value.to_le_bytes();
    [a, b]
}

/// The upper half of a number.
fn high(value: u32) -> [u8; 2] {
    let [.., a, b] = value.to_le_bytes();
    [a, b]
}

/// An image that is written.
pub struct Image {
    file: File,
    /// The next block.
    next: u32,
    /// Blocks before that one that are not written yet.
    waiting: Vec<u8>,
    chunk: Vec<u8>,
}

impl Image {
    /// An image in an empty file.
    pub fn new(file: File) -> Self {
        Image { file, next: RESERVED, waiting: Vec::with_capacity(BUFFER), chunk: vec![0; CHUNK] }
    }

    /// Adds bytes, in blocks of their own; the number of the first.
    fn append(&mut self, bytes: &[u8]) -> io::Result<u32> {
        let first = self.next;
        let blocks = u32::try_from(bytes.len().div_ceil(BLOCK)).unwrap_or(u32::MAX);
        self.next = first
            .checked_add(blocks)
            .filter(|next| *next <= BLOCKS_MAX)
            .ok_or_else(|| wrong(format!("its files have more than {} GiB", u64::from(BLOCKS_MAX >> 18))))?;
        if self.waiting.len() + bytes.len() > BUFFER {
            self.write_waiting(first)?;
        }
        self.waiting.extend_from_slice(bytes);
        self.waiting.resize(self.waiting.len().next_multiple_of(BLOCK), 0);
        Ok(first)
    }

    /// Writes what waits, which ends before `block`.
    fn write_waiting(&mut self, block: u32) -> io::Result<()> {
        let end = u64::from(block) * BLOCK as u64;
        self.file.write_all_at(&self.waiting, end - self.waiting.len() as u64)?;
        self.waiting.clear();
        Ok(())
    }

    /// Finishes the image with the files of `tree`, whose bytes were put aside here, and room for `free` bytes more. `identity`
    /// makes its UUID: the same content gives the same image.
    ///
    /// # Errors
    /// As the host answers; `InvalidData` for a tree that ext4 cannot hold.
    pub fn finish(mut self, tree: &Tree, identity: [u8; 32], free: u64) -> io::Result<()> {
        let numbers = Numbers::of(tree);
        let mut groups = Groups::default();
        groups.take(0, 1);
        let mut inodes = Vec::with_capacity(numbers.order.len() * inode::SIZE);
        for id in &numbers.order {
            inodes.extend(self.inode(tree, &numbers, *id, &mut groups)?);
        }
        self.write_waiting(self.next)?;
        groups.lay_out(self.next, free, numbers.order.len(), numbers.directories);
        groups.write(&self.file, &inodes, identity)
    }

    /// Writes what a node has beside its inode, and the bytes of that.
    fn inode(
        &mut self,
        tree: &Tree,
        numbers: &Numbers,
        id: Id,
        groups: &mut Groups,
    ) -> io::Result<[u8; inode::SIZE]> {
        let node = tree.node(id);
        let mut blocks = 0;
        let mut inode = inode::Inode::new(&node.meta);
        let stored = match &node.kind {
            Kind::File(content) => Some(content.clone()),
            Kind::Directory(_) => {
                let bytes = directory::bytes(tree, numbers, id);
                Some(self.stored(&bytes)?)
            }
            Kind::Link(text) if text.len() >= inode::ROOM => Some(self.stored(text)?),
            _ => None,
        };
        if let Some(content) = &stored {
            for run in &content.runs {
                groups.take(run.physical, run.count);
                blocks += run.count;
            }
            let (root, nodes) = inode::extents(&content.runs, &mut |block| {
                let at = self.append(block)?;
                groups.take(at, 1);
                Ok(at)
            })?;
            blocks += nodes;
            inode.set_extents(&root, content.len);
        }
        match xattr::place(&node.meta.attributes)? {
            xattr::Place::None => {}
            xattr::Place::Inode(bytes) => inode.set_attributes(&bytes),
            xattr::Place::Block(bytes) => {
                let at = self.append(&bytes)?;
                groups.take(at, 1);
                blocks += 1;
                inode.set_attribute_block(at);
            }
        }
        inode.set_kind(&node.kind);
        inode.set_links(numbers.links(id), matches!(node.kind, Kind::Directory(_)))?;
        inode.set_blocks(blocks);
        Ok(inode.bytes())
    }

    fn stored(&mut self, bytes: &[u8]) -> io::Result<Content> {
        let physical = self.append(bytes)?;
        let count = u32::try_from(bytes.len().div_ceil(BLOCK)).unwrap_or(u32::MAX);
        Ok(Content { len: bytes.len() as u64, runs: vec![Run { logical: 0, physical, count }] })
    }
}

impl Store for Image {
    fn put(&mut self, content: &mut dyn Read, len: u64) -> io::Result<Content> {
        let mut chunk = std::mem::take(&mut self.chunk);
        let stored = self.store(content, len, &mut chunk);
        self.chunk = chunk;
        stored
    }
}

impl Image {
    fn store(&mut self, content: &mut dyn Read, len: u64, chunk: &mut [u8]) -> io::Result<Content> {
        let mut runs: Vec<Run> = Vec::new();
        let (mut left, mut logical) = (len, 0u32);
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
            let chunk = chunk.get_mut(..want).unwrap_or_default();
            content.read_exact(chunk).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => ended(),
                _ => error,
            })?;
            left -= want as u64;
            let count = u32::try_from(want.div_ceil(BLOCK)).unwrap_or(0);
            if chunk.iter().any(|byte| *byte != 0) {
                let physical = self.append(chunk)?;
                match runs.last_mut() {
                    Some(run)
                        if run.physical + run.count == physical && run.logical + run.count == logical =>
                    {
                        run.count += count;
                    }
                    _ => runs.push(Run { logical, physical, count }),
                }
            }
            logical = logical.checked_add(count).ok_or_else(|| wrong("a file is too large"))?;
        }
        Ok(Content { len, runs })
    }
}

/// The inodes of a tree's nodes.
struct Numbers {
    /// The nodes that have a name, in the order of their inodes: the top, then the others from [`FIRST`] on.
    order: Vec<Id>,
    /// The inode of each node, and how many links it has.
    of: Vec<(u32, u32)>,
    /// The node of the directory that each directory is in.
    above: Vec<Id>,
    directories: Vec<u32>,
}

impl Numbers {
    fn of(tree: &Tree) -> Numbers {
        let mut numbers = Numbers {
            order: vec![TOP],
            of: vec![(0, 0); tree.len()],
            above: vec![TOP; tree.len()],
            directories: vec![ROOT],
        };
        // `.` and, as it is its own parent, `..`.
        numbers.of[TOP] = (ROOT, 2);
        let (mut seen, mut next) = (0, FIRST);
        while let Some(dir) = numbers.order.get(seen).copied() {
            seen += 1;
            for (_, id) in tree.children(dir) {
                let (number, links) = numbers.of[id];
                if number != 0 {
                    numbers.of[id].1 = links + 1;
                    continue;
                }
                let directory = matches!(tree.node(id).kind, Kind::Directory(_));
                numbers.of[id] = (next, if directory { 2 } else { 1 });
                if directory {
                    numbers.above[id] = dir;
                    numbers.of[dir].1 += 1;
                    numbers.directories.push(next);
                }
                numbers.order.push(id);
                next += 1;
            }
        }
        numbers
    }

    fn inode(&self, id: Id) -> u32 {
        self.of.get(id).map_or(0, |(number, _)| *number)
    }

    fn links(&self, id: Id) -> u32 {
        self.of.get(id).map_or(0, |(_, links)| *links)
    }

    fn above(&self, id: Id) -> Id {
        self.above.get(id).copied().unwrap_or(TOP)
    }
}

#[cfg(test)]
mod tests;
