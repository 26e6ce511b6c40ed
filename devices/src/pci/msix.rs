//! MSI-X: the vectors of a function, each a message that the guest chooses and can mask (PCI 3.0, section 6.8.2).

use base::irq::{Messages, Msi};

use super::overlay;

/// Bytes of a table entry: address, data, vector control.
pub const ENTRY_LEN: u64 = 16;
/// Most vectors of a function here.
pub const VECTORS_MAX: u16 = 128;

/// Vector control: masked.
const MASKED: u32 = 1;
/// Message control: the function uses MSI-X.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const MASK_ALL: u16 = 1 << 14;
/// What of the message control the guest can write.
pub const CONTROL_WRITABLE: u16 = ENABLE | MASK_ALL;

#[derive(Clone, Copy)]
struct Vector {
    msi: Msi,
    control: u32,
    pending: bool,
}

/// Table, pending bits and switches of one function.
pub struct Msix {
    vectors: Vec<Vector>,
    control: u16,
    master: bool,
}

impl Msix {
    /// `count` vectors, at most [`VECTORS_MAX`], all masked, the whole switched off.
    pub fn new(count: u16) -> Msix {
        let vector = Vector { msi: Msi::default(), control: MASKED, pending: false };
        Msix { vectors: vec![vector; usize::from(count.min(VECTORS_MAX))], control: 0, master: false }
    }

