//! Kernel images: recognised, checked, unpacked and brought to their place in guest memory.
//!
//! Two forms boot: a bzImage, as distributions ship it, and the ELF file (`vmlinux`) inside it or from a build. The
//! bzImage is unpacked on the host; everything an image says is checked before it is used, and what is wrong with it
//! is told with its name.

mod bzimage;
mod elf;
mod kallsyms;
mod payload;
pub mod scan;
mod shelf;
mod source;
mod symbols;

use std::fs::{self, File, Metadata};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base::fail::{unreadable, why_of};
use base::host::open_to_read;
use base::memory::Memory;
use base::{Doing, Fail, Result, Why};
use linux_loader::loader::bootparam::setup_header;
use serde::Serialize;

use self::bzimage::BzImage;
use self::elf::Elf;
pub use self::payload::Compression;
use self::shelf::{Shelf, Unpacked};
use self::source::Source;
pub(crate) use self::source::read_into;
pub use self::symbols::Symbols;
use crate::discovery::has_acpi;
use crate::map::Map;
use crate::{Loading, Protocol, linux};

/// What an image says about itself, or what is wrong with it.
pub(crate) type Claim<T> = std::result::Result<T, String>;

/// The form of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Format {
    /// ELF, `vmlinux`.
    #[serde(rename = "elf")]
    Elf,
    /// bzImage, `vmlinuz`.
    #[serde(rename = "bzImage")]
    BzImage,
}

#[derive(Debug)]
enum Form {
    Elf(Elf),
    BzImage(Box<BzImage>),
}

/// A kernel image that has been recognised.
#[derive(Debug)]
pub struct Kernel {
    name: String,
    path: Option<PathBuf>,
    passed_over: Option<Fail>,
    source: Source,
    form: Form,
    packed: bool,
    shelf: Option<PathBuf>,
}

/// A kernel in guest memory.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    /// Entry of the 64-bit Linux protocol.
    pub linux: u64,
    /// Entry of PVH, if it has one.
    pub pvh: Option<u64>,
    /// One past the last byte it needs.
    pub end: u64,
    /// Setup header for the zero page.
    pub header: setup_header,
    /// Whether PVH is the only protocol it speaks.
    pub only_pvh: bool,
    /// Whether it was configured with ACPI, if it says so itself.
    pub acpi: Option<bool>,
}

/// Where a directory holds a kernel image, in the order of preference.
///
/// `vmlinux` comes first because it is never older than the bzImage made from it, and its segments are mapped in
/// place of being unpacked; debug sections, however large, are never touched.
const PLACES: [&str; 3] = ["vmlinux", "arch/x86/boot/bzImage", "vmlinuz"];

/// The files in a directory that may be a kernel image.
fn candidates(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<_> = PLACES.iter().map(|place| dir.join(place)).collect();
    found.retain(|place| place.is_file());
    if !found.is_empty() {
        return Ok(found);
    }
    let installed = installed(dir);
    Err(Fail::new(Why::Missing, format!("find a kernel in {}", dir.display()))
        .because(format!("it holds none of {}", PLACES.join(", ")))
        .hint(match installed.as_slice() {
            [] => "build the kernel there, or pass the image itself".to_owned(),
            images => format!("pass the image itself: {}", images.join(" or ")),
        }))
}

/// Most images that a message names.
const NAMED: usize = 8;

/// The images in a directory that has them as /boot has: `vmlinuz-6.1.0-56-amd64`. The newest names come first.
fn installed(dir: &Path) -> Vec<String> {
    let names =
        fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut images: Vec<_> =
        names.filter(|name| name.starts_with("vmlinuz-") || name.starts_with("vmlinux-")).collect();
    images.sort_by(|a, b| b.cmp(a));
    images.truncate(NAMED);
    images.iter().map(|name| dir.join(name).display().to_string()).collect()
}

fn opening(path: &Path) -> String {
    format!("open kernel {}", path.display())
}

fn open_file(path: &Path) -> Result<(File, Metadata)> {
    let opened = open_to_read(path).and_then(|file| file.metadata().map(|about| (file, about)));
    opened.map_err(|cause| unreadable(opening(path), path, cause))
}

