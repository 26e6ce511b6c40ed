//! A lane: one thread that waits for file descriptors, deadlines and messages, and runs the work that lives on it.
//!
//! Crossing into a lane has one verb: [`Handle::visit`] runs a closure where the work lives and waits for it,
//! [`Handle::post`] tells and never waits. Waiting goes one way only (control, then vCPU, then lane), so a lane
//! never waits for another thread and no circle can form.

use std::any::Any;
use std::collections::HashMap;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};

use crate::bus::Effect;

/// Work that lives on a lane. It is never called from two threads, so it needs no lock.
pub trait Work: Any + Send {
    /// Called once when the work has moved in: the place to watch file descriptors.
    fn arrive(&mut self, ctx: &mut Context<'_>) -> Effect {
        let _ = ctx;
        Effect::None
    }

    /// A watched descriptor is ready, or a deadline has come; `token` is the one given with it.
    fn ready(&mut self, token: u32, ctx: &mut Context<'_>) -> Effect;
}

/// Readiness to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Something can be read, or the other side has hung up.
    Readable,
    /// Something can be written.
    Writable,
    /// An eventfd was written to since the last call: reported once for each wake-up, so it need not be read
    /// (edge-triggered; its counter would take centuries to fill).
    Rung,
    /// Something may be read or written that could not be before, or the other side has hung up: reported once for
    /// each change, so whoever hears of it goes on until the descriptor answers `EAGAIN` (edge-triggered).
    Changes,
}

/// What a piece of work can ask of its lane while it is being called.
pub struct Context<'a> {
    me: u32,
    lane: &'a mut Lane,
}

impl Context<'_> {
    /// Calls [`Work::ready`] with `token` whenever `fd` is ready, until [`Context::unwatch`].
    ///
    /// # Errors
    /// The descriptor cannot be waited for (`EPERM`: a regular file, always ready).
    pub fn watch(&mut self, fd: impl AsFd, token: u32, interest: Interest) -> io::Result<()> {
        let flags = match interest {
            Interest::Readable => EventFlags::IN,
            Interest::Writable => EventFlags::OUT,
            Interest::Rung => EventFlags::IN | EventFlags::ET,
            Interest::Changes => EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET,
        };
        epoll::add(&self.lane.poll, fd, EventData::new_u64(pack(self.me, token)), flags)?;
        Ok(())
    }

    /// Whether the other side of the socket that is the cause of this call has said its last word (what it said before
    /// may still be unread).
    pub fn ended(&self) -> bool {
        self.lane.ended
    }

    /// The same context, lent for a shorter time: for work that passes its lane on inside a value of its own.
    pub fn reborrow(&mut self) -> Context<'_> {
        Context { me: self.me, lane: self.lane }
    }

    /// Stops waiting for `fd`. Harmless if nobody waits for it.
    pub fn unwatch(&mut self, fd: impl AsFd) {
        // ENOENT means that it was not watched, which is what the caller wants.
        let _ = epoll::delete(&self.lane.poll, fd);
    }

    /// Calls [`Work::ready`] with `token` once, `after` from now; replaces an earlier deadline of that token.
    pub fn arm(&mut self, token: u32, after: Duration) {
        self.lane.deadlines.insert((self.me, token), Instant::now() + after);
    }

    /// Forgets the deadline of `token`.
    pub fn disarm(&mut self, token: u32) {
        self.lane.deadlines.remove(&(self.me, token));
    }
}

fn pack(id: u32, token: u32) -> u64 {
    u64::from(id) << 32 | u64::from(token)
}

fn unpack(data: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = data.to_be_bytes();
    (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]))
}

type Letter = Box<dyn FnOnce(&mut Lane) -> Effect + Send>;

/// The way into a lane from other threads.
#[derive(Clone)]
pub struct LaneHandle {
    letters: Sender<Letter>,
    bell: Arc<Bell>,
    next: Arc<AtomicU32>,
    /// The thread, where the lane waits for its first letter to get one.
    thread: Option<Arc<Thread>>,
}

/// The thread of a lane that starts with the first letter.
struct Thread {
    name: String,
    idle: Mutex<Option<Lane>>,
    running: Mutex<Option<JoinHandle<()>>>,
}

