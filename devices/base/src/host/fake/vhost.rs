//! A kernel that works no rings, but remembers what it was asked for and holds what it was given.

use std::collections::HashMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::host::vhost::{Back, Request, Vhost};

/// Which of its eventfds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Bell {
    /// The driver says that there is work.
    Kick,
    /// The driver wants an interrupt.
    Call,
    /// A ring is broken.
    Error,
}

/// The kernel: all of its vhost devices together. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Kernel(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    features: u64,
    opened: usize,
    /// What was asked for since the last look, in order, by the number of the device.
    asked: Vec<(usize, String)>,
    /// What it holds: the eventfds of each ring of each device.
    held: HashMap<(usize, u32, Bell), OwnedFd>,
    /// The request that is refused, by the beginning of its words.
    refused: Option<&'static str>,
}

impl Kernel {
    /// One that can live up to these features.
    pub fn new(features: u64) -> Kernel {
        let kernel = Kernel::default();
        kernel.lock().features = features;
        kernel
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn open(&self, back: Back) -> Box<dyn Vhost> {
        let mut state = self.lock();
        let number = state.opened;
        state.opened += 1;
        state.asked.push((number, format!("open {}", back.path())));
        Box::new(Device { kernel: self.clone(), number })
    }

    /// Takes what was asked for since the last time.
    pub fn take(&self) -> Vec<String> {
        let asked = std::mem::take(&mut self.lock().asked);
        asked.into_iter().map(|(number, words)| format!("{number}: {words}")).collect()
    }

    /// Refuses what begins with these words from now on.
    pub fn refuse(&self, words: Option<&'static str>) {
        self.lock().refused = words;
    }

    /// How many descriptors it holds.
    pub fn holds(&self) -> usize {
        self.lock().held.len()
    }

    /// The eventfd of a device's ring, if it holds one.
    pub fn bell(&self, device: usize, ring: u32, bell: Bell) -> Option<OwnedFd> {
        self.lock().held.get(&(device, ring, bell))?.try_clone().ok()
    }
}

struct Device {
    kernel: Kernel,
    number: usize,
}

impl Device {
    fn hold(
        &self,
        state: &mut State,
        ring: u32,
        bell: Bell,
        fd: Option<BorrowedFd<'_>>,
    ) -> io::Result<String> {
        let place = (self.number, ring, bell);
        let name = format!("{bell:?}").to_lowercase();
        Ok(match fd {
            Some(fd) => {
                state.held.insert(place, fd.try_clone_to_owned()?);
                format!("{name} {ring}")
            }
            None => {
                state.held.remove(&place);
                format!("no {name} {ring}")
            }
        })
    }
}

impl Vhost for Device {
    fn ask(&mut self, request: Request<'_>) -> io::Result<u64> {
        let mut state = self.kernel.lock();
        let words = match request {
            Request::Features => "features".to_owned(),
            Request::Own => "own".to_owned(),
            Request::Accept(features) => format!("accept {features:#x}"),
            Request::Ring(ring, place) => {
                format!("ring {ring} {} {:#x} {:#x} {:#x}", place.size, place.desc, place.avail, place.used)
            }
            Request::Kick(ring, fd) => self.hold(&mut state, ring, Bell::Kick, fd)?,
            Request::Call(ring, fd) => self.hold(&mut state, ring, Bell::Call, fd)?,
            Request::Error(ring, fd) => self.hold(&mut state, ring, Bell::Error, fd)?,
            Request::Backend(ring, Some(_)) => format!("backend {ring}"),
            Request::Backend(ring, None) => format!("no backend {ring}"),
            Request::Guest(cid) => format!("guest {cid}"),
            Request::Run(run) => format!("run {run}"),
        };
        let refused = state.refused.is_some_and(|refused| words.starts_with(refused));
        state.asked.push((self.number, words));
        if refused { Err(io::ErrorKind::AddrInUse.into()) } else { Ok(state.features) }
    }

    fn renew(&mut self) -> io::Result<()> {
        let mut state = self.kernel.lock();
        state.held.retain(|(number, ..), _| *number != self.number);
        state.asked.push((self.number, "renew".to_owned()));
        Ok(())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let mut state = self.kernel.lock();
        state.held.retain(|(number, ..), _| *number != self.number);
        state.asked.push((self.number, "close".to_owned()));
    }
}
