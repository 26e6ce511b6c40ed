//! Assembly: from a plan to a board with all chips on it, in one loop over the devices.

use std::sync::{Arc, PoisonError};

use arch::layout;
use base::clock::Clock;
use base::host::Host;
use base::irq::{Line, SharedLine};
use base::lane::{Lane, LaneHandle};
use base::memory::Memory;
use base::node::{HostBridge, Node};
use base::{Doing, Fail, Result, Why};
use devices::catalog::{self, Body, Chip, Finish, Kit, Overhear, Space, Window};
use devices::ioapic::IoApic;
use devices::virtio::{Device, Knob, Meters};

use super::board::Board;
use super::control::Reports;
use super::lazy::Lazy;
use super::virtio::{Parts, Room};
use crate::hv::Vm;
use crate::plan::{Irqchip, Plan, Transport};

/// What assembly takes from the world.
pub struct Site<'a> {
    /// The empty VM.
    pub vm: Arc<dyn Vm>,
    /// Guest memory.
    pub memory: &'a Memory,
    /// The host's objects.
    pub host: &'a dyn Host,
    /// The times.
    pub clock: Arc<dyn Clock>,
    /// Control.
    pub reports: &'a Reports,
    /// How drivers reach virtio devices.
    pub transport: Transport,
    /// Somebody wants to see the counters, or to change devices while they run.
    pub watched: bool,
}

/// What assembly makes.
pub struct Assembled {
    /// Buses with all chips on them.
    pub board: Board,
    /// The devices as the firmware tables name them.
    pub nodes: Vec<Node>,
    /// The PCI host bridge, if there is one.
    pub bridge: Option<HostBridge>,
    /// Inputs of the I/O APIC.
    pub pins: u32,
    /// The last duties of chips, when the guest has ended: to hand on the output they still hold.
    pub finishes: Vec<Finish>,
    /// The counters of each device that has some, by its name, if anybody wants them.
    pub meters: Vec<(String, Meters)>,
    /// What can change of each device while the guest runs, likewise.
    pub knobs: Vec<(String, Knob)>,
    /// The lane on which virtio devices work, if there is any.
    pub lane: Option<LaneHandle>,
}

/// Builds every device of the plan and puts it in its place.
///
/// # Errors
/// A device cannot be built, or two want the same place.
pub fn assemble(plan: &Plan, site: &Site<'_>) -> Result<Assembled> {
    let mut board = Board::new(site.vm.clone());
    let lines = Lines::new(plan.irqchip, site, &mut board)?;
    let line = |gsi: u32| lines.line(gsi);
    let mut work = Work {
        site,
        made: Assembled {
            board,
            nodes: Vec::new(),
            bridge: None,
            pins: 0,
            finishes: Vec::new(),
            meters: Vec::new(),
            knobs: Vec::new(),
            lane: None,
        },
        watched: site.watched,
        room: Room::new(site.transport, line),
    };
    if plan.command.is_some() {
        work.made.board.watch.lock().unwrap_or_else(PoisonError::into_inner).keep_tail();
    }
    let overheard = work.made.board.overheard.clone();
    let overhear: Overhear =
        Arc::new(move |bytes| overheard.lock().unwrap_or_else(PoisonError::into_inner).feed(bytes));
    for device in &plan.devices {
        let entry = catalog::find(&device.kind).ok_or_else(|| {
            Fail::new(Why::Usage, format!("build {}", device.name))
                .because(format!("there is no device kind {}", device.kind))
        })?;
        let kit = Kit {
            name: &device.name,
            host: site.host,
            clock: site.clock.clone(),
            memory: site.memory,
            lines: &line,
            overhear: overhear.clone(),
            lane: &site.reports.lane,
        };
        match entry.build(&device.spec, &kit)? {
            Body::Chip(chip) => work.place_chip(&device.name, chip)?,
            Body::Virtio(virtio) => work.place_virtio(&device.name, virtio, &lines)?,
            Body::Absent => {}
        }
    }
    let mut made = work.made;
    made.bridge = work.room.close(&mut made.board, site.memory.len())?;
    let pins = made.bridge.iter().flat_map(|bridge| &bridge.pins).map(|(_, gsi)| gsi);
    made.pins = lines.settle(made.nodes.iter().flat_map(|node| &node.irqs).chain(pins));
    Ok(made)
}

