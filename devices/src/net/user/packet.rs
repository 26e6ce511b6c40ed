//! Ethernet, IP, TCP, UDP and ICMP as the guest sends them: what is needed of each header, every value a claim.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// EtherTypes.
pub const IPV4: u16 = 0x0800;
/// See [`IPV4`].
pub const IPV6: u16 = 0x86dd;
/// See [`IPV4`].
pub const ARP: u16 = 0x0806;

/// IP protocol numbers.
pub const ICMP: u8 = 1;
/// See [`ICMP`].
pub const TCP: u8 = 6;
/// See [`ICMP`].
pub const UDP: u8 = 17;
/// See [`ICMP`].
pub const ICMPV6: u8 = 58;

/// Flags of TCP.
pub mod flag {
    #![allow(missing_docs, reason = "the names are those of RFC 9293")]
    pub const FIN: u8 = 1;
    pub const SYN: u8 = 2;
    pub const RST: u8 = 4;
    pub const PSH: u8 = 8;
    pub const ACK: u8 = 16;
}

/// Two bytes of `bytes`, big-endian.
pub fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let end = at.checked_add(2)?;
    Some(u16::from_be_bytes(bytes.get(at..end)?.try_into().ok()?))
}

/// Four bytes of `bytes`, big-endian.
pub fn long(bytes: &[u8], at: usize) -> Option<u32> {
    let end = at.checked_add(4)?;
    Some(u32::from_be_bytes(bytes.get(at..end)?.try_into().ok()?))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    let end = at.checked_add(N)?;
    bytes.get(at..end)?.try_into().ok()
}

/// A frame of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Who sent it.
    pub source: Mac,
    /// What is in it.
    pub body: Body,
}

/// What is in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// Somebody asks for the Ethernet address of `target`.
    Arp {
        /// Who asks.
        sender: Ipv4Addr,
        /// Whose address is wanted.
        target: Ipv4Addr,
    },
    /// An IP packet.
    Ip(Packet),
}

/// An IP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Its sender.
    pub source: IpAddr,
    /// Where it is to go.
    pub target: IpAddr,
    /// Protocol of the payload.
    pub protocol: u8,
    /// Where in the frame the payload begins.
    pub at: usize,
    /// Bytes of the payload.
    pub len: usize,
    /// It is a fragment.
    pub fragment: Option<Fragment>,
}

/// Which part of a packet a fragment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Number of the packet.
    pub id: u32,
    /// Where its bytes belong in the payload.
    pub offset: usize,
    /// It is not the last.
    pub more: bool,
}

/// Reads the headers of a frame of `total` bytes of which `head` are the first.
pub fn parse(head: &[u8], total: usize) -> Option<Frame> {
    let source = array::<6>(head, 6)?;
    let body = match word(head, 12)? {
        IPV4 => Body::Ip(ipv4(head, total)?),
        IPV6 => Body::Ip(ipv6(head, total)?),
        ARP => arp(head)?,
        _ => return None,
    };
    Some(Frame { source, body })
}

/// RFC 826: Ethernet, IPv4, request.
fn arp(head: &[u8]) -> Option<Body> {
    let kind = array::<8>(head, ETHERNET)?;
    (kind == [0, 1, 8, 0, 6, 4, 0, 1]).then_some(())?;
    let sender = Ipv4Addr::from(array::<4>(head, 28)?);
    Some(Body::Arp { sender, target: Ipv4Addr::from(array::<4>(head, 38)?) })
}

/// RFC 791, section 3.1.
fn ipv4(head: &[u8], total: usize) -> Option<Packet> {
    let first = *head.get(ETHERNET)?;
    let header = usize::from(first & 15).checked_mul(4).filter(|len| *len >= 20)?;
    let end = ETHERNET.checked_add(header)?;
    let bytes = head.get(ETHERNET..end)?;
    (first >> 4 == 4 && sum(0, bytes) == 0xffff).then_some(())?;
    let whole = usize::from(word(bytes, 2)?);
    let len = whole.checked_sub(header)?;
    (end.checked_add(len)? <= total).then_some(())?;
    let place = word(bytes, 6)?;
    let fragment = (place & 0x3fff != 0).then_some(Fragment {
        id: word(bytes, 4)?.into(),
        offset: usize::from(place & 0x1fff).saturating_mul(8),
        more: place & 0x2000 != 0,
    });
    Some(Packet {
        source: Ipv4Addr::from(array::<4>(bytes, 12)?).into(),
        target: Ipv4Addr::from(array::<4>(bytes, 16)?).into(),
        protocol: *bytes.get(9)?,
        at: end,
        len,
        fragment,
    })
}

