//! Assembly: from a plan to a board with all chips on it, in one loop over the devices.

use std::os::fd::AsFd;
use std::sync::Arc;

use arch::layout;
use base::bus::{Effect, Registers};
use base::clock::Clock;
use base::host::Host;
use base::irq::{Line, SharedLine};
use base::lane::{Lane, LaneHandle};
use base::memory::Memory;
use base::node::Node;
use base::{Doing, Fail, Result, Why};
use devices::catalog::{self, Body, Chip, Finish, Kit, Space, Window};
use devices::ioapic::IoApic;
use devices::virtio::Device;
use devices::virtio::mmio::{Mmio, NOTIFY};

use super::board::Board;
use super::control::Reports;
use super::lazy::Lazy;
use crate::hv::Vm;
use crate::plan::{Irqchip, Plan};

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
}

/// What assembly makes.
pub struct Assembled {
    /// Buses with all chips on them.
    pub board: Board,
    /// The devices as the firmware tables name them.
    pub nodes: Vec<Node>,
    /// Inputs of the I/O APIC.
    pub pins: u32,
    /// The last duties of chips, when the guest has ended: to hand on the output they still hold.
    pub finishes: Vec<Finish>,
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
        made: Assembled { board, nodes: Vec::new(), pins: 0, finishes: Vec::new(), lane: None },
        virtio: 0,
    };
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
            lane: &site.reports.lane,
        };
        match entry.build(&device.spec, &kit)? {
            Body::Chip(chip) => work.place_chip(&device.name, chip)?,
            Body::Virtio(virtio) => work.place_virtio(&device.name, virtio, &lines)?,
            Body::Absent => {}
        }
    }
    let mut made = work.made;
    made.pins = lines.settle(&made.nodes);
    Ok(made)
}

/// Assembly under way.
struct Work<'a> {
    site: &'a Site<'a>,
    made: Assembled,
    /// Virtio devices placed so far.
    virtio: u32,
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
        let number = self.virtio;
        self.virtio += 1;
        let gsi = layout::FIRST_FREE_GSI + number;
        let base = layout::VIRTIO_MMIO + u64::from(number) * layout::VIRTIO_MMIO_LEN;
        if gsi >= lines.pins_max() {
            return Err(Fail::new(Why::Usage, format!("place {name}"))
                .because(format!("all {number} virtio interrupts are taken"))
                .hint("use fewer devices"));
        }
        let lane = self.lane()?;
        let mmio = Mmio::attach(name, device, self.site.memory, lines.line(gsi), &lane)?;
        let chip = Wiring { mmio, vm: self.site.vm.clone(), base, wired: false };
        self.made.nodes.push(Node {
            name: format!("V{number:03}"),
            hid: "LNRO0005",
            uid: number,
            ports: Vec::new(),
            memory: vec![(narrow(base)?, narrow(layout::VIRTIO_MMIO_LEN)?)],
            irqs: vec![gsi],
        });
        self.made.board.memory.insert(name, base, layout::VIRTIO_MMIO_LEN, Box::new(chip))
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

/// A virtio window whose doorbells are wired into the hypervisor when the driver first rings one.
///
/// Not earlier, because KVM frees what a registration replaced after a grace period of some 10 ms, and a VM that ends
/// before it waits.
struct Wiring {
    mmio: Mmio,
    vm: Arc<dyn Vm>,
    base: u64,
    wired: bool,
}

impl Registers for Wiring {
    fn read(&mut self, at: u64, data: &mut [u8]) {
        self.mmio.read(at, data);
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        let effect = self.mmio.write(at, data);
        if at == NOTIFY && !self.wired {
            self.wired = true;
            for doorbell in self.mmio.doorbells() {
                // Without it such writes go on coming as exits, and the register rings the doorbell itself.
                let _ =
                    self.vm.ring_on_write(self.base + NOTIFY, u32::from(doorbell.queue), doorbell.as_fd());
            }
        }
        effect
    }
}

fn narrow(value: u64) -> Result<u32> {
    u32::try_from(value).doing(Why::Host, || format!("place a device at {value:#x}"))
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
    fn settle(&self, nodes: &[Node]) -> u32 {
        match self {
            Lines::Split(ioapic) => {
                let pins = nodes.iter().flat_map(|node| &node.irqs).max().map_or(1, |gsi| gsi + 1);
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
