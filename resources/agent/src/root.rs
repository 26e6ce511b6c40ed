//! The root of a guest: file systems put in their places, and the way into them.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent::orders::{CHANGES, ON_DISKS, Orders, Source, Volume, Writes};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, mount_bind, mount_change, mount_move};

use crate::mounts::{mount_any, mount_at, mount_with};
use crate::network;

/// The place of the new root until it is entered.
const ROOT: &str = "/.root";
/// Beneath it are the layers of what is private to the guest.
const LAYERS: &str = "/.layers";
/// Longest wait for a disk to appear.
const PATIENCE: Duration = Duration::from_secs(10);

/// Makes the guest what the orders say.
pub fn build(orders: &Orders) -> io::Result<()> {
    let name = orders.hostname.as_slice();
    rustix::system::sethostname(name)?;
    let mut changes = None;
    if let Some(root) = &orders.root {
        place(root, Path::new(ROOT), 0, orders.changes)?;
        // While its path can still be walked.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        changes =
            orders.changes.then(|| rustix::fs::open(layer(0).upper, flags, Mode::empty())).transpose()?;
        enter(ROOT)?;
    }
    if orders.systemd {
        // The rest is its own matter.
        mount_at("tmpfs", "tmpfs", "/run", "mode=755")?;
    } else {
        furnish();
    }
    if let Some(changes) = changes {
        show(&changes)?;
    }
    for (volume, number) in orders.volumes.iter().zip(1..) {
        let inside = OsStr::from_bytes(&volume.place);
        if !Path::new(inside).is_absolute() {
            let text = format!("mount at {}: it is no absolute path", inside.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        place(volume, Path::new(inside), number, false)?;
    }
    network::build(&orders.interfaces)
}

/// Mounts a volume. `number` tells its layers from those of others; a `plain` one holds all that has changed itself.
fn place(volume: &Volume, at: &Path, number: u32, plain: bool) -> io::Result<()> {
    if volume.writes != Writes::Private {
        return attach(volume, at, volume.writes == Writes::Refused);
    }
    let Layer { lower, memory, upper, work } = layer(number);
    attach(volume, &lower, true)?;
    mount_at("tmpfs", "private", &memory, "mode=755")?;
    for dir in [&upper, &work] {
        fs::create_dir_all(dir)?;
    }
    // A renamed directory is copied: a reference to the one below would be of no use elsewhere.
    let plain = if plain { ",redirect_dir=off,metacopy=off" } else { "" };
    let options = format!(
        "lowerdir={},upperdir={},workdir={}{plain}",
        lower.display(),
        upper.display(),
        work.display()
    );
    mount_at("overlay", "private", at, &options)
}

/// Directories of what is private to the guest.
struct Layer {
    lower: PathBuf,
    memory: PathBuf,
    upper: PathBuf,
    work: PathBuf,
}

/// Out of the way of everything, and reachable as long as the overlay holds it.
fn layer(number: u32) -> Layer {
    let [lower, memory] = ["lower", "memory"].map(|name| PathBuf::from(format!("{LAYERS}/{number}/{name}")));
    Layer { upper: memory.join("upper"), work: memory.join("work"), lower, memory }
}

/// Shows what is written to the root, in a place that is root's alone.
fn show(changes: &OwnedFd) -> io::Result<()> {
    fs::create_dir_all(CHANGES)?;
    if let Some(parent) = Path::new(CHANGES).parent() {
        fs::set_permissions(parent, PermissionsExt::from_mode(0o700))?;
    }
    Ok(mount_bind(format!("/proc/self/fd/{}", changes.as_raw_fd()), CHANGES)?)
}

fn attach(volume: &Volume, at: &Path, refuse: bool) -> io::Result<()> {
    let flags = if refuse { MountFlags::RDONLY } else { MountFlags::empty() };
    match &volume.source {
        Source::Directory(tag) => {
            let tag = String::from_utf8_lossy(tag).into_owned();
            mount_with("virtiofs", &tag, at, "", flags)
        }
        Source::Disk(serial) => {
            let disk = find_disk(serial)?;
            let kinds: Vec<&str> = ON_DISKS.iter().map(|kind| kind.name).collect();
            mount_any(&kinds, &disk, at, flags)
        }
    }
}

/// The device file of the disk with a serial number.
fn find_disk(serial: &[u8]) -> io::Result<String> {
    let start = Instant::now();
    loop {
        for entry in fs::read_dir("/sys/block").into_iter().flatten() {
            let entry = entry?;
            if fs::read(entry.path().join("serial")).is_ok_and(|found| found == serial) {
                return Ok(format!("/dev/{}", entry.file_name().display()));
            }
        }
        if start.elapsed() > PATIENCE {
            let text = format!("there is no disk {}", String::from_utf8_lossy(serial));
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Makes `root` the root directory, with this kernel's own file systems in it.
pub fn enter(root: &str) -> io::Result<()> {
    for place in ["proc", "sys", "dev"] {
        let inside = format!("{root}/{place}");
        fs::create_dir_all(&inside)?;
        mount_move(format!("/{place}"), inside)?;
    }
    std::env::set_current_dir(root)?;
    // Over the initramfs rather than beneath it: then this root can be pivoted, as namespaces want to.
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")
}

/// Mounts what programs expect of a running system. A kernel or a root without a place for something works without it.
pub fn furnish() {
    // As after the start of any distribution: what is mounted here is seen by containers, too.
    let _ = mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC);
    for (kind, place, options) in [
        ("devpts", "/dev/pts", "mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("tmpfs", "/run", "mode=755"),
        ("debugfs", "/sys/kernel/debug", ""),
        ("tracefs", "/sys/kernel/tracing", ""),
        ("securityfs", "/sys/kernel/security", ""),
        ("bpf", "/sys/fs/bpf", ""),
        ("cgroup2", "/sys/fs/cgroup", ""),
    ] {
        let _ = mount_at(kind, kind, Path::new(place), options);
    }
    let links = [("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1")];
    for (name, target) in links.into_iter().chain([("stderr", "/proc/self/fd/2")]) {
        let _ = std::os::unix::fs::symlink(target, format!("/dev/{name}"));
    }
    if fs::create_dir("/tmp").is_ok() {
        let all = PermissionsExt::from_mode(0o1777);
        let _ = fs::set_permissions("/tmp", all);
    }
}
