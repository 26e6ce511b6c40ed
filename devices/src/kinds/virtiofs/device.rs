//! The device: requests from the ring to the server and back. What need not wait is done on the lane, the rest by threads.

use std::sync::Arc;
use std::time::Duration;

use base::crew::Crew;
use base::lane::Interest;
use base::memory::Memory;
use base::{Doing, Fault, Result, Why};
use rustix::io::Errno;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::server::{Call, Closing, LARGEST, Server};
use super::wire::{Answer, Header, IN_HEADER, OUT_HEADER, Reply, Stop, WRITE_IN, op};
use crate::virtio::{Chain, Device, Io, Meters};

/// What must not wait behind other requests, and all others (section 5.11.2).
const URGENT: u16 = 0;
const REQUESTS: u16 = 1;
/// Entries of the queues. A request of 256 pages takes one for each, and a few for what comes before them.
const QUEUES: [u16; 2] = [128, 1024];
/// Bytes of the name by which the driver finds the device (section 5.11.4).
pub const TAG_BYTES: usize = 36;
/// Threads of a device.
const THREADS: usize = 8;
/// Requests that threads have at the most. A driver can offer one chain twice, so the size of the ring is no bound.
const DEPTH: usize = 64;
/// Bytes of requests and answers that are moved in one visit of the lane, and one request more: other devices wait.
const SHARE: u64 = 8 << 20;
/// The longest request but for the data of a write: an extended attribute with its name, or a list of what is forgotten.
const BODY: u64 = 128 << 10;
/// How long a reset waits for files that do not answer: a server that is gone, something that is read by waiting. Beyond it
/// their threads are left behind, each with what it holds, as the run could not end otherwise.
const PATIENCE: Duration = Duration::from_secs(5);
/// The token of the threads' bell.
const CREW: u16 = 0;
/// The token of the deadline at which the other devices have had their turn.
const AGAIN: u16 = 1;

/// A request that was taken.
struct Task {
    chain: Chain,
    header: Header,
    body: Vec<u8>,
}

/// What a thread is to do.
enum Job {
    Serve(Task),
    Close(#[allow(dead_code, reason = "held to be dropped")] Vec<Closing>),
}

/// What has been done: the chain of a request, and how much was written of it.
type Done = Option<(Chain, u32)>;

pub struct Fs {
    name: String,
    tag: [u8; TAG_BYTES],
    server: Arc<Server>,
    memory: Memory,
    crew: Option<Crew<Job, Done>>,
    done: Vec<Done>,
}

impl Fs {
    pub fn new(name: &str, tag: [u8; TAG_BYTES], server: Server, memory: Memory) -> Fs {
        let (name, server) = (name.to_owned(), Arc::new(server));
        Fs { name, tag, server, memory, crew: None, done: Vec::new() }
    }

    /// Takes requests while there is room, until `share` bytes are named.
    fn admit(&mut self, queue: u16, share: &mut u64, io: &mut Io<'_>) -> Result<(), Fault> {
        while self.crew.as_ref().is_some_and(|crew| crew.in_flight() < DEPTH) {
            if *share == 0 {
                io.arm(AGAIN, Duration::ZERO);
                return Ok(());
            }
            let Some(chain) = io.next(queue)? else { return Ok(()) };
            let bytes = chain.readable().len().saturating_add(chain.writable().len());
            *share = share.saturating_sub(bytes.min(LARGEST.into()));
            self.begin(chain, io);
        }
        Ok(())
    }

    fn pump(&mut self, io: &mut Io<'_>) -> Result<(), Fault> {
        let mut share = SHARE;
        // What is forgotten makes room for what is found.
        self.admit(URGENT, &mut share, io)?;
        loop {
            self.admit(REQUESTS, &mut share, io)?;
            let Some(crew) = &mut self.crew else { return Ok(()) };
            crew.reap(&mut self.done);
            if self.done.is_empty() {
                break;
            }
            for (chain, written) in self.done.drain(..).flatten() {
                io.done(chain, written);
            }
        }
        let closing = self.server.take_closing();
        if !closing.is_empty()
            && let Some(crew) = &mut self.crew
        {
            // Without a thread they are closed here.
            drop(crew.give(Job::Close(closing)));
        }
        Ok(())
    }

