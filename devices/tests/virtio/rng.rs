//! The entropy device.

use base::host::fake::FakeHost;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{EVENT_IDX, Rig};

fn rig() -> Rig {
    Rig::of("rng", "enabled=on", &FakeHost::default())
}

#[test]
fn fills_what_the_driver_offers() {
    let mut rig = rig();
    let mut queue = rig.start(EVENT_IDX, 8);
    queue.push(rig.ram(), &[(0x1000, 100, true), (0x3000, 28, true)]);
    rig.notify(0);
    assert_eq!(rig.wait_used(&mut queue), (0, 128));
    let mut bytes = [0; 128];
    rig.ram().read_slice(&mut bytes[..100], GuestAddress(0x1000)).unwrap();
    rig.ram().read_slice(&mut bytes[100..], GuestAddress(0x3000)).unwrap();
    let kinds = bytes.iter().collect::<std::collections::HashSet<_>>().len();
    assert!(kinds > 64, "{kinds} different values in 128 random bytes");
    assert_eq!(rig.meter("bytes"), 128);
}

#[test]
fn a_greedy_request_gets_64_kib() {
    let mut rig = rig();
    let mut queue = rig.start(0, 8);
    queue.push(rig.ram(), &[(0, 2 << 20, true)]);
    rig.notify(0);
    assert_eq!(rig.wait_used(&mut queue), (0, 64 << 10));
    let beyond: u64 = rig.ram().read_obj(GuestAddress(64 << 10)).unwrap();
    assert_eq!(beyond, 0, "nothing is written beyond the bound");
}

#[test]
fn a_request_without_room_comes_back_empty() {
    let mut rig = rig();
    let mut queue = rig.start(0, 8);
    queue.push(rig.ram(), &[(0x1000, 64, false)]);
    queue.push(rig.ram(), &[(0x1000, 0, true)]);
    rig.notify(0);
    assert_eq!(rig.wait_used(&mut queue), (0, 0));
    assert_eq!(rig.wait_used(&mut queue), (1, 0));
}
