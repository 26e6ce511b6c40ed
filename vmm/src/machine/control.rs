//! Control: waits for the first thing that ends a run, and says what it was.
//!
//! It lives on the main thread's lane. vCPUs and lanes tell it, it waits for nobody.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use base::bus::Effect;
use base::lane::{Context, Interest, Lane, LaneHandle, Work};
use base::sys::{program, signals};
use base::{Doing, Fail, Result, Why};

use super::board::{Board, Leave};
use crate::outcome::End;
use crate::plan::{OnReset, Period};

/// Signals that end a run in an orderly way.
pub const ENDING: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
const DEADLINE: u32 = 1;
const SIGNALS: u32 = 2;

/// The time a run may take, and when that is over. A guest that is restarted goes on with the same clock.
pub type Deadline = (Period, Instant);

/// The main thread's lane and the ends that were reported.
pub struct Control {
    lane: Lane,
    ends: Receiver<End>,
    /// Until the lane watches them.
    signals: Option<OwnedFd>,
    deadline: Option<Deadline>,
    /// Takes a signal to somebody else, if it can: then it does not end the run.
    pub courier: Option<Courier>,
    /// The way in, for vCPUs and devices.
    pub reports: Reports,
}

/// Whether the guest has reached user space.
pub type Arrival = Box<dyn Fn() -> bool + Send>;

/// Takes a signal, by its number, to somebody else; whether it did.
pub type Courier = Box<dyn FnMut(i32) -> bool + Send>;

/// Where a thread reports that the run has ended.
#[derive(Clone)]
pub struct Reports {
    ends: Sender<End>,
    /// The lane on which control, and the waiting work of chips, lives.
    pub lane: LaneHandle,
}

impl Reports {
    /// Tells control; the first end counts.
    pub fn end(&self, end: End) {
        // Control is gone only when the run is over, and then nobody needs to know.
        let _ = self.ends.send(end);
        self.lane.report(Effect::None);
    }
}

impl Control {
    /// Takes the ending signals and starts the clock. To be called before any other thread starts: threads inherit
    /// which signals are blocked.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn new(deadline: Option<Deadline>) -> Result<Control> {
        let doing = || "set up the control loop";
        let (ends, ended) = channel();
        let obeyed = ends.clone();
        let (lane, handle) = Lane::new(move |effect| {
            if let Some(end) = end_of(effect) {
                let _ = obeyed.send(end);
            }
        })
        .doing(Why::Host, doing)?;
        let signals = signals::divert(&ENDING).doing(Why::Host, doing)?;
        let reports = Reports { ends, lane: handle };
        Ok(Control { lane, ends: ended, signals: Some(signals), deadline, courier: None, reports })
    }

    /// Whether the run is over before it has begun: asked between the steps of a start, which may be long.
    pub fn interrupted(&self) -> Option<End> {
        let late = |(limit, end): Deadline| (Instant::now() >= end).then_some(End::TimedOut(limit));
        let signal = || self.signals.as_ref().and_then(signals::next).map(End::Signalled);
        self.deadline.and_then(late).or_else(signal)
    }

    /// Serves the lane until something ends the run. From then on the ending signals end the process at once, so that
    /// an operator who asks twice does not wait for a host that is stuck. A reset that begins another life (`again`)
    /// is no end: signals wait for that life, which has a result to tell.
    pub fn wait(&mut self, again: bool) -> End {
        if let Some(signals) = self.signals.take() {
            let ends = self.reports.ends.clone();
            let (deadline, courier) = (self.deadline, self.courier.take());
            self.reports.lane.adopt(Overseer { signals, deadline, courier, ends });
        }
        let end = loop {
            if let Ok(end) = self.ends.try_recv() {
                break end;
            }
            self.lane.turn(None);
        };
        let end = self.last_word(end);
        if !(again && matches!(end, End::Reset)) {
            crate::terminal::restore();
            signals::unblock(&ENDING);
        }
        end
    }

    /// A reset may be the beginning of another life: what came with it from the operator or the host counts more.
    /// Keys and signals that have come are heard first: lives may be so short that nobody else listens.
    fn last_word(&mut self, end: End) -> End {
        if matches!(end, End::Reset) {
            self.lane.turn(Some(Duration::ZERO));
        }
        let weighty = |end: &End| {
            let timed_out = matches!(end, End::TimedOut(_) | End::BootTimedOut(_));
            timed_out || matches!(end, End::Quit | End::Signalled(_) | End::HostError(_))
        };
        match end {
            End::Reset => self.ends.try_iter().find(weighty).unwrap_or(End::Reset),
            end => end,
        }
    }
}

/// What an effect means for the run; `None`: nothing.
pub fn end_of(effect: Effect) -> Option<End> {
    Some(match effect {
        Effect::None | Effect::Move(_) => return None,
        Effect::Reset => End::Reset,
        Effect::Off => End::PoweredOff,
        Effect::Exit(code) => End::DebugExit(code),
        Effect::Panicked => End::Panicked { evidence: "its panic notifier said so".to_owned() },
        Effect::Quit => End::Quit,
        Effect::Broken(why) => End::HostError(Fail::new(Why::Host, why)),
    })
}

/// What the end of a vCPU's loop means for the run; `None`: it left because the run is over.
pub fn end_of_vcpu(leave: Leave, whereabouts: impl FnOnce() -> String) -> Option<End> {
    let crashed = |what: &str| Some(End::Crashed { detail: format!("{what}, {}", whereabouts()) });
    match leave {
        Leave::Effect(effect) => end_of(effect),
        Leave::TripleFault => crashed("triple fault"),
        Leave::Halted => crashed("halted with nothing that could wake it"),
        Leave::Stuck(why) => crashed(&why),
        Leave::Over => None,
    }
}

