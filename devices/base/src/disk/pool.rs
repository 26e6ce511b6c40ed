//! The back end of threads, for hosts that have or allow no io_uring (containers often do not).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::fstatfs;

use super::image::{Image, Kind};
use super::{Ended, Job, Serve};
use crate::crew::Crew;

/// Threads of one disk at the most; they start as they are needed.
const THREADS: usize = 4;

/// Whether `file` is memory (`tmpfs`, a `memfd`).
pub fn in_memory(file: &File) -> bool {
    const TMPFS: i64 = 0x0102_1994;
    const HUGETLBFS: i64 = 0x9584_58f6;
    fstatfs(file).is_ok_and(|fs| [TMPFS, HUGETLBFS].contains(&fs.f_type))
}

pub struct Pool {
    image: Image,
    crew: Crew<(u16, Job), Ended>,
    /// Jobs that ended in the call that took them.
    met: Vec<Ended>,
    /// The file is memory: no job on it waits for anything.
    prompt: bool,
}

impl Pool {
    pub fn new(image: Image, name: &str) -> io::Result<Pool> {
        let prompt = matches!(&image.0, Kind::Flat(layers) if layers.in_memory());
        let worked = image.clone();
        let crew = Crew::new(name, THREADS, move |(tag, job): (u16, Job)| {
            let end = match &worked.0 {
                Kind::Flat(layers) => job.run(layers),
                Kind::Qcow2(image) => image.run(job),
            };
            (tag, end)
        })?;
        Ok(Pool { image, crew, met: Vec::new(), prompt })
    }

    /// Does a job here if it need not wait: a thread would take ten times as long to hear of it. It comes back if
    /// it has to, maybe with a part left to do.
    fn at_once(&self, job: Job) -> Result<io::Result<()>, Job> {
        match &self.image.0 {
            Kind::Flat(layers) => job.try_run(layers, self.prompt),
            Kind::Qcow2(_) => Err(job),
        }
    }
}

impl Serve for Pool {
    fn take(&mut self, tag: u16, job: Job) {
        let job = match self.at_once(job) {
            Ok(end) => return self.met.push((tag, end)),
            Err(job) => job,
        };
        // No thread at all is an I/O error.
        if let Err((_, cause)) = self.crew.give((tag, job)) {
            self.met.push((tag, Err(cause)));
        }
    }

    fn go(&mut self) {}

    fn reap(&mut self, ended: &mut Vec<Ended>) {
        ended.append(&mut self.met);
        self.crew.reap(ended);
    }

    fn wait(&mut self) {
        if self.met.is_empty() {
            self.crew.wait();
        }
    }

    fn bell(&self) -> BorrowedFd<'_> {
        self.crew.as_fd()
    }
}
