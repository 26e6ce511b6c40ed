//! The server: it reads requests from the control socket and has them answered, as work on the control lane.
//!
//! Whoever asks may hang or lie: what is kept of each is bounded, nobody is waited for, and of too many the oldest goes.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use base::bus::Effect;
use base::lane::{Context, Interest, Work};
use base::{Fail, Why};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use serde_json::Value;

use super::wire::{ANSWER, REQUEST, Request, answer};

/// Connections at the most.
const CALLERS: usize = 32;
/// The token of the socket; each connection has the next.
const SOCKET: u32 = 0;
/// The token of the moment at which the socket is looked at again, and how long that is off.
const AGAIN: u32 = u32::MAX;
const PAUSE: Duration = Duration::from_secs(1);

/// What comes of a request.
pub enum Reply {
    /// An answer.
    Told(Result<Value, Fail>),
    /// An answer, after which the connection belongs to somebody else.
    Given(Value, Box<dyn FnOnce(OwnedFd) + Send>),
}

/// Answers requests; called on the lane, so it waits for nobody but the lanes of devices.
pub type Answerer = Box<dyn FnMut(Request) -> Reply + Send>;

/// Gives the socket that listens, and does not block; called on the lane. `None`: there is none.
pub type Listen = Box<dyn FnOnce() -> Option<OwnedFd> + Send>;

/// The server of one VM.
pub struct Server {
    listen: Option<Listen>,
    socket: Option<OwnedFd>,
    callers: BTreeMap<u32, Caller>,
    next: u32,
    answerer: Answerer,
}

/// Somebody who asks.
struct Caller {
    socket: OwnedFd,
    /// A request that is not complete.
    asked: Vec<u8>,
    /// What the socket has not taken yet of an answer.
    answer: Vec<u8>,
    /// Whether that is waited for.
    stuck: bool,
    /// Who gets the connection after it.
    heir: Option<Box<dyn FnOnce(OwnedFd) + Send>>,
}

/// What becomes of a caller.
#[derive(PartialEq, Eq)]
enum Fate {
    /// Something has to come from it first.
    Stays,
    /// Its next request is here already.
    Again,
    Goes,
    Inherited,
}

impl Server {
    /// A server on what `listen` will give.
    pub fn new(listen: Listen, answerer: Answerer) -> Server {
        Server { listen: Some(listen), socket: None, callers: BTreeMap::new(), next: SOCKET + 1, answerer }
    }

    fn listen(&mut self, ctx: &mut Context<'_>) {
        if let Some(socket) = &self.socket
            && let Err(cause) = ctx.watch(socket, SOCKET, Interest::Readable)
        {
            ::log::warn!("wait for requests: {cause}");
        }
    }

    fn accept(&mut self, ctx: &mut Context<'_>) {
        // No more than come in one go: others live on this lane, too.
        for _ in 0..CALLERS {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let Some(listener) = &self.socket else { return };
            let socket = match accept_with(listener, flags) {
                Ok(socket) => socket,
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => return,
                Err(cause) => {
                    // Out of descriptors: whoever calls goes on waiting, and must not keep this thread busy.
                    ::log::debug!("accept a connection: {cause}");
                    ctx.unwatch(listener);
                    return ctx.arm(AGAIN, PAUSE);
                }
            };
            let number = self.next;
            self.next = self.next.checked_add(1).filter(|next| *next != AGAIN).unwrap_or(SOCKET + 1);
            if ctx.watch(&socket, number, Interest::Readable).is_err() {
                continue;
            }
            let caller = Caller { socket, asked: Vec::new(), answer: Vec::new(), stuck: false, heir: None };
            self.callers.insert(number, caller);
            if self.callers.len() > CALLERS
                && let Some((last, oldest)) = self.callers.pop_first()
            {
                ctx.unwatch(&oldest.socket);
                ctx.disarm(last);
            }
        }
    }

