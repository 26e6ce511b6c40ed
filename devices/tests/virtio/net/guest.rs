//! A guest with a TCP/IP stack that is not ours (smoltcp), behind the queues of the card.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use base::host::fake::FakeHost;
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{icmp, tcp, udp};
use smoltcp::time::Instant as Moment;
use smoltcp::wire::{
    EthernetAddress, HardwareAddress, IpAddress, IpCidr, IpEndpoint, Ipv4Address, Ipv6Address,
};
use vm_memory::{Bytes, GuestAddress};

use super::super::driver::*;

pub const F_CSUM: u64 = 1;
pub const F_GUEST_CSUM: u64 = 1 << 1;
pub const F_GUEST_TSO: u64 = 3 << 7;
pub const F_MERGE: u64 = 1 << 15;

/// A driver that knows nothing, and one that knows all.
pub const PLAIN: u64 = 0;
pub const ALL: u64 = u64::MAX;

pub const GATEWAY: Ipv4Address = Ipv4Address::new(10, 0, 2, 2);
pub const GUEST: Ipv4Address = Ipv4Address::new(10, 0, 2, 15);
pub const GATEWAY6: Ipv6Address = Ipv6Address::new(0xfd6d, 0x6179, 0x666c, 0x7900, 0, 0, 0, 2);
pub const GUEST6: Ipv6Address = Ipv6Address::new(0xfd6d, 0x6179, 0x666c, 0x7900, 0, 0, 0, 0x15);

const HEADER: usize = 12;
/// Buffers of the receive queue and of the transmit queue: number, bytes, where they begin.
const RX: (u16, u32, u64) = (128, 4096, 0x1_0000);
const TX: (u16, u32, u64) = (16, 66_000, 0x20_0000);
const PATIENCE: Duration = Duration::from_secs(30);

/// The card as its driver sees it.
pub struct Card {
    pub rig: Rig,
    rx: Virtq,
    tx: Virtq,
    /// Where the buffers lie, by head.
    places: HashMap<u16, u64>,
    spare: Vec<u64>,
    inbox: VecDeque<Vec<u8>>,
    mtu: usize,
    checksums: bool,
    /// Bytes of the largest frame received.
    pub largest: usize,
    /// Of so many frames received, one is lost in the driver; 0: none.
    pub lose_one_of: usize,
    received: usize,
    /// Frames of the guest that are lost next.
    pub lose_next: usize,
}

impl Card {
    pub fn new(text: &str, features: u64, host: &FakeHost, mtu: usize) -> Card {
        let mut rig = Rig::of("net", text, host);
        let features = (features | VERSION_1) & rig.offered();
        assert!(rig.negotiate(features), "features {features:#x} are accepted");
        let (rx, tx) = (rig.queue(0, RX.0, features), rig.queue(1, 64, features));
        rig.go();
        let spare = (0..u64::from(TX.0)).map(|n| TX.2 + n * u64::from(TX.1)).collect();
        let mut card = Card {
            rig,
            rx,
            tx,
            places: HashMap::new(),
            spare,
            inbox: VecDeque::new(),
            mtu,
            checksums: features & F_GUEST_CSUM != 0,
            largest: 0,
            lose_one_of: 0,
            received: 0,
            lose_next: 0,
        };
        for n in 0..u64::from(RX.0) {
            card.lay(RX.2 + n * u64::from(RX.1));
        }
        card.rig.notify(0);
        card
    }

    fn lay(&mut self, place: u64) {
        let head = self.rx.push(self.rig.memory.ram(), &[(place, RX.1, true)]);
        self.places.insert(head, place);
    }

    /// Takes what has been received out of the queue, and lays the buffers anew.
    pub fn receive_all(&mut self) {
        let ram = self.rig.memory.clone();
        let mut laid = false;
        while let Some((head, len)) = self.rx.pop(ram.ram()) {
            laid = true;
            let mut place = self.places[&u16::try_from(head).unwrap()];
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            ram.ram().read_slice(&mut bytes, GuestAddress(place)).unwrap();
            self.lay(place);
            let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
            assert!(buffers >= 1, "a frame has a buffer");
            for _ in 1..buffers {
                let (head, len) = self.rx.pop(ram.ram()).expect("all buffers of a frame come together");
                place = self.places[&u16::try_from(head).unwrap()];
                let at = bytes.len();
                bytes.resize(at + usize::try_from(len).unwrap(), 0);
                ram.ram().read_slice(&mut bytes[at..], GuestAddress(place)).unwrap();
                self.lay(place);
            }
            let frame = bytes.split_off(HEADER);
            if !self.checksums {
                assert_eq!(bytes[..2], [0, 0], "no offloads were agreed on");
                assert!(frame.len() <= self.mtu + 14, "a frame of {} bytes", frame.len());
            }
            self.largest = self.largest.max(frame.len());
            self.received += 1;
            if self.lose_one_of == 0 || !self.received.is_multiple_of(self.lose_one_of) {
                self.inbox.push_back(frame);
            }
        }
        if laid {
            self.rig.notify(0);
        }
    }

