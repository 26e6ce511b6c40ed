//! Flow control, slow ends, and guests that lie.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vm_memory::{Bytes, GuestAddress};

use super::peer::*;
use super::super::driver::{NEEDS_RESET, reg};

#[test]
fn a_slow_host_stops_the_guest_and_nothing_is_lost() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    let (mut other, other_port) = guest.called_on(6);
    let sent = pattern(3 << 20);
    let (mut at, mut room, mut taken) = (0, 256 << 10, 0u32);
    let mut seen = Vec::new();
    while at < sent.len() {
        let outstanding = u32::try_from(at).unwrap().wrapping_sub(taken);
        let len = (room - outstanding).min(16 << 10).min(u32::try_from(sent.len() - at).unwrap());
        if len > 0 {
            let end = at + usize::try_from(len).unwrap();
            guest.say_bytes(5, port, &sent[at..end]);
            at = end;
        } else {
            // The other connection is not held up.
            guest.say_bytes(6, other_port, b"ping");
            assert_eq!(exactly(&mut other, 4), b"ping");
            seen.extend(exactly(&mut stream, 100 << 10));
        }
        while !guest.is_quiet() {
            let packet = guest.receive();
            assert_eq!((packet.op, packet.dst_port), (CREDIT_UPDATE, 5));
            (room, taken) = (packet.buf_alloc, packet.fwd_cnt);
        }
    }
    guest.say_end(5, port, SEND | RECEIVE);
    seen.extend(rest(&mut stream));
    assert!(seen == sent, "{} of {} bytes", seen.len(), sent.len());
}

#[test]
fn a_slow_guest_gets_what_it_has_room_for() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    let (mut other, _) = guest.called_on(6);
    guest.send(&Packet { buf_alloc: 1000, ..Guest::packet(CREDIT_UPDATE, 5, port) });
    stream.write_all(&pattern(2500)).unwrap();
    let mut got = guest.expect(DATA).bytes;
    assert_eq!(got.len(), 1000);
    guest.expect(CREDIT_REQUEST);
    assert!(guest.hears_nothing(), "it is asked once");
    other.write_all(b"other").unwrap();
    assert_eq!(guest.expect(DATA).bytes, b"other", "nobody else waits");
    guest.send(&Packet { buf_alloc: 1000, fwd_cnt: 700, ..Guest::packet(CREDIT_UPDATE, 5, port) });
    got.extend(guest.expect(DATA).bytes);
    assert_eq!(got.len(), 1700);
    guest.expect(CREDIT_REQUEST);
    // More taken than sent, and a room that shrinks: lies that give it nothing.
    guest.send(&Packet { buf_alloc: 1000, fwd_cnt: 5000, ..Guest::packet(CREDIT_UPDATE, 5, port) });
    guest.send(&Packet { buf_alloc: 10, fwd_cnt: 700, ..Guest::packet(CREDIT_UPDATE, 5, port) });
    assert!(guest.hears_nothing());
    guest.send(&Packet { buf_alloc: 9000, fwd_cnt: 1700, ..Guest::packet(CREDIT_UPDATE, 5, port) });
    got.extend(guest.expect(DATA).bytes);
    assert_eq!(got, pattern(2500));
}

#[test]
fn more_than_was_promised_resets_the_connection() {
    let mut guest = Guest::new();
    let (stream, port) = guest.called_on(5);
    let piece = pattern(64 << 10);
    let mut sent = 0;
    while guest.is_quiet() && sent < 64 {
        guest.say_bytes(5, port, &piece);
        sent += 1;
    }
    let mut packet = guest.receive();
    while packet.op == CREDIT_UPDATE {
        guest.say_bytes(5, port, &piece);
        sent += 1;
        if !guest.is_quiet() || sent > 64 {
            packet = guest.receive();
        }
    }
    assert_eq!((packet.op, packet.src_port), (RESET, port));
    assert!((4..16).contains(&sent), "{sent} times 64 KiB were kept for a host that reads nothing");
    drop(stream);
}

#[test]
fn credit_is_told_when_asked_for() {
    let mut guest = Guest::new();
    let (mut stream, port) = guest.called_on(5);
    guest.say_bytes(5, port, b"12345");
    exactly(&mut stream, 5);
    guest.say(CREDIT_REQUEST, 5, port);
    let packet = guest.expect(CREDIT_UPDATE);
    assert_eq!((packet.buf_alloc, packet.fwd_cnt), (256 << 10, 5));
}

#[test]
fn nonsense_hurts_only_who_says_it() {
    let mut guest = Guest::new();
    let (mut good, good_port) = guest.called_on(5);
    let unknown = |op| Guest::packet(op, 77, 88);
    for op in [RESPONSE, SHUTDOWN, DATA, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8, 0xffff] {
        guest.send(&unknown(op));
        let answer = guest.expect(RESET);
        assert_eq!((answer.src_port, answer.dst_port), (88, 77), "operation {op}");
    }
    guest.send(&unknown(RESET));
    for header in [vec![], vec![0; 43], Packet { src_cid: 4, ..unknown(REQUEST) }.header()] {
        guest.send_raw(&[&header[..], &[0; 1][..header.is_empty().into()]].concat(), b"");
    }
    assert!(guest.hears_nothing());
    assert_eq!(guest.rig.meter("dropped"), 3);
    guest.send(&Packet { kind: 2, ..unknown(REQUEST) });
    assert_eq!(guest.expect(RESET).kind, 2, "no such kind of socket");
    for (op, len) in [(DATA, 10_000), (DATA, u32::MAX), (99, 0), (REQUEST, 0), (RESPONSE, 0)] {
        let (mut stream, port) = guest.called_on(6);
        guest.send(&Packet { len, bytes: vec![0; 100], ..Guest::packet(op, 6, port) });
        assert_eq!(guest.expect(RESET).src_port, port, "operation {op}, length {len}");
        assert_eq!(rest(&mut stream), b"");
    }
    // To a host that is not this one.
    let mut stranger = Guest::packet(REQUEST, 1, 2);
    stranger.dst_cid = 9;
    guest.send_raw(&stranger.header(), b"");
    let (head, _) = guest.rig.wait_used(&mut guest.rx);
    let at = guest.buffers.remove(&head).unwrap();
    guest.offer(at);
    guest.rig.notify(0);
    good.write_all(b"well").unwrap();
    assert_eq!(guest.expect(DATA).bytes, b"well");
    guest.say_bytes(5, good_port, b"fine");
    assert_eq!(exactly(&mut good, 4), b"fine");
    assert_eq!(guest.rig.get(reg::STATUS) & NEEDS_RESET, 0);
}

