//! The card itself, on a tap and on passt.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use base::host::Host;
use base::host::fake::FakeHost;
use rustix::io::{read, write};

use super::guest::*;
use super::super::driver::*;
use vm_memory::{Bytes, GuestAddress};

const TAP: &str = "tap=tap7,mac=02:00:00:00:00:07";

/// A frame, longer than one buffer if it is to be.
fn frame(len: usize) -> Vec<u8> {
    let mut frame = vec![0xff; 12];
    frame.extend([0x88, 0xb5]);
    frame.extend(pattern(len - 14));
    frame
}

fn next(card: &mut Card) -> Vec<u8> {
    loop {
        let seen = card.rig.bell.edges();
        if let Some(frame) = card.next_frame() {
            return frame;
        }
        card.rig.bell.wait(seen);
    }
}

#[test]
fn shows_what_it_is() {
    let host = FakeHost::default();
    let mut rig = Rig::of("net", &format!("{TAP},queues=4,mtu=9000"), &host);
    let mut config = [0; 12];
    rig.config(0, &mut config);
    assert_eq!(config[..6], [2, 0, 0, 0, 0, 7]);
    assert_eq!(config[6..], [1, 0, 4, 0, 0x28, 0x23], "link up, 4 pairs, an MTU of 9000");
    let offered = rig.offered();
    for (bit, name) in [
        (0, "CSUM"),
        (1, "GUEST_CSUM"),
        (3, "MTU"),
        (5, "MAC"),
        (7, "GUEST_TSO4"),
        (11, "HOST_TSO4"),
        (15, "MRG_RXBUF"),
        (16, "STATUS"),
        (17, "CTRL_VQ"),
        (22, "MQ"),
        (56, "HOST_USO"),
    ] {
        assert!(offered & 1 << bit != 0, "{name} is offered");
    }
    assert!(offered & 1 << 14 == 0, "HOST_UFO is not: this tap does not know it");
    let mut plain = Rig::of("net", TAP, &host);
    assert!(plain.offered() & 1 << 22 == 0, "one pair needs no MQ");
    let mut passt = rig_on_passt().0;
    assert_eq!(passt.offered() & 0x7fff, 1 << 3 | 1 << 5, "passt has no offloads");
}

#[test]
fn frames_pass_a_tap_both_ways() {
    let host = FakeHost::default();
    let mut card = Card::new(TAP, ALL, &host, 1500);
    let tap = host.far_end().unwrap();
    card.send(&frame(60));
    let mut got = vec![0; 100];
    card.rig.settle();
    let len = read(&tap, &mut got).unwrap();
    assert_eq!(got[..12], [0; 12], "the virtio header goes with it");
    assert_eq!(got[12..len], frame(60));
    // Large ones come in as many buffers as they need.
    for len in [60, 1514, 4084, 4085, 30_000, 65_000] {
        write(&tap, &[&[0; 12][..], &frame(len)].concat()).unwrap();
        assert!(next(&mut card) == frame(len), "{len} bytes");
    }
    assert_eq!(card.rig.meter("received_frames"), 6);
    assert_eq!((card.rig.meter("sent_frames"), card.rig.meter("sent_bytes")), (1, 60));
}

#[test]
fn a_guest_without_buffers_loses_nothing_that_fits_the_tap() {
    let host = FakeHost::default();
    let mut rig = Rig::of("net", TAP, &host);
    let tap = host.far_end().unwrap();
    let features = rig.offered();
    assert!(rig.negotiate(features));
    let mut rx = rig.queue(0, 64, features);
    rig.go();
    for n in 0..8usize {
        write(&tap, &[&[0; 12][..], &frame(100 + n)].concat()).unwrap();
    }
    rig.settle();
    assert_eq!(rig.meter("received_frames"), 0);
    for n in 0..64u64 {
        rx.push(rig.ram(), &[(0x10_0000 + n * 0x1000, 2048, true)]);
    }
    rig.notify(0);
    for n in 0..8u32 {
        assert_eq!(rig.wait_used(&mut rx), (rx_head(n), 12 + 100 + n));
    }
}

/// Chains of one descriptor are handed out in order.
fn rx_head(n: u32) -> u32 {
    n
}

#[test]
fn frames_that_are_none_go_nowhere() {
    let host = FakeHost::default();
    let mut rig = Rig::of("net", TAP, &host);
    let tap = host.far_end().unwrap();
    let features = rig.offered();
    assert!(rig.negotiate(features));
    let mut tx = rig.queue(1, 8, features);
    rig.go();
    for len in [1, 11, 12, 25, 70_000] {
        tx.push(rig.ram(), &[(0x1000, len, false)]);
        rig.notify(1);
        rig.wait_used(&mut tx);
    }
    assert_eq!(rig.meter("malformed_frames"), 5);
    assert!(read(&tap, &mut [0; 64]).is_err(), "nothing came through");
}

/// Sends a command; its answer.
fn command(rig: &mut Rig, control: &mut Virtq, bytes: &[u8]) -> u8 {
    rig.ram().write_slice(bytes, GuestAddress(0x1000)).unwrap();
    rig.ram().write_obj(0xeeu8, GuestAddress(0x2000)).unwrap();
    control.push(rig.ram(), &[(0x1000, u32::try_from(bytes.len()).unwrap(), false), (0x2000, 1, true)]);
    rig.notify(control.index);
    assert_eq!(rig.wait_used(control).1, 1);
    rig.ram().read_obj(GuestAddress(0x2000)).unwrap()
}

