//! Both ends of the wire over a socket pair, with real programs.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use agent::client::{Client, Streams};
use agent::flow::WINDOW;
use agent::server::{End, Options, Server};
use agent::wire::{Exec, Frame, Outcome, Size, Stream, VERSION};
use rustix::pipe::{PipeFlags, pipe_with};

const PATIENCE: Duration = Duration::from_secs(20);

fn options() -> Options {
    let trampoline = vec![env!("CARGO_BIN_EXE_agent").into(), "on-terminal".into()];
    Options { trampoline, init: false, sync: false, fresh: false, messages: false, another: Vec::new() }
}

/// A guest in a thread, and the other end of its wire.
fn guest() -> (UnixStream, JoinHandle<std::io::Result<End>>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = Server::new(theirs.into(), options()).unwrap();
    (ours, thread::spawn(|| server.serve()))
}

fn client() -> Client {
    Client::connect(guest().0.into(), PATIENCE).unwrap()
}

fn pipe() -> (File, OwnedFd) {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    (read.into(), write)
}

fn exec(argv: &[&str]) -> Exec {
    Exec {
        argv: argv.iter().map(|word| word.as_bytes().to_vec()).collect(),
        env: vec![(b"PATH".to_vec(), b"/usr/bin:/bin".to_vec()), (b"COLOUR".to_vec(), b"blue".to_vec())],
        directory: b"/usr".to_vec(),
        ..Exec::default()
    }
}

/// Runs a program to its end: outcome, stdout, stderr.
fn run(client: &Client, exec: Exec, input: &[u8]) -> (Outcome, Vec<u8>, Vec<u8>) {
    let ((stdin, mut feed), (mut stdout, out), (mut stderr, err)) = (pipe(), pipe(), pipe());
    let streams = Streams { stdin: Some(stdin.into()), stdout: Some(out), stderr: Some(err) };
    let process = client.start(exec, streams).unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            // A program that does not read breaks the pipe, which is its right.
            let _ = File::from(std::mem::replace(&mut feed, pipe().1)).write_all(input);
        });
        let read = |from: &mut File| {
            let mut bytes = Vec::new();
            from.read_to_end(&mut bytes).unwrap();
            bytes
        };
        let stdout = scope.spawn(move || read(&mut stdout));
        let stderr = scope.spawn(move || read(&mut stderr));
        (process.wait().unwrap(), stdout.join().unwrap(), stderr.join().unwrap())
    })
}

#[test]
fn streams_directory_environment_and_code_are_the_programs_own() {
    let script = "pwd; echo $COLOUR; cat; echo oops >&2; exit 7";
    let (outcome, out, err) = run(&client(), exec(&["sh", "-c", script]), b"given");
    assert_eq!((outcome, &out[..], &err[..]), (Outcome::Code(7), &b"/usr\nblue\ngiven"[..], &b"oops\n"[..]));
}

#[test]
fn a_home_is_the_users_unless_the_host_says_one() {
    let script = ["sh", "-c", "echo $HOME"];
    let us = rustix::process::geteuid().as_raw().to_string();
    let users = std::fs::read_to_string("/etc/passwd").unwrap();
    let entry = users.lines().map(|line| line.split(':').collect::<Vec<_>>()).find(|entry| entry[2] == us);
    let home = entry.map_or("/", |entry| entry[5]);
    assert_eq!(run(&client(), exec(&script), b"").1, b"\n", "nothing is added where nobody is named");
    let mut said = Exec { user: us.into_bytes(), ..exec(&script) };
    assert_eq!(run(&client(), said.clone(), b"").1, format!("{home}\n").as_bytes());
    said.env.push((b"HOME".to_vec(), b"/elsewhere".to_vec()));
    assert_eq!(run(&client(), said, b"").1, b"/elsewhere\n");
}

#[test]
fn ends_are_told_exactly() {
    let client = client();
    let end = |exec| run(&client, exec, b"").0;
    assert_eq!(end(exec(&["sh", "-c", "kill -9 $$"])), Outcome::Signal(9));
    assert_eq!(end(exec(&["no-such-program"])).code(), 127);
    assert_eq!(end(exec(&["/etc/passwd"])).code(), 126);
    assert_eq!(end(Exec { directory: b"/nowhere".to_vec(), ..exec(&["true"]) }), Outcome::NoDirectory(2));
    let (outcome, out, _) = run(&client, exec(&["sh", "-c", "sleep 10 & echo started"]), b"");
    assert_eq!(
        (outcome, &out[..]),
        (Outcome::Code(0), &b"started\n"[..]),
        "what it leaves behind is not waited for"
    );
}

