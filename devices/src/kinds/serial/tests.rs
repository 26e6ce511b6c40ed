//! The serial port under test: a guest at its registers, pipes at its other end, a lane that turns when told.

use crate::catalog::Body;

use super::*;
use crate::kinds::tests::{Driven, Fixture, PipeHost};
use base::lane::{Lane, LaneHandle};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Duration;

const DATA: u64 = 0x3f8;
const IER: u64 = 0x3f9;
const FCR: u64 = 0x3fa;
const MCR: u64 = 0x3fc;
const LSR: u64 = 0x3fd;

const FULL: &[u8] = &[0];

fn open_port(chip: &mut Driven) {
    chip.write(FCR, &[1]);
    chip.write(MCR, &[0x0b]);
}

fn send(chip: &mut Driven, bytes: &[u8]) {
    bytes.iter().for_each(|byte| assert_eq!(chip.write(DATA, &[*byte]), Effect::None));
}

fn read_all(chip: &mut Driven) -> Vec<u8> {
    let mut seen = Vec::new();
    while chip.read(LSR, 1) != [0x60] {
        seen.extend(chip.read(DATA, 1));
    }
    seen
}

fn at_a_terminal() -> Fixture {
    Fixture::with(PipeHost { terminal: true, ..PipeHost::default() }, &[(0, 4096)])
}

#[test]
fn a_line_goes_out_at_its_end_without_the_lane() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("stdio");
    send(&mut chip, b"hello");
    assert_eq!(fixture.output(), b"");
    send(&mut chip, b"\n");
    assert_eq!(fixture.output(), b"hello\n");
}

#[test]
fn a_prompt_goes_out_when_the_guest_has_no_more() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("stdio");
    chip.write(IER, &[2]);
    send(&mut chip, b"# ");
    chip.write(IER, &[0]);
    assert_eq!(fixture.output(), b"# ");
}

#[test]
fn the_rest_goes_out_after_a_while_and_then_the_lane_sleeps() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("stdio");
    fixture.turn();
    send(&mut chip, b"half");
    let mut seen = Vec::new();
    while seen != b"half" {
        fixture.wait();
        seen.extend(fixture.output());
    }
    fixture.wait();
    // Quiet now: the next byte has to wake it again.
    send(&mut chip, b"way");
    while seen != b"halfway" {
        fixture.wait();
        seen.extend(fixture.output());
    }
}

#[test]
fn a_slow_reader_makes_the_guest_wait_and_loses_nothing() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("stdio");
    fixture.turn();
    let mut sent = Vec::new();
    while chip.read(LSR, 1) != FULL {
        let byte = [b'a' + u8::try_from(sent.len() % 26).unwrap(), b'\n'];
        send(&mut chip, &byte);
        sent.extend(byte);
        assert!(sent.len() < 1 << 20, "never told to wait");
    }
    chip.write(IER, &[2]);
    assert_eq!(fixture.line.edges.get(), 0, "no room, no interrupt");
    send(&mut chip, b"although told to wait\n");
    sent.extend(b"although told to wait\n");
    let mut seen = Vec::new();
    while seen.len() < sent.len() {
        fixture.turn();
        seen.extend(fixture.output());
    }
    assert!(seen == sent, "bytes lost or out of order");
    assert_eq!(chip.read(LSR, 1), [0x60]);
    assert_eq!(fixture.line.edges.get(), 1, "told once that there is room");
    send(&mut chip, b"direct\n");
    assert_eq!(fixture.output(), b"direct\n", "the lane has handed the output back");
}

#[test]
fn a_burst_interrupts_once_until_the_guest_looks() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("stdio");
    chip.write(IER, &[2]);
    assert_eq!(fixture.line.edges.get(), 1);
    chip.read(FCR, 1);
    send(&mut chip, &[b'x'; 16]);
    assert_eq!(fixture.line.edges.get(), 2);
}

/// Linux's driver asks for all interrupts to see which there are, and reads what it takes for noise. A script on standard
/// input is there before that, and lost its first letter.
#[test]
fn input_outlives_a_driver_that_probes() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("stdio");
    fixture.send(b"mount");
    fixture.turn();
    for enabled in [0, 0x0f, 0] {
        chip.write(IER, &[enabled]);
        fixture.turn();
        chip.read(IER, 1);
    }
    chip.read(DATA, 1);
    open_port(&mut chip);
    chip.write(IER, &[5]);
    fixture.turn();
    assert_eq!(read_all(&mut chip), b"mount");
    // All of them, by a driver that has turned interrupts on, is no question.
    chip.write(MCR, &[0x08]);
    chip.write(IER, &[0x0f]);
    fixture.send(b"x");
    fixture.turn();
    assert_eq!(read_all(&mut chip), b"x");
}

