//! Metrics: the counters of the machine and its devices, a line of JSON for each moment, while the guest runs.
//!
//! The lines are written on the control lane, which waits for nobody: a reader that is slow misses whole lines, and is
//! told how many. docs/metrics.md has the meaning of each name; a test compares the two.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base::bus::Effect;
use base::host::Host;
use base::lane::{Context, Interest, LaneHandle, Work};
use base::memory::Memory;
use base::{Doing, Fail, Result, Why};
use devices::outlet::{Flow, Outlet};
use devices::virtio::Meters;
use serde_json::{Map, Value, json};

use super::board::Board;
use crate::hv::Kind;
use crate::plan::Metrics;

/// The deadline of the next line, and the descriptor of a reader that was slow.
const NEXT: u32 = 1;
const ROOM: u32 = 2;

/// What is counted.
#[derive(Clone)]
pub struct Sources {
    /// Exits and the hypervisor's side.
    pub board: Arc<Board>,
    /// Guest memory.
    pub memory: Memory,
    /// Counters of devices, by their names.
    pub devices: Vec<(String, Meters)>,
}

impl Sources {
    /// The counters of the machine as a whole.
    pub fn machine(&self) -> Map<String, Value> {
        let exits = Kind::NAMES.iter().zip(&self.board.exits);
        let mut all: Map<String, Value> =
            exits.map(|((_, name), count)| (format!("{name}_exits"), count.get().into())).collect();
        let mut put = |name: &str, value: u64| all.insert(name.to_owned(), value.into());
        put("late_writes", self.board.late.get());
        put("lost_interrupts", self.board.vm.lost_interrupts());
        put("memory_bytes", self.memory.len());
        if let Ok(resident) = self.memory.resident() {
            put("memory_resident_bytes", resident);
        }
        all
    }

    /// The counters of each device.
    pub fn devices(&self) -> Map<String, Value> {
        let values = |meters: &Meters| -> Map<String, Value> {
            meters.iter().map(|(name, count)| ((*name).to_owned(), count.get().into())).collect()
        };
        self.devices.iter().map(|(name, meters)| (name.clone(), values(meters).into())).collect()
    }
}

/// The file that lines go to, open.
pub struct Recorder<S = Sources> {
    path: PathBuf,
    every: Duration,
    outlet: Outlet,
    sources: S,
}

impl Recorder<()> {
    /// Opens the file as an output of a device is opened: a pipe needs its reader first, and nothing waits for one.
    ///
    /// # Errors
    /// As the host answers.
    pub fn open(metrics: &Metrics, host: &dyn Host) -> Result<Self> {
        let outlet = Outlet::new(metrics.open(host)?.into())
            .doing(Why::Host, || format!("look at the metrics file {}", metrics.path.display()))?;
        Ok(Recorder { path: metrics.path.clone(), every: metrics.every.duration(), outlet, sources: () })
    }

    /// Knows now what to record.
    pub fn of(self, sources: Sources) -> Recorder {
        Recorder { path: self.path, every: self.every, outlet: self.outlet, sources }
    }
}

impl Recorder {
    /// Writes the first line, and has `lane` write the others. `started` is when the process began.
    pub fn start(self, lane: &LaneHandle, started: Instant) -> Recording {
        let every = self.every;
        let mut book = Book { recorder: self, started, skipped: 0, over: false };
        let stuck = book.write("start");
        let recording = Recording(Arc::new(Mutex::new(book)));
        lane.adopt(Ticker { recording: recording.clone(), every, stuck });
        recording
    }
}

/// Lines under way.
struct Book {
    recorder: Recorder,
    started: Instant,
    /// Lines that a slow reader has missed.
    skipped: u64,
    /// Nothing is written any more.
    over: bool,
}

impl Book {
    fn line(&self, event: &str) -> String {
        let millis = (self.started.elapsed().as_secs_f64() * 1e6).round() / 1e3;
        let line = json!({
            "event": event,
            "time_ms": millis,
            "skipped_lines": self.skipped,
            "machine": self.recorder.sources.machine(),
            "devices": self.recorder.sources.devices(),
        });
        format!("{line}\n")
    }

    /// Writes a line if those before it are out; whether the reader has to be waited for.
    fn write(&mut self, event: &str) -> bool {
        if self.over {
            return false;
        }
        if !self.recorder.outlet.is_empty() {
            self.skipped = self.skipped.saturating_add(1);
            return true;
        }
        self.line(event).bytes().for_each(|byte| self.recorder.outlet.push(byte));
        self.flush()
    }

    /// Writes what the host takes; whether there is more.
    fn flush(&mut self) -> bool {
        let flow = self.recorder.outlet.flush();
        self.heed(flow)
    }

    fn heed(&mut self, flow: Flow) -> bool {
        let cause = match flow {
            Flow::Drained => return false,
            Flow::Stuck => return true,
            Flow::Closed => "its reader has gone".to_owned(),
            Flow::Broken(cause) => cause.to_string(),
        };
        self.give_up(&Fail::new(Why::Host, self.doing()).because(cause));
        false
    }

    fn doing(&self) -> String {
        format!("write metrics to {}", self.recorder.path.display())
    }

    /// Says why there are no more lines, once.
    fn give_up(&mut self, fail: &Fail) {
        if !std::mem::replace(&mut self.over, true) {
            ::log::warn!("{fail}; no more are written");
        }
    }
}

/// A recording under way: the lane writes its lines, the machine the last one.
#[derive(Clone)]
pub struct Recording(Arc<Mutex<Book>>);

impl Recording {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the last line. Waits for the reader as long as it takes something within each span of `patience`.
    pub fn end(&self, patience: Duration) {
        let mut book = self.book();
        if book.over {
            return;
        }
        book.line("end").bytes().for_each(|byte| book.recorder.outlet.push(byte));
        let name = format!("metrics to {}", book.recorder.path.display());
        match book.recorder.outlet.finish(&name, patience) {
            Ok(flow) => drop(book.heed(flow)),
            Err(fail) => book.give_up(&fail),
        }
    }
}

/// Writes a line after each period.
struct Ticker {
    recording: Recording,
    every: Duration,
    /// The reader is waited for.
    stuck: bool,
}

impl Ticker {
    /// Waits for the reader, or no longer. A file that cannot be waited for is tried again with the next line.
    fn heed(&mut self, stuck: bool, ctx: &mut Context<'_>) {
        let book = self.recording.book();
        let fd = book.recorder.outlet.fd();
        if stuck && !self.stuck {
            self.stuck = ctx.watch(fd, ROOM, Interest::Writable).is_ok();
        } else if !stuck && std::mem::take(&mut self.stuck) {
            ctx.unwatch(fd);
        }
    }
}

impl Work for Ticker {
    fn arrive(&mut self, ctx: &mut Context<'_>) -> Effect {
        let stuck = std::mem::take(&mut self.stuck);
        self.heed(stuck, ctx);
        ctx.arm(NEXT, self.every);
        Effect::None
    }

    fn ready(&mut self, token: u32, ctx: &mut Context<'_>) -> Effect {
        let stuck = match token {
            NEXT => {
                ctx.arm(NEXT, self.every);
                // What is left of the line before may have room by now.
                let mut book = self.recording.book();
                book.flush();
                book.write("period")
            }
            _ => self.recording.book().flush(),
        };
        self.heed(stuck, ctx);
        if self.recording.book().over {
            ctx.disarm(NEXT);
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests;
