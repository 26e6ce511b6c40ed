//! Stock kernels with their devices on a PCI bus: by MSI-X and by the pin, on both kinds of interrupt controllers, and
//! with drivers that let go of devices and take them again.

use super::boots::healthy;
use super::{boot, expect, stock, value};
use crate::harness::{Case, Room, Verdict};
use crate::kernels::Flavour;

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Flavour::ALL
        .into_iter()
        .map(|flavour| {
            // Two for the entropy device: changes of its configuration, and its queue.
            case(&format!("vectors_{}", flavour.name()), flavour, "", "2")
        })
        .collect();
    cases.push(case("vectors_full_irqchip", Flavour::Cloud, "--irqchip full --cpus 2", "2"));
    cases.push(case("pins", Flavour::Cloud, "--cmdline pci=nomsi", "0"));
    cases.push(case("pins_full_irqchip", Flavour::Cloud, "--irqchip full --cpus 2 --cmdline pci=nomsi", "0"));
    // No ACPI: the bus is found by probing, and its pins in the MP table.
    for (name, word, vectors) in [("vectors", "", "2"), ("pins", "pci=nomsi", "0")] {
        let name = format!("real::pci::without_acpi_by_{name}");
        cases.push(Case::new(name, move |room| without_acpi(room, word, vectors)));
    }
    cases.push(Case::new("real::pci::drivers_come_and_go", rebind));
    cases
}

fn case(name: &str, flavour: Flavour, arguments: &'static str, vectors: &'static str) -> Case {
    Case::new(format!("real::pci::{name}"), move |room| {
        let (kernel, initrd) = stock(flavour)?;
        let arguments =
            format!("--transport pci {arguments} --cmdline 'loglevel=6 test.do=rng test.do=interrupts'");
        let output = boot(room, &kernel.bzimage(), &initrd, &arguments)?;
        output.code(0)?;
        expect(&output, "rng", "virtio_rng.0 32")?;
        expect(&output, "vectors", vectors)?;
        expect(&output, "handled", "yes")?;
        healthy(&output)
    })
}

/// Such a guest cannot power off.
fn without_acpi(room: &mut Room<'_>, word: &str, vectors: &str) -> Verdict {
    let (kernel, initrd) = stock(Flavour::Generic)?;
    let arguments = format!(
        "--transport pci --cpus 2 --cmdline 'acpi=off {word} loglevel=6 test.do=rng test.do=interrupts test.end=reboot'"
    );
    let output = boot(room, &kernel.bzimage(), &initrd, &arguments)?;
    output.code(0)?;
    if output.text().contains("buggy MP table") {
        return Err(output.differs("an MP table that the kernel likes"));
    }
    expect(&output, "rng", "virtio_rng.0 32")?;
    expect(&output, "vectors", vectors)?;
    expect(&output, "handled", "yes")?;
    healthy(&output)
}

/// Each driver lets its device go and takes it again, five times over; then the devices are removed from the bus and found
/// by a new scan, which sizes their windows.
fn rebind(room: &mut Room<'_>) -> Verdict {
    let (kernel, initrd) = stock(Flavour::Cloud)?;
    room.shell("yes mayfly | head -c 1M >disk.img")?.code(0)?;
    let arguments = "--transport pci --disk path=disk.img --cmdline 'loglevel=6 test.do=rebind'";
    let output = boot(room, &kernel.bzimage(), &initrd, arguments)?;
    output.code(0)?;
    expect(&output, "removed", "0")?;
    expect(&output, "found", "2 32")?;
    room.shell("head -c 4096 disk.img | sha256sum")?.code(0)?.mentions(&value(&output, "sum")?)?;
    healthy(&output)
}
