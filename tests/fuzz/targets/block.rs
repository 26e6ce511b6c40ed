//! A driver that sends disks what it likes: any type, sector, flags and pieces, to every make of disk, many at a time.
//!
//! The first byte chooses the disk, the rest are requests: a type, a sector, and the pieces of memory that follow the
//! header. Every request that has room for a status is answered with one, and a base is never written to.
#![no_main]

mod world;

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use base::bus::Registers;
use base::disk::qcow2;
use base::host::fake::{FILE_BYTES, FakeHost};
use base::irq::FakeLine;
use base::memory::Memory;
use devices::catalog;
use devices::virtio::mmio::Mmio;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use world::World;

const DISKS: [&str; 7] = [
    "path=a.img",
    "path=a.img,readonly=on",
    "path=a.img,overlay=on",
    "path=a.img,io=threads",
    "path=q,format=qcow2",
    "path=a.img,overlay=over",
    "path=a.img,overlay=on,queues=2,iops=1000000",
];

/// Descriptors, and where they, the rings and the requests lie. Each request has 4 KiB for its header.
const SIZE: u16 = 256;
const DESC: u64 = 1 << 20;
const AVAIL: u64 = DESC + 0x8000;
const USED: u64 = DESC + 0xa000;
const HEADERS: u64 = 0x2_0000;
/// Nothing else is where data may be.
const DATA: u64 = 2 << 20;

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| World::new(&[(0, 4 << 20)]))
}

fn file(host: &FakeHost, path: &str) -> File {
    host.file(Path::new(path)).expect("make a file")
}

fn attach(world: &World, text: &str, host: &FakeHost) -> Mmio {
    let image = file(host, "q");
    image.set_len(0).expect("empty a file");
    qcow2::create(image, FILE_BYTES, None).expect("make an image");
    file(host, "over").set_len(0).expect("empty a file");
    let device = world.build(catalog::find("blk").expect("there are disks"), text, host);
    let Some(device) = device else { panic!("{text} is no disk") };
    let line = Arc::new(FakeLine::default());
    Mmio::attach("fuzzed", device, &world.memory, line, &world.lane).expect("attach a disk")
}

fn set(mmio: &mut Mmio, at: u64, value: u64) {
    let [a, b, c, d, ..] = value.to_le_bytes();
    mmio.write(at, &[a, b, c, d]);
}

/// What a driver does up to DRIVER_OK (virtio 1.2, section 3.1.1): VERSION_1 and all that disks offer.
fn start(mmio: &mut Mmio, features: u64) {
    for status in [0, 1, 3] {
        set(mmio, 0x70, status);
    }
    let mut offered = [0; 4];
    mmio.read(0x10, &mut offered);
    for (select, value) in [(0, u64::from(u32::from_le_bytes(offered)) & features), (1, 1)] {
        set(mmio, 0x24, select);
        set(mmio, 0x20, value);
    }
    set(mmio, 0x70, 11);
    set(mmio, 0x30, 0);
    set(mmio, 0x38, SIZE.into());
    for (at, value) in [(0x80, DESC), (0x90, AVAIL), (0xa0, USED)] {
        set(mmio, at, value);
        set(mmio, at + 4, 0);
    }
    set(mmio, 0x44, 1);
    set(mmio, 0x70, 15);
}

