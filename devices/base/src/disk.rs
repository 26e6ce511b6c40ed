//! A disk: reads, writes and the rest on an open image, many at a time.
//!
//! Two back ends with one face: io_uring, and a small pool of threads where the host has or allows none, and for
//! images that are more than files. Raw images and throwaway overlays move straight from and to guest memory.

mod image;
mod job;
mod layers;
mod pool;
pub mod qcow2;
mod written;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use crate::memory::Memory;
use crate::sys::uring::Uring;
use image::Kind;

pub use image::{Image, go_direct};
pub(crate) use job::STEPS;
pub use job::{Action, Job};
pub(crate) use layers::Layers;

/// Which back end serves a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// io_uring if the host allows it, or else threads; for files in memory, no more than the calling thread.
    #[default]
    Auto,
    /// io_uring.
    Uring,
    /// Threads.
    Threads,
}

/// A job that has ended: its tag, and how it went.
pub type Ended = (u16, io::Result<()>);

/// What both back ends do.
pub(crate) trait Serve: Send {
    /// Takes a job; it may start only at the next `go`.
    fn take(&mut self, tag: u16, job: Job);
    /// Starts what was taken.
    fn go(&mut self);
    /// Collects what has ended.
    fn reap(&mut self, ended: &mut Vec<Ended>);
    /// Waits until at least one job has ended.
    fn wait(&mut self);
    /// Becomes readable when a job ends.
    fn bell(&self) -> BorrowedFd<'_>;
}

/// An open disk.
pub struct Disk {
    back: Box<dyn Serve>,
    image: Image,
    memory: Memory,
    in_flight: usize,
    /// Jobs that were done by doing nothing.
    idle: Vec<Ended>,
}

impl Disk {
    /// Serves `image` with at most `depth` jobs in flight on parts of `memory`. `name` begins the names of threads.
    ///
    /// # Errors
    /// The host has no io_uring for us, or the image cannot do with it, and it was asked for by name; or there is no
    /// descriptor left.
    pub fn open(
        image: &Image,
        memory: &Memory,
        backend: Backend,
        depth: u16,
        name: &str,
    ) -> io::Result<Disk> {
        let threads = || pool::Pool::new(image.clone(), name).map(|pool| Box::new(pool) as Box<dyn Serve>);
        let back: Box<dyn Serve> = match (backend, &image.0) {
            (Backend::Uring, Kind::Flat(layers)) => Box::new(Uring::new(layers.clone(), depth)?),
            (Backend::Uring, Kind::Qcow2(_)) => {
                return Err(io::Error::new(io::ErrorKind::Unsupported, "qcow2 images need threads"));
            }
            (Backend::Threads, _) | (Backend::Auto, Kind::Qcow2(_)) => threads()?,
            // io_uring has a worker thread do what memory files could do at once.
            (Backend::Auto, Kind::Flat(layers)) if layers.in_memory() => threads()?,
            (Backend::Auto, Kind::Flat(layers)) => match Uring::new(layers.clone(), depth) {
                Ok(ring) => Box::new(ring),
                Err(cause) => {
                    log::debug!("{name}: no io_uring ({cause}), threads it is");
                    threads()?
                }
            },
        };
        Ok(Disk { back, image: image.clone(), memory: memory.clone(), in_flight: 0, idle: Vec::new() })
    }

    /// Takes a job on `len` bytes of the disk from `offset`, and on `parts` of guest memory (address, bytes) for reads
    /// and writes, which together are as long. `tag` comes back with its end. It starts at the next [`Disk::go`].
    ///
    /// # Errors
    /// A part is not in guest memory.
    pub fn take(
        &mut self,
        tag: u16,
        action: Action,
        (offset, len): (u64, u64),
        parts: impl Iterator<Item = (u64, u32)>,
    ) -> io::Result<()> {
        let job = Job::new(action, offset, len, &self.memory, parts)?;
        self.in_flight += 1;
        match &self.image.0 {
            // What goes with this process needs no stable storage.
            Kind::Flat(layers) if action == Action::Flush && layers.throwaway() => {
                self.idle.push((tag, Ok(())))
            }
            _ => self.back.take(tag, job),
        }
        Ok(())
    }

    /// Starts all jobs taken: with io_uring one system call for all of them, in which those end that need not wait.
    pub fn go(&mut self) {
        self.back.go();
    }

    /// Adds the jobs that have ended to `ended`.
    pub fn reap(&mut self, ended: &mut Vec<Ended>) {
        let before = ended.len();
        ended.append(&mut self.idle);
        self.back.reap(ended);
        self.in_flight = self.in_flight.saturating_sub(ended.len() - before);
    }

    /// Hands what the image keeps in memory to the host: after a `kill -9` it would be lost. Waits for no disk.
    ///
    /// # Errors
    /// As the host answers.
    pub fn settle(&self) -> io::Result<()> {
        match &self.image.0 {
            Kind::Flat(_) => Ok(()),
            Kind::Qcow2(image) => image.settle(),
        }
    }

    /// Waits for all jobs; after it, no part of guest memory is touched any more.
    pub fn drain(&mut self, ended: &mut Vec<Ended>) {
        self.back.go();
        self.reap(ended);
        while self.in_flight > 0 {
            self.back.wait();
            self.reap(ended);
        }
    }
}

impl AsFd for Disk {
    /// Becomes readable when a job ends; to be waited for edge-triggered, and never read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.back.bell()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.drain(&mut Vec::new());
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
