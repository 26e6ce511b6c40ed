//! The guest's end of the wire: starts programs, carries their streams, tells how they ended.
//!
//! One thread and one `poll`: nothing here blocks but the write-back before an exit is told, so a program that
//! does not read, or a host that does not, holds up nobody else.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, wait, waitpid};

use crate::backlog::Backlog;
use crate::clock;
use crate::flow::{Inflow, Outflow};
use crate::kernel_log::KernelLog;
use crate::process::{self, Started};
use crate::wire::{Decoder, FROM_HOST, Frame, MAX_DATA, Malformed, Outcome, Stream, VERSION};

/// With this much waiting to be sent, nothing more is read: not from programs, not from the host.
const HIGH: usize = 256 << 10;
/// Servers of other wires at the most: a host that asks for more is not called.
const OTHERS: usize = 64;
/// An exit waits for what the kernel has said before, up to so many bytes: a kernel may never be quiet.
const LOG: usize = 16 << 20;

/// What a server needs to know of its surroundings.
#[derive(Clone, Debug)]
pub struct Options {
    /// The command that runs [`enter_terminal`](crate::enter_terminal) on the arguments that follow.
    pub trampoline: Vec<OsString>,
    /// This process is PID 1 and reaps whatever ends.
    pub init: bool,
    /// Write file systems back before an exit is told, so that the host finds the files.
    pub sync: bool,
    /// Forget what was cached of files before a program starts, so that it sees what the host has changed.
    pub fresh: bool,
    /// Pass on what the kernel says.
    pub messages: bool,
    /// The command that calls the host and serves the wire that comes of it; empty if there is no way to call.
    pub another: Vec<OsString>,
}

/// Why a server ended in good order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The host asked for it.
    Shutdown,
    /// The host closed the stream.
    Closed,
}

/// A program and what is on its way to and from it.
struct Program {
    pid: Pid,
    pidfd: OwnedFd,
    terminal: Option<OwnedFd>,
    stdin: Option<OwnedFd>,
    /// Input that the program has not taken yet: a window at most.
    waiting: VecDeque<u8>,
    stdin_ended: bool,
    inflow: Inflow,
    outputs: [Output; 2],
    outcome: Option<Outcome>,
    /// How much of the kernel's log was passed on when only this was left to do.
    finished_at: Option<usize>,
}

/// Standard output or standard error.
struct Output {
    stream: Stream,
    /// Gone once it has ended.
    fd: Option<OwnedFd>,
    flow: Outflow,
}

/// What a descriptor in the poll set belongs to.
#[derive(Clone, Copy)]
enum Source {
    Wire,
    Stdin(u32),
    Output(u32),
    Ended,
    Messages,
}

/// The guest's end of a wire.
pub struct Server {
    wire: OwnedFd,
    options: Options,
    decoder: Decoder,
    /// Encoded frames that the wire has not taken yet.
    out: Backlog,
    programs: BTreeMap<u32, Program>,
    messages: Option<KernelLog>,
    /// Bytes of the kernel's log that were passed on.
    passed: usize,
    /// Servers of other wires.
    others: Vec<(Pid, OwnedFd)>,
    greeted: bool,
}

