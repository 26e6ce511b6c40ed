//! The registers of a 16550A serial port: a state machine that talks to nobody.
//!
//! Source: National Semiconductor PC16550D data sheet, section 8. Two things differ on purpose. The line is
//! infinitely fast, so the character time-out comes at once. And turning the FIFO on or off keeps the received
//! bytes, as a driver does that while the port is already open to the host.

use std::collections::VecDeque;

/// Interrupt enable: received data.
const IER_RECEIVE: u8 = 0x01;
/// Interrupt enable: transmitter holding register empty.
const IER_TRANSMIT: u8 = 0x02;
/// Interrupt enable: receiver line status.
const IER_LINE: u8 = 0x04;
/// Interrupt enable: modem status.
const IER_MODEM: u8 = 0x08;
const IER_ALL: u8 = 0x0f;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_TRANSMIT: u8 = 0x02;
const IIR_RECEIVE: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 0x01;
const FCR_CLEAR_RECEIVER: u8 = 0x02;

const LCR_DIVISOR: u8 = 0x80;

const MCR_DTR: u8 = 0x01;
const MCR_RTS: u8 = 0x02;
const MCR_OUT1: u8 = 0x04;
const MCR_OUT2: u8 = 0x08;
const MCR_LOOP: u8 = 0x10;

const LSR_DATA: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_BREAK: u8 = 0x10;
const LSR_HOLDING_EMPTY: u8 = 0x20;
const LSR_EMPTY: u8 = 0x40;
const LSR_FIFO_ERROR: u8 = 0x80;

const MSR_CTS: u8 = 0x10;
const MSR_DSR: u8 = 0x20;
const MSR_RI: u8 = 0x40;
const MSR_DCD: u8 = 0x80;
/// Changes of CTS, DSR and DCD stand four bits below them; of RI only the end is told, in bit 2.
const MSR_CHANGES: u8 = 0x0b;
const MSR_RING_ENDED: u8 = 0x04;

/// Depth of the receive FIFO.
const DEPTH: usize = 16;

#[derive(Clone, Copy, Debug)]
struct Received {
    byte: u8,
    broken: bool,
}

/// A 16550A.
#[derive(Debug)]
pub struct Uart {
    enabled: u8,
    fifo: bool,
    trigger: usize,
    line_control: u8,
    modem_control: u8,
    modem_changes: u8,
    scratch: u8,
    divisor_low: u8,
    divisor_high: u8,
    received: VecDeque<Received>,
    overrun: bool,
    /// The transmitter takes bytes.
    ready: bool,
    /// It has become empty and the guest has not been told yet.
    emptied: bool,
    /// The guest has said that it has nothing more to send.
    finished: bool,
}

impl Default for Uart {
    fn default() -> Self {
        Uart {
            enabled: 0,
            fifo: false,
            trigger: 1,
            // 8 data bits at 115200 baud: what a guest that never sets them up expects.
            line_control: 0x03,
            divisor_low: 1,
            divisor_high: 0,
            modem_control: 0,
            modem_changes: 0,
            scratch: 0,
            received: VecDeque::with_capacity(DEPTH),
            overrun: false,
            ready: true,
            emptied: false,
            finished: false,
        }
    }
}

impl Uart {
    /// Reads register `at` (0 to 7).
    pub fn read(&mut self, at: u64) -> u8 {
        let divisor = self.line_control & LCR_DIVISOR != 0;
        match at {
            0 if divisor => self.divisor_low,
            1 if divisor => self.divisor_high,
            0 => self.received.pop_front().map_or(0, |received| received.byte),
            1 => self.enabled,
            2 => self.identify(),
            3 => self.line_control,
            4 => self.modem_control,
            5 => self.line_status(),
            6 => self.modem_lines() | std::mem::take(&mut self.modem_changes),
            7 => self.scratch,
            _ => 0xff,
        }
    }

    /// Writes register `at` (0 to 7); `Some` is a byte that leaves on the line.
    pub fn write(&mut self, at: u64, value: u8) -> Option<u8> {
        let divisor = self.line_control & LCR_DIVISOR != 0;
        match at {
            0 if divisor => self.divisor_low = value,
            1 if divisor => self.divisor_high = value,
            0 => return self.transmit(value),
            1 => self.enable(value),
            2 => self.control_fifo(value),
            3 => self.line_control = value,
            4 => self.control_modem(value),
            7 => self.scratch = value,
            _ => {}
        }
        None
    }

