//! The io_uring back end of disks: one system call starts many jobs, and those that need not wait end in it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, cqueue, opcode, squeue};

use crate::disk::{Action, Ended, Job, Layers, STEPS, Serve};

/// A ring for one disk.
pub struct Uring {
    ring: IoUring,
    /// Files not registered with the ring: the kernel takes a closed ring apart in its own time, and would hold a registered
    /// file, with its lock, beyond the end of this process; the next machine would find its disk in use.
    layers: Arc<Layers>,
    /// By tag. A job stays here, with its list of memory, until the kernel has answered it.
    jobs: Vec<Option<Job>>,
    /// Answers that this side gave itself.
    ended: Vec<Ended>,
    in_flight: usize,
}

/// The kernel owes us these: with a full machine it asks to come again.
fn passing(error: &io::Error) -> bool {
    let passing = [libc::EINTR, libc::EAGAIN, libc::EBUSY];
    error.raw_os_error().is_some_and(|errno| passing.contains(&errno))
}

impl Uring {
    /// A ring for jobs with tags below `depth`.
    ///
    /// # Errors
    /// The host has no io_uring, or forbids it (`EPERM` in many containers).
    pub fn new(layers: Arc<Layers>, depth: u16) -> io::Result<Uring> {
        let entries = u32::from(depth).next_power_of_two();
        // COOP_TASKRUN (Linux 5.19): answers wait for our next system call instead of an interrupt.
        let ring = IoUring::builder()
            .setup_coop_taskrun()
            .build(entries)
            .or_else(|_| IoUring::builder().build(entries))?;
        let jobs = std::iter::repeat_with(|| None).take(depth.into()).collect();
        Ok(Uring { ring, layers, jobs, ended: Vec::new(), in_flight: 0 })
    }

    fn entry(file: Fd, job: &Job) -> squeue::Entry {
        let (list, count) = job.iovecs.raw();
        match (job.action, job.mode()) {
            (Action::Read, _) => opcode::Readv::new(file, list, count).offset(job.offset).build(),
            (Action::Write, _) => opcode::Writev::new(file, list, count).offset(job.offset).build(),
            (_, Some(mode)) => opcode::Fallocate::new(file, job.len)
                .offset(job.offset)
                .mode(mode.bits().cast_signed())
                .build(),
            (_, None) => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        }
    }

    fn push(&mut self, tag: u16, job: Job) {
        let Some(slot) = self.jobs.get_mut(usize::from(tag)).filter(|slot| slot.is_none()) else {
            self.ended.push((tag, Err(io::ErrorKind::InvalidInput.into())));
            return;
        };
        let job = slot.insert(job);
        let file = Fd(self.layers.prepare(job).as_raw_fd());
        let entry = Self::entry(file, job).user_data(tag.into());
        // SAFETY: what the entry points to (a list and the memory in it) belongs to the job, which stays in its slot
        // until the kernel has answered it, as do the files; dropping the ring waits for all answers.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        match pushed {
            Ok(()) => self.in_flight += 1,
            // Cannot be: there is an entry for each tag.
            Err(_) => {
                *slot = None;
                self.ended.push((tag, Err(io::ErrorKind::ResourceBusy.into())));
            }
        }
    }

    fn answer(&mut self) -> Option<cqueue::Entry> {
        self.ring.completion().next()
    }

    /// Tells the kernel of all entries, and waits for `want` answers.
    fn enter(&mut self, want: usize) {
        while let Err(error) = self.ring.submit_and_wait(want) {
            if !passing(&error) {
                // Nothing but a bug of ours gets here (EBADF, EFAULT, EINVAL), and nothing is known any more of the
                // memory that the kernel holds: it is safe neither to go on nor to give up.
                log::error!("enter io_uring: {error}");
                std::process::abort();
            }
            std::thread::yield_now();
        }
    }
}

impl Serve for Uring {
    fn take(&mut self, tag: u16, job: Job) {
        self.push(tag, job);
    }

    fn go(&mut self) {
        if !self.ring.submission().is_empty() {
            self.enter(0);
        }
    }

    fn reap(&mut self, ended: &mut Vec<Ended>) {
        // What takes more steps goes on when the bell rings, which the last of them has seen to.
        for _ in 0..STEPS {
            ended.append(&mut self.ended);
            while let Some(answer) = self.answer() {
                self.in_flight = self.in_flight.saturating_sub(1);
                let Ok(tag) = u16::try_from(answer.user_data()) else { continue };
                let Some(mut job) = self.jobs.get_mut(usize::from(tag)).and_then(Option::take) else {
                    continue;
                };
                let moved = usize::try_from(answer.result())
                    .map_err(|_| io::Error::from_raw_os_error(answer.result().saturating_neg()));
                match job.advance(moved, &self.layers) {
                    Some(end) => ended.push((tag, end)),
                    None => self.push(tag, job),
                }
            }
            if self.ring.submission().is_empty() {
                return ended.append(&mut self.ended);
            }
            self.enter(0);
        }
        ended.append(&mut self.ended);
    }

    fn wait(&mut self) {
        if self.ended.is_empty() && self.in_flight > 0 {
            self.enter(1);
        }
    }

    fn bell(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring keeps its descriptor open for longer than `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // The kernel must not touch lists and memory that are about to go.
        let mut ended = Vec::new();
        while self.in_flight > 0 {
            self.enter(1);
            self.reap(&mut ended);
        }
    }
}
