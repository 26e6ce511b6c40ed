//! The disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use base::host::fake::{FILE_BYTES, FakeHost};
use base::memory::Memory;
use vm_memory::{Bytes, GuestAddress};

use super::driver::*;

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const ZEROES: u32 = 13;
pub const F_FLUSH: u64 = 1 << 9;
pub const ALL_FEATURES: u64 = u64::MAX;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

pub const BACKENDS: [&str; 2] = ["uring", "threads"];
pub const SECTORS: u64 = FILE_BYTES / 512;

/// Where headers, statuses and data lie: request `n` has 4 KiB of its own for the first two.
pub const HEADERS: u64 = 0x1_0000;
pub const DATA: u64 = 0x20_0000;

/// A disk on `a.img` and the driver of its queue.
pub struct Player {
    pub rig: Rig,
    pub queue: Virtq,
    next: u64,
    file: File,
}

impl Player {
    fn new(text: &str, features: u64) -> Player {
        let file = tempfile::tempfile().unwrap();
        file.set_len(FILE_BYTES).unwrap();
        Self::on(file, text, features)
    }

    fn on(file: File, text: &str, features: u64) -> Player {
        let host = FakeHost::default();
        host.put(Path::new("a.img"), file.try_clone().unwrap());
        for n in 0..16u8 {
            file.write_all_at(&[n + 1; 64 << 10], u64::from(n) << 16).unwrap();
        }
        let mut rig = Rig::of("blk", &format!("path=a.img,{text}"), &host);
        let features = features & rig.offered();
        let queue = rig.start(features, 256);
        Player { rig, queue, next: 0, file }
    }

    /// What `text` asks of `host`.
    pub fn of(host: &FakeHost, text: &str) -> Player {
        Self::behind(Rig::of("blk", text, host))
    }

    /// A disk that is built already.
    pub fn behind(mut rig: Rig) -> Player {
        let features = rig.offered();
        let queue = rig.start(features, 256);
        Player { rig, queue, next: 0, file: tempfile::tempfile().unwrap() }
    }

    /// Lays a request; where its status will be.
    pub fn ask(&mut self, kind: u32, sector: u64, data: &[Part], indirect: bool) -> u64 {
        let header = HEADERS + (self.next % 256) * 4096;
        self.next += 1;
        let ram = self.rig.memory.ram();
        ram.write_obj(kind.to_le(), GuestAddress(header)).unwrap();
        ram.write_obj(sector.to_le(), GuestAddress(header + 8)).unwrap();
        let status = header + 16;
        ram.write_obj(0xeeu8, GuestAddress(status)).unwrap();
        let mut parts = vec![(header, 16, false)];
        parts.extend(data);
        parts.push((status, 1, true));
        if indirect {
            self.queue.push_indirect(ram, header + 1024, &parts);
        } else {
            self.queue.push(ram, &parts);
        }
        status
    }

    pub fn byte(&self, at: u64) -> u8 {
        self.rig.ram().read_obj(GuestAddress(at)).unwrap()
    }

    /// One request from begin to end: its status and length.
    pub fn run(&mut self, kind: u32, sector: u64, data: &[Part]) -> (u8, u32) {
        let status = self.ask(kind, sector, data, false);
        self.rig.notify(0);
        let (_, len) = self.rig.wait_used(&mut self.queue);
        (self.byte(status), len)
    }

    pub fn fill(&self, at: u64, byte: u8, len: usize) {
        self.rig.ram().write_slice(&vec![byte; len], GuestAddress(at)).unwrap();
    }

    fn on_disk(&self, at: u64) -> u8 {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, at).unwrap();
        byte[0]
    }

    /// A discard or write-zeroes.
    pub fn clear(&mut self, kind: u32, sector: u64, count: u32, flags: u32) -> u8 {
        let ram = self.rig.memory.ram();
        ram.write_obj(sector.to_le(), GuestAddress(DATA)).unwrap();
        ram.write_obj([count.to_le(), flags.to_le()], GuestAddress(DATA + 8)).unwrap();
        self.run(kind, 0, &[(DATA, 16, false)]).0
    }
}