    /// Bytes the host may send now.
    ///
    /// A driver raises RTS (or asks for receive interrupts) when it has cleared the FIFO and listens. What came
    /// before that would be lost, so nothing is taken from the host until then. A driver that looks which interrupts
    /// there are asks for all of them, while nothing says that it wants any: Linux then throws away what has come.
    pub fn room(&self) -> usize {
        let probing = self.enabled == IER_ALL && self.modem_control & MCR_OUT2 == 0;
        let listening = self.modem_control & MCR_RTS != 0 || (self.enabled & IER_RECEIVE != 0 && !probing);
        if !listening || self.is_looped() { 0 } else { self.depth().saturating_sub(self.received.len()) }
    }

    /// Whether the guest has read all it was sent.
    pub fn has_read_all(&self) -> bool {
        self.received.is_empty()
    }

    /// Takes a byte from the host; not more of them than there is [`Uart::room`].
    pub fn receive(&mut self, byte: u8) {
        self.take(Received { byte, broken: false });
    }

    /// Takes a break condition from the host. `SysRq` of a guest kernel hangs on it, so it comes through even when
    /// the guest does not read.
    pub fn receive_break(&mut self) {
        // Twice the depth: an operator who keeps the key down must not eat memory.
        if self.received.len() < 2 * DEPTH {
            self.received.push_back(Received { byte: 0, broken: true });
        }
    }

    /// Says whether the transmitter takes more bytes.
    pub fn set_ready(&mut self, ready: bool) {
        self.emptied = ready && (self.emptied || !self.ready);
        self.ready = ready;
    }

    /// Whether the guest has said, since the last call, that it has nothing more to send: it has turned the
    /// transmit interrupt off.
    pub fn take_finished(&mut self) -> bool {
        std::mem::take(&mut self.finished)
    }

    /// The level of the interrupt output.
    pub fn interrupts(&self) -> bool {
        self.cause() != IIR_NONE
    }

    fn is_looped(&self) -> bool {
        self.modem_control & MCR_LOOP != 0
    }

    fn depth(&self) -> usize {
        if self.fifo { DEPTH } else { 1 }
    }

    fn take(&mut self, received: Received) {
        if self.received.len() < self.depth() {
            self.received.push_back(received);
        } else {
            self.overrun = true;
        }
    }

