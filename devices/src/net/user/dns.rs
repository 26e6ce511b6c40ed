//! What passes the gateway's name service: questions and answers of the DNS (RFC 1035), read as far as rules need it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::packet::{long, word};

/// The port of the name service.
pub const PORT: u16 = 53;
/// Labels of a name, and steps through a message, that are followed.
const LABELS: usize = 128;
const RECORDS: usize = 256;

/// The name servers of this machine, from the text of `resolv.conf(5)`.
pub fn servers(text: &str) -> Vec<SocketAddr> {
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    let addresses = lines.filter_map(|rest| rest.trim().parse::<IpAddr>().ok());
    addresses.take(3).map(|address| SocketAddr::new(address, PORT)).collect()
}

/// The one name that a query asks for, in lower case without its final dot; `None` if this is no plain query.
pub fn question(message: &[u8]) -> Option<String> {
    let flags = word(message, 2)?;
    // A query, not an answer; the operation is the standard one.
    (flags & 0xf800 == 0 && word(message, 4)? == 1).then_some(())?;
    name(message, 12).map(|(name, _)| name)
}

/// An address that an answer gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The address.
    pub address: IpAddr,
    /// Seconds for which it holds.
    pub seconds: u32,
}

/// The name an answer is about, and the addresses it gives.
pub fn answers(message: &[u8]) -> Option<(String, Vec<Answer>)> {
    let flags = word(message, 2)?;
    // An answer without an error.
    (flags & 0x800f == 0x8000 && word(message, 4)? == 1).then_some(())?;
    let (asked, at) = name(message, 12)?;
    let mut at = at.checked_add(4)?;
    let mut found = Vec::new();
    for _ in 0..usize::from(word(message, 6)?).min(RECORDS) {
        let (_, fixed) = name(message, at)?;
        let kind = word(message, fixed)?;
        let seconds = long(message, fixed.checked_add(4)?)?;
        let len = usize::from(word(message, fixed.checked_add(8)?)?);
        let data = fixed.checked_add(10)?;
        at = data.checked_add(len)?;
        let bytes = message.get(data..at)?;
        let address = match kind {
            1 => <[u8; 4]>::try_from(bytes).ok().map(|bytes| IpAddr::from(Ipv4Addr::from(bytes))),
            28 => <[u8; 16]>::try_from(bytes).ok().map(|bytes| IpAddr::from(Ipv6Addr::from(bytes))),
            _ => None,
        };
        found.extend(address.map(|address| Answer { address, seconds }));
    }
    Some((asked, found))
}

/// The answer REFUSED (5) or SERVFAIL (2) to a query.
pub fn refusal(query: &[u8], code: u8) -> Option<Vec<u8>> {
    let (_, at) = name(query, 12)?;
    let mut answer = query.get(..at.checked_add(4)?)?.to_vec();
    let [_, _, flags, more, counts @ ..] = answer.get_mut(..12)? else { return None };
    (*flags, *more) = (0x80 | *flags & 1, 0x80 | code & 15);
    counts.copy_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
    Some(answer)
}

/// The name at `at`, and where what follows it begins.
fn name(message: &[u8], at: usize) -> Option<(String, usize)> {
    let (mut at, mut end) = (at, None);
    let mut text = String::new();
    for _ in 0..LABELS {
        let len = *message.get(at)?;
        let next = at.checked_add(1)?;
        match len {
            0 => return Some((text, end.unwrap_or(next))),
            1..=63 => {
                let till = next.checked_add(len.into())?;
                if !text.is_empty() {
                    text.push('.');
                }
                for byte in message.get(next..till)? {
                    // A dot or a letter of another script within a label matches no rule.
                    text.push(if byte.is_ascii_graphic() && *byte != b'.' {
                        char::from(byte.to_ascii_lowercase())
                    } else {
                        '?'
                    });
                }
                at = till;
            }
            192.. => {
                end.get_or_insert(at.checked_add(2)?);
                at = usize::from(word(message, at)? & 0x3fff);
            }
            64..192 => return None,
        }
        if text.len() > 255 {
            return None;
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn query() -> Vec<u8> {
        let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        query.extend(b"\x07Example\x03org\0\0\x01\0\x01");
        query
    }

    #[test]
    fn questions_and_answers_are_read() {
        let mut message = query();
        assert_eq!(question(&message).as_deref(), Some("example.org"));
        assert_eq!(answers(&message), None, "a question is no answer");
        message[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 3]);
        // A name by another name, and its addresses.
        message.extend(b"\xc0\x0c\0\x05\0\x01\0\0\0\x3c\0\x04\x01a\xc0\x14");
        message.extend(b"\xc0\x29\0\x01\0\x01\0\0\0\x3c\0\x04\xcb\0\x71\x05");
        message.extend(b"\xc0\x29\0\x1c\0\x01\0\0\0\x3d\0\x10\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x05");
        let (name, found) = answers(&message).unwrap();
        let found: Vec<_> = found.iter().map(|answer| (answer.address.to_string(), answer.seconds)).collect();
        assert_eq!(name, "example.org");
        assert_eq!(found, [("203.0.113.5".to_owned(), 60), ("2001:db8::5".to_owned(), 61)]);
        assert_eq!(question(&message), None);
    }

    #[test]
    fn a_refusal_repeats_the_question() {
        let refused = refusal(&query(), 5).unwrap();
        assert_eq!(refused[..12], [0x12, 0x34, 0x81, 0x85, 0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(refused[12..], query()[12..]);
    }

    #[test]
    fn a_name_in_a_circle_ends() {
        let mut message = query();
        message.truncate(12);
        message.extend([0xc0, 12, 0, 1, 0, 1]);
        assert_eq!(question(&message), None);
        message.splice(12.., *b"\x01a\xc0\x0c");
        assert_eq!(question(&message), None);
    }

    #[test]
    fn servers_are_found_in_a_resolv_conf() {
        let text =
            "# comment\nnameserver 192.0.2.53\nsearch x\n nameserver\t2001:db8::53 \nnameserver what\n";
        let found = servers(text).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(found, ["192.0.2.53:53", "[2001:db8::53]:53"]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = (question(&bytes), answers(&bytes), refusal(&bytes, 5));
        }
    }
}
