//! What the chips' tests build them in: a host of pipes, a clock moved by hand and a lane that turns when told.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base::Result;
use base::bus::Effect;
use base::clock::ManualClock;
use base::host::{Access, Host, Stream};
use base::irq::{FakeLine, SharedLine};
use base::lane::{Lane, LaneHandle};
use base::memory::Memory;
use rustix::pipe::{PipeFlags, pipe, pipe_with};

use crate::catalog::{Body, Chip, Entry, Kind, Kit, Of};

/// A place to build chips in.
pub struct Fixture {
    pub host: PipeHost,
    pub clock: Arc<ManualClock>,
    pub memory: Memory,
    pub line: Arc<FakeLine>,
    pub lane: RefCell<Lane>,
    handle: LaneHandle,
    effects: Arc<Mutex<Vec<Effect>>>,
}

impl Default for Fixture {
    fn default() -> Self {
        Fixture::with(PipeHost::default(), &[(0, 1 << 20)])
    }
}

impl Fixture {
    pub fn with(host: PipeHost, ram: &[(u64, u64)]) -> Fixture {
        let effects = Arc::new(Mutex::new(Vec::new()));
        let heard = effects.clone();
        let (lane, handle) = Lane::new(move |effect| heard.lock().unwrap().push(effect)).unwrap();
        Fixture {
            host,
            clock: Arc::default(),
            memory: Memory::new(ram).unwrap(),
            line: Arc::default(),
            lane: RefCell::new(lane),
            handle,
            effects,
        }
    }

    /// Chips get `lane`, which turns by itself, in place of the one that turns when told.
    pub fn beside(host: PipeHost, lane: &LaneHandle) -> Fixture {
        Fixture { handle: lane.clone(), ..Fixture::with(host, &[(0, 4096)]) }
    }

    pub fn build<K: Kind>(&self, text: &str) -> Result<Body> {
        let entry = &Of::<K>::NEW;
        let line = self.line.clone();
        let kit = Kit {
            name: K::NAME,
            host: &self.host,
            clock: self.clock.clone(),
            memory: &self.memory,
            lines: &move |_| line.clone() as SharedLine,
            overhear: Arc::new(|_| ()),
            lane: &self.handle,
        };
        entry.build(&entry.parse(text)?, &kit)
    }

    pub fn chip<K: Kind>(&self, text: &str) -> Driven {
        match self.build::<K>(text).unwrap() {
            Body::Chip(body) => Driven { body },
            _ => panic!("{} {text} is no chip", K::NAME),
        }
    }

    pub fn absent<K: Kind>(&self, text: &str) -> bool {
        matches!(self.build::<K>(text).unwrap(), Body::Absent)
    }

    /// Lets the lane do what it can do now.
    pub fn turn(&self) {
        for _ in 0..16 {
            self.lane.borrow_mut().turn(Some(Duration::ZERO));
        }
    }

    /// Lets the lane wait for the next thing to happen, a deadline for example.
    pub fn wait(&self) {
        self.lane.borrow_mut().turn(None);
    }

    /// What the lane has asked of the machine since the last call.
    pub fn effects(&self) -> Vec<Effect> {
        std::mem::take(&mut self.effects.lock().unwrap())
    }

    /// Sends input to the chip.
    pub fn send(&self, bytes: &[u8]) {
        let sender = self.host.sender.as_ref().unwrap();
        assert_eq!(rustix::io::write(sender, bytes).unwrap(), bytes.len());
    }

    /// What has been written to the standard output or error since the last call.
    pub fn output(&self) -> Vec<u8> {
        let mut seen = vec![0; 1 << 20];
        let n = rustix::io::read(self.host.seen.as_ref().unwrap(), &mut seen).unwrap_or(0);
        seen.truncate(n);
        seen
    }

    /// What the file that was opened holds.
    pub fn file(&self) -> Vec<u8> {
        let mut file = &self.host.file;
        file.rewind().unwrap();
        let mut seen = Vec::new();
        file.read_to_end(&mut seen).unwrap();
        seen
    }
}

/// A host whose standard streams are pipes, and which has one file.
pub struct PipeHost {
    pub input: OwnedFd,
    pub terminal: bool,
    /// The other end of the input; taken away to end it.
    pub sender: Option<OwnedFd>,
    pub output: OwnedFd,
    /// The other end of the output; taken away to close it.
    pub seen: Option<OwnedFd>,
    pub file: File,
}

impl Default for PipeHost {
    fn default() -> Self {
        let (input, sender) = pipe().unwrap();
        let (seen, output) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        let file = tempfile::tempfile().unwrap();
        PipeHost { input, terminal: false, sender: Some(sender), output, seen: Some(seen), file }
    }
}

impl Host for PipeHost {
    fn open(&self, _: &str, _: &Path, _: Access) -> Result<File> {
        Ok(self.file.try_clone().unwrap())
    }
    fn stdio(&self, _: &str) -> Result<Stream> {
        let input = self.input.try_clone().unwrap();
        Ok(Stream { input: Some(input), output: self.output.try_clone().unwrap(), terminal: self.terminal })
    }
    fn pty(&self, role: &str) -> Result<Stream> {
        self.stdio(role)
    }
    fn stderr(&self) -> std::io::Result<OwnedFd> {
        self.output.try_clone()
    }
    fn random(&self, data: &mut [u8]) -> std::io::Result<()> {
        data.fill(4);
        Ok(())
    }
}

/// A chip with somebody who accesses its registers by address.
pub struct Driven {
    pub body: Chip,
}

impl Driven {
    pub fn read(&mut self, at: u64, width: usize) -> Vec<u8> {
        let mut data = vec![0xff; width];
        let window = self.body.windows.iter_mut().find(|w| w.base <= at && at < w.base + w.len).unwrap();
        window.registers.read(at - window.base, &mut data);
        data
    }

    pub fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        let window = self.body.windows.iter_mut().find(|w| w.base <= at && at < w.base + w.len).unwrap();
        window.registers.write(at - window.base, data)
    }
}