    /// The next frame received.
    pub fn next_frame(&mut self) -> Option<Vec<u8>> {
        self.receive_all();
        self.inbox.pop_front()
    }

    fn reclaim(&mut self) {
        while let Some((head, _)) = self.tx.pop(self.rig.memory.ram()) {
            let place = self.places.remove(&(u16::try_from(head).unwrap() | 0x8000)).unwrap();
            self.spare.push(place);
        }
    }

    /// Waits until the device has given all frames back.
    pub fn wait_until_sent(&mut self) {
        loop {
            let seen = self.rig.bell.edges();
            self.reclaim();
            if self.spare.len() == usize::from(TX.0) {
                return;
            }
            self.rig.bell.wait(seen);
        }
    }

    /// Sends a frame.
    pub fn send(&mut self, frame: &[u8]) {
        self.reclaim();
        if self.lose_next > 0 {
            self.lose_next -= 1;
            return;
        }
        let place = loop {
            match self.spare.pop() {
                Some(place) => break place,
                None => {
                    let seen = self.rig.bell.edges();
                    self.reclaim();
                    if self.spare.is_empty() {
                        self.rig.bell.wait(seen);
                    }
                }
            }
        };
        let ram = self.rig.memory.ram();
        ram.write_slice(&[0; HEADER], GuestAddress(place)).unwrap();
        ram.write_slice(frame, GuestAddress(place + 12)).unwrap();
        // In two pieces with the border in the headers, as no parser likes it.
        let (len, border) = (u32::try_from(frame.len() + HEADER).unwrap(), 12 + 27);
        let parts = [(place, border, false), (place + u64::from(border), len - border, false)];
        let head = self.tx.push(ram, &parts);
        self.places.insert(head | 0x8000, place);
        self.rig.notify(1);
    }
}

pub struct Received(Vec<u8>);
pub struct Sending<'a>(&'a mut Card);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.send(&frame);
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.max_transmission_unit = self.mtu + 14;
        capabilities.medium = Medium::Ethernet;
        if self.checksums {
            capabilities.checksum = ChecksumCapabilities::ignored();
            // What we check ourselves, because the card does.
            capabilities.checksum.ipv4 = smoltcp::phy::Checksum::Both;
            capabilities.checksum.icmpv4 = smoltcp::phy::Checksum::Both;
            capabilities.checksum.icmpv6 = smoltcp::phy::Checksum::Both;
        }
        capabilities
    }

    fn receive(&mut self, _: Moment) -> Option<(Received, Sending<'_>)> {
        let frame = self.next_frame()?;
        Some((Received(frame), Sending(self)))
    }

    fn transmit(&mut self, _: Moment) -> Option<Sending<'_>> {
        Some(Sending(self))
    }
}

/// The guest.
pub struct Guest {
    pub card: Card,
    pub stack: Interface,
    pub sockets: SocketSet<'static>,
    begun: Instant,
    port: u16,
}

impl Guest {
    /// A guest with fixed addresses.
    pub fn new(text: &str, features: u64) -> Guest {
        Guest::on(text, features, &FakeHost::default())
    }

