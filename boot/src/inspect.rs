//! Reads a kernel before it runs: what it is, how it can be entered, and what it lacks for this machine.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use base::Result;
use serde::Serialize;

use crate::kernel::{Compression, Format, Kernel, scan};

/// Longest configuration file that is read.
const MAX_CONFIG: u64 = 4 << 20;

/// A configuration option this machine asks for.
struct Need {
    option: &'static str,
    /// What does not work without it.
    purpose: &'static str,
    /// Whether a kernel without it does not come up at all.
    vital: bool,
    /// Whether a module loaded from an initrd is as good.
    module: bool,
}

const fn need(option: &'static str, purpose: &'static str, vital: bool, module: bool) -> Need {
    Need { option, purpose, vital, module }
}

/// What this machine asks of a kernel.
const NEEDS: &[Need] = &[
    need("64BIT", "a 64-bit machine", true, false),
    need("ACPI", "processors, poweroff and devices found by ACPI", false, false),
    need("SMP", "more than one processor", false, false),
    need("KVM_GUEST", "the paravirtual clock and other help of KVM", false, false),
    need("SERIAL_8250_CONSOLE", "messages on the serial console", false, false),
    need("BLK_DEV_INITRD", "an initrd", false, false),
    need("DEVTMPFS", "device nodes without a helper in user space", false, false),
    need("VIRTIO_MMIO", "devices on the mmio transport", false, true),
    need("VIRTIO_PCI", "devices on the pci transport", false, true),
    need("VIRTIO_BLK", "disks", false, true),
    need("EXT4_FS", "an ext4 root file system", false, true),
    need("HW_RANDOM_VIRTIO", "entropy from the host", false, true),
    need("VIRTIO_BALLOON", "memory given back to the host", false, true),
    need("VIRTIO_NET", "network cards", false, true),
    need("VIRTIO_VSOCKETS", "sockets to the host", false, true),
    need("VIRTIO_FS", "shared directories", false, true),
    need("RTC_DRV_CMOS", "the time of day from the clock chip", false, true),
    need("PVH", "entry by PVH (the Linux protocol does without)", false, false),
];

/// What it asks of a kernel without ACPI, instead.
const NEEDS_WITHOUT_ACPI: &[Need] = &[
    need("X86_MPPARSE", "processors and interrupts, found by the MP table", false, false),
    need(
        "VIRTIO_MMIO_CMDLINE_DEVICES",
        "devices on the mmio transport, found by the command line",
        false,
        false,
    ),
];

/// How a configuration has an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// `=y`.
    Builtin,
    /// `=m`: needs an initrd that loads it.
    Module,
    /// Not set.
    Missing,
}

/// One option this machine asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Support {
    /// `CONFIG_VIRTIO_BLK`.
    pub option: String,
    /// How the configuration has it.
    pub state: State,
    /// What it is good for.
    pub purpose: &'static str,
    /// What to know about it, if it is not simply there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<&'static str>,
}

/// The entries a kernel offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Protocols {
    /// The 64-bit Linux protocol.
    pub linux: bool,
    /// PVH.
    pub pvh: bool,
}

/// What there is to say about a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The name it was opened by.
    pub kernel: String,
    /// Its form.
    pub format: Format,
    /// `6.1.0-56-amd64 (builder) #1 SMP ...`, if it says.
    pub version: Option<String>,
    /// How its payload is compressed.
    pub compression: Option<Compression>,
    /// Whether the host unpacks it; otherwise the guest does.
    pub unpacked_by_host: bool,
    /// How it can be entered.
    pub protocols: Protocols,
    /// Where its configuration was found: `embedded`, or a path.
    pub config: Option<String>,
    /// What the configuration says about each option this machine asks for; empty without one.
    pub support: Vec<Support>,
}

/// Reads a kernel.
///
/// # Errors
/// It cannot be read, or its payload is corrupt.
pub fn inspect(kernel: &Kernel) -> Result<Report> {
    let inside = kernel.with_elf(|elf, source| {
        let linux = scan::is_linux(elf, source);
        // An ELF file that offers nothing else is entered as Linux is.
        let protocols = Protocols { linux: linux || elf.pvh.is_none(), pvh: elf.pvh.is_some() };
        (protocols, scan::version(elf, source), scan::config(elf, source))
    })?;
    let unpacked = inside.is_some();
    let (protocols, banner, embedded) = inside.unwrap_or((Protocols { linux: true, pvh: false }, None, None));
    let version = kernel.header_version().map(str::to_owned).or(banner);
    let (config, support) =
        match embedded.map(|text| ("embedded".to_owned(), text)).or_else(|| beside(kernel)) {
            Some((place, text)) => (Some(place), support(&text)),
            None => (None, Vec::new()),
        };
    Ok(Report {
        kernel: kernel.name().to_owned(),
        format: kernel.format(),
        version,
        compression: kernel.compression(),
        unpacked_by_host: unpacked && kernel.format() == Format::BzImage,
        protocols,
        config,
        support,
    })
}

/// The release that a kernel is, as `uname -r` says it: `6.1.0-56-amd64`. `None` if it does not say.
///
/// # Errors
/// It cannot be read.
pub fn release(kernel: &Kernel) -> Result<Option<String>> {
    let banner = match kernel.header_version() {
        Some(version) => Some(version.to_owned()),
        None => kernel.with_elf(scan::version)?.flatten(),
    };
    // It names a directory further on.
    let first = |banner: String| banner.split_ascii_whitespace().next().map(str::to_owned);
    Ok(banner.and_then(first).filter(|release| !release.contains('/') && !release.starts_with('.')))
}

