//! Which sectors of an overlay were written: a bitmap that grows with what is in it.
//!
//! It takes at most a 4096th of the disk's size, and no more than a page for each 16 MiB in which something was
//! written. Ranges that were written as a whole take no page.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{PoisonError, RwLock};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Words of a page, and the sectors in it.
const WORDS: usize = 512;
const SECTORS: u64 = WORDS as u64 * 64;

/// The sectors of 16 MiB.
enum Page {
    All,
    Some { words: Box<[u64; WORDS]>, count: u64 },
}

impl Page {
    fn has(&self, sector: u64) -> bool {
        match self {
            Page::All => true,
            Page::Some { words, .. } => word(words.as_slice(), sector) >> (sector % 64) & 1 == 1,
        }
    }

    /// The first sector from `from` on, up to the end of the page, that is not as `inside` says.
    fn end_of_run(&self, from: u64, inside: bool) -> u64 {
        let Page::Some { words, .. } = self else { return if inside { SECTORS } else { from } };
        let mut at = from;
        while at < SECTORS {
            let word = word(words.as_slice(), at) >> (at % 64);
            let same = u64::from(if inside { word.trailing_ones() } else { word.trailing_zeros() });
            let left = 64 - at % 64;
            if same < left {
                return at + same;
            }
            at += left;
        }
        SECTORS
    }

    fn mark(&mut self, range: Range<u64>) {
        let Page::Some { words, count } = self else { return };
        let (mut at, end) = (range.start, range.end.min(SECTORS));
        while at < end {
            let bits = (end - at).min(64 - at % 64);
            let mask = (u64::MAX >> (64 - bits)) << (at % 64);
            if let Some(word) = usize::try_from(at / 64).ok().and_then(|index| words.get_mut(index)) {
                *count += u64::from((mask & !*word).count_ones());
                *word |= mask;
            }
            at += bits;
        }
        if *count == SECTORS {
            *self = Page::All;
        }
    }
}

fn word(words: &[u64], sector: u64) -> u64 {
    usize::try_from(sector / 64).ok().and_then(|index| words.get(index)).copied().unwrap_or(0)
}

/// The set of sectors written so far.
#[derive(Default)]
pub struct Written(RwLock<HashMap<u64, Page>>);

impl Written {
    /// Whether the byte at `offset` was written, and how many of the `len` bytes from there on (at least 1) are alike.
    pub fn run(&self, offset: u64, len: u64) -> (bool, u64) {
        let pages = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let end = offset.saturating_add(len);
        let (first, last) = (offset / SECTOR, end.div_ceil(SECTOR));
        let inside = pages.get(&(first / SECTORS)).is_some_and(|page| page.has(first % SECTORS));
        let mut at = first;
        while at < last {
            let within = at % SECTORS;
            let stop = match pages.get(&(at / SECTORS)) {
                Some(page) => page.end_of_run(within, inside),
                None if inside => within,
                None => SECTORS,
            };
            at = at - within + stop;
            if stop < SECTORS {
                break;
            }
        }
        (inside, at.saturating_mul(SECTOR).min(end).saturating_sub(offset))
    }

    /// Marks the sectors that `len` more bytes from `offset` on have completed.
    pub fn mark(&self, offset: u64, len: u64) {
        let (mut at, end) = (offset / SECTOR, offset.saturating_add(len) / SECTOR);
        if at >= end {
            return;
        }
        let mut pages = self.0.write().unwrap_or_else(PoisonError::into_inner);
        while at < end {
            let within = at % SECTORS;
            let stop = (within + (end - at)).min(SECTORS);
            if stop - within == SECTORS {
                pages.insert(at / SECTORS, Page::All);
            } else {
                let empty = || Page::Some { words: Box::new([0; WORDS]), count: 0 };
                pages.entry(at / SECTORS).or_insert_with(empty).mark(within..stop);
            }
            at += stop - within;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(range: Range<u64>) -> (u64, u64) {
        (range.start * SECTOR, (range.end - range.start) * SECTOR)
    }

    proptest! {
        #[test]
        fn says_what_a_plain_list_says(
            marks in prop::collection::vec((0..80_000u64, 1..40_000u64), 0..12),
            asks in prop::collection::vec((0..100_000u64, 1..70_000u64), 1..20),
        ) {
            let (written, mut plain) = (Written::default(), vec![false; 200_000]);
            for (from, count) in marks {
                let (offset, len) = bytes(from..from + count);
                written.mark(offset, len);
                plain[usize::try_from(from).unwrap()..usize::try_from(from + count).unwrap()].fill(true);
            }
            for (from, count) in asks {
                let list = &plain[usize::try_from(from).unwrap()..usize::try_from(from + count).unwrap()];
                let alike = list.iter().take_while(|bit| **bit == list[0]).count() as u64;
                let (offset, len) = bytes(from..from + count);
                prop_assert_eq!(written.run(offset, len), (list[0], alike * SECTOR));
            }
        }
    }

    #[test]
    fn a_sector_counts_once_it_is_whole() {
        let written = Written::default();
        written.mark(512, 300);
        assert_eq!(written.run(0, 4096), (false, 4096));
        written.mark(812, 212);
        assert_eq!(written.run(512, 4096), (true, 512));
        assert_eq!(written.run(700, 100), (true, 100));
        assert_eq!(written.run(0, 600), (false, 512));
    }

    #[test]
    fn whole_ranges_take_no_page() {
        let written = Written::default();
        written.mark(0, 1 << 30);
        for sector in 0..SECTORS {
            written.mark((1 << 30) + sector * SECTOR, SECTOR);
        }
        let pages = written.0.read().unwrap();
        assert_eq!(pages.len(), 65);
        assert!(pages.values().all(|page| matches!(page, Page::All)));
    }
}
