//! Synthetic images for everything that can be wrong with one.

use super::*;
use proptest::prelude::*;
use std::io::Write as _;
use vm_memory::{Bytes, GuestAddress};

mod found;
mod kept;
mod loading;

const MIB: u64 = 1 << 20;
/// Segment of the ordinary ELF file: offset, address, bytes in the file, bytes in memory.
const SEGMENT: (u64, u64, u64, u64) = (0x1000, 0x10_0000, 0x2345, 0x4000);

fn low_byte(at: usize) -> u8 {
    u8::try_from(at & 0xff).unwrap()
}

/// A program header.
fn program_header(kind: u32, (offset, address, file_len, memory_len): (u64, u64, u64, u64)) -> Vec<u8> {
    let mut bytes = [kind.to_le_bytes(), 5u32.to_le_bytes()].concat();
    for field in [offset, address + 0xffff_8000_0000_0000, address, file_len, memory_len, 0x1000] {
        bytes.extend(field.to_le_bytes());
    }
    bytes
}

/// An ELF file of these program headers, `len` bytes long, every byte after the headers its offset's low byte.
fn elf(entry: u64, headers: &[Vec<u8>], len: usize) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for field in [entry, 64, 0] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend([0, 0, 0, 0, 64, 0, 56, 0]);
    bytes.extend(u16::try_from(headers.len()).unwrap().to_le_bytes());
    bytes.extend([0; 6]);
    bytes.extend(headers.concat());
    bytes.extend((bytes.len()..len).map(low_byte));
    bytes
}

pub(crate) fn plain_elf() -> Vec<u8> {
    elf(0x10_0010, &[program_header(1, SEGMENT)], 0x4000)
}

