//! The machine: from a plan to its outcome.

mod assemble;
mod board;
mod control;
mod desk;
mod doorbells;
mod host_objects;
mod lazy;
mod load;
mod metrics;
mod scout;
mod vcpu;
mod virtio;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base::clock::HostClock;
use base::host::Host;
use base::lane::LaneHandle;
use base::memory::Memory;
use base::{Doing, Result, Why};
use boot::kernel::Kernel;
use devices::catalog::Finish;

use self::assemble::{Assembled, Site, assemble};
use self::board::Board;
use self::control::{Arrival, Control, end_of};
use self::desk::{Exhibits, Opening};
pub use self::load::check;
use self::load::load;
use self::metrics::{Recorder, Sources};
pub use self::scout::Scout;
use self::vcpu::Running;
use crate::control::presence::Presence;
use crate::echo::{Echo, Shown};
use crate::hang::Hang;
use crate::host::LinuxHost;
use crate::hv::{Kind, Stand, Vcpu, Vm};
use crate::kernels;
use crate::log;
use crate::outcome::{End, Ram, Report, Times, Watch};
use crate::plan::{OnReset, Plan};
use crate::session::{self, Session};

/// Runs the machine of `plan` until it ends. `scout` was sent ahead, `started` is when the process began, `presence` how
/// others find it.
///
/// # Errors
/// The machine could not be started. What goes wrong later, also in starting it again, is a [`Report`] too.
pub fn run(plan: &Plan, scout: &Scout, started: Instant, presence: Option<&Presence>) -> Result<Report> {
    let again = plan.on_reset == OnReset::Restart;
    let host = if again { LinuxHost::for_lives() } else { LinuxHost::default() };
    let mut before: Option<Report> = None;
    loop {
        let session = plan.command.as_ref().map(|command| Session::prepare(command, &host)).transpose()?;
        let opening = presence
            .map(|presence| Opening { presence: presence.clone(), switchboard: host.switchboard().clone() });
        let life = live(plan, scout, &host, (session, opening), started, before.is_none());
        let report = match (life, before) {
            (Ok(report), _) => report,
            (Err(fail), Some(report)) => return Ok(report.but(End::HostError(fail), started)),
            (Err(fail), None) => return Err(fail),
        };
        if !(again && matches!(report.end, End::Reset)) {
            return Ok(report);
        }
        before = Some(report);
        host.begin_again();
    }
}

/// One life of the machine; what is worth a note is told in the first one.
fn live(
    plan: &Plan,
    scout: &Scout,
    host: &LinuxHost,
    (session, opening): (Option<Session>, Option<Opening>),
    started: Instant,
    first: bool,
) -> Result<Report> {
    // A time that no clock can hold is no limit.
    let deadline = plan.timeout.and_then(|limit| Some((limit, started.checked_add(limit.duration())?)));
    // Asked first: where there is no KVM, nothing else matters.
    scout.hypervisor()?;
    let control = Control::new(deadline)?;
    let memory = Memory::new(&arch::layout::ram(plan.memory.bytes()))
        .doing(Why::Host, || format!("reserve {} of memory", plan.memory))?;
    let kernel = kernels::open(&plan.kernel)?;
    if first {
        name_kernel(plan, &kernel);
    }
    let vm = Arc::new(scout.vm()?.with(plan.irqchip)?);
    Ok(match Machine::build(plan, vm, memory, &kernel, host, control, opening.is_some())? {
        ControlFlow::Continue(machine) => {
            let machine = Machine { opening, ..machine };
            let report = machine.run(plan, Some(scout), session, started);
            // What is on its last line matters where it is shown.
            let shown = plan.command.is_none() && host.has_lent_stdio();
            Report { mid_line: report.mid_line && shown, ..report }
        }
        ControlFlow::Break(end) => Report::unborn(plan, end, started),
    })
}

/// Says which kernel it is where a directory was named.
fn name_kernel(plan: &Plan, kernel: &Kernel) {
    let Some(path) = kernel.path().filter(|path| *path != plan.kernel) else { return };
    let instead = kernel.passed_over().map_or(String::new(), |fail| format!(" ({})", fail.summary()));
    log::note(&format!("the kernel is {}{instead}", path.display()));
}

/// Lines of the console that are told of a guest that went wrong.
const LAST_LINES: usize = 40;
/// How long the host may take nothing of the guest's last output before it is given up.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same, when the operator wants the end now.
const HASTE: Duration = Duration::from_millis(200);