/// Extension headers that are looked through.
const EXTENSIONS: usize = 6;

/// RFC 8200, sections 3 and 4.
fn ipv6(head: &[u8], total: usize) -> Option<Packet> {
    (head.get(ETHERNET)? >> 4 == 6).then_some(())?;
    let mut at = ETHERNET.checked_add(40)?;
    let end = at.checked_add(usize::from(word(head, 18)?))?;
    (end <= total).then_some(())?;
    let mut protocol = *head.get(20)?;
    let mut fragment = None;
    for _ in 0..EXTENSIONS {
        let len = match protocol {
            // Hop-by-hop options, routing, destination options.
            0 | 43 | 60 => usize::from(*head.get(at.checked_add(1)?)?).saturating_add(1).saturating_mul(8),
            44 => {
                let place = word(head, at.checked_add(2)?)?;
                let id = long(head, at.checked_add(4)?)?;
                let offset = usize::from(place & !7);
                fragment = Some(Fragment { id, offset, more: place & 1 != 0 });
                8
            }
            _ => break,
        };
        protocol = *head.get(at)?;
        at = at.checked_add(len)?;
        if fragment.is_some_and(|fragment| fragment.offset > 0) {
            break;
        }
    }
    Some(Packet {
        source: Ipv6Addr::from(array::<16>(head, 22)?).into(),
        target: Ipv6Addr::from(array::<16>(head, 38)?).into(),
        protocol,
        at,
        len: end.checked_sub(at)?,
        fragment,
    })
}

/// A TCP header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tcp {
    /// The guest's port.
    pub source: u16,
    /// The port it speaks to.
    pub target: u16,
    /// Number of the first byte.
    pub sequence: u32,
    /// Number of the byte expected next, if [`flag::ACK`] is set.
    pub acknowledged: u32,
    /// [`flag`]s.
    pub flags: u8,
    /// Bytes the sender takes, to be scaled.
    pub window: u16,
    /// Its largest segment (SYN only).
    pub segment: Option<u16>,
    /// Its window scale (SYN only).
    pub scale: Option<u8>,
    /// Bytes of the header.
    pub header: usize,
}

/// Reads a TCP header (RFC 9293, section 3.1; RFC 7323, section 2.2). `bytes` begins with it and may end behind it.
pub fn tcp(bytes: &[u8]) -> Option<Tcp> {
    let header = usize::from(bytes.get(12)? >> 4).checked_mul(4).filter(|len| *len >= 20)?;
    let mut options = bytes.get(20..header)?;
    let mut tcp = Tcp {
        source: word(bytes, 0)?,
        target: word(bytes, 2)?,
        sequence: long(bytes, 4)?,
        acknowledged: long(bytes, 8)?,
        flags: *bytes.get(13)?,
        window: word(bytes, 14)?,
        segment: None,
        scale: None,
        header,
    };
    while let Some((kind, rest)) = options.split_first() {
        options = match kind {
            0 => break,
            1 => rest,
            _ => {
                let len = usize::from(*rest.first()?).checked_sub(2)?;
                let value = rest.get(1..)?.get(..len)?;
                match (kind, value) {
                    (2, [high, low]) => tcp.segment = Some(u16::from_be_bytes([*high, *low])),
                    (3, [scale]) => tcp.scale = Some((*scale).min(14)),
                    _ => {}
                }
                rest.get(1..)?.get(len..)?
            }
        };
    }
    Some(tcp)
}