#[test]
fn commands_are_obeyed_or_refused() {
    let host = FakeHost::default();
    let mut rig = Rig::of("net", &format!("{TAP},queues=2"), &host);
    let features = rig.offered();
    assert!(rig.negotiate(features));
    let mut control = rig.queue(4, 8, features);
    rig.go();
    for (bytes, answer) in [
        (&[0, 0, 1][..], 0),                     // promiscuous
        (&[4, 0, 2, 0], 0),                      // two pairs
        (&[4, 0, 3, 0], 1),                      // three: there are two
        (&[4, 0, 0, 0], 1),                      // none
        (&[1, 1, 2, 0, 0, 0, 0, 9], 0),          // an address
        (&[1, 1, 3, 0, 0, 0, 0, 9], 1),          // that of a group
        (&[1, 1, 2, 0], 1),                      // half of one
        (&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0], 0),    // checksums only
        (&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0x80], 1), // what is no switch
        (&[9, 9, 9], 1),
        (&[0], 1),
    ] {
        assert_eq!(command(&mut rig, &mut control, bytes), answer, "{bytes:?}");
    }
    let mut mac = [0; 6];
    rig.config(0, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 9]);
    // A driver that knows of one pair has its commands in the third queue.
    assert!(rig.negotiate(features & !(1 << 22)));
    let mut control = rig.queue(2, 8, features);
    rig.go();
    assert_eq!(command(&mut rig, &mut control, &[0, 1, 1]), 0);
    assert_eq!(command(&mut rig, &mut control, &[4, 0, 1, 0]), 1, "pairs were not agreed on");
}

fn rig_on_passt() -> (Rig, OwnedFd) {
    let (host, path) = (FakeHost::default(), Path::new("passt.sock"));
    let listener = host.listen("passt", path).unwrap();
    let rig = Rig::of("net", "passt=passt.sock", &host);
    (rig, rustix::net::accept(&listener.socket).unwrap())
}

#[test]
fn frames_pass_passt_both_ways() {
    let (host, path) = (FakeHost::default(), Path::new("passt.sock"));
    let listener = host.listen("passt", path).unwrap();
    let mut card = Card::new("passt=passt.sock,mtu=60000", ALL, &host, 60_000);
    let mut passt = std::fs::File::from(rustix::net::accept(&listener.socket).unwrap());
    for len in [60, 1514, 60_014] {
        card.send(&frame(len));
        let mut got = vec![0; len + 4];
        passt.read_exact(&mut got).unwrap();
        assert_eq!(got[..4], u32::try_from(len).unwrap().to_be_bytes());
        assert!(got[4..] == frame(len));
        // In two pieces: a stream has no borders.
        got[4..].reverse();
        let (first, second) = got.split_at(7);
        passt.write_all(first).unwrap();
        card.rig.settle();
        passt.write_all(second).unwrap();
        assert!(next(&mut card) == got[4..], "{len} bytes");
    }
    // Frames that nobody may send end the connection, not the machine.
    passt.write_all(&[0xff; 64]).unwrap();
    let mut rest = Vec::new();
    card.rig.settle();
    card.send(&frame(60));
    drop(card);
    passt.read_to_end(&mut rest).unwrap();
}

#[test]
fn a_passt_that_does_not_read_holds_the_guest_up() {
    let (mut rig, passt) = rig_on_passt();
    let features = rig.offered();
    assert!(rig.negotiate(features));
    let mut tx = rig.queue(1, 64, features);
    rig.go();
    for _ in 0..64 {
        tx.push(rig.ram(), &[(0x10_0000, 12 + 60_000, false)]);
    }
    rig.notify(1);
    rig.settle();
    let sent = rig.meter("sent_frames");
    assert!(sent < 64, "{sent} frames of 60 kB went into a full socket");
    // Both sides go on when the other does.
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; 64 * 60_004];
        std::fs::File::from(passt).read_exact(&mut got).map(|()| got)
    });
    for _ in 0..64 {
        rig.wait_used(&mut tx);
    }
    let got = reader.join().unwrap().unwrap();
    assert!(got.chunks(60_004).all(|frame| frame[..4] == 60_000u32.to_be_bytes()));
}

#[test]
fn limits_hold_in_both_directions_and_lose_nothing() {
    let host = FakeHost::default();
    let mut card = Card::new(&format!("{TAP},packets=200,packets_burst=4,bandwidth=100M"), ALL, &host, 1500);
    let tap = host.far_end().unwrap();
    for _ in 0..12 {
        write(&tap, &[&[0; 12][..], &frame(100)].concat()).unwrap();
        card.send(&frame(100));
    }
    for n in 0..12 {
        assert_eq!(next(&mut card), frame(100), "{n}");
    }
    card.wait_until_sent();
    assert!(card.rig.meter("throttled") > 0);
    let mut got = [0; 200];
    assert_eq!((0..12).filter(|_| read(&tap, &mut got) == Ok(112)).count(), 12);
}