    /// The most urgent interrupt that is pending and enabled (data sheet, table IV).
    fn cause(&self) -> u8 {
        let broken = self.received.front().is_some_and(|received| received.broken);
        if self.enabled & IER_LINE != 0 && (self.overrun || broken) {
            IIR_LINE
        } else if self.enabled & IER_RECEIVE != 0 && !self.received.is_empty() {
            if self.fifo && self.received.len() < self.trigger { IIR_TIMEOUT } else { IIR_RECEIVE }
        } else if self.enabled & IER_TRANSMIT != 0 && self.emptied {
            IIR_TRANSMIT
        } else if self.enabled & IER_MODEM != 0 && self.modem_changes != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    fn identify(&mut self) -> u8 {
        let cause = self.cause();
        if cause == IIR_TRANSMIT {
            self.emptied = false;
        }
        cause | if self.fifo { IIR_FIFO } else { 0 }
    }

    fn line_status(&mut self) -> u8 {
        let mut status = if self.ready || self.is_looped() { LSR_HOLDING_EMPTY | LSR_EMPTY } else { 0 };
        if self.fifo && self.received.iter().any(|received| received.broken) {
            status |= LSR_FIFO_ERROR;
        }
        if let Some(front) = self.received.front_mut() {
            status |= LSR_DATA;
            if std::mem::take(&mut front.broken) {
                status |= LSR_BREAK;
            }
        }
        if std::mem::take(&mut self.overrun) {
            status |= LSR_OVERRUN;
        }
        status
    }

    fn transmit(&mut self, byte: u8) -> Option<u8> {
        self.emptied = self.ready;
        if self.is_looped() {
            self.emptied = true;
            self.take(Received { byte, broken: false });
            return None;
        }
        Some(byte)
    }

    fn enable(&mut self, value: u8) {
        let before = std::mem::replace(&mut self.enabled, value & IER_ALL);
        let turned = before ^ self.enabled;
        if turned & IER_TRANSMIT != 0 {
            if self.enabled & IER_TRANSMIT != 0 {
                // Asking for the interrupt while the transmitter is empty gives one at once.
                self.emptied |= self.ready;
            } else {
                self.finished = true;
            }
        }
    }

    fn control_fifo(&mut self, value: u8) {
        self.fifo = value & FCR_ENABLE != 0;
        if !self.fifo {
            return;
        }
        if value & FCR_CLEAR_RECEIVER != 0 {
            self.received.clear();
        }
        self.trigger = match value >> 6 {
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        };
    }

    fn control_modem(&mut self, value: u8) {
        let before = self.modem_lines();
        self.modem_control = value & 0x1f;
        let after = self.modem_lines();
        self.modem_changes |= ((before ^ after) >> 4) & MSR_CHANGES;
        if before & !after & MSR_RI != 0 {
            self.modem_changes |= MSR_RING_ENDED;
        }
    }

    /// The other side is always there, except in loopback, where the port hears itself.
    fn modem_lines(&self) -> u8 {
        if !self.is_looped() {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)]
            .into_iter()
            .filter(|(from, _)| self.modem_control & from != 0)
            .fold(0, |lines, (_, to)| lines | to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const IIR: u64 = 2;
    const FCR: u64 = 2;
    const LCR: u64 = 3;
    const MCR: u64 = 4;
    const LSR: u64 = 5;
    const MSR: u64 = 6;

    fn opened() -> Uart {
        let mut uart = Uart::default();
        uart.write(FCR, 0x81);
        uart.write(MCR, 0x0b);
        uart
    }

    /// The steps by which Linux's 8250 driver tells a 16550A from its relatives.
    #[test]
    fn is_a_16550a_to_a_driver_that_probes() {
        let mut uart = Uart::default();
        uart.write(IER, 0);
        assert_eq!(uart.read(IER), 0);
        uart.write(IER, 0xff);
        assert_eq!(uart.read(IER), 0x0f, "no sleep mode and no extra enable bits");
        uart.write(IER, 0);
        uart.write(MCR, 0x1a);
        assert_eq!(uart.read(MSR) & 0xf0, 0x90, "loopback leads RTS to CTS and OUT2 to DCD");
        uart.write(MCR, 0);
        uart.write(LCR, 0xbf);
        uart.write(FCR, 0);
        uart.write(LCR, 0);
        uart.write(FCR, 0x21);
        assert_eq!(uart.read(IIR) >> 5, 6, "a FIFO, and not of 64 bytes");
        uart.write(FCR, 0x03);
        uart.write(MCR, 0x10);
        (0..255).for_each(|byte| assert_eq!(uart.write(DATA, byte), None, "loopback leaves the line alone"));
        let mut depth = 0;
        while uart.read(LSR) & LSR_DATA != 0 {
            assert_eq!(uart.read(DATA), depth);
            depth += 1;
        }
        assert_eq!(depth, 16);
    }

    #[test]
    fn the_divisor_hides_behind_its_latch() {
        let mut uart = opened();
        uart.write(LCR, 0x83);
        assert_eq!(uart.write(DATA, 12), None, "a divisor is not sent");
        uart.write(IER, 1);
        assert_eq!((uart.read(DATA), uart.read(IER)), (12, 1));
        uart.write(LCR, 0x03);
        assert_eq!((uart.read(IER), uart.write(DATA, b'x')), (0, Some(b'x')));
    }

    #[test]
    fn the_transmit_interrupt_comes_on_asking_and_after_each_byte_and_goes_by_reading() {
        let mut uart = opened();
        assert!(!uart.interrupts());
        for _ in 0..2 {
            uart.write(IER, IER_TRANSMIT);
            assert!(uart.interrupts(), "asking while empty");
            assert_eq!(uart.read(IIR) & 0x0f, IIR_TRANSMIT);
            assert_eq!(uart.read(IIR) & 0x0f, IIR_NONE, "reading has taken it back");
            uart.write(IER, 0);
            assert!(uart.take_finished() && !uart.take_finished());
        }
        uart.write(IER, IER_TRANSMIT);
        uart.read(IIR);
        uart.write(DATA, b'x');
        assert!(uart.interrupts(), "a byte has left");
    }

    #[test]
    fn a_full_transmitter_says_so_and_interrupts_when_it_has_room_again() {
        let mut uart = opened();
        uart.write(IER, IER_TRANSMIT);
        uart.write(DATA, b'x');
        uart.set_ready(false);
        assert!(!uart.interrupts());
        assert_eq!(uart.read(LSR) & (LSR_HOLDING_EMPTY | LSR_EMPTY), 0);
        assert_eq!(uart.write(DATA, b'y'), Some(b'y'), "a guest that writes on is still heard");
        assert!(!uart.interrupts());
        uart.set_ready(true);
        assert_eq!(uart.read(IIR) & 0x0f, IIR_TRANSMIT);
        uart.set_ready(true);
        assert!(!uart.interrupts(), "room is told once");
        assert_eq!(uart.read(LSR), LSR_HOLDING_EMPTY | LSR_EMPTY);
    }

    #[test]
    fn received_bytes_interrupt_until_read() {
        let mut uart = opened();
        uart.write(IER, IER_RECEIVE);
        (0..8).for_each(|byte| uart.receive(byte));
        assert_eq!((uart.room(), uart.has_read_all()), (8, false));
        assert_eq!(uart.read(IIR), IIR_FIFO | IIR_RECEIVE, "the trigger level is reached");
        assert_eq!(uart.read(LSR) & LSR_DATA, LSR_DATA);
        assert_eq!(uart.read(DATA), 0);
        assert_eq!(uart.read(IIR), IIR_FIFO | IIR_TIMEOUT, "below it, time runs out at once");
        (1..8).for_each(|byte| assert_eq!(uart.read(DATA), byte));
        assert!(!uart.interrupts() && uart.has_read_all());
        assert_eq!(uart.read(DATA), 0, "an empty FIFO");
    }

    #[test]
    fn nothing_is_taken_before_the_guest_listens_or_in_loopback() {
        let mut uart = Uart::default();
        assert_eq!(uart.room(), 0);
        uart.write(MCR, MCR_RTS);
        assert_eq!(uart.room(), 1, "no FIFO yet");
        uart.write(FCR, FCR_ENABLE);
        assert_eq!(uart.room(), 16);
        uart.write(MCR, MCR_RTS | MCR_LOOP);
        assert_eq!(uart.room(), 0);
        uart.write(MCR, 0);
        uart.write(IER, IER_RECEIVE);
        assert_eq!(uart.room(), 16, "a guest without RTS that wants interrupts");
    }

    #[test]
    fn switching_the_fifo_keeps_bytes_and_clearing_it_drops_them() {
        let mut uart = opened();
        uart.receive(b'a');
        uart.write(FCR, 0);
        uart.write(FCR, 0x02);
        uart.write(FCR, FCR_ENABLE);
        assert!(!uart.has_read_all());
        uart.write(FCR, FCR_ENABLE | FCR_CLEAR_RECEIVER);
        assert!(uart.has_read_all());
    }

    #[test]
    fn a_break_is_a_line_status_with_a_zero_byte_even_into_a_full_fifo() {
        let mut uart = opened();
        uart.write(IER, IER_LINE);
        (0..16).for_each(|byte| uart.receive(byte));
        uart.receive_break();
        (0..16).for_each(|byte| assert_eq!(uart.read(DATA), byte));
        assert_eq!(uart.read(IIR) & 0x0f, IIR_LINE);
        let status = uart.read(LSR);
        assert_eq!(status & (LSR_BREAK | LSR_DATA | LSR_OVERRUN), LSR_BREAK | LSR_DATA);
        assert!(!uart.interrupts(), "reading the status has told it");
        assert_eq!((uart.read(LSR) & LSR_BREAK, uart.read(DATA)), (0, 0));
    }

    #[test]
    fn modem_changes_are_told_once() {
        let mut uart = opened();
        assert_eq!(uart.read(MSR), 0xb0);
        uart.write(IER, IER_MODEM);
        uart.write(MCR, MCR_LOOP | MCR_OUT1);
        assert_eq!(uart.read(IIR) & 0x0f, IIR_MODEM);
        assert_eq!(uart.read(MSR), 0x40 | 0x0b);
        uart.write(MCR, MCR_LOOP);
        assert_eq!((uart.read(MSR), uart.read(MSR)), (MSR_RING_ENDED, 0));
    }

    #[test]
    fn the_rest_is_memory() {
        let mut uart = Uart::default();
        uart.write(7, 0x5a);
        uart.write(4, 0xff);
        uart.write(8, 1);
        assert_eq!((uart.read(7), uart.read(4), uart.read(8)), (0x5a, 0x1f, 0xff));
    }
}
