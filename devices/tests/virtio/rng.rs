//! The entropy device.

use std::sync::Arc;
use std::time::Duration;

use base::clock::ManualClock;
use base::host::fake::FakeHost;
use base::memory::Memory;
use devices::catalog::Body;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{EVENT_IDX, RAM, Rig, build, build_at, reg};

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

#[test]
fn a_limit_lets_requests_wait_in_the_ring() {
    let (host, memory) = (FakeHost::default(), Memory::new(&RAM).unwrap());
    let clock = Arc::new(ManualClock::at(Duration::from_secs(1)));
    let body = build_at("rng", "rate=1000", &host, &memory, clock.clone()).unwrap();
    let Body::Virtio(device) = body else { panic!("the device is one of virtio") };
    let mut rig = Rig::new(device, memory);
    let mut queue = rig.start(EVENT_IDX, 8);
    for _ in 0..3 {
        queue.push(rig.ram(), &[(0x1000, 600, true)]);
    }
    // Two begin before the saved-up second is spent; the third waits until the debt is paid, however often it is asked for.
    for (wait, bytes) in [(0, 1200), (100, 1200), (100, 1200), (1, 1800)] {
        clock.advance(Duration::from_millis(wait));
        rig.notify(0);
        rig.settle();
        assert_eq!(rig.meter("bytes"), bytes, "after {wait} ms more");
    }
    assert!(rig.meter("throttled") > 0);
    clock.advance(Duration::from_secs(60));
    queue.push(rig.ram(), &[(0x1000, 0x2000, true)]);
    rig.notify(0);
    for expected in [600, 600, 600, 1000] {
        assert_eq!(rig.wait_used(&mut queue).1, expected, "no more than a second's worth in one request");
    }
}

#[test]
fn what_waited_for_the_limit_is_taken_up_without_a_doorbell() {
    let mut rig = Rig::of("rng", "rate=100", &FakeHost::default());
    let mut queue = rig.start(EVENT_IDX, 8);
    for _ in 0..2 {
        queue.push(rig.ram(), &[(0x1000, 120, true)]);
    }
    rig.notify(0);
    for _ in 0..2 {
        assert_eq!(rig.wait_used(&mut queue).1, 100);
    }
    // And a reset is not held up by what waits.
    queue.push(rig.ram(), &[(0x1000, 120, true)]);
    rig.notify(0);
    rig.set(reg::STATUS, 0);
    assert_eq!(rig.get(reg::STATUS), 0);
}

#[test]
fn a_limit_of_nothing_is_refused() {
    let memory = Memory::new(&RAM).unwrap();
    let refused = build("rng", "rate=0", &FakeHost::default(), &memory).err().expect("a refusal").to_string();
    assert!(refused.contains("set up test0: rate=0 lets no request through"), "{refused}");
}
