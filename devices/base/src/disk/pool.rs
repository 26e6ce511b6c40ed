//! The back end of threads, for hosts that have or allow no io_uring (containers often do not).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::fstatfs;

use super::image::{Image, Kind};
use super::{Ended, Job, Serve};

/// Threads of one disk at the most; they start as they are needed.
const THREADS: usize = 4;

/// Whether `file` is memory (`tmpfs`, a `memfd`).
pub fn in_memory(file: &File) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    const HUGETLBFS: i64 = 0x9584_58f6;
    fstatfs(file).is_ok_and(|fs| [TMPFS, HUGETLBFS].contains(&fs.f_type))
}

pub struct Pool {
    name: String,
    shared: Arc<Shared>,
    jobs: Option<Sender<(u16, Job)>>,
    ended: Receiver<Ended>,
    /// Kept to be cloned into threads.
    answers: Sender<Ended>,
    /// Jobs that ended in the call that took them, or that a wait has met.
    met: Vec<Ended>,
    /// The file is memory: no job on it waits for anything.
    prompt: bool,
    threads: Vec<JoinHandle<()>>,
    in_flight: usize,
}

struct Shared {
    image: Image,
    jobs: Mutex<Receiver<(u16, Job)>>,
    bell: OwnedFd,
}

impl Shared {
    fn work(&self, answers: &Sender<Ended>) {
        loop {
            let next = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok((tag, job)) = next else { return };
            // By value: the job lets go of guest memory before its end is known.
            let end = match &self.image.0 {
                Kind::Flat(layers) => job.run(layers),
                Kind::Qcow2(image) => image.run(job),
            };
            if answers.send((tag, end)).is_err() {
                return;
            }
            // Fails only when the counter is full, and then the bell is heard already.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }
}

impl Pool {
    pub fn new(image: Image, name: &str) -> io::Result<Pool> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let prompt = matches!(&image.0, Kind::Flat(layers) if layers.in_memory());
        let (jobs, taken) = channel();
        let (answers, ended) = channel();
        let shared = Arc::new(Shared { image, jobs: Mutex::new(taken), bell });
        let name = name.to_owned();
        Ok(Pool {
            name,
            shared,
            jobs: Some(jobs),
            ended,
            answers,
            met: Vec::new(),
            prompt,
            threads: Vec::new(),
            in_flight: 0,
        })
    }

    /// Does a job here if it need not wait: a thread would take ten times as long to hear of it. It comes back if
    /// it has to, maybe with a part left to do.
    fn at_once(&self, job: Job) -> Result<io::Result<()>, Job> {
        match &self.shared.image.0 {
            Kind::Flat(layers) => job.try_run(layers, self.prompt),
            Kind::Qcow2(_) => Err(job),
        }
    }

    /// Starts one more thread if all may be busy.
    fn grow(&mut self) -> io::Result<()> {
        if self.in_flight <= self.threads.len() || self.threads.len() >= THREADS {
            return Ok(());
        }
        let (shared, answers) = (self.shared.clone(), self.answers.clone());
        let name = format!("{}-io{}", self.name, self.threads.len());
        let thread = std::thread::Builder::new().name(name).spawn(move || shared.work(&answers))?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Serve for Pool {
    fn take(&mut self, tag: u16, job: Job) {
        self.in_flight += 1;
        let job = match self.at_once(job) {
            Ok(end) => return self.met.push((tag, end)),
            Err(job) => job,
        };
        // Fewer threads than wished are enough; none at all is an I/O error.
        if let Err(error) = self.grow()
            && self.threads.is_empty()
        {
            self.met.push((tag, Err(error)));
        } else if let Some(jobs) = &self.jobs {
            // The receiver lives in `shared`.
            let _ = jobs.send((tag, job));
        }
    }

    fn go(&mut self) {}

    fn reap(&mut self, ended: &mut Vec<Ended>) {
        let before = ended.len();
        ended.append(&mut self.met);
        ended.extend(self.ended.try_iter());
        self.in_flight = self.in_flight.saturating_sub(ended.len() - before);
    }

    fn wait(&mut self) {
        if self.met.is_empty()
            && let Ok(end) = self.ended.recv()
        {
            self.met.push(end);
        }
    }

    fn bell(&self) -> BorrowedFd<'_> {
        self.shared.bell.as_fd()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
