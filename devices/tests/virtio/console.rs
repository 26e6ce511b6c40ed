//! The console: a played driver at one end, pipes and sockets at the other.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use base::bus::Effect;
use base::host::fake::FakeHost;
use base::memory::Memory;
use devices::catalog::Body;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{EVENT_IDX, RAM, Rig, Virtq, build, reg};

const IN: u64 = 0x1_0000;
const OUT: u64 = 0x2_0000;
const CONTROL: u64 = 0x4_0000;
const MULTIPORT: u64 = 2;
const CHANGED: u32 = 2;

struct Console {
    // Gone before the host, whose pipes it writes to.
    rig: Rig,
    host: FakeHost,
    queues: Vec<Virtq>,
}

impl Console {
    fn new(text: &str) -> Console {
        Console::on(FakeHost::default(), text)
    }

    fn on(host: FakeHost, text: &str) -> Console {
        let rig = Rig::of("console", text, &host);
        let mut console = Console { host, rig, queues: Vec::new() };
        console.start();
        console
    }

    fn start(&mut self) {
        let features = self.rig.offered() & !EVENT_IDX;
        assert!(self.rig.negotiate(features));
        let count = if features & MULTIPORT != 0 { 4 } else { 2 };
        self.queues = (0..count).map(|index| self.rig.queue(index, 16, features)).collect();
        self.rig.go();
    }

    /// The far ends of the stream: where to type, and where to read.
    fn far_ends(&self) -> (File, File) {
        self.host.far_ends().unwrap()
    }

    fn call(&self) -> UnixStream {
        let stream = UnixStream::from(self.host.dial(Path::new("c.sock")).unwrap());
        stream.set_nonblocking(false).unwrap();
        stream
    }

    /// Offers output without waiting for it to be taken.
    fn offer(&mut self, text: &[u8]) {
        self.rig.ram().write_slice(text, GuestAddress(OUT)).unwrap();
        self.queues[1].push(self.rig.memory.ram(), &[(OUT, u32::try_from(text.len()).unwrap(), false)]);
        self.rig.notify(1);
    }

    fn print(&mut self, text: &[u8]) {
        self.offer(text);
        self.rig.wait_used(&mut self.queues[1]);
    }

    /// Offers room for so many bytes of input.
    fn make_room(&mut self, len: u32) {
        self.queues[0].push(self.rig.memory.ram(), &[(IN, len, true)]);
        self.rig.notify(0);
    }

    /// Waits for input in the room that was made.
    fn input(&mut self) -> Vec<u8> {
        let (_, len) = self.rig.wait_used(&mut self.queues[0]);
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.rig.ram().read_slice(&mut bytes, GuestAddress(IN)).unwrap();
        bytes
    }

    fn has_no_input(&mut self) -> bool {
        self.rig.settle();
        self.queues[0].is_empty(self.rig.memory.ram())
    }

    /// Sends a control message.
    fn tell(&mut self, id: u32, event: u16, value: u16) {
        let message = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        self.rig.ram().write_slice(&message, GuestAddress(CONTROL)).unwrap();
        self.queues[3].push(self.rig.memory.ram(), &[(CONTROL, 8, false)]);
        self.rig.notify(3);
        self.rig.wait_used(&mut self.queues[3]);
    }

    /// Waits for a control message: its event, value, and what follows.
    fn told(&mut self) -> (u16, u16, Vec<u8>) {
        self.queues[2].push(self.rig.memory.ram(), &[(CONTROL + 0x100, 64, true)]);
        self.rig.notify(2);
        let (_, len) = self.rig.wait_used(&mut self.queues[2]);
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.rig.ram().read_slice(&mut bytes, GuestAddress(CONTROL + 0x100)).unwrap();
        assert_eq!(bytes[..4], [0; 4], "there is one port");
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        (half(4), half(6), bytes[8..].to_vec())
    }
}

