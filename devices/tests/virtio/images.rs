//! Disks that are more than a raw file: overlays, qcow2, direct I/O, several queues, limits, and a size that changes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base::clock::ManualClock;
use base::disk::qcow2;
use base::host::fake::{FILE_BYTES, FakeHost};
use base::memory::Memory;
use devices::catalog::Body;
use vm_memory::{Bytes, GuestAddress};

use super::blk::*;
use super::driver::*;

fn file() -> File {
    tempfile::tempfile().unwrap()
}

/// A host with a base image `a.img`, each 64 KiB of it filled with its number plus 1.
fn host() -> (FakeHost, File) {
    let (host, base) = (FakeHost::default(), file());
    for n in 0..16u8 {
        base.write_all_at(&[n + 1; 64 << 10], u64::from(n) << 16).unwrap();
    }
    host.put(Path::new("a.img"), base.try_clone().unwrap());
    (host, base)
}

fn put_qcow2(host: &FakeHost, name: &str, backing: Option<(&str, &str)>) -> File {
    let made = file();
    let backing = backing.map(|(name, format)| (name.to_owned(), format));
    qcow2::create(made.try_clone().unwrap(), FILE_BYTES, backing).unwrap();
    host.put(Path::new(name), made.try_clone().unwrap());
    made
}

fn refusal(host: &FakeHost, text: &str) -> String {
    let memory = Memory::new(&RAM).unwrap();
    match build("blk", text, host, &memory) {
        Ok(_) => panic!("{text} is accepted"),
        Err(fail) => fail.to_string(),
    }
}

fn write(player: &mut Player, sector: u64, byte: u8, sectors: usize) {
    player.fill(DATA, byte, sectors * 512);
    let len = u32::try_from(sectors * 512).unwrap();
    assert_eq!(player.run(OUT, sector, &[(DATA, len, false)]), (OK, 1), "write {sectors} at {sector}");
}

fn first_byte(player: &mut Player, sector: u64) -> u8 {
    player.fill(DATA, 0xee, 512);
    assert_eq!(player.run(IN, sector, &[(DATA, 512, true)]), (OK, 513), "read sector {sector}");
    player.byte(DATA)
}

/// Writes, clears and reads as every disk does it, on one whose sector `n` reads as `n / 128 + 1` or 0 at first.
fn lives(player: &mut Player, base: bool) {
    let old = |sector: u64| if base { u8::try_from(sector / 128 + 1).unwrap() } else { 0 };
    write(player, 127, 0xa1, 2);
    let found = [126, 127, 128, 129].map(|sector| first_byte(player, sector));
    assert_eq!(found, [old(126), 0xa1, 0xa1, old(129)]);
    assert_eq!(player.clear(ZEROES, 1000, 100, 1), OK);
    assert_eq!(player.clear(ZEROES, 1100, 100, 0), OK);
    assert_eq!(player.clear(DISCARD, 127, 1, 0), OK);
    let found = [999, 1000, 1199, 1200, 128].map(|sector| first_byte(player, sector));
    assert_eq!(found, [old(999), 0, 0, old(1200), 0xa1]);
    write(player, 1050, 0xa2, 1);
    // One read across all of it.
    player.fill(DATA, 0xee, 200 << 10);
    assert_eq!(player.run(IN, 900, &[(DATA, 100 << 10, true), (DATA + (100 << 10), 100 << 10, true)]).0, OK);
    let found = [99, 100, 149, 150, 151, 300].map(|n| player.byte(DATA + n * 512));
    assert_eq!(found, [old(999), 0, 0, 0xa2, 0, old(1200)]);
    assert_eq!(player.run(FLUSH, 0, &[]), (OK, 1));
    assert_eq!((player.rig.meter("errors"), player.rig.meter("faults")), (0, 0));
}