    /// Does a request, or gives it to a thread.
    fn begin(&mut self, chain: Chain, io: &mut Io<'_>) {
        self.server.counts.requests.add(1);
        let task = match read(chain, io.memory()) {
            Ok(task) => task,
            Err((chain, unique, stop)) => {
                let written = answer(&chain, io.memory(), unique, Err(stop));
                return io.done(chain, written);
            }
        };
        match serve(&self.server, &task, &self.memory, true) {
            Some(written) => io.done(task.chain, written),
            None => {
                self.server.counts.waited.add(1);
                let Some(crew) = &mut self.crew else { return };
                if let Err((Job::Serve(task), cause)) = crew.give(Job::Serve(task)) {
                    let written = answer(&task.chain, &self.memory, task.header.unique, Err(cause.into()));
                    io.done(task.chain, written);
                }
            }
        }
    }
}

/// Reads a request; what is none comes back with the number to answer by.
fn read(chain: Chain, memory: &Memory) -> std::result::Result<Task, (Chain, u64, Stop)> {
    let mut bytes = [0; 40];
    let len = chain.readable().read(memory.ram(), 0, &mut bytes);
    let header = match Header::read(bytes.get(..len).unwrap_or_default()) {
        Ok(header) => header,
        Err(stop) => return Err((chain, 0, stop)),
    };
    let whole = chain.readable().len();
    let rest = whole.saturating_sub(IN_HEADER);
    let body = if header.op == op::WRITE { rest.min(WRITE_IN) } else { rest };
    if u64::from(header.len) != whole || body > BODY {
        return Err((chain, header.unique, Stop::Refused(Errno::INVAL)));
    }
    let mut bytes = vec![0; usize::try_from(body).unwrap_or(0)];
    chain.readable().read(memory.ram(), IN_HEADER, &mut bytes);
    Ok(Task { chain, header, body: bytes })
}

/// Does a request and answers it; how much was written of its chain. `None`: it would have to wait.
fn serve(server: &Server, task: &Task, memory: &Memory, at_once: bool) -> Option<u32> {
    let Task { chain, header, body } = task;
    let answered = server.serve(&Call { header: *header, body, chain, memory, at_once });
    if answered == Err(Stop::Waits) && at_once {
        return None;
    }
    if matches!(answered, Err(Stop::Refused(error)) if error != Errno::NOENT) {
        server.counts.refused.add(1);
    }
    Some(answer(chain, memory, header.unique, answered))
}

/// Writes an answer; how much was written.
fn answer(chain: &Chain, memory: &Memory, unique: u64, answered: Answer) -> u32 {
    let room = chain.writable().len();
    let (mut error, mut len) = (None, OUT_HEADER);
    match answered {
        Ok(Reply::Silence) => return 0,
        Ok(Reply::Moved(bytes)) => len = len.saturating_add(bytes),
        Ok(Reply::Bytes(bytes)) => {
            len = len.saturating_add(bytes.len() as u64);
            if len <= room {
                chain.writable().write(memory.ram(), OUT_HEADER, &bytes);
            } else {
                error = Some(Errno::IO);
            }
        }
        Err(Stop::Refused(refused)) => error = Some(refused),
        Err(Stop::Unknown) => error = Some(Errno::NOSYS),
        Err(Stop::Waits) => error = Some(Errno::AGAIN),
    }
    if error.is_some() {
        len = OUT_HEADER;
    }
    let len = u32::try_from(len).unwrap_or(u32::MAX);
    if room < OUT_HEADER {
        return 0;
    }
    let mut header = [0; 16];
    let number = error.map_or(0, |error| error.raw_os_error().wrapping_neg());
    let fields = len.to_le_bytes().into_iter().chain(number.to_le_bytes()).chain(unique.to_le_bytes());
    header.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
    chain.writable().write(memory.ram(), 0, &header);
    len
}

impl Device for Fs {
    fn id(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    /// `struct virtio_fs_config`: the tag, and how many queues there are for requests.
    fn config(&self) -> Vec<u8> {
        let mut config = self.tag.to_vec();
        config.extend(1u32.to_le_bytes());
        config
    }

    fn start(&mut self, _: u64, io: &mut Io<'_>) -> Result<()> {
        let name = &self.name;
        if self.crew.is_none() {
            let (server, memory) = (self.server.clone(), self.memory.clone());
            let work = move |job| match job {
                Job::Serve(task) => {
                    let written = serve(&server, &task, &memory, false).unwrap_or(0);
                    Some((task.chain, written))
                }
                Job::Close(closing) => {
                    drop(closing);
                    None
                }
            };
            self.crew = Some(Crew::new(name, THREADS, work).doing(Why::Host, || format!("set up {name}"))?);
        }
        match &self.crew {
            Some(crew) => {
                io.watch(crew, CREW, Interest::Rung).doing(Why::Host, || format!("wait for {name}"))
            }
            None => Ok(()),
        }
    }

    fn kick(&mut self, _: u16, io: &mut Io<'_>) -> Result<(), Fault> {
        self.pump(io)
    }

    fn ready(&mut self, _: u16, io: &mut Io<'_>) -> Result<(), Fault> {
        self.pump(io)
    }

    fn stop(&mut self, io: &mut Io<'_>) {
        io.disarm(AGAIN);
        if let Some(crew) = &mut self.crew {
            io.unwatch(&*crew);
            let settled = crew.settle(PATIENCE);
            crew.reap(&mut self.done);
            self.done.clear();
            if !settled && let Some(crew) = self.crew.take() {
                let name = &self.name;
                log::warn!(target: "guest", "{name}: {} requests wait for a file of the host that does not answer", crew.in_flight());
                crew.abandon();
            }
        }
        // The driver has forgotten all it knew; so do we.
        self.server.clear();
    }

    fn meters(&self) -> Meters {
        let counts = &self.server.counts;
        vec![
            ("requests", counts.requests.clone()),
            ("waited", counts.waited.clone()),
            ("read_bytes", counts.read_bytes.clone()),
            ("write_bytes", counts.write_bytes.clone()),
            ("refused", counts.refused.clone()),
        ]
    }
}
