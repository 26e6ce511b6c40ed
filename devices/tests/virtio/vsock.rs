//! The socket device: a played guest at one end, Unix sockets at the other. Connections come and go here.

mod flow;
mod peer;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

use base::host::fake::FakeHost;
use base::memory::Memory;

use self::peer::*;
use super::driver::{RAM, Rig, build, reg};

#[test]
fn the_guest_learns_its_context_id() {
    for (text, cid) in [("guest.sock", 3u64), ("path=a,cid=4294967294", 4_294_967_294)] {
        let mut rig = Rig::of("vsock", text, &FakeHost::default());
        let mut bytes = [0; 8];
        rig.config(0, &mut bytes);
        assert_eq!(u64::from_le_bytes(bytes), cid);
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let refused = |text: &str| {
        let memory = Memory::new(&RAM).unwrap();
        match build("vsock", text, &FakeHost::default(), &memory) {
            Ok(_) => panic!("{text} is accepted"),
            Err(fail) => fail.to_string(),
        }
    };
    for cid in ["0", "2", "4294967295"] {
        let text = refused(&format!("path=a,cid={cid}"));
        assert_eq!(text, format!("give test0 the context ID {cid}: a guest has one of 3 to 4294967294\n  hint: leave cid out for 3"));
    }
    let text = refused(&format!("path={}", "x".repeat(97)));
    assert!(text.contains("has at most 96 bytes, so that `_PORT` fits behind it\n  hint: "), "{text}");
}

#[test]
fn a_program_of_the_host_reaches_one_of_the_guest() {
    let mut guest = Guest::new();
    let mut stream = guest.dial();
    // What follows the line is for the guest, also when it comes with it.
    stream.write_all(b"CONNECT 52\nhello").unwrap();
    let request = guest.expect(REQUEST);
    assert_eq!((request.src_port, request.dst_port), (1 << 30, 52));
    assert!(guest.hears_nothing(), "no bytes before the guest has accepted");
    guest.say(RESPONSE, 52, 1 << 30);
    assert_eq!(line(&mut stream), "OK 1073741824\n");
    assert_eq!(guest.expect(DATA).bytes, b"hello");
    guest.say_bytes(52, 1 << 30, b"world");
    assert_eq!(exactly(&mut stream, 5), b"world");
    let (_second, port) = guest.called_on(52);
    assert_eq!(port, (1 << 30) + 1, "each has a port of its own");
    assert_eq!((guest.rig.meter("rx_bytes"), guest.rig.meter("tx_bytes")), (5, 5));
}

#[test]
fn a_guest_reaches_this_process_where_no_socket_has_a_file() {
    use devices::catalog::{Purpose, find};
    let host = FakeHost::default();
    let (mut here, there) = UnixStream::pair().unwrap();
    there.set_nonblocking(true).unwrap();
    host.answer(1024, there.into());
    let spec = find("vsock").unwrap().serve(Purpose::Calls).unwrap().unwrap();
    assert_eq!(spec, serde_json::json!({ "cid": 3 }), "it listens nowhere");
    let rig = Rig::of("vsock", "cid=3", &host);
    let mut guest = Guest::start(host, rig);
    guest.say(REQUEST, 7, 1024);
    guest.expect(RESPONSE);
    guest.say_bytes(7, 1024, b"hello");
    assert_eq!(exactly(&mut here, 5), b"hello");
    here.write_all(b"world").unwrap();
    assert_eq!(guest.expect(DATA).bytes, b"world");
    // One call is answered, and nobody is at other ports.
    for (port, peer) in [(8, 1024), (9, 1025)] {
        guest.say(REQUEST, port, peer);
        assert_eq!(guest.expect(RESET).dst_port, port);
    }
    drop(here);
    guest.expect(SHUTDOWN);
}

#[test]
fn a_guest_that_refuses_ends_the_stream_without_an_answer() {
    let mut guest = Guest::new();
    let mut stream = guest.dial();
    stream.write_all(b"CONNECT 9\n").unwrap();
    let request = guest.expect(REQUEST);
    guest.say(RESET, 9, request.src_port);
    assert_eq!(rest(&mut stream), b"");
    assert!(guest.hears_nothing(), "a reset is not answered");
}

#[test]
fn a_greeting_that_is_none_ends_the_stream() {
    let mut guest = Guest::new();
    for text in ["HELLO 1\n", "CONNECT\n", "CONNECT 99999999999\n", "CONNECT 000000000000000000000000000"] {
        let mut stream = guest.dial();
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = Vec::new();
        // The rest of what was said may be unread when it is closed.
        let _ = stream.read_to_end(&mut answer);
        assert_eq!(answer, b"", "{text}");
    }
    let mut slow = guest.dial();
    slow.write_all(b"CONN").unwrap();
    guest.rig.settle();
    slow.write_all(b"ECT 7\n").unwrap();
    assert_eq!(guest.expect(REQUEST).dst_port, 7, "a line may come in pieces");
}

#[test]
fn a_program_of_the_guest_reaches_one_of_the_host() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    guest.say(REQUEST, 1000, 80);
    let answer = guest.expect(RESPONSE);
    assert_eq!((answer.src_port, answer.dst_port), (80, 1000));
    let (mut stream, _) = listener.accept().unwrap();
    guest.say_bytes(1000, 80, b"question");
    assert_eq!(exactly(&mut stream, 8), b"question");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(DATA).bytes, b"answer");
    guest.say(REQUEST, 1000, 81);
    let refused = guest.expect(RESET);
    assert_eq!((refused.src_port, refused.dst_port), (81, 1000), "nobody listens there");
}