#[test]
fn input_waits_outside_until_the_guest_has_room() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("stdio");
    let text: Vec<u8> = (0..=255).chain(0..100).collect();
    fixture.send(&text);
    fixture.turn();
    assert_eq!(chip.read(LSR, 1), [0x60], "nothing before the guest listens");
    open_port(&mut chip);
    chip.write(IER, &[1]);
    fixture.turn();
    assert_eq!(fixture.line.edges.get(), 1);
    assert_eq!(rustix::io::ioctl_fionread(&fixture.host.input).unwrap(), 100, "only a gulp is taken");
    let mut seen = Vec::new();
    while seen.len() < text.len() {
        seen.extend(read_all(&mut chip));
        fixture.turn();
    }
    assert_eq!(seen, text);
}

#[test]
fn a_gulp_of_input_needs_the_lane_once() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("stdio");
    open_port(&mut chip);
    chip.write(IER, &[1]);
    fixture.send(&[b'x'; 256]);
    fixture.turn();
    assert_eq!(read_all(&mut chip), [b'x'; 256], "the lane sleeps, and the guest reads on");
    assert_eq!(fixture.line.edges.get(), 1, "the interrupt output stays high as long as there is something");
}

#[test]
fn without_a_fifo_each_byte_interrupts() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("stdio");
    chip.write(IER, &[1]);
    fixture.send(b"abc");
    fixture.turn();
    for (edges, byte) in (1..).zip(b"abc") {
        assert_eq!((fixture.line.edges.get(), chip.read(DATA, 1)), (edges, vec![*byte]));
    }
}

#[test]
fn the_end_of_input_is_the_end_of_reading_it() {
    let mut fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("stdio");
    open_port(&mut chip);
    fixture.send(b"last");
    fixture.host.sender = None;
    fixture.turn();
    assert_eq!(read_all(&mut chip), b"last");
    fixture.turn();
    // A watched descriptor at its end would be ready at once, again and again.
    let before = std::time::Instant::now();
    fixture.lane.borrow_mut().turn(Some(Duration::from_millis(20)));
    assert!(before.elapsed() >= Duration::from_millis(20), "the lane still watches closed input");
}

#[test]
fn a_regular_file_is_input_too() {
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&path, [b'x'; 50]).unwrap();
    let host = PipeHost { input: File::open(&path).unwrap().into(), ..PipeHost::default() };
    let fixture = Fixture::with(host, &[(0, 4096)]);
    let mut chip = fixture.chip::<This>("stdio");
    open_port(&mut chip);
    let mut seen = Vec::new();
    for _ in 0..8 {
        fixture.turn();
        seen.extend(read_all(&mut chip));
    }
    assert_eq!(seen, [b'x'; 50]);
}

/// A guest that echoes, a host that sends pieces of every size, a reader with a small pipe and a lane on a thread of
/// its own: whoever sleeps is woken. Pipes and FIFOs are full and empty in turn.
#[test]
fn nobody_sleeps_while_there_is_something_to_echo() {
    for seed in 0..4 {
        let (chip, lane, sender, mut seen) = beside_a_lane();
        let mut dice = Dice(seed);
        let text: Vec<u8> = (0..90_000).map(|_| if dice.roll(20) == 0 { b'\n' } else { b'x' }).collect();
        let sent = text.clone();
        let host = std::thread::spawn(move || {
            let mut rest = sent.as_slice();
            while !rest.is_empty() {
                let longest = [1, 16, 17, 300, 5000][dice.roll(5)];
                let (piece, more) = rest.split_at((1 + dice.roll(longest)).min(rest.len()));
                assert_eq!(rustix::io::write(&sender, piece).unwrap(), piece.len());
                rest = more;
                (0..dice.roll(4)).for_each(|_| std::thread::yield_now());
            }
        });
        let guest = std::thread::spawn(move || echo(chip, 90_000));
        let mut echoed: Vec<u8> = Vec::new();
        while echoed.len() < text.len() {
            let awake = awaits(&seen, Duration::from_secs(60));
            assert!(awake, "seed {seed}: asleep after {} of {} bytes", echoed.len(), text.len());
            let mut piece = [0; 1777];
            let n = std::io::Read::read(&mut seen, &mut piece).unwrap();
            echoed.extend(&piece[..n]);
        }
        assert!(echoed == text, "seed {seed}: bytes lost or out of order");
        host.join().unwrap();
        guest.join().unwrap();
        assert!(lane.stop());
    }
}

/// A port whose lane runs, and the other ends of its pipes.
fn beside_a_lane() -> (Driven, LaneHandle, OwnedFd, File) {
    let (seen, output) = rustix::pipe::pipe().unwrap();
    // One page, so that it is full now and then.
    rustix::pipe::fcntl_setpipe_size(&output, 4096).unwrap();
    let lane = Lane::spawn("test", |_| ()).unwrap();
    let mut fixture = Fixture::beside(PipeHost { output, ..PipeHost::default() }, &lane);
    let chip = fixture.chip::<This>("stdio");
    (chip, lane, fixture.host.sender.take().unwrap(), seen.into())
}

