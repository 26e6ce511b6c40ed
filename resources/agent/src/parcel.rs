//! A parcel: a file, or a directory with all that is in it, as one stream of bytes. Both ends are here, and either may be the
//! host: who unpacks trusts nothing.
//!
//! Items follow each other: a kind (8 bits), a mode (32 bits, little endian), a name (its length in 32 bits before it). A
//! file goes on with pieces of its content, each with its length before it, and a length of zero; a symbolic link with its
//! target, as a name is written. A directory is followed by what is in it, and `up`. `end` says that nothing was lost. The name of
//! the first item is empty: where it goes is for the receiver to say.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RawMode};
use rustix::io::Errno;

const FILE: u8 = 1;
const DIRECTORY: u8 = 2;
const LINK: u8 = 3;
const UP: u8 = 4;
const END: u8 = 5;

/// Directories within each other at the most: each is an open descriptor at both ends.
const DEPTH: usize = 256;
/// Bytes of a piece, of a name and of a target at the most.
const PIECE: usize = 64 << 10;
const NAME: usize = 255;
const TARGET: usize = 4096;
/// What is kept of a mode: a bit that lends somebody's rights does not travel.
const RIGHTS: u32 = 0o777;

/// Packs what is at `path`; how many things were left out, which are neither files nor directories nor links.
///
/// # Errors
/// It cannot be read, or `out` not be written.
pub fn pack(path: &Path, out: &mut impl Write) -> io::Result<u64> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    let mut left_out = 0;
    pack_open(file, b"", out, 0, &mut left_out)?;
    put_item(out, END, 0, b"")?;
    out.flush()?;
    Ok(left_out)
}

fn pack_open(
    file: OwnedFd,
    name: &[u8],
    out: &mut impl Write,
    depth: usize,
    left_out: &mut u64,
) -> io::Result<()> {
    let mode = rustix::fs::fstat(&file)?.st_mode;
    match FileType::from_raw_mode(mode) {
        FileType::RegularFile => {
            put_item(out, FILE, mode, name)?;
            let mut file = File::from(file);
            let mut bytes = vec![0; PIECE];
            loop {
                let n = file.read(&mut bytes)?;
                put_bytes(out, bytes.get(..n).unwrap_or_default())?;
                if n == 0 {
                    return Ok(());
                }
            }
        }
        FileType::Directory if depth < DEPTH => {
            put_item(out, DIRECTORY, mode, name)?;
            for entry in Dir::read_from(&file)? {
                let entry = entry?;
                let name = entry.file_name().to_bytes();
                if name != b"." && name != b".." {
                    pack_entry(&file, name, out, depth, left_out)?;
                }
            }
            put_item(out, UP, 0, b"")
        }
        FileType::Directory => Err(Errno::LOOP.into()),
        _ if depth == 0 => {
            Err(io::Error::new(ErrorKind::InvalidInput, "it is neither a file nor a directory"))
        }
        _ => {
            *left_out += 1;
            Ok(())
        }
    }
}

fn pack_entry(
    parent: &OwnedFd,
    name: &[u8],
    out: &mut impl Write,
    depth: usize,
    left_out: &mut u64,
) -> io::Result<()> {
    let about = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    match FileType::from_raw_mode(about.st_mode) {
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(parent, name, Vec::new())?;
            put_item(out, LINK, 0, name)?;
            put_bytes(out, target.as_bytes())
        }
        FileType::RegularFile | FileType::Directory => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = rustix::fs::openat(parent, name, flags, Mode::empty())?;
            pack_open(file, name, out, depth + 1, left_out)
        }
        _ => {
            *left_out += 1;
            Ok(())
        }
    }
}

fn put_item(out: &mut impl Write, kind: u8, mode: RawMode, name: &[u8]) -> io::Result<()> {
    out.write_all(&[kind])?;
    out.write_all(&(mode & RIGHTS).to_le_bytes())?;
    put_bytes(out, name)
}

fn put_bytes(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes())?;
    out.write_all(bytes)
}

