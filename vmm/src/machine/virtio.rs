//! Where virtio devices go: windows at fixed places, or functions on a PCI bus.

use std::sync::Arc;

use arch::layout;
use base::irq::SharedLine;
use base::lane::LaneHandle;
use base::memory::Memory;
use base::node::{HostBridge, Node};
use base::{Doing, Fail, Result, Why};
use boot::inspect;
use boot::kernel::Kernel;
use devices::catalog::Space;
use devices::pci::wire::Wire;
use devices::pci::{Root, root};
use devices::virtio::mmio::{ACK, Mmio};
use devices::virtio::pci::{Pci, Place, WINDOW_LEN};
use devices::virtio::{Device, Knob, Meters};

use super::board::Board;
use super::doorbells::Doorbells;
use super::lazy::Lazy;
use crate::hv::Vm;
use crate::plan::Transport;

/// The transport of a machine that runs `kernel`: what the plan says, or what the kernel has a driver for.
///
/// Over mmio the guest starts with fewer exits, so it is the choice where nothing speaks against it.
pub fn choose(wanted: Transport, kernel: &Kernel) -> Transport {
    match wanted {
        Transport::Auto if inspect::needs_pci(kernel) => Transport::Pci,
        Transport::Auto | Transport::Mmio => Transport::Mmio,
        Transport::Pci => Transport::Pci,
    }
}

/// The room for virtio devices.
pub enum Room {
    /// Windows one after another; so many are taken.
    Mmio(u32),
    /// A PCI bus, and the lines that its interrupt pins share.
    Pci(Root, Vec<(u32, Arc<Wire>)>, Vec<(u8, u32)>),
}

/// What a device is put in place with.
pub struct Parts<'a> {
    /// Its name.
    pub name: &'a str,
    /// Itself.
    pub device: Box<dyn Device>,
    /// Guest memory.
    pub memory: &'a Memory,
    /// The lane on which it will work.
    pub lane: &'a LaneHandle,
    /// Interrupt lines by GSI; there are `gsis`.
    pub line: &'a dyn Fn(u32) -> SharedLine,
    /// Number of GSIs.
    pub gsis: u32,
    /// Somebody wants to see its counters, or to change it while it runs.
    pub watched: bool,
}

/// What a device has become in its place.
pub struct Placed {
    /// Its entry in the firmware tables, where it needs one.
    pub node: Option<Node>,
    /// Its counters, if they are wanted.
    pub meters: Meters,
    /// What can change of it, likewise.
    pub knob: Option<Knob>,
}

impl Room {
    /// The room that the transport gives; `line` leads to GSIs.
    pub fn new(transport: Transport, line: impl Fn(u32) -> SharedLine) -> Room {
        match transport {
            Transport::Auto | Transport::Mmio => Room::Mmio(0),
            Transport::Pci => {
                let wires = layout::PCI_GSIS.map(|gsi| (gsi, Wire::new(line(gsi))));
                Room::Pci(Root::default(), wires.into(), Vec::new())
            }
        }
    }

    /// Puts a device in its place.
    ///
    /// # Errors
    /// There is no room left, or the host is out of file descriptors.
    pub fn place(&mut self, board: &mut Board, parts: Parts<'_>) -> Result<Placed> {
        match self {
            Room::Mmio(taken) => {
                let number = *taken;
                *taken += 1;
                place_mmio(board, parts, number)
            }
            Room::Pci(root, wires, pins) => {
                let (pin, placed) = place_pci(board, parts, root, wires)?;
                pins.push(pin);
                Ok(placed)
            }
        }
    }

