//! Bare-metal guests of our own, assembled with the tests: no other toolchain is needed.
#![allow(unsafe_code)]

use std::collections::BTreeMap;

std::arch::global_asm!(include_str!("guests.s"));

unsafe extern "C" {
    #[link_name = "mayfly_guests"]
    static FIRST: u8;
    #[link_name = "mayfly_guests_end"]
    static LAST: u8;
}

/// The archive that `guests.s` lays down.
fn archive() -> &'static [u8] {
    let (first, last) = (&raw const FIRST, &raw const LAST);
    let len = last.addr() - first.addr();
    // SAFETY: both labels bound one read-only section of this program, first before last.
    unsafe { std::slice::from_raw_parts(first, len) }
}

/// The code of every guest, by name.
///
/// # Panics
/// The archive is not as the macros of `guests.s` write it.
pub fn all() -> BTreeMap<&'static str, &'static [u8]> {
    let whole = archive();
    let mut at = 0usize;
    let mut found = BTreeMap::new();
    while at < whole.len() {
        let name_len = whole[at..].iter().position(|byte| *byte == 0).expect("a name ends with a zero");
        let name = std::str::from_utf8(&whole[at..at + name_len]).expect("names are ASCII");
        at = (at + name_len + 1).next_multiple_of(8);
        let len = usize::from_le_bytes(whole[at..at + 8].try_into().expect("eight bytes"));
        found.insert(name, &whole[at + 8..at + 8 + len]);
        at = (at + 8 + len).next_multiple_of(8);
    }
    found
}
