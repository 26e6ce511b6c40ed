//! The device: bytes from the queues to the host's end of the line and back.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use base::bus::Effect;
use base::host::Screen;
use base::host::socket::is_hung_up;
use base::lane::Interest;
use base::meter::Counter;
use base::{Fail, Fault, Result, Why};
use rustix::io::Errno;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::line::Line;
use super::port::Port;
use crate::catalog::{Finish, Kit, Overhear};
use crate::escape::{CTRL_A, Escape, HELP, Key};
use crate::outlet::Flow;
use crate::virtio::{Chain, Device, Io, Meters};

/// Queues: bytes to the guest and from it; control messages likewise, of a named port.
const RX: u16 = 0;
const TX: u16 = 1;
const CONTROL_RX: u16 = 2;
const CONTROL_TX: u16 = 3;
const QUEUES: [u16; 4] = [64, 64, 16, 16];

/// Section 5.3.3.
const F_SIZE: u64 = 1 << 0;
const F_MULTIPORT: u64 = 1 << 1;

const INPUT: u16 = 0;
const OUTPUT: u16 = 1;
const CALLER: u16 = 2;
const SCREEN: u16 = 3;
const AGAIN: u16 = 4;

/// Bytes from the guest in one visit: a chain may claim gigabytes, and others use this lane too.
const SHARE: u64 = 1 << 20;
/// Bytes moved at once.
const PIECE: usize = 4096;
/// Key strokes kept for a guest that reads slowly: the escape key behind them is to be found all the same.
const TYPED_AHEAD: usize = 1 << 20;
/// How soon a host that refuses a caller is asked again.
const PAUSE: Duration = Duration::from_millis(100);
/// What a break is to Linux's hvc: the SysRq key follows.
const CTRL_O: u8 = 0x0f;

/// A virtio console with one port.
pub struct Console {
    name: String,
    line: Line,
    /// Present when it has a name, and is no console then.
    port: Option<Port>,
    /// The driver knows ports.
    ported: bool,
    /// Present when the input is the operator's terminal.
    escape: Option<Escape>,
    screen: Option<Screen>,
    overhear: Overhear,
    /// Input that the guest has no room for yet.
    typed: VecDeque<u8>,
    /// Room of the guest's for input that has not come yet.
    room: Option<Chain>,
    /// Output that the host has no room for yet: from this byte on.
    output: Option<(Chain, u64)>,
    /// How the input is waited for; `None` until that was tried.
    pollable: Option<bool>,
    listening: bool,
    /// The caller has ended its half: it may still read, and hang up.
    half: bool,
    awaiting: bool,
    stuck: bool,
    rx_bytes: Arc<Counter>,
    tx_bytes: Arc<Counter>,
}

impl Console {
    /// A console at the end of `line`.
    pub fn new(line: Line, port: Option<Port>, screen: Option<Screen>, kit: &Kit<'_>) -> Console {
        let escape = line.is_terminal().then(Escape::default);
        let mut port = port;
        if let Some(port) = &mut port {
            port.connect(line.is_connected());
        }
        Console {
            name: kit.name.to_owned(),
            line,
            port,
            ported: false,
            escape,
            screen,
            overhear: kit.overhear.clone(),
            typed: VecDeque::new(),
            room: None,
            output: None,
            pollable: None,
            listening: false,
            half: false,
            awaiting: false,
            stuck: false,
            rx_bytes: Arc::default(),
            tx_bytes: Arc::default(),
        }
    }

    /// Takes output from the guest, as much as the host takes.
    fn take(&mut self, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        let mut share = SHARE;
        loop {
            if !self.line.has_room() {
                self.flush(io);
                if !self.line.has_room() {
                    return Ok(());
                }
            }
            let next = match self.output.take() {
                None => io.next(TX)?.map(|chain| (chain, 0)),
                rest => rest,
            };
            let Some((chain, at)) = next else {
                self.flush(io);
                return Ok(());
            };
            let end = self.carry(&chain, at, share, io);
            share = share.saturating_sub(end.saturating_sub(at));
            if end >= chain.readable().len() {
                io.done(chain, 0);
            } else {
                self.output = Some((chain, end));
            }
            if share == 0 {
                self.flush(io);
                io.arm(AGAIN, Duration::ZERO);
                return Ok(());
            }
        }
    }

