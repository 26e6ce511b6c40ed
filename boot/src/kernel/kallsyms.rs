//! The names of a kernel's code as the kernel itself has them (`CONFIG_KALLSYMS`), in an image that is stripped.
//!
//! `scripts/kallsyms.c` writes several tables one after another, and none of them has a name in the image. They are found
//! by what they have to look like: the table of tokens by the digits, which are always tokens of their own, and by the
//! index that follows it and has to agree with each of the 256 tokens; the names before it by the markers that follow
//! them and have to agree with each 256th name; the addresses by being in order.

use memchr::memmem::Finder;

use super::symbols::Symbol;

/// The tokens 0 to 9, each with its end: where the table of tokens is.
const DIGITS: &[u8] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
const TOKENS: usize = 256;
/// The longest token that is thought possible; they are pairs of pairs of letters, and seldom beyond 20.
const MAX_TOKEN: usize = 128;
/// The names that are thought possible. Distributions have 100 to 300 thousand.
const NAMES: std::ops::Range<u32> = 64..4_000_000;
/// How far before the tokens the names may begin. Distributions have two to five MB.
const MAX_NAMES: usize = 64 << 20;
/// Each so many names have a marker.
const STRIDE: usize = 256;
/// The tables begin at such addresses; a segment does, too.
const ALIGN: usize = 8;
/// The longest name of a symbol (`KSYM_NAME_LEN`).
const MAX_NAME: usize = 512;

/// How many names are looked at in all, and how often digits are: an image may be made to look like tables everywhere.
const STEPS: usize = 64 << 20;
const HITS: usize = 1024;

/// The tokens, and where they and their index lie.
struct Tokens {
    texts: Vec<std::ops::Range<usize>>,
    start: usize,
    end: usize,
}

/// Where each name begins, and where their number stands.
struct Names {
    begins: Vec<usize>,
    at: usize,
}

/// The symbols of a kernel in the bytes of a segment of its; none if there are none.
pub fn read(image: &[u8]) -> Option<Vec<Symbol>> {
    let mut steps = STEPS;
    Finder::new(DIGITS).find_iter(image).take(HITS).find_map(|hit| {
        let tokens = tokens(image, hit)?;
        let names = names(image, &tokens, &mut steps)?;
        let addresses = addresses(image, &tokens, &names)?;
        let texts = names.begins.iter().map(|at| expand(image, *at, &tokens));
        let symbols = addresses.into_iter().zip(texts);
        symbols
            .map(|(address, text)| {
                let (kind, name) = text?.split_at_checked(1).map(|(k, n)| (k.to_owned(), n.to_owned()))?;
                Some(Symbol { address, code: matches!(kind.as_str(), "t" | "T" | "w" | "W"), name })
            })
            .collect()
    })
}

fn u16_at(image: &[u8], at: usize) -> Option<usize> {
    image.get(at..)?.first_chunk().map(|bytes| usize::from(u16::from_le_bytes(*bytes)))
}

