//! A layer: what a guest has changed of its root, as an archive to be laid over the same root again: a tar file whose
//! deletions are whiteouts (OCI image specification 1.1, layer.md, "Representing Changes").
//!
//! What is read is the upper directory of an overlay (Linux, Documentation/filesystems/overlayfs.rst).

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, lgetxattr, llistxattr, major, minor, openat, readlinkat,
    statat,
};
use rustix::io::Errno;
use tar::{Builder, EntryType, Header};

/// Before the name of what is gone.
const WHITEOUT: &[u8] = b".wh.";
/// Beside what is in a directory that hides the one below it.
const OPAQUE: &str = ".wh..wh..opq";
/// Extended attributes of the overlay itself, and the one that says that a directory hides the one below it.
const OVERLAY: &str = "trusted.overlay.";
const HIDES: &str = "trusted.overlay.opaque";
/// Directories within each other at the most: each is an open descriptor.
const DEPTH: usize = 512;

/// Writes the layer whose upper directory is at `upper`, in the order of names. Sockets are no part of it, nor is a file whose
/// own name is that of a whiteout.
///
/// # Errors
/// It cannot be read, or `out` not be written.
pub fn pack(upper: &Path, out: impl Write) -> io::Result<()> {
    let top = rustix::fs::open(upper, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut layer = Layer { out: Builder::new(out), linked: BTreeMap::new() };
    layer.directory(&top, Path::new(""), 0)?;
    layer.out.into_inner()?.flush()
}

struct Layer<W: Write> {
    out: Builder<W>,
    /// Files with several names that have been written under one of them, by their numbers.
    linked: BTreeMap<u64, PathBuf>,
}

impl<W: Write> Layer<W> {
    /// Writes what is in a directory.
    fn directory(&mut self, from: &OwnedFd, at: &Path, depth: usize) -> io::Result<()> {
        if depth > DEPTH {
            return Err(Errno::LOOP.into());
        }
        let mut names = Vec::new();
        for entry in Dir::read_from(from)? {
            let name = entry?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        names.sort();
        names.into_iter().try_for_each(|name| self.entry(from, at, &OsString::from_vec(name), depth))
    }

    fn entry(&mut self, from: &OwnedFd, at: &Path, name: &OsStr, depth: usize) -> io::Result<()> {
        let about = match statat(from, name, AtFlags::SYMLINK_NOFOLLOW) {
            // What still runs in the guest has removed it meanwhile.
            Err(Errno::NOENT) => return Ok(()),
            about => about?,
        };
        let kind = FileType::from_raw_mode(about.st_mode);
        if kind == FileType::CharacterDevice && about.st_rdev == 0 {
            let gone = [WHITEOUT, name.as_bytes()].concat();
            return self.mark(&at.join(OsStr::from_bytes(&gone)));
        }
        if kind == FileType::Socket || name.as_bytes().starts_with(WHITEOUT) {
            return Ok(());
        }
        let path = at.join(name);
        if kind != FileType::Directory && about.st_nlink > 1 {
            if let Some(first) = self.linked.get(&about.st_ino) {
                let mut header = header(&about, EntryType::Link);
                return self.out.append_link(&mut header, &path, first);
            }
            self.linked.insert(about.st_ino, path.clone());
        }
        let attributes = attributes(from, name)?;
        let hides = attributes.iter().any(|(name, value)| name == HIDES && value == b"y");
        let own = attributes.iter().filter(|(name, _)| !name.starts_with(OVERLAY));
        let own: Vec<_> = own.map(|(name, value)| (format!("SCHILY.xattr.{name}"), value)).collect();
        self.out.append_pax_extensions(own.iter().map(|(name, value)| (name.as_str(), value.as_slice())))?;
        match kind {
            FileType::RegularFile => self.file(from, name, &path, &about),
            FileType::Directory => {
                let mut header = header(&about, EntryType::Directory);
                // With a slash at its end, as it is usual.
                self.out.append_data(&mut header, path.join(""), io::empty())?;
                if hides {
                    self.mark(&path.join(OPAQUE))?;
                }
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let inner = openat(from, name, flags, Mode::empty())?;
                self.directory(&inner, &path, depth + 1)
            }
            FileType::Symlink => {
                let target = readlinkat(from, name, Vec::new())?;
                let mut header = header(&about, EntryType::Symlink);
                self.out.append_link(&mut header, &path, OsStr::from_bytes(target.as_bytes()))
            }
            _ => {
                let mut header = header(&about, special(kind));
                header.set_device_major(major(about.st_rdev))?;
                header.set_device_minor(minor(about.st_rdev))?;
                self.out.append_data(&mut header, &path, io::empty())
            }
        }
    }

    /// Writes a file with the length that it has now, whatever it becomes while it is read.
    fn file(&mut self, from: &OwnedFd, name: &OsStr, path: &Path, about: &Stat) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(openat(from, name, flags, Mode::empty())?);
        let length = u64::try_from(about.st_size).unwrap_or(0);
        let mut header = header(about, EntryType::Regular);
        header.set_size(length);
        self.out.append_data(&mut header, path, file.chain(io::repeat(0)).take(length))
    }

    /// Writes an empty file whose name says it all.
    fn mark(&mut self, path: &Path) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_size(0);
        header.set_mode(0);
        self.out.append_data(&mut header, path, io::empty())
    }
}

