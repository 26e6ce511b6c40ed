//! A guest that uses a console as it likes, at each kind of end it may have: pieces of any size both ways, control messages
//! with any content, and a host that reads slowly, comes and goes.
//!
//! The first byte chooses the end, the rest is a list of moves. Bytes count up, so that one that is lost or repeated shows;
//! once the host has read all, the guest has all its buffers of output back.
#![no_main]

mod driver;
mod world;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::OnceLock;

use base::host::fake::FakeHost;
use devices::catalog;
use driver::{CHAINS, Driver};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{OFlags, fcntl_setfl};
use vm_memory::{Bytes, GuestAddress};
use world::World;

/// A terminal stands at the third: what is typed there may be an escape.
const ENDS: [&str; 8] =
    ["stdio", "file=a", "stdio", "pty", "none", "socket=c", "to=stdio,name=port", "socket=c,name=port"];
const TERMINAL: usize = 2;

const RX: usize = 0;
const TX: usize = 1;
const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;
/// Where the buffers of each queue lie, 8 KiB for each chain.
const BUFFERS: u64 = 0x1_0000;
const ROUND: u8 = 251;

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| World::new(&[(0, 2 << 20)]))
}

/// Bytes that count up.
struct Count(u8);

impl Count {
    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let next = || {
            let byte = self.0;
            self.0 = (byte + 1) % ROUND;
            byte
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    fn check(&mut self, bytes: &[u8], what: &str) {
        for byte in bytes {
            assert_eq!(*byte, self.0, "{what} goes on");
            self.0 = (self.0 + 1) % ROUND;
        }
    }
}

struct Play<'a> {
    world: &'a World,
    driver: Driver<'a>,
    host: FakeHost,
    end: usize,
    /// The other ends of a stream: its input, and its output.
    far: Option<(Option<File>, File)>,
    caller: Option<UnixStream>,
    written: Count,
    seen: Count,
    typed: Count,
    read: Count,
    /// Bytes in chains that came back.
    taken: usize,
    /// Of the chains: the bytes of output, and of the first piece of input.
    lens: [usize; CHAINS as usize],
    splits: [usize; CHAINS as usize],
}

impl Play<'_> {
    fn place(queue: usize, chain: u16) -> u64 {
        BUFFERS + (queue as u64 * u64::from(CHAINS) + u64::from(chain)) * 0x2000
    }

    /// Whether nothing of what goes this way is ever forgotten or made up.
    fn counts_output(&self) -> bool {
        matches!(ENDS[self.end], "stdio" | "file=a" | "to=stdio,name=port") && self.end != TERMINAL
    }

    fn counts_input(&self) -> bool {
        matches!(ENDS[self.end], "stdio" | "pty" | "to=stdio,name=port") && self.end != TERMINAL
    }

    /// The guest writes.
    fn write(&mut self, a: u8, b: u8) {
        let Some(chain) = self.driver.spare(TX) else { return };
        let len = usize::from(a) << (b & 7) & 0x1fff;
        let at = Self::place(TX, chain);
        let bytes = self.written.bytes(len);
        self.world.memory.ram().write_slice(&bytes, GuestAddress(at)).expect("a buffer is in memory");
        self.lens[usize::from(chain)] = len;
        // In two pieces, with room for an answer behind them that nobody gives.
        let (all, cut) = (u32::try_from(len).expect("a length fits"), u32::from(b));
        let cut = cut.min(all);
        let parts = [
            (at, cut, false),
            (at + u64::from(cut), all - cut, false),
            (at + 0x1fff, u32::from(b >> 7), true),
        ];
        self.driver.offer(TX, chain, &parts);
    }

    /// The guest makes room.
    fn make_room(&mut self, queue: usize, a: u8, b: u8) {
        let Some(chain) = self.driver.spare(queue) else { return };
        let (at, len) = (Self::place(queue, chain), u32::from(a) << (b & 3));
        if queue == RX {
            self.splits[usize::from(chain)] = usize::from(b >> 4);
        }
        self.driver.offer(queue, chain, &[(at, u32::from(b >> 4), true), (at + 0x100, len, true)]);
    }

    /// The guest says something about a port.
    fn control(&mut self, message: [u8; 4], any: bool) {
        let Some(chain) = self.driver.spare(CONTROL_TX) else { return };
        let at = Self::place(CONTROL_TX, chain);
        let [event, value, id, len] = message;
        let bytes = if any {
            [id, event, value, len, event, id, value, len]
        } else {
            [0, 0, 0, 0, [0, 3, 6][usize::from(event % 3)], 0, value & 1, 0]
        };
        self.world.memory.ram().write_slice(&bytes, GuestAddress(at)).expect("a buffer is in memory");
        self.driver.offer(CONTROL_TX, chain, &[(at, if any { u32::from(len & 15) } else { 8 }, false)]);
    }

    /// Somebody types.
    fn type_in(&mut self, a: u8, b: u8) {
        let len = usize::from(a) << (b & 3);
        if let Some(caller) = &mut self.caller {
            let _ = caller.write(&vec![a; len]);
        } else if let Some((Some(input), _)) = &mut self.far {
            let bytes = Count(self.typed.0).bytes(len);
            let done = input.write(&bytes).unwrap_or(0);
            self.typed.bytes(done);
        }
    }

    /// The host reads what there is.
    fn look(&mut self) {
        let (mut bytes, counts) = ([0; 4096], self.counts_output());
        if let Some(caller) = &mut self.caller {
            while caller.read(&mut bytes).is_ok_and(|len| len > 0) {}
        } else if let Some((_, output)) = &mut self.far {
            while let Ok(len @ 1..) = output.read(&mut bytes) {
                if counts {
                    self.seen.check(&bytes[..len], "output");
                }
            }
        }
    }

    /// Somebody comes, goes, or ends a half.
    fn come_or_go(&mut self, a: u8) {
        match (a & 3, &self.caller) {
            (0, _) => self.caller = None,
            (1, Some(caller)) => drop(caller.shutdown(std::net::Shutdown::Write)),
            (2, Some(caller)) => drop(caller.shutdown(std::net::Shutdown::Read)),
            (_, None) => {
                self.caller = self.host.dial(Path::new("c")).ok().map(UnixStream::from);
                if let Some(caller) = &self.caller {
                    let _ = caller.set_nonblocking(true);
                }
            }
            _ => {}
        }
        if a & 0xfc == 0xfc
            && let Some((input, _)) = &mut self.far
        {
            *input = None;
        }
    }

    /// Looks at all that came back.
    fn collect(&mut self) {
        self.driver.settle();
        while let Some((chain, len)) = self.driver.take(TX) {
            assert_eq!(len, 0, "nothing is written to output");
            self.taken += self.lens[usize::from(chain)];
        }
        while let Some((chain, len)) = self.driver.take(RX) {
            let len = usize::try_from(len).expect("a length fits");
            let mut bytes = vec![0; 0x2000];
            let at = GuestAddress(Self::place(RX, chain));
            self.world.memory.ram().read_slice(&mut bytes, at).expect("a buffer is in memory");
            let split = self.splits[usize::from(chain)].min(len);
            let typed = [&bytes[..split], &bytes[0x100..0x100 + len - split]].concat();
            if self.counts_input() {
                self.read.check(&typed, "input");
            }
        }
        while self.driver.take(CONTROL_TX).is_some() {}
        while let Some((_, len)) = self.driver.take(CONTROL_RX) {
            assert!(len <= 8 + 64, "a control message has {len} bytes");
        }
        assert!(!self.driver.is_broken(), "rings that are in order break nothing");
    }
}