/// An ELF file with a PVH note, and perhaps the banner of Linux.
fn pvh_elf(linux: bool) -> Vec<u8> {
    let mut note = Vec::new();
    for field in [4u32, 8, 18] {
        note.extend(field.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(0x10_0020u64.to_le_bytes());
    let at = 0x3800u64;
    let mut bytes = elf(
        0x10_0010,
        &[program_header(1, SEGMENT), program_header(4, (at, 0, note.len() as u64, 0))],
        0x4000,
    );
    let at = usize::try_from(at).unwrap();
    bytes[at..at + note.len()].copy_from_slice(&note);
    if linux {
        let text = b"Linux version %s\0Linux version 6.1.0-test (someone) #1 SMP\n\0";
        bytes[0x2000..0x2000 + text.len()].copy_from_slice(text);
    }
    bytes
}

/// A bzImage around a packed payload.
fn bzimage(packed: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    let offset = 0x300usize;
    let code_len = (offset + packed.len()).next_multiple_of(16);
    put(0x1f1, &[1]);
    put(0x1f4, &u32::try_from(code_len / 16).unwrap().to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x20e, &0x100u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &u32::try_from(offset).unwrap().to_le_bytes());
    put(0x24c, &u32::try_from(packed.len()).unwrap().to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    put(0x300, b"6.1.0-test (someone) #1\0");
    bytes.resize(1024 + offset, 0xcc);
    bytes.extend(packed);
    bytes.resize(1024 + code_len, 0);
    bytes
}

/// `content` packed, with its length at the end as the kernel's build appends it.
fn pack(compression: Compression, content: &[u8]) -> Vec<u8> {
    let mut packed = match compression {
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(content).unwrap();
            // Its own format ends with the length.
            return encoder.finish().unwrap();
        }
        Compression::Lz4 => {
            let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
            for block in content.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                packed.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
                packed.extend(block);
            }
            packed
        }
        Compression::Zstd => {
            ruzstd::encoding::compress_to_vec(content, ruzstd::encoding::CompressionLevel::Fastest)
        }
        Compression::Lzo => b"\x89LZO whatever it holds".to_vec(),
        other => panic!("no encoder for {other:?}"),
    };
    packed.extend(u32::try_from(content.len()).unwrap().to_le_bytes());
    packed
}

fn small_memory() -> (Memory, Map) {
    let memory = Memory::new(&[(0, 64 * MIB)]).unwrap();
    let map = Map::new(&memory);
    (memory, map)
}

fn reason(bytes: &[u8]) -> String {
    Kernel::parse("k", bytes).unwrap_err().summary()
}

/// Compares the segment of [`plain_elf`] in memory with what the file says.
fn assert_loaded(memory: &Memory, what: &str) {
    let (offset, address, file_len, memory_len) = SEGMENT;
    let mut loaded = vec![0xee; usize::try_from(memory_len).unwrap()];
    memory.ram().read_slice(&mut loaded, GuestAddress(address)).unwrap();
    let (offset, file_len) = (usize::try_from(offset).unwrap(), usize::try_from(file_len).unwrap());
    let expected: Vec<u8> =
        (0..loaded.len()).map(|at| if at < file_len { low_byte(offset + at) } else { 0 }).collect();
    assert!(loaded == expected, "{what}: the segment is not what the file has, followed by zeroes");
}

#[test]
fn loads_an_elf_file() {
    let kernel = Kernel::parse("k", plain_elf()).unwrap();
    assert_eq!((kernel.format(), kernel.compression()), (Format::Elf, None));
    let (memory, map) = small_memory();
    let placed = kernel.load(Protocol::Auto, Loading::Map, &memory, &map).unwrap();
    assert_eq!((placed.linux, placed.pvh, placed.end), (0x10_0010, None, 0x10_4000));
    assert_loaded(&memory, "from memory");
}

#[test]
fn unpacks_every_format() {
    for compression in [Compression::Gzip, Compression::Lz4, Compression::Zstd] {
        let kernel = Kernel::parse("k", bzimage(&pack(compression, &plain_elf()))).unwrap();
        assert_eq!((kernel.format(), kernel.compression()), (Format::BzImage, Some(compression)));
        assert_eq!(kernel.header_version(), Some("6.1.0-test (someone) #1"));
        let (memory, map) = small_memory();
        let placed = kernel.load(Protocol::Auto, Loading::Map, &memory, &map).unwrap();
        assert_eq!(placed.linux, 0x10_0010, "{compression:?}");
        assert_loaded(&memory, compression.name());
        let (version, limit) = (placed.header.version, placed.header.cmdline_size);
        assert_eq!((version, limit), (0x20f, 2047), "the setup header is the image's own");
    }
}

/// A file large enough to be mapped: its whole pages are, and nothing of the page after its last byte shows.
#[test]
fn maps_what_it_can() {
    let len = 0x10_0000u64 + 0x123;
    let (memory_len, address) = (len + 0x5000, 0x20_0800);
    let image = elf(0x20_0800, &[program_header(1, (0x1800, address, len, memory_len))], 0x20_0000);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&image).unwrap();
    let from_file = Kernel::read("k", file).unwrap();
    let packed = Kernel::parse("k", bzimage(&pack(Compression::Lz4, &image))).unwrap();
    for kernel in [from_file, packed] {
        let (memory, map) = small_memory();
        kernel.load(Protocol::Auto, Loading::Map, &memory, &map).unwrap();
        let mut loaded = vec![0xee; usize::try_from(memory_len + 0x800).unwrap()];
        memory.ram().read_slice(&mut loaded, GuestAddress(0x20_0000)).unwrap();
        let (head, rest) = loaded.split_at(0x800);
        let (body, bss) = rest.split_at(usize::try_from(len).unwrap());
        assert!(head.iter().chain(bss).all(|byte| *byte == 0), "bytes of the file leaked around the segment");
        assert!(body == &image[0x1800..0x1800 + body.len()], "the segment is not what the file has");
    }
}

