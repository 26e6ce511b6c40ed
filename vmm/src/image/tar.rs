//! Archives as `tar` makes them: one member after the other, from any stream.
//!
//! Own, and no library's, for its bounds: an archive comes from anywhere, and its extended headers and long names say
//! themselves how much memory they want. POSIX.1-2017 "pax", section "ustar Interchange Format"; GNU tar, "Basic Tar Format".

use std::collections::BTreeMap;
use std::io::{self, Read};

use super::tree::{shown, wrong};

/// Bytes of a header, and what members are padded to.
pub const BLOCK: usize = 512;
/// Longest extended header or long name.
const HEADER_MAX: u64 = 1 << 20;
/// Most pieces of a sparse file.
const PIECES_MAX: usize = 1 << 16;

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// A file with content.
    File,
    /// Another name for an earlier file.
    HardLink,
    /// A symbolic link.
    Link,
    /// A character device.
    Character,
    /// A block device.
    Block,
    /// A directory.
    Directory,
    /// A pipe.
    Fifo,
}

/// A member of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name, as it stands there.
    pub path: Vec<u8>,
    /// What it links to.
    pub target: Vec<u8>,
    /// What it is.
    pub kind: Type,
    /// Permissions: 12 bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Numbers of a device.
    pub device: (u32, u32),
    /// Bytes of the file.
    pub len: u64,
    /// Extended attributes.
    pub attributes: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Where its bytes begin in the archive.
    pub offset: u64,
    /// Where the pieces of a sparse file lie in it: offset and length.
    pieces: Option<Vec<(u64, u64)>>,
}

/// An archive that is read.
pub struct Archive<R> {
    stream: R,
    /// Bytes read so far.
    at: u64,
    /// Bytes of the current member that are still to come, and its padding.
    left: u64,
    padding: u64,
}

/// What headers before a member say of it.
#[derive(Default)]
struct Extension {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    attributes: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// Whether bytes begin like an archive: a header whose checksum is right.
pub fn is_header(bytes: &[u8]) -> bool {
    let header = bytes.get(..BLOCK);
    header.is_some_and(|header| number(field(header, 148, 8)).is_ok_and(|told| told == checksum(header)))
}

fn field(header: &[u8], at: usize, len: usize) -> &[u8] {
    header.get(at..at + len).unwrap_or_default()
}

/// The sum of all bytes, the checksum's own taken as spaces.
fn checksum(header: &[u8]) -> u64 {
    let byte = |(at, byte): (usize, &u8)| u64::from(if (148..156).contains(&at) { b' ' } else { *byte });
    header.iter().enumerate().map(byte).sum()
}

/// A number in octal digits, or in binary if the first bit is set.
fn number(field: &[u8]) -> io::Result<u64> {
    let bad = || wrong(format!("{} is no number", shown(field)));
    if let Some((first, rest)) = field.split_first().filter(|(first, _)| **first & 0x80 != 0) {
        // Negative numbers fit nowhere but in times.
        let low = (first & 0x7f != 0x7f).then_some(u64::from(first & 0x7f)).ok_or_else(bad)?;
        return rest.iter().try_fold(low, |sum, byte| {
            sum.checked_mul(256).map(|sum| sum | u64::from(*byte)).ok_or_else(bad)
        });
    }
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    let digits = field.get(..end).unwrap_or_default().trim_ascii();
    digits.iter().try_fold(0u64, |sum, digit| {
        let digit = (b'0'..=b'7').contains(digit).then(|| u64::from(digit - b'0')).ok_or_else(bad)?;
        sum.checked_mul(8).map(|sum| sum + digit).ok_or_else(bad)
    })
}

fn text(field: &[u8]) -> Vec<u8> {
    field.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
}

fn small(value: u64) -> io::Result<u32> {
    u32::try_from(value).map_err(|_| wrong(format!("{value} is too large")))
}

impl<R: Read> Archive<R> {
    /// The archive that begins here.
    pub fn new(stream: R) -> Self {
        Archive { stream, at: 0, left: 0, padding: 0 }
    }

    /// The stream, wherever it is.
    pub fn into_stream(self) -> R {
        self.stream
    }