fn header(about: &Stat, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_mode(about.st_mode & 0o7777);
    header.set_uid(about.st_uid.into());
    header.set_gid(about.st_gid.into());
    header.set_mtime(u64::try_from(about.st_mtime).unwrap_or(0));
    header
}

fn special(kind: FileType) -> EntryType {
    match kind {
        FileType::CharacterDevice => EntryType::Char,
        FileType::BlockDevice => EntryType::Block,
        _ => EntryType::Fifo,
    }
}

/// The extended attributes of what is called `name` in a directory, whose names are text.
fn attributes(from: &OwnedFd, name: &OsStr) -> io::Result<Vec<(String, Vec<u8>)>> {
    // A link is not followed, and nothing has to be opened.
    let path = Path::new("/proc/self/fd").join(from.as_raw_fd().to_string()).join(name);
    let mut list = vec![0; 64 << 10];
    let n = match llistxattr(&path, &mut list) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        n => n?,
    };
    let names = list.get(..n).unwrap_or_default().split(|byte| *byte == 0);
    let names = names.filter_map(|name| std::str::from_utf8(name).ok()).filter(|name| !name.is_empty());
    let read = |name: &str| {
        let mut value = vec![0; 64 << 10];
        let n = lgetxattr(&path, name, &mut value)?;
        value.truncate(n);
        Ok((name.to_owned(), value))
    };
    names.map(read).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{FileExt, PermissionsExt, symlink};

    use rustix::fs::{CWD, XattrFlags, mknodat, setxattr};

    use super::*;

    /// A directory of a test, gone afterwards.
    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Place {
            let path = std::env::temp_dir().join(format!("layer-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Place(path)
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// What an archive says: kind, name and link of each entry; attributes of some.
    fn read(bytes: &[u8]) -> Vec<String> {
        let mut archive = tar::Archive::new(bytes);
        let mut found = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let kind = entry.header().entry_type().as_byte() as char;
            let (name, link) = (entry.path().unwrap().into_owned(), entry.link_name().unwrap());
            let link = link.map_or(String::new(), |link| format!(" -> {}", link.display()));
            found.push(format!("{kind} {}{link} {:o}", name.display(), entry.header().mode().unwrap()));
            for extension in entry.pax_extensions().unwrap().into_iter().flatten() {
                let extension = extension.unwrap();
                found.push(format!("  {}={}", extension.key().unwrap(), extension.value().unwrap()));
            }
        }
        found
    }

    fn packed(place: &Path) -> Vec<u8> {
        let mut bytes = Vec::new();
        pack(place, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn all_kinds_of_changes_are_told() {
        let Place(place) = &Place::new("kinds");
        fs::create_dir_all(place.join("etc/hides")).unwrap();
        fs::write(place.join("etc/given"), "text\n").unwrap();
        fs::set_permissions(place.join("etc/given"), PermissionsExt::from_mode(0o4750)).unwrap();
        fs::set_permissions(place.join("etc"), PermissionsExt::from_mode(0o755)).unwrap();
        fs::set_permissions(place.join("etc/hides"), PermissionsExt::from_mode(0o700)).unwrap();
        fs::hard_link(place.join("etc/given"), place.join("again")).unwrap();
        let long = "n".repeat(200);
        symlink("../nowhere", place.join(&long)).unwrap();
        mknodat(CWD, place.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        mknodat(CWD, place.join("etc/gone"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        fs::write(place.join(".wh.odd"), "").unwrap();
        drop(std::os::unix::net::UnixListener::bind(place.join("socket")).unwrap());
        let set =
            |at: &str, name: &str, value: &[u8]| setxattr(place.join(at), name, value, XattrFlags::empty());
        set("etc/given", "user.note", b"kept").unwrap();
        let hides = set("etc/hides", HIDES, b"y").is_ok();
        let mut wanted = vec![
            "0 again 4750".to_owned(),
            "  SCHILY.xattr.user.note=kept".into(),
            "5 etc/ 755".into(),
            "1 etc/given -> again 4750".into(),
            "0 etc/.wh.gone 0".into(),
            "5 etc/hides/ 700".into(),
            "0 etc/hides/.wh..wh..opq 0".into(),
            "6 fifo 400".into(),
            format!("2 {long} -> ../nowhere 777"),
        ];
        if !hides {
            println!("skipped: only root may hide directories");
            wanted.remove(6);
        }
        assert_eq!(read(&packed(place)), wanted);
    }

    #[test]
    fn a_file_that_changes_meanwhile_keeps_its_length_and_a_large_one_is_not_held() {
        let Place(place) = &Place::new("large");
        let file = fs::File::create(place.join("large")).unwrap();
        file.set_len(100 << 20).unwrap();
        file.write_all_at(b"end", (100 << 20) - 3).unwrap();
        /// Counts, keeps the end, and cuts the file short at the first byte.
        struct Count<'a>(u64, Vec<u8>, &'a fs::File);
        impl Write for Count<'_> {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                assert!(bytes.len() <= 1 << 20, "{} bytes at once", bytes.len());
                if self.0 == 0 {
                    self.2.set_len(50 << 20).unwrap();
                }
                self.0 += bytes.len() as u64;
                self.1 = bytes.to_vec();
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut out = Count(0, Vec::new(), &file);
        pack(place, &mut out).unwrap();
        assert_eq!(out.0, 512 + (100 << 20) + 1024, "a header, the length it was said to have, and the end");
        assert!(pack(&place.join("nowhere"), io::sink()).is_err());
    }
}
