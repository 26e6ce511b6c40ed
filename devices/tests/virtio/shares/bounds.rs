//! What a hostile guest gets: an error, and no more than its part of the host.

use std::fs;

use super::*;

#[test]
fn requests_that_are_none_are_answered_and_harm_nobody() {
    let mut guest = Guest::new(true, "");
    fs::write(guest.dir.path().join("file"), "content").unwrap();
    // Shorter than a header, or not as long as it says.
    for len in [1usize, 15, 39] {
        let answer = guest.send(&vec![0xff; len], 64);
        assert_eq!(word(&answer, 4).cast_signed(), -EINVAL, "{len} bytes");
    }
    for said in [0u32, 39, 41, u32::MAX] {
        let mut request = guest.request(GETATTR, ROOT, &[], (0, 0));
        request[..4].copy_from_slice(&said.to_le_bytes());
        let answer = guest.send(&request, 256);
        assert_eq!(word(&answer, 4).cast_signed(), -EINVAL, "a length of {said}");
    }
    // No room for the answer, or not enough.
    let request = guest.request(GETATTR, ROOT, &[0; 16], (0, 0));
    assert!(guest.send(&request, 0).is_empty() && guest.send(&request, 15).is_empty());
    assert_eq!(word(&guest.send(&request, 16), 4).cast_signed(), -EIO);
    for op in [0, 7, 19, 31, 39, 40, 48, 52, 1000, u32::MAX] {
        assert_eq!(guest.call(op, ROOT, &[0; 64]), Err(ENOSYS), "operation {op}");
    }
    assert_eq!(guest.content("file").unwrap(), b"content", "it is well");
    assert_eq!(guest.rig.meter("faults"), 0);
}

#[test]
fn every_operation_takes_any_body() {
    let mut guest = Guest::new(true, "");
    fs::create_dir(guest.dir.path().join("dir")).unwrap();
    fs::write(guest.dir.path().join("file"), "content").unwrap();
    let (dir, file) = (guest.lookup(ROOT, "dir").unwrap(), guest.lookup(ROOT, "file").unwrap());
    let handle = guest.open(file, O_RDWR).unwrap();
    let mut seed = 7u64;
    let mut roll = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 33
    };
    for round in 0..6000u32 {
        // All but INIT and DESTROY, which would end it.
        let op = round % 54;
        if op == INIT || op == 38 || op == FORGET || op == 42 {
            continue;
        }
        let node = [ROOT, dir, file, 0, roll(), u64::MAX][usize::try_from(roll() % 6).unwrap()];
        let mut body: Vec<u8> = Vec::new();
        for _ in 0..roll() % 12 {
            let value = [0, 1, handle, roll(), u64::MAX, 4096, 1 << 40][usize::try_from(roll() % 7).unwrap()];
            body.extend(value.to_le_bytes());
        }
        if roll() % 2 == 0 {
            body.extend([&b"file\0"[..], b"new\0dir\0", b"dir/..\0x", b"\0\0"][usize::try_from(roll() % 4).unwrap()]);
        }
        // What comes of it is the guest's own doing.
        let _ = guest.call(op, node, &body);
    }
    guest.call(GETATTR, ROOT, &[0; 16]).unwrap();
    assert_eq!(guest.rig.meter("faults"), 0);
}

#[test]
fn lengths_are_those_of_the_request() {
    everywhere("", |mut guest| {
        fs::write(guest.dir.path().join("file"), vec![7; 9000]).unwrap();
        let node = guest.lookup(ROOT, "file").unwrap();
        let handle = guest.open(node, O_RDWR).unwrap();
        for size in [6u32, 1 << 21, u32::MAX] {
            let body = Body::default().longs(&[handle, 0]).words(&[size, 0]).longs(&[0]).words(&[0, 0]);
            let body = [body.0.as_slice(), b"short"].concat();
            assert_eq!(guest.call(WRITE, node, &body), Err(EINVAL), "5 bytes said to be {size}");
        }
        assert_eq!(guest.read(node, handle, (0, u32::MAX)).unwrap().len(), 9000, "what there is, where there is room");
        let body = Body::default().longs(&[handle, 0]).words(&[5000, 0]).longs(&[0]).words(&[0, 0]);
        let request = guest.request(READ, node, &body.0, (0, 0));
        assert_eq!(guest.send(&request, 16 + 100).len(), 116, "no more than there is room for");
        assert_eq!(guest.read(node, handle, (u64::MAX, 10)), Err(EINVAL));
        assert_eq!(guest.read(node, handle + 1, (0, 10)), Err(EBADF));
        assert_eq!(guest.read(ROOT, handle, (0, 10)), Err(EBADF), "a handle of another node");
        let listing = long(&guest.call(OPENDIR, ROOT, &[0; 8]).unwrap(), 0);
        let body = Body::default().longs(&[listing, 0]).words(&[1 << 20, 0]).longs(&[0, 0]);
        let request = guest.request(READDIRPLUS, ROOT, &body.0, (0, 0));
        let answer = guest.send(&request, 16 + 200);
        assert_eq!(word(&answer, 4), 0, "what there is room for is listed");
    });
}

/// What the kernel makes up as it is read is there, and what is read by waiting does not make the lane or the end wait.
#[test]
fn files_of_the_kernel_are_read_and_never_waited_for() {
    let host = FakeHost::default();
    host.put_directory(std::path::Path::new("dir"), std::path::Path::new("/proc"));
    let mut guest = Guest::on(&host, tempfile::tempdir().unwrap(), ",readonly=on");
    let text = guest.content("version").unwrap();
    assert!(text.starts_with(b"Linux version"), "{text:?}");
    // As root it opens, and has nothing more to say after a while; others are refused.
    if let Ok(node) = guest.lookup(ROOT, "kmsg")
        && let Ok(handle) = guest.open(node, 0)
    {
        let all = (0..10_000).find_map(|_| guest.read(node, handle, (0, 60_000)).err());
        assert_eq!(all, Some(11), "it would have to wait");
    }
}
