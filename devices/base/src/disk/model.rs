//! Disks of every make beside a plain array: whatever is done to both, they read alike.

use std::fs::File;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use super::qcow2::{Backing, Opening, create};
use super::*;

/// Sectors of the disks, a size that no cluster or page divides.
const SECTORS: u64 = 10_003;
const BYTES: u64 = SECTORS * 512;

#[derive(Clone, Debug)]
enum Deed {
    Read { sector: u64, count: u64 },
    Write { sector: u64, count: u64, seed: u8 },
    Zero { sector: u64, count: u64, unmap: bool },
    Discard { sector: u64, count: u64 },
    Flush,
    Reopen,
}

fn deeds() -> impl Strategy<Value = Vec<Deed>> {
    let place = || {
        let around = prop_oneof![0..SECTORS, (0..24u64).prop_map(|n| n * 512), Just(SECTORS - 300), Just(0)];
        (around, prop_oneof![1..16u64, Just(128), 1..1000u64]).prop_map(|(sector, count)| {
            (sector.min(SECTORS - 1), count.min(SECTORS - sector.min(SECTORS - 1)))
        })
    };
    let deed = prop_oneof![
        4 => place().prop_map(|(sector, count)| Deed::Read { sector, count }),
        4 => (place(), any::<u8>()).prop_map(|((sector, count), seed)| Deed::Write { sector, count, seed }),
        2 => (place(), any::<bool>()).prop_map(|((sector, count), unmap)| Deed::Zero { sector, count, unmap }),
        2 => place().prop_map(|(sector, count)| Deed::Discard { sector, count }),
        1 => Just(Deed::Flush),
        1 => Just(Deed::Reopen),
    ];
    prop::collection::vec(deed, 1..40)
}

/// Guest memory of which data begins and ends in the middle of a page, in three pieces.
fn parts(len: u64) -> Vec<(u64, u32)> {
    let piece =
        |from: u64, to: u64| (0x1_0200 + from + from.min(1) * 1024, u32::try_from(to - from).unwrap());
    let cuts = [0, (len / 3) & !511, (len / 2) & !511, len];
    let mut at = 0;
    let mut list = Vec::new();
    for pair in cuts.windows(2).filter(|pair| pair[1] > pair[0]) {
        let (_, bytes) = piece(pair[0], pair[1]);
        list.push((0x1_0200 + at, bytes));
        at += u64::from(bytes) + 1536;
    }
    list
}

struct World {
    make: Make,
    disk: Disk,
    memory: Memory,
    model: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Make {
    Raw(Backend),
    Direct(Backend),
    Throwaway(Backend),
    Qcow2,
    Qcow2OnRaw,
}

fn base() -> (File, Vec<u8>) {
    let bytes: Vec<u8> = (0..BYTES).map(|at| u8::try_from(at / 512 % 251).unwrap() ^ 0x5a).collect();
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    (file, bytes)
}

/// The disk, what it reads like, and the file to open it from once more.
fn build(make: Make) -> (Image, Vec<u8>, File) {
    let (file, bytes) = base();
    let again = file.try_clone().unwrap();
    let empty = || tempfile::tempfile().unwrap();
    match make {
        Make::Raw(_) => (Image::raw(file), bytes, again),
        Make::Direct(_) => (Image::direct(file).unwrap(), bytes, again),
        Make::Throwaway(_) => {
            let top = File::from(memfd_create("top", MemfdFlags::CLOEXEC).unwrap());
            (Image::throwaway(file, top).unwrap(), bytes, again)
        }
        Make::Qcow2 => {
            let top = empty();
            create(top.try_clone().unwrap(), BYTES, None).unwrap();
            let image = Opening::new(top.try_clone().unwrap(), true).unwrap().image(None);
            (image, vec![0; bytes.len()], top)
        }
        Make::Qcow2OnRaw => {
            let top = empty();
            create(top.try_clone().unwrap(), BYTES, Some(("base.img".into(), "raw"))).unwrap();
            let opening = Opening::new(top, true).unwrap();
            assert_eq!(opening.backing(), Some(("base.img", Some("raw"))));
            (opening.image(Some(Backing::raw(file).unwrap())), bytes, again)
        }
    }
}

impl World {
    fn new(make: Make) -> World {
        let memory = Memory::new(&[(0, 4 << 20)]).unwrap();
        let (image, model, again) = build(make);
        assert_eq!(image.size().unwrap(), BYTES);
        let backend = match make {
            Make::Raw(backend) | Make::Direct(backend) | Make::Throwaway(backend) => backend,
            Make::Qcow2 | Make::Qcow2OnRaw => Backend::Auto,
        };
        let _ = again;
        let disk = Disk::open(&image, &memory, backend, 8, "disk0").unwrap();
        World { make, disk, memory, model }
    }

