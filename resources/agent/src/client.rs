//! The host's end of the wire: runs programs in the guest as if they ran here.
//!
//! One thread reads the wire and never waits for anything else; each stream of each program has a thread that
//! carries it, so a reader of ours that is slow holds up its own program only.

mod remote;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::retry_on_intr;

use crate::flow::{Inflow, Outflow};
use crate::heard::{Heard, Said};
use crate::wire::{Decoder, Exec, FROM_GUEST, Frame, MAX_DATA, Malformed, Outcome, Stream, VERSION};

/// The host's end of a wire. Dropping it cuts the wire.
pub struct Client {
    link: Arc<Link>,
    reader: Option<thread::JoinHandle<()>>,
    next: AtomicU32,
}

/// What all threads of a client share.
struct Link {
    wire: OwnedFd,
    /// Held while a frame is written, so that frames do not mix.
    writing: Mutex<()>,
    programs: Mutex<Programs>,
    heard: Heard,
}

#[derive(Default)]
struct Programs {
    running: HashMap<u32, Arc<Shared>>,
    /// Why the wire is dead, once it is.
    broken: Option<String>,
}

/// A running program, as its threads see it.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Readable once no more input is wanted; wakes the thread that waits for input.
    satisfied: OwnedFd,
}

#[derive(Default)]
struct State {
    stdin: Outflow,
    /// The program takes no more input.
    stdin_closed: bool,
    stdout: Pending,
    stderr: Pending,
    /// Why output could not be written, the first time.
    refused: Option<rustix::io::Errno>,
    end: Option<Result<Outcome, String>>,
}

/// Output that has arrived and is not written yet.
#[derive(Default)]
struct Pending {
    bytes: VecDeque<u8>,
    flow: Inflow,
    ended: bool,
}

/// The descriptors that a program's streams are tied to. Without one, input is empty and output is dropped.
#[derive(Debug, Default)]
pub struct Streams {
    /// Read for standard input.
    pub stdin: Option<OwnedFd>,
    /// Written with standard output, and with all output of a program on a terminal.
    pub stdout: Option<OwnedFd>,
    /// Written with standard error.
    pub stderr: Option<OwnedFd>,
}

/// A program in the guest that was asked for; [`Process::wait`] tells how it ended.
pub struct Process {
    remote: Remote,
    shared: Arc<Shared>,
    carriers: Vec<thread::JoinHandle<()>>,
    input: Option<thread::JoinHandle<()>>,
}

/// Tells what became of a program's output, also after the wait for the program.
pub struct Outputs(Arc<Shared>);

impl Outputs {
    /// Why some of it could not be written, if so.
    pub fn error(&self) -> Option<io::Error> {
        lock(&self.0.state).refused.map(io::Error::from)
    }
}

/// A way to reach a program that another thread waits for.
#[derive(Clone)]
pub struct Remote {
    link: Arc<Link>,
    id: u32,
}

