//! The socket device: a played guest at one end, Unix sockets at the other.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use base::host::Host;
use base::host::fake::FakeHost;
use base::memory::Memory;
use vm_memory::{Bytes, GuestAddress};

use crate::driver::{EVENT_IDX, NEEDS_RESET, RAM, Rig, Virtq, build, reg};

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const SHUTDOWN: u16 = 4;
const DATA: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;
const RECEIVE: u32 = 1;
const SEND: u32 = 2;

const HEADER: u64 = 44;
/// Bytes in a buffer of the guest behind the header.
const BUFFER: u64 = 4096;
const BUFFERS: u64 = 32;
/// Where packets to the host are laid.
const OUT: u64 = 0x20_0000;
/// What the guest has room for unless it says otherwise.
const ROOM: u32 = 1 << 18;

#[derive(Clone, Debug, Default, PartialEq)]
struct Packet {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    bytes: Vec<u8>,
}

impl Packet {
    fn header(&self) -> Vec<u8> {
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

    fn read(bytes: &[u8]) -> Packet {
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
struct Guest {
    host: FakeHost,
    rig: Rig,
    rx: Virtq,
    tx: Virtq,
    buffers: HashMap<u32, u64>,
}

impl Guest {
    fn new() -> Guest {
        let host = FakeHost::default();
        let rig = Rig::of("vsock", "guest.sock", &host);
        Guest::start(host, rig)
    }

    fn start(host: FakeHost, mut rig: Rig) -> Guest {
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

    fn offer(&mut self, at: u64) {
        let len = u32::try_from(HEADER + BUFFER).unwrap();
        let head = self.rx.push(self.rig.ram(), &[(at, len, true)]);
        self.buffers.insert(head.into(), at);
    }

    /// The next packet to the guest, whose buffer is offered again.
    fn receive(&mut self) -> Packet {
        let (packet, at) = self.receive_for_good();
        self.offer(at);
        self.rig.notify(0);
        packet
    }

    /// The same, but the buffer is not offered again.
    fn receive_for_good(&mut self) -> (Packet, u64) {
        let (head, len) = self.rig.wait_used(&mut self.rx);
        let at = self.buffers.remove(&head).unwrap();
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.rig.ram().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let packet = Packet::read(&bytes);
        assert_eq!(packet.bytes.len(), usize::try_from(packet.len).unwrap(), "{packet:?}");
        assert_eq!((packet.src_cid, packet.dst_cid), (2, 3), "{packet:?}");
        (packet, at)
    }

    fn expect(&mut self, op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.op, op, "{packet:?}");
        packet
    }

    /// Whether nothing has come for the guest.
    fn hears_nothing(&mut self) -> bool {
        self.rig.settle();
        self.rx.pop(self.rig.ram()).is_none()
    }

    /// Sends a packet as it stands, with `bytes` behind the header.
    fn send_raw(&mut self, header: &[u8], bytes: &[u8]) {
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

    fn packet(op: u16, port: u32, peer: u32) -> Packet {
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

    fn send(&mut self, packet: &Packet) {
        self.send_raw(&packet.header(), &packet.bytes);
    }

    /// Sends `op` from the guest's `port` to the host's `peer`.
    fn say(&mut self, op: u16, port: u32, peer: u32) {
        self.send(&Guest::packet(op, port, peer));
    }

    fn say_bytes(&mut self, port: u32, peer: u32, bytes: &[u8]) {
        let len = u32::try_from(bytes.len()).unwrap();
        self.send(&Packet { len, bytes: bytes.to_vec(), ..Guest::packet(DATA, port, peer) });
    }

    fn say_end(&mut self, port: u32, peer: u32, flags: u32) {
        self.send(&Packet { flags, ..Guest::packet(SHUTDOWN, port, peer) });
    }

    /// A connection of the host's to the guest's port: the host's end, and its port as the guest sees it.
    fn called_on(&mut self, port: u32) -> (UnixStream, u32) {
        let mut stream = self.dial();
        write!(stream, "CONNECT {port}\n").unwrap();
        let request = self.expect(REQUEST);
        assert_eq!((request.dst_port, request.kind), (port, 1));
        assert!(request.buf_alloc > 0);
        self.say(RESPONSE, port, request.src_port);
        assert_eq!(line(&mut stream), format!("OK {}\n", request.src_port));
        (stream, request.src_port)
    }

    fn dial(&self) -> UnixStream {
        let stream = UnixStream::from(self.host.dial(Path::new("guest.sock")).unwrap());
        stream.set_nonblocking(false).unwrap();
        stream
    }

    /// Somebody who listens on the host's port.
    fn listen(&self, port: u32) -> UnixListener {
        let path = format!("guest.sock_{port}");
        let listener = UnixListener::from(self.host.listen("test", Path::new(&path)).unwrap().socket);
        listener.set_nonblocking(false).unwrap();
        listener
    }
}

fn line(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    let mut byte = [0];
    while !text.ends_with('\n') {
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "the stream ends after {text:?}");
        text.push(char::from(byte[0]));
    }
    text
}

fn exactly(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn rest(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

#[test]
fn the_guest_learns_its_context_id() {
    for (text, cid) in [("guest.sock", 3u64), ("path=a,cid=4294967294", 4_294_967_294)] {
        let mut rig = Rig::of("vsock", text, &FakeHost::default());
        let mut bytes = [0; 8];
        rig.config(0, &mut bytes);
        assert_eq!(u64::from_le_bytes(bytes), cid);
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let refused = |text: &str| {
        let memory = Memory::new(&RAM).unwrap();
        match build("vsock", text, &FakeHost::default(), &memory) {
            Ok(_) => panic!("{text} is accepted"),
            Err(fail) => fail.to_string(),
        }
    };
    for cid in ["0", "2", "4294967295"] {
        let text = refused(&format!("path=a,cid={cid}"));
        assert_eq!(text, format!("give test0 the context ID {cid}: a guest has one of 3 to 4294967294"));
    }
    let text = refused(&format!("path={}", "x".repeat(97)));
    assert!(text.contains("has at most 96 bytes, so that `_PORT` fits behind it\n  hint: "), "{text}");
}

#[test]
fn a_program_of_the_host_reaches_one_of_the_guest() {
    let mut guest = Guest::new();
    let mut stream = guest.dial();
    // What follows the line is for the guest, also when it comes with it.
    stream.write_all(b"CONNECT 52\nhello").unwrap();
    let request = guest.expect(REQUEST);
    assert_eq!((request.src_port, request.dst_port), (1 << 30, 52));
    assert!(guest.hears_nothing(), "no bytes before the guest has accepted");
    guest.say(RESPONSE, 52, 1 << 30);
    assert_eq!(line(&mut stream), "OK 1073741824\n");
    assert_eq!(guest.expect(DATA).bytes, b"hello");
    guest.say_bytes(52, 1 << 30, b"world");
    assert_eq!(exactly(&mut stream, 5), b"world");
    let (_second, port) = guest.called_on(52);
    assert_eq!(port, (1 << 30) + 1, "each has a port of its own");
    assert_eq!((guest.rig.meter("rx_bytes"), guest.rig.meter("tx_bytes")), (5, 5));
}

#[test]
fn a_guest_that_refuses_ends_the_stream_without_an_answer() {
    let mut guest = Guest::new();
    let mut stream = guest.dial();
    stream.write_all(b"CONNECT 9\n").unwrap();
    let request = guest.expect(REQUEST);
    guest.say(RESET, 9, request.src_port);
    assert_eq!(rest(&mut stream), b"");
    assert!(guest.hears_nothing(), "a reset is not answered");
}

#[test]
fn a_greeting_that_is_none_ends_the_stream() {
    let mut guest = Guest::new();
    for text in ["HELLO 1\n", "CONNECT\n", "CONNECT 99999999999\n", "CONNECT 000000000000000000000000000"] {
        let mut stream = guest.dial();
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = Vec::new();
        // The rest of what was said may be unread when it is closed.
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"", "{text}");
    }
    let mut slow = guest.dial();
    slow.write_all(b"CONN").unwrap();
    guest.rig.settle();
    slow.write_all(b"ECT 7\n").unwrap();
    assert_eq!(guest.expect(REQUEST).dst_port, 7, "a line may come in pieces");
}

#[test]
fn a_program_of_the_guest_reaches_one_of_the_host() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    guest.say(REQUEST, 1000, 80);
    let answer = guest.expect(RESPONSE);
    assert_eq!((answer.src_port, answer.dst_port), (80, 1000));
    let (mut stream, _) = listener.accept().unwrap();
    guest.say_bytes(1000, 80, b"question");
    assert_eq!(exactly(&mut stream, 8), b"question");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(DATA).bytes, b"answer");
    guest.say(REQUEST, 1000, 81);
    let refused = guest.expect(RESET);
    assert_eq!((refused.src_port, refused.dst_port), (81, 1000), "nobody listens there");
}

#[test]
fn a_busy_program_of_the_host_is_waited_for() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    rustix::net::listen(&listener, 0).unwrap();
    guest.say(REQUEST, 1, 80);
    guest.expect(RESPONSE);
    guest.say(REQUEST, 2, 80);
    assert!(guest.hears_nothing(), "there is no room for the second yet");
    listener.accept().unwrap();
    assert_eq!(guest.expect(SHUTDOWN).dst_port, 1, "the first was closed at once");
    assert_eq!(guest.expect(RESPONSE).dst_port, 2);
}

#[test]
fn the_host_may_end_its_half_and_still_hear_the_answer() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(DATA).bytes, b"question", "bytes come before the end");
    assert_eq!(guest.expect(SHUTDOWN).flags, SEND, "one half only");
    guest.say_bytes(5, port, b"answer");
    assert_eq!(exactly(&mut stream, 6), b"answer");
    guest.say_end(5, port, SEND | RECEIVE);
    assert_eq!(guest.expect(RESET).src_port, port, "the guest may forget it");
    assert_eq!(rest(&mut stream), b"");
}

#[test]
fn the_guest_may_end_its_half_and_still_hear_the_answer() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    guest.say_bytes(5, port, b"question");
    guest.say_end(5, port, SEND);
    assert_eq!(rest(&mut stream), b"question", "the end is there behind the bytes");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(DATA).bytes, b"answer");
    drop(stream);
    assert_eq!(guest.expect(SHUTDOWN).flags, SEND | RECEIVE);
    guest.say_bytes(5, port, b"more");
    assert_eq!(guest.expect(RESET).src_port, port, "bytes after the end break the protocol");
}

