//! Disks: virtio-blk on a raw file, a block device or a qcow2 image, or on an overlay over one (virtio 1.2, section 5.2).

mod change;
mod device;
mod image;
mod request;

use std::fs::File;

use base::disk::{Backend, Disk};
use base::host::Host;
use base::throttle::{Rate, Throttle};
use base::{Doing, Fail, Result, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::amount::Amount;
use crate::catalog::{Body, Driver, Kind, Kit, Presence, Purpose};
use device::{Blk, Source};

/// The kind.
pub struct This;

/// A disk of the guest: `/dev/vda` and so on, in the order given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The image file or block device; a whole number of 512-byte sectors. A block device that is mounted can only be used
    /// with readonly=on or overlay=on.
    pub path: String,
    /// on: the guest can only read, and several machines may share the file.
    #[serde(default)]
    pub readonly: bool,
    /// raw or qcow2 (default: raw, unless the file looks like another format: then it has to be said).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// on: open the backing files that a qcow2 image names. Whoever made the image chose them.
    #[serde(default, skip_serializing_if = "is_default")]
    pub backing: bool,
    /// on: what the guest writes is thrown away at the end, the image is only read, and any number of machines may
    /// share it; or a file that keeps it, a qcow2 image that is made if it is missing (default: off).
    #[serde(default, skip_serializing_if = "is_default")]
    pub overlay: Overlay,
    /// on: go past the host's page cache (O_DIRECT).
    #[serde(default, skip_serializing_if = "is_default")]
    pub direct: bool,
    /// Queues, 1 to 64; one for each vCPU spares them waiting for each other (default: 1).
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub queues: u16,
    /// Requests in a second at the most (default: no limit).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// Requests that may be saved up for a burst (default: those of one second).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops_burst: Option<u64>,
    /// Bytes in a second at the most, read and written together, such as 100M (default: no limit).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Amount>,
    /// Bytes that may be saved up for a burst (default: those of one second).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst: Option<Amount>,
    /// The serial number that the guest sees, 1 to 20 bytes of ASCII; `serial` is another name of this key (default: the
    /// name of the device, `disk0`).
    #[serde(default, alias = "serial")]
    pub id: Option<String>,
    /// How the host does the work.
    #[serde(default)]
    pub io: Engine,
}

impl Spec {
    /// Whether the image itself is written to.
    fn writes(&self) -> bool {
        !self.readonly && self.overlay == Overlay::Off
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn one() -> u16 {
    1
}

fn is_one(queues: &u16) -> bool {
    *queues == 1
}

/// What the bytes of an image mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the file are those of the disk.
    Raw,
    /// A qcow2 image, version 2 or 3.
    Qcow2,
}

/// Where writes go.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(from = "String", into = "String")]
#[schemars(with = "String")]
pub enum Overlay {
    /// Into the image.
    #[default]
    Off,
    /// Into a file without a name, which goes with the machine.
    Throwaway,
    /// Into this file.
    Kept(String),
}

impl From<String> for Overlay {
    fn from(text: String) -> Overlay {
        match text.as_str() {
            "off" | "false" => Overlay::Off,
            "on" | "true" => Overlay::Throwaway,
            _ => Overlay::Kept(text),
        }
    }
}

impl From<Overlay> for String {
    fn from(overlay: Overlay) -> String {
        match overlay {
            Overlay::Off => "off".to_owned(),
            Overlay::Throwaway => "on".to_owned(),
            Overlay::Kept(path) => path,
        }
    }
}

/// How the host does the work of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// io_uring if the host allows it, or else threads; threads for qcow2.
    #[default]
    Auto,
    /// io_uring; an error if the host does not allow it.
    Uring,
    /// Up to four threads.
    Threads,
}

/// Bytes of a serial number (section 5.2.6).
const ID_BYTES: usize = 20;
/// Queues at the most: the device keeps a bit for each.
const QUEUES: u16 = 64;

impl Kind for This {
    type Spec = Spec;
    const NAME: &'static str = "blk";
    const FLAG: &'static str = "disk";
    const SUMMARY: &'static str =
        "a disk on a file (raw, qcow2) or block device, or on an overlay over one (virtio-blk)";
    const BARE: &'static str = "path";
    const EXAMPLE: &'static str = "path=root.img,readonly=on";
    const PRESENCE: Presence = Presence::OnRequest;
    const DRIVERS: &'static [Driver] = &[Driver { module: "virtio_blk", option: "VIRTIO_BLK" }];

    fn check(spec: &Spec, name: &str) -> Result<()> {
        serial_number(spec.id.as_deref().unwrap_or(name), name)?;
        check(spec, name)
    }

