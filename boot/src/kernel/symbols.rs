//! Where in a kernel an address is: by its symbol table, by the map beside it, or by the names it carries itself.

use std::fs;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use super::elf::Fields;
use super::source::Source;
use super::{Claim, Kernel, kallsyms};

/// Longest table or map that is read: that of a kernel with everything in it has 30 MB.
const MAX_TABLE: u64 = 256 << 20;
/// Most bytes of a segment that are searched.
const MAX_SEGMENT: u64 = 256 << 20;
/// Longest name (`KSYM_NAME_LEN`), and most bytes of names that are kept.
const MAX_NAME: usize = 512;
const MAX_NAMES: usize = 128 << 20;
const SECTION_HEADER: usize = 64;
const SYMBOL: usize = 24;
/// `SHT_SYMTAB`.
const SYMBOL_TABLE: u32 = 2;
/// `STT_FUNC`, and `STT_NOTYPE`: code in assembly.
const CODE: [u8; 2] = [2, 0];

/// A name and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// As it was linked: without the slide of an address space that is laid out at random.
    pub address: u64,
    /// Whether it is code.
    pub code: bool,
    /// Its name.
    pub name: String,
}

/// The symbols of a kernel.
#[derive(Debug)]
pub struct Symbols {
    /// Code alone, by address.
    code: Vec<Symbol>,
    /// Where the kernel's own code begins and ends, and the code that it needs to start.
    text: [Range<u64>; 2],
    /// The entry of system calls, which the processor knows too.
    entry: Option<u64>,
}

impl Symbols {
    /// Those of `kernel` itself: its symbol table, or if it is stripped the names that it carries for its own use.
    pub fn of(kernel: &Kernel) -> Option<Symbols> {
        let read = kernel.with_elf(|elf, source| {
            let table = table(source).ok().flatten().and_then(Symbols::new);
            table.or_else(|| {
                elf.segments.iter().find_map(|segment| {
                    let len = usize::try_from(segment.file_len.min(MAX_SEGMENT)).ok()?;
                    Symbols::new(kallsyms::read(&source.view(segment.offset, len).ok()?)?)
                })
            })
        });
        read.ok().flatten().flatten()
    }

    /// Those in a file: an ELF file with a symbol table, or a `System.map`.
    pub fn read(path: &Path) -> Option<Symbols> {
        if let Ok(kernel) = Kernel::open(path) {
            let table = kernel.with_elf(|_, source| table(source).ok().flatten());
            return Symbols::new(table.ok().flatten().flatten()?);
        }
        let file =
            fs::File::open(path).ok().filter(|file| file.metadata().is_ok_and(|about| about.is_file()))?;
        let mut text = Vec::new();
        file.take(MAX_TABLE).read_to_end(&mut text).ok()?;
        Symbols::new(map(&String::from_utf8_lossy(&text)))
    }

    /// Puts them in order; none if they are not those of a kernel.
    fn new(mut all: Vec<Symbol>) -> Option<Symbols> {
        let find = |name: &str| all.iter().find(|symbol| symbol.name == name).map(|symbol| symbol.address);
        let first = find("_stext").or_else(|| find("_text"))?;
        let entry = find("entry_SYSCALL_64");
        let last = find("_etext");
        let start = find("_sinittext").zip(find("_einittext")).map_or(0..0, |(first, last)| first..last);
        // They are told on terminals.
        let plain = |name: &str| name.len() <= MAX_NAME && name.bytes().all(|byte| byte.is_ascii_graphic());
        all.retain(|symbol| symbol.code && symbol.address >= first && plain(&symbol.name));
        // Of names for one place the first in the file counts, which is that of the function.
        all.sort_by_key(|symbol| symbol.address);
        all.dedup_by_key(|symbol| symbol.address);
        let end = last.or_else(|| all.last().map(|symbol| symbol.address)).filter(|end| *end > first)?;
        Some(Symbols { code: all, text: [first..end, start], entry })
    }

    /// How far the kernel is from where it was linked, if the processor enters it at `entry` for a system call
    /// (`MSR_LSTAR`). `None` before the kernel has said so, and if that is nothing a kernel could have done.
    pub fn slide(&self, entry: u64) -> Option<u64> {
        /// The kernel moves by whole huge pages (`CONFIG_PHYSICAL_ALIGN`), and stays within 1 GiB.
        const STEP: u64 = 2 << 20;
        const FARTHEST: u64 = 1 << 30;
        let slide = entry.checked_sub(self.entry?)?;
        (slide.is_multiple_of(STEP) && slide < FARTHEST).then_some(slide)
    }

