use std::fs;
use std::io::Write;

use super::*;

/// A package with these members.
pub fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut file = MAGIC.to_vec();
    for (name, content) in members {
        file.extend(
            format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 644, content.len()).into_bytes(),
        );
        file.extend(*content);
        file.resize(file.len().next_multiple_of(2), b'\n');
    }
    file
}

/// An archive with these files.
pub fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o4777);
        // Written by hand: the crate refuses what a test wants to say.
        let name = &mut header.as_old_mut().name;
        if path.len() < name.len() {
            name[..path.len()].copy_from_slice(path.as_bytes());
        } else {
            let mut long = tar::Header::new_gnu();
            long.set_entry_type(tar::EntryType::GNULongName);
            long.set_size(path.len() as u64 + 1);
            long.set_cksum();
            archive.append(&long, [path.as_bytes(), b"\0"].concat().as_slice()).unwrap();
        }
        header.set_cksum();
        archive.append(&header, *content).unwrap();
    }
    archive.into_inner().unwrap()
}

/// A package with these files.
pub fn package(files: &[(&str, &[u8])]) -> Vec<u8> {
    ar(&[("debian-binary", b"2.0\n"), ("control.tar", b""), ("data.tar", &archive(files))])
}

/// What becomes of a package in an empty directory.
fn try_unpack(package: &[u8]) -> (tempfile::TempDir, Result<Found>) {
    let dir = tempfile::tempdir().unwrap();
    let (path, into) = (dir.path().join("p.deb"), dir.path().join("into"));
    fs::write(&path, package).unwrap();
    fs::create_dir(&into).unwrap();
    let found = unpack(&path, &into);
    (dir, found)
}

fn refusal(package: &[u8]) -> String {
    let (dir, found) = try_unpack(package);
    let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "something is beside it: {names:?}");
    let fail = found.unwrap_err();
    assert!(fail.remedy().is_some(), "{fail}");
    fail.summary().split_once(".deb: ").unwrap().1.to_owned()
}

const GOOD: [(&str, &[u8]); 6] = [
    ("./boot/vmlinuz-6.1.0-1", b"kernel"),
    ("./boot/config-6.1.0-1", b"CONFIG_X=y\n"),
    ("./boot/grub.cfg", b"no"),
    ("./usr/lib/modules/6.1.0-1/kernel/a.ko", b"module"),
    ("./lib/modules/6.1.0-1/modules.order", b"kernel/a.ko\n"),
    ("./etc/passwd", b"no"),
];

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

/// The content in zstd, as it stands: one frame of raw blocks.
fn zst(bytes: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x80, 0x58];
    frame.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
    let blocks: Vec<_> = bytes.chunks(1 << 16).collect();
    for (number, block) in blocks.iter().enumerate() {
        let last = u32::from(number + 1 == blocks.len());
        let header = (u32::try_from(block.len()).unwrap() << 3) | last;
        frame.extend(&header.to_le_bytes()[..3]);
        frame.extend(*block);
    }
    frame
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut packed = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
    packed.write_all(bytes).unwrap();
    packed.finish().unwrap()
}