#[test]
fn leaves_to_the_guest_what_it_cannot_unpack() {
    let image = bzimage(&pack(Compression::Lzo, &[0; 100]));
    let gzip = Kernel::parse("k", bzimage(&pack(Compression::Gzip, &plain_elf()))).unwrap();
    for kernel in [Kernel::parse("k", image).unwrap(), gzip.keep_packed()] {
        let (memory, map) = small_memory();
        let placed = kernel.load(Protocol::Auto, Loading::Map, &memory, &map).unwrap();
        assert_eq!(
            (placed.linux, placed.end),
            (0x100_0200, 0x110_0000),
            "entry 0x200 into the code, init_size after"
        );
        assert_eq!(memory.ram().read_obj::<u32>(GuestAddress(0x100_0200)).unwrap(), 0xcccc_cccc);
        let fail = kernel.load(Protocol::Pvh, Loading::Map, &memory, &map).unwrap_err();
        assert!(fail.to_string().contains("payload stays packed"), "{fail}");
    }
}

#[test]
fn writes_the_file_inside_if_pvh_can_enter_it() {
    let written = |bytes: Vec<u8>| {
        let mut out = Vec::new();
        (Kernel::parse("k", bytes).unwrap().write_pvh_elf(&mut out).unwrap(), out)
    };
    let elf = pvh_elf(true);
    assert_eq!(written(bzimage(&pack(Compression::Gzip, &elf))), (true, elf.clone()));
    assert_eq!(written(elf.clone()), (true, elf));
    assert_eq!(written(plain_elf()), (false, vec![]));
}

#[test]
fn takes_pvh_where_it_is_asked_for_or_alone() {
    let (memory, map) = small_memory();
    let pvh = Kernel::parse("k", pvh_elf(false))
        .unwrap()
        .load(Protocol::Auto, Loading::Map, &memory, &map)
        .unwrap();
    assert_eq!((pvh.pvh, pvh.only_pvh), (Some(0x10_0020), true));
    let kernel = Kernel::parse("k", pvh_elf(true)).unwrap();
    assert!(
        !kernel.load(Protocol::Auto, Loading::Map, &memory, &map).unwrap().only_pvh,
        "a banner makes it Linux"
    );
    let version = kernel.with_elf(scan::version).unwrap().flatten();
    assert_eq!(
        version.as_deref(),
        Some("6.1.0-test (someone) #1 SMP"),
        "the format string before it is none"
    );
    let fail = Kernel::parse("k", plain_elf())
        .unwrap()
        .load(Protocol::Pvh, Loading::Map, &memory, &map)
        .unwrap_err();
    assert_eq!(fail.summary(), "enter kernel k by PVH: it has no PVH entry");
}

#[test]
fn finds_an_embedded_configuration() {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(b"CONFIG_64BIT=y\n").unwrap();
    let config = [b"IKCFG_ST", packed.finish().unwrap().as_slice(), b"IKCFG_ED"].concat();
    let mut image = plain_elf();
    image[0x1800..0x1800 + config.len()].copy_from_slice(&config);
    let packed = Kernel::parse("k", bzimage(&pack(Compression::Lz4, &image))).unwrap();
    let memory = Memory::new(&arch::layout::ram(64 << 20)).unwrap();
    let placed = packed.load(Protocol::Auto, Loading::Map, &memory, &Map::new(&memory)).unwrap();
    assert_eq!(placed.acpi, Some(false), "without CONFIG_ACPI, as it says itself");
    let kernel = Kernel::parse("k", image).unwrap();
    assert_eq!(kernel.with_elf(scan::config).unwrap().flatten().as_deref(), Some("CONFIG_64BIT=y\n"));
    assert_eq!(Kernel::parse("k", plain_elf()).unwrap().with_elf(scan::config).unwrap(), Some(None));
}