#[test]
fn a_busy_program_of_the_host_is_waited_for() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    rustix::net::listen(&listener, 0).unwrap();
    guest.say(REQUEST, 1, 80);
    guest.expect(RESPONSE);
    guest.say(REQUEST, 2, 80);
    assert!(guest.hears_nothing(), "there is no room for the second yet");
    listener.accept().unwrap();
    assert_eq!(guest.expect(SHUTDOWN).dst_port, 1, "the first was closed at once");
    assert_eq!(guest.expect(RESPONSE).dst_port, 2);
}

#[test]
fn the_host_may_end_its_half_and_still_hear_the_answer() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    stream.write_all(b"question").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(DATA).bytes, b"question", "bytes come before the end");
    assert_eq!(guest.expect(SHUTDOWN).flags, SEND, "one half only");
    guest.say_bytes(5, port, b"answer");
    assert_eq!(exactly(&mut stream, 6), b"answer");
    guest.say_end(5, port, SEND | RECEIVE);
    assert_eq!(guest.expect(RESET).src_port, port, "the guest may forget it");
    assert_eq!(rest(&mut stream), b"");
}

#[test]
fn the_guest_may_end_its_half_and_still_hear_the_answer() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    guest.say_bytes(5, port, b"question");
    guest.say_end(5, port, SEND);
    assert_eq!(rest(&mut stream), b"question", "the end is there behind the bytes");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(DATA).bytes, b"answer");
    drop(stream);
    assert_eq!(guest.expect(SHUTDOWN).flags, SEND | RECEIVE);
    guest.say_bytes(5, port, b"more");
    assert_eq!(guest.expect(RESET).src_port, port, "bytes after the end break the protocol");
}

#[test]
fn a_host_that_dies_is_a_full_end_even_with_bytes_unread() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    stream.write_all(b"last words").unwrap();
    guest.say_bytes(5, port, b"never read");
    drop(stream);
    assert_eq!(guest.expect(DATA).bytes, b"last words");
    let mut end = guest.expect(SHUTDOWN);
    if end.flags == RECEIVE {
        // It was seen first that nobody reads.
        end = guest.expect(SHUTDOWN);
    }
    assert_eq!(end.flags, SEND | RECEIVE);
    guest.say_bytes(5, port, b"crossed the end");
    assert!(guest.hears_nothing(), "what was under way is forgotten");
    guest.say(RESET, 5, port);
    assert!(guest.hears_nothing());
    let (_, again) = guest.called_on(5);
    assert_ne!(again, port);
}

#[test]
fn what_the_guest_sent_before_its_end_arrives() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    let sent = pattern(1 << 20);
    let mut taken = 0;
    // Until the socket is full and bytes wait in the device.
    for piece in sent.chunks(16 << 10) {
        if taken + piece.len() > 256 << 10 {
            break;
        }
        guest.say_bytes(5, port, piece);
        taken += piece.len();
    }
    guest.say_end(5, port, SEND | RECEIVE);
    while guest.receive().op != RESET {}
    assert_eq!(rest(&mut stream), sent[..taken]);
}

#[test]
fn hundreds_of_connections_go_on_side_by_side() {
    let mut guest = Guest::new();
    let mut streams: Vec<_> = (0..300u32).map(|_| guest.called_on(5)).collect();
    for (number, (stream, _)) in (0u32..).zip(&mut streams) {
        stream.write_all(&number.to_le_bytes()).unwrap();
    }
    let mut got = HashMap::new();
    while got.len() < streams.len() {
        let packet = guest.expect(DATA);
        got.insert(packet.src_port, packet.bytes);
    }
    for (number, (stream, port)) in (0u32..).zip(&mut streams) {
        assert_eq!(got[port], number.to_le_bytes());
        guest.say_bytes(5, *port, &number.to_be_bytes());
        assert_eq!(exactly(stream, 4), number.to_be_bytes());
    }
    let ports: Vec<_> = streams.iter().map(|(_, port)| *port).collect();
    drop(streams);
    let mut ended: Vec<_> = ports.iter().map(|_| guest.expect(SHUTDOWN).src_port).collect();
    ended.sort_unstable();
    assert_eq!(ended, ports);
}

#[test]
fn a_reset_ends_all_streams_and_the_next_driver_starts_anew() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    guest.say_bytes(5, port, b"before");
    let Guest { host, mut rig, .. } = guest;
    rig.set(reg::STATUS, 0);
    assert_eq!(rest(&mut stream), b"before");
    // It waits until there is a driver again.
    let early = UnixStream::from(host.dial(Path::new("guest.sock")).unwrap());
    (&early).write_all(b"CONNECT 8\n").unwrap();
    let mut guest = Guest::start(host, rig);
    let request = guest.expect(REQUEST);
    assert_eq!((request.dst_port, request.src_port), (8, port + 1), "ports go on where they were");
}
