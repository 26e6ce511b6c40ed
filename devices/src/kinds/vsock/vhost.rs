//! The device whose rings the host's kernel works (vhost-vsock): its other end is the host's `AF_VSOCK`.

use std::io;

use base::host::vhost::Back;
use base::{Doing, Fail, Fault, Result, Why};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::device::{QUEUES, RX, TX};
use crate::catalog::Kit;
use crate::virtio::vhost::Worker;
use crate::virtio::{Device, Io};

/// `VIRTIO_VSOCK_F_STREAM` and `VIRTIO_VSOCK_F_SEQPACKET`, section 5.10.3. The kernel knows the second where it can do it;
/// the first goes without saying.
const F_STREAM: u64 = 1;
const F_SEQPACKET: u64 = 2;

/// The token by which the kernel says that it cannot go on.
const BROKEN: u16 = 0;

/// The socket device, as far as it is here: what it shows, and who works its rings. The events stay here too: none ever
/// happens.
pub struct Vsock {
    cid: u32,
    name: String,
    worker: Worker,
}

impl Vsock {
    /// The device of the guest `cid`.
    pub fn new(cid: u32, kit: &Kit<'_>) -> Result<Vsock> {
        let back = kit.host.vhost(kit.name, Back::Vsock, kit.memory)?;
        let worker = Worker::new(back, 0, Some(cid)).map_err(|cause| refused(&cause, cid, kit.name))?;
        Ok(Vsock { cid, name: kit.name.to_owned(), worker })
    }
}

fn refused(cause: &io::Error, cid: u32, name: &str) -> Fail {
    if cause.kind() == io::ErrorKind::AddrInUse {
        return Fail::new(Why::Denied, format!("give {name} the context ID {cid}"))
            .because("another guest of this host has it")
            .hint("choose another one: cid=N");
    }
    Fail::new(Why::Host, format!("have the host's kernel work for {name}"))
        .because(cause.to_string())
        .hint("pass vhost=off")
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        F_STREAM | self.worker.features() & F_SEQPACKET
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn config(&self) -> Vec<u8> {
        u64::from(self.cid).to_le_bytes().to_vec()
    }

    fn start(&mut self, features: u64, io: &mut Io<'_>) -> Result<()> {
        let taken = self.worker.take(&[RX, TX], features, BROKEN, io);
        taken
            .and_then(|()| self.worker.begin(None))
            .doing(Why::Host, || format!("have the host's kernel work for {}", self.name))
    }

    fn kick(&mut self, _: u16, _: &mut Io<'_>) -> std::result::Result<(), Fault> {
        Ok(())
    }

    fn ready(&mut self, _: u16, _: &mut Io<'_>) -> std::result::Result<(), Fault> {
        self.worker.break_off()
    }

    fn stop(&mut self, io: &mut Io<'_>) {
        self.worker.stop(io);
    }
}
