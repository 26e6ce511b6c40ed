//! What a guest can make devices say in the log: few lines that count, however often it breaks a rule.

#[path = "virtio/driver.rs"]
mod driver;

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use base::host::fake::FakeHost;
use base::memory::Memory;
use devices::catalog::{Body, CATALOG};
use driver::*;
use log::{LevelFilter, Log, Metadata, Record};

/// How often each rule is broken.
const TIMES: u64 = 500;
/// Where no memory is.
const HOLE: u64 = 8 << 20;

/// Keeps all lines, with their targets.
struct Lines(Mutex<Vec<(String, String)>>);

static LINES: Lines = Lines(Mutex::new(Vec::new()));

impl Lines {
    /// Those since the last call.
    fn take(&self) -> Vec<(String, String)> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &Record<'_>) {
        let line = (record.target().to_owned(), record.args().to_string());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }
    fn flush(&self) {}
}

/// The lines since the last call are those of something that was counted up to `count` from `before` on, which each
/// says, and no more of them than there are powers of two.
fn expect_rationed(what: &str, before: u64, count: u64) {
    let lines = LINES.take();
    assert!(lines.iter().all(|(target, _)| target == "guest"), "{what}: {lines:#?}");
    let due: Vec<u64> = (0..64).map(|bit| 1 << bit).filter(|n| (before + 1..=count).contains(n)).collect();
    assert_eq!(lines.len(), due.len(), "{what}, {count} times: {lines:#?}");
    for ((_, line), n) in lines.iter().zip(due) {
        let counted = [format!("(fault {n})"), format!("(error {n})")];
        assert!(counted.iter().any(|words| line.contains(words)), "{what}: {line}");
    }
}

/// Each queue names a descriptor that is none.
fn offer_lies<V: Via>(rig: &mut Over<V>) {
    let features = rig.offered();
    assert!(rig.negotiate(features));
    let mut queues = Vec::new();
    for index in 0.. {
        rig.set(reg::QUEUE_SELECT, u32::from(index));
        let max = u16::try_from(rig.get(reg::QUEUE_MAX)).unwrap();
        if max == 0 {
            break;
        }
        queues.push(rig.queue(index, max.min(16), features));
    }
    rig.go();
    for mut queue in queues {
        queue.offer(rig.ram(), 16);
        rig.notify(queue.index);
    }
    rig.settle();
}

/// A queue that is nowhere.
fn set_up_nowhere<V: Via>(rig: &mut Over<V>) {
    assert!(rig.negotiate(VERSION_1));
    rig.set(reg::QUEUE_SELECT, 0);
    rig.set(reg::QUEUE_SIZE, 16);
    for at in [reg::DESC, reg::AVAIL, reg::USED] {
        rig.set64(at, HOLE);
    }
    rig.set(reg::QUEUE_READY, 1);
}

fn break_rules<V: Via>() {
    for entry in CATALOG {
        let name = entry.name();
        let (memory, host) = (Memory::new(&RAM).unwrap(), FakeHost::default());
        let Ok(Body::Virtio(device)) = build(name, entry.example(), &host, &memory) else { continue };
        let mut rig = Over::<V>::new(device, memory);
        LINES.take();
        let mut before = 0;
        for break_one in [offer_lies, set_up_nowhere] {
            (0..TIMES).for_each(|_| break_one(&mut rig));
            let faults = rig.meter("faults");
            assert!(faults >= before + TIMES, "{name}: {faults} faults after {before}");
            expect_rationed(name, before, faults);
            before = faults;
        }
    }
}

/// A host that has less of a disk than it said.
fn meet_errors() {
    let host = FakeHost::default();
    let mut rig = Over::<Mmio>::of("blk", "path=a.img", &host);
    let mut queue = rig.start(u64::MAX, 16);
    LINES.take();
    host.file(Path::new("a.img")).unwrap().set_len(0).unwrap();
    for _ in 0..TIMES {
        // A header of zeros: read the first sector.
        queue.push(rig.ram(), &[(0x1000, 16, false), (0x2000, 513, true)]);
        rig.notify(0);
        rig.wait_used(&mut queue);
    }
    assert_eq!(rig.meter("errors"), TIMES);
    expect_rationed("a disk that was cut short", 0, TIMES);
}

/// One test, since there is one log.
#[test]
fn a_storm_is_a_few_lines_that_count() {
    log::set_logger(&LINES).unwrap();
    log::set_max_level(LevelFilter::Trace);
    break_rules::<Mmio>();
    break_rules::<Pci>();
    meet_errors();
}