fn patience(end: &End) -> Duration {
    match end {
        End::Quit | End::Signalled(_) | End::TimedOut(_) | End::BootTimedOut(_) => HASTE,
        _ => PATIENCE,
    }
}

/// A machine about to run.
struct Machine {
    board: Arc<Board>,
    memory: Memory,
    control: Control,
    vcpus: Vec<Box<dyn Vcpu>>,
    finishes: Vec<Finish>,
    lane: Option<LaneHandle>,
    recorder: Option<Recorder>,
    /// The file of the kernel.
    image: Option<PathBuf>,
    /// Where the vCPUs stood, if that is of interest.
    stands: Vec<Option<Stand>>,
    /// What can be seen and changed of it from the outside, if anybody can find it.
    exhibits: Option<Exhibits>,
    opening: Option<Opening>,
}

impl Machine {
    /// Builds it; or says how the run ended while it was being built. `watched`: others will be able to find it.
    fn build(
        plan: &Plan,
        vm: Arc<dyn Vm>,
        memory: Memory,
        kernel: &Kernel,
        host: &dyn Host,
        control: Control,
        watched: bool,
    ) -> Result<ControlFlow<End, Machine>> {
        // Before all else: counters that cannot be written should not cost a run.
        let recorder = plan.metrics.as_ref().map(|metrics| Recorder::open(metrics, host)).transpose()?;
        // Before the devices: a slot that follows interrupt routing waits for a grace period of the kernel.
        vm.map(&memory)?;
        let site = Site {
            vm: vm.clone(),
            memory: &memory,
            host,
            clock: Arc::new(HostClock::default()),
            reports: &control.reports,
            transport: virtio::choose(plan.transport, kernel),
            watched: watched || plan.metrics.is_some(),
        };
        let made = assemble(plan, &site)?;
        if let Some(end) = control.interrupted() {
            return Ok(ControlFlow::Break(end));
        }
        let start = load(plan, kernel, &made, &memory, host)?;
        if let Some(end) = control.interrupted() {
            return Ok(ControlFlow::Break(end));
        }
        let Assembled { board, finishes, meters, knobs, lane, .. } = made;
        let mut vcpus = (0..plan.cpus).map(|id| vm.vcpu(id, plan.cpus)).collect::<Result<Vec<_>>>()?;
        if let Some(first) = vcpus.first_mut() {
            first.start_at(&start)?;
        }
        let board = Arc::new(board);
        control.glean(board.clone());
        control.settle();
        let sources = Sources { board: board.clone(), memory: memory.clone(), devices: meters };
        let recorder = recorder.map(|recorder| recorder.of(sources.clone()));
        let exhibits = watched.then_some(Exhibits { sources, knobs });
        let opening = None;
        let image = kernel.path().map(Path::to_owned);
        let stands = Vec::new();
        Ok(ControlFlow::Continue(Machine {
            board,
            memory,
            control,
            vcpus,
            finishes,
            lane,
            recorder,
            image,
            stands,
            exhibits,
            opening,
        }))
    }

    fn run(
        mut self,
        plan: &Plan,
        scout: Option<&Scout>,
        session: Option<Session>,
        started: Instant,
    ) -> Report {
        let recording =
            self.recorder.take().map(|recorder| recorder.start(&self.control.reports.lane, started));
        let first_instruction = started.elapsed();
        let shown = self.show_guest(plan);
        let session = session.map(|session| self.open(session)).transpose();
        if let Some(limit) = plan.boot_timeout {
            let arrived = self.arrival(session.as_ref().ok().and_then(Option::as_ref));
            self.control.await_boot(limit, plan.on_reset, started, arrived);
        }
        if let (Some(opening), Some(exhibits), Ok(session)) = (&self.opening, self.exhibits.take(), &session)
        {
            let reach = session.as_ref().map(session::Running::reach);
            opening.open(plan, exhibits, &self.control.reports, reach);
        }
        let (session, end) = match session {
            Ok(session) => (session, self.live(scout, plan.on_reset == OnReset::Restart)),
            Err(fail) => (None, End::HostError(fail)),
        };
        if let Some(recording) = recording {
            recording.end(HASTE);
        }
        let command = session.map(|session| session.end(patience(&end)));
        let mut watch = self.board.watch.lock().unwrap_or_else(PoisonError::into_inner);
        watch.show(None);
        if let Some(shown) = shown {
            shown.wait(patience(&end));
        }
        let overheard = self.board.overheard.lock().unwrap_or_else(PoisonError::into_inner);
        Report {
            end: end.explained_by(&watch).explained_by(&overheard),
            accel: plan.accel.here(),
            cpus: plan.cpus,
            times: Times { first_instruction: Some(first_instruction), end: started.elapsed(), cpu: None },
            exits: Kind::NAMES.iter().zip(&self.board.exits).map(|((_, name), n)| (*name, n.get())).collect(),
            memory: Ram { size: self.memory.len(), touched: self.memory.resident().unwrap_or(0) },
            mid_line: watch.mid_line() || overheard.mid_line(),
            last_lines: watch.last_lines(LAST_LINES),
            hang: (!self.stands.is_empty())
                .then(|| Hang::read(&self.stands, &self.memory, self.image.as_deref())),
            command,
        }
    }

