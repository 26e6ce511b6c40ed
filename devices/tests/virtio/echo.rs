//! Devices that only count, and keep.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use base::lane::Interest;
use base::meter::Counter;
use base::{Doing, Fail, Fault, Why};
use devices::virtio::{Chain, Device, Io, Meters};

/// Gives every chain back after adding up its bytes; its configuration can be written.
#[derive(Default)]
pub struct Echo {
    config: [u8; 8],
    kicks: Arc<Counter>,
    chains: Arc<Counter>,
    /// It does not start.
    lame: bool,
    patience: Duration,
}

impl Device for Echo {
    fn id(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        1 << 3
    }
    fn queues(&self) -> &[u16] {
        &[64, 16]
    }
    fn config(&self) -> Vec<u8> {
        self.config.to_vec()
    }
    fn configure(&mut self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).unwrap();
        self.config[at..at + bytes.len()].copy_from_slice(bytes);
    }
    fn start(&mut self, _: u64, _: &mut Io<'_>) -> base::Result<()> {
        if self.lame { Err(Fail::new(Why::Host, "start echo0")) } else { Ok(()) }
    }
    fn patience(&self, _: u16) -> Duration {
        self.patience
    }
    fn kick(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), Fault> {
        self.kicks.add(1);
        while let Some(chain) = io.next(queue)? {
            self.chains.add(1);
            let len = chain.readable().len() + chain.writable().len();
            io.done(chain, u32::try_from(len).unwrap());
        }
        Ok(())
    }
    fn meters(&self) -> Meters {
        vec![("device_kicks", self.kicks.clone()), ("chains", self.chains.clone())]
    }
}

impl Echo {
    /// One that does not start.
    pub fn lame() -> Echo {
        Echo { lame: true, ..Echo::default() }
    }

    /// One whose driver may be left without an interrupt for so long.
    pub fn patient(patience: Duration) -> Echo {
        Echo { patience, ..Echo::default() }
    }
}

/// Keeps the chains it takes until its bell rings; then it takes more.
pub struct Keeper {
    bell: Arc<OwnedFd>,
    kept: Vec<Chain>,
    chains: Arc<Counter>,
}

impl Keeper {
    /// One that gives its chains back when `bell`, an eventfd, rings.
    pub fn new(bell: Arc<OwnedFd>) -> Keeper {
        Keeper { bell, kept: Vec::new(), chains: Arc::default() }
    }
}

impl Device for Keeper {
    fn id(&self) -> u32 {
        43
    }
    fn queues(&self) -> &[u16] {
        &[64]
    }
    fn start(&mut self, _: u64, io: &mut Io<'_>) -> base::Result<()> {
        io.watch(&self.bell, 0, Interest::Rung).doing(Why::Host, || "wait for the bell")
    }
    fn kick(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), Fault> {
        while let Some(chain) = io.next(queue)? {
            self.chains.add(1);
            self.kept.push(chain);
        }
        Ok(())
    }
    fn ready(&mut self, _: u16, io: &mut Io<'_>) -> Result<(), Fault> {
        for chain in self.kept.drain(..) {
            chain.writable().write(io.ram(), 0, b"back");
            io.done(chain, 4);
        }
        self.kick(0, io)
    }
    fn stop(&mut self, io: &mut Io<'_>) {
        self.kept.clear();
        io.unwatch(&self.bell);
    }
    fn meters(&self) -> Meters {
        vec![("chains", self.chains.clone())]
    }
}
