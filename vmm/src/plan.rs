//! A plan: everything a machine is made from, in one value that can be written down and read back.
//!
//! The command line, a plan file and (later) the API all end in a [`Plan`]; the machine is assembled from nothing
//! else. Devices appear in it by the name of their catalogue entry, with settings that only the entry understands.

mod units;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use base::{Doing, Fail, Result, Why};
use clap::ValueEnum;
use devices::catalog::{self, CATALOG, Entry, Presence};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use units::{Period, Size};

/// What every kernel is told unless `--cmdline-only` says otherwise: talk on the first serial port (there is no
/// other), reset through the keyboard controller (the shortest way to the machine), and reset at once after a panic.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 8250.nr_uarts=1 reboot=k panic=-1";
/// What follows it where there is no PCI bus: look for none.
pub const NO_PCI: &str = "pci=off";
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
    /// What a reset by the guest does.
    pub on_reset: OnReset,
    /// What runs the vCPUs.
    pub accel: Accel,
    /// How long the guest may run; without it, as long as it likes.
    pub timeout: Option<Period>,
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
            on_reset: OnReset::default(),
            accel: Accel::default(),
            timeout: None,
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

/// The kernel command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Cmdline {
    /// The default command line, then this.
    Extend(String),
    /// Exactly this.
    Only(String),
}

impl Default for Cmdline {
    fn default() -> Self {
        Cmdline::Extend(String::new())
    }
}

impl Cmdline {
    /// Adds `text` at its end.
    pub fn push(&mut self, text: &str) {
        let (Cmdline::Extend(old) | Cmdline::Only(old)) = self;
        if !old.is_empty() {
            old.push(' ');
        }
        old.push_str(text);
    }

    /// The text for the kernel of a machine with a PCI bus, or without, whose console to be seen is `terminal`.
    pub fn text(&self, pci: bool, terminal: Option<&str>) -> String {
        match self {
            Cmdline::Extend(text) => {
                let more = terminal.map(|name| format!("console={name}"));
                let more = more.filter(|word| !DEFAULT_CMDLINE.contains(word.as_str())).unwrap_or_default();
                let words = [DEFAULT_CMDLINE, if pci { "" } else { NO_PCI }, &more, text];
                words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
            }
            Cmdline::Only(text) => text.clone(),
        }
    }
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// The best of those that the kernel offers.
    #[default]
    Auto,
    /// The 64-bit Linux boot protocol.
    Linux,
    /// PVH: 32-bit, through the entry that an ELF note names.
    Pvh,
}

/// How the code of an uncompressed kernel comes into memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KernelMemory {
    /// Copied, except with the accelerator `unchecked`, where a page fault is not what is dear.
    #[default]
    Auto,
    /// Mapped from the file: starts at once, and machines share the page cache.
    Mapped,
    /// Copied into huge pages: saves the guest up to three page faults for each 4 KiB of code.
    Copied,
}

/// Who emulates the interrupt controllers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Irqchip {
    /// KVM has the local APICs, mayfly the I/O APIC; neither PIC nor PIT. Fast to set up and to close.
    #[default]
    Split,
    /// KVM has them all, PIC and PIT too, for guests that need those.
    Full,
}

/// How drivers reach virtio devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// mmio, except for a kernel whose configuration (in the file beside it) has a driver for pci only.
    #[default]
    Auto,
    /// Registers at fixed addresses that ACPI names: the quickest start.
    Mmio,
    /// Functions on a PCI bus, with MSI-X: what every distribution's kernel and installer finds.
    Pci,
}

/// What a reset by the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnReset {
    /// It ends the run.
    #[default]
    Exit,
    /// The machine starts again.
    Restart,
}

/// What runs the vCPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// /dev/kvm where it can run Linux, else the emulated host.
    #[default]
    Auto,
    /// /dev/kvm, or an error that says why it cannot.
    Kvm,
    /// The emulated host: QEMU emulates a processor with AMD-V, Linux on it offers KVM. Slower.
    Emulated,
    /// /dev/kvm as it is, unasked what stands behind it: for bare-metal guests on a KVM that emulates ring 0.
    Unchecked,
}

/// One device of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Name of its catalogue entry.
    pub kind: String,
    /// Name of this one, in messages and counters: `disk0`. Chosen if it is left out.
    #[serde(default)]
    pub name: String,
    /// Its settings; the defaults are filled in.
    #[serde(default = "empty")]
    pub spec: Value,
}

fn empty() -> Value {
    Value::Object(serde_json::Map::new())
}

