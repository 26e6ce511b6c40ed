//! The ELF form of a kernel: which bytes go where, and where to begin.
//!
//! ELF-64 Object File Format, version 1.5; PVH's note is described in Xen's `public/elfnote.h`.

use std::fmt::Display;
use std::io;
use std::ops::Range;

use base::memory::Memory;

use super::Claim;
use super::source::Source;
use crate::Loading;

pub const MAGIC: &[u8] = b"\x7fELF";
const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const SECTION_HEADER: usize = 64;
/// Kernels have about five; the bound keeps a lying header from costing anything.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// Kernels have about forty, with debug sections and initcalls some more.
const MAX_SECTION_HEADERS: u16 = 256;
/// Flag of a section with machine code.
const EXECUTABLE: u64 = 4;
/// A huge page.
const HUGE: u64 = 2 << 20;
/// Notes of all kinds a kernel carries come to a few hundred bytes.
const MAX_NOTES: u64 = 64 << 10;

const PAGE: u64 = 4096;

const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_RELOCATABLE: u16 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const LOAD: u32 = 1;
const INTERPRETER: u32 = 3;
const NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the address of the PVH entry.
const PHYS32_ENTRY: u32 = 18;

/// A piece of the file that goes to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Offset in the file.
    pub offset: u64,
    /// Bytes taken from the file.
    pub file_len: u64,
    /// Guest-physical address.
    pub address: u64,
    /// Bytes in memory; those beyond `file_len` are zero.
    pub memory_len: u64,
    virtual_address: u64,
}

impl Segment {
    /// One past its last byte in memory. Does not overflow: parsing has checked it.
    pub fn end(&self) -> u64 {
        self.address.saturating_add(self.memory_len)
    }
}

/// A parsed ELF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// What goes to memory, in address order.
    pub segments: Vec<Segment>,
    /// Guest-physical address of the ELF entry.
    pub entry: u64,
    /// Guest-physical address of the PVH entry, if there is one.
    pub pvh: Option<u64>,
    /// Whether a note of Linux's own was found.
    pub linux_note: bool,
    /// Where the largest section of code lies in the file.
    pub code: Range<u64>,
}

/// Little-endian fields of a header, read with a checked cursor.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    pub(super) fn array<const N: usize>(&mut self) -> Claim<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or("its ELF headers are truncated")?;
        self.0 = rest;
        Ok(*field)
    }
    pub(super) fn u16(&mut self) -> Claim<u16> {
        self.array().map(u16::from_le_bytes)
    }
    pub(super) fn u32(&mut self) -> Claim<u32> {
        self.array().map(u32::from_le_bytes)
    }
    pub(super) fn u64(&mut self) -> Claim<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

struct ProgramHeader {
    kind: u32,
    segment: Segment,
}

impl Elf {
    /// Reads the headers and notes.
    pub fn parse(source: &Source) -> Claim<Elf> {
        let header = source.prefix(0, HEADER).map_err(unreadable)?;
        let (entry, table, count) = identify(&header)?;
        let len = usize::from(count) * PROGRAM_HEADER;
        let bytes = source.prefix(table, len).map_err(unreadable)?;
        if bytes.len() < len {
            return Err(truncated("its program headers", table.saturating_add(len as u64), source));
        }
        let mut segments = Vec::new();
        let mut notes = Notes::default();
        for bytes in bytes.chunks_exact(PROGRAM_HEADER) {
            let ProgramHeader { kind, segment } = program_header(bytes)?;
            match kind {
                INTERPRETER => return Err("it is a program that needs a dynamic linker, not a kernel".into()),
                LOAD if segment.memory_len > 0 => segments.push(check(segment, source)?),
                NOTE => notes.read(&segment, source)?,
                _ => {}
            }
        }
        segments.sort_by_key(|segment| segment.address);
        if segments.is_empty() {
            return Err("it has no loadable segments".into());
        }
        for pair in segments.windows(2) {
            if let [a, b] = pair
                && a.end() > b.address
            {
                return Err(format!("its segments at {:#x} and {:#x} overlap", a.address, b.address));
            }
        }
        let elf = Elf { segments, entry: 0, pvh: None, linux_note: notes.linux, code: code(&header, source) };
        let pvh = notes.pvh.map(|pvh| elf.physical(pvh, "PVH entry")).transpose()?;
        Ok(Elf { entry: elf.physical(entry, "entry")?, pvh, ..elf })
    }

