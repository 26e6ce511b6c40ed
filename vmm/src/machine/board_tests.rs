//! The run loop on the fake hypervisor.

use std::sync::{Arc, Mutex};

use base::bus::{Effect, Registers};
use devices::catalog::Space;

use super::board::{Board, Leave};
use crate::hv::fake::{Fake, FakeVm, Step};
use crate::hv::{Kind, Vcpu};

/// A chip that writes down what it is told and answers with its last byte.
struct Scribe(Arc<Mutex<Vec<u8>>>);

impl Registers for Scribe {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(self.0.lock().unwrap().last().copied().unwrap_or(0));
    }
    fn write(&mut self, _: u64, data: &[u8]) -> Effect {
        self.0.lock().unwrap().extend(data);
        if data == [0xfe] { Effect::Reset } else { Effect::None }
    }
}

fn play(script: Vec<Step>) -> (Arc<FakeVm>, Board, Vec<u8>, Leave) {
    let fake = FakeVm::new([script]);
    let mut board = Board::new(Arc::new(Fake(fake.clone())));
    let told = Arc::default();
    board.bus(Space::Port).insert("scribe", 0x60, 8, Box::new(Scribe(Arc::clone(&told)))).unwrap();
    board.bus(Space::Memory).insert("scribe", 0xd000_0000, 8, Box::new(Scribe(Arc::clone(&told)))).unwrap();
    board.consoles.push(0x60);
    let mut vcpu = fake.player(0);
    let leave = loop {
        if let Some(leave) = board.handle(vcpu.run().unwrap()) {
            break leave;
        }
    };
    let told = told.lock().unwrap().clone();
    (fake, board, told, leave)
}

#[test]
fn accesses_reach_the_chip_and_answers_the_guest() {
    let (fake, board, told, leave) = play(vec![
        Step::Out(0x60, vec![1]),
        Step::Store(0xd000_0004, vec![2, 3]),
        Step::In(0x61, 2),
        Step::In(0x200, 4),
        Step::Out(0x64, vec![0xfe]),
        Step::Out(0x60, vec![9]),
    ]);
    assert!(matches!(leave, Leave::Effect(Effect::Reset)), "{leave:?}");
    assert_eq!(told, [1, 2, 3, 0xfe], "nothing is heard after the reset");
    assert_eq!(*fake.answers.lock().unwrap(), [vec![3, 3], vec![0xff; 4]]);
    assert_eq!(board.ports.misses.get(), 1);
    assert_eq!(board.exits[Kind::PortWrite as usize].get(), 2);
    assert_eq!(board.exits[Kind::PortRead as usize].get(), 2);
}

#[test]
fn late_writes_come_before_the_exit_that_follows_them() {
    let (_, _, told, leave) = play(vec![
        Step::Late(0x60, b'a'),
        Step::Late(0x60, b'b'),
        Step::Out(0x60, vec![b'c']),
        Step::Late(0x60, 0xfe),
        Step::In(0x61, 1),
    ]);
    assert_eq!(told, [b'a', b'b', b'c', 0xfe]);
    assert!(matches!(leave, Leave::Effect(Effect::Reset)), "{leave:?}");
}

#[test]
fn the_console_is_watched_for_last_words() {
    let text = b"Kernel panic - not syncing: no init\n";
    let script = text.iter().map(|byte| Step::Late(0x60, *byte)).chain([Step::TripleFault]).collect();
    let (_, board, _, leave) = play(script);
    assert!(matches!(leave, Leave::TripleFault), "{leave:?}");
    assert_eq!(board.watch.lock().unwrap().panic().as_deref(), Some("Kernel panic - not syncing: no init"));
}

#[test]
fn a_guest_that_the_hypervisor_gives_up_is_told_apart() {
    let (.., leave) = play(vec![Step::Stuck("cannot emulate")]);
    assert!(matches!(leave, Leave::Stuck(why) if why == "cannot emulate"));
}
