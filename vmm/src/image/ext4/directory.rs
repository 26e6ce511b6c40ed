//! Directories: names in blocks, as a list. ext4's "Directory Entries", "Linear (Classic) Directories".

use super::{BLOCK, Numbers, low, put};
use crate::image::tree::{Id, Kind, Tree};

/// Bytes of an entry before its name.
const HEAD: usize = 8;

/// All blocks of a directory.
pub fn bytes(tree: &Tree, numbers: &Numbers, dir: Id) -> Vec<u8> {
    let own = [(&b"."[..], dir), (&b".."[..], numbers.above(dir))];
    let mut out = Vec::new();
    // Where the last entry of the block began, and where the next one goes.
    let (mut last, mut at) = (0, BLOCK);
    for (name, id) in own.into_iter().chain(tree.children(dir)) {
        let len = (HEAD + name.len()).next_multiple_of(4);
        if at + len > BLOCK {
            end_block(&mut out, last);
            out.resize(out.len() + BLOCK, 0);
            at = 0;
        }
        let start = out.len() - BLOCK;
        last = at;
        let entry = out.get_mut(start + at..start + at + len).unwrap_or_default();
        put(entry, 0, &numbers.inode(id).to_le_bytes());
        put(entry, 4, &low(u32::try_from(len).unwrap_or(0)));
        put(entry, 6, &[u8::try_from(name.len()).unwrap_or(u8::MAX), kind(&tree.node(id).kind)]);
        put(entry, HEAD, name);
        at += len;
    }
    end_block(&mut out, last);
    out
}

/// The last entry of the last block goes to its end.
fn end_block(out: &mut [u8], last: usize) {
    if let Some(start) = out.len().checked_sub(BLOCK) {
        put(out, start + last + 4, &low(u32::try_from(BLOCK - last).unwrap_or(0)));
    }
}

fn kind(kind: &Kind) -> u8 {
    match kind {
        Kind::File(_) => 1,
        Kind::Directory(_) => 2,
        Kind::Device { block: false, .. } => 3,
        Kind::Device { block: true, .. } => 4,
        Kind::Fifo => 5,
        Kind::Link(_) => 7,
    }
}
