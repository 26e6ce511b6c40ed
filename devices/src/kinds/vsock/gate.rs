//! The host's end: programs that call the guest, and those whom the guest may call.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use base::host::{Answers, Dialer, Listener};
use base::lane::Interest;
use base::{Doing, Result, Why};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use crate::virtio::Io;

/// A Unix socket of the host's, where programs of the host connect; those that listen have its path with `_PORT`
/// behind it.
pub struct Public {
    pub listener: Listener,
    pub path: PathBuf,
    pub dialer: Dialer,
}

/// The ways in and out.
pub struct Gate {
    /// For programs of the host, if it is open to them.
    pub public: Option<Public>,
    /// For this process.
    pub answers: Answers,
}

impl Gate {
    /// Waits for programs that call; whether there can be any.
    pub fn watch(&self, token: u16, io: &mut Io<'_>) -> Result<bool> {
        let Some(public) = &self.public else { return Ok(false) };
        let watched = io.watch(&public.listener.socket, token, Interest::Readable);
        watched.doing(Why::Host, || format!("wait for connections on {}", public.path.display()))?;
        Ok(true)
    }

    /// Leaves them where they wait by themselves.
    pub fn unwatch(&self, io: &mut Io<'_>) {
        if let Some(public) = &self.public {
            io.unwatch(&public.listener.socket);
        }
    }

    /// Takes the next one that calls.
    pub fn accept(&self) -> std::result::Result<OwnedFd, Errno> {
        let public = self.public.as_ref().ok_or(Errno::AGAIN)?;
        accept_with(&public.listener.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }

    /// Connects to whoever is to be called at `port`: this process comes first.
    pub fn reach(&self, port: u32) -> io::Result<OwnedFd> {
        if let Some(socket) = (self.answers)(port) {
            return Ok(socket);
        }
        let public = self.public.as_ref().ok_or(io::ErrorKind::ConnectionRefused)?;
        let mut path = public.path.clone().into_os_string();
        path.push(format!("_{port}"));
        (public.dialer)(&PathBuf::from(path))
    }
}
