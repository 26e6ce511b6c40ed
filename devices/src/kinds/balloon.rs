//! Memory that the guest gives back while it runs: virtio-balloon (virtio 1.2, section 5.5).
//!
//! What comes back is dropped from the host's memory at once, and backed anew when the guest uses it again. So a guest
//! that takes pages out of the balloon need not tell first, and a page in it may read as anything: as zeros, or as the
//! bytes of the kernel's file where that is mapped. The specification allows just that of pages in the balloon and of
//! reported ones, unless the driver has negotiated `VIRTIO_BALLOON_F_PAGE_POISON`: then they have to keep a value, which
//! a mapped file does not. So it is not offered, and a Linux that relies on the content of its free pages reports none.

use std::sync::Arc;
use std::time::Duration;

use base::meter::Counter;
use base::{Fail, Fault, Result, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::amount::Amount;
use crate::catalog::{Body, Driver, Kind, Kit, Presence};
use crate::flag;
use crate::virtio::{Chain, Device, Io, Meters};

/// Feature bits, section 5.5.3.
mod feature {
    pub const STATS_VQ: u64 = 1 << 1;
    pub const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub const REPORTING: u64 = 1 << 5;
}

/// Bytes of a page frame, whatever pages the guest works with (section 5.5.6).
const FRAME: u64 = 4096;
/// Entries of a queue: Linux reports 32 ranges in one request.
const QUEUE: u16 = 64;
/// Page frames that are looked at in one request (Linux sends 256). Each may be a system call, and a chain may name a
/// milliard of them: what is beyond stays where it is, which a device may always choose.
const FRAMES: u64 = 1024;
/// Statistics that are looked at in one report (Linux sends 10 to 16), and the bytes of each.
const STATISTICS: u64 = 32;
const STATISTIC: usize = 10;
/// Where `actual` is in the configuration space (section 5.5.4).
const ACTUAL: u64 = 4;
/// The token of the deadline at which the guest is asked for statistics.
const ASK: u16 = 0;

/// The kind.
pub struct This;

/// A balloon in the guest: memory in it belongs to the host.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// How much the guest is asked to give back, such as 256M: whole pages of 4 KiB, less than its memory.
    #[serde(default = "nothing")]
    pub size: Amount,
    /// on: a guest that runs out of memory takes back what it has given, instead of ending programs.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Seconds between two questions to the guest how it uses its memory, for the counters (default: it is not asked).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stats: Option<u32>,
    /// on: the guest reports what it has freed, and the host has it back until the guest uses it again.
    #[serde(default)]
    pub reporting: bool,
}

fn nothing() -> Amount {
    Amount(0)
}

/// What can change while the guest runs.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Change {
    /// As in [`Spec`].
    #[serde(alias = "target")]
    size: Amount,
}

/// The page frames of a balloon of `size` in a guest with `bytes` of memory.
fn frames_of(size: Amount, bytes: u64, name: &str) -> Result<u32> {
    if !size.0.is_multiple_of(FRAME) {
        let cause = format!("size={size} is no whole number of pages of 4K");
        return wrong(name, cause, "size=256M");
    }
    if size.0 >= bytes {
        let cause = format!("size={size} is not less than the guest's memory, {}", Amount(bytes));
        return wrong(name, cause, "choose less, or pass more --memory");
    }
    Ok(u32::try_from(size.0 / FRAME).unwrap_or(u32::MAX))
}

impl Kind for This {
    type Spec = Spec;
    const NAME: &'static str = "balloon";
    const FLAG: &'static str = "balloon";
    const SUMMARY: &'static str = "memory that the guest gives back while it runs (virtio-balloon)";
    const BARE: &'static str = "size";
    const EXAMPLE: &'static str = "reporting=on,deflate_on_oom=on,stats=5";
    const PRESENCE: Presence = Presence::OnRequest;
    const DRIVERS: &'static [Driver] = &[Driver { module: "virtio_balloon", option: "VIRTIO_BALLOON" }];

