//! The room for system calls that Rust's libraries do not make safe. One of the three rooms with `unsafe`.
#![allow(unsafe_code)]

pub mod children;
pub mod death;
pub mod iovec;
pub mod owner;
pub mod program;
pub mod ram;
pub mod scratch;
pub mod signals;
pub mod socket;
pub mod tap;
pub mod uring;
pub mod vhost;
