//! Virtio devices, driven as a guest's driver would.

mod blk;
mod driver;
mod images;
mod rng;
mod transport;
mod vsock;
