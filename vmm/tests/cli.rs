//! The exact words for wrong and right inputs: each file in `resources/golden` is a session with the real binary.
//!
//! A line `$ mayfly ...` is a command; what follows is what it printed on standard error and output, and its exit
//! code. `GOLDEN=write cargo test -p vmm --test cli` writes down what is printed now. What grows with the catalogue of
//! devices is not in them, so that a new device changes no golden file.

mod tiny;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};

use self::tiny::tiny;

const NOBODY: u32 = 65534;

/// A directory with the files that the sessions name.
fn fixtures() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(dir.path().join("directory")).unwrap();
    put("notes.txt", "Not a kernel, but a text about kernels.\n");
    put("empty", "");
    put("disk.img", &"\0".repeat(4096));
    fs::set_permissions(dir.path().join("disk.img"), fs::Permissions::from_mode(0o666)).unwrap();
    fs::set_permissions(dir.path().join("directory"), fs::Permissions::from_mode(0o777)).unwrap();
    put("broken.json", "{ \"kernel\": \n");
    put("unknown-key.json", "{\n  \"kernal\": \"vmlinuz\"\n}\n");
    put("wrong-type.json", "{ \"kernel\": \"vmlinuz\", \"cpus\": \"four\" }\n");
    put(
        "good.json",
        "{ \"kernel\": \"vmlinuz\", \"initrd\": [\"builtin\"], \"cpus\": 4, \"memory\": \"2G\" }\n",
    );
    put(
        "good.toml",
        "kernel = \"tiny\"\ncommand = \"echo {suite}\"\nroot = \"directory\"\n[matrix]\ncpus = [1, 2]\nsuite = [\"a\"]\n",
    );
    put("none.toml", "kernel = \"tiny\"\n[matrix]\ncpus = [1, 99]\n");
    fs::create_dir(dir.path().join("boot")).unwrap();
    for release in ["5.10.0-9-amd64", "6.1.0-56-amd64"] {
        put(&format!("boot/vmlinuz-{release}"), "");
    }
    fs::write(dir.path().join("tiny"), tiny()).unwrap();
    // A tree in which something has the name of a kernel and is none.
    fs::create_dir(dir.path().join("tree")).unwrap();
    put("tree/vmlinux", "a text\n");
    fs::write(dir.path().join("tree/vmlinuz"), tiny()).unwrap();
    put("cut", &format!("MZ{}", "\0".repeat(298)));
    fs::write(dir.path().join("short.qcow2"), [b"QFI\xfb\0\0\0\x03".as_slice(), &[0; 92]].concat()).unwrap();
    fs::set_permissions(dir.path().join("short.qcow2"), fs::Permissions::from_mode(0o666)).unwrap();
    put("secret", "not for everyone\n");
    fs::set_permissions(dir.path().join("secret"), fs::Permissions::from_mode(0o000)).unwrap();
    dir
}

/// Runs a command line of a session.
fn run(dir: &Path, words: &str) -> Output {
    start(dir, words, &[]).wait_with_output().unwrap()
}

/// Starts a command line with this environment. Not as root, whom nothing is refused.
fn start(dir: &Path, words: &str, environment: &[(&str, &Path)]) -> Child {
    /// A child started while another thread still writes its copy would hold that copy open: it could not be run.
    static COPYING: Mutex<()> = Mutex::new(());
    let binary = dir.join("mayfly");
    let turn = COPYING.lock().unwrap_or_else(PoisonError::into_inner);
    if !binary.exists() {
        fs::copy(env!("CARGO_BIN_EXE_mayfly"), &binary).unwrap();
    }
    let mut command = Command::new(binary);
    command.args(words.split_ascii_whitespace()).current_dir(dir).stdin(Stdio::null()).env_clear();
    command.envs(environment.iter().copied());
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(turn);
    child
}

/// A session as it goes now: the commands of `old`, with what they print.
fn session(dir: &Path, old: &str) -> String {
    let mut text = String::new();
    for line in old.lines().filter(|line| line.starts_with("$ ") || line.starts_with('#')) {
        text.push_str(&format!("{line}\n"));
        let Some(words) = line.strip_prefix("$ mayfly") else { continue };
        let output = run(dir, words);
        for stream in [&output.stderr, &output.stdout] {
            // Where the files are differs from run to run.
            let here = dir.display().to_string();
            text.push_str(&String::from_utf8_lossy(stream).replace(&here, "DIRECTORY"));
            if !text.ends_with('\n') {
                text.push('\n');
            }
        }
        text.push_str(&format!("exit code {}\n\n", output.status.code().unwrap()));
    }
    text
}

