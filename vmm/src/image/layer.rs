//! Layers: archives applied to a tree, one over the other. OCI image specification, "Image Layer Filesystem Changeset".

use std::collections::BTreeMap;
use std::io::{self, Read};

use super::tar::{Archive, Type, read_over};
use super::tree::{Content, Kind, Meta, Tree, shown, wrong};

/// A name that begins so takes away the file with the rest of it.
const WHITEOUT: &[u8] = b".wh.";
/// One that begins so is about the layer itself: this, or notes of old tools.
const ABOUT: &[u8] = b".wh..wh.";
/// The directory this is in hides what earlier layers have in it.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Where the bytes of files are put aside.
pub trait Store {
    /// Puts aside the `len` bytes of `content`.
    ///
    /// # Errors
    /// Those of reading and of writing; the content is shorter.
    fn put(&mut self, content: &mut dyn Read, len: u64) -> io::Result<Content>;
}

/// What names that begin with `.wh.` mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// An archive of files: names.
    Plain,
    /// A layer over others: what it takes away from them.
    Layer,
}

/// Applies the archive in `stream` to the tree.
///
/// # Errors
/// As the stream and the store answer; `InvalidData` for what is no archive, or one that is not to be trusted.
pub fn apply(stream: impl Read, form: Form, tree: &mut Tree, store: &mut dyn Store) -> io::Result<()> {
    tree.begin_layer();
    let mut archive = Archive::new(stream);
    while let Some(member) = archive.next(read_over)? {
        let path = member.path.as_slice();
        let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        if form == Form::Layer && name.starts_with(WHITEOUT) {
            let dir = path.strip_suffix(name).unwrap_or_default();
            if name == OPAQUE {
                tree.clear(dir)?;
            } else if !name.starts_with(ABOUT) {
                take_away(tree, dir, name)?;
            }
            continue;
        }
        let kind = match member.kind {
            Type::File => {
                tree.charge_bytes(member.len)?;
                Kind::File(store.put(&mut archive.content(&member), member.len)?)
            }
            Type::HardLink => {
                tree.link(path, &member.target)?;
                continue;
            }
            Type::Link => Kind::Link(member.target),
            Type::Directory => Kind::Directory(BTreeMap::new()),
            Type::Fifo => Kind::Fifo,
            Type::Character | Type::Block => {
                let (major, minor) = member.device;
                Kind::Device { block: member.kind == Type::Block, major, minor }
            }
        };
        let meta = Meta {
            mode: member.mode,
            uid: member.uid,
            gid: member.gid,
            mtime: member.mtime,
            attributes: member.attributes,
        };
        tree.put(path, kind, meta)?;
    }
    // What follows the end belongs to the stream, and to its digest.
    io::copy(&mut archive.into_stream(), &mut io::sink())?;
    Ok(())
}

fn take_away(tree: &mut Tree, dir: &[u8], whiteout: &[u8]) -> io::Result<()> {
    let name = whiteout.strip_prefix(WHITEOUT).unwrap_or_default();
    if matches!(name, [] | b"." | b"..") {
        return Err(wrong(format!("{} takes away nothing that has a name", shown(whiteout))));
    }
    tree.remove(&[dir, name].concat())
}