#[test]
fn names_what_is_no_kernel() {
    let at = |offset: usize, magic: &[u8]| {
        let mut bytes = vec![0; 4096];
        bytes[offset..offset + magic.len()].copy_from_slice(magic);
        bytes
    };
    for (bytes, expected) in [
        (Vec::new(), "it is empty"),
        (b"hello, world\n".to_vec(), "it is a text file"),
        ("größer\n".repeat(100).into_bytes(), "it is a text file"),
        (at(0x38, b"ARM\x64"), "it is an arm64 kernel"),
        (at(0, b"MZ"), "it is a PE (EFI) program"),
        (at(0, &[0x1f, 0x8b, 8]), "it is a gzip compressed file"),
        (b"070701000000".to_vec(), "it is a cpio archive"),
        (vec![0; 4096], "it is neither"),
        (vec![0xff; 3], "it is neither"),
    ] {
        let text = reason(&bytes);
        assert!(text.starts_with(&format!("load kernel k: {expected}")), "{text}");
    }
    assert!(
        Kernel::parse("k", b"\x1f\x8b".to_vec()).unwrap_err().remedy().unwrap().contains("unpack it first")
    );
}

/// Changes bytes of a good image and expects to be told so.
fn refused(mut image: Vec<u8>, changes: &[(usize, &[u8])], expected: &str) {
    for (at, bytes) in changes {
        image[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    let text = reason(&image);
    assert!(text.contains(expected), "{text:?} does not say {expected:?}");
}

#[test]
fn names_what_is_wrong_with_an_elf_file() {
    let plain = plain_elf;
    refused(plain(), &[(4, &[1])], "32-bit ELF file");
    refused(plain(), &[(5, &[2])], "big-endian");
    refused(plain(), &[(18, &[183])], "for arm64, not for x86-64");
    refused(plain(), &[(16, &[1])], "relocatable object or kernel module");
    refused(plain(), &[(16, &[4])], "type 4, not an executable");
    refused(plain(), &[(54, &[32])], "no program headers");
    refused(plain(), &[(56, &[0xff, 0xff])], "65535 program headers");
    refused(plain(), &[(32, &0x3ff0u64.to_le_bytes())], "its program headers would end");
    refused(plain(), &[(32, &u64::MAX.to_le_bytes())], "its program headers would end");
    refused(plain(), &[(64, &[3])], "needs a dynamic linker");
    refused(plain(), &[(64, &[6])], "no loadable segments");
    refused(plain(), &[(24, &0x10_4000u64.to_le_bytes())], "entry point 0x104000 lies outside");
    refused(
        plain()[..0x3000].to_vec(),
        &[],
        "truncated: its segment at 0x100000 would end at byte 13125 of 12288",
    );
    refused(plain()[..40].to_vec(), &[], "truncated");
    refused(plain(), &[(64 + 8, &u64::MAX.to_le_bytes())], "truncated");
    refused(plain(), &[(64 + 24, &u64::MAX.to_le_bytes())], "beyond the address space");
    refused(plain(), &[(64 + 40, &[0, 0x10])], "in the file and");
    let overlapping = [program_header(1, SEGMENT), program_header(1, (0, 0x10_3fff, 1, 1))];
    refused(elf(0x10_0010, &overlapping, 0x4000), &[], "segments at 0x100000 and 0x103fff overlap");
    refused(pvh_elf(false), &[(0x3804, &[2])], "in place of an address");
    refused(pvh_elf(false), &[(0x3810, &[0; 8])], "PVH entry point 0x0 lies outside");
}

#[test]
fn takes_an_entry_given_as_a_virtual_address() {
    let mut image = plain_elf();
    image[24..32].copy_from_slice(&0xffff_8000_0010_0010u64.to_le_bytes());
    let (memory, map) = small_memory();
    assert_eq!(
        Kernel::parse("k", image).unwrap().load(Protocol::Auto, Loading::Map, &memory, &map).unwrap().linux,
        0x10_0010
    );
}

#[test]
fn names_what_is_wrong_with_a_bzimage() {
    let good = || bzimage(&pack(Compression::Gzip, &plain_elf()));
    refused(good(), &[(0x206, &[0x0b])], "boot protocol 2.11 is older than 2.12");
    refused(good(), &[(0x211, &[0])], "zImage");
    refused(good(), &[(0x236, &[0])], "32-bit kernel");
    refused(good()[..1500].to_vec(), &[], "truncated: its code would end");
    refused(good()[..0x210].to_vec(), &[], "ends within its setup header");
    refused(good(), &[(0x24c, &[0xff; 4])], "does not lie in its code");
    refused(good(), &[(0x24c, &[0; 4])], "does not lie in its code");
    refused(good(), &[(0x248, &[0xff; 4])], "does not lie in its code");
}

fn load_failure(image: Vec<u8>) -> String {
    let (memory, map) = small_memory();
    Kernel::parse("k", image)
        .unwrap()
        .load(Protocol::Auto, Loading::Map, &memory, &map)
        .unwrap_err()
        .summary()
}

#[test]
fn names_what_is_wrong_with_a_payload() {
    for compression in [Compression::Gzip, Compression::Lz4, Compression::Zstd] {
        let good = pack(compression, &plain_elf());
        let name = compression.name();
        let text = load_failure(bzimage(&pack(compression, b"not an ELF file")));
        assert!(text.contains("does not unpack to an ELF file"), "{name}: {text}");
        // A length that lies, in either direction.
        for length in [16u32, 0x10_0000] {
            let mut lying = good.clone();
            let at = lying.len() - 4;
            lying[at..].copy_from_slice(&length.to_le_bytes());
            let text = load_failure(bzimage(&lying));
            assert!(
                text.starts_with(&format!("load kernel k: its {name} payload is corrupt")),
                "{name}: {text}"
            );
        }
        let mut huge = good.clone();
        let at = huge.len() - 4;
        huge[at..].copy_from_slice(&[0xff; 4]);
        assert!(load_failure(bzimage(&huge)).contains("claims to unpack to 4095 MiB"), "{name}");
        let mut cut = good[..good.len() / 2].to_vec();
        cut.extend(&good[good.len() - 4..]);
        assert!(load_failure(bzimage(&cut)).contains("corrupt"), "{name}");
        assert!(!load_failure(bzimage(&good[..8])).is_empty(), "{name}");
    }
    let mut broken = plain_elf();
    broken[18] = 40;
    assert!(
        load_failure(bzimage(&pack(Compression::Gzip, &broken)))
            .contains("in its payload, it is an ELF file for 32-bit Arm")
    );
}

#[test]
fn fails_on_memory_too_small() {
    let memory = Memory::new(&[(0, MIB)]).unwrap();
    let fail = Kernel::parse("k", plain_elf())
        .unwrap()
        .load(Protocol::Auto, Loading::Map, &memory, &Map::new(&memory))
        .unwrap_err();
    assert!(fail.to_string().contains("it needs 2 MiB of memory, the guest has 1 MiB"), "{fail}");
}

/// Loads whatever it is; only a panic or an endless run would be wrong.
fn try_all(bytes: Vec<u8>) {
    let Ok(kernel) = Kernel::parse("k", bytes) else { return };
    let (memory, map) = small_memory();
    let _ = kernel.load(Protocol::Auto, Loading::Map, &memory, &map);
    let _ = kernel.load(Protocol::Pvh, Loading::Copy, &memory, &map);
    let _ = crate::inspect::inspect(&kernel);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn survives_random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        try_all(bytes);
    }

    #[test]
    fn survives_changed_images(
        which in 0usize..6,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<[u8; 4]>()), 1..4),
        within in prop::sample::select(vec![0x80usize, 0x280, 0x2000]),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut image = match which {
            0 => plain_elf(),
            1 => pvh_elf(true),
            2 => bzimage(&pack(Compression::Gzip, &plain_elf())),
            3 => bzimage(&pack(Compression::Lz4, &plain_elf())),
            4 => bzimage(&pack(Compression::Zstd, &plain_elf())),
            _ => bzimage(&pack(Compression::Lzo, &[])),
        };
        for (at, bytes) in changes {
            let at = at.index(within.min(image.len() - 4));
            image[at..at + 4].copy_from_slice(&bytes);
        }
        if let Some(cut) = cut {
            image.truncate(cut.index(image.len()));
        }
        try_all(image);
    }
}
