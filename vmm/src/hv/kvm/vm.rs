//! A VM: slots, interrupts, doorbells and delayed writes.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arch::layout;
use base::irq::{Messages, Msi, Wire};
use base::memory::Memory;
use base::meter::Counter;
use base::{Doing, Fail, Result, Why};
use devices::catalog::Space;
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQFD_FLAG_DEASSIGN, KVM_PIT_SPEAKER_DUMMY,
    KvmIrqRouting, kvm_enable_cap, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign, kvm_irq_routing_entry, kvm_irqfd, kvm_msi, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, VmFd};

use super::ring::Ring;
use super::vcpu::KvmVcpu;
use super::{Blank, Hypervisor};
use crate::hv::{Vcpu, Vm};
use crate::plan::Irqchip;

/// A KVM virtual machine.
pub struct KvmVm {
    fd: VmFd,
    hypervisor: Arc<Hypervisor>,
    ring: OnceLock<Mutex<Ring>>,
    routes: Mutex<Routes>,
    /// Interrupts that KVM did not take.
    lost: Counter,
    /// What the guest can reach. Last: it goes after the descriptor.
    memory: OnceLock<Memory>,
}

impl KvmVm {
    pub(super) fn new(blank: Blank, irqchip: Irqchip) -> Result<KvmVm> {
        let Blank { hypervisor, fd } = blank;
        // Only Intel processors need it; it costs two short calls.
        fd.set_tss_address(usize::try_from(layout::TSS).unwrap_or(0))
            .doing(Why::Host, || "set the TSS address")?;
        match irqchip {
            Irqchip::Split => {
                let cap = kvm_enable_cap {
                    cap: KVM_CAP_SPLIT_IRQCHIP,
                    args: [u64::from(layout::IOAPIC_PINS_MAX), 0, 0, 0],
                    ..Default::default()
                };
                fd.enable_cap(&cap).doing(Why::Unsupported, || "split the interrupt controllers")?;
            }
            Irqchip::Full => {
                fd.create_irq_chip().doing(Why::Host, || "create the interrupt controllers")?;
                let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
                fd.create_pit2(pit).doing(Why::Host, || "create the PIT")?;
            }
        }
        Ok(KvmVm {
            fd,
            hypervisor,
            ring: OnceLock::new(),
            routes: Mutex::new(Routes { split: irqchip == Irqchip::Split, ..Routes::default() }),
            lost: Counter::default(),
            memory: OnceLock::new(),
        })
    }
}