#[test]
fn shows_its_size_and_limits() {
    let mut player = Player::new("readonly=off", ALL_FEATURES);
    let mut config = [0; 60];
    player.rig.config(0, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[8..12], (128u32 << 10).to_le_bytes(), "size_max");
    assert_eq!(config[12..16], 254u32.to_le_bytes(), "seg_max");
    assert_eq!(config[20..24], 512u32.to_le_bytes(), "blk_size");
    assert_eq!(config[36..40], (254u32 * 256).to_le_bytes(), "max_discard_sectors");
    let offered = player.rig.offered();
    assert_eq!(offered & 0xff_ffff, 1 << 1 | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 14);
    let offered = Player::new("readonly=on", ALL_FEATURES).rig.offered();
    assert_eq!(offered & 0xff_ffff, 1 << 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10, "read-only");
}

#[test]
fn reads_and_writes_in_pieces() {
    for io in BACKENDS {
        let mut player = Player::new(&format!("io={io}"), ALL_FEATURES);
        let (status, len) = player.run(IN, 127, &[(DATA, 1000, true), (DATA + 4000, 24, true)]);
        assert_eq!((status, len), (OK, 1025), "{io}");
        let bytes = [0, 511, 512, 999, 1000, 4000, 4023].map(|at| player.byte(DATA + at));
        assert_eq!(bytes, [1, 1, 2, 2, 0, 2, 2], "{io}");

        player.fill(DATA, 0xaa, 512);
        player.fill(DATA + 512, 0xbb, 512);
        let parts = [(DATA + 512, 500, false), (DATA + 1012, 12, false), (DATA, 512, false)];
        assert_eq!(player.run(OUT, SECTORS - 2, &parts), (OK, 1));
        assert_eq!(player.run(FLUSH, 0, &[]), (OK, 1));
        let end = FILE_BYTES;
        let bytes = [end - 1025, end - 1024, end - 513, end - 512, end - 1].map(|at| player.on_disk(at));
        assert_eq!(bytes, [16, 0xbb, 0xbb, 0xaa, 0xaa], "{io}");
        let meters = ["reads", "read_bytes", "writes", "write_bytes", "flushes", "errors"];
        assert_eq!(meters.map(|name| player.rig.meter(name)), [1, 1024, 1, 1024, 1, 0]);
    }
}

#[test]
fn many_in_flight_all_come_back() {
    for io in BACKENDS {
        for features in [ALL_FEATURES, !(EVENT_IDX | INDIRECT)] {
            let mut player = Player::new(&format!("io={io}"), features);
            let indirect = features & INDIRECT != 0;
            let count = if indirect { 256 } else { 85 };
            let ask = |player: &mut Player, n: u64| {
                let data = (DATA + n * 512, 512, true);
                player.ask(IN, n * 8 % SECTORS, &[data], indirect)
            };
            let statuses: Vec<u64> = (0..count).map(|n| ask(&mut player, n)).collect();
            player.rig.notify(0);
            for _ in 0..count {
                player.rig.wait_used(&mut player.queue);
            }
            for (n, status) in (0..).zip(statuses) {
                assert_eq!(player.byte(status), OK, "{io}: request {n}");
                let expected = u8::try_from(n * 8 % SECTORS / 128 + 1).unwrap();
                assert_eq!(player.byte(DATA + n * 512 + 511), expected, "{io}: request {n}");
            }
        }
    }
}

