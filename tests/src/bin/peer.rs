//! Both ends of the socket device, for its cases: a program of the guest and one of the host that try everything.
//!
//!     peer guest COUNT MIB          in the guest
//!     peer host PATH COUNT MIB      on the host, before the guest starts
//!
//! COUNT connections are open at the same time, in either direction; streams are of so many MiB. What came out is said
//! as `key=value`. PATH is the device's Unix socket, or `vsock:CID` where the host's kernel carries the streams. And piece
//! by piece:
//!
//!     peer serve PATH MIB           on the host: whoever comes is served, until its input ends
//!     peer echo MIB                 in the guest: a stream goes to the host and back
//!     peer streams MIB              in the guest: a stream to the host, then one from there
//!     peer many COUNT               in the guest: COUNT connections, a few at a time; each sends a byte and takes one
//!     peer answer                   in the guest: whoever comes is served, until END is called
//!     peer call PATH COUNT          on the host: as `many`, in the other direction; then calls END
//!     peer hold PATH                on the host: calls, says nothing, and hears of the end
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};

/// The context ID of the host, and that of whoever asks.
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
/// Ports of the guest: what comes in goes out again; the end of it all.
const ECHO: u32 = 5;
const END: u32 = 7;
/// Ports of the host: the same; bytes are taken and their sum told; bytes are given and their sum asked for.
const HOST_ECHO: u32 = 80;
const TAKE: u32 = 81;
const GIVE: u32 = 82;
/// Connections at a time, where they are not to be open all at once.
const FEW: usize = 4;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["guest", count, mib] => guest(number(count), number(mib)),
        ["host", path, count, mib] => host(path, number(count), number(mib)),
        ["serve", path, mib] => attend(path, number(mib)),
        ["echo", mib] => call(HOST_ECHO)
            .and_then(|stream| both_ways(&stream, stream.try_clone()?, number(mib)))
            .map(|sum| println!("echo={sum}")),
        ["streams", mib] => up(number(mib)).and_then(|()| down()),
        ["many", count] => many(number(count), || call(HOST_ECHO)).map(|count| println!("many={count}")),
        ["answer"] => answer(),
        ["call", path, count] => summon(path, number(count)),
        ["hold", path] => hold(path),
        _ => Err(io::Error::other("see tests/src/bin/peer.rs")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("peer=failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn number(text: &str) -> usize {
    text.parse().unwrap_or(0)
}

fn guest(count: usize, mib: usize) -> io::Result<()> {
    let echo = listen(ECHO)?;
    thread::spawn(move || serve(&|| Ok(echo.accept()?.0), bounce));
    let end = listen(END)?;
    println!("calls={}", calls(count, || call(HOST_ECHO))?);
    println!("refused={}", call(99).is_err());
    up(mib)?;
    down()?;
    drop(end.accept()?);
    println!("guest=done");
    Ok(())
}

/// A stream to the host, which tells its sum.
fn up(mib: usize) -> io::Result<()> {
    let up = call(TAKE)?;
    let sum = give(&up, mib)?;
    up.shutdown(Shutdown::Write)?;
    println!("up={}", verdict(&sum, &told(&up)?));
    Ok(())
}

/// A stream from the host, which is told its sum.
fn down() -> io::Result<()> {
    let down = call(GIVE)?;
    let sum = take(&down)?;
    (&down).write_all(sum.as_bytes())?;
    println!("down={sum}");
    Ok(())
}

/// Serves calls from the host until one to END.
fn answer() -> io::Result<()> {
    let (echo, end) = (listen(ECHO)?, listen(END)?);
    crew(move || Ok(echo.accept()?.0), bounce);
    drop(end.accept()?);
    println!("answer=done");
    Ok(())
}

/// Calls the guest as soon as it listens.
fn reach(path: &str) -> io::Result<Socket> {
    let mut patience = 1000;
    loop {
        match connect(path, ECHO) {
            Err(error) if patience == 0 => return Err(error),
            Err(_) => patience -= 1,
            Ok(stream) => return Ok(stream),
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// Calls the guest, and waits for the end of it.
fn hold(path: &str) -> io::Result<()> {
    let mut stream = reach(path)?;
    println!("hold=begun");
    let end = stream.read(&mut [0]);
    println!("hold={}", end.map_or_else(|error| error.kind().to_string(), |len| format!("{len} bytes")));
    Ok(())
}

/// Calls the guest as soon as it listens, and tells it when that is all.
fn summon(path: &str, count: usize) -> io::Result<()> {
    drop(reach(path)?);
    println!("many={}", many(count, || connect(path, ECHO))?);
    connect(path, END).map(drop)
}

/// Serves calls from the guest until the input ends.
fn attend(path: &str, mib: usize) -> io::Result<()> {
    for (port, work) in [(HOST_ECHO, bounce as fn(&Socket) -> _), (TAKE, take_and_tell)] {
        let listener = bind(path, port)?;
        crew(move || Ok(listener.accept()?.0), work);
    }
    let listener = bind(path, GIVE)?;
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            match give_and_ask(&stream, mib) {
                Ok(sum) => println!("given={sum}"),
                Err(error) => println!("given=failed: {error}"),
            }
        }
    });
    println!("host=ready");
    io::copy(&mut io::stdin(), &mut io::sink()).map(drop)
}

/// Whose kernel carries the streams of the device at `path`: the guest's context ID.
fn context(path: &str) -> Option<u32> {
    path.strip_prefix("vsock:")?.parse().ok()
}

/// Listens on a port of the host's.
fn bind(path: &str, port: u32) -> io::Result<Socket> {
    if context(path).is_some() {
        return listen(port);
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&SockAddr::unix(format!("{path}_{port}"))?)?;
    socket.listen(4096)?;
    Ok(socket)
}

fn listen(port: u32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.bind(&SockAddr::vsock(ANY, port))?;
    socket.listen(4096)?;
    Ok(socket)
}

fn call(port: u32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.connect(&SockAddr::vsock(HOST, port))?;
    Ok(socket)
}

fn host(path: &str, count: usize, mib: usize) -> io::Result<()> {
    for (port, work) in [(HOST_ECHO, bounce as fn(&Socket) -> _), (TAKE, take_and_tell)] {
        let listener = bind(path, port)?;
        thread::spawn(move || serve(&|| Ok(listener.accept()?.0), work));
    }
    let listener = bind(path, GIVE)?;
    println!("host=ready");
    // The guest asks for it last, after all it does by itself.
    let (stream, _) = listener.accept()?;
    println!("given={}", give_and_ask(&stream, mib)?);
    println!("called={}", calls(count, || connect(path, ECHO))?);
    println!("nobody={}", connect(path, 99).is_err());
    let echo = connect(path, ECHO)?;
    println!("echo={}", both_ways(&echo, echo.try_clone()?, mib)?);
    drop(connect(path, END)?);
    Ok(())
}

/// Connects to the guest's port, as soon as there is a device.
fn connect(path: &str, port: u32) -> io::Result<Socket> {
    if let Some(cid) = context(path) {
        let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
        socket.connect(&SockAddr::vsock(cid, port))?;
        return Ok(socket);
    }
    while !Path::new(path).exists() {
        thread::sleep(Duration::from_millis(10));
    }
    let mut stream = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    stream.connect(&SockAddr::unix(path)?)?;
    writeln!(stream, "CONNECT {port}")?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        if stream.read(&mut byte)? == 0 {
            return Err(io::Error::other("the guest does not answer"));
        }
        line.extend(byte);
    }
    if line.starts_with(b"OK ") { Ok(stream) } else { Err(io::Error::other("a strange answer")) }
}

