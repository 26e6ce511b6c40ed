//! The `mayfly` command.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    vmm::cli::main()
}
