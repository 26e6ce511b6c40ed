//! Sources: where images come from. A client of a registry would be one more.

mod docker;
mod files;
mod layout;
mod tarball;

use std::io::Read;
use std::path::Path;

use base::fail::{unreadable, why_of};
use base::{Doing, Fail, Result, Why};

use self::files::{Directory, Files, Members};
use super::config::Config;
use super::decode::{self, Packing};
use super::digest::Digest;
use super::layer::Form;
use crate::quote;

/// Longest document in JSON.
const DOCUMENT_MAX: u64 = 8 << 20;
/// Longest name of an image.
const NAME_MAX: usize = 256;

/// A source of images.
pub trait Source {
    /// The image called `name`, or the only one there is.
    ///
    /// # Errors
    /// There is none; there are several; it cannot be read, or is for another machine.
    fn choose(&self, name: Option<&str>) -> Result<Recipe>;

    /// The bytes of a layer.
    ///
    /// # Errors
    /// They are not there, or cannot be read.
    fn open(&self, layer: &Layer) -> Result<Box<dyn Read + '_>>;
}

/// How a root file system is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// What it is known by: the digest of its configuration, which names its layers; or that of its only file.
    pub id: Digest,
    /// What it is called.
    pub names: Vec<String>,
    /// What it says of itself.
    pub config: Config,
    /// Its layers, the lowest first.
    pub layers: Vec<Layer>,
    /// What names in them mean.
    pub form: Form,
}

/// A layer in its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Its place there.
    pub place: String,
    /// The digest of its bytes, and how many there are.
    pub digest: Option<Digest>,
    /// As above.
    pub size: Option<u64>,
    /// The digest of what they unpack to.
    pub unpacked: Option<Digest>,
}

/// The source at a path: told by what it is.
///
/// # Errors
/// It is nothing that holds images, or cannot be read.
pub fn find(path: &Path) -> Result<Box<dyn Source>> {
    let doing = || format!("read image {}", path.display());
    let found = std::fs::metadata(path).map_err(|cause| unreadable(doing(), path, cause))?;
    if found.is_dir() {
        let files = Directory::new(path);
        if files.open("index.json").is_ok_and(|file| file.is_some()) {
            return Ok(Box::new(layout::Layout::new(Box::new(files))));
        }
        return Err(Fail::new(Why::Invalid, doing())
            .because("it is a directory without an index.json, so no OCI image layout")
            .hint(format!("a directory with a root file system is --root {}", path.display())));
    }
    let file = base::host::open_to_read(path).map_err(|cause| unreadable(doing(), path, cause))?;
    if !found.is_file() {
        return Err(Fail::new(Why::Invalid, doing()).because("it is neither a file nor a directory"));
    }
    let stream = file.try_clone().doing(Why::Host, doing)?;
    let (packing, _) = decode::open(stream).map_err(|cause| damaged(doing(), cause))?;
    // Members have to be found again, which only a file allows.
    let members = match packing {
        Packing::None => Members::of(file, path),
        _ => Members::unpacked(file, path),
    };
    let members = members.map_err(|cause| damaged(doing(), cause))?;
    Ok(match members {
        Some(members) if members.has("index.json") && members.has("oci-layout") => {
            Box::new(layout::Layout::new(Box::new(members)))
        }
        Some(members) if members.has("manifest.json") => Box::new(docker::Docker::new(members)),
        _ => Box::new(tarball::Tarball::new(path)),
    })
}

/// The failure that is in the bytes of an image, unless the host says that it is its own.
pub fn damaged(doing: impl Into<String>, cause: std::io::Error) -> Fail {
    match cause.raw_os_error() {
        Some(_) => Fail::new(why_of(&cause), doing).because(cause),
        None => Fail::new(Why::Invalid, doing).because(cause),
    }
}

/// Those of an image's names that can be shown and typed: what it calls itself goes to terminals.
fn proper(names: impl IntoIterator<Item = String>) -> Vec<String> {
    let good = |name: &String| {
        (1..=NAME_MAX).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_graphic())
    };
    names.into_iter().filter(good).collect()
}

/// What is done with a file of an image, whose place the image says itself.
fn reading(files: &dyn Files, place: &str) -> String {
    format!("read {} of image {}", quote::line(place.as_bytes()), files.label())
}