/// Lays one request from the input; whether it has a status.
fn lay(memory: &Memory, n: u16, at: &mut u16, bytes: &[u8; 8]) -> bool {
    let &[kind, low, high, flags, pieces, size, place, header] = bytes;
    let ram = memory.ram();
    let head = HEADERS + u64::from(n) * 64;
    // A sector near the beginning, the end, or anywhere.
    let near = u64::from(u16::from_le_bytes([low, high]));
    let sector = match flags >> 6 {
        0 => near % (FILE_BYTES / 512),
        1 => FILE_BYTES / 512 - near % 8,
        2 => near << 48,
        _ => u64::MAX - near,
    };
    let _ = ram.write_obj(u32::from(kind % 16).to_le(), GuestAddress(head));
    let _ = ram.write_obj(sector.to_le(), GuestAddress(head + 8));
    // The segment of a discard or write-zeroes, which is data to the rest.
    let data = DATA + u64::from(place) * 512;
    let segment = [sector, u64::from(size) << (flags & 7) | u64::from(flags >> 3 & 7) << 32];
    let _ = ram.write_obj(segment, GuestAddress(data));
    let unit = [512, 16, 1, 4096][usize::from(flags >> 4 & 3)];
    let mut list = vec![(head, if header < 250 { 16 } else { u32::from(header - 249) }, false)];
    for piece in 0..u64::from(pieces % 5) {
        let len = (u32::from(size) + 1) * unit;
        list.push((data + piece * 1024, len, pieces >> 3 & 1 == 1));
    }
    let answered = pieces < 248;
    if answered {
        list.push((head + 32, 1, true));
    }
    let first = *at;
    for (index, (addr, len, write)) in list.iter().enumerate() {
        let more = index + 1 < list.len();
        let flags = u16::from(more) | u16::from(*write) << 1;
        let entry = DESC + 16 * u64::from(*at);
        let _ = ram.write_obj(*addr, GuestAddress(entry));
        let _ = ram.write_obj(*len, GuestAddress(entry + 8));
        let _ = ram.write_obj(flags, GuestAddress(entry + 12));
        let _ = ram.write_obj(*at + 1, GuestAddress(entry + 14));
        *at += 1;
    }
    let _ = ram.write_obj(0xeeu8, GuestAddress(head + 32));
    let _ = ram.write_obj(first, GuestAddress(AVAIL + 4 + 2 * u64::from(n)));
    answered
}

fuzz_target!(|data: &[u8]| {
    let Some((&[choice, features], requests)) = data.split_first_chunk::<2>() else { return };
    let (world, host) = (world(), FakeHost::default());
    let text = DISKS[usize::from(choice) % DISKS.len()];
    let mut mmio = attach(world, text, &host);
    let _ = world.memory.ram().write_slice(&[0; 0xb000], GuestAddress(DESC));
    // With and without flushes; no EVENT_IDX and no INDIRECT, which are the ring's concern.
    start(&mut mmio, if features & 1 == 0 { 0xff_ffff } else { 0xff_ffff & !(1 << 9) });
    let (mut at, mut statuses, mut polite) = (0, Vec::new(), true);
    for (n, request) in (0u16..).zip(requests.chunks_exact(8)).take(40) {
        let Ok(request) = request.try_into() else { break };
        let answered = lay(&world.memory, n, &mut at, request);
        polite &= answered;
        statuses.push(HEADERS + u64::from(n) * 64 + 32);
        let _ = world.memory.ram().write_obj(n + 1, GuestAddress(AVAIL + 2));
    }
    set(&mut mmio, 0x50, 0);
    // As long as there is something in flight: threads and io_uring come back in their own time.
    let count = u16::try_from(statuses.len()).unwrap_or(0);
    let mut patience = 5000;
    while polite && patience > 0 {
        mmio.front().visit(|_, _| ());
        let used: u16 = world.memory.ram().read_obj(GuestAddress(USED + 2)).unwrap_or(0);
        if used == count {
            break;
        }
        patience -= 1;
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    if polite {
        assert!(patience > 0, "{text}: a request is not answered");
        for status in statuses {
            let status: u8 =
                world.memory.ram().read_obj(GuestAddress(status)).expect("a status is in memory");
            assert!(status <= 2, "{text}: a request came back with status {status:#x}");
        }
    }
    set(&mut mmio, 0x70, 0);
    drop(mmio);
    if text.contains("overlay") || text.contains("readonly") {
        let mut bytes = vec![0xff; usize::try_from(FILE_BYTES).unwrap_or(0)];
        std::os::unix::fs::FileExt::read_exact_at(&file(&host, "a.img"), &mut bytes, 0)
            .expect("read the base");
        assert!(bytes.iter().all(|byte| *byte == 0), "{text}: the base was written to");
    }
});
