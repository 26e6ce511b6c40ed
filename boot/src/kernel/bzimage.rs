//! The bzImage form of a kernel: a setup header, and a program that unpacks the rest.
//!
//! `Documentation/arch/x86/boot.rst` of the kernel.

use std::io;

use arch::layout::HIGH_RAM;
use base::memory::Memory;
use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::Claim;
use super::payload::{Compression, unpack};
use super::source::Source;

/// Offset of the setup header in the file and in the zero page.
pub const HEADER_AT: usize = 0x1f1;
/// Enough of the file for the header and what lies before it.
pub const HEAD: usize = 0x290;
const MAGIC_AT: usize = 0x202;
pub const MAGIC: &[u8; 4] = b"HdrS";
const SECTOR: u64 = 512;
/// Boot protocol 2.12 (Linux 3.8): the first that says whether there is a 64-bit entry.
const OLDEST: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry lies this far into the protected-mode code.
const ENTRY_64: u64 = 0x200;
/// A version string longer than this is none.
const MAX_VERSION: usize = 256;

/// A parsed bzImage.
#[derive(Clone, Debug)]
pub struct BzImage {
    /// Its setup header, as far as the file says it goes; zero after that.
    pub header: setup_header,
    /// `6.1.0-56-amd64 (builder) #1 SMP ...`, if it names one.
    pub version: Option<String>,
    /// How the payload is compressed.
    pub compression: Compression,
    /// Offset and length of the protected-mode code in the file.
    code: (u64, u64),
    payload: (u64, u64),
}

/// Whether these are the first bytes of a bzImage.
pub fn recognise(head: &[u8]) -> bool {
    head.get(MAGIC_AT..).is_some_and(|rest| rest.starts_with(MAGIC))
}

impl BzImage {
    /// Reads the setup header; `head` is the file's first [`HEAD`] bytes.
    pub fn parse(head: &[u8], source: &Source) -> Claim<BzImage> {
        let header = header(head)?;
        let (version, xloadflags) = (header.version, header.xloadflags);
        if version < OLDEST {
            return Err(format!(
                "its boot protocol {}.{:02} is older than 2.12",
                version >> 8,
                version & 0xff
            ));
        }
        if header.loadflags & LOADED_HIGH == 0 {
            return Err("it is a zImage, which loads below 640 KiB".into());
        }
        if xloadflags & XLF_KERNEL_64 == 0 {
            return Err("it is a 32-bit kernel, without a 64-bit entry".into());
        }
        let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
        let start = (sectors + 1) * SECTOR;
        let len = u64::from(header.syssize) * 16;
        // The size counts 16-byte units and may round up by one.
        if len < ENTRY_64 || start + len > source.len().saturating_add(15) {
            let end = start + len;
            return Err(format!("it is truncated: its code would end at byte {end} of {}", source.len()));
        }
        let code = (start, len.min(source.len().saturating_sub(start)));
        let payload = payload(&header, code)?;
        let first = source.prefix(payload.0, 6).map_err(|error| error.to_string())?;
        let version = version_string(&header, start, source);
        Ok(BzImage { header, version, compression: Compression::recognise(&first), code, payload })
    }

    /// Unpacks the payload: an ELF file.
    pub fn unpack(&self, source: &Source) -> Claim<Source> {
        let (offset, len) = self.payload;
        let len = usize::try_from(len).map_err(|error| error.to_string())?;
        let mut packed = base::sys::scratch::Scratch::new(len).map_err(|error| error.to_string())?;
        source.read_at(offset, packed.as_mut_slice()).map_err(|error| error.to_string())?;
        unpack(self.compression, packed.as_slice()).map(Source::Scratch)
    }

    /// Guest-physical start of the code, and end of the memory it needs to unpack itself.
    pub fn span(&self) -> Claim<(u64, u64)> {
        let (preferred, align) = (self.header.pref_address, self.header.kernel_alignment);
        let start = if self.header.relocatable_kernel == 0 {
            preferred
        } else {
            preferred
                .max(HIGH_RAM)
                .checked_next_multiple_of(u64::from(align).max(1))
                .ok_or("it asks for an address beyond the address space")?
        };
        let end = start.checked_add(u64::from(self.header.init_size).max(self.code.1));
        Ok((start, end.ok_or("it asks for an address beyond the address space")?))
    }

    /// Brings the code to its place; returns the 64-bit entry.
    pub fn load(&self, source: &mut Source, memory: &Memory, start: u64) -> io::Result<u64> {
        source.fill(memory, start, self.code.0, self.code.1)?;
        Ok(start.saturating_add(ENTRY_64))
    }
}

/// Copies the header out of the file: from 0x1f1 to where the jump at 0x200 goes.
fn header(head: &[u8]) -> Claim<setup_header> {
    let short = "it is truncated: it ends within its setup header";
    let jump = usize::from(*head.get(0x201).ok_or(short)?);
    let bytes = head.get(HEADER_AT..(MAGIC_AT + jump).min(HEAD)).ok_or(short)?;
    let mut header = setup_header::default();
    let target = header.as_mut_slice();
    let len = bytes.len().min(target.len());
    let (Some(target), Some(bytes)) = (target.get_mut(..len), bytes.get(..len)) else {
        return Err(short.into());
    };
    target.copy_from_slice(bytes);
    Ok(header)
}

fn payload(header: &setup_header, (start, len): (u64, u64)) -> Claim<(u64, u64)> {
    let (offset, payload_len) = (u64::from(header.payload_offset), u64::from(header.payload_length));
    if payload_len == 0 || offset + payload_len > len {
        return Err(format!("its payload of {payload_len} bytes at {offset:#x} does not lie in its code"));
    }
    Ok((start + offset, payload_len))
}

fn version_string(header: &setup_header, setup_len: u64, source: &Source) -> Option<String> {
    let at = u64::from(header.kernel_version);
    if at == 0 || at + SECTOR >= setup_len {
        return None;
    }
    let bytes = source.prefix(at + SECTOR, MAX_VERSION).ok()?;
    let text = bytes.split(|byte| *byte == 0).next().filter(|text| text.len() < MAX_VERSION)?;
    let text = std::str::from_utf8(text).ok()?;
    let plain = !text.is_empty() && text.chars().all(|c| !c.is_control());
    plain.then(|| text.to_owned())
}