impl Kernel {
    /// Opens and recognises the kernel that `path` means: the file itself, or in a build tree `vmlinux`,
    /// `arch/x86/boot/bzImage` or `vmlinuz`: the first of them that is one.
    ///
    /// # Errors
    /// There is no such path, the directory holds no kernel, or as [`Kernel::open`].
    pub fn find(path: &Path) -> Result<Kernel> {
        let (file, about) = open_file(path)?;
        if !about.is_dir() {
            return Kernel::at(path, file, &about);
        }
        let mut candidates = candidates(path)?.into_iter();
        let first = candidates.next().unwrap_or_default();
        let refusal = match Kernel::open(&first) {
            Err(refusal) => refusal,
            found => return found,
        };
        match candidates.find_map(|path| Kernel::open(&path).ok()) {
            Some(kernel) => Ok(Kernel { passed_over: Some(refusal), ..kernel }),
            None => Err(refusal),
        }
    }

    /// Opens and recognises the image at `path`. Only headers are read.
    ///
    /// # Errors
    /// The file cannot be opened, or is no kernel that boots here: the failure says what it is.
    pub fn open(path: &Path) -> Result<Kernel> {
        let (file, about) = open_file(path)?;
        Kernel::at(path, file, &about)
    }

    fn at(path: &Path, file: File, about: &Metadata) -> Result<Kernel> {
        let kernel = Kernel::from_file(path.display().to_string(), file, about)?;
        Ok(Kernel { path: Some(path.to_owned()), ..kernel })
    }

    /// Recognises the image in an open file; `name` is how failures call it.
    ///
    /// # Errors
    /// As [`Kernel::open`].
    pub fn read(name: impl Into<String>, file: File) -> Result<Kernel> {
        let name = name.into();
        let about = file.metadata().doing(Why::Host, || format!("open kernel {name}"))?;
        Kernel::from_file(name, file, &about)
    }

