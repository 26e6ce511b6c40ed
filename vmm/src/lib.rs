//! mayfly: a hypervisor for virtual machines that live for a test.

pub mod accel;
pub mod builtin;
pub mod cli;
pub mod control;
pub mod doctor;
pub mod echo;
pub mod hang;
pub mod health;
pub mod host;
pub mod hv;
pub mod image;
pub mod junit;
pub mod kernels;
pub mod ktap;
pub mod lab;
pub mod log;
pub mod machine;
pub mod matrix;
pub mod modules;
pub mod outcome;
pub mod plan;
pub mod quote;
pub mod session;
pub mod terminal;
