//! Frames and their bytes. Decoding trusts nothing: every length is checked before it is used.

use std::fmt;

/// The version of the protocol that this code speaks.
pub const VERSION: u16 = 3;
/// The most data that one frame carries, in bytes.
pub const MAX_DATA: usize = 64 << 10;
/// The longest frame that a guest takes: an `exec` with the largest argument list that Linux allows.
pub const FROM_HOST: usize = 8 << 20;
/// The longest frame that a host takes. A guest is not trusted with more.
pub const FROM_GUEST: usize = MAX_DATA + 64;

const MAGIC: &[u8; 6] = b"mayfly";

/// One of the three streams of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stream {
    /// Standard input, from host to guest.
    Stdin = 0,
    /// Standard output, from guest to host.
    Stdout = 1,
    /// Standard error, from guest to host.
    Stderr = 2,
}

/// The size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// A program to start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exec {
    /// The program and its arguments; the program is searched for in the `PATH` of `env`.
    pub argv: Vec<Vec<u8>>,
    /// The whole environment; with a user, `HOME` is added if it is missing.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// The directory to start in.
    pub directory: Vec<u8>,
    /// `USER[:GROUP]`, each a name or a number; the server's own if it is empty.
    pub user: Vec<u8>,
    /// Give it a terminal of this size, and make that its controlling one, instead of three pipes.
    pub terminal: Option<Size>,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It exited with this code.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
    /// It never ran: executing it failed with this `errno`.
    NoProgram(i32),
    /// It never ran: entering its directory failed with this `errno`.
    NoDirectory(i32),
    /// It never ran: the guest knows no such user or group.
    NoUser,
}

impl Outcome {
    /// The exit code by which a shell tells of such an end.
    pub fn code(self) -> u8 {
        match self {
            Outcome::Code(code) => code,
            Outcome::Signal(signal) => signal.saturating_add(128),
            Outcome::NoProgram(errno) if errno == rustix::io::Errno::NOENT.raw_os_error() => 127,
            Outcome::NoProgram(_) | Outcome::NoDirectory(_) | Outcome::NoUser => 126,
        }
    }
}

/// What is said over the wire; the table in the [crate documentation](crate) tells who says it when.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of the table")]
pub enum Frame {
    Hello { version: u16 },
    Exec { id: u32, exec: Exec },
    Data { id: u32, stream: Stream, bytes: Vec<u8> },
    End { id: u32, stream: Stream },
    Stop { id: u32, stream: Stream },
    Credit { id: u32, stream: Stream, bytes: u32 },
    Resize { id: u32, size: Size },
    Signal { id: u32, number: u8 },
    Exit { id: u32, outcome: Outcome },
    Shutdown,
    Clock { seconds: u64, nanoseconds: u32 },
    Message(Message),
    Trouble { text: Vec<u8> },
    Call,
}

/// What the guest's kernel has said, and it alone: what programs write to its log is none of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// How grave it is: 0 (emergency) to 7 (debugging).
    pub level: u8,
    /// When, in microseconds from the kernel's start.
    pub time: u64,
    /// One line.
    pub text: Vec<u8>,
}

/// The other end broke a rule of the protocol; the text says which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Malformed {}

impl From<Malformed> for std::io::Error {
    fn from(broken: Malformed) -> Self {
        std::io::Error::new(std::io::ErrorKind::InvalidData, broken)
    }
}

