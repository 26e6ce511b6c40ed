use super::*;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestAddress};

const BOTH: [Backend; 2] = [Backend::Uring, Backend::Threads];

/// A disk of 1 MiB, each 64 KiB filled with its number plus 1, on a file that stays visible.
fn disk(backend: Backend, file: File) -> (Disk, Memory, File) {
    for n in 0..16u8 {
        file.write_all_at(&[n + 1; 64 << 10], u64::from(n) << 16).unwrap();
    }
    let memory = Memory::new(&[(0, 1 << 20)]).unwrap();
    let disk = Disk::open(&Image::raw(file.try_clone().unwrap()), &memory, backend, 8, "disk0").unwrap();
    (disk, memory, file)
}

fn on_file(backend: Backend) -> (Disk, Memory, File) {
    disk(backend, tempfile::tempfile().unwrap())
}

fn run(disk: &mut Disk) -> Vec<Ended> {
    let mut ended = Vec::new();
    disk.drain(&mut ended);
    ended.sort_by_key(|(tag, _)| *tag);
    ended
}

fn all_well(ended: &[Ended], tags: &[u16]) {
    let well: Vec<u16> = ended.iter().map(|(tag, end)| end.as_ref().map(|()| *tag).unwrap()).collect();
    assert_eq!(well, tags);
}

#[test]
fn reads_scatter_and_writes_gather() {
    for backend in BOTH {
        let (mut disk, memory, file) = on_file(backend);
        disk.take(0, Action::Read, (0xfffe, 6), [(0x100, 3), (0x200, 3)].into_iter()).unwrap();
        memory.ram().write_slice(b"mayfly", GuestAddress(0x300)).unwrap();
        disk.take(1, Action::Write, (0x2_0001, 6), [(0x302, 4), (0x300, 2)].into_iter()).unwrap();
        all_well(&run(&mut disk), &[0, 1]);
        let mut bytes = [0; 8];
        memory.ram().read_slice(&mut bytes[..4], GuestAddress(0x100)).unwrap();
        memory.ram().read_slice(&mut bytes[4..], GuestAddress(0x200)).unwrap();
        assert_eq!(bytes, [1, 1, 2, 0, 2, 2, 2, 0], "{backend:?}");
        file.read_exact_at(&mut bytes, 0x2_0000).unwrap();
        assert_eq!(&bytes, b"\x03yflyma\x03", "{backend:?}");
    }
}

#[test]
fn more_pieces_than_the_kernel_takes_go_in_several_steps() {
    for backend in BOTH {
        let (mut disk, memory, _file) = on_file(backend);
        let parts = (0..3000).map(|n| (n * 8, 5));
        disk.take(7, Action::Read, (0, 15000), parts).unwrap();
        all_well(&run(&mut disk), &[7]);
        let last: [u8; 6] = memory.ram().read_obj(GuestAddress(2999 * 8)).unwrap();
        assert_eq!(last, [1, 1, 1, 1, 1, 0], "{backend:?}");
    }
}

#[test]
fn zeros_and_holes_read_as_zeros_on_any_file() {
    let memfd = || File::from(memfd_create("zeros", MemfdFlags::CLOEXEC).unwrap());
    for backend in BOTH {
        // A memory file has no ZERO_RANGE: zeros are written.
        for (mut disk, _memory, file) in [on_file(backend), self::disk(backend, memfd())] {
            disk.take(0, Action::Zero { unmap: false }, (0x1000, 0x2_3000), std::iter::empty()).unwrap();
            disk.take(1, Action::Zero { unmap: true }, (0x4_0000, 0x1000), std::iter::empty()).unwrap();
            disk.take(2, Action::Discard, (0x5_0000, 0x1000), std::iter::empty()).unwrap();
            disk.take(3, Action::Flush, (0, 0), std::iter::empty()).unwrap();
            all_well(&run(&mut disk), &[0, 1, 2, 3]);
            let byte = |at| {
                let mut byte = [0xff];
                file.read_exact_at(&mut byte, at).unwrap();
                byte[0]
            };
            let found = [0xfff, 0x1000, 0x2_3fff, 0x2_4000, 0x4_0000, 0x4_0fff, 0x4_1000].map(byte);
            assert_eq!(found, [1, 0, 0, 3, 0, 0, 5], "{backend:?}");
            assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        }
    }
}

