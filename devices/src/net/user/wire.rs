//! The wire to the guest: packets that begin here, with the offloads that its driver has accepted.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use base::Fault;
use base::clock::Clock;

use super::fragment::split;
use super::packet::{Builder, ETHERNET, Mac, UDP, sum, udp_header};
use crate::net::header::Segment;
use crate::net::pcap::Pcap;
use crate::net::{HEADER, Header, Inbox};
use crate::virtio::Io;

/// The gateway's Ethernet address.
pub const GATEWAY_MAC: Mac = [0x02, 0x6d, 0x61, 0x79, 0x66, 0x01];

/// What is known of the guest's card.
pub struct Card {
    /// Its address, as its last frame said.
    pub mac: Mac,
    /// Bytes of an IP packet.
    pub mtu: u16,
    /// The driver completes checksums.
    pub checksums: bool,
    /// The driver takes large TCP segments over IPv4, over IPv6.
    pub large: (bool, bool),
    /// Where frames are recorded.
    pub pcap: Option<Pcap>,
    /// The times.
    pub clock: Arc<dyn Clock>,
}

/// The way to the guest during one call.
pub struct Wire<'a, 'io> {
    /// The guest's card.
    pub card: &'a mut Card,
    /// Its buffers.
    pub inbox: &'a mut Inbox,
    /// Its rings and memory.
    pub io: &'a mut Io<'io>,
}

impl Wire<'_, '_> {
    /// Begins a packet to the guest.
    pub fn packet(&self, from: IpAddr, to: IpAddr, protocol: u8, len: usize) -> Builder {
        Builder::new((self.card.mac, GATEWAY_MAC), from, to, protocol, len)
    }

    /// Sends a whole frame; whether there was room.
    ///
    /// # Errors
    /// The guest's ring is broken.
    pub fn frame(&mut self, bytes: &[u8]) -> Result<bool, Fault> {
        if let Some(pcap) = &mut self.card.pcap {
            pcap.record(self.card.clock.wall(), bytes.len(), |room| {
                room.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            });
        }
        self.inbox.put(bytes, Header::default(), self.io)
    }

    /// Sends a packet whose checksum is at `offset` of its payload, in fragments if it is larger than the MTU; whether
    /// there was room for all of it.
    ///
    /// # Errors
    /// As [`Wire::frame`].
    pub fn whole(&mut self, mut packet: Builder, offset: usize) -> Result<bool, Fault> {
        packet.sum_all(offset, 0, 0);
        let mtu = usize::from(self.card.mtu);
        if packet.len() <= mtu.saturating_add(ETHERNET) {
            return self.frame(packet.bytes());
        }
        for frame in split(&packet, mtu) {
            if !self.frame(&frame)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether the guest takes TCP segments larger than its MTU.
    pub fn large(&self, v6: bool) -> bool {
        if v6 { self.card.large.1 } else { self.card.large.0 }
    }

    /// Sends a TCP segment of which `len` bytes of data lie behind the headers in the inbox already, in pieces of
    /// `size` bytes if it is larger.
    pub fn segment(&mut self, mut packet: Builder, len: usize, size: u16) {
        let (at, v6) = (packet.at(), packet.at() > 40);
        let head = packet.len();
        let tcp = head.saturating_sub(at);
        let mut header = Header::default();
        if self.card.checksums {
            packet.sum_pseudo(16, tcp.saturating_add(len));
            header.checksum = Some((u16::try_from(at).unwrap_or(0), 16));
            if len > usize::from(size) {
                header.segment = Some(Segment { size, v6 });
                header.len = u16::try_from(head).unwrap_or(0);
            }
        } else {
            let mut data = vec![0; len];
            self.inbox.read(self.io.ram(), HEADER.saturating_add(head as u64), &mut data);
            packet.sum_all(16, sum(0, &data), len);
        }
        self.inbox.write(self.io.ram(), HEADER, packet.bytes());
        let whole = head.saturating_add(len);
        if let Some(pcap) = &mut self.card.pcap {
            let (inbox, ram) = (&*self.inbox, self.io.ram());
            pcap.record(self.card.clock.wall(), whole, |room| inbox.read(ram, HEADER, room));
        }
        self.inbox.commit(whole as u64, header, self.io);
    }

    /// Sends a UDP datagram; whether there was room for all of it.
    ///
    /// # Errors
    /// As [`Wire::frame`].
    pub fn datagram(&mut self, from: SocketAddr, to: SocketAddr, data: &[u8]) -> Result<bool, Fault> {
        let header = udp_header(from.port(), to.port(), data.len());
        let len = data.len().saturating_add(header.len());
        let packet = self.packet(from.ip(), to.ip(), UDP, len).with(&header).with(data);
        self.whole(packet, 6)
    }
}