    /// Whether the function uses MSI-X, and not its pin.
    pub fn is_on(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// Whether there is such a vector.
    pub fn has(&self, vector: u16) -> bool {
        usize::from(vector) < self.vectors.len()
    }

    /// Takes over what the guest wrote: the message control word, and whether the function may send messages at all.
    pub fn switch(&mut self, control: u16, master: bool, messages: &dyn Messages) {
        (self.control, self.master) = (control, master);
        if !self.is_on() {
            self.forget();
        }
        self.send_pending(messages);
    }

    /// Forgets what is pending (reset of the device).
    pub fn forget(&mut self) {
        self.vectors.iter_mut().for_each(|vector| vector.pending = false);
    }

    /// Sends the message of `vector`, or remembers it while that is masked. A vector that does not exist is silent.
    pub fn fire(&mut self, vector: u16, messages: &dyn Messages) {
        let (on, open) = (self.is_on(), self.is_open());
        let Some(vector) = self.vectors.get_mut(usize::from(vector)) else { return };
        if open && vector.control & MASKED == 0 {
            messages.send(vector.msi);
        } else {
            vector.pending |= on;
        }
    }

    /// The message that [`Msix::fire`] would send now.
    pub fn message(&self, vector: u16) -> Option<Msi> {
        let vector = self.vectors.get(usize::from(vector)).filter(|vector| vector.control & MASKED == 0)?;
        self.is_open().then_some(vector.msi)
    }

    /// Whether vectors that are not masked themselves are sent.
    fn is_open(&self) -> bool {
        self.control & (ENABLE | MASK_ALL) == ENABLE && self.master
    }

    fn send_pending(&mut self, messages: &dyn Messages) {
        if self.is_open() {
            for vector in self.vectors.iter_mut().filter(|v| v.pending && v.control & MASKED == 0) {
                vector.pending = false;
                messages.send(vector.msi);
            }
        }
    }

    /// Reads the table.
    pub fn read_table(&self, at: u64, data: &mut [u8]) {
        data.fill(0);
        let (Ok(first), len) = (usize::try_from(at / ENTRY_LEN), data.len() as u64) else { return };
        let count = usize::try_from(len.div_ceil(ENTRY_LEN)).unwrap_or(0).saturating_add(1);
        for (vector, number) in self.vectors.iter().zip(0u64..).skip(first).take(count) {
            let mut entry = [0; 16];
            overlay(0, &vector.msi.address.to_le_bytes(), 0, &mut entry);
            overlay(8, &vector.msi.data.to_le_bytes(), 0, &mut entry);
            overlay(12, &vector.control.to_le_bytes(), 0, &mut entry);
            overlay(number * ENTRY_LEN, &entry, at, data);
        }
    }

    /// Writes the table: one or two aligned double words; other accesses have no effect (section 6.8.2).
    pub fn write_table(&mut self, at: u64, data: &[u8], messages: &dyn Messages) {
        if !matches!(data.len(), 4 | 8) || !at.is_multiple_of(data.len() as u64) {
            return;
        }
        for (word, at) in data.chunks_exact(4).zip((at..).step_by(4)) {
            self.write_word(at, word.try_into().map(u32::from_le_bytes).unwrap_or(0));
        }
        self.send_pending(messages);
    }

    fn write_word(&mut self, at: u64, value: u32) {
        let vector = usize::try_from(at / ENTRY_LEN).ok().and_then(|number| self.vectors.get_mut(number));
        let Some(vector) = vector else { return };
        let low = u64::from(u32::MAX);
        match at % ENTRY_LEN {
            0 => vector.msi.address = vector.msi.address & !low | u64::from(value & !3),
            4 => vector.msi.address = vector.msi.address & low | u64::from(value) << 32,
            8 => vector.msi.data = value,
            _ => vector.control = value & MASKED,
        }
    }

    /// Reads the pending bits. They cannot be written.
    pub fn read_pending(&self, at: u64, data: &mut [u8]) {
        let bits = self.vectors.iter().zip(0u32..).filter(|(vector, _)| vector.pending);
        let bits = bits.fold(0u128, |bits, (_, number)| bits | 1u128.checked_shl(number).unwrap_or(0));
        data.fill(0);
        overlay(0, &bits.to_le_bytes(), at, data);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Post(Mutex<Vec<u32>>);
    impl Messages for Post {
        fn send(&self, msi: Msi) {
            assert_eq!(msi.address, 0x1_fee0_1000);
            self.0.lock().unwrap().push(msi.data);
        }
        fn watch(&self, _: u32, _: Option<Msi>) {
            panic!("MSI-X needs no report");
        }
    }

    impl Post {
        fn take(&self) -> Vec<u32> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    /// Three vectors with the messages 40, 41 and 42, unmasked, and the function set to `control`.
    fn msix(control: u16, post: &Post) -> Msix {
        let mut msix = Msix::new(3);
        for number in 0..3u32 {
            let at = u64::from(number) * ENTRY_LEN;
            msix.write_table(at, &0x1_fee0_1003u64.to_le_bytes(), post);
            msix.write_table(at + 8, &(40 + number).to_le_bytes(), post);
            msix.write_table(at + 12, &[0, 0, 0, 0], post);
        }
        msix.switch(control, true, post);
        msix
    }

    fn pending(msix: &Msix) -> u64 {
        let mut bits = [0xff; 8];
        msix.read_pending(0, &mut bits);
        u64::from_le_bytes(bits)
    }

    #[test]
    fn messages_go_out_when_nothing_masks_them() {
        let post = Post::default();
        let mut msix = msix(ENABLE, &post);
        for vector in [2, 0, 3, 0xffff] {
            msix.fire(vector, &post);
        }
        assert_eq!(post.take(), [42, 40]);
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn what_is_masked_waits_and_goes_out_once() {
        let post = Post::default();
        let mut msix = msix(ENABLE | MASK_ALL, &post);
        [1, 1, 2].into_iter().for_each(|vector| msix.fire(vector, &post));
        assert_eq!((post.take(), pending(&msix)), (vec![], 0b110));
        msix.write_table(ENTRY_LEN + 12, &[1, 0, 0, 0], &post);
        msix.switch(ENABLE, true, &post);
        assert_eq!((post.take(), pending(&msix)), (vec![42], 0b010), "one is masked still");
        // Address and data may change meanwhile: what goes out is what stands there then.
        msix.write_table(ENTRY_LEN + 8, &77u64.to_le_bytes(), &post);
        assert_eq!((post.take(), pending(&msix)), (vec![77], 0), "eight bytes: data and control");
    }

    #[test]
    fn without_bus_mastering_messages_wait() {
        let post = Post::default();
        let mut msix = msix(ENABLE, &post);
        msix.switch(ENABLE, false, &post);
        msix.fire(0, &post);
        assert_eq!((post.take(), pending(&msix)), (vec![], 1));
        msix.switch(ENABLE, true, &post);
        assert_eq!((post.take(), pending(&msix)), (vec![40], 0));
    }

    #[test]
    fn switched_off_it_forgets() {
        let post = Post::default();
        let mut msix = msix(ENABLE | MASK_ALL, &post);
        msix.fire(0, &post);
        msix.switch(0, true, &post);
        msix.fire(1, &post);
        assert_eq!(pending(&msix), 0);
        msix.switch(ENABLE, true, &post);
        assert_eq!(post.take(), Vec::<u32>::new());
    }

    #[test]
    fn the_table_reads_as_it_was_written_and_takes_no_odd_writes() {
        let post = Post::default();
        let mut msix = msix(0, &post);
        for (at, data) in [
            (0, &[9u8][..]),
            (8, &[9; 2]),
            (2, &[9; 4]),
            (4, &[9; 8]),
            (48, &[9; 4]),
            (u64::MAX - 3, &[9; 4]),
        ] {
            msix.write_table(at, data, &post);
        }
        let mut data = [0xff; 8];
        msix.read_table(20, &mut data);
        assert_eq!(data, [1, 0, 0, 0, 41, 0, 0, 0]);
        msix.read_table(44, &mut data);
        assert_eq!(data, [0; 8], "beyond the end");
        msix.read_table(u64::MAX - 3, &mut data);
        assert_eq!(data, [0; 8]);
        msix.write_table(12, &[0xff; 4], &post);
        let mut word = [0; 4];
        msix.read_table(12, &mut word);
        assert_eq!(word, [1, 0, 0, 0], "reserved bits stay zero");
    }
}