#[test]
fn an_overlay_takes_the_writes_and_goes_with_the_machine() {
    for io in BACKENDS {
        let (host, base) = host();
        let text = format!("path=a.img,overlay=on,io={io}");
        let mut players = [Player::of(&host, &text), Player::of(&host, &text)];
        for player in &mut players {
            lives(player, true);
        }
        drop(players);
        let mut player = Player::of(&host, &text);
        assert_eq!(first_byte(&mut player, 127), 1, "{io}: nothing is left of the others");
        let mut bytes = vec![0; usize::try_from(FILE_BYTES).unwrap()];
        base.read_exact_at(&mut bytes, 0).unwrap();
        assert!(
            bytes.iter().enumerate().all(|(at, byte)| usize::from(*byte) == (at >> 16) + 1),
            "{io}: the base"
        );
    }
}

#[test]
fn a_disk_in_a_thousand_patches_reads_whole() {
    for io in BACKENDS {
        let (host, _) = host();
        let mut player = Player::of(&host, &format!("path=a.img,overlay=on,io={io}"));
        for sector in (1..256).step_by(2) {
            write(&mut player, sector, 0xc3, 1);
        }
        // More steps than the lane takes in one go, several times at once.
        let statuses = [0, 1, 2].map(|n| player.ask(IN, 0, &[(DATA + (n << 17), 128 << 10, true)], false));
        player.rig.notify(0);
        for _ in statuses {
            assert_eq!(player.rig.wait_used(&mut player.queue).1, (128 << 10) + 1, "{io}");
        }
        for (n, status) in (0..).zip(statuses) {
            assert_eq!(player.byte(status), OK, "{io}");
            let wrong = (0..256u64).find(|sector| {
                let old = u8::try_from(sector / 128 + 1).unwrap();
                player.byte(DATA + (n << 17) + sector * 512 + 511) != if sector % 2 == 1 { 0xc3 } else { old }
            });
            assert_eq!(wrong, None, "{io}: this sector is wrong");
        }
    }
}

#[test]
fn a_reset_does_not_lose_an_overlay() {
    let (host, _) = host();
    let mut player = Player::of(&host, "path=a.img,overlay=on");
    write(&mut player, 5, 0xb7, 1);
    player.rig.set(reg::STATUS, 0);
    let features = player.rig.offered();
    player.queue = player.rig.start(features, 256);
    assert_eq!(first_byte(&mut player, 5), 0xb7);
}

#[test]
fn an_overlay_outlives_a_restart_of_the_machine() {
    for text in ["path=a.img,overlay=on", "path=q,format=qcow2,overlay=on"] {
        let host = FakeHost::for_lives();
        put_qcow2(&host, "q", None);
        let mut player = Player::of(&host, text);
        write(&mut player, 5, 0xb8, 1);
        drop(player);
        let mut player = Player::of(&host, text);
        assert_eq!(first_byte(&mut player, 5), 0xb8, "{text}");
    }
}

#[test]
fn a_kept_overlay_is_there_again_and_fits_its_base_only() {
    let (host, base) = host();
    host.put(Path::new("over"), file());
    let text = "path=a.img,overlay=over";
    let mut player = Player::of(&host, text);
    lives(&mut player, true);
    assert!(refusal(&host, text).starts_with("lock over for test0: another process uses it"));
    drop(player);
    let mut player = Player::of(&host, text);
    let found = [126, 128, 1000, 1050].map(|sector| first_byte(&mut player, sector));
    assert_eq!(found, [1, 0xa1, 0, 0xa2]);
    drop(player);

    host.put(Path::new("b.img"), base.try_clone().unwrap());
    let here = std::env::current_dir().unwrap();
    assert_eq!(
        refusal(&host, "path=b.img,overlay=over"),
        format!(
            "use over as overlay of test0: it was made for {here}/a.img (raw), not for {here}/b.img (raw)\n  \
             hint: if only the name has changed: qemu-img rebase -u -F raw -b {here}/b.img over",
            here = here.display()
        )
    );
    base.set_len(FILE_BYTES + 512).unwrap();
    let refused = refusal(&host, text);
    assert!(refused.contains("its disk has 1048576 bytes, that of its base 1049088"), "{refused}");
    let junk = file();
    junk.write_all_at(b"junk", 0).unwrap();
    host.put(Path::new("junk"), junk);
    let refused = refusal(&host, "path=a.img,overlay=junk");
    assert!(refused.starts_with("use junk as overlay of test0: "), "{refused}");
}

