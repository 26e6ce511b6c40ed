//! Wrong inputs: each gives one clear error, a remedy where there is one, and the right exit code.

use super::kernel;
use crate::ground::Output;
use crate::harness::{Case, Room, Stop, Verdict};
use crate::image;

/// Usage errors.
const USAGE: i32 = 2;
/// The machine could not be started.
const NOT_STARTED: i32 = 125;

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        wrong("no_kernel", NOT_STARTED, "/no/such/kernel", |_| Ok("--kernel /no/such/kernel".into())),
        wrong("an_empty_directory_as_kernel", NOT_STARTED, "empty", |room| {
            room.shell("mkdir empty")?;
            Ok("--kernel empty".into())
        }),
        wrong("a_text_as_kernel", NOT_STARTED, "notes.txt", |room| {
            room.file("notes.txt", "not a kernel at all\n".repeat(1000))?;
            Ok("--kernel notes.txt".into())
        }),
        wrong("an_empty_file_as_kernel", NOT_STARTED, "void", |room| {
            room.file("void", "")?;
            Ok("--kernel void".into())
        }),
        broken("a_kernel_for_another_processor", |image| image[18] = 183),
        broken("a_32_bit_elf", |image| image[4] = 1),
        broken("a_truncated_kernel", |image| image.truncate(0x1001)),
        broken("a_kernel_cut_in_its_headers", |image| image.truncate(70)),
        broken("a_segment_beyond_memory", |image| {
            image[64 + 24..64 + 32].copy_from_slice(&(1u64 << 40).to_le_bytes())
        }),
        broken("a_segment_that_wraps", |image| {
            image[64 + 24..64 + 32].copy_from_slice(&u64::MAX.to_le_bytes());
            image[64 + 40..64 + 48].copy_from_slice(&u64::MAX.to_le_bytes());
        }),
        broken("an_entry_outside_the_image", |image| {
            image[24..32].copy_from_slice(&(1u64 << 33).to_le_bytes())
        }),
        wrong("a_missing_initrd", NOT_STARTED, "/no/such/initrd", |room| {
            Ok(format!("--kernel {} --initrd /no/such/initrd", kernel(room, "hello")?))
        }),
        wrong("pvh_where_there_is_none", NOT_STARTED, "hello.elf", |room| {
            Ok(format!("--kernel {} --protocol pvh", kernel(room, "hello")?))
        }),
        fifo("a_pipe_as_kernel", "--kernel PIPE"),
        fifo("a_pipe_as_initrd", "--kernel KERNEL --initrd PIPE"),
        fifo("a_pipe_as_disk", "--kernel KERNEL --disk PIPE"),
        fifo("a_pipe_as_disk_to_read", "--kernel KERNEL --disk PIPE,readonly=on"),
        wrong("a_serial_file_in_no_directory", NOT_STARTED, "/no/such/log", |room| {
            Ok(format!("--kernel {} --serial file=/no/such/log", kernel(room, "hello")?))
        }),
    ];
    for (name, code, named, arguments) in [
        ("no_cpus", USAGE, "0 CPU", "--cpus 0"),
        ("too_many_cpus", USAGE, "65 CPU", "--cpus 65"),
        ("ten_terabytes", USAGE, "10T", "--memory 10T"),
        ("no_memory", USAGE, "0", "--memory 0"),
        ("a_size_that_is_none", USAGE, "much", "--memory much"),
        ("an_unknown_flag", USAGE, "--wings", "--wings"),
        ("an_unknown_serial", USAGE, "serial", "--serial telegraph"),
        ("an_unknown_key_of_a_disk", USAGE, "path", "--disk path=/dev/null,colour=red"),
        ("a_missing_disk", NOT_STARTED, "/no/such/disk", "--disk path=/no/such/disk"),
        ("a_directory_as_disk", NOT_STARTED, "/tmp", "--disk path=/tmp"),
        ("a_timeout_of_nothing", USAGE, "0s", "--timeout 0s"),
        ("a_missing_plan", NOT_STARTED, "/no/such/plan", "--plan /no/such/plan.json"),
    ] {
        cases.push(wrong(name, code, named, move |room| {
            Ok(format!("--kernel {} {arguments}", kernel(room, "hello")?))
        }));
    }
    cases.push(Case::new("bare::the_complaint_of_json_is_an_object", |room| {
        let output = room.guest("--json --kernel /no/such/kernel")?;
        output.code(NOT_STARTED)?;
        let object: serde_json::Value = serde_json::from_slice(&output.stdout)
            .map_err(|cause| Stop::Failed(format!("read the result object: {cause}: {}", output.text())))?;
        let good = object["end"] == "not-started" && object["exit_code"] == NOT_STARTED;
        if good { Ok(()) } else { Err(output.differs("a result object that says not-started")) }
    }));
    cases
}

/// A run that must not start: it ends with `code`, and what it says is one error that names `named`.
fn wrong(
    name: &str,
    code: i32,
    named: &'static str,
    arguments: impl Fn(&mut Room<'_>) -> Result<String, Stop> + 'static,
) -> Case {
    Case::new(format!("bare::wrong::{name}"), move |room| {
        let arguments = arguments(room)?;
        let output = room.guest(&arguments)?;
        output.code(code)?;
        one_error(&output, named)
    })
}

/// A pipe that nobody writes to, in the place of `PIPE`, where a file should be: the start must not wait for it.
fn fifo(name: &str, arguments: &'static str) -> Case {
    Case::new(format!("bare::wrong::{name}"), move |room| {
        // Not in the directory of the case: the emulated host shares that with ours, and shares no pipes.
        let name = room.dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let pipe = format!("/dev/shm/{name}");
        room.shell(&format!("mkfifo {pipe}"))?.code(0)?;
        let kernel = kernel(room, "hello")?;
        let arguments = arguments.replace("PIPE", &pipe).replace("KERNEL", &kernel);
        let output = room.guest(&arguments)?;
        room.shell(&format!("rm {pipe}"))?.code(0)?;
        output.code(NOT_STARTED)?;
        one_error(&output, &name)?;
        // A missing file would be named, too.
        output.complains(": it is ").map(drop)
    })
}

/// A guest whose image is broken on purpose.
fn broken(name: &str, damage: impl Fn(&mut Vec<u8>) + 'static) -> Case {
    wrong(name, NOT_STARTED, "broken.elf", move |room| {
        let code = *crate::guests::all().get("hello").ok_or("find the guest hello")?;
        let mut image = image::elf(code, false);
        damage(&mut image);
        room.file("broken.elf", image)?;
        Ok("--kernel broken.elf --timeout 5s".into())
    })
}

fn one_error(output: &Output, named: &str) -> Verdict {
    let said = output.complaint();
    let errors = said.lines().filter(|line| line.starts_with("error: ")).count();
    let odd =
        ["panicked at", "RUST_BACKTRACE", "os error", "failed to"].iter().find(|word| said.contains(**word));
    if errors != 1 || odd.is_some() || !said.contains(named) {
        return Err(output.differs(&format!("one error that names {named:?}, in plain words")));
    }
    Ok(())
}