    /// Takes bytes of `chain` from `at` on, while there is room for them and at most `share`; up to which one.
    fn carry(&mut self, chain: &Chain, at: u64, share: u64, io: &Io<'_>) -> u64 {
        let mut end = at;
        while self.line.has_room() && end.saturating_sub(at) < share {
            let mut bytes = [0; PIECE];
            let len = chain.readable().read(io.ram(), end, &mut bytes);
            let bytes = bytes.get(..len).unwrap_or_default();
            if bytes.is_empty() {
                break;
            }
            if self.port.is_none() {
                (self.overhear)(bytes);
            }
            self.line.push(bytes);
            end = end.saturating_add(len as u64);
        }
        self.tx_bytes.add(end.saturating_sub(at));
        end
    }

    /// Writes out what the host takes, and waits for it if that is not all.
    fn flush(&mut self, io: &mut Io<'_>) {
        match self.line.flush() {
            Flow::Drained => self.wait(false, io),
            Flow::Stuck => self.wait(true, io),
            Flow::Closed | Flow::Broken(_) if self.line.listener().is_some() => self.hang_up(io),
            flow => {
                self.wait(false, io);
                io.ask(meaning(&self.name, flow));
            }
        }
    }

    /// Waits, or waits no more, for the host to take output.
    fn wait(&mut self, stuck: bool, io: &mut Io<'_>) {
        if stuck == std::mem::replace(&mut self.stuck, stuck) {
            return;
        }
        self.line.with_output(|output| {
            if !stuck {
                io.unwatch(output);
            } else if io.watch(output, OUTPUT, Interest::Writable).is_err() {
                // It cannot be waited for: ask again after a while.
                self.stuck = false;
                io.arm(AGAIN, PAUSE);
            }
        });
    }

    /// Gives the guest the input there is, then waits for more input or for more room.
    fn feed(&mut self, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        loop {
            if self.room.is_none() {
                self.room = io.next(RX)?;
            }
            let open = !self.ported || self.port.as_ref().is_some_and(|port| port.open);
            if !self.typed.is_empty()
                && let Some(chain) = self.room.take()
            {
                self.give(chain, io);
                continue;
            }
            // A terminal is always listened to: the operator may want to quit a guest that does not.
            let wanted = open && self.room.is_some() || self.escape.is_some();
            if self.half {
                return Ok(());
            }
            if !wanted {
                self.unlisten(io);
                return Ok(());
            }
            // What cannot be waited for is always ready.
            if self.listen(io) || self.line.input.is_none() || self.room.is_none() || !open {
                return Ok(());
            }
            self.read(io);
        }
    }

    fn give(&mut self, chain: Chain, io: &mut Io<'_>) {
        let most = usize::try_from(chain.writable().len()).unwrap_or(usize::MAX);
        let len = self.typed.len().min(most).min(PIECE);
        let bytes: Vec<u8> = self.typed.drain(..len).collect();
        chain.writable().write(io.ram(), 0, &bytes);
        self.rx_bytes.add(len as u64);
        io.done(chain, u32::try_from(len).unwrap_or(0));
    }

    /// Waits for input; `false` if that is impossible because it is always ready, or gone.
    fn listen(&mut self, io: &mut Io<'_>) -> bool {
        let Some(input) = &self.line.input else { return false };
        if !self.listening && self.pollable != Some(false) {
            self.listening = io.watch(input, INPUT, Interest::Readable).is_ok();
            self.pollable = Some(self.listening);
        }
        self.listening
    }

