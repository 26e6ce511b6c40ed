//! A whole Debian in an archive as the root of a command: thousands of files, and more written than the guest has memory.

use std::process::Command;

use super::{LIMIT, debian};
use crate::ground::quote;
use crate::harness::{Case, Room, Stop, Verdict};
use crate::kernels::{Flavour, Kernel};
use crate::real::expect;

pub fn cases() -> Vec<Case> {
    vec![Case::new("soak::containers::debian", system)]
}

/// Runs a program of this machine, which packs faster than an emulated one.
fn here(program: &str, arguments: &[&str]) -> Result<(), Stop> {
    let output =
        Command::new(program).args(arguments).output().map_err(|cause| format!("run {program}: {cause}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr)).into()),
    }
}

fn system(room: &mut Room<'_>) -> Verdict {
    room.limit = LIMIT;
    let image = debian()?.display().to_string();
    let top = room.dir.join("top").display().to_string();
    let archive = room.dir.join("debian.tar.gz").display().to_string();
    std::fs::create_dir(&top).map_err(|cause| format!("make {top}: {cause}"))?;
    here("debugfs", &["-R", &format!("rdump / {top}"), &image])?;
    here("tar", &["-C", &top, "-czf", &archive, "."])?;
    std::fs::remove_dir_all(&top).map_err(|cause| format!("remove {top}: {cause}"))?;
    let kernel = Kernel::fetch(Flavour::Cloud).map_err(Stop::Skipped)?;
    let mayfly = quote(&room.mayfly.display().to_string());
    let kernel = quote(&kernel.bzimage().display().to_string());
    let options = room.ground.options();
    let output = room.shell(&format!(
        "export XDG_CACHE_HOME=$PWD/cache; {mayfly} run {options} --kernel {kernel} --image debian.tar.gz -- sh -c '
           echo packages=$(dpkg -l | grep -c ^ii); echo broken=$(dpkg --audit | wc -l)
           cd /usr && find . -xdev -type f -exec cat {{}} + | wc -c | sed s/^/bytes=/
           dd if=/dev/urandom of=/big bs=1M count=600 status=none && sync && sha256sum /big >/sum
           echo 3 >/proc/sys/vm/drop_caches; sha256sum --quiet -c /sum && echo kept=yes'"
    ))?;
    output.code(0)?;
    expect(&output, "broken", "0")?;
    expect(&output, "kept", "yes")
}