#[test]
fn much_data_goes_both_ways_and_others_are_not_held_up() {
    let client = client();
    let data: Vec<u8> = (0..5_000_000u32).flat_map(u32::to_le_bytes).collect();
    // Nobody reads from this one: it fills its window, and stays.
    let (mut unread, out) = pipe();
    let stuck = client.start(exec(&["yes"]), Streams { stdout: Some(out), ..Streams::default() }).unwrap();
    let (outcome, back, _) = run(&client, exec(&["cat"]), &data);
    assert_eq!(outcome, Outcome::Code(0));
    assert!(back == data, "{} of {} bytes came back", back.len(), data.len());
    stuck.remote().signal(15).unwrap();
    let reader = thread::spawn(move || unread.read_to_end(&mut Vec::new()).unwrap());
    assert_eq!(stuck.wait().unwrap(), Outcome::Signal(15));
    let seen = reader.join().unwrap();
    // What was in the window, in the pipe of the program, and in ours.
    assert!(seen <= usize::try_from(WINDOW).unwrap() + (3 << 16), "{seen} bytes were held");
}

#[test]
fn a_reader_that_leaves_ends_the_program() {
    let (mut read, out) = pipe();
    let client = client();
    let process = client.start(exec(&["yes"]), Streams { stdout: Some(out), ..Streams::default() }).unwrap();
    read.read_exact(&mut [0; 10]).unwrap();
    drop(read);
    assert_eq!(process.wait().unwrap(), Outcome::Signal(13), "SIGPIPE");
}

#[test]
fn a_program_that_leaves_its_input_is_not_fed() {
    let (stdin, feed) = pipe();
    let client = client();
    let process =
        client.start(exec(&["true"]), Streams { stdin: Some(stdin.into()), ..Streams::default() }).unwrap();
    // Its input stays open, and the wait ends all the same.
    assert_eq!(process.wait().unwrap(), Outcome::Code(0));
    drop(feed);
}

#[test]
fn a_terminal_is_one() {
    let script =
        "test -t 0 && test -t 1 && stty size && read line && echo got $line && stty size && cat; exit 3";
    let client = client();
    let (mut read, out) = pipe();
    let (stdin, feed) = pipe();
    let exec = Exec { terminal: Some(Size { rows: 33, columns: 101 }), ..exec(&["sh", "-c", script]) };
    let streams = Streams { stdin: Some(stdin.into()), stdout: Some(out), stderr: None };
    let process = client.start(exec, streams).unwrap();
    let mut seen = String::new();
    let mut until = |text: &str| {
        while !seen.contains(text) {
            let mut bytes = [0; 100];
            let n = read.read(&mut bytes).unwrap();
            assert!(n > 0, "{seen:?} ended before {text:?}");
            seen.push_str(std::str::from_utf8(&bytes[..n]).unwrap());
        }
    };
    until("33 101\r\n");
    process.remote().resize(Size { rows: 5, columns: 6 }).unwrap();
    let mut feed = File::from(feed);
    feed.write_all(b"hello\n").unwrap();
    until("got hello\r\n5 6\r\n");
    // The key for a signal, then the end of input, which a terminal hears as a key too.
    drop(feed);
    assert_eq!(process.wait().unwrap(), Outcome::Code(3));
    let (outcome, _, err) =
        run(&client, Exec { terminal: Some(Size { rows: 1, columns: 1 }), ..self::exec(&["nix"]) }, b"");
    assert_eq!((outcome, err), (Outcome::Code(127), vec![]));
}

#[test]
fn a_terminal_whose_reader_is_slow_loses_nothing_and_holds_up_nobody() {
    let client = client();
    let (mut screen, out) = pipe();
    let exec_on = Exec { terminal: Some(Size { rows: 24, columns: 80 }), ..exec(&["seq", "1", "300000"]) };
    let busy = client.start(exec_on, Streams { stdout: Some(out), ..Streams::default() }).unwrap();
    // Nobody reads the screen yet, and all windows are full.
    let (outcome, said, _) = run(&client, exec(&["seq", "1", "100000"]), b"");
    assert_eq!((outcome, said.len()), (Outcome::Code(0), 588_895));
    let mut text = String::new();
    screen.read_to_string(&mut text).unwrap();
    assert_eq!(busy.wait().unwrap(), Outcome::Code(0));
    let wanted: String = (1..=300_000).map(|n| format!("{n}\r\n")).collect();
    assert!(text == wanted, "{} bytes of {}", text.len(), wanted.len());
}

