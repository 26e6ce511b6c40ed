//! A guest that sends any packets to the socket device, with programs of the host that come, talk and go at the other end.
//!
//! The input is a list of moves. Bytes of a stream count up, so that one that is lost, repeated or of another stream
//! shows; packets to the guest have a sound header.
#![no_main]

mod driver;
mod world;

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::OnceLock;

use base::host::Host;
use base::host::fake::FakeHost;
use devices::catalog;
use driver::{CHAINS, Driver};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use world::World;

const RX: usize = 0;
const TX: usize = 1;
const HEADER: usize = 44;
/// Where buffers of the two queues lie, 8 KiB for each chain.
const IN: u64 = 0x4_0000;
const OUT: u64 = 0x8_0000;
/// Bytes count up to here, and begin again.
const ROUND: u8 = 251;
/// Programs of the host at the most.
const PROGRAMS: usize = 8;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RESET: u16 = 3;
const DATA: u16 = 5;

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| World::new(&[(0, 2 << 20)]))
}

/// A program of the host.
struct Program {
    stream: UnixStream,
    /// It has sent its `CONNECT`, or was called.
    talks: bool,
    said: u8,
    /// The byte that has to come next; the first may be any.
    due: Option<u8>,
    /// A line that is no byte of the stream comes first.
    answered: bool,
}

impl Program {
    fn new(stream: UnixStream, called: bool) -> Program {
        let _ = stream.set_nonblocking(true);
        Program { stream, talks: called, said: 0, due: None, answered: called }
    }

    /// Reads what there is; whether the stream has ended.
    fn read(&mut self, honest: bool) -> bool {
        let mut bytes = [0; 4096];
        loop {
            let len = match self.stream.read(&mut bytes) {
                Ok(0) => return true,
                Ok(len) => len,
                Err(cause) => return cause.kind() != ErrorKind::WouldBlock,
            };
            for byte in &bytes[..len] {
                if !self.answered {
                    self.answered = *byte == b'\n';
                } else if honest {
                    assert_eq!(*byte, self.due.unwrap_or(*byte), "a stream to the host goes on");
                    self.due = Some((*byte + 1) % ROUND);
                }
            }
        }
    }
}

/// What the guest knows of a connection, by its own and the host's port.
#[derive(Default)]
struct Known {
    said: u8,
    due: u8,
}

struct Play<'a> {
    world: &'a World,
    driver: Driver<'a>,
    host: FakeHost,
    listeners: Vec<UnixListener>,
    programs: Vec<Program>,
    known: HashMap<(u32, u32), Known>,
    /// The last connection that the host has asked for.
    asked: (u32, u32),
    /// Bytes of the guest's buffers, by their chains.
    rooms: [u32; CHAINS as usize],
    /// Headers say how much follows them. After a lie nothing is known of the content of streams.
    honest: bool,
}