    /// Puts the host bridge on the board, if there is a bus; how the firmware tables name it. `bytes` of RAM are there.
    ///
    /// # Errors
    /// Something else is in its place.
    pub fn close(self, board: &mut Board, bytes: u64) -> Result<Option<HostBridge>> {
        let Room::Pci(root, _, pins) = self else { return Ok(None) };
        let ecam = (layout::PCI_ECAM, root::ECAM_LEN);
        board.memory.insert("pci", ecam.0, ecam.1, root.ecam())?;
        let [address, data] = root.ports();
        board.ports.insert("pci", root::ADDRESS_PORT, 1, address)?;
        board.ports.insert("pci", root::DATA_PORT, root::DATA_LEN, data)?;
        // The address register: half of all accesses, and it takes effect with the next one.
        board.lazy.push(Lazy::new(Space::Port, root::ADDRESS_PORT, 4, None));
        let low = (narrow(layout::PCI_LOW)?, narrow(layout::PCI_LOW_LEN)?);
        let high = (layout::pci_high(bytes), layout::PCI_HIGH_LEN);
        Ok(Some(HostBridge { ecam, low, high, pins }))
    }
}

fn place_mmio(board: &mut Board, parts: Parts<'_>, number: u32) -> Result<Placed> {
    let gsi = layout::FIRST_FREE_GSI + number;
    let base = layout::VIRTIO_MMIO + u64::from(number) * layout::VIRTIO_MMIO_LEN;
    if gsi >= parts.gsis {
        return Err(Fail::new(Why::Usage, format!("place {}", parts.name))
            .because(format!("all {number} virtio interrupts are taken"))
            .hint("use fewer devices"));
    }
    let mmio = Mmio::attach(parts.name, parts.device, parts.memory, (parts.line)(gsi), parts.lane)?;
    let meters = if parts.watched { mmio.meters().clone() } else { Meters::new() };
    let knob = parts.watched.then(|| mmio.knob().clone());
    let doorbells = Doorbells::new(board.vm.clone(), mmio.bells(), Some(base));
    let chip = doorbells.around(Box::new(mmio));
    // One in each interrupt. Nothing comes of it before the driver reads the causes again, which is an exit.
    board.lazy.push(Lazy::new(Space::Memory, base + ACK, 4, None));
    board.memory.insert(parts.name, base, layout::VIRTIO_MMIO_LEN, chip)?;
    let node = Node {
        name: format!("V{number:03}"),
        hid: "LNRO0005",
        uid: number,
        ports: Vec::new(),
        memory: vec![(narrow(base)?, narrow(layout::VIRTIO_MMIO_LEN)?)],
        irqs: vec![gsi],
    };
    Ok(Placed { node: Some(node), meters, knob })
}

/// Makes a device a function of the bus; its device number and the GSI of its pin.
fn place_pci(
    board: &mut Board,
    parts: Parts<'_>,
    root: &Root,
    wires: &[(u32, Arc<Wire>)],
) -> Result<((u8, u32), Placed)> {
    let device = root.next()?;
    let (gsi, wire) = wires
        .get(usize::from(device) % wires.len().max(1))
        .ok_or_else(|| Fail::new(Why::Host, format!("place {}", parts.name)).because("there is no line"))?;
    let place = Place {
        device,
        base: layout::PCI_LOW + u64::from(device) * WINDOW_LEN,
        pin: (wire.end(device), u8::try_from(*gsi).unwrap_or(0)),
        messages: Vm::messages(board.vm.clone()),
    };
    let pci = Pci::attach(parts.name, parts.device, parts.memory, place, parts.lane)?;
    let meters = if parts.watched { pci.meters() } else { Meters::new() };
    let knob = parts.watched.then(|| pci.knob());
    let doorbells = Doorbells::new(board.vm.clone(), pci.bells(), None);
    board.memory.insert_movable(device.into(), WINDOW_LEN, doorbells.around(Box::new(pci.clone())));
    board.movable.push((device.into(), doorbells));
    root.add(Box::new(pci));
    Ok(((device, *gsi), Placed { node: None, meters, knob }))
}

fn narrow(value: u64) -> Result<u32> {
    u32::try_from(value).doing(Why::Host, || format!("place a device at {value:#x}"))
}
