//! Shared directories: what a guest reads and changes there, and what it does not get at.

mod bounds;
mod guest;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use base::host::fake::FakeHost;

use self::guest::*;
use super::driver::{self, RAM, Rig};

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const EIO: i32 = 5;
const EBADF: i32 = 9;
const EEXIST: i32 = 17;
const ENOTDIR: i32 = 20;
const EINVAL: i32 = 22;
const EROFS: i32 = 30;
const ENAMETOOLONG: i32 = 36;
const ENOSYS: i32 = 38;
const ELOOP: i32 = 40;
const EOPNOTSUPP: i32 = 95;
const ESTALE: i32 = 116;

/// Flags of open(2).
const O_RDWR: u32 = 2;
const O_CREAT: u32 = 0o100;
const O_EXCL: u32 = 0o200;
const O_TRUNC: u32 = 0o1000;
const O_APPEND: u32 = 0o2000;

/// Both on a disk, where requests wait, and in memory, where none does.
fn everywhere(keys: &str, test: impl Fn(Guest)) {
    for memory in [true, false] {
        test(Guest::new(memory, keys));
    }
}

#[test]
fn the_tag_is_the_name_it_is_mounted_by() {
    let host = FakeHost::default();
    for (text, wanted) in [("dir", "test0"), ("dir,tag=sources", "sources")] {
        let mut rig = Rig::of("virtiofs", text, &host);
        let mut config = [0xee; 40];
        rig.config(0, &mut config);
        let tag: Vec<u8> = config[..36].iter().copied().take_while(|byte| *byte != 0).collect();
        assert_eq!((tag.as_slice(), word(&config, 36)), (wanted.as_bytes(), 1), "{text}");
    }
    let memory = base::memory::Memory::new(&RAM).unwrap();
    let long = format!("dir,tag={}", "x".repeat(37));
    let refused = driver::build("virtiofs", &long, &host, &memory).err().unwrap().to_string();
    assert!(refused.contains("it is not 1 to 36 bytes\n  hint: "), "{refused}");
    assert!(driver::build("virtiofs", "dir,tag=", &host, &memory).is_err());
}

