//! The hypervisor port: the few things a machine asks of the kernel, so that all else runs on a fake too.

pub mod fake;
pub mod kvm;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use arch::{layout, registers};
use base::Result;
use base::irq::Messages;
use base::memory::Memory;
use boot::Start;
use devices::catalog::Space;
use kvm_bindings::{kvm_regs, kvm_sregs};

/// One virtual machine.
pub trait Vm: Send + Sync {
    /// Gives the guest its RAM, once. The VM keeps a share of the memory for as long as a guest can reach it.
    ///
    /// It knows addresses, not pages: until a vCPU runs, what is mapped there may still be replaced
    /// ([`Memory::map_file`], [`Memory::adopt`]).
    ///
    /// # Errors
    /// As the hypervisor answers, or it was given memory before.
    fn map(&self, memory: &Memory) -> Result<()>;

    /// Makes vCPU number `id` of a VM that has its memory. `count` is how many the machine has.
    ///
    /// # Errors
    /// As the hypervisor answers.
    fn vcpu(&self, id: u32, count: u32) -> Result<Box<dyn Vcpu>>;

    /// Where message-signalled interrupts go.
    fn messages(self: Arc<Self>) -> Arc<dyn Messages>;

    /// Interrupt messages and levels that the hypervisor did not take so far.
    fn lost_interrupts(&self) -> u64;

    /// Sets input `gsi` of the in-kernel interrupt controllers (full irqchip only).
    fn set_line(&self, gsi: u32, high: bool);

    /// Has writes of `value` (4 bytes) at `address`, or any writes there, signal `doorbell` without leaving the kernel.
    ///
    /// # Errors
    /// The hypervisor cannot; the caller then sees such writes as exits.
    fn ring_on_write(&self, address: u64, value: Option<u32>, doorbell: BorrowedFd<'_>) -> Result<()>;

    /// Ends what [`Vm::ring_on_write`] began with the same arguments.
    ///
    /// # Errors
    /// As the hypervisor answers.
    fn stop_ringing(&self, address: u64, value: Option<u32>, doorbell: BorrowedFd<'_>) -> Result<()>;

    /// Has writes at `address` handed over late and in batches, by [`Vm::late_writes`].
    ///
    /// # Errors
    /// The hypervisor cannot; the caller then sees such writes as exits.
    fn delay_writes(&self, space: Space, address: u64, len: u32) -> Result<()>;

    /// Ends what [`Vm::delay_writes`] began.
    ///
    /// # Errors
    /// As the hypervisor answers.
    fn hear_writes(&self, space: Space, address: u64, len: u32) -> Result<()>;

    /// Hands over the writes that were delayed, in their order. To be called before an exit is handled.
    fn late_writes(&self, take: &mut dyn FnMut(Space, u64, &[u8]));
}

/// One virtual processor. It is used by one thread; only its [`Kick`] crosses.
pub trait Vcpu: Send {
    /// Puts the boot processor at its first instruction.
    ///
    /// # Errors
    /// As the hypervisor answers.
    fn start_at(&mut self, start: &Start) -> Result<()>;

    /// Runs the guest until it needs something.
    ///
    /// # Errors
    /// The hypervisor cannot run it any more.
    fn run(&mut self) -> Result<Exit<'_>>;

    /// The way to get this vCPU out of [`Vcpu::run`] from another thread.
    fn kick(&self) -> Arc<dyn Kick>;

    /// Where the vCPU stands, in one line for a report (`rip=... cr3=...`).
    fn whereabouts(&self) -> String;

    /// Where it stands, for who looks into it. To be asked on the thread that runs it.
    ///
    /// # Errors
    /// As the hypervisor answers.
    fn stand(&self) -> Result<Stand>;
}

/// Where a vCPU stands.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stand {
    /// What it does.
    pub activity: Activity,
    /// Its registers.
    pub regs: kvm_regs,
    /// Its segments and control registers.
    pub sregs: kvm_sregs,
    /// Where system calls of 64-bit programs enter (`MSR_LSTAR`); 0 before the guest has said so.
    pub lstar: u64,
}

/// What a vCPU does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activity {
    /// It executes instructions.
    #[default]
    Running,
    /// It waits for an interrupt (`hlt`).
    Halted,
    /// It waits for another one to start it.
    Parked,
}

/// Gets a vCPU out of the guest.
pub trait Kick: Send + Sync {
    /// Makes the present or the next [`Vcpu::run`] return [`Exit::Interrupted`].
    fn kick(&self);
}

/// The registers of the boot processor at `start`; `sregs` comes with what KVM set at reset.
pub fn registers_at(start: &Start, sregs: &mut kvm_sregs) -> kvm_regs {
    match *start {
        Start::Linux64 { entry, zero_page } => {
            registers::linux64(sregs, entry, zero_page, layout::BOOT_STACK)
        }
        Start::Pvh { entry, start_info } => registers::pvh(sregs, entry, start_info),
    }
}

/// Why a vCPU came out of the guest.
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest reads a port; the answer goes into `data`: `count` items of `width` bytes.
    PortRead {
        /// Port number.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        width: usize,
        /// Room for the answers.
        data: &'a mut [u8],
    },
    /// The guest writes a port.
    PortWrite {
        /// Port number.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        width: usize,
        /// What it writes, one access after another.
        data: &'a [u8],
    },
    /// The guest reads a device's memory.
    MemoryRead(u64, &'a mut [u8]),
    /// The guest writes a device's memory.
    MemoryWrite(u64, &'a [u8]),
    /// The guest has finished a level-triggered interrupt with this vector.
    EndOfInterrupt(u8),
    /// A triple fault.
    Shutdown,
    /// The guest halted and no interrupt can wake it (only where the hypervisor reports it).
    Halted,
    /// Kicked, or a signal came.
    Interrupted,
    /// The hypervisor cannot go on with this guest; the text says why.
    Stuck(String),
    /// Nothing to do.
    Nothing,
}

impl Exit<'_> {
    /// The name under which exits of this kind are counted.
    pub fn kind(&self) -> Kind {
        match self {
            Exit::PortRead { .. } => Kind::PortRead,
            Exit::PortWrite { .. } => Kind::PortWrite,
            Exit::MemoryRead(..) => Kind::MemoryRead,
            Exit::MemoryWrite(..) => Kind::MemoryWrite,
            Exit::EndOfInterrupt(_) => Kind::EndOfInterrupt,
            Exit::Interrupted => Kind::Interrupted,
            Exit::Shutdown | Exit::Halted | Exit::Stuck(_) | Exit::Nothing => Kind::Other,
        }
    }
}

/// Kinds of exits, for counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Kind {
    /// `port_read`
    PortRead,
    /// `port_write`
    PortWrite,
    /// `mmio_read`
    MemoryRead,
    /// `mmio_write`
    MemoryWrite,
    /// `eoi`
    EndOfInterrupt,
    /// `interrupted`
    Interrupted,
    /// `other`
    Other,
}

impl Kind {
    /// All kinds with their names in reports.
    pub const NAMES: [(Kind, &'static str); 7] = [
        (Kind::PortRead, "port_read"),
        (Kind::PortWrite, "port_write"),
        (Kind::MemoryRead, "mmio_read"),
        (Kind::MemoryWrite, "mmio_write"),
        (Kind::EndOfInterrupt, "eoi"),
        (Kind::Interrupted, "interrupted"),
        (Kind::Other, "other"),
    ];
}