    fn from_file(name: String, file: File, about: &Metadata) -> Result<Kernel> {
        let refuse = |what: &'static str, hint| {
            Err(Fail::new(Why::Invalid, format!("open kernel {name}")).because(what).hint(hint))
        };
        match about.file_type() {
            kind if kind.is_file() => Kernel::recognise(name, Source::File(Arc::new(file), about.len())),
            kind if kind.is_dir() => refuse("it is a directory", IMAGE),
            kind if kind.is_fifo() => refuse(
                "it is a pipe, not a regular file",
                "put what comes out of it into a file first, and pass that",
            ),
            _ => refuse("it is not a regular file", IMAGE),
        }
    }

    /// Recognises the image in memory: for tests and fuzzing.
    ///
    /// # Errors
    /// As [`Kernel::open`].
    pub fn parse(name: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Result<Kernel> {
        Kernel::recognise(name.into(), Source::Bytes(Arc::new(bytes.into())))
    }

    fn recognise(name: String, source: Source) -> Result<Kernel> {
        let form = recognise(&source).map_err(|reason| refuse(&name, reason))?;
        Ok(Kernel { name, path: None, passed_over: None, source, form, packed: false, shelf: None })
    }

    /// Leaves a bzImage packed: the guest unpacks itself, as it does on hardware.
    #[must_use]
    pub fn keep_packed(self) -> Kernel {
        Kernel { packed: true, ..self }
    }

    /// Keeps what is unpacked of it in the directory `shelf` for the next time, and takes it from there. Nothing fails
    /// where that cannot be written; what is there can be removed at any time.
    #[must_use]
    pub fn kept_in(self, shelf: PathBuf) -> Kernel {
        Kernel { shelf: Some(shelf), ..self }
    }

    /// How failures call it: the path it was opened by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path it was opened by, if it was.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Why it was not another file of its directory, which would have been preferred.
    pub fn passed_over(&self) -> Option<&Fail> {
        self.passed_over.as_ref()
    }

    /// One past the last address that it takes itself, as its headers say.
    pub(crate) fn end(&self) -> Result<u64> {
        match &self.form {
            Form::Elf(elf) => Ok(elf.span().1),
            Form::BzImage(image) => {
                image.span().map(|(_, end)| end).map_err(|reason| refuse(&self.name, reason))
            }
        }
    }

    /// Whether it is Linux, which needs memory to work with besides its own.
    pub(crate) fn is_linux(&self) -> bool {
        match &self.form {
            Form::Elf(elf) => scan::is_linux(elf, &self.source),
            Form::BzImage(_) => true,
        }
    }

    /// Its form.
    pub fn format(&self) -> Format {
        match self.form {
            Form::Elf(_) => Format::Elf,
            Form::BzImage(_) => Format::BzImage,
        }
    }

    /// How its payload is compressed; an ELF file has none.
    pub fn compression(&self) -> Option<Compression> {
        match &self.form {
            Form::Elf(_) => None,
            Form::BzImage(image) => Some(image.compression),
        }
    }

    /// The version a bzImage's header names: `6.1.0-56-amd64 (builder) #1 SMP ...`.
    pub(crate) fn header_version(&self) -> Option<&str> {
        match &self.form {
            Form::Elf(_) => None,
            Form::BzImage(image) => image.version.as_deref(),
        }
    }

    /// Calls `with` on the ELF file: this one, or the one unpacked from the bzImage. `None` if the host cannot unpack
    /// it.
    pub(crate) fn with_elf<T>(&self, with: impl FnOnce(&Elf, &Source) -> T) -> Result<Option<T>> {
        match &self.form {
            Form::Elf(elf) => Ok(Some(with(elf, &self.source))),
            Form::BzImage(image) if image.compression.unpacks() => {
                let Unpacked { elf, source, .. } = self.unpacked(image)?;
                Ok(Some(with(&elf, &source)))
            }
            Form::BzImage(_) => Ok(None),
        }
    }

    /// Writes the ELF file to `out`, unpacked, if it can be entered by PVH; false, and nothing is written, if not.
    ///
    /// # Errors
    /// The image is broken, or `out` cannot be written.
    pub fn write_pvh_elf(&self, out: &mut impl std::io::Write) -> Result<bool> {
        let written = self.with_elf(|elf, source| {
            if elf.pvh.is_none() {
                return Ok(false);
            }
            for at in (0..source.len()).step_by(1 << 20) {
                out.write_all(&source.prefix(at, 1 << 20)?)?;
            }
            Ok::<_, std::io::Error>(true)
        })?;
        written.unwrap_or(Ok(false)).doing(Why::Host, || format!("unpack kernel {}", self.name))
    }

    /// Unpacks a bzImage, so that it is on its shelf when it is needed.
    ///
    /// # Errors
    /// It is broken.
    pub fn prepare(&self) -> Result<()> {
        self.with_elf(|_, _| ()).map(|_| ())
    }

    /// What is packed in `image`: from the shelf, or unpacked now.
    fn unpacked(&self, image: &BzImage) -> Result<Unpacked> {
        let shelf = match (&self.shelf, &self.source) {
            (Some(dir), Source::File(file, _)) => Shelf::new(dir, file),
            _ => None,
        };
        if let Some(found) = shelf.as_ref().and_then(Shelf::find) {
            return Ok(found);
        }
        let unpacked = unpack(image, &self.source).map_err(|reason| refuse(&self.name, reason))?;
        if let Some(shelf) = shelf {
            shelf.keep(&unpacked);
        }
        Ok(unpacked)
    }

    /// Brings the kernel to its place in memory that has never been written.
    pub(crate) fn load(
        &self,
        protocol: Protocol,
        loading: Loading,
        memory: &Memory,
        map: &Map,
    ) -> Result<Placed> {
        let placed = match &self.form {
            Form::Elf(elf) => {
                let only_pvh = elf.pvh.is_some() && !scan::is_linux(elf, &self.source);
                let mut source =
                    self.source.share().doing(Why::Host, || format!("load kernel {}", self.name))?;
                Placed { only_pvh, ..self.load_elf(elf, &mut source, loading, memory, map)? }
            }
            Form::BzImage(image) if image.compression.unpacks() && !self.packed => {
                let Unpacked { elf, mut source, acpi } = self.unpacked(image)?;
                let placed = self.load_elf(&elf, &mut source, loading, memory, map)?;
                Placed { header: image.header, acpi, ..placed }
            }
            Form::BzImage(image) => self.load_packed(image, memory, map)?,
        };
        match protocol {
            Protocol::Pvh if placed.pvh.is_none() => Err(self.without_pvh()),
            _ => Ok(placed),
        }
    }

    fn without_pvh(&self) -> Fail {
        let fail = Fail::new(Why::Invalid, format!("enter kernel {} by PVH", self.name));
        match self.compression() {
            Some(packed) if self.packed || !packed.unpacks() => {
                fail.because(format!("its {} payload stays packed", packed.name()))
            }
            _ => fail
                .because("it has no PVH entry")
                .hint("configure it with CONFIG_PVH=y, or leave the choice of protocol out"),
        }
    }

    fn load_elf(
        &self,
        elf: &Elf,
        source: &mut Source,
        loading: Loading,
        memory: &Memory,
        map: &Map,
    ) -> Result<Placed> {
        let (start, end) = elf.span();
        map.check(&self.name, start, end)?;
        elf.load(source, memory, loading)
            .map_err(|e| Fail::new(why_of(&e), format!("load kernel {}", self.name)).because(e))?;
        Ok(Placed {
            linux: elf.entry,
            pvh: elf.pvh,
            end,
            header: linux::header(),
            only_pvh: false,
            acpi: None,
        })
    }

    fn load_packed(&self, image: &BzImage, memory: &Memory, map: &Map) -> Result<Placed> {
        let (start, end) = image.span().map_err(|reason| refuse(&self.name, reason))?;
        map.check(&self.name, start, end)?;
        let loading = || format!("load kernel {}", self.name);
        let mut source = self.source.share().doing(Why::Host, loading)?;
        let linux = image.load(&mut source, memory, start).doing(Why::Host, loading)?;
        Ok(Placed { linux, pvh: None, end, header: image.header, only_pvh: false, acpi: None })
    }
}