#[test]
fn files_are_read_as_they_are() {
    everywhere(",readonly=on", |mut guest| {
        let bytes: Vec<u8> = (0..50_000u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        fs::write(guest.dir.path().join("file"), &bytes).unwrap();
        assert_eq!(guest.content("file").unwrap(), bytes);
        let node = guest.lookup(ROOT, "file").unwrap();
        let handle = guest.open(node, 0).unwrap();
        assert_eq!(guest.read(node, handle, (40_000, 20_000)).unwrap(), bytes[40_000..], "up to its end");
        assert_eq!(guest.read(node, handle, (60_000, 100)).unwrap(), b"", "and not behind it");
        let about = guest.call(GETATTR, node, &[0; 16]).unwrap();
        let found = fs::metadata(guest.dir.path().join("file")).unwrap();
        assert_eq!((long(&about, 16), long(&about, 24)), (found.ino(), 50_000));
        assert_eq!(word(&about, 16 + 60), found.mode());
        assert_eq!(guest.lookup(ROOT, "none"), Err(ENOENT));
        assert!(guest.rig.meter("read_bytes") >= 60_000);
    });
}

#[test]
fn directories_are_listed_with_what_is_in_them() {
    everywhere("", |mut guest| {
        for n in 0..700 {
            fs::write(guest.dir.path().join(format!("file-{n}")), vec![b'x'; n]).unwrap();
        }
        let handle = long(&guest.call(OPENDIR, ROOT, &[0; 8]).unwrap(), 0);
        let (mut names, mut at) = (std::collections::BTreeMap::new(), 0);
        loop {
            let body = Body::default().longs(&[handle, at]).words(&[4096, 0]).longs(&[0, 0]);
            let list = guest.call(READDIRPLUS, ROOT, &body.0).unwrap();
            assert!(list.len() <= 4096, "no more than was asked for");
            let mut rest = list.as_slice();
            while !rest.is_empty() {
                let len = usize::try_from(word(rest, 128 + 16)).unwrap();
                let name = String::from_utf8(rest[152..152 + len].to_owned()).unwrap();
                assert!(names.insert(name, (long(rest, 0), long(rest, 48))).is_none(), "each once");
                at = long(rest, 128 + 8);
                rest = &rest[(152 + len).next_multiple_of(8)..];
            }
            if list.is_empty() {
                break;
            }
        }
        assert_eq!(names.len(), 702);
        assert_eq!((names["."].0, names[".."].0), (0, 0), "these are no nodes");
        let (node, size) = names["file-321"];
        assert_eq!((guest.lookup(ROOT, "file-321"), size), (Ok(node), 321), "a listing is a lookup");
    });
}

#[test]
fn what_a_guest_changes_is_changed() {
    everywhere("", |mut guest| {
        let body = Body::default().words(&[O_RDWR | O_CREAT | O_EXCL, 0o100_666, 0, 0]).text("new");
        let made = guest.call(CREATE, ROOT, &body.0).unwrap();
        let (node, handle) = (long(&made, 0), long(&made, 128));
        assert_eq!(guest.write(node, handle, 3, b"written", 0), Ok(7));
        assert_eq!(guest.call(CREATE, ROOT, &body.0), Err(EEXIST));
        let path = guest.dir.path().join("new");
        assert_eq!(fs::read(&path).unwrap(), b"\0\0\0written");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode(), 0o100_666, "no mask is in the way");
        // Someone else has made it longer: what is appended goes behind that.
        fs::write(&path, "0123456789abcdef").unwrap();
        assert_eq!(guest.write(node, handle, 10, b"end", O_APPEND), Ok(3));
        assert_eq!(fs::read(&path).unwrap(), b"0123456789abcdefend");
        let mode = Body::default().words(&[1 | 8, 0]).longs(&[0, 4, 0, 0, 0, 0]);
        let mode = mode.words(&[0, 0, 0, 0o600, 0, 0, 0, 0]);
        guest.call(SETATTR, node, &mode.0).unwrap();
        let about = fs::metadata(&path).unwrap();
        assert_eq!((about.len(), about.permissions().mode()), (4, 0o100_600));
        guest.call(RENAME, ROOT, &Body::default().longs(&[ROOT]).text("new").text("moved").0).unwrap();
        assert_eq!(guest.read(node, handle, (0, 9)).unwrap(), b"0123", "its handle does not mind");
        guest.call(LINK, ROOT, &Body::default().longs(&[node]).text("second").0).unwrap();
        guest.call(UNLINK, ROOT, &Body::default().text("moved").0).unwrap();
        guest.call(MKDIR, ROOT, &Body::default().words(&[0o40_755, 0]).text("dir").0).unwrap();
        guest.call(SYMLINK, ROOT, &Body::default().text("link").text("anything").0).unwrap();
        let link = guest.lookup(ROOT, "link").unwrap();
        assert_eq!(guest.call(READLINK, link, &[]).unwrap(), b"anything");
        let mut left: Vec<_> = fs::read_dir(guest.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["dir", "link", "second"]);
        guest.call(RMDIR, ROOT, &Body::default().text("dir").0).unwrap();
    });
}

#[test]
fn a_file_without_a_name_can_get_one() {
    everywhere("", |mut guest| {
        let body = Body::default().words(&[O_RDWR, 0o100_640, 0, 0]).text("/");
        let made = match guest.call(TMPFILE, ROOT, &body.0) {
            // Not every file system has them.
            Err(EOPNOTSUPP) => return,
            made => made.unwrap(),
        };
        let (node, handle) = (long(&made, 0), long(&made, 128));
        guest.write(node, handle, 0, b"late", 0).unwrap();
        assert_eq!(fs::read_dir(guest.dir.path()).unwrap().count(), 0);
        guest.call(LINK, ROOT, &Body::default().longs(&[node]).text("name").0).unwrap();
        assert_eq!(fs::read(guest.dir.path().join("name")).unwrap(), b"late");
        assert_eq!(guest.lookup(ROOT, "name"), Ok(node));
    });
}