impl Plan {
    /// Reads a plan file (JSON).
    ///
    /// # Errors
    /// The file cannot be read, or [`Why::Usage`]: it is not a plan, an unknown key (the known ones are named).
    pub fn read(path: &Path) -> Result<Plan> {
        let doing = || format!("read the plan {}", path.display());
        let text = std::fs::read(path).map_err(|e| base::fail::unreadable(doing(), path, e))?;
        serde_json::from_slice(&text)
            .doing(Why::Usage, doing)
            .map_err(|fail| fail.hint("`mayfly schema` prints what a plan may hold, `--dry-run` writes one"))
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
        self.devices = complete_devices(std::mem::take(&mut self.devices))?;
        Ok(self)
    }

    /// The first console to be seen, as Linux calls it: /dev/console. On the serial port a panic is heard all the same.
    pub fn terminal(&self) -> Option<&'static str> {
        self.devices.iter().find_map(|device| catalog::find(&device.kind)?.terminal(&device.spec))
    }

    fn check(&self) -> Result<()> {
        let usage = |doing: String, cause: String| Err(Fail::new(Why::Usage, doing).because(cause));
        if self.kernel.as_os_str().is_empty() {
            return Err(
                Fail::new(Why::Usage, "find out what to boot: no kernel is named").hint("pass --kernel FILE")
            );
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
        if self.timeout.is_some_and(|timeout| timeout.duration().is_zero()) {
            return Err(Fail::new(Why::Usage, "let the guest run for 0s: it would never start")
                .hint("leave the timeout out for a run without one"));
        }
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

fn complete_devices(mut given: Vec<Device>) -> Result<Vec<Device>> {
    if let Some(stranger) = given.iter().find(|device| catalog::find(&device.kind).is_none()) {
        let known: Vec<_> = CATALOG.iter().map(|entry| entry.name()).collect();
        return Err(Fail::new(Why::Usage, format!("add a device of kind `{}`", stranger.kind))
            .because(format!("the kinds are {}", known.join(", "))));
    }
    let mut names: BTreeSet<String> = BTreeSet::new();
    for device in given.iter().filter(|device| !device.name.is_empty()) {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        if !device.name.chars().all(fits) || device.name.len() > 32 {
            return Err(Fail::new(Why::Usage, format!("name a device `{}`", device.name))
                .because("a name is at most 32 small letters, digits, `-` and `_`"));
        }
        if !names.insert(device.name.clone()) {
            return Err(Fail::new(Why::Usage, format!("name a device `{}`", device.name))
                .because("another device has that name"));
        }
    }
    let mut all = Vec::new();
    for entry in CATALOG {
        let (mut mine, rest) = given.into_iter().partition(|device| device.kind == entry.name());
        given = rest;
        complete_kind(*entry, &mut mine, &mut names)?;
        all.append(&mut mine);
    }
    Ok(all)
}

/// Completes the devices of one kind.
fn complete_kind(entry: &dyn Entry, mine: &mut Vec<Device>, names: &mut BTreeSet<String>) -> Result<()> {
    if let Presence::Standard(usual) = entry.presence() {
        if mine.len() > 1 {
            return Err(Fail::new(Why::Usage, format!("add a second {} device", entry.name()))
                .because("a machine has exactly one"));
        }
        if mine.is_empty() {
            mine.push(Device {
                kind: entry.name().to_owned(),
                name: String::new(),
                spec: entry.parse(usual)?,
            });
        }
    }
    let mut number = 0;
    for device in mine {
        device.spec = entry.check(&device.spec)?;
        while device.name.is_empty() {
            let name = match entry.presence() {
                Presence::Standard(_) if number == 0 => entry.name().to_owned(),
                _ => format!("{}{number}", entry.flag()),
            };
            number += 1;
            if names.insert(name.clone()) {
                device.name = name;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(json: &str) -> Result<Plan> {
        serde_json::from_str::<Plan>(json).doing(Why::Usage, || "read")
    }

    fn complaint(json: &str) -> String {
        plan(json).and_then(Plan::complete).expect_err(json).to_string()
    }

    #[test]
    fn an_empty_plan_has_the_defaults_and_needs_a_kernel() {
        assert_eq!(plan("{}").unwrap(), Plan::default());
        assert_eq!(complaint("{}"), "find out what to boot: no kernel is named\n  hint: pass --kernel FILE");
    }

    #[test]
    fn completing_adds_what_every_machine_has_and_is_repeatable() {
        let once =
            plan(r#"{"kernel": "k", "initrd": ["builtin", "./builtin"]}"#).unwrap().complete().unwrap();
        assert_eq!(once.initrd, [Initrd::Builtin, Initrd::File("./builtin".into())]);
        let standard = CATALOG.iter().filter(|e| matches!(e.presence(), Presence::Standard(_)));
        assert_eq!(
            once.devices.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(),
            standard.map(|e| e.name()).collect::<Vec<_>>()
        );
        let text = serde_json::to_string(&once).unwrap();
        assert_eq!(plan(&text).unwrap().complete().unwrap(), once, "{text}");
    }

    #[test]
    fn every_kind_is_named_after_its_flag_and_counted() {
        for entry in CATALOG.iter().filter(|e| e.presence() == Presence::OnRequest) {
            let mut plan = Plan { kernel: "k".into(), ..Plan::default() };
            for _ in 0..2 {
                plan.add_device(*entry, entry.example()).unwrap();
            }
            let taken = format!("{}0", entry.flag());
            plan.devices[1].name = taken.clone();
            let plan = plan.complete().unwrap();
            let names: Vec<_> =
                plan.devices.iter().filter(|d| d.kind == entry.name()).map(|d| d.name.as_str()).collect();
            assert_eq!(names, [format!("{}1", entry.flag()).as_str(), taken.as_str()]);
        }
    }

    #[test]
    fn a_flag_for_a_standard_device_replaces_it() {
        for entry in CATALOG.iter().filter(|e| e.presence() != Presence::OnRequest) {
            let mut plan = Plan { kernel: "k".into(), ..Plan::default() };
            plan.add_device(*entry, entry.example()).unwrap();
            plan.add_device(*entry, entry.example()).unwrap();
            let plan = plan.complete().unwrap();
            assert_eq!(plan.devices.iter().filter(|d| d.kind == entry.name()).count(), 1, "{}", entry.name());
        }
    }

    #[test]
    fn the_command_line_extends_or_replaces() {
        let mut line = Cmdline::default();
        assert_eq!(line.text(true, None), DEFAULT_CMDLINE);
        assert_eq!(line.text(false, Some("ttyS0")), format!("{DEFAULT_CMDLINE} pci=off"));
        assert_eq!(line.text(true, Some("hvc0")), format!("{DEFAULT_CMDLINE} console=hvc0"));
        ["quiet", "init=/x"].iter().for_each(|word| line.push(word));
        assert_eq!(line.text(true, None), format!("{DEFAULT_CMDLINE} quiet init=/x"));
        let plan = plan(r#"{"kernel": "k", "cmdline": {"only": "a"}}"#).unwrap();
        assert_eq!(plan.cmdline.text(false, Some("ttyS0")), "a");
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (json, expected) in [
            (r#"{"kernel": "k", "cpus": 0}"#, "give the machine 0 CPUs: it takes 1 to 64"),
            (r#"{"kernel": "k", "cpus": 65}"#, "give the machine 65 CPUs: it takes 1 to 64"),
            (r#"{"kernel": "k", "memory": "10T"}"#, "give the machine 10T of memory: the most is 1T"),
            (
                r#"{"kernel": "k", "memory": "1048577"}"#,
                "give the machine 1048577 of memory: it is not a whole number of 4 KiB pages",
            ),
            (
                r#"{"kernel": "k", "memory": 512}"#,
                "give the machine 512 of memory: the least is 1M\n  hint: a plain number counts bytes; for MiB write 512M",
            ),
            (
                r#"{"kernel": "k", "devices": [{"kind": "serial", "name": "A"}]}"#,
                "name a device `A`: a name is at most 32 small letters, digits, `-` and `_`",
            ),
        ] {
            if json.contains("serial") && catalog::find("serial").is_none() {
                continue;
            }
            assert_eq!(complaint(json), expected);
        }
        let unknown = complaint(r#"{"kernal": "k"}"#);
        assert!(unknown.contains("unknown field `kernal`, expected one of `kernel`, `initrd`"), "{unknown}");
        let kind = complaint(r#"{"kernel": "k", "devices": [{"kind": "floppy"}]}"#);
        assert!(kind.starts_with("add a device of kind `floppy`: the kinds are "), "{kind}");
        let long = format!(r#"{{"kernel": "k", "cmdline": {{"only": "{}"}}}}"#, "x".repeat(2048));
        assert_eq!(
            complaint(&long),
            "pass the kernel command line: it has 2048 bytes and the kernel takes 2047"
        );
    }
}
