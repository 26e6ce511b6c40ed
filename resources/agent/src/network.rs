//! The network of a guest: interfaces with addresses, routes and name servers, as ordered (rtnetlink(7)).

use std::fs;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent::orders::Interface;
use rustix::mount::mount_bind;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, recv, sendto, socket};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
/// A request, to be acknowledged.
const REQUEST: u16 = 1 | 4;
/// The same, for something new.
const CREATE: u16 = REQUEST | 0x400;
const IFF_UP: u32 = 1;
/// The address is nobody else's: it is used without asking around for a second first.
const IFA_F_NODAD: u8 = 2;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
/// The gateway is on this wire, whatever the addresses say.
const RTNH_F_ONLINK: u32 = 4;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Longest wait for a card to appear: its driver is loaded by now.
const PATIENCE: Duration = Duration::from_secs(10);
/// The interface that always is the loopback.
const LOOPBACK: u32 = 1;
/// Where name servers are looked for, and where those that were ordered stand.
const RESOLVERS: &str = "/etc/resolv.conf";
const OURS: &str = "/run/mayfly.resolv.conf";
/// Where systemd-resolved looks for servers that are no interface's.
const RESOLVED: &str = "/run/systemd/resolved.conf.d";

/// Switches the loopback interface on, and sets the others up as ordered.
pub fn build(interfaces: &[Interface]) -> io::Result<()> {
    let wire = Wire(socket(AddressFamily::NETLINK, SocketType::RAW, None)?);
    wire.raise(LOOPBACK)?;
    for interface in interfaces {
        wire.set_up(interface, interfaces).map_err(|error| {
            let name = interface.mac.map_or_else(|| "the network card".to_owned(), |mac| text(&mac));
            io::Error::new(error.kind(), format!("set up {name}: {error}"))
        })?;
    }
    let servers: Vec<IpAddr> = interfaces.iter().flat_map(|interface| interface.servers.clone()).collect();
    if servers.is_empty() { Ok(()) } else { name_servers(&servers) }
}

/// Has names looked up at `servers`. What stands in the place of `/etc/resolv.conf` is covered, not changed: it may be a file of
/// the host's that may be written to.
fn name_servers(servers: &[IpAddr]) -> io::Result<()> {
    let lines: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    fs::write(OURS, lines)?;
    let words: Vec<String> = servers.iter().map(IpAddr::to_string).collect();
    fs::create_dir_all(RESOLVED)?;
    fs::write(format!("{RESOLVED}/mayfly.conf"), format!("[Resolve]\nDNS={}\n", words.join(" ")))?;
    let Some(place) = resolvers_place()? else { return Ok(()) };
    if !place.exists() {
        place.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(&place, "")?;
    }
    Ok(mount_bind(OURS, &place)?)
}