impl Server {
    /// A server on a stream, which it makes non-blocking.
    ///
    /// # Errors
    /// The stream cannot be made non-blocking, or the kernel's log cannot be read.
    pub fn new(wire: OwnedFd, options: Options) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&wire, true)?;
        let mut server = Server {
            wire,
            decoder: Decoder::new(FROM_HOST),
            out: Backlog::default(),
            programs: BTreeMap::new(),
            messages: options.messages.then(KernelLog::open).transpose()?,
            passed: 0,
            options,
            others: Vec::new(),
            greeted: false,
        };
        server.send(&Frame::Hello { version: VERSION });
        Ok(server)
    }

    /// Serves until the host is done. Programs that still run get a `SIGKILL`.
    ///
    /// # Errors
    /// The host broke the protocol, or the stream failed.
    pub fn serve(mut self) -> io::Result<End> {
        let end = self.turn_until_end();
        if matches!(end, Ok(End::Shutdown)) {
            self.pass_messages();
            // The host is about to stop listening: what it does not take at once it does not need.
            let _ = self.flush();
        }
        // The number of one that has been reaped may be somebody else's by now.
        for program in self.programs.values().filter(|program| program.outcome.is_none()) {
            signal_group(program.pid, Signal::KILL);
        }
        end
    }

    fn turn_until_end(&mut self) -> io::Result<End> {
        loop {
            for source in self.wait()? {
                match source {
                    Source::Wire => {
                        self.flush()?;
                        if let Some(end) = self.receive()? {
                            return Ok(end);
                        }
                    }
                    Source::Stdin(id) => self.feed_stdin(id),
                    Source::Output(id) => self.read_outputs(id),
                    Source::Ended => self.reap(),
                    Source::Messages => {
                        self.pass_messages();
                    }
                }
            }
            self.finish();
            self.flush()?;
        }
    }

    /// Waits until something can be done, and says what.
    fn wait(&self) -> io::Result<Vec<Source>> {
        let calm = self.out.len() < HIGH;
        let mut wire = PollFlags::empty();
        wire.set(PollFlags::IN, calm);
        wire.set(PollFlags::OUT, !self.out.is_empty());
        let mut sources = vec![Source::Wire];
        let mut fds = vec![PollFd::new(&self.wire, wire)];
        if let Some(messages) = self.messages.as_ref().filter(|_| calm) {
            sources.push(Source::Messages);
            fds.push(PollFd::new(messages, PollFlags::IN));
        }
        for (id, program) in &self.programs {
            if let Some(fd) = program.stdin.as_ref().filter(|_| !program.waiting.is_empty()) {
                sources.push(Source::Stdin(*id));
                fds.push(PollFd::new(fd, PollFlags::OUT));
            }
            for output in &program.outputs {
                if let Some(fd) = output.fd.as_ref().filter(|_| calm && output.flow.room() > 0) {
                    sources.push(Source::Output(*id));
                    fds.push(PollFd::new(fd, PollFlags::IN));
                }
            }
            if program.outcome.is_none() {
                sources.push(Source::Ended);
                fds.push(PollFd::new(&program.pidfd, PollFlags::IN));
            }
        }
        for (_, pidfd) in &self.others {
            sources.push(Source::Ended);
            fds.push(PollFd::new(pidfd, PollFlags::IN));
        }
        rustix::io::retry_on_intr(|| poll(&mut fds, None))?;
        Ok(sources.into_iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty()).map(|(s, _)| s).collect())
    }

    /// Passes on what the kernel has said, as far as there is room. Whether that is all.
    fn pass_messages(&mut self) -> bool {
        while self.out.len() < HIGH {
            let Some(message) = self.messages.as_mut().and_then(KernelLog::take) else { return true };
            self.passed = self.passed.saturating_add(message.text.len());
            self.send(&Frame::Message(message));
        }
        self.messages.is_none()
    }

    fn send(&mut self, frame: &Frame) {
        frame.encode(self.out.back());
    }

    /// Writes what the wire takes.
    fn flush(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match rustix::io::write(&self.wire, self.out.front()) {
                Ok(n) => self.out.shift(n),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Reads what the wire has and does what it says.
    fn receive(&mut self) -> io::Result<Option<End>> {
        let mut bytes = vec![0; MAX_DATA];
        while self.out.len() < HIGH {
            match rustix::io::read(&self.wire, &mut bytes) {
                Ok(0) | Err(Errno::CONNRESET | Errno::PIPE) => return Ok(Some(End::Closed)),
                Ok(n) => self.decoder.feed(bytes.get(..n).unwrap_or_default()),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            while let Some(frame) = self.decoder.next_frame()? {
                if let Some(end) = self.obey(frame)? {
                    return Ok(Some(end));
                }
            }
        }
        Ok(None)
    }

    fn obey(&mut self, frame: Frame) -> Result<Option<End>, Malformed> {
        if !self.greeted {
            self.greeted = matches!(frame, Frame::Hello { version: VERSION });
            return if self.greeted { Ok(None) } else { Err(Malformed("the host speaks another version")) };
        }
        match frame {
            Frame::Exec { id, exec } => {
                if self.programs.contains_key(&id) {
                    return Err(Malformed("an id is used twice"));
                }
                if self.options.fresh && self.programs.is_empty() {
                    // Best effort: without it, files that the host has changed meanwhile may look old.
                    let _ = std::fs::write("/proc/sys/vm/drop_caches", "3");
                }
                match process::start(&exec, &self.options.trampoline) {
                    Ok(started) => drop(self.programs.insert(id, Program::new(started))),
                    Err(outcome) => self.send(&Frame::Exit { id, outcome }),
                }
            }
            Frame::Data { id, stream: Stream::Stdin, bytes } => {
                // No such program: it has ended, and the host did not know that yet. So below.
                if let Some(program) = self.programs.get_mut(&id).filter(|program| program.stdin.is_some()) {
                    program.inflow.arrived(bytes.len())?;
                    program.waiting.extend(bytes);
                    self.feed_stdin(id);
                }
            }
            Frame::End { id, stream: Stream::Stdin } => {
                if let Some(program) = self.programs.get_mut(&id) {
                    program.end_stdin();
                    self.feed_stdin(id);
                }
            }
            Frame::Stop { id, stream } => {
                if let Some(program) = self.programs.get_mut(&id) {
                    program.stop(stream);
                }
            }
            Frame::Credit { id, stream, bytes } => {
                if let Some(program) = self.programs.get_mut(&id) {
                    let output = program.outputs.iter_mut().find(|output| output.stream == stream);
                    output.ok_or(Malformed("credit was given for stdin"))?.flow.grant(bytes)?;
                }
            }
            Frame::Resize { id, size } => {
                if let Some(master) = self.programs.get(&id).and_then(|program| program.terminal.as_ref()) {
                    // A program on its way out may have lost its terminal; nobody misses the size then.
                    let _ = process::resize(master, size);
                }
            }
            Frame::Signal { id, number } => {
                if let Some(program) = self.programs.get(&id).filter(|program| program.outcome.is_none())
                    && let Some(signal) = Signal::from_named_raw(i32::from(number))
                {
                    signal_group(program.pid, signal);
                }
            }
            Frame::Shutdown => return Ok(Some(End::Shutdown)),
            Frame::Clock { seconds, nanoseconds } => clock::set(seconds, nanoseconds),
            Frame::Call => {
                if self.others.len() < OTHERS
                    && let Some(other) = process::start_another(&self.options.another)
                {
                    self.others.push(other);
                }
            }
            Frame::Hello { .. }
            | Frame::Message(_)
            | Frame::Trouble { .. }
            | Frame::Data { .. }
            | Frame::End { .. }
            | Frame::Exit { .. } => {
                return Err(Malformed("a frame came from the wrong end"));
            }
        }
        Ok(None)
    }

    /// Writes waiting input to a program, and closes its input after the last of it.
    fn feed_stdin(&mut self, id: u32) {
        let Some(program) = self.programs.get_mut(&id) else { return };
        let Some(fd) = program.stdin.as_ref() else { return };
        let mut frame = None;
        while !program.waiting.is_empty() {
            match rustix::io::write(fd, program.waiting.as_slices().0) {
                Ok(n) => {
                    program.waiting.drain(..n);
                    if let Some(bytes) = program.inflow.passed(n) {
                        frame = Some(Frame::Credit { id, stream: Stream::Stdin, bytes });
                    }
                }
                Err(Errno::AGAIN | Errno::INTR) => break,
                Err(_) => {
                    program.stop(Stream::Stdin);
                    frame = Some(Frame::Stop { id, stream: Stream::Stdin });
                    break;
                }
            }
        }
        if program.stdin_ended && program.waiting.is_empty() {
            program.stdin = None;
        }
        if let Some(frame) = frame {
            self.send(&frame);
        }
    }

    /// Reads what a program has written, as far as there is credit. Of a program that has exited, an output ends
    /// when it is empty: what it left running in the background does not keep it open.
    fn read_outputs(&mut self, id: u32) {
        let Some(program) = self.programs.get_mut(&id) else { return };
        for output in &mut program.outputs {
            let stream = output.stream;
            while let Some(fd) =
                output.fd.as_ref().filter(|_| output.flow.room() > 0 && self.out.len() < HIGH)
            {
                let mut bytes = vec![0; output.flow.room()];
                let frame = match rustix::io::read(fd, &mut bytes) {
                    Ok(n) if n > 0 => {
                        bytes.truncate(n);
                        output.flow.sent(n);
                        Frame::Data { id, stream, bytes }
                    }
                    Err(Errno::INTR) => continue,
                    Err(Errno::AGAIN) if program.outcome.is_none() => break,
                    // The last has closed it; on a terminal that is an error (EIO).
                    _ => {
                        output.fd = None;
                        Frame::End { id, stream }
                    }
                };
                frame.encode(self.out.back());
                if program.outcome.is_none() {
                    // One piece per turn, so that everyone gets a turn.
                    break;
                }
            }
        }
    }

    /// Learns which processes have ended.
    fn reap(&mut self) {
        if self.options.init {
            while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
                self.others.retain(|(other, _)| *other != pid);
                if let Some(program) = self.programs.values_mut().find(|program| program.pid == pid) {
                    program.outcome = Some(outcome(status));
                }
            }
        } else {
            self.others.retain(|(pid, _)| !matches!(waitpid(Some(*pid), WaitOptions::NOHANG), Ok(Some(_))));
            for program in self.programs.values_mut().filter(|program| program.outcome.is_none()) {
                if let Ok(Some((_, status))) = waitpid(Some(program.pid), WaitOptions::NOHANG) {
                    program.outcome = Some(outcome(status));
                }
            }
        }
    }

    /// Tells of the programs that have ended and whose output is all sent.
    fn finish(&mut self) {
        let exited: Vec<_> = self
            .programs
            .iter()
            .filter(|(_, program)| program.outcome.is_some())
            .map(|(id, _)| *id)
            .collect();
        for id in exited {
            self.read_outputs(id);
            let done = |program: &&mut Program| program.outputs.iter().all(|output| output.fd.is_none());
            let Some(program) = self.programs.get_mut(&id).filter(done) else { continue };
            if program.finished_at.is_none() && self.options.sync {
                rustix::fs::sync();
            }
            let since = *program.finished_at.get_or_insert(self.passed);
            // What the kernel had to say of it comes before: if there is no room for it now, the wire makes some.
            if !self.pass_messages() && self.passed.saturating_sub(since) < LOG {
                continue;
            }
            if let Some(outcome) = self.programs.remove(&id).and_then(|program| program.outcome) {
                self.send(&Frame::Exit { id, outcome });
            }
        }
    }
}

impl Program {
    fn new(started: Started) -> Self {
        let output = |stream, fd| Output { stream, fd, flow: Outflow::default() };
        Program {
            pid: started.pid,
            pidfd: started.pidfd,
            terminal: started.terminal,
            stdin: started.stdin,
            waiting: VecDeque::new(),
            stdin_ended: false,
            inflow: Inflow::default(),
            outputs: [output(Stream::Stdout, started.stdout), output(Stream::Stderr, started.stderr)],
            outcome: None,
            finished_at: None,
        }
    }

    fn end_stdin(&mut self) {
        self.stdin_ended = true;
        if self.terminal.is_some() && self.stdin.is_some() {
            // A terminal has no end; this is the key that stands for it (VEOF).
            self.waiting.push_back(4);
        }
    }

    /// Closes a stream that the other side does not want. A terminal is hung up as a whole.
    fn stop(&mut self, stream: Stream) {
        if stream == Stream::Stdin {
            self.stdin = None;
            self.waiting.clear();
        }
        for output in self.outputs.iter_mut().filter(|output| output.stream == stream) {
            output.fd = None;
            if self.terminal.take().is_some() {
                self.stdin = None;
            }
        }
    }
}

/// Signals a program and what it has started, or the program alone as long as it has no group of its own.
fn signal_group(pid: Pid, signal: Signal) {
    use rustix::process::{kill_process, kill_process_group};
    if kill_process_group(pid, signal).is_err() {
        // It may have ended this very moment, which is no error.
        let _ = kill_process(pid, signal);
    }
}

fn outcome(status: WaitStatus) -> Outcome {
    let small = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
    match (status.exit_status(), status.terminating_signal()) {
        (_, Some(signal)) => Outcome::Signal(small(signal)),
        (code, None) => Outcome::Code(code.map_or(u8::MAX, small)),
    }
}

#[cfg(test)]
mod tests;
