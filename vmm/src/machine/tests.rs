//! Whole machines on the fake hypervisor and the fake host: assembly, control, and how each end is told.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base::host::fake::FakeHost;
use base::memory::Memory;
use base::ports::{RESET, RESET_VALUE, SLEEP_CONTROL};
use boot::Start;
use boot::kernel::Kernel;

use super::Machine;
use super::control::Control;
use crate::hv::fake::{Fake, FakeVm, Step};
use crate::outcome::{End, Report};
use crate::plan::{OnReset, Plan, Transport};

/// Power off: sleep type 5, and go (ACPI 6.5, section 4.8.3.7).
pub fn off() -> Step {
    Step::Out(SLEEP_CONTROL, vec![5 << 2 | 0x20])
}

/// The smallest kernel: an ELF file with one instruction at 1 MiB.
fn kernel() -> Kernel {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let words = |file: &mut Vec<u8>, values: &[u64], width: usize| {
        values.iter().for_each(|value| file.extend(&value.to_le_bytes()[..width]));
    };
    words(&mut file, &[2, 62], 2);
    words(&mut file, &[1], 4);
    words(&mut file, &[0x10_0000, 64, 0], 8);
    words(&mut file, &[0], 4);
    words(&mut file, &[64, 56, 1, 0, 0, 0], 2);
    words(&mut file, &[1, 5], 4);
    words(&mut file, &[120, 0x10_0000, 0x10_0000, 1, 1, 4096], 8);
    file.push(0xf4);
    Kernel::parse("smallest", file).unwrap()
}

fn run(plan: Plan, scripts: Vec<Vec<Step>>) -> (Arc<FakeVm>, Report) {
    run_since(Instant::now(), plan, scripts)
}

/// Runs a machine whose process began at `started`.
fn run_since(started: Instant, plan: Plan, scripts: Vec<Vec<Step>>) -> (Arc<FakeVm>, Report) {
    // It holds the other ends of the streams: it has to outlive the run.
    let host = FakeHost::default();
    run_on(&host, started, plan, scripts)
}

/// The same on a host of the caller's.
pub fn run_on(
    host: &FakeHost,
    started: Instant,
    plan: Plan,
    scripts: Vec<Vec<Step>>,
) -> (Arc<FakeVm>, Report) {
    let fake = FakeVm::new(scripts);
    match build_on(host, started, &plan, &fake) {
        (plan, ControlFlow::Continue(machine)) => (fake, machine.run(&plan, None, None, started)),
        (plan, ControlFlow::Break(end)) => (fake, Report::unborn(&plan, end, started)),
    }
}

/// Builds a machine; the whole plan.
pub fn build_on(
    host: &FakeHost,
    started: Instant,
    plan: &Plan,
    fake: &Arc<FakeVm>,
) -> (Plan, ControlFlow<End, Machine>) {
    let plan = Plan { kernel: "smallest".into(), ..plan.clone() }.complete().unwrap();
    let deadline = plan.timeout.map(|limit| (limit, started + limit.duration()));
    let control = Control::new(deadline).unwrap();
    let memory = Memory::new(&arch::layout::ram(plan.memory.bytes())).unwrap();
    let vm = Arc::new(Fake(fake.clone()));
    let built = Machine::build(&plan, vm, memory, &kernel(), host, control, false).unwrap();
    (plan, built)
}

#[test]
fn the_machine_is_put_together_as_planned() {
    let plan = Plan { memory: "5G".parse().unwrap(), cpus: 2, ..Plan::default() };
    let (fake, report) = run(plan, vec![vec![off()]]);
    let pieces: Vec<_> = fake.pieces.lock().unwrap().iter().map(|piece| (piece.guest, piece.len)).collect();
    assert_eq!(pieces, [(0, 3 << 30), (4 << 30, 2 << 30)]);
    let zero_page = arch::layout::ZERO_PAGE;
    assert_eq!(*fake.started.lock().unwrap(), Some(Start::Linux64 { entry: 0x10_0000, zero_page }));
    assert!(matches!(report.end, End::PoweredOff), "{report:?}");
    assert_eq!((report.cpus, report.memory.size), (2, 5 << 30));
    assert_eq!(report.exits["port_write"], 1);
}

#[test]
fn each_end_is_told_for_what_it_was() {
    let reset = || Step::Out(RESET, vec![RESET_VALUE]);
    let panic = b"Kernel panic - not syncing: none\n".map(|byte| Step::Out(0x3f8, vec![byte]));
    for (script, code) in [
        (vec![off()], 0),
        (vec![reset()], 0),
        (vec![Step::Out(0x64, vec![0xfe])], 0),
        (vec![Step::Out(0xf4, vec![42])], 42),
        (vec![Step::Out(0x505, vec![1])], 120),
        (panic.into_iter().chain([reset()]).collect(), 120),
        (vec![Step::TripleFault], 122),
        (vec![Step::Stuck("KVM cannot emulate an instruction of the guest")], 122),
    ] {
        let (_, report) = run(Plan::default(), vec![script.clone()]);
        assert_eq!(report.end.exit_code(), code, "{:?} after {:?}", report.end, script.last());
    }
}

#[test]
fn the_first_end_counts_and_all_vcpus_stop() {
    let plan = Plan { cpus: 4, ..Plan::default() };
    let spin = || vec![Step::Spin; 3];
    let (_, report) = run(plan, vec![spin(), spin(), vec![Step::Out(0xf4, vec![7])], spin()]);
    assert!(matches!(report.end, End::DebugExit(7)), "{report:?}");
}

