//! A guest that gives memory back in every way there is: any page frames, any ranges, statistics with any content.
//!
//! What it has given reads as zeros, what it has not is as it was, and only page frames that are no memory break the device.
#![no_main]

mod driver;
mod world;

use std::sync::OnceLock;

use base::host::fake::FakeHost;
use devices::catalog;
use driver::Driver;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use world::World;

const BALLOONS: [&str; 4] = ["reporting=on,stats=1,deflate_on_oom=on", "reporting=on", "stats=1", "size=1M"];
const FRAME: u64 = 4096;
/// Memory that may be given back: what is below has rings and buffers in it.
const FIRST: u64 = 2 << 20;
const END: u64 = 4 << 20;
/// Where the buffers lie, 16 KiB for each chain.
const BUFFERS: u64 = 0x4_0000;
/// Page frames of a request that count; the device may leave the rest alone.
const FRAMES: usize = 1024;

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let world = World::new(&[(0, END)]);
        (FIRST..END).step_by(4096).for_each(|page| fill(&world, page));
        world
    })
}

/// What a page holds as long as it is the guest's, in its first and its last word.
fn mark(page: u64) -> u64 {
    page | 0xa5a5_0000_0000_0001
}

fn fill(world: &World, page: u64) {
    for at in [page, page + FRAME - 8] {
        world.memory.ram().write_obj(mark(page), GuestAddress(at)).expect("a page is in memory");
    }
}

struct Play<'a> {
    world: &'a World,
    driver: Driver<'a>,
    given: Vec<bool>,
    broken: bool,
}

impl Play<'_> {
    fn give(&mut self, from: u64, to: u64) {
        for page in (from.max(FIRST)..to.min(END)).step_by(4096) {
            self.given[usize::try_from((page - FIRST) / FRAME).expect("a frame fits")] = true;
        }
    }

    /// A list of page frames into the balloon, or out of it.
    fn frames(&mut self, queue: usize, [start, step, count, wild, odd]: [u8; 5]) {
        let Some(chain) = self.driver.spare(queue) else { return };
        let count = usize::from(count) << (wild & 3);
        let mut list: Vec<u32> = (0..count)
            .map(|n| 512 + (u32::from(start) * 2 + u32::from(step) * u32::try_from(n).unwrap_or(0)) % 512)
            .collect();
        if wild & 0xc0 == 0xc0
            && let Some(place) = list.get_mut(usize::from(odd) * 4)
        {
            // No memory, up to the last frame that can be said.
            *place = [1024, 1 << 20, u32::MAX, 0xfee00][usize::from(wild >> 2 & 3)];
        }
        let mut bytes: Vec<u8> = list.iter().flat_map(|frame| frame.to_le_bytes()).collect();
        if odd == 0xff {
            bytes.push(0);
        }
        let at = BUFFERS + 0x4000 * u64::from(chain);
        self.world.memory.ram().write_slice(&bytes, GuestAddress(at)).expect("a buffer is in memory");
        let len = u32::try_from(bytes.len()).expect("a length fits");
        let cut = u32::from(step).min(len);
        self.driver.offer(queue, chain, &[(at, cut, false), (at + u64::from(cut), len - cut, false)]);
        let looked = list.get(..FRAMES).unwrap_or(&list);
        self.broken |=
            odd == 0xff || queue == 0 && looked.iter().any(|frame| u64::from(*frame) * FRAME >= END);
        if queue == 0 && !self.broken {
            looked
                .iter()
                .for_each(|frame| self.give(u64::from(*frame) * FRAME, (u64::from(*frame) + 1) * FRAME));
        }
    }

    /// Free memory is reported.
    fn report(&mut self, queue: usize, [page, offset, pages, rest, more]: [u8; 5]) {
        let Some(chain) = self.driver.spare(queue) else { return };
        let mut parts = Vec::new();
        for n in 0..u64::from(more & 3) + 1 {
            let at = FIRST + (u64::from(page) * 2 + n * 40) % 500 * FRAME + u64::from(offset) * 16;
            let len = u64::from(pages) * FRAME + u64::from(rest) * 16 + 1;
            let len = len.min(END - at);
            parts.push((at, u32::try_from(len).expect("a length fits"), more & 4 == 0));
            self.give(at.div_ceil(FRAME) * FRAME, (at + len) / FRAME * FRAME);
        }
        self.driver.offer(queue, chain, &parts);
    }

    /// Statistics, or what is in their place.
    fn statistics(&mut self, queue: usize, [tag, value, len, step, _]: [u8; 5]) {
        let Some(chain) = self.driver.spare(queue) else { return };
        let at = BUFFERS + 0x4000 * u64::from(chain);
        let bytes: Vec<u8> = (0..len)
            .flat_map(|n| {
                let tag = u16::from(tag).wrapping_add(u16::from(n) * u16::from(step));
                [tag.to_le_bytes().as_slice(), &(u64::from(value) << (n % 64)).to_le_bytes()].concat()
            })
            .skip(usize::from(tag & 1))
            .collect();
        self.world.memory.ram().write_slice(&bytes, GuestAddress(at)).expect("a buffer is in memory");
        self.driver.offer(queue, chain, &[(at, u32::try_from(bytes.len()).expect("a length fits"), false)]);
    }

    /// The end of a move.
    fn look(&mut self, queues: usize) {
        self.driver.settle();
        assert_eq!(self.driver.is_broken(), self.broken, "broken by what is no memory, and by nothing else");
        for queue in 0..queues {
            while let Some((_, len)) = self.driver.take(queue) {
                assert_eq!(len, 0, "a balloon writes nothing");
            }
        }
    }

    /// Every page is what it should be; what was given is filled anew for the next input.
    fn compare(&self) {
        for (page, given) in (FIRST..END).step_by(4096).zip(&self.given) {
            let wanted = if *given { 0 } else { mark(page) };
            for at in [page, page + FRAME - 8] {
                let found: u64 = self.world.memory.ram().read_obj(GuestAddress(at)).expect("in memory");
                assert_eq!(found, wanted, "{at:#x}, given: {given}");
            }
            if *given {
                fill(self.world, page);
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, moves)) = data.split_first() else { return };
    let (world, entry) = (world(), catalog::find("balloon").expect("there are balloons"));
    let text = BALLOONS[usize::from(choice) % BALLOONS.len()];
    let device = world.build(entry, text, &FakeHost::default()).expect("make a balloon");
    let queues = device.queues().len();
    let driver = Driver::start(world, device, u32::MAX);
    let given = vec![false; usize::try_from((END - FIRST) / FRAME).expect("a number of pages fits")];
    let mut play = Play { world, driver, given, broken: false };
    let statistics = text.contains("stats").then_some(2);
    let reporting = text.contains("reporting").then_some(queues - 1);
    for piece in moves.chunks_exact(6).take(100) {
        let &[kind, ref about @ ..] = piece else { break };
        let Ok(about) = about.try_into() else { break };
        match (kind % 5, statistics, reporting) {
            (0, ..) => play.frames(0, about),
            (1, ..) => play.frames(1, about),
            (2, _, Some(queue)) => play.report(queue, about),
            (3, Some(queue), _) => play.statistics(queue, about),
            (4, ..) => {
                let [a, b, c, ..] = about;
                play.driver.registers().write(0x100 + u64::from(a % 16), &[b; 8][..usize::from(c % 8) + 1]);
            }
            _ => {}
        }
        play.look(queues);
        if play.broken {
            break;
        }
    }
    play.compare();
    play.driver.stop();
});
