//! What programs do to files, for the cases of shares, each thing once.
//!
//!     files each DIR [CACHE]   says NAME=yes or NAME=no: CAUSE for each, and failed=COUNT
//!     files as-user DIR        what a user without rights does, for `each`
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, SystemTime};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, XattrFlags,
};
use rustix::io::Errno;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

type Check = fn(&Path) -> io::Result<()>;

const CHECKS: [(&str, Check); 24] = [
    ("written", written),
    ("appended", appended),
    ("truncated", truncated),
    ("renamed", renamed),
    ("linked", linked),
    ("symlinked", symlinked),
    ("unlinked", unlinked),
    ("nameless", nameless),
    ("attributes", attributes),
    ("mapped", mapped),
    ("sparse", sparse),
    ("modes", modes),
    ("user", user),
    ("locked", locked),
    ("timed", timed),
    ("special", special),
    ("listed", listed),
    ("long", long),
    ("counted", counted),
    ("copied", copied),
    ("synced", synced),
    ("deep", deep),
    ("refused", refused),
    ("created", created),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["each", dir] => each(Path::new(dir), "auto"),
        ["each", dir, cache] => each(Path::new(dir), cache),
        ["as-user", dir] => return as_user(Path::new(dir)),
        _ => println!("files=each DIR [CACHE] | as-user DIR"),
    }
    ExitCode::SUCCESS
}

fn each(dir: &Path, cache: &str) {
    let mut failed = 0;
    for (name, check) in CHECKS {
        let place = dir.join(name);
        // Stock kernels before 6.6 map no file whose reads all go to the host.
        if cache == "never" && name == "mapped" {
            continue;
        }
        let result = fs::create_dir(&place).and_then(|()| check(&place));
        match result {
            Ok(()) => println!("{name}=yes"),
            Err(cause) => {
                failed += 1;
                println!("{name}=no: {cause}");
            }
        }
    }
    println!("failed={failed}");
}

fn demand(holds: bool, what: &str) -> io::Result<()> {
    if holds { Ok(()) } else { Err(io::Error::other(what.to_owned())) }
}

fn refuses<T>(result: io::Result<T>, wanted: Errno) -> io::Result<()> {
    match result {
        Ok(_) => Err(io::Error::other(format!("expected {wanted}"))),
        Err(error) if error.raw_os_error() == Some(wanted.raw_os_error()) => Ok(()),
        Err(error) => Err(io::Error::other(format!("expected {wanted}, got {error}"))),
    }
}

fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut byte = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    (0..len).map(|_| byte()).collect()
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

fn written(dir: &Path) -> io::Result<()> {
    let bytes = pattern(5_000_011, 1);
    fs::write(dir.join("a"), &bytes)?;
    demand(fs::read(dir.join("a"))? == bytes, "what was written is read")?;
    let mut file = open(&dir.join("a"))?;
    file.write_all_at(b"in the middle", 1_234_567)?;
    let mut some = [0; 13];
    file.read_exact_at(&mut some, 1_234_567)?;
    demand(&some == b"in the middle", "a piece in the middle")?;
    file.seek(SeekFrom::End(0))?;
    file.write_all(b"end")?;
    demand(file.metadata()?.len() == 5_000_014, "the length follows")
}

fn appended(dir: &Path) -> io::Result<()> {
    let append = || OpenOptions::new().append(true).create(true).open(dir.join("log"));
    let (mut one, mut two) = (append()?, append()?);
    for n in 0..50 {
        writeln!(one, "one {n}")?;
        writeln!(two, "two {n}")?;
    }
    demand(fs::read_to_string(dir.join("log"))?.lines().count() == 100, "a line for each append")
}

fn truncated(dir: &Path) -> io::Result<()> {
    let path = dir.join("a");
    fs::write(&path, pattern(10_000, 2))?;
    let file = open(&path)?;
    file.set_len(100)?;
    file.set_len(9000)?;
    let bytes = fs::read(&path)?;
    demand(bytes.len() == 9000 && bytes[100..].iter().all(|byte| *byte == 0), "cut and grown by zeros")?;
    drop(File::create(&path)?);
    demand(fs::metadata(&path)?.len() == 0, "emptied when opened")?;
    fs::write(&path, "again")?;
    demand(fs::read(&path)? == b"again", "written again")
}

