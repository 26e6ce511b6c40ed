//! Whether the host's kernel works the rings of a card (vhost-net), and what speaks against it.

use std::io;

use base::host::vhost::Back;
use base::{Fail, Result, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::{Mode, Spec, wrong};
use crate::catalog::Kit;
use crate::virtio::vhost::Worker;

/// Who works the rings of a card on a tap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// This process.
    #[default]
    Off,
    /// The host's kernel where it can, else this process.
    Auto,
    /// The host's kernel (vhost-net).
    On,
}

impl Choice {
    pub fn is_off(&self) -> bool {
        *self == Choice::Off
    }
}

/// What has to be seen of the frames here, and cannot be where the kernel carries them.
fn is_limited(spec: &Spec) -> bool {
    spec.bandwidth.is_some() || spec.packets.is_some()
}

pub fn check(spec: &Spec, mode: Mode, name: &str) -> Result<()> {
    if spec.vhost != Choice::On {
        return Ok(());
    }
    if mode != Mode::Tap {
        let hint = "use mode tap, or leave vhost out";
        return Err(wrong(name, "vhost=on", "the host's kernel works the rings of a tap only", hint));
    }
    if is_limited(spec) {
        let cause = "the host's kernel knows no limits, and frames do not come by here";
        return Err(wrong(name, "limits with vhost=on", cause, "leave one of them out"));
    }
    Ok(())
}

/// One worker for each pair of queues; none where this process does it.
pub fn workers(spec: &Spec, pairs: u16, kit: &Kit<'_>) -> Result<Vec<Worker>> {
    let wanted = match spec.vhost {
        Choice::Off => false,
        Choice::Auto => !is_limited(spec),
        Choice::On => true,
    };
    if !wanted {
        return Ok(Vec::new());
    }
    match (0..pairs).map(|_| worker(kit)).collect() {
        Err(fail) if spec.vhost == Choice::Auto => {
            log::debug!(target: "guest", "{}: the frames go through this process: {fail}", kit.name);
            Ok(Vec::new())
        }
        result => result,
    }
}

fn worker(kit: &Kit<'_>) -> Result<Worker> {
    let back = kit.host.vhost(kit.name, Back::Net, kit.memory)?;
    Worker::new(back, 1 << VIRTIO_NET_F_MRG_RXBUF, None).map_err(|cause: io::Error| {
        Fail::new(Why::Host, format!("have the host's kernel work for {}", kit.name))
            .because(cause)
            .hint("pass vhost=off")
    })
}
