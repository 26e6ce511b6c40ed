//! The lane's side of the serial port: carries input in when there is room, and output out when the host was busy.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base::bus::Effect;
use base::lane::{Context, Interest, Work};
use rustix::io::Errno;

use super::Port;
use crate::escape::{CTRL_A, Escape, HELP, Key};
use crate::inlet::Inlet;

/// Output without an end of line goes out after one to two of these.
const TICK: Duration = Duration::from_millis(5);
/// Key strokes kept for a guest that reads slowly: the escape key behind them is to be found all the same, and
/// whatever a person pastes is to fit.
const TYPED_AHEAD: usize = 1 << 20;
/// Input taken from the host at once. It is what a driver reads in one interrupt at most (256 bytes in Linux's): were
/// there always more, it would read on for ever, and drop what the guest's programs have no time to take.
const GULP: usize = 256;

const INPUT: u32 = 0;
const OUTPUT: u32 = 1;
const TICKED: u32 = 2;

/// Input of the serial port, and the watch over its output.
pub struct Pump {
    port: Arc<Mutex<Port>>,
    input: Option<Inlet>,
    /// How the input is waited for; `None` until that was tried.
    pollable: Option<bool>,
    watching: bool,
    /// Present when the input is the operator's terminal.
    escape: Option<Escape>,
    /// Output was already waiting at the last tick.
    old: bool,
}

impl Pump {
    pub fn new(port: Arc<Mutex<Port>>, input: Option<OwnedFd>, terminal: bool) -> Pump {
        let escape = terminal.then(Escape::default);
        Pump { port, input: input.map(Inlet::new), pollable: None, watching: false, escape, old: false }
    }

    /// Waits for the host to take output.
    pub fn wait_for_output(&mut self, ctx: &mut Context<'_>) -> Effect {
        let mut port = lock(&self.port);
        if port.stuck && ctx.watch(port.outlet.fd(), OUTPUT, Interest::Writable).is_err() {
            // It cannot be waited for: ask again after a while.
            port.stuck = false;
            port.ticking = true;
            ctx.arm(TICKED, TICK);
        }
        Effect::None
    }

    /// Looks after a while for output that has not gone out.
    pub fn start_ticking(&mut self, ctx: &mut Context<'_>) -> Effect {
        self.old = true;
        ctx.arm(TICKED, TICK);
        Effect::None
    }

    /// Gives the guest as much input as it has room for, then waits for more input or for more room.
    pub fn take_input(&mut self, ctx: &mut Context<'_>) -> Effect {
        loop {
            let mut port = lock(&self.port);
            port.fill();
            let room = port.uart.room();
            // A terminal is always listened to: the operator may want to quit a guest that does not.
            let wanted = room > 0 || self.escape.is_some();
            port.starved = self.input.is_some() && room == 0;
            drop(port);
            if !wanted {
                self.unwatch(ctx);
                return Effect::None;
            }
            if self.watch(ctx) {
                return Effect::None;
            }
            // A regular file is always ready.
            if self.input.is_none() {
                return Effect::None;
            }
            let effect = self.read(ctx);
            if effect != Effect::None {
                return effect;
            }
        }
    }

    /// Waits for input; `false` if that is impossible because it is always ready, or gone.
    fn watch(&mut self, ctx: &mut Context<'_>) -> bool {
        let Some(input) = &self.input else { return false };
        if self.pollable == Some(false) || self.watching {
            return self.watching;
        }
        self.watching = ctx.watch(input, INPUT, Interest::Readable).is_ok();
        self.pollable = Some(self.watching);
        self.watching
    }

    fn unwatch(&mut self, ctx: &mut Context<'_>) {
        if let Some(input) = self.input.as_ref().filter(|_| self.watching) {
            ctx.unwatch(input);
            self.watching = false;
        }
    }

    /// Reads once, if the guest has room or an operator is to be listened to.
    fn read(&mut self, ctx: &mut Context<'_>) -> Effect {
        let Some(input) = &mut self.input else { return Effect::None };
        if self.escape.is_none() && lock(&self.port).uart.room() == 0 {
            return Effect::None;
        }
        let mut buffer = [0; GULP];
        match input.read(&mut buffer) {
            Ok(0) => self.close(ctx),
            Ok(n) => return self.take(buffer.get(..n).unwrap_or_default(), ctx),
            Err(Errno::INTR | Errno::AGAIN) if self.watching => {}
            // A terminal that was hung up answers so.
            Err(Errno::IO) => self.close(ctx),
            Err(error) => {
                log::warn!(target: "guest", "read the serial input: {error}; going on without");
                self.close(ctx);
            }
        }
        Effect::None
    }

    /// No more input will come.
    fn close(&mut self, ctx: &mut Context<'_>) {
        self.unwatch(ctx);
        self.input = None;
    }

    fn take(&mut self, bytes: &[u8], ctx: &mut Context<'_>) -> Effect {
        let mut port = lock(&self.port);
        let Some(escape) = &mut self.escape else {
            port.typed.extend(bytes);
            return Effect::None;
        };
        let mut help = false;
        for byte in bytes {
            match escape.feed(*byte) {
                Key::Wait => {}
                Key::Quit => return Effect::Quit,
                Key::Type(byte) => port.typed.push_back(byte),
                Key::TypeEscaped(byte) => port.typed.extend([CTRL_A, byte]),
                Key::Break => {
                    port.uart.receive_break();
                    port.settle();
                }
                Key::Help => {
                    HELP.bytes().for_each(|byte| port.outlet.push(byte));
                    help = true;
                }
            }
        }
        port.typed.truncate(TYPED_AHEAD);
        drop(port);
        if help { self.flush(ctx) } else { Effect::None }
    }

    /// Writes out what the host takes, and waits for it if that is not all.
    fn flush(&mut self, ctx: &mut Context<'_>) -> Effect {
        let mut port = lock(&self.port);
        if port.stuck {
            return Effect::None;
        }
        let effect = port.flush();
        if port.stuck {
            drop(port);
            self.wait_for_output(ctx);
        }
        effect
    }

    /// The host takes output again.
    fn drain(&mut self, ctx: &mut Context<'_>) -> Effect {
        let mut port = lock(&self.port);
        let effect = port.flush();
        if !port.stuck || effect != Effect::None {
            port.stuck = false;
            ctx.unwatch(port.outlet.fd());
        }
        port.settle();
        effect
    }

    /// Sends out what has waited since the last tick, and ticks on while there is something to send.
    fn tick(&mut self, ctx: &mut Context<'_>) -> Effect {
        let effect = if self.old { self.flush(ctx) } else { Effect::None };
        let mut port = lock(&self.port);
        self.old = !port.outlet.is_empty();
        let touched = std::mem::take(&mut port.touched);
        port.ticking = !port.stuck && (touched || self.old);
        if port.ticking {
            ctx.arm(TICKED, TICK);
        }
        port.settle();
        effect
    }
}

fn lock(port: &Mutex<Port>) -> MutexGuard<'_, Port> {
    port.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Work for Pump {
    fn arrive(&mut self, ctx: &mut Context<'_>) -> Effect {
        self.take_input(ctx)
    }

    fn ready(&mut self, token: u32, ctx: &mut Context<'_>) -> Effect {
        match token {
            INPUT => match self.read(ctx) {
                Effect::None => self.take_input(ctx),
                effect => effect,
            },
            OUTPUT => self.drain(ctx),
            TICKED => self.tick(ctx),
            _ => Effect::None,
        }
    }
}
