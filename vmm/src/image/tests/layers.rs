//! Layers over one another, and the forms of archives.

use super::*;
use crate::image::decode;

#[test]
fn what_a_layer_takes_away_is_gone() {
    let lower = Tar::default()
        .directory("etc")
        .file("etc/kept", "1")
        .file("etc/gone", "1")
        .directory("opaque")
        .file("opaque/old", "1")
        .directory("opaque/sub")
        .file("opaque/sub/old", "1")
        .directory("tree/deep")
        .file("tree/deep/file", "1")
        .bytes();
    let upper = Tar::default()
        .file("etc/.wh.gone", "")
        .file("opaque/sub/new", "2")
        .file("opaque/new", "2")
        // What it hides is of the layers before, wherever it stands.
        .file("opaque/.wh..wh..opq", "")
        .file(".wh.tree", "")
        .file("etc/.wh.never", "")
        .file("nowhere/.wh.never", "")
        .file(".wh..wh.plnk", "")
        .bytes();
    assert_eq!(
        listed(Form::Layer, &[lower.clone(), upper.clone()]).unwrap(),
        [
            "/etc/",
            "/etc/kept \"1\"",
            "/opaque/",
            "/opaque/new \"2\"",
            "/opaque/sub/",
            "/opaque/sub/new \"2\""
        ]
    );
    // In an archive of files these are names like any others.
    let plain = listed(Form::Plain, &[upper]).unwrap();
    assert!(plain.contains(&"/.wh.tree \"\"".to_owned()), "{plain:?}");
    // And what comes back in the layer that takes it away is there.
    let back = Tar::default().file("etc/gone", "3").file("etc/.wh.gone", "").bytes();
    let found = listed(Form::Layer, &[lower, back]).unwrap();
    assert!(found.contains(&"/etc/gone \"3\"".to_owned()), "{found:?}");
}

#[test]
fn a_file_takes_the_place_of_another_of_whatever_kind() {
    let lower = Tar::default()
        .directory("lib")
        .file("lib/a", "1")
        .link("bin -> usr/bin")
        .directory("dir")
        .file("dir/inside", "1")
        .file("file", "1")
        .link("soft -> lib")
        .bytes();
    let upper = Tar::default()
        .add(b'5', "lib", (0o700, 7, 8), b"")
        .file("bin/tool", "2")
        .file("dir", "2")
        .directory("file")
        .directory("soft")
        .bytes();
    assert_eq!(
        listed(Form::Layer, &[lower, upper]).unwrap(),
        [
            "/bin -> usr/bin",
            "/dir \"2\"",
            "/file/",
            "/lib/ 7:8 700",
            "/lib/a \"1\"",
            "/soft/",
            "/usr/",
            "/usr/bin/",
            "/usr/bin/tool \"2\"",
        ]
    );
}

#[test]
fn all_kinds_of_files_keep_what_they_are() {
    let long = "n".repeat(200);
    let archive = Tar::default()
        .add(b'0', "./setuid", (0o4755, 1234, 5678), b"x")
        .add(b'1', "/hard -> ./setuid", (0, 0, 0), b"")
        .add(b'3', "null", (0o666, 0, 0), b"")
        .add(b'4', "disk", (0o660, 0, 6), b"")
        .add(b'6', "fifo", (0o600, 0, 0), b"")
        .add(b'0', "old/", (0o755, 0, 0), b"")
        .pax(&[
            ("path", long.as_bytes()),
            ("uid", b"3000000"),
            ("SCHILY.xattr.user.a", b"v=1"),
            ("comment", b"no"),
        ])
        .file("short", "y")
        .add(b'L', "././@LongLink", (0, 0, 0), format!("{long}.gnu\0").as_bytes())
        .file("cut", "z")
        .file("in", "")
        .patch(345, b"pre/fix")
        // A binary number, as GNU tar writes what does not fit into digits.
        .file("binary", "")
        .patch(108, &[0x80, 0, 0, 0, 0, 0x2d, 0xc6, 0xc0]);
    let wanted = [
        "/binary \"\" 3000000:0".to_owned(),
        "/disk block 1:3 0:6 660".to_owned(),
        "/fifo fifo 600".to_owned(),
        "/hard \"x\" 1234:5678 4755".to_owned(),
        format!("/{long} \"y\" 3000000:0 user.a=v=1"),
        format!("/{long}.gnu \"z\""),
        "/null character 1:3 666".to_owned(),
        "/old/".to_owned(),
        "/pre/".to_owned(),
        "/pre/fix/".to_owned(),
        "/pre/fix/in \"\"".to_owned(),
        "/setuid = /hard 1234:5678 4755".to_owned(),
    ];
    assert_eq!(listed(Form::Plain, &[archive.bytes()]).unwrap(), wanted);
}