impl Vm for KvmVm {
    fn map(&self, memory: &Memory) -> Result<()> {
        self.memory
            .set(memory.clone())
            .map_err(|_| Fail::new(Why::Host, "give the guest its memory").because("it has some"))?;
        for (slot, piece) in (0..).zip(memory.pieces()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: piece.guest,
                memory_size: piece.len,
                userspace_addr: piece.host,
            };
            // SAFETY: the range is a reservation of `memory`, which only guest memory ever stands in: what takes the
            // place of its pages is mapped over them, and KVM follows (MMU notifiers). It stays reserved for as long
            // as a guest can run: this VM and each of its vCPUs hold a share, and drop it after their descriptor.
            unsafe { self.fd.set_user_memory_region(region) }.doing(Why::Host, || {
                format!("give the guest {} MiB at {:#x}", piece.len >> 20, piece.guest)
            })?;
        }
        Ok(())
    }

    fn vcpu(&self, id: u32, count: u32) -> Result<Box<dyn Vcpu>> {
        let doing = || format!("create vCPU {id}");
        let memory = self
            .memory
            .get()
            .cloned()
            .ok_or_else(|| Fail::new(Why::Host, doing()).because("it has no memory"))?;
        let fd = self.fd.create_vcpu(u64::from(id)).doing(Why::Host, doing)?;
        let cpuid = arch::cpuid::tailor(&self.hypervisor.cpuid()?, id, count)
            .map_err(|cause| Fail::new(Why::Host, doing()).because(format!("{cause:?}")))?;
        fd.set_cpuid2(&cpuid).doing(Why::Host, || format!("set CPUID of vCPU {id}"))?;
        Ok(Box::new(KvmVcpu::new(id, fd, memory, |fd| self.share_ring(fd))?))
    }

    fn messages(self: Arc<Self>) -> Arc<dyn Messages> {
        self
    }

    fn lost_interrupts(&self) -> u64 {
        self.lost.get()
    }

    fn set_line(&self, gsi: u32, high: bool) {
        if self.fd.set_irq_line(gsi, high).is_err() {
            self.lost.add(1);
        }
    }

    fn ring_on_write(&self, address: u64, value: Option<u32>, doorbell: BorrowedFd<'_>) -> Result<()> {
        self.wire(address, value, doorbell, 0)
            .doing(Why::Host, || format!("wire the doorbell at {address:#x}"))
    }

    fn stop_ringing(&self, address: u64, value: Option<u32>, doorbell: BorrowedFd<'_>) -> Result<()> {
        self.wire(address, value, doorbell, 1 << kvm_ioeventfd_flag_nr_deassign)
            .doing(Why::Host, || format!("unwire the doorbell at {address:#x}"))
    }

    fn delay_writes(&self, space: Space, address: u64, len: u32) -> Result<()> {
        self.fd
            .register_coalesced_mmio(location(space, address), len)
            .doing(Why::Host, || format!("delay writes at {address:#x}"))
    }

    fn hear_writes(&self, space: Space, address: u64, len: u32) -> Result<()> {
        self.fd
            .unregister_coalesced_mmio(location(space, address), len)
            .doing(Why::Host, || format!("hear writes at {address:#x}"))
    }

    fn late_writes(&self, take: &mut dyn FnMut(Space, u64, &[u8])) {
        let Some(ring) = self.ring.get() else { return };
        let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
        for write in ring.full() {
            take(write.space, write.address, write.data());
        }
    }
}

fn location(space: Space, address: u64) -> IoEventAddress {
    match space {
        Space::Port => IoEventAddress::Pio(address),
        Space::Memory => IoEventAddress::Mmio(address),
    }
}

/// `_IOW(KVMIO, 0x79, struct kvm_ioeventfd)` (`include/uapi/linux/kvm.h`).
const KVM_IOEVENTFD: libc::c_ulong = 0x4040_ae79;
/// `_IOW(KVMIO, 0x76, struct kvm_irqfd)`.
const KVM_IRQFD: libc::c_ulong = 0x4020_ae76;

impl KvmVm {
    /// Registers or, with that flag, removes an ioeventfd: for 4 bytes of this value, or for any write. The latter is
    /// found without decoding the guest's instruction.
    fn wire(
        &self,
        address: u64,
        value: Option<u32>,
        doorbell: BorrowedFd<'_>,
        flags: u32,
    ) -> std::io::Result<()> {
        let matching = if value.is_some() { 1 << kvm_ioeventfd_flag_nr_datamatch } else { 0 };
        let request = kvm_ioeventfd {
            datamatch: value.unwrap_or(0).into(),
            addr: address,
            len: if value.is_some() { 4 } else { 0 },
            fd: doorbell.as_raw_fd(),
            flags: flags | matching,
            ..Default::default()
        };
        // KVM_IOEVENTFD through the raw call: kvm-ioctls wants an owned EventFd, and the doorbell is the engine's.
        // SAFETY: the descriptor is a VM's, and KVM reads one `kvm_ioeventfd` from the pointer.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_IOEVENTFD, &raw const request) };
        if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }

    fn share_ring(&self, vcpu: &kvm_ioctls::VcpuFd) -> Result<()> {
        if self.ring.get().is_none() {
            let ring = Ring::map(vcpu).doing(Why::Host, || "map the ring of delayed writes")?;
            let _ = self.ring.set(Mutex::new(ring));
        }
        Ok(())
    }
}