    fn unlisten(&mut self, io: &mut Io<'_>) {
        if let Some(input) = self.line.input.as_ref().filter(|_| self.listening) {
            io.unwatch(input);
            self.listening = false;
        }
    }

    /// Reads once.
    fn read(&mut self, io: &mut Io<'_>) {
        let Some(input) = &mut self.line.input else { return };
        if self.half {
            if is_hung_up(&*input) {
                self.hang_up(io);
            }
            return;
        }
        let mut bytes = [0; PIECE];
        match input.read(&mut bytes) {
            Ok(len) if len > 0 => self.hear(bytes.get(..len).unwrap_or_default(), io),
            Err(Errno::INTR | Errno::AGAIN) if self.listening => {}
            Ok(_) | Err(Errno::IO | Errno::CONNRESET) => self.close(io),
            Err(error) => {
                log::warn!(target: "guest", "read the input of {}: {error}; going on without", self.name);
                self.close(io);
            }
        }
    }

    /// The input has ended. A caller may have ended only its half, and still listen.
    fn close(&mut self, io: &mut Io<'_>) {
        self.unlisten(io);
        let Some(input) = &self.line.input else { return };
        if self.line.listener().is_none() {
            self.line.input = None;
        } else if is_hung_up(input) || io.watch(input, INPUT, Interest::Changes).is_err() {
            self.hang_up(io);
        } else {
            self.half = true;
        }
    }

    /// Key strokes, or bytes of a program.
    fn hear(&mut self, bytes: &[u8], io: &mut Io<'_>) {
        let Some(escape) = &mut self.escape else { return self.typed.extend(bytes) };
        let mut help = false;
        for byte in bytes {
            match escape.feed(*byte) {
                Key::Wait => {}
                Key::Quit => return io.ask(Effect::Quit),
                Key::Type(byte) => self.typed.push_back(byte),
                Key::TypeEscaped(byte) => self.typed.extend([CTRL_A, byte]),
                Key::Break => self.typed.push_back(CTRL_O),
                Key::Help => help = true,
            }
        }
        self.typed.truncate(TYPED_AHEAD);
        if help {
            self.line.push(HELP.as_bytes());
            self.flush(io);
        }
    }

    /// Waits for a caller, if this is a line for callers and there is none.
    fn await_caller(&mut self, io: &mut Io<'_>) {
        let Some(listener) = self.line.listener().filter(|_| !self.awaiting && !self.line.is_connected())
        else {
            return;
        };
        self.awaiting = io.watch(listener, CALLER, Interest::Readable).is_ok();
        if !self.awaiting {
            io.arm(AGAIN, PAUSE);
        }
    }

    fn await_nobody(&mut self, io: &mut Io<'_>) {
        if let Some(listener) = self.line.listener() {
            io.unwatch(listener);
        }
        self.awaiting = false;
    }

    fn accept(&mut self, io: &mut Io<'_>) {
        let accepted = self.line.accept();
        if accepted.is_ok() && !self.line.is_connected() {
            return;
        }
        self.await_nobody(io);
        if accepted.is_err() {
            // Out of descriptors, most likely.
            return io.arm(AGAIN, PAUSE);
        }
        (self.pollable, self.listening) = (None, false);
        if let Some(port) = &mut self.port {
            port.connect(true);
        }
    }

    /// The caller has gone: the next one may come.
    fn hang_up(&mut self, io: &mut Io<'_>) {
        self.unlisten(io);
        self.wait(false, io);
        if let Some(input) = self.line.input.as_ref().filter(|_| self.half) {
            io.unwatch(input);
        }
        self.half = false;
        self.line.hang_up();
        self.typed.clear();
        if let Some(port) = &mut self.port {
            port.connect(false);
        }
        self.await_caller(io);
    }