    /// The name for an address as it was linked: `schedule+0x1c`. Only for the kernel's own code.
    pub fn name(&self, address: u64) -> Option<String> {
        if !self.text.iter().any(|text| text.contains(&address)) {
            return None;
        }
        let after = self.code.partition_point(|symbol| symbol.address <= address);
        let symbol = self.code.get(after.checked_sub(1)?)?;
        Some(format!("{}+{:#x}", symbol.name, address.saturating_sub(symbol.address)))
    }
}

/// The symbol table of an ELF file, if it has one.
fn table(source: &Source) -> Claim<Option<Vec<Symbol>>> {
    let read = |at, len: u64| {
        let len = usize::try_from(len.min(MAX_TABLE)).unwrap_or(usize::MAX);
        source.view(at, len).map_err(|cause| cause.to_string())
    };
    let header = read(0, 64)?;
    let places = Fields(header.get(0x28..).unwrap_or_default()).u64()?;
    let mut sizes = Fields(header.get(0x3a..).unwrap_or_default());
    let (each, count) = (sizes.u16()?, sizes.u16()?);
    if usize::from(each) != SECTION_HEADER {
        return Ok(None);
    }
    let headers = read(places, u64::from(count) * u64::from(each))?;
    let section = |bytes: &[u8]| -> Claim<(u32, u64, u64, u32)> {
        let mut fields = Fields(bytes);
        let (_name, kind) = (fields.u32()?, fields.u32()?);
        let (_flags, _address) = (fields.u64()?, fields.u64()?);
        Ok((kind, fields.u64()?, fields.u64()?, fields.u32()?))
    };
    let sections = headers.chunks_exact(SECTION_HEADER).map(section).collect::<Claim<Vec<_>>>()?;
    let Some((_, at, len, link)) = sections.iter().find(|(kind, ..)| *kind == SYMBOL_TABLE) else {
        return Ok(None);
    };
    let names = usize::try_from(*link).ok().and_then(|link| sections.get(link));
    let Some((_, names_at, names_len, _)) = names else { return Ok(None) };
    let (symbols, names) = (read(*at, *len)?, read(*names_at, *names_len)?);
    // Names may overlap, so that a small file could have as many as it likes.
    let mut room = MAX_NAMES;
    let mut name_at = |at: u32| {
        let rest = names.get(usize::try_from(at).ok()?..)?;
        let rest = rest.get(..MAX_NAME).unwrap_or(rest);
        let name = rest.split(|byte| *byte == 0).next().filter(|name| !name.is_empty())?;
        room = room.checked_sub(name.len())?;
        Some(String::from_utf8_lossy(name).into_owned())
    };
    let symbol = |bytes: &[u8]| -> Option<Symbol> {
        let mut fields = Fields(bytes);
        let at = fields.u32().ok()?;
        let [kind, _other] = fields.array().ok()?;
        if !CODE.contains(&(kind & 15)) {
            return None;
        }
        let name = name_at(at)?;
        let _section = fields.u16().ok()?;
        Some(Symbol { address: fields.u64().ok()?, code: true, name })
    };
    Ok(Some(symbols.chunks_exact(SYMBOL).filter_map(symbol).collect()))
}

