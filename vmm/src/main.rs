//! The `mayfly` command.
//!
//! C's `main`, not Rust's: what the standard library does before that one costs twenty system calls here, and five more
//! with each thread, for a message when a stack overflows. A guard page ends the process without it too, by SIGSEGV.
#![no_main]

// SAFETY: no other function of the program has this name, and it is of the type that C's start-up code calls.
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
extern "C" fn main() -> std::ffi::c_int {
    vmm::cli::main().into()
}