    /// Control messages, from the guest and to it.
    fn control(&mut self, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        let Some(port) = self.port.as_mut().filter(|_| self.ported) else { return Ok(()) };
        loop {
            while port.has_message() {
                let Some(chain) = io.next(CONTROL_RX)? else { return Ok(()) };
                let message = port.next().unwrap_or_default();
                let written = chain.writable().write(io.ram(), 0, &message);
                io.done(chain, u32::try_from(written).unwrap_or(0));
            }
            let Some(chain) = io.next(CONTROL_TX)? else { return Ok(()) };
            let mut message = [0; 8];
            if chain.readable().read(io.ram(), 0, &mut message) == message.len() && port.has_room() {
                port.hear(message);
            }
            io.done(chain, 0);
        }
    }

    fn look_at_screen(&mut self, io: &mut Io<'_>) {
        if let Some(screen) = &self.screen {
            // Only that there was a change is of interest.
            let _ = rustix::io::read(&screen.changed, &mut [0; 512]);
            io.reconfigured();
        }
    }
}

/// What the way of the output means for the run.
fn meaning(name: &str, flow: Flow) -> Effect {
    match flow {
        Flow::Drained | Flow::Stuck => Effect::None,
        Flow::Closed => Effect::Quit,
        Flow::Broken(error) => {
            let fail = Fail::new(Why::Host, format!("write the output of {name}"));
            Effect::Broken(fail.because(error).summary())
        }
    }
}

impl Device for Console {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        let size = if self.screen.is_some() { F_SIZE } else { 0 };
        size | if self.port.is_some() { F_MULTIPORT } else { 0 }
    }

    fn queues(&self) -> &[u16] {
        let (console, port) = (QUEUES.get(..2).unwrap_or_default(), QUEUES.as_slice());
        if self.port.is_some() { port } else { console }
    }

    fn config(&self) -> Vec<u8> {
        let (columns, rows) = self.screen.as_ref().and_then(|screen| (screen.size)()).unwrap_or((0, 0));
        let ports = 1u32;
        [columns.to_le_bytes().as_slice(), &rows.to_le_bytes(), &ports.to_le_bytes(), &[0; 4]].concat()
    }

    fn start(&mut self, features: u64, io: &mut Io<'_>) -> Result<()> {
        self.ported = features & F_MULTIPORT != 0;
        if let Some(screen) = &self.screen
            && io.watch(&screen.changed, SCREEN, Interest::Readable).is_err()
        {
            log::warn!(target: "guest", "{}: changes of the terminal's size are not heard of", self.name);
        }
        self.await_caller(io);
        Ok(())
    }

    fn kick(&mut self, queue: u16, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        match queue {
            RX => self.feed(io),
            TX => self.take(io),
            _ => {
                self.control(io)?;
                // The guest may have opened the port.
                self.feed(io)
            }
        }
    }

    fn ready(&mut self, token: u16, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        match token {
            INPUT => self.read(io),
            OUTPUT => self.take(io)?,
            CALLER => {
                self.accept(io);
                self.flush(io);
                self.take(io)?;
            }
            SCREEN => self.look_at_screen(io),
            AGAIN => {
                self.await_caller(io);
                self.take(io)?;
            }
            _ => {}
        }
        self.control(io)?;
        self.feed(io)
    }

    fn stop(&mut self, io: &mut Io<'_>) {
        self.unlisten(io);
        self.wait(false, io);
        self.await_nobody(io);
        if let Some(screen) = &self.screen {
            io.unwatch(&screen.changed);
        }
        io.disarm(AGAIN);
        (self.room, self.output) = (None, None);
        if let Some(port) = &mut self.port {
            port.reset();
        }
    }

    fn last_duty(&mut self) -> Option<Finish> {
        let outlet = self.line.outlet()?;
        let name = self.name.clone();
        Some(Box::new(move |patience| {
            let mut outlet = outlet.lock().unwrap_or_else(PoisonError::into_inner);
            outlet.finish(&format!("{name} output"), patience).map(|flow| meaning(&name, flow))
        }))
    }

    fn meters(&self) -> Meters {
        vec![("rx_bytes", self.rx_bytes.clone()), ("tx_bytes", self.tx_bytes.clone())]
    }
}
