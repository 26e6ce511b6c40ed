//! Archives that mean harm: refused, or harmless.

use super::*;
use crate::image::tar::Archive;

fn refused(archive: Tar) -> String {
    listed(Form::Layer, &[archive.bytes()]).expect_err("it was taken").to_string()
}

#[test]
fn names_that_lead_out_of_the_tree_are_refused_or_stay_in_it() {
    assert_eq!(refused(Tar::default().file("../escape", "")), "`../escape` leads upwards");
    assert_eq!(refused(Tar::default().file("a/../../escape", "")), "`a/../../escape` leads upwards");
    assert!(refused(Tar::default().file("nodir", "").file("nodir/x", "")).contains("no directory"));
    assert_eq!(refused(Tar::default().file(".", "")), "the top of the archive is no directory");
    let missing = refused(Tar::default().add(b'1', "passwd -> etc/passwd", (0, 0, 0), b""));
    assert_eq!(missing, "`passwd` is a link to `etc/passwd`, which is not there");
    assert!(refused(Tar::default().add(b'1', "x -> ../../etc/passwd", (0, 0, 0), b"")).contains("upwards"));
    let dir = Tar::default().directory("d").add(b'1', "x -> d", (0, 0, 0), b"");
    assert_eq!(refused(dir), "`x` is a link to `d`, a directory");
    assert!(refused(Tar::default().file("d/.wh...", "")).contains("takes away nothing"));
    // An absolute name is one of the tree, and so is where a link leads.
    let inside = Tar::default()
        .file("/etc/shadow", "1")
        .link("up -> ../../..")
        .file("up/etc/up", "2")
        .link("root -> /")
        .file("root/etc/root", "3")
        .link("dangling -> /not/there")
        .file("dangling/file", "4");
    assert_eq!(
        listed(Form::Layer, &[inside.bytes()]).unwrap(),
        [
            "/dangling -> /not/there",
            "/etc/",
            "/etc/root \"3\"",
            "/etc/shadow \"1\"",
            "/etc/up \"2\"",
            "/not/",
            "/not/there/",
            "/not/there/file \"4\"",
            "/root -> /",
            "/up -> ../../..",
        ]
    );
}

#[test]
fn links_that_lead_nowhere_end() {
    let circle = Tar::default().link("a -> b").link("b -> a").file("a/x", "");
    assert_eq!(refused(circle), "`a/x` leads through too many links");
    // Each link doubles the way.
    let mut many = Tar::default().link("l0 -> .");
    for n in 1..60 {
        many = many.link(&format!("l{n} -> l{}/l{}", n - 1, n - 1));
    }
    assert_eq!(refused(many.file("l59/x", "")), "`l59/x` leads through too many links");
}

#[test]
fn what_asks_for_too_much_is_refused() {
    let long = Tar::default().add(b'x', "pax", (0, 0, 0), b"").patch(124, b"77777777777");
    assert!(refused(long).contains("an extended header of 8589934591 bytes is too long"));
    let huge = Tar::default().add(b'0', "huge", (0, 0, 0), b"").patch(124, b"77777777777");
    assert_eq!(listed(Form::Plain, &[huge.0]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    // 16 EiB of nothing.
    let sparse = Tar::default()
        .add(b'S', "sparse", (0, 0, 0), b"")
        .patch(483, &[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    assert!(refused(sparse).contains("more than 256 GiB"));
    let name = "n".repeat(300);
    assert!(
        refused(Tar::default().pax(&[("path", name.as_bytes())]).file("x", ""))
            .contains("is no name for a file")
    );
    let deep = "d/".repeat(3000);
    assert!(refused(Tar::default().pax(&[("path", deep.as_bytes())]).file("x", "")).contains("is too deep"));
    // Deeper and deeper through a link.
    let half = "d/".repeat(1500);
    let deeper = Tar::default()
        .pax(&[("path", half.as_bytes())])
        .directory("x")
        .pax(&[("linkpath", half.as_bytes())])
        .link("l -> x")
        .pax(&[("path", format!("l/{half}x").as_bytes())])
        .file("x", "");
    assert!(refused(deeper).contains("is too deep"));
}

#[test]
fn damage_is_told_wherever_it_is() {
    let good = Tar::default()
        .pax(&[("path", b"long"), ("SCHILY.xattr.user.a", b"b")])
        .file("a", "content")
        .file("s", "0123456789")
        .link("l -> a")
        .bytes();
    for at in 0..good.len() - 1024 {
        // Cut anywhere but after a member's bytes it is told; there, nobody could know.
        if let Ok(whole) = listed(Form::Plain, &[good[..at].to_vec()]) {
            let wanted: &[&str] = match at {
                0 => &[],
                1543..=2048 => &["/long \"content\" user.a=b"],
                2570..=3072 => &["/long \"content\" user.a=b", "/s \"0123456789\""],
                3584.. => &["/l -> a", "/long \"content\" user.a=b", "/s \"0123456789\""],
                _ => panic!("cut at {at} it was taken"),
            };
            assert_eq!(whole, wanted, "cut at {at}");
        }
        // And whatever a byte is, nothing worse happens than a complaint.
        for value in [0, 0x80, 0xff, b'9'] {
            let mut bent = good.clone();
            bent[at] = value;
            let _ = listed(Form::Plain, &[bent]);
        }
    }
    let map = |pieces: &str, size: &[u8]| {
        refused(Tar::default().add(b'S', "s", (0, 0, 0), b"").patch(386, pieces.as_bytes()).patch(124, size))
    };
    let piece = |offset: u32, len: u32| format!("{offset:011o}\0{len:011o}\0");
    assert!(map(&(piece(100, 10) + &piece(50, 10)), b"00000000024\0").contains("goes backwards"));
    assert!(map(&piece(0, 10), b"00000000777\0").contains("does not add up"));
    assert!(
        refused(Tar::default().add(b'Z', "what", (0, 0, 0), b""))
            .contains("`what` is of the unknown kind `Z`")
    );
    let sparse = Tar::default().pax(&[("GNU.sparse.major", b"1")]).file("x", "");
    assert!(refused(sparse).contains("--format=gnu"));
    let mut archive = Archive::new(&b"x"[..]);
    assert_eq!(archive.next(crate::image::tar::read_over).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}
