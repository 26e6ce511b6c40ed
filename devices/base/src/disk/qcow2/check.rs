//! A look at the tables of a qcow2 image before anything is written to it.
//!
//! Clusters are given out by their reference counts. Where those are damaged, a table counts as free space, the next
//! write of the guest lands in it, and the image is gone. So the counts of all that is not data must be there. Data
//! clusters are not looked at: that takes `qemu-img check`, and minutes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of the largest table that is read: those of `qemu-img` (32 MiB of L1, 8 MiB of refcount table).
const LARGEST: u64 = 32 << 20;
/// Bits of a table entry that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn damaged(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// The fields of the header that matter here, by offset (docs/interop/qcow2.txt of QEMU).
struct Head {
    cluster_bits: u32,
    l1: (u64, u64),
    counts: (u64, u64),
    /// Bits of a reference count, as power of 2.
    order: u32,
    len: u64,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u32::from_be_bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u64::from_be_bytes)
}

impl Head {
    fn read(file: &File) -> io::Result<Head> {
        let mut bytes = [0; 104];
        file.read_exact_at(&mut bytes, 0).map_err(|cause| match cause.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::new(cause.kind(), "it ends within its header"),
            _ => cause,
        })?;
        let cluster_bits = be32(&bytes, 20);
        let order = if be32(&bytes, 4) == 2 { 4 } else { be32(&bytes, 96) };
        if !(9..=21).contains(&cluster_bits) || order > 6 {
            return Err(damaged("its header names no possible sizes"));
        }
        // Incompatible feature 1: whoever finds damage says so there.
        if be32(&bytes, 4) > 2 && be64(&bytes, 72) & 2 != 0 {
            return Err(damaged("it is marked as damaged"));
        }
        Ok(Head {
            cluster_bits,
            l1: (be64(&bytes, 40), u64::from(be32(&bytes, 36)) * 8),
            counts: (be64(&bytes, 48), u64::from(be32(&bytes, 56)) << cluster_bits),
            order,
            len: super::super::layers::size(file)?,
        })
    }

    /// Entries of the table at `offset`.
    fn table(&self, file: &File, (offset, len): (u64, u64), name: &str) -> io::Result<Vec<u64>> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len && len <= LARGEST);
        if end.is_none() || !offset.is_multiple_of(1 << self.cluster_bits) {
            return Err(damaged(format!("its {name} is not within the file")));
        }
        let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        file.read_exact_at(&mut bytes, offset)?;
        let (entries, _) = bytes.as_chunks();
        Ok(entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
    }
}

/// Reads reference counts, block by block.
struct Counts<'a> {
    file: &'a File,
    head: &'a Head,
    blocks: Vec<u64>,
    last: Option<(u64, Vec<u8>)>,
}

impl Counts<'_> {
    /// Demands that no cluster of `offset..offset + len` counts as free.
    fn used(&mut self, offset: u64, len: u64, name: &str) -> io::Result<()> {
        let bits = self.head.cluster_bits;
        let (first, last) = (offset >> bits, offset.saturating_add(len).div_ceil(1 << bits));
        if offset >= self.head.len || !offset.is_multiple_of(1 << bits) {
            return Err(damaged(format!("its {name} at {offset:#x} is not within the file")));
        }
        for cluster in first..last {
            if !self.counted(cluster)? {
                return Err(damaged(format!("its {name} at {offset:#x} counts as free space")));
            }
        }
        Ok(())
    }

    fn counted(&mut self, cluster: u64) -> io::Result<bool> {
        let (bits, order) = (self.head.cluster_bits, self.head.order);
        let each = 1u64 << (bits + 3 - order);
        let block = usize::try_from(cluster / each).ok().and_then(|index| self.blocks.get(index));
        let Some(block) = block.map(|entry| entry & OFFSET).filter(|offset| *offset != 0) else {
            return Ok(false);
        };
        let known = self.last.as_ref().is_some_and(|(at, _)| *at == block);
        if !known {
            let mut bytes = vec![0; 1 << bits];
            self.file.read_exact_at(&mut bytes, block).map_err(|_| damaged("its refcounts are cut off"))?;
            self.last = Some((block, bytes));
        }
        let bytes = self.last.as_ref().map(|(_, bytes)| bytes.as_slice()).unwrap_or_default();
        let bit = (cluster % each) << order;
        let (from, len) = (usize::try_from(bit / 8).unwrap_or(usize::MAX), (1usize << order).div_ceil(8));
        let count = bytes.get(from..from.saturating_add(len)).unwrap_or_default();
        let shift = if order < 3 { bit % 8 } else { 0 };
        let mask = if order < 3 { (1u16 << (1 << order)) - 1 } else { 0xff };
        Ok(count.iter().any(|byte| u16::from(*byte) >> shift & mask != 0))
    }
}

/// Looks at all tables of the image but those of data.
///
/// # Errors
/// One is not in the file, or counts as free space.
pub fn check(file: &File) -> io::Result<()> {
    let head = Head::read(file)?;
    let cluster = 1u64 << head.cluster_bits;
    let blocks = head.table(file, head.counts, "refcount table")?;
    let l1 = head.table(file, head.l1, "L1 table")?;
    let mut counts = Counts { file, head: &head, blocks: blocks.clone(), last: None };
    counts.used(0, cluster, "header")?;
    counts.used(head.counts.0, head.counts.1, "refcount table")?;
    if head.l1.1 > 0 {
        counts.used(head.l1.0, head.l1.1, "L1 table")?;
    }
    for (tables, name) in [(blocks, "refcount block"), (l1, "L2 table")] {
        for entry in tables {
            if entry & OFFSET != 0 {
                counts.used(entry & OFFSET, cluster, name)?;
            }
        }
    }
    Ok(())
}