    pub fn on(text: &str, features: u64, host: &FakeHost) -> Guest {
        let mtu =
            text.split(',').find_map(|word| word.strip_prefix("mtu=")).map_or(1500, |n| n.parse().unwrap());
        let mut card = Card::new(text, features, host, mtu);
        let mut mac = [0; 6];
        card.rig.config(0, &mut mac);
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress(mac)));
        let mut stack = Interface::new(config, &mut card, Moment::ZERO);
        stack.update_ip_addrs(|list| {
            list.push(IpCidr::new(GUEST.into(), 24)).unwrap();
            list.push(IpCidr::new(GUEST6.into(), 64)).unwrap();
        });
        stack.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
        stack.routes_mut().add_default_ipv6_route(GATEWAY6).unwrap();
        Guest { card, stack, sockets: SocketSet::new(Vec::new()), begun: Instant::now(), port: 40_000 }
    }

    /// Runs until `done` says so.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.card.rig.bell.edges();
            let now = Moment::from_micros(i64::try_from(self.begun.elapsed().as_micros()).unwrap());
            let polled = self.stack.poll(now, &mut self.card, &mut self.sockets);
            if done(self) {
                return;
            }
            assert!(Instant::now() < deadline, "waited for {what}");
            if polled == PollResult::None {
                let delay = self.stack.poll_delay(now, &self.sockets);
                let delay =
                    delay.map_or(Duration::from_secs(1), |delay| Duration::from_micros(delay.total_micros()));
                self.card.rig.bell.wait_at_most(seen, delay.min(Duration::from_secs(1)));
            }
        }
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn next_port(&mut self) -> u16 {
        self.port += 1;
        self.port
    }

    fn socket(&mut self) -> SocketHandle {
        let buffer = |len| tcp::SocketBuffer::new(vec![0; len]);
        let mut socket = tcp::Socket::new(buffer(256 << 10), buffer(256 << 10));
        socket.set_ack_delay(None);
        self.sockets.add(socket)
    }

    /// Begins a connection.
    pub fn begin(&mut self, to: impl Into<IpAddress>, port: u16) -> SocketHandle {
        let (handle, own) = (self.socket(), self.next_port());
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        socket.connect(self.stack.context(), (to.into(), port), own).unwrap();
        handle
    }

    /// A connection.
    pub fn connect(&mut self, to: impl Into<IpAddress>, port: u16) -> SocketHandle {
        let handle = self.begin(to, port);
        self.until("a connection", |guest| guest.tcp(handle).may_send());
        handle
    }

    /// A socket that waits for a connection.
    pub fn listen(&mut self, port: u16) -> SocketHandle {
        let handle = self.socket();
        self.tcp(handle).listen(port).unwrap();
        handle
    }

    /// Sends all of `data`.
    pub fn send(&mut self, handle: SocketHandle, data: &[u8]) {
        let mut sent = 0;
        self.until("data to be sent", |guest| {
            sent += guest.tcp(handle).send_slice(&data[sent..]).unwrap();
            sent == data.len()
        });
    }

    /// Receives `len` bytes.
    pub fn receive(&mut self, handle: SocketHandle, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        self.until("data", |guest| {
            let socket = guest.tcp(handle);
            while socket.can_recv() && data.len() < len {
                socket
                    .recv(|bytes| {
                        let taken = bytes.len().min(len - data.len());
                        data.extend(&bytes[..taken]);
                        (taken, ())
                    })
                    .unwrap();
            }
            data.len() == len
        });
        data
    }

    /// A UDP socket, bound.
    pub fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 32], vec![0; 256 << 10]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    pub fn send_to(&mut self, handle: SocketHandle, data: &[u8], to: impl Into<IpAddress>, port: u16) {
        let to = IpEndpoint::new(to.into(), port);
        self.sockets.get_mut::<udp::Socket>(handle).send_slice(data, to).unwrap();
    }

    /// The next datagram.
    pub fn receive_from(&mut self, handle: SocketHandle) -> (Vec<u8>, IpEndpoint) {
        let mut found = None;
        self.until("a datagram", |guest| {
            let socket = guest.sockets.get_mut::<udp::Socket>(handle);
            found = socket.recv().ok().map(|(data, meta)| (data.to_vec(), meta.endpoint));
            found.is_some()
        });
        found.unwrap()
    }

    /// A socket for ICMP: echo with this identifier, or errors about this UDP port.
    pub fn icmp(&mut self, endpoint: icmp::Endpoint) -> SocketHandle {
        let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 8192]);
        let mut socket = icmp::Socket::new(buffer(), buffer());
        socket.bind(endpoint).unwrap();
        self.sockets.add(socket)
    }

    pub fn meter(&self, name: &str) -> u64 {
        self.card.rig.meter(name)
    }
}

/// Bytes that are easily told from others.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..u32::try_from(len).unwrap()).map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]).collect()
}