    fn act(&mut self, action: Action, (sector, count): (u64, u64), parts: &[(u64, u32)]) {
        self.disk.take(0, action, (sector * 512, count * 512), parts.iter().copied()).unwrap();
        let mut ended = Vec::new();
        self.disk.drain(&mut ended);
        let (_, end) = ended.pop().expect("the job has ended");
        end.unwrap_or_else(|error| {
            panic!("{:?}: {action:?} at {sector}, {count} sectors: {error}", self.make)
        });
    }

    fn plain(&mut self, sector: u64, count: u64) -> &mut [u8] {
        let [from, to] = [sector, sector + count].map(|n| usize::try_from(n * 512).unwrap());
        &mut self.model[from..to]
    }

    fn read(&mut self, sector: u64, count: u64) -> Vec<u8> {
        let parts = parts(count * 512);
        self.act(Action::Read, (sector, count), &parts);
        let mut bytes = Vec::new();
        for (at, len) in parts {
            let mut part = vec![0; usize::try_from(len).unwrap()];
            self.memory.ram().read_slice(&mut part, GuestAddress(at)).unwrap();
            bytes.extend(part);
        }
        bytes
    }

    fn check(&mut self, sector: u64, count: u64) {
        let found = self.read(sector, count);
        let wanted = self.plain(sector, count);
        let wrong = found.iter().zip(wanted.iter()).position(|(a, b)| a != b);
        assert_eq!(wrong.map(|at| sector + at as u64 / 512), None, "{:?}: this sector is wrong", self.make);
    }

