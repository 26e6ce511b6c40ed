//! The link to a network address translator in this process: the guest sees a small network with a router, and the
//! host sees the sockets of an ordinary program. No rights are needed.
//!
//! ```text
//! frames of the guest -> packet -> guest.rs -> a flow (tcp, udp) -> its socket
//! sockets             -> host.rs -> the flow -> wire -> frames for the guest
//! ```

mod dhcp;
mod dns;
mod fragment;
mod guest;
mod host;
mod neighbour;
pub mod packet;
mod policy;
mod publish;
mod table;
mod tcp;
mod udp;
mod wire;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::Read;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base::host::{Access, Host};
use base::lane::Interest;
use base::meter::Counter;
use base::{Doing, Fault, Result, Why};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

use super::pcap::Pcap;
use super::{Inbox, Link};
use crate::catalog::Kit;
use crate::virtio::{Chain, Io, Meters};
use dhcp::Lease;
use fragment::Assemblies;
pub use neighbour::{GATEWAY4, GUEST4, GUEST6, ROUTER6};
use packet::Mac;
pub use policy::Policy;
use publish::Port;
pub use publish::Publish;
use table::{FLOWS, Flow, Table};
use tcp::Turn;
use wire::{Card, Wire};

/// Bytes of `resolv.conf` that are read.
const RESOLV_CONF: u64 = 64 << 10;
/// Turns of flows in one visit, so that one guest leaves the lane to others.
const TURNS: usize = 128;

/// Tokens: what is left after a visit, the two clocks, published ports, flows.
const MORE: u16 = 0;
const TICK: u16 = 1;
const ROUTER: u16 = 2;
const PORTS: u16 = 0x100;
const FIRST_FLOW: u16 = 0x1000;

/// How often flows are looked at while one waits for the guest, and while none does.
const SOON: Duration = Duration::from_secs(1);
const LATER: Duration = Duration::from_secs(15);
/// How often the guest is told of its router, which it believes in for 30 minutes.
const ROUTER_AGAIN: Duration = Duration::from_secs(600);

/// What the user says of the network.
#[derive(Debug, Default)]
pub struct Settings {
    /// The guest's Ethernet address.
    pub mac: Mac,
    /// Bytes of an IP packet.
    pub mtu: u16,
    /// Published ports.
    pub publish: Vec<Publish>,
    /// Where the guest may go.
    pub policy: Policy,
    /// The resolver, if not the host's.
    pub dns: Option<SocketAddr>,
    /// The gateway's address leads to this machine's loopback address.
    pub loopback: bool,
    /// The guest gets IPv6.
    pub ipv6: bool,
    /// Where frames are recorded.
    pub pcap: Option<String>,
}

impl Settings {
    /// Opens the record of the device called `name`, and empties it.
    ///
    /// # Errors
    /// As the host answers.
    pub fn record(&self, name: &str, host: &dyn Host) -> Result<Option<File>> {
        let access = Access { write: true, create: true, ..Access::default() };
        let open = |path: &String| host.open(&format!("{name} record"), Path::new(path), access);
        self.pcap.as_ref().map(open).transpose()
    }
}

/// What has passed.
#[derive(Default)]
struct Counts {
    flows: Arc<Counter>,
    refused: Arc<Counter>,
    ignored: Arc<Counter>,
}

/// The network.
pub struct User {
    name: String,
    card: Card,
    lease: Lease,
    ipv6: bool,
    loopback: bool,
    resolvers: Vec<SocketAddr>,
    /// Which of them is asked; the next one when it fails.
    resolver: usize,
    policy: Policy,
    ports: Vec<Port>,
    table: Table,
    /// Flows of datagrams that began at a published port: the port, and who began it.
    peers: HashMap<(usize, SocketAddr), u16>,
    /// Flows that have something to do.
    work: VecDeque<u16>,
    /// Bytes that wait for sockets or for the guest to acknowledge them, of all connections.
    buffered: usize,
    assemblies: Assemblies,
    scratch: Vec<u8>,
    /// Makes first sequence numbers that nobody can guess.
    dice: RandomState,
    rolled: u64,
    /// A tick is due soon.
    soon: bool,
    counts: Counts,
}

