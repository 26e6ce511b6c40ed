//! Both ends of a stream that is measured, for the benchmark of networks and sockets.
//!
//!     traffic host NAME tcp:PORT|unix:PATH|vsock:PORT [RIGHT]      before the guest starts
//!     traffic guest tcp:ADDRESS:PORT|vsock:PORT MIB TRIPS CALLS    in the guest
//!
//! The guest asks for one kind of traffic after another; the host measures each and says a line for it: time, processor
//! time that was not idle, and what KVM counted of all guests meanwhile, for each MiB, round trip or connection. So
//! whatever a VMM counts itself, and whatever clock its guest believes in, all are measured alike.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

/// The context ID of the host, and that of whoever asks.
const HOST: u32 = 2;
const ANY: u32 = u32::MAX;
/// Bytes of one read or write, but for round trips.
const PIECE: usize = 128 << 10;
/// What a MiB is made of.
const PIECES: usize = (1 << 20) / PIECE;
/// KVM's counters, in debugfs: exits, those to user space by port and by memory, interrupts given to guests.
const COUNTERS: [&str; 4] = ["exits", "io_exits", "mmio_exits", "irq_injections"];
const COUNTED: &str = "/sys/kernel/debug/kvm";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["host", name, at] => host(name, at),
        ["guest", to, counts @ ..] => {
            let counts: Vec<u32> = counts.iter().filter_map(|count| count.parse().ok()).collect();
            match counts.as_slice() {
                &[mib, trips, calls] => guest(to, mib, trips, calls),
                _ => Err(io::Error::other("say MIB TRIPS CALLS")),
            }
        }
        _ => Err(io::Error::other("traffic host NAME AT | traffic guest TO MIB TRIPS CALLS")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("traffic=failed: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A stream in both directions.
trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// What the guest asks for: one byte, and a count behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    /// So many MiB to the host.
    Up,
    /// So many MiB to the guest.
    Down,
    /// A byte there and back, so often.
    Trip,
    /// So many connections one after another, each with a byte there and back.
    Call,
}

impl Wish {
    const ALL: [Wish; 4] = [Wish::Up, Wish::Down, Wish::Trip, Wish::Call];

    fn name(self) -> &'static str {
        match self {
            Wish::Up => "out, MiB",
            Wish::Down => "in, MiB",
            Wish::Trip => "round trip",
            Wish::Call => "connection",
        }
    }
}

fn guest(to: &str, mib: u32, trips: u32, calls: u32) -> io::Result<()> {
    let mut stream = patiently(to)?;
    let mut buffer = vec![0x5a; PIECE];
    for (number, count) in [mib, mib, trips, calls].into_iter().enumerate() {
        // The first time it is not measured: caches are cold and windows small.
        for count in [count.div_ceil(8), count] {
            let Some(wish) = Wish::ALL.get(number).filter(|_| count > 0) else { continue };
            stream.write_all(&[u8::try_from(number).unwrap_or(0)])?;
            stream.write_all(&count.to_le_bytes())?;
            // It has read its counters.
            stream.read_exact(&mut buffer[..1])?;
            match wish {
                Wish::Up => {
                    for _ in 0..count as usize * PIECES {
                        stream.write_all(&buffer)?;
                    }
                    stream.read_exact(&mut buffer[..1])?;
                }
                Wish::Down => {
                    for _ in 0..count as usize * PIECES {
                        stream.read_exact(&mut buffer)?;
                    }
                }
                Wish::Trip => {
                    for _ in 0..count {
                        stream.write_all(&buffer[..1])?;
                        stream.read_exact(&mut buffer[..1])?;
                    }
                }
                Wish::Call => {
                    for _ in 0..count {
                        let mut one = connect(to)?;
                        one.write_all(&buffer[..1])?;
                        one.read_exact(&mut buffer[..1])?;
                    }
                }
            }
            stream.write_all(&buffer[..1])?;
        }
    }
    Ok(())
}

/// Connects as soon as there is a network: a card may take a moment.
fn patiently(to: &str) -> io::Result<Box<dyn Stream>> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match connect(to) {
            Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            result => return result,
        }
    }
}