#[test]
fn qcow2_images_are_disks() {
    let (host, _) = host();
    put_qcow2(&host, "q", None);
    let mut player = Player::of(&host, "path=q,format=qcow2");
    lives(&mut player, false);
    drop(player);
    let mut player = Player::of(&host, "path=q,format=qcow2,readonly=on");
    assert_eq!(first_byte(&mut player, 1050), 0xa2, "what was written is in the image");
    assert_eq!(player.run(OUT, 0, &[(DATA, 512, false)]), (IOERR, 1), "read-only");
    drop(player);
    for text in ["path=q,format=qcow2,overlay=on", "path=q,format=qcow2,overlay=over"] {
        host.put(Path::new("over"), file());
        let mut player = Player::of(&host, text);
        write(&mut player, 1050, 0xa3, 1);
        assert_eq!(first_byte(&mut player, 1050), 0xa3);
        drop(player);
        let mut player = Player::of(&host, "path=q,format=qcow2,readonly=on");
        assert_eq!(first_byte(&mut player, 1050), 0xa2, "{text}: the image below stays as it is");
    }
}

#[test]
fn what_is_written_without_a_flush_is_in_the_image_after_a_reset() {
    let (host, _) = host();
    let image = put_qcow2(&host, "q", None);
    let mut player = Player::of(&host, "path=q,format=qcow2");
    write(&mut player, 77, 0x77, 1);
    player.rig.set(reg::STATUS, 0);
    // As somebody would find it after a kill -9: read from the file, not through the device.
    let again = File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&image))).unwrap();
    let other = FakeHost::default();
    let copy = file();
    std::io::copy(&mut &again, &mut &copy).unwrap();
    other.put(Path::new("q"), copy);
    let mut player = Player::of(&other, "path=q,format=qcow2,readonly=on");
    assert_eq!(first_byte(&mut player, 77), 0x77);
}

#[test]
fn formats_and_backing_files_are_never_guessed() {
    let (host, _) = host();
    put_qcow2(&host, "q", None);
    put_qcow2(&host, "over-a", Some(("a.img", "raw")));
    put_qcow2(&host, "over-q", Some(("q", "qcow2")));
    put_qcow2(&host, "itself", Some(("itself", "qcow2")));
    put_qcow2(&host, "odd", Some(("a.img", "vmdk")));
    put_qcow2(&host, "far", Some(("nbd://host/disk", "raw")));
    assert_eq!(
        refusal(&host, "path=q"),
        "use q as image of test0: it looks like qcow2, and no format was said\n  \
         hint: pass format=qcow2, or format=raw if its bytes are those of the disk"
    );
    let mut player = Player::of(&host, "path=q,format=raw,readonly=on");
    assert_eq!(first_byte(&mut player, 0), b'Q', "said to be raw, it is");
    drop(player);
    assert_eq!(
        refusal(&host, "path=a.img,format=qcow2"),
        "use a.img as image of test0: it is no qcow2 image\n  hint: pass format=raw, or leave format out"
    );
    assert_eq!(
        refusal(&host, "path=over-a,format=qcow2"),
        "use over-a as image of test0: it stands on a.img, and backing files are not followed unasked\n  \
         hint: pass backing=on if you trust the image's maker"
    );
    let mut player = Player::of(&host, "path=over-a,format=qcow2,backing=on");
    lives(&mut player, true);
    drop(player);
    let mut player = Player::of(&host, "path=over-q,format=qcow2,backing=on");
    lives(&mut player, false);
    drop(player);
    for (name, cause) in [
        ("itself", "another process uses it"),
        ("odd", "the format of its backing file a.img is vmdk, which is not supported"),
        ("far", "its backing file nbd://host/disk is no plain file"),
    ] {
        let refused = refusal(&host, &format!("path={name},format=qcow2,backing=on"));
        assert!(refused.contains(cause), "{name}: {refused}");
    }
    let refused = refusal(&host, "path=itself,format=qcow2,backing=on,readonly=on");
    assert!(refused.contains("more than 8 images stand on one another"), "{refused}");
}

