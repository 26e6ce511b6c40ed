//! A kernel for tests of what comes before it.

/// The smallest kernel: an ELF file with one instruction at 1 MiB.
pub fn tiny() -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    let words = |file: &mut Vec<u8>, words: &[u64]| words.iter().for_each(|w| file.extend(w.to_le_bytes()));
    words(&mut file, &[0x10_0000, 64, 0]);
    file.extend(b"\0\0\0\0\x40\0\x38\0\x01\0\0\0\0\0\0\0\x01\0\0\0\x05\0\0\0");
    words(&mut file, &[120, 0x10_0000, 0x10_0000, 1, 1, 8]);
    file.push(0xf4);
    file
}
