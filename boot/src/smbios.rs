//! SMBIOS: who made this machine, and words for the guest, as /sys/class/dmi/id and dmidecode show them (DSP0134 3.7).
//!
//! The entry point comes first in the segment in which a guest looks for it (section 5.2.2), so it does not look on.

use arch::layout::{SMBIOS, SMBIOS_LEN};
use base::memory::Memory;
use base::{Doing, Fail, Result, Why};
use vm_memory::{Bytes, GuestAddress};

/// The 64-bit entry point (section 5.2.2) has this length, and the structures follow at a multiple of 16 bytes.
const ENTRY_LEN: u8 = 24;
const TABLE: u64 = SMBIOS + 32;
/// The version of the specification that the structures follow.
const VERSION: [u8; 3] = [3, 7, 0];

/// Types of structures (chapter 7).
const FIRMWARE: u8 = 0;
const SYSTEM: u8 = 1;
const OEM_STRINGS: u8 = 11;
const END: u8 = 127;

/// Firmware characteristics (section 7.1.1): none of them is supported, or said.
const NOT_SUPPORTED: u64 = 1 << 3;
/// The second byte of their extension: the table describes a virtual machine.
const VIRTUAL: u8 = 1 << 4;
/// The firmware has no release date of its own; kernels take one before 2001 or so for a reason to distrust its tables.
const RELEASE_DATE: &str = "01/01/2026";
/// The system was turned on by its power switch.
const POWER_SWITCH: u8 = 6;
/// No embedded controller; a release that is not numbered (0xff for both parts).
const NONE: u8 = 0xff;

/// What the tables say. An empty text is left out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity<'a> {
    /// Who made the system, and its firmware.
    pub manufacturer: &'a str,
    /// What it is.
    pub product: &'a str,
    /// Its version, and that of its firmware.
    pub version: &'a str,
    /// Its serial number.
    pub serial: &'a str,
    /// Its UUID as it is written, byte for byte; without one it has none.
    pub uuid: Option<[u8; 16]>,
    /// The family of computers it belongs to.
    pub family: &'a str,
    /// Strings for whoever knows what they mean.
    pub oem: &'a [String],
}

/// Writes the tables where `arch::layout` has them.
///
/// # Errors
/// As [`tables`], or there is no memory there.
pub fn place(identity: &Identity, memory: &Memory) -> Result<()> {
    let tables = tables(identity)?;
    memory.ram().write_slice(&tables, GuestAddress(SMBIOS)).doing(Why::Invalid, || "write the SMBIOS tables")
}

/// The tables as they lie from `layout::SMBIOS` on, the entry point first.
///
/// # Errors
/// [`Why::Usage`]: a text holds a zero byte, an OEM string is empty, or all are too long for the space.
pub fn tables(identity: &Identity) -> Result<Vec<u8>> {
    let fail = |cause: String| Fail::new(Why::Usage, "describe the machine by SMBIOS").because(cause);
    let texts = [identity.manufacturer, identity.product, identity.version, identity.serial, identity.family];
    if texts.into_iter().chain(identity.oem.iter().map(String::as_str)).any(|text| text.contains('\0')) {
        return Err(fail("a text holds a zero byte".to_owned()));
    }
    if identity.oem.iter().any(String::is_empty) {
        return Err(fail("an OEM string is empty".to_owned()));
    }
    let mut structures = Structures::default();
    structures.add(firmware(identity));
    structures.add(system(identity));
    // A structure counts its strings in a byte.
    for strings in identity.oem.chunks(usize::from(u8::MAX)) {
        let mut oem = Structure::new(OEM_STRINGS);
        for text in strings {
            oem.number(text);
        }
        oem.body.push(oem.count);
        structures.add(oem);
    }
    structures.add(Structure::new(END));
    let len = structures.bytes.len();
    let room = SMBIOS_LEN.saturating_sub(TABLE.saturating_sub(SMBIOS));
    let short = u32::try_from(len).ok().filter(|len| u64::from(*len) <= room);
    let short = short.ok_or_else(|| fail(format!("its texts need {len} bytes, and there are {room}")))?;
    let mut bytes = entry(short).to_vec();
    bytes.resize(usize::try_from(TABLE.saturating_sub(SMBIOS)).unwrap_or(0), 0);
    bytes.extend(structures.bytes);
    Ok(bytes)
}

