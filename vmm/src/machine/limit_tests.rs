//! Limits of time on the fake hypervisor: which one ends a run, and what is told of where the vCPUs stood.

use std::ops::ControlFlow;
use std::time::Instant;

use base::host::fake::FakeHost;

use super::tests::build_on;
use crate::hang::Mode;
use crate::hv::fake::{FakeVm, Step};
use crate::hv::{Activity, Stand};
use crate::outcome::{End, Report};
use crate::plan::{Period, Plan};

fn limit(text: &str) -> Option<Period> {
    Some(text.parse().unwrap())
}

/// Runs a machine whose vCPUs say these bytes on the console and then spin.
fn run(plan: Plan, said: &[u8], stands: Vec<Stand>) -> Report {
    let script = said.iter().map(|byte| Step::Out(0x3f8, vec![*byte])).collect();
    let fake = FakeVm::new([script]);
    *fake.stands.lock().unwrap() = stands;
    let (host, started) = (FakeHost::default(), Instant::now());
    match build_on(&host, started, &plan, &fake) {
        (plan, ControlFlow::Continue(machine)) => machine.run(&plan, None, None, started),
        (_, ControlFlow::Break(end)) => panic!("{end:?}"),
    }
}

#[test]
fn a_guest_that_does_not_come_to_user_space_is_ended() {
    for said in [&b""[..], b"[    0.1] Linux version 6.1\r\n[    0.2] and no more\r\n"] {
        let plan = Plan { boot_timeout: limit("30ms"), timeout: limit("1h"), ..Plan::default() };
        let report = run(plan, said, Vec::new());
        assert!(matches!(report.end, End::BootTimedOut(_)), "{report:?}");
        assert_eq!(report.exit_code(), 124);
        assert!(
            report.json().starts_with(
                r#"{"end":"boot-timed-out","exit_code":124,"command":null,"cause":"boot-timeout","#
            ),
            "{}",
            report.json()
        );
    }
}

#[test]
fn what_either_console_says_counts_as_a_sign_of_user_space() {
    for overheard in [false, true] {
        let (host, fake) = (FakeHost::default(), FakeVm::new([vec![]]));
        let (_, built) = build_on(&host, Instant::now(), &Plan::default(), &fake);
        let ControlFlow::Continue(machine) = built else { panic!("it ended before it began") };
        let arrived = machine.arrival(None);
        let console = if overheard { &*machine.board.overheard } else { &machine.board.watch };
        console.lock().unwrap().feed(b"[    0.1] x\r\n");
        assert!(!arrived());
        console.lock().unwrap().feed(b"[    0.2] Run /init as init process\r\n");
        assert!(arrived(), "overheard: {overheard}");
    }
}

#[test]
fn each_vcpu_says_where_it_stood_when_the_time_was_up() {
    let mut kernel = Stand::default();
    (kernel.regs.rip, kernel.sregs.efer) = (0xffff_ffff_8100_0000, 1 << 10);
    let mut user = kernel;
    (user.regs.rip, user.sregs.cs.selector) = (0x40_1000, 0x33);
    let parked = Stand { activity: Activity::Parked, ..Stand::default() };
    let plan = Plan { cpus: 3, timeout: limit("30ms"), ..Plan::default() };
    let report = run(plan, b"", vec![kernel, user, parked]);
    let hang = report.hang.as_ref().unwrap();
    let modes: Vec<_> = hang.vcpus.iter().map(|place| (place.vcpu, place.mode, place.rip)).collect();
    assert_eq!(
        modes,
        [
            (0, Mode::Kernel, Some(0xffff_ffff_8100_0000)),
            (1, Mode::User, Some(0x40_1000)),
            (2, Mode::NotStarted, None)
        ]
    );
    assert!(report.json().contains(r#""hang":{"slide":null,"vcpus":[{"vcpu":0,"mode":"kernel","#));
}

#[test]
fn a_run_that_ends_by_itself_is_not_looked_into() {
    let fake = FakeVm::new([vec![Step::Out(0xf4, vec![3])]]);
    let (host, started) = (FakeHost::default(), Instant::now());
    let (plan, built) = build_on(&host, started, &Plan::default(), &fake);
    let ControlFlow::Continue(machine) = built else { panic!("it ended before it began") };
    let report = machine.run(&plan, None, None, started);
    assert!(report.hang.is_none(), "{report:?}");
    for (end, worth) in [
        (End::Signalled(libc::SIGINT), false),
        (End::Signalled(libc::SIGHUP), false),
        (End::Signalled(libc::SIGTERM), true),
        (End::Signalled(libc::SIGQUIT), true),
        (End::Quit, false),
        (End::PoweredOff, false),
    ] {
        assert_eq!(end.is_worth_a_look(), worth, "{end:?}");
    }
}