    fn claim(spec: &Spec, name: &str, host: &dyn Host) -> Result<Vec<File>> {
        image::claim(spec, name, host)
    }

    fn serve(purpose: Purpose<'_>) -> Option<Spec> {
        let Purpose::Disk { image, serial, keep } = purpose else { return None };
        Some(Spec {
            path: image.to_str()?.to_owned(),
            readonly: false,
            // What a name says, its giver has said; the content is not asked.
            format: image.extension().is_some_and(|end| end == "qcow2").then_some(Format::Qcow2),
            backing: false,
            overlay: if keep { Overlay::Off } else { Overlay::Throwaway },
            direct: false,
            queues: 1,
            iops: None,
            iops_burst: None,
            bandwidth: None,
            bandwidth_burst: None,
            id: Some(serial.to_owned()),
            io: Engine::Auto,
        })
    }

    fn build(spec: &Spec, kit: &Kit<'_>) -> Result<Body> {
        let id = serial_number(spec.id.as_deref().unwrap_or(kit.name), kit.name)?;
        let throttle = throttle(spec, kit);
        let image = image::open(spec, kit.name, kit.host)?;
        let backend = match spec.io {
            Engine::Auto => Backend::Auto,
            Engine::Uring => Backend::Uring,
            Engine::Threads => Backend::Threads,
        };
        if backend == Backend::Uring {
            Disk::open(&image, kit.memory, backend, 1, kit.name)
                .doing(Why::Unsupported, || format!("set up io_uring for {}", kit.name))
                .map_err(|fail| fail.hint("pass io=threads or io=auto"))?;
        }
        let source = Source { image, backend, name: kit.name.to_owned(), memory: kit.memory.clone() };
        let device = Blk::new(source, spec.readonly, id, spec.queues, throttle);
        let device = device.doing(Why::Host, || format!("ask for the size of {}", spec.path))?;
        Ok(Body::Virtio(Box::new(device)))
    }
}

/// Refuses settings that make no sense together.
fn check(spec: &Spec, name: &str) -> Result<()> {
    let overlaid = spec.overlay != Overlay::Off;
    let raw = spec.format != Some(Format::Qcow2);
    let wrong = [
        (spec.path.is_empty(), "no image is named", "name its file: --disk path=root.img"),
        (spec.queues == 0 || spec.queues > QUEUES, "queues is not 1 to 64", "leave queues out for one"),
        (overlaid && spec.readonly, "a read-only disk is never written to", "leave out readonly or overlay"),
        (
            overlaid && spec.direct,
            "an overlay lives by the page cache that the machines share",
            "leave out direct or overlay",
        ),
        (
            spec.backing && raw,
            "only qcow2 images have backing files",
            "pass format=qcow2, or leave out backing",
        ),
        (spec.iops == Some(0), "iops=0 lets no request through", "leave iops out for no limit"),
        (
            spec.bandwidth == Some(Amount(0)),
            "bandwidth=0 lets no request through",
            "leave bandwidth out for no limit",
        ),
        (spec.iops.is_none() && spec.iops_burst.is_some(), "a burst needs a limit", "pass iops as well"),
        (
            spec.bandwidth.is_none() && spec.bandwidth_burst.is_some(),
            "a burst needs a limit",
            "pass bandwidth as well",
        ),
    ];
    match wrong.into_iter().find(|(wrong, ..)| *wrong) {
        Some((_, cause, hint)) => {
            Err(Fail::new(Why::Usage, format!("set up {name}")).because(cause).hint(hint))
        }
        None => Ok(()),
    }
}

fn throttle(spec: &Spec, kit: &Kit<'_>) -> Throttle {
    let rate = |limit: Option<u64>, burst: Option<u64>| {
        limit.map(|per_second| Rate { per_second, burst: burst.unwrap_or(per_second).max(1) })
    };
    let operations = rate(spec.iops, spec.iops_burst);
    let bytes = rate(spec.bandwidth.map(|amount| amount.0), spec.bandwidth_burst.map(|amount| amount.0));
    Throttle::new(operations, bytes, kit.clock.clone())
}

fn serial_number(text: &str, name: &str) -> Result<[u8; ID_BYTES]> {
    let mut id = [0; ID_BYTES];
    match id.get_mut(..text.len()) {
        Some(room) if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic()) => {
            room.copy_from_slice(text.as_bytes());
            Ok(id)
        }
        _ => Err(Fail::new(Why::Usage, format!("give {name} the serial number {text:?}"))
            .because(format!("it is not 1 to {ID_BYTES} bytes of printable ASCII"))
            .hint("choose a shorter one, or leave id out for the name of the device")),
    }
}