fn sessions() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/golden");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    files
}

#[test]
fn the_words_are_those_of_the_golden_files() {
    let dir = fixtures();
    let files = sessions();
    assert!(!files.is_empty());
    let mut wrong = String::new();
    for file in files {
        let old = fs::read_to_string(&file).unwrap();
        let new = session(dir.path(), &old);
        if std::env::var_os("GOLDEN").is_some_and(|value| value == "write") {
            fs::write(&file, new).unwrap();
            continue;
        }
        let (mut old, mut new) = (old.lines(), new.lines());
        loop {
            let pair = (old.next(), new.next());
            if pair == (None, None) {
                break;
            }
            if pair.0 != pair.1 {
                let name = file.file_name().unwrap().display();
                wrong += &format!("{name}: expected {:?}\n{name}: it prints {:?}\n", pair.0, pair.1);
                break;
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "\n{wrong}GOLDEN=write cargo test -p vmm --test cli writes down the new words\n"
    );
}

#[test]
fn nothing_typed_gets_friendly_help() {
    let dir = fixtures();
    let output = run(dir.path(), "");
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("Usage: mayfly") && told.contains("Start here"), "{told}");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_plan_written_down_is_the_same_plan() {
    let dir = fixtures();
    let first = run(dir.path(), "run --plan good.json --cmdline quiet --timeout 90s --dry-run");
    assert_eq!(first.status.code(), Some(0), "{}", String::from_utf8_lossy(&first.stderr));
    fs::write(dir.path().join("again.json"), &first.stdout).unwrap();
    let plan: serde_json::Value = serde_json::from_slice(&first.stdout).unwrap();
    assert_eq!(plan["cmdline"]["extend"], "quiet");
    assert_eq!((&plan["cpus"], &plan["timeout"]), (&4.into(), &"90s".into()));
    let second = run(dir.path(), "run --plan again.json --dry-run");
    assert_eq!(String::from_utf8(first.stdout), String::from_utf8(second.stdout));
}

#[test]
fn flags_change_the_command_of_a_plan() {
    let dir = fixtures();
    let plan = |words: &str| -> serde_json::Value {
        let output = run(dir.path(), words);
        assert_eq!(output.status.code(), Some(0), "{words}: {}", String::from_utf8_lossy(&output.stderr));
        fs::write(dir.path().join("command.json"), &output.stdout).unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let root = |plan: &serde_json::Value| {
        let all = plan["devices"].as_array().unwrap().iter().filter(|device| device["name"] == "root");
        all.map(|device| device["spec"]["path"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let path = |name: &str| dir.path().join(name).display().to_string();
    let first = plan("run --kernel tiny --root disk.img --dry-run -- true");
    assert_eq!(root(&first), [path("disk.img")]);
    let other = plan("run --plan command.json --root empty --dry-run");
    assert_eq!((root(&other), &other["command"]["argv"]), (vec![path("empty")], &first["command"]["argv"]));
    assert_eq!(root(&plan("run --plan command.json --root directory --dry-run")), [path("directory")]);
    assert_eq!(root(&plan("run --plan command.json --dry-run -- other")), [path("directory")]);
}

#[test]
fn changes_go_to_a_file_and_a_system_is_told_of_its_root() {
    let dir = fixtures();
    let output = run(dir.path(), "run --kernel tiny --root directory --export-changes - -- x");
    assert_eq!(output.status.code(), Some(2));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        told.starts_with("error: use --export-changes -: standard output is the command's\n  hint: "),
        "{told}"
    );
    let words = "run --kernel tiny --root directory --export-changes a.tar --systemd --dry-run -- x";
    let plan: serde_json::Value = serde_json::from_slice(&run(dir.path(), words).stdout).unwrap();
    assert_eq!(plan["command"]["export_changes"], dir.path().join("a.tar").display().to_string());
    assert_eq!(plan["command"]["systemd"], true);
    assert!(plan["cmdline"]["extend"].as_str().unwrap().contains("fstab=no"), "{plan}");
    assert!(!dir.path().join("a.tar").exists());
}

#[test]
fn a_home_is_passed_on_where_it_is_the_commands_own() {
    let dir = fixtures();
    let home = |words: &str| {
        let child =
            start(dir.path(), &format!("run --kernel tiny {words} -- x"), &[("HOME", Path::new("/mine"))]);
        let output = child.wait_with_output().unwrap();
        let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let env = plan["command"]["env"].as_array().unwrap().iter().filter_map(|word| word.as_str());
        env.filter_map(|word| word.strip_prefix("HOME=")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(home("--dry-run"), ["/mine"]);
    assert_eq!(home("--dry-run --user ann"), [""; 0]);
    assert_eq!(home("--dry-run --user ann -e HOME"), ["/mine"]);
    assert_eq!(home("--dry-run --root directory"), [""; 0]);
}

#[test]
fn what_is_printed_about_mayfly_is_whole() {
    let dir = fixtures();
    for (words, contents) in [
        ("completions bash", "--kernel"),
        ("completions zsh", "--kernel"),
        ("completions fish", "kernel"),
        ("man", ".TH mayfly 1"),
        ("man run", ".TH mayfly-run 1"),
        ("run --help", "Exit codes:"),
        ("--version", concat!("mayfly ", env!("CARGO_PKG_VERSION"))),
    ] {
        let output = run(dir.path(), words);
        let told = String::from_utf8(output.stdout).unwrap();
        assert!(told.contains(contents), "{words}: {told}");
        assert_eq!(output.status.code(), Some(0), "{words}");
    }
    let schema: serde_json::Value = serde_json::from_slice(&run(dir.path(), "schema").stdout).unwrap();
    assert!(schema.pointer("/properties/kernel").is_some());
    let doctor: serde_json::Value = serde_json::from_slice(&run(dir.path(), "doctor --json").stdout).unwrap();
    assert_eq!(doctor.pointer("/checks/0/name").and_then(|name| name.as_str()), Some("kvm"));
}

#[test]
fn findings_that_cannot_be_printed_are_no_success() {
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_mayfly")).arg("doctor").stdout(full).output().unwrap();
    assert_ne!(output.status.code(), Some(0));
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(told, "error: write to standard output: No space left on device\n");
}

#[test]
fn a_failure_before_the_start_is_a_result_too() {
    let dir = fixtures();
    let output = run(dir.path(), "run --kernel vmlinuz --cpus 0 --json");
    let line: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(line["end"], "not-started");
    assert_eq!(line["exit_code"], 2);
    assert_eq!(line["error"], "give the machine 0 CPUs: it takes 1 to 64");
}

#[test]
fn a_result_pipe_is_opened_once_and_never_waited_for() {
    let dir = fixtures();
    let fifo = dir.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o666.into(), 0).unwrap();
    fs::set_permissions(&fifo, fs::Permissions::from_mode(0o666)).unwrap();
    let output = run(dir.path(), "run --kernel vmlinuz --cpus 0 --json=pipe");
    assert_eq!(output.status.code(), Some(125), "{output:?}");
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("open result file pipe for writing: ") && told.contains("reader first"), "{told}");

    let nonblocking = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
    let mut reader = fs::File::from(rustix::fs::open(&fifo, nonblocking, 0.into()).unwrap());
    assert_eq!(run(dir.path(), "run --kernel vmlinuz --cpus 0 --json=pipe").status.code(), Some(2));
    let mut line = String::new();
    std::io::Read::read_to_string(&mut reader, &mut line).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap()["exit_code"], 2);

    fs::write(dir.path().join("kept"), "old").unwrap();
    assert_eq!(run(dir.path(), "run --kernel vmlinuz --json=kept --dry-run").status.code(), Some(0));
    assert_eq!(fs::read(dir.path().join("kept")).unwrap(), b"old", "a dry run has no result");
}

/// A file that is opened where a standard stream was closed would get what is meant for the stream.
#[test]
fn closed_streams_are_nobodys_file() {
    let dir = fixtures();
    let ended = Command::new("sh")
        .args(["-c", r#"exec "$0" run --kernel vmlinuz --cpus 0 --json=result 2>&-"#])
        .arg(env!("CARGO_BIN_EXE_mayfly"))
        .current_dir(dir.path())
        .status()
        .unwrap();
    assert_eq!(ended.code(), Some(2));
    let result = fs::read_to_string(dir.path().join("result")).unwrap();
    assert!(serde_json::from_str::<serde_json::Value>(&result).is_ok(), "not the result alone: {result}");
}

#[test]
fn a_reader_that_has_gone_has_had_enough() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(reader);
    let ended = Command::new(env!("CARGO_BIN_EXE_mayfly")).arg("man").stdout(writer).status().unwrap();
    assert_eq!(ended.code(), Some(0), "{ended}");
}

/// A run on the emulated host locks its disks here, where others can see it: a disk in use is found before any host is
/// started for it.
#[test]
fn a_disk_in_use_is_not_given_to_a_run_on_the_emulated_host() {
    let dir = fixtures();
    let path = dir.path().join("shared.img");
    fs::write(&path, [0; 1024]).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    let told = || {
        let output = run(dir.path(), "run --accel emulated --kernel tiny --disk shared.img");
        assert_eq!(output.status.code(), Some(125));
        String::from_utf8(output.stderr).unwrap()
    };
    let other = fs::File::open(&path).unwrap();
    other.lock().unwrap();
    let refusal = told();
    assert!(refusal.starts_with("error: lock shared.img for disk0: another process uses it\n"), "{refusal}");
    other.unlock().unwrap();
    // Nothing else stands in its way but that there is no QEMU where PATH is empty.
    assert!(told().starts_with("error: emulate a host"), "{}", told());
}

/// Whoever waits for the emulated host can be told to stop, and then hears as much of it as of a run.
#[test]
fn a_signal_before_the_emulated_host_is_up_is_told_as_the_end() {
    let dir = fixtures();
    let (bin, cache) = (dir.path().join("bin"), dir.path().join("cache"));
    for place in [&bin, &cache.join("mayfly/lab")] {
        fs::create_dir_all(place).unwrap();
    }
    let qemu = bin.join("qemu-system-x86_64");
    fs::write(&qemu, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&qemu, fs::Permissions::from_mode(0o755)).unwrap();
    // It waits for its turn in the cache, which never comes.
    let lock = fs::File::create(cache.join("mayfly/lab/lock")).unwrap();
    lock.lock().unwrap();
    for path in [&cache, &cache.join("mayfly"), &cache.join("mayfly/lab"), &cache.join("mayfly/lab/lock")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let end = |words: &str, signal: rustix::process::Signal| {
        let mut child = start(dir.path(), words, &[("PATH", &bin), ("XDG_CACHE_HOME", &cache)]);
        let threads = format!("/proc/{}/task", child.id());
        let boots = || {
            let mut threads = fs::read_dir(&threads).unwrap().flatten();
            threads.any(|task| fs::read(task.path().join("comm")).is_ok_and(|name| name == b"boot\n"))
        };
        while !boots() {
            assert_eq!(child.try_wait().unwrap(), None, "{words}");
            std::thread::yield_now();
        }
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), told, String::from_utf8(output.stdout).unwrap())
    };
    use rustix::process::Signal;
    for (signal, number) in [(Signal::INT, 2), (Signal::TERM, 15)] {
        let code = 128 + number;
        let (status, told, result) = end("run --accel emulated --kernel tiny --json", signal);
        assert_eq!(status, Some(code), "{told}");
        assert!(
            told.ends_with(&format!("\nerror: run the guest: signal {number} ended the run\n")),
            "{told}"
        );
        let line: serde_json::Value = serde_json::from_str(&result).unwrap();
        assert_eq!((&line["end"], &line["exit_code"]), (&"signalled".into(), &code.into()), "{result}");
        assert_eq!(
            (&line["accel"], &line["times_ms"]["first_instruction"]),
            (&"emulated".into(), &().into())
        );
        let (status, told, _) = end("lab -- true", signal);
        assert_eq!(status, Some(code), "{told}");
        assert_eq!(told, format!("error: boot the emulated host: signal {number} ended it\n"));
    }
}
