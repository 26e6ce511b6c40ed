//! The serial port COM1: a 16550A whose line ends in a terminal, a pseudo-terminal or a file.
//!
//! Output is never lost: it goes to the host at the end of each line, when the guest says that it has no more, or
//! 5 to 10 ms after it was written; while the host takes nothing, the guest is told to wait. Input is taken from
//! the host only when the guest has read all that was taken before, a few FIFOs at a time. When the reader of the output goes away (`| head`), the run ends
//! as if the operator had asked for it, as other tools do.

mod pump;
mod uart;

use std::collections::VecDeque;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use base::bus::{Effect, Registers};
use base::host::{Host, Stream};
use base::irq::SharedLine;
use base::lane::Handle;
use base::node::Node;
use base::{Doing, Fail, Result, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::pump::Pump;
use self::uart::Uart;
use crate::catalog::{Body, Chip, Kind, Kit, Lazy, Presence, Purpose, Space, Window};
use crate::line_end::{self, Chosen, LineEnd};
use crate::outlet::{Flow, Outlet};

const PORT: u16 = 0x3f8;
/// The transmitter, and the interrupt enable register as long as it enables nothing: a polling console writes a
/// zero to it before and after each line. The divisor latch has the same addresses; it is reached only after a write
/// to another register, which hands over everything before it.
const LAZY: &[Lazy] =
    &[Lazy { address: PORT as u64, only: None }, Lazy { address: PORT as u64 + 1, only: Some(0) }];
const PORTS: u16 = 8;
const IRQ: u32 = 4;

/// A place where the line may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum To {
    /// Standard input and output; a terminal is set to raw mode, `Ctrl-a x` ends the run.
    Stdio,
    /// A new pseudo-terminal, whose name is printed. What nobody reads there is forgotten, the oldest first.
    Pty,
    /// Nowhere: output is thrown away and there is no input. A kernel's last words are heard all the same.
    None,
}

/// The serial port.
pub struct This;

impl Kind for This {
    type Spec = LineEnd<To>;
    const NAME: &'static str = "serial";
    const FLAG: &'static str = "serial";
    const SUMMARY: &'static str = "where the serial port COM1 (ttyS0) leads: stdio, pty, none or file=PATH";
    const BARE: &'static str = "to";
    const EXAMPLE: &'static str = "stdio";
    const PRESENCE: Presence = Presence::Standard("stdio");

    fn check(spec: &LineEnd<To>, name: &str) -> Result<()> {
        spec.check(name)
    }

    fn claim(spec: &LineEnd<To>, name: &str, host: &dyn Host) -> Result<Vec<File>> {
        Ok(spec.claim(name, host)?.into_iter().collect())
    }

    fn terminal(spec: &LineEnd<To>) -> Option<&'static str> {
        (!matches!(spec.to, Some(To::None))).then_some("ttyS0")
    }

    fn serve(purpose: Purpose<'_>) -> Option<LineEnd<To>> {
        matches!(purpose, Purpose::Console).then_some(LineEnd { to: Some(To::None), file: None })
    }

    fn build(spec: &LineEnd<To>, kit: &Kit<'_>) -> Result<Body> {
        let (stream, forgetful) = open(spec, kit)?;
        let outlet =
            Outlet::new(stream.output).doing(Why::Host, || format!("look at the output of {}", kit.name))?;
        let outlet = if forgetful { outlet.forgetful() } else { outlet };
        let port = Arc::new(Mutex::new(Port::new(outlet, (kit.lines)(IRQ))));
        let pump = kit.lane.adopt(Pump::new(port.clone(), stream.input, stream.terminal));
        let last = port.clone();
        let name = format!("{} output", kit.name);
        Ok(Body::Chip(Chip {
            windows: vec![Window {
                space: Space::Port,
                base: u64::from(PORT),
                len: u64::from(PORTS),
                lazy: LAZY,
                registers: Box::new(Front { port, pump }),
            }],
            node: Some(Node {
                name: "COM1".to_owned(),
                hid: "PNP0501",
                uid: 0,
                ports: vec![PORT..=PORT + PORTS - 1],
                memory: Vec::new(),
                irqs: vec![IRQ],
            }),
            console: Some(u64::from(PORT)),
            finish: Some(Box::new(move |patience| {
                last.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .outlet
                    .finish(&name, patience)
                    .map(meaning)
            })),
        }))
    }
}

