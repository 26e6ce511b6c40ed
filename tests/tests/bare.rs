//! Guests of a few instructions, on this machine's /dev/kvm: each way to end, each port, each wrong input.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use tests::ground::{Ground, Shell};
use tests::harness::{self, Stop};

fn main() -> ExitCode {
    harness::main("bare", &tests::bare::cases(), |_| {
        match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
            Ok(_) => Ok(Box::new(Shell::local()?) as Box<dyn Ground>),
            Err(cause) => Err(Stop::Skipped(format!(
                "open /dev/kvm: {cause}; `real` runs these cases on the emulated host"
            ))),
        }
    })
}