impl Frame {
    /// Appends the frame's bytes to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        self.encode_body(out);
        let length = u32::try_from(out.len() - start - 4).unwrap_or(u32::MAX);
        if let Some(place) = out.get_mut(start..start + 4) {
            place.copy_from_slice(&length.to_le_bytes());
        }
    }

    fn encode_body(&self, out: &mut Vec<u8>) {
        let head = |out: &mut Vec<u8>, kind: u8, id: u32| {
            out.push(kind);
            out.extend_from_slice(&id.to_le_bytes());
        };
        match self {
            Frame::Hello { version } => {
                out.push(1);
                out.extend_from_slice(MAGIC);
                out.extend_from_slice(&version.to_le_bytes());
            }
            Frame::Exec { id, exec } => {
                head(out, 2, *id);
                exec.encode(out);
            }
            Frame::Data { id, stream, bytes } => {
                head(out, 3, *id);
                out.push(*stream as u8);
                put_string(out, bytes);
            }
            Frame::End { id, stream } => {
                head(out, 4, *id);
                out.push(*stream as u8);
            }
            Frame::Stop { id, stream } => {
                head(out, 5, *id);
                out.push(*stream as u8);
            }
            Frame::Credit { id, stream, bytes } => {
                head(out, 6, *id);
                out.push(*stream as u8);
                out.extend_from_slice(&bytes.to_le_bytes());
            }
            Frame::Resize { id, size } => {
                head(out, 7, *id);
                size.encode(out);
            }
            Frame::Signal { id, number } => {
                head(out, 8, *id);
                out.push(*number);
            }
            Frame::Exit { id, outcome } => {
                head(out, 9, *id);
                let (kind, value) = match *outcome {
                    Outcome::Code(code) => (0, i32::from(code)),
                    Outcome::Signal(signal) => (1, i32::from(signal)),
                    Outcome::NoProgram(errno) => (2, errno),
                    Outcome::NoDirectory(errno) => (3, errno),
                    Outcome::NoUser => (4, 0),
                };
                out.push(kind);
                out.extend_from_slice(&value.to_le_bytes());
            }
            Frame::Shutdown => out.push(10),
            Frame::Clock { seconds, nanoseconds } => {
                out.push(11);
                out.extend_from_slice(&seconds.to_le_bytes());
                out.extend_from_slice(&nanoseconds.to_le_bytes());
            }
            Frame::Message(message) => {
                out.extend_from_slice(&[12, message.level]);
                out.extend_from_slice(&message.time.to_le_bytes());
                put_string(out, &message.text);
            }
            Frame::Trouble { text } => {
                out.push(13);
                put_string(out, text);
            }
            Frame::Call => out.push(14),
        }
    }

    /// Reads the frame that `bytes` begins with and the number of bytes it takes; `None` if it is not complete.
    ///
    /// # Errors
    /// The bytes are not a frame, or one that is longer than `limit`.
    pub fn decode(bytes: &[u8], limit: usize) -> Result<Option<(Frame, usize)>, Malformed> {
        let Some((length, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        if length > limit {
            return Err(Malformed("a frame is too long"));
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let mut body = Body(body);
        let frame = Frame::decode_body(&mut body)?;
        if !body.0.is_empty() {
            return Err(Malformed("a frame has bytes left over"));
        }
        Ok(Some((frame, length + 4)))
    }

    fn decode_body(body: &mut Body<'_>) -> Result<Frame, Malformed> {
        let kind = body.byte()?;
        if let 1 | 10.. = kind {
            return Frame::decode_general(kind, body);
        }
        let id = body.word()?;
        Ok(match kind {
            2 => Frame::Exec { id, exec: Exec::decode(body)? },
            3 => {
                let (stream, bytes) = (body.stream()?, body.string()?);
                if bytes.len() > MAX_DATA {
                    return Err(Malformed("a data frame is too long"));
                }
                Frame::Data { id, stream, bytes: bytes.to_vec() }
            }
            4 => Frame::End { id, stream: body.stream()? },
            5 => Frame::Stop { id, stream: body.stream()? },
            6 => Frame::Credit { id, stream: body.stream()?, bytes: body.word()? },
            7 => Frame::Resize { id, size: Size::decode(body)? },
            8 => Frame::Signal { id, number: body.byte()? },
            9 => {
                let (kind, value) = (body.byte()?, i32::from_le_bytes(body.array()?));
                let small = u8::try_from(value).map_err(|_| Malformed("an exit code is out of range"));
                let outcome = match kind {
                    0 => Outcome::Code(small?),
                    1 => Outcome::Signal(small?),
                    2 => Outcome::NoProgram(value),
                    3 => Outcome::NoDirectory(value),
                    4 => Outcome::NoUser,
                    _ => return Err(Malformed("an outcome is of an unknown kind")),
                };
                Frame::Exit { id, outcome }
            }
            _ => return Err(Malformed("a frame is of an unknown kind")),
        })
    }
}

impl Frame {
    /// Reads the rest of a frame that concerns no program.
    fn decode_general(kind: u8, body: &mut Body<'_>) -> Result<Frame, Malformed> {
        Ok(match kind {
            1 => {
                if body.array::<6>()? != *MAGIC {
                    return Err(Malformed("the other end does not speak this protocol"));
                }
                Frame::Hello { version: body.half()? }
            }
            10 => Frame::Shutdown,
            11 => Frame::Clock { seconds: body.long()?, nanoseconds: body.word()? },
            12 => {
                let (level, time) = (body.byte()?, body.long()?);
                Frame::Message(Message { level, time, text: body.string()?.to_vec() })
            }
            13 => Frame::Trouble { text: body.string()?.to_vec() },
            14 => Frame::Call,
            _ => return Err(Malformed("a frame is of an unknown kind")),
        })
    }
}

impl Exec {
    fn encode(&self, out: &mut Vec<u8>) {
        put_number(out, self.argv.len());
        for word in &self.argv {
            put_string(out, word);
        }
        put_number(out, self.env.len());
        for (name, value) in &self.env {
            put_string(out, name);
            put_string(out, value);
        }
        put_string(out, &self.directory);
        put_string(out, &self.user);
        out.push(u8::from(self.terminal.is_some()));
        if let Some(size) = self.terminal {
            size.encode(out);
        }
    }

    fn decode(body: &mut Body<'_>) -> Result<Exec, Malformed> {
        let argv = body.list(|body| Ok(body.string()?.to_vec()))?;
        if argv.is_empty() {
            return Err(Malformed("a program has no name"));
        }
        Ok(Exec {
            argv,
            env: body.list(|body| Ok((body.string()?.to_vec(), body.string()?.to_vec())))?,
            directory: body.string()?.to_vec(),
            user: body.string()?.to_vec(),
            terminal: body.option(Size::decode)?,
        })
    }
}

impl Size {
    fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.rows.to_le_bytes());
        out.extend_from_slice(&self.columns.to_le_bytes());
    }

    fn decode(body: &mut Body<'_>) -> Result<Size, Malformed> {
        Ok(Size { rows: body.half()?, columns: body.half()? })
    }
}

