//! A plan: everything a machine is made from, in one value that can be written down and read back.
//!
//! The command line, a plan file and (later) the API all end in a [`Plan`]; the machine is assembled from nothing
//! else. Devices appear in it by the name of their catalogue entry, with settings that only the entry understands.

mod choices;
mod cmdline;
mod command;
mod container;
mod devices;
mod identity;
mod metrics;
mod network;
mod units;

use std::path::{Path, PathBuf};

use ::devices::catalog::{self, Entry, Presence};
use base::{Fail, Result, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::error::Category;

pub use self::command::{Access, Command, PORT, Root, Volume};
pub use self::container::Container;
pub use self::devices::Device;
pub use self::identity::{GenerationId, Smbios, Uuid};
pub use self::metrics::Metrics;
pub use choices::{Accel, Irqchip, KernelMemory, Ktap, OnReset, Protocol, Transport};
pub use cmdline::{Cmdline, DEFAULT_CMDLINE, NO_PCI};
pub use units::{Period, Size};

/// RAM unless the plan says otherwise. It is backed when touched, so more than needed costs next to nothing, and
/// a distribution's initrd unpacks in it.
pub const DEFAULT_MEMORY: Size = Size::mib(512);
/// Most vCPUs.
pub const CPUS_MAX: u32 = 64;
/// Least RAM.
pub const MEMORY_MIN: Size = Size::mib(1);
/// Most RAM: 1 TiB, which the 40 physical address bits of the smallest x86-64 servers can still reach.
pub const MEMORY_MAX: Size = Size::mib(1 << 20);

/// Everything a machine is made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Plan {
    /// The kernel: a bzImage, an ELF vmlinux, or a kernel tree that holds one.
    pub kernel: PathBuf,
    /// Initial RAM file systems, joined in this order. `builtin` is mayfly's own.
    pub initrd: Vec<Initrd>,
    /// The kernel command line.
    pub cmdline: Cmdline,
    /// How the kernel is entered.
    pub protocol: Protocol,
    /// How the code of an uncompressed kernel comes into memory.
    pub kernel_memory: KernelMemory,
    /// Number of vCPUs, 1 to 64.
    #[schemars(range(min = 1, max = 64))]
    pub cpus: u32,
    /// RAM, 1 MiB to 1 TiB.
    pub memory: Size,
    /// Who emulates the interrupt controllers.
    pub irqchip: Irqchip,
    /// How drivers reach virtio devices.
    pub transport: Transport,
    /// What the guest reads about its machine in SMBIOS.
    pub smbios: Smbios,
    /// The VM generation ID; without it the guest finds none.
    pub generation_id: Option<GenerationId>,
    /// What a reset by the guest does.
    pub on_reset: OnReset,
    /// What runs the vCPUs.
    pub accel: Accel,
    /// How long the guest may run; without it, as long as it likes.
    pub timeout: Option<Period>,
    /// How long the guest may take to user space: to the call of mayfly's agent, or without a command to the first line on a
    /// console that is none of the kernel's.
    pub boot_timeout: Option<Period>,
    /// A program to run in the guest, by mayfly's own agent; without one, the guest does what its initial RAM disk says.
    pub command: Option<Command>,
    /// Where counters of the machine and its devices are written while it runs.
    pub metrics: Option<Metrics>,
    /// Devices. Those that every machine has are added where they are missing.
    pub devices: Vec<Device>,
}

impl Default for Plan {
    fn default() -> Self {
        Plan {
            kernel: PathBuf::new(),
            initrd: Vec::new(),
            cmdline: Cmdline::default(),
            protocol: Protocol::default(),
            kernel_memory: KernelMemory::default(),
            cpus: 1,
            memory: DEFAULT_MEMORY,
            irqchip: Irqchip::default(),
            transport: Transport::default(),
            smbios: Smbios::default(),
            generation_id: None,
            on_reset: OnReset::default(),
            accel: Accel::default(),
            timeout: None,
            boot_timeout: None,
            command: None,
            metrics: None,
            devices: Vec::new(),
        }
    }
}

/// An initial RAM file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(from = "PathBuf", into = "PathBuf")]
#[schemars(with = "PathBuf")]
pub enum Initrd {
    /// mayfly's own, with its agent: the word `builtin`. A file of that name is `./builtin`.
    Builtin,
    /// A cpio archive, compressed in any way the kernel knows.
    File(PathBuf),
}

impl From<PathBuf> for Initrd {
    fn from(path: PathBuf) -> Self {
        if path == Path::new("builtin") { Initrd::Builtin } else { Initrd::File(path) }
    }
}

impl From<Initrd> for PathBuf {
    fn from(initrd: Initrd) -> Self {
        match initrd {
            Initrd::Builtin => "builtin".into(),
            Initrd::File(path) => path,
        }
    }
}