#[test]
fn damaged_qcow2_images_give_one_clear_error() {
    let (host, _) = host();
    let image = put_qcow2(&host, "q", None);
    let damage = |offset: u64, bytes: &[u8]| {
        let mut good = vec![0; bytes.len()];
        image.read_exact_at(&mut good, offset).unwrap();
        image.write_all_at(bytes, offset).unwrap();
        let refused = refusal(&host, "path=q,format=qcow2");
        image.write_all_at(&good, offset).unwrap();
        assert!(
            refused.starts_with("use q as image of test0: as a qcow2 image it cannot be used: "),
            "{refused}"
        );
        assert!(refused.ends_with("\n  hint: qemu-img check q"), "{refused}");
        refused
    };
    assert!(damage(4, &[0, 0, 0, 9]).contains("v9"), "version");
    assert!(damage(40, &[0xff; 8]).contains("L1 table"), "L1 table");
    assert!(damage(48, &[0x7f, 0, 0, 0, 0, 0, 0, 0]).contains("refcount table is not within the file"));
    assert!(damage(79, &[2]).contains("marked as damaged"));
    let mut table = [0; 8];
    image.read_exact_at(&mut table, 48).unwrap();
    let refused = damage(u64::from_be_bytes(table), &[0; 8]);
    assert!(refused.contains("its header at 0x0 counts as free space"), "{refused}");
    Player::of(&host, "path=q,format=qcow2");
}

#[test]
fn settings_that_make_no_sense_together_are_refused() {
    let (host, _) = host();
    for (text, cause) in [
        ("overlay=on,readonly=on", "a read-only disk is never written to"),
        ("overlay=on,direct=on", "an overlay lives by the page cache"),
        ("backing=on", "only qcow2 images have backing files"),
        ("queues=0", "queues is not 1 to 64"),
        ("queues=65", "queues is not 1 to 64"),
        ("iops=0", "iops=0 lets no request through"),
        ("bandwidth=0", "bandwidth=0 lets no request through"),
        ("iops_burst=5", "a burst needs a limit"),
        ("bandwidth_burst=5M", "a burst needs a limit"),
    ] {
        let refused = refusal(&host, &format!("path=a.img,{text}"));
        assert!(refused.starts_with("set up test0: ") && refused.contains(cause), "{text}: {refused}");
        assert!(refused.contains("\n  hint: "), "{text}: {refused}");
    }
    put_qcow2(&host, "q", None);
    let refused = refusal(&host, "path=q,format=qcow2,io=uring");
    assert!(refused.contains("qcow2 images need threads\n  hint: pass io=threads or io=auto"), "{refused}");
    let refused = refusal(&host, "path=a.img,bandwidth=fast");
    assert!(refused.contains("\"fast\" is no amount: write 500, 64K, 100M or 2G"), "{refused}");
}

