//! Debian's packages of kernels: image, configuration and modules, taken out without the tools of a distribution.
//!
//! A package is a file from somewhere: what it says is checked, and it puts nothing but plain files below one directory. The
//! form is that of deb(5): an `ar` archive with `debian-binary`, the control archive, and `data.tar` in some compression.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use base::fail::unreadable;
use base::files::{self, Name, Reach};
use base::host::open_to_read;
use base::{Doing, Fail, Result, Why};
use rustix::fs::OFlags;
use rustix::io::Errno;

/// Most bytes that a package may unpack to: far more than the largest kernel with all of its modules, with symbols.
const UNPACKED: u64 = 6 << 30;
/// Most entries of an archive.
const ENTRIES: usize = 200_000;
/// Most members of a package: it has three, and signatures.
const MEMBERS: usize = 32;
/// Longest path in it, and most names in one: those of modules have about ten. What is deeper could be made, but a directory
/// so deep takes a descriptor for each step to be removed again.
const PATH: usize = 4096;
const PARTS: usize = 64;
/// Longest header that says a path.
const HEADER: u64 = 64 << 10;
/// Most memory for a decoder, in KiB: `xz -9` takes 65 MiB.
const DECODER_KIB: u32 = 256 << 10;

const MAGIC: &[u8] = b"!<arch>\n";

/// What a package brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The release whose image it has: `6.1.0-56-cloud-amd64`.
    pub release: Option<String>,
    /// It has modules.
    pub modules: bool,
}

/// Unpacks what a machine boots of the package at `path` into the empty or fitting directory `into`: `boot/vmlinuz-RELEASE`,
/// `boot/config-RELEASE`, `lib/modules/RELEASE`. Links, devices and all else stay out.
///
/// # Errors
/// It cannot be read, is no package, is broken or too large, or `into` cannot be written.
pub fn unpack(path: &Path, into: &Path) -> Result<Found> {
    let file = open_to_read(path)
        .map_err(|cause| unreadable(format!("open package {}", path.display()), path, cause))?;
    let top = rustix::fs::open(into, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, 0.into())
        .doing(Why::Host, || format!("open {}", into.display()))?;
    unpack_file(file, top).map_err(|refusal| match refusal {
        Refusal::Package(cause) => {
            let fail = Fail::new(Why::Invalid, format!("unpack {}", path.display())).because(cause);
            fail.hint("pass a package of Debian or Ubuntu with a kernel in it: linux-image-VERSION.deb")
        }
        Refusal::Host(cause) => {
            Fail::new(Why::Host, format!("unpack {} into {}", path.display(), into.display())).because(cause)
        }
    })
}

/// Whose fault it is.
enum Refusal {
    Package(String),
    Host(io::Error),
}

impl From<String> for Refusal {
    fn from(cause: String) -> Self {
        Refusal::Package(cause)
    }
}

impl From<Errno> for Refusal {
    fn from(cause: Errno) -> Self {
        Refusal::Host(cause.into())
    }
}

fn broken(cause: io::Error) -> Refusal {
    Refusal::Package(format!("it is broken or cut short: {cause}"))
}