#[test]
fn large_requests_leave_the_lane_to_others() {
    use rustix::fs::{MemfdFlags, memfd_create};
    let host = FakeHost::default();
    let file = File::from(memfd_create("large", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(64 << 20).unwrap();
    host.put(Path::new("a.img"), file);
    let mut rig = Rig::of("blk", "path=a.img", &host);
    let mut queue = rig.start(INDIRECT, 8);
    rig.ram().write_obj([0u64; 2], GuestAddress(HEADERS)).unwrap();
    // The same memory again and again.
    let mut parts = vec![(DATA, 128 << 10, true); 254];
    parts.insert(0, (HEADERS, 16, false));
    parts.push((HEADERS + 16, 1, true));
    for _ in 0..6 {
        queue.push_indirect(rig.memory.ram(), HEADERS + 4096, &parts);
    }
    rig.notify(0);
    for _ in 0..6 {
        assert_eq!(rig.wait_used(&mut queue).1, (254 << 17) + 1);
    }
    rig.settle();
    assert_eq!(rig.meter("interrupts"), 6, "a visit, and an interrupt, for each 32 MiB");
}

fn read_without_waiting(file: &File) -> rustix::io::Result<usize> {
    use rustix::io::{IoSliceMut, ReadWriteFlags, preadv2};
    file.write_all_at(&[1], 0).unwrap();
    preadv2(file, &mut [IoSliceMut::new(&mut [0])], 0, ReadWriteFlags::NOWAIT)
}

#[test]
fn page_cache_reads_take_one_visit_and_one_interrupt() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(FILE_BYTES).unwrap();
    if let Err(cause) = read_without_waiting(&file) {
        return eprintln!("skipped: temporary files here are on a file system without RWF_NOWAIT: {cause}");
    }
    let mut player = Player::on(file, "io=uring", ALL_FEATURES);
    for n in 0..4 {
        player.ask(IN, n, &[(DATA + n * 512, 512, true)], false);
    }
    player.rig.notify(0);
    player.rig.settle();
    assert_eq!((player.rig.meter("kicks"), player.rig.bell.edges()), (2, 1), "one kick came with the start");
    assert_eq!(player.rig.meter("reads"), 4, "they end in the visit that starts them");
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut player = Player::new("readonly=on", ALL_FEATURES);
    assert_eq!(player.run(OUT, 0, &[(DATA, 512, false)]), (IOERR, 1));
    assert_eq!(player.clear(ZEROES, 0, 1, 0), UNSUPP);
    assert_eq!(player.run(FLUSH, 0, &[]).0, OK);
    assert_eq!(player.run(IN, 0, &[(DATA, 512, true)]), (OK, 513));
    assert_eq!(player.on_disk(0), 1);
}

#[test]
fn tells_its_serial_number() {
    for (text, id) in [("id=abc-DEF_0123456789xy", "abc-DEF_0123456789xy"), ("io=auto", "test0")] {
        let mut player = Player::new(text, ALL_FEATURES);
        player.fill(DATA, 0xff, 30);
        assert_eq!(player.run(GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
        let mut bytes = [0; 21];
        player.rig.ram().read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        let mut expected = [0; 21];
        expected[..id.len()].copy_from_slice(id.as_bytes());
        expected[20] = 0xff;
        assert_eq!(bytes, expected);
        assert_eq!(player.run(GET_ID, 0, &[(DATA, 3, true)]), (OK, 4), "as much as there is room for");
    }
}

#[test]
fn requests_that_make_no_sense_fail_alone() {
    let mut player = Player::new("readonly=off", ALL_FEATURES);
    let read = [(DATA, 512, true)];
    let write = [(DATA, 512, false)];
    let cases: [(&str, u32, u64, &[Part], u8); 12] = [
        ("read at the end", IN, SECTORS, &read, IOERR),
        ("read across the end", IN, SECTORS - 1, &[(DATA, 1024, true)], IOERR),
        ("sector overflows", IN, u64::MAX, &read, IOERR),
        ("sector overflows in bytes", OUT, u64::MAX / 512 + 1, &write, IOERR),
        ("half a sector", IN, 0, &[(DATA, 100, true)], IOERR),
        ("read into what is readable", IN, 0, &write, IOERR),
        ("write from what is writable", OUT, 0, &read, IOERR),
        ("nothing to read", IN, 5, &[], OK),
        ("nothing, beyond the end", IN, SECTORS + 1, &[], IOERR),
        ("two segments", DISCARD, 0, &[(DATA, 32, false)], IOERR),
        ("secure erase", 14, 0, &write, UNSUPP),
        ("unknown", 99, 0, &write, UNSUPP),
    ];
    for (what, kind, sector, data, status) in cases {
        assert_eq!(player.run(kind, sector, data).0, status, "{what}");
    }
    // A header of 15 bytes.
    player.queue.push(player.rig.memory.ram(), &[(HEADERS, 15, false), (DATA, 1, true)]);
    player.rig.notify(0);
    assert_eq!(player.rig.wait_used(&mut player.queue).1, 1);
    assert_eq!(player.byte(DATA), IOERR, "short header");
    assert_eq!(player.run(IN, 0, &read), (OK, 513), "and goes on working");
    assert_eq!((player.rig.meter("faults"), player.rig.meter("errors")), (0, 0));

    player.queue.push(player.rig.memory.ram(), &[(HEADERS, 16, false)]);
    player.rig.notify(0);
    player.rig.settle();
    assert_ne!(player.rig.get(reg::STATUS) & NEEDS_RESET, 0, "no room for the status is a fault");
}

#[test]
fn what_was_taken_before_a_broken_request_ends() {
    for io in BACKENDS {
        let mut player = Player::new(&format!("io={io}"), ALL_FEATURES);
        let status = player.ask(IN, 0, &[(DATA, 512, true)], false);
        // No room for its status.
        player.queue.push(player.rig.memory.ram(), &[(HEADERS, 16, false)]);
        player.rig.notify(0);
        // The fault interrupts, and maybe the answer does by itself.
        while player.byte(status) == 0xee {
            let seen = player.rig.bell.edges();
            if player.byte(status) == 0xee {
                player.rig.bell.wait(seen);
            }
        }
        assert_eq!((player.byte(status), player.byte(DATA)), (OK, 1), "{io}");
        // The answer may be there before the visit that finds the fault is over.
        player.rig.settle();
        assert_ne!(player.rig.get(reg::STATUS) & NEEDS_RESET, 0, "{io}");
    }
}

#[test]
fn clears_ranges() {
    for io in BACKENDS {
        let mut player = Player::new(&format!("io={io}"), ALL_FEATURES);
        assert_eq!(player.clear(ZEROES, 8, 8, 0), OK);
        assert_eq!(player.clear(ZEROES, 32, 8, 1), OK, "may unmap");
        assert_eq!(player.clear(DISCARD, 64, 8, 0), OK);
        let bytes = [4095, 4096, 8191, 8192, 16384, 20480].map(|at| player.on_disk(at));
        assert_eq!(bytes, [1, 0, 0, 1, 0, 1], "{io}");
        assert_eq!(player.clear(DISCARD, 0, 8, 1), UNSUPP, "discard knows no unmap");
        assert_eq!(player.clear(ZEROES, 0, 8, 2), UNSUPP, "unknown flag");
        assert_eq!(player.clear(ZEROES, SECTORS - 1, 2, 0), IOERR, "across the end");
        assert_eq!(player.clear(ZEROES, 0, u32::MAX, 0), IOERR, "more than was offered");
        assert_eq!(player.clear(ZEROES, 0, 0, 0), OK, "nothing");
        assert_eq!(player.on_disk(0), 1);
    }
}

#[test]
fn a_host_error_is_an_io_error_of_the_guest() {
    for io in BACKENDS {
        let mut player = Player::new(&format!("io={io}"), ALL_FEATURES);
        player.file.set_len(4096).unwrap();
        assert_eq!(player.run(IN, 8, &[(DATA, 512, true)]), (IOERR, 0), "{io}");
        assert_eq!(player.run(IN, 0, &[(DATA, 512, true)]), (OK, 513), "{io}");
        assert_eq!((player.rig.meter("errors"), player.rig.meter("faults")), (1, 0));
    }
}

#[test]
fn without_flush_a_write_ends_on_stable_storage() {
    for io in BACKENDS {
        let mut player = Player::new(&format!("io={io}"), ALL_FEATURES & !F_FLUSH);
        player.fill(DATA, 0xcc, 512);
        assert_eq!(player.run(OUT, 3, &[(DATA, 512, false)]), (OK, 1));
        assert_eq!((player.rig.meter("writes"), player.rig.meter("flushes")), (1, 1), "{io}");
        assert_eq!(player.on_disk(3 * 512), 0xcc);
    }
}

#[test]
fn after_a_reset_nothing_touches_guest_memory() {
    for io in BACKENDS {
        let mut player = Player::new(&format!("io={io}"), ALL_FEATURES);
        for round in 0..20 {
            for n in 0..60 {
                player.ask(IN, n, &[(DATA, 0x1_0000, true)], false);
            }
            player.rig.notify(0);
            player.rig.set(reg::STATUS, 0);
            player.fill(DATA, 0x77, 0x1_0000);
            player.rig.settle();
            assert_eq!(player.byte(DATA), 0x77, "{io}, round {round}");
            let features = player.rig.offered();
            player.queue = player.rig.start(features, 256);
            assert_eq!(player.run(IN, 0, &[(DATA, 512, true)]), (OK, 513), "{io}, round {round}");
        }
    }
}

#[test]
fn one_chain_offered_many_times_is_bounded() {
    let mut player = Player::new("io=threads", ALL_FEATURES);
    let ram = player.rig.memory.ram();
    ram.write_obj([IN, 0, 0, 0], GuestAddress(HEADERS)).unwrap();
    Virtq::describe(ram, player.queue.desc, 0, HEADERS, 16, 1, 1);
    Virtq::describe(ram, player.queue.desc, 1, DATA, 0x1_0000 + 1, 2, 0);
    for _ in 0..50 {
        for _ in 0..256 {
            player.queue.offer(player.rig.memory.ram(), 0);
        }
        player.rig.notify(0);
        player.rig.settle();
    }
    player.rig.set(reg::STATUS, 0);
    let features = player.rig.offered();
    player.queue = player.rig.start(features, 256);
    assert_eq!(player.run(IN, 0, &[(DATA, 512, true)]), (OK, 513));
}

#[test]
fn a_disk_is_free_as_soon_as_its_machine_is_gone() {
    for io in BACKENDS {
        let mut player = Player::new(&format!("io={io}"), ALL_FEATURES);
        for round in 0..20 {
            assert_eq!(player.run(IN, 0, &[(DATA, 512, true)]), (OK, 513), "{io}, round {round}");
            let file = player.file.try_clone().unwrap();
            drop(player);
            player = Player::on(file, &format!("io={io}"), ALL_FEATURES);
        }
    }
}

fn refusal(text: &str, prepare: impl FnOnce(&File)) -> String {
    let host = FakeHost::default();
    prepare(&host.file(Path::new("a.img")).unwrap());
    let memory = Memory::new(&RAM).unwrap();
    match build("blk", text, &host, &memory) {
        Ok(_) => panic!("{text} is accepted"),
        Err(fail) => fail.to_string(),
    }
}

#[test]
fn unusable_images_are_refused_with_a_remedy() {
    let cut = |len| move |file: &File| file.set_len(len).unwrap();
    assert_eq!(
        refusal("a.img", cut(0)),
        "use a.img as image of test0: it is empty\n  hint: truncate -s 1G a.img"
    );
    assert_eq!(
        refusal("a.img", cut(700)),
        "use a.img as image of test0: its 700 bytes are no whole number of 512-byte sectors\n  \
         hint: truncate -s %512 a.img"
    );
    assert_eq!(
        refusal("a.img,id=123456789012345678901", |_| ()),
        "give test0 the serial number \"123456789012345678901\": it is not 1 to 20 bytes of printable ASCII\n  \
         hint: choose a shorter one, or leave id out for the name of the device"
    );
    let unknown = refusal("a.img,sync=on", |_| ());
    for key in ["sync", "path", "readonly", "id", "io"] {
        assert!(unknown.contains(&format!("`{key}`")), "{key} is named in: {unknown}");
    }
}

#[test]
fn paths_may_hold_anything() {
    let entry = devices::catalog::find("blk").unwrap();
    for (text, path, readonly) in [
        ("a.img", "a.img", false),
        ("id_disk.img", "id_disk.img", false),
        ("path=id_1,,id_2,readonly=on", "id_1,id_2", true),
        ("readonly=on,path=a,,b=c,,,,d.img,id=id_7", "a,b=c,,d.img", true),
        ("path=/x=y/on", "/x=y/on", false),
    ] {
        let spec = entry.parse(text).unwrap_or_else(|fail| panic!("{fail}"));
        assert_eq!((&spec["path"], &spec["readonly"]), (&path.into(), &readonly.into()), "{text}");
    }
}

#[test]
fn two_machines_do_not_write_to_one_disk() {
    let host = FakeHost::default();
    let memory = Memory::new(&RAM).unwrap();
    let open = |text: &str| build("blk", &format!("a.img,{text}"), &host, &memory);
    let reader = open("readonly=on").unwrap();
    let second = open("readonly=on").unwrap();
    let refused = open("readonly=off").err().expect("others read it").to_string();
    assert_eq!(
        refused,
        "lock a.img for test0: another process uses it\n  \
         hint: stop the other machine, or pass readonly=on or overlay=on to all that share the disk"
    );
    drop((reader, second));
    let writer = open("readonly=off").unwrap();
    assert!(open("readonly=off").is_err() && open("readonly=on").is_err());
    drop(writer);
    open("readonly=off").unwrap();
}