fn renamed(dir: &Path) -> io::Result<()> {
    fs::write(dir.join("a"), "a")?;
    fs::write(dir.join("b"), "b")?;
    fs::create_dir(dir.join("sub"))?;
    let with = |from: &str, to: &str, flags| {
        rustix::fs::renameat_with(CWD, dir.join(from), CWD, dir.join(to), flags).map_err(io::Error::from)
    };
    refuses(with("a", "b", RenameFlags::NOREPLACE), Errno::EXIST)?;
    with("a", "b", RenameFlags::EXCHANGE)?;
    demand(fs::read(dir.join("a"))? == b"b", "exchanged")?;
    let held = File::open(dir.join("b"))?;
    fs::rename(dir.join("a"), dir.join("b"))?;
    demand(fs::read(dir.join("b"))? == b"b" && !dir.join("a").exists(), "moved over another")?;
    let mut text = String::new();
    (&held).read_to_string(&mut text)?;
    demand(text == "a", "what was there is still open")?;
    fs::rename(dir.join("b"), dir.join("sub/b"))?;
    fs::rename(dir.join("sub"), dir.join("moved"))?;
    demand(fs::read(dir.join("moved/b"))? == b"b", "a directory moves with what is in it")?;
    refuses(fs::rename(dir.join("moved"), dir.join("moved/x")), Errno::INVAL)
}

fn linked(dir: &Path) -> io::Result<()> {
    fs::write(dir.join("a"), "shared")?;
    fs::hard_link(dir.join("a"), dir.join("b"))?;
    let (a, b) = (fs::metadata(dir.join("a"))?, fs::metadata(dir.join("b"))?);
    demand((a.ino(), a.nlink()) == (b.ino(), 2), "one file, two names")?;
    fs::remove_file(dir.join("a"))?;
    demand(fs::read(dir.join("b"))? == b"shared", "the second name is enough")?;
    refuses(fs::hard_link(dir.join("b"), dir.join("b")), Errno::EXIST)
}

fn symlinked(dir: &Path) -> io::Result<()> {
    symlink("target", dir.join("link"))?;
    demand(fs::read_link(dir.join("link"))? == Path::new("target"), "what it says")?;
    fs::write(dir.join("target"), "found")?;
    demand(fs::read(dir.join("link"))? == b"found", "where it leads")?;
    fs::hard_link(dir.join("link"), dir.join("second"))?;
    demand(fs::read_link(dir.join("second"))? == Path::new("target"), "a second name of a link")
}

fn unlinked(dir: &Path) -> io::Result<()> {
    let path = dir.join("gone");
    let mut file = open(&path)?;
    fs::remove_file(&path)?;
    file.write_all(b"still here")?;
    file.rewind()?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let about = file.metadata()?;
    demand(text == "still here" && about.nlink() == 0 && about.len() == 10, "without a name")?;
    file.set_len(3)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    demand(file.metadata()?.len() == 3, "cut without a name")
}

fn nameless(dir: &Path) -> io::Result<()> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::open(dir, flags, Mode::from_raw_mode(0o640))?);
    file.write_all(b"named late")?;
    demand(fs::read_dir(dir)?.count() == 0, "no name yet")?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::linkat(CWD, path, CWD, dir.join("name"), AtFlags::SYMLINK_FOLLOW)?;
    demand(fs::read(dir.join("name"))? == b"named late", "a name given late")?;
    demand(fs::metadata(dir.join("name"))?.mode() & 0o777 == 0o640, "its mode")
}

