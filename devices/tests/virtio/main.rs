//! Virtio devices, driven as a guest's driver would.

mod blk;
mod driver;
mod rng;
mod transport;
mod vsock;