/// Takes delayed writes where no exit follows them: a guest that prints and then idles in the kernel's arms. Looks
/// often while there are some, and ten times a second in the long run.
struct Gleaner {
    board: Arc<Board>,
    seen: u64,
    pause: Duration,
}

const SHORTEST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_millis(100);

impl Control {
    /// Has delayed writes of `board` taken even when no exit follows them.
    pub fn glean(&self, board: Arc<Board>) {
        self.reports.lane.adopt(Gleaner { board, seen: 0, pause: SHORTEST });
    }

    /// Ends the run if the guest has not reached user space in time: after `limit` from the beginning, which for a machine
    /// that was reset is that of its present life.
    pub fn await_boot(&self, limit: Period, on_reset: OnReset, started: Instant, arrived: Arrival) {
        let from = if on_reset == OnReset::Restart { Instant::now() } else { started };
        // A time that no clock can hold is no limit.
        if let Some(end) = from.checked_add(limit.duration()) {
            let ends = self.reports.ends.clone();
            self.reports.lane.adopt(BootWatch { limit, end, arrived, ends });
        }
    }

    /// Has the memory that only the start needed given back, if the run lasts.
    pub fn settle(&self) {
        self.reports.lane.adopt(Settler);
    }
}

impl Work for Gleaner {
    fn arrive(&mut self, ctx: &mut Context<'_>) -> Effect {
        ctx.arm(DEADLINE, self.pause);
        Effect::None
    }

    fn ready(&mut self, _: u32, ctx: &mut Context<'_>) -> Effect {
        let effect = self.board.take_late_writes();
        let seen = self.board.late.get();
        self.pause = if seen == self.seen { (self.pause * 2).min(LONGEST) } else { SHORTEST };
        self.seen = seen;
        ctx.arm(DEADLINE, self.pause);
        effect
    }
}

/// Gives back what the start needed, once the run has shown that it is no short one.
struct Settler;

const SETTLED: Duration = Duration::from_millis(250);

impl Work for Settler {
    fn arrive(&mut self, ctx: &mut Context<'_>) -> Effect {
        ctx.arm(DEADLINE, SETTLED);
        Effect::None
    }

    fn ready(&mut self, _: u32, _: &mut Context<'_>) -> Effect {
        program::give_back();
        Effect::None
    }
}

/// Waits for the guest to reach user space, and not for longer than that may take.
struct BootWatch {
    limit: Period,
    end: Instant,
    arrived: Arrival,
    ends: Sender<End>,
}

impl Work for BootWatch {
    fn arrive(&mut self, ctx: &mut Context<'_>) -> Effect {
        ctx.arm(DEADLINE, self.end.saturating_duration_since(Instant::now()));
        Effect::None
    }

    fn ready(&mut self, _: u32, _: &mut Context<'_>) -> Effect {
        if !(self.arrived)() {
            let _ = self.ends.send(End::BootTimedOut(self.limit));
        }
        Effect::None
    }
}

/// Watches the clock and the signals.
struct Overseer {
    signals: OwnedFd,
    deadline: Option<Deadline>,
    courier: Option<Courier>,
    ends: Sender<End>,
}

impl Work for Overseer {
    fn arrive(&mut self, ctx: &mut Context<'_>) -> Effect {
        if let Some((_, end)) = self.deadline {
            ctx.arm(DEADLINE, end.saturating_duration_since(Instant::now()));
        }
        match ctx.watch(&self.signals, SIGNALS, Interest::Readable) {
            Ok(()) => Effect::None,
            Err(cause) => Effect::Broken(format!("watch for signals: {cause}")),
        }
    }

    fn ready(&mut self, token: u32, _: &mut Context<'_>) -> Effect {
        let end = match (token, self.deadline) {
            (DEADLINE, Some((limit, _))) => Some(End::TimedOut(limit)),
            _ => signals::next(&self.signals)
                .filter(|signal| !self.courier.as_mut().is_some_and(|courier| courier(*signal)))
                .map(End::Signalled),
        };
        if let Some(end) = end {
            let _ = self.ends.send(end);
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_hears_of_signals_and_of_the_time() {
        let mut control = Control::new(None).unwrap();
        let (signals, sender) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK).unwrap();
        control.signals = Some(signals);
        assert!(control.interrupted().is_none());
        // `struct signalfd_siginfo`: 128 bytes that begin with the number.
        let mut info = [0; 128];
        info[0] = 15; // SIGTERM
        rustix::io::write(&sender, &info).unwrap();
        assert!(matches!(control.interrupted(), Some(End::Signalled(15))));
        let limit: Period = "50ms".parse().unwrap();
        control.deadline = Some((limit, Instant::now()));
        assert!(matches!(control.interrupted(), Some(End::TimedOut(_))));
    }
    #[test]
    fn a_guest_is_asked_once_whether_it_is_in_user_space() {
        for arrives in [false, true] {
            let mut control = Control::new(None).unwrap();
            let limit: Period = "1ms".parse().unwrap();
            let (tell, asked) = channel();
            let arrived = Box::new(move || tell.send(()).is_ok() && arrives);
            control.await_boot(limit, OnReset::Exit, Instant::now(), arrived);
            while asked.try_recv().is_err() {
                control.lane.turn(None);
            }
            let end = control.ends.try_recv().ok();
            assert_eq!(matches!(end, Some(End::BootTimedOut(_))), !arrives, "{end:?}");
            assert!(asked.try_recv().is_err());
        }
    }
}