fn unpack_file(file: File, top: OwnedFd) -> std::result::Result<Found, Refusal> {
    let (name, data) = data(BufReader::with_capacity(1 << 18, file)).map_err(Refusal::Package)?;
    let decoder: Box<dyn Read> = match name.strip_prefix("data.tar").unwrap_or_default() {
        "" => Box::new(data),
        ".gz" => Box::new(flate2::read::MultiGzDecoder::new(data)),
        ".xz" => Box::new(lzma_rust2::XzReader::new_mem_limit(data, true, DECODER_KIB)),
        ".zst" => Box::new(
            ruzstd::decoding::StreamingDecoder::new(data)
                .map_err(|cause| Refusal::Package(format!("its {name} is broken: {cause}")))?,
        ),
        _ => {
            return Err(Refusal::Package(format!(
                "its {name} is compressed in a way that is not known here (gzip, xz and zstd are)"
            )));
        }
    };
    let mut taker = Taker { top, last: None, found: Found::default() };
    // Buffered: an archive is read in blocks of 512 bytes.
    let bounded = Bounded { inner: decoder, left: UNPACKED };
    let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 17, bounded));
    let mut long: Option<Vec<u8>> = None;
    // Raw: names that take an entry of their own would be read here whole, however long they say they are.
    for (number, entry) in archive.entries().map_err(broken)?.raw(true).enumerate() {
        if number > ENTRIES {
            return Err(Refusal::Package(format!("it holds more than {ENTRIES} files")));
        }
        let mut entry = entry.map_err(broken)?;
        let kind = entry.header().entry_type();
        if kind.is_gnu_longname() || kind.is_pax_local_extensions() {
            let mut text = Vec::new();
            entry.by_ref().take(HEADER).read_to_end(&mut text).map_err(broken)?;
            long = match kind.is_gnu_longname() {
                // It ends with a zero byte.
                true => text.split(|byte| *byte == 0).next().map(<[u8]>::to_vec),
                false => path_of_pax(&text).or(long),
            };
        } else if !(kind.is_gnu_longlink() || kind.is_pax_global_extensions()) {
            let path = long.take().unwrap_or_else(|| entry.path_bytes().into_owned());
            let size = entry.size();
            taker.take(&path, kind.is_file().then_some(size), &mut entry)?;
        }
    }
    Ok(taker.found)
}

/// The path in the records of a pax header: `LENGTH path=...\n`.
fn path_of_pax(text: &[u8]) -> Option<Vec<u8>> {
    let records = tar::PaxExtensions::new(text).flatten();
    records.filter(|record| record.key_bytes() == b"path").last().map(|record| record.value_bytes().to_vec())
}

/// The member with the files: its name, and the file cut to it.
fn data(mut file: BufReader<File>) -> std::result::Result<(String, io::Take<BufReader<File>>), String> {
    let cut = |cause: io::Error| match cause.kind() {
        io::ErrorKind::UnexpectedEof => "it is cut short".to_owned(),
        _ => cause.to_string(),
    };
    let mut magic = [0; 8];
    if file.read_exact(&mut magic).is_err() || magic != MAGIC {
        return Err("it is no Debian package".to_owned());
    }
    for number in 0..MEMBERS {
        let mut header = [0; 60];
        file.read_exact(&mut header).map_err(cut)?;
        let text = std::str::from_utf8(&header).ok().filter(|text| text.ends_with("`\n"));
        let field = |from: usize, to: usize| text.and_then(|text| text.get(from..to)).map(str::trim_end);
        let name = field(0, 16).ok_or("it is a damaged ar archive")?.trim_end_matches('/').to_owned();
        let size: u64 = field(48, 58)
            .and_then(|size| size.parse().ok())
            .ok_or_else(|| format!("its member {name} has no size"))?;
        if number == 0 && name != "debian-binary" {
            return Err("it is an ar archive, but no Debian package".to_owned());
        }
        if name.starts_with("data.tar") {
            return Ok((name, file.take(size)));
        }
        // Members begin at even places. Ten digits are no step that overflows.
        let step = i64::try_from(size.next_multiple_of(2)).map_err(|cause| cause.to_string())?;
        file.seek_relative(step).map_err(cut)?;
    }
    Err("it has no data.tar".to_owned())
}

/// A stream that is given up when it goes on for too long: a small package can unpack to very much.
struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(read as u64)
            .ok_or_else(|| io::Error::other(format!("it unpacks to more than {} GiB", UNPACKED >> 30)))?;
        Ok(read)
    }
}

/// Puts files where they belong.
struct Taker {
    top: OwnedFd,
    /// The directory of the last file: the next one is mostly there as well.
    last: Option<(Vec<Vec<u8>>, OwnedFd)>,
    found: Found,
}

