//! Works on one file or disk at random and finds whether it keeps what was written ([`tests::churn`]).
//!
//!     churn FILE SEED COUNT [MIB]     COUNT operations on a file of at most so many MiB
//!
//! Writes, reads, mapped writes and reads, direct ones, holes, zeroes, allocations, cuts, insertions and removals in the
//! middle, syncs, a cache that is dropped, a file that is opened anew. FILE may be a block device: it keeps its size, and
//! holes are punched in the disk. At the end all of it is read from the disk once more. The same seed does the same.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::path::Path;
use std::process::ExitCode;

use tests::churn::Work;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (path, numbers) = words.split_first().unwrap_or((&"", &[]));
    let numbers: Option<Vec<u64>> = numbers.iter().map(|word| word.parse().ok()).collect();
    let (seed, count, mib) = match numbers.as_deref() {
        Some([seed, count]) => (*seed, *count, 4),
        Some([seed, count, mib]) => (*seed, *count, *mib),
        _ => {
            eprintln!("churn FILE SEED COUNT [MIB]");
            return ExitCode::from(2);
        }
    };
    let mut log = VecDeque::new();
    let limit = usize::try_from(mib << 20).unwrap_or(usize::MAX);
    match Work::open(Path::new(path), seed, limit).and_then(|mut work| work.run(count, &mut log)) {
        Ok(done) => {
            println!("churned={done}");
            ExitCode::SUCCESS
        }
        Err(cause) => {
            log.iter().for_each(|line| println!("{line}"));
            println!("churned=wrong: {path}, seed {seed}: {cause}");
            ExitCode::FAILURE
        }
    }
}
