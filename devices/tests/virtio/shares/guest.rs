//! A guest played by the test: it speaks FUSE over the rings of a share.

use std::path::Path;

use base::host::fake::FakeHost;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::super::driver::{Rig, VERSION_1, Virtq};

pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const RENAME: u32 = 12;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const RELEASE: u32 = 18;
pub const SETXATTR: u32 = 21;
pub const GETXATTR: u32 = 22;
pub const LISTXATTR: u32 = 23;
pub const REMOVEXATTR: u32 = 24;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const CREATE: u32 = 35;
pub const FALLOCATE: u32 = 43;
pub const READDIRPLUS: u32 = 44;
pub const COPY_FILE_RANGE: u32 = 47;
pub const TMPFILE: u32 = 51;

pub const ROOT: u64 = 1;

/// Where a request is laid, and where its answer.
const OUT: u64 = 0x10_0000;
const IN: u64 = 0x18_0000;

/// A share of a directory of its own, mounted.
pub struct Guest {
    pub rig: Rig,
    pub dir: TempDir,
    queue: Virtq,
    unique: u64,
}

/// Bytes of a request, put together.
#[derive(Default)]
pub struct Body(pub Vec<u8>);

impl Body {
    pub fn words(mut self, words: &[u32]) -> Body {
        words.iter().for_each(|word| self.0.extend(word.to_le_bytes()));
        self
    }

    pub fn longs(mut self, longs: &[u64]) -> Body {
        longs.iter().for_each(|long| self.0.extend(long.to_le_bytes()));
        self
    }

    pub fn text(mut self, text: &str) -> Body {
        self.0.extend(text.as_bytes());
        self.0.push(0);
        self
    }
}

/// The 8 bytes of an answer from `at` on.
pub fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Guest {
    /// In memory if `memory`, or else where the host has its temporary files; `keys` are those of the share.
    pub fn new(memory: bool, keys: &str) -> Guest {
        let dir = if memory { TempDir::new_in("/dev/shm") } else { TempDir::new_in("/var/tmp") };
        Guest::of(dir.unwrap(), keys)
    }

    pub fn of(dir: TempDir, keys: &str) -> Guest {
        let host = FakeHost::default();
        host.put_directory(Path::new("dir"), dir.path());
        Guest::on(&host, dir, keys)
    }

    /// Of what that host has for `dir`.
    pub fn on(host: &FakeHost, dir: TempDir, keys: &str) -> Guest {
        let mut rig = Rig::of("virtiofs", &format!("path=dir{keys}"), host);
        let queue = rig.start_with(1, VERSION_1, 256);
        let mut guest = Guest { rig, dir, queue, unique: 0 };
        let body = Body::default().words(&[7, 38, 1 << 17, u32::MAX]).words(&[u32::MAX; 12]);
        let init = guest.call(INIT, 0, &body.0).unwrap();
        assert_eq!((word(&init, 0), word(&init, 4), init.len()), (7, 37, 64));
        guest
    }

    /// Sends bytes as they are; the answer with its header, or nothing.
    pub fn send(&mut self, request: &[u8], room: u32) -> Vec<u8> {
        let ram = self.rig.ram();
        ram.write_slice(request, GuestAddress(OUT)).unwrap();
        let mut parts = vec![(OUT, u32::try_from(request.len()).unwrap(), false)];
        if room > 0 {
            parts.push((IN, room, true));
        }
        self.queue.push(ram, &parts);
        self.rig.notify(1);
        let (_, written) = self.rig.wait_used(&mut self.queue);
        let mut answer = vec![0; usize::try_from(written).unwrap()];
        self.rig.ram().read_slice(&mut answer, GuestAddress(IN)).unwrap();
        answer
    }

    pub fn request(&mut self, op: u32, node: u64, body: &[u8], user: (u32, u32)) -> Vec<u8> {
        self.unique += 2;
        let len = u32::try_from(40 + body.len()).unwrap();
        let header =
            Body::default().words(&[len, op]).longs(&[self.unique, node]).words(&[user.0, user.1, 1, 0]);
        [header.0, body.to_owned()].concat()
    }

    /// Asks; the answer without its header, or the error number.
    pub fn call(&mut self, op: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.call_as((0, 0), op, node, body)
    }

    pub fn call_as(&mut self, user: (u32, u32), op: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let request = self.request(op, node, body, user);
        let answer = self.send(&request, 16 + (64 << 10));
        assert_eq!(word(&answer, 0), u32::try_from(answer.len()).unwrap(), "the answer says how long it is");
        assert_eq!(long(&answer, 8), self.unique, "it is the answer to this");
        match word(&answer, 4).cast_signed() {
            0 => Ok(answer[16..].to_owned()),
            error => {
                assert_eq!(answer.len(), 16, "an error is all of an answer");
                Err(-error)
            }
        }
    }

    /// The node of a name.
    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        self.call(LOOKUP, parent, &Body::default().text(name).0).map(|entry| long(&entry, 0))
    }

    pub fn open(&mut self, node: u64, flags: u32) -> Result<u64, i32> {
        self.call(OPEN, node, &Body::default().words(&[flags, 0]).0).map(|opened| long(&opened, 0))
    }

    pub fn read(&mut self, node: u64, handle: u64, (at, len): (u64, u32)) -> Result<Vec<u8>, i32> {
        let body = Body::default().longs(&[handle, at]).words(&[len, 0]).longs(&[0]).words(&[0, 0]);
        self.call(READ, node, &body.0)
    }

    pub fn write(&mut self, node: u64, handle: u64, at: u64, bytes: &[u8], flags: u32) -> Result<u32, i32> {
        let len = u32::try_from(bytes.len()).unwrap();
        let mut body = Body::default().longs(&[handle, at]).words(&[len, 0]).longs(&[0]).words(&[flags, 0]);
        body.0.extend(bytes);
        self.call(WRITE, node, &body.0).map(|answer| word(&answer, 0))
    }

    /// The whole of a file, by its name in the shared directory.
    pub fn content(&mut self, name: &str) -> Result<Vec<u8>, i32> {
        let node = self.lookup(ROOT, name)?;
        let handle = self.open(node, 0)?;
        let bytes = self.read(node, handle, (0, 60_000));
        self.call(RELEASE, node, &Body::default().longs(&[handle, 0, 0]).0)?;
        bytes
    }

    /// Forgets so many times; there is no answer to wait for.
    pub fn forget(&mut self, node: u64, times: u64) {
        let request = self.request(FORGET, node, &times.to_le_bytes(), (0, 0));
        assert!(self.send(&request, 0).is_empty());
    }
}