impl Play<'_> {
    /// A packet of the guest, with as many bytes behind the header.
    fn send(&mut self, header: &[u8; HEADER], pair: (u32, u32), len: u32) {
        let Some(chain) = self.driver.spare(TX) else { return };
        let at = OUT + 0x2000 * u64::from(chain);
        let known = self.known.entry(pair).or_default();
        let bytes: Vec<u8> = (0..len)
            .map(|_| {
                let byte = known.said;
                known.said = (byte + 1) % ROUND;
                byte
            })
            .collect();
        let ram = self.world.memory.ram();
        ram.write_slice(header, GuestAddress(at)).expect("a buffer is in memory");
        ram.write_slice(&bytes, GuestAddress(at + 64)).expect("a buffer is in memory");
        let parts = [(at, 44, false), (at + 64, len, false)];
        self.driver.offer(TX, chain, if len > 0 { &parts } else { &parts[..1] });
    }

    fn packet(&mut self, [op, ports, flags, credit, size]: [u8; 5]) {
        let op = u16::from(op % 8);
        // To a listener, to nobody, or on the connection that the host has asked for.
        let pair = match ports & 7 {
            0..4 => (u32::from(ports >> 6), u32::from(ports & 3)),
            _ => self.asked,
        };
        let len = if op == DATA { u32::from(size) << (flags >> 5) } else { 0 }.min(0x1f00);
        let room = u32::from(credit & 15) << 10;
        let mut header = Vec::with_capacity(HEADER);
        header.extend(3u64.to_le_bytes());
        header.extend(2u64.to_le_bytes());
        for word in [pair.0, pair.1, len] {
            header.extend(word.to_le_bytes());
        }
        header.extend([1, 0]);
        header.extend(op.to_le_bytes());
        let read = u32::from(credit >> 4) << 8;
        for word in [u32::from(flags & 7), room, read] {
            header.extend(word.to_le_bytes());
        }
        let header = header.first_chunk().expect("a header has its size");
        self.send(header, pair, len);
    }

    /// The guest makes room for a packet.
    fn make_room(&mut self, size: u8) {
        let Some(chain) = self.driver.spare(RX) else { return };
        let at = IN + 0x2000 * u64::from(chain);
        let len = u32::from(size) * 32;
        self.rooms[usize::from(chain)] = if size & 1 == 0 { len + 44 } else { len };
        if size & 1 == 0 {
            self.driver.offer(RX, chain, &[(at, 44, true), (at + 44, len, true)]);
        } else {
            self.driver.offer(RX, chain, &[(at, len, true)]);
        }
    }

    /// Looks at all that came for the guest.
    fn receive(&mut self) {
        self.driver.settle();
        while self.driver.take(TX).is_some() {}
        while let Some((chain, len)) = self.driver.take(RX) {
            if self.rooms[usize::from(chain)] <= 44 {
                assert_eq!(len, 0, "what has no room for a packet goes back as it came");
                continue;
            }
            let mut bytes = vec![0; usize::try_from(len).expect("a length fits")];
            let at = GuestAddress(IN + 0x2000 * u64::from(chain));
            self.world.memory.ram().read_slice(&mut bytes, at).expect("a buffer is in memory");
            self.hear(&bytes);
        }
    }

    fn hear(&mut self, bytes: &[u8]) {
        let (header, body) = bytes.split_first_chunk::<HEADER>().expect("a packet has a header");
        let word = |at: usize| u32::from_le_bytes(*header[at..].first_chunk().expect("a word"));
        let half = |at: usize| u16::from_le_bytes(*header[at..].first_chunk().expect("a half"));
        let (pair, op) = ((word(20), word(16)), half(30));
        // Who sent to somebody who is not there gets a reset in that one's name.
        assert!((word(0), word(4)) == (2, 0) || op == RESET, "from the host");
        assert_eq!((word(8), word(12)), (3, 0), "to the guest");
        assert_eq!(usize::try_from(word(24)), Ok(body.len()), "as long as it says");
        match op {
            REQUEST => {
                self.asked = pair;
                self.known.entry(pair).or_default().due = 0;
            }
            RESPONSE => self.known.entry(pair).or_default().due = 0,
            RESET => assert!(body.is_empty(), "a reset carries nothing"),
            DATA => {
                let known = self.known.entry(pair).or_default();
                for byte in body {
                    assert_eq!(*byte, known.due, "a stream to the guest goes on");
                    known.due = (byte + 1) % ROUND;
                }
            }
            4 | 6 | 7 => {}
            _ => panic!("operation {op} is none"),
        }
    }

    /// A program of the host comes, and asks for a port of the guest.
    fn come(&mut self, port: u8) {
        if self.programs.len() == PROGRAMS {
            return;
        }
        let Ok(socket) = self.host.dial(Path::new("guest.sock")) else { return };
        let mut program = Program::new(socket.into(), false);
        if port & 1 == 0 {
            program.talks = writeln!(program.stream, "CONNECT {}", port >> 1).is_ok();
        }
        self.programs.push(program);
    }

    /// A program that was called takes the call.
    fn accept(&mut self, which: u8) {
        let listener = &self.listeners[usize::from(which) % self.listeners.len()];
        if self.programs.len() < PROGRAMS
            && let Ok((stream, _)) = listener.accept()
        {
            self.programs.push(Program::new(stream, true));
        }
    }

    /// A program says something, or a part of its greeting.
    fn talk(&mut self, which: u8, size: u8) {
        let count = self.programs.len().max(1);
        let Some(program) = self.programs.get_mut(usize::from(which) % count) else { return };
        if !program.talks {
            let bytes = [b'C', b'\n', b' ', size];
            let _ = program.stream.write(&bytes[usize::from(size & 3)..]);
            return;
        }
        let bytes: Vec<u8> = (0..u16::from(size) << (which >> 5))
            .map(|n| u8::try_from((u16::from(program.said) + n) % u16::from(ROUND)).unwrap_or(0))
            .collect();
        if let Ok(len) = program.stream.write(&bytes) {
            let said = (usize::from(program.said) + len) % usize::from(ROUND);
            program.said = u8::try_from(said).unwrap_or(0);
        }
    }

    /// A program reads, and goes when its stream has ended or it likes to.
    fn listen(&mut self, which: u8, how: u8) {
        let count = self.programs.len().max(1);
        let at = usize::from(which) % count;
        let Some(program) = self.programs.get_mut(at) else { return };
        match how & 7 {
            0 => drop(program.stream.shutdown(Shutdown::Write)),
            1 => drop(program.stream.shutdown(Shutdown::Read)),
            2 => drop(self.programs.remove(at)),
            _ => {
                if program.read(self.honest) {
                    self.programs.remove(at);
                }
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let (world, host) = (world(), FakeHost::default());
    let entry = catalog::find("vsock").expect("there are sockets");
    let device = world.build(entry, "path=guest.sock", &host).expect("make a socket device");
    let listeners = (1..3).map(|port| {
        let path = format!("guest.sock_{port}");
        let listener = UnixListener::from(host.listen("test", Path::new(&path)).expect("listen").socket);
        let _ = listener.set_nonblocking(true);
        listener
    });
    let listeners = listeners.collect();
    let driver = Driver::start(world, device, u32::MAX);
    let (programs, known) = (Vec::new(), HashMap::new());
    let mut play = Play {
        world,
        driver,
        host,
        listeners,
        programs,
        known,
        asked: (0, 0),
        rooms: [0; CHAINS as usize],
        honest: true,
    };
    for _ in 0..CHAINS / 2 {
        play.make_room(128);
    }
    let mut moves = data;
    for _ in 0..200 {
        let Some((&[kind, a, b, c, d, e], rest)) = moves.split_first_chunk::<6>() else { break };
        moves = rest;
        match kind % 8 {
            0 | 1 => play.packet([a, b, c, d, e]),
            2 => play.make_room(a),
            3 => play.come(a),
            4 => play.accept(a),
            5 => play.talk(a, b),
            6 => play.listen(a, b),
            _ => {
                // Any header at all.
                if let Some((header, rest)) = moves.split_first_chunk::<HEADER>().filter(|_| a < 64) {
                    moves = rest;
                    play.honest = false;
                    play.send(header, (0, 0), u32::from(b));
                }
            }
        }
        if kind & 0x80 == 0 {
            play.receive();
        }
        if play.driver.is_broken() {
            assert!(!play.honest, "packets that follow the rules break nothing");
            break;
        }
    }
    play.receive();
    play.driver.stop();
});