/// Locks whatever a panicking thread may have left locked: every change below is complete in itself.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Client {
    /// Waits for the guest's greeting on `wire`, returns it and starts to listen.
    ///
    /// # Errors
    /// The guest is gone, speaks something else, or says nothing for so long (`TimedOut`).
    pub fn connect(wire: OwnedFd, patience: Duration) -> io::Result<Client> {
        Client::listening(wire, patience, Box::new(|_| ()))
    }

    /// As [`Client::connect`]; `heard` is told what the guest says.
    ///
    /// # Errors
    /// As there; or the guest cannot be set up, and says why.
    pub fn listening(wire: OwnedFd, patience: Duration, heard: Heard) -> io::Result<Client> {
        // Over all of it: a guest must not gain time with each byte.
        let start = Instant::now();
        let mut decoder = Decoder::new(FROM_GUEST);
        let mut bytes = [0; 256];
        let greeting = loop {
            if let Some(frame) = decoder.next_frame()? {
                break frame;
            }
            let left = patience.saturating_sub(start.elapsed());
            let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            if retry_on_intr(|| poll(&mut [PollFd::new(&wire, PollFlags::IN)], Some(&left)))? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match retry_on_intr(|| rustix::io::read(&wire, &mut bytes))? {
                0 => {
                    let why = "it ended before it said anything";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
                }
                n => decoder.feed(bytes.get(..n).unwrap_or_default()),
            }
        };
        match greeting {
            Frame::Hello { version: VERSION } => {}
            Frame::Hello { .. } => return Err(Malformed("the guest speaks another version").into()),
            Frame::Trouble { text } => {
                return Err(io::Error::other(String::from_utf8_lossy(&text).into_owned()));
            }
            _ => return Err(Malformed("the guest does not greet").into()),
        }
        let link = Arc::new(Link { wire, writing: Mutex::default(), programs: Mutex::default(), heard });
        link.send(&Frame::Hello { version: VERSION })?;
        let reader = thread::Builder::new().name("wire".into()).spawn({
            let link = link.clone();
            move || {
                let why = match link.listen(decoder) {
                    Ok(()) => "the guest is gone".to_owned(),
                    Err(error) => error.to_string(),
                };
                link.fail(&why);
            }
        })?;
        Ok(Client { link, reader: Some(reader), next: AtomicU32::new(1) })
    }

    /// Asks for a program and ties its streams to `streams`.
    ///
    /// # Errors
    /// The wire is dead, or the host is out of threads or descriptors. That the program cannot be started is an
    /// [`Outcome`].
    pub fn start(&self, exec: Exec, streams: Streams) -> io::Result<Process> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            satisfied: eventfd(0, EventfdFlags::CLOEXEC)?,
        });
        {
            let mut programs = lock(&self.link.programs);
            if let Some(why) = &programs.broken {
                return Err(io::Error::new(io::ErrorKind::BrokenPipe, why.clone()));
            }
            programs.running.insert(id, shared.clone());
        }
        let remote = Remote { link: self.link.clone(), id };
        self.link.send(&Frame::Exec { id, exec })?;
        let mut process = Process { remote, shared, carriers: Vec::new(), input: None };
        match streams.stdin {
            Some(from) => process.input = Some(process.carry("stdin", move |it| it.carry_input(&from))?),
            None => self.link.send(&Frame::End { id, stream: Stream::Stdin })?,
        }
        for (stream, to, name) in
            [(Stream::Stdout, streams.stdout, "stdout"), (Stream::Stderr, streams.stderr, "stderr")]
        {
            let carrier = process.carry(name, move |it| it.carry_output(stream, to))?;
            process.carriers.push(carrier);
        }
        Ok(process)
    }

    /// Tells the guest what time it is.
    ///
    /// # Errors
    /// The wire is dead.
    pub fn set_clock(&self, since_1970: Duration) -> io::Result<()> {
        self.link
            .send(&Frame::Clock { seconds: since_1970.as_secs(), nanoseconds: since_1970.subsec_nanos() })
    }

    /// Asks the guest to write everything to disk and power off. Does not wait for it.
    ///
    /// # Errors
    /// The wire is dead.
    pub fn shut_down(&self) -> io::Result<()> {
        self.link.send(&Frame::Shutdown)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // Ends the reader's `read`. Not a socket: then the reader ends when the guest does.
        if rustix::net::shutdown(&self.link.wire, rustix::net::Shutdown::Both).is_ok() {
            self.reader.take().map(thread::JoinHandle::join);
        }
    }
}

impl Link {
    fn send(&self, frame: &Frame) -> io::Result<()> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        let _guard = lock(&self.writing);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let n = retry_on_intr(|| rustix::io::write(&self.wire, rest))?;
            rest = rest.get(n..).unwrap_or_default();
        }
        Ok(())
    }

    /// Reads frames until the guest is gone.
    fn listen(&self, mut decoder: Decoder) -> io::Result<()> {
        let mut bytes = vec![0; MAX_DATA];
        loop {
            while let Some(frame) = decoder.next_frame()? {
                self.obey(frame)?;
            }
            match retry_on_intr(|| rustix::io::read(&self.wire, &mut bytes))? {
                0 => return Ok(()),
                n => decoder.feed(bytes.get(..n).unwrap_or_default()),
            }
        }
    }

    fn obey(&self, frame: Frame) -> Result<(), Malformed> {
        let find =
            |id| lock(&self.programs).running.get(&id).cloned().ok_or(Malformed("there is no such program"));
        match frame {
            Frame::Data { id, stream, bytes } => find(id)?.change(|state| {
                let pending = state.output(stream)?;
                pending.flow.arrived(bytes.len())?;
                pending.bytes.extend(bytes);
                Ok(())
            }),
            Frame::End { id, stream } => find(id)?.change(|state| {
                state.output(stream)?.ended = true;
                Ok(())
            }),
            Frame::Stop { id, stream: Stream::Stdin } => {
                let program = find(id)?;
                program.satisfy();
                program.change(|state| {
                    state.stdin_closed = true;
                    Ok(())
                })
            }
            Frame::Credit { id, stream: Stream::Stdin, bytes } => {
                find(id)?.change(|state| state.stdin.grant(bytes))
            }
            Frame::Exit { id, outcome } => {
                let program = lock(&self.programs).running.remove(&id);
                program.ok_or(Malformed("there is no such program"))?.finish(Ok(outcome));
                Ok(())
            }
            Frame::Message(message) => {
                (self.heard)(Said::Kernel(message));
                Ok(())
            }
            _ => Err(Malformed("a frame came from the wrong end")),
        }
    }

    /// Cuts the wire and tells all programs.
    fn fail(&self, why: &str) {
        // A wire that is no socket stays open until the client is dropped; nobody listens to it any more.
        let _ = rustix::net::shutdown(&self.wire, rustix::net::Shutdown::Both);
        let mut programs = lock(&self.programs);
        programs.broken = Some(why.to_owned());
        for (_, program) in programs.running.drain() {
            program.finish(Err(why.to_owned()));
        }
    }
}