fn attributes(dir: &Path) -> io::Result<()> {
    let path = dir.join("a");
    fs::write(&path, "")?;
    symlink("nowhere", dir.join("link"))?;
    for (path, name) in [(&path, "trusted.one"), (&path, "trusted.two"), (&dir.to_owned(), "trusted.dir")] {
        rustix::fs::lsetxattr(path, name, b"value", XattrFlags::CREATE)?;
        let again = rustix::fs::lsetxattr(path, name, b"value", XattrFlags::CREATE);
        refuses(again.map_err(io::Error::from), Errno::EXIST)?;
    }
    let mut room = [0u8; 300];
    let len = rustix::fs::getxattr(&path, "trusted.two", &mut room[..])?;
    demand(&room[..len] == b"value", "its value")?;
    let len = rustix::fs::listxattr(&path, &mut room[..])?;
    let names = String::from_utf8_lossy(&room[..len]).into_owned();
    demand(names.contains("trusted.one\0") && names.contains("trusted.two\0"), &format!("names: {names:?}"))?;
    rustix::fs::removexattr(&path, "trusted.one")?;
    let gone = rustix::fs::getxattr(&path, "trusted.one", &mut room[..]);
    refuses(gone.map_err(io::Error::from), Errno::NODATA)
}

fn mapped(dir: &Path) -> io::Result<()> {
    const LEN: usize = 1 << 20;
    let path = dir.join("a");
    let bytes = pattern(LEN, 3);
    fs::write(&path, &bytes)?;
    let map = |file| MmapRegion::<()>::from_file(FileOffset::new(file, 0), LEN).map_err(io::Error::other);
    let region = map(open(&path)?)?;
    let memory = region.as_volatile_slice();
    let mut seen = vec![0; LEN];
    memory.read_slice(&mut seen, 0).map_err(io::Error::other)?;
    demand(seen == bytes, "what is in the file is in memory")?;
    for at in (0..LEN).step_by(4096) {
        memory.write_slice(b"mapped", at + 5).map_err(io::Error::other)?;
    }
    drop(region);
    let file = open(&path)?;
    file.sync_all()?;
    let seen = fs::read(&path)?;
    demand(seen.len() == LEN && seen.chunks(4096).all(|page| &page[5..11] == b"mapped"), "and back")
}

fn sparse(dir: &Path) -> io::Result<()> {
    const MIB: u64 = 1 << 20;
    let file = open(&dir.join("a"))?;
    file.set_len(64 * MIB)?;
    file.write_all_at(&[7; 8192], 32 * MIB)?;
    file.sync_all()?;
    let seek = |to| rustix::fs::seek(&file, to).map_err(io::Error::from);
    demand(seek(rustix::fs::SeekFrom::Data(0))? == 32 * MIB, "where data are")?;
    demand(seek(rustix::fs::SeekFrom::Hole(32 * MIB))? == 32 * MIB + 8192, "where a hole is")?;
    rustix::fs::fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 32 * MIB, 4096)?;
    let mut some = [1; 4097];
    file.read_exact_at(&mut some, 32 * MIB)?;
    demand(some[..4096].iter().all(|byte| *byte == 0) && some[4096] == 7, "a hole was punched")?;
    demand(file.metadata()?.blocks() < 100, "holes take no room")?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 64 * MIB, MIB)?;
    demand(file.metadata()?.len() == 65 * MIB, "room was made")
}

fn modes(dir: &Path) -> io::Result<()> {
    let mode = |name: &str| fs::symlink_metadata(dir.join(name)).map(|about| about.mode() & 0o7777);
    rustix::process::umask(Mode::from_raw_mode(0o027));
    File::create(dir.join("file"))?;
    fs::create_dir(dir.join("dir"))?;
    rustix::process::umask(Mode::from_raw_mode(0));
    OpenOptions::new().create(true).truncate(true).write(true).mode(0o666).open(dir.join("open"))?;
    demand(
        (mode("file")?, mode("dir")?, mode("open")?) == (0o640, 0o750, 0o666),
        "by the mask of the guest",
    )?;
    fs::set_permissions(dir.join("file"), Permissions::from_mode(0o4711))?;
    demand(mode("file")? == 0o4711, "changed")?;
    std::os::unix::fs::chown(dir.join("file"), Some(1234), Some(5678))?;
    let about = fs::metadata(dir.join("file"))?;
    demand((about.uid(), about.gid(), about.mode() & 0o7777) == (1234, 5678, 0o711), "given away")
}