#[test]
fn what_the_host_refuses_is_an_error_of_that_job_alone() {
    for backend in BOTH {
        let (mut disk, memory, file) = on_file(backend);
        file.set_len(0x8000).unwrap();
        disk.take(0, Action::Read, (0x8000, 512), [(0, 512)].into_iter()).unwrap();
        disk.take(1, Action::Read, (0, 512), [(0, 512)].into_iter()).unwrap();
        let ended = run(&mut disk);
        let kinds: Vec<_> = ended.iter().map(|(_, end)| end.as_ref().err().map(io::Error::kind)).collect();
        assert_eq!(kinds, [Some(io::ErrorKind::UnexpectedEof), None], "{backend:?}");
        for parts in [[(1 << 20, 512)], [((1 << 20) - 1, 512)], [(0, 511)]] {
            assert!(disk.take(2, Action::Read, (0, 512), parts.into_iter()).is_err(), "{parts:x?}");
        }

        let read_only =
            File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file))).unwrap();
        let mut disk = Disk::open(&Image::raw(read_only), &memory, backend, 8, "disk0").unwrap();
        disk.take(3, Action::Write, (0, 512), [(0, 512)].into_iter()).unwrap();
        assert!(run(&mut disk)[0].1.is_err(), "{backend:?}");
    }
}

#[test]
fn dropping_a_disk_waits_for_its_jobs() {
    for backend in BOTH {
        let (mut disk, memory, file) = on_file(backend);
        memory.ram().write_slice(&[0xee; 4096], GuestAddress(0)).unwrap();
        for tag in 0..8 {
            disk.take(tag, Action::Write, (u64::from(tag) << 12, 4096), [(0, 4096)].into_iter()).unwrap();
        }
        drop(disk);
        let mut bytes = vec![0; 8 << 12];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0xee), "{backend:?}");
    }
}

#[test]
fn a_file_in_memory_needs_no_thread() {
    let memfd = File::from(memfd_create("prompt", MemfdFlags::CLOEXEC).unwrap());
    let (mut disk, memory, _file) = disk(Backend::Auto, memfd);
    disk.take(0, Action::Read, (0, 512), [(0, 512)].into_iter()).unwrap();
    disk.take(1, Action::Write, (0, 512), [(0, 512)].into_iter()).unwrap();
    disk.take(2, Action::Flush, (0, 0), std::iter::empty()).unwrap();
    disk.go();
    let mut ended = Vec::new();
    disk.reap(&mut ended);
    all_well(&ended, &[0, 1, 2]);
    assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(511)).unwrap(), 1);
}

#[test]
fn a_job_in_the_page_cache_ends_in_the_call_that_starts_it() {
    use rustix::io::{IoSliceMut, ReadWriteFlags, preadv2};
    for backend in BOTH {
        let (mut disk, _memory, file) = on_file(backend);
        if let Err(cause) = preadv2(&file, &mut [IoSliceMut::new(&mut [0])], 0, ReadWriteFlags::NOWAIT) {
            return eprintln!(
                "skipped: temporary files here are on a file system without RWF_NOWAIT: {cause}"
            );
        }
        disk.take(0, Action::Read, (0, 4096), [(0, 4096)].into_iter()).unwrap();
        disk.go();
        let mut ended = Vec::new();
        disk.reap(&mut ended);
        all_well(&ended, &[0]);
    }
}

#[test]
fn a_file_that_may_not_be_changed_is_an_error_and_keeps_its_content() {
    use rustix::fs::{SealFlags, fcntl_add_seals};
    for backend in BOTH {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let (mut disk, _memory, file) = disk(backend, memfd_create("sealed", flags).unwrap().into());
        // As with a file that is immutable or in use for swapping: it is no matter of what the file system can do.
        fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        let actions = [Action::Discard, Action::Zero { unmap: true }, Action::Zero { unmap: false }];
        for (tag, action) in (0..).zip(actions) {
            disk.take(tag, action, (0, 4096), std::iter::empty()).unwrap();
        }
        for (tag, end) in run(&mut disk) {
            let errno = end.map_err(|cause| cause.raw_os_error());
            assert_eq!(errno, Err(Some(libc::EPERM)), "{backend:?}: {:?}", actions[usize::from(tag)]);
        }
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [1], "{backend:?}");
    }
}

/// A host disk that is full: a file that must not grow.
fn full(bytes: u64, room: u64) -> File {
    use rustix::fs::{SealFlags, fcntl_add_seals};
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("full", flags).unwrap());
    super::qcow2::create(file.try_clone().unwrap(), bytes, None).unwrap();
    file.set_len(room).unwrap();
    fcntl_add_seals(&file, SealFlags::GROW).unwrap();
    file
}