#[test]
fn a_host_that_dies_is_a_full_end_even_with_bytes_unread() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    stream.write_all(b"last words").unwrap();
    guest.say_bytes(5, port, b"never read");
    drop(stream);
    assert_eq!(guest.expect(DATA).bytes, b"last words");
    let mut end = guest.expect(SHUTDOWN);
    if end.flags == RECEIVE {
        // It was seen first that nobody reads.
        end = guest.expect(SHUTDOWN);
    }
    assert_eq!(end.flags, SEND | RECEIVE);
    guest.say_bytes(5, port, b"crossed the end");
    assert!(guest.hears_nothing(), "what was under way is forgotten");
    guest.say(RESET, 5, port);
    assert!(guest.hears_nothing());
    let (_, again) = guest.called_on(5);
    assert_ne!(again, port);
}

#[test]
fn what_the_guest_sent_before_its_end_arrives() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    let sent = pattern(1 << 20);
    let mut taken = 0;
    // Until the socket is full and bytes wait in the device.
    for piece in sent.chunks(16 << 10) {
        if taken + piece.len() > 256 << 10 {
            break;
        }
        guest.say_bytes(5, port, piece);
        taken += piece.len();
    }
    guest.say_end(5, port, SEND | RECEIVE);
    while guest.receive().op != RESET {}
    assert_eq!(rest(&mut stream), sent[..taken]);
}

