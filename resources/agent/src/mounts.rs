//! File systems put in their places.

use std::fs;
use std::io;
use std::path::Path;

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
    if !place.is_dir() {
        fs::create_dir_all(place).map_err(|error| told(kind, place, &error, error.kind()))?;
    }
    let options = std::ffi::CString::new(options)?;
    mount(source, place, kind, flags, options.as_c_str()).map_err(|errno| {
        let error = io::Error::from(errno);
        told(kind, place, &error, error.kind())
    })
}

fn told(kind: &str, place: &Path, error: &io::Error, of: io::ErrorKind) -> io::Error {
    io::Error::new(of, format!("mount {kind} at {}: {error}", place.display()))
}
