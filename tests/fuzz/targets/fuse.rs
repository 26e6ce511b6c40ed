//! A driver that asks a share for anything: any operation, node, handle, name and length, with any room for the answer.
//!
//! The directory stands in memory, beside one that no request may reach: it has to stay as it is, and none of its files
//! may be seen. Every request that has room for an answer gets one.
#![no_main]

mod world;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use base::bus::Registers;
use base::host::fake::FakeHost;
use base::irq::FakeLine;
use devices::catalog;
use devices::virtio::mmio::Mmio;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use world::World;

const SHARES: [&str; 4] =
    ["path=dir", "path=dir,cache=always", "path=dir,cache=never", "path=dir,readonly=on"];
const SIZE: u16 = 64;
const DESC: u64 = 1 << 20;
const AVAIL: u64 = DESC + 0x8000;
const USED: u64 = DESC + 0xa000;
/// Where requests are laid, and their answers.
const OUT: u64 = 0x1_0000;
const IN: u64 = 0x4_0000;
/// What is written in the file outside.
const SECRET: &[u8] = b"outside of the share";

/// Names that a request may say.
const NAMES: [&[u8]; 12] = [
    b"file\0",
    b"dir\0",
    b"link\0",
    b"new\0",
    b"..\0",
    b"../secret\0",
    b"dir/x\0",
    b"\0",
    b"secret\0",
    b"out\0",
    b"user.a\0",
    b"no end",
];

struct Place {
    world: World,
    /// The parent of the share.
    top: PathBuf,
}

fn place() -> &'static Place {
    static PLACE: OnceLock<Place> = OnceLock::new();
    PLACE.get_or_init(|| {
        let top = PathBuf::from(format!("/dev/shm/mayfly-fuzz-{}", std::process::id()));
        Place { world: World::new(&[(0, 2 << 20)]), top }
    })
}

fn tidy(top: &Path) {
    let _ = fs::remove_dir_all(top);
}

fn lay_out(top: &Path) {
    tidy(top);
    fs::create_dir_all(top.join("share/dir")).expect("make a directory");
    fs::write(top.join("secret"), SECRET).expect("write a file");
    fs::write(top.join("share/file"), b"inside").expect("write a file");
    fs::write(top.join("share/dir/deep"), b"inside").expect("write a file");
    std::os::unix::fs::symlink("../secret", top.join("share/link")).expect("make a link");
    std::os::unix::fs::symlink(top, top.join("share/out")).expect("make a link");
}

fn set(mmio: &mut Mmio, at: u64, value: u64) {
    let [a, b, c, d, ..] = value.to_le_bytes();
    mmio.write(at, &[a, b, c, d]);
}

/// Up to DRIVER_OK, with both queues (virtio 1.2, section 3.1.1).
fn start(mmio: &mut Mmio) {
    for (at, value) in
        [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 0), (0x20, 0), (0x24, 1), (0x20, 1), (0x70, 11)]
    {
        set(mmio, at, value);
    }
    set(mmio, 0x30, 1);
    set(mmio, 0x38, SIZE.into());
    for (at, value) in [(0x80, DESC), (0x90, AVAIL), (0xa0, USED)] {
        set(mmio, at, value);
        set(mmio, at + 4, 0);
    }
    set(mmio, 0x44, 1);
    set(mmio, 0x70, 15);
}

/// The bytes of a request that the input describes.
fn request(n: u64, op: u32, node: u8, words: &[u8], name: u8) -> Vec<u8> {
    let mut body = Vec::new();
    for byte in words {
        let number = match byte {
            0..200 => u64::from(*byte),
            200..230 => 1u64 << ((byte - 200) * 2),
            _ => u64::MAX - u64::from(byte - 230),
        };
        // What takes memory, in moderation: room for a file, and bytes to be copied.
        let number = if matches!(op, 43 | 47) { number & 0xf_ffff } else { number };
        if byte & 1 == 0 {
            body.extend(number.to_le_bytes());
        } else {
            body.extend(number.to_le_bytes().get(..4).unwrap_or_default());
        }
    }
    for name in [name, name >> 4] {
        body.extend(NAMES.get(usize::from(name & 15)).copied().unwrap_or_default());
    }
    let len = u32::try_from(40 + body.len()).unwrap_or(0);
    let mut request = Vec::new();
    request.extend(len.to_le_bytes());
    request.extend(op.to_le_bytes());
    request.extend(n.to_le_bytes());
    request.extend(u64::from(node).to_le_bytes());
    request.extend([0; 16]);
    request.extend(body);
    request
}