/// Assembly under way.
struct Work<'a> {
    site: &'a Site<'a>,
    made: Assembled,
    /// Counters and knobs are wanted.
    watched: bool,
    /// Where virtio devices go.
    room: Room,
}

impl Work<'_> {
    fn place_chip(&mut self, name: &str, chip: Chip) -> Result<()> {
        for window in chip.windows {
            let Window { space, base, len, lazy, registers } = window;
            let lazy = lazy.iter().map(|register| Lazy::new(space, register.address, 1, register.only));
            self.made.board.lazy.extend(lazy);
            self.made.board.bus(space).insert(name, base, len, registers)?;
        }
        self.made.nodes.extend(chip.node);
        self.made.board.consoles.extend(chip.console);
        self.made.finishes.extend(chip.finish);
        Ok(())
    }

    fn place_virtio(&mut self, name: &str, device: Box<dyn Device>, lines: &Lines) -> Result<()> {
        let mut device = device;
        self.made.finishes.extend(device.last_duty());
        let lane = &self.lane()?;
        let line = &|gsi| lines.line(gsi);
        let (memory, gsis, watched) = (self.site.memory, lines.pins_max(), self.watched);
        let parts = Parts { name, device, memory, lane, line, gsis, watched };
        let placed = self.room.place(&mut self.made.board, parts)?;
        self.made.nodes.extend(placed.node);
        if watched {
            self.made.meters.push((name.to_owned(), placed.meters));
            self.made.knobs.extend(placed.knob.map(|knob| (name.to_owned(), knob)));
        }
        Ok(())
    }

    /// The I/O lane, for the first device that needs one.
    fn lane(&mut self) -> Result<LaneHandle> {
        if let Some(lane) = &self.made.lane {
            return Ok(lane.clone());
        }
        let reports = self.site.reports.clone();
        let lane = Lane::spawn("io0", move |effect| reports.lane.report(effect))
            .doing(Why::Host, || "set up the I/O lane")?;
        self.made.lane = Some(lane.clone());
        Ok(lane)
    }
}

/// Where interrupt lines lead.
enum Lines {
    /// To the I/O APIC in this process.
    Split(IoApic),
    /// To the controllers in the kernel.
    Full(Arc<dyn Vm>),
}

impl Lines {
    fn new(irqchip: Irqchip, site: &Site<'_>, board: &mut Board) -> Result<Lines> {
        if irqchip == Irqchip::Full {
            return Ok(Lines::Full(site.vm.clone()));
        }
        let ioapic = IoApic::new(layout::IOAPIC_PINS_MAX, site.vm.clone().messages());
        board.memory.insert("ioapic", layout::IOAPIC, layout::IOAPIC_LEN, ioapic.registers())?;
        // The select register: half of all accesses, and it takes effect with the next one.
        board.lazy.push(Lazy::new(Space::Memory, layout::IOAPIC, 4, None));
        let eoi = ioapic.clone();
        board.end_of_interrupt = Box::new(move |vector| eoi.eoi(vector));
        Ok(Lines::Split(ioapic))
    }

    fn line(&self, gsi: u32) -> SharedLine {
        match self {
            Lines::Split(ioapic) => ioapic.line(gsi),
            Lines::Full(vm) => Arc::new(KernelLine { vm: vm.clone(), gsi }),
        }
    }

    fn pins_max(&self) -> u32 {
        match self {
            Lines::Split(_) => layout::IOAPIC_PINS_MAX,
            Lines::Full(_) => layout::KERNEL_IOAPIC_PINS,
        }
    }

    /// Shows the guest no more inputs than these devices use; how many there are.
    fn settle<'a>(&self, gsis: impl Iterator<Item = &'a u32>) -> u32 {
        match self {
            Lines::Split(ioapic) => {
                let pins = gsis.max().map_or(1, |gsi| gsi + 1);
                ioapic.set_pins(pins);
                pins
            }
            Lines::Full(_) => layout::KERNEL_IOAPIC_PINS,
        }
    }
}

/// An input of the kernel's interrupt controllers.
struct KernelLine {
    vm: Arc<dyn Vm>,
    gsi: u32,
}

impl Line for KernelLine {
    fn set(&self, high: bool) {
        self.vm.set_line(self.gsi, high);
    }
}