impl Taker {
    fn take(
        &mut self,
        path: &[u8],
        size: Option<u64>,
        content: &mut impl Read,
    ) -> std::result::Result<(), Refusal> {
        let told = || crate::quote::line(path.get(..80).unwrap_or(path));
        let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
        let mut parts: Vec<&[u8]> = parts.collect();
        if parts.contains(&b"..".as_slice()) {
            return Err(Refusal::Package(format!("it has a file outside of itself: {}", told())));
        }
        if path.len() > PATH || parts.len() > PARTS {
            return Err(Refusal::Package(format!("it has a file too deep in directories: {}", told())));
        }
        // With merged directories /lib is a link, and packages say where files are in truth.
        if parts.starts_with(&[b"usr", b"lib"]) {
            parts.remove(0);
        }
        // Without a size it is no file.
        let (Some((name, dirs)), Some(size)) = (parts.split_last(), size) else { return Ok(()) };
        match (dirs, *name) {
            ([b"boot"], name) => {
                let kept: [&[u8]; 3] = [b"vmlinuz-", b"config-", b"System.map-"];
                if !kept.iter().any(|start| name.starts_with(start)) {
                    return Ok(());
                }
                if let Some(release) = name.strip_prefix(b"vmlinuz-") {
                    let release = release_of(release)
                        .ok_or_else(|| format!("its kernel has a name that cannot be used: {}", told()))?;
                    if let Some(other) = self.found.release.replace(release.clone()) {
                        return Err(Refusal::Package(format!(
                            "it holds several kernels: {other}, {release}"
                        )));
                    }
                }
            }
            ([b"lib", b"modules", _, ..], _) => self.found.modules = true,
            _ => return Ok(()),
        }
        let dirs: Vec<Vec<u8>> = dirs.iter().map(|part| part.to_vec()).collect();
        let name = Name::new(name).map_err(|cause| format!("its file {}: {cause}", told()))?;
        if self.last.as_ref().is_none_or(|(last, _)| *last != dirs) {
            let place = descend(&self.top, &dirs)?;
            self.last = Some((dirs, place));
        }
        let Some((_, place)) = &self.last else { return Ok(()) };
        let made = match files::create(place, name, OFlags::WRONLY, 0o644) {
            Err(Errno::EXIST) => return Err(Refusal::Package(format!("it has {} twice", told()))),
            made => made?,
        };
        match copy(content, &mut File::from(made))? {
            copied if copied == size => Ok(()),
            _ => Err(Refusal::Package(format!("it ends within {}", told()))),
        }
    }
}

/// Copies a file, and knows whose fault it is if that ends early; the number of bytes.
fn copy(from: &mut impl Read, to: &mut File) -> std::result::Result<u64, Refusal> {
    let mut buffer = vec![0; 1 << 16];
    let mut copied = 0;
    loop {
        let n = from.read(&mut buffer).map_err(broken)?;
        if n == 0 {
            return Ok(copied);
        }
        io::Write::write_all(to, buffer.get(..n).unwrap_or_default()).map_err(Refusal::Host)?;
        copied += n as u64;
    }
}

/// Opens the directory that the names lead to, and makes what is missing. No link is followed on the way.
fn descend(top: &OwnedFd, names: &[Vec<u8>]) -> std::result::Result<OwnedFd, Refusal> {
    let mut place = top.try_clone().map_err(Refusal::Host)?;
    for bytes in names {
        let name = Name::new(bytes).map_err(|cause| format!("{}: {cause}", crate::quote::line(bytes)))?;
        match files::create_directory(&place, name, 0o755) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(cause) => return Err(cause.into()),
        }
        place = files::step(&place, name, Reach::Any)?;
    }
    Ok(place)
}

/// A release that can be the name of a directory, and of nothing else.
fn release_of(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "._+~-".contains(c);
    let good =
        !text.is_empty() && text.len() <= 120 && !text.starts_with(['.', '-']) && text.chars().all(plain);
    good.then(|| text.to_owned())
}

/// Packages of modules that belong to the package at `path`, and lie beside it: Ubuntu has image and modules in packages of
/// their own, which differ in the beginning of their names.
pub fn companions(path: &Path) -> Vec<PathBuf> {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return Vec::new() };
    let rest = ["linux-image-unsigned-", "linux-image-"].iter().find_map(|start| name.strip_prefix(start));
    let kinds = ["linux-modules-", "linux-modules-extra-"].into_iter();
    let names = kinds.filter_map(|kind| Some(path.with_file_name(format!("{kind}{}", rest?))));
    names.filter(|path| path.is_file()).collect()
}

#[cfg(test)]
pub(super) mod tests;
