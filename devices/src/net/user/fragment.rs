//! IP fragments: datagrams larger than a packet, put together from the guest's and taken apart for it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use super::packet::{Builder, ETHERNET, Fragment, Packet, sum};

/// Datagrams that may be incomplete at one time, and how long (RFC 791 suggests 15 s).
const OPEN: usize = 16;
const PATIENCE: Duration = Duration::from_secs(15);
/// Pieces of one datagram.
const PIECES: usize = 128;

type Key = (IpAddr, IpAddr, u8, u32);

/// A datagram of which some is missing.
struct Assembly {
    bytes: Vec<u8>,
    /// What is there: ranges in the order they came.
    pieces: Vec<(usize, usize)>,
    whole: Option<usize>,
    since: Duration,
}

/// Datagrams on their way here in pieces.
#[derive(Default)]
pub struct Assemblies(HashMap<Key, Assembly>);

impl Assemblies {
    /// Adds a piece; the payload of the packet once it is whole. Pieces that overlap spoil the datagram (RFC 5722).
    pub fn add(
        &mut self,
        packet: &Packet,
        fragment: Fragment,
        bytes: &[u8],
        now: Duration,
    ) -> Option<Vec<u8>> {
        self.expire(now);
        let key = (packet.source, packet.target, packet.protocol, fragment.id);
        let end = fragment.offset.checked_add(bytes.len()).filter(|end| *end <= 65_535)?;
        if !self.0.contains_key(&key) && self.0.len() >= OPEN {
            return None;
        }
        let assembly = self.0.entry(key).or_insert_with(|| Assembly {
            bytes: Vec::new(),
            pieces: Vec::new(),
            whole: None,
            since: now,
        });
        let overlaps = assembly.pieces.iter().any(|(from, till)| fragment.offset < *till && *from < end);
        let broken = overlaps
            || bytes.is_empty()
            || assembly.pieces.len() >= PIECES
            || (fragment.more && !bytes.len().is_multiple_of(8))
            || (!fragment.more && assembly.whole.is_some());
        if broken {
            self.0.remove(&key);
            return None;
        }
        if assembly.bytes.len() < end {
            assembly.bytes.resize(end, 0);
        }
        assembly.bytes.get_mut(fragment.offset..end)?.copy_from_slice(bytes);
        assembly.pieces.push((fragment.offset, end));
        if !fragment.more {
            assembly.whole = Some(end);
        }
        let there: usize = assembly.pieces.iter().map(|(from, till)| till.saturating_sub(*from)).sum();
        // Without overlaps, as many bytes as there must be, and none behind the end, are all of them.
        (assembly.whole == Some(there) && assembly.bytes.len() == there).then_some(())?;
        Some(self.0.remove(&key)?.bytes)
    }

    /// Gives up what has waited too long.
    pub fn expire(&mut self, now: Duration) {
        self.0.retain(|_, assembly| now.saturating_sub(assembly.since) < PATIENCE);
    }

    /// Whether nothing is incomplete.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// The frames of a packet that is larger than `mtu`.
pub fn split(packet: &Builder, mtu: usize) -> Vec<Vec<u8>> {
    let bytes = packet.bytes();
    let (head, payload) = bytes.split_at_checked(packet.at()).unwrap_or((bytes, &[]));
    let v6 = packet.at() > ETHERNET.saturating_add(20);
    let headers = packet.at().saturating_sub(ETHERNET).saturating_add(if v6 { 8 } else { 0 });
    let room = mtu.saturating_sub(headers) & !7;
    // The checksum of the datagram tells it from those before and after.
    let id = sum(0, payload);
    if room == 0 {
        return Vec::new();
    }
    let count = payload.len().div_ceil(room);
    let piece = |(at, data): (usize, &[u8])| {
        let place = u16::try_from(at.saturating_mul(room)).unwrap_or(0);
        let more = at.saturating_add(1) < count;
        let mut frame = head.to_vec();
        if v6 {
            let protocol = frame.get(20).copied().unwrap_or(0);
            set(&mut frame, 18, u16::try_from(data.len().saturating_add(8)).unwrap_or(0));
            if let Some(next) = frame.get_mut(20) {
                *next = 44;
            }
            let [high, low] = (place | u16::from(more)).to_be_bytes();
            let [a, b] = id.to_be_bytes();
            frame.extend([protocol, 0, high, low, 0, 0, a, b]);
        } else {
            set(&mut frame, 16, u16::try_from(data.len().saturating_add(20)).unwrap_or(0));
            set(&mut frame, 18, id);
            set(&mut frame, 20, place >> 3 | if more { 0x2000 } else { 0 });
            set(&mut frame, 24, 0);
            let sum = !sum(0, frame.get(ETHERNET..).unwrap_or_default());
            set(&mut frame, 24, sum);
        }
        frame.extend(data);
        frame
    };
    payload.chunks(room).enumerate().map(piece).collect()
}

fn set(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(room) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<2>()) {
        *room = value.to_be_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::{Body, UDP, parse, udp_header};
    use super::*;

    #[test]
    fn what_is_taken_apart_can_be_put_together() {
        for (a, b) in [("10.0.2.2", "10.0.2.15"), ("fd00::1", "fd00::2")] {
            let data: Vec<u8> = (0..5000u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
            let (a, b) = (a.parse().unwrap(), b.parse().unwrap());
            let built = Builder::new(([1; 6], [2; 6]), a, b, UDP, 5008);
            let built = built.with(&udp_header(53, 4000, 5000)).with(&data);
            let mut frames = split(&built, 1500);
            assert_eq!(frames.len(), 4);
            frames.swap(0, 2);
            let mut assemblies = Assemblies::default();
            let mut whole = None;
            for frame in &frames {
                assert!(whole.is_none() && frame.len() <= 1514);
                let Body::Ip(packet) = parse(frame, frame.len()).unwrap().body else { panic!() };
                let bytes = &frame[packet.at..packet.at + packet.len];
                whole = assemblies.add(&packet, packet.fragment.unwrap(), bytes, Duration::ZERO);
            }
            assert_eq!(whole.unwrap()[8..], data);
            assert!(assemblies.is_empty());
        }
    }

    #[test]
    fn what_never_becomes_whole_is_bounded_and_forgotten() {
        let packet = Packet {
            source: "10.0.2.15".parse().unwrap(),
            target: "10.0.2.2".parse().unwrap(),
            protocol: UDP,
            at: 34,
            len: 8,
            fragment: None,
        };
        let mut assemblies = Assemblies::default();
        for id in 0..1000 {
            let piece = Fragment { id, offset: 65_520, more: true };
            assert_eq!(assemblies.add(&packet, piece, &[0; 8], Duration::ZERO), None);
        }
        assert_eq!(assemblies.0.len(), OPEN);
        let overlap = Fragment { id: 0, offset: 65_520, more: true };
        assert_eq!(assemblies.add(&packet, overlap, &[0; 8], Duration::ZERO), None);
        assert_eq!(assemblies.0.len(), OPEN - 1, "an overlap spoils it");
        assemblies.expire(PATIENCE);
        assert!(assemblies.is_empty());
    }
}