/// Serves whoever comes, each in a thread of its own.
fn serve<S: Send + 'static>(accept: &dyn Fn() -> io::Result<S>, work: fn(&S) -> io::Result<()>) {
    while let Ok(stream) = accept() {
        let worker = thread::Builder::new().stack_size(128 << 10);
        let started = worker.spawn(move || {
            if let Err(error) = work(&stream) {
                println!("served=failed: {error}");
            }
        });
        if let Err(error) = started {
            println!("served=failed: {error}");
        }
    }
}

/// Serves whoever comes, a few at a time: starting a thread takes longer than a short visit.
fn crew<S>(
    accept: impl Fn() -> io::Result<S> + Send + Sync + 'static,
    work: impl Fn(&S) -> io::Result<()> + Copy + Send + 'static,
) {
    let accept = std::sync::Arc::new(accept);
    for _ in 0..2 * FEW {
        let accept = accept.clone();
        thread::spawn(move || {
            while let Ok(stream) = accept() {
                if let Err(error) = work(&stream) {
                    println!("served=failed: {error}");
                }
            }
        });
    }
}

/// What comes in goes out again, to the end.
fn bounce(stream: &Socket) -> io::Result<()> {
    let (mut from, mut to) = (stream, stream);
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer)? {
            0 => return stream.shutdown(Shutdown::Write),
            len => to.write_all(&buffer[..len])?,
        }
    }
}

