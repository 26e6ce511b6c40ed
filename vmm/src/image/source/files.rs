//! The files of a source: in a directory, or in an archive.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::image::decode;
use crate::image::tar::{Archive, Type};
use crate::image::tree::{BYTES_MAX, wrong};

/// Most members of an archive that are kept in mind: an image has a few for each of its layers.
const MEMBERS_MAX: usize = 100_000;
/// Most links from one member to the next.
const LINKS_MAX: usize = 8;

/// The bytes of a file, and how many there are.
pub type Opened<'a> = (Box<dyn Read + 'a>, u64);

/// Files by name.
pub trait Files {
    /// What they are called together.
    fn label(&self) -> String;

    /// A file; `None` if it is not there.
    ///
    /// # Errors
    /// As the host answers; it is no file.
    fn open(&self, place: &str) -> io::Result<Option<Opened<'_>>>;
}

/// Files of a directory.
pub struct Directory(PathBuf);

impl Directory {
    /// Those of the directory at a path.
    pub fn new(path: &Path) -> Self {
        Directory(path.to_owned())
    }
}

impl Files for Directory {
    fn label(&self) -> String {
        self.0.display().to_string()
    }

    fn open(&self, place: &str) -> io::Result<Option<Opened<'_>>> {
        match base::host::open_to_read(&self.0.join(place)) {
            Ok(file) => match file.metadata()? {
                found if found.is_file() => Ok(Some((Box::new(file), found.len()))),
                _ => Err(wrong("it is no file")),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Members of an archive that is not packed.
pub struct Members {
    label: String,
    file: File,
    members: BTreeMap<String, Member>,
}

enum Member {
    /// Where its bytes are, and how many.
    File(u64, u64),
    /// The name it stands for.
    Link(String),
}

impl Members {
    /// Those of the archive in a file; `None` if the first of them is of no image. Reads no more than headers then.
    ///
    /// # Errors
    /// As the host answers; `InvalidData` for what is no archive.
    pub fn of(mut file: File, path: &Path) -> io::Result<Option<Members>> {
        file.rewind()?;
        let len = file.metadata()?.len();
        let mut archive = Archive::new(io::BufReader::with_capacity(4096, file.try_clone()?));
        let mut members = BTreeMap::new();
        let skip = |stream: &mut io::BufReader<File>, count: u64| {
            stream.seek_relative(i64::try_from(count).map_err(io::Error::other)?)
        };
        while let Some(member) = archive.next(skip)? {
            let Some(name) = name(&member.path) else { continue };
            if !is_of_image(&name) || members.len() >= MEMBERS_MAX {
                return Ok(None);
            }
            let end = member.offset.checked_add(member.len);
            if member.kind == Type::File && end.is_none_or(|end| end > len) {
                return Err(crate::image::tar::ended());
            }
            let target = String::from_utf8_lossy(&member.target).into_owned();
            let found = match member.kind {
                Type::File => Member::File(member.offset, member.len),
                Type::HardLink => Member::Link(target),
                // Relative to where the link is.
                Type::Link => match name.rsplit_once('/') {
                    Some((dir, _)) => Member::Link(format!("{dir}/{target}")),
                    None => Member::Link(target),
                },
                _ => continue,
            };
            members.insert(name, found);
        }
        Ok(Some(Members { label: path.display().to_string(), file, members }))
    }

    /// The same of an archive that is packed: it is unpacked into a file without a name first, unless it turns out to be of
    /// something else.
    ///
    /// # Errors
    /// As [`Members::of`].
    pub fn unpacked(mut file: File, path: &Path) -> io::Result<Option<Members>> {
        file.rewind()?;
        let (_, stream) = decode::open(&file)?;
        let mut first = Archive::new(stream);
        loop {
            let Some(member) = first.next(crate::image::tar::read_over)? else { return Ok(None) };
            match name(&member.path) {
                Some(name) if is_of_image(&name) => break,
                Some(_) => return Ok(None),
                // The directory itself.
                None => {}
            }
        }
        drop(first);
        file.rewind()?;
        let (_, stream) = decode::open(file)?;
        let mut copy = scratch()?;
        copy_all(stream, &mut io::BufWriter::with_capacity(1 << 20, &mut copy), BYTES_MAX)?;
        copy.seek(SeekFrom::Start(0))?;
        Members::of(copy, path)
    }

    /// Whether there is a file of that name.
    pub fn has(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }
}

/// Copies a stream of `most` bytes at the most.
fn copy_all(stream: impl Read, to: &mut impl Write, most: u64) -> io::Result<()> {
    if io::copy(&mut stream.take(most.saturating_add(1)), to)? > most {
        return Err(wrong(format!("it unpacks to more than {} GiB", most >> 30)));
    }
    to.flush()
}

/// A file without a name, where there is room for large ones.
fn scratch() -> io::Result<File> {
    use base::host::Host;
    crate::host::LinuxHost::default().scratch("a copy of the archive").map_err(io::Error::other)
}

/// A member's name without what means nothing; `None` for the directory itself.
fn name(path: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(path);
    let mut steps = Vec::new();
    for step in text.split('/').filter(|step| !matches!(*step, "" | ".")) {
        match step {
            ".." => drop(steps.pop()),
            step => steps.push(step),
        }
    }
    (!steps.is_empty()).then(|| steps.join("/"))
}

/// Whether an image's archive has members of that name: those of a layout, and those that docker makes.
fn is_of_image(name: &str) -> bool {
    let (first, rest) = name.split_once('/').unwrap_or((name, ""));
    let is_id = |text: &str| text.len() == 64 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
    match first {
        "blobs" => true,
        "oci-layout" | "index.json" | "manifest.json" | "repositories" => rest.is_empty(),
        _ => {
            // As docker, and with packed layers crane and jib, name them; podman puts the kind of digest before.
            let ends = [".json", ".tar", ".tar.gz"];
            let bare = ends.iter().find_map(|end| first.strip_suffix(end)).unwrap_or(first);
            is_id(bare.strip_prefix("sha256:").unwrap_or(bare)) || name == "config.json"
        }
    }
}

impl Files for Members {
    fn label(&self) -> String {
        self.label.clone()
    }

    fn open(&self, place: &str) -> io::Result<Option<Opened<'_>>> {
        let mut place = place.to_owned();
        for _ in 0..LINKS_MAX {
            match self.members.get(&place) {
                None => return Ok(None),
                Some(Member::File(offset, len)) => {
                    let part = Part { file: &self.file, at: *offset, end: offset + len };
                    return Ok(Some((Box::new(part), *len)));
                }
                Some(Member::Link(target)) => place = name(target.as_bytes()).unwrap_or_default(),
            }
        }
        Err(wrong("it is a link to a link, and so on"))
    }
}

/// Some bytes of a file.
struct Part<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.end - self.at).unwrap_or(usize::MAX).min(out.len());
        let out = out.get_mut(..most).unwrap_or_default();
        match self.file.read_at(out, self.at)? {
            0 if !out.is_empty() => Err(crate::image::tar::ended()),
            len => {
                self.at += len as u64;
                Ok(len)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_that_unpacks_to_too_much_is_given_up() {
        let mut copy = Vec::new();
        copy_all(io::repeat(1).take(1000), &mut copy, 1000).unwrap();
        assert_eq!(copy.len(), 1000);
        let told = copy_all(io::repeat(1), &mut io::sink(), 1000).unwrap_err().to_string();
        assert_eq!(told, "it unpacks to more than 0 GiB");
    }
}
