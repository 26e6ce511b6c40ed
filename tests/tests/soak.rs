//! Real guests for long: `tests/soak`. As `real`, on hardware virtualization or on the emulated host.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    tests::harness::main("soak", &tests::soak::cases(), tests::real::ground)
}