#[test]
fn direct_disks_take_buffers_at_any_address() {
    for io in BACKENDS {
        let image = tempfile::NamedTempFile::new().unwrap();
        let (host, _) = host();
        host.put(Path::new("d.img"), image.reopen().unwrap());
        image.as_file().set_len(FILE_BYTES).unwrap();
        let memory = Memory::new(&RAM).unwrap();
        let text = format!("path=d.img,direct=on,io={io}");
        if let Err(fail) = build("blk", &text, &host, &memory) {
            return eprintln!("skipped: temporary files here know no O_DIRECT: {fail}");
        }
        let mut player = Player::of(&host, &text);
        player.fill(DATA + 3, 0x31, 2048);
        player.fill(DATA + 4001, 0x32, 2048);
        let parts = [(DATA + 3, 1000, false), (DATA + 4001, 1048, false)];
        assert_eq!(player.run(OUT, 8, &parts), (OK, 1), "{io}");
        player.fill(DATA, 0, 8192);
        let parts = [(DATA + 7, 1, true), (DATA + 101, 2047, true)];
        assert_eq!(player.run(IN, 8, &parts), (OK, 2049), "{io}");
        let found = [DATA + 6, DATA + 7, DATA + 101, DATA + 1099, DATA + 1100, DATA + 2147, DATA + 2148];
        assert_eq!(found.map(|at| player.byte(at)), [0, 0x31, 0x31, 0x31, 0x32, 0x32, 0], "{io}");
        assert_eq!(player.clear(ZEROES, 8, 4, 0), OK);
        assert_eq!(first_byte(&mut player, 8), 0);
        assert_eq!(player.rig.meter("errors"), 0);
    }
}

#[test]
fn direct_qcow2_disks_take_any_sector() {
    let (host, _) = host();
    for (name, backing) in [("top.qcow2", Some(("below.qcow2", "qcow2"))), ("below.qcow2", None)] {
        let image = tempfile::NamedTempFile::new().unwrap();
        let backing = backing.map(|(name, format)| (name.to_owned(), format));
        qcow2::create(image.reopen().unwrap(), FILE_BYTES, backing).unwrap();
        host.put(Path::new(name), image.into_file());
    }
    let text = "path=top.qcow2,format=qcow2,backing=on,direct=on";
    match build("blk", text, &host, &Memory::new(&RAM).unwrap()) {
        Err(fail) if fail.to_string().contains("past the page cache") => {
            return eprintln!("skipped: temporary files here know no O_DIRECT: {fail}");
        }
        built => drop(built.unwrap_or_else(|fail| panic!("{fail}"))),
    }
    let mut player = Player::of(&host, text);
    write(&mut player, 3, 0x42, 1);
    let found = [2, 3, 4].map(|sector| first_byte(&mut player, sector));
    assert_eq!((found, player.run(FLUSH, 0, &[])), ([0, 0x42, 0], (OK, 1)));
}

#[test]
fn several_queues_share_one_disk() {
    let (host, _) = host();
    let mut rig = Rig::of("blk", "path=a.img,queues=3", &host);
    let mut config = [0; 36];
    rig.config(0, &mut config);
    assert_eq!(config[34..36], 3u16.to_le_bytes(), "num_queues");
    let features = rig.offered();
    assert_ne!(features & 1 << 12, 0, "VIRTIO_BLK_F_MQ");
    assert!(rig.negotiate(features));
    let mut queues: Vec<Virtq> = (0..3).map(|index| rig.queue(index, 64, features)).collect();
    rig.go();
    for round in 0..30u64 {
        for (n, queue) in (0u64..).zip(&mut queues) {
            let (header, data) = (HEADERS + n * 4096, DATA + n * 4096);
            rig.ram().write_obj([IN, 0], GuestAddress(header)).unwrap();
            rig.ram().write_obj((n * 128 + round).to_le(), GuestAddress(header + 8)).unwrap();
            queue.push(rig.ram(), &[(header, 16, false), (data, 512, true), (header + 16, 1, true)]);
            rig.notify(queue.index);
        }
        for (n, queue) in (0u64..).zip(&mut queues) {
            assert_eq!(rig.wait_used(queue).1, 513);
            let found: u8 = rig.ram().read_obj(GuestAddress(DATA + n * 4096)).unwrap();
            assert_eq!(u64::from(found), n + 1, "queue {n}, round {round}");
        }
    }
    assert_eq!(rig.meter("reads"), 90);
}

