//! What is packed inside a bzImage, and how it is unpacked on the host.
//!
//! A guest that unpacks itself spends about a tenth of its boot on it, and cannot use both processors.

use std::io::Read;
use std::sync::Mutex;
use std::thread;

use base::sys::scratch::Scratch;
use serde::Serialize;

use super::Claim;

/// Largest kernel that is unpacked: a bound on what a lying size field can ask for.
const MAX_UNPACKED: u32 = 1 << 30;
/// Largest dictionary or window a decoder may allocate, in bytes; `zstd --ultra -22` asks for 128 MiB.
const MAX_WINDOW: u32 = 256 << 20;
/// Uncompressed length of every block of the legacy LZ4 format but the last.
const LZ4_BLOCK: usize = 8 << 20;
const LZ4_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// Enough to unpack a kernel as fast as memory allows.
const MAX_THREADS: usize = 4;

/// How a kernel's payload is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Deflate.
    Gzip,
    /// LZMA2, usually after the x86 branch filter.
    Xz,
    /// LZ4 in its legacy frame.
    Lz4,
    /// Zstandard.
    Zstd,
    /// bzip2: the guest unpacks it.
    Bzip2,
    /// LZMA: the guest unpacks it.
    Lzma,
    /// LZO: the guest unpacks it.
    Lzo,
    /// None that is known: the guest unpacks it.
    Unknown,
}

impl Compression {
    /// Recognises a payload by its first bytes.
    pub fn recognise(payload: &[u8]) -> Compression {
        let magics: [(&[u8], Compression); 7] = [
            (&[0x1f, 0x8b], Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (&LZ4_MAGIC, Compression::Lz4),
            (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
            (b"BZh", Compression::Bzip2),
            (&[0x5d, 0, 0], Compression::Lzma),
            (b"\x89LZO", Compression::Lzo),
        ];
        magics.iter().find(|(magic, _)| payload.starts_with(magic)).map_or(Compression::Unknown, |(_, c)| *c)
    }

    /// Whether the host can unpack it.
    pub fn unpacks(self) -> bool {
        matches!(self, Compression::Gzip | Compression::Xz | Compression::Lz4 | Compression::Zstd)
    }

    /// Its usual name.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Gzip => "gzip",
            Compression::Xz => "xz",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
            Compression::Bzip2 => "bzip2",
            Compression::Lzma => "lzma",
            Compression::Lzo => "lzo",
            Compression::Unknown => "unknown compression",
        }
    }
}

/// Unpacks a payload. Its last four bytes are the unpacked length, as the kernel's build appends them.
pub fn unpack(compression: Compression, payload: &[u8]) -> Claim<Scratch> {
    let (packed, size) = payload.split_last_chunk::<4>().ok_or("its payload is truncated")?;
    let size = u32::from_le_bytes(*size);
    if size > MAX_UNPACKED {
        return Err(format!("its payload claims to unpack to {} MiB", size >> 20));
    }
    let broken = |error: String| format!("its {} payload is corrupt: {error}", compression.name());
    let len = usize::try_from(size).map_err(|error| error.to_string())?;
    let mut unpacked = Scratch::new(len).map_err(|error| error.to_string())?;
    let out = unpacked.as_mut_slice();
    match compression {
        // The size is part of the format: the CRC and length of RFC 1952 end the member.
        Compression::Gzip => read(flate2::bufread::GzDecoder::new(payload), out),
        Compression::Xz => read(lzma_rust2::XzReader::new_mem_limit(packed, false, MAX_WINDOW >> 10), out),
        Compression::Lz4 => lz4(packed, out),
        Compression::Zstd => zstd(packed, out),
        other => Err(format!("{} is left to the guest", other.name())),
    }
    .map_err(broken)?;
    Ok(unpacked)
}

/// Fills `out` and sees to it that the stream ends there, which is when decoders compare checksums.
fn read(mut decoder: impl Read, out: &mut [u8]) -> Claim<()> {
    decoder.read_exact(out).map_err(|error| error.to_string())?;
    match decoder.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err("it is longer than it says".into()),
        Err(error) => Err(error.to_string()),
    }
}