    fn check(spec: &Spec, name: &str) -> Result<()> {
        frames_of(spec.size, u64::MAX, name)?;
        if spec.stats == Some(0) {
            let cause = "stats=0 is no time between two questions".to_owned();
            return wrong(name, cause, "leave stats out for none");
        }
        Ok(())
    }

    fn build(spec: &Spec, kit: &Kit<'_>) -> Result<Body> {
        let bytes = kit.memory.len();
        let target = frames_of(spec.size, bytes, kit.name)?;
        let balloon = Balloon::new(kit.name, target, bytes, offer(spec), spec.stats);
        Ok(Body::Virtio(Box::new(balloon)))
    }
}

fn wrong<T>(name: &str, cause: String, hint: &str) -> Result<T> {
    Err(Fail::new(Why::Usage, format!("set up {name}")).because(cause).hint(hint))
}

/// The features that the settings ask for.
fn offer(spec: &Spec) -> u64 {
    let wishes = [
        (spec.deflate_on_oom, feature::DEFLATE_ON_OOM),
        (spec.stats.is_some(), feature::STATS_VQ),
        (spec.reporting, feature::REPORTING),
    ];
    wishes.into_iter().filter(|(wished, _)| *wished).fold(0, |all, (_, bit)| all | bit)
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// The queues of a driver that accepted `features`. Section 5.5.2 gives the optional ones fixed numbers; Linux and QEMU
/// number those that exist, without gaps, and so do we.
fn roles(features: u64) -> Vec<Role> {
    let optional = [(feature::STATS_VQ, Role::Statistics), (feature::REPORTING, Role::Reporting)];
    let optional = optional.into_iter().filter(|(bit, _)| features & bit != 0).map(|(_, role)| role);
    [Role::Inflate, Role::Deflate].into_iter().chain(optional).collect()
}

/// The statistics by their tags (section 5.5.6.4), as counters.
const TAGS: [&str; 10] = [
    "guest_swapped_in_bytes",
    "guest_swapped_out_bytes",
    "guest_major_faults",
    "guest_minor_faults",
    "guest_free_bytes",
    "guest_total_bytes",
    "guest_available_bytes",
    "guest_cache_bytes",
    "guest_huge_page_allocations",
    "guest_huge_page_failures",
];

#[derive(Default)]
struct Counts {
    inflated: Arc<Counter>,
    deflated: Arc<Counter>,
    reported: Arc<Counter>,
    /// What is in the balloon now, as the driver says.
    actual: Arc<Counter>,
    errors: Arc<Counter>,
    /// Reports of statistics, and what the last one said.
    statistics: Arc<Counter>,
    tags: [Arc<Counter>; TAGS.len()],
}

struct Balloon {
    name: String,
    /// Page frames that the balloon is to hold, and that the driver says it holds.
    target: u32,
    actual: u32,
    /// Of the guest's memory.
    bytes: u64,
    offered: u64,
    queues: Vec<u16>,
    /// Of the queues, as the running driver numbers them.
    roles: Vec<Role>,
    period: Option<Duration>,
    /// The buffer of the statistics queue: kept until the guest is to fill it anew.
    report: Option<Chain>,
    counts: Counts,
}

impl Balloon {
    fn new(name: &str, target: u32, bytes: u64, offered: u64, seconds: Option<u32>) -> Balloon {
        Balloon {
            name: name.to_owned(),
            target,
            bytes,
            actual: 0,
            offered,
            queues: roles(offered).iter().map(|_| QUEUE).collect(),
            roles: Vec::new(),
            period: seconds.map(|seconds| Duration::from_secs(seconds.into())),
            report: None,
            counts: Counts::default(),
        }
    }

    /// Section 5.5.6.1: the request is a list of page frames that now belong to the host.
    fn inflate(&self, chain: &Chain, io: &Io<'_>) -> std::result::Result<(), Fault> {
        let mut list = vec![0; usize::try_from(frames(chain)?.saturating_mul(4)).unwrap_or(0)];
        chain.readable().read(io.ram(), 0, &mut list);
        let (list, _) = list.as_chunks::<4>();
        let mut ranges = Vec::with_capacity(list.len());
        for frame in list {
            let start = u64::from(u32::from_le_bytes(*frame)).saturating_mul(FRAME);
            // Of the ranges of RAM none ends within a page.
            if !io.ram().address_in_range(GuestAddress(start)) {
                return Err(Fault::new("page frame in the balloon is not in memory", start));
            }
            ranges.push((start, start.saturating_add(FRAME)));
        }
        self.counts.inflated.add(self.discard(ranges, io));
        Ok(())
    }

    /// Section 5.5.6.7: the buffers of the request are free memory. Nothing is written there.
    fn take_free(&self, chain: &Chain, io: &Io<'_>) {
        let parts = chain.writable().parts(0, u64::MAX).chain(chain.readable().parts(0, u64::MAX));
        let ranges = parts.map(|part| {
            let end = part.addr.0.saturating_add(part.len.into());
            // Whole pages within it.
            (part.addr.0.div_ceil(FRAME).saturating_mul(FRAME), end.saturating_sub(end % FRAME))
        });
        let freed = self.discard(ranges.filter(|(start, end)| start < end).collect(), io);
        self.counts.reported.add(freed);
    }

    /// Gives ranges (first address, end) of RAM back to the host; says how many bytes it took.
    fn discard(&self, ranges: Vec<(u64, u64)>, io: &Io<'_>) -> u64 {
        let mut taken = 0u64;
        for (start, end) in join(ranges) {
            let len = end.saturating_sub(start);
            match io.memory().discard(start, len) {
                Ok(()) => taken = taken.saturating_add(len),
                Err(cause) => {
                    self.counts.errors.add(1);
                    let count = self.counts.errors.get();
                    // One line for the 1st, 2nd, 4th, 8th...
                    if count.is_power_of_two() {
                        let name = &self.name;
                        log::warn!(
                            target: "guest",
                            "{name}: give {len} bytes at {start:#x} back to the host: {cause} (error {count})"
                        );
                    }
                }
            }
        }
        taken
    }

    /// Section 5.5.6.3: the one buffer of the statistics queue comes filled, and goes back when new ones are wanted.
    fn collect(&mut self, chain: Chain, io: &mut Io<'_>) {
        let len = chain.readable().len().min(STATISTICS.saturating_mul(STATISTIC as u64));
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        chain.readable().read(io.ram(), 0, &mut bytes);
        let (entries, _) = bytes.as_chunks::<STATISTIC>();
        for [low, high, a, b, c, d, e, f, g, h] in entries {
            let tag = usize::from(u16::from_le_bytes([*low, *high]));
            // Linux knows more than the specification.
            if let Some(counter) = self.counts.tags.get(tag) {
                counter.set(u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]));
            }
        }
        self.counts.statistics.add(1);
        // A driver has one buffer there. Of two the older goes back, so that nothing is kept but the last.
        if let Some(older) = self.report.replace(chain) {
            io.done(older, 0);
        }
        if let Some(period) = self.period {
            io.arm(ASK, period);
        }
    }
}

