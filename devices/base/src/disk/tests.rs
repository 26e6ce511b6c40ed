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
