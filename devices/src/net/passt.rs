//! The link to passt, or any program that speaks its protocol: each frame behind its length in four bytes, big-endian,
//! on a Unix stream socket.

use std::os::fd::OwnedFd;

use base::lane::Interest;
use base::{Doing, Fault, Result, Why};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::{HEADER, Header, Inbox, LARGEST, Link};
use crate::virtio::{Chain, Io};

/// Bytes read at once: some frames of the largest size.
const READ: usize = 256 << 10;
/// Token of the socket, and of what is left after a share of work.
const SOCKET: u16 = 0;
const MORE: u16 = 1;
/// Reads in one visit.
const SHARE: usize = 8;

/// A connection to passt.
pub struct PasstLink {
    socket: OwnedFd,
    name: String,
    mtu: u16,
    /// Received and not yet handed on: `from..till` of it.
    input: Vec<u8>,
    from: usize,
    till: usize,
    /// To be sent, the first `sent` bytes of it are.
    output: Vec<u8>,
    sent: usize,
    /// Frames in `input` wait for room.
    starved: bool,
    lost: bool,
}

impl PasstLink {
    /// The link of the device called `name` over a connected, non-blocking socket.
    pub fn new(socket: OwnedFd, name: &str, mtu: u16) -> PasstLink {
        PasstLink {
            socket,
            name: name.to_owned(),
            mtu,
            input: Vec::new(),
            from: 0,
            till: 0,
            output: Vec::new(),
            sent: 0,
            starved: false,
            lost: false,
        }
    }

    fn lose(&mut self, why: &str) {
        if !std::mem::replace(&mut self.lost, true) {
            log::error!(target: "guest", "{}: the network is gone: {why}", self.name);
        }
    }

    /// Sends what is left; whether all is gone.
    fn drain(&mut self) -> bool {
        while let Some(rest) = self.output.get(self.sent..).filter(|rest| !rest.is_empty() && !self.lost) {
            match send(&self.socket, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(len) => self.sent = self.sent.saturating_add(len),
                Err(Errno::AGAIN) => return false,
                Err(Errno::INTR) => {}
                Err(cause) => self.lose(&cause.to_string()),
            }
        }
        self.output.clear();
        self.sent = 0;
        true
    }

    /// The next whole frame that has been received: where it begins and its length.
    fn frame(&mut self) -> Option<(usize, usize)> {
        let bytes = self.input.get(self.from..self.till)?;
        let (len, rest) = bytes.split_first_chunk::<4>()?;
        let len = u32::from_be_bytes(*len);
        if u64::from(len) > LARGEST {
            self.lose("it sends a frame longer than any");
            return None;
        }
        let len = usize::try_from(len).ok()?;
        (rest.len() >= len).then_some((self.from.saturating_add(4), len))
    }

    /// Puts received frames into the inbox; whether there was room for all.
    fn deliver(&mut self, inbox: &mut Inbox, io: &mut Io<'_>) -> std::result::Result<bool, Fault> {
        while let Some((at, len)) = self.frame() {
            let whole = HEADER.saturating_add(len as u64);
            let end = at.saturating_add(len);
            // A frame longer than the MTU was not asked for, and may be longer than any buffer.
            if len > usize::from(self.mtu).saturating_add(18) {
                inbox.drop_one();
            } else if inbox.room(whole, io)? < whole {
                return Ok(false);
            } else if let Some(frame) = self.input.get(at..end) {
                inbox.write(io.ram(), HEADER, frame);
                inbox.commit(len as u64, Header::default(), io);
            }
            self.from = end;
        }
        self.input.copy_within(self.from..self.till, 0);
        self.till = self.till.saturating_sub(self.from);
        self.from = 0;
        Ok(true)
    }

    fn receive(&mut self, inboxes: &mut [Inbox], io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        let Some(inbox) = inboxes.first_mut() else { return Ok(()) };
        self.input.resize(READ, 0);
        for _ in 0..SHARE {
            self.starved = !self.deliver(inbox, io)?;
            if self.starved || self.lost {
                return Ok(());
            }
            let Some(room) = self.input.get_mut(self.till..) else { return Ok(()) };
            match recv(&self.socket, room, RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.lose("passt has ended"),
                Ok((len, _)) => self.till = self.till.saturating_add(len),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(cause) => self.lose(&cause.to_string()),
            }
        }
        io.arm(MORE, std::time::Duration::ZERO);
        Ok(())
    }
}

impl Link for PasstLink {
    /// The protocol has no place for a virtio header.
    fn features(&self) -> u64 {
        0
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }

    fn start(&mut self, _: u64, io: &mut Io<'_>) -> Result<()> {
        io.watch(&self.socket, SOCKET, Interest::Changes)
            .doing(Why::Host, || format!("wait for frames of {}", self.name))
    }

    fn transmit(
        &mut self,
        _: usize,
        chain: &Chain,
        _: &mut [Inbox],
        io: &mut Io<'_>,
    ) -> std::result::Result<bool, Fault> {
        if !self.drain() {
            return Ok(false);
        }
        let len = chain.readable().len().saturating_sub(HEADER);
        let Some(len) = u32::try_from(len).ok().filter(|len| u64::from(*len) <= LARGEST) else {
            return Ok(true);
        };
        self.output.extend(len.to_be_bytes());
        self.output.resize(self.output.len().saturating_add(usize::try_from(len).unwrap_or(0)), 0);
        if let Some(frame) = self.output.get_mut(4..) {
            chain.readable().read(io.ram(), HEADER, frame);
        }
        self.drain();
        Ok(true)
    }

    fn refilled(
        &mut self,
        _: usize,
        inboxes: &mut [Inbox],
        io: &mut Io<'_>,
    ) -> std::result::Result<(), Fault> {
        if self.starved { self.receive(inboxes, io) } else { Ok(()) }
    }

    fn ready(&mut self, _: u16, inboxes: &mut [Inbox], io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        self.drain();
        self.receive(inboxes, io)
    }

    fn stop(&mut self, io: &mut Io<'_>) {
        io.unwatch(&self.socket);
        io.disarm(MORE);
    }
}
