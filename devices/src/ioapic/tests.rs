//! The I/O APIC under test: registers, edges, levels, messages, and a model to agree with.

use super::*;
use proptest::prelude::*;

#[derive(Debug, Default)]
struct Sent {
    messages: Mutex<Vec<Msi>>,
    watches: Mutex<Vec<(u32, Option<Msi>)>>,
}

impl Sent {
    fn take(&self) -> Vec<Msi> {
        std::mem::take(&mut self.messages.lock().unwrap())
    }
    fn watches(&self) -> Vec<(u32, Option<Msi>)> {
        std::mem::take(&mut self.watches.lock().unwrap())
    }
}

impl Messages for Sent {
    fn send(&self, msi: Msi) {
        self.messages.lock().unwrap().push(msi);
    }
    fn watch(&self, pin: u32, msi: Option<Msi>) {
        self.watches.lock().unwrap().push((pin, msi));
    }
}

fn apic() -> (IoApic, Arc<Sent>) {
    let sent = Arc::new(Sent::default());
    (IoApic::new(24, sent.clone()), sent)
}

fn get(apic: &mut IoApic, register: u32) -> u32 {
    apic.write(SELECT, &register.to_le_bytes());
    let mut data = [0; 4];
    apic.read(DATA, &mut data);
    u32::from_le_bytes(data)
}

fn put(apic: &mut IoApic, register: u32, value: u32) {
    apic.write(SELECT, &register.to_le_bytes());
    apic.write(DATA, &value.to_le_bytes());
}

/// Writes an entry as Linux does: the upper half, then the lower.
fn route(apic: &mut IoApic, pin: u32, entry: u64) {
    put(apic, 0x11 + 2 * pin, half(entry, true));
    put(apic, 0x10 + 2 * pin, half(entry, false));
}

fn entry(apic: &mut IoApic, pin: u32) -> u64 {
    u64::from(get(apic, 0x11 + 2 * pin)) << 32 | u64::from(get(apic, 0x10 + 2 * pin))
}

const DESTINATION_3: u64 = 3 << 56;

#[test]
fn tells_its_version_its_pins_and_its_id() {
    let (mut apic, _) = apic();
    assert_eq!(get(&mut apic, VERSION), 23 << 16 | 0x20);
    put(&mut apic, ID, u32::MAX);
    assert_eq!((get(&mut apic, ID), get(&mut apic, ARBITRATION)), (ID_BITS, ID_BITS));
    assert_eq!(get(&mut apic, 0x10), 1 << 16, "masked at the start");
    for nowhere in [0x03, 0x0f, 0x10 + 48, 0xff, u32::MAX] {
        put(&mut apic, nowhere, 0);
        assert_eq!(get(&mut apic, nowhere), u32::MAX);
    }
}

#[test]
fn has_as_many_inputs_as_are_wanted() {
    let sent = Arc::new(Sent::default());
    let mut apic = IoApic::new(1000, sent.clone());
    assert_eq!(get(&mut apic, VERSION) >> 16, 239);
    route(&mut apic, 239, 0x31);
    apic.line(239).pulse();
    assert_eq!(sent.take().len(), 1, "beyond what 8 bits select");
    apic.set_pins(7);
    assert_eq!(get(&mut apic, VERSION) >> 16, 6);
    apic.line(239).pulse();
    apic.set_pins(1000);
    assert_eq!((sent.take().len(), get(&mut apic, VERSION) >> 16), (0, 6));
}

#[test]
fn an_edge_is_one_message() {
    let (mut apic, sent) = apic();
    let line = apic.line(4);
    route(&mut apic, 4, DESTINATION_3 | 0x31);
    line.pulse();
    assert_eq!(sent.take(), [Msi { address: 0xfee0_3000, data: 0x31 }]);
    line.set(true);
    line.set(true);
    line.set(false);
    assert_eq!(sent.take().len(), 1, "only the rise counts");
    assert_eq!(sent.watches(), [], "edges need no report of their end");
}

#[test]
fn an_edge_on_a_masked_pin_waits() {
    let (mut apic, sent) = apic();
    let line = apic.line(4);
    line.pulse();
    line.pulse();
    assert_eq!(sent.take(), []);
    route(&mut apic, 4, 0x31);
    assert_eq!(sent.take().len(), 1, "edges merge as in the local APIC");
    route(&mut apic, 4, 0x31 | MASKED);
    route(&mut apic, 4, 0x31);
    assert_eq!(sent.take(), [], "and are sent once");
}

#[test]
fn a_level_interrupts_until_it_is_low_at_the_end_of_an_interrupt() {
    let (mut apic, sent) = apic();
    let line = apic.line(9);
    route(&mut apic, 9, LEVEL | 0x42);
    let message = Msi { address: 0xfee0_0000, data: 0x42 | 1 << 14 | 1 << 15 };
    assert_eq!(sent.watches(), [(9, Some(message))]);
    line.set(true);
    assert_eq!(sent.take(), [message]);
    assert_ne!(entry(&mut apic, 9) & REMOTE_IRR, 0);
    line.set(false);
    line.set(true);
    assert_eq!(sent.take(), [], "it is being handled");
    apic.eoi(0x41);
    assert_eq!(sent.take(), [], "another vector");
    apic.write(EOI, &[0x42, 0, 0, 0]);
    assert_eq!(sent.take(), [message], "still high");
    line.set(false);
    apic.eoi(0x42);
    assert_eq!(entry(&mut apic, 9) & REMOTE_IRR, 0);
    assert_eq!(sent.take(), []);
}