impl User {
    /// The network of the device that `kit` is for.
    ///
    /// # Errors
    /// The host refuses a port or the record of frames.
    pub fn new(settings: Settings, kit: &Kit<'_>) -> Result<User> {
        let ports = settings.publish.iter().map(|publish| publish.open(kit.name)).collect::<Result<_>>()?;
        let pcap = settings.record(kit.name, kit.host)?.map(|file| Pcap::new(file, kit.name));
        let resolvers = match settings.dns {
            Some(server) => vec![server],
            None => resolvers(kit),
        };
        kit.host.expect_descriptors(FLOWS.into());
        let (client, gateway) = (neighbour::GUEST4, neighbour::GATEWAY4);
        let lease = Lease { client, gateway, mtu: settings.mtu, dns: !resolvers.is_empty() };
        Ok(User {
            name: kit.name.to_owned(),
            card: Card {
                mac: settings.mac,
                mtu: settings.mtu,
                checksums: false,
                large: (false, false),
                pcap,
                clock: kit.clock.clone(),
            },
            lease,
            ipv6: settings.ipv6,
            loopback: settings.loopback,
            resolvers,
            resolver: 0,
            policy: settings.policy,
            ports,
            table: Table::default(),
            peers: HashMap::new(),
            work: VecDeque::new(),
            buffered: 0,
            assemblies: Assemblies::default(),
            scratch: Vec::new(),
            dice: RandomState::new(),
            rolled: 0,
            soon: false,
            counts: Counts::default(),
        })
    }

    fn now(&self) -> Duration {
        self.card.clock.monotonic()
    }

    /// A number that nobody can guess.
    fn roll(&mut self) -> u32 {
        self.rolled = self.rolled.wrapping_add(1);
        u32::try_from(self.dice.hash_one(self.rolled) >> 32).unwrap_or(0)
    }

    /// Notes that a flow has something to do.
    fn queue(&mut self, number: u16) {
        if let Some(slot) = self.table.get(number).filter(|slot| !slot.queued) {
            slot.queued = true;
            self.work.push_back(number);
        }
    }

    /// Ends a flow.
    fn remove(&mut self, number: u16) {
        if let Some(slot) = self.table.remove(number)
            && let Flow::Tcp(connection) = slot.flow
        {
            self.buffered = self.buffered.saturating_sub(connection.waiting());
        }
    }

    /// Lets flows speak to the guest, in turn, while there is room.
    fn pump(&mut self, inboxes: &mut [Inbox], io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        let Some(inbox) = inboxes.first_mut() else { return Ok(()) };
        let now = self.now();
        let mut turns = TURNS;
        while let Some(number) = self.work.pop_front() {
            let Some(slot) = self.table.get(number) else { continue };
            let mut wire = Wire { card: &mut self.card, inbox: &mut *inbox, io: &mut *io };
            let turn = match &mut slot.flow {
                Flow::Tcp(connection) => connection.pump(&mut wire, &mut self.buffered)?,
                Flow::Udp(flow) => flow.pump(&mut wire, &mut self.policy, &mut self.scratch, now)?,
            };
            slot.queued = matches!(turn, Turn::Starved | Turn::Again);
            match turn {
                Turn::Idle => {}
                Turn::Gone => self.remove(number),
                Turn::Again => self.work.push_back(number),
                Turn::Starved => {
                    self.work.push_front(number);
                    break;
                }
            }
            turns = turns.saturating_sub(1);
            if turns == 0 {
                io.arm(MORE, Duration::ZERO);
                break;
            }
        }
        let idle = self.table.is_empty() && self.assemblies.is_empty();
        if !self.soon && !idle {
            self.soon = true;
            io.arm(TICK, SOON);
        }
        if let Some(pcap) = &mut self.card.pcap {
            pcap.flush();
        }
        Ok(())
    }
}

