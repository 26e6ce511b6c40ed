//! Settings that change while a guest runs.

use std::fs::File;
use std::path::Path;

use base::Why;
use base::host::fake::FakeHost;

use super::blk::*;
use super::driver::*;

/// A host with an image of a MiB.
fn host() -> (FakeHost, File) {
    let (host, image) = (FakeHost::default(), tempfile::tempfile().unwrap());
    image.set_len(1 << 20).unwrap();
    host.put(Path::new("a.img"), image.try_clone().unwrap());
    (host, image)
}

fn number(rig: &mut Rig, at: u64) -> u64 {
    let mut config = [0; 8];
    rig.config(at, &mut config);
    u64::from_le_bytes(config)
}

fn refused(rig: &Rig, change: &str) -> String {
    let fail = rig.via.knob().tune(change).expect_err(change);
    assert_eq!(fail.why, Why::Usage, "{fail}");
    fail.to_string()
}

#[test]
fn a_disk_grows_with_its_image() {
    let (host, image) = host();
    let mut player = Player::of(&host, "path=a.img");
    let edges = player.rig.bell.edges();
    player.rig.via.knob().tune("size=3M").unwrap();
    assert_eq!(image.metadata().unwrap().len(), 3 << 20);
    assert_eq!((number(&mut player.rig, 0), player.rig.bell.edges()), (6144, edges + 1));
    assert_eq!(player.run(IN, 6143, &[(DATA, 512, true)]), (OK, 513), "the new sectors are there");
    image.set_len(4 << 20).unwrap();
    player.rig.via.knob().tune("size=auto").unwrap();
    assert_eq!(number(&mut player.rig, 0), 8192, "what others have made of the image");
    for (change, why) in [
        ("size=1M", "the image is larger, and a disk does not shrink"),
        ("size=513", "no whole number of sectors"),
        ("size=much", "size=much: "),
        ("iops=0", "it lets no request through: write off for no limit"),
        ("iops_burst=5", "a burst needs a limit"),
        ("path=b.img", "unknown field `path`, expected one of `size`, `iops`"),
        ("size", "`size` is not KEY=VALUE\n  hint: an example: test0 size=2G"),
        ("size=", "size=: it has no value"),
    ] {
        let told = refused(&player.rig, change);
        assert!(told.contains(why), "{change}: {told}");
    }
    assert_eq!(number(&mut player.rig, 0), 8192, "and nothing has changed");
    drop(player);
    for text in ["path=a.img,readonly=on", "path=a.img,overlay=on"] {
        let told = refused(&Player::of(&host, text).rig, "size=9M");
        assert!(told.contains("read-only") || told.contains("thrown away"), "{told}");
    }
    assert_eq!(image.metadata().unwrap().len(), 4 << 20);
}

#[test]
fn a_limit_that_goes_lets_go_of_what_it_held_up() {
    let (host, _) = host();
    // After the first MiB nothing for 17 minutes.
    let mut player = Player::of(&host, "path=a.img,bandwidth=1K,bandwidth_burst=1");
    for n in 0..5 {
        player.ask(IN, n, &[(DATA, 64 << 10, true)], false);
    }
    player.rig.notify(0);
    player.rig.wait_used(&mut player.queue);
    player.rig.settle();
    assert_eq!(player.rig.meter("reads"), 1);
    player.rig.via.knob().tune("bandwidth=off").unwrap();
    for _ in 0..4 {
        assert_eq!(player.rig.wait_used(&mut player.queue).1, (64 << 10) + 1);
    }
    player.rig.via.knob().tune("iops=1,iops_burst=2").unwrap();
    for n in 0..4 {
        player.ask(IN, n, &[(DATA, 512, true)], false);
    }
    player.rig.notify(0);
    for _ in 0..2 {
        player.rig.wait_used(&mut player.queue);
    }
    player.rig.settle();
    assert_eq!(player.rig.meter("reads"), 7, "two of the burst, and two wait");
    player.rig.set(reg::STATUS, 0);
}

#[test]
fn a_balloon_gets_another_target() {
    let mut rig = Rig::of("balloon", "size=1M", &FakeHost::default());
    // Also before a driver starts it.
    rig.via.knob().tune("size=2M").unwrap();
    assert_eq!((number(&mut rig, 0), rig.bell.edges()), (512, 0));
    rig.start(0, 64);
    rig.via.knob().tune("target=3M").unwrap();
    assert_eq!((number(&mut rig, 0), rig.bell.edges()), (768, 1));
    assert!(refused(&rig, "size=1000").contains("no whole number of pages"));
    assert!(refused(&rig, "size=1T").contains("not less than the guest's memory"));
    assert_eq!(number(&mut rig, 0), 768);
}

#[test]
fn what_has_no_settings_says_so() {
    let rig = Rig::of("rng", "on", &FakeHost::default());
    let told = rig.via.knob().tune("rate=1").unwrap_err().to_string();
    assert_eq!(told, "change test0: it has no settings that can change while it runs");
}
