//! Facts about x86-64: where things lie, and what a vCPU looks like before its first instruction.
//!
//! Pure functions on plain data: nothing here opens, maps or calls anything.
#![forbid(unsafe_code)]

pub mod cpuid;
pub mod layout;
pub mod msr;
pub mod paging;
pub mod registers;
