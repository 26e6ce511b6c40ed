//! One emulated host, and what a command on it must not notice of that.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command as Process, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use agent::wire::{Outcome, Size};
use rustix::pipe::{PipeFlags, pipe_with};
use vmm::lab::{Command, Host, Options};

/// A place for both ends of a pipe.
fn pipe() -> (File, OwnedFd) {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    (read.into(), write)
}

/// Runs a script on the host: outcome, stdout, stderr.
fn run(host: &Host, command: Command, input: &[u8]) -> (Outcome, Vec<u8>, Vec<u8>) {
    let ((stdin, feed), (mut stdout, out), (mut stderr, err)) = (pipe(), pipe(), pipe());
    let command = Command { stdin: Some(stdin.into()), stdout: Some(out), stderr: Some(err), ..command };
    thread::scope(|scope| {
        scope.spawn(move || File::from(feed).write_all(input));
        let read = |from: &mut File| {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).unwrap();
            bytes
        };
        let stdout = scope.spawn(move || read(&mut stdout));
        let stderr = scope.spawn(move || read(&mut stderr));
        (host.exec(command).unwrap(), stdout.join().unwrap(), stderr.join().unwrap())
    })
}

fn sh(script: &str) -> Command {
    Command::here(["sh", "-c", script]).unwrap()
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

/// All checks on one host, since it takes seconds to boot.
#[test]
fn an_emulated_host_is_this_one_with_a_kvm() {
    if Process::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("skipped 1: there is no qemu-system-x86_64");
        return;
    }
    let start = Instant::now();
    let host = Host::boot(&Options::default()).unwrap();
    println!("up after {:?}", start.elapsed());
    ends(&host);
    surroundings(&host);
    streams(&host);
    at_once(&host);
    terminals(&host);
    files(&host);
    kvm(&host);
    let pid = host.pid();
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    drop(host);
    assert!(!Path::new(&format!("/proc/{pid}")).exists(), "QEMU is left running");
}

fn ends(host: &Host) {
    let end = |script| run(host, sh(script), b"").0;
    assert_eq!(end("exit 7"), Outcome::Code(7));
    assert_eq!(end("kill -TERM $$"), Outcome::Signal(15));
    assert_eq!(run(host, Command::here(["no-such-program"]).unwrap(), b"").0.code(), 127);
    assert_eq!(run(host, Command::here(["/etc/passwd"]).unwrap(), b"").0.code(), 126);
}

fn surroundings(host: &Host) {
    let place = tempfile::tempdir().unwrap();
    let command = Command {
        directory: place.path().to_owned(),
        env: vec![("PATH".into(), "/usr/bin:/bin".into()), ("ODD".into(), "a b\n'c".into())],
        ..sh("pwd; printf %s \"$ODD\"; nproc >&2; env | grep -c . >&2")
    };
    let (outcome, out, err) = run(host, command, b"");
    assert_eq!(outcome, Outcome::Code(0));
    assert_eq!(text(out), format!("{}\na b\n'c", place.path().display()));
    // PATH and two lines of ODD, and what a shell adds: PWD.
    assert_eq!(text(err), "1\n4\n");
}

fn streams(host: &Host) {
    let (outcome, out, err) = run(host, sh("echo to out; echo to err >&2; cat"), b"from in");
    assert_eq!(
        (outcome, text(out), text(err)),
        (Outcome::Code(0), "to out\nfrom in".into(), "to err\n".into())
    );
    let data: Vec<u8> =
        (0..5_000_000u32).flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let start = Instant::now();
    let (outcome, back, _) = run(host, Command::here(["cat"]).unwrap(), &data);
    println!("20 MB went there and back in {:?}", start.elapsed());
    assert_eq!(outcome, Outcome::Code(0));
    assert!(back == data, "{} of {} bytes came back, or others", back.len(), data.len());
}

/// Two commands that wait for one another, through pipes in a directory that only the emulated host has.
fn at_once(host: &Host) {
    assert_eq!(run(host, sh("mkfifo /run/there /run/back"), b"").0, Outcome::Code(0));
    thread::scope(|scope| {
        let one = scope.spawn(|| run(host, sh("echo hello > /run/there; cat /run/back"), b""));
        let two = scope.spawn(|| run(host, sh("read word < /run/there; echo $word to you > /run/back"), b""));
        assert_eq!(text(one.join().unwrap().1), "hello to you\n");
        assert_eq!(two.join().unwrap().0, Outcome::Code(0));
    });
    assert!(!Path::new("/run/there").exists());
}