/// Unpacks a parcel to `place`: into it under this `name` if it is a directory, and else as it.
///
/// # Errors
/// The parcel is broken or not complete, or the files cannot be made.
pub fn unpack(input: &mut impl Read, place: &Path, name: &OsStr) -> io::Result<()> {
    let (top, first) = destination(place, name)?;
    let mut open = vec![(top, None)];
    let mut content = Content { begun: false, first: first.as_bytes().to_vec() };
    loop {
        let [kind] = take(input)?;
        let mode = u32::from_le_bytes(take(input)?) & RIGHTS;
        let name = take_bytes(input, NAME)?;
        match kind {
            FILE => {
                let (parent, name) = content.place(&open, name)?;
                unpack_file(input, parent, &name, mode)?;
            }
            LINK => {
                let (parent, name) = content.place(&open, name)?;
                let target = take_bytes(input, TARGET)?;
                link(parent, &name, &target)?;
            }
            DIRECTORY if open.len() <= DEPTH => {
                let (parent, name) = content.place(&open, name)?;
                let directory = make_directory(parent, &name)?;
                open.push((directory, Some(mode)));
            }
            UP => match open.pop() {
                // Last: a directory that may not be written to is filled first.
                Some((directory, Some(mode))) => rustix::fs::fchmod(&directory, Mode::from_raw_mode(mode))?,
                _ => return Err(broken("it goes up from its top")),
            },
            END if content.begun && open.len() == 1 => return Ok(()),
            _ => return Err(broken("an item is of an unknown kind, or out of place")),
        }
    }
}

/// Directories that are open, the innermost last, each with the mode that it gets in the end.
type Open = [(OwnedFd, Option<RawMode>)];

/// What has come of a parcel.
struct Content {
    /// The first item has come.
    begun: bool,
    /// The name of that, here.
    first: Vec<u8>,
}

impl Content {
    /// Where an item called `name` goes.
    fn place<'a>(&mut self, open: &'a Open, name: Vec<u8>) -> io::Result<(&'a OwnedFd, Vec<u8>)> {
        let top = open.len() == 1;
        if top && std::mem::replace(&mut self.begun, true) {
            return Err(broken("something comes after its first item"));
        }
        let name = if top { self.first.clone() } else { name };
        let leads_elsewhere = name.is_empty() || name == b"." || name == b".." || name.contains(&b'/');
        if leads_elsewhere || name.contains(&0) {
            return Err(broken("a name leads elsewhere"));
        }
        let parent = open.last().ok_or_else(|| broken("it goes up from its top"))?;
        Ok((&parent.0, name))
    }
}

fn destination(place: &Path, name: &OsStr) -> io::Result<(OwnedFd, std::ffi::OsString)> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(place, flags, Mode::empty()) {
        Ok(directory) => return Ok((directory, name.to_owned())),
        Err(Errno::NOENT | Errno::NOTDIR) if !place.as_os_str().as_bytes().ends_with(b"/") => {}
        Err(error) => return Err(error.into()),
    }
    let parent = place.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = place.file_name().ok_or(Errno::INVAL)?;
    Ok((rustix::fs::open(parent, flags, Mode::empty())?, name.to_owned()))
}

fn unpack_file(input: &mut impl Read, parent: &OwnedFd, name: &[u8], mode: RawMode) -> io::Result<()> {
    // What is there may be a pipe without a reader.
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = rustix::fs::openat(parent, name, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?;
    let mut file = File::from(file);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(ErrorKind::AlreadyExists, "what is there is no file"));
    }
    loop {
        let piece = take_bytes(input, PIECE)?;
        if piece.is_empty() {
            break;
        }
        file.write_all(&piece)?;
    }
    Ok(rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?)
}

fn make_directory(parent: &OwnedFd, name: &[u8]) -> io::Result<OwnedFd> {
    match rustix::fs::mkdirat(parent, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

fn link(parent: impl AsFd, name: &[u8], target: &[u8]) -> io::Result<()> {
    let parent = parent.as_fd();
    match rustix::fs::symlinkat(target, parent, name) {
        Err(Errno::EXIST) => {
            rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
            Ok(rustix::fs::symlinkat(target, parent, name)?)
        }
        made => Ok(made?),
    }
}

fn broken(why: &str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, format!("the copy is broken: {why}"))
}

fn take<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes).map_err(cut)?;
    Ok(bytes)
}

fn take_bytes(input: &mut impl Read, limit: usize) -> io::Result<Vec<u8>> {
    let length = usize::try_from(u32::from_le_bytes(take(input)?)).unwrap_or(usize::MAX);
    if length > limit {
        return Err(broken("a name or a piece is too long"));
    }
    let mut bytes = vec![0; length];
    input.read_exact(&mut bytes).map_err(cut)?;
    Ok(bytes)
}

