//! Many programs at the same few names, for the cases of shares.
//!
//!     storm DIR THREADS ROUNDS   says done=COUNT, errors=COUNT, and each kind of error that no file system gives
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;

use rustix::io::Errno;

/// Errors that two programs at the same names get on any file system.
const USUAL: [Errno; 6] =
    [Errno::NOENT, Errno::EXIST, Errno::NOTEMPTY, Errno::ISDIR, Errno::NOTDIR, Errno::MLINK];

fn main() {
    let mut words = std::env::args().skip(1);
    let dir = words.next().unwrap_or_default();
    let mut number = || words.next().and_then(|word| word.parse().ok()).unwrap_or(1);
    storm(Path::new(&dir), number(), number());
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

/// Bytes that look random, and are the same in every run (MMIX's linear congruential generator).
fn dice(count: u64, seed: u64) -> impl Iterator<Item = u64> {
    let mut state = seed;
    (0..count).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 56
    })
}

fn storm(dir: &Path, threads: u64, rounds: u64) {
    let errors: Mutex<BTreeMap<String, u32>> = Mutex::default();
    let (places, done) = (dir.join("storm"), Mutex::new(0u64));
    for n in 0..4 {
        let made = fs::create_dir_all(places.join(format!("d{n}")));
        made.unwrap_or_else(|cause| println!("storm=failed: {cause}"));
    }
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (errors, places, done) = (&errors, &places, &done);
            scope.spawn(move || {
                let mut dice = dice(rounds * 3, thread + 99);
                for _ in 0..rounds {
                    let mut roll = || dice.next().unwrap_or(0);
                    let (what, a, b) = (roll() % 12, roll(), roll());
                    let result = gust(places, what, a, b);
                    if let Err(error) = result
                        && !USUAL.iter().any(|usual| error.raw_os_error() == Some(usual.raw_os_error()))
                    {
                        let line = format!("{what}: {error}");
                        if let Ok(mut errors) = errors.lock() {
                            *errors.entry(line).or_default() += 1;
                        }
                    } else if let Ok(mut done) = done.lock() {
                        *done += 1;
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().unwrap_or_default();
    println!("done={}", done.into_inner().unwrap_or(0));
    println!("errors={}", errors.values().sum::<u32>());
    for (error, count) in errors {
        println!("error={count} {error}");
    }
    println!("cleared={}", fs::remove_dir_all(&places).is_ok());
}

/// One thing of the storm.
fn gust(places: &Path, what: u64, a: u64, b: u64) -> io::Result<()> {
    let path = |n: u64| places.join(format!("d{}/n{}", n % 4, n / 4 % 8));
    let (one, two) = (path(a), path(b));
    match what {
        0 | 1 => open(&one)?.write_all(b"some bytes"),
        2 => {
            let mut text = Vec::new();
            File::open(&one)?.read_to_end(&mut text).map(drop)
        }
        3 | 4 => fs::rename(&one, &two),
        5 => fs::remove_file(&one),
        6 => fs::symlink_metadata(&one).map(drop),
        7 => match fs::hard_link(&one, &two) {
            // A directory.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            result => result,
        },
        8 => {
            let entries = fs::read_dir(places.join(format!("d{}", a % 4)))?;
            entries.flatten().try_for_each(|entry| match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                result => result.map(drop),
            })
        }
        9 => {
            fs::create_dir(&one)?;
            fs::write(one.join("x"), "in it").and_then(|()| fs::rename(&one, &two))
        }
        10 => fs::remove_dir_all(&one),
        _ => {
            let file = open(&one)?;
            fs::remove_file(&one)?;
            file.write_all_at(b"gone", 0)?;
            file.set_len(2)?;
            match file.metadata()?.len() {
                // Or what others have written meanwhile who had it open.
                2 | 4 | 10 => Ok(()),
                len => Err(io::Error::other(format!("a file has become {len} bytes long"))),
            }
        }
    }
}
