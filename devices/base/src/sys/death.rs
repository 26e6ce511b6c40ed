//! The last act of a process that a signal ends.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

/// Numbers of signals are below this.
const SIGNALS: usize = 65;
/// Bytes of the stack of a handler: `act` is short, the runtime's words about an overflow need some KiB.
const STACK: usize = 64 << 10;

/// Signals that end a process unless it does something about them (signal(7)); real-time signals do, too. Not in it:
/// `SIGKILL`, about which nothing can be done, and `SIGPIPE` and `SIGXFSZ`, which writers ignore.
const DEADLY: [c_int; 20] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGUSR1,
    libc::SIGSEGV,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGSTKFLT,
    libc::SIGXCPU,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSYS,
];

static ACT: OnceLock<fn()> = OnceLock::new();
/// By number: what was done about a signal before.
static BEFORE: [OnceLock<libc::sigaction>; SIGNALS] = [const { OnceLock::new() }; SIGNALS];

/// Has `act` called before a signal ends this process; the signal then ends it as it would have. Signals that are
/// ignored or handled are left alone, except for faults, which a Rust runtime handles to explain an overflow of the
/// stack: it still does, after `act`. A second call changes nothing.
///
/// The stack of this thread may overflow: it is given another one for the handler. On a thread that has none, `act` is not
/// called when its stack overflows.
///
/// `act` runs in a signal handler, in any thread and at any moment: it must take no lock and no memory.
pub fn prepare(act: fn()) {
    if ACT.set(act).is_err() {
        return;
    }
    lend_stack();
    for signal in DEADLY.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX()) {
        let Some(before) = action_of(signal) else { continue };
        let runtime = [libc::SIGSEGV, libc::SIGBUS].contains(&signal) && before.sa_sigaction != libc::SIG_IGN;
        let slot = usize::try_from(signal).ok().and_then(|number| BEFORE.get(number));
        let Some(slot) = slot.filter(|_| runtime || before.sa_sigaction == libc::SIG_DFL) else { continue };
        // Before the handler is there, which looks for it.
        let _ = slot.set(before);
        // SAFETY: all-zero is a valid `sigaction`, to be filled in.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = die as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
        // ONSTACK: a stack that has overflowed has no room for the handler.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the mask is a part of the local.
        unsafe { libc::sigfillset(&raw mut action.sa_mask) };
        set_action(signal, &action);
    }
}

/// Gives this thread a stack for handlers, for the rest of the process, if it has none.
fn lend_stack() {
    // SAFETY: all-zero is a valid `stack_t`, to be filled in.
    let mut stack: libc::stack_t = unsafe { std::mem::zeroed() };
    // SAFETY: nothing is set, and the pointer is to a local.
    let told = unsafe { libc::sigaltstack(std::ptr::null(), &raw mut stack) };
    if told == 0 && stack.ss_flags & libc::SS_DISABLE != 0 {
        stack.ss_sp = Box::leak(vec![0_u8; STACK].into_boxed_slice()).as_mut_ptr().cast();
        stack.ss_size = STACK;
        stack.ss_flags = 0;
        // SAFETY: the memory is never freed, and nobody else has it. A refusal changes nothing.
        unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) };
    }
}

/// What is done about `signal` now.
fn action_of(signal: c_int) -> Option<libc::sigaction> {
    // SAFETY: all-zero is a valid `sigaction`, to be filled in.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: nothing is set, and the pointer is to a local.
    let told = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    (told == 0).then_some(action)
}

fn set_action(signal: c_int, action: &libc::sigaction) {
    // SAFETY: the action is valid: it was made by `prepare`, was in force before, or is the default. Its handler, if it
    // has one, is async-signal-safe: `die`, or the runtime's. A refusal leaves everything as it is.
    unsafe { libc::sigaction(signal, action, std::ptr::null_mut()) };
}

/// The handler.
extern "C" fn die(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    if let Some(act) = ACT.get() {
        act();
    }
    // SAFETY: the kernel hands a valid `siginfo_t` to a handler with SA_SIGINFO.
    let code = unsafe { (*info).si_code };
    let before = usize::try_from(signal).ok().and_then(|number| BEFORE.get(number)?.get());
    if let Some(before) = before.filter(|_| faulted(signal, code)) {
        // The instruction is tried again, and faults again.
        return set_action(signal, before);
    }
    // SAFETY: all-zero is the default action.
    set_action(signal, &unsafe { std::mem::zeroed() });
    // SAFETY: has no preconditions. The signal is blocked in its handler: it comes when that returns.
    unsafe { libc::raise(signal) };
}

/// Whether an instruction of this thread raised the signal, and would again.
fn faulted(signal: c_int, code: c_int) -> bool {
    /// Bad memory that nobody has touched yet (`BUS_MCEERR_AO`).
    const NOTICE: c_int = 5;
    match signal {
        libc::SIGSEGV | libc::SIGILL | libc::SIGFPE => code > 0,
        libc::SIGBUS => code > 0 && code != NOTICE,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    const DEATH: &str = "MAYFLY_TEST_DEATH";
    /// What it does last.
    const WORDS: &[u8] = b"restored\n";

    fn last_words() {
        let _ = rustix::io::write(rustix::stdio::stderr(), WORDS);
    }

    fn overflow(depth: u64) -> u64 {
        let room = std::hint::black_box([depth; 64]);
        room[usize::try_from(depth % 64).unwrap()] + if depth == u64::MAX { 0 } else { overflow(depth + 1) }
    }

    /// The process that dies: this test, run by the next one.
    #[test]
    fn dies_as_told() {
        let Ok(how) = std::env::var(DEATH) else { return };
        let no_core = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
        rustix::process::setrlimit(rustix::process::Resource::Core, no_core).unwrap();
        // As in a program with C's main: the runtime of tests gives each thread a stack for handlers.
        let none = libc::stack_t { ss_sp: std::ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
        // SAFETY: no handler runs on it now.
        assert_eq!(unsafe { libc::sigaltstack(&raw const none, std::ptr::null_mut()) }, 0);
        prepare(last_words);
        match how.as_str() {
            // SAFETY: none: the fault is what is tested.
            "fault" => unsafe { std::ptr::null_mut::<u8>().wrapping_add(8).write_volatile(1) },
            "overflow" => drop(std::hint::black_box(overflow(0))),
            "abort" => std::process::abort(),
            number => {
                // SAFETY: has no preconditions.
                unsafe { libc::raise(number.parse().unwrap()) };
            }
        }
        panic!("it outlived {how}");
    }

    #[test]
    fn every_deadly_signal_leaves_time_for_a_last_act_and_is_deadly_still() {
        let raised = DEADLY.into_iter().chain([libc::SIGRTMIN() + 3, libc::SIGRTMAX()]);
        let mut deaths: Vec<_> = raised.map(|signal| (signal.to_string(), signal)).collect();
        deaths.extend(
            [("fault", libc::SIGSEGV), ("overflow", libc::SIGABRT), ("abort", libc::SIGABRT)]
                .map(|(how, signal)| (how.to_owned(), signal)),
        );
        for (how, signal) in deaths {
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "sys::death::tests::dies_as_told", "--nocapture"])
                .env(DEATH, &how)
                .output()
                .unwrap();
            let told = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.signal(), Some(signal), "{how}: {told}");
            let times = if how == "overflow" { 2 } else { 1 };
            assert_eq!(told.matches("restored\n").count(), times, "{how}: {told}");
        }
    }
}