    fn serve(&mut self, number: u32, ctx: &mut Context<'_>) {
        let Some(mut caller) = self.callers.remove(&number) else { return };
        let stuck = caller.stuck;
        let fate = caller.turn(&mut self.answerer);
        match fate {
            Fate::Stays => {}
            // Nothing tells of what is read already. After those whose sockets tell something.
            Fate::Again => ctx.arm(number, Duration::ZERO),
            Fate::Goes | Fate::Inherited => {
                ctx.unwatch(&caller.socket);
                ctx.disarm(number);
            }
        }
        match (fate, caller.heir.take()) {
            (Fate::Goes, _) => {}
            (Fate::Inherited, Some(heir)) => heir(caller.socket),
            (_, heir) => {
                caller.heir = heir;
                if stuck != caller.stuck {
                    ctx.unwatch(&caller.socket);
                    let interest = if caller.stuck { Interest::Writable } else { Interest::Readable };
                    if ctx.watch(&caller.socket, number, interest).is_err() {
                        return;
                    }
                }
                self.callers.insert(number, caller);
            }
        }
    }
}

impl Caller {
    /// Goes on with it as far as nobody has to be waited for, and by one request: others wait for their turn.
    fn turn(&mut self, answerer: &mut Answerer) -> Fate {
        if let Some(fate) = self.send() {
            return fate;
        }
        match self.next_request() {
            Ok(Some(line)) => self.ask(&line, answerer),
            Ok(None) => return Fate::Stays,
            Err(_) => return Fate::Goes,
        }
        match self.send() {
            Some(fate) => fate,
            None if self.asked.contains(&b'\n') => Fate::Again,
            None => Fate::Stays,
        }
    }

    /// Sends what there is of an answer. What becomes of the caller, if that is settled by it.
    fn send(&mut self) -> Option<Fate> {
        match self.flush() {
            Ok(true) if self.heir.is_some() => Some(Fate::Inherited),
            Ok(out) => {
                self.stuck = !out;
                self.stuck.then_some(Fate::Stays)
            }
            Err(_) => Some(Fate::Goes),
        }
    }

    fn ask(&mut self, line: &[u8], answerer: &mut Answerer) {
        let told = match Request::read(line).map(answerer) {
            Ok(Reply::Told(told)) => told,
            Ok(Reply::Given(value, heir)) => {
                self.heir = Some(heir);
                Ok(value)
            }
            Err(fail) => Err(fail),
        };
        self.answer = answer(&told);
        if self.answer.len() > ANSWER {
            let fail = Fail::new(Why::Host, "answer the request").because("the answer is too long");
            self.answer = answer(&Err(fail));
        }
    }

