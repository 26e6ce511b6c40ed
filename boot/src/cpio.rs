//! Writes cpio archives in the form that Linux unpacks as an initramfs: newc
//! (`Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Owner is root and every time is zero, so that the same content gives the same bytes.

use base::{Fail, Result, Why};

const MAGIC: &str = "070701";
const TRAILER: &str = "TRAILER!!!";
const ALIGN: usize = 4;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;
const BLOCK: u32 = 0o060_000;

/// The two kinds of device nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// A character device.
    Character,
    /// A block device.
    Block,
}

/// An archive being written. Parents of an entry are to be added before it.
#[derive(Clone, Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Archive {
        Archive::default()
    }

    /// Adds a directory; `mode` has the permission bits.
    ///
    /// # Errors
    /// The path is empty or has a zero byte.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        self.entry(path, DIRECTORY | mode, (0, 0), &[])
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// As [`Archive::directory`], or the content is larger than the format can say (4 GiB).
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(path, REGULAR | mode, (0, 0), content)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// As [`Archive::directory`].
    pub fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.entry(path, SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a device node with its major and minor number.
    ///
    /// # Errors
    /// As [`Archive::directory`].
    pub fn node(&mut self, path: &str, kind: Node, mode: u32, device: (u32, u32)) -> Result<()> {
        let kind = match kind {
            Node::Character => CHARACTER,
            Node::Block => BLOCK,
        };
        self.entry(path, kind | mode, device, &[])
    }

    /// The archive, complete.
    pub fn finish(mut self) -> Vec<u8> {
        self.header(TRAILER, 0, 0, (0, 0), 0);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<()> {
        let fail = |cause: &'static str| Fail::new(Why::Invalid, format!("archive {path:?}")).because(cause);
        // The kernel takes names as they are, from its root.
        let path = path.trim_start_matches('/');
        if path.is_empty() || path.contains('\0') {
            return Err(fail("it is not a path"));
        }
        let len = u32::try_from(content.len()).map_err(|_| fail("it is larger than 4 GiB"))?;
        self.entries = self.entries.saturating_add(1);
        let ino = self.entries;
        self.header(path, ino, mode, device, len);
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn header(&mut self, path: &str, ino: u32, mode: u32, device: (u32, u32), len: u32) {
        let links = 1 + u32::from(mode & DIRECTORY == DIRECTORY && mode & REGULAR == 0);
        let (major, minor) = device;
        let name_len = u32::try_from(path.len().saturating_add(1)).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(MAGIC.as_bytes());
        // ino, mode, uid, gid, nlink, mtime, filesize, dev major and minor, rdev major and minor, namesize, check
        for field in [ino, mode, 0, 0, links, 0, len, 0, 0, major, minor, name_len, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut archive = Archive::new();
        archive.directory("dev", 0o755).unwrap();
        archive.node("/dev/console", Node::Character, 0o600, (5, 1)).unwrap();
        archive.node("dev/vda", Node::Block, 0o660, (254, 0)).unwrap();
        archive.file("init", 0o755, b"#!/bin/sh\n").unwrap();
        archive.symlink("sh", "init").unwrap();
        archive.finish()
    }

    /// Name, mode, device and content.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    /// Each entry, as the kernel's unpacker finds them.
    fn unpack(mut bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |at: usize| {
                u32::from_str_radix(std::str::from_utf8(&bytes[6 + 8 * at..14 + 8 * at]).unwrap(), 16)
                    .unwrap()
            };
            let (mode, len, device, name_len) =
                (field(1), field(6) as usize, (field(9), field(10)), field(11) as usize);
            assert_eq!((field(2), field(3), field(5)), (0, 0, 0), "owner and time");
            let name = String::from_utf8(bytes[110..110 + name_len - 1].to_vec()).unwrap();
            let at = (110 + name_len).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(bytes.len(), at);
                return entries;
            }
            entries.push((name, mode, device, bytes[at..at + len].to_vec()));
            bytes = &bytes[(at + len).next_multiple_of(4)..];
        }
    }

    #[test]
    fn unpacks_to_what_went_in() {
        let entry = |name: &str, mode, device, content: &str| (name.to_owned(), mode, device, content.into());
        assert_eq!(
            unpack(&sample()),
            [
                entry("dev", 0o040_755, (0, 0), ""),
                entry("dev/console", 0o020_600, (5, 1), ""),
                entry("dev/vda", 0o060_660, (254, 0), ""),
                entry("init", 0o100_755, (0, 0), "#!/bin/sh\n"),
                entry("sh", 0o120_777, (0, 0), "init"),
            ]
        );
        for bad in ["", "/", "a\0b"] {
            assert!(Archive::new().file(bad, 0o644, b"").is_err(), "{bad:?}");
        }
    }

    /// What another implementation makes of it.
    #[test]
    fn cpio_reads_it() {
        use std::io::Write;
        use std::process::{Command, Stdio};
        let mut command = Command::new("cpio");
        let spawned =
            command.arg("-itv").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let Ok(mut child) = spawned else {
            println!("skipped: there is no cpio program");
            return;
        };
        child.stdin.take().unwrap().write_all(&sample()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}");
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert!(lines[0].starts_with("drwxr-xr-x") && lines[1].starts_with("crw-------"), "{text}");
        assert!(lines[1].contains("5,   1") && lines[4].ends_with("sh -> init"), "{text}");
    }
}