/// How the configuration in a file beside a kernel has an option, named without `CONFIG_`; `None` without such a file.
pub fn option(kernel: &Kernel, name: &str) -> Option<State> {
    let (_, text) = beside(kernel)?;
    let line = format!("CONFIG_{name}=");
    Some(match text.lines().find_map(|found| found.strip_prefix(line.as_str())) {
        Some("y") => State::Builtin,
        Some("m") => State::Module,
        _ => State::Missing,
    })
}

/// Whether the configuration beside a kernel says that of the two transports of virtio it has pci only. Without such a
/// file: no. An embedded configuration is not searched for: that takes longer than a start.
pub fn needs_pci(kernel: &Kernel) -> bool {
    beside(kernel).is_some_and(|(_, text)| lacks_mmio(&text))
}

fn lacks_mmio(config: &str) -> bool {
    let has = |option: &str| {
        config.lines().any(|line| line.strip_prefix(option).is_some_and(|end| matches!(end, "y" | "m")))
    };
    !has("CONFIG_VIRTIO_MMIO=") && has("CONFIG_VIRTIO_PCI=")
}

/// A configuration in a file beside the kernel: `config-VERSION` beside `vmlinuz-VERSION`, as distributions lay them,
/// or the `.config` of a build tree.
fn beside(kernel: &Kernel) -> Option<(String, String)> {
    let path = kernel.path()?;
    let dir = path.parent()?;
    let name = path.file_name()?.to_str()?;
    let version = ["vmlinuz-", "vmlinux-"].iter().find_map(|prefix| name.strip_prefix(prefix));
    let mut places: Vec<PathBuf> = version.map(|v| dir.join(format!("config-{v}"))).into_iter().collect();
    places.extend(in_tree(path));
    if name == "vmlinuz" {
        places.push(dir.join("config"));
    }
    places.iter().find_map(|place| Some((place.display().to_string(), read(place)?)))
}

/// Where the configuration is if a kernel lies in the tree that it was built in.
fn in_tree(path: &Path) -> Option<PathBuf> {
    let config = match path.file_name()?.to_str()? {
        "vmlinux" => ".config",
        "bzImage" => "../../../.config",
        _ => return None,
    };
    Some(path.parent()?.join(config))
}

/// The configuration of a kernel that lies in the tree it was built in.
pub(crate) fn config_in_tree(kernel: &Kernel) -> Option<String> {
    read(&in_tree(kernel.path()?)?)
}

fn read(path: &Path) -> Option<String> {
    // A pipe of that name would wait for its writer.
    if !path.is_file() {
        return None;
    }
    let mut text = String::new();
    File::open(path).ok()?.take(MAX_CONFIG).read_to_string(&mut text).ok()?;
    Some(text)
}

fn support(config: &str) -> Vec<Support> {
    let set: BTreeMap<&str, &str> =
        config.lines().filter_map(|line| line.strip_prefix("CONFIG_")?.split_once('=')).collect();
    let tell = |need: &Need| {
        let state = match set.get(need.option) {
            Some(&"y") => State::Builtin,
            Some(&"m") => State::Module,
            _ => State::Missing,
        };
        let note = match state {
            State::Builtin => None,
            State::Module if need.module => Some("a module: needs an initrd that loads it"),
            State::Module => Some("a module: has to be built in"),
            State::Missing if need.vital => Some("the kernel does not boot without it"),
            State::Missing => Some("not there"),
        };
        Support { option: format!("CONFIG_{}", need.option), state, purpose: need.purpose, note }
    };
    let rest = if set.get("ACPI") == Some(&"y") { &[] } else { NEEDS_WITHOUT_ACPI };
    NEEDS.iter().chain(rest).map(tell).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_configuration() {
        let found =
            support("# CONFIG_PVH is not set\nCONFIG_64BIT=y\nCONFIG_VIRTIO_BLK=m\nCONFIG_VIRTIO_BLK_X=y\n");
        let state = |name: &str| found.iter().find(|s| s.option == name).unwrap().clone();
        assert_eq!(state("CONFIG_64BIT").state, State::Builtin);
        assert_eq!(state("CONFIG_64BIT").note, None);
        assert_eq!(state("CONFIG_VIRTIO_BLK").note, Some("a module: needs an initrd that loads it"));
        assert_eq!(state("CONFIG_PVH").state, State::Missing);
        assert_eq!(found.len(), NEEDS.len() + NEEDS_WITHOUT_ACPI.len());
        let found = support("CONFIG_64BIT=y\nCONFIG_ACPI=y\n");
        assert_eq!(found.len(), NEEDS.len(), "with ACPI nothing else is asked for");
    }

    #[test]
    fn pci_is_needed_where_there_is_nothing_else() {
        let only = "CONFIG_PCI=y\n# CONFIG_VIRTIO_MMIO is not set\nCONFIG_VIRTIO_PCI=m\n";
        assert!(lacks_mmio(only));
        for config in ["", "CONFIG_VIRTIO_MMIO=m\nCONFIG_VIRTIO_PCI=y\n", "CONFIG_VIRTIO_PCI_LIB=y\n"] {
            assert!(!lacks_mmio(config), "{config}");
        }
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("vmlinuz-9");
        std::fs::write(&image, crate::kernel::tests::plain_elf()).unwrap();
        let needs = || needs_pci(&Kernel::open(&image).unwrap());
        assert!(!needs(), "nothing is known");
        std::fs::write(dir.path().join("config-9"), only).unwrap();
        assert!(needs());
    }
}