/// The guest: polls for a byte and for room, and sends the byte back.
fn echo(mut chip: Driven, bytes: usize) {
    open_port(&mut chip);
    for _ in 0..bytes {
        while chip.read(LSR, 1)[0] & 0x21 != 0x21 {
            std::thread::yield_now();
        }
        let byte = chip.read(DATA, 1);
        chip.write(DATA, &byte);
    }
}

/// Waits for something to read.
fn awaits(from: &File, patience: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Timespec::try_from(patience).unwrap();
    poll(&mut [PollFd::new(from, PollFlags::IN)], Some(&limit)).unwrap() == 1
}

/// Numbers as irregular as a test needs, the same in every run (a linear congruential generator, MMIX's numbers).
struct Dice(u64);

impl Dice {
    /// A number below `sides`.
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % sides
    }
}

#[test]
fn the_escape_key_works_even_when_the_guest_does_not_listen() {
    let fixture = at_a_terminal();
    let _chip = fixture.chip::<This>("stdio");
    fixture.turn();
    fixture.send(&[b'k'; 3000]);
    fixture.turn();
    fixture.send(b"\x01?");
    fixture.turn();
    assert_eq!(fixture.output(), crate::escape::HELP.as_bytes());
    assert_eq!(fixture.effects(), []);
    fixture.send(b"\x01x");
    fixture.turn();
    assert_eq!(fixture.effects(), [Effect::Quit]);
}

#[test]
fn what_was_typed_ahead_is_read_later_and_ctrl_a_can_be_typed() {
    let fixture = at_a_terminal();
    let mut chip = fixture.chip::<This>("stdio");
    fixture.turn();
    fixture.send(b"early birds \x01a\x01k\n");
    fixture.turn();
    open_port(&mut chip);
    let mut seen = Vec::new();
    for _ in 0..4 {
        fixture.turn();
        seen.extend(read_all(&mut chip));
    }
    assert_eq!(seen, b"early birds \x01\x01k\n");
}

#[test]
fn without_a_terminal_ctrl_a_is_a_byte() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("stdio");
    open_port(&mut chip);
    fixture.turn();
    fixture.send(b"\x01x");
    fixture.turn();
    assert_eq!(read_all(&mut chip), b"\x01x");
    assert_eq!(fixture.effects(), []);
}

#[test]
fn a_reader_that_goes_away_ends_the_run() {
    let mut fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("stdio");
    fixture.host.seen = None;
    send(&mut chip, b"anyone");
    assert_eq!(chip.write(DATA, b"\n"), Effect::Quit);
    assert_eq!(chip.write(DATA, b"\n"), Effect::None, "said once");
    assert_eq!(chip.read(LSR, 1), [0x60]);
    assert_eq!((chip.body.finish.take().unwrap())(Duration::ZERO).unwrap(), Effect::Quit, "and at the end");
}

#[test]
fn the_end_of_the_run_drains_what_is_left() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("file=console.log");
    send(&mut chip, b"no end of line");
    assert_eq!(fixture.file(), b"");
    assert_eq!((chip.body.finish.take().unwrap())(Duration::ZERO).unwrap(), Effect::None);
    assert_eq!(fixture.file(), b"no end of line");
}

#[test]
fn a_pseudo_terminal_without_a_reader_does_not_hold_the_guest() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("pty");
    for _ in 0..300_000 {
        send(&mut chip, b"x");
    }
    assert_eq!(chip.read(LSR, 1), [0x60]);
}

#[test]
fn a_wide_access_reaches_the_neighbours() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("stdio");
    chip.write(0x3fe, &[1, 0x5a]);
    assert_eq!(chip.read(0x3fe, 2), [0xb0, 0x5a]);
    assert_eq!(chip.read(0x3ff, 4), [0x5a, 0xff, 0xff, 0xff], "beyond the window nobody answers");
}

#[test]
fn a_line_that_leads_nowhere_still_takes_all_and_is_listened_to() {
    let fixture = Fixture::default();
    let mut chip = fixture.chip::<This>("none");
    for _ in 0..100_000 {
        send(&mut chip, b"x");
    }
    assert_eq!(chip.read(LSR, 1), [0x60]);
    let Body::Chip(chip) = fixture.build::<This>("none").unwrap() else { panic!("no chip") };
    assert_eq!(chip.console, Some(0x3f8), "a panic has to be heard there too");
}

#[test]
fn the_user_chooses_one_end() {
    let fixture = Fixture::default();
    let fail = fixture.build::<This>("to=pty,file=x").err().unwrap();
    assert_eq!(fail.why, Why::Usage);
    let fail = fixture.build::<This>("tcp").err().unwrap().to_string();
    assert!(fail.contains("stdio") && fail.contains("pty"), "the known places are named: {fail}");
}
