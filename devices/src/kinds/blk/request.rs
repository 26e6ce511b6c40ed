//! What a request of the driver asks for, and whether it may (section 5.2.6).

use base::disk::Action;
use base::memory::Ram;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::virtio::Chain;

/// Bytes of a sector, in which all of virtio-blk counts.
pub const SECTOR: u64 = 512;
/// Bytes of the header: type, reserved, sector.
pub const HEADER: u64 = 16;
/// Segments of data in one request at the most (`seg_max`): what a queue of 256 has room for beside header and status.
pub const SEGMENTS: u32 = 254;
/// Bytes of a segment at the most (`size_max`).
pub const SEGMENT_BYTES: u32 = 128 << 10;
/// Bytes that one request may name, as those two allow: almost 32 MiB. A request may end in the call that starts it;
/// a driver that had the lane copy gigabytes there, or write them as zeros, would keep it from all else.
pub const LARGEST: u64 = SEGMENTS as u64 * SEGMENT_BYTES as u64;

/// The answer to a request, its last byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A request that may be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Work for the disk, on a range in bytes.
    Disk { action: Action, offset: u64, len: u64 },
    /// The serial number.
    Id,
}

/// What the disk is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub sectors: u64,
    pub readonly: bool,
    /// Bytes of the smallest block that can be read and written.
    pub block: u64,
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u64::from_le_bytes)
}

impl Shape {
    /// Reads a chain as a request.
    ///
    /// # Errors
    /// The status for a request that cannot be done.
    pub fn order(&self, chain: &Chain, ram: &Ram) -> Result<Order, Status> {
        let mut header = [0; 16];
        if chain.readable().read(ram, 0, &mut header) < header.len() {
            return Err(Status::IoError);
        }
        let sector = le64(&header, 8);
        let out = chain.readable().len().saturating_sub(HEADER);
        let room = chain.writable().len().saturating_sub(1);
        match le32(&header, 0) {
            VIRTIO_BLK_T_IN if out == 0 => self.range(Action::Read, sector, room),
            VIRTIO_BLK_T_OUT if room == 0 => self.range(Action::Write, sector, out),
            // Data in the wrong direction.
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => Err(Status::IoError),
            VIRTIO_BLK_T_FLUSH => Ok(Order::Disk { action: Action::Flush, offset: 0, len: 0 }),
            VIRTIO_BLK_T_GET_ID => Ok(Order::Id),
            kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) if !self.readonly => {
                let mut segment = [0; 16];
                chain.readable().read(ram, HEADER, &mut segment);
                // One segment is all we offer (max_discard_seg, max_write_zeroes_seg).
                if out == 16 { self.clear(kind, &segment) } else { Err(Status::IoError) }
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// A segment: sector (8 bytes), number of sectors (4), flags (4).
    fn clear(&self, kind: u32, segment: &[u8]) -> Result<Order, Status> {
        let (sector, count, flags) = (le64(segment, 0), le32(segment, 8), le32(segment, 12));
        // Bit 0 is unmap, which only write-zeroes knows (section 5.2.6.2).
        let action = match (kind, flags) {
            (VIRTIO_BLK_T_DISCARD, 0) => Action::Discard,
            (VIRTIO_BLK_T_WRITE_ZEROES, 0 | 1) => Action::Zero { unmap: flags == 1 },
            _ => return Err(Status::Unsupported),
        };
        self.range(action, sector, u64::from(count) * SECTOR)
    }

    fn range(&self, action: Action, sector: u64, len: u64) -> Result<Order, Status> {
        let end = sector.checked_add(len.div_ceil(SECTOR)).ok_or(Status::IoError)?;
        let refused = action != Action::Read && self.readonly;
        // The driver was told of larger blocks (blk_size), which the host wants whole.
        let whole =
            sector.saturating_mul(SECTOR).is_multiple_of(self.block) && len.is_multiple_of(self.block);
        if end > self.sectors || !whole || len > LARGEST || refused {
            return Err(Status::IoError);
        }
        // Within the disk, whose bytes were counted in 64 bits.
        Ok(Order::Disk { action, offset: sector.saturating_mul(SECTOR), len })
    }
}
