use std::process::Command;

use super::*;
use crate::image::tree::Meta;

fn meta(mode: u16) -> Meta {
    Meta { mode, uid: 1234, gid: 70_000, mtime: (1_700_000_000, 5), ..Meta::default() }
}

/// Writes a tree with files of all kinds into `path`.
fn write(path: &std::path::Path) {
    let mut image = Image::new(File::options().read(true).write(true).create_new(true).open(path).unwrap());
    let mut tree = Tree::default();
    let mut file = |image: &mut Image, name: &str, bytes: &[u8], meta: Meta| {
        let content = image.put(&mut &bytes[..], bytes.len() as u64).unwrap();
        tree.put(name.as_bytes(), Kind::File(content), meta).unwrap();
    };
    file(&mut image, "empty", b"", meta(0));
    file(&mut image, "small", b"small\n", meta(0o4755));
    file(&mut image, "gone", b"gone\n", meta(0o644));
    let large: Vec<u8> = (0..3_000_000u32).map(|n| u8::try_from(n / 4096 % 251).unwrap() | 1).collect();
    file(&mut image, "large", &large, meta(0o644));
    // So many holes that the extents take a tree.
    let mut holes = vec![0; 400 * 2 * CHUNK + 1];
    (0..400).for_each(|n| holes[n * 2 * CHUNK] = 1);
    file(&mut image, "holes", &holes, meta(0o644));
    let mut labelled = meta(0o644);
    labelled.attributes.insert(b"user.short".to_vec(), b"in the inode".to_vec());
    labelled.attributes.insert(b"system.posix_acl_access".to_vec(), b"left out".to_vec());
    file(&mut image, "labelled", b"x", labelled.clone());
    labelled.attributes.insert(b"user.long".to_vec(), vec![b'l'; 1000]);
    labelled.attributes.insert(b"security.capability".to_vec(), vec![1; 20]);
    file(&mut image, "labelled2", b"x", labelled);
    for n in 0..1000 {
        file(&mut image, &format!("many/{n:0>100}"), b"", meta(0o600));
    }
    tree.begin_layer();
    tree.remove(b"gone").unwrap();
    tree.link(b"a/b/hard", b"small").unwrap();
    let long = "l".repeat(200).into_bytes();
    for (name, kind) in [
        ("soft", Kind::Link(b"small".to_vec())),
        ("soft2", Kind::Link(long)),
        ("null", Kind::Device { block: false, major: 1, minor: 3 }),
        ("disk", Kind::Device { block: true, major: 259, minor: 300 }),
        ("fifo", Kind::Fifo),
    ] {
        tree.put(name.as_bytes(), kind, meta(0o666)).unwrap();
    }
    image.finish(&tree, [7; 32], 64 << 20).unwrap();
}

/// What a tool of e2fsprogs says of an image; `None`, with a line for the summary, if it is not installed.
fn ask(tool: &str, arguments: &[&str]) -> Option<(Option<i32>, String)> {
    match Command::new(tool).args(arguments).output() {
        Ok(output) => Some((output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())),
        Err(cause) => {
            eprintln!("skipped: {tool}: {cause}");
            None
        }
    }
}

#[test]
fn an_image_is_without_fault_and_holds_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    write(&path);
    let name = path.to_str().unwrap();
    let Some((code, text)) = ask("e2fsck", &["-fn", name]) else { return };
    assert_eq!(code, Some(0), "{text}");
    let out = dir.path().join("large");
    ask("debugfs", &["-R", &format!("dump /large {}", out.display()), name]).unwrap();
    let large: Vec<u8> = (0..3_000_000u32).map(|n| u8::try_from(n / 4096 % 251).unwrap() | 1).collect();
    assert!(std::fs::read(&out).unwrap() == large);
    for (file, wanted) in [
        ("/small", "Mode:  04755"),
        ("/a/b/hard", "Links: 2"),
        ("/small", "User:  1234   Group: 70000"),
        ("/small", "mtime: 0x6553f100:00000014"),
        ("/null", "Device major/minor number: 01:03"),
        ("/disk", "Device major/minor number: 259:300"),
        ("/soft", "Fast link dest: \"small\""),
        ("/soft2", "Size: 200"),
        ("/holes", "Size: 52428801"),
        ("/labelled", "user.short (12) = \"in the inode\""),
        ("/labelled2", "user.long (1000)"),
        ("/labelled2", "security.capability (20)"),
    ] {
        let (_, text) = ask("debugfs", &["-R", &format!("stat {file}"), name]).unwrap();
        assert!(text.contains(wanted), "{file}: no {wanted} in {text}");
    }
    let (_, text) = ask("debugfs", &["-R", "ls -p /many", name]).unwrap();
    assert_eq!(text.lines().filter(|line| line.contains("/0000")).count(), 1000, "{text}");
}

#[test]
fn the_same_files_give_the_same_image_and_free_room_takes_none() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = ["a", "b"].map(|name| dir.path().join(name));
    write(&first);
    write(&second);
    assert!(std::fs::read(&first).unwrap() == std::fs::read(&second).unwrap());
    let found = std::fs::metadata(&first).unwrap();
    assert!(found.len() > 64 << 20, "{}", found.len());
    // 3 MB, the blocks of 400 chunks, and tables.
    assert!(found.blocks() * 512 < 34 << 20, "{} bytes on disk", found.blocks() * 512);
}

/// Trees that chance has grown, with all that layers do to them.
#[test]
fn any_tree_gives_an_image_without_fault() {
    let dir = tempfile::tempdir().unwrap();
    for seed in 1..=12u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut chance = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let path = dir.path().join(seed.to_string());
        let mut image = Image::new(File::options().write(true).create_new(true).open(&path).unwrap());
        let mut tree = Tree::default();
        for _ in 0..400 {
            let mut name = || {
                let steps = 1 + chance(3);
                (0..steps)
                    .map(|_| format!("/{}", "n".repeat(1 + usize::try_from(chance(9)).unwrap())))
                    .collect::<String>()
            };
            let (one, other) = (name().into_bytes(), name().into_bytes());
            let mut meta = meta(u16::try_from(chance(0o10000)).unwrap());
            for n in 0..chance(3) {
                let value = vec![b'v'; usize::try_from(chance(300)).unwrap()];
                meta.attributes.insert(format!("user.{n}").into_bytes(), value);
            }
            // What makes no sense is refused, and leaves the tree as it should be.
            let _ = match chance(9) {
                0 => tree.put(&one, Kind::Directory(Default::default()), meta),
                1 => tree.link(&one, &other),
                2 => tree.put(&one, Kind::Link(other), meta),
                3 => tree.put(&one, Kind::Fifo, meta),
                4 => tree.remove(&one),
                5 => tree.clear(&one),
                6 if chance(20) == 0 => {
                    tree.begin_layer();
                    Ok(())
                }
                _ => {
                    let len = chance(200_000);
                    let mut bytes = (0..len).map(|n| u8::from(n / 70_000 != 1)).collect::<Vec<_>>();
                    bytes.truncate(usize::try_from(len).unwrap());
                    let content = image.put(&mut &bytes[..], len).unwrap();
                    tree.put(&one, Kind::File(content), meta)
                }
            };
        }
        image.finish(&tree, [1; 32], 1 << 20).unwrap();
        let Some((code, text)) = ask("e2fsck", &["-fn", path.to_str().unwrap()]) else { return };
        assert_eq!(code, Some(0), "seed {seed}: {text}");
        std::fs::remove_file(path).unwrap();
    }
}
