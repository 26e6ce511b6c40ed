//! What goes in and comes out: command line, RAM disks, memory map, serial port, debug console.

use super::{guest, kernel};
use crate::harness::{Case, Stop, Verdict};

/// What the guest `flood` writes.
fn flood() -> String {
    (1..=0x40000u32)
        .rev()
        .map(
            |left| if left.is_multiple_of(64) { '\n' } else { char::from_u32(48 + left % 64).unwrap_or('?') },
        )
        .collect()
}

pub fn cases() -> Vec<Case> {
    vec![
        guest("serial_says_what_the_guest_says", "hello", "", |output| {
            output.code(0)?.says("hello from ring 0\n").map(drop)
        }),
        guest("serial_loses_nothing", "flood", "", |output| {
            output.code(0)?;
            if output.stdout == flood().as_bytes() { Ok(()) } else { Err(output.differs("256 KiB in order")) }
        }),
        guest("cmdline_extends_the_default", "cmdline", "--cmdline 'one two=2' --cmdline three", |output| {
            output.code(0)?;
            let text = output.text();
            let good = text.contains("console=ttyS0") && text.contains("one two=2 three");
            if good { Ok(()) } else { Err(output.differs("the default and what was added")) }
        }),
        guest("cmdline_only_replaces_it", "cmdline", "--cmdline-only 'just this'", |output| {
            output.code(0)?.says("just this").map(drop)
        }),
        guest("pvh_entry", "pvh", "--protocol pvh --cmdline-only 'by pvh'", |output| {
            output.code(0)?.says("by pvh").map(drop)
        }),
        guest("memory_map_of_128_mib", "memory", "--memory 128M", |output| map(output, 128 << 20)),
        guest("memory_map_of_5_gib", "memory", "--memory 5G", |output| map(output, 5 << 30)),
        guest("serial_none", "hello", "--serial none", |output| output.code(0)?.says("").map(drop)),
        Case::new("bare::initrds_are_joined", |room| {
            let kernel = kernel(room, "initrd")?;
            room.file("a", "abcd")?;
            room.file("b", [b"123".as_slice(), &[0; 5000], b"end"].concat())?;
            let output = room.guest(&format!("--kernel {kernel} --initrd a --initrd b"))?;
            output.code(0)?;
            // The kernel allows zeroes between archives.
            let said: Vec<u8> = output.stdout.iter().copied().filter(|byte| *byte != 0).collect();
            if said == b"abcd123end" && output.stdout.len() >= 5010 {
                Ok(())
            } else {
                Err(output.differs("both files, one after the other"))
            }
        }),
        Case::new("bare::serial_file", |room| {
            let kernel = kernel(room, "hello")?;
            room.guest(&format!("--kernel {kernel} --serial file=log"))?.code(0)?.says("")?;
            room.shell("cat log")?.says("hello from ring 0\n")?;
            Ok(())
        }),
        Case::new("bare::debug_console", |room| {
            let kernel = kernel(room, "debugcon")?;
            let output = room.guest(&format!("--kernel {kernel}"))?;
            output.code(0)?;
            let said = output.text() + &output.complaint();
            if said.matches("on the debug console\n").count() == 2 {
                Ok(())
            } else {
                Err(output.differs("the text of both debug ports"))
            }
        }),
        Case::new("bare::serial_takes_input_from_a_pipe", |room| {
            let (kernel, options) = (kernel(room, "echo")?, room.ground.options());
            let mayfly = room.mayfly.display();
            // Far more than the FIFO of the port holds: what does not fit must wait.
            let script = format!(
                "(yes 'some text for the guest' | head -c 5000; printf q) | {mayfly} run {options} --kernel {kernel}"
            );
            let output = room.shell(&script)?;
            output.code(7)?.mentions("ready\n")?;
            if output.stdout.len() == 6 + 5001 { Ok(()) } else { Err(output.differs("5,007 bytes")) }
        }),
        Case::new("bare::serial_file_at_the_limit_of_its_size", |room| {
            let (kernel, options) = (kernel(room, "flood")?, room.ground.options());
            let mayfly = room.mayfly.display();
            let output = room.shell(&format!(
                "ulimit -f 64; {mayfly} run {options} --kernel {kernel} --serial file=log --json"
            ))?;
            output.code(123)?.complains("error: write the serial output: File too large\n")?;
            output.mentions(r#""end":"host-error""#)?;
            Ok(())
        }),
    ]
}

/// The map adds up to `size`, less what firmware keeps below 1 MiB.
fn map(output: &crate::ground::Output, size: u64) -> Verdict {
    output.code(0)?;
    let text = output.text();
    let sum = u64::from_str_radix(text.trim(), 16)
        .map_err(|cause| Stop::Failed(format!("read {text:?}: {cause}")))?;
    if sum <= size && sum + (1 << 20) > size {
        Ok(())
    } else {
        Err(output.differs(&format!("{size:#x} or a little less")))
    }
}