/// A document of JSON among `files`; its digest has to be what was promised.
fn document(files: &dyn Files, place: &str, promised: Option<Digest>) -> Result<Vec<u8>> {
    let doing = || reading(files, place);
    let file = files.open(place).map_err(|cause| damaged(doing(), cause))?;
    let Some((stream, len)) = file else {
        return Err(Fail::new(Why::Invalid, doing()).because("it is not there"));
    };
    if len > DOCUMENT_MAX {
        return Err(Fail::new(Why::Invalid, doing()).because(format!("{len} bytes are too many")));
    }
    let mut bytes = Vec::new();
    stream.take(DOCUMENT_MAX).read_to_end(&mut bytes).map_err(|cause| damaged(doing(), cause))?;
    match promised {
        Some(promised) if promised != Digest::of(&bytes) => {
            let cause = format!("its digest is {}, and {promised} was promised", Digest::of(&bytes));
            Err(Fail::new(Why::Invalid, doing()).because(cause))
        }
        _ => Ok(bytes),
    }
}

/// Reads a document as what it has to be.
fn parse<T: serde::de::DeserializeOwned>(files: &dyn Files, place: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).doing(Why::Invalid, || reading(files, place))
}

/// The bytes of a layer among `files`.
fn layer<'a>(files: &'a dyn Files, layer: &Layer) -> Result<Box<dyn Read + 'a>> {
    let doing = || reading(files, &layer.place);
    match files.open(&layer.place).map_err(|cause| damaged(doing(), cause))? {
        Some((stream, _)) => Ok(stream),
        None => Err(Fail::new(Why::Invalid, doing()).because("it is not there")),
    }
}

/// Reads the configuration of an image, and sees to it that it is for this machine and has as many layers as there are.
fn configuration(
    files: &dyn Files,
    place: &str,
    bytes: &[u8],
    layers: usize,
) -> Result<(Config, Vec<Digest>)> {
    let doing = || format!("use image {}", files.label());
    let config: Config = parse(files, place, bytes)?;
    let fits = |found: &str, wanted: &str| found.is_empty() || found == wanted;
    if !fits(&config.os, "linux") || !fits(&config.architecture, "amd64") {
        let machine = format!("{}/{}", config.os, config.architecture);
        return Err(Fail::new(Why::Unsupported, doing())
            .because(format!("it is for {}", quote::line(machine.as_bytes())))
            .hint("machines here are linux/amd64"));
    }
    let unpacked = config.rootfs.diff_ids.iter().map(|text| text.parse()).collect::<Result<Vec<_>, _>>();
    let unpacked = unpacked.doing(Why::Invalid, doing)?;
    if unpacked.len() != layers {
        let cause = format!("its configuration names {} layers, and it has {layers}", unpacked.len());
        return Err(Fail::new(Why::Invalid, doing()).because(cause));
    }
    Ok((config, unpacked))
}

/// Whether what someone asks for is this name: whole, or as docker shortens it.
pub(super) fn is_called(asked: &str, name: &str) -> bool {
    fn whole(name: &str) -> String {
        let short = name.strip_prefix("docker.io/").unwrap_or(name);
        let short = short.strip_prefix("library/").unwrap_or(short);
        let tagged = short.rsplit('/').next().is_some_and(|last| last.contains(':') || last.contains('@'));
        if tagged { short.to_owned() } else { format!("{short}:latest") }
    }
    asked == name || whole(asked) == whole(name)
}

/// The failure to choose among images: `names` are there.
fn undecided(label: &str, asked: Option<&str>, names: &[String]) -> Fail {
    let names: Vec<String> = names.iter().map(|name| quote::line(name.as_bytes())).collect();
    let list = names.join(", ");
    match asked {
        _ if names.is_empty() => Fail::new(Why::Invalid, format!("use image {label}"))
            .because("there is no image for a machine in it"),
        Some(asked) => Fail::new(Why::Missing, format!("find {asked} in image {label}"))
            .because(format!("it has {list}"))
            .hint(format!("--image {label}#{}", names.first().map_or("NAME", String::as_str))),
        None => Fail::new(Why::Usage, format!("choose an image of {label}"))
            .because(format!("it has several: {list}"))
            .hint(format!("--image {label}#{}", names.first().map_or("NAME", String::as_str))),
    }
}
