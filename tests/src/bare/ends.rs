//! How a run ends, and the exit code of each end.

use super::{guest, kernel};
use crate::harness::{Case, Stop};

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = [
        ("debug_exit", "leave", "", 42),
        ("debug_exit_501", "leave_501", "", 43),
        ("debug_exit_0_with_4_cpus", "hello", "--cpus 4", 0),
        ("triple_fault", "triple", "", 122),
        ("reset_through_the_keyboard_controller", "reset", "", 0),
        ("pvpanic", "panic", "", 120),
        ("acpi_poweroff", "poweroff", "", 0),
        ("every_port_can_be_read", "ports", "", 0),
        ("full_irqchip", "hello", "--irqchip full", 0),
        ("a_kernel_in_5_gib", "hello", "--memory 5G", 0),
        ("the_least_memory", "hello", "--memory 2M", 0),
    ]
    .into_iter()
    .map(|(case, name, arguments, code)| guest(case, name, arguments, move |out| out.code(code).map(drop)))
    .collect();
    for name in ["sleep", "spin"] {
        cases.push(guest(&format!("timeout_of_a_guest_in_{name}"), name, "--timeout 300ms", |output| {
            // Neither guest ever ends: without the timeout the script is killed, which is another code.
            output.code(124)?.complains("300ms").map(drop)
        }));
    }
    cases.extend(lost_output());
    cases.push(restart());
    cases.push(restart_without_its_kernel());
    cases.push(signal());
    cases.push(guest(
        "a_guest_that_never_asks_for_its_command",
        "poweroff",
        "--initrd builtin --json=result -- true",
        |output| {
            output
                .code(125)?
                .complains("error: set up the guest: it ended before its agent called\n  hint: ")?;
            output.complains("CONFIG_VIRTIO_VSOCKETS").map(drop)
        },
    ));
    cases.push(guest("json", "hello", "--serial none --json", |output| {
        output.code(0)?;
        let object: serde_json::Value = serde_json::from_slice(&output.stdout)
            .map_err(|cause| Stop::Failed(format!("read the result object: {cause}: {}", output.text())))?;
        let good = object["end"] == "debug-exit"
            && object["exit_code"] == 0
            && object["cpus"] == 1
            && object["times_ms"]["first_instruction"].as_f64().is_some_and(|time| time > 0.0)
            && object["exits"].as_object().is_some_and(|exits| !exits.is_empty())
            && object["memory_bytes"]["size"].as_u64() == Some(512 << 20)
            && object["memory_bytes"]["touched"].as_u64().is_some_and(|touched| touched < 64 << 20);
        if good { Ok(()) } else { Err(output.differs("a result object of a debug exit")) }
    }));
    cases.extend([
        guest("a_result_on_a_full_disk", "hello", "--json=/dev/full", |output| {
            output.code(123)?.complains("error: write the result: No space left on device\n").map(drop)
        }),
        guest("a_result_on_a_full_standard_output", "hello", "--serial none --json >/dev/full", |output| {
            output.code(123)?.complains("error: write the result: No space left on device\n").map(drop)
        }),
        guest("a_result_that_fails_hides_no_code", "leave", "--json=/dev/full", |output| {
            output.code(42).map(drop)
        }),
    ]);
    cases
}

/// Output that the host does not take decides how the run ended, also where it is lost only after the guest's own end
/// (`mark` writes no line feed).
fn lost_output() -> Vec<Case> {
    let full = |name: &'static str| {
        Case::new(format!("bare::{name}_on_a_full_disk"), move |room| {
            let kernel = kernel(room, name)?;
            let output = room.guest(&format!("--kernel {kernel} >/dev/full"))?;
            output.code(123)?.complains("error: write the serial output: No space left on device\n")?;
            Ok(())
        })
    };
    let closed = |name: &'static str| {
        Case::new(format!("bare::{name}_for_a_reader_that_has_gone"), move |room| {
            let (kernel, options) = (kernel(room, name)?, room.ground.options());
            let mayfly = room.mayfly.display();
            // The shell finds out when the reader has gone.
            let output = room.shell(&format!(
                "{{ trap '' PIPE; while echo; do :; done 2>/dev/null; {mayfly} run {options} --kernel {kernel}; \
                 echo $? >code; }} | true; exit $(cat code)"
            ))?;
            output.code(130)?;
            if output.stderr.is_empty() { Ok(()) } else { Err(output.differs("no complaint")) }
        })
    };
    vec![full("hello"), full("mark"), closed("hello"), closed("mark")]
}

/// With `--on-reset restart` a reset starts the machine again, with memory as it was loaded and output that goes on.
fn restart() -> Case {
    Case::new("bare::on_reset_restart", |room| {
        let kernel = kernel(room, "again")?;
        let run = format!("--kernel {kernel} --on-reset restart --serial file=log");
        room.guest(&format!("{run} --timeout 1s"))?.code(124)?;
        let log = room.shell("cat log")?;
        let said = log.text();
        let lives = said.lines().count();
        let good = lives > 1 && said.lines().take(lives - 1).all(|line| line == "alive");
        if good { Ok(()) } else { Err(log.differs("the words of several lives, whole")) }
    })
}

/// What goes wrong in a later life is no failure to start.
fn restart_without_its_kernel() -> Case {
    Case::new("bare::on_reset_restart_without_its_kernel", |room| {
        let (kernel, options) = (kernel(room, "again")?, room.ground.options());
        let mayfly = room.mayfly.display();
        let script = format!(
            "{mayfly} run {options} --kernel {kernel} --on-reset restart --timeout 30s --serial file=log --json=result & \
             until grep -q alive log 2>/dev/null; do sleep 0.02; done; rm {kernel}; wait $!"
        );
        room.shell(&script)?.code(123)?.complains("error: open kernel ")?;
        room.shell("cat result")?.mentions(r#""end":"host-error","exit_code":123"#)?;
        Ok(())
    })
}

/// A signal ends the run, with the code that a shell would give it.
fn signal() -> Case {
    Case::new("bare::sigterm", |room| {
        let (kernel, options) = (kernel(room, "echo")?, room.ground.options());
        let mayfly = room.mayfly.display();
        let script = format!(
            "{mayfly} run {options} --kernel {kernel} --serial file=out & \
             until grep -q ready out 2>/dev/null; do sleep 0.02; done; kill -TERM $!; wait $!"
        );
        room.shell(&script)?.code(143)?;
        Ok(())
    })
}