/// What `nm` writes: `ffffffff81000000 T _text`.
fn map(text: &str) -> Vec<Symbol> {
    let symbol = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        let code = matches!(words.next()?, "t" | "T" | "w" | "W");
        Some(Symbol { address, code, name: words.next()?.to_owned() })
    };
    text.lines().filter_map(symbol).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::kallsyms::tests::{BASE, Era, tables};

    const MAP: &str = "0000000000000000 A fixed_percpu_data\n\
        ffffffff81000000 T _text\nffffffff81000000 T _stext\nffffffff81000200 T start_kernel\n\
        ffffffff81000400 t idle\nffffffff81000500 D data\nffffffff81000600 T entry_SYSCALL_64\n\
        ffffffff81000800 T _etext\nffffffff82000000 T _sinittext\nffffffff82000000 T init\nffffffff82000100 T _einittext\n";

    fn check(symbols: &Symbols) {
        let name = |at: u64| symbols.name(BASE + at);
        assert_eq!(name(0x3ff).as_deref(), Some("start_kernel+0x1ff"));
        assert_eq!(name(0x400).as_deref(), Some("idle+0x0"));
        assert_eq!(name(0x510).as_deref(), Some("idle+0x110"), "data is no place in code");
        assert_eq!((name(0x800), name(0x100_0100), symbols.name(0x1000)), (None, None, None));
        assert!(name(0x100_0010).is_some(), "code that is gone once the kernel has started");
        let entry = BASE + 0x600;
        assert_eq!(symbols.slide(entry), Some(0));
        assert_eq!(symbols.slide(entry + (62 << 20)), Some(62 << 20));
        for odd in [0, entry - (2 << 20), entry + 4096, entry + (1 << 30)] {
            assert_eq!(symbols.slide(odd), None, "{odd:#x}");
        }
    }

    #[test]
    fn a_map_names_code() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("System.map");
        fs::write(&path, MAP).unwrap();
        check(&Symbols::read(&path).unwrap());
        // What Debian puts there.
        fs::write(&path, "ffffffffffffffff B The real System.map is in the linux-image-dbg package\n")
            .unwrap();
        assert!(Symbols::read(&path).is_none());
        assert!(Symbols::read(dir.path()).is_none());
    }

    #[test]
    fn names_that_are_no_names_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        let long = "x".repeat(100_000);
        let names = [
            (BASE, 0, "_stext"),
            (BASE + 0x100, 2, long.as_str()),
            (BASE + 0x200, 2, "\x1b]0;mine\x07"),
            (BASE + 0x800, 0, "_etext"),
        ];
        fs::write(&path, elf(&[0; 64], &names)).unwrap();
        let symbols = Symbols::read(&path).unwrap();
        assert_eq!(
            symbols.name(BASE + 0x210).as_deref(),
            Some(format!("{}+0x110", &long[..MAX_NAME]).as_str())
        );
    }

    /// An ELF file with these bytes as its segment, and a symbol table if there are symbols.
    fn elf(segment: &[u8], symbols: &[(u64, u8, &str)]) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
        let long =
            |file: &mut Vec<u8>, words: &[u64]| words.iter().for_each(|w| file.extend(w.to_le_bytes()));
        let (mut names, mut table) = (vec![0], Vec::new());
        for (address, kind, name) in symbols {
            table.extend(u32::try_from(names.len()).unwrap().to_le_bytes());
            table.extend([*kind, 0, 1, 0]);
            long(&mut table, &[*address, 16]);
            names.extend(name.as_bytes());
            names.push(0);
        }
        let at = |before: usize| u64::try_from(before).unwrap();
        let (begin, len) = (128, at(segment.len()));
        let table_at = begin + len;
        let names_at = table_at + at(table.len());
        let sections = names_at + at(names.len());
        long(&mut file, &[BASE, 64, sections]);
        file.extend(b"\0\0\0\0\x40\0\x38\0\x01\0\x40\0");
        file.extend(if symbols.is_empty() { [0, 0] } else { [3, 0] });
        file.extend(b"\0\0\x01\0\0\0\x05\0\0\0");
        long(&mut file, &[begin, BASE, 0x100_0000, len, len, 4096]);
        file.resize(128, 0);
        file.extend(segment);
        file.extend(&table);
        file.extend(&names);
        let section = |file: &mut Vec<u8>, kind: u64, place: u64, size: u64, link: u64| {
            long(file, &[kind << 32, 0, 0, place, size, link, 0, 0]);
        };
        section(&mut file, 0, 0, 0, 0);
        section(&mut file, 2, table_at, at(table.len()), 2);
        section(&mut file, 3, names_at, at(names.len()), 0);
        file
    }

    #[test]
    fn a_symbol_table_counts_and_without_one_the_kernels_own_names() {
        let kernel = |bytes: Vec<u8>| Kernel::parse("k", bytes).unwrap();
        let symbols: Vec<_> = map(MAP)
            .into_iter()
            .map(|symbol| (symbol.address, if symbol.code { 2 } else { 1 }, symbol.name))
            .collect();
        let symbols: Vec<_> = symbols.iter().map(|(at, kind, name)| (*at, *kind, name.as_str())).collect();
        let whole = elf(&[0xf4; 64], &symbols);
        check(&Symbols::of(&kernel(whole.clone())).unwrap());
        assert!(Symbols::of(&kernel(elf(&[0xf4; 64], &[]))).is_none());
        for at in (128..whole.len()).step_by(7) {
            let mut bent = whole.clone();
            bent[at] ^= 0xff;
            let _ = Symbols::of(&kernel(bent));
        }
        let mut own: Vec<_> = [
            (0, "T_stext"),
            (0x200, "Tstart_kernel"),
            (0x400, "tidle"),
            (0x500, "Ddata"),
            (0x600, "Tentry_SYSCALL_64"),
        ]
        .map(|(at, name)| (BASE + at, name.to_owned()))
        .into();
        own.push((BASE + 0x800, "T_etext".into()));
        own.extend(
            [(0, "T_sinittext"), (0x100, "T_einittext")]
                .map(|(at, name)| (BASE + 0x100_0000 + at, name.to_owned())),
        );
        own.extend((0..100).map(|n| (BASE + 0x200_0000 + n, format!("din_data_{n}"))));
        let own: Vec<_> = own.iter().map(|(at, name)| (*at, name.as_str())).collect();
        check(&Symbols::of(&kernel(elf(&tables(&own, Era::Before), &[]))).unwrap());
    }
}
