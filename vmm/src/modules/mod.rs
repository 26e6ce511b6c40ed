//! Kernel modules: found in a module tree by name, with what they depend on, in the order to load them.
//!
//! Dependencies are read from the modules themselves (the `depends` and `softdep` entries of their `.modinfo`), so
//! a tree that was only unpacked will do: no `depmod` has to have run. Signatures stay: a kernel may insist on them.

mod supply;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use base::{Doing, Fail, Result, Why};

pub use self::supply::Supply;

/// The modules of a kernel: `/lib/modules/RELEASE`, or the tree it was built in.
pub struct Tree {
    root: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// A module to load.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, as `lsmod` has it.
    pub name: String,
    /// The file, unpacked.
    pub content: Vec<u8>,
}

/// Names have underscores where files may have hyphens.
fn name_of(file: &str) -> Option<String> {
    let (name, end) = file.split_once(".ko")?;
    matches!(end, "" | ".gz" | ".xz" | ".zst").then(|| name.replace('-', "_"))
}

impl Tree {
    /// Reads what the tree at `root` holds: the list that came with it (`modules.order`), or all of it where none did.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(root: &Path) -> Result<Tree> {
        let mut tree = Tree { root: root.to_owned(), files: BTreeMap::new(), builtin: BTreeSet::new() };
        match fs::read_to_string(root.join("modules.order")) {
            Ok(list) => {
                for line in list.lines() {
                    // The list may come from a package: it leads nowhere else.
                    if !Path::new(line).components().all(|part| matches!(part, Component::Normal(_))) {
                        continue;
                    }
                    // Build trees of Linux 6.1 and later list the objects.
                    let path = root.join(line).with_extension("ko");
                    if let Some(name) = path.file_name().and_then(|name| name_of(name.to_str()?)) {
                        tree.files.insert(name, path);
                    }
                }
            }
            Err(_) => tree.walk(&root.join("kernel"))?,
        }
        let list = fs::read_to_string(root.join("modules.builtin")).unwrap_or_default();
        let names = list.lines().filter_map(|line| name_of(line.rsplit('/').next()?));
        tree.builtin.extend(names);
        Ok(tree)
    }

    fn walk(&mut self, top: &Path) -> Result<()> {
        let mut dirs = vec![top.to_owned()];
        while let Some(dir) = dirs.pop() {
            let reading = || format!("read {}", dir.display());
            for entry in fs::read_dir(&dir).doing(Why::Missing, reading)? {
                let entry = entry.doing(Why::Host, reading)?;
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    dirs.push(entry.path());
                } else if let Some(name) = entry.file_name().to_str().and_then(name_of) {
                    self.files.insert(name, entry.path());
                }
            }
        }
        Ok(())
    }

    /// Adds the module `name` and what it depends on to `order`, unless they are there or built in.
    ///
    /// # Errors
    /// There is no such module, or one cannot be read.
    pub fn add(&self, name: &str, order: &mut Vec<Module>) -> Result<()> {
        self.add_below(name, order, &mut BTreeSet::new())
    }

    fn add_below(&self, name: &str, order: &mut Vec<Module>, above: &mut BTreeSet<String>) -> Result<()> {
        let loading = || format!("load kernel module {name}");
        let known = order.iter().any(|module| module.name == name) || self.builtin.contains(name);
        if known || !above.insert(name.to_owned()) {
            return Ok(());
        }
        let path = self.files.get(name).and_then(|path| packed(path)).ok_or_else(|| {
            Fail::new(Why::Missing, loading())
                .because(format!("it is neither built in nor in {}", self.root.display()))
        })?;
        let content = unpack(&path).doing(Why::Invalid, || format!("read {}", path.display()))?;
        for needed in words(&content, "depends=").split(',').filter(|word| !word.is_empty()) {
            self.add_below(&needed.replace('-', "_"), order, above)?;
        }
        // Soft: better with it, good without it.
        let soft = words(&content, "softdep=pre:");
        for wished in soft.split_ascii_whitespace().take_while(|word| *word != "post:") {
            let wished = wished.replace('-', "_");
            // What the crypto API calls by an alias, which a module of that name always provides.
            let generic = format!("{}_generic", wished.strip_prefix("crypto_").unwrap_or(&wished));
            let _ = self.add_below(&wished, order, above).or_else(|_| self.add_below(&generic, order, above));
        }
        order.push(Module { name: name.to_owned(), content });
        Ok(())
    }
}