#[test]
fn a_slow_host_stops_the_guest_and_nothing_is_lost() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    let (mut other, other_port) = guest.called_on(6);
    let sent = pattern(3 << 20);
    let (mut at, mut room, mut taken) = (0, 256 << 10, 0u32);
    let mut seen = Vec::new();
    while at < sent.len() {
        let outstanding = u32::try_from(at).unwrap().wrapping_sub(taken);
        let len = (room - outstanding).min(16 << 10).min(u32::try_from(sent.len() - at).unwrap());
        if len > 0 {
            let end = at + usize::try_from(len).unwrap();
            guest.say_bytes(5, port, &sent[at..end]);
            at = end;
        } else {
            // The other connection is not held up.
            guest.say_bytes(6, other_port, b"ping");
            assert_eq!(exactly(&mut other, 4), b"ping");
            seen.extend(exactly(&mut stream, 100 << 10));
        }
        while !guest.is_quiet() {
            let packet = guest.receive();
            assert_eq!((packet.op, packet.dst_port), (CREDIT_UPDATE, 5));
            (room, taken) = (packet.buf_alloc, packet.fwd_cnt);
        }
    }
    guest.say_end(5, port, SEND | RECEIVE);
    seen.extend(rest(&mut stream));
    assert!(seen == sent, "{} of {} bytes", seen.len(), sent.len());
}

impl Guest {
    /// Whether no packet waits for the guest now.
    fn is_quiet(&mut self) -> bool {
        self.rig.settle();
        self.rx.is_empty(self.rig.ram())
    }
}