fn cut(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::UnexpectedEof => io::Error::new(ErrorKind::UnexpectedEof, "the copy is not complete"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;

    /// A directory of a test, gone afterwards.
    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Place {
            let path = std::env::temp_dir().join(format!("parcel-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Place(path)
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn packed(path: &Path) -> Vec<u8> {
        let mut bytes = Vec::new();
        pack(path, &mut bytes).unwrap();
        bytes
    }

    fn refusal(bytes: &[u8], place: &Path) -> String {
        unpack(&mut &*bytes, place, OsStr::new("x")).unwrap_err().to_string()
    }

    #[test]
    fn a_tree_arrives_as_it_was() {
        let place = Place::new("tree");
        let (from, to) = (place.0.join("from"), place.0.join("to"));
        std::fs::create_dir_all(from.join("a/b")).unwrap();
        std::fs::create_dir(&to).unwrap();
        let large: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(from.join("a/b/large"), &large).unwrap();
        std::fs::write(from.join("run"), "#!/bin/sh\n").unwrap();
        std::fs::set_permissions(from.join("run"), PermissionsExt::from_mode(0o4755)).unwrap();
        std::fs::set_permissions(from.join("a/b"), PermissionsExt::from_mode(0o555)).unwrap();
        std::os::unix::fs::symlink("a/b/large", from.join("link")).unwrap();
        let bytes = packed(&from);
        for name in ["x", "x", "y"] {
            // The first makes it, the second writes over it.
            let as_it = if name == "y" { to.join("y") } else { to.clone() };
            unpack(&mut bytes.as_slice(), &as_it, OsStr::new("x")).unwrap();
            let got = to.join(name);
            assert!(std::fs::read(got.join("a/b/large")).unwrap() == large, "{name}");
            assert_eq!(std::fs::read_link(got.join("link")).unwrap(), Path::new("a/b/large"));
            let mode = |at: &str| std::fs::metadata(got.join(at)).unwrap().permissions().mode() & 0o7777;
            assert_eq!((mode("run"), mode("a/b")), (0o755, 0o555), "no borrowed rights");
        }
        for name in ["from", "to/x", "to/y"] {
            std::fs::set_permissions(place.0.join(name).join("a/b"), PermissionsExt::from_mode(0o755))
                .unwrap();
        }
    }

    #[test]
    fn a_file_gets_the_name_that_is_asked_for() {
        let place = Place::new("file");
        std::fs::write(place.0.join("f"), "content").unwrap();
        let bytes = packed(&place.0.join("f"));
        unpack(&mut bytes.as_slice(), &place.0.join("g"), OsStr::new("f")).unwrap();
        assert_eq!(std::fs::read(place.0.join("g")).unwrap(), b"content");
        let missing = place.0.join("no/");
        assert!(refusal(&bytes, &missing).contains("No such file"), "a directory that is not there");
    }

    #[test]
    fn a_parcel_that_lies_writes_nothing_elsewhere() {
        let place = Place::new("lies");
        let inside = place.0.join("inside");
        std::fs::create_dir(&inside).unwrap();
        let item = |kind: u8, name: &[u8]| {
            let mut bytes = Vec::new();
            put_item(&mut bytes, kind, 0o755, name).unwrap();
            bytes
        };
        for name in [b"..".as_slice(), b"../y", b"/etc/y", b"", b".", b"a\0b"] {
            let bytes = [item(DIRECTORY, b""), item(FILE, name)].concat();
            assert_eq!(refusal(&bytes, &inside), "the copy is broken: a name leads elsewhere");
        }
        // A link out, and then a file through it.
        let mut bytes = [item(DIRECTORY, b""), item(LINK, b"out")].concat();
        put_bytes(&mut bytes, b"../..").unwrap();
        bytes.extend([item(DIRECTORY, b"out"), item(FILE, b"y")].concat());
        assert!(unpack(&mut bytes.as_slice(), &inside, OsStr::new("x")).is_err());
        assert!(!place.0.join("y").exists());
        assert!(
            refusal(&[item(DIRECTORY, b""), item(UP, b""), item(UP, b"")].concat(), &inside).contains("top")
        );
        assert!(refusal(&item(DIRECTORY, b"").repeat(300), &inside).contains("leads elsewhere"));
        let deep: Vec<u8> = [item(DIRECTORY, b""), item(DIRECTORY, b"d").repeat(DEPTH)].concat();
        assert!(refusal(&deep, &inside).contains("out of place"));
        assert_eq!(refusal(b"", &inside), "the copy is not complete");
        let mut cut = packed(Path::new("/proc/self/exe"));
        cut.truncate(cut.len() - 1);
        assert_eq!(refusal(&cut, &place.0), "the copy is not complete");
    }
}
