//! Inodes, and the trees of extents in them. ext4's "Index Nodes", "Extent Tree".

use std::io;

use super::{BLOCK, high, low, put};
use crate::image::tree::{Kind, Meta, Run, wrong};

/// Bytes of an inode.
pub const SIZE: usize = 256;
/// Bytes of an inode for a short link, a device's numbers, or the root of its extents (`i_block`).
pub const ROOM: usize = 60;
/// Fields beyond the 128 bytes of old (`i_extra_isize`); extended attributes follow.
pub const EXTRA: u16 = 32;
/// Where extended attributes begin.
pub const ATTRIBUTES: usize = 128 + EXTRA as usize;

/// Most links to a file; a directory with more has 1, which means that nobody knows.
const LINKS_MAX: u32 = 65_000;
/// `EXT4_EXTENTS_FL`.
const EXTENTS: u32 = 0x8_0000;
/// Most blocks of an extent.
const EXTENT_MAX: u32 = 32_768;
/// Bytes of an extent, of an index entry, and of the header before them.
const ENTRY: usize = 12;

/// An inode that is filled.
pub struct Inode([u8; SIZE]);

impl Inode {
    /// One with these attributes.
    pub fn new(meta: &Meta) -> Self {
        let mut inode = Inode([0; SIZE]);
        inode.put(0, &meta.mode.to_le_bytes());
        inode.put(2, &low(meta.uid));
        inode.put(24, &low(meta.gid));
        inode.put(120, &high(meta.uid));
        inode.put(122, &high(meta.gid));
        let (seconds, extra) = time(meta.mtime);
        for (at, beyond) in [(8, 140), (12, 132), (16, 136), (144, 148)] {
            inode.put(at, &seconds.to_le_bytes());
            inode.put(beyond, &extra.to_le_bytes());
        }
        inode.put(128, &EXTRA.to_le_bytes());
        inode
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        put(&mut self.0, at, bytes);
    }

    /// What it is; a short link's text and a device's numbers stand in it.
    pub fn set_kind(&mut self, kind: &Kind) {
        let (bits, room) = match kind {
            Kind::File(_) => (0x8000, None),
            Kind::Directory(_) => (0x4000, None),
            Kind::Link(text) if text.len() < ROOM => {
                self.set_len(text.len() as u64);
                (0xa000, Some(text.clone()))
            }
            Kind::Link(_) => (0xa000, None),
            Kind::Device { block, major, minor } => {
                let bits = if *block { 0x6000 } else { 0x2000 };
                (bits, Some(device(*major, *minor)))
            }
            Kind::Fifo => (0x1000, None),
        };
        let [a, b] = [self.0[0], self.0[1]];
        self.put(0, &(u16::from_le_bytes([a, b]) | bits).to_le_bytes());
        if let Some(room) = room {
            self.put(40, &room);
        }
    }

    fn set_len(&mut self, len: u64) {
        let bytes = len.to_le_bytes();
        self.put(4, &bytes[..4]);
        self.put(108, &bytes[4..]);
    }

    /// Its bytes are `len`, found by the root of a tree of extents.
    pub fn set_extents(&mut self, root: &[u8], len: u64) {
        self.set_len(len);
        self.put(32, &EXTENTS.to_le_bytes());
        self.put(40, root);
    }

    /// How many names it has.
    ///
    /// # Errors
    /// They are too many.
    pub fn set_links(&mut self, links: u32, directory: bool) -> io::Result<()> {
        let links = match links {
            links if links < LINKS_MAX => links,
            _ if directory => 1,
            _ => return Err(wrong(format!("a file has more than {LINKS_MAX} names"))),
        };
        self.put(26, &low(links));
        Ok(())
    }

    /// How many blocks it has in all.
    pub fn set_blocks(&mut self, blocks: u32) {
        let sectors = u64::from(blocks) * (BLOCK / 512) as u64;
        let bytes = sectors.to_le_bytes();
        self.put(28, &bytes[..4]);
        self.put(116, &bytes[4..6]);
    }

    /// Extended attributes that fit into it.
    pub fn set_attributes(&mut self, bytes: &[u8]) {
        self.put(ATTRIBUTES, bytes);
    }

    /// The block with extended attributes.
    pub fn set_attribute_block(&mut self, block: u32) {
        self.put(104, &block.to_le_bytes());
    }

    /// Its bytes.
    pub fn bytes(self) -> [u8; SIZE] {
        self.0
    }
}

/// Seconds, and the field beyond them: two bits more, and nanoseconds.
fn time((seconds, nanoseconds): (i64, u32)) -> (u32, u32) {
    // 34 bits, the lowest 32 of them with a sign: from 1901 to 2446.
    let seconds = seconds.clamp(-(1 << 31), (3 << 32) + (1 << 31) - 1);
    let [a, b, c, d, ..] = seconds.to_le_bytes();
    let lowest = u32::from_le_bytes([a, b, c, d]);
    let epoch = (seconds - i64::from(i32::from_le_bytes([a, b, c, d]))) >> 32;
    (lowest, u32::try_from(epoch & 3).unwrap_or(0) | nanoseconds.min(999_999_999) << 2)
}

/// A device's numbers: in the old form where they are small, else in the second word.
fn device(major: u32, minor: u32) -> Vec<u8> {
    let old = major < 256 && minor < 256;
    let word = if old {
        [major << 8 | minor, 0]
    } else {
        [0, minor & 0xff | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12]
    };
    word.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// The root of the tree of extents for `runs`, and how many blocks the rest of it takes, which `append` writes.
///
/// # Errors
/// Those of `append`.
pub fn extents(runs: &[Run], append: &mut dyn FnMut(&[u8]) -> io::Result<u32>) -> io::Result<(Vec<u8>, u32)> {
    // First block in the file, and the entry.
    let mut level: Vec<(u32, [u8; ENTRY])> = Vec::new();
    for run in runs {
        let mut done = 0;
        while done < run.count {
            let count = (run.count - done).min(EXTENT_MAX);
            let mut entry = [0; ENTRY];
            put(&mut entry, 0, &(run.logical + done).to_le_bytes());
            put(&mut entry, 4, &low(count));
            put(&mut entry, 8, &(run.physical + done).to_le_bytes());
            level.push((run.logical + done, entry));
            done += count;
        }
    }
    let (mut depth, mut blocks) = (0, 0);
    while level.len() > ROOM / ENTRY - 1 {
        let mut above = Vec::new();
        for part in level.chunks(BLOCK / ENTRY - 1) {
            let at = append(&node(part, BLOCK, depth))?;
            blocks += 1;
            let first = part.first().map_or(0, |(first, _)| *first);
            let mut entry = [0; ENTRY];
            put(&mut entry, 0, &first.to_le_bytes());
            put(&mut entry, 4, &at.to_le_bytes());
            above.push((first, entry));
        }
        level = above;
        depth += 1;
    }
    Ok((node(&level, ROOM, depth), blocks))
}

/// A node of the tree: header and entries.
fn node(entries: &[(u32, [u8; ENTRY])], size: usize, depth: u32) -> Vec<u8> {
    let number = |value: usize| low(u32::try_from(value).unwrap_or(0));
    let mut out = vec![0; size];
    put(&mut out, 0, &0xf30a_u16.to_le_bytes());
    put(&mut out, 2, &number(entries.len()));
    put(&mut out, 4, &number(size / ENTRY - 1));
    put(&mut out, 6, &low(depth));
    for ((_, entry), place) in entries.iter().zip(1..) {
        put(&mut out, place * ENTRY, entry);
    }
    out
}
