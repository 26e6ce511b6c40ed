//! A record of all frames in the classic pcap format, for Wireshark and tcpdump.

use std::fs::File;
use std::io::Write;
use std::time::Duration;

/// Bytes kept of a frame.
const SNAP: usize = 65_535;
/// Bytes that may wait for a slow reader of a pipe.
const WAITING: usize = 4 << 20;
/// Bytes of a record in all: a guest that talks without end does not fill the host's disk.
const MOST: u64 = 4 << 30;

/// The file that frames are recorded in.
pub struct Pcap {
    file: File,
    name: String,
    waiting: Vec<u8>,
    written: u64,
    closed: bool,
}

impl Pcap {
    /// Begins a record; `name` is the device's, for messages.
    pub fn new(file: File, name: &str) -> Pcap {
        let mut waiting = Vec::new();
        // Magic number of microseconds, version 2.4, zone, accuracy, snap length, Ethernet.
        for word in [0xa1b2_c3d4, 0x0004_0002, 0, 0, 65_535, 1u32] {
            waiting.extend(word.to_le_bytes());
        }
        let mut pcap = Pcap { file, name: name.to_owned(), waiting, written: 0, closed: false };
        pcap.flush();
        pcap
    }

    /// Records a frame of `len` bytes that `read` copies from offset 0 on, seen at `wall`.
    pub fn record(&mut self, wall: Duration, len: usize, read: impl FnOnce(&mut [u8])) {
        let kept = len.min(SNAP);
        if self.closed || self.waiting.len().saturating_add(kept) > WAITING {
            return;
        }
        let number = |n: u64| u32::try_from(n & 0xffff_ffff).unwrap_or(0).to_le_bytes();
        self.waiting.extend(number(wall.as_secs()));
        self.waiting.extend(wall.subsec_micros().to_le_bytes());
        self.waiting.extend(number(kept as u64));
        self.waiting.extend(number(len as u64));
        let at = self.waiting.len();
        self.waiting.resize(at.saturating_add(kept), 0);
        if let Some(room) = self.waiting.get_mut(at..) {
            read(room);
        }
    }

    /// Writes what has been recorded.
    pub fn flush(&mut self) {
        let mut done = 0usize;
        while let Some(rest) = self.waiting.get(done..).filter(|rest| !rest.is_empty() && !self.closed) {
            match self.file.write(rest) {
                Ok(len) => done = done.saturating_add(len),
                Err(cause) if cause.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(cause) if cause.kind() == std::io::ErrorKind::Interrupted => {}
                Err(cause) => self.close(&cause.to_string()),
            }
        }
        self.waiting.drain(..done.min(self.waiting.len()));
        self.written = self.written.saturating_add(done as u64);
        if self.written > MOST && !self.closed {
            self.close("it has grown to 4 GiB");
        }
    }

    fn close(&mut self, why: &str) {
        log::warn!(target: "guest", "{}: the record of frames ends: {why}", self.name);
        self.closed = true;
        self.waiting = Vec::new();
    }
}