#[test]
fn the_key_for_a_signal_reaches_the_foreground() {
    let exec = Exec {
        terminal: Some(Size { rows: 1, columns: 1 }),
        // Who runs the tests in the background of a script has them ignore that signal, and all that they start.
        ..exec(&["env", "--default-signal=INT", "sh", "-c", "echo r; exec sleep 1000"])
    };
    let client = client();
    let ((mut read, out), (stdin, feed)) = (pipe(), pipe());
    let process =
        client.start(exec, Streams { stdin: Some(stdin.into()), stdout: Some(out), stderr: None }).unwrap();
    read.read_exact(&mut [0; 3]).unwrap();
    File::from(feed).write_all(b"\x03").unwrap();
    assert_eq!(process.wait().unwrap(), Outcome::Signal(2));
}

#[test]
fn a_guest_ends_with_its_host() {
    let (wire, server) = guest();
    let client = Client::connect(wire.into(), PATIENCE).unwrap();
    let process = client.start(exec(&["sleep", "1000"]), Streams::default()).unwrap();
    client.shut_down().unwrap();
    assert_eq!(server.join().unwrap().unwrap(), End::Shutdown);
    assert_eq!(process.wait().unwrap_err().to_string(), "the guest is gone");
    assert!(client.start(exec(&["true"]), Streams::default()).is_err());

    let (wire, server) = guest();
    drop(Client::connect(wire.into(), PATIENCE).unwrap());
    assert_eq!(server.join().unwrap().unwrap(), End::Closed);
}

#[test]
fn a_host_that_breaks_the_rules_is_cut_off() {
    // It does not read what it is sent.
    let exec = || Frame::Exec { id: 1, exec: exec(&["sleep", "1000"]) };
    let hello = || Frame::Hello { version: VERSION };
    let flood = (0..10).map(|_| Frame::Data { id: 1, stream: Stream::Stdin, bytes: vec![0; 65536] });
    let stop = Frame::Credit { id: 1, stream: Stream::Stdout, bytes: 1 };
    for (frames, complaint) in [
        (vec![exec()], "the host speaks another version"),
        (vec![Frame::Hello { version: 99 }], "the host speaks another version"),
        (vec![hello(), exec(), exec()], "an id is used twice"),
        (vec![hello(), exec(), stop], "more credit was given than was used"),
        (vec![hello(), hello()], "a frame came from the wrong end"),
        ([hello(), exec()].into_iter().chain(flood).collect(), "more data came than there was credit for"),
    ] {
        let (mut wire, server) = guest();
        let mut bytes = Vec::new();
        frames.iter().for_each(|frame| frame.encode(&mut bytes));
        // It may be cut off before the last byte.
        let _ = wire.write_all(&bytes);
        assert_eq!(server.join().unwrap().unwrap_err().to_string(), complaint, "{frames:?}");
    }
}

#[test]
fn a_guest_that_breaks_the_rules_is_cut_off() {
    let hello = || Frame::Hello { version: VERSION };
    let flood = (0..5).map(|_| Frame::Data { id: 1, stream: Stream::Stdout, bytes: vec![0; 65536] });
    let unknown = Frame::Exit { id: 77, outcome: Outcome::Code(0) };
    for (frames, complaint) in [
        (flood.collect(), "more data came than there was credit for"),
        (vec![unknown], "there is no such program"),
        (
            vec![Frame::Credit { id: 1, stream: Stream::Stdin, bytes: 1 }],
            "more credit was given than was used",
        ),
        (vec![Frame::Shutdown], "a frame came from the wrong end"),
    ] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut bytes = Vec::new();
        hello().encode(&mut bytes);
        theirs.write_all(&bytes).unwrap();
        let client = Client::connect(ours.into(), PATIENCE).unwrap();
        // Nobody reads this output, so that a flood of it is one.
        let (unread, out) = pipe();
        let process =
            client.start(exec(&["x"]), Streams { stdout: Some(out), ..Streams::default() }).unwrap();
        bytes.clear();
        frames.iter().for_each(|frame| frame.encode(&mut bytes));
        let _ = theirs.write_all(&bytes);
        // Cut off: nothing more comes from the host.
        let _ = theirs.read_to_end(&mut Vec::new());
        drop(unread);
        assert_eq!(process.wait().unwrap_err().to_string(), complaint, "{frames:?}");
    }
}
