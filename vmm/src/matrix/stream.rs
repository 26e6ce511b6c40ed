//! The output of a cell: its end is kept in memory, all of it in a file where one is wanted.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use base::{Doing, Result, Why};

/// What is kept.
const TAIL: usize = 64 << 10;

/// A pipe, read as far as something is in it.
pub struct Stream {
    pipe: Option<File>,
    tail: Vec<u8>,
    file: Option<File>,
}

impl Stream {
    /// Reads from a pipe.
    ///
    /// # Errors
    /// The host refuses.
    pub fn new(pipe: OwnedFd, file: Option<File>) -> Result<Stream> {
        rustix::io::ioctl_fionbio(&pipe, true).doing(Why::Host, || "read the output of a run")?;
        Ok(Stream { pipe: Some(pipe.into()), tail: Vec::new(), file })
    }

    /// The pipe, while it is open.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// Takes what is there; a file that cannot be written any more is given up, and that is told.
    ///
    /// # Errors
    /// The file could not be written.
    pub fn take(&mut self) -> Result<()> {
        let mut buffer = [0; 1 << 16];
        // As much as a full pipe has: the others wait for their turn.
        let Some(pipe) = &mut self.pipe else { return Ok(()) };
        match pipe.read(&mut buffer) {
            Ok(0) => self.pipe = None,
            Ok(n) => {
                let new = buffer.get(..n).unwrap_or_default();
                self.tail.extend(new);
                // Not each time: what is in front would be moved as often.
                if self.tail.len() > 2 * TAIL {
                    self.tail.drain(..self.tail.len() - TAIL);
                }
                let written = self.file.as_mut().map_or(Ok(()), |file| file.write_all(new));
                if written.is_err() {
                    self.file = None;
                }
                return written.doing(Why::Host, || "write the log of a run");
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.pipe = None,
        }
        Ok(())
    }

    /// Takes all that is there now, and closes the pipe: whoever has it still says nothing that counts.
    ///
    /// # Errors
    /// As [`Stream::take`].
    pub fn finish(&mut self) -> Result<()> {
        // Another process may write as fast as this one reads: a full pipe and a little more, then it is enough.
        let rounds = (0..32).try_for_each(|_| self.take());
        self.pipe = None;
        rounds
    }

    /// The end of what came.
    pub fn tail(&self) -> &[u8] {
        let from = self.tail.len().saturating_sub(TAIL);
        self.tail.get(from..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::pipe;

    #[test]
    fn the_end_is_kept_and_all_of_it_is_in_the_file() {
        let (read, write) = pipe().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut stream = Stream::new(read, Some(file.reopen().unwrap())).unwrap();
        stream.take().unwrap();
        assert!(stream.fd().is_some() && stream.tail().is_empty(), "nothing is there, and nobody waits");
        let mut write = File::from(write);
        for block in 0..10u8 {
            write.write_all(&[block; 30_000]).unwrap();
            stream.take().unwrap();
        }
        assert_eq!(stream.tail().len(), TAIL);
        assert!(stream.tail().ends_with(&[9; 30_000]));
        assert_eq!(file.as_file().metadata().unwrap().len(), 300_000);
        write.write_all(b"end").unwrap();
        stream.finish().unwrap();
        assert!(stream.fd().is_none() && stream.tail().ends_with(b"end"), "whoever holds it, it is over");
    }

    #[test]
    fn a_file_that_is_full_is_told_once() {
        let (read, write) = pipe().unwrap();
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut stream = Stream::new(read, Some(full)).unwrap();
        let mut write = File::from(write);
        write.write_all(b"a").unwrap();
        assert!(stream.take().unwrap_err().summary().starts_with("write the log of a run: No space"));
        write.write_all(b"b").unwrap();
        stream.take().unwrap();
        assert_eq!(stream.tail(), b"ab");
    }
}