#[test]
fn a_slow_guest_gets_what_it_has_room_for() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    let (mut other, _) = guest.called_on(6);
    guest.send(&Packet { buf_alloc: 1000, ..Guest::packet(CREDIT_UPDATE, 5, port) });
    stream.write_all(&pattern(2500)).unwrap();
    let mut got = guest.expect(DATA).bytes;
    assert_eq!(got.len(), 1000);
    guest.expect(CREDIT_REQUEST);
    assert!(guest.hears_nothing(), "it is asked once");
    other.write_all(b"other").unwrap();
    assert_eq!(guest.expect(DATA).bytes, b"other", "nobody else waits");
    guest.send(&Packet { buf_alloc: 1000, fwd_cnt: 700, ..Guest::packet(CREDIT_UPDATE, 5, port) });
    got.extend(guest.expect(DATA).bytes);
    assert_eq!(got.len(), 1700);
    guest.expect(CREDIT_REQUEST);
    // More taken than sent, and a room that shrinks: lies that give it nothing.
    guest.send(&Packet { buf_alloc: 1000, fwd_cnt: 5000, ..Guest::packet(CREDIT_UPDATE, 5, port) });
    guest.send(&Packet { buf_alloc: 10, fwd_cnt: 700, ..Guest::packet(CREDIT_UPDATE, 5, port) });
    assert!(guest.hears_nothing());
    guest.send(&Packet { buf_alloc: 9000, fwd_cnt: 1700, ..Guest::packet(CREDIT_UPDATE, 5, port) });
    got.extend(guest.expect(DATA).bytes);
    assert_eq!(got, pattern(2500));
}

#[test]
fn more_than_was_promised_resets_the_connection() {
    let mut guest = Guest::new();
    let (stream, port) = guest.called_on(5);
    let piece = pattern(64 << 10);
    let mut sent = 0;
    while guest.is_quiet() && sent < 64 {
        guest.say_bytes(5, port, &piece);
        sent += 1;
    }
    let mut packet = guest.receive();
    while packet.op == CREDIT_UPDATE {
        guest.say_bytes(5, port, &piece);
        sent += 1;
        if !guest.is_quiet() || sent > 64 {
            packet = guest.receive();
        }
    }
    assert_eq!((packet.op, packet.src_port), (RESET, port));
    assert!((4..16).contains(&sent), "{sent} times 64 KiB were kept for a host that reads nothing");
    drop(stream);
}

#[test]
fn credit_is_told_when_asked_for() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    guest.say_bytes(5, port, b"12345");
    exactly(&mut stream, 5);
    guest.say(CREDIT_REQUEST, 5, port);
    let packet = guest.expect(CREDIT_UPDATE);
    assert_eq!((packet.buf_alloc, packet.fwd_cnt), (256 << 10, 5));
}

#[test]
fn nonsense_hurts_only_who_says_it() {
    let mut guest = Guest::new();
    let (mut good, good_port) = guest.called_on(5);
    let unknown = |op| Guest::packet(op, 77, 88);
    for op in [RESPONSE, SHUTDOWN, DATA, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8, 0xffff] {
        guest.send(&unknown(op));
        let answer = guest.expect(RESET);
        assert_eq!((answer.src_port, answer.dst_port), (88, 77), "operation {op}");
    }
    guest.send(&unknown(RESET));
    for header in [vec![], vec![0; 43], Packet { src_cid: 4, ..unknown(REQUEST) }.header()] {
        guest.send_raw(&[&header[..], &[0; 1][..header.is_empty().into()]].concat(), b"");
    }
    assert!(guest.hears_nothing());
    assert_eq!(guest.rig.meter("dropped"), 3);
    guest.send(&Packet { kind: 2, ..unknown(REQUEST) });
    assert_eq!(guest.expect(RESET).kind, 2, "no such kind of socket");
    for (op, len) in [(DATA, 10_000), (DATA, u32::MAX), (99, 0), (REQUEST, 0), (RESPONSE, 0)] {
        let (mut stream, port) = guest.called_on(6);
        guest.send(&Packet { len, bytes: vec![0; 100], ..Guest::packet(op, 6, port) });
        assert_eq!(guest.expect(RESET).src_port, port, "operation {op}, length {len}");
        assert_eq!(rest(&mut stream), b"");
    }
    // To a host that is not this one.
    let mut stranger = Guest::packet(REQUEST, 1, 2);
    stranger.dst_cid = 9;
    guest.send_raw(&stranger.header(), b"");
    let (head, _) = guest.rig.wait_used(&mut guest.rx);
    let at = guest.buffers.remove(&head).unwrap();
    guest.offer(at);
    guest.rig.notify(0);
    good.write_all(b"well").unwrap();
    assert_eq!(guest.expect(DATA).bytes, b"well");
    guest.say_bytes(5, good_port, b"fine");
    assert_eq!(exactly(&mut good, 4), b"fine");
    assert_eq!(guest.rig.get(reg::STATUS) & NEEDS_RESET, 0);
}

