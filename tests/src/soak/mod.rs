//! What takes too long for every day: real guests under load for minutes, and a whole Debian.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::harness::{Case, Stop};
use crate::kernels::Flavour;
use crate::real::drivers::come_and_go;
use crate::real::{commands, network};

mod containers;
mod disks;
mod injected;
mod sockets;
mod system;

/// Time for a script here.
const LIMIT: Duration = Duration::from_secs(900);
/// A transport, and the kernel that is tried on it.
const WAYS: [(&str, Flavour); 2] = [("mmio", Flavour::Cloud), ("pci", Flavour::Generic)];

/// All of them.
pub fn cases() -> Vec<Case> {
    [
        containers::cases(),
        disks::cases(),
        system::cases(),
        drivers(),
        sockets::cases(),
        network::soak(),
        commands::soak(),
        injected::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Drivers come and go for longer.
fn drivers() -> Vec<Case> {
    WAYS.map(|(transport, flavour)| {
        Case::new(format!("soak::drivers::come_and_go_{transport}"), move |room| {
            room.limit = LIMIT;
            come_and_go(room, flavour, transport, 15)
        })
    })
    .into()
}

/// The image with a Debian system in it. Where it cannot be made, that is a reason to skip.
pub(crate) fn debian() -> Result<PathBuf, Stop> {
    let program = crate::house::root().join("resources/debian");
    let output = Command::new(&program)
        .output()
        .map_err(|cause| Stop::Skipped(format!("run {}: {cause}", program.display())))?;
    let said = String::from_utf8_lossy(&output.stdout);
    match said.lines().last().filter(|_| output.status.success()) {
        Some(path) => Ok(path.into()),
        None => Err(Stop::Skipped(String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; "))),
    }
}