#[test]
fn image_configuration_and_modules_are_taken_out_of_each_kind_of_package() {
    let data = archive(&GOOD);
    for (name, data) in [
        ("data.tar", data.clone()),
        ("data.tar.gz", gz(&data)),
        ("data.tar.xz", xz(&data)),
        ("data.tar.zst/", zst(&data)),
    ] {
        let package = ar(&[("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (name, &data)]);
        let (dir, found) = try_unpack(&package);
        let found = found.unwrap_or_else(|fail| panic!("{name}: {fail}"));
        assert_eq!(found, Found { release: Some("6.1.0-1".into()), modules: true }, "{name}");
        let into = dir.path().join("into");
        let read = |path: &str| fs::read_to_string(into.join(path));
        assert_eq!(read("boot/vmlinuz-6.1.0-1").unwrap(), "kernel");
        assert_eq!(read("lib/modules/6.1.0-1/kernel/a.ko").unwrap(), "module", "with merged directories");
        assert_eq!(read("lib/modules/6.1.0-1/modules.order").unwrap(), "kernel/a.ko\n");
        assert!(read("boot/grub.cfg").is_err() && !into.join("etc").exists());
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &fs::metadata(into.join("boot/vmlinuz-6.1.0-1")).unwrap().permissions(),
        );
        assert_eq!(mode & 0o7777, 0o644, "rights are ours");
    }
}

#[test]
fn long_names_come_whole() {
    let path = format!("./lib/modules/6.1.0-1/{}/a.ko", "d".repeat(150));
    let (dir, found) = try_unpack(&package(&[("boot/vmlinuz-6.1.0-1", b"k"), (&path, b"m")]));
    assert!(found.unwrap().modules);
    assert_eq!(fs::read(dir.path().join("into").join(&path)).unwrap(), b"m");
    // As pax has them.
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_pax_extensions([("path", path.as_bytes())]).unwrap();
    let mut header = tar::Header::new_ustar();
    header.set_size(1);
    header.set_path("short").unwrap();
    header.set_cksum();
    archive.append(&header, b"p".as_slice()).unwrap();
    let data = archive.into_inner().unwrap();
    let (dir, found) = try_unpack(&ar(&[("debian-binary", b"2.0\n"), ("data.tar", &data)]));
    assert!(found.unwrap().modules);
    assert_eq!(fs::read(dir.path().join("into").join(&path)).unwrap(), b"p");
}

#[test]
fn what_is_no_package_or_a_broken_one_is_told() {
    assert_eq!(refusal(b""), "it is no Debian package");
    assert_eq!(refusal(b"text that is long enough"), "it is no Debian package");
    assert_eq!(refusal(&ar(&[("libx.o", b"")])), "it is an ar archive, but no Debian package");
    assert_eq!(refusal(&ar(&[("debian-binary", b"2.0\n")])), "it is cut short");
    let many: Vec<_> = (0..40).map(|_| ("debian-binary", b"".as_slice())).collect();
    assert_eq!(refusal(&ar(&many)), "it has no data.tar");
    assert!(
        refusal(&ar(&[("debian-binary", b""), ("data.tar.bz2", b"x")]))
            .contains("data.tar.bz2 is compressed in a way")
    );
    for name in ["data.tar.xz", "data.tar.gz", "data.tar.zst"] {
        let told = refusal(&ar(&[("debian-binary", b""), (name, b"nonsense, and long enough for a header")]));
        assert!(told.contains("broken"), "{name}: {told}");
    }
    let whole = archive(&GOOD);
    let cut = &whole[..520];
    assert!(
        refusal(&ar(&[("debian-binary", b""), ("data.tar", cut)])).contains("cut short"),
        "within a file"
    );
    let mut size = ar(&[("debian-binary", b"2.0\n")]);
    size[8 + 48..8 + 58].copy_from_slice(b"many      ");
    assert_eq!(refusal(&size), "its member debian-binary has no size");
    // A member that says it is longer than all files are ends where its file does.
    let mut long = package(&GOOD);
    let at = long.windows(8).position(|bytes| bytes == b"data.tar").unwrap();
    long[at + 48..at + 58].copy_from_slice(b"9999999999");
    assert!(try_unpack(&long).1.is_ok());
}

#[test]
fn a_hostile_package_reaches_nothing_else() {
    for path in ["../boot/vmlinuz-1", "./boot/../../x", "lib/modules/../../../x", "boot/vmlinuz-1/.."] {
        let told = refusal(&package(&[(path, b"k")]));
        assert!(told.starts_with("it has a file outside of itself: "), "{path}: {told}");
    }
    let most = format!("lib/modules/1/{}a", "d/".repeat(PARTS - 4));
    assert!(try_unpack(&package(&[(&most, b"m")])).1.is_ok());
    for path in [format!("{most}/b"), format!("lib/modules/1/{}", "./".repeat(PATH))] {
        let told = refusal(&package(&[(&path, b"m")]));
        assert!(told.starts_with("it has a file too deep in directories: lib/modules/1/"), "{told}");
    }
    for release in [".hidden", "-flag", "a b", "a\nb", "é"] {
        let told = refusal(&package(&[(&format!("boot/vmlinuz-{release}"), b"k")]));
        assert!(told.starts_with("its kernel has a name that cannot be used: "), "{release}: {told}");
    }
    let twice: [(&str, &[u8]); 2] = [("boot/config-1", b"a"), ("./boot//config-1", b"b")];
    assert_eq!(refusal(&package(&twice)), "it has ./boot//config-1 twice");
    let several: [(&str, &[u8]); 2] = [("boot/vmlinuz-1", b"a"), ("boot/vmlinuz-2", b"b")];
    assert_eq!(refusal(&package(&several)), "it holds several kernels: 1, 2");

    // A link in the way of files: it is not made, and the files are ours.
    let mut archive = tar::Builder::new(Vec::new());
    let outside = tempfile::tempdir().unwrap();
    for kind in [tar::EntryType::Symlink, tar::EntryType::Link, tar::EntryType::Char] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_path("lib/modules/6").unwrap();
        header.set_link_name(outside.path()).unwrap();
        header.set_size(0);
        header.set_cksum();
        archive.append(&header, b"".as_slice()).unwrap();
    }
    let mut header = tar::Header::new_gnu();
    header.set_path("lib/modules/6/a.ko").unwrap();
    header.set_size(1);
    header.set_cksum();
    archive.append(&header, b"m".as_slice()).unwrap();
    let data = archive.into_inner().unwrap();
    let (dir, found) = try_unpack(&ar(&[("debian-binary", b""), ("data.tar", &data)]));
    assert_eq!(found.unwrap(), Found { release: None, modules: true });
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert!(dir.path().join("into/lib/modules/6/a.ko").is_file());

    // One that stands there already is not followed either.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.deb");
    fs::write(&path, package(&[("boot/vmlinuz-1", b"k")])).unwrap();
    fs::create_dir(dir.path().join("into")).unwrap();
    std::os::unix::fs::symlink(outside.path(), dir.path().join("into/boot")).unwrap();
    assert!(unpack(&path, &dir.path().join("into")).is_err());
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
}

#[test]
fn a_stream_without_an_end_is_given_up() {
    let mut bounded = Bounded { inner: io::repeat(0), left: 1 << 20 };
    let told = io::copy(&mut bounded, &mut io::sink()).unwrap_err().to_string();
    assert_eq!(told, "it unpacks to more than 6 GiB");
    let mut exact = Bounded { inner: io::repeat(0).take(1 << 20), left: 1 << 20 };
    assert_eq!(io::copy(&mut exact, &mut io::sink()).unwrap(), 1 << 20);
}

#[test]
fn packages_with_the_modules_of_an_image_are_found_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for name in [
        "linux-modules-6.8.0-50-generic_6.8.0-50.51_amd64.deb",
        "linux-modules-6.8.0-50-generic_6.8.0-50.52_amd64.deb",
    ] {
        fs::write(path(name), "").unwrap();
    }
    for image in ["linux-image-", "linux-image-unsigned-"] {
        let image = path(&format!("{image}6.8.0-50-generic_6.8.0-50.51_amd64.deb"));
        assert_eq!(companions(&image), [path("linux-modules-6.8.0-50-generic_6.8.0-50.51_amd64.deb")]);
    }
    assert!(companions(&path("mine.deb")).is_empty());
}
