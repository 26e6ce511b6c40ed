//! Compression of archives, told by how they begin.

use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use lzma_rust2::XzReader;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

use super::tar::{is_header, read_over};
use super::tree::wrong;

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;
/// Most memory for what has been unpacked and may be referred to: that of `zstd --ultra --long=27`, and of `xz -9`.
const WINDOW: u64 = 128 << 20;

/// How bytes are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Not at all: an archive.
    None,
    /// gzip, RFC 1952.
    Gzip,
    /// xz.
    Xz,
    /// Zstandard, RFC 8878.
    Zstd,
}

impl Packing {
    /// That of bytes which begin so; `Err` says what else they are.
    pub fn of(begin: &[u8]) -> Result<Packing, &'static str> {
        // A frame that is to be skipped may come first.
        let skipped = matches!(begin, [first, 0x2a, 0x4d, 0x18, ..] if first & 0xf0 == 0x50);
        match begin {
            [0x1f, 0x8b, ..] => Ok(Packing::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Ok(Packing::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Ok(Packing::Zstd),
            _ if skipped => Ok(Packing::Zstd),
            _ if is_header(begin) => Ok(Packing::None),
            // An archive of nothing.
            _ if begin.len() >= 512 && begin.iter().take(512).all(|byte| *byte == 0) => Ok(Packing::None),
            [] => Err("it is empty"),
            [b'B', b'Z', b'h', ..] => {
                Err("it is packed with bzip2, which is not read here: use gzip, xz or zstd")
            }
            _ => Err("it is no archive: not tar, and not packed with gzip, xz or zstd"),
        }
    }
}

/// The archive in a stream.
///
/// # Errors
/// The stream's; `InvalidData`: there is none.
pub fn open<'a>(stream: impl Read + 'a) -> io::Result<(Packing, Box<dyn Read + 'a>)> {
    let mut begin = Vec::new();
    let mut stream = stream;
    (&mut stream).take(512).read_to_end(&mut begin)?;
    let packing = Packing::of(&begin).map_err(wrong)?;
    let stream = BufReader::with_capacity(BUFFER, io::Cursor::new(begin).chain(stream));
    let kib = u32::try_from(WINDOW >> 10).unwrap_or(u32::MAX);
    Ok((
        packing,
        match packing {
            Packing::None => Box::new(stream),
            Packing::Gzip => Box::new(Damaged(MultiGzDecoder::new(stream))),
            Packing::Xz => Box::new(Damaged(XzReader::new_mem_limit(stream, true, kib))),
            Packing::Zstd => Box::new(Damaged(Zstd::new(stream))),
        },
    ))
}

/// A decoder; what it complains of is the data's fault, unless the host said it.
struct Damaged<R>(R);

impl<R: Read> Read for Damaged<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.0.read(out).map_err(|error| match error.raw_os_error() {
            Some(_) => error,
            None if error.kind() == io::ErrorKind::Interrupted => error,
            None => wrong(format!("it cannot be unpacked: {error}")),
        })
    }
}

/// All frames of a stream, one after the other.
struct Zstd<R> {
    stream: R,
    decoder: FrameDecoder,
    inside: bool,
}

impl<R: BufRead> Zstd<R> {
    fn new(stream: R) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(WINDOW);
        Zstd { stream, decoder, inside: false }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        loop {
            if !self.inside {
                if self.stream.fill_buf()?.is_empty() {
                    return Ok(0);
                }
                match self.decoder.init(&mut self.stream) {
                    Ok(()) => self.inside = true,
                    Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                        length,
                        ..
                    })) => read_over(&mut self.stream, u64::from(length))?,
                    Err(error) => return Err(io::Error::other(error)),
                }
                continue;
            }
            if self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                let blocks = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder.decode_blocks(&mut self.stream, blocks).map_err(io::Error::other)?;
            }
            match self.decoder.read(out)? {
                0 => self.inside = !self.decoder.is_finished(),
                len => return Ok(len),
            }
        }
    }
}