/// The value of an entry in a module's `.modinfo`: strings that each end with a zero byte. Never the first, which is
/// the licence.
fn words<'a>(module: &'a [u8], key: &str) -> &'a str {
    let mut entries = module.split(|byte| *byte == 0).skip(1);
    let value = entries.find_map(|entry| entry.strip_prefix(key.as_bytes())).unwrap_or_default();
    std::str::from_utf8(value).unwrap_or_default()
}

/// The file of a module as it lies there: itself, or with one of the endings of those that are packed.
fn packed(path: &Path) -> Option<PathBuf> {
    ["", ".xz", ".zst", ".gz"].into_iter().find_map(|end| {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        Some(PathBuf::from(name)).filter(|path| path.is_file())
    })
}

/// The module without the signature at its end: an emulated CPU spends most of a load on verifying it. The kernel notes
/// that it is missing, and loads the module all the same. The form is that of Linux, `scripts/sign-file.c`: signature,
/// 12 bytes of which the last four are its length, and the words.
pub fn unsigned(mut module: Vec<u8>) -> Vec<u8> {
    let body = module.strip_suffix(b"~Module signature appended~\n").and_then(<[u8]>::split_last_chunk::<12>);
    if let Some((body, [.., a, b, c, d])) = body {
        let signature = usize::try_from(u32::from_be_bytes([*a, *b, *c, *d])).unwrap_or(usize::MAX);
        let length = body.len().saturating_sub(signature);
        module.truncate(length);
    }
    module
}

/// Most bytes of a module: the largest have a few hundred MiB of debugging symbols.
const MODULE: u64 = 1 << 30;
/// Most memory for a decoder, in KiB.
const DECODER_KIB: u32 = 256 << 10;

