//! Works on one file at random, and in the same way on a copy of it in memory: whatever is read has to be as in the copy.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, FallocateFlags, OFlags, fadvise, fallocate};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Most bytes of one operation.
const MOST: usize = 96 << 10;
const PAGE: usize = 4096;
/// Operations that are told when one has gone wrong.
const TOLD: usize = 30;

/// Numbers that look like chance (xorshift64).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`, or 0.
    fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).unwrap_or(u64::MAX).max(1);
        usize::try_from((self.next() >> 11) % end).unwrap_or(0)
    }

    /// Bytes that never come again: some all the same, for those who look for zeroes.
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        if self.below(8) == 0 {
            return vec![0; len];
        }
        let words = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes());
        words.take(len).collect()
    }
}

/// What can be done.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Write,
    Read,
    DirectWrite,
    DirectRead,
    MappedWrite,
    MappedRead,
    Cut,
    Punch,
    Zero,
    Allocate,
    Remove,
    Insert,
    Sync,
    Drop,
    Reopen,
}

/// As often as they are here.
const DEEDS: &[Deed] = &[
    Deed::Write,
    Deed::Write,
    Deed::Write,
    Deed::Write,
    Deed::Read,
    Deed::Read,
    Deed::Read,
    Deed::DirectWrite,
    Deed::DirectWrite,
    Deed::DirectRead,
    Deed::DirectRead,
    Deed::MappedWrite,
    Deed::MappedWrite,
    Deed::MappedRead,
    Deed::Cut,
    Deed::Punch,
    Deed::Punch,
    Deed::Zero,
    Deed::Allocate,
    Deed::Remove,
    Deed::Insert,
    Deed::Sync,
    Deed::Drop,
    Deed::Reopen,
];

/// A file, and what it has to be.
pub struct Work {
    path: PathBuf,
    file: File,
    direct: File,
    /// What the file has to be.
    copy: Vec<u8>,
    /// The file is a block device.
    device: bool,
    /// Direct reads and writes begin and end at multiples of this.
    grain: usize,
    limit: usize,
    chance: Chance,
}

impl Work {
    /// Begins with a new file, or with a block device as it is: that one keeps its size. The same seed does the same.
    ///
    /// # Errors
    /// As the system answers.
    pub fn open(path: &Path, seed: u64, limit: usize) -> io::Result<Work> {
        let device = path.metadata().is_ok_and(|data| data.file_type().is_block_device());
        let file = OpenOptions::new().read(true).write(true).create(!device).truncate(!device).open(path)?;
        let direct = direct(path)?;
        let copy = if device { read(&file, 0, limit)? } else { Vec::new() };
        let limit = if device { copy.len() } else { limit };
        // Sectors of a device, blocks of a file system.
        let grain = if device { 512 } else { PAGE };
        // Neighbouring seeds are to have nothing in common, and none may be 0.
        let chance = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        Ok(Work { path: path.to_owned(), file, direct, copy, device, grain, limit, chance })
    }

    /// Does `count` things, then reads all of it from the disk. The last things done are in `log`.
    ///
    /// # Errors
    /// As the system answers, or what was read is not what had been written.
    pub fn run(&mut self, count: u64, log: &mut VecDeque<String>) -> io::Result<u64> {
        for number in 0..count {
            let deed = DEEDS[self.chance.below(DEEDS.len())];
            let at = self.chance.below(if self.device { self.limit } else { self.copy.len() + MOST });
            let at = at.min(self.limit);
            let len = (1 + self.chance.below(MOST)).min(self.limit - at);
            let (at, len) = if self.chance.below(3) == 0 { (at & !511, len & !511) } else { (at, len) };
            if log.len() == TOLD {
                log.pop_front();
            }
            log.push_back(format!("{number}: {deed:?} {len} at {at} of {}", self.copy.len()));
            self.step(deed, at, len)?;
        }
        log.push_back("at the end".to_owned());
        self.drop_cache()?;
        if !self.device && self.file.metadata()?.len() != self.copy.len() as u64 {
            return Err(io::Error::other(format!("its size is not {}", self.copy.len())));
        }
        self.compare(0, self.limit, &read(&self.file, 0, self.limit)?)?;
        Ok(count)
    }

