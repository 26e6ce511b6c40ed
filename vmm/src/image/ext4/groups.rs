//! Groups of blocks: which blocks and inodes are in use, where the tables are, and the superblock. ext4's "Block Groups",
//! "Super Block".

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{BLOCK, FIRST, ROOT, inode, low, put};

/// Blocks of a group: one for each bit of a block.
const BLOCKS: u32 = 8 * 4096;
/// Inodes of a group: as many, so that the bitmap of a group without any is all zero, and no byte of the file.
const INODES: u32 = BLOCKS;
/// Blocks of a group's table of inodes.
const TABLE: u32 = INODES / 16;
/// Bytes of a descriptor, and how many fit into a block.
const DESCRIPTOR: usize = 32;
const DESCRIPTORS: u32 = 128;
// As many bits as a block has, and as many inodes and descriptors as fit into one.
const _: () = assert!(BLOCK == 4096 && BLOCK / inode::SIZE == 16 && BLOCK / DESCRIPTOR == 128);

/// `EXT_ATTR`, `DIR_INDEX`, `SPARSE_SUPER2`: the last, with no groups named, is for no copies of the superblock.
const COMPATIBLE: u32 = 0x8 | 0x20 | 0x200;
/// `FILETYPE`, `EXTENTS`, `FLEX_BG`.
const INCOMPATIBLE: u32 = 0x2 | 0x40 | 0x200;
/// `LARGE_FILE`, `HUGE_FILE`, `DIR_NLINK`, `EXTRA_ISIZE`.
const READ_ONLY_COMPATIBLE: u32 = 0x2 | 0x8 | 0x20 | 0x40;

/// The groups of an image.
#[derive(Default)]
pub struct Groups {
    /// Blocks in use: the first of each run, and how many.
    taken: Vec<(u32, u32)>,
    count: u32,
    /// Where the bitmaps of blocks begin; those of inodes follow, then the tables.
    bitmaps: u32,
    /// Inodes in use, the reserved ones too.
    inodes: u32,
    directories: Vec<u32>,
}

impl Groups {
    /// Blocks are in use.
    pub fn take(&mut self, first: u32, count: u32) {
        self.taken.push((first, count));
    }

    /// Lays the groups out: `end` is the first block that nothing is in yet.
    pub fn lay_out(&mut self, end: u32, free: u64, files: usize, directories: Vec<u32>) {
        let wanted = u64::from(end) + free / BLOCK as u64 + 2;
        let count = wanted.div_ceil(u64::from(BLOCKS - TABLE - 2));
        // The root directory has its number among the reserved ones.
        self.inodes = u32::try_from(files).unwrap_or(u32::MAX).saturating_add(FIRST - 2);
        self.count = u32::try_from(count).unwrap_or(u32::MAX).max(self.inodes.div_ceil(INODES));
        self.bitmaps = end;
        self.directories = directories;
        self.take(end, self.count * (TABLE + 2));
        self.take(1, self.descriptor_blocks());
    }

    fn descriptor_blocks(&self) -> u32 {
        self.count.div_ceil(DESCRIPTORS)
    }

