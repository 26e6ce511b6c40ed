//! A guest for commands: its root is put together as ordered, and the wire to the host served until that is done.

use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use agent::orders::{self, Orders};
use agent::server::{Options, Server};
use agent::wire::Frame;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::root;

/// The host's context ID (virtio 1.2, section 5.10.4).
const HOST: u32 = 2;
/// Longest wait for the way to the host: it is there as soon as the driver has found its device.
const PATIENCE: Duration = Duration::from_secs(10);

/// The orders that came with the RAM disk, if any did. The file goes: programs find none of it.
pub fn orders() -> io::Result<Option<Orders>> {
    let bytes = match fs::read(orders::PATH) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        bytes => bytes?,
    };
    fs::remove_file(orders::PATH)?;
    Ok(Some(Orders::decode(&bytes)?))
}

/// Serves the host to the end.
pub fn run(orders: &Orders) -> io::Result<()> {
    let wire = call(orders.port)?;
    if let Err(error) = root::build(orders) {
        return tell(&wire, &error);
    }
    let me = OsString::from("/proc/self/exe");
    let trampoline = vec![me.clone(), OsString::from(crate::ON_TERMINAL)];
    let another = vec![me, crate::ANOTHER.into(), orders.port.to_string().into()];
    let options = Options { trampoline, init: true, sync: false, fresh: false, messages: true, another };
    Server::new(wire, options)?.serve()?;
    Ok(())
}

/// Calls the host once more, and serves what it asks for there: `port` is what the agent was told.
pub fn serve_another(port: &str) -> io::Result<()> {
    let port = port.parse().map_err(|_| io::Error::new(ErrorKind::InvalidInput, "a port is a number"))?;
    let trampoline = vec![OsString::from("/proc/self/exe"), OsString::from(crate::ON_TERMINAL)];
    let another = Vec::new();
    let options = Options { trampoline, init: false, sync: false, fresh: false, messages: false, another };
    Server::new(call(port)?, options)?.serve()?;
    Ok(())
}

/// Calls the host.
fn call(port: u32) -> io::Result<OwnedFd> {
    let start = Instant::now();
    loop {
        let called = Socket::new(Domain::VSOCK, Type::STREAM, None)
            .and_then(|socket| socket.connect(&SockAddr::vsock(HOST, port)).map(|()| socket));
        match called {
            Ok(socket) => return Ok(socket.into()),
            Err(error) if start.elapsed() > PATIENCE => {
                return Err(io::Error::new(error.kind(), format!("call the host: {error}")));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Tells the host why there will be no guest.
fn tell(wire: &OwnedFd, error: &io::Error) -> io::Result<()> {
    let mut bytes = Vec::new();
    Frame::Trouble { text: error.to_string().into_bytes() }.encode(&mut bytes);
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let n = rustix::io::retry_on_intr(|| rustix::io::write(wire, rest))?;
        rest = rest.get(n..).unwrap_or_default();
    }
    // The host hangs up, or has ended the machine before.
    while rustix::io::read(wire, &mut [0; 64])? > 0 {}
    Ok(())
}
