//! The real-time clock and its battery-backed memory (CMOS): tells the guest the right time, in UTC.
//!
//! Source: Motorola MC146818A data sheet. The time is worked out when it is read, so it is never caught in an
//! update and never stands still. There is no alarm and no interrupt, and the firmware tables name none: a driver
//! then polls instead of waiting for one.

mod calendar;

use std::sync::Arc;

use base::Result;
use base::bus::{Effect, Registers};
use base::clock::Clock;
use base::memory::Memory;
use base::node::Node;

use self::calendar::Moment;
use super::Switch;
use crate::catalog::{Body, Chip, Kind, Kit, Lazy, Presence, Space, Window};

const PORT: u16 = 0x70;
const INDEX: u64 = 0;
const DATA: u64 = 1;
/// The rest of the index port switches non-maskable interrupts off.
const INDEX_BITS: u8 = 0x7f;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
/// Not of the chip but of every PC since: the FADT names it, too.
const CENTURY: u8 = 0x32;

/// Register A: an update is in progress. Never.
const A_UPDATING: u8 = 0x80;
/// Register A after power-up: a 32.768 kHz crystal, 1024 Hz.
const A_USUAL: u8 = 0x26;
/// Register B: the guest sets the time, which stands still until it is done.
const B_SET: u8 = 0x80;
/// Register B: numbers are binary, not BCD.
const B_BINARY: u8 = 0x04;
/// Register B: hours run to 24, not to 12.
const B_24_HOURS: u8 = 0x02;
/// Register D: the battery is good.
const D_VALID: u8 = 0x80;
/// Hours: after noon, where they run to 12.
const AFTERNOON: u8 = 0x80;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The real-time clock.
pub struct This;

impl Kind for This {
    type Spec = Switch;
    const NAME: &'static str = "rtc";
    const FLAG: &'static str = "rtc";
    const SUMMARY: &'static str = "the real-time clock, which gives the guest the host's time (UTC)";
    const BARE: &'static str = "enabled";
    const EXAMPLE: &'static str = "on";
    const PRESENCE: Presence = Presence::Standard("on");

    fn build(spec: &Switch, kit: &Kit<'_>) -> Result<Body> {
        Ok(spec.body(|| Chip {
            windows: vec![Window {
                space: Space::Port,
                base: u64::from(PORT),
                len: 2,
                // The index: it takes effect with the data access that follows.
                lazy: &[Lazy { address: PORT as u64, only: None }],
                registers: Box::new(Rtc::new(kit.clock.clone(), kit.memory)),
            }],
            node: Some(Node {
                name: "RTC0".to_owned(),
                hid: "PNP0B00",
                uid: 0,
                ports: vec![PORT..=PORT + 1],
                memory: Vec::new(),
                irqs: Vec::new(),
            }),
            ..Chip::default()
        }))
    }
}

struct Rtc {
    clock: Arc<dyn Clock>,
    index: u8,
    bytes: [u8; 128],
    /// Seconds by which the guest's time is ahead of the host's.
    ahead: i64,
}

impl Rtc {
    fn new(clock: Arc<dyn Clock>, memory: &Memory) -> Rtc {
        let mut rtc = Rtc { clock, index: 0, bytes: [0; 128], ahead: 0 };
        rtc.put(REGISTER_A, A_USUAL);
        rtc.put(REGISTER_B, B_24_HOURS);
        rtc.put(REGISTER_D, D_VALID);
        let low = memory.pieces().filter(|piece| piece.guest < 4 * GIB);
        let low = low.map(|piece| piece.guest.saturating_add(piece.len)).max().unwrap_or(0);
        let high: u64 = memory.pieces().filter(|piece| piece.guest >= 4 * GIB).map(|piece| piece.len).sum();
        // Where every PC's firmware leaves the sizes of memory.
        rtc.put_size(&[0x15, 0x16], low.min(640 * KIB) / KIB);
        for at in [[0x17, 0x18], [0x30, 0x31]] {
            rtc.put_size(&at, low.saturating_sub(MIB) / KIB);
        }
        rtc.put_size(&[0x34, 0x35], low.saturating_sub(16 * MIB) / (64 * KIB));
        rtc.put_size(&[0x5b, 0x5c, 0x5d], high / (64 * KIB));
        rtc
    }

