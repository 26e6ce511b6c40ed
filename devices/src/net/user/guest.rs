//! What the guest sends: each frame is answered by the gateway itself, or belongs to a flow, or begins one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use base::Fault;
use base::lane::Interest;
use rustix::io::Errno;
use rustix::net::ipproto;
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, connect, socket_with};

use super::neighbour::{self, Unreachable, is_gateway, is_guest, quote, unreachable};
use super::packet::{self, Body, ICMP, ICMPV6, Packet, TCP, UDP, bare, flag, word};
use super::table::Flow;
use super::tcp::{Connection, Data, Ends, Lost};
use super::udp::{Association, Carries};
use super::wire::Wire;
use super::{FIRST_FLOW, ROUTER, ROUTER_AGAIN, User, dhcp, dns};
use crate::net::{HEADER, Inbox};
use crate::virtio::{Chain, Io};

/// Bytes of a frame that are looked at for its headers.
const HEAD: usize = 256;

/// Makes the wire of a call, from fields of `self` that are not used otherwise meanwhile.
macro_rules! wire {
    ($self:ident, $inbox:ident, $io:ident) => {
        &mut Wire { card: &mut $self.card, inbox: &mut *$inbox, io: &mut *$io }
    };
}
pub(super) use wire;

impl User {
    /// A frame of the guest, behind its virtio header.
    pub(super) fn frame(&mut self, chain: &Chain, inbox: &mut Inbox, io: &mut Io<'_>) -> Result<(), Fault> {
        let total = usize::try_from(chain.readable().len().saturating_sub(HEADER)).unwrap_or(0);
        let mut head = [0; HEAD];
        let len = chain.readable().read(io.ram(), HEADER, &mut head);
        let head = head.get(..len).unwrap_or_default();
        if let Some(pcap) = &mut self.card.pcap {
            let ram = io.ram();
            pcap.record(self.card.clock.wall(), total, |room| {
                chain.readable().read(ram, HEADER, room);
            });
        }
        let Some(frame) = packet::parse(head, total) else {
            self.counts.ignored.add(1);
            return Ok(());
        };
        if frame.source.first().is_some_and(|first| first & 1 == 0) {
            self.card.mac = frame.source;
        }
        match frame.body {
            Body::Arp { sender, target } if target == neighbour::GATEWAY4 => {
                let reply = neighbour::arp_reply(frame.source, sender);
                wire!(self, inbox, io).frame(&reply)?;
                Ok(())
            }
            Body::Arp { .. } => Ok(()),
            Body::Ip(packet) => self.packet(&packet, chain, inbox, io),
        }
    }

    fn packet(
        &mut self,
        packet: &Packet,
        chain: &Chain,
        inbox: &mut Inbox,
        io: &mut Io<'_>,
    ) -> Result<(), Fault> {
        if packet.protocol == TCP && packet.fragment.is_none() {
            return self.tcp(packet, chain, inbox, io);
        }
        if ![UDP, ICMP, ICMPV6].contains(&packet.protocol) {
            self.counts.ignored.add(1);
            return Ok(());
        }
        let mut payload = vec![0; packet.len];
        chain.readable().read(io.ram(), HEADER.saturating_add(packet.at as u64), &mut payload);
        if let Some(fragment) = packet.fragment {
            let now = self.now();
            match self.assemblies.add(packet, fragment, &payload, now) {
                Some(whole) => payload = whole,
                None => return Ok(()),
            }
        }
        match packet.protocol {
            UDP => self.udp(packet, &payload, inbox, io),
            _ => self.icmp(packet, &payload, inbox, io),
        }
    }

