//! A guest played by the test: its driver, and the packets it sends and gets.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use base::host::Host;
use base::host::fake::FakeHost;
use vm_memory::{Bytes, GuestAddress};

use super::super::driver::{EVENT_IDX, Rig, Virtq};

pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
pub const RESET: u16 = 3;
pub const SHUTDOWN: u16 = 4;
pub const DATA: u16 = 5;
pub const CREDIT_UPDATE: u16 = 6;
pub const CREDIT_REQUEST: u16 = 7;
pub const RECEIVE: u32 = 1;
pub const SEND: u32 = 2;

pub const HEADER: u64 = 44;
/// Bytes in a buffer of the guest behind the header.
pub const BUFFER: u64 = 4096;
pub const BUFFERS: u64 = 32;
/// Where packets to the host are laid.
pub const OUT: u64 = 0x20_0000;
/// What the guest has room for unless it says otherwise.
pub const ROOM: u32 = 1 << 18;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Packet {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub bytes: Vec<u8>,
}

impl Packet {
    pub fn header(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.src_cid.to_le_bytes());
        out.extend(self.dst_cid.to_le_bytes());
        for word in [self.src_port, self.dst_port, self.len] {
            out.extend(word.to_le_bytes());
        }
        out.extend(self.kind.to_le_bytes());
        out.extend(self.op.to_le_bytes());
        for word in [self.flags, self.buf_alloc, self.fwd_cnt] {
            out.extend(word.to_le_bytes());
        }
        out
    }

    pub fn read(bytes: &[u8]) -> Packet {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        Packet {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
            bytes: bytes[44..].to_vec(),
        }
    }
}

/// The guest: its driver, and how it sees each connection (by its own port).
pub struct Guest {
    pub host: FakeHost,
    pub rig: Rig,
    pub rx: Virtq,
    pub tx: Virtq,
    pub buffers: HashMap<u32, u64>,
}

impl Guest {
    pub fn new() -> Guest {
        let host = FakeHost::default();
        let rig = Rig::of("vsock", "guest.sock", &host);
        Guest::start(host, rig)
    }

    pub fn start(host: FakeHost, mut rig: Rig) -> Guest {
        // Interrupts are wanted for each packet.
        let features = rig.offered() & !EVENT_IDX;
        assert!(rig.negotiate(features));
        let rx = rig.queue(0, 64, features);
        let tx = rig.queue(1, 64, features);
        rig.queue(2, 4, features);
        rig.go();
        let mut guest = Guest { host, rig, rx, tx, buffers: HashMap::new() };
        for number in 0..BUFFERS {
            guest.offer(0x1_0000 + 0x2000 * number);
        }
        guest.rig.notify(0);
        guest
    }

    pub fn offer(&mut self, at: u64) {
        let len = u32::try_from(HEADER + BUFFER).unwrap();
        let head = self.rx.push(self.rig.ram(), &[(at, len, true)]);
        self.buffers.insert(head.into(), at);
    }

    /// The next packet to the guest, whose buffer is offered again.
    pub fn receive(&mut self) -> Packet {
        let (packet, at) = self.receive_for_good();
        self.offer(at);
        self.rig.notify(0);
        packet
    }

    /// The same, but the buffer is not offered again.
    pub fn receive_for_good(&mut self) -> (Packet, u64) {
        let (head, len) = self.rig.wait_used(&mut self.rx);
        let at = self.buffers.remove(&head).unwrap();
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.rig.ram().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let packet = Packet::read(&bytes);
        assert_eq!(packet.bytes.len(), usize::try_from(packet.len).unwrap(), "{packet:?}");
        assert_eq!((packet.src_cid, packet.dst_cid), (2, 3), "{packet:?}");
        (packet, at)
    }

    pub fn expect(&mut self, op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.op, op, "{packet:?}");
        packet
    }

    /// Whether nothing has come for the guest.
    pub fn hears_nothing(&mut self) -> bool {
        self.rig.settle();
        self.rx.pop(self.rig.ram()).is_none()
    }

    /// Sends a packet as it stands, with `bytes` behind the header.
    pub fn send_raw(&mut self, header: &[u8], bytes: &[u8]) {
        self.rig.ram().write_slice(header, GuestAddress(OUT)).unwrap();
        self.rig.ram().write_slice(bytes, GuestAddress(OUT + 0x100)).unwrap();
        let mut parts = vec![(OUT, u32::try_from(header.len()).unwrap(), false)];
        if !bytes.is_empty() {
            parts.push((OUT + 0x100, u32::try_from(bytes.len()).unwrap(), false));
        }
        self.tx.push(self.rig.ram(), &parts);
        self.rig.notify(1);
        self.rig.wait_used(&mut self.tx);
    }

    pub fn packet(op: u16, port: u32, peer: u32) -> Packet {
        Packet {
            src_cid: 3,
            dst_cid: 2,
            src_port: port,
            dst_port: peer,
            kind: 1,
            op,
            buf_alloc: ROOM,
            ..Packet::default()
        }
    }

    pub fn send(&mut self, packet: &Packet) {
        self.send_raw(&packet.header(), &packet.bytes);
    }

    /// Sends `op` from the guest's `port` to the host's `peer`.
    pub fn say(&mut self, op: u16, port: u32, peer: u32) {
        self.send(&Guest::packet(op, port, peer));
    }

    pub fn say_bytes(&mut self, port: u32, peer: u32, bytes: &[u8]) {
        let len = u32::try_from(bytes.len()).unwrap();
        self.send(&Packet { len, bytes: bytes.to_vec(), ..Guest::packet(DATA, port, peer) });
    }

    pub fn say_end(&mut self, port: u32, peer: u32, flags: u32) {
        self.send(&Packet { flags, ..Guest::packet(SHUTDOWN, port, peer) });
    }

    /// A connection of the host's to the guest's port: the host's end, and its port as the guest sees it.
    pub fn called_on(&mut self, port: u32) -> (UnixStream, u32) {
        let mut stream = self.dial();
        writeln!(stream, "CONNECT {port}").unwrap();
        let request = self.expect(REQUEST);
        assert_eq!((request.dst_port, request.kind), (port, 1));
        assert!(request.buf_alloc > 0);
        self.say(RESPONSE, port, request.src_port);
        assert_eq!(line(&mut stream), format!("OK {}\n", request.src_port));
        (stream, request.src_port)
    }

    pub fn dial(&self) -> UnixStream {
        let stream = UnixStream::from(self.host.dial(Path::new("guest.sock")).unwrap());
        stream.set_nonblocking(false).unwrap();
        stream
    }

    /// Somebody who listens on the host's port.
    pub fn listen(&self, port: u32) -> UnixListener {
        let path = format!("guest.sock_{port}");
        let listener = UnixListener::from(self.host.listen("test", Path::new(&path)).unwrap().socket);
        listener.set_nonblocking(false).unwrap();
        listener
    }
}

pub fn line(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    let mut byte = [0];
    while !text.ends_with('\n') {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "the stream ends after {text:?}");
        text.push(char::from(byte[0]));
    }
    text
}

pub fn exactly(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

pub fn rest(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

impl Guest {
    /// Whether no packet waits for the guest now.
    pub fn is_quiet(&mut self) -> bool {
        self.rig.settle();
        self.rx.is_empty(self.rig.ram())
    }
}
