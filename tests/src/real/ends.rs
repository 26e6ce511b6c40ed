//! How a Linux guest ends, and the exit code of each end.

use super::{boot, expect, stock};
use crate::harness::{Case, Stop};
use crate::kernels::Flavour;

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = [
        ("poweroff", "test.end=poweroff", 0, "powered-off"),
        ("reboot", "test.end=reboot", 0, "reset"),
        ("reboot_by_acpi", "test.end=reboot reboot=a", 0, "reset"),
        ("triple_fault", "test.end=reboot reboot=t", 122, "crashed"),
        ("panic", "test.end=panic", 120, "panicked"),
        ("end_of_init", "test.end=init", 120, "panicked"),
        ("no_init", "rdinit=/no/such/init root=/dev/none", 120, "panicked"),
        ("debug_exit", "test.end=exit", 42, "debug-exit"),
        ("timeout", "test.end=hang", 124, "timed-out"),
    ]
    .into_iter()
    .map(|(name, cmdline, code, end)| ended(name, cmdline, code, end))
    .collect();
    cases.push(corrupt("a_truncated_bzimage", |image| image.truncate(image.len() / 2)));
    cases.push(corrupt("a_bzimage_with_a_broken_payload", |image| {
        let middle = image.len() / 2;
        image[middle..middle + 4096].fill(0x5a);
    }));
    cases.push(corrupt("a_bzimage_that_lies_about_its_payload", |image| {
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
    }));
    cases
}

fn ended(name: &str, cmdline: &'static str, code: i32, end: &'static str) -> Case {
    let timeout = if code == 124 { "--timeout 15s" } else { "" };
    Case::new(format!("real::ends::{name}"), move |room| {
        // The cloud kernel gives user space no way to a port (CONFIG_DEVPORT).
        let flavour = if end == "debug-exit" { Flavour::Generic } else { Flavour::Cloud };
        let (kernel, initrd) = stock(flavour)?;
        let arguments = format!("--json=result {timeout} --cmdline 'quiet {cmdline}'");
        let output = boot(room, &kernel.bzimage(), &initrd, &arguments)?;
        output.code(code)?;
        if !cmdline.starts_with("rdinit") {
            expect(&output, "userspace", "yes")?;
        }
        let result = room.shell("cat result")?;
        let object: serde_json::Value = serde_json::from_slice(&result.stdout)
            .map_err(|cause| Stop::Failed(format!("read the result object: {cause}: {}", result.text())))?;
        if object["end"] == end && object["exit_code"] == code {
            Ok(())
        } else {
            Err(Stop::Failed(format!("expected the end {end} with {code}, the result is {object}")))
        }
    })
}

/// A kernel damaged on purpose does not start, and the complaint names the file.
fn corrupt(name: &str, damage: impl Fn(&mut Vec<u8>) + 'static) -> Case {
    Case::new(format!("real::ends::{name}"), move |room| {
        let (kernel, initrd) = stock(Flavour::Cloud)?;
        let mut image =
            std::fs::read(kernel.bzimage()).map_err(|cause| format!("read the kernel: {cause}"))?;
        damage(&mut image);
        let broken = room.file("vmlinuz-broken", image)?;
        boot(room, &broken, &initrd, "")?.code(125)?.complains("vmlinuz-broken")?;
        Ok(())
    })
}