/// The one's complement sum of `bytes` on top of `start`, folded to 16 bits (RFC 1071).
pub fn sum(start: u32, bytes: &[u8]) -> u16 {
    let (pairs, odd) = bytes.as_chunks::<2>();
    let mut sum = u64::from(start);
    for pair in pairs {
        // Four GiB of words until it could overflow.
        sum = sum.wrapping_add(u64::from(u16::from_be_bytes(*pair)));
    }
    if let [last] = odd {
        sum = sum.wrapping_add(u64::from(*last) << 8);
    }
    fold(sum)
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff).wrapping_add(sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

/// The sum of the pseudo-header (RFC 9293, section 3.1; RFC 8200, section 8.1) of a payload of `len` bytes.
pub fn pseudo(source: IpAddr, target: IpAddr, protocol: u8, len: usize) -> u16 {
    let len = u32::try_from(len).unwrap_or(0);
    let addresses = match (source, target) {
        (IpAddr::V4(a), IpAddr::V4(b)) => sum(u32::from(sum(0, &a.octets())), &b.octets()),
        (IpAddr::V6(a), IpAddr::V6(b)) => sum(u32::from(sum(0, &a.octets())), &b.octets()),
        _ => 0,
    };
    fold(u64::from(addresses).wrapping_add(u64::from(protocol)).wrapping_add(u64::from(len)))
}

/// A packet for the guest under construction: headers in front, maybe a small payload behind them.
#[derive(Clone, Debug)]
pub struct Builder {
    bytes: Vec<u8>,
    source: IpAddr,
    target: IpAddr,
    protocol: u8,
    at: usize,
}

impl Builder {
    /// Ethernet and IP headers for a payload of `len` bytes.
    pub fn new(macs: (Mac, Mac), source: IpAddr, target: IpAddr, protocol: u8, len: usize) -> Builder {
        let mut bytes = Vec::with_capacity(128);
        let (to, from) = macs;
        bytes.extend(to);
        bytes.extend(from);
        let narrow = |len: usize| u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes();
        match (source, target) {
            (IpAddr::V4(source), IpAddr::V4(target)) => {
                bytes.extend(IPV4.to_be_bytes());
                bytes.extend([0x45, 0]);
                bytes.extend(narrow(len.saturating_add(20)));
                bytes.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]); // never to be fragmented, 64 hops
                bytes.extend(source.octets());
                bytes.extend(target.octets());
                let header = !sum(0, bytes.get(ETHERNET..).unwrap_or_default());
                put(&mut bytes, ETHERNET.saturating_add(10), header);
            }
            (IpAddr::V6(source), IpAddr::V6(target)) => {
                bytes.extend(IPV6.to_be_bytes());
                bytes.extend([0x60, 0, 0, 0]);
                bytes.extend(narrow(len));
                // Neighbour discovery wants 255 hops (RFC 4861, section 7.1), and nobody minds.
                bytes.extend([protocol, 255]);
                bytes.extend(source.octets());
                bytes.extend(target.octets());
            }
            // No caller mixes them.
            _ => {}
        }
        let at = bytes.len();
        Builder { bytes, source, target, protocol, at }
    }

    /// Appends to it.
    #[must_use]
    pub fn with(mut self, bytes: &[u8]) -> Builder {
        self.bytes.extend(bytes);
        self
    }

    /// Where the payload of the IP packet begins.
    pub fn at(&self) -> usize {
        self.at
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is nothing, which never is.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Stores the sum of the pseudo-header at `offset` of the payload: whoever receives the packet, or the card that
    /// sends it, adds the rest. The payload has `len` bytes.
    pub fn sum_pseudo(&mut self, offset: usize, len: usize) {
        let pseudo = pseudo(self.source, self.target, self.protocol, len);
        put(&mut self.bytes, self.at.saturating_add(offset), pseudo);
    }

    /// Stores the whole checksum at `offset` of the payload; `more` is the sum of what is not in here, `len` bytes.
    pub fn sum_all(&mut self, offset: usize, more: u16, len: usize) {
        let payload = self.bytes.get(self.at..).unwrap_or_default();
        let whole = payload.len().saturating_add(len);
        // ICMP over IPv4 has no pseudo-header.
        let start =
            if self.protocol == ICMP { 0 } else { pseudo(self.source, self.target, self.protocol, whole) };
        let sum = !sum(u32::from(start).wrapping_add(u32::from(more)), payload);
        // For UDP zero says that there is none (RFC 768).
        let sum = if sum == 0 && self.protocol == UDP { 0xffff } else { sum };
        put(&mut self.bytes, self.at.saturating_add(offset), sum);
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(room) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<2>()) {
        *room = value.to_be_bytes();
    }
}