#[test]
fn a_storm_without_buffers_waits_and_then_goes_on() {
    let mut guest = Guest::new();
    // No buffer is left.
    for number in 0..BUFFERS {
        guest.say(DATA, 1, u32::try_from(number).unwrap());
    }
    let taken: Vec<_> = (0..BUFFERS).map(|_| guest.receive_for_good()).collect();
    let header = Guest::packet(DATA, 2, 3).header();
    guest.rig.ram().write_slice(&header, GuestAddress(OUT)).unwrap();
    let mut pushed = 0;
    let mut back = 0;
    for _ in 0..40 {
        for _ in 0..20 {
            guest.tx.push(guest.rig.ram(), &[(OUT, 44, false)]);
            pushed += 1;
        }
        guest.rig.notify(1);
        guest.rig.settle();
        while guest.tx.pop(guest.rig.ram()).is_some() {
            back += 1;
        }
        if back < pushed {
            break;
        }
    }
    assert!((256..300).contains(&back), "{back} of {pushed} packets were answered in vain");
    for (packet, at) in taken {
        assert_eq!(packet.op, RESET);
        guest.offer(at);
    }
    guest.rig.notify(0);
    for _ in 0..pushed {
        assert_eq!(guest.expect(RESET).src_port, 3);
    }
    guest.rig.settle();
    while guest.tx.pop(guest.rig.ram()).is_some() {
        back += 1;
    }
    assert_eq!(back, pushed);
}

#[test]
fn buffers_that_hold_nothing_come_back() {
    let mut guest = Guest::new();
    let (mut stream, _) = guest.called_on(5);
    for _ in 0..BUFFERS {
        stream.write_all(b"x").unwrap();
        guest.receive_for_good();
    }
    stream.write_all(b"y").unwrap();
    guest.rx.push(guest.rig.ram(), &[(0x1000, 44, true)]);
    guest.rx.push(guest.rig.ram(), &[(0x1000, 4096, false)]);
    guest.rig.notify(0);
    for _ in 0..2 {
        assert_eq!(guest.rig.wait_used(&mut guest.rx).1, 0);
    }
    guest.offer(0x8000);
    guest.rig.notify(0);
    assert_eq!(guest.expect(DATA).bytes, b"y");
}

/// Packets that may say anything, to connections that are and are not, while their other ends come and go.
#[test]
fn random_packets_break_nothing_but_their_connections() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    listener.set_nonblocking(true).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut roll = |end: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % end
    };
    let mut ends: Vec<UnixStream> = Vec::new();
    for _ in 0..5000 {
        let pick = |of: &[u32], at: u64| of[usize::try_from(at).unwrap() % of.len()];
        let len = pick(&[0, 1, 100, 4096, 65536, 65537, u32::MAX], roll(7));
        let packet = Packet {
            src_port: pick(&[5, 6, 7], roll(3)),
            dst_port: pick(&[80, 80, 81, 1 << 30], roll(4)),
            op: u16::try_from(pick(&[1, 1, 2, 3, 4, 5, 5, 5, 6, 7, 8], roll(11))).unwrap(),
            len,
            flags: pick(&[0, 1, 2, 3, u32::MAX], roll(5)),
            buf_alloc: pick(&[0, 1, 4096, ROOM, u32::MAX], roll(5)),
            fwd_cnt: pick(&[0, 1, 1 << 31, u32::MAX], roll(4)),
            bytes: vec![7; usize::try_from(len.min(65536)).unwrap()],
            ..Guest::packet(0, 0, 0)
        };
        guest.send(&packet);
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(true).unwrap();
            // A full socket, or one whose other end is gone, is part of the play.
            let _ = (&stream).write(&[9; 5000]);
            ends.push(stream);
        }
        match roll(8) {
            0 if !ends.is_empty() => drop(ends.remove(0)),
            1 => drop(ends.last_mut().map(|end| end.shutdown(Shutdown::Write))),
            2 => drop(ends.last_mut().map(|end| end.read(&mut [0; 8192]))),
            _ => {}
        }
        while !guest.is_quiet() {
            guest.receive();
        }
        assert_eq!(guest.rig.get(reg::STATUS) & NEEDS_RESET, 0);
    }
    assert!(guest.rig.meter("opened") > 50, "{} connections", guest.rig.meter("opened"));
    guest.say(RESET, 8, 80);
    guest.say(REQUEST, 8, 80);
    assert_eq!(guest.expect(RESPONSE).dst_port, 8, "it works as before");
}