impl Messages for KvmVm {
    fn send(&self, msi: Msi) {
        let [low, high] = halves(msi.address);
        let request = kvm_msi { address_lo: low, address_hi: high, data: msi.data, ..Default::default() };
        if self.fd.signal_msi(request).is_err() {
            self.lost.add(1);
        }
    }

    fn watch(&self, pin: u32, msi: Option<Msi>) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let before = routes.pins.clone();
        routes.pins.retain(|(gsi, _)| *gsi != pin);
        routes.pins.extend(msi.map(|msi| (pin, msi)));
        // A routing change waits for a grace period of the kernel: only when something changed.
        if routes.pins != before && !self.set_routes(&routes) {
            self.lost.add(1);
        }
    }

    fn wire(&self, wires: &[Wire]) {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        // The other controllers have routes of their own in the kernel, which a table of ours would replace.
        if !routes.split {
            return;
        }
        let mut new = Vec::new();
        for (call, msi) in wires {
            let known = routes.wired.iter().position(|wired| Arc::ptr_eq(&wired.call, call));
            match (known, msi) {
                (Some(at), Some(msi)) => {
                    if let Some(wired) = routes.wired.get_mut(at) {
                        wired.msi = *msi;
                    }
                }
                (Some(at), None) => {
                    let wired = routes.wired.swap_remove(at);
                    // It fails for what is not there, which is what is wanted.
                    let _ = self.irqfd(&wired, KVM_IRQFD_FLAG_DEASSIGN);
                }
                (None, Some(msi)) => {
                    let taken = |gsi: &u32| routes.wired.iter().any(|wired| wired.gsi == *gsi);
                    let gsi = (layout::IOAPIC_PINS_MAX..WIRES_END).find(|gsi| !taken(gsi));
                    let Some(gsi) = gsi else { continue };
                    routes.wired.push(Wired { call: call.clone(), gsi, msi: *msi });
                    new.push(gsi);
                }
                (None, None) => {}
            }
        }
        if wires.iter().all(|(_, msi)| msi.is_none()) {
            return;
        }
        let set = self.set_routes(&routes);
        // What cannot be wired is heard by who waits for it.
        routes.wired.retain(|wired| !new.contains(&wired.gsi) || set && self.irqfd(wired, 0).is_ok());
    }
}

/// GSIs of messages that an eventfd stands for begin behind those of pins.
const WIRES_END: u32 = layout::IOAPIC_PINS_MAX + 1024;

/// What GSIs stand for.
#[derive(Default)]
struct Routes {
    split: bool,
    pins: Vec<(u32, Msi)>,
    wired: Vec<Wired>,
}

/// An eventfd whose writes KVM takes for a message.
struct Wired {
    call: Arc<OwnedFd>,
    gsi: u32,
    msi: Msi,
}

impl KvmVm {
    fn set_routes(&self, routes: &Routes) -> bool {
        let wired = routes.wired.iter().map(|wired| route(wired.gsi, wired.msi));
        let entries: Vec<_> = routes.pins.iter().map(|(gsi, msi)| route(*gsi, *msi)).chain(wired).collect();
        let set = KvmIrqRouting::from_entries(&entries).map(|table| self.fd.set_gsi_routing(&table));
        matches!(set, Ok(Ok(())))
    }

    /// KVM_IRQFD through the raw call, as for doorbells.
    fn irqfd(&self, wired: &Wired, flags: u32) -> std::io::Result<()> {
        let fd = u32::try_from(wired.call.as_raw_fd()).map_err(std::io::Error::other)?;
        let request = kvm_irqfd { fd, gsi: wired.gsi, flags, ..Default::default() };
        // SAFETY: the descriptor is a VM's, and KVM reads one `kvm_irqfd` from the pointer.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_IRQFD, &raw const request) };
        if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    }
}

fn route(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    [entry.u.msi.address_lo, entry.u.msi.address_hi] = halves(msi.address);
    entry.u.msi.data = msi.data;
    entry
}

fn halves(address: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}