/// How many page frames of a list are looked at.
fn frames(chain: &Chain) -> std::result::Result<u64, Fault> {
    let bytes = chain.readable().len();
    if !bytes.is_multiple_of(4) {
        return Err(Fault::new("list of page frames ends within one", bytes));
    }
    Ok((bytes / 4).min(FRAMES))
}

/// Ranges (first address, end) that touch or overlap, as one: a huge one is few system calls, and huge pages go whole.
fn join(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges {
        match joined.last_mut() {
            Some((_, last)) if start <= *last => *last = end.max(*last),
            _ => joined.push((start, end)),
        }
    }
    joined
}

impl Device for Balloon {
    fn id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queues(&self) -> &[u16] {
        &self.queues
    }

    /// `struct virtio_balloon_config`, section 5.5.4: `num_pages` and `actual`. The rest belongs to features that are not
    /// offered.
    fn config(&self) -> Vec<u8> {
        [self.target, self.actual].iter().flat_map(|pages| pages.to_le_bytes()).collect()
    }

    /// Only `actual` is the driver's to write.
    fn configure(&mut self, at: u64, bytes: &[u8]) {
        let mut actual = self.actual.to_le_bytes();
        for (offset, byte) in (0u64..).zip(bytes) {
            let place = at.checked_add(offset).and_then(|at| at.checked_sub(ACTUAL));
            let place = place.and_then(|place| usize::try_from(place).ok());
            if let Some(old) = place.and_then(|place| actual.get_mut(place)) {
                *old = *byte;
            }
        }
        self.actual = u32::from_le_bytes(actual);
        self.counts.actual.set(u64::from(self.actual).saturating_mul(FRAME));
    }