#[test]
fn a_full_host_disk_loses_nothing_that_was_written() {
    const BYTES: u64 = 64 << 20;
    let file = full(BYTES, 1 << 20);
    let open = |file: &File| {
        let image = super::qcow2::Opening::new(file.try_clone().unwrap(), true).unwrap().image(None);
        let memory = Memory::new(&[(0, 1 << 20)]).unwrap();
        (Disk::open(&image, &memory, Backend::Auto, 8, "disk0").unwrap(), memory)
    };
    let (mut disk, mut memory) = open(&file);
    let act = |disk: &mut Disk, action, at: u64| {
        disk.take(0, action, (at, 4096), [(0x1000, 4096)].into_iter()).unwrap();
        run(disk).pop().unwrap().1
    };
    let (mut known, mut refused) = (std::collections::BTreeMap::new(), 0);
    for round in 0..400u64 {
        // Some new clusters, some that are there.
        let among = if round % 3 == 0 { BYTES } else { 1 << 20 };
        let at = (round.wrapping_mul(0x9e37_79b9_7f4a_7c15) % among) & !4095;
        let byte = u8::try_from(round % 255).unwrap() + 1;
        memory.ram().write_slice(&[byte; 4096], GuestAddress(0x1000)).unwrap();
        match act(&mut disk, Action::Write, at) {
            Ok(()) => {
                known.insert(at, byte);
            }
            Err(_) => {
                refused += 1;
                known.remove(&at);
            }
        }
        if round % 50 == 49 {
            let flushed = act(&mut disk, Action::Flush, 0);
            if flushed.is_ok() && round % 100 == 99 {
                drop(disk);
                (disk, memory) = open(&file);
            }
        }
        for (at, byte) in &known {
            act(&mut disk, Action::Read, *at).unwrap();
            let mut found = [0; 4096];
            memory.ram().read_slice(&mut found, GuestAddress(0x1000)).unwrap();
            assert!(found == [*byte; 4096], "round {round}: {at:#x} reads {:#x}, not {byte:#x}", found[0]);
        }
    }
    assert!(refused > 10 && known.len() > 10, "{refused} refused, {} written", known.len());
}

/// Jobs in flight at once on pieces of the same clusters and pages do not disturb each other.
#[test]
fn neighbours_changed_at_once_stay_apart() {
    const BYTES: usize = 1024;
    const PIECE: u64 = BYTES as u64;
    const PIECES: u64 = 512;
    let file = |byte: u8| {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![byte; usize::try_from(PIECE * PIECES).unwrap()], 0).unwrap();
        file
    };
    let on_raw = || {
        let top = tempfile::tempfile().unwrap();
        let backing = Some(("base.img".to_owned(), "raw"));
        super::qcow2::create(top.try_clone().unwrap(), PIECE * PIECES, backing).unwrap();
        let opening = super::qcow2::Opening::new(top, true).unwrap();
        opening.image(Some(super::qcow2::Backing::raw(file(0xee)).unwrap()))
    };
    let throwaway = || Image::throwaway(file(0xee), tempfile::tempfile().unwrap()).unwrap();
    for round in 0..16u64 {
        let images = [
            ("raw", Image::raw(file(0xee)), Backend::Uring),
            ("overlay", throwaway(), Backend::Uring),
            ("overlay on threads", throwaway(), Backend::Threads),
            ("qcow2 on raw", on_raw(), Backend::Auto),
        ];
        for (name, image, backend) in images {
            let memory = Memory::new(&[(0, PIECE * PIECES)]).unwrap();
            let mut disk = Disk::open(&image, &memory, backend, 128, "disk0").unwrap();
            // An odd factor: each piece once, neighbours soon after each other or far apart.
            let order = (0..PIECES).map(|n| n * (2 * round + 1) % PIECES);
            let mut expected = vec![0xee; usize::try_from(PIECES).unwrap()];
            for (n, piece) in order.enumerate() {
                if n % 128 == 0 {
                    assert!(run(&mut disk).iter().all(|(_, end)| end.is_ok()), "{name}");
                }
                let place = usize::try_from(piece).unwrap();
                let (at, byte) = (piece * PIECE, u8::try_from(piece % 250).unwrap() + 1);
                memory.ram().write_slice(&[byte; BYTES], GuestAddress(at)).unwrap();
                let action = match (piece * 7 + round) % 8 {
                    0 => Action::Zero { unmap: true },
                    1 => Action::Zero { unmap: false },
                    2 => continue,
                    _ => Action::Write,
                };
                expected[place] = if action == Action::Write { byte } else { 0 };
                let part = (action == Action::Write).then_some((at, 1024));
                disk.take(u16::try_from(n % 128).unwrap(), action, (at, PIECE), part.into_iter()).unwrap();
            }
            assert!(run(&mut disk).iter().all(|(_, end)| end.is_ok()), "{name}");
            let whole = PIECE * PIECES;
            disk.take(0, Action::Read, (0, whole), [(0, u32::try_from(whole).unwrap())].into_iter()).unwrap();
            all_well(&run(&mut disk), &[0]);
            let mut found = vec![0; usize::try_from(whole).unwrap()];
            memory.ram().read_slice(&mut found, GuestAddress(0)).unwrap();
            for (piece, (bytes, expected)) in found.chunks(BYTES).zip(expected).enumerate() {
                assert!(
                    bytes.iter().all(|byte| *byte == expected),
                    "{name}, round {round}: piece {piece} is {:#x}, not {expected:#x}",
                    bytes[0]
                );
            }
        }
    }
}
