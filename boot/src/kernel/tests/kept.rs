//! What is kept of a kernel that was unpacked.

use std::fs;

use super::*;

/// The first bytes of the segment in memory, after loading the kernel at `path` with the shelf `dir`.
fn load(path: &Path, dir: &Path) -> Result<u32> {
    let (memory, map) = small_memory();
    let kernel = Kernel::find(path)?.kept_in(dir.to_owned());
    let placed = kernel.load(Protocol::Auto, Loading::Map, &memory, &map)?;
    assert_eq!(
        (placed.linux, placed.header.version),
        (0x10_0010, 0x20f),
        "all but the content is the image's"
    );
    Ok(memory.ram().read_obj::<u32>(GuestAddress(SEGMENT.1)).unwrap())
}

fn on(shelf: &Path) -> Vec<PathBuf> {
    fs::read_dir(shelf).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn unpacks_once_and_takes_no_half_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let (path, shelf) = (dir.path().join("k"), dir.path().join("cache/unpacked"));
    let image = bzimage(&pack(Compression::Gzip, &plain_elf()));
    fs::write(&path, &image).unwrap();
    let content = load(&path, &shelf).unwrap();
    let kept = on(&shelf);
    let [file] = kept.as_slice() else { panic!("{kept:?}") };

    // What is kept is what is loaded: it is given another first byte, where the segment begins.
    let whole = fs::read(file).unwrap();
    assert!(whole.starts_with(&plain_elf()) && whole.ends_with(b"mayfly kernel 1?"));
    let mut other = whole.clone();
    other[usize::try_from(SEGMENT.0).unwrap()] ^= 0xff;
    fs::write(file, &other).unwrap();
    assert_eq!(load(&path, &shelf).unwrap(), content ^ 0xff);

    // One that was cut is none, nor is one that does not say it is whole.
    for broken in [&whole[..whole.len() - 1], &whole[..10], b"", &plain_elf()] {
        fs::write(file, broken).unwrap();
        assert_eq!(load(&path, &shelf).unwrap(), content);
    }

    // Another image at the same path is another kernel; one that is broken is told as ever.
    fs::write(&path, bzimage(&pack(Compression::Zstd, &plain_elf()))).unwrap();
    assert_eq!(load(&path, &shelf).unwrap(), content);
    assert_eq!(on(&shelf).len(), 2);
    fs::write(&path, bzimage(&pack(Compression::Gzip, b"no kernel"))).unwrap();
    assert!(load(&path, &shelf).unwrap_err().to_string().contains("does not unpack to an ELF file"));
    assert_eq!(on(&shelf).len(), 2, "what is broken is not kept");
}

#[test]
fn those_used_last_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = dir.path().join("unpacked");
    let image = bzimage(&pack(Compression::Gzip, &plain_elf()));
    let first = dir.path().join("0");
    fs::write(&first, &image).unwrap();
    load(&first, &shelf).unwrap();
    let oldest = on(&shelf);
    for n in 1..7 {
        let path = dir.path().join(n.to_string());
        fs::write(&path, &image).unwrap();
        load(&path, &shelf).unwrap();
        // Its use makes it the newest again.
        load(&first, &shelf).unwrap();
    }
    let kept = on(&shelf);
    assert!(kept.len() == 4 && kept.contains(&oldest[0]), "{kept:?}");
}

#[test]
fn where_nothing_can_be_kept_all_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (path, nowhere) = (dir.path().join("k"), dir.path().join("file/unpacked"));
    fs::write(dir.path().join("file"), "").unwrap();
    fs::write(&path, bzimage(&pack(Compression::Gzip, &plain_elf()))).unwrap();
    load(&path, &nowhere).unwrap();
    // An ELF file has nothing to be unpacked.
    fs::write(&path, plain_elf()).unwrap();
    let (memory, map) = small_memory();
    let shelf = dir.path().join("shelf");
    let kernel = Kernel::find(&path).unwrap().kept_in(shelf.clone());
    kernel.load(Protocol::Auto, Loading::Map, &memory, &map).unwrap();
    kernel.prepare().unwrap();
    assert!(!shelf.exists());
}
