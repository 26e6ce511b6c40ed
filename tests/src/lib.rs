//! What the tests stand on: the rules of the house, bare-metal guests, real kernels, and the ground they run on.

pub mod bare;
pub mod churn;
pub mod ground;
#[path = "../guests/mod.rs"]
pub mod guests;
pub mod harness;
pub mod house;
pub mod image;
pub mod initramfs;
pub mod kernels;
pub mod real;
pub mod soak;
