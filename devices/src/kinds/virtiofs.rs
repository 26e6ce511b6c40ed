//! Directories of the host in the guest: virtio-fs (virtio 1.2, section 5.11), served in this process.
//!
//! The guest's kernel resolves names, follows links and checks permissions; it asks for one step at a time, and no step
//! leads out of the directory.

mod attributes;
mod data;
mod device;
mod handles;
mod names;
mod nodes;
mod server;
mod wire;

use std::fs::File;
use std::path::PathBuf;

use base::host::Host;
use base::{Doing, Fail, Result, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::device::{Fs, TAG_BYTES};
use self::nodes::Limits;
use self::server::{Rules, Server};
use super::on;
use crate::catalog::{Access, Body, Driver, Kind, Kit, Presence, Purpose};

/// Files that the guest can have open.
const HANDLES: u16 = 16 << 10;
/// Places of files held open beyond those: what is looked at often.
const PLACES: u16 = 32 << 10;
/// A kernel needs more than that for each file it knows. So a guest can know as many files as its memory has room for.
const NODE_BYTES: u64 = 1 << 10;
/// Files that the smallest guest can know, and the largest: 300 bytes of ours each.
const NODES: (u64, u64) = (1 << 16, 1 << 22);

/// A directory of the host that the guest can mount: `mount -t virtiofs TAG /mnt`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The directory. The guest reaches it and what is below it, other file systems mounted there included, and no symbolic
    /// link leads out of it.
    pub path: PathBuf,
    /// The name by which the guest mounts it, 1 to 36 bytes (default: the name of the device, `share0`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// on: the guest can only read.
    #[serde(default)]
    pub readonly: bool,
    /// What the guest may keep in its memory: auto, always or never.
    #[serde(default)]
    pub cache: Cache,
    /// on: a file system that is mounted below the directory is one of its own in the guest, too. off: it is all one, for
    /// an overlay over it, which refuses others; files on different ones may then have the same inode number.
    #[serde(default = "on", skip_serializing_if = "is_on")]
    pub submounts: bool,
}

fn is_on(submounts: &bool) -> bool {
    *submounts
}

/// What the guest may keep in its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// What it has read, as long as the file has not changed when it is opened again. Names and attributes for a second.
    #[default]
    Auto,
    /// All of it, for as long as it likes, and writes go to the host when it sees fit: for directories that nobody else
    /// changes.
    Always,
    /// Nothing: each read and write goes to the host.
    Never,
}

/// The kind.
pub struct This;

impl Kind for This {
    type Spec = Spec;
    const NAME: &'static str = "virtiofs";
    const FLAG: &'static str = "share";
    const SUMMARY: &'static str = "a directory of the host that the guest can mount (virtio-fs)";
    const BARE: &'static str = "path";
    const EXAMPLE: &'static str = "path=src,tag=src,readonly=on";
    const PRESENCE: Presence = Presence::OnRequest;
    const DRIVERS: &'static [Driver] = &[Driver { module: "virtiofs", option: "VIRTIO_FS" }];

    fn check(spec: &Spec, name: &str) -> Result<()> {
        tag(spec, name).map(drop)
    }

    fn claim(spec: &Spec, name: &str, host: &dyn Host) -> Result<Vec<File>> {
        Ok(vec![host.directory(name, &spec.path)?.into()])
    }

    fn serve(purpose: Purpose<'_>) -> Option<Spec> {
        let Purpose::Directory { path, tag, access } = purpose else { return None };
        Some(Spec {
            path: path.to_owned(),
            tag: Some(tag.to_owned()),
            readonly: access != Access::Through,
            cache: Cache::default(),
            submounts: access != Access::Layered,
        })
    }

    fn build(spec: &Spec, kit: &Kit<'_>) -> Result<Body> {
        let tag = tag(spec, kit.name)?;
        let root = kit.host.directory(kit.name, &spec.path)?;
        kit.host.expect_descriptors(u64::from(HANDLES).saturating_add(PLACES.into()));
        let nodes = kit.memory.len().checked_div(NODE_BYTES).unwrap_or(0).clamp(NODES.0, NODES.1);
        let limits =
            Limits { nodes: usize::try_from(nodes).unwrap_or(usize::MAX), places: usize::from(PLACES) };
        let rules = Rules { readonly: spec.readonly, cache: spec.cache, submounts: spec.submounts };
        let server = Server::new(root, rules, limits, usize::from(HANDLES), kit.clock.clone());
        let server =
            server.doing(Why::Host, || format!("look at {} for {}", spec.path.display(), kit.name))?;
        Ok(Body::Virtio(Box::new(Fs::new(kit.name, tag, server, kit.memory.clone()))))
    }
}

/// The tag as the driver reads it.
fn tag(spec: &Spec, name: &str) -> Result<[u8; TAG_BYTES]> {
    let text = spec.tag.as_deref().unwrap_or(name);
    let mut tag = [0; TAG_BYTES];
    match tag.get_mut(..text.len()) {
        Some(room) if !text.is_empty() && !text.contains('\0') => {
            room.copy_from_slice(text.as_bytes());
            Ok(tag)
        }
        _ => Err(Fail::new(Why::Usage, format!("give {name} the tag {text:?}"))
            .because(format!("it is not 1 to {TAG_BYTES} bytes"))
            .hint("name it by tag=NAME; the guest mounts it by that name")),
    }
}