impl State {
    fn output(&mut self, stream: Stream) -> Result<&mut Pending, Malformed> {
        match stream {
            Stream::Stdin => Err(Malformed("output came on stdin")),
            Stream::Stdout => Ok(&mut self.stdout),
            Stream::Stderr => Ok(&mut self.stderr),
        }
    }
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut State) -> Result<(), Malformed>) -> Result<(), Malformed> {
        let result = change(&mut lock(&self.state));
        self.changed.notify_all();
        result
    }

    fn finish(&self, end: Result<Outcome, String>) {
        let mut state = lock(&self.state);
        state.end = Some(end);
        state.stdin_closed = true;
        state.stdout.ended = true;
        state.stderr.ended = true;
        drop(state);
        self.changed.notify_all();
        self.satisfy();
    }

    fn satisfy(&self) {
        // The counter cannot overflow: this happens twice at most.
        let _ = rustix::io::write(&self.satisfied, &1u64.to_ne_bytes());
    }

    /// Waits until `ready` gives something.
    fn wait<T>(&self, mut ready: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut state = lock(&self.state);
        loop {
            if let Some(found) = ready(&mut state) {
                return found;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What a thread needs that carries a stream.
struct Carrier {
    remote: Remote,
    shared: Arc<Shared>,
}

impl Carrier {
    /// Reads `from` and sends it while the program wants it. A wire that dies ends the program's wait, so errors
    /// of sending need not be told here.
    fn carry_input(&self, from: &OwnedFd) {
        let (link, id, stream) = (&self.remote.link, self.remote.id, Stream::Stdin);
        loop {
            let room = self.shared.wait(|state| match (state.stdin_closed, state.stdin.room()) {
                (true, _) => Some(0),
                (false, 0) => None,
                (false, room) => Some(room),
            });
            let mut fds =
                [PollFd::new(from, PollFlags::IN), PollFd::new(&self.shared.satisfied, PollFlags::IN)];
            if room == 0 || retry_on_intr(|| poll(&mut fds, None)).is_err() || !fds[1].revents().is_empty() {
                return;
            }
            let mut bytes = vec![0; room];
            // An input that cannot be read (a directory, a terminal that is gone) has nothing more to give.
            let n = retry_on_intr(|| rustix::io::read(from, &mut bytes)).unwrap_or(0);
            if n == 0 {
                let _ = link.send(&Frame::End { id, stream });
                return;
            }
            bytes.truncate(n);
            lock(&self.shared.state).stdin.sent(n);
            if link.send(&Frame::Data { id, stream, bytes }).is_err() {
                return;
            }
        }
    }

    /// Writes what arrives to `to`, and tells the guest when nobody wants it any more.
    fn carry_output(&self, stream: Stream, to: Option<OwnedFd>) {
        let (link, id) = (&self.remote.link, self.remote.id);
        let mut wanted = true;
        loop {
            let (bytes, over) = self.shared.wait(|state| {
                let over = state.end.is_some();
                let pending = state.output(stream).ok()?;
                let ready = pending.ended || !pending.bytes.is_empty();
                ready.then(|| (Vec::from(std::mem::take(&mut pending.bytes)), over))
            });
            if bytes.is_empty() {
                return;
            }
            (link.heard)(Said::Program(stream, &bytes));
            if let Some(to) = to.as_ref().filter(|_| wanted) {
                if let Err(error) = write_all(to, &bytes) {
                    wanted = false;
                    lock(&self.shared.state).refused.get_or_insert(error);
                }
                if !wanted && !over {
                    let _ = link.send(&Frame::Stop { id, stream });
                }
            }
            let credit = lock(&self.shared.state)
                .output(stream)
                .ok()
                .and_then(|pending| pending.flow.passed(bytes.len()));
            if let Some(bytes) = credit.filter(|_| !over) {
                let _ = link.send(&Frame::Credit { id, stream, bytes });
            }
        }
    }
}

/// Writes all of it, also where the descriptor happens to be non-blocking.
fn write_all(to: &OwnedFd, mut bytes: &[u8]) -> rustix::io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(n) => bytes = bytes.get(n..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                retry_on_intr(|| poll(&mut [PollFd::new(to, PollFlags::OUT)], None))?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Process {
    fn carry(
        &self,
        name: &str,
        work: impl FnOnce(&Carrier) + Send + 'static,
    ) -> io::Result<thread::JoinHandle<()>> {
        let carrier = Carrier { remote: self.remote.clone(), shared: self.shared.clone() };
        thread::Builder::new().name(name.into()).spawn(move || work(&carrier))
    }

    /// A way to signal it while another thread waits for it.
    pub fn remote(&self) -> Remote {
        self.remote.clone()
    }

    /// A way to ask what became of its output.
    pub fn outputs(&self) -> Outputs {
        Outputs(self.shared.clone())
    }

    /// Waits for the end of the program and until all its output is written.
    ///
    /// # Errors
    /// The wire died first; the text says why.
    pub fn wait(self) -> io::Result<Outcome> {
        let end = self.shared.wait(|state| state.end.clone());
        for carrier in self.carriers.into_iter().chain(self.input) {
            // A thread that panicked has said so on stderr.
            let _ = carrier.join();
        }
        end.map_err(|why| io::Error::new(io::ErrorKind::ConnectionAborted, why))
    }
}