/// Sends a request and waits for it to come back: the answer, of which `room` bytes at the most.
fn ask(mmio: &mut Mmio, n: u16, request: &[u8], room: u32) -> Vec<u8> {
    let ram = place().world.memory.ram();
    let _ = ram.write_slice(request, GuestAddress(OUT));
    let _ = ram.write_slice(&vec![0; room as usize], GuestAddress(IN));
    let parts = [(OUT, u32::try_from(request.len()).unwrap_or(0), 0u16), (IN, room, 2)];
    for (index, (addr, len, write)) in (0u16..).zip(parts) {
        let entry = DESC + 16 * u64::from(index);
        let more = u16::from(index == 0 && room > 0);
        let _ = ram.write_obj(addr, GuestAddress(entry));
        let _ = ram.write_obj(len, GuestAddress(entry + 8));
        let _ = ram.write_obj(write | more, GuestAddress(entry + 12));
        let _ = ram.write_obj(1u16, GuestAddress(entry + 14));
    }
    let _ = ram.write_obj(0u16, GuestAddress(AVAIL + 4 + 2 * u64::from(n % SIZE)));
    let _ = ram.write_obj(n.wrapping_add(1), GuestAddress(AVAIL + 2));
    set(mmio, 0x50, 1);
    for patience in 0.. {
        mmio.front().visit(|_, _| ());
        let used: u16 = ram.read_obj(GuestAddress(USED + 2)).unwrap_or(0);
        if used == n.wrapping_add(1) {
            break;
        }
        assert!(patience < 5000, "a request does not come back: {request:x?}");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let mut answer = vec![0; room as usize];
    let _ = ram.read_slice(&mut answer, GuestAddress(IN));
    answer
}

fuzz_target!(|data: &[u8]| {
    let Some((&[choice], mut rest)) = data.split_first_chunk::<1>() else { return };
    let Place { world, top } = place();
    lay_out(top);
    let host = FakeHost::default();
    host.put_directory(Path::new("dir"), &top.join("share"));
    let text = SHARES[usize::from(choice) % SHARES.len()];
    let entry = catalog::find("virtiofs").expect("there are shares");
    let device = world.build(entry, text, &host).expect("build a share");
    let line = Arc::new(FakeLine::default());
    let mut mmio = Mmio::attach("fuzzed", device, &world.memory, line, &world.lane).expect("attach a share");
    let _ = world.memory.ram().write_slice(&[0; 0xb000], GuestAddress(DESC));
    start(&mut mmio);
    let init: Vec<u8> =
        [7u32, 38, 1 << 17, u32::MAX, u32::MAX].iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut greeting = request(0, 26, 0, &[], 0xff);
    greeting.extend(init);
    let len = u32::try_from(greeting.len()).unwrap_or(0).to_le_bytes();
    greeting.splice(..4, len);
    let hello = ask(&mut mmio, 0, &greeting, 80);
    assert_eq!(hello.get(4..8), Some(&[0; 4][..]), "the share says hello");
    let mut n = 1u16;
    while let Some((&[op, node, name, room, count], more)) = rest.split_first_chunk::<5>() {
        let (words, left) = more.split_at(usize::from(count % 16).min(more.len()));
        rest = left;
        let room = [0, 8, 16, 100, 144, 160, 4096, 65536][usize::from(room % 8)];
        let request = request(n.into(), u32::from(op % 56), node % 12, words, name);
        let answer = ask(&mut mmio, n, &request, room);
        let seen = answer.windows(SECRET.len()).any(|bytes| bytes == SECRET);
        assert!(!seen, "{text}: a file outside was read");
        n += 1;
        if n > 60 {
            break;
        }
    }
    set(&mut mmio, 0x70, 0);
    drop(mmio);
    assert_eq!(
        fs::read(top.join("secret")).ok().as_deref(),
        Some(SECRET),
        "{text}: a file outside was changed"
    );
    let beside = fs::read_dir(top).expect("look at the place").count();
    assert_eq!(beside, 2, "{text}: something was made outside");
    if text.contains("readonly") {
        assert_eq!(
            fs::read(top.join("share/file")).ok().as_deref(),
            Some(&b"inside"[..]),
            "a file was changed"
        );
        assert_eq!(fs::read_dir(top.join("share")).expect("look at the share").count(), 4);
    }
    tidy(top);
});