/// Opens connections until there are `count` of them, and lets each say something and hear it again.
fn calls<S>(count: usize, open: impl Fn() -> io::Result<S>) -> io::Result<usize>
where
    for<'a> &'a S: Read + Write,
{
    let streams = (0..count).map(|_| open()).collect::<io::Result<Vec<S>>>()?;
    for (at, stream) in streams.iter().enumerate() {
        let mut stream = stream;
        stream.write_all(&at.to_le_bytes())?;
    }
    let mut right = 0;
    for (at, stream) in streams.iter().enumerate() {
        let mut stream = stream;
        let mut bytes = [0; 8];
        stream.read_exact(&mut bytes)?;
        right += usize::from(bytes == at.to_le_bytes());
    }
    Ok(right)
}

/// Opens connections one after another, a few at a time, and lets each send a byte and take it back.
fn many<S>(count: usize, open: impl Fn() -> io::Result<S> + Sync) -> io::Result<usize>
where
    for<'a> &'a S: Read + Write,
{
    let some = |from: usize| {
        let mut right = 0;
        for at in (from..count).step_by(FEW) {
            let told =
                |what: &str, error: io::Error| io::Error::other(format!("{what} number {at}: {error}"));
            let stream = open().map_err(|error| told("open", error))?;
            let (mut stream, byte) = (&stream, [at.to_le_bytes()[0]]);
            stream.write_all(&byte).map_err(|error| told("write to", error))?;
            let mut back = [0];
            stream.read_exact(&mut back).map_err(|error| told("read from", error))?;
            right += usize::from(byte == back);
        }
        io::Result::Ok(right)
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..FEW).map(|from| scope.spawn(move || some(from))).collect();
        let ends = threads
            .into_iter()
            .map(|thread| thread.join().map_err(|_| io::Error::other("a caller panicked"))?);
        ends.sum()
    })
}

/// Bytes that repeat late, and their sum (FNV-1a over 8-byte words).
struct Bytes {
    state: u64,
    sum: u64,
}

impl Bytes {
    fn new() -> Bytes {
        Bytes { state: 0x9e37_79b9_7f4a_7c15, sum: 0xcbf2_9ce4_8422_2325 }
    }

    fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_exact_mut(8) {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            word.copy_from_slice(&self.state.to_le_bytes());
        }
        self.add(buffer);
    }

    fn add(&mut self, buffer: &[u8]) {
        for word in buffer.chunks_exact(8) {
            let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
            self.sum = (self.sum ^ word).wrapping_mul(0x100_0000_01b3);
        }
    }

    fn sum(&self) -> String {
        format!("{:016x}", self.sum)
    }
}

fn give(mut to: impl Write, mib: usize) -> io::Result<String> {
    let mut bytes = Bytes::new();
    let mut buffer = vec![0; 64 << 10];
    for _ in 0..mib * 16 {
        bytes.fill(&mut buffer);
        to.write_all(&buffer)?;
    }
    Ok(bytes.sum())
}

fn take(mut from: impl Read) -> io::Result<String> {
    let mut bytes = Bytes::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut have = 0;
        while have < buffer.len() {
            match from.read(&mut buffer[have..])? {
                0 => {
                    bytes.add(&buffer[..have]);
                    return Ok(bytes.sum());
                }
                len => have += len,
            }
        }
        bytes.add(&buffer);
    }
}

fn take_and_tell(stream: &Socket) -> io::Result<()> {
    let sum = take(stream)?;
    let mut stream = stream;
    stream.write_all(sum.as_bytes())
}

fn told(mut from: impl Read) -> io::Result<String> {
    let mut sum = [0; 16];
    from.read_exact(&mut sum)?;
    Ok(String::from_utf8_lossy(&sum).into_owned())
}

fn verdict(sum: &str, told: &str) -> String {
    if sum == told { sum.to_owned() } else { format!("{sum}, and there it is {told}") }
}

/// Gives a stream, and is told its sum.
fn give_and_ask(stream: &Socket, mib: usize) -> io::Result<String> {
    let sum = give(stream, mib)?;
    stream.shutdown(Shutdown::Write)?;
    Ok(verdict(&sum, &told(stream)?))
}

/// Sends and receives at the same time, by two handles of one stream; what comes back is what was sent.
fn both_ways(stream: &Socket, mut twin: Socket, mib: usize) -> io::Result<String> {
    let sent = thread::spawn(move || {
        let sum = give(&mut twin, mib)?;
        twin.shutdown(Shutdown::Write)?;
        io::Result::Ok(sum)
    });
    let back = take(stream)?;
    let sent = sent.join().map_err(|_| io::Error::other("the sender has panicked"))??;
    Ok(verdict(&sent, &back))
}