fn u32_at(image: &[u8], at: usize) -> Option<u32> {
    image.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(image: &[u8], at: usize) -> Option<u64> {
    image.get(at..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

/// The table of tokens in which the token `0` begins at `digit`.
fn tokens(image: &[u8], digit: usize) -> Option<Tokens> {
    // The end of the token before it is the last of as many ends as there are tokens before it.
    let mut end = digit;
    for _ in 0..b'0' {
        let before = image.get(..end)?.strip_suffix(&[0])?;
        end = before.len().saturating_sub(MAX_TOKEN);
        end += before.get(end..)?.iter().rposition(|byte| *byte == 0).map_or(0, |at| at + 1);
    }
    // The first one may seem to be longer, if the table before this one does not end in a zero.
    let first = image.get(end..)?.iter().position(|byte| *byte == 0)? + end;
    let starts = (end..=first).filter(|start| start.is_multiple_of(ALIGN));
    starts.into_iter().find_map(|start| {
        let mut texts = Vec::with_capacity(TOKENS);
        let mut at = start;
        for _ in 0..TOKENS {
            let text = image.get(at..)?.get(..MAX_TOKEN)?;
            let len = text.iter().position(|byte| *byte == 0)?;
            texts.push(at..at + len);
            at += len + 1;
        }
        let index = at.next_multiple_of(ALIGN);
        let mut indexed = texts.iter().zip(0..);
        indexed
            .all(|(text, number)| u16_at(image, index + 2 * number) == Some(text.start - start))
            .then(|| Tokens { texts, start, end: index + 2 * TOKENS })
    })
}

/// Where the name after the one at `at` begins.
fn next_name(image: &[u8], at: usize) -> Option<usize> {
    let (first, second) = (usize::from(*image.get(at)?), image.get(at + 1).copied().unwrap_or(0));
    // Since 6.1, a length of more than 127 takes two bytes.
    if first & 0x80 == 0 {
        Some(at + 1 + first)
    } else {
        Some(at + 2 + (first & 0x7f) + (usize::from(second) << 7))
    }
}

/// The names that lie before `tokens`, found in as many steps as are left.
fn names(image: &[u8], tokens: &Tokens, steps: &mut usize) -> Option<Names> {
    let first = tokens.start.saturating_sub(MAX_NAMES).next_multiple_of(ALIGN);
    let mut places = (first..tokens.start).step_by(ALIGN).rev();
    places.find_map(|at| {
        let count = u32_at(image, at).filter(|count| NAMES.contains(count))?;
        if u32_at(image, at + 4)? != 0 {
            return None;
        }
        let count = usize::try_from(count).ok()?;
        // Each takes two bytes at least.
        let mut next = at + ALIGN;
        if count.checked_mul(2)? > tokens.start.checked_sub(next)? {
            return None;
        }
        let mut begins = Vec::new();
        for _ in 0..count {
            *steps = steps.checked_sub(1)?;
            begins.push(next);
            next = next_name(image, next).filter(|next| *next <= tokens.start)?;
        }
        let markers = next.next_multiple_of(ALIGN);
        let agrees = |(nth, begin): (usize, &usize)| {
            let marker = u32_at(image, markers + 4 * nth).and_then(|marker| usize::try_from(marker).ok());
            markers + 4 * nth < tokens.start && marker == begin.checked_sub(at + ALIGN)
        };
        begins.iter().step_by(STRIDE).enumerate().all(agrees).then_some(Names { begins, at })
    })
}

/// The addresses: before the names, or since 6.4 after the tokens.
fn addresses(image: &[u8], tokens: &Tokens, names: &Names) -> Option<Vec<u64>> {
    let len = names.begins.len().checked_mul(4)?.next_multiple_of(ALIGN);
    let before = names.at.checked_sub(8).and_then(|base| Some((base.checked_sub(len)?, base)));
    let after = tokens.end.next_multiple_of(ALIGN);
    let places = before.into_iter().chain([(after, after + len)]);
    places.into_iter().find_map(|(table, base)| {
        let base = u64_at(image, base).filter(|base| *base >> 63 == 1)?;
        let offset = |nth: usize| u32_at(image, table + 4 * nth);
        // Where those of variables for each CPU are absolute, all others are negative.
        let signed = (0..names.begins.len()).filter_map(offset).filter(|offset| offset >> 31 == 1).count();
        let signed = signed > names.begins.len() / 2;
        let mut addresses = Vec::with_capacity(names.begins.len());
        for nth in 0..names.begins.len() {
            let offset = offset(nth)?;
            let address = match offset.cast_signed() {
                negative if signed && negative < 0 => {
                    base.checked_sub(1)?.checked_add(u64::from(negative.unsigned_abs()))?
                }
                _ if signed => u64::from(offset),
                _ => base.checked_add(u64::from(offset))?,
            };
            if addresses.last().is_some_and(|last| *last > address) {
                return None;
            }
            addresses.push(address);
        }
        Some(addresses)
    })
}

/// The name at `at` with its kind before it.
fn expand(image: &[u8], at: usize, tokens: &Tokens) -> Option<String> {
    let end = next_name(image, at)?;
    let first = at + if image.get(at)? & 0x80 == 0 { 1 } else { 2 };
    let mut text = Vec::new();
    for token in image.get(first..end)? {
        text.extend(image.get(tokens.texts.get(usize::from(*token))?.clone())?);
        if text.len() > MAX_NAME {
            return None;
        }
    }
    String::from_utf8(text).ok()
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// How the tables are laid out.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Era {
        /// Linux 4.20 to 6.3.
        Before,
        /// Since 6.4.
        After,
        /// Since 6.15: no address is absolute.
        Relative,
    }

    pub const BASE: u64 = 0xffff_ffff_8100_0000;

    fn align(image: &mut Vec<u8>) {
        image.resize(image.len().next_multiple_of(ALIGN), 0);
    }

    /// Tables as `scripts/kallsyms.c` writes them, without any compression but for one token: `do_`.
    pub fn tables(symbols: &[(u64, &str)], era: Era) -> Vec<u8> {
        let mut image = vec![0x5a; 4096];
        let mut offsets = Vec::new();
        for (address, _) in symbols {
            let offset = match (*address).checked_sub(BASE) {
                None => u32::try_from(*address).unwrap(),
                Some(offset) if era == Era::Relative => u32::try_from(offset).unwrap(),
                // `offset` is -1 - x.
                Some(offset) => !u32::try_from(offset).unwrap(),
            };
            offsets.extend(offset.to_le_bytes());
        }
        let addresses = |image: &mut Vec<u8>| {
            align(image);
            image.extend(&offsets);
            align(image);
            image.extend(BASE.to_le_bytes());
        };
        if era == Era::Before {
            addresses(&mut image);
        }
        image.extend(u64::try_from(symbols.len()).unwrap().to_le_bytes());
        let (start, mut markers) = (image.len(), Vec::new());
        for (nth, (_, name)) in symbols.iter().enumerate() {
            if nth % STRIDE == 0 {
                markers.extend(u32::try_from(image.len() - start).unwrap().to_le_bytes());
            }
            let name: Vec<u8> = name.replace("do_", "\x01").into_bytes();
            let len = u16::try_from(name.len()).unwrap();
            match len {
                ..0x80 => image.push(len.to_le_bytes()[0]),
                _ => image.extend([len.to_le_bytes()[0] & 0x7f | 0x80, u8::try_from(len >> 7).unwrap()]),
            }
            image.extend(name);
        }
        align(&mut image);
        image.extend(markers);
        align(&mut image);
        let (start, mut index) = (image.len(), Vec::new());
        for token in 0..=255u8 {
            index.extend(u16::try_from(image.len() - start).unwrap().to_le_bytes());
            match token {
                1 => image.extend(b"do_\0"),
                0x20..0x7f => image.extend([token, 0]),
                _ => image.extend(b"xy\0"),
            }
        }
        align(&mut image);
        image.extend(index);
        if era != Era::Before {
            addresses(&mut image);
        }
        image.extend([0xa5; 4096]);
        image
    }

    /// Names of functions, one after another, with a variable of each CPU before them.
    pub fn many() -> Vec<(u64, String)> {
        let long = format!("T{}", "a_very_long_name_".repeat(12));
        let some = (0..1000).map(|n| (BASE + 16 * n, format!("tdo_something_{n}")));
        std::iter::once((0x1000, "Airq_stack".to_owned()))
            .chain(some)
            .chain([(BASE + 16_000, long)])
            .collect()
    }

    #[test]
    fn the_tables_are_found_wherever_they_are() {
        for era in [Era::Before, Era::After, Era::Relative] {
            let all: Vec<_> =
                many().into_iter().filter(|(at, _)| era != Era::Relative || *at >= BASE).collect();
            let all: Vec<_> = all.iter().map(|(at, name)| (*at, name.as_str())).collect();
            let found = read(&tables(&all, era)).unwrap_or_else(|| panic!("none of {era:?}"));
            let found: Vec<_> = found.iter().map(|it| (it.address, it.name.as_str(), it.code)).collect();
            let wanted: Vec<_> =
                all.iter().map(|(at, name)| (*at, &name[1..], name.starts_with(['t', 'T']))).collect();
            assert_eq!(found, wanted, "{era:?}");
        }
    }

    #[test]
    fn tables_that_contradict_themselves_are_none() {
        let all = many();
        let all: Vec<_> = all.iter().map(|(at, name)| (*at, name.as_str())).collect();
        let whole = tables(&all, Era::Before);
        assert!(read(&whole).is_some());
        let digits = Finder::new(DIGITS).find(&whole).unwrap();
        // A token, its index, a marker, a length, an address out of order, and an end in the middle.
        for at in [digits + 40, digits + 900, digits - 0x60 - 8, 4096 + 4 * 1002 + 8 + 8, 4096 + 40] {
            let mut bent = whole.clone();
            bent[at] ^= 0x40;
            let found = read(&bent);
            assert!(found.is_none() || found.is_some_and(|found| found.len() == all.len()), "{at}");
        }
        for len in (0..whole.len()).step_by(97) {
            let _ = read(&whole[..len]);
        }
        assert!(read(&whole[..digits + 600]).is_none());
    }
}
