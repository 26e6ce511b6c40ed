//! Stock kernels, and the bare-metal cases once more, on hardware virtualization: this machine's where it has it, else
//! that of the emulated host, which is started once for all of them.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use tests::harness;
use tests::real::{cases, ground};

fn main() -> ExitCode {
    let mut cases = cases();
    cases.extend(tests::bare::cases());
    harness::main("real", &cases, ground)
}
