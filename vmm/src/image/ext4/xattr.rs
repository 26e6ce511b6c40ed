//! Extended attributes: in the inode if they fit, or in a block. ext4's "Extended Attributes".

use std::collections::BTreeMap;
use std::io;

use super::{BLOCK, inode, low, put};
use crate::image::tree::{shown, wrong};

const MAGIC: u32 = 0xea02_0000;
/// Bytes of an entry before its name.
const HEAD: usize = 16;
/// Bytes before the first entry: in a block, and in an inode.
const BLOCK_HEAD: usize = 32;
const INODE_HEAD: usize = 4;
/// Zeros after the last entry.
const END: usize = 4;

/// What names begin with, and the number that stands for it.
const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];

/// Where the attributes of a file go.
pub enum Place {
    /// There are none.
    None,
    /// In the inode.
    Inode(Vec<u8>),
    /// In a block.
    Block(Vec<u8>),
}

/// An attribute: what stands for its prefix, the rest of its name, and its value.
type Attribute<'a> = (u8, &'a [u8], &'a [u8]);

/// Places attributes. Those of kinds that a disk does not keep as they are (access lists) are left out.
///
/// # Errors
/// They do not fit into a block.
pub fn place(attributes: &BTreeMap<Vec<u8>, Vec<u8>>) -> io::Result<Place> {
    let mut known: Vec<Attribute<'_>> = attributes
        .iter()
        .filter_map(|(name, value)| {
            let (prefix, index) = PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix))?;
            let rest = name.get(prefix.len()..).filter(|rest| (1..256).contains(&rest.len()))?;
            Some((*index, rest, value.as_slice()))
        })
        .collect();
    // The kernel looks for them in this order.
    known.sort_by_key(|(index, name, _)| (*index, name.len(), *name));
    let size: usize = known.iter().map(|(_, name, value)| entry_len(name) + value_len(value)).sum::<usize>();
    if known.is_empty() {
        Ok(Place::None)
    } else if INODE_HEAD + size + END <= inode::SIZE - inode::ATTRIBUTES {
        let mut bytes = vec![0; inode::SIZE - inode::ATTRIBUTES];
        put(&mut bytes, 0, &MAGIC.to_le_bytes());
        // In an inode offsets count from the first entry.
        write(&known, &mut bytes, INODE_HEAD, INODE_HEAD, false);
        Ok(Place::Inode(bytes))
    } else if BLOCK_HEAD + size + END <= BLOCK {
        let mut bytes = vec![0; BLOCK];
        let whole = write(&known, &mut bytes, BLOCK_HEAD, 0, true);
        for (at, value) in [(0, MAGIC), (4, 1), (8, 1), (12, whole)] {
            put(&mut bytes, at, &value.to_le_bytes());
        }
        Ok(Place::Block(bytes))
    } else {
        let name = attributes.keys().next().map(|name| shown(name)).unwrap_or_default();
        Err(wrong(format!(
            "the extended attributes of a file ({name} and others) do not fit into {BLOCK} bytes"
        )))
    }
}

fn entry_len(name: &[u8]) -> usize {
    (HEAD + name.len()).next_multiple_of(4)
}

fn value_len(value: &[u8]) -> usize {
    value.len().next_multiple_of(4)
}

/// Writes entries from `at` on, and values from the end backwards; the hash over all.
fn write(attributes: &[Attribute<'_>], bytes: &mut [u8], mut at: usize, origin: usize, hashed: bool) -> u32 {
    let (mut end, mut whole) = (bytes.len(), 0u32);
    let number = |value: usize| u32::try_from(value).unwrap_or(0);
    for (index, name, value) in attributes {
        end -= value_len(value);
        let hash = if hashed { hash(name, value) } else { 0 };
        whole = whole.rotate_left(16) ^ hash;
        put(bytes, at, &[u8::try_from(name.len()).unwrap_or(0), *index]);
        put(bytes, at + 2, &low(number(end - origin)));
        put(bytes, at + 8, &number(value.len()).to_le_bytes());
        put(bytes, at + 12, &hash.to_le_bytes());
        put(bytes, at + HEAD, name);
        put(bytes, end, value);
        at += entry_len(name);
    }
    whole
}

fn hash(name: &[u8], value: &[u8]) -> u32 {
    let named = name.iter().fold(0u32, |hash, byte| hash.rotate_left(5) ^ u32::from(*byte));
    value.chunks(4).fold(named, |hash, part| {
        let mut word = [0; 4];
        put(&mut word, 0, part);
        hash.rotate_left(16) ^ u32::from_le_bytes(word)
    })
}