fn connect(to: &str) -> io::Result<Box<dyn Stream>> {
    match to.split_once(':') {
        Some(("tcp", address)) => {
            let stream = TcpStream::connect(address)?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream))
        }
        Some(("vsock", port)) => {
            let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
            socket.connect(&SockAddr::vsock(HOST, port.parse().map_err(io::Error::other)?))?;
            Ok(Box::new(socket))
        }
        _ => Err(io::Error::other(format!("{to} is no address"))),
    }
}

type Accept = Box<dyn Fn() -> io::Result<Box<dyn Stream>>>;

fn listen(at: &str) -> io::Result<Accept> {
    match at.split_once(':') {
        Some(("tcp", port)) => {
            let listener = TcpListener::bind(format!("0.0.0.0:{port}"))?;
            Ok(Box::new(move || {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }))
        }
        Some(("unix", path)) => {
            let listener = UnixListener::bind(path)?;
            Ok(Box::new(move || Ok(Box::new(listener.accept()?.0))))
        }
        Some(("vsock", port)) => {
            let socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
            socket.bind(&SockAddr::vsock(ANY, port.parse().map_err(io::Error::other)?))?;
            socket.listen(16)?;
            Ok(Box::new(move || Ok(Box::new(socket.accept()?.0))))
        }
        _ => Err(io::Error::other(format!("{at} is no address"))),
    }
}

fn host(name: &str, at: &str) -> io::Result<()> {
    let accept = listen(at)?;
    println!("traffic=ready");
    let mut stream = accept()?;
    let mut buffer = vec![0x5a; PIECE];
    let mut last = None;
    loop {
        let mut order = [0; 5];
        match stream.read_exact(&mut order) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            result => result?,
        }
        let [wish, count @ ..] = order;
        let Some(wish) = Wish::ALL.get(usize::from(wish)).copied() else { return Ok(()) };
        let count = u32::from_le_bytes(count);
        let before = Count::read()?;
        stream.write_all(&buffer[..1])?;
        match wish {
            Wish::Up => {
                for _ in 0..count as usize * PIECES {
                    stream.read_exact(&mut buffer)?;
                }
                stream.write_all(&buffer[..1])?;
            }
            Wish::Down => {
                for _ in 0..count as usize * PIECES {
                    stream.write_all(&buffer)?;
                }
            }
            Wish::Trip => {
                for _ in 0..count {
                    stream.read_exact(&mut buffer[..1])?;
                    stream.write_all(&buffer[..1])?;
                }
            }
            Wish::Call => {
                for _ in 0..count {
                    let mut one = accept()?;
                    one.read_exact(&mut buffer[..1])?;
                    one.write_all(&buffer[..1])?;
                }
            }
        }
        // The guest has seen all of it.
        stream.read_exact(&mut buffer[..1])?;
        let after = Count::read()?;
        if last == Some(wish) {
            println!("{name:<20} {:<11} {}", wish.name(), after.since(&before, count));
        }
        last = Some(wish);
    }
}

/// What has passed so far.
struct Count {
    at: Instant,
    /// In hundredths of a second.
    idle: f64,
    /// As [`COUNTERS`]; absent without debugfs.
    counters: Vec<f64>,
}

impl Count {
    fn read() -> io::Result<Count> {
        let stat = fs::read_to_string("/proc/stat")?;
        // proc(5): user, nice, system, idle, iowait.
        let times = stat.lines().next().unwrap_or_default().split_whitespace();
        let idle = times.skip(4).take(2).filter_map(|time| time.parse::<f64>().ok()).sum();
        let read = |name: &&str| fs::read_to_string(format!("{COUNTED}/{name}")).ok()?.trim().parse().ok();
        Ok(Count { counters: COUNTERS.iter().filter_map(read).collect(), idle, at: Instant::now() })
    }

    /// What one of `count` took.
    fn since(&self, before: &Count, count: u32) -> String {
        let one = |sum: f64| sum / f64::from(count);
        let time = (self.at - before.at).as_secs_f64() * 1e6;
        // Of one processor, as the emulated host has when it counts instructions.
        let busy = time - (self.idle - before.idle) * 1e4;
        let mut text = format!("{:>9.1} us, busy {:>9.1} us", one(time), one(busy));
        for ((after, before), name) in self.counters.iter().zip(&before.counters).zip(COUNTERS) {
            text.push_str(&format!(", {name} {:.2}", one(after - before)));
        }
        text
    }
}