    /// With `-v`, shows the console of a command's guest where it is seen nowhere else.
    fn show_guest(&self, plan: &Plan) -> Option<Shown> {
        let wanted =
            plan.command.is_some() && plan.terminal().is_none() && ::log::log_enabled!(::log::Level::Info);
        // Without a thread for it the guest can run all the same.
        let (echo, shown) = wanted.then(Echo::start)?.ok()?;
        self.board.watch.lock().unwrap_or_else(PoisonError::into_inner).show(Some(echo));
        Some(shown)
    }

    /// Who knows whether the guest has reached user space: the session, or whoever reads its consoles.
    fn arrival(&self, session: Option<&session::Running>) -> Arrival {
        if let Some(session) = session {
            return session.arrival();
        }
        fn lock(watch: &Mutex<Watch>) -> MutexGuard<'_, Watch> {
            watch.lock().unwrap_or_else(PoisonError::into_inner)
        }
        let board = self.board.clone();
        lock(&board.watch).await_user_space();
        lock(&board.overheard).await_user_space();
        Box::new(move || lock(&board.watch).user_space() || lock(&board.overheard).user_space())
    }

    /// Lets a session begin: it hears the signals before this machine does.
    fn open(&mut self, session: Session) -> Result<session::Running> {
        let (late, quit) = (self.control.reports.clone(), self.control.reports.clone());
        let (up, unwanted) = (self.opening.clone(), self.control.reports.clone());
        let up = move || {
            if up.is_some_and(|opening| !opening.presence.rise()) {
                unwanted.end(End::Quit);
            }
        };
        let running = session.start(move |end| late.end(end), move || quit.end(End::Quit), up)?;
        self.control.courier = Some(Box::new(running.courier()));
        Ok(running)
    }

    /// Runs the vCPUs until the first end, then brings everything to rest: no thread touches guest memory or a file
    /// of the host any more, and what the guest printed is out. With `again`, a reset begins another life.
    fn live(&mut self, scout: Option<&Scout>, again: bool) -> End {
        let mut running = Vec::new();
        let mut refused = None;
        for (id, vcpu) in (0..).zip(std::mem::take(&mut self.vcpus)) {
            match Running::start(id, vcpu, self.board.clone(), self.control.reports.clone(), scout) {
                Ok(vcpu) => running.push(vcpu),
                Err(fail) => refused = Some(End::HostError(fail)),
            }
        }
        let end = refused.unwrap_or_else(|| self.control.wait(again));
        self.board.examine.store(end.is_worth_a_look(), Ordering::SeqCst);
        self.board.over.store(true, Ordering::SeqCst);
        let stands: Vec<_> = running.into_iter().map(Running::stop).collect();
        self.stands = if end.is_worth_a_look() { stands } else { Vec::new() };
        self.board.take_late_writes();
        if let Some(lane) = self.lane.take() {
            lane.stop();
        }
        let patience = patience(&end);
        self.finish(end, patience)
    }

    /// Has the chips hand over the output that they hold; what the run came to after that.
    fn finish(&mut self, end: End, patience: Duration) -> End {
        let mut end = end;
        let mut late = None;
        for finish in std::mem::take(&mut self.finishes) {
            match finish(patience) {
                Ok(effect) => end = end.overruled_by(end_of(effect)),
                Err(fail) => late = Some(fail),
            }
        }
        // Output that nobody took in time is worth an error only where nothing worse has happened.
        match (end, late) {
            (End::PoweredOff | End::Reset | End::DebugExit(0), Some(fail)) => End::HostError(fail),
            (end, _) => end,
        }
    }
}

#[cfg(test)]
mod board_tests;
#[cfg(test)]
mod limit_tests;
#[cfg(test)]
mod tests;
