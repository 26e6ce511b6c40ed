//! Entropy for the guest: virtio-rng (virtio 1.2, section 5.4).

use std::sync::Arc;

use base::host::Entropy;
use base::meter::Counter;
use base::throttle::{Rate, Throttle};
use base::{Fail, Fault, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::on;
use crate::amount::Amount;
use crate::catalog::{Body, Driver, Kind, Kit, Presence};
use crate::virtio::{Chain, Device, Io, Meters};

/// The most that one request gets. A chain may offer almost 4 GiB: without this bound one request would keep the
/// lane, and the host's generator, busy for seconds.
const LARGEST: u64 = 64 << 10;

/// The token of the deadline at which the limit lets the next request through.
const ADMIT: u16 = 0;

/// The kind.
pub struct This;

/// Random numbers for the guest.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// on: the machine has the device; off: it has none.
    #[serde(default = "on")]
    pub enabled: bool,
    /// Bytes in a second at the most, such as 64K (default: no limit).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<Amount>,
}

impl Kind for This {
    type Spec = Spec;
    const NAME: &'static str = "rng";
    const FLAG: &'static str = "rng";
    const SUMMARY: &'static str = "random numbers for the guest (virtio-rng)";
    const BARE: &'static str = "enabled";
    const EXAMPLE: &'static str = "on";
    const PRESENCE: Presence = Presence::Standard("on");
    const DRIVERS: &'static [Driver] = &[Driver { module: "virtio_rng", option: "HW_RANDOM_VIRTIO" }];

    fn check(spec: &Spec, name: &str) -> base::Result<()> {
        if spec.rate == Some(Amount(0)) {
            return Err(Fail::new(Why::Usage, format!("set up {name}"))
                .because("rate=0 lets no request through")
                .hint("leave rate out for no limit, or pass off for no device"));
        }
        Ok(())
    }

    fn build(spec: &Spec, kit: &Kit<'_>) -> base::Result<Body> {
        if !spec.enabled {
            return Ok(Body::Absent);
        }
        let rate = spec.rate.map(|Amount(bytes)| Rate { per_second: bytes, burst: bytes });
        let throttle = Throttle::new(None, rate, kit.clock.clone());
        let largest = rate.map_or(LARGEST, |rate| rate.burst.min(LARGEST));
        let (bytes, throttled) = Default::default();
        Ok(Body::Virtio(Box::new(Rng { entropy: kit.host.entropy(), largest, throttle, bytes, throttled })))
    }
}

struct Rng {
    entropy: Entropy,
    /// The most that one request gets: no more than the limit allows in a second, so that no debt lasts.
    largest: u64,
    throttle: Throttle,
    bytes: Arc<Counter>,
    throttled: Arc<Counter>,
}

impl Rng {
    /// Fills the room of one request, up to the bound; says how many bytes it got. A host that has none gives
    /// none: the driver asks again.
    fn fill(&self, chain: &Chain, io: &Io<'_>) -> u32 {
        let wanted = chain.writable().len().min(self.largest);
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
        loop {
            // Asked first: what the limit holds up waits in the ring.
            if let Err(wait) = self.throttle.admit() {
                self.throttled.add(1);
                io.arm(ADMIT, wait);
                return Ok(());
            }
            let Some(chain) = io.next(queue)? else { return Ok(()) };
            let filled = self.fill(&chain, io);
            self.throttle.spend(1, filled.into());
            self.bytes.add(filled.into());
            io.done(chain, filled);
        }
    }

    fn ready(&mut self, _: u16, io: &mut Io<'_>) -> Result<(), Fault> {
        self.kick(0, io)
    }

    fn stop(&mut self, io: &mut Io<'_>) {
        io.disarm(ADMIT);
    }

    fn meters(&self) -> Meters {
        vec![("bytes", self.bytes.clone()), ("throttled", self.throttled.clone())]
    }
}