fn zstd(packed: &[u8], out: &mut [u8]) -> Claim<()> {
    let mut decoder = ruzstd::decoding::FrameDecoder::new();
    decoder.set_max_window_size(u64::from(MAX_WINDOW));
    let expected = out.len();
    match decoder.decode_all(packed, out) {
        Ok(len) if len == expected => Ok(()),
        Ok(len) => Err(format!("it unpacks to {len} bytes, not to {expected}")),
        Err(error) => Err(error.to_string()),
    }
}

/// The legacy LZ4 format: independent blocks, so several threads unpack at once.
fn lz4(packed: &[u8], out: &mut [u8]) -> Claim<()> {
    let expected = out.len().div_ceil(LZ4_BLOCK);
    let blocks = lz4_blocks(packed, expected)?;
    let threads = thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS).min(expected);
    let work = Mutex::new(blocks.into_iter().zip(out.chunks_mut(LZ4_BLOCK)));
    let run = || -> Claim<()> {
        loop {
            // A poisoned lock only means that another thread is about to report its failure.
            let next = work.lock().map_err(|_| "a decoder panicked")?.next();
            let Some((block, out)) = next else { return Ok(()) };
            let len = lz4_flex::block::decompress_into(block, out).map_err(|error| error.to_string())?;
            if len != out.len() {
                return Err(format!("a block unpacks to {len} bytes, not to {}", out.len()));
            }
        }
    };
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let own = run();
        others
            .into_iter()
            .map(|other| other.join().unwrap_or(Err("a decoder panicked".into())))
            .fold(own, Result::and)
    })
}

fn lz4_blocks(packed: &[u8], expected: usize) -> Claim<Vec<&[u8]>> {
    let mut rest = packed.strip_prefix(&LZ4_MAGIC).ok_or("it is not in the legacy frame")?;
    let mut blocks = Vec::new();
    while let Some((len, after)) = rest.split_first_chunk::<4>()
        && blocks.len() <= expected
    {
        let len = usize::try_from(u32::from_le_bytes(*len)).map_err(|error| error.to_string())?;
        let (block, next) = after.split_at_checked(len).ok_or("a block goes beyond its end")?;
        blocks.push(block);
        rest = next;
    }
    match (blocks.len() == expected, rest) {
        (true, []) => Ok(blocks),
        _ => Err(format!("it has not the {expected} blocks that its length asks for")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Forty repetitions of a sentence through the x86 branch filter and LZMA2, made with liblzma.
    const XZ: &str = "fd377a585a0000016922de360201040021010800d2b974cbe0034700205d0036984b98fdc28f9c9ab291ae79201a5a\
        d689fc4bb4e69ba5366648a36cc32f6000b5050a26000138c806000000dbad72d73e300d8b020000000001595a";

    #[test]
    fn unpacks_xz_with_its_branch_filter() {
        let digits: Vec<char> = XZ.chars().collect();
        let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16).unwrap();
        let mut packed: Vec<u8> = digits.chunks(2).map(byte).collect();
        packed.extend(840u32.to_le_bytes());
        assert_eq!(Compression::recognise(&packed), Compression::Xz);
        let unpacked = unpack(Compression::Xz, &packed).unwrap();
        assert_eq!(unpacked.as_slice(), "mayfly unpacks this. ".repeat(40).as_bytes());
        if let Some(byte) = packed.get_mut(50) {
            *byte ^= 1;
        }
        assert!(unpack(Compression::Xz, &packed).unwrap_err().contains("its xz payload is corrupt"));
    }

    #[test]
    fn unpacks_lz4_blocks_in_parallel() {
        let content: Vec<u8> = (0..20_000_000u32).map(|n| u8::try_from(n / 777 % 251).unwrap()).collect();
        let mut packed = LZ4_MAGIC.to_vec();
        for block in content.chunks(LZ4_BLOCK) {
            let block = lz4_flex::block::compress(block);
            packed.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            packed.extend(block);
        }
        packed.extend(20_000_000u32.to_le_bytes());
        assert!(unpack(Compression::Lz4, &packed).unwrap().as_slice() == content);
    }
}