impl Thread {
    fn start(&self) {
        let Some(mut lane) = lock(&self.idle).take() else { return };
        // Where the host refuses the thread the lane is gone with its letters, and visitors hear so.
        let thread = std::thread::Builder::new().name(self.name.clone()).spawn(move || lane.run());
        *lock(&self.running) = thread.ok();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes the lane, with one system call for many letters.
struct Bell {
    fd: OwnedFd,
    rung: AtomicBool,
}

impl Bell {
    fn ring(&self) {
        if !self.rung.swap(true, Ordering::SeqCst) {
            // The counter cannot overflow: the flag lets one ring through until the lane has answered it.
            let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
        }
    }

    fn answer(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.fd, &mut count);
        // Cleared before the letters are read: one that comes later rings again. Swapped, not stored: so the letters of
        // all who found it rung, and did not ring, are seen by the reads that follow.
        self.rung.swap(false, Ordering::SeqCst);
    }
}

impl LaneHandle {
    fn send(&self, letter: Letter) {
        // A lane that has ended drops its letters; so would it have dropped the work they are for.
        if self.letters.send(letter).is_ok() {
            self.bell.ring();
            if let Some(thread) = &self.thread {
                thread.start();
            }
        }
    }

    /// Moves `work` onto the lane.
    pub fn adopt<T: Work>(&self, work: T) -> Handle<T> {
        let id = self.adopt_boxed(Box::new(work));
        Handle { lane: self.clone(), id, kind: PhantomData }
    }

    /// Moves work of unknown type onto the lane.
    pub fn adopt_boxed(&self, work: Box<dyn Work>) -> u32 {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.send(Box::new(move |lane| {
            lane.works.insert(id, work);
            lane.call(id, |work, ctx| work.arrive(ctx))
        }));
        id
    }

    /// Has the lane obey an effect as if one of its works had returned it.
    pub fn report(&self, effect: Effect) {
        self.send(Box::new(move |_| effect));
    }

    /// Ends the lane after the letters sent so far. A lane of [`Lane::spawn`] has dropped its works, and its thread has
    /// ended, when this returns; `false`: by a panic.
    pub fn stop(&self) -> bool {
        if let Some(thread) = &self.thread
            && lock(&thread.idle).take().is_some()
        {
            return true;
        }
        self.send(Box::new(|lane| {
            lane.running = false;
            Effect::None
        }));
        let thread = self.thread.as_ref().and_then(|thread| lock(&thread.running).take());
        thread.is_none_or(|thread| thread.join().is_ok())
    }
}

/// The way to one piece of work on a lane.
pub struct Handle<T> {
    lane: LaneHandle,
    id: u32,
    kind: PhantomData<fn(T)>,
}

impl<T> Clone for Handle<T> {
    fn clone(&self) -> Self {
        Handle { lane: self.lane.clone(), id: self.id, kind: PhantomData }
    }
}

impl<T: Work> Handle<T> {
    /// Tells: runs `letter` where the work lives, some time soon.
    pub fn post(&self, letter: impl FnOnce(&mut T, &mut Context<'_>) -> Effect + Send + 'static) {
        let id = self.id;
        self.lane.send(Box::new(move |lane| {
            lane.call(id, |work, ctx| match (work as &mut dyn Any).downcast_mut::<T>() {
                Some(work) => letter(work, ctx),
                None => Effect::None,
            })
        }));
    }

    /// Runs `question` where the work lives and waits for the answer; `None` when the lane or the work is gone.
    pub fn visit<R: Send + 'static>(
        &self,
        question: impl FnOnce(&mut T, &mut Context<'_>) -> R + Send + 'static,
    ) -> Option<R> {
        let (answer, answered) = sync_channel(1);
        self.post(move |work, ctx| {
            let _ = answer.send(question(work, ctx));
            Effect::None
        });
        answered.recv().ok()
    }

    /// Removes the work from its lane and drops it there.
    pub fn retire(&self) {
        let id = self.id;
        self.lane.send(Box::new(move |lane| {
            lane.works.remove(&id);
            lane.deadlines.retain(|(owner, _), _| *owner != id);
            Effect::None
        }));
    }
}

const BELL: u32 = 0;
/// Letters that are read in one turn. A guest can have one posted with each exit of each vCPU; deadlines, and whoever
/// takes single turns, are not to wait for the last of them.
const LETTERS: usize = 64;

/// One lane. [`Lane::run`] is its life; a test may take single turns instead.
pub struct Lane {
    poll: OwnedFd,
    bell: Arc<Bell>,
    letters: Receiver<Letter>,
    works: HashMap<u32, Box<dyn Work>>,
    deadlines: HashMap<(u32, u32), Instant>,
    obey: Box<dyn FnMut(Effect) + Send>,
    running: bool,
    /// Of the event being served: the other side has hung up.
    ended: bool,
}

impl Lane {
    /// A lane and the way into it; `obey` is told every effect its works return (other than `None`).
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn new(obey: impl FnMut(Effect) + Send + 'static) -> io::Result<(Lane, LaneHandle)> {
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&poll, &fd, EventData::new_u64(pack(BELL, 0)), EventFlags::IN)?;
        let bell = Arc::new(Bell { fd, rung: AtomicBool::new(false) });
        let (sender, letters) = channel();
        let next = Arc::new(AtomicU32::new(BELL + 1));
        let handle = LaneHandle { letters: sender, bell: bell.clone(), next, thread: None };
        let lane = Lane {
            poll,
            bell,
            letters,
            works: HashMap::new(),
            deadlines: HashMap::new(),
            obey: Box::new(obey),
            running: true,
            ended: false,
        };
        Ok((lane, handle))
    }

