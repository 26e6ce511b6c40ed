//! The host's kernel as the one who works rings (vhost): what it is told and in which order, and how it lets go.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use base::Fault;
use base::host::vhost::{Request, Vhost};
use base::lane::Interest;
use rustix::event::{EventfdFlags, eventfd};

use super::Io;
use super::engine::FEATURES;

/// A part of the kernel, and the rings that it works from a start of the device to its stop.
pub struct Worker {
    back: Box<dyn Vhost>,
    features: u64,
    /// The guest's context ID, where streams are carried; without one it is frames.
    cid: Option<u32>,
    /// Written to when a ring is broken.
    error: OwnedFd,
    /// The rings that it has, counted from 0.
    rings: Vec<u32>,
    /// It touches guest memory.
    working: bool,
    /// It did not let go, or could not be opened again.
    lost: bool,
}

impl Worker {
    /// Has `back` work for this process, with frames, or with the streams of the context `cid`. It has to know the
    /// features of the rings, and `needs` as well.
    ///
    /// # Errors
    /// It does not; another guest has the context ID; or as the kernel answers (it needs a thread for this).
    pub fn new(mut back: Box<dyn Vhost>, needs: u64, cid: Option<u32>) -> io::Result<Worker> {
        let features = back.ask(Request::Features)?;
        let lacks = (FEATURES | needs) & !features;
        if lacks != 0 {
            return Err(io::Error::other(format!("it lacks the features {lacks:#x}")));
        }
        own(back.as_mut(), cid)?;
        let error = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Worker { back, features, cid, error, rings: Vec::new(), working: false, lost: false })
    }

    /// What it can live up to.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Gives it the rings of those `queues` that the driver has enabled, in this order, with the features that the
    /// driver has accepted. When `token` is ready, one of them is broken ([`Worker::break_off`]).
    ///
    /// # Errors
    /// As the kernel answers.
    pub fn take(&mut self, queues: &[u16], features: u64, token: u16, io: &mut Io<'_>) -> io::Result<()> {
        if self.lost {
            return Err(io::Error::other("it could not be opened again"));
        }
        self.back.ask(Request::Accept(features & self.features))?;
        for (ring, queue) in (0..).zip(queues) {
            let Some(lent) = io.lend(*queue)? else { continue };
            self.rings.push(ring);
            self.back.ask(Request::Ring(ring, lent.place))?;
            self.back.ask(Request::Error(ring, Some(self.error.as_fd())))?;
            self.back.ask(Request::Call(ring, Some(lent.call.as_fd())))?;
            self.back.ask(Request::Kick(ring, Some(lent.kick.as_fd())))?;
        }
        io.watch(&self.error, token, Interest::Rung)
    }

    /// Lets it begin, with the frames of `tap` or with its streams.
    ///
    /// # Errors
    /// As the kernel answers.
    pub fn begin(&mut self, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if self.rings.is_empty() || std::mem::replace(&mut self.working, true) {
            return Ok(());
        }
        self.switch(tap, true)
    }

    /// Has it leave the tap or the streams alone, and guest memory with them.
    pub fn pause(&mut self) {
        if std::mem::take(&mut self.working) && self.switch(None, false).is_err() {
            self.lost = true;
        }
    }

    fn switch(&mut self, tap: Option<BorrowedFd<'_>>, on: bool) -> io::Result<()> {
        if self.cid.is_some() {
            return self.back.ask(Request::Run(on)).map(drop);
        }
        // One that does not let go of a ring may still let go of the other.
        let asked = self.rings.iter().map(|ring| self.back.ask(Request::Backend(*ring, tap)).map(drop));
        asked.fold(Ok(()), io::Result::and)
    }

    /// Its token is ready: it cannot go on with a ring, and leaves them alone from now on.
    ///
    /// # Errors
    /// That is the guest's doing, and told once.
    pub fn break_off(&mut self) -> Result<(), Fault> {
        if !self.working {
            return Ok(());
        }
        self.pause();
        Err(Fault::new("the host's kernel cannot go on with a ring", self.rings.len() as u64))
    }

    /// Takes the rings away from it.
    pub fn stop(&mut self, io: &mut Io<'_>) {
        io.unwatch(&self.error);
        // What it has said of these rings is not said of the next.
        let _ = rustix::io::read(&self.error, &mut [0; 8]);
        self.pause();
        for ring in std::mem::take(&mut self.rings) {
            for request in [Request::Kick(ring, None), Request::Call(ring, None), Request::Error(ring, None)]
            {
                self.lost |= self.back.ask(request).is_err();
            }
        }
        // Streams end with the guest's driver, also for the programs of the host, which hear of it when their context
        // goes. And what does not let go when it is told lets go when it is closed.
        if self.cid.is_some() || self.lost {
            let again = self.back.renew().and_then(|()| own(self.back.as_mut(), self.cid));
            self.lost = again.is_err();
        }
    }
}

/// Has it work for this process.
fn own(back: &mut dyn Vhost, cid: Option<u32>) -> io::Result<()> {
    back.ask(Request::Own)?;
    cid.map_or(Ok(()), |cid| back.ask(Request::Guest(cid)).map(drop))
}