#[test]
fn limits_let_requests_wait_in_the_ring() {
    let (host, _) = host();
    let clock = Arc::new(ManualClock::at(Duration::from_secs(1)));
    for (text, at_once, wait) in [
        ("iops=10,iops_burst=3", 3, 100),
        ("bandwidth=10K,bandwidth_burst=1K", 2, 50),
        ("iops=10,iops_burst=3,bandwidth=1M", 3, 100),
    ] {
        let memory = Memory::new(&RAM).unwrap();
        let body = build_at("blk", &format!("path=a.img,{text}"), &host, &memory, clock.clone()).unwrap();
        let Body::Virtio(device) = body else { panic!("a disk is a virtio device") };
        let mut player = Player::behind(Rig::new(device, memory));
        for n in 0..6 {
            player.ask(IN, n, &[(DATA + n * 512, 512, true)], false);
        }
        for expected in at_once..=6 {
            player.rig.notify(0);
            player.rig.settle();
            assert_eq!(player.rig.meter("reads"), expected, "{text}");
            // A hurried driver changes nothing.
            player.rig.notify(0);
            player.rig.settle();
            assert_eq!(player.rig.meter("reads"), expected, "{text}");
            clock.advance(Duration::from_millis(wait));
        }
        assert!(player.rig.meter("throttled") > 0, "{text}");
        for _ in 0..6 {
            player.rig.wait_used(&mut player.queue);
        }
        player.rig.set(reg::STATUS, 0);
    }
}

#[test]
fn the_lane_takes_up_what_waited_by_itself() {
    let (host, _) = host();
    let mut player = Player::of(&host, "path=a.img,iops=200,iops_burst=1");
    for n in 0..5 {
        player.ask(IN, n, &[(DATA + n * 512, 512, true)], false);
    }
    player.rig.notify(0);
    for _ in 0..5 {
        assert_eq!(player.rig.wait_used(&mut player.queue).1, 513);
    }
    drop(player);
    // And a reset while one waits is not held up by it.
    let mut player = Player::of(&host, "path=a.img,iops=1,iops_burst=1");
    for n in 0..5 {
        player.ask(IN, n, &[(DATA + n * 512, 512, true)], false);
    }
    player.rig.notify(0);
    player.rig.wait_used(&mut player.queue);
    player.rig.set(reg::STATUS, 0);
    assert_eq!(player.rig.get(reg::STATUS), 0);
}

#[test]
fn a_new_size_reaches_the_driver() {
    let (host, base) = host();
    let sectors = |rig: &mut Rig| {
        let mut config = [0; 8];
        rig.config(0, &mut config);
        u64::from_le_bytes(config)
    };
    let mut rig = Rig::of("blk", "path=a.img", &host);
    base.set_len(2 << 20).unwrap();
    assert_eq!(sectors(&mut rig), SECTORS, "nobody has asked");
    rig.via.refresh().unwrap();
    assert_eq!((sectors(&mut rig), rig.bell.edges()), (4096, 0), "no driver, no interrupt");

    let mut player = Player::behind(rig);
    assert_eq!(player.run(IN, 4095, &[(DATA, 512, true)]), (OK, 513));
    let (edges, generation) = (player.rig.bell.edges(), player.rig.get(reg::GENERATION));
    player.rig.via.refresh().unwrap();
    assert_eq!(player.rig.bell.edges(), edges, "nothing new, no interrupt");
    base.set_len(3 << 20).unwrap();
    player.rig.via.refresh().unwrap();
    assert_eq!(player.rig.bell.edges(), edges + 1);
    assert_eq!(player.rig.get(reg::CAUSES) & 2, 2, "configuration change");
    assert_ne!(player.rig.get(reg::GENERATION), generation);
    assert_eq!(sectors(&mut player.rig), 6144);
    assert_eq!(player.run(IN, 6143, &[(DATA, 512, true)]), (OK, 513), "the new sectors are there");
    base.set_len(1 << 20).unwrap();
    player.rig.via.refresh().unwrap();
    assert_eq!(player.run(IN, 6143, &[(DATA, 512, true)]).0, IOERR, "and gone");
    assert_eq!(player.rig.meter("errors"), 0, "the host was not asked for them");
}