/// The file that `/etc/resolv.conf` stands for; `None` where there is none, and none can be made but on the host.
fn resolvers_place() -> io::Result<Option<PathBuf>> {
    match fs::canonicalize(RESOLVERS) {
        Ok(place) => return Ok(Some(place)),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // A link to what a service would have made; in /run nothing is anybody else's.
    if let Ok(target) = fs::read_link(RESOLVERS) {
        let target = Path::new("/etc").join(target);
        let plain = target.to_string_lossy().replace("/etc/../", "/");
        return Ok(plain.starts_with("/run/").then(|| plain.into()));
    }
    let device = |path: &str| fs::metadata(path).map(|found| found.dev());
    let own = match device("/etc") {
        Ok(of_etc) => device("/").is_ok_and(|of_root| of_root == of_etc),
        Err(_) => true,
    };
    Ok(own.then(|| RESOLVERS.into()))
}

/// An Ethernet address as it is written.
fn text(mac: &[u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// A way to tell the kernel of its network.
struct Wire(OwnedFd);

impl Wire {
    fn set_up(&self, interface: &Interface, all: &[Interface]) -> io::Result<()> {
        let (name, index) = find(interface, all)?;
        let six = interface.addresses.iter().any(|(address, _)| address.is_ipv6());
        if six {
            for (setting, value) in [("accept_ra", "0"), ("accept_dad", "0")] {
                // A kernel without IPv6 has neither.
                let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{setting}"), value);
            }
        }
        self.raise(index)?;
        let known = |address: &IpAddr| address.is_ipv4() || Path::new("/proc/sys/net/ipv6").exists();
        for (address, prefix) in interface.addresses.iter().filter(|(address, _)| known(address)) {
            self.ask(RTM_NEWADDR, CREATE, &address_message(index, *address, *prefix))?;
        }
        for gateway in interface.gateways.iter().filter(|gateway| known(gateway)) {
            match self.ask(RTM_NEWROUTE, CREATE, &route_message(index, *gateway)) {
                // Another card leads there already.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                result => result?,
            }
        }
        Ok(())
    }

    fn raise(&self, index: u32) -> io::Result<()> {
        // An `ifinfomsg`: family, padding and type, the interface, its flags and which of them are meant.
        let mut body = vec![0; 4];
        [index, IFF_UP, IFF_UP].iter().for_each(|word| body.extend(word.to_ne_bytes()));
        self.ask(RTM_NEWLINK, REQUEST, &body)
    }

    /// Sends a message and waits for its acknowledgement.
    fn ask(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let mut message = Vec::new();
        message.extend(u32::try_from(16 + body.len()).unwrap_or(u32::MAX).to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        // Sequence number and port: one question at a time.
        message.extend([0; 8]);
        message.extend(body);
        sendto(&self.0, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        let mut answer = [0; 1024];
        let (n, _) = recv(&self.0, &mut answer, RecvFlags::empty())?;
        // An `nlmsgerr`: behind the header 0, or an errno with its sign turned.
        let cause = answer.get(..n).and_then(|answer| answer.get(16..20)?.try_into().ok());
        match cause.map(i32::from_ne_bytes) {
            Some(0) => Ok(()),
            Some(errno) => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
            None => Err(io::Error::new(ErrorKind::InvalidData, "the kernel's answer is none")),
        }
    }
}

/// An `ifaddrmsg` with its attributes.
fn address_message(index: u32, address: IpAddr, prefix: u8) -> Vec<u8> {
    let (family, bytes) = parts(address);
    let flags = if family == AF_INET6 { IFA_F_NODAD } else { 0 };
    let mut body = vec![family, prefix, flags, 0];
    body.extend(index.to_ne_bytes());
    put(&mut body, IFA_LOCAL, &bytes);
    put(&mut body, IFA_ADDRESS, &bytes);
    body
}

/// An `rtmsg` of the way to everywhere else, with its attributes.
fn route_message(index: u32, gateway: IpAddr) -> Vec<u8> {
    let (family, bytes) = parts(gateway);
    // The main table, set at the start, everywhere, unicast.
    let mut body = vec![family, 0, 0, 0, 254, 3, 0, 1];
    body.extend(if family == AF_INET { RTNH_F_ONLINK } else { 0 }.to_ne_bytes());
    put(&mut body, RTA_OIF, &index.to_ne_bytes());
    put(&mut body, RTA_GATEWAY, &bytes);
    body
}

fn parts(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AF_INET6, address.octets().to_vec()),
    }
}

/// Adds an attribute, whose length is a multiple of four here.
fn put(body: &mut Vec<u8>, kind: u16, bytes: &[u8]) {
    body.extend(u16::try_from(4 + bytes.len()).unwrap_or(u16::MAX).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(bytes);
}

/// Name and number of the interface that is meant: the one with that Ethernet address, or the first card that nobody names.
fn find(interface: &Interface, all: &[Interface]) -> io::Result<(String, u32)> {
    let start = Instant::now();
    loop {
        let mut cards = cards()?;
        cards.sort_by_key(|card| card.index);
        let named = |card: &&Card| all.iter().filter_map(|one| one.mac).any(|mac| text(&mac) == card.mac);
        let found = match interface.mac {
            Some(mac) => cards.iter().find(|card| card.mac == text(&mac)),
            None => cards.iter().find(|card| !named(card)),
        };
        if let Some(card) = found {
            return Ok((card.name.clone(), card.index));
        }
        if start.elapsed() > PATIENCE {
            return Err(io::Error::new(ErrorKind::NotFound, "the kernel has found no such card"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Card {
    name: String,
    index: u32,
    mac: String,
}

/// The interfaces that stand for a device.
fn cards() -> io::Result<Vec<Card>> {
    let mut cards = Vec::new();
    for entry in fs::read_dir("/sys/class/net")? {
        let entry = entry?;
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        if let (true, Ok(index)) = (entry.path().join("device").exists(), read("ifindex").trim().parse()) {
            let name = entry.file_name().to_string_lossy().into_owned();
            cards.push(Card { name, index, mac: read("address").trim().to_owned() });
        }
    }
    Ok(cards)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_of_rtnetlink() {
        let message = address_message(2, IpAddr::from([10, 0, 2, 15]), 24);
        assert_eq!(message, [2, 24, 0, 0, 2, 0, 0, 0, 8, 0, 2, 0, 10, 0, 2, 15, 8, 0, 1, 0, 10, 0, 2, 15]);
        let message = route_message(2, IpAddr::from([10, 0, 2, 2]));
        let wanted = [2, 0, 0, 0, 254, 3, 0, 1, 4, 0, 0, 0, 8, 0, 4, 0, 2, 0, 0, 0, 8, 0, 5, 0, 10, 0, 2, 2];
        assert_eq!(message, wanted);
        let six = address_message(3, IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, 15]), 64);
        assert_eq!((six.len(), &six[..4]), (8 + 20 + 20, &[10, 64, 2, 0][..]));
    }
}
