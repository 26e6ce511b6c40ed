//! What the driver has open: files, and directories with the entries that were read and not handed on yet.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base::files::Speed;
use rustix::fs::{RawDir, SeekFrom};
use rustix::io::Errno;

use super::nodes::Place;
use super::wire::{Answer, Stop};

/// Bytes of entries that are read from the host in one go.
const READ: usize = 32 << 10;

/// An open file or directory.
pub struct Handle {
    pub file: Place,
    /// The node it was opened as, and how long its file system may let us wait.
    pub node: u64,
    pub speed: Speed,
    /// Of a directory.
    listing: Option<Mutex<Listing>>,
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub ino: u64,
    /// Where the entry behind it is.
    pub next: u64,
    /// The kind of file, as the upper bits of a mode have it.
    pub kind: u32,
    pub name: Box<[u8]>,
}

/// Where a directory is being read.
#[derive(Default)]
pub struct Listing {
    entries: VecDeque<Entry>,
    /// Where the first of them is.
    at: u64,
    started: bool,
}

impl Listing {
    /// Goes to the entry at `offset`, a place that the driver was told.
    pub fn seek(&mut self, directory: impl AsFd, offset: u64) -> Answer<()> {
        // From the beginning, anew: that is what rewinddir(3) is for.
        if offset != self.at || self.started && offset == 0 {
            self.entries.clear();
            rustix::fs::seek(directory, SeekFrom::Start(offset))?;
        }
        (self.started, self.at) = (true, offset);
        Ok(())
    }

    /// The next entry, which stays the next until it is taken; `None` at the end.
    pub fn peek(&mut self, directory: impl AsFd) -> Answer<Option<&Entry>> {
        if self.entries.is_empty() {
            let mut room = Vec::with_capacity(READ);
            let mut raw = RawDir::new(directory, room.spare_capacity_mut());
            while let Some(entry) = raw.next() {
                let entry = entry?;
                self.entries.push_back(Entry {
                    ino: entry.ino(),
                    next: entry.next_entry_cookie(),
                    kind: entry.file_type().as_raw_mode() & 0o170_000,
                    name: entry.file_name().to_bytes().into(),
                });
                if raw.is_buffer_empty() {
                    break;
                }
            }
        }
        Ok(self.entries.front())
    }

    /// Takes the next entry.
    pub fn take(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            self.at = entry.next;
        }
    }
}

impl Handle {
    pub fn file(node: u64, speed: Speed, file: OwnedFd) -> Handle {
        Handle { file: Arc::new(file), node, speed, listing: None }
    }

    pub fn directory(node: u64, speed: Speed, file: OwnedFd) -> Handle {
        Handle { file: Arc::new(file), node, speed, listing: Some(Mutex::default()) }
    }

    /// Where it is being read.
    ///
    /// # Errors
    /// It is no directory.
    pub fn listing(&self) -> Answer<MutexGuard<'_, Listing>> {
        let listing = self.listing.as_ref().ok_or(Stop::Refused(Errno::NOTDIR))?;
        Ok(listing.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// All of them, by number.
pub struct Handles {
    most: usize,
    open: Mutex<(u64, HashMap<u64, Arc<Handle>>)>,
}

impl Handles {
    /// None yet, and no more than `most`.
    pub fn new(most: usize) -> Handles {
        Handles { most, open: Mutex::default() }
    }

    fn open(&self) -> MutexGuard<'_, (u64, HashMap<u64, Arc<Handle>>)> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is room for one more: asked before a file is opened, or made, in vain.
    ///
    /// # Errors
    /// There is none.
    pub fn room(&self) -> Answer<()> {
        if self.open().1.len() < self.most { Ok(()) } else { Err(Stop::Refused(Errno::NFILE)) }
    }

    /// Keeps one; its number.
    ///
    /// # Errors
    /// There are too many.
    pub fn add(&self, handle: Handle) -> Answer<u64> {
        let mut open = self.open();
        let (last, all) = &mut *open;
        if all.len() >= self.most {
            return Err(Stop::Refused(Errno::NFILE));
        }
        // Never used twice.
        *last = last.saturating_add(1);
        all.insert(*last, Arc::new(handle));
        Ok(*last)
    }

    /// The one with this number.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, number: u64) -> Answer<Arc<Handle>> {
        self.open().1.get(&number).cloned().ok_or(Stop::Refused(Errno::BADF))
    }

    /// The one with this number, if it was opened as `node`.
    ///
    /// # Errors
    /// There is none.
    pub fn get_of(&self, node: u64, number: u64) -> Answer<Arc<Handle>> {
        let handle = self.get(number)?;
        if handle.node == node { Ok(handle) } else { Err(Stop::Refused(Errno::BADF)) }
    }

    /// Takes one away.
    pub fn remove(&self, number: u64) -> Option<Arc<Handle>> {
        self.open().1.remove(&number)
    }

    /// Takes all away.
    pub fn clear(&self) -> Vec<Arc<Handle>> {
        self.open().1.drain().map(|(_, handle)| handle).collect()
    }
}
