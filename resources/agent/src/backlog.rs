//! Bytes on their way out.

/// So many written bytes are kept before the rest is moved to the front.
const CHUNK: usize = 256 << 10;

/// Bytes that wait to be written.
#[derive(Default)]
pub(crate) struct Backlog {
    bytes: Vec<u8>,
    written: usize,
}

impl Backlog {
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - self.written
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn front(&self) -> &[u8] {
        self.bytes.get(self.written..).unwrap_or_default()
    }

    pub(crate) fn back(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    pub(crate) fn shift(&mut self, n: usize) {
        self.written += n;
        if self.is_empty() || self.written > CHUNK {
            self.bytes.drain(..self.written);
            self.written = 0;
        }
    }
}
