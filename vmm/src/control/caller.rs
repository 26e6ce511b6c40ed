//! The other end of the control socket: asks a VM.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use base::{Doing, Fail, Result, Why};
use rustix::net::sockopt::socket_peercred;
use rustix::process::Pid;
use serde_json::Value;

use super::registry::{self, Record, Registry, State};
use super::wire::{ANSWER, Request, read_answer};

/// How long a VM may take for an answer: it waits for nobody, so one that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection to a VM.
pub struct Caller {
    socket: UnixStream,
    name: String,
}

impl Caller {
    /// Calls the VM of a record.
    ///
    /// # Errors
    /// It has ended.
    pub fn call(record: &Record) -> Result<Caller> {
        let name = record.name.clone();
        if let State::Ended(_) = record.state {
            return Err(ended(&name));
        }
        let doing = || format!("reach the VM {name}");
        let socket = match UnixStream::connect(record.control()) {
            Ok(socket) => socket,
            Err(_) if !record.lives() => return Err(ended(&name)),
            Err(cause) => return Err(Fail::new(Why::Host, doing()).because(cause)),
        };
        socket.set_read_timeout(Some(PATIENCE)).doing(Why::Host, doing)?;
        socket.set_write_timeout(Some(PATIENCE)).doing(Why::Host, doing)?;
        Ok(Caller { socket, name })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// As the VM answers; it does not.
    pub fn ask(&mut self, request: &Request) -> Result<Value> {
        let doing = || format!("ask the VM {}", self.name);
        self.socket.write_all(&request.line()).doing(Why::Host, doing)?;
        let mut line = Vec::new();
        let mut bytes = [0; 4096];
        // What follows the answer may be for somebody else; nothing does without a request, but for the agent's hello.
        let room = if *request == Request::Agent { 1 } else { bytes.len() };
        loop {
            match self.socket.read(bytes.get_mut(..room).unwrap_or_default()) {
                Ok(0) => return Err(Fail::new(Why::Host, doing()).because("it has ended")),
                Ok(n) if line.len() <= ANSWER => {
                    line.extend_from_slice(bytes.get(..n).unwrap_or_default());
                    if line.ends_with(b"\n") {
                        return read_answer(&line);
                    }
                }
                Ok(_) => return Err(Fail::new(Why::Host, doing()).because("it does not stop to answer")),
                Err(cause) if cause.kind() == std::io::ErrorKind::Interrupted => {}
                Err(cause) if cause.kind() == std::io::ErrorKind::WouldBlock => {
                    let cause = format!("it has not answered for {} s", PATIENCE.as_secs());
                    return Err(Fail::new(Why::Host, doing()).because(cause));
                }
                Err(cause) => return Err(Fail::new(Why::Host, doing()).because(cause)),
            }
        }
    }

    /// The process at the other end.
    pub fn peer(&self) -> Option<Pid> {
        socket_peercred(self.socket.as_fd()).ok().map(|cred| cred.pid)
    }

    /// The connection, for what comes after an answer.
    ///
    /// # Errors
    /// The host refuses.
    pub fn into_socket(self) -> Result<UnixStream> {
        let doing = || format!("use the way to the VM {}", self.name);
        self.socket.set_read_timeout(None).doing(Why::Host, doing)?;
        self.socket.set_write_timeout(None).doing(Why::Host, doing)?;
        Ok(self.socket)
    }
}

fn ended(name: &str) -> Fail {
    Fail::new(Why::Missing, format!("reach the VM {name}"))
        .because("it has ended")
        .hint(format!("`mayfly logs {name}` shows what it said, `mayfly rm {name}` removes it"))
}

/// Finds the VM of that name in the registry of this user.
///
/// # Errors
/// There is none.
pub fn find(name: &str) -> Result<Record> {
    registry::find(&Registry::look(), name)
}