fn exactly(from: &mut impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn what_is_printed_comes_out_and_what_is_typed_goes_in() {
    let mut console = Console::new("stdio");
    let (mut keys, mut paper) = console.far_ends();
    console.print(b"login: ");
    assert_eq!(exactly(&mut paper, 7), b"login: ");
    keys.write_all(b"root\r").unwrap();
    console.make_room(100);
    assert_eq!(console.input(), b"root\r");
    console.make_room(2);
    keys.write_all(b"abc").unwrap();
    assert_eq!(console.input(), b"ab", "no more than there is room for");
    console.make_room(2);
    assert_eq!(console.input(), b"c");
    assert_eq!((console.rig.meter("rx_bytes"), console.rig.meter("tx_bytes")), (8, 7));
}

#[test]
fn a_slow_reader_stops_the_guest_and_nothing_is_lost() {
    let mut console = Console::new("stdio");
    let (_keys, mut paper) = console.far_ends();
    let text: Vec<u8> = (0..60_000u32).map(|at| u8::try_from(at % 251).unwrap()).collect();
    let mut printed: Vec<u8> = Vec::new();
    let mut held = 0;
    for _ in 0..8 {
        console.offer(&text);
        printed.extend(&text);
        console.rig.settle();
        held += 1;
        while console.queues[1].pop(console.rig.memory.ram()).is_some() {
            held -= 1;
        }
        // The bytes of one that is held are read later.
        if held > 0 {
            break;
        }
    }
    assert_eq!(held, 1, "a reader that reads nothing was given {} bytes", printed.len());
    assert_eq!(exactly(&mut paper, printed.len()), printed);
    console.rig.wait_used(&mut console.queues[1]);
    console.print(b"end");
    assert_eq!(exactly(&mut paper, 3), b"end");
}

#[test]
fn a_chain_of_megabytes_goes_out_piece_by_piece() {
    let mut console = Console::new("stdio");
    let (_keys, mut paper) = console.far_ends();
    // All of RAM, again and again: a chain may name a page more than once.
    let parts: Vec<_> = (0..8).map(|_| (0, 1 << 20, false)).collect();
    console.queues[1].push(console.rig.memory.ram(), &parts);
    console.rig.notify(1);
    let reader = std::thread::spawn(move || exactly(&mut paper, 8 << 20).len());
    console.rig.wait_used(&mut console.queues[1]);
    assert_eq!(reader.join().unwrap(), 8 << 20);
}

#[test]
fn a_terminal_nobody_reads_holds_nobody_up() {
    let mut console = Console::new("pty");
    for _ in 0..8 {
        console.print(&[b'.'; 50_000]);
    }
}

#[test]
fn the_escape_key_ends_the_run_even_if_the_guest_does_not_listen() {
    let console = Console::on(FakeHost::with_terminal(80, 25), "stdio");
    let (mut keys, mut paper) = console.far_ends();
    keys.write_all(b"\x01?").unwrap();
    let help = devices::escape::HELP;
    assert_eq!(exactly(&mut paper, help.len()), help.as_bytes());
    keys.write_all(b"lost\x01x").unwrap();
    assert_eq!(console.rig.effect(), Effect::Quit);
}

#[test]
fn keys_of_a_terminal_are_kept_and_a_break_is_what_linux_takes_for_one() {
    let mut console = Console::on(FakeHost::with_terminal(80, 25), "stdio");
    let (mut keys, _paper) = console.far_ends();
    keys.write_all(b"a\x01a\x01bh").unwrap();
    console.make_room(100);
    let mut typed = console.input();
    while typed.len() < 4 {
        console.make_room(100);
        typed.extend(console.input());
    }
    assert_eq!(typed, b"a\x01\x0fh");
}

#[test]
fn the_guest_hears_of_the_size_of_the_terminal_and_of_its_changes() {
    let mut console = Console::on(FakeHost::with_terminal(80, 25), "stdio");
    let size = |rig: &mut Rig| {
        let mut bytes = [0; 8];
        rig.config(0, &mut bytes);
        bytes
    };
    assert_eq!(size(&mut console.rig), [80, 0, 25, 0, 1, 0, 0, 0]);
    let seen = console.rig.bell.edges();
    console.host.resize(300, 2).unwrap();
    console.rig.bell.wait(seen);
    assert_eq!(console.rig.get(reg::CAUSES) & CHANGED, CHANGED);
    assert_eq!(size(&mut console.rig), [44, 1, 2, 0, 1, 0, 0, 0]);
    assert_eq!(Console::new("stdio").rig.offered() & 1, 0, "a pipe has no size");
}

#[test]
fn a_reader_that_goes_away_ends_the_run() {
    let host = FakeHost::default();
    let rig = Rig::of("console", "stdio", &host);
    drop(host);
    let mut console = Console { host: FakeHost::default(), rig, queues: Vec::new() };
    console.start();
    console.print(b"anyone?\n");
    assert_eq!(console.rig.effect(), Effect::Quit);
    console.print(b"no\n");
}

#[test]
fn output_that_waits_is_handed_over_at_the_end() {
    let host = FakeHost::default();
    let memory = Memory::new(&RAM).unwrap();
    let Ok(Body::Virtio(mut device)) = build("console", "stdio", &host, &memory) else { panic!("no device") };
    let last_duty = device.last_duty().unwrap();
    let mut console = Console { host, rig: Rig::new(device, memory), queues: Vec::new() };
    console.start();
    let (_keys, mut paper) = console.far_ends();
    for _ in 0..2 {
        console.print(&[b'.'; 60_000]);
    }
    drop(console.rig);
    let reader = std::thread::spawn(move || exactly(&mut paper, 120_000).len());
    assert_eq!(last_duty(Duration::from_secs(20)).unwrap(), Effect::None);
    assert_eq!(reader.join().unwrap(), 120_000);
}

#[test]
fn callers_come_and_go_and_find_the_last_output() {
    let mut console = Console::new("socket=c.sock");
    console.print(b"before anyone came\n");
    let mut first = console.call();
    assert_eq!(exactly(&mut first, 19), b"before anyone came\n");
    let mut second = console.call();
    first.write_all(b"first\r").unwrap();
    console.make_room(64);
    assert_eq!(console.input(), b"first\r");
    // Its input has ended, but it still reads.
    first.shutdown(Shutdown::Write).unwrap();
    console.rig.settle();
    console.print(b"for the first\n");
    assert_eq!(exactly(&mut first, 14), b"for the first\n");
    drop(first);
    second.write_all(b"second\r").unwrap();
    console.make_room(64);
    assert_eq!(console.input(), b"second\r");
    console.print(b"for the second\n");
    assert_eq!(exactly(&mut second, 15), b"for the second\n");
    drop(second);
    // What nobody reads holds nobody up.
    for _ in 0..8 {
        console.print(&[b'.'; 50_000]);
    }
}

#[test]
fn a_named_port_introduces_itself_and_says_who_is_there() {
    let mut console = Console::new("socket=c.sock,name=org.mayfly.0");
    console.tell(0, 0, 1);
    assert_eq!(console.told(), (1, 1, vec![]), "there is a port");
    console.tell(0, 3, 1);
    assert_eq!(console.told(), (7, 1, b"org.mayfly.0".to_vec()));
    assert_eq!(console.told(), (6, 0, vec![]), "nobody is there yet");
    let mut caller = console.call();
    assert_eq!(console.told(), (6, 1, vec![]));
    caller.write_all(b"request").unwrap();
    console.make_room(64);
    assert!(console.has_no_input(), "no program of the guest has opened the port");
    console.tell(0, 6, 1);
    assert_eq!(console.input(), b"request");
    console.print(b"answer");
    assert_eq!(exactly(&mut caller, 6), b"answer");
    drop(caller);
    console.make_room(64);
    assert_eq!(console.told(), (6, 0, vec![]));
}

#[test]
fn nonsense_on_the_control_queue_is_nothing() {
    let mut console = Console::new("to=none,name=n");
    for (id, event, value) in [(1, 3, 1), (u32::MAX, 6, 1), (0, 99, 1), (0, 1, 1), (0, 0, 0)] {
        console.tell(id, event, value);
    }
    console.queues[3].push(console.rig.memory.ram(), &[(CONTROL, 3, false)]);
    console.rig.notify(3);
    console.rig.wait_used(&mut console.queues[3]);
    // Many that ask for answers nobody takes.
    for _ in 0..200 {
        console.queues[3].push(console.rig.memory.ram(), &[(CONTROL + 0x200, 8, false)]);
        console.rig.ram().write_slice(&[0, 0, 0, 0, 0, 0, 1, 0], GuestAddress(CONTROL + 0x200)).unwrap();
        console.rig.notify(3);
        console.rig.settle();
        if console.queues[3].pop(console.rig.memory.ram()).is_none() {
            break;
        }
    }
    assert_eq!(console.told().0, 1);
    assert_eq!(console.rig.get(reg::STATUS), 15);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let refused = |text: &str| {
        let memory = Memory::new(&RAM).unwrap();
        match build("console", text, &FakeHost::default(), &memory) {
            Ok(_) => panic!("{text} is accepted"),
            Err(fail) => fail.to_string(),
        }
    };
    let both = refused("to=pty,socket=s");
    assert!(both.contains("socket and another one are given\n  hint: leave one of them out"), "{both}");
    let both = refused("to=pty,file=f");
    assert!(both.contains("both to and file are given"), "{both}");
    let none = refused("to=none,name=");
    assert!(none.contains("name=: it has no value"), "{none}");
    for name in ["a b", "x/y", &"n".repeat(65)] {
        let text = refused(&format!("to=none,name={name}"));
        assert!(text.contains("a name is 1 to 64 letters, digits, `.`, `-` and `_`"), "{text}");
    }
}