impl Plan {
    /// Reads a plan file (JSON).
    ///
    /// # Errors
    /// The file cannot be read, or [`Why::Usage`]: it is not a plan, an unknown key (the known ones are named).
    pub fn read(path: &Path) -> Result<Plan> {
        let doing = || format!("read the plan {}", path.display());
        let text = std::fs::read(path).map_err(|e| base::fail::unreadable(doing(), path, e))?;
        Plan::parse(path, &text)
    }

    /// Reads the text of a plan; `from` is how failures call it.
    ///
    /// # Errors
    /// As [`Plan::read`].
    pub fn parse(from: &Path, text: &[u8]) -> Result<Plan> {
        let doing = || format!("read the plan {}", from.display());
        serde_json::from_slice(text).map_err(|cause| {
            let whole = matches!(cause.classify(), Category::Data | Category::Io);
            let cause = if whole { cause.to_string() } else { format!("it is not JSON: {cause}") };
            Fail::new(Why::Usage, doing())
                .because(cause)
                .hint("`mayfly schema` prints what a plan may hold, `--dry-run` writes one")
        })
    }

    /// Adds a device from the text of its flag. One that every machine has replaces the earlier one of its kind.
    ///
    /// # Errors
    /// [`Why::Usage`]: as the entry says.
    pub fn add_device(&mut self, entry: &dyn Entry, text: &str) -> Result<()> {
        let spec = entry.parse(text)?;
        if let Presence::Standard(_) = entry.presence() {
            self.devices.retain(|device| device.kind != entry.name());
        }
        self.devices.push(Device { kind: entry.name().to_owned(), name: String::new(), spec });
        Ok(())
    }

    /// Checks the plan and completes it: standard devices, names, defaults of settings. Completing it again changes
    /// nothing. Devices come out in the order of the catalogue, those of one kind in the order given.
    ///
    /// # Errors
    /// [`Why::Usage`]: a value makes no sense; the message names it.
    pub fn complete(mut self) -> Result<Plan> {
        self.check()?;
        self.equip()?;
        self.devices = devices::complete(std::mem::take(&mut self.devices))?;
        Ok(self)
    }

    /// The first console to be seen, as Linux calls it: /dev/console. On the serial port a panic is heard all the same.
    pub fn terminal(&self) -> Option<&'static str> {
        self.devices.iter().find_map(|device| catalog::find(&device.kind)?.terminal(&device.spec))
    }

    fn check(&self) -> Result<()> {
        let usage = |doing: String, cause: String| Err(Fail::new(Why::Usage, doing).because(cause));
        if self.kernel.as_os_str().is_empty() {
            return Err(Fail::new(Why::Usage, "find out what to boot: no kernel is named")
                .hint("pass --kernel FILE, or a command: mayfly run -- uname -a"));
        }
        if !(1..=CPUS_MAX).contains(&self.cpus) {
            return usage(
                format!("give the machine {} CPUs", self.cpus),
                format!("it takes 1 to {CPUS_MAX}"),
            );
        }
        let doing = format!("give the machine {} of memory", self.memory);
        if self.memory < MEMORY_MIN {
            let fail = Fail::new(Why::Usage, doing).because(format!("the least is {MEMORY_MIN}"));
            return Err(match self.memory.bytes() {
                0 => fail,
                bytes => fail.hint(format!("a plain number counts bytes; for MiB write {bytes}M")),
            });
        }
        if self.memory > MEMORY_MAX {
            return usage(doing, format!("the most is {MEMORY_MAX}"));
        }
        if !self.memory.bytes().is_multiple_of(4096) {
            return usage(doing, "it is not a whole number of 4 KiB pages".to_owned());
        }
        if [self.timeout, self.boot_timeout].iter().flatten().any(|limit| limit.duration().is_zero()) {
            return Err(Fail::new(Why::Usage, "let the guest run for 0s: it would never start")
                .hint("leave the timeout out for a run without one"));
        }
        if let Some(command) = &self.command {
            command.check()?;
            if self.on_reset == OnReset::Restart {
                return Err(Fail::new(Why::Usage, "restart the machine after a reset")
                    .because("a command runs once")
                    .hint("leave --on-reset out"));
            }
        }
        boot::smbios::tables(&self.smbios.identity())?;
        self.metrics.iter().try_for_each(Metrics::check)?;
        let cmdline = self.cmdline.text(self.transport == Transport::Pci, self.terminal());
        let most = arch::layout::CMDLINE_MAX - 1;
        if cmdline.len() > most {
            let cause = format!("it has {} bytes and the kernel takes {most}", cmdline.len());
            return usage("pass the kernel command line".to_owned(), cause);
        }
        if cmdline.contains('\0') {
            return usage("pass the kernel command line".to_owned(), "it holds a zero byte".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