    /// The physical address of an entry point: as it stands, or as a virtual address of a segment.
    fn physical(&self, entry: u64, what: &str) -> Claim<u64> {
        let inside = |start: u64, segment: &Segment| {
            entry.checked_sub(start).filter(|at| *at < segment.memory_len).map(|at| segment.address + at)
        };
        let physical = self.segments.iter().find_map(|segment| inside(segment.address, segment));
        physical
            .or_else(|| self.segments.iter().find_map(|segment| inside(segment.virtual_address, segment)))
            .ok_or_else(|| format!("its {what} point {entry:#x} lies outside its segments"))
    }

    /// Guest-physical addresses of its first byte and one past its last.
    pub fn span(&self) -> (u64, u64) {
        let start = self.segments.first().map_or(0, |segment| segment.address);
        (start, self.segments.iter().map(Segment::end).max().unwrap_or(0))
    }

    /// Brings every segment to its place in memory that has never been written (so what lies beyond a segment's file
    /// bytes is zero).
    pub fn load(&self, source: &mut Source, memory: &Memory, loading: Loading) -> io::Result<()> {
        for segment in &self.segments {
            let start = segment.address;
            let huge = match loading {
                Loading::Map => start..start,
                Loading::Copy => self.huge_code(segment),
            };
            // Neither overflows: parsing has checked where the segment ends in the file and in memory.
            let end = start + segment.file_len;
            let offset = |address: u64| segment.offset + (address - start);
            source.fill(memory, start, segment.offset, huge.start - start)?;
            if !huge.is_empty() {
                source.fill_huge(memory, huge.start, offset(huge.start), huge.end - huge.start)?;
            }
            source.fill(memory, huge.end, offset(huge.end), end - huge.end)?;
        }
        Ok(())
    }

    /// The huge pages of guest memory that hold nothing but code of this segment; empty, and at its start, if none.
    fn huge_code(&self, segment: &Segment) -> Range<u64> {
        let file_end = segment.offset + segment.file_len;
        let clamp = |at: u64| at.clamp(segment.offset, file_end) - segment.offset + segment.address;
        let start = clamp(self.code.start).checked_next_multiple_of(HUGE).unwrap_or(u64::MAX);
        let end = clamp(self.code.end) / HUGE * HUGE;
        if start < end && segment.offset % PAGE == segment.address % PAGE {
            start..end
        } else {
            segment.address..segment.address
        }
    }
}

/// Checks the file header: entry address, offset and number of program headers.
fn identify(header: &[u8]) -> Claim<(u64, u64, u16)> {
    let mut fields = Fields(header);
    let ident = fields.array::<16>()?;
    let [_, _, _, _, class, order, ..] = ident;
    if class != CLASS_64 {
        return Err("it is a 32-bit ELF file, not a 64-bit one".into());
    }
    if order != LITTLE_ENDIAN {
        return Err("it is a big-endian ELF file, not one for x86-64".into());
    }
    let kind = fields.u16()?;
    let machine = fields.u16()?;
    if machine != MACHINE_X86_64 {
        return Err(format!("it is an ELF file for {}, not for x86-64", machine_name(machine)));
    }
    match kind {
        TYPE_EXECUTABLE | TYPE_SHARED => {}
        TYPE_RELOCATABLE => {
            return Err("it is a relocatable object or kernel module, not a linked kernel".into());
        }
        other => return Err(format!("it is an ELF file of type {other}, not an executable")),
    }
    let _version = fields.u32()?;
    let entry = fields.u64()?;
    let table = fields.u64()?;
    let _section_headers = fields.u64()?;
    let _flags = fields.u32()?;
    let _header_len = fields.u16()?;
    let each = fields.u16()?;
    let count = fields.u16()?;
    if usize::from(each) != PROGRAM_HEADER || count == 0 {
        return Err("it has no program headers of the ELF-64 form".into());
    }
    if count > MAX_PROGRAM_HEADERS {
        return Err(format!("it has {count} program headers, more than {MAX_PROGRAM_HEADERS}"));
    }
    Ok((entry, table, count))
}

/// Finds the largest section of code in the section table. The table is advice: without one that can be read, there is
/// no such section.
fn code(header: &[u8], source: &Source) -> Range<u64> {
    let sections = || -> Claim<Vec<Range<u64>>> {
        let mut fields = Fields(header.get(0x28..).unwrap_or_default());
        let table = fields.u64()?;
        let mut fields = Fields(header.get(0x3a..).unwrap_or_default());
        let (each, count) = (fields.u16()?, fields.u16()?.min(MAX_SECTION_HEADERS));
        if usize::from(each) != SECTION_HEADER {
            return Ok(Vec::new());
        }
        let bytes = source.prefix(table, usize::from(count) * SECTION_HEADER).map_err(unreadable)?;
        bytes.chunks_exact(SECTION_HEADER).map(executable).collect()
    };
    sections().unwrap_or_default().into_iter().max_by_key(|at| at.end - at.start).unwrap_or(0..0)
}

