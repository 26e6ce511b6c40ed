//! Entropy for the guest: virtio-rng (virtio 1.2, section 5.4).

use std::sync::Arc;

use base::Fault;
use base::host::Entropy;
use base::meter::Counter;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::Switch;
use crate::catalog::{Body, Kind, Kit, Presence};
use crate::virtio::{Chain, Device, Io, Meters};

/// The most that one request gets. A chain may offer almost 4 GiB: without this bound one request would keep the
/// lane, and the host's generator, busy for seconds.
const LARGEST: u64 = 64 << 10;

/// The kind.
pub struct This;

impl Kind for This {
    type Spec = Switch;
    const NAME: &'static str = "rng";
    const FLAG: &'static str = "rng";
    const SUMMARY: &'static str = "random numbers for the guest (virtio-rng)";
    const BARE: &'static str = "enabled";
    const EXAMPLE: &'static str = "on";
    const PRESENCE: Presence = Presence::Standard("on");

    fn build(spec: &Switch, kit: &Kit<'_>) -> base::Result<Body> {
        if !spec.enabled {
            return Ok(Body::Absent);
        }
        Ok(Body::Virtio(Box::new(Rng { entropy: kit.host.entropy(), bytes: Arc::default() })))
    }
}

struct Rng {
    entropy: Entropy,
    bytes: Arc<Counter>,
}

impl Rng {
    /// Fills the room of one request, up to [`LARGEST`]; says how many bytes it got. A host that has none gives
    /// none: the driver asks again.
    fn fill(&self, chain: &Chain, io: &Io<'_>) -> u32 {
        let wanted = chain.writable().len().min(LARGEST);
        let mut bytes = vec![0; usize::try_from(wanted).unwrap_or(0)];
        if (self.entropy)(&mut bytes).is_err() {
            return 0;
        }
        u32::try_from(chain.writable().write(io.ram(), 0, &bytes)).unwrap_or(0)
    }
}

impl Device for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queues(&self) -> &[u16] {
        &[64]
    }

    fn kick(&mut self, queue: u16, io: &mut Io<'_>) -> Result<(), Fault> {
        while let Some(chain) = io.next(queue)? {
            let filled = self.fill(&chain, io);
            self.bytes.add(filled.into());
            io.done(chain, filled);
        }
        Ok(())
    }

    fn meters(&self) -> Meters {
        vec![("bytes", self.bytes.clone())]
    }
}