/// A TCP header without options, its checksum zero.
pub fn tcp_header(
    source: u16,
    target: u16,
    sequence: u32,
    acknowledged: u32,
    flags: u8,
    window: u16,
) -> [u8; 20] {
    let ([a, b], [c, d]) = (source.to_be_bytes(), target.to_be_bytes());
    let ([e, f, g, h], [i, j, k, l]) = (sequence.to_be_bytes(), acknowledged.to_be_bytes());
    let [m, n] = window.to_be_bytes();
    [a, b, c, d, e, f, g, h, i, j, k, l, 0x50, flags, m, n, 0, 0, 0, 0]
}

/// A UDP header for `len` bytes, its checksum zero.
pub fn udp_header(source: u16, target: u16, len: usize) -> [u8; 8] {
    let ([a, b], [c, d]) = (source.to_be_bytes(), target.to_be_bytes());
    let [e, f] = u16::try_from(len.saturating_add(8)).unwrap_or(u16::MAX).to_be_bytes();
    [a, b, c, d, e, f, 0, 0]
}

/// An address with a port of 0 where there is none.
pub fn bare(address: IpAddr) -> SocketAddr {
    SocketAddr::new(address, 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_built_is_read_back() {
        let (a, b): (IpAddr, IpAddr) = ("10.0.2.2".parse().unwrap(), "10.0.2.15".parse().unwrap());
        let header = tcp_header(80, 40000, 7, 9, flag::SYN | flag::ACK, 1000);
        let mut built = Builder::new(([1; 6], [2; 6]), a, b, TCP, 22).with(&header).with(b"hi");
        built.sum_all(16, 0, 0);
        let bytes = built.bytes();
        let Frame { source, body: Body::Ip(packet) } = parse(bytes, bytes.len()).unwrap() else { panic!() };
        assert_eq!((source, packet.source, packet.target, packet.len), ([2; 6], a, b, 22));
        let read = tcp(&bytes[packet.at..]).unwrap();
        assert_eq!((read.source, read.target, read.sequence, read.acknowledged), (80, 40000, 7, 9));
        let whole = sum(u32::from(pseudo(a, b, TCP, 22)), &bytes[packet.at..]);
        assert_eq!(whole, 0xffff, "the checksum is right");
        assert_eq!(parse(bytes, bytes.len() - 1), None, "a packet longer than its frame");
    }

    #[test]
    fn options_of_a_syn_are_read() {
        let mut bytes = tcp_header(1, 2, 3, 4, flag::SYN, 5).to_vec();
        bytes[12] = 0x80;
        bytes.extend([2, 4, 5, 0xb4, 1, 3, 3, 7, 0, 0, 0, 0]);
        let read = tcp(&bytes).unwrap();
        assert_eq!((read.segment, read.scale, read.header), (Some(1460), Some(7), 32));
        bytes[21] = 1;
        assert_eq!(tcp(&bytes), None, "an option shorter than its head");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 0..4) {
            let kinds = [[8, 0], [0x86, 0xdd], [8, 6], [0, 0]];
            if let (Some(place), Some(kind)) = (bytes.get_mut(12..14), kinds.get(usize::try_from(kind).unwrap())) {
                place.copy_from_slice(kind);
            }
            if let Some(Frame { body: Body::Ip(packet), .. }) = parse(&bytes, bytes.len()) {
                prop_assert!(packet.at + packet.len <= bytes.len());
                let _ = tcp(&bytes[packet.at..]);
            }
            let _ = tcp(&bytes);
        }
    }
}
