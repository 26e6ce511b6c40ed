//! What the gateway says of itself: ARP, neighbour and router discovery, echo, and errors of ICMP.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use base::Fault;

use super::packet::{ARP, Builder, ICMP, ICMPV6, Mac};
use super::tcp::Ends;
use super::wire::{GATEWAY_MAC, Wire};

/// The guest's network: the first three bytes of its IPv4 addresses.
pub const NET4: [u8; 3] = [10, 0, 2];
/// The gateway, which is the name server too.
pub const GATEWAY4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The address that DHCP gives the guest.
pub const GUEST4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The guest's network: the first 64 bits of its IPv6 addresses.
pub const NET6: [u16; 4] = [0xfd6d, 0x6179, 0x666c, 0x7900];
/// The gateway in it.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd6d, 0x6179, 0x666c, 0x7900, 0, 0, 0, 2);
/// An address in it that the guest may be given.
pub const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd6d, 0x6179, 0x666c, 0x7900, 0, 0, 0, 15);
/// The gateway on the wire.
pub const ROUTER6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];

/// Whether this is an address of the gateway.
pub fn is_gateway(address: IpAddr) -> bool {
    [IpAddr::V4(GATEWAY4), GATEWAY6.into(), ROUTER6.into()].contains(&address)
}

/// Whether a packet from this address can be the guest's.
pub fn is_guest(address: IpAddr) -> bool {
    !is_gateway(address)
        && match address {
            IpAddr::V4(v4) => v4.octets().starts_with(&NET4),
            IpAddr::V6(v6) => v6.segments().starts_with(&NET6) || v6.is_unicast_link_local(),
        }
}

/// The answer to an ARP request for the gateway (RFC 826).
pub fn arp_reply(guest: Mac, sender: Ipv4Addr) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend(guest);
    frame.extend(GATEWAY_MAC);
    frame.extend(ARP.to_be_bytes());
    frame.extend([0, 1, 8, 0, 6, 4, 0, 2]);
    frame.extend(GATEWAY_MAC);
    frame.extend(GATEWAY4.octets());
    frame.extend(guest);
    frame.extend(sender.octets());
    frame
}

/// The answer to a neighbour solicitation (RFC 4861, section 7.2): `message` is its ICMPv6 message.
pub fn advertise_neighbour(wire: &mut Wire<'_, '_>, source: IpAddr, message: &[u8]) -> Result<(), Fault> {
    let target = message.get(8..24).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()).map(Ipv6Addr::from);
    let Some(target) = target.filter(|target| is_gateway((*target).into())) else { return Ok(()) };
    if source.is_unspecified() {
        // Somebody asks whether it may have our address: it may not.
        let macs = (ALL_NODES_MAC, GATEWAY_MAC);
        let packet = Builder::new(macs, target.into(), ALL_NODES.into(), ICMPV6, 32);
        wire.whole(neighbour(packet, target, 0xa0), 2)?;
    } else {
        let packet = wire.packet(target.into(), source, ICMPV6, 32);
        wire.whole(neighbour(packet, target, 0xe0), 2)?;
    }
    Ok(())
}

/// Router, and as `flags` say solicited and override, at our Ethernet address.
fn neighbour(packet: Builder, target: Ipv6Addr, flags: u8) -> Builder {
    packet.with(&[136, 0, 0, 0, flags, 0, 0, 0]).with(&target.octets()).with(&[2, 1]).with(&GATEWAY_MAC)
}

/// Tells the guest of its router, network and name server (RFC 4861, section 4.2; RFC 8106).
pub fn advertise_router(wire: &mut Wire<'_, '_>, dns: bool) -> Result<(), Fault> {
    let forever = [0xff; 4];
    // 64 hops, nothing managed, router for 30 minutes.
    let mut message = vec![134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    message.extend([1, 1]);
    message.extend(GATEWAY_MAC);
    message.extend([5, 1, 0, 0, 0, 0]);
    message.extend(wire.card.mtu.to_be_bytes());
    message.extend([3, 4, 64, 0xc0]);
    message.extend(forever);
    message.extend(forever);
    message.extend([0; 4]);
    message.extend(NET6.iter().flat_map(|word| word.to_be_bytes()));
    message.extend([0; 8]);
    if dns {
        message.extend([25, 3, 0, 0]);
        message.extend(forever);
        message.extend(GATEWAY6.octets());
    }
    let macs = (ALL_NODES_MAC, GATEWAY_MAC);
    let packet = Builder::new(macs, ROUTER6.into(), ALL_NODES.into(), ICMPV6, message.len());
    wire.whole(packet.with(&message), 2)?;
    Ok(())
}

/// An echo reply: `rest` is the message behind its checksum.
pub fn echo_reply(wire: &mut Wire<'_, '_>, from: IpAddr, to: IpAddr, rest: &[u8]) -> Result<bool, Fault> {
    let (protocol, kind) = if to.is_ipv6() { (ICMPV6, 129) } else { (ICMP, 0) };
    let len = rest.len().saturating_add(4);
    wire.whole(wire.packet(from, to, protocol, len).with(&[kind, 0, 0, 0]).with(rest), 2)
}

/// Why the guest cannot reach something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// There is no way to the network.
    Net,
    /// Nobody answers there.
    Host,
    /// Nobody listens there.
    Port,
    /// A rule forbids it.
    Barred,
}

/// Tells the guest (RFC 792, RFC 1812 section 5.2.7.1, RFC 4443 section 3.1) about its packet of `protocol` whose
/// payload began with `first`.
pub fn unreachable(
    wire: &mut Wire<'_, '_>,
    ends: Ends,
    protocol: u8,
    first: &[u8],
    why: Unreachable,
) -> Result<(), Fault> {
    let Ends { guest, remote } = ends;
    let (from, icmp, kind, code): (IpAddr, u8, u8, u8) = if guest.is_ipv6() {
        let code = match why {
            Unreachable::Net => 0,
            Unreachable::Barred => 1,
            Unreachable::Host => 3,
            Unreachable::Port => 4,
        };
        (GATEWAY6.into(), ICMPV6, 1, code)
    } else {
        let code = match why {
            Unreachable::Net => 0,
            Unreachable::Host => 1,
            Unreachable::Port => 3,
            Unreachable::Barred => 13,
        };
        (GATEWAY4.into(), ICMP, 3, code)
    };
    let quoted = Builder::new(([0; 6], [0; 6]), guest.ip(), remote.ip(), protocol, first.len()).with(first);
    let quoted = quoted.bytes().get(14..).unwrap_or_default();
    let len = quoted.len().saturating_add(8);
    let packet = wire.packet(from, guest.ip(), icmp, len).with(&[kind, code, 0, 0, 0, 0, 0, 0]);
    wire.whole(packet.with(quoted), 2)?;
    Ok(())
}

/// The first bytes of a TCP or UDP header, as an error quotes them: ports and what follows.
pub fn quote(guest: SocketAddr, remote: SocketAddr, then: u32) -> [u8; 8] {
    let ([a, b], [c, d]) = (guest.port().to_be_bytes(), remote.port().to_be_bytes());
    let [e, f, g, h] = then.to_be_bytes();
    [a, b, c, d, e, f, g, h]
}
