//! Stock kernels reach user space: each flavour, as bzImage and vmlinux, by the Linux entry and by PVH, with one and
//! four CPUs, in little memory and beyond 4 GiB.

use super::{boot, expect, stock, value};
use crate::ground::Output;
use crate::harness::{Case, Verdict};
use crate::kernels::Flavour;

#[derive(Clone, Copy, PartialEq)]
enum Form {
    BzImage,
    Vmlinux,
    Pvh,
}

/// Every flavour meets every form, every number of CPUs and every size, without all of their combinations.
const MATRIX: [(Form, u32, u64); 4] =
    [(Form::BzImage, 1, 128), (Form::BzImage, 4, 5120), (Form::Vmlinux, 4, 128), (Form::Pvh, 1, 5120)];

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for flavour in Flavour::ALL {
        for (form, cpus, mib) in MATRIX {
            cases.push(stock_kernel(flavour, form, cpus, mib));
        }
    }
    cases.push(builtin());
    cases.push(console());
    cases.push(input());
    cases.push(full_irqchip());
    cases.extend([1, 4].map(without_acpi));
    cases
}

fn stock_kernel(flavour: Flavour, form: Form, cpus: u32, mib: u64) -> Case {
    let (word, protocol) = match form {
        Form::BzImage => ("bzimage", "linux"),
        Form::Vmlinux => ("vmlinux", "linux"),
        Form::Pvh => ("pvh", "pvh"),
    };
    let name = format!("real::boots::{}_{word}_{cpus}_cpus_{mib}_mib", flavour.name());
    Case::new(name, move |room| {
        let (kernel, initrd) = stock(flavour)?;
        let image = if form == Form::BzImage { kernel.bzimage() } else { kernel.vmlinux()? };
        let arguments = format!("--protocol {protocol} --cpus {cpus} --memory {mib}M --cmdline test.do=rng");
        let output = boot(room, &image, &initrd, &arguments)?;
        output.code(0)?;
        expect(&output, "userspace", "yes")?;
        expect(&output, "release", &kernel.release)?;
        expect(&output, "cpus", &cpus.to_string())?;
        expect(&output, "clocksource", "kvm-clock")?;
        memory(&output, mib)?;
        clock(&output)?;
        healthy(&output)
    })
}

/// The kernel keeps some for itself, but not a fifth and 64 MiB.
fn memory(output: &Output, mib: u64) -> Verdict {
    let kib: u64 = value(output, "memory")?.parse().map_err(|_| output.differs("a number of KiB"))?;
    let (least, most) = ((mib * 4 / 5).saturating_sub(64) << 10, mib << 10);
    if (least..=most).contains(&kib) {
        Ok(())
    } else {
        Err(output.differs(&format!("memory of nearly {mib} MiB")))
    }
}

/// The guest's clock is ours, within what a boot on an emulated host takes.
fn clock(output: &Output) -> Verdict {
    let theirs: u64 = value(output, "date")?.parse().map_err(|_| output.differs("seconds since 1970"))?;
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    if now.abs_diff(theirs) < 120 { Ok(()) } else { Err(output.differs(&format!("a date near {now}"))) }
}

/// Nothing in the log that a kernel says when something is wrong with its machine.
pub(super) fn healthy(output: &Output) -> Verdict {
    let bad =
        ["BUG:", "WARNING:", "Call Trace", "ACPI Error", "ACPI BIOS Error", "Hardware Error", "nobody cared"];
    // QEMU's emulated processor tells nested guests of an XSAVE area that does not add up: a guest of QEMU's own on the
    // emulated host warns of it as well.
    let text = output.text();
    let text: String = text
        .split("[ cut here ]")
        .map(|block| match block.split_once("[ end trace") {
            Some((warning, rest)) if warning.contains("fpu__init_system_xstate") => rest,
            _ => block,
        })
        .collect();
    match text.lines().find(|line| bad.iter().any(|word| line.contains(word))) {
        Some(line) => Err(output.differs(&format!("a healthy log, without the line {line:?}"))),
        None => Ok(()),
    }
}

/// mayfly's own RAM disk shows user space with nothing else at hand.
fn builtin() -> Case {
    Case::new("real::boots::builtin_initrd", |room| {
        let (kernel, _) = stock(Flavour::Cloud)?;
        let output =
            room.guest(&format!("--kernel {} --initrd builtin --timeout 240s", kernel.bzimage().display()))?;
        output.code(0)?.mentions(&kernel.release)?;
        healthy(&output)
    })
}

/// The console loses nothing, however much is printed.
fn console() -> Case {
    Case::new("real::boots::console_loses_nothing", |room| {
        let (kernel, initrd) = stock(Flavour::Cloud)?;
        let output = boot(room, &kernel.bzimage(), &initrd, "--cmdline 'quiet test.do=flood'")?;
        output.code(0)?.mentions("flood=done")?;
        let wanted: Vec<String> = (1..=1500).map(|number| number.to_string()).collect();
        let text = output.text();
        let said: Vec<&str> =
            text.lines().map(str::trim_end).filter(|line| line.parse::<u32>().is_ok()).collect();
        if said == wanted { Ok(()) } else { Err(output.differs("the numbers from 1 to 1500")) }
    })
}

/// What is typed reaches user space.
fn input() -> Case {
    Case::new("real::boots::console_input", |room| {
        let (kernel, initrd) = stock(Flavour::Cloud)?;
        let script = format!(
            "(until grep -q ready out 2>/dev/null; do sleep 0.1; done; echo hello there) | \
             {} run {} --kernel {} --initrd {} --timeout 240s --cmdline 'quiet test.do=read' >out; s=$?; \
             cat out; exit $s",
            room.mayfly.display(),
            room.ground.options(),
            kernel.bzimage().display(),
            initrd.display()
        );
        let output = room.shell(&script)?;
        output.code(0)?;
        expect(&output, "line", "hello there")
    })
}

/// Without ACPI a kernel finds processors and interrupts by the MP table: all processors come up, and the serial port's
/// driver, which waits for interrupts, prints. Devices on the mmio transport are not found: Debian's kernels lack
/// CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES (and its cloud kernel CONFIG_X86_MPPARSE). Nor can such a guest power off: it
/// resets.
fn without_acpi(cpus: u32) -> Case {
    Case::new(format!("real::boots::without_acpi_{cpus}_cpus"), move |room| {
        let (kernel, initrd) = stock(Flavour::Generic)?;
        let arguments = format!("--cpus {cpus} --cmdline 'acpi=off test.end=reboot'");
        let output = boot(room, &kernel.bzimage(), &initrd, &arguments)?;
        output.code(0)?.mentions("found SMP MP-table")?.mentions("virtio_mmio.device=4096@0xd0000000:5")?;
        expect(&output, "userspace", "yes")?;
        expect(&output, "cpus", &cpus.to_string())?;
        expect(&output, "clocksource", "kvm-clock")?;
        clock(&output)?;
        healthy(&output)
    })
}

fn full_irqchip() -> Case {
    Case::new("real::boots::full_irqchip", |room| {
        let (kernel, initrd) = stock(Flavour::Cloud)?;
        let output = boot(room, &kernel.bzimage(), &initrd, "--irqchip full --cpus 2")?;
        output.code(0)?;
        expect(&output, "cpus", "2")?;
        healthy(&output)
    })
}
