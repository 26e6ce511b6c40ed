//! A crew: threads that do the waiting work of one device, as many as there is work for at a time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

/// Threads called `NAME-io0` and so on, which start as they are needed and end with the crew. Its device hears of what is
/// done by a bell, and never waits for it.
pub struct Crew<J, E> {
    name: String,
    most: usize,
    shared: Arc<Shared<J, E>>,
    jobs: Option<Sender<J>>,
    ended: Receiver<E>,
    /// Kept to be cloned into threads.
    answers: Sender<E>,
    /// Ends that a wait has met.
    met: Vec<E>,
    threads: Vec<JoinHandle<()>>,
    in_flight: usize,
}

struct Shared<J, E> {
    work: Box<dyn Fn(J) -> E + Send + Sync>,
    jobs: Mutex<Receiver<J>>,
    bell: OwnedFd,
}

impl<J, E> Shared<J, E> {
    fn serve(&self, answers: &Sender<E>) {
        loop {
            let next = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(job) = next else { return };
            // By value: the job lets go of what it holds before its end is known.
            if answers.send((self.work)(job)).is_err() {
                return;
            }
            // Fails only when the counter is full, and then the bell is heard already.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }
}

impl<J: Send + 'static, E: Send + 'static> Crew<J, E> {
    /// A crew of at most `most` threads that does each job by `work`.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new(
        name: &str,
        most: usize,
        work: impl Fn(J) -> E + Send + Sync + 'static,
    ) -> io::Result<Crew<J, E>> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (jobs, taken) = channel();
        let (answers, ended) = channel();
        let shared = Arc::new(Shared { work: Box::new(work), jobs: Mutex::new(taken), bell });
        Ok(Crew {
            name: name.to_owned(),
            most,
            shared,
            jobs: Some(jobs),
            ended,
            answers,
            met: Vec::new(),
            threads: Vec::new(),
            in_flight: 0,
        })
    }

    /// Starts one more thread if all may be busy.
    fn grow(&mut self) -> io::Result<()> {
        if self.in_flight < self.threads.len() || self.threads.len() >= self.most {
            return Ok(());
        }
        let (shared, answers) = (self.shared.clone(), self.answers.clone());
        let name = format!("{}-io{}", self.name, self.threads.len());
        let thread = std::thread::Builder::new().name(name).spawn(move || shared.serve(&answers))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Has `job` done.
    ///
    /// # Errors
    /// There is no thread to do it, and the host gives none: the job comes back.
    pub fn give(&mut self, job: J) -> Result<(), (J, io::Error)> {
        // Fewer threads than wished are enough.
        if let Err(cause) = self.grow()
            && self.threads.is_empty()
        {
            return Err((job, cause));
        }
        let Some(jobs) = &self.jobs else { return Err((job, io::ErrorKind::BrokenPipe.into())) };
        // The receiver lives in `shared`.
        jobs.send(job).map_err(|lost| (lost.0, io::ErrorKind::BrokenPipe.into()))?;
        self.in_flight += 1;
        Ok(())
    }

    /// Adds what has been done to `ended`.
    pub fn reap(&mut self, ended: &mut Vec<E>) {
        let before = ended.len();
        ended.append(&mut self.met);
        ended.extend(self.ended.try_iter());
        self.in_flight = self.in_flight.saturating_sub(ended.len() - before);
    }

    /// Waits until a job has ended, if one is under way.
    pub fn wait(&mut self) {
        if self.met.is_empty()
            && self.in_flight > 0
            && let Ok(end) = self.ended.recv()
        {
            self.met.push(end);
        }
    }

    /// Waits until all jobs have ended, or `patience` is over; whether they have. What it met is to be collected.
    pub fn settle(&mut self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        while self.met.len() < self.in_flight {
            match self.ended.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(ended) => self.met.push(ended),
                Err(_) => return false,
            }
        }
        true
    }

    /// Lets go of the threads without waiting for their jobs: each ends with the one it has.
    pub fn abandon(mut self) {
        self.threads.clear();
    }

    /// Jobs given whose ends have not been collected.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl<J, E> AsFd for Crew<J, E> {
    /// Becomes readable when a job ends; to be waited for edge-triggered, and never read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.bell.as_fd()
    }
}

impl<J, E> Drop for Crew<J, E> {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_that_never_ends_is_left_behind() {
        let (gate, held) = channel::<()>();
        let held = Mutex::new(held);
        let mut crew = Crew::new("test", 1, move |_: u32| held.lock().unwrap().recv().is_ok()).unwrap();
        crew.give(1).map_err(|(_, cause)| cause).unwrap();
        assert!(!crew.settle(Duration::ZERO), "it has not ended");
        crew.abandon();
        // Now it does, and nobody listens.
        drop(gate);
    }

    #[test]
    fn threads_come_with_the_work_and_every_job_ends_once() {
        let gate = Arc::new(std::sync::Barrier::new(3));
        let held = gate.clone();
        let mut crew = Crew::new("test", 2, move |job: u32| {
            if job < 2 {
                held.wait();
            }
            job * 10
        })
        .unwrap();
        assert!(crew.threads.is_empty(), "no work, no thread");
        for job in 0..5 {
            crew.give(job).map_err(|(_, cause)| cause).unwrap();
        }
        // Both of the first two have to be under way for this to pass.
        gate.wait();
        let mut ended = Vec::new();
        while crew.in_flight() > 0 {
            crew.wait();
            crew.reap(&mut ended);
        }
        ended.sort_unstable();
        assert_eq!((ended, crew.threads.len()), (vec![0, 10, 20, 30, 40], 2));
    }
}
