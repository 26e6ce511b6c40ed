//! Commands in guests: their streams, exit codes and signals, their environment, and what becomes of wrong ones. Their
//! root is a RAM disk with busybox in it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{expect, value};
use crate::ground::{Output, quote};
use crate::harness::{Case, Room, Stop, Verdict};
use crate::kernels::{Flavour, Kernel};

/// Programs in the RAM disk.
const PROGRAMS: &str =
    "sh cat echo true false id env pwd seq head wc sleep kill sha256sum yes dd stty hostname mount";

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Flavour::ALL
        .into_iter()
        .map(|flavour| {
            Case::new(format!("real::commands::streams_{}", flavour.name()), move |room| {
                streams(room, flavour)
            })
        })
        .collect();
    cases.push(Case::new("real::commands::over_pci", |room| {
        run(room, "--transport pci", "echo over pci")?.code(0)?.says("over pci\n").map(drop)
    }));
    cases.push(Case::new("real::commands::ends", ends));
    cases.push(Case::new("real::commands::surroundings", surroundings));
    cases.push(Case::new("real::commands::output_of_64_mib", |room| volume(room, 64)));
    cases.push(Case::new("real::commands::signals", signals));
    cases.push(Case::new("real::commands::machine_ends_first", machine_ends_first));
    cases.push(Case::new("real::commands::terminal", terminal));
    cases.push(Case::new("real::commands::a_reader_that_leaves", |room| {
        let line = line(room, Flavour::Cloud, "", "yes")?;
        let output = room.shell(&format!("({line}; echo code=$? >&2) | head -n 1"))?;
        output.says("y\n")?.complains("code=141\n").map(drop)
    }));
    cases
}

/// What takes longer.
pub fn soak() -> Vec<Case> {
    vec![Case::new("soak::commands::a_gibibyte_there_and_back", gibibyte)]
}

/// The RAM disk, and beside it the modules where a kernel that is unpacked has them.
fn ramdisk(room: &Room<'_>) -> Result<PathBuf, Stop> {
    let path = room.dir.join("root.cpio");
    crate::initramfs::write_root(&path, PROGRAMS)?;
    Ok(path)
}

/// The command line, as shell text, of a run of `command` (shell text too).
fn line(room: &Room<'_>, flavour: Flavour, arguments: &str, command: &str) -> Result<String, Stop> {
    let kernel = Kernel::fetch(flavour).map_err(Stop::Skipped)?;
    let initrd = ramdisk(room)?;
    let word = |path: &Path| quote(&path.display().to_string());
    Ok(format!(
        "{} run {} --kernel {} --initrd {} --timeout 100s {arguments} -- {command}",
        word(room.mayfly),
        room.ground.options(),
        word(&kernel.bzimage()),
        word(&initrd)
    ))
}

fn run(room: &mut Room<'_>, arguments: &str, command: &str) -> Result<Output, Stop> {
    let line = line(room, Flavour::Cloud, arguments, command)?;
    room.shell(&line)
}

/// A shell on a terminal: its size as it changes, keys that are signals, jobs that stop and go on, much output; and the operator's
/// own terminal as it was, however the run ends.
fn terminal(room: &mut Room<'_>) -> Verdict {
    room.limit = Duration::from_secs(240);
    let program = crate::initramfs::program_path("terminal")?;
    let play = |room: &mut Room<'_>, steps: &[&str], command: &str| -> Result<Output, Stop> {
        let line = line(room, Flavour::Cloud, "-it", command)?;
        let steps: Vec<String> = steps.iter().map(|step| quote(step)).collect();
        room.shell(&format!(
            "{} patience=60 {} -- {line}",
            quote(&program.display().to_string()),
            steps.join(" ")
        ))
    };
    // What is typed is seen, too: what is waited for is none of it.
    let shell = [
        "expect=# ",
        r"send=stty size\n",
        "expect=24 80",
        r#"send=sh -c 'trap "echo winch-\$((20+3))" WINCH; echo wait-$((1+0)); until [ "$(stty size)" = "40 100" ]; do :; done; echo sized-$((2*2))'\n"#,
        "expect=wait-1",
        "size=40x100",
        "expect=winch-23",
        "expect=sized-4",
        r"send=sh -c 'echo run-$((1+1)); sleep 1000'\n",
        "expect=run-2",
        r"send=\x03",
        r"send=echo code=$?-$((3*3))\n",
        "expect=code=130-9",
        r"send=sh -c 'echo run-$((2+2)); cat'\n",
        "expect=run-4",
        r"send=\x1a",
        "expect=Stopped",
        "expect=# ",
        r"send=fg\n",
        "expect=cat\"",
        r"send=twice\n",
        "expect=twice\r\ntwice\r\n",
        r"send=\x04",
        r"send=seq 1 100000; echo all-$((5*5))\n",
        "expect=99999\r\n100000\r\n",
        "expect=all-25",
        r"send=exit 5\n",
    ];
    play(room, &shell, "sh")?.code(5)?;
    play(room, &["expect=# ", r"send=\x01x"], "sh")?.code(130)?;
    let wait = "sh -c 'echo up-$((1+1)); sleep 1000'";
    for (signal, code) in [("TERM", 143), ("INT", 130), ("HUP", 129)] {
        play(room, &["expect=up-2", &format!("signal={signal}")], wait)?.code(code)?;
    }
    let panic = "sh -c 'echo up-$((1+1)); echo c >/proc/sysrq-trigger; sleep 1000'";
    play(room, &["expect=up-2"], panic)?.code(120)?;
    Ok(())
}