#[test]
fn a_storm_without_buffers_waits_and_then_goes_on() {
    let mut guest = Guest::new();
    // No buffer is left.
    for number in 0..BUFFERS {
        guest.say(DATA, 1, u32::try_from(number).unwrap());
    }
    let taken: Vec<_> = (0..BUFFERS).map(|_| guest.receive_for_good()).collect();
    let header = Guest::packet(DATA, 2, 3).header();
    guest.rig.ram().write_slice(&header, GuestAddress(OUT)).unwrap();
    let mut pushed = 0;
    let mut back = 0;
    for _ in 0..40 {
        for _ in 0..20 {
            guest.tx.push(guest.rig.ram(), &[(OUT, 44, false)]);
            pushed += 1;
        }
        guest.rig.notify(1);
        guest.rig.settle();
        while guest.tx.pop(guest.rig.ram()).is_some() {
            back += 1;
        }
        if back < pushed {
            break;
        }
    }
    assert!((256..300).contains(&back), "{back} of {pushed} packets were answered in vain");
    for (packet, at) in taken {
        assert_eq!(packet.op, RESET);
        guest.offer(at);
    }
    guest.rig.notify(0);
    for _ in 0..pushed {
        assert_eq!(guest.expect(RESET).src_port, 3);
    }
    guest.rig.settle();
    while guest.tx.pop(guest.rig.ram()).is_some() {
        back += 1;
    }
    assert_eq!(back, pushed);
}

#[test]
fn buffers_that_hold_nothing_come_back() {
    let mut guest = Guest::new();
    let (mut stream, _) = guest.called_on(5);
    for _ in 0..BUFFERS {
        stream.write_all(b"x").unwrap();
        guest.receive_for_good();
    }
    stream.write_all(b"y").unwrap();
    guest.rx.push(guest.rig.ram(), &[(0x1000, 44, true)]);
    guest.rx.push(guest.rig.ram(), &[(0x1000, 4096, false)]);
    guest.rig.notify(0);
    for _ in 0..2 {
        assert_eq!(guest.rig.wait_used(&mut guest.rx).1, 0);
    }
    guest.offer(0x8000);
    guest.rig.notify(0);
    assert_eq!(guest.expect(DATA).bytes, b"y");
}

#[test]
fn hundreds_of_connections_go_on_side_by_side() {
    let mut guest = Guest::new();
    let mut streams: Vec<_> = (0..300u32).map(|_| guest.called_on(5)).collect();
    for (number, (stream, _)) in (0u32..).zip(&mut streams) {
        stream.write_all(&number.to_le_bytes()).unwrap();
    }
    let mut got = HashMap::new();
    while got.len() < streams.len() {
        let packet = guest.expect(DATA);
        got.insert(packet.src_port, packet.bytes);
    }
    for (number, (stream, port)) in (0u32..).zip(&mut streams) {
        assert_eq!(got[port], number.to_le_bytes());
        guest.say_bytes(5, *port, &number.to_be_bytes());
        assert_eq!(exactly(stream, 4), number.to_be_bytes());
    }
    let ports: Vec<_> = streams.iter().map(|(_, port)| *port).collect();
    drop(streams);
    let mut ended: Vec<_> = ports.iter().map(|_| guest.expect(SHUTDOWN).src_port).collect();
    ended.sort_unstable();
    assert_eq!(ended, ports);
}

#[test]
fn a_reset_ends_all_streams_and_the_next_driver_starts_anew() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    guest.say_bytes(5, port, b"before");
    let Guest { host, mut rig, .. } = guest;
    rig.set(reg::STATUS, 0);
    assert_eq!(rest(&mut stream), b"before");
    // It waits until there is a driver again.
    let early = UnixStream::from(host.dial(Path::new("guest.sock")).unwrap());
    (&early).write_all(b"CONNECT 8\n").unwrap();
    let mut guest = Guest::start(host, rig);
    let request = guest.expect(REQUEST);
    assert_eq!((request.dst_port, request.src_port), (8, port + 1), "ports go on where they were");
}