/// Where a section lies in the file; nowhere, if it is not code.
fn executable(header: &[u8]) -> Claim<Range<u64>> {
    let mut fields = Fields(header);
    let _name_and_kind = fields.u64()?;
    let flags = fields.u64()?;
    let _address = fields.u64()?;
    let (offset, len) = (fields.u64()?, fields.u64()?);
    Ok(if flags & EXECUTABLE == 0 { 0..0 } else { offset..offset.saturating_add(len) })
}

fn machine_name(machine: u16) -> String {
    match machine {
        3 => "32-bit x86".into(),
        8 => "MIPS".into(),
        20 | 21 => "PowerPC".into(),
        22 => "s390".into(),
        40 => "32-bit Arm".into(),
        183 => "arm64".into(),
        243 => "RISC-V".into(),
        258 => "LoongArch".into(),
        other => format!("machine {other}"),
    }
}

fn program_header(bytes: &[u8]) -> Claim<ProgramHeader> {
    let mut fields = Fields(bytes);
    let kind = fields.u32()?;
    let _flags = fields.u32()?;
    let segment = Segment {
        offset: fields.u64()?,
        virtual_address: fields.u64()?,
        address: fields.u64()?,
        file_len: fields.u64()?,
        memory_len: fields.u64()?,
    };
    Ok(ProgramHeader { kind, segment })
}

fn check(segment: Segment, source: &Source) -> Claim<Segment> {
    let Segment { offset, file_len, address, memory_len, .. } = segment;
    let at = format!("its segment at {address:#x}");
    if file_len > memory_len {
        return Err(format!("{at} has {file_len} bytes in the file and {memory_len} in memory"));
    }
    if address.checked_add(memory_len).is_none() {
        return Err(format!("{at} goes beyond the address space"));
    }
    match offset.checked_add(file_len) {
        Some(end) if end <= source.len() => Ok(segment),
        end => Err(truncated(&at, end.unwrap_or(u64::MAX), source)),
    }
}

fn truncated(what: &str, end: u64, source: &Source) -> String {
    format!("it is truncated: {what} would end at byte {end} of {}", source.len())
}

fn unreadable(error: impl Display) -> String {
    error.to_string()
}

/// What the notes say.
#[derive(Default)]
struct Notes {
    pvh: Option<u64>,
    linux: bool,
}

impl Notes {
    /// Reads one note segment. Notes are advice: a broken one ends the reading and is no error, except that a PVH
    /// entry has to be an address.
    fn read(&mut self, segment: &Segment, source: &Source) -> Claim<()> {
        let len = usize::try_from(segment.file_len.min(MAX_NOTES)).unwrap_or(0);
        let bytes = source.prefix(segment.offset, len).map_err(unreadable)?;
        let mut rest = bytes.as_slice();
        while let Some(Note { name, kind, content }) = take_note(&mut rest) {
            match name {
                b"Linux\0" => self.linux = true,
                b"Xen\0" if kind == PHYS32_ENTRY => self.pvh = Some(address(content)?),
                _ => {}
            }
        }
        Ok(())
    }
}

struct Note<'a> {
    name: &'a [u8],
    kind: u32,
    content: &'a [u8],
}

/// Takes the first note off; name and content are padded to 4 bytes.
fn take_note<'a>(bytes: &mut &'a [u8]) -> Option<Note<'a>> {
    let mut fields = Fields(bytes);
    let name_len = usize::try_from(fields.u32().ok()?).ok()?;
    let content_len = usize::try_from(fields.u32().ok()?).ok()?;
    let kind = fields.u32().ok()?;
    let Fields(rest) = fields;
    let name = rest.get(..name_len)?;
    let rest = rest.get(name_len.checked_next_multiple_of(4)?..)?;
    let content = rest.get(..content_len)?;
    // The last note may lack its padding.
    *bytes = rest.get(content_len.checked_next_multiple_of(4)?..).unwrap_or_default();
    Some(Note { name, kind, content })
}

fn address(content: &[u8]) -> Claim<u64> {
    match content.len() {
        4 => Fields(content).u32().map(u64::from),
        8 => Fields(content).u64(),
        other => Err(format!("its PVH note has {other} bytes in place of an address")),
    }
}