    /// The next member; what was left of the one before is passed over by `skip`, which a stream that can be positioned does
    /// without reading.
    ///
    /// # Errors
    /// The stream's; `InvalidData` for what is no archive.
    pub fn next(&mut self, skip: impl Fn(&mut R, u64) -> io::Result<()>) -> io::Result<Option<Member>> {
        let mut extension = None;
        // An archive ends after a member, not after what was said of one.
        let end = |extension: Option<Extension>| extension.map_or(Ok(None), |_| Err(ended()));
        loop {
            skip(&mut self.stream, self.left)?;
            match skip(&mut self.stream, self.padding) {
                // Some tools leave out what comes after the last byte.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return end(extension),
                skipped => skipped?,
            }
            self.at += self.left + self.padding;
            (self.left, self.padding) = (0, 0);
            let Some(header) = self.header()? else { return end(extension) };
            if !is_header(&header) {
                return Err(wrong(format!("there is no header at byte {}", self.at - BLOCK as u64)));
            }
            let size = number(field(&header, 124, 12))?;
            let told = extension.get_or_insert_default();
            match header[156] {
                b'L' => told.path = Some(text(&self.body(size)?)),
                b'K' => told.target = Some(text(&self.body(size)?)),
                b'x' => told.read(&self.body(size)?)?,
                // For all members, which no tool writes anything into that matters; the name of a volume.
                b'g' | b'V' => drop(self.body(size)?),
                kind => return self.member(&header, kind, extension.unwrap_or_default()).map(Some),
            }
        }
    }

    /// The next header; `None` at the end: two blocks of zeros, or simply no more bytes.
    fn header(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut header = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.stream.read(&mut header[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(ended()),
                Ok(len) => filled += len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.at += BLOCK as u64;
        Ok((header != [0; BLOCK]).then_some(header))
    }

    /// The bytes of an extended header.
    fn body(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > HEADER_MAX {
            return Err(wrong(format!("an extended header of {size} bytes is too long")));
        }
        let mut body = Vec::new();
        (&mut self.stream).take(size).read_to_end(&mut body)?;
        if body.len() as u64 != size {
            return Err(ended());
        }
        self.at += size;
        self.padding = padding(size);
        Ok(body)
    }

    fn member(&mut self, header: &[u8; BLOCK], kind: u8, extension: Extension) -> io::Result<Member> {
        let mut path = extension.path.unwrap_or_else(|| {
            let name = text(field(header, 0, 100));
            // Only POSIX's own format has it: GNU's has times there.
            let prefix = text(field(header, 345, 155));
            let posix = field(header, 257, 6) == b"ustar\0" && !prefix.is_empty();
            if posix { [prefix.as_slice(), b"/", &name].concat() } else { name }
        });
        let kind = match kind {
            // Before POSIX directories had but a slash at their end.
            b'0' | 0 | b'7' if path.ends_with(b"/") => Type::Directory,
            b'0' | 0 | b'7' | b'S' => Type::File,
            b'1' => Type::HardLink,
            b'2' => Type::Link,
            b'3' => Type::Character,
            b'4' => Type::Block,
            b'5' => Type::Directory,
            b'6' => Type::Fifo,
            other => {
                let what = char::from(other).escape_debug();
                return Err(wrong(format!("{} is of the unknown kind `{what}`", shown(&path))));
            }
        };
        while path.len() > 1 && path.ends_with(b"/") {
            path.pop();
        }
        let size = match extension.size {
            Some(size) => size,
            None => number(field(header, 124, 12))?,
        };
        let numbers = |told: Option<u32>, at| told.map_or_else(|| small(number(field(header, at, 8))?), Ok);
        let device = matches!(kind, Type::Character | Type::Block);
        let mode = number(field(header, 100, 8))? & 0o7777;
        let mtime = i64::try_from(number(field(header, 136, 12)).unwrap_or(0)).unwrap_or(0);
        let mut member = Member {
            target: extension.target.unwrap_or_else(|| text(field(header, 157, 100))),
            kind,
            mode: u16::try_from(mode).unwrap_or(0),
            uid: numbers(extension.uid, 108)?,
            gid: numbers(extension.gid, 116)?,
            mtime: extension.mtime.unwrap_or((mtime, 0)),
            device: if device { (numbers(None, 329)?, numbers(None, 337)?) } else { (0, 0) },
            len: if kind == Type::File { size } else { 0 },
            attributes: extension.attributes,
            offset: self.at,
            pieces: None,
            path,
        };
        if header[156] == b'S' {
            member.pieces = Some(self.pieces(header, size)?);
            member.len = number(field(header, 483, 12))?;
            member.offset = self.at;
        }
        // Only files have content; a link may repeat the size of what it links to.
        (self.left, self.padding) = match kind {
            Type::File => (size, padding(size)),
            _ => (0, 0),
        };
        Ok(member)
    }

    /// The map of a sparse file in GNU's old form: four pieces in the header, 21 in each block that follows.
    fn pieces(&mut self, header: &[u8; BLOCK], size: u64) -> io::Result<Vec<(u64, u64)>> {
        let bad = |what: &str| wrong(format!("the map of a sparse file {what}"));
        let mut pieces = Vec::new();
        let mut read = |block: &[u8], count: usize, at: usize| {
            for place in (0..count).map(|piece| at + piece * 24) {
                let (offset, len) = (number(field(block, place, 12))?, number(field(block, place + 12, 12))?);
                if len > 0 {
                    pieces.push((offset, len));
                }
            }
            if pieces.len() > PIECES_MAX { Err(bad("is too long")) } else { Ok(()) }
        };
        read(header, 4, 386)?;
        let mut more = header[482] != 0;
        while more {
            let mut block = [0; BLOCK];
            self.stream.read_exact(&mut block).map_err(at_end)?;
            self.at += BLOCK as u64;
            read(&block, 21, 0)?;
            more = block[504] != 0;
        }
        let mut end = 0u64;
        for (offset, len) in &pieces {
            if *offset < end {
                return Err(bad("goes backwards"));
            }
            end = offset.checked_add(*len).ok_or_else(|| bad("has no end"))?;
        }
        let whole = pieces.iter().try_fold(0u64, |sum, (_, len)| sum.checked_add(*len));
        if whole != Some(size) || number(field(header, 483, 12))? < end {
            return Err(bad("does not add up"));
        }
        Ok(pieces)
    }

    /// The bytes of the current member, holes included.
    pub fn content<'a>(&'a mut self, member: &'a Member) -> Content<'a, R> {
        let whole = [(0, member.len)];
        let pieces = member.pieces.clone().unwrap_or_else(|| whole.to_vec());
        Content { archive: self, pieces: pieces.into_iter().collect(), at: 0, len: member.len }
    }
}

/// The bytes of a member.
pub struct Content<'a, R> {
    archive: &'a mut Archive<R>,
    pieces: std::collections::VecDeque<(u64, u64)>,
    at: u64,
    len: u64,
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        while self.pieces.front().is_some_and(|(offset, len)| offset + len <= self.at) {
            self.pieces.pop_front();
        }
        let (hole, until) = match self.pieces.front() {
            Some((offset, len)) if *offset <= self.at => (false, offset + len),
            Some((offset, _)) => (true, *offset),
            None => (true, self.len),
        };
        let most = usize::try_from(until.saturating_sub(self.at)).unwrap_or(usize::MAX).min(out.len());
        let out = out.get_mut(..most).unwrap_or_default();
        if out.is_empty() {
            return Ok(0);
        }
        let len = if hole {
            out.fill(0);
            out.len()
        } else {
            let len = self.archive.stream.read(out)?;
            if len == 0 {
                return Err(ended());
            }
            self.archive.at += len as u64;
            self.archive.left = self.archive.left.saturating_sub(len as u64);
            len
        };
        self.at += len as u64;
        Ok(len)
    }
}

/// Zeros after so many bytes.
fn padding(size: u64) -> u64 {
    (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64
}

/// The stream ends where it must not.
pub fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "it ends too early")
}

