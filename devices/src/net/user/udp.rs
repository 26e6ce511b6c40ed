//! Flows without connections: UDP between two ends, and echo requests to one address.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use base::Fault;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send, sendto};

use super::dns;
use super::neighbour::{Unreachable, echo_reply, quote, unreachable};
use super::packet::UDP;
use super::policy::Policy;
use super::tcp::{Ends, Turn};
use super::wire::Wire;

/// Datagrams for the guest in one turn.
const SHARE: usize = 16;
/// Room for the largest datagram.
pub const LARGEST: usize = 65_536;

/// What a flow carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carries {
    /// Anything.
    Data,
    /// Questions to the resolver and its answers.
    Names,
    /// Echo requests with this identifier.
    Echo(u16),
}

/// A flow.
pub struct Association {
    socket: Arc<OwnedFd>,
    ends: Ends,
    /// Where datagrams of the guest go; `None`: the socket is connected and belongs to this flow alone.
    to: Option<SocketAddr>,
    carries: Carries,
    used: Duration,
    readable: bool,
}

impl Association {
    /// One over a connected socket of its own.
    pub fn new(socket: OwnedFd, ends: Ends, carries: Carries, now: Duration) -> Association {
        Association { socket: Arc::new(socket), ends, to: None, carries, used: now, readable: false }
    }

    /// One that `peer` began through a published port.
    pub fn published(socket: Arc<OwnedFd>, ends: Ends, peer: SocketAddr, now: Duration) -> Association {
        Association { socket, ends, to: Some(peer), carries: Carries::Data, used: now, readable: false }
    }

    /// Its socket, if it is its own.
    pub fn own_socket(&self) -> Option<&OwnedFd> {
        self.to.is_none().then_some(&*self.socket)
    }

    /// Who began it through a published port.
    pub fn peer(&self) -> Option<SocketAddr> {
        self.to
    }

    /// Who speaks to whom.
    pub fn ends(&self) -> Ends {
        self.ends
    }

    /// There is something to read.
    pub fn changed(&mut self) {
        self.readable = true;
    }

    /// When something last passed.
    pub fn used(&self) -> Duration {
        self.used
    }

    /// Something has passed.
    pub fn touch(&mut self, now: Duration) {
        self.used = now;
    }

    /// Whether nothing has passed for so long that nothing will (RFC 4787, section 4.3: two minutes and more).
    pub fn is_over(&self, now: Duration) -> bool {
        let patience = match self.carries {
            Carries::Data => 150,
            Carries::Names | Carries::Echo(_) => 20,
        };
        now.saturating_sub(self.used) > Duration::from_secs(patience)
    }

    /// Sends what the guest says.
    ///
    /// # Errors
    /// As the host answers.
    pub fn send(&mut self, data: &[u8], now: Duration) -> Result<(), Errno> {
        self.used = now;
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let answer = match self.to {
            Some(peer) => sendto(&self.socket, data, flags, &peer),
            None => send(&self.socket, data, flags),
        };
        match answer {
            // Lost, as on any full wire.
            Ok(_) | Err(Errno::AGAIN | Errno::NOBUFS | Errno::INTR) => Ok(()),
            // The answer to an earlier datagram; this one may be sent now.
            Err(Errno::CONNREFUSED) if self.to.is_none() => {
                let _ = send(&self.socket, data, flags);
                Err(Errno::CONNREFUSED)
            }
            Err(cause) => Err(cause),
        }
    }

    /// Hands the guest what has come for it. `scratch` has room for the largest datagram.
    ///
    /// # Errors
    /// The guest's ring is broken.
    pub fn pump(
        &mut self,
        wire: &mut Wire<'_, '_>,
        policy: &mut Policy,
        scratch: &mut [u8],
        now: Duration,
    ) -> Result<Turn, Fault> {
        if !self.readable || self.to.is_some() {
            return Ok(Turn::Idle);
        }
        // A datagram that has been read and finds no room is lost; one packet there should be room for.
        let packet = u64::from(wire.card.mtu).saturating_add(26);
        for _ in 0..SHARE {
            if wire.inbox.room(packet, wire.io)? < packet {
                return Ok(Turn::Starved);
            }
            match recv(&*self.socket, &mut *scratch, RecvFlags::DONTWAIT) {
                Ok((len, _)) => {
                    self.used = now;
                    let data = scratch.get(..len).unwrap_or_default();
                    self.deliver(data, wire, policy, now)?;
                }
                Err(Errno::AGAIN) => {
                    self.readable = false;
                    return Ok(Turn::Idle);
                }
                Err(Errno::INTR) => {}
                Err(cause) => self.refused(cause, wire)?,
            }
        }
        Ok(Turn::Again)
    }

    fn deliver(
        &self,
        data: &[u8],
        wire: &mut Wire<'_, '_>,
        policy: &mut Policy,
        now: Duration,
    ) -> Result<(), Fault> {
        let Ends { guest, remote } = self.ends;
        match self.carries {
            Carries::Echo(id) => {
                // The kernel numbers echo sockets its own way.
                let Some((&[kind, 0, ..], rest)) = data.split_first_chunk::<6>() else { return Ok(()) };
                if kind == 0 || kind == 129 {
                    echo_reply(wire, remote.ip(), guest.ip(), &[&id.to_be_bytes(), rest].concat())?;
                }
            }
            Carries::Names => {
                if policy.restricts() {
                    let Some((name, found)) = dns::answers(data) else {
                        wire.datagram(remote, guest, data)?;
                        return Ok(());
                    };
                    for answer in found {
                        policy.learn(&name, answer.address, answer.seconds, now);
                    }
                }
                wire.datagram(remote, guest, data)?;
            }
            Carries::Data => {
                wire.datagram(remote, guest, data)?;
            }
        }
        Ok(())
    }

    /// Tells the guest why its datagram did not get through.
    ///
    /// # Errors
    /// The guest's ring is broken.
    pub fn refused(&self, cause: Errno, wire: &mut Wire<'_, '_>) -> Result<(), Fault> {
        if let Carries::Echo(_) = self.carries {
            return Ok(());
        }
        let why = match cause {
            Errno::CONNREFUSED => Unreachable::Port,
            Errno::NETUNREACH | Errno::NETDOWN => Unreachable::Net,
            Errno::ACCESS | Errno::PERM => Unreachable::Barred,
            _ => Unreachable::Host,
        };
        let Ends { guest, remote } = self.ends;
        unreachable(wire, self.ends, UDP, &quote(guest, remote, 8 << 16), why)
    }
}