/// The host's resolvers; none if it names none.
fn resolvers(kit: &Kit<'_>) -> Vec<SocketAddr> {
    let path = Path::new("/etc/resolv.conf");
    let mut text = Vec::new();
    let read = kit.host.open(&format!("{} resolvers", kit.name), path, Access::default());
    let found = match read.map(|file| file.take(RESOLV_CONF).read_to_end(&mut text)) {
        Ok(Ok(_)) => dns::servers(&String::from_utf8_lossy(&text)),
        Ok(Err(_)) | Err(_) => Vec::new(),
    };
    if found.is_empty() {
        log::info!(target: "guest", "{}: {} names no server: the guest gets none", kit.name, path.display());
    }
    found
}

impl Link for User {
    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_HOST_ECN
    }

    fn mtu(&self) -> u16 {
        self.card.mtu
    }

    fn start(&mut self, features: u64, io: &mut Io<'_>) -> Result<()> {
        self.offer(features);
        self.scratch.resize(udp::LARGEST, 0);
        for (token, port) in (PORTS..FIRST_FLOW).zip(&self.ports) {
            io.watch(&port.socket, token, Interest::Readable)
                .doing(Why::Host, || format!("wait for connections to {}", self.name))?;
        }
        Ok(())
    }

    fn offer(&mut self, features: u64) {
        let has = |bit: u32| features & 1 << bit != 0;
        // A large segment without checksums to be completed does not exist (section 5.1.3.1).
        self.card.checksums = has(VIRTIO_NET_F_GUEST_CSUM);
        let large = |bit| self.card.checksums && has(bit);
        self.card.large = (large(VIRTIO_NET_F_GUEST_TSO4), large(VIRTIO_NET_F_GUEST_TSO6));
    }

    fn transmit(
        &mut self,
        _: usize,
        chain: &Chain,
        inboxes: &mut [Inbox],
        io: &mut Io<'_>,
    ) -> std::result::Result<bool, Fault> {
        if let Some(inbox) = inboxes.first_mut() {
            self.frame(chain, inbox, io)?;
        }
        Ok(true)
    }

    fn flush(&mut self, inboxes: &mut [Inbox], io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        self.pump(inboxes, io)
    }

    fn refilled(
        &mut self,
        _: usize,
        inboxes: &mut [Inbox],
        io: &mut Io<'_>,
    ) -> std::result::Result<(), Fault> {
        if self.work.is_empty() { Ok(()) } else { self.pump(inboxes, io) }
    }

    fn ready(
        &mut self,
        token: u16,
        inboxes: &mut [Inbox],
        io: &mut Io<'_>,
    ) -> std::result::Result<(), Fault> {
        if let Some(inbox) = inboxes.first_mut() {
            match token {
                MORE => {}
                TICK => self.tick(inbox, io)?,
                ROUTER => self.advertise(inbox, io)?,
                FIRST_FLOW.. => self.changed(token.saturating_sub(FIRST_FLOW), inbox, io)?,
                PORTS.. => self.knock(usize::from(token.saturating_sub(PORTS)), inbox, io)?,
                _ => {}
            }
        }
        self.pump(inboxes, io)
    }

    fn stop(&mut self, io: &mut Io<'_>) {
        for number in self.table.numbers() {
            if let Some(Flow::Tcp(connection)) = self.table.get(number).map(|slot| &slot.flow) {
                // The other side learns that the guest knows of nothing any more.
                connection.abort();
            }
        }
        self.table.clear();
        self.peers.clear();
        self.work.clear();
        self.buffered = 0;
        self.assemblies = Assemblies::default();
        self.soon = false;
        for port in &self.ports {
            io.unwatch(&port.socket);
        }
        [MORE, TICK, ROUTER].into_iter().for_each(|token| io.disarm(token));
        if let Some(pcap) = &mut self.card.pcap {
            pcap.flush();
        }
    }

    fn meters(&self) -> Meters {
        vec![
            ("flows", self.counts.flows.clone()),
            ("refused_flows", self.counts.refused.clone()),
            ("ignored_frames", self.counts.ignored.clone()),
        ]
    }
}