    /// Writes all of it; `inodes` are those in use but the reserved ones, the root directory's first.
    ///
    /// # Errors
    /// As the host answers.
    pub fn write(&self, file: &File, inodes: &[u8], identity: [u8; 32]) -> io::Result<()> {
        let at = |block: u32| u64::from(block) * BLOCK as u64;
        file.set_len(at(self.count * BLOCKS))?;
        let tables = self.bitmaps + 2 * self.count;
        let place = |number: u32| at(tables) + u64::from(number - 1) * inode::SIZE as u64;
        let (root, others) = inodes.split_at_checked(inode::SIZE).unwrap_or((inodes, &[]));
        file.write_all_at(root, place(ROOT))?;
        file.write_all_at(others, place(FIRST))?;
        let used = bits((self.count * BLOCKS) as usize, &self.taken);
        let occupied = bits((self.count * INODES) as usize, &[(0, self.inodes)]);
        let mut descriptors = vec![0; self.descriptor_blocks() as usize * BLOCK];
        let (mut free_blocks, mut free_inodes) = (0, 0);
        let maps = used.chunks(BLOCK).zip(occupied.chunks(BLOCK));
        for (group, (blocks, inodes)) in (0..self.count).zip(maps) {
            for (bitmap, block) in [(blocks, group), (inodes, self.count + group)] {
                if bitmap.iter().any(|byte| *byte != 0) {
                    file.write_all_at(bitmap, at(self.bitmaps + block))?;
                }
            }
            let [blocks, inodes] = [blocks, inodes].map(free);
            let own = group * INODES + 1..=(group + 1) * INODES;
            let directories = self.directories.iter().filter(|number| own.contains(number)).count();
            let directories = u32::try_from(directories).unwrap_or(u32::MAX);
            let place = group as usize * DESCRIPTOR;
            let pointers = [group, self.count + group, 2 * self.count + group * TABLE];
            for (number, pointer) in pointers.into_iter().enumerate() {
                put(&mut descriptors, place + number * 4, &(self.bitmaps + pointer).to_le_bytes());
            }
            for (number, value) in [blocks, inodes, directories].into_iter().enumerate() {
                put(&mut descriptors, place + 12 + number * 2, &low(value));
            }
            free_blocks += blocks;
            free_inodes += inodes;
        }
        file.write_all_at(&descriptors, at(1))?;
        file.write_all_at(&self.superblock(free_blocks, free_inodes, identity), 1024)
    }

    fn superblock(&self, free_blocks: u32, free_inodes: u32, identity: [u8; 32]) -> [u8; 1024] {
        let mut out = [0; 1024];
        for (at, value) in [
            (0, self.count * INODES),
            (4, self.count * BLOCKS),
            (12, free_blocks),
            (16, free_inodes),
            // Blocks and clusters of 1024 << 2 bytes.
            (24, 2),
            (28, 2),
            (32, BLOCKS),
            (36, BLOCKS),
            (40, INODES),
            // Revision 1: the sizes below are given.
            (76, 1),
            (84, FIRST),
            (92, COMPATIBLE),
            (96, INCOMPATIBLE),
            (100, READ_ONLY_COMPATIBLE),
            // Extended attributes and access lists.
            (256, 0xc),
            // Names are hashed as unsigned bytes.
            (352, 2),
        ] {
            put(&mut out, at, &value.to_le_bytes());
        }
        let (size, extra): (u16, u16) = (256, inode::EXTRA);
        // No check after so many mounts; magic; clean; errors: go on.
        for (at, value) in
            [(54, u16::MAX), (56, 0xef53), (58, 1), (60, 1), (88, size), (348, extra), (350, extra)]
        {
            put(&mut out, at, &value.to_le_bytes());
        }
        let (mut uuid, seed) = (identity, &identity[16..]);
        // Version 4, variant 1 (RFC 9562): it is as good as random.
        uuid[6] = uuid[6] & 0x0f | 0x40;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        put(&mut out, 104, &uuid[..16]);
        put(&mut out, 236, seed);
        // Half MD4 for names; 16 groups are laid out as one.
        put(&mut out, 252, &[1]);
        put(&mut out, 372, &[4]);
        out
    }
}

/// A bitmap with runs of ones.
fn bits(len: usize, runs: &[(u32, u32)]) -> Vec<u8> {
    let mut bits = vec![0; len / 8];
    for (first, count) in runs {
        let (mut at, end) = (*first as usize, (first + count) as usize);
        while at < end {
            let whole = at.is_multiple_of(8) && end - at >= 8;
            if let Some(byte) = bits.get_mut(at / 8) {
                *byte |= if whole { 0xff } else { 1 << (at % 8) };
            }
            at += if whole { 8 } else { 1 };
        }
    }
    bits
}

/// The zeros in a bitmap.
fn free(bitmap: &[u8]) -> u32 {
    bitmap.iter().map(|byte| byte.count_zeros()).sum()
}