    /// Where a flow to `target` leads in truth.
    fn lead(&self, target: SocketAddr) -> Result<SocketAddr, Unreachable> {
        let address = target.ip();
        if is_gateway(address) {
            if target.port() == dns::PORT {
                return self.resolvers.get(self.resolver).copied().ok_or(Unreachable::Port);
            }
            let own: IpAddr =
                if address.is_ipv6() { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
            let allowed = !self.policy.restricts() || self.policy.allows(address, target.port(), self.now());
            return if self.loopback && allowed {
                Ok(SocketAddr::new(own, target.port()))
            } else {
                Err(Unreachable::Barred)
            };
        }
        if is_guest(address) {
            return Err(Unreachable::Host);
        }
        let allowed = self.policy.allows(address, target.port(), self.now());
        if allowed { Ok(target) } else { Err(Unreachable::Barred) }
    }

    fn tcp(
        &mut self,
        packet: &Packet,
        chain: &Chain,
        inbox: &mut Inbox,
        io: &mut Io<'_>,
    ) -> Result<(), Fault> {
        let mut header = [0; 60];
        let begin = HEADER.saturating_add(packet.at as u64);
        let len = chain.readable().read(io.ram(), begin, &mut header).min(packet.len);
        let Some(segment) = header.get(..len).and_then(packet::tcp) else {
            self.counts.ignored.add(1);
            return Ok(());
        };
        let ends = Ends {
            guest: SocketAddr::new(packet.source, segment.source),
            remote: SocketAddr::new(packet.target, segment.target),
        };
        let data = Data {
            chain,
            at: begin.saturating_add(segment.header as u64),
            len: u32::try_from(packet.len.saturating_sub(segment.header)).unwrap_or(0),
        };
        let Some(number) = self.table.find(&(TCP, ends)) else {
            return match segment.flags & (flag::SYN | flag::ACK | flag::RST) {
                flag::SYN => self.connect(ends, &segment, inbox, io),
                flags if flags & flag::RST != 0 => Ok(()),
                _ => refuse(&segment, ends, data.len, wire!(self, inbox, io)),
            };
        };
        let Some(slot) = self.table.get(number) else { return Ok(()) };
        let Flow::Tcp(connection) = &mut slot.flow else { return Ok(()) };
        let wire = wire!(self, inbox, io);
        match connection.input(&segment, &data, wire, &mut self.buffered) {
            Ok(()) => self.queue(number),
            Err(lost) => {
                connection.abort();
                if lost == Lost::Tell {
                    connection.refuse(wire)?;
                }
                self.remove(number);
            }
        }
        Ok(())
    }

    /// The guest begins a connection.
    fn connect(
        &mut self,
        ends: Ends,
        syn: &packet::Tcp,
        inbox: &mut Inbox,
        io: &mut Io<'_>,
    ) -> Result<(), Fault> {
        // Answers of the resolver are read for the rules, which is done for datagrams only.
        let names = is_gateway(ends.remote.ip()) && ends.remote.port() == dns::PORT;
        let led = self
            .lead(ends.remote)
            .and_then(|to| if names && self.policy.restricts() { Err(Unreachable::Port) } else { Ok(to) });
        let to = match led {
            Ok(to) if is_guest(ends.guest.ip()) && !self.table.is_full() => to,
            Ok(_) => {
                self.counts.refused.add(1);
                return refuse(syn, ends, 0, wire!(self, inbox, io));
            }
            Err(why) => {
                self.counts.refused.add(1);
                return self.deny(ends, syn, why, inbox, io);
            }
        };
        let made = open(to, SocketType::STREAM, None);
        let connected = made.and_then(|socket| match connect(&socket, &to) {
            Ok(()) => Ok((socket, true)),
            Err(Errno::INPROGRESS) => Ok((socket, false)),
            Err(cause) => Err(cause),
        });
        match connected {
            Ok((socket, at_once)) => {
                let (roll, now) = (self.roll(), self.now());
                let mut new = Connection::outgoing(socket, ends, roll, syn, self.card.mtu, now);
                if at_once {
                    new.connected();
                }
                if let Some(number) = self.begin((TCP, ends), Flow::Tcp(new), io)
                    && at_once
                {
                    self.queue(number);
                }
                Ok(())
            }
            Err(cause) => {
                self.counts.refused.add(1);
                self.deny(ends, syn, reason(cause), inbox, io)
            }
        }
    }

    /// Tells the guest why there is no connection.
    fn deny(
        &mut self,
        ends: Ends,
        syn: &packet::Tcp,
        why: Unreachable,
        inbox: &mut Inbox,
        io: &mut Io<'_>,
    ) -> Result<(), Fault> {
        let wire = wire!(self, inbox, io);
        match why {
            Unreachable::Port => refuse(syn, ends, 0, wire),
            why => unreachable(wire, ends, TCP, &quote(ends.guest, ends.remote, syn.sequence), why),
        }
    }

    /// Puts a flow into the table and watches its socket.
    pub(super) fn begin(&mut self, key: (u8, Ends), flow: Flow, io: &mut Io<'_>) -> Option<u16> {
        let number = self.table.insert(key, flow)?;
        self.counts.flows.add(1);
        let token = FIRST_FLOW.saturating_add(number);
        let watched = match self.table.get(number).map(|slot| &slot.flow) {
            Some(Flow::Tcp(connection)) => io.watch(connection.socket(), token, Interest::Changes),
            Some(Flow::Udp(flow)) => match flow.own_socket() {
                Some(socket) => io.watch(socket, token, Interest::Changes),
                None => Ok(()),
            },
            None => Ok(()),
        };
        if let Err(cause) = watched {
            log::debug!(target: "guest", "{}: wait for a socket: {cause}", self.name);
            self.remove(number);
            return None;
        }
        Some(number)
    }

    fn udp(
        &mut self,
        packet: &Packet,
        payload: &[u8],
        inbox: &mut Inbox,
        io: &mut Io<'_>,
    ) -> Result<(), Fault> {
        let (Some(source), Some(target), Some(len)) = (word(payload, 0), word(payload, 2), word(payload, 4))
        else {
            return Ok(());
        };
        // A length of the sender's own counts, unless it is none.
        let data = payload.get(8..usize::from(len)).or_else(|| payload.get(8..)).unwrap_or_default();
        let ends = Ends {
            guest: SocketAddr::new(packet.source, source),
            remote: SocketAddr::new(packet.target, target),
        };
        if packet.source.is_ipv4() && (source, target) == (dhcp::CLIENT, dhcp::SERVER) {
            return self.lend(data, packet.source, inbox, io);
        }
        let multicast = match packet.target {
            IpAddr::V4(v4) => v4.is_multicast() || v4.is_broadcast() || v4.octets().ends_with(&[255]),
            IpAddr::V6(v6) => v6.is_multicast(),
        };
        if !is_guest(packet.source) || (multicast && !is_gateway(packet.target)) {
            self.counts.ignored.add(1);
            return Ok(());
        }
        let names = is_gateway(packet.target) && target == dns::PORT;
        if names && self.policy.restricts() {
            let allowed = dns::question(data).is_some_and(|name| self.policy.resolves(&name));
            if !allowed {
                self.counts.refused.add(1);
                if let Some(refusal) = dns::refusal(data, 5) {
                    wire!(self, inbox, io).datagram(ends.remote, ends.guest, &refusal)?;
                }
                return Ok(());
            }
        }
        let carries = if names { Carries::Names } else { Carries::Data };
        self.datagram((UDP, ends), carries, data, inbox, io)
    }

    /// Sends a datagram on by its flow, which it may begin.
    fn datagram(
        &mut self,
        key: (u8, Ends),
        carries: Carries,
        data: &[u8],
        inbox: &mut Inbox,
        io: &mut Io<'_>,
    ) -> Result<(), Fault> {
        let (_, ends) = key;
        let now = self.now();
        let number = match self.table.find(&key) {
            Some(number) => Some(number),
            None => match self.associate(key, carries, io) {
                Ok(number) => number,
                Err(why) => {
                    self.counts.refused.add(1);
                    let first = quote(ends.guest, ends.remote, 8 << 16);
                    return match carries {
                        // A ping that nobody may send is one that nobody answers.
                        Carries::Echo(_) => Ok(()),
                        _ => unreachable(wire!(self, inbox, io), ends, UDP, &first, why),
                    };
                }
            },
        };
        let Some(number) = number else {
            self.counts.refused.add(1);
            return Ok(());
        };
        let Some(Flow::Udp(flow)) = self.table.get(number).map(|slot| &mut slot.flow) else { return Ok(()) };
        if let Err(cause) = flow.send(data, now) {
            flow.refused(cause, wire!(self, inbox, io))?;
            if carries == Carries::Names {
                self.resolver =
                    self.resolver.saturating_add(1).checked_rem(self.resolvers.len()).unwrap_or(0);
                self.remove(number);
            }
        }
        Ok(())
    }

    /// Begins a flow of datagrams. `None`: there are too many.
    fn associate(
        &mut self,
        key: (u8, Ends),
        carries: Carries,
        io: &mut Io<'_>,
    ) -> Result<Option<u16>, Unreachable> {
        let (_, ends) = key;
        let to = self.lead(ends.remote)?;
        if self.table.is_full() {
            self.evict();
        }
        let protocol = match carries {
            Carries::Echo(_) if to.is_ipv6() => Some(ipproto::ICMPV6),
            Carries::Echo(_) => Some(ipproto::ICMP),
            _ => None,
        };
        let socket = open(to, SocketType::DGRAM, protocol).map_err(reason)?;
        connect(&socket, &to).map_err(reason)?;
        let flow = Association::new(socket, ends, carries, self.now());
        Ok(self.begin(key, Flow::Udp(flow), io))
    }

    fn icmp(
        &mut self,
        packet: &Packet,
        payload: &[u8],
        inbox: &mut Inbox,
        io: &mut Io<'_>,
    ) -> Result<(), Fault> {
        let Some((&kind, &code)) = payload.first().zip(payload.get(1)) else { return Ok(()) };
        let v6 = packet.source.is_ipv6();
        match (v6, kind, code) {
            (true, 133, 0) if self.ipv6 => self.advertise(inbox, io),
            (true, 135, 0) if self.ipv6 => {
                neighbour::advertise_neighbour(wire!(self, inbox, io), packet.source, payload)
            }
            (false, 8, 0) | (true, 128, 0) if is_guest(packet.source) => {
                let rest = payload.get(4..).unwrap_or_default();
                if is_gateway(packet.target) {
                    neighbour::echo_reply(wire!(self, inbox, io), packet.target, packet.source, rest)?;
                    return Ok(());
                }
                let id = word(payload, 4).unwrap_or(0);
                let guest = SocketAddr::new(packet.source, id);
                let key = (packet.protocol, Ends { guest, remote: bare(packet.target) });
                // The kernel fills in identifier and checksum.
                self.datagram(key, Carries::Echo(id), payload, inbox, io)
            }
            _ => Ok(()),
        }
    }

    /// Answers a DHCP client.
    fn lend(
        &mut self,
        message: &[u8],
        client: IpAddr,
        inbox: &mut Inbox,
        io: &mut Io<'_>,
    ) -> Result<(), Fault> {
        let Some(answer) = dhcp::answer(message, &self.lease) else { return Ok(()) };
        let to = if is_guest(client) { client } else { Ipv4Addr::BROADCAST.into() };
        let from = SocketAddr::new(neighbour::GATEWAY4.into(), dhcp::SERVER);
        wire!(self, inbox, io).datagram(from, SocketAddr::new(to, dhcp::CLIENT), &answer)?;
        Ok(())
    }

    /// Tells the guest of its IPv6 router, now and from time to time.
    pub(super) fn advertise(&mut self, inbox: &mut Inbox, io: &mut Io<'_>) -> Result<(), Fault> {
        neighbour::advertise_router(wire!(self, inbox, io), self.lease.dns)?;
        io.arm(ROUTER, ROUTER_AGAIN);
        Ok(())
    }
}

/// Answers a segment that belongs to no connection (RFC 9293, section 3.10.7.1).
fn refuse(segment: &packet::Tcp, ends: Ends, len: u32, wire: &mut Wire<'_, '_>) -> Result<(), Fault> {
    let Ends { guest, remote } = ends;
    let (number, acknowledged, flags) = if segment.flags & flag::ACK != 0 {
        (segment.acknowledged, 0, flag::RST)
    } else {
        let syn_or_fin = u32::from(segment.flags & (flag::SYN | flag::FIN) != 0);
        (0, segment.sequence.wrapping_add(len).wrapping_add(syn_or_fin), flag::RST | flag::ACK)
    };
    let header = packet::tcp_header(remote.port(), guest.port(), number, acknowledged, flags, 0);
    let packet = wire.packet(remote.ip(), guest.ip(), TCP, header.len()).with(&header);
    wire.whole(packet, 16)?;
    Ok(())
}

/// A socket of the family of `to`.
fn open(to: SocketAddr, kind: SocketType, protocol: Option<Protocol>) -> Result<OwnedFd, Errno> {
    let family = if to.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, protocol)
}

/// What an error of the host means to the guest.
pub(super) fn reason(cause: Errno) -> Unreachable {
    match cause {
        Errno::NETUNREACH | Errno::NETDOWN | Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL => Unreachable::Net,
        Errno::HOSTUNREACH | Errno::HOSTDOWN | Errno::TIMEDOUT => Unreachable::Host,
        Errno::ACCESS | Errno::PERM => Unreachable::Barred,
        _ => Unreachable::Port,
    }
}
