//! The device: frames from its queues to the link and back, and the control queue.

use std::sync::Arc;
use std::time::Duration;

use base::meter::Counter;
use base::throttle::Throttle;
use base::{Fault, Result};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_OK, VIRTIO_NET_S_LINK_UP,
};

use super::control::{Command, read};
use crate::net::user::packet::{ETHERNET, Mac};
use crate::net::{HEADER, Inbox, LARGEST, Link, inbox};
use crate::virtio::{Chain, Device, Io, Meters};

/// Entries of a queue of frames, and of the control queue.
const QUEUE: u16 = 256;
const CONTROL: u16 = 16;

/// How long a driver may be left without an interrupt for what it has sent: longer than most answers take to come back,
/// and too short for whoever waits for room to send.
const SENT: Duration = Duration::from_micros(200);

/// Tokens above those of links: a pair may send, or receive, again.
const RECEIVING: u16 = 0xfe00;
const SENDING: u16 = 0xff00;
const PAIR: u16 = 0xff;

/// What the driver may switch on and off at run time.
const SWITCHES: [u32; 7] = [
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
];

/// What a card is apart from what it leads to.
pub struct Card {
    pub mac: Mac,
    /// Pairs of queues.
    pub pairs: u16,
    /// How much may be sent, and received; all pairs together send, each receives.
    pub limits: Box<dyn Fn() -> Throttle + Send>,
}

#[derive(Default)]
struct Counts {
    sent: Arc<Counter>,
    sent_bytes: Arc<Counter>,
    malformed: Arc<Counter>,
    throttled: Arc<Counter>,
}

pub struct Net {
    card: Card,
    link: Box<dyn Link>,
    sizes: Vec<u16>,
    inboxes: Vec<Inbox>,
    /// For each pair: a frame that the link did not take yet.
    stuck: Vec<Option<Chain>>,
    features: u64,
    /// Pairs of queues in use.
    pairs: u16,
    throttle: Throttle,
    counts: Counts,
    received: Arc<inbox::Counts>,
}

impl Net {
    pub fn new(card: Card, link: Box<dyn Link>) -> Net {
        let pairs = card.pairs.max(1);
        let received = Arc::new(inbox::Counts::default());
        let mut sizes = vec![QUEUE; usize::from(pairs).saturating_mul(2)];
        sizes.push(CONTROL);
        Net {
            inboxes: (0..pairs)
                .map(|pair| Inbox::new(pair.saturating_mul(2), received.clone(), (card.limits)()))
                .collect(),
            throttle: (card.limits)(),
            stuck: (0..pairs).map(|_| None).collect(),
            card: Card { pairs, ..card },
            link,
            sizes,
            features: 0,
            pairs: 1,
            counts: Counts::default(),
            received,
        }
    }