/// Standard input arrives, standard output and standard error are apart, and each is the command's alone.
fn streams(room: &mut Room<'_>, flavour: Flavour) -> Verdict {
    let release = Kernel::fetch(flavour).map_err(Stop::Skipped)?.release;
    let command = "sh -c 'cat; echo out; echo err >&2; cat /proc/sys/kernel/osrelease; exit 7'";
    let line = line(room, flavour, "", command)?;
    let output = room.shell(&format!("printf 'in\\000\\377\\n' | {line}"))?;
    output.code(7)?;
    let wanted = [b"in\0\xff\nout\n", release.as_bytes(), b"\n"].concat();
    if output.stdout != wanted || output.stderr != b"err\n" {
        return Err(output.differs("what the command says, and nothing else"));
    }
    Ok(())
}

/// How commands end, or do not begin.
fn ends(room: &mut Room<'_>) -> Verdict {
    run(room, "", "true")?.code(0)?.says("")?;
    run(room, "", "sh -c 'exit 255'")?.code(255)?;
    run(room, "", "sh -c 'kill -9 $$'")?.code(137)?;
    run(room, "", "no-such-program")?.code(127)?.complains("error: run no-such-program in the guest: ")?;
    run(room, "", "/mayfly.orders")?.code(127)?;
    run(room, "", "/proc/version")?
        .code(126)?
        .complains("error: run /proc/version in the guest: Permission")?;
    run(room, "--workdir /none", "true")?
        .code(126)?
        .complains("error: start true in /none of the guest: ")?;
    run(room, "--user nobody-here", "true")?.code(126)?.complains("no such user or group")?;
    let output = run(room, "--json=result", "sh -c 'kill -15 $$'")?;
    output.code(143)?;
    let result = room.shell("cat result")?;
    result
        .mentions("\"exit_code\":143,\"command\":{\"end\":\"signalled\",\"exit_code\":null,\"signal\":15,\"healthy\":true,")?;
    Ok(())
}

/// Directory, environment, user, terminal, host name and file systems.
fn surroundings(room: &mut Room<'_>) -> Verdict {
    let command = "sh -c 'echo dir=$(pwd); echo a=$A; echo b=$B; echo home=$HOME; id; hostname; \
                   for f in proc sysfs devtmpfs devpts tmpfs cgroup2; do mount | head -n 99 >/dev/null; \
                   while read d p t r; do [ $t = $f ] && echo has=$f && break; done </proc/mounts; done'";
    let script = "--workdir /tmp --env A=1 -e 'B=2 3' -e UNSET --user 12:34 --hostname guest-1";
    let output = run(room, script, command)?;
    output.code(0)?.mentions("uid=12 gid=34 groups=34\nguest-1\n")?;
    for (key, wanted) in [("dir", "/tmp"), ("a", "1"), ("b", "2 3"), ("home", "/")] {
        expect(&output, key, wanted)?;
    }
    for kind in ["proc", "sysfs", "devtmpfs", "devpts", "tmpfs", "cgroup2"] {
        output.mentions(&format!("has={kind}\n"))?;
    }
    let output = run(room, "-it", "sh -c 'test -t 0 && test -t 2 && stty size'")?;
    output.code(0)?.says("24 80\r\n")?;
    Ok(())
}

