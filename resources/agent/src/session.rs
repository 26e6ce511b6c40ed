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

use crate::{root, system};

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

/// Serves the host to the end. With a system in the guest, it is that which ends it, and this returns only for trouble.
pub fn run(orders: &Orders) -> io::Result<()> {
    if orders.systemd {
        let error = root::build(orders).map_or_else(|error| error, |()| system::become_init(orders));
        return tell(&call(orders.port)?, &error);
    }
    let wire = call(orders.port)?;
    if let Err(error) = root::build(orders) {
        return tell(&wire, &error);
    }
    serve(wire, orders.port, true)
}

fn serve(wire: OwnedFd, port: u32, init: bool) -> io::Result<()> {
    let me = OsString::from("/proc/self/exe");
    let trampoline = vec![me.clone(), OsString::from(crate::ON_TERMINAL)];
    let another = vec![me, crate::ANOTHER.into(), port.to_string().into()];
    let options = Options { trampoline, init, sync: false, fresh: false, messages: true, another };
    Server::new(wire, options)?.serve()?;
    Ok(())
}

/// Calls the host once more, and serves what it asks for there: `port` is what the agent was told.
pub fn serve_another(port: &str) -> io::Result<()> {
    let trampoline = vec![OsString::from("/proc/self/exe"), OsString::from(crate::ON_TERMINAL)];
    let another = Vec::new();
    let options = Options { trampoline, init: false, sync: false, fresh: false, messages: false, another };
    Server::new(call(number(port)?)?, options)?.serve()?;
    Ok(())
}

/// Serves the host as a service of a system; `port` is the host's.
pub fn serve_in_system(port: &str) -> io::Result<()> {
    let served = number(port).and_then(|port| serve(call(port)?, port, false));
    system::power_off()?;
    served
}

/// Tells the host what is wrong with the system, and ends the machine.
pub fn tell_of_system(port: &str, text: &str) -> io::Result<()> {
    let wire = number(port).and_then(call)?;
    tell(&wire, &io::Error::other(format!("start the system: {text}")))?;
    crate::init::end("poweroff", "")
}

fn number(port: &str) -> io::Result<u32> {
    port.parse().map_err(|_| io::Error::new(ErrorKind::InvalidInput, "a port is a number"))
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
