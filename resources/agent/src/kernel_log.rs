//! What the kernel says: its log, without the lines that programs have written into it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::io::Errno;

use crate::wire::Message;

/// Longest record that the kernel gives (`PRINTK_MESSAGE_MAX`).
const LONGEST: usize = 2048;

/// The kernel's log, from its first line.
pub(crate) struct KernelLog(OwnedFd);

impl KernelLog {
    /// Opens it.
    pub(crate) fn open() -> io::Result<KernelLog> {
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        Ok(KernelLog(File::options().read(true).custom_flags(flags).open("/dev/kmsg")?.into()))
    }

    /// The next message of the kernel's own; `None` if there is none now.
    pub(crate) fn take(&mut self) -> Option<Message> {
        let mut record = [0; LONGEST];
        loop {
            match rustix::io::read(&self.0, &mut record) {
                Ok(0) => return None,
                Ok(n) => {
                    if let Some(message) = record.get(..n).and_then(parse) {
                        return Some(message);
                    }
                }
                // Older records were overwritten before they were read: the next read goes on after them.
                Err(Errno::PIPE | Errno::INTR) => {}
                Err(_) => return None,
            }
        }
    }
}

#[cfg(test)]
impl From<OwnedFd> for KernelLog {
    fn from(fd: OwnedFd) -> KernelLog {
        KernelLog(fd)
    }
}

impl AsFd for KernelLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A record (Linux, Documentation/ABI/testing/dev-kmsg): `priority,number,microseconds,flags;text`, then lines that
/// begin with a space. The facility, the upper bits of the priority, is 0 for the kernel and cannot be for anybody else.
fn parse(record: &[u8]) -> Option<Message> {
    let line = record.split(|byte| *byte == b'\n').next()?;
    let at = line.iter().position(|byte| *byte == b';')?;
    let (head, text) = line.split_at_checked(at)?;
    let mut fields = std::str::from_utf8(head).ok()?.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let time = fields.nth(1)?.parse().ok()?;
    let level = u8::try_from(priority).ok().filter(|level| *level < 8)?;
    Some(Message { level, time, text: text.get(1..)?.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_the_kernel_are_read_and_others_are_not() {
        let message = parse(b"4,339,5140900,-;WARNING: CPU: 0; x\n SUBSYSTEM=acpi\n DEVICE=+a:b\n").unwrap();
        assert_eq!(message, Message { level: 4, time: 5_140_900, text: b"WARNING: CPU: 0; x".to_vec() });
        // What `echo 'BUG: x' >/dev/kmsg` becomes: facility 1.
        assert_eq!(parse(b"12,340,5140901,-;BUG: x\n"), None);
        for nonsense in [&b""[..], b"\n", b"x,1,2,-;a", b"4,1;a", b"4,1,2,-"] {
            assert_eq!(parse(nonsense), None, "{nonsense:?}");
        }
    }
}
