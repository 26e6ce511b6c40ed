//! Any bytes at all from the other end of the agent's wire, cut anywhere: frames or a complaint, never a panic, and
//! what was read is written back the same.
#![no_main]

use agent::wire::{Decoder, FROM_GUEST, FROM_HOST, Frame};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else { return };
    let limit = if choice & 1 == 0 { FROM_HOST } else { FROM_GUEST };
    let mut decoder = Decoder::new(limit);
    for part in bytes.chunks(usize::from(choice >> 1) + 1) {
        decoder.feed(part);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => {
                    let mut again = Vec::new();
                    frame.encode(&mut again);
                    assert_eq!(
                        Frame::decode(&again, limit),
                        Ok(Some((frame, again.len()))),
                        "a frame reads back"
                    );
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});