    fn put(&mut self, at: u8, value: u8) {
        if let Some(byte) = self.bytes.get_mut(usize::from(at)) {
            *byte = value;
        }
    }

    /// Puts `size` at some bytes, lowest first; the largest number that fits stands for anything larger.
    fn put_size(&mut self, at: &[u8], size: u64) {
        let largest = (1u64 << (8 * at.len())) - 1;
        for (at, byte) in at.iter().zip(size.min(largest).to_le_bytes()) {
            self.put(*at, byte);
        }
    }

    fn byte(&self, at: u8) -> u8 {
        self.bytes.get(usize::from(at)).copied().unwrap_or(0xff)
    }

    fn is(&self, bit: u8) -> bool {
        self.byte(REGISTER_B) & bit != 0
    }

    fn is_time(at: u8) -> bool {
        matches!(at, SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | CENTURY)
    }

    fn host_seconds(&self) -> i64 {
        i64::try_from(self.clock.wall().as_secs()).unwrap_or(i64::MAX)
    }

    /// Copies the present time into the registers.
    fn show_time(&mut self) {
        let now = Moment::at(self.host_seconds().saturating_add(self.ahead));
        let noon = if self.is(B_24_HOURS) || now.hour < 12 { 0 } else { AFTERNOON };
        let hour = match now.hour {
            hour if self.is(B_24_HOURS) => hour,
            0 | 12 => 12,
            hour => hour % 12,
        };
        let shown = [
            (SECONDS, now.second),
            (MINUTES, now.minute),
            (HOURS, hour),
            (WEEKDAY, now.weekday),
            (DAY, now.day),
            (MONTH, now.month),
            (YEAR, now.year_of_century()),
            (CENTURY, now.century()),
        ];
        for (at, value) in shown {
            let code = if self.is(B_BINARY) { value } else { ((value / 10) << 4) | (value % 10) };
            self.put(at, if at == HOURS { code | noon } else { code });
        }
    }

    /// Makes the time in the registers the present one.
    fn take_time(&mut self) {
        let number = |at| {
            let code = self.byte(at) & if at == HOURS && !self.is(B_24_HOURS) { !AFTERNOON } else { 0xff };
            if self.is(B_BINARY) { code } else { (code >> 4).saturating_mul(10).saturating_add(code & 0x0f) }
        };
        let hour = match number(HOURS) {
            hour if self.is(B_24_HOURS) => hour,
            hour if self.byte(HOURS) & AFTERNOON != 0 => hour % 12 + 12,
            hour => hour % 12,
        };
        let moment = Moment {
            year: i64::from(number(CENTURY)) * 100 + i64::from(number(YEAR)),
            month: number(MONTH),
            day: number(DAY),
            hour,
            minute: number(MINUTES),
            second: number(SECONDS),
            weekday: 1,
        };
        self.ahead = moment.seconds().saturating_sub(self.host_seconds());
    }

    fn read_byte(&mut self) -> u8 {
        if Rtc::is_time(self.index) && !self.is(B_SET) {
            self.show_time();
        }
        self.byte(self.index)
    }

    fn write_byte(&mut self, value: u8) {
        match self.index {
            REGISTER_A => self.put(REGISTER_A, value & !A_UPDATING),
            REGISTER_B => {
                let was_set = self.is(B_SET);
                // What the guest is about to change in pieces starts out as the time of now, in the notation of now.
                if !was_set {
                    self.show_time();
                }
                self.put(REGISTER_B, value);
                if was_set && !self.is(B_SET) {
                    self.take_time();
                }
            }
            // They only tell.
            REGISTER_C | REGISTER_D => {}
            at if Rtc::is_time(at) && !self.is(B_SET) => {
                self.show_time();
                self.put(at, value);
                self.take_time();
            }
            at => self.put(at, value),
        }
    }
}

impl Registers for Rtc {
    fn read(&mut self, at: u64, data: &mut [u8]) {
        // The index cannot be read back on a PC.
        let byte = match at {
            DATA => self.read_byte(),
            _ => return,
        };
        if let Some(first) = data.first_mut() {
            *first = byte;
        }
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        for (port, byte) in (at..).zip(data) {
            match port {
                INDEX => self.index = byte & INDEX_BITS,
                DATA => self.write_byte(*byte),
                _ => {}
            }
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests;
