//! A device that only counts.

use std::sync::Arc;

use base::meter::Counter;
use base::{Fail, Fault, Why};
use devices::virtio::{Device, Io, Meters};

/// Gives every chain back after adding up its bytes; its configuration can be written.
#[derive(Default)]
pub struct Echo {
    config: [u8; 8],
    kicks: Arc<Counter>,
    chains: Arc<Counter>,
    /// It does not start.
    lame: bool,
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
}