    /// A lane with a thread of its own, called `name`, from its first letter until [`LaneHandle::stop`]: a lane that
    /// nobody uses costs two descriptors.
    ///
    /// # Errors
    /// The host refuses the descriptors.
    pub fn spawn(name: &str, obey: impl FnMut(Effect) + Send + 'static) -> io::Result<LaneHandle> {
        let (lane, handle) = Lane::new(obey)?;
        let thread =
            Thread { name: name.to_owned(), idle: Mutex::new(Some(lane)), running: Mutex::new(None) };
        Ok(LaneHandle { thread: Some(Arc::new(thread)), ..handle })
    }

    /// Runs until it is told to stop.
    pub fn run(&mut self) {
        while self.running {
            self.turn(None);
        }
    }

    /// Waits (at most `limit`) for something to happen and handles all that has.
    pub fn turn(&mut self, limit: Option<Duration>) {
        let next = self.deadlines.values().min().map(|at| at.saturating_duration_since(Instant::now()));
        let wait = match (next, limit) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        let wait = wait.and_then(|wait| Timespec::try_from(wait).ok());
        let mail = self.serve(wait.as_ref());
        self.ring_deadlines();
        if mail {
            self.bell.answer();
            for _ in 0..LETTERS {
                let Ok(letter) = self.letters.try_recv() else { return };
                // A visitor finds the descriptors that were ready before its letter already served.
                self.serve(Some(&Timespec::default()));
                let effect = letter(self);
                self.obey(effect);
            }
            // There may be more, whose senders have rung and will not again.
            self.bell.ring();
        }
    }

    /// Waits for descriptors and serves them; whether there is mail.
    fn serve(&mut self, wait: Option<&Timespec>) -> bool {
        let mut events: Vec<Event> = Vec::with_capacity(32);
        // EINTR is a turn in which nothing happened.
        let _ = epoll::wait(&self.poll, spare_capacity(&mut events), wait);
        let mut mail = false;
        for event in events {
            let (id, token) = unpack(event.data.u64());
            if id == BELL {
                mail = true;
            } else {
                let flags = event.flags;
                let over = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
                self.ended = flags.intersects(over);
                let effect = self.call(id, |work, ctx| work.ready(token, ctx));
                self.ended = false;
                self.obey(effect);
            }
        }
        mail
    }

    fn ring_deadlines(&mut self) {
        if self.deadlines.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut due: Vec<_> =
            self.deadlines.iter().filter(|(_, at)| **at <= now).map(|(key, at)| (*at, *key)).collect();
        due.sort_unstable();
        for (_, key) in due {
            // A work called earlier in this loop may have disarmed it.
            if self.deadlines.remove(&key).is_some() {
                let effect = self.call(key.0, |work, ctx| work.ready(key.1, ctx));
                self.obey(effect);
            }
        }
    }

    fn call(&mut self, id: u32, f: impl FnOnce(&mut dyn Work, &mut Context<'_>) -> Effect) -> Effect {
        // Taken out while it is called, so that it can use the lane.
        let Some(mut work) = self.works.remove(&id) else { return Effect::None };
        let effect = f(work.as_mut(), &mut Context { me: id, lane: self });
        self.works.insert(id, work);
        effect
    }

    fn obey(&mut self, effect: Effect) {
        if effect != Effect::None {
            (self.obey)(effect);
        }
    }
}

#[cfg(test)]
mod tests;