/// Our end of a pipe: no read or write of it waits.
fn prompt(end: File) -> File {
    fcntl_setfl(&end, OFlags::NONBLOCK).expect("a pipe can be told not to block");
    end
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, mut moves)) = data.split_first() else { return };
    let end = usize::from(choice) % ENDS.len();
    let host = if end == TERMINAL { FakeHost::with_terminal(80, 25) } else { FakeHost::default() };
    let (world, entry) = (world(), catalog::find("console").expect("there are consoles"));
    let device = world.build(entry, ENDS[end], &host).expect("make a console");
    let far = host.far_ends().ok().map(|(input, output)| (Some(prompt(input)), prompt(output)));
    let driver = Driver::start(world, device, u32::MAX);
    let [written, seen, typed, read] = [const { Count(0) }; 4];
    let (lens, splits) = ([0; CHAINS as usize], [0; CHAINS as usize]);
    let caller = None;
    let mut play =
        Play { world, driver, host, end, far, caller, written, seen, typed, read, taken: 0, lens, splits };
    for _ in 0..200 {
        let Some((&[kind, a, b, c, d], rest)) = moves.split_first_chunk::<5>() else { break };
        moves = rest;
        match kind % 8 {
            0 | 1 => play.write(a, b),
            2 => play.make_room(RX, a, b),
            3 => play.type_in(a, b),
            4 => play.look(),
            5 => play.control([a, b, c, d], kind & 0x40 != 0),
            6 => play.make_room(CONTROL_RX, a, b),
            _ => play.come_or_go(a),
        }
        if kind & 0x80 == 0 {
            play.collect();
        }
    }
    // The host reads on, and the guest has all its buffers back.
    let mut turns = 0;
    play.collect();
    while play.counts_output() && play.driver.is_waiting(TX) {
        turns += 1;
        assert!(turns < 10_000, "{}: output is not taken although the host reads", ENDS[end]);
        play.look();
        play.collect();
    }
    let Play { host, mut written, driver, taken, .. } = play;
    driver.stop();
    if ENDS[end] == "file=a" {
        let file = host.file(Path::new("a")).expect("there is the file");
        let mut bytes = vec![0; taken];
        file.read_exact_at(&mut bytes, 0).expect("the file has all that was taken");
        written.0 = 0;
        written.check(&bytes, "output in a file");
    }
});
