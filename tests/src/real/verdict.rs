//! The verdict on a run: tests that a command tells of, a guest that hangs, a kernel that complains.

use std::path::Path;

use super::{expect, value};
use crate::ground::{Output, quote};
use crate::harness::{Case, Room, Stop, Verdict};
use crate::kernels::{Flavour, Kernel};

/// Programs in the RAM disk.
const PROGRAMS: &str = "sh cat echo true sleep mkdir mount fsfreeze";

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("real::verdict::tests_of_a_command", tests_of_a_command),
        Case::new("real::verdict::a_boot_that_hangs", a_boot_that_hangs),
        Case::new("real::verdict::a_program_that_hangs", a_program_that_hangs),
        Case::new("real::verdict::a_task_that_hangs", a_task_that_hangs),
    ]
}

/// Runs `command` (shell text) on the cloud kernel.
fn run(room: &mut Room<'_>, arguments: &str, command: &str) -> Result<Output, Stop> {
    let line = line(room, arguments, command)?;
    room.shell(&line)
}

fn line(room: &Room<'_>, arguments: &str, command: &str) -> Result<String, Stop> {
    let kernel = Kernel::fetch(Flavour::Cloud).map_err(Stop::Skipped)?;
    let initrd = room.dir.join("root.cpio");
    crate::initramfs::write_root(&initrd, PROGRAMS)?;
    let word = |path: &Path| quote(&path.display().to_string());
    Ok(format!(
        "{} run {} --kernel {} --initrd {} {arguments} -- {command}",
        word(room.mayfly),
        room.ground.options(),
        word(&kernel.bzimage()),
        word(&initrd)
    ))
}

/// What a run wrote down.
fn result(room: &mut Room<'_>) -> Result<serde_json::Value, Stop> {
    let text = room.shell("cat result")?;
    serde_json::from_slice(&text.stdout).map_err(|cause| Stop::Failed(format!("read the result: {cause}")))
}

fn demand(truth: bool, what: &str, of: &serde_json::Value) -> Verdict {
    if truth { Ok(()) } else { Err(Stop::Failed(format!("{what}: {of}"))) }
}

/// Failing tests are no success, and are in the report; with `-v` the kernel is to be seen, and its console can go to a file.
fn tests_of_a_command(room: &mut Room<'_>) -> Verdict {
    room.file(
        "tests",
        "TAP version 13\n1..2\n# selftests: x: a\n# TAP version 13\n# 1..2\n# ok 1 one\n# not ok 2 two <&>\n\
         not ok 1 selftests: x: a # exit=1\nok 2 selftests: x: b # SKIP no <disk>\n",
    )?;
    let arguments = "--timeout 90s --json=result --junit r.xml";
    let tests = "sh -c 'cat; echo no test >&2; echo KTAP version 1 >/dev/kmsg'";
    let output = run(room, &format!("-v {arguments} <tests"), tests)?;
    output.code(119)?.mentions("not ok 1 selftests: x: a")?;
    output.complains("error: judge the tests: 1 of 3 failed: selftests: x: a.two <&>\n  hint: ")?;
    output.complains("  | [    0.000000] Linux version ")?;
    let found = result(room)?;
    let command = &found["command"];
    demand(found["cause"] == "tests-failed" && command["exit_code"] == 0, "one cause", &found)?;
    let wanted =
        serde_json::json!({"passed": 1, "failed": 1, "skipped": 1, "failures": ["selftests: x: a.two <&>"]});
    demand(command["tests"] == wanted, "the tests", &found)?;
    demand(found["times_ms"]["cpu"].as_f64().is_some_and(|cpu| cpu > 0.0), "what was computed", &found)?;
    let report = room.shell("cat r.xml; ls -A | grep -c '^[.]'")?;
    for line in [
        "<testsuites name=\"mayfly\" tests=\"4\" failures=\"2\" errors=\"0\" skipped=\"1\" ",
        "<failure type=\"tests-failed\" message=\"judge the tests: 1 of 3 failed: selftests: x: a.two &lt;&amp;&gt;\">",
        "<testcase classname=\"selftests: x: a\" name=\"one\"/>",
        "<testcase classname=\"selftests: x: a\" name=\"two &lt;&amp;&gt;\"><failure type=\"not-ok\" message=\"\"></failure>",
        "<testcase classname=\"command\" name=\"selftests: x: b\"><skipped message=\"SKIP no &lt;disk&gt;\"/>",
        "</testsuites>\n0\n",
    ] {
        report.mentions(line)?;
    }
    let output = run(room, &format!("--ktap report --serial file=said {arguments} <tests"), "cat")?;
    output.code(0)?;
    if !output.stderr.is_empty() {
        return Err(output.differs("nothing on standard error"));
    }
    room.shell("cat r.xml")?.mentions("<property name=\"cause\" value=\"ok\"/>")?;
    // Warnings and worse only: what a command waits for is not shown unless it is asked for.
    room.shell("grep -c 'PCI: ' said")?.code(0).map(drop)
}

