//! The host's end of a console: a stream that is there from the start, or a program that connects and leaves.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base::host::{Listener, Stream};
use base::{Doing, Result, Why};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use super::To;
use crate::catalog::Kit;
use crate::inlet::Inlet;
use crate::line_end::{self, Chosen, LineEnd};
use crate::outlet::{Flow, Outlet, ROOM};

/// The host's end.
pub struct Line {
    way: Way,
    /// Bytes for the guest come from here.
    pub input: Option<Inlet>,
    terminal: bool,
}

enum Way {
    /// A stream. Whoever ends the run writes out the rest.
    Fixed(Arc<Mutex<Outlet>>),
    /// Whoever connects.
    Called {
        listener: Listener,
        caller: Option<Outlet>,
        /// The last bytes that nobody was there to read.
        kept: VecDeque<u8>,
        forgetful: bool,
    },
}

fn lock(outlet: &Mutex<Outlet>) -> MutexGuard<'_, Outlet> {
    outlet.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Line {
    /// Opens the end that was chosen.
    ///
    /// # Errors
    /// As the host answers.
    pub fn open(end: &LineEnd<To>, kit: &Kit<'_>) -> Result<Line> {
        let output = |file: std::fs::File| Stream { input: None, output: file.into(), terminal: false };
        let (stream, forgetful) = match end.choose(To::Stdio, kit.name, kit.host)? {
            Chosen::File(file) => (output(file), false),
            Chosen::Place(To::Stdio) => (kit.host.stdio(kit.name)?, false),
            Chosen::Place(To::Pty) => (kit.host.pty(kit.name)?, true),
            Chosen::Place(To::None) => {
                (output(line_end::empty(Path::new("/dev/null"), kit.name, kit.host)?), false)
            }
        };
        let outlet =
            Outlet::new(stream.output).doing(Why::Host, || format!("look at the output of {}", kit.name))?;
        let outlet = if forgetful { outlet.forgetful() } else { outlet };
        let way = Way::Fixed(Arc::new(Mutex::new(outlet)));
        Ok(Line { way, input: stream.input.map(Inlet::new), terminal: stream.terminal })
    }

    /// An end for whoever connects to `listener`. A `forgetful` one never asks the guest to wait.
    pub fn called(listener: Listener, forgetful: bool) -> Line {
        let way = Way::Called { listener, caller: None, kept: VecDeque::new(), forgetful };
        Line { way, input: None, terminal: false }
    }

    /// Whether the operator sits at it.
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// The way out that is to be finished when the guest has ended.
    pub fn outlet(&self) -> Option<Arc<Mutex<Outlet>>> {
        match &self.way {
            Way::Fixed(outlet) => Some(outlet.clone()),
            Way::Called { .. } => None,
        }
    }

    /// Where callers come from, if it is a line for callers.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        match &self.way {
            Way::Called { listener, .. } => Some(listener.socket.as_fd()),
            Way::Fixed(_) => None,
        }
    }

    /// Whether somebody is there.
    pub fn is_connected(&self) -> bool {
        !matches!(&self.way, Way::Called { caller: None, .. })
    }

    fn with<R>(&mut self, work: impl FnOnce(&mut Outlet) -> R) -> Option<R> {
        match &mut self.way {
            Way::Fixed(outlet) => Some(work(&mut lock(outlet))),
            Way::Called { caller, .. } => caller.as_mut().map(work),
        }
    }

    /// Takes the caller that waits, if there is one.
    ///
    /// # Errors
    /// As `accept(2)`.
    pub fn accept(&mut self) -> std::io::Result<()> {
        let Way::Called { listener, caller, kept, forgetful } = &mut self.way else { return Ok(()) };
        let socket = match accept_with(&listener.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => socket,
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let input = socket.try_clone()?;
        let mut outlet = Outlet::new(socket)?;
        if *forgetful {
            outlet = outlet.forgetful();
        }
        kept.drain(..).for_each(|byte| outlet.push(byte));
        *caller = Some(outlet);
        self.input = Some(Inlet::new(input));
        Ok(())
    }

    /// Lets the caller go.
    pub fn hang_up(&mut self) {
        if let Way::Called { caller, .. } = &mut self.way {
            *caller = None;
            self.input = None;
        }
    }

    /// Takes bytes of the guest's.
    pub fn push(&mut self, bytes: &[u8]) {
        if let Way::Called { caller: None, kept, .. } = &mut self.way {
            kept.extend(bytes);
            let over = kept.len().saturating_sub(ROOM);
            kept.drain(..over);
        } else {
            self.with(|outlet| bytes.iter().for_each(|byte| outlet.push(*byte)));
        }
    }

    /// Whether the guest may go on writing.
    pub fn has_room(&mut self) -> bool {
        self.with(|outlet| outlet.has_room()).unwrap_or(true)
    }

    /// Writes out what the host takes.
    pub fn flush(&mut self) -> Flow {
        self.with(|outlet| if outlet.is_empty() { Flow::Drained } else { outlet.flush() })
            .unwrap_or(Flow::Drained)
    }

    /// Calls `work` with the descriptor of the way out, if there is one.
    pub fn with_output<R>(&mut self, work: impl FnOnce(BorrowedFd<'_>) -> R) -> Option<R> {
        self.with(|outlet| work(outlet.fd()))
    }
}
