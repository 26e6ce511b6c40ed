//! What an unpacked kernel tells in passing: its version banner and its configuration.

use std::io::Read;

use memchr::memmem::Finder;

use super::elf::Elf;
use super::source::Source;

/// Bytes of a kernel that are searched at most.
const MAX_SCAN: u64 = 256 << 20;
const CHUNK: u64 = 1 << 20;
/// Searched-for strings are shorter than this, so that chunks overlap by it.
const OVERLAP: u64 = 64;
const BANNER: &[u8] = b"Linux version ";
/// Longest banner kept.
const MAX_BANNER: usize = 512;
/// Starts the configuration that CONFIG_IKCONFIG embeds.
const CONFIG_START: &[u8] = b"IKCFG_ST";
/// Longest configuration that is unpacked: Debian's has 260 KB.
const MAX_CONFIG: u64 = 4 << 20;
/// Longest packed configuration that is read.
const MAX_PACKED_CONFIG: usize = 1 << 20;

/// The banner of the kernel, without `Linux version `: `6.1.0-56-amd64 (builder) (compiler) #1 SMP ...`.
pub fn version(elf: &Elf, source: &Source) -> Option<String> {
    find(elf, source, BANNER, |at| {
        let bytes = source.prefix(at + BANNER.len() as u64, MAX_BANNER).ok()?;
        // The same words also begin a format string; only the banner goes on with a number.
        let text = bytes.split(|byte| matches!(byte, 0 | b'\n')).next()?;
        let text = std::str::from_utf8(text).ok()?;
        let plain = text.starts_with(|c: char| c.is_ascii_digit()) && text.chars().all(|c| !c.is_control());
        plain.then(|| text.to_owned())
    })
}

/// Whether the kernel is Linux: by a note of its own, or by its banner.
pub fn is_linux(elf: &Elf, source: &Source) -> bool {
    elf.linux_note || version(elf, source).is_some()
}

/// The embedded configuration.
pub fn config(elf: &Elf, source: &Source) -> Option<String> {
    find(elf, source, CONFIG_START, |at| {
        let packed = source.prefix(at + CONFIG_START.len() as u64, MAX_PACKED_CONFIG).ok()?;
        let mut text = String::new();
        let unpacked = flate2::bufread::GzDecoder::new(packed.as_slice());
        unpacked.take(MAX_CONFIG).read_to_string(&mut text).ok()?;
        Some(text)
    })
}

/// Calls `accept` with the offset of each occurrence of `needle` in the segments until it takes one.
fn find<T>(elf: &Elf, source: &Source, needle: &[u8], accept: impl Fn(u64) -> Option<T>) -> Option<T> {
    let finder = Finder::new(needle);
    let mut budget = MAX_SCAN;
    for segment in &elf.segments {
        let len = segment.file_len.min(budget);
        budget -= len;
        let mut at = 0;
        while at < len {
            let chunk = usize::try_from((len - at).min(CHUNK + OVERLAP)).ok()?;
            let bytes = source.view(segment.offset + at, chunk).ok()?;
            let mut hits = finder.find_iter(&bytes);
            let found = hits.find_map(|hit| accept(segment.offset + at + hit as u64));
            if found.is_some() {
                return found;
            }
            at += CHUNK;
        }
    }
    None
}
