//! Both ends of the socket device, for its cases: a program of the guest and one of the host that try everything.
//!
//!     peer guest COUNT MIB          in the guest
//!     peer host PATH COUNT MIB      on the host, before the guest starts
//!
//! COUNT connections are open at the same time, in either direction; streams are of so many MiB. What came out is said
//! as `key=value`.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
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

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["guest", count, mib] => guest(number(count), number(mib)),
        ["host", path, count, mib] => host(path, number(count), number(mib)),
        _ => Err(io::Error::other("peer guest COUNT MIB | peer host PATH COUNT MIB")),
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
    let up = call(TAKE)?;
    let sum = give(&up, mib)?;
    up.shutdown(Shutdown::Write)?;
    println!("up={}", verdict(&sum, &told(&up)?));
    let down = call(GIVE)?;
    let sum = take(&down)?;
    (&down).write_all(sum.as_bytes())?;
    println!("down={sum}");
    drop(down);
    drop(end.accept()?);
    println!("guest=done");
    Ok(())
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
    for (port, work) in [(HOST_ECHO, bounce as fn(&UnixStream) -> _), (TAKE, take_and_tell)] {
        let listener = UnixListener::bind(format!("{path}_{port}"))?;
        thread::spawn(move || serve(&|| Ok(listener.accept()?.0), work));
    }
    let listener = UnixListener::bind(format!("{path}_{GIVE}"))?;
    println!("host=ready");
    // The guest asks for it last, after all it does by itself.
    let (stream, _) = listener.accept()?;
    let sum = give(&stream, mib)?;
    stream.shutdown(Shutdown::Write)?;
    println!("given={}", verdict(&sum, &told(&stream)?));
    println!("called={}", calls(count, || connect(path, ECHO))?);
    println!("nobody={}", connect(path, 99).is_err());
    println!("echo={}", both_ways(connect(path, ECHO)?, mib)?);
    drop(connect(path, END)?);
    Ok(())
}

/// Connects to the guest's port, as soon as there is a device.
fn connect(path: &str, port: u32) -> io::Result<UnixStream> {
    while !Path::new(path).exists() {
        thread::sleep(Duration::from_millis(10));
    }
    let mut stream = UnixStream::connect(path)?;
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

/// A stream with two ends.
trait Stream {
    fn end(&self) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn end(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Stream for Socket {
    fn end(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

/// What comes in goes out again, to the end.
fn bounce<S: Stream>(stream: &S) -> io::Result<()>
where
    for<'a> &'a S: Read + Write,
{
    let (mut from, mut to) = (stream, stream);
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer)? {
            0 => return stream.end(),
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

fn take_and_tell(stream: &UnixStream) -> io::Result<()> {
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

/// Sends and receives at the same time; what comes back is what was sent.
fn both_ways(stream: UnixStream, mib: usize) -> io::Result<String> {
    let writer = stream.try_clone()?;
    let sent = thread::spawn(move || {
        let sum = give(&writer, mib)?;
        writer.shutdown(Shutdown::Write)?;
        io::Result::Ok(sum)
    });
    let back = take(&stream)?;
    let sent = sent.join().map_err(|_| io::Error::other("the sender has panicked"))??;
    Ok(verdict(&sent, &back))
}