/// The entry point of structures of `len` bytes.
fn entry(len: u32) -> [u8; ENTRY_LEN as usize] {
    let mut entry = [0; ENTRY_LEN as usize];
    let [major, minor, revision] = VERSION;
    // The checksum is filled in below. Revision 1 of the entry point; a reserved byte.
    let head = [b'_', b'S', b'M', b'3', b'_', 0, ENTRY_LEN, major, minor, revision, 1, 0];
    let parts = head.into_iter().chain(len.to_le_bytes()).chain(TABLE.to_le_bytes());
    entry.iter_mut().zip(parts).for_each(|(byte, part)| *byte = part);
    let sum = entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = entry.get_mut(5) {
        *checksum = sum.wrapping_neg();
    }
    entry
}

/// Firmware information (section 7.1).
fn firmware(identity: &Identity) -> Structure {
    let mut it = Structure::new(FIRMWARE);
    let (vendor, version) = (it.number(identity.manufacturer), it.number(identity.version));
    let date = it.number(RELEASE_DATE);
    // It lies in no segment and takes no flash: both zero.
    it.body.extend([vendor, version, 0, 0, date, 0]);
    it.body.extend(NOT_SUPPORTED.to_le_bytes());
    it.body.extend([0, VIRTUAL, NONE, NONE, NONE, NONE, 0, 0]);
    it
}

/// System information (section 7.2).
fn system(identity: &Identity) -> Structure {
    let mut it = Structure::new(SYSTEM);
    let numbers = [identity.manufacturer, identity.product, identity.version, identity.serial];
    let numbers = numbers.map(|text| it.number(text));
    let family = it.number(identity.family);
    it.body.extend(numbers);
    // All zeros: there is none.
    it.body.extend(wire(identity.uuid.unwrap_or_default()));
    // No SKU number.
    it.body.extend([POWER_SWITCH, 0, family]);
    it
}

/// A UUID as firmware tables hold it: the first three fields are little-endian (section 7.2.1).
pub fn wire(uuid: [u8; 16]) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = uuid;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

/// One structure (section 6.1.2): a body behind a header of 4 bytes, and strings that it names by their numbers.
struct Structure {
    kind: u8,
    body: Vec<u8>,
    strings: Vec<u8>,
    count: u8,
}

impl Structure {
    fn new(kind: u8) -> Structure {
        Structure { kind, body: Vec::new(), strings: Vec::new(), count: 0 }
    }

    /// The number under which the body names `text`; 0 for none.
    fn number(&mut self, text: &str) -> u8 {
        if text.is_empty() {
            return 0;
        }
        self.strings.extend(text.bytes());
        self.strings.push(0);
        self.count = self.count.saturating_add(1);
        self.count
    }
}

/// Structures one after another; a handle is the number of one.
#[derive(Default)]
struct Structures {
    bytes: Vec<u8>,
    count: u16,
}