    fn step(&mut self, deed: Deed, at: usize, len: usize) -> io::Result<()> {
        let grain = self.grain;
        let (low, high) = (at - at % grain, len - len % grain);
        match deed {
            Deed::Write => {
                let bytes = self.chance.bytes(len);
                self.file.write_all_at(&bytes, at as u64)?;
                self.put(at, &bytes);
            }
            Deed::Read => self.compare(at, len, &read(&self.file, at, len)?)?,
            Deed::DirectWrite if high > 0 => {
                let bytes = self.chance.bytes(high);
                let mut room = vec![0; high + PAGE];
                let aligned = aligned(&mut room, high);
                aligned.copy_from_slice(&bytes);
                self.direct.write_all_at(aligned, low as u64)?;
                self.put(low, &bytes);
            }
            Deed::DirectRead if high > 0 => {
                let mut room = vec![0; high + PAGE];
                let aligned = aligned(&mut room, high);
                let have = self.direct.read_at(aligned, low as u64)?;
                self.compare(low, high, &aligned[..have])?;
            }
            Deed::MappedWrite | Deed::MappedRead => {
                self.mapped(matches!(deed, Deed::MappedWrite), at, len)?
            }
            Deed::Punch => self.punch(at, len)?,
            Deed::Zero => self.zero(at, len)?,
            Deed::Cut if !self.device => {
                self.file.set_len(at as u64)?;
                self.copy.resize(at, 0);
            }
            Deed::Allocate if !self.device && len > 0 => {
                fallocate(&self.file, FallocateFlags::empty(), at as u64, len as u64)?;
                let end = (at + len).max(self.copy.len());
                self.copy.resize(end, 0);
            }
            Deed::Remove if !self.device && high > 0 && low + high < self.copy.len() => {
                fallocate(&self.file, FallocateFlags::COLLAPSE_RANGE, low as u64, high as u64)?;
                self.copy.drain(low..low + high);
            }
            Deed::Insert
                if !self.device
                    && high > 0
                    && low < self.copy.len()
                    && self.copy.len() + high <= self.limit =>
            {
                fallocate(&self.file, FallocateFlags::INSERT_RANGE, low as u64, high as u64)?;
                self.copy.splice(low..low, vec![0; high]);
            }
            Deed::Sync => self.file.sync_all()?,
            Deed::Drop => self.drop_cache()?,
            Deed::Reopen => {
                self.file = OpenOptions::new().read(true).write(true).open(&self.path)?;
                self.direct = direct(&self.path)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// What is written beyond the end leaves zeroes before it.
    fn put(&mut self, at: usize, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let end = at + bytes.len();
        if end > self.copy.len() {
            self.copy.resize(end, 0);
        }
        self.copy[at..end].copy_from_slice(bytes);
    }

    fn mapped(&mut self, write: bool, at: usize, len: usize) -> io::Result<()> {
        let len = len.min(self.copy.len().saturating_sub(at));
        if len == 0 {
            return Ok(());
        }
        let (start, skipped) = (at - at % PAGE, at % PAGE);
        let from = FileOffset::new(self.file.try_clone()?, start as u64);
        let map = MmapRegion::<()>::from_file(from, skipped + len).map_err(io::Error::other)?;
        let slice = map.get_slice(skipped, len).map_err(io::Error::other)?;
        let mut bytes = if write { self.chance.bytes(len) } else { vec![0; len] };
        if write {
            slice.write_slice(&bytes, 0).map_err(io::Error::other)?;
            self.put(at, &bytes);
            Ok(())
        } else {
            slice.read_slice(&mut bytes, 0).map_err(io::Error::other)?;
            self.compare(at, len, &bytes)
        }
    }

    fn punch(&mut self, at: usize, len: usize) -> io::Result<()> {
        let (at, len) = if self.device { (at - at % 512, len - len % 512) } else { (at, len) };
        if len == 0 {
            return Ok(());
        }
        fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at as u64, len as u64)?;
        let end = (at + len).min(self.copy.len());
        if at < end {
            self.copy[at..end].fill(0);
        }
        Ok(())
    }

    fn zero(&mut self, at: usize, len: usize) -> io::Result<()> {
        let (at, len) = if self.device { (at - at % 512, len - len % 512) } else { (at, len) };
        if len == 0 {
            return Ok(());
        }
        let keep = if self.device { FallocateFlags::KEEP_SIZE } else { FallocateFlags::empty() };
        fallocate(&self.file, FallocateFlags::ZERO_RANGE | keep, at as u64, len as u64)?;
        self.put(at, &vec![0; len]);
        Ok(())
    }

    /// All that the kernel keeps goes to the disk, and comes from there when it is next read.
    fn drop_cache(&self) -> io::Result<()> {
        self.file.sync_all()?;
        Ok(fadvise(&self.file, 0, None, Advice::DontNeed)?)
    }

    /// Demands that `found` is what the copy has of the `len` bytes at `at`.
    fn compare(&self, at: usize, len: usize, found: &[u8]) -> io::Result<()> {
        let wanted = self.copy.get(at..).unwrap_or_default();
        let wanted = &wanted[..len.min(wanted.len())];
        if let Some(place) = found.iter().zip(wanted).position(|(found, wanted)| found != wanted) {
            let (end, at) = (found.len().min(wanted.len()), at + place);
            let wrong =
                found[place..end].iter().zip(&wanted[place..end]).filter(|(found, wanted)| found != wanted);
            return Err(io::Error::other(format!(
                "at {at} there is {:02x?} instead of {:02x?}; {} bytes of the next {} are wrong",
                &found[place..end.min(place + 8)],
                &wanted[place..end.min(place + 8)],
                wrong.count(),
                end - place
            )));
        }
        if found.len() != wanted.len() {
            let (found, wanted) = (found.len(), wanted.len());
            return Err(io::Error::other(format!("{found} bytes at {at}, and there should be {wanted}")));
        }
        Ok(())
    }
}

fn direct(path: &Path) -> io::Result<File> {
    let flag = i32::try_from(OFlags::DIRECT.bits()).map_err(io::Error::other)?;
    OpenOptions::new().read(true).write(true).custom_flags(flag).open(path)
}

/// `len` bytes of `room` that begin at a page.
fn aligned(room: &mut [u8], len: usize) -> &mut [u8] {
    let from = room.as_ptr().align_offset(PAGE);
    &mut room[from..from + len]
}

/// What is at `at`: `len` bytes, or fewer at the end of the file.
fn read(file: &File, at: usize, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut have = 0;
    while have < len {
        match file.read_at(&mut bytes[have..], (at + have) as u64)? {
            0 => break,
            more => have += more,
        }
    }
    bytes.truncate(have);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(path: &Path) -> Work {
        Work::open(path, 7, 1 << 20).unwrap()
    }

    #[test]
    fn a_file_system_that_works_is_found_to() {
        // Not every file system takes direct reads and writes: the one of the tree does.
        let place = tempfile::Builder::new().tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mut log = VecDeque::new();
        assert_eq!(
            work(&place.path().join("file")).run(300, &mut log).map_err(|e| format!("{e}: {log:?}")),
            Ok(300)
        );
    }

    #[test]
    fn one_wrong_byte_is_found() {
        let place = tempfile::Builder::new().tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = place.path().join("file");
        let mut work = work(&path);
        work.step(Deed::Write, 100, 5000).unwrap();
        work.file.write_all_at(&[work.copy[3000] ^ 1], 3000).unwrap();
        let cause = work.step(Deed::MappedRead, 2000, 2000).unwrap_err().to_string();
        assert!(
            cause.starts_with("at 3000 there is ") && cause.ends_with("1 bytes of the next 1000 are wrong"),
            "{cause}"
        );
        work.step(Deed::Read, 3001, 100).unwrap();
        work.file.set_len(4000).unwrap();
        let cause = work.step(Deed::Read, 3500, 9000).unwrap_err().to_string();
        assert_eq!(cause, "500 bytes at 3500, and there should be 1600");
        assert!(work.run(0, &mut VecDeque::new()).is_err());
    }
}
