//! The initial RAM disk: parts laid one after another, as high in memory as the kernel allows.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use base::fail::{unreadable, why_of};
use base::host::open_to_read;
use base::memory::Memory;
use base::{Doing, Fail, Result, Why};
use vm_memory::{Bytes, GuestAddress};

use crate::kernel::read_into;
use crate::map::Map;

const PAGE: u64 = 4096;
/// Each part begins at a multiple of this: the kernel's unpacker skips zeroes to such a boundary
/// (`Documentation/driver-api/early-userspace/buffer-format.rst`).
const ALIGN: u64 = 4;

/// A part of the initrd. Later parts overwrite files of earlier ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// A cpio archive, compressed or not, in a file.
    File(PathBuf),
    /// A cpio archive in memory.
    Bytes(Vec<u8>),
}

/// Where the initrd lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// Guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

enum Content<'a> {
    File(&'a Path, File),
    Bytes(&'a [u8]),
}

fn reading(path: &Path) -> String {
    format!("read initrd {}", path.display())
}

fn open(path: &Path) -> Result<(Content<'_>, u64)> {
    let fail = |cause: &'static str| Fail::new(Why::Invalid, reading(path)).because(cause);
    let told = |error: io::Error| unreadable(reading(path), path, error);
    let file = open_to_read(path).map_err(told)?;
    let about = file.metadata().map_err(told)?;
    if about.is_dir() {
        return Err(fail("it is a directory").hint("pack it: (cd DIR && find . | cpio -o -H newc) > initrd"));
    }
    if about.file_type().is_fifo() {
        return Err(fail("it is a pipe, not a regular file").hint("write it to a file first"));
    }
    if !about.is_file() {
        return Err(fail("it is not a regular file").hint("pass a cpio archive"));
    }
    if about.len() == 0 {
        return Err(fail("it is empty").hint("leave it out for none, or pass `builtin` for mayfly's own"));
    }
    Ok((Content::File(path, file), about.len()))
}

/// Bytes of all parts together. Nothing is read.
///
/// # Errors
/// A file cannot be read, as [`place`] would fail on it.
pub fn size(parts: &[Part]) -> Result<u64> {
    let sizes = parts.iter().map(|part| match part {
        Part::File(path) => open(path).map(|(_, len)| len),
        Part::Bytes(bytes) => Ok(bytes.len() as u64),
    });
    sizes.sum()
}

/// Reads the parts into guest memory between `floor` and `ceiling` (the last address a byte may have), page-aligned
/// and as high as they fit. No parts, no initrd.
///
/// # Errors
/// A part cannot be read, or memory is too small: the failure says how much would do.
pub fn place(parts: &[Part], memory: &Memory, map: &Map, floor: u64, ceiling: u64) -> Result<Option<Initrd>> {
    let mut contents = Vec::with_capacity(parts.len());
    let mut len = 0u64;
    for part in parts {
        let (content, part_len) = match part {
            Part::File(path) => open(path)?,
            Part::Bytes(bytes) => (Content::Bytes(bytes), bytes.len() as u64),
        };
        let at = len.checked_next_multiple_of(ALIGN);
        len =
            at.and_then(|at| at.checked_add(part_len)).doing_some("lay out the initrd", "it is too large")?;
        contents.push((content, len - part_len, part_len));
    }
    if len == 0 {
        return Ok(None);
    }
    let start = position(len, map, floor, ceiling)?;
    for (content, at, len) in contents {
        match content {
            Content::File(path, file) => {
                let len = usize::try_from(len).doing(Why::Invalid, || reading(path))?;
                read_into(memory, start + at, &file, 0, len)
                    .map_err(|error| Fail::new(why_of(&error), reading(path)).because(error))?;
            }
            Content::Bytes(bytes) => memory
                .ram()
                .write_slice(bytes, GuestAddress(start + at))
                .doing(Why::Host, || "write the built-in initrd")?,
        }
    }
    Ok(Some(Initrd { start, len }))
}

fn position(len: u64, map: &Map, floor: u64, ceiling: u64) -> Result<u64> {
    let fail = || Fail::new(Why::Invalid, format!("place the initrd of {} KiB", len.div_ceil(1024)));
    let floor =
        floor.checked_next_multiple_of(PAGE).doing_some("place the initrd", "the kernel fills all memory")?;
    let end = map.low_end().min(ceiling.saturating_add(1));
    match end.checked_sub(len).map(|start| start - start % PAGE) {
        Some(start) if start >= floor => Ok(start),
        _ if floor.saturating_add(len) > ceiling => {
            Err(fail().because(format!("this kernel takes it below {:#x} only", ceiling.saturating_add(1))))
        }
        _ => Err(map.too_small(fail(), floor.saturating_add(len).saturating_add(PAGE))),
    }
}

/// Turns arithmetic that left its range into a failure.
trait DoingSome<T> {
    fn doing_some(self, what: &str, cause: &'static str) -> Result<T>;
}

impl<T> DoingSome<T> for Option<T> {
    fn doing_some(self, what: &str, cause: &'static str) -> Result<T> {
        self.ok_or_else(|| Fail::new(Why::Invalid, what).because(cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const MIB: u64 = 1 << 20;

    fn setup() -> (Memory, Map) {
        let memory = Memory::new(&[(0, 16 * MIB)]).unwrap();
        let map = Map::new(&memory);
        (memory, map)
    }

    #[test]
    fn lays_parts_high_and_aligned() {
        let (memory, map) = setup();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"ABCDE").unwrap();
        let parts = [Part::Bytes(vec![1; 4098]), Part::File(file.path().into()), Part::Bytes(vec![2; 3])];
        let initrd = place(&parts, &memory, &map, MIB, 8 * MIB - 1).unwrap().unwrap();
        assert_eq!(initrd, Initrd { start: 8 * MIB - 2 * PAGE, len: 4100 + 8 + 3 });
        let mut bytes = vec![0; 15];
        memory.ram().read_slice(&mut bytes, GuestAddress(initrd.start + 4096)).unwrap();
        assert_eq!(bytes, b"\x01\x01\0\0ABCDE\0\0\0\x02\x02\x02");
        assert_eq!(place(&[], &memory, &map, MIB, u64::MAX).unwrap(), None);
    }

    #[test]
    fn fails_by_name() {
        let (memory, map) = setup();
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("empty");
        File::create(&empty).unwrap();
        let text = |path: &Path| {
            place(&[Part::File(path.into())], &memory, &map, MIB, u64::MAX).unwrap_err().summary()
        };
        let name = dir.path().display();
        assert_eq!(text(dir.path()), format!("read initrd {name}: it is a directory"));
        assert_eq!(text(&empty), format!("read initrd {name}/empty: it is empty"));
        assert_eq!(text(&dir.path().join("no")), format!("read initrd {name}/no: No such file or directory"));
    }

    #[test]
    fn says_what_would_fit() {
        let (memory, map) = setup();
        let parts = [Part::Bytes(vec![0; 4 << 20])];
        let fail = place(&parts, &memory, &map, 13 * MIB, u64::MAX).unwrap_err();
        assert!(fail.remedy().unwrap().contains("--memory 18M"), "{fail}");
        let fail = place(&parts, &memory, &map, 5 * MIB, 8 * MIB).unwrap_err();
        assert!(fail.to_string().contains("below 0x800001"), "{fail}");
        assert!(place(&parts, &memory, &map, u64::MAX, u64::MAX).is_err());
    }
}
