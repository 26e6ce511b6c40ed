//! `mayfly matrix` with guests of a few instructions: each cell is a machine.

use super::kernel;
use crate::harness::{Case, Room, Stop};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("bare::matrix::two_by_two", two_by_two),
        Case::new("bare::matrix::a_signal_ends_all_of_it", signal),
        Case::new("bare::matrix::fail_fast", fail_fast),
    ]
}

/// The command line of a matrix on this ground.
fn line(room: &Room<'_>, arguments: &str) -> String {
    format!("{} matrix {} {arguments}", room.mayfly.display(), room.ground.options())
}

fn two_by_two(room: &mut Room<'_>) -> Result<(), Stop> {
    kernel(room, "hello")?;
    kernel(room, "leave")?;
    let text = "serial = \"none\"\n[matrix]\nkernel = [\"./hello.elf\", { name = \"bad\", kernel = \"./leave.elf\" }]\ncpus = [1, 2]\n";
    room.file("m.toml", text)?;
    let line = line(room, "m.toml");
    let report = "--json=r.json --junit r.xml --logs logs --retries 1";
    let output = room.shell(&format!("{line} {report}"))?;
    output
        .code(1)?
        .mentions("KERNEL     CPUS  RESULT  TIME")?
        .mentions("4 cells in ")?
        .mentions(": 2 ok, 2 failed\n")?;
    output.complains("kernel=bad,cpus=2 failed, and is tried again: exit code 42\n")?;
    output.complains("kernel=bad,cpus=2 failed: exit code 42\n")?;
    let object = room.shell("cat r.json")?;
    let object: serde_json::Value =
        serde_json::from_slice(&object.stdout).map_err(|cause| cause.to_string())?;
    let good = object["exit_code"] == 1
        && object["counts"]["ok"] == 2
        && object["cells"][0]["verdict"] == "ok"
        && object["cells"][0]["tries"][0]["result"]["end"] == "debug-exit"
        && object["cells"][1]["tries"][0]["result"]["cpus"] == 2
        && object["cells"][2]["name"] == "kernel=bad,cpus=1"
        && object["cells"][2]["tries"].as_array().is_some_and(|tries| tries.len() == 2);
    if !good {
        return Err(Stop::Failed(format!("it is not the report of that matrix: {object:#}")));
    }
    room.shell("cat r.xml")?
        .mentions("<testsuite name=\"m\" tests=\"4\" failures=\"2\" errors=\"0\" skipped=\"0\"")?
        .mentions("<failure type=\"debug-exit\" message=\"exit code 42\">")?;
    room.shell("ls -1 logs; cat 'logs/kernel=bad,cpus=1/result.json'")?
        .mentions("kernel=bad,cpus=1\n")?
        .mentions("kernel=bad,cpus=2.try2\n")?
        .mentions("\"exit_code\":42")?;

    room.shell(&format!("{line} --filter kernel=hello.elf --json"))?.code(0)?.mentions("\"exit_code\":0")?;
    room.shell(&format!("{line} --filter kernel=hello --jobs 1"))?.code(2)?.complains(
        "error: use --filter kernel=hello: `kernel` has no such value\n  hint: it has hello.elf, bad\n",
    )?;
    // None that can be started: not a kernel.
    room.file("none.toml", "kernel = \"./m.toml\"\n[matrix]\ncpus = [1, 2]\n")?;
    room.shell(&line.replace("m.toml", "none.toml"))?
        .code(125)?
        .mentions("not-started")?
        .complains("load kernel ./m.toml: it is a text file, not a kernel image\n")?;
    // A machine that crashes is told by how it ended, and takes no other with it.
    kernel(room, "triple")?;
    room.file("crash.toml", "[matrix]\nkernel = [\"./triple.elf\", \"./hello.elf\"]\n")?;
    room.shell(&line.replace("m.toml", "crash.toml"))?
        .code(1)?
        .mentions("1 ok, 1 failed")?
        .mentions("triple fault")?;
    Ok(())
}

/// A signal ends all cells in an orderly way: nothing is left, and what is known is told.
fn signal(room: &mut Room<'_>) -> Result<(), Stop> {
    kernel(room, "echo")?;
    kernel(room, "hello")?;
    let text = "serial = \"file={n}.out\"\n[matrix]\nn = [1, 2, 3]\nkernel = [\"./echo.elf\"]\n";
    room.file("m.toml", text)?;
    let line = line(room, "m.toml --cpus 8 --jobs 2 --json=r.json");
    let script = format!(
        "{line} >table & until grep -q ready 1.out 2>/dev/null && grep -q ready 2.out 2>/dev/null; do sleep 0.02; done; \
         pids=$(cat /proc/$!/task/$!/children); kill -TERM $!; wait $!; code=$?; for pid in $pids; do [ ! -e /proc/$pid ] || echo left $pid; done; \
         cat table; exit $code"
    );
    let output = room.shell(&script)?;
    output.code(143)?.mentions("3 cells in ")?.mentions(": 3 skipped\n")?;
    if output.text().contains("left ") {
        return Err(output.differs("no process that is left"));
    }
    room.shell("cat r.json; ls")?.mentions("\"exit_code\":143")?;
    Ok(())
}

/// The first failure ends the others.
fn fail_fast(room: &mut Room<'_>) -> Result<(), Stop> {
    kernel(room, "sleep")?;
    kernel(room, "leave")?;
    room.file("m.toml", "[matrix]\nkernel = [\"./sleep.elf\", \"./leave.elf\", { name = \"last\", kernel = \"./leave.elf\" }]\n")?;
    let line = line(room, "m.toml --cpus 8 --jobs 2 --fail-fast");
    room.shell(&line)?.code(1)?.mentions("1 failed, 2 skipped\n").map(drop)
}