impl Structures {
    fn add(&mut self, it: Structure) {
        let len = u8::try_from(it.body.len().saturating_add(4)).unwrap_or(u8::MAX);
        self.bytes.extend([it.kind, len]);
        self.bytes.extend(self.count.to_le_bytes());
        self.bytes.extend(it.body);
        // The last string is followed by an empty one; where there are none, that takes two zeros.
        let end: &[u8] = if it.strings.is_empty() { &[0, 0] } else { &[0] };
        self.bytes.extend(it.strings);
        self.bytes.extend(end);
        self.count = self.count.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A structure as a guest finds it: type, handle, all bytes of its formatted part, strings.
    type Found = (u8, u16, Vec<u8>, Vec<String>);

    /// Walks the tables as section 6.1 says a guest does.
    fn walk(bytes: &[u8]) -> Vec<Found> {
        assert_eq!(&bytes[..5], b"_SM3_");
        let len = usize::from(bytes[6]);
        assert_eq!(bytes[..len].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum");
        let size = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let address = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
        let at = usize::try_from(address - SMBIOS).unwrap();
        let mut rest = &bytes[at..at + size];
        assert_eq!(bytes.len(), at + size);
        let mut found = Vec::new();
        while !rest.is_empty() {
            let (head, tail) = rest.split_at(rest[1].into());
            let end = tail.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let strings = tail[..end].split(|byte| *byte == 0).filter(|text| !text.is_empty());
            let strings = strings.map(|text| String::from_utf8(text.to_vec()).unwrap()).collect();
            found.push((head[0], u16::from_le_bytes([head[2], head[3]]), head.to_vec(), strings));
            rest = &tail[end + 2..];
        }
        found
    }

    fn identity(oem: &[String]) -> Identity<'_> {
        Identity {
            manufacturer: "Maker",
            product: "Thing",
            version: "1.2",
            serial: "S-7",
            uuid: Some([0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 10, 11, 12, 13, 14, 15]),
            family: "Things",
            oem,
        }
    }

    #[test]
    fn a_guest_finds_each_text_where_the_specification_has_it() {
        let oem = ["io.systemd.credential:a=b".to_owned(), "two".to_owned()];
        let bytes = tables(&identity(&oem)).unwrap();
        assert_eq!(bytes[7..12], [3, 7, 0, 1, 0], "version of the tables, revision of the entry point");
        let found = walk(&bytes);
        assert_eq!(
            found.iter().map(|it| (it.0, it.1)).collect::<Vec<_>>(),
            [(0, 0), (1, 1), (11, 2), (127, 3)]
        );

        let (_, _, firmware, strings) = &found[0];
        assert_eq!(strings, &["Maker", "1.2", RELEASE_DATE]);
        assert_eq!(firmware.len(), 0x1a);
        assert_eq!((firmware[4], firmware[5], firmware[8]), (1, 2, 3), "vendor, version, date");
        assert_eq!(firmware[0x13] & 0x10, 0x10, "a virtual machine");

        let (_, _, system, strings) = &found[1];
        assert_eq!(strings, &["Maker", "Thing", "1.2", "S-7", "Things"]);
        assert_eq!((system.len(), &system[4..8], system[0x1a]), (0x1b, [1, 2, 3, 4].as_slice(), 5));
        let uuid = [0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 10, 11, 12, 13, 14, 15];
        assert_eq!(system[8..24], uuid, "wire format");
        assert_eq!((system[0x18], system[0x19]), (6, 0), "wake-up, SKU");

        let (_, _, strings, texts) = &found[2];
        assert_eq!((strings.as_slice(), texts.as_slice()), ([11, 5, 2, 0, 2].as_slice(), oem.as_slice()));
        assert_eq!(found[3].2, [127, 4, 3, 0]);
        assert!(bytes.ends_with(&[127, 4, 3, 0, 0, 0]));
    }

    #[test]
    fn what_is_not_said_is_not_there() {
        let found = walk(&tables(&Identity::default()).unwrap());
        assert_eq!(found.len(), 3, "no OEM strings");
        assert_eq!(found[1].2[4..24], [0; 20], "no names and no UUID");
        assert_eq!(found[1].3, [] as [String; 0]);
    }

    #[test]
    fn many_strings_take_several_structures_and_too_many_are_refused() {
        let many: Vec<String> = (0..300).map(|n| format!("n{n}")).collect();
        let found = walk(&tables(&identity(&many)).unwrap());
        let counts: Vec<_> = found.iter().filter(|it| it.0 == 11).map(|it| (it.2[4], it.3.len())).collect();
        assert_eq!(counts, [(255, 255), (45, 45)]);
        let refused = |oem: &[String]| tables(&identity(oem)).unwrap_err().summary();
        let long = "x".repeat(usize::try_from(SMBIOS_LEN).unwrap());
        assert!(refused(&[long]).contains(&format!("and there are {}", SMBIOS_LEN - 32)));
        assert!(refused(&[String::new()]).ends_with("an OEM string is empty"));
        assert!(refused(&["a\0b".into()]).ends_with("a text holds a zero byte"));
    }

    #[test]
    fn a_kernel_finds_them_first_in_the_segment_where_it_looks() {
        let memory = Memory::new(&arch::layout::ram(2 << 20)).unwrap();
        place(&identity(&[]), &memory).unwrap();
        let mut segment = vec![0; 0x1_0000];
        memory.ram().read_slice(&mut segment, GuestAddress(0xf_0000)).unwrap();
        assert_eq!(segment.chunks(16).position(|paragraph| paragraph.starts_with(b"_SM3_")), Some(0));
        assert!(place(&identity(&[]), &Memory::new(&[(0, 64 << 10)]).unwrap()).is_err());
    }
}
