//! Sockets between guest and host: virtio-vsock (virtio 1.2, section 5.10), ending in Unix sockets of the host.
//!
//! A program of the host connects to the device's socket, says `CONNECT port`, and after the answer `OK port` is
//! joined to the program of the guest that listens there. A program of the guest that connects to the host's port N
//! is joined to whoever listens on the Unix socket `PATH_N`, or to this process where that answers at N.

mod connection;
mod device;
mod gate;
mod packet;
mod table;
mod traffic;
mod vhost;

use std::fs::File;
use std::path::{Path, PathBuf};

use base::host::socket::NAME_MAX;
use base::host::{Door, Host};
use base::{Fail, Result, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::device::{Site, Vsock};
use self::gate::{Gate, Public};
use crate::catalog::{Body, Driver, Kind, Kit, Presence, Purpose};

/// The first context ID that no one has yet (section 5.10.4).
const FIRST_CID: u32 = 3;
/// What is added to the path for the largest port.
const LONGEST_PORT: usize = "_4294967295".len();

/// A socket device.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// The Unix socket on which programs of the host reach the guest; it is made, and removed at the end. A guest's
    /// connection to the host's port N goes to the Unix socket of that name with `_N` at its end. Without it there is
    /// no way to programs of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The guest's context ID: 3 to 4294967294.
    #[serde(default = "first_cid")]
    pub cid: u32,
    /// on: the host's kernel carries the streams (vhost-vsock). The guest is reached on its context ID by sockets of the
    /// family AF_VSOCK, and reaches those of the host; there is no Unix socket.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vhost: bool,
}

fn first_cid() -> u32 {
    FIRST_CID
}

/// The kind.
pub struct This;

impl Kind for This {
    type Spec = Spec;
    const NAME: &'static str = "vsock";
    const FLAG: &'static str = "vsock";
    const SUMMARY: &'static str =
        "sockets between guest and host, over a Unix socket of the host (virtio-vsock)";
    const BARE: &'static str = "path";
    const EXAMPLE: &'static str = "path=guest.sock";
    const PRESENCE: Presence = Presence::OnRequest;
    const DRIVERS: &'static [Driver] =
        &[Driver { module: "vmw_vsock_virtio_transport", option: "VIRTIO_VSOCKETS" }];

    fn serve(purpose: Purpose<'_>) -> Option<Spec> {
        matches!(purpose, Purpose::Calls).then_some(Spec { path: None, cid: FIRST_CID, vhost: false })
    }

    fn does_serve(spec: &Spec, _: Purpose<'_>) -> bool {
        // The kernel knows no process that answers.
        !spec.vhost
    }

    fn check(spec: &Spec, name: &str) -> Result<()> {
        if spec.cid < FIRST_CID || spec.cid == u32::MAX {
            return Err(Fail::new(Why::Usage, format!("give {name} the context ID {}", spec.cid))
                .because(format!("a guest has one of {FIRST_CID} to {}", u32::MAX - 1))
                .hint("leave cid out for 3"));
        }
        if spec.vhost && spec.path.is_some() {
            return Err(Fail::new(Why::Usage, format!("use a Unix socket for {name} with vhost=on"))
                .because("streams that the host's kernel carries end in sockets of the family AF_VSOCK")
                .hint("leave the path out, or vhost"));
        }
        let room = NAME_MAX.saturating_sub(LONGEST_PORT);
        if let Some(path) = spec.path.as_ref().filter(|path| path.as_os_str().len() > room) {
            return Err(Fail::new(Why::Usage, format!("use {} for {name}", path.display()))
                .because(format!(
                    "the name of a socket has at most {room} bytes, so that `_PORT` fits behind it"
                ))
                .hint("name it relative to the directory mayfly is started in"));
        }
        Ok(())
    }

    fn claim(spec: &Spec, name: &str, host: &dyn Host) -> Result<Vec<File>> {
        if let Some(path) = &spec.path {
            host.door(name, Door::Socket(path))?;
        }
        Ok(Vec::new())
    }

    fn build(spec: &Spec, kit: &Kit<'_>) -> Result<Body> {
        if spec.vhost {
            return Ok(Body::Virtio(Box::new(vhost::Vsock::new(spec.cid, kit)?)));
        }
        let public = spec.path.as_deref().map(|path| open(path, kit)).transpose()?;
        let site = Site {
            gate: Gate { public, answers: kit.host.answers() },
            clock: kit.clock.clone(),
            memory: kit.memory.clone(),
        };
        Ok(Body::Virtio(Box::new(Vsock::new(site, spec.cid))))
    }
}

/// Opens the device to programs of the host, at `path`.
fn open(path: &Path, kit: &Kit<'_>) -> Result<Public> {
    Ok(Public {
        listener: kit.host.listen(kit.name, path)?,
        dialer: kit.host.dialer(),
        path: path.to_owned(),
    })
}
