//! Frames there and back, whole, cut and damaged.

use super::*;

/// One frame of each kind, with and without its options.
fn samples() -> Vec<Frame> {
    let size = Size { rows: 24, columns: 80 };
    let exec = Exec {
        argv: vec![b"sh".to_vec(), vec![], b"\xff\0".to_vec()],
        env: vec![(b"A".to_vec(), b"1".to_vec()), (b"B".to_vec(), vec![])],
        directory: b"/".to_vec(),
        user: b"1000:100".to_vec(),
        terminal: Some(size),
    };
    let plain = Exec { argv: vec![b"x".to_vec()], ..Exec::default() };
    let mut all = vec![
        Frame::Hello { version: 7 },
        Frame::Exec { id: 1, exec },
        Frame::Exec { id: u32::MAX, exec: plain },
        Frame::Credit { id: 2, stream: Stream::Stdin, bytes: 4096 },
        Frame::Resize { id: 3, size },
        Frame::Signal { id: 3, number: 15 },
        Frame::Shutdown,
        Frame::Clock { seconds: 1 << 40, nanoseconds: 999_999_999 },
        Frame::Message(Message { level: 4, time: 1_000_001, text: b"WARNING: x".to_vec() }),
        Frame::Call,
        Frame::Trouble { text: b"mount root: no such device".to_vec() },
    ];
    for stream in [Stream::Stdin, Stream::Stdout, Stream::Stderr] {
        all.push(Frame::Data { id: 9, stream, bytes: vec![7; 1000] });
        all.push(Frame::End { id: 9, stream });
        all.push(Frame::Stop { id: 9, stream });
    }
    for outcome in [Outcome::Code(7), Outcome::Signal(9), Outcome::NoProgram(2), Outcome::NoDirectory(-1)] {
        all.push(Frame::Exit { id: 5, outcome });
    }
    all
}

#[test]
fn frames_survive_the_wire_however_they_are_cut() {
    let mut bytes = Vec::new();
    samples().iter().for_each(|frame| frame.encode(&mut bytes));
    for step in [1, 3, 64, bytes.len()] {
        let (mut decoder, mut seen) = (Decoder::new(FROM_GUEST), Vec::new());
        for part in bytes.chunks(step) {
            decoder.feed(part);
            while let Some(frame) = decoder.next_frame().unwrap() {
                seen.push(frame);
            }
        }
        assert_eq!(seen, samples(), "in steps of {step}");
    }
}

#[test]
fn any_damage_is_refused_or_read_but_never_panics() {
    let mut seed = 1u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        usize::try_from(seed >> 33).unwrap()
    };
    for frame in samples() {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        for cut in 0..bytes.len() {
            assert_eq!(Frame::decode(&bytes[..cut], FROM_HOST), Ok(None), "{frame:?} cut at {cut}");
            // The same, with a length that claims to be complete.
            let mut short = bytes[..cut].to_vec();
            if let Some(length) = cut.checked_sub(4) {
                short[..4].copy_from_slice(&u32::try_from(length).unwrap().to_le_bytes());
                assert!(Frame::decode(&short, FROM_HOST).is_err(), "{frame:?} shortened to {cut}");
            }
        }
        for _ in 0..2000 {
            let mut bad = bytes.clone();
            for _ in 0..=random() % 3 {
                let at = random() % bad.len();
                bad[at] = u8::try_from(random() % 256).unwrap();
            }
            let _ = Frame::decode(&bad, FROM_HOST);
        }
    }
}

#[test]
fn lengths_are_limited() {
    let mut bytes = Vec::new();
    Frame::Data { id: 0, stream: Stream::Stdin, bytes: vec![0; MAX_DATA + 1] }.encode(&mut bytes);
    assert_eq!(Frame::decode(&bytes, FROM_HOST), Err(Malformed("a data frame is too long")));
    assert_eq!(Frame::decode(&u32::MAX.to_le_bytes(), FROM_HOST), Err(Malformed("a frame is too long")));
    // A list that claims four thousand million items.
    let list = [[6, 0, 0, 0, 2].as_slice(), &[0; 4], &[0xff; 4]].concat();
    let claim = [u32::try_from(list.len() - 4).unwrap().to_le_bytes().as_slice(), &list[4..]].concat();
    assert_eq!(Frame::decode(&claim, FROM_HOST), Err(Malformed("a frame is too short")));
}

#[test]
fn outcomes_have_the_codes_of_a_shell() {
    let codes = [Outcome::Code(7), Outcome::Signal(9), Outcome::NoProgram(2), Outcome::NoProgram(13)];
    assert_eq!(codes.map(Outcome::code), [7, 137, 127, 126]);
}
