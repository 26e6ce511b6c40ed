//! What only the memory-mapped transport does.

use base::host::fake::FakeHost;

use crate::driver::*;

const ALL: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

fn rig() -> Over<Mmio> {
    Over::of("rng", "enabled=on", &FakeHost::default())
}

#[test]
fn names_itself() {
    let mut rig = rig();
    assert_eq!((rig.get(reg::MAGIC), rig.get(4), rig.get(reg::DEVICE_ID)), (0x7472_6976, 2, 4));
}

#[test]
fn a_used_ring_is_a_cause_until_it_is_acknowledged() {
    let mut rig = rig();
    let mut queue = rig.start(0, 8);
    queue.push(rig.ram(), &[(0x1000, 8, true)]);
    rig.notify(0);
    rig.wait_used(&mut queue);
    assert_eq!((rig.get(reg::CAUSES), rig.get(reg::CAUSES)), (1, 1));
    rig.set(reg::ACK, 1);
    assert_eq!(rig.get(reg::CAUSES), 0);
}

#[test]
fn odd_accesses_do_nothing() {
    let mut rig = rig();
    rig.start(0, 8);
    for (at, data) in
        [(reg::STATUS, &[0u8][..]), (reg::STATUS, &[0; 2]), (reg::STATUS, &[0; 8]), (0x6e, &[0; 4])]
    {
        rig.via.registers().write(at, data);
        assert_eq!(rig.get(reg::STATUS), ALL, "{} bytes at {at:#x}", data.len());
    }
    let mut byte = [0xff];
    rig.via.registers().read(reg::STATUS, &mut byte);
    assert_eq!(byte, [0xff], "registers are 32 bits wide");
}
