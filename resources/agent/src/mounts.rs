//! File systems put in their places.

use std::fs;
use std::io;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

/// Mounts a file system, and creates the directory for it if need be.
pub fn mount_at(kind: &str, source: &str, place: impl AsRef<Path>, options: &str) -> io::Result<()> {
    mount_with(kind, source, place, options, MountFlags::empty())
}

/// The same, with flags.
pub fn mount_with(
    kind: &str,
    source: &str,
    place: impl AsRef<Path>,
    options: &str,
    flags: MountFlags,
) -> io::Result<()> {
    let place = place.as_ref();
    make_place(kind, place)?;
    let options = std::ffi::CString::new(options)?;
    mount(source, place, kind, flags, options.as_c_str()).map_err(|errno| told(kind, place, &errno.into()))
}

/// Mounts the file system that a disk has: the first of `kinds` that the kernel finds on it.
pub fn mount_any(kinds: &[&str], disk: &str, place: &Path, flags: MountFlags) -> io::Result<()> {
    make_place(disk, place)?;
    let tried = kinds.iter().map(|kind| (*kind, mount(disk, place, *kind, flags, c"")));
    choose(tried).map_err(|cause| told(disk, place, &cause))
}

/// What came of file systems that were tried one after the other, until one fits. One that the kernel does not know, or not
/// on this disk, says less than one that it knows and cannot use.
fn choose<'a>(tried: impl Iterator<Item = (&'a str, Result<(), Errno>)>) -> io::Result<()> {
    let mut cause = None;
    for (kind, result) in tried {
        match result {
            Ok(()) => return Ok(()),
            Err(Errno::NODEV | Errno::INVAL) => {}
            Err(errno) => cause = cause.or(Some((kind, io::Error::from(errno)))),
        }
    }
    Err(match cause {
        Some((kind, error)) => io::Error::new(error.kind(), format!("as {kind}: {error}")),
        None => io::Error::new(io::ErrorKind::InvalidData, "it has no file system that this kernel knows"),
    })
}

fn make_place(what: &str, place: &Path) -> io::Result<()> {
    if place.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(place).map_err(|error| told(what, place, &error))
}

fn told(what: &str, place: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("mount {what} at {}: {error}", place.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_mounted_as_what_it_is_or_the_real_cause_is_told() {
        let tell = |tried: &[(&'static str, Result<(), Errno>)]| {
            choose(tried.iter().copied()).map_err(|error| error.to_string())
        };
        let strange = Err(Errno::INVAL);
        assert_eq!(tell(&[("ext4", strange), ("xfs", Ok(())), ("erofs", Err(Errno::IO))]), Ok(()));
        assert_eq!(tell(&[("ext4", Err(Errno::IO)), ("xfs", Ok(()))]), Ok(()));
        let damaged = [("ext4", Err(Errno::UCLEAN)), ("xfs", strange), ("btrfs", Err(Errno::NODEV))];
        let text = tell(&damaged).unwrap_err();
        assert!(text.starts_with("as ext4: Structure needs cleaning"), "{text}");
        let none = tell(&[("ext4", strange), ("xfs", Err(Errno::NODEV))]).unwrap_err();
        assert_eq!(none, "it has no file system that this kernel knows");
    }
}
