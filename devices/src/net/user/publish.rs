//! Ports of the host that lead into the guest.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use base::fail::why_of;
use base::{Fail, Result, Why};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

/// Connections that wait to be taken.
const BACKLOG: i32 = 128;

/// What is to be published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publish {
    /// Where the host listens.
    pub host: SocketAddr,
    /// The guest's port.
    pub guest: u16,
    /// Ports of UDP.
    pub udp: bool,
}

/// A published port.
pub struct Port {
    /// The socket that listens, or that takes datagrams.
    pub socket: Arc<OwnedFd>,
    /// The guest's port.
    pub guest: u16,
    /// It is a port of UDP.
    pub udp: bool,
}

/// Reads `[ADDR:]HOST:GUEST[/udp]`.
fn read(text: &str) -> Option<Publish> {
    let (rest, udp) = match text.split_once('/') {
        Some((rest, "udp")) => (rest, true),
        Some((rest, "tcp")) => (rest, false),
        Some(_) => return None,
        None => (text, false),
    };
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
    let (rest, guest) = rest.rsplit_once(':')?;
    let (address, host) = match rest.rsplit_once(':') {
        Some((address, host)) => {
            let plain = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
            (plain.parse::<IpAddr>().ok()?, host)
        }
        // Only this machine, unless the user says who else.
        None => (Ipv4Addr::LOCALHOST.into(), rest),
    };
    Some(Publish { host: SocketAddr::new(address, number(host)?), guest: number(guest)?, udp })
}

impl Publish {
    /// Reads what `text` says for the device called `name`.
    ///
    /// # Errors
    /// [`Why::Usage`]: it makes no sense.
    pub fn read(text: &str, name: &str) -> Result<Publish> {
        read(text).ok_or_else(|| {
            Fail::new(Why::Usage, format!("publish {text} of {name}"))
                .because("it is not [ADDRESS:]HOST-PORT:GUEST-PORT[/udp]")
                .hint("publish=8080:80 leads from port 8080 of this machine to port 80 of the guest")
        })
    }

    /// Opens the port of the host, for the device called `name`.
    ///
    /// # Errors
    /// The host refuses it.
    pub fn open(&self, name: &str) -> Result<Port> {
        let Publish { host, guest, udp } = *self;
        let socket = bind_to(host, udp).map_err(|cause| {
            let cause = std::io::Error::from(cause);
            let hint = match Errno::from_io_error(&cause) {
                Some(Errno::ADDRINUSE) => "end the program that has the port, or publish another",
                Some(Errno::ACCESS) => "publish a port from 1024 on",
                Some(Errno::ADDRNOTAVAIL) => "use an address of this machine, or 0.0.0.0 for all of them",
                _ => "",
            };
            let fail = Fail::new(why_of(&cause), format!("publish {host} of {name}")).because(cause);
            if hint.is_empty() { fail } else { fail.hint(hint) }
        })?;
        Ok(Port { socket: Arc::new(socket), guest, udp })
    }
}

fn bind_to(host: SocketAddr, udp: bool) -> rustix::io::Result<OwnedFd> {
    let family = if host.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let kind = if udp { SocketType::DGRAM } else { SocketType::STREAM };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    if !udp {
        // Connections of a machine that has just ended do not keep the next one from its port.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    bind(&socket, &host)?;
    if !udp {
        listen(&socket, BACKLOG)?;
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read() {
        let shown = |text| read(text).map(|Publish { host, guest, udp }| format!("{host} {guest} {udp}"));
        assert_eq!(shown("8080:80").as_deref(), Some("127.0.0.1:8080 80 false"));
        assert_eq!(shown("0.0.0.0:53:5353/udp").as_deref(), Some("0.0.0.0:53 5353 true"));
        assert_eq!(shown("[::1]:8080:80").as_deref(), Some("[::1]:8080 80 false"));
        for wrong in ["", "80", "0:80", "80:0", "x:80", "80:99999", "80:80/sctp", "localhost:80:80", ":80"] {
            assert_eq!(shown(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_port_in_use_is_named_with_the_remedy() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let publish = Publish::read(&format!("{port}:80"), "net0").unwrap();
        let fail = publish.open("net0").err().unwrap().to_string();
        assert_eq!(
            fail,
            format!(
                "publish 127.0.0.1:{port} of net0: Address already in use\n  \
                 hint: end the program that has the port, or publish another"
            )
        );
    }
}