fn user(dir: &Path) -> io::Result<()> {
    fs::set_permissions(dir, Permissions::from_mode(0o1777))?;
    let group = dir.join("group");
    fs::create_dir(&group)?;
    std::os::unix::fs::chown(&group, Some(0), Some(77))?;
    fs::set_permissions(&group, Permissions::from_mode(0o2775))?;
    fs::write(dir.join("secret"), "root's")?;
    fs::set_permissions(dir.join("secret"), Permissions::from_mode(0o600))?;
    fs::write(dir.join("setuid"), "program")?;
    fs::set_permissions(dir.join("setuid"), Permissions::from_mode(0o6777))?;
    let me = std::env::current_exe()?;
    let output = Command::new(me).arg("as-user").arg(dir).uid(1000).gid(1000).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    demand(output.status.success(), said.trim())?;
    let about = fs::metadata(dir.join("mine"))?;
    demand((about.uid(), about.gid()) == (1000, 1000), "a user's file is the user's")?;
    let link = fs::symlink_metadata(dir.join("mylink"))?;
    demand((link.uid(), link.gid()) == (1000, 1000), "a user's link is the user's")?;
    let made = fs::metadata(dir.join("mydir"))?;
    demand((made.uid(), made.gid()) == (1000, 1000), "a user's directory is the user's")?;
    let mode = fs::metadata(dir.join("setuid"))?.mode() & 0o7777;
    demand(mode == 0o777, &format!("a program that was written to has lost its rights: {mode:o}"))
}

/// As a user without rights.
fn as_user(dir: &Path) -> ExitCode {
    let attempt = || -> io::Result<()> {
        fs::write(dir.join("mine"), "mine")?;
        symlink("x", dir.join("mylink"))?;
        fs::create_dir(dir.join("mydir"))?;
        refuses(fs::read(dir.join("secret")), Errno::ACCESS)?;
        refuses(fs::remove_file(dir.join("secret")), Errno::PERM)?;
        refuses(fs::write(dir.join("group/x"), ""), Errno::ACCESS)?;
        OpenOptions::new().write(true).open(dir.join("setuid"))?.write_all(b"changed")
    };
    match attempt() {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            println!("as a user: {cause}");
            ExitCode::FAILURE
        }
    }
}

fn locked(dir: &Path) -> io::Result<()> {
    let (one, two) = (open(&dir.join("a"))?, open(&dir.join("a"))?);
    rustix::fs::flock(&one, FlockOperation::LockExclusive)?;
    let second = rustix::fs::flock(&two, FlockOperation::NonBlockingLockExclusive);
    refuses(second.map_err(io::Error::from), Errno::WOULDBLOCK)?;
    drop(one);
    rustix::fs::flock(&two, FlockOperation::NonBlockingLockExclusive)?;
    rustix::fs::fcntl_lock(&two, FlockOperation::NonBlockingLockExclusive)?;
    Ok(())
}

fn timed(dir: &Path) -> io::Result<()> {
    let file = File::create(dir.join("a"))?;
    let then = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    file.set_modified(then)?;
    demand(fs::metadata(dir.join("a"))?.modified()? == then, "to the nanosecond")?;
    file.set_modified(SystemTime::UNIX_EPOCH - Duration::from_secs(1000))?;
    demand(fs::metadata(dir.join("a"))?.mtime() == -1000, "before the first second")
}

