//! How a kernel finds processors, interrupts and devices: by ACPI, or where it has none by an MP table and by words on
//! its command line.

use base::node::Node;

use crate::acpi::VIRTIO_MMIO;
use crate::cmdline;

/// What a kernel reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Discovery {
    /// The ACPI tables.
    Acpi,
    /// The MP table, and `virtio_mmio.device=` on the command line.
    Words,
}

/// How a kernel finds things with this command line. Where that does not decide, `configured` says whether it has ACPI
/// at all; it has where nobody knows.
pub fn choose(cmdline: &str, configured: impl FnOnce() -> Option<bool>) -> Discovery {
    // As Linux reads them (`parse_acpi`): in their order, and the last that decides counts.
    let off = words(cmdline).fold(false, |off, word| match word {
        "acpi=off" => true,
        "acpi=force" => false,
        _ => off,
    });
    if off || configured() == Some(false) { Discovery::Words } else { Discovery::Acpi }
}

/// Whether a kernel's configuration has ACPI; `None` if the text is no configuration.
pub fn has_acpi(config: &str) -> Option<bool> {
    let has = |wanted| config.lines().any(|line| line == wanted);
    if has("CONFIG_ACPI=y") { Some(true) } else { has("CONFIG_64BIT=y").then_some(false) }
}

/// The command line with a word for each virtio-mmio device among `nodes`, unless it has such words already. They stand
/// before `--`, after which words are for the first process.
pub fn announce(cmdline: &str, nodes: &[Node]) -> String {
    if words(cmdline).any(|word| word.starts_with("virtio_mmio.device=")) {
        return cmdline.to_owned();
    }
    let devices = nodes.iter().filter(|node| node.hid == VIRTIO_MMIO);
    let places = devices.filter_map(|node| node.memory.first().zip(node.irqs.first()));
    let spelt: Vec<_> =
        places.map(|((base, len), irq)| format!("virtio_mmio.device={len}@{base:#x}:{irq}")).collect();
    let (kernels, rest) = halves(cmdline);
    cmdline::join([kernels].into_iter().chain(spelt.iter().map(String::as_str)).chain([rest]))
}

/// The words that are for the kernel.
fn words(cmdline: &str) -> impl Iterator<Item = &str> {
    halves(cmdline).0.split(gap()).filter(|word| !word.is_empty())
}

/// The part for the kernel, and from `--` on the part for the first process.
fn halves(cmdline: &str) -> (&str, &str) {
    let mut at = 0;
    for word in cmdline.split_inclusive(gap()) {
        if word.trim_end() == "--" {
            return cmdline.split_at(at);
        }
        at += word.len();
    }
    (cmdline, "")
}

/// Whether a character ends a word. Quotes hold words together, as they do for Linux.
fn gap() -> impl FnMut(char) -> bool {
    let mut quoted = false;
    move |c| {
        quoted ^= c == '"';
        !quoted && c.is_ascii_whitespace()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn virtio(base: u32, irq: u32) -> Node {
        Node {
            name: "V000".into(),
            hid: "LNRO0005",
            uid: 0,
            ports: Vec::new(),
            memory: vec![(base, 0x1000)],
            irqs: vec![irq],
        }
    }

    #[test]
    fn command_line_and_configuration_decide() {
        for (cmdline, found) in [
            ("quiet acpi=off", Discovery::Words),
            ("acpi=off acpi=force", Discovery::Acpi),
            ("acpi=force acpi=off -- x", Discovery::Words),
            ("pci=noacpi acpi=noirq", Discovery::Acpi),
            ("quiet -- acpi=off", Discovery::Acpi),
            ("dyndbg=\"file a acpi=off\"", Discovery::Acpi),
            ("xacpi=off acpi=offx", Discovery::Acpi),
        ] {
            assert_eq!(choose(cmdline, || None), found, "{cmdline}");
        }
        assert_eq!(choose("acpi=off", || panic!("asked for nothing")), Discovery::Words);
        assert_eq!(choose("acpi=force", || Some(false)), Discovery::Words);
        assert_eq!(choose("", || Some(false)), Discovery::Words);
        assert_eq!(choose("", || Some(true)), Discovery::Acpi);
    }

    #[test]
    fn a_configuration_is_believed_only_if_it_is_one() {
        assert_eq!(has_acpi("CONFIG_64BIT=y\nCONFIG_ACPI=y\n"), Some(true));
        assert_eq!(has_acpi("CONFIG_64BIT=y\n# CONFIG_ACPI is not set\nCONFIG_ACPI_X=y\n"), Some(false));
        assert_eq!(has_acpi("a text about CONFIG_ACPI\n"), None);
        assert_eq!(has_acpi(""), None);
    }

    #[test]
    fn devices_are_announced_once_and_to_the_kernel() {
        let serial = Node { hid: "PNP0501", memory: Vec::new(), ..virtio(0, 4) };
        let nodes = [serial, virtio(0xd000_0000, 5), virtio(0xd000_1000, 6)];
        let both = "virtio_mmio.device=4096@0xd0000000:5 virtio_mmio.device=4096@0xd0001000:6";
        assert_eq!(announce("quiet", &nodes), format!("quiet {both}"));
        assert_eq!(announce("", &nodes), both);
        assert_eq!(announce("a=\"b  c\" -- 3 x", &nodes), format!("a=\"b  c\" {both} -- 3 x"));
        assert_eq!(announce("-- 3", &nodes), format!("{both} -- 3"));
        assert_eq!(announce("quiet", &[]), "quiet");
        let own = "virtio_mmio.device=4K@0xd0000000:5";
        assert_eq!(announce(own, &nodes), own);
    }
}
