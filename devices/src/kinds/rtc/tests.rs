//! The clock under test: what a guest reads and sets, against a clock moved by hand.

use super::*;
use crate::kinds::tests::{Driven, Fixture, PipeHost};
use std::time::Duration;

/// 2026-07-04 15:09:08 UTC, a Saturday.
const NOW: Duration = Duration::from_secs(1_783_177_748);

fn fixture() -> Fixture {
    let fixture = Fixture::default();
    fixture.clock.advance(NOW);
    fixture
}

fn get(chip: &mut Driven, at: u8) -> u8 {
    chip.write(0x70, &[at]);
    chip.read(0x71, 1)[0]
}

fn put(chip: &mut Driven, at: u8, value: u8) {
    chip.write(0x70, &[at]);
    chip.write(0x71, &[value]);
}

fn time(chip: &mut Driven) -> [u8; 8] {
    [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|at| get(chip, at))
}

#[test]
fn tells_the_time_of_the_host_in_bcd() {
    let fixture = fixture();
    let mut chip = fixture.chip::<This>("on");
    assert_eq!(get(&mut chip, REGISTER_B), B_24_HOURS);
    assert_eq!(time(&mut chip), [0x20, 0x26, 0x07, 0x04, 7, 0x15, 0x09, 0x08]);
    fixture.clock.advance(Duration::from_secs(52));
    assert_eq!(time(&mut chip), [0x20, 0x26, 0x07, 0x04, 7, 0x15, 0x10, 0x00]);
}

#[test]
fn tells_it_in_binary_and_in_twelve_hours() {
    let fixture = fixture();
    let mut chip = fixture.chip::<This>("on");
    put(&mut chip, REGISTER_B, B_BINARY);
    assert_eq!(time(&mut chip), [20, 26, 7, 4, 7, 3 | AFTERNOON, 9, 8]);
    let mut hours = Vec::new();
    for _ in 0..24 {
        hours.push(get(&mut chip, HOURS));
        fixture.clock.advance(Duration::from_secs(3600));
    }
    hours.rotate_left(9);
    let morning = [12, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
    assert_eq!(hours[..12], morning, "midnight is 12 in the morning");
    assert_eq!(hours[12..], morning.map(|hour| hour | AFTERNOON));
}

#[test]
fn can_be_set_in_every_notation_and_goes_on_from_there() {
    for mode in [0, B_BINARY, B_24_HOURS, B_BINARY | B_24_HOURS] {
        let fixture = fixture();
        let mut chip = fixture.chip::<This>("on");
        let code = |n: u8| if mode & B_BINARY != 0 { n } else { ((n / 10) << 4) | (n % 10) };
        let hour = if mode & B_24_HOURS != 0 { code(23) } else { code(11) | AFTERNOON };
        put(&mut chip, REGISTER_B, B_SET | mode);
        for (at, value) in [
            (CENTURY, code(19)),
            (YEAR, code(99)),
            (MONTH, code(12)),
            (DAY, code(31)),
            (HOURS, hour),
            (MINUTES, code(59)),
            (SECONDS, code(58)),
        ] {
            put(&mut chip, at, value);
        }
        fixture.clock.advance(Duration::from_secs(100));
        assert_eq!(get(&mut chip, SECONDS), code(58), "it stands still while it is set");
        put(&mut chip, REGISTER_B, mode);
        put(&mut chip, REGISTER_B, B_24_HOURS);
        assert_eq!(time(&mut chip), [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x58], "mode {mode:#x}");
        fixture.clock.advance(Duration::from_secs(2));
        assert_eq!(time(&mut chip), [0x20, 0, 1, 1, 7, 0, 0, 0], "mode {mode:#x}");
    }
}

#[test]
fn a_single_register_can_be_set_while_it_runs() {
    let fixture = fixture();
    let mut chip = fixture.chip::<This>("on");
    put(&mut chip, YEAR, 0x30);
    assert_eq!(time(&mut chip)[..4], [0x20, 0x30, 0x07, 0x04]);
    fixture.clock.advance(Duration::from_secs(1));
    assert_eq!(get(&mut chip, SECONDS), 0x09);
}

#[test]
fn is_never_caught_in_an_update_and_its_battery_is_good() {
    let fixture = fixture();
    let mut chip = fixture.chip::<This>("on");
    assert_eq!(get(&mut chip, REGISTER_A), A_USUAL);
    put(&mut chip, REGISTER_A, 0xff);
    assert_eq!(get(&mut chip, REGISTER_A), 0x7f);
    put(&mut chip, REGISTER_D, 0);
    assert_eq!((get(&mut chip, REGISTER_C), get(&mut chip, REGISTER_D)), (0, D_VALID));
}

#[test]
fn the_rest_is_memory_and_the_top_bit_of_the_index_is_not_part_of_it() {
    let fixture = fixture();
    let mut chip = fixture.chip::<This>("on");
    for at in (0x0e..0x32).chain(0x33..0x80) {
        put(&mut chip, at, at ^ 0x55);
    }
    for at in (0x0e..0x32).chain(0x33..0x80) {
        assert_eq!(get(&mut chip, at | 0x80), at ^ 0x55);
    }
    assert_eq!(chip.read(0x70, 1), [0xff]);
    chip.write(0x70, &[0x0f, 0x0a]);
    assert_eq!(get(&mut chip, 0x0f), 0x0a, "index and data in one access");
}

#[test]
fn names_the_sizes_of_memory() {
    let fixture = Fixture::with(PipeHost::default(), &[(0, 3 << 30), (4 << 30, 2 << 30)]);
    let mut chip = fixture.chip::<This>("on");
    let mut word = |at: u8| u16::from_le_bytes([get(&mut chip, at), get(&mut chip, at + 1)]);
    assert_eq!(word(0x15), 640);
    assert_eq!((word(0x17), word(0x30)), (0xffff, 0xffff), "as much as can be said");
    assert_eq!(u64::from(word(0x34)) * 64 * KIB, 3 * GIB - 16 * MIB);
    assert_eq!(u64::from(word(0x5b)) * 64 * KIB, 2 * GIB);
    assert_eq!(get(&mut chip, 0x5d), 0);
}

#[test]
fn survives_anything_that_is_written() {
    let fixture = fixture();
    let mut chip = fixture.chip::<This>("on");
    for value in [0xff, 0x80, 0x00, 0x7f] {
        for mode in [0, B_SET, B_BINARY, B_SET | B_BINARY | B_24_HOURS, 0xff] {
            put(&mut chip, REGISTER_B, mode);
            for at in 0..0x80 {
                if at != REGISTER_B {
                    put(&mut chip, at, value);
                }
            }
            put(&mut chip, REGISTER_B, mode & !B_SET);
            time(&mut chip);
        }
    }
}