#[test]
fn files_belong_to_who_makes_them() {
    if !rustix::process::geteuid().is_root() {
        // Then all of them belong to who runs this, as `what_a_guest_changes_is_changed` sees.
        return;
    }
    everywhere("", |mut guest| {
        let body = Body::default().words(&[O_RDWR | O_CREAT, 0o100_644, 0, 0]).text("mine");
        guest.call_as((1234, 5678), CREATE, ROOT, &body.0).unwrap();
        let about = fs::metadata(guest.dir.path().join("mine")).unwrap();
        assert_eq!((about.uid(), about.gid()), (1234, 5678), "though the directory is root's");
        guest.call(MKDIR, ROOT, &Body::default().words(&[0o755, 0]).text("dir").0).unwrap();
        assert_eq!(fs::metadata(guest.dir.path().join("dir")).unwrap().uid(), 0, "and the next is not");
        fs::write(guest.dir.path().join("by-us"), "").unwrap();
        assert_eq!(fs::metadata(guest.dir.path().join("by-us")).unwrap().uid(), 0);
    });
}

#[test]
fn a_share_that_is_only_read_refuses_every_change() {
    everywhere(",readonly=on", |mut guest| {
        fs::write(guest.dir.path().join("file"), "kept").unwrap();
        let node = guest.lookup(ROOT, "file").unwrap();
        let handle = guest.open(node, 0).unwrap();
        for flags in [1, O_RDWR, O_TRUNC, O_RDWR | O_APPEND] {
            assert_eq!(guest.open(node, flags), Err(EROFS), "open {flags:#o}");
        }
        assert_eq!(guest.write(node, handle, 0, b"x", 0), Err(EROFS));
        let name = || Body::default().text("file");
        let changes = [
            (CREATE, ROOT, Body::default().words(&[O_CREAT, 0o644, 0, 0]).text("new")),
            (CREATE, ROOT, Body::default().words(&[O_RDWR | O_CREAT, 0o644, 0, 0]).text("new")),
            (TMPFILE, ROOT, Body::default().words(&[O_RDWR, 0o644, 0, 0]).text("/")),
            (MKNOD, ROOT, Body::default().words(&[0o100_644, 0, 0, 0]).text("new")),
            (MKDIR, ROOT, Body::default().words(&[0o755, 0]).text("new")),
            (SYMLINK, ROOT, Body::default().text("new").text("x")),
            (LINK, ROOT, Body::default().longs(&[node]).text("new")),
            (UNLINK, ROOT, name()),
            (RMDIR, ROOT, name()),
            (RENAME, ROOT, Body::default().longs(&[ROOT]).text("file").text("new")),
            (SETATTR, node, Body::default().words(&[8, 0]).longs(&[0; 10])),
            (FALLOCATE, node, Body::default().longs(&[handle, 0, 10, 0])),
            (COPY_FILE_RANGE, node, Body::default().longs(&[handle, 0, node, handle, 0, 4, 0])),
            (SETXATTR, node, Body::default().words(&[1, 0]).text("user.a").text("")),
            (REMOVEXATTR, node, Body::default().text("user.a")),
        ];
        for (op, on, body) in changes {
            assert_eq!(guest.call(op, on, &body.0), Err(EROFS), "operation {op}");
        }
        // Who opens it without the right to keep its set-user-ID bit may not take that, either.
        fs::set_permissions(guest.dir.path().join("file"), fs::Permissions::from_mode(0o6755)).unwrap();
        for flags in [0, O_TRUNC] {
            let _ = guest.call(OPEN, node, &Body::default().words(&[flags, 1]).0);
        }
        let about = fs::metadata(guest.dir.path().join("file")).unwrap();
        assert_eq!(about.permissions().mode() & 0o7777, 0o6755);
        assert_eq!(fs::read(guest.dir.path().join("file")).unwrap(), b"kept");
        assert_eq!(fs::read_dir(guest.dir.path()).unwrap().count(), 1);
    });
}

#[test]
fn attributes_of_users_are_shared_and_lists_of_access_are_not() {
    everywhere("", |mut guest| {
        fs::write(guest.dir.path().join("file"), "").unwrap();
        let node = guest.lookup(ROOT, "file").unwrap();
        let mut body = Body::default().words(&[5, 0]).text("user.one");
        body.0.extend(b"value");
        let get = |size: u32, name| Body::default().words(&[size, 0]).text(name).0;
        if guest.call(SETXATTR, node, &body.0) != Err(EOPNOTSUPP) {
            assert_eq!(guest.call(GETXATTR, node, &get(0, "user.one")).map(|len| word(&len, 0)), Ok(5));
            assert_eq!(guest.call(GETXATTR, node, &get(100, "user.one")).unwrap(), b"value");
            assert_eq!(guest.call(GETXATTR, node, &get(4, "user.one")), Err(34), "too long for its room");
            assert_eq!(guest.call(LISTXATTR, node, &[100, 0, 0, 0, 0, 0, 0, 0]).unwrap(), b"user.one\0");
        }
        assert_eq!(guest.call(GETXATTR, node, &get(100, "system.posix_acl_access")), Err(EOPNOTSUPP));
    });
}