/// What the `tar` of this machine writes, in all of its forms, is read.
#[test]
fn archives_of_gnu_tar_are_read_in_all_of_its_forms() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top");
    let deep = top.join("d".repeat(90)).join("e".repeat(90));
    std::fs::create_dir_all(&deep).unwrap();
    std::fs::write(deep.join("f".repeat(90)), "deep").unwrap();
    let sparse = std::fs::File::create(top.join("sparse")).unwrap();
    for at in (1..40).map(|n| n * 200_000) {
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"island", at).unwrap();
    }
    std::fs::hard_link(top.join("sparse"), top.join("twin")).unwrap();
    let whole = std::fs::read(top.join("sparse")).unwrap();
    for form in [&["--format=gnu"][..], &["--format=posix"], &["--format=gnu", "-S"]] {
        let made =
            std::process::Command::new("tar").args(form).arg("-C").arg(&top).args(["-c", "."]).output();
        let Ok(made) = made else { return eprintln!("skipped: there is no tar") };
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let (mut tree, mut shelf) = (Tree::default(), Shelf::default());
        apply(&made.stdout[..], Form::Plain, &mut tree, &mut shelf).unwrap();
        assert!(shelf.0.contains(&b"deep".to_vec()) && shelf.0.contains(&whole), "{form:?}");
        assert_eq!(tree.find(b"sparse").unwrap(), tree.find(b"twin").unwrap(), "{form:?}");
        let path = format!("{}/{}/{}", "d".repeat(90), "e".repeat(90), "f".repeat(90));
        assert!(tree.find(path.as_bytes()).unwrap().is_some(), "{form:?}");
    }
}

#[test]
fn packed_archives_are_told_by_how_they_begin() {
    use std::io::Write;
    let archive = Tar::default().file("a", &"text ".repeat(100_000)).bytes();
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let zstd =
        |bytes: &[u8]| ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest);
    let (first, second) = archive.split_at(1000);
    // A frame to be skipped, and several frames: as zstd:chunked has them. Members of gzip are as many.
    let chunked = [&[0x5f, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3], &zstd(first)[..], &zstd(second)].concat();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a"), &archive).unwrap();
    let xz = std::process::Command::new("xz").arg("-c").arg(dir.path().join("a")).output();
    let xz = xz.map_or_else(|_| archive.clone(), |made| made.stdout);
    if xz == archive {
        eprintln!("skipped: there is no xz");
    }
    for (what, packed) in [
        ("xz", xz),
        ("plain", archive.clone()),
        ("gzip", gzip(&archive)),
        ("gzip in parts", [gzip(first), gzip(second)].concat()),
        ("zstd", zstd(&archive)),
        ("zstd in parts", chunked),
    ] {
        let mut unpacked = Vec::new();
        decode::open(&packed[..]).unwrap().1.read_to_end(&mut unpacked).unwrap();
        assert!(unpacked == archive, "{what}");
        if packed != archive {
            let cut = decode::open(&packed[..packed.len() - 9]).unwrap().1.read_to_end(&mut Vec::new());
            assert_eq!(cut.unwrap_err().kind(), io::ErrorKind::InvalidData, "{what}, cut");
        }
    }
    for (bytes, told) in [
        (&b""[..], "it is empty"),
        (b"BZh91AY", "it is packed with bzip2, which is not read here: use gzip, xz or zstd"),
        (b"PK\x03\x04", "it is no archive: not tar, and not packed with gzip, xz or zstd"),
    ] {
        assert_eq!(decode::open(bytes).err().unwrap().to_string(), told);
    }
}