/// A kernel that waits for a root that never comes is ended, and says where it waits.
fn a_boot_that_hangs(room: &mut Room<'_>) -> Verdict {
    let arguments = "--json=result --junit r.xml --boot-timeout 15s --timeout 80s \
                     --cmdline 'rdinit=/none root=/dev/none rootwait'";
    let output = run(room, arguments, "true")?;
    output.code(124)?.complains("error: boot the guest: no user space after 15s\n  vcpu0: ")?;
    let found = result(room)?;
    demand(found["end"] == "boot-timed-out" && found["cause"] == "boot-timeout", "one cause", &found)?;
    let place = &found["hang"]["vcpus"][0];
    // Where exactly depends on how fast this machine is.
    let symbol = place["symbol"].as_str().unwrap_or_default();
    demand(place["mode"] == "kernel" && symbol.contains("+0x"), "the name of its place", &found)?;
    demand(found["hang"]["slide"] == "0x0", "no slide", &found)?;
    room.shell("cat r.xml")?
        .mentions("type=\"boot-timeout\" message=\"boot the guest: no user space after 15s\"")?;
    Ok(())
}

/// A run that SIGTERM ends (the second: the first is for the command) says where the guest stood.
fn a_program_that_hangs(room: &mut Room<'_>) -> Verdict {
    let command = "sh -c 'trap \"echo asked\" TERM; echo busy; while :; do :; done'";
    let line = line(room, "--json=result --timeout 100s", command)?;
    let until = |word: &str| format!("until grep -q {word} out || ! kill -0 $p; do sleep 0.1; done");
    let (busy, asked) = (until("busy"), until("asked"));
    let output = room.shell(&format!(
        ">out; {line} >out & p=$!; {busy}; kill -TERM $p; {asked}; kill -TERM $p; wait $p; echo code=$?"
    ))?;
    expect(&output, "code", "143")?;
    output.complains("error: run the guest: signal 15 ended the run\n  vcpu0: ")?;
    let found = result(room)?;
    demand(found["cause"] == "signal" && found["hang"]["slide"] == "0x0", "where it stood", &found)
}

/// A task that waits for too long is a complaint; what a program writes into the log is none.
fn a_task_that_hangs(room: &mut Room<'_>) -> Verdict {
    room.shell("truncate -s 16M disk && mkfs.ext4 -q disk")?.code(0)?;
    let script = "echo \"<0>BUG: KASAN: not at all\" >/dev/kmsg; mkdir /m && mount -t ext4 /dev/vda /m \
                  && echo 2 >/proc/sys/kernel/hung_task_timeout_secs && fsfreeze --freeze /m || exit 9; \
                  (echo late >/m/file; echo written) & sleep 8; fsfreeze --unfreeze /m; wait; echo code=$?";
    let output = run(room, "--timeout 90s --json=result --disk disk", &format!("sh -c '{script}'"))?;
    output.code(121)?;
    value(&output, "code")?;
    output.complains("error: judge the guest's kernel: INFO: task sh:")?.complains("\n  | task:sh ")?;
    let found = result(room)?;
    let kinds: Vec<_> = found["command"]["findings"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|finding| &finding["kind"])
        .collect();
    let hung =
        kinds.iter().any(|kind| *kind == "hung-task") && !kinds.iter().any(|kind| *kind == "memory-error");
    demand(hung && found["cause"] == "unhealthy", "a hung task, and nothing that a program has said", &found)
}