#[test]
fn what_was_forgotten_is_gone_and_what_was_not_is_not() {
    everywhere("", |mut guest| {
        fs::write(guest.dir.path().join("file"), "x").unwrap();
        let node = guest.lookup(ROOT, "file").unwrap();
        assert_eq!(guest.lookup(ROOT, "file"), Ok(node));
        guest.forget(node, 1);
        guest.call(GETATTR, node, &[0; 16]).unwrap();
        guest.forget(node, 1);
        assert_eq!(guest.call(GETATTR, node, &[0; 16]), Err(ESTALE));
        assert_ne!(guest.lookup(ROOT, "file"), Ok(node), "a number is never used twice");
        guest.forget(ROOT, u64::MAX);
        guest.call(GETATTR, ROOT, &[0; 16]).unwrap();
    });
}

#[test]
fn no_name_and_no_link_leads_out() {
    everywhere("", |mut guest| {
        symlink("/etc", guest.dir.path().join("out")).unwrap();
        fs::create_dir(guest.dir.path().join("dir")).unwrap();
        let out = guest.lookup(ROOT, "out").unwrap();
        assert_eq!(guest.call(READLINK, out, &[]).unwrap(), b"/etc", "a link is what it says");
        assert_eq!(guest.lookup(out, "passwd"), Err(ENOTDIR), "and no way");
        assert_eq!(guest.open(out, 0), Err(EINVAL));
        assert_eq!(guest.call(OPENDIR, out, &[0; 8]), Err(ENOTDIR));
        let dir = guest.lookup(ROOT, "dir").unwrap();
        for name in ["..", ".", "", "../out", "dir/..", "/etc/passwd"] {
            assert_eq!(guest.lookup(dir, name), Err(EINVAL), "{name:?}");
            let made = guest.call(MKDIR, dir, &Body::default().words(&[0o755, 0]).text(name).0);
            assert_eq!(made, Err(EINVAL), "{name:?}");
        }
        assert_eq!(guest.lookup(dir, &"n".repeat(256)), Err(ENAMETOOLONG));
        let create = Body::default().words(&[O_RDWR | O_CREAT, 0o644, 0, 0]).text("out");
        assert_eq!(guest.call(CREATE, ROOT, &create.0), Err(ELOOP), "a link is not written through");
        for (kind, wanted) in [(0o020_666, EPERM), (0o060_666, EPERM), (0o040_755, EINVAL)] {
            let body = Body::default().words(&[kind, 0x103, 0, 0]).text("node");
            assert_eq!(guest.call(MKNOD, ROOT, &body.0), Err(wanted), "{kind:o}");
        }
    });
}

/// While a program of the host swaps a directory with a link to another place, the guest sees the one or the link, and never
/// what is in the other place.
#[test]
fn races_with_links_lead_nowhere() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("file"), "outside").unwrap();
    everywhere("", |mut guest| {
        let at = guest.dir.path().to_owned();
        fs::create_dir(at.join("dir")).unwrap();
        fs::write(at.join("dir/file"), "inside").unwrap();
        symlink(outside.path(), at.join("link")).unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let (a, b) = (at.join("dir"), at.join("link"));
                    let flags = rustix::fs::RenameFlags::EXCHANGE;
                    rustix::fs::renameat_with(rustix::fs::CWD, a, rustix::fs::CWD, b, flags).unwrap();
                }
            });
            let mut inside = 0;
            for _ in 0..2000 {
                let Ok(node) = guest.lookup(ROOT, "dir") else { continue };
                if let Ok(file) = guest.lookup(node, "file")
                    && let Ok(handle) = guest.open(file, 0)
                {
                    assert_eq!(guest.read(file, handle, (0, 100)).unwrap(), b"inside");
                    guest.call(RELEASE, file, &Body::default().longs(&[handle, 0, 0]).0).unwrap();
                    inside += 1;
                }
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(inside > 0, "the directory is seen at times");
        });
    });
}
