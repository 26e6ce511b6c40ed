use std::collections::BTreeMap;
use std::io::{self, Read};

use super::layer::{Form, Store, apply};
use super::tree::{Content, Id, Kind, TOP, Tree};

mod cache;
mod hostile;
mod layers;
mod sources;

/// An archive that a test writes by hand.
#[derive(Clone, Default)]
pub(super) struct Tar(Vec<u8>);

impl Tar {
    /// A member: its kind, name, mode, owner and group, and content. Links have their target after the name: `a -> b`.
    fn add(mut self, kind: u8, name: &str, (mode, uid, gid): (u32, u32, u32), content: &[u8]) -> Self {
        let (name, target) = name.split_once(" -> ").unwrap_or((name, ""));
        let mut header = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, name.as_bytes());
        put(
            100,
            format!("{mode:07o}\0{uid:07o}\0{gid:07o}\0{:011o}\0{:011o}\0", content.len(), 1_000_000)
                .as_bytes(),
        );
        put(156, &[kind]);
        put(157, target.as_bytes());
        put(257, b"ustar\x0000");
        put(329, b"0000001\x000000003\0");
        self.0.extend(header);
        self.seal();
        self.body(content)
    }

    /// Puts bytes into the last header.
    fn patch(mut self, at: usize, bytes: &[u8]) -> Self {
        let start = self.0.len() - 512;
        self.0[start + at..start + at + bytes.len()].copy_from_slice(bytes);
        self.seal();
        self
    }

    /// Makes the checksum of the last header right.
    fn seal(&mut self) {
        let start = self.0.len() - 512;
        self.0[start + 148..start + 156].fill(b' ');
        let sum: u32 = self.0[start..].iter().map(|byte| u32::from(*byte)).sum();
        self.0[start + 148..start + 155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }

    fn body(mut self, content: &[u8]) -> Self {
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.add(b'0', name, (0o644, 0, 0), content.as_bytes())
    }

    fn directory(self, name: &str) -> Self {
        self.add(b'5', name, (0o755, 0, 0), b"")
    }

    fn link(self, name: &str) -> Self {
        self.add(b'2', name, (0o777, 0, 0), b"")
    }

    /// An extended header for the next member.
    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut body = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let digits = (1..).find(|digits| (rest + digits).to_string().len() == *digits).unwrap();
            body.extend(format!("{} {key}=", rest + digits).into_bytes());
            body.extend_from_slice(value);
            body.push(b'\n');
        }
        self.add(b'x', "pax", (0o644, 0, 0), &body)
    }

    /// Its bytes, with the end.
    fn bytes(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

/// Puts bytes aside in memory.
#[derive(Default)]
struct Shelf(Vec<Vec<u8>>);

impl Store for Shelf {
    fn put(&mut self, content: &mut dyn Read, len: u64) -> io::Result<Content> {
        let mut bytes = Vec::new();
        content.take(len).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.0.push(bytes);
        let run =
            super::tree::Run { logical: 0, physical: u32::try_from(self.0.len() - 1).unwrap(), count: 1 };
        Ok(Content { len, runs: vec![run] })
    }
}

/// A line for each file of the layers, applied one over the other: what it is, and what is in it.
fn listed(form: Form, layers: &[Vec<u8>]) -> io::Result<Vec<String>> {
    let (mut tree, mut shelf) = (Tree::default(), Shelf::default());
    for layer in layers {
        apply(&layer[..], form, &mut tree, &mut shelf)?;
    }
    let mut out = Vec::new();
    list(&tree, &shelf, TOP, "", &mut BTreeMap::new(), &mut out);
    Ok(out)
}

fn list(
    tree: &Tree,
    shelf: &Shelf,
    dir: Id,
    at: &str,
    seen: &mut BTreeMap<Id, String>,
    out: &mut Vec<String>,
) {
    for (name, id) in tree.children(dir) {
        let path = format!("{at}/{}", String::from_utf8_lossy(name));
        let node = tree.node(id);
        let meta = &node.meta;
        let mut line = match &node.kind {
            _ if seen.contains_key(&id) => format!("{path} = {}", seen[&id]),
            Kind::File(content) => {
                let run = content.runs.first().map_or(0, |run| run.physical as usize);
                format!("{path} {:?}", String::from_utf8_lossy(&shelf.0[run]))
            }
            Kind::Directory(_) => format!("{path}/"),
            Kind::Link(text) => format!("{path} -> {}", String::from_utf8_lossy(text)),
            Kind::Device { block, major, minor } => {
                format!("{path} {} {major}:{minor}", if *block { "block" } else { "character" })
            }
            Kind::Fifo => format!("{path} fifo"),
        };
        if (meta.uid, meta.gid) != (0, 0) {
            line += &format!(" {}:{}", meta.uid, meta.gid);
        }
        if ![0o644, 0o755, 0o777].contains(&meta.mode) {
            line += &format!(" {:o}", meta.mode);
        }
        for (name, value) in &meta.attributes {
            line += &format!(" {}={}", String::from_utf8_lossy(name), String::from_utf8_lossy(value));
        }
        out.push(line);
        seen.entry(id).or_insert_with(|| path.clone());
        list(tree, shelf, id, &path, seen, out);
    }
}