fn terminals(host: &Host) {
    let terminal = Some(Size { rows: 33, columns: 101 });
    let script =
        "test -t 0 && test -t 1 && test -t 2 && stty size && tty >/dev/null && : < /dev/tty && exit 5";
    let (outcome, out, err) = run(host, Command { terminal, ..sh(script) }, b"");
    assert_eq!((outcome, text(out), text(err)), (Outcome::Code(5), "33 101\r\n".into(), String::new()));
    let (outcome, out, _) = run(host, sh("test -t 0 || test -t 1 || echo none"), b"");
    assert_eq!((outcome, text(out)), (Outcome::Code(0), "none\n".into()));
}

fn files(host: &Host) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("made");
    let here = |script| Command { directory: dir.path().to_owned(), ..sh(script) };
    let script = "umask 027; head -c 3000000 /dev/zero > made; echo end >> made; mkdir sub; mv made sub; ln -s sub/made made";
    assert_eq!(run(host, here(script), b"").0, Outcome::Code(0));
    let found = std::fs::read(&path).unwrap();
    assert!(found.len() == 3_000_004 && found.ends_with(b"end\n"), "{} bytes", found.len());
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o640);
    // And the other way, also where the file was known there already.
    std::fs::write(&path, "changed here").unwrap();
    let (_, out, _) = run(host, here("cat made"), b"");
    assert_eq!(text(out), "changed here");
}

fn kvm(host: &Host) {
    let script = "test -c /dev/kvm && cat /sys/module/kvm_amd/parameters/npt && test -c /dev/net/tun && \
                  test -c /dev/vhost-net && test -c /dev/vhost-vsock && ping -c 1 -W 5 127.0.0.1 >/dev/null; echo $?";
    let (_, out, err) = run(host, sh(script), b"");
    let said = text(out);
    assert!(said.starts_with("Y\n") || said.starts_with("1\n"), "{said} {}", text(err));
    // The VM that the host itself keeps: a counter that was not set off is one that KVM could not scale.
    let script = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource /sys/kernel/debug/kvm/*/vcpu0/tsc-offset";
    let (_, out, err) = run(host, sh(script), b"");
    let said = text(out);
    assert!(said.starts_with("tsc\n-") && said.trim() != "tsc\n-0", "{said} {}", text(err));
}

/// The command line's own way, with a process that is killed: nothing stays behind.
#[test]
fn a_killed_lab_takes_qemu_with_it() {
    if Process::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("skipped 1: there is no qemu-system-x86_64");
        return;
    }
    let mut lab = Process::new(env!("CARGO_BIN_EXE_mayfly"))
        .args(["lab", "--memory", "1G", "--", "sh", "-c", "echo ready; exec sleep 1000"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = [0; 6];
    lab.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"ready\n");
    let children = format!("/proc/{0}/task", lab.id());
    let tasks = std::fs::read_dir(children).unwrap().flatten();
    let mut pids = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let qemu = pids.find_map(|list| list.split_whitespace().next().map(str::to_owned)).expect("QEMU runs");
    lab.kill().unwrap();
    lab.wait().unwrap();
    let stat = format!("/proc/{qemu}/stat");
    let deadline = Instant::now() + Duration::from_secs(5);
    // Gone, or a zombie until whoever adopted it looks.
    while std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z")) {
        assert!(Instant::now() < deadline, "QEMU outlives a killed lab");
        thread::yield_now();
    }
}

/// Signals reach the command, its code comes back, and the time is kept.
#[test]
fn the_command_line_passes_on_codes_signals_and_limits() {
    if Process::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("skipped 1: there is no qemu-system-x86_64");
        return;
    }
    let lab = |arguments: &[&str]| {
        let mut command = Process::new(env!("CARGO_BIN_EXE_mayfly"));
        command.args(["lab", "--memory", "1G"]).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
        command
    };
    let script = "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let mut child = lab(&["--", "sh", "-c", script]).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut said = [0; 6];
    out.read_exact(&mut said).unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)
        .unwrap();
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), child.wait().unwrap().code()), ("caught\n", Some(9)));

    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = lab(&["--", "echo", "lost"]).stdout(full).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(123));
    assert_eq!(text(output.stderr), "error: write the output: No space left on device\n");

    assert_eq!(lab(&["--timeout", "1ms", "--", "true"]).status().unwrap().code(), Some(124));
    let output = lab(&["--", "no-such-program"]).stderr(Stdio::piped()).output().unwrap();
    assert_eq!(output.status.code(), Some(127));
    assert_eq!(
        text(output.stderr),
        "error: run no-such-program: No such file or directory\n  hint: check the name; it is looked for in the directories of PATH\n"
    );
}