fn special(dir: &Path) -> io::Result<()> {
    let make = |name: &str, kind, device| {
        rustix::fs::mknodat(CWD, dir.join(name), kind, Mode::from_raw_mode(0o644), device)
            .map_err(io::Error::from)
    };
    make("pipe", FileType::Fifo, 0)?;
    make("socket", FileType::Socket, 0)?;
    make("whiteout", FileType::CharacterDevice, 0)?;
    make("plain", FileType::RegularFile, 0)?;
    refuses(make("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3)), Errno::PERM)?;
    refuses(make("disk", FileType::BlockDevice, rustix::fs::makedev(8, 0)), Errno::PERM)?;
    let path = dir.join("pipe");
    let reader = std::thread::spawn(move || fs::read(path));
    fs::write(dir.join("pipe"), "through")?;
    demand(reader.join().is_ok_and(|read| read.is_ok_and(|bytes| bytes == b"through")), "a pipe in the guest")
}

fn listed(dir: &Path) -> io::Result<()> {
    for n in 0..2000 {
        File::create(dir.join(format!("file-with-a-name-of-some-length-{n}")))?;
    }
    let names: std::collections::BTreeSet<_> =
        fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<_>>()?;
    demand(names.len() == 2000, "each once")?;
    for entry in fs::read_dir(dir)? {
        fs::remove_file(entry?.path())?;
    }
    demand(fs::read_dir(dir)?.count() == 0, "removed while they were listed")
}

fn long(dir: &Path) -> io::Result<()> {
    fs::write(dir.join("n".repeat(255)), "long")?;
    demand(fs::read(dir.join("n".repeat(255)))? == b"long", "255 bytes")?;
    refuses(fs::write(dir.join("n".repeat(256)), ""), Errno::NAMETOOLONG)
}

fn counted(dir: &Path) -> io::Result<()> {
    let about = rustix::fs::statvfs(dir)?;
    demand(about.f_blocks > 0 && about.f_namemax == 255, "how much room there is")?;
    fs::create_dir(dir.join("sub"))?;
    demand(fs::metadata(dir)?.nlink() == 3, "directories are counted")
}

fn copied(dir: &Path) -> io::Result<()> {
    let bytes = pattern(3_000_000, 4);
    fs::write(dir.join("a"), &bytes)?;
    demand(fs::copy(dir.join("a"), dir.join("b"))? == 3_000_000, "all of it")?;
    demand(fs::read(dir.join("b"))? == bytes, "copied")?;
    let (from, to) = (File::open(dir.join("a"))?, open(&dir.join("b"))?);
    let (mut at, mut to_at) = (1000, 10);
    let moved = rustix::fs::copy_file_range(&from, Some(&mut at), &to, Some(&mut to_at), 5000)?;
    let mut some = vec![0; moved];
    to.read_exact_at(&mut some, 10)?;
    demand(moved == 5000 && some == bytes[1000..6000], "a part of it")
}

fn synced(dir: &Path) -> io::Result<()> {
    let mut file = File::create(dir.join("a"))?;
    file.write_all(b"kept")?;
    file.sync_data()?;
    file.sync_all()?;
    File::open(dir)?.sync_all()?;
    rustix::fs::syncfs(&file)?;
    Ok(())
}

fn deep(dir: &Path) -> io::Result<()> {
    let mut path = dir.to_owned();
    for n in 0..60 {
        path.push(format!("level-{n}"));
        fs::create_dir(&path)?;
    }
    fs::write(path.join("bottom"), "down")?;
    demand(fs::read(path.join("bottom"))? == b"down", "60 levels down")?;
    fs::remove_dir_all(dir.join("level-0"))
}

fn refused(dir: &Path) -> io::Result<()> {
    fs::create_dir(dir.join("full"))?;
    fs::write(dir.join("full/x"), "")?;
    refuses(fs::remove_dir(dir.join("full")), Errno::NOTEMPTY)?;
    refuses(fs::remove_file(dir.join("full")), Errno::ISDIR)?;
    refuses(fs::remove_dir(dir.join("full/x")), Errno::NOTDIR)?;
    refuses(fs::create_dir(dir.join("full")), Errno::EXIST)?;
    refuses(fs::read(dir.join("none")), Errno::NOENT)?;
    refuses(fs::read(dir.join("full/x/y")), Errno::NOTDIR)
}

fn created(dir: &Path) -> io::Result<()> {
    let new = || OpenOptions::new().write(true).create_new(true).open(dir.join("a"));
    drop(new()?);
    refuses(new(), Errno::EXIST)?;
    symlink("b", dir.join("link"))?;
    fs::write(dir.join("link"), "through the link")?;
    demand(fs::read(dir.join("b"))? == b"through the link", "made where a link leads")
}