fn unpack(image: &BzImage, packed: &Source) -> Claim<Unpacked> {
    let source = image.unpack(packed)?;
    let magic = source.prefix(0, elf::MAGIC.len()).map_err(|error| error.to_string())?;
    if magic != elf::MAGIC {
        return Err("its payload does not unpack to an ELF file".to_owned());
    }
    let elf = Elf::parse(&source).map_err(|reason| format!("in its payload, {reason}"))?;
    // While it is at hand: a search takes little beside the unpacking.
    let acpi = scan::config(&elf, &source).and_then(|config| has_acpi(&config));
    Ok(Unpacked { elf, source, acpi })
}

/// The remedy for what is no kernel.
const IMAGE: &str = "pass a bzImage (vmlinuz) or an ELF vmlinux for x86-64";

/// The failure for an image that is not one, or is broken.
fn refuse(name: &str, reason: String) -> Fail {
    let fail = Fail::new(Why::Invalid, format!("load kernel {name}"));
    let hint = match reason.as_str() {
        text if text.contains("compressed file") => "unpack it first",
        text if text.contains("truncated") || text.contains("corrupt") => "copy or build it again",
        _ => IMAGE,
    };
    fail.because(reason).hint(hint)
}

fn recognise(source: &Source) -> Claim<Form> {
    if source.len() == 0 {
        return Err("it is empty".into());
    }
    let head = source.prefix(0, bzimage::HEAD).map_err(|error| error.to_string())?;
    if head.starts_with(elf::MAGIC) {
        return Elf::parse(source).map(Form::Elf);
    }
    if bzimage::recognise(&head) {
        return BzImage::parse(&head, source).map(|image| Form::BzImage(Box::new(image)));
    }
    Err(describe(&head).into())
}

/// What a file is that is no kernel for this machine.
fn describe(head: &[u8]) -> &'static str {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    match () {
        () if at(0x38, b"ARM\x64") => "it is an arm64 kernel, not one for x86-64",
        () if at(0x38, b"RSC\x05") => "it is a RISC-V kernel, not one for x86-64",
        () if at(0, b"MZ") && at(4, b"zimg") => "it is an EFI zboot image, not for x86-64",
        () if at(0, b"MZ") && head.len() < bzimage::HEAD => {
            "it is truncated: it ends before its setup header does"
        }
        () if at(0, b"MZ") => "it is a PE (EFI) program, not a Linux kernel",
        () if at(0, &[0x27, 0x05, 0x19, 0x56]) => "it is a U-Boot image, not one for x86-64",
        () if at(0, &[0x1f, 0x8b]) => "it is a gzip compressed file, not a kernel image",
        () if at(0, b"\xfd7zXZ\0") => "it is an xz compressed file, not a kernel image",
        () if at(0, &[0x28, 0xb5, 0x2f, 0xfd]) => "it is a zstd compressed file, not a kernel image",
        () if at(0, b"BZh") => "it is a bzip2 compressed file, not a kernel image",
        () if at(0, b"!<arch>\ndebian-binary") => {
            "it is a Debian package, whose name has to end with .deb here"
        }
        () if at(0, &[0xed, 0xab, 0xee, 0xdb]) => "it is an rpm package, not a kernel image",
        () if at(0, b"070701") => "it is a cpio archive, which goes to --initrd",
        () if is_text(head) => "it is a text file, not a kernel image",
        () => "it is neither a bzImage nor an ELF file",
    }
}

fn is_text(head: &[u8]) -> bool {
    let whole = match std::str::from_utf8(head) {
        Ok(_) => head,
        // Cut within a character.
        Err(error) if error.error_len().is_none() => head.get(..error.valid_up_to()).unwrap_or_default(),
        Err(_) => return false,
    };
    whole.iter().all(|byte| !byte.is_ascii_control() || byte.is_ascii_whitespace())
}

#[cfg(test)]
pub(crate) mod tests;