/// The stream at the end of the line, and whether it forgets what nobody reads.
fn open(spec: &LineEnd<To>, kit: &Kit<'_>) -> Result<(Stream, bool)> {
    let output = |file: File| (Stream { input: None, output: file.into(), terminal: false }, false);
    Ok(match spec.choose(To::Stdio, kit.name, kit.host)? {
        Chosen::File(file) => output(file),
        Chosen::Place(To::Stdio) => (kit.host.stdio(kit.name)?, false),
        Chosen::Place(To::Pty) => (kit.host.pty(kit.name)?, true),
        Chosen::Place(To::None) => output(line_end::empty(Path::new("/dev/null"), kit.name, kit.host)?),
    })
}

/// What the way of the output means for the run.
fn meaning(flow: Flow) -> Effect {
    match flow {
        Flow::Drained | Flow::Stuck => Effect::None,
        Flow::Closed => Effect::Quit,
        Flow::Broken(error) => {
            Effect::Broken(Fail::new(Why::Host, "write the serial output").because(error).summary())
        }
    }
}

/// What vCPUs and the lane share: the registers, the way out, and who waits for what.
struct Port {
    uart: Uart,
    outlet: Outlet,
    /// Input that the receive FIFO has no room for.
    typed: VecDeque<u8>,
    line: SharedLine,
    /// The level of the interrupt output when it was last looked at.
    high: bool,
    /// The lane waits until the host takes output.
    stuck: bool,
    /// The lane looks again after a while for output without an end of line.
    ticking: bool,
    /// Output has come since it last looked.
    touched: bool,
    /// The lane takes no input until the guest has read what it has.
    starved: bool,
}

impl Port {
    fn new(outlet: Outlet, line: SharedLine) -> Port {
        Port {
            uart: Uart::default(),
            outlet,
            typed: VecDeque::new(),
            line,
            high: false,
            stuck: false,
            ticking: false,
            touched: false,
            starved: false,
        }
    }

    /// Writes out what the host takes.
    fn flush(&mut self) -> Effect {
        let flow = self.outlet.flush();
        match flow {
            Flow::Drained => self.stuck = false,
            Flow::Stuck => self.stuck = true,
            Flow::Closed | Flow::Broken(_) => {}
        }
        meaning(flow)
    }

    /// Brings the registers and the interrupt line in step with the outlet.
    fn settle(&mut self) {
        self.uart.set_ready(self.outlet.has_room());
        let high = self.uart.interrupts();
        if high && !self.high {
            self.line.pulse();
        }
        self.high = high;
    }

    /// Fills the receive FIFO with the input that waits. An interrupt output that fell when the guest read the last
    /// byte has to be settled before: otherwise it would not rise again for the next.
    fn fill(&mut self) {
        while self.uart.room() > 0
            && let Some(byte) = self.typed.pop_front()
        {
            self.uart.receive(byte);
        }
        self.settle();
    }
}

/// The vCPU's side.
struct Front {
    port: Arc<Mutex<Port>>,
    pump: Handle<Pump>,
}

impl Registers for Front {
    fn read(&mut self, at: u64, data: &mut [u8]) {
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        for (register, byte) in (at..).zip(data) {
            *byte = port.uart.read(register);
        }
        port.settle();
        self.feed(&mut port);
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        for (register, byte) in (at..).zip(data) {
            if let Some(sent) = port.uart.write(register, *byte) {
                port.outlet.push(sent);
                port.touched = true;
            }
        }
        let mut effect = Effect::None;
        let due = port.uart.take_finished() || port.outlet.is_due();
        if due && !port.stuck && !port.outlet.is_empty() {
            effect = port.flush();
            if port.stuck {
                self.pump.post(Pump::wait_for_output);
            }
        }
        if !port.outlet.is_empty() && !port.stuck && !port.ticking {
            port.ticking = true;
            self.pump.post(Pump::start_ticking);
        }
        port.settle();
        self.feed(&mut port);
        effect
    }
}

impl Front {
    /// Gives the guest the input that waits, and asks the lane for more once it has read all.
    ///
    /// To wake the lane for each FIFO of 16 bytes would make input as slow as the host's scheduler is: seconds for a
    /// few pages where the host is busy.
    fn feed(&self, port: &mut Port) {
        if !port.typed.is_empty() {
            port.fill();
        }
        if port.starved && port.uart.has_read_all() && port.uart.room() > 0 {
            port.starved = false;
            self.pump.post(Pump::take_input);
        }
    }
}

#[cfg(test)]
mod tests;