    fn do_it(&mut self, deed: &Deed) {
        match *deed {
            Deed::Read { sector, count } => self.check(sector, count),
            Deed::Write { sector, count, seed } => {
                let bytes: Vec<u8> =
                    (0..count * 512).map(|at| u8::try_from(at / 512 % 250).unwrap() ^ seed).collect();
                let (parts, mut at) = (parts(count * 512), 0);
                for (addr, len) in &parts {
                    let len = usize::try_from(*len).unwrap();
                    self.memory.ram().write_slice(&bytes[at..at + len], GuestAddress(*addr)).unwrap();
                    at += len;
                }
                self.act(Action::Write, (sector, count), &parts);
                self.plain(sector, count).copy_from_slice(&bytes);
            }
            Deed::Zero { sector, count, unmap } => {
                self.act(Action::Zero { unmap }, (sector, count), &[]);
                self.plain(sector, count).fill(0);
            }
            Deed::Discard { sector, count } => {
                self.act(Action::Discard, (sector, count), &[]);
                // Each sector reads as before or as zeros, and stays so.
                let found = self.read(sector, count);
                for (is, was) in found.chunks(512).zip(self.plain(sector, count).chunks_mut(512)) {
                    let zeros = is.iter().all(|byte| *byte == 0);
                    assert!(zeros || is == was, "a discarded sector reads as something new");
                    was.copy_from_slice(is);
                }
            }
            Deed::Flush => self.act(Action::Flush, (0, 0), &[]),
            // A reset of the device: the back end goes and comes, the image stays.
            Deed::Reopen => {
                let image = self.disk.image.clone();
                self.disk = Disk::open(&image, &self.memory, Backend::Auto, 8, "disk0").unwrap();
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn every_disk_reads_as_a_plain_array(deeds in deeds()) {
        let backends = [Backend::Uring, Backend::Threads];
        let flat = backends.iter().flat_map(|back| [Make::Raw(*back), Make::Direct(*back), Make::Throwaway(*back)]);
        for make in flat.chain([Make::Qcow2, Make::Qcow2OnRaw]) {
            let mut world = World::new(make);
            for deed in &deeds {
                world.do_it(deed);
            }
            for sector in (0..SECTORS).step_by(2048) {
                world.check(sector, 2048.min(SECTORS - sector));
            }
        }
    }
}

#[test]
fn a_base_stays_as_it_is_and_many_disks_share_it() {
    let (file, bytes) = base();
    let memory = Memory::new(&[(0, 4 << 20)]).unwrap();
    let read_only =
        || File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file))).unwrap();
    let mut disks: Vec<Disk> = (0..3)
        .map(|n| {
            let top = File::from(memfd_create("top", MemfdFlags::CLOEXEC).unwrap());
            let image = Image::throwaway(read_only(), top).unwrap();
            Disk::open(&image, &memory, Backend::Auto, 8, &format!("disk{n}")).unwrap()
        })
        .collect();
    for (n, disk) in (0..).zip(&mut disks) {
        memory.ram().write_slice(&[0xa0 + n; 512], GuestAddress(0)).unwrap();
        disk.take(0, Action::Write, (512 * 7, 512), [(0, 512)].into_iter()).unwrap();
        disk.take(1, Action::Zero { unmap: true }, (1 << 20, 1 << 20), std::iter::empty()).unwrap();
        disk.take(2, Action::Discard, (4 << 20, 1 << 20), std::iter::empty()).unwrap();
        disk.take(3, Action::Flush, (0, 0), std::iter::empty()).unwrap();
        let mut ended = Vec::new();
        disk.drain(&mut ended);
        assert!(ended.len() == 4 && ended.iter().all(|(_, end)| end.is_ok()), "{ended:?}");
    }
    for (n, disk) in (0u8..).zip(&mut disks) {
        disk.take(0, Action::Read, (512 * 6, 512 * 3), [(0, 512 * 3)].into_iter()).unwrap();
        disk.drain(&mut Vec::new());
        let found: Vec<u8> = [0, 512, 1024].map(|at| memory.ram().read_obj(GuestAddress(at)).unwrap()).into();
        assert_eq!(found, [bytes[512 * 6], 0xa0 + n, bytes[512 * 8]], "disk{n} has its own sector 7");
    }
    let mut now = vec![0; bytes.len()];
    file.read_exact_at(&mut now, 0).unwrap();
    assert!(now == bytes, "the base has changed");
}

#[test]
fn damaged_qcow2_images_are_refused_or_fail_but_bring_nothing_down() {
    let good = tempfile::tempfile().unwrap();
    create(good.try_clone().unwrap(), 8 << 20, None).unwrap();
    let memory = Memory::new(&[(0, 1 << 20)]).unwrap();
    let mut seed = 0x1234_5678_9abc_def1u64;
    let mut dice = |end: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % end
    };
    let drive = |file: &File, sectors: &[u64]| {
        let Ok(opening) = Opening::new(file.try_clone().unwrap(), true) else { return false };
        let (size, image) = (opening.size(), opening.image(None));
        let mut disk = Disk::open(&image, &memory, Backend::Auto, 8, "disk0").unwrap();
        for (n, sector) in sectors.iter().enumerate() {
            let offset = sector * 512;
            if offset + 4096 > size {
                continue;
            }
            let action =
                [Action::Write, Action::Read, Action::Discard, Action::Zero { unmap: true }, Action::Flush]
                    [n % 5];
            let parts = if n % 5 < 2 { vec![(0, 4096)] } else { Vec::new() };
            disk.take(0, action, (offset, 4096), parts.into_iter()).unwrap();
            disk.drain(&mut Vec::new());
        }
        true
    };
    assert!(drive(&good, &[0, 100, 5000]), "the good one opens");
    let len = good.metadata().unwrap().len();
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    good.read_exact_at(&mut bytes, 0).unwrap();
    let (mut refused, rounds) = (0, 400);
    for _ in 0..rounds {
        let mut bad = bytes.clone();
        for _ in 0..=dice(4) {
            // Half of the damage goes to the header, the rest to the tables.
            let end = if dice(2) == 0 { 112 } else { len };
            bad[usize::try_from(dice(end)).unwrap()] = u8::try_from(dice(256)).unwrap();
        }
        if dice(8) == 0 {
            bad.truncate(usize::try_from(dice(len)).unwrap());
        }
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bad, 0).unwrap();
        let sectors: Vec<u64> = (0..12).map(|_| dice(16384)).collect();
        refused += u32::from(!drive(&file, &sectors));
    }
    assert!(refused > rounds / 20, "{refused} of {rounds} were refused");
}