fn unpack(path: &Path) -> std::io::Result<Vec<u8>> {
    let bytes = fs::read(path)?;
    let packed: Box<dyn Read> = match path.extension().and_then(|end| end.to_str()) {
        Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(bytes.as_slice())),
        Some("xz") => Box::new(lzma_rust2::XzReader::new_mem_limit(bytes.as_slice(), true, DECODER_KIB)),
        Some("zst") => Box::new(
            ruzstd::decoding::StreamingDecoder::new(bytes.as_slice()).map_err(std::io::Error::other)?,
        ),
        _ => return Ok(bytes),
    };
    let mut unpacked = Vec::new();
    if packed.take(MODULE).read_to_end(&mut unpacked)? as u64 == MODULE {
        return Err(std::io::Error::other(format!("it unpacks to {} GiB or more", MODULE >> 30)));
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Tree) {
        let root = tempfile::tempdir().unwrap();
        for (name, modinfo) in files {
            let path = root.path().join("kernel").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let content = format!(
                "\x7fELF depends on nothing\0license=GPL\0{}\0vermagic=6\0",
                modinfo.replace('|', "\0")
            );
            if name.ends_with(".gz") {
                let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                packed.write_all(content.as_bytes()).unwrap();
                fs::write(path, packed.finish().unwrap()).unwrap();
            } else if name.ends_with(".xz") {
                let options = lzma_rust2::XzOptions::with_preset(0);
                let mut packed = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
                packed.write_all(content.as_bytes()).unwrap();
                fs::write(path, packed.finish().unwrap()).unwrap();
            } else if name.ends_with(".zst") {
                // A frame of one raw block, which is the last: its length in the header of the frame, and in that of the block.
                let length = u8::try_from(content.len()).unwrap();
                let block = u32::from(length) << 3 | 1;
                let head = [0x28, 0xb5, 0x2f, 0xfd, 0x20, length];
                fs::write(path, [&head, &block.to_le_bytes()[..3], content.as_bytes()].concat()).unwrap();
            } else {
                fs::write(path, content).unwrap();
            }
        }
        fs::write(root.path().join("modules.builtin"), "kernel/lib/crc16.ko\n").unwrap();
        let tree = Tree::open(root.path()).unwrap();
        (root, tree)
    }

    fn order(tree: &Tree, names: &[&str]) -> Result<Vec<String>> {
        let mut order = Vec::new();
        names.iter().try_for_each(|name| tree.add(name, &mut order))?;
        Ok(order.into_iter().map(|module| module.name).collect())
    }

    #[test]
    fn a_list_is_read_instead_of_the_whole_tree() {
        let (root, _) = tree(&[("a/one.ko.gz", "depends="), ("a/two.ko", "depends=one"), ("a/three.ko", "")]);
        fs::write(root.path().join("modules.order"), "kernel/a/two.o\nkernel/a/one.ko\nkernel/a/gone.ko\n")
            .unwrap();
        let tree = Tree::open(root.path()).unwrap();
        assert_eq!(order(&tree, &["two"]).unwrap(), ["one", "two"], "as a build lists them, and packed");
        for absent in ["three", "gone"] {
            assert!(order(&tree, &[absent]).is_err(), "{absent}");
        }
    }

    #[test]
    fn packed_modules_are_unpacked_and_a_list_leads_nowhere_else() {
        let (root, files) = tree(&[
            ("a.ko.gz", "depends=b"),
            ("b.ko.xz", "depends=c"),
            ("c.ko.zst", "depends=d"),
            ("d.ko", ""),
        ]);
        let mut modules = Vec::new();
        files.add("a", &mut modules).unwrap();
        let names: Vec<_> = modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["d", "c", "b", "a"]);
        assert!(modules.iter().all(|module| module.content.starts_with(b"\x7fELF")));
        fs::write(root.path().join("kernel/c.ko.zst"), "nonsense").unwrap();
        let told = order(&files, &["a"]).unwrap_err().summary();
        assert!(told.starts_with("read ") && told.contains("c.ko.zst: "), "{told}");

        let inner = root.path().join("kernel");
        fs::write(inner.join("modules.order"), format!("{}/d.ko\n../kernel/d.ko\n", inner.display()))
            .unwrap();
        assert!(order(&Tree::open(&inner).unwrap(), &["d"]).is_err());
    }

    #[test]
    fn signatures_are_cut_off() {
        let end = b"~Module signature appended~\n";
        let signed = [&b"module"[..], b"SIGNATURE", &[0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 9], end].concat();
        assert_eq!(unsigned(signed), b"module");
        assert_eq!(unsigned(b"module".to_vec()), b"module");
        assert_eq!(unsigned(end.to_vec()), end);
    }

    #[test]
    fn what_a_module_needs_comes_before_it_and_once() {
        let (_root, tree) = tree(&[
            ("fs/ext4.ko", "depends=jbd2,crc16|softdep=pre: crypto-crc32c post: other"),
            ("fs/jbd2.ko.gz", "depends=base-one"),
            ("a/base_one.ko", "depends="),
            ("a/b/kvm-amd.ko", "depends=base-one"),
            ("loop/a1.ko", "depends=a2"),
            ("loop/a2.ko", "depends=a1"),
            ("c/crc32c_generic.ko", "depends="),
        ]);
        assert_eq!(
            order(&tree, &["ext4", "kvm_amd", "crc16"]).unwrap(),
            ["base_one", "jbd2", "crc32c_generic", "ext4", "kvm_amd"]
        );
        assert_eq!(order(&tree, &["a1"]).unwrap(), ["a2", "a1"], "a circle ends");
        let fail = order(&tree, &["absent"]).unwrap_err();
        let text = fail.to_string();
        assert!(text.starts_with("load kernel module absent: it is neither built in nor in /"), "{text}");
    }
}