#[test]
fn masking_keeps_the_watch_on_a_level_that_is_being_handled() {
    let (mut apic, sent) = apic();
    let line = apic.line(9);
    route(&mut apic, 9, LEVEL | 0x42);
    line.set(true);
    sent.watches();
    put(&mut apic, 0x10 + 18, half(LEVEL | MASKED | 0x42, false));
    apic.eoi(0x42);
    assert_eq!((sent.take().len(), sent.watches()), (1, vec![]));
    put(&mut apic, 0x10 + 18, half(LEVEL | 0x42, false));
    assert_eq!((sent.take().len(), sent.watches()), (1, vec![]), "unmasked while high");
    route(&mut apic, 9, 0x42);
    assert_eq!(sent.watches(), [(9, None)], "edge-triggered now");
}

#[test]
fn switching_to_edge_and_back_ends_a_level_interrupt() {
    let (mut apic, sent) = apic();
    apic.line(9).set(true);
    route(&mut apic, 9, LEVEL | 0x42);
    assert_eq!(sent.take().len(), 1);
    put(&mut apic, 0x10 + 18, half(MASKED | 0x42, false));
    put(&mut apic, 0x10 + 18, half(LEVEL | 0x42, false));
    assert_eq!(sent.take().len(), 1, "sent anew");
}

#[test]
fn a_message_carries_modes_and_destination() {
    let (mut apic, sent) = apic();
    // Lowest priority, logical; destination 0x80 with 3 above its 8 bits.
    route(&mut apic, 0, 0x80 << 56 | 3 << 49 | 1 << 11 | 1 << 8 | 0x55);
    apic.line(0).pulse();
    assert_eq!(sent.take(), [Msi { address: 0xfee8_0064, data: 0x155 }]);
    // A non-maskable interrupt.
    route(&mut apic, 0, 4 << 8);
    apic.line(0).pulse();
    assert_eq!(sent.take(), [Msi { address: 0xfee0_0000, data: 0x400 }]);
}

#[test]
fn a_line_to_nowhere_and_odd_accesses_are_harmless() {
    let (mut apic, sent) = apic();
    apic.line(24).pulse();
    apic.line(u32::MAX).set(true);
    apic.write(DATA, &[]);
    apic.write(0x20, &[1; 8]);
    apic.write(SELECT, &[1]);
    let mut data = [0xff; 8];
    apic.read(DATA, &mut data);
    assert_eq!(data, [0x20, 0, 23, 0, 0, 0, 0, 0]);
    assert_eq!(sent.take(), []);
}

#[derive(Clone, Debug)]
enum Step {
    Set(bool),
    Pulse,
    Route { vector: u8, level: bool, masked: bool },
    Eoi(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        any::<bool>().prop_map(Step::Set),
        Just(Step::Pulse),
        (0x30u8..0x33, any::<bool>(), any::<bool>()).prop_map(|(vector, level, masked)| Step::Route {
            vector,
            level,
            masked
        }),
        (0x30u8..0x33).prop_map(Step::Eoi),
    ]
}

/// What an input is, told in the terms of its user: how many interrupts it owes.
struct Model {
    vector: u8,
    level: bool,
    masked: bool,
    high: bool,
    /// Edge: a rise nobody was told of. Level: unused.
    owed: bool,
    /// Level: a processor is handling it.
    busy: bool,
    sent: Vec<u8>,
}

impl Model {
    fn settle(&mut self) {
        let due = if self.level { self.high && !self.busy } else { self.owed };
        if due && !self.masked {
            self.owed = false;
            self.busy = self.level;
            self.sent.push(self.vector);
        }
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Set(high) => {
                self.owed |= high && !self.high && !self.level;
                self.high = high;
            }
            Step::Pulse => {
                self.take(&Step::Set(true));
                self.take(&Step::Set(false));
            }
            Step::Route { vector, level, masked } => {
                (self.vector, self.level, self.masked) = (vector, level, masked);
                self.owed &= !level;
                self.busy &= level;
            }
            Step::Eoi(vector) => self.busy &= vector != self.vector,
        }
        self.settle();
    }
}

proptest! {
    #[test]
    fn agrees_with_a_model_of_each_input(steps in prop::collection::vec((0u8..3, step()), 0..60)) {
        let (mut apic, sent) = apic();
        for pin in 0..3u8 {
            let mut model = Model {
                vector: 0, level: false, masked: true, high: false, owed: false, busy: false, sent: Vec::new(),
            };
            let line = apic.line(u32::from(pin));
            for (to, step) in &steps {
                if *to != pin && !matches!(step, Step::Eoi(_)) {
                    continue;
                }
                model.take(step);
                match *step {
                    Step::Set(high) => line.set(high),
                    Step::Pulse => line.pulse(),
                    Step::Eoi(vector) => apic.eoi(vector),
                    Step::Route { vector, level, masked } => {
                        let bits = [(level, LEVEL), (masked, MASKED)];
                        let bits = bits.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
                        put(&mut apic, 0x10 + 2 * u32::from(pin), half(bits | u64::from(vector), false));
                    }
                }
            }
            let vectors: Vec<u8> = sent.take().iter().map(|msi| msi.data.to_le_bytes()[0]).collect();
            prop_assert_eq!(&vectors, &model.sent, "pin {}", pin);
            // Leave the pin quiet for the next one's interrupts to be told apart.
            line.set(false);
            put(&mut apic, 0x10 + 2 * u32::from(pin), half(MASKED, false));
            sent.take();
        }
    }
}