/// So many MiB come out as they were, and go in.
fn volume(room: &mut Room<'_>, mib: u32) -> Verdict {
    let line = |room: &Room<'_>, command: &str| line(room, Flavour::Cloud, "", command);
    let (out, sum) = (line(room, &format!("dd if=/dev/zero bs=1M count={mib}"))?, line(room, "sha256sum")?);
    let output = room.shell(&format!(
        "{out} 2>/dev/null | sha256sum | sed 's/ .*//; s/^/down=/'
         head -c {mib}M /dev/zero | {sum} | sed 's/ .*//; s/^/up=/'
         head -c {mib}M /dev/zero | sha256sum | sed 's/ .*//; s/^/sum=/'"
    ))?;
    let wanted = value(&output, "sum")?;
    expect(&output, "down", &wanted)?;
    expect(&output, "up", &wanted)
}

/// A GiB of random bytes goes in and comes out at once, then a million lines; mayfly holds none of it.
fn gibibyte(room: &mut Room<'_>) -> Verdict {
    room.limit = Duration::from_secs(3000);
    let line = line(room, Flavour::Cloud, "--memory 256M --timeout 2900s", "sh -c 'cat; seq 1 1000000'")?;
    let output = room.shell(&format!(
        "head -c 64M /dev/urandom >r; all() {{ for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do cat r; done; }}
         echo wanted=$( (all; seq 1 1000000) | sha256sum | cut -c1-64)
         mkfifo /dev/shm/out.$$ /dev/shm/in.$$; sha256sum </dev/shm/out.$$ >sum & all >/dev/shm/in.$$ &
         {line} </dev/shm/in.$$ >/dev/shm/out.$$ & p=$!
         while sed -n 's/VmHWM: *//p' /proc/$p/status >peak.new 2>/dev/null && [ -s peak.new ]; do mv peak.new peak; sleep 1; done
         wait; rm /dev/shm/out.$$ /dev/shm/in.$$; echo came=$(cut -c1-64 sum); echo peak=$(sed 's/[^0-9]//g' peak)"
    ))?;
    let wanted = value(&output, "wanted")?;
    expect(&output, "came", &wanted)?;
    let peak: u64 = value(&output, "peak")?.parse().map_err(|_| output.differs("a peak in KiB"))?;
    // The guest's memory is part of it.
    if peak > (256 + 64) << 10 {
        return Err(output.differs("at most 64 MiB beside the guest's memory"));
    }
    Ok(())
}

/// A signal to mayfly is one to the command; a second ends the run, whatever the command does with the first.
fn signals(room: &mut Room<'_>) -> Verdict {
    let wait = "sh -c 'trap \"echo caught; exit 5\" TERM; echo ready; while :; do sleep 0.1; done'";
    let deaf = "sh -c 'trap \"echo ignored\" TERM; echo ready; while :; do sleep 0.1; done'";
    let (wait, deaf) = (line(room, Flavour::Cloud, "", wait)?, line(room, Flavour::Cloud, "", deaf)?);
    let until = |word: &str| format!("until grep -q {word} out; do sleep 0.1; done");
    let (ready, ignored) = (until("ready"), until("ignored"));
    let output = room.shell(&format!(
        ">out; {wait} >out & p=$!; {ready}; kill -TERM $p; wait $p; echo first=$?; cat out
         >out; {deaf} >out & p=$!; {ready}; kill -TERM $p; {ignored}; kill -TERM $p; wait $p; echo second=$?"
    ))?;
    output.mentions("caught\n")?;
    expect(&output, "first", "5")?;
    expect(&output, "second", "143")
}

/// A panic, a power-off and a reset under a command are no success, and the time is up where it is.
fn machine_ends_first(room: &mut Room<'_>) -> Verdict {
    let output = run(room, "", "sh -c 'echo before; echo c >/proc/sysrq-trigger; sleep 100'")?;
    output
        .code(120)?
        .says("before\n")?
        .complains("its kernel panicked (Kernel panic - not syncing: sysrq")?;
    let output = run(room, "", "sh -c 'echo o >/proc/sysrq-trigger; sleep 100'")?;
    output.code(122)?.complains("it ended before its command did")?;
    // Without the driver the agent cannot call, and says so on the console.
    let output = run(room, "--cmdline module_blacklist=vmw_vsock_virtio_transport", "true")?;
    output.code(125)?.complains("error: set up the guest: it ended before its agent called\n  hint: ")?;
    output.complains("  | error: run the guest: call the host: ")?;
    let output = run(room, "--timeout 20s", "sh -c 'echo before; sleep 1000'")?;
    output.code(124)?.says("before\n")?.complains("it was not over after 20s")?;
    Ok(())
}
