//! What a guest finds when it looks around, and small checks of its devices: each says `key=value` on the console,
//! so that a test on the host can read it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

use rustix::fs::{Advice, fadvise};
use rustix::mount::{UnmountFlags, unmount};
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

use crate::mounts::mount_at;

/// Says in a few lines where this is.
pub fn hello() {
    let uname = rustix::system::uname();
    let name = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
    println!();
    println!("Hello from {} {} on {}.", name(uname.sysname()), name(uname.release()), name(uname.machine()));
    println!("  up        {} s after the kernel started", word("/proc/uptime").unwrap_or_default());
    println!("  cpus      {}", cpus().len());
    println!("  memory    {} MiB, {} MiB of it free", memory("MemTotal:") >> 10, memory("MemFree:") >> 10);
    for disk in disks() {
        let sectors: u64 = word(format!("/sys/block/{disk}/size")).and_then(|n| n.parse().ok()).unwrap_or(0);
        println!("  disk      {disk}, {} MiB", sectors >> 11);
    }
    println!("  clock     {}", word(CLOCK).unwrap_or_default());
}

const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

/// Runs the check that is called `name` and says what came out.
pub fn run(name: &str, argument: &str) {
    let result = match name {
        "cpus" => visit_cpus(),
        "memory" => Ok(format!("{} KiB", memory("MemTotal:"))),
        "clock" => seconds().map(|seconds| format!("{seconds} {}", word(CLOCK).unwrap_or_default())),
        "rng" => random(),
        "disk" => disk(if argument.is_empty() { "vda" } else { argument }),
        "ext4" => ext4(if argument.is_empty() { "vda" } else { argument }),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "there is no such check")),
    };
    match result {
        Ok(value) => println!("{name}={value}"),
        Err(error) => println!("{name}=failed: {error}"),
    }
}

/// The first word in a file.
fn word(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok()?.split_ascii_whitespace().next().map(str::to_owned)
}

fn disks() -> BTreeSet<String> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with("vd") || name.starts_with("pmem")).collect()
}

/// A line of `/proc/meminfo`, in KiB.
fn memory(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Numbers of the CPUs that are on line.
fn cpus() -> Vec<usize> {
    let set = sched_getaffinity(None).unwrap_or_default();
    (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
}

/// Runs on each CPU in turn: the number of those it was seen on.
fn visit_cpus() -> io::Result<String> {
    let mut visited = 0;
    for cpu in cpus() {
        let mut set = CpuSet::new();
        set.set(cpu);
        sched_setaffinity(None, &set)?;
        visited += usize::from(sched_getcpu() == cpu);
    }
    Ok(visited.to_string())
}

/// Seconds since 1970, which the kernel has from the clock chip.
fn seconds() -> io::Result<u64> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map(|now| now.as_secs()).map_err(io::Error::other)
}

fn random() -> io::Result<String> {
    let mut bytes = [0; 32];
    File::open("/dev/hwrng")?.read_exact(&mut bytes)?;
    let distinct: BTreeSet<_> = bytes.into_iter().collect();
    if distinct.len() < 8 { Err(io::Error::other("it repeats itself")) } else { Ok("32 bytes".into()) }
}

/// Writes a pattern over the first MiB of a disk and reads it back from the disk itself.
fn disk(name: &str) -> io::Result<String> {
    let pattern: Vec<u8> =
        (0..1u32 << 18).flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let mut file = File::options().read(true).write(true).open(format!("/dev/{name}"))?;
    file.write_all(&pattern)?;
    file.sync_all()?;
    // What is in memory is dropped, so that the next read goes to the disk.
    fadvise(&file, 0, None, Advice::DontNeed)?;
    file.seek(SeekFrom::Start(0))?;
    let mut back = vec![0; pattern.len()];
    file.read_exact(&mut back)?;
    if back == pattern {
        Ok("1 MiB".into())
    } else {
        Err(io::Error::other("it reads otherwise than written"))
    }
}

/// Mounts an ext4 file system, adds a file, and finds it again after a second mount.
fn ext4(name: &str) -> io::Result<String> {
    let (device, place) = (format!("/dev/{name}"), "/disk");
    let note = format!("{place}/mayfly");
    mount_at("ext4", &device, place, "")?;
    let written = fs::write(&note, "was here\n");
    unmount(place, UnmountFlags::empty())?;
    written?;
    mount_at("ext4", &device, place, "")?;
    let found = fs::read_to_string(&note);
    unmount(place, UnmountFlags::empty())?;
    found.map(|text| text.trim_end().to_owned())
}