pub(crate) fn put_number(out: &mut Vec<u8>, number: usize) {
    out.extend_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_le_bytes());
}

pub(crate) fn put_string(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len());
    out.extend_from_slice(bytes);
}

/// The part of a frame that is not read yet.
pub(crate) struct Body<'a>(pub(crate) &'a [u8]);

impl<'a> Body<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Malformed("a frame is too short"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn byte(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_le_bytes)
    }

    fn half(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn word(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    fn long(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn string(&mut self) -> Result<&'a [u8], Malformed> {
        let length = self.word()?;
        self.take(usize::try_from(length).unwrap_or(usize::MAX))
    }

    fn stream(&mut self) -> Result<Stream, Malformed> {
        match self.byte()? {
            0 => Ok(Stream::Stdin),
            1 => Ok(Stream::Stdout),
            2 => Ok(Stream::Stderr),
            _ => Err(Malformed("a stream is neither stdin nor stdout nor stderr")),
        }
    }

    fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Option<T>, Malformed> {
        match self.byte()? {
            0 => Ok(None),
            1 => read(self).map(Some),
            _ => Err(Malformed("an option is neither there nor absent")),
        }
    }

    pub(crate) fn list<T>(
        &mut self,
        read: impl Fn(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Vec<T>, Malformed> {
        let count = self.word()?;
        // Grown as items are found: the count alone reserves nothing, and each item takes four bytes or more.
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(read(self)?);
        }
        Ok(list)
    }
}

/// Collects bytes until they make frames.
#[derive(Debug)]
pub struct Decoder {
    bytes: Vec<u8>,
    start: usize,
    limit: usize,
}

impl Decoder {
    /// A decoder that takes frames of up to `limit` bytes: [`FROM_HOST`] or [`FROM_GUEST`].
    pub fn new(limit: usize) -> Self {
        Decoder { bytes: Vec::new(), start: 0, limit }
    }

    /// Adds bytes as they arrived.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next complete frame.
    ///
    /// # Errors
    /// The bytes are not a frame; so will the rest be.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, Malformed> {
        let rest = self.bytes.get(self.start..).unwrap_or_default();
        Ok(Frame::decode(rest, self.limit)?.map(|(frame, length)| {
            self.start += length;
            frame
        }))
    }
}

#[cfg(test)]
mod tests;