#[test]
fn a_guest_that_never_ends_runs_out_of_time() {
    let plan = Plan { timeout: Some("50ms".parse().unwrap()), ..Plan::default() };
    let (_, report) = run(plan, vec![vec![Step::Spin]]);
    assert_eq!(report.end.exit_code(), 124, "{report:?}");
    assert!(report.times.end.as_millis() >= 50);
}

#[test]
fn a_start_that_takes_too_long_is_given_up() {
    let plan = Plan { timeout: Some("1s".parse().unwrap()), ..Plan::default() };
    let started = Instant::now().checked_sub(Duration::from_secs(2)).unwrap();
    let (fake, report) = run_since(started, plan, vec![vec![off()]]);
    assert_eq!(report.end.exit_code(), 124, "{report:?}");
    assert!(fake.started.lock().unwrap().is_none(), "no guest was begun");
    assert!(report.json().contains(r#""first_instruction":null"#), "{}", report.json());
}

/// Whether SIGTERM waits, in this thread.
fn term_is_blocked() -> bool {
    let about = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let mask = about.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
    u64::from_str_radix(mask.trim(), 16).unwrap() >> (libc::SIGTERM - 1) & 1 == 1
}

#[test]
fn a_signal_between_two_lives_waits_for_the_second() {
    let reset = || Step::Out(RESET, vec![RESET_VALUE]);
    for (on_reset, end, waits) in
        [(OnReset::Restart, reset(), true), (OnReset::Restart, off(), false), (OnReset::Exit, reset(), false)]
    {
        run(Plan { on_reset, ..Plan::default() }, vec![vec![end.clone()]]);
        assert_eq!(term_is_blocked(), waits, "{on_reset:?} after {end:?}");
    }
}

#[test]
fn a_crash_says_where() {
    let (_, report) = run(Plan::default(), vec![vec![Step::TripleFault]]);
    let End::Crashed { detail } = report.end else { panic!("{report:?}") };
    assert_eq!(detail, "triple fault, vCPU of a script");
}

#[test]
fn unknown_addresses_read_as_ones_and_hurt_nobody() {
    let (fake, report) = run(
        Plan::default(),
        vec![vec![
            Step::In(0x1234, 2),
            Step::Load(0xdead_0000, 8),
            Step::Out(0x1234, vec![1, 2, 3, 4]),
            Step::Store(0xdead_0000, vec![1]),
            off(),
        ]],
    );
    assert!(matches!(report.end, End::PoweredOff), "{report:?}");
    assert_eq!(*fake.answers.lock().unwrap(), [vec![0xff; 2], vec![0xff; 8]]);
}

/// Configuration space of device `number` through ECAM.
fn ecam(number: u64, register: u64) -> u64 {
    arch::layout::PCI_ECAM + (number << 15) + register
}

#[test]
fn a_driver_finds_its_device_over_pci_and_moves_it() {
    let (low, far) = (arch::layout::PCI_LOW + 0x4000, 0x12_3400_0000u64);
    let word = |value: u32| value.to_le_bytes().to_vec();
    let plan = Plan { transport: Transport::Pci, ..Plan::default() };
    let script = vec![
        Step::Load(ecam(0, 0), 4),
        Step::Load(ecam(1, 0), 4),
        Step::Load(low + 0x12, 2),
        Step::Store(ecam(1, 4), vec![6, 0]),
        Step::Load(low + 0x12, 2),
        // The queue is none, but whoever rings its doorbell has it wired.
        Step::Store(low + 0x2000, vec![0, 0]),
        Step::Out(0xcf8, word(0x8000_0810)),
        Step::Out(0xcfc, word(0x3400_0000)),
        Step::Out(0xcf8, word(0x8000_0814)),
        Step::Out(0xcfc, word(0x12)),
        Step::Load(low + 0x12, 2),
        Step::Load(far + 0x12, 2),
        Step::Store(far + 0x2000, vec![0, 0]),
        // Another device stays where it is; port 0xcf9 is no part of the address register.
        Step::In(0xcf8, 4),
        Step::Store(ecam(1, 4), vec![0, 0]),
        Step::Load(far + 0x12, 2),
        off(),
    ];
    let (fake, report) = run(plan, vec![script]);
    assert!(matches!(report.end, End::PoweredOff), "{report:?}");
    let answers = fake.answers.lock().unwrap();
    let numbers: Vec<u64> = answers
        .iter()
        .map(|bytes| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
        .collect();
    let none = 0xffff;
    assert_eq!(numbers, [0x0008_1b36, 0x1044_1af4, none, 1, none, 1, 0x8000_0814, none]);
    assert_eq!(*fake.doorbells.lock().unwrap(), [], "a window that is nowhere has no doorbell");
}

#[test]
fn the_transport_decides_whether_there_is_a_bus() {
    for (transport, found) in
        [(Transport::Auto, 0xffff_ffff), (Transport::Mmio, 0xffff_ffff), (Transport::Pci, 0x0008_1b36u32)]
    {
        let plan = Plan { transport, ..Plan::default() };
        let (fake, _) = run(plan, vec![vec![Step::Load(ecam(0, 0), 4), off()]]);
        assert_eq!(*fake.answers.lock().unwrap(), [found.to_le_bytes()], "{transport:?}");
    }
}