    /// The next line; `None`: it is not there yet.
    fn next_request(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = [0; 4096];
        loop {
            if let Some(end) = self.asked.iter().position(|byte| *byte == b'\n') {
                let rest = self.asked.split_off(end.saturating_add(1));
                return Ok(Some(std::mem::replace(&mut self.asked, rest)));
            }
            if self.asked.len() > REQUEST {
                return Err(io::ErrorKind::InvalidData.into());
            }
            match rustix::io::read(&self.socket, &mut bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.asked.extend_from_slice(bytes.get(..n).unwrap_or_default()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes what the socket takes; whether all is out.
    fn flush(&mut self) -> io::Result<bool> {
        while !self.answer.is_empty() {
            match rustix::io::write(&self.socket, &self.answer) {
                Ok(n) => drop(self.answer.drain(..n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}

impl Work for Server {
    fn arrive(&mut self, ctx: &mut Context<'_>) -> Effect {
        self.socket = self.listen.take().and_then(|listen| listen());
        self.listen(ctx);
        Effect::None
    }

    fn ready(&mut self, token: u32, ctx: &mut Context<'_>) -> Effect {
        match token {
            SOCKET => self.accept(ctx),
            AGAIN => self.listen(ctx),
            number => self.serve(number, ctx),
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::PathBuf;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use base::lane::Lane;
    use serde_json::json;

    use super::*;

    /// A server with a lane of its own, and where it listens.
    struct Rig {
        place: tempfile::TempDir,
        lane: base::lane::LaneHandle,
    }

    impl Rig {
        fn new(answerer: Answerer) -> Rig {
            let place = tempfile::tempdir().unwrap();
            let socket = UnixListener::bind(place.path().join("s")).unwrap();
            socket.set_nonblocking(true).unwrap();
            let lane = Lane::spawn("control", |_| ()).unwrap();
            lane.adopt(Server::new(Box::new(|| Some(socket.into())), answerer));
            Rig { place, lane }
        }

        fn path(&self) -> PathBuf {
            self.place.path().join("s")
        }

        fn call(&self) -> UnixStream {
            let socket = UnixStream::connect(self.path()).unwrap();
            // So that a failure ends: nobody waits that long.
            socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            socket
        }
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            self.lane.stop();
        }
    }

    fn echo() -> Answerer {
        Box::new(|request| Reply::Told(Ok(serde_json::to_value(request).unwrap())))
    }

    fn ask(mut socket: &UnixStream, text: &[u8]) -> String {
        socket.write_all(text).unwrap();
        let mut line = String::new();
        BufReader::new(socket).read_line(&mut line).unwrap();
        line
    }

    #[test]
    fn requests_are_answered_one_after_another_and_however_they_are_cut() {
        let rig = Rig::new(echo());
        let caller = rig.call();
        assert_eq!(ask(&caller, &Request::Inspect.line()), "{\"ok\":{\"request\":\"inspect\"}}\n");
        assert!(ask(&caller, b"nonsense\n").starts_with("{\"error\":\"read the request: "));
        let line = Request::Stop.line();
        (&caller).write_all(&line[..7]).unwrap();
        assert!(ask(&rig.call(), &Request::Inspect.line()).contains("inspect"), "nobody waits for another");
        assert_eq!(ask(&caller, &line[7..]), "{\"ok\":{\"request\":\"stop\"}}\n");
    }

    #[test]
    fn those_who_hang_hold_up_nobody() {
        let rig = Rig::new(Box::new(|_| Reply::Told(Ok(json!("x".repeat(3 << 20))))));
        // They ask for much and read nothing, or begin a request and never end it.
        let deaf: Vec<_> = (0..CALLERS).map(|_| rig.call()).collect();
        for (n, mut caller) in deaf.iter().enumerate() {
            let line = Request::Inspect.line();
            caller.write_all(if n % 2 == 0 { &line } else { &line[..5] }).unwrap();
        }
        let caller = rig.call();
        assert_eq!(ask(&caller, &Request::Inspect.line()).len(), (3 << 20) + 10);
        // Of too many the oldest goes: its answer ends, or is lost with the connection.
        let cut = (&deaf[0]).read_to_end(&mut Vec::new());
        assert!(cut.is_ok() || cut.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset));
        let mut endless = rig.call();
        // Either the write or the read finds that it is cut off.
        let _ = endless.write_all(&vec![b' '; REQUEST + 5000]);
        assert!(matches!(endless.read(&mut [0; 1]), Ok(0) | Err(_)), "a request has an end");
    }

    #[test]
    fn who_asks_much_at_once_waits_for_its_turn() {
        let (tell, told) = channel();
        let (go, wait) = channel::<()>();
        let rig = Rig::new(Box::new(move |request| {
            let first = matches!(request, Request::Kill { .. });
            tell.send(request).unwrap();
            if first {
                wait.recv().unwrap();
            }
            Reply::Told(Ok(json!(1)))
        }));
        let (greedy, other) = (rig.call(), rig.call());
        assert_eq!(ask(&other, &Request::Inspect.line()), "{\"ok\":1}\n");
        let many = Request::Inspect.line().repeat(100);
        (&greedy).write_all(&[Request::Kill { signal: None }.line(), many].concat()).unwrap();
        let mut asked = told.iter();
        assert_eq!(
            (asked.next(), asked.next()),
            (Some(Request::Inspect), Some(Request::Kill { signal: None }))
        );
        // While the first of many is answered, somebody else asks.
        (&other).write_all(&Request::Stop.line()).unwrap();
        go.send(()).unwrap();
        let before = asked.position(|request| request == Request::Stop).unwrap();
        assert!(before < 10, "{before} requests of another's went first");
        let answers = BufReader::new(&greedy)
            .lines()
            .take(101)
            .filter(|line| line.as_deref().ok() == Some("{\"ok\":1}"));
        assert_eq!(answers.count(), 101, "all are answered");
    }

    #[test]
    fn a_connection_is_given_away_after_its_answer() {
        let (tell, told) = channel();
        let rig = Rig::new(Box::new(move |_| {
            let tell = tell.clone();
            Reply::Given(json!(1), Box::new(move |socket| tell.send(socket).unwrap()))
        }));
        let mut caller = rig.call();
        assert_eq!(ask(&caller, &Request::Agent.line()), "{\"ok\":1}\n");
        let mut theirs = UnixStream::from(told.recv().unwrap());
        theirs.set_nonblocking(false).unwrap();
        caller.write_all(b"hello").unwrap();
        let mut got = [0; 5];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello", "nothing of it was taken");
        drop(theirs);
        assert_eq!(caller.read(&mut got).unwrap(), 0);
    }
}
