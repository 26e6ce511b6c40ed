//! Builds the guest agent, static and small, to be embedded: a binary of the same sources for another machine.

use std::env;
use std::path::PathBuf;
use std::process::Command;

/// The agent is a program for guests, so it is built for this target whatever else is.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let top = PathBuf::from(variable("CARGO_MANIFEST_DIR")).join("..");
    for input in ["resources/agent/src", "resources/agent/Cargo.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={}", top.join(input).display());
    }
    // In a directory of its own: the outer build holds the lock of the usual one.
    let dir = PathBuf::from(variable("OUT_DIR")).join("agent");
    let mut cargo = Command::new(variable("CARGO"));
    cargo.current_dir(&top).args([
        "build",
        "--release",
        "--offline",
        "--quiet",
        "-p",
        "agent",
        "--bin",
        "agent",
    ]);
    cargo.args(["--target", TARGET, "--target-dir"]).arg(&dir);
    // Neither a linter's wrapper nor a fuzzer's flags are meant for it.
    for name in ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "CARGO_BUILD_TARGET"] {
        cargo.env_remove(name);
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    for (setting, value) in [("OPT_LEVEL", "s"), ("LTO", "fat"), ("PANIC", "abort"), ("STRIP", "symbols")] {
        cargo.env(format!("CARGO_PROFILE_RELEASE_{setting}"), value);
    }
    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("build the guest agent: {status}"),
        Err(error) => panic!("build the guest agent: {error}"),
    }
    println!("cargo:rustc-env=MAYFLY_AGENT={}", dir.join(TARGET).join("release/agent").display());
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("read {name}, which cargo sets: {error}"))
}
