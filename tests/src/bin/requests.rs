//! The guest's side of the disk benchmark: requests past the guest's page cache, counted and timed.
//!
//!     requests DISK...        in the guest
//!
//! It says `begin`, sleeps for a moment, works, says `end`, sleeps, and then says what it did, so that somebody on the host
//! can look at counters in between. Each disk is at least as large as [`SPAN`]. Work named `none` is all of that and no
//! request: what it costs is to be taken off.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use base::disk::{Action, Backend, Disk, Image};
use base::memory::Memory;
use rustix::fs::OFlags;

/// Bytes of a disk that are used.
const SPAN: u64 = 32 << 20;
const PAGE: u64 = 4 << 10;
const MIB: u64 = 1 << 20;
/// Requests in flight where there are many.
const DEPTH: u16 = 32;
/// For the host to look at its counters: it has one processor, and this guest lets go of it.
const PAUSE: Duration = Duration::from_millis(100);

/// A kind of work: its name, requests in flight, bytes of one, how many there are.
struct Work {
    name: &'static str,
    action: Action,
    depth: u16,
    size: u64,
    count: u16,
}

const fn work(name: &'static str, action: Action, depth: u16, size: u64, count: u16) -> Work {
    Work { name, action, depth, size, count }
}

const WORKS: [Work; 7] = [
    work("none", Action::Read, 1, PAGE, 0),
    work("read-4k", Action::Read, 1, PAGE, 256),
    work("write-4k", Action::Write, 1, PAGE, 256),
    work("read-4k-deep", Action::Read, DEPTH, PAGE, 512),
    work("write-4k-deep", Action::Write, DEPTH, PAGE, 512),
    work("read-1m", Action::Read, 1, MIB, 16),
    work("write-1m", Action::Write, 1, MIB, 16),
];

fn main() -> ExitCode {
    for disk in std::env::args().skip(1) {
        if let Err(cause) = try_all(&disk) {
            println!("requests: {disk}: {cause}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn try_all(path: &str) -> io::Result<()> {
    let open = || {
        let direct = OFlags::DIRECT.bits().cast_signed();
        OpenOptions::new().read(true).write(true).custom_flags(direct).open(path)
    };
    let file = open()?;
    // No 2 MiB of it are aligned as such, so the buffers are of pages that lie as they come.
    let memory = Memory::new(&[(PAGE, MIB)])?;
    let mut disk = Disk::open(&Image::direct(open()?)?, &memory, Backend::Uring, DEPTH, "requests")?;
    for work in &WORKS {
        // The same once before: buffers, caches and the host's tables are there then.
        let mut run = || match work.depth {
            1 => one_by_one(&file, work),
            _ => together(&mut disk, work),
        };
        run()?;
        let interrupts = interrupts()?;
        println!("begin");
        sleep(PAUSE);
        let start = Instant::now();
        run()?;
        let took = start.elapsed().as_nanos();
        println!("end");
        sleep(PAUSE);
        let name = path.rsplit('/').next().unwrap_or(path);
        let count = work.count;
        println!("row {name} {} {count} {took} {}", work.name, self::interrupts()? - interrupts);
    }
    Ok(())
}

/// Where requests go: all over the disk for small ones, one after another for large ones.
struct Places {
    work: &'static Work,
    at: u64,
}

impl Iterator for Places {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let slots = SPAN / self.work.size;
        // Numerical Recipes' generator; its upper bits are the good ones.
        self.at = match self.work.size {
            MIB => self.at + 1,
            _ => self.at.wrapping_mul(1_664_525).wrapping_add(1_013_904_223) & u64::from(u32::MAX),
        };
        let slot = if self.work.size == MIB { self.at } else { self.at >> 8 };
        Some(slot % slots * self.work.size)
    }
}

fn places(work: &'static Work) -> impl Iterator<Item = u64> {
    Places { work, at: 0 }.take(work.count.into())
}

/// One request after another, by plain system calls.
fn one_by_one(file: &File, work: &'static Work) -> io::Result<()> {
    let (size, page) = (usize::try_from(work.size).unwrap_or(0), usize::try_from(PAGE).unwrap_or(0));
    let mut buffer = vec![0x5a; size + page];
    let head = buffer.as_ptr().align_offset(page);
    let buffer = buffer.get_mut(head..head + size).unwrap_or_default();
    for place in places(work) {
        match work.action {
            Action::Read => file.read_exact_at(buffer, place)?,
            _ => file.write_all_at(buffer, place)?,
        }
    }
    Ok(())
}

/// As many as there may be in one system call, and the next when all of them have ended.
fn together(disk: &mut Disk, work: &'static Work) -> io::Result<()> {
    let places: Vec<u64> = places(work).collect();
    let mut ended = Vec::new();
    for batch in places.chunks(work.depth.into()) {
        for (tag, place) in (0..).zip(batch) {
            let part = (PAGE + u64::from(tag) * PAGE, u32::try_from(PAGE).unwrap_or(0));
            disk.take(tag, work.action, (*place, PAGE), [part].into_iter())?;
        }
        disk.drain(&mut ended);
        for (_, end) in ended.drain(..) {
            end?;
        }
    }
    Ok(())
}

/// Interrupts of virtio devices so far.
fn interrupts() -> io::Result<u64> {
    let table = fs::read_to_string("/proc/interrupts")?;
    let ours = table.lines().filter(|line| line.contains("virtio"));
    let of =
        |line: &str| line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()).sum::<u64>();
    Ok(ours.map(of).sum())
}