fn at_end(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::UnexpectedEof { ended() } else { error }
}

/// Passes over bytes of a stream by reading them.
///
/// # Errors
/// As the stream answers; it ends before.
pub fn read_over<R: Read>(stream: &mut R, count: u64) -> io::Result<()> {
    match io::copy(&mut stream.take(count), &mut io::sink())? {
        read if read == count => Ok(()),
        _ => Err(ended()),
    }
}

impl Extension {
    /// Reads records: `LENGTH KEYWORD=VALUE\n`, where the length is that of the whole record.
    fn read(&mut self, mut body: &[u8]) -> io::Result<()> {
        let bad = || wrong("an extended header is damaged");
        while !body.is_empty() {
            let space = body.iter().position(|byte| *byte == b' ').ok_or_else(bad)?;
            let len = decimal(body.get(..space).unwrap_or_default()).ok_or_else(bad)?;
            let len = usize::try_from(len).map_err(|_| bad())?;
            let record = body.get(space + 1..len).ok_or_else(bad)?;
            let record = record.strip_suffix(b"\n").ok_or_else(bad)?;
            body = body.get(len..).unwrap_or_default();
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(bad)?;
            let (key, value) = record.split_at(equals);
            self.set(key, value.get(1..).unwrap_or_default())?;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        let bad = || wrong(format!("{} of an extended header is {}", shown(key), shown(value)));
        let id = || decimal(value).and_then(|id| u32::try_from(id).ok()).ok_or_else(bad);
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.target = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value).ok_or_else(bad)?),
            b"uid" => self.uid = Some(id()?),
            b"gid" => self.gid = Some(id()?),
            b"mtime" => self.mtime = Some(time(value).ok_or_else(bad)?),
            _ if key.starts_with(b"GNU.sparse.") => {
                return Err(wrong(
                    "it has sparse files in pax form: make it with --format=gnu, or without --sparse",
                ));
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.attributes.insert(name.to_vec(), value.to_vec());
                }
            }
        }
        Ok(())
    }
}

fn decimal(digits: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(digits).ok()?;
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// Seconds with a fraction.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    // What is before the epoch counts backwards in the text, and forwards on disks.
    match whole.starts_with('-') && nanoseconds > 0 {
        true => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds)),
        false => Some((seconds, nanoseconds)),
    }
}