    fn has(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    /// The index of the control queue: behind all pairs, or behind the first for a driver that knows of no more
    /// (section 5.1.2).
    fn control(&self) -> u16 {
        let pairs = if self.has(VIRTIO_NET_F_MQ) { self.card.pairs } else { 1 };
        pairs.saturating_mul(2)
    }

    /// The inboxes of all pairs that the driver knows of: for one that knows of one pair, the queues behind it are no
    /// receive queues.
    fn inboxes(&mut self) -> (&mut dyn Link, &mut [Inbox]) {
        let known = usize::from(self.control() / 2);
        let inboxes = self.inboxes.get_mut(..known).unwrap_or_default();
        (self.link.as_mut(), inboxes)
    }

    /// Hands the frames of a pair to the link.
    fn transmit(&mut self, pair: u16, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        let at = usize::from(pair);
        let queue = pair.saturating_mul(2).saturating_add(1);
        loop {
            if let Err(wait) = self.throttle.admit() {
                self.counts.throttled.add(1);
                io.arm(SENDING | pair, wait);
                break;
            }
            let Some(stuck) = self.stuck.get_mut(at) else { return Ok(()) };
            let chain = match stuck.take() {
                Some(chain) => chain,
                None => match io.next(queue)? {
                    Some(chain) => chain,
                    None => break,
                },
            };
            let len = chain.readable().len();
            let frame = len.saturating_sub(HEADER);
            if frame < ETHERNET as u64 || frame > LARGEST {
                self.counts.malformed.add(1);
            } else {
                let (link, inboxes) = self.inboxes();
                if !link.transmit(at, &chain, inboxes, io)? {
                    if let Some(stuck) = self.stuck.get_mut(at) {
                        *stuck = Some(chain);
                    }
                    break;
                }
                self.throttle.spend(1, frame);
                self.counts.sent.add(1);
                self.counts.sent_bytes.add(frame);
            }
            io.done(chain, 0);
        }
        let (link, inboxes) = self.inboxes();
        link.flush(inboxes, io)?;
        self.await_room(io);
        Ok(())
    }

    /// Comes back to what found no room because the limit was reached.
    fn await_room(&mut self, io: &mut Io<'_>) {
        for (pair, inbox) in (0..).zip(&mut self.inboxes) {
            if let Some(wait) = inbox.wait() {
                self.counts.throttled.add(1);
                io.arm(RECEIVING | pair, wait);
            }
        }
    }

    fn command(&mut self, command: Option<Command>, io: &mut Io<'_>) -> bool {
        match command {
            Some(Command::Receive | Command::Table) => true,
            Some(Command::Address(mac)) => {
                self.card.mac = mac;
                // Not news to the driver, but to be read from now on.
                io.reconfigured();
                true
            }
            Some(Command::Pairs(pairs)) if (1..=self.card.pairs).contains(&pairs) => {
                let allowed = self.has(VIRTIO_NET_F_MQ) && self.link.use_pairs(pairs.into());
                if allowed {
                    self.pairs = pairs;
                }
                allowed
            }
            Some(Command::Offloads(set)) => {
                let switches = SWITCHES.iter().fold(0, |set, bit| set | 1u64 << bit);
                let allowed = set & !(self.features & switches) == 0;
                if allowed {
                    self.link.offer(set);
                }
                allowed
            }
            Some(Command::Pairs(_)) | None => false,
        }
    }

    fn obey(&mut self, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        while let Some(chain) = io.next(self.control())? {
            let command = read(&chain, io.ram());
            let answer = if self.command(command, io) { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            let written = chain.writable().write(io.ram(), 0, &[u8::try_from(answer).unwrap_or(1)]);
            io.done(chain, u32::try_from(written).unwrap_or(0));
        }
        Ok(())
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let link = self.link.features();
        let several = if self.card.pairs > 1 { 1 << VIRTIO_NET_F_MQ } else { 0 };
        let switches = if link != 0 { 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS } else { 0 };
        link | several
            | switches
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_MTU
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_CTRL_VQ
            | 1 << VIRTIO_NET_F_CTRL_RX
            | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
    }

    fn queues(&self) -> &[u16] {
        &self.sizes
    }

    /// `struct virtio_net_config`, section 5.1.4.
    fn config(&self) -> Vec<u8> {
        let mut config = Vec::with_capacity(12);
        config.extend(self.card.mac);
        config.extend(u16::try_from(VIRTIO_NET_S_LINK_UP).unwrap_or(1).to_le_bytes());
        config.extend(self.card.pairs.to_le_bytes());
        config.extend(self.link.mtu().to_le_bytes());
        config
    }

    fn start(&mut self, features: u64, io: &mut Io<'_>) -> Result<()> {
        self.features = features;
        self.pairs = 1;
        let mergeable = self.has(VIRTIO_NET_F_MRG_RXBUF);
        self.inboxes.iter_mut().for_each(|inbox| inbox.start(mergeable));
        self.stuck.fill_with(|| None);
        self.link.start(features, io)?;
        self.link.use_pairs(1);
        Ok(())
    }

    /// A frame that is sent leaves room for another, which the driver takes up when it sends or receives the next.
    fn patience(&self, queue: u16) -> Duration {
        if queue % 2 == 1 && queue < self.control() { SENT } else { Duration::ZERO }
    }

    fn kick(&mut self, queue: u16, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        if queue == self.control() {
            return self.obey(io);
        }
        let pair = queue / 2;
        if queue % 2 == 1 {
            return self.transmit(pair, io);
        }
        let (link, inboxes) = self.inboxes();
        if let Some(inbox) = inboxes.get_mut(usize::from(pair)) {
            inbox.refill(io)?;
            link.refilled(usize::from(pair), inboxes, io)?;
        }
        self.await_room(io);
        Ok(())
    }

    fn ready(&mut self, token: u16, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        if token >= SENDING {
            return self.transmit(token & PAIR, io);
        }
        let (link, inboxes) = self.inboxes();
        if token >= RECEIVING {
            link.refilled((token & PAIR).into(), inboxes, io)?;
        } else {
            link.ready(token, inboxes, io)?;
        }
        self.await_room(io);
        for pair in 0..self.pairs {
            if let Some(Some(_)) = self.stuck.get(usize::from(pair)) {
                self.transmit(pair, io)?;
            }
        }
        Ok(())
    }

    fn stop(&mut self, io: &mut Io<'_>) {
        self.link.stop(io);
        for pair in 0..self.card.pairs {
            io.disarm(SENDING | pair);
            io.disarm(RECEIVING | pair);
        }
        self.inboxes.iter_mut().for_each(Inbox::clear);
        self.stuck.fill_with(|| None);
    }

    fn meters(&self) -> Meters {
        if !self.link.shows_frames() {
            return self.link.meters();
        }
        let mut meters = vec![
            ("sent_frames", self.counts.sent.clone()),
            ("sent_bytes", self.counts.sent_bytes.clone()),
            ("malformed_frames", self.counts.malformed.clone()),
            ("throttled", self.counts.throttled.clone()),
            ("received_frames", self.received.frames.clone()),
            ("received_bytes", self.received.bytes.clone()),
            ("dropped_frames", self.received.dropped.clone()),
        ];
        meters.extend(self.link.meters());
        meters
    }
}
