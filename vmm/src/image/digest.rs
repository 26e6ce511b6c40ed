//! Digests: names of bytes that only they have. OCI image specification, "Digests".

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use super::tree::wrong;

/// A SHA-256 digest: `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// That of bytes.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    /// Its bytes.
    pub fn bytes(self) -> [u8; 32] {
        self.0
    }

    /// Its digits.
    pub fn hex(self) -> String {
        use fmt::Write;
        self.0.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    /// The one with these digits.
    pub fn from_hex(hex: &str) -> Option<Digest> {
        let digit = |digit: u8| match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        };
        let mut bytes = [0; 32];
        if hex.len() != 2 * bytes.len() {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            *byte = digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?;
        }
        Some(Digest(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl FromStr for Digest {
    type Err = String;
    fn from_str(text: &str) -> Result<Digest, String> {
        text.strip_prefix("sha256:").and_then(Digest::from_hex).ok_or_else(|| {
            format!("{} is no digest: sha256: and 64 digits", super::tree::shown(text.as_bytes()))
        })
    }
}

/// A stream whose bytes are counted and digested as they are read.
pub struct Digesting<R> {
    stream: R,
    sum: Sha256,
    count: u64,
}

impl<R: Read> Digesting<R> {
    /// Begins here.
    pub fn new(stream: R) -> Self {
        Digesting { stream, sum: Sha256::new(), count: 0 }
    }

    /// Reads what is left, and tells the digest and the number of bytes.
    ///
    /// # Errors
    /// The stream's.
    pub fn finish(mut self) -> io::Result<(Digest, u64)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((Digest(self.sum.finalize().into()), self.count))
    }

    /// As [`Digesting::finish`]; the bytes have to be those that were promised.
    ///
    /// # Errors
    /// The stream's; `InvalidData`: they are not.
    pub fn verify(self, promised: Option<Digest>, size: Option<u64>) -> io::Result<()> {
        let (found, count) = self.finish()?;
        match (size, promised) {
            (Some(size), _) if size != count => {
                Err(wrong(format!("it has {count} bytes, and {size} were promised")))
            }
            (_, Some(promised)) if promised != found => {
                Err(wrong(format!("its digest is {found}, and {promised} was promised")))
            }
            _ => Ok(()),
        }
    }
}

impl<R: Read> Read for Digesting<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let len = self.stream.read(out)?;
        self.sum.update(out.get(..len).unwrap_or_default());
        self.count += len as u64;
        Ok(len)
    }
}