    fn start(&mut self, features: u64, _: &mut Io<'_>) -> Result<()> {
        self.roles = roles(features);
        Ok(())
    }

    fn kick(&mut self, queue: u16, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        let Some(role) = self.roles.get(usize::from(queue)).copied() else { return Ok(()) };
        while let Some(chain) = io.next(queue)? {
            match role {
                Role::Inflate => self.inflate(&chain, io)?,
                // Nothing to do: what is not backed is backed at the first touch.
                Role::Deflate => self.counts.deflated.add(frames(&chain)?.saturating_mul(FRAME)),
                Role::Reporting => self.take_free(&chain, io),
                Role::Statistics => {
                    self.collect(chain, io);
                    continue;
                }
            }
            io.done(chain, 0);
        }
        Ok(())
    }

    fn ready(&mut self, _: u16, io: &mut Io<'_>) -> std::result::Result<(), Fault> {
        if let Some(report) = self.report.take() {
            io.done(report, 0);
        }
        Ok(())
    }

    fn tune(&mut self, change: &str) -> Option<Result<()>> {
        let change = flag::change::<Change>(&self.name, "size=256M", change);
        let target = change.and_then(|change| frames_of(change.size, self.bytes, &self.name));
        Some(target.map(|target| self.target = target))
    }

    fn stop(&mut self, io: &mut Io<'_>) {
        io.disarm(ASK);
        self.report = None;
        // A driver that begins anew begins with an empty balloon.
        self.actual = 0;
        self.counts.actual.set(0);
    }

    fn meters(&self) -> Meters {
        let counts = &self.counts;
        let mut meters = vec![
            ("inflated_bytes", counts.inflated.clone()),
            ("deflated_bytes", counts.deflated.clone()),
            ("reported_bytes", counts.reported.clone()),
            ("actual_bytes", counts.actual.clone()),
            ("errors", counts.errors.clone()),
        ];
        if self.period.is_some() {
            meters.push(("statistics", counts.statistics.clone()));
            meters.extend(TAGS.into_iter().zip(counts.tags.iter().cloned()));
        }
        meters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_numbered_without_gaps() {
        use Role::{Deflate, Inflate, Reporting, Statistics};
        assert_eq!(roles(0), [Inflate, Deflate]);
        assert_eq!(roles(feature::REPORTING | feature::DEFLATE_ON_OOM), [Inflate, Deflate, Reporting]);
        assert_eq!(roles(u64::MAX), [Inflate, Deflate, Statistics, Reporting]);
    }

    #[test]
    fn ranges_that_touch_are_joined() {
        assert_eq!(join(vec![]), []);
        let ranges = vec![(0x5000, 0x6000), (0x1000, 0x2000), (0x4000, 0x5000), (0x4000, 0x5000), (0, 0x800)];
        assert_eq!(join(ranges), [(0, 0x800), (0x1000, 0x2000), (0x4000, 0x6000)]);
        assert_eq!(join(vec![(0, 9), (1, 2), (3, 4), (u64::MAX, u64::MAX)]), [(0, 9), (u64::MAX, u64::MAX)]);
    }
}
