//! The root: host bridge and bus 0, reached by ECAM and by the ports of configuration mechanism 1.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base::bus::{Effect, Registers};
use base::{Fail, Result, Why};

use super::Function;
use super::config::{Config, Identity, LEN};

/// Bytes of ECAM for one bus: 4 KiB for each of 8 functions of 32 devices.
pub const ECAM_LEN: u64 = 1 << 20;
/// Port of the address register. It is one of 32 bits: the three ports behind it, accessed for themselves, belong to
/// other chips (0xcf9 resets).
pub const ADDRESS_PORT: u64 = 0xcf8;
/// First port of the data register.
pub const DATA_PORT: u64 = 0xcfc;
/// Ports of the data register.
pub const DATA_LEN: u64 = 4;
/// Devices of a bus, the host bridge among them.
const DEVICES_MAX: usize = 32;

/// Red Hat's generic PCIe host bridge: software knows it, and knows no quirk of it.
const HOST_BRIDGE: Identity =
    Identity { ids: [0x1b36, 0x0008], subsystem: [0x1af4, 0x1100], revision: 0, class: [6, 0, 0] };

/// The bus and all that is on it. Clones are the same one.
#[derive(Clone)]
pub struct Root {
    functions: Arc<Mutex<Vec<Box<dyn Function>>>>,
}

impl Default for Root {
    fn default() -> Self {
        let bridge: Box<dyn Function> = Box::new(Bridge(Config::new(&HOST_BRIDGE)));
        Root { functions: Arc::new(Mutex::new(vec![bridge])) }
    }
}

impl Root {
    fn lock(&self) -> MutexGuard<'_, Vec<Box<dyn Function>>> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device number that the next function gets.
    ///
    /// # Errors
    /// The bus is full.
    pub fn next(&self) -> Result<u8> {
        let devices = self.lock().len();
        let free = u8::try_from(devices).ok().filter(|_| devices < DEVICES_MAX);
        free.ok_or_else(|| {
            Fail::new(Why::Usage, "place a device on the PCI bus")
                .because(format!("it holds {DEVICES_MAX} devices, the host bridge among them"))
                .hint("use fewer devices, or --transport mmio")
        })
    }

    /// Puts a function on the bus, as function 0 of the device [`Root::next`].
    pub fn add(&self, function: Box<dyn Function>) {
        self.lock().push(function);
    }

    /// The memory-mapped configuration space: [`ECAM_LEN`] bytes.
    pub fn ecam(&self) -> Box<dyn Registers> {
        Box::new(Ecam(self.clone()))
    }

    /// The registers at [`ADDRESS_PORT`] and at [`DATA_PORT`].
    pub fn ports(&self) -> [Box<dyn Registers>; 2] {
        let address = Arc::new(AtomicU32::new(0));
        [Box::new(Address(address.clone())), Box::new(Data { root: self.clone(), address })]
    }

    /// Gives `access` the function at `number` (device and function, as an address has them), and the register that
    /// `at` is. An access that goes beyond its `len` bytes is cut there, as is one beyond the end of the space.
    fn with<T>(&self, number: u64, at: u64, access: impl FnOnce(&mut dyn Function, usize) -> T) -> Option<T> {
        let at = usize::try_from(at).ok().filter(|at| *at < LEN)?;
        let device = usize::try_from(number >> 3).ok().filter(|_| number & 7 == 0)?;
        let mut functions = self.lock();
        Some(access(functions.get_mut(device)?.as_mut(), at))
    }
}

/// At most the bytes of `data` that lie below `end`, for an access at `at`.
fn reach(at: u64, len: usize, end: u64) -> usize {
    usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX).min(len)
}

/// Enhanced configuration access (PCIe 3.0, section 7.2.2).
struct Ecam(Root);

/// What a conventional function has of its 4 KiB.
const END: u64 = LEN as u64;

impl Registers for Ecam {
    fn read(&mut self, at: u64, data: &mut [u8]) {
        let (number, at) = (at >> 12, at & 0xfff);
        let reach = reach(at, data.len(), END);
        let data = data.get_mut(..reach).unwrap_or_default();
        self.0.with(number, at, |function, at| function.read_config(at, data));
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        let (number, at) = (at >> 12, at & 0xfff);
        let data = data.get(..reach(at, data.len(), END)).unwrap_or_default();
        self.0.with(number, at, |function, at| function.write_config(at, data)).unwrap_or_default()
    }
}

/// The address register of configuration mechanism 1 (PCI 3.0, section 3.2.2.3.2).
struct Address(Arc<AtomicU32>);

/// The address register means something.
const ENABLED: u32 = 1 << 31;
/// What of the address register can be written.
const ADDRESS_WRITABLE: u32 = 0x80ff_fffc;

impl Registers for Address {
    fn read(&mut self, at: u64, data: &mut [u8]) {
        if at == 0 && data.len() == 4 {
            data.copy_from_slice(&self.0.load(Ordering::SeqCst).to_le_bytes());
        }
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        if let (0, Ok(address)) = (at, data.try_into()) {
            self.0.store(u32::from_le_bytes(address) & ADDRESS_WRITABLE, Ordering::SeqCst);
        }
        Effect::None
    }
}

/// Its data register.
struct Data {
    root: Root,
    address: Arc<AtomicU32>,
}

impl Data {
    /// Device and function, and the register, that an access at offset `at` means.
    fn target(&self, at: u64) -> Option<(u64, u64)> {
        let address = self.address.load(Ordering::SeqCst);
        let (bus, number) = (address >> 16 & 0xff, u64::from(address >> 8 & 0xff));
        let meant = address & ENABLED != 0 && bus == 0 && at < DATA_LEN;
        meant.then(|| (number, u64::from(address & 0xfc) + at))
    }
}

impl Registers for Data {
    fn read(&mut self, at: u64, data: &mut [u8]) {
        if let Some((number, register)) = self.target(at) {
            let data = data.get_mut(..reach(at, data.len(), DATA_LEN)).unwrap_or_default();
            self.root.with(number, register, |function, at| function.read_config(at, data));
        }
    }

    fn write(&mut self, at: u64, data: &[u8]) -> Effect {
        let Some((number, register)) = self.target(at) else { return Effect::None };
        let data = data.get(..reach(at, data.len(), DATA_LEN)).unwrap_or_default();
        self.root.with(number, register, |function, at| function.write_config(at, data)).unwrap_or_default()
    }
}

/// The host bridge: a header and nothing behind it.
struct Bridge(Config);

impl Function for Bridge {
    fn read_config(&mut self, at: usize, data: &mut [u8]) {
        self.0.read(at, data);
    }

    fn write_config(&mut self, at: usize, data: &[u8]) -> Effect {
        self.0.write(at, data);
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A function that is what was written to it.
    struct Blank([u8; LEN]);

    impl Function for Blank {
        fn read_config(&mut self, at: usize, data: &mut [u8]) {
            data.copy_from_slice(&self.0[at..at + data.len()]);
        }
        fn write_config(&mut self, at: usize, data: &[u8]) -> Effect {
            self.0[at..at + data.len()].copy_from_slice(data);
            if data == [0xfe] { Effect::Reset } else { Effect::None }
        }
    }

    fn root() -> Root {
        let root = Root::default();
        assert_eq!(root.next().unwrap(), 1);
        root.add(Box::new(Blank([0; LEN])));
        root
    }

    fn read(chip: &mut dyn Registers, at: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        data[..len].fill(0xff);
        chip.read(at, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    #[test]
    fn both_ways_lead_to_the_same_registers() {
        let root = root();
        let (mut ecam, [mut address, mut data]) = (root.ecam(), root.ports());
        assert_eq!(read(ecam.as_mut(), 0, 4), 0x0008_1b36, "the host bridge");
        assert_eq!(read(ecam.as_mut(), 8, 4), 0x0600_0000);
        address.write(0, &0x8000_0840u32.to_le_bytes());
        assert_eq!(read(address.as_mut(), 0, 4), 0x8000_0840);
        data.write(0, &[1, 2, 3, 4]);
        data.write(3, &[9]);
        assert_eq!(read(ecam.as_mut(), 0x8040, 4), 0x0903_0201);
        assert_eq!(read(ecam.as_mut(), 0x803f, 8), 0x09_0302_0100);
        assert_eq!((read(data.as_mut(), 2, 2), read(data.as_mut(), 1, 1)), (0x0903, 2));
        assert_eq!(ecam.write(0x8044, &[0xfe]), Effect::Reset, "consequences are handed on");
        assert_eq!(data.write(0, &[0xfe]), Effect::Reset);
    }

    #[test]
    fn nobody_answers_elsewhere() {
        let root = root();
        let (mut ecam, [mut address, mut data]) = (root.ecam(), root.ports());
        for at in [2 << 15, 31 << 15, 0x9000, 0x8100, 0x8fff, ECAM_LEN - 1, u64::MAX] {
            assert_eq!(read(ecam.as_mut(), at, 4), 0xffff_ffff, "{at:#x}");
            assert_eq!(ecam.write(at, &[0xfe]), Effect::None);
        }
        // Disabled; another bus; no such function; no such device.
        for target in [0x0000_0800u32, 0x8001_0800, 0x8000_0900, 0x8000_1000] {
            address.write(0, &target.to_le_bytes());
            assert_eq!(read(data.as_mut(), 0, 4), 0xffff_ffff, "{target:#x}");
        }
    }

    #[test]
    fn odd_accesses_stay_within_the_register() {
        let root = root();
        let (mut ecam, [mut address, mut data]) = (root.ecam(), root.ports());
        assert_eq!(read(ecam.as_mut(), 0x80fe, 4), 0xffff_0000, "cut at the end of the space");
        ecam.write(0x80fe, &[1, 2, 3, 4]);
        assert_eq!(read(ecam.as_mut(), 0x80fe, 2), 0x0201);
        // The address register is written whole, or not at all.
        address.write(0, &0x8000_0800u32.to_le_bytes());
        address.write(3, &[1]);
        address.write(1, &[0x0e]);
        assert_eq!((read(address.as_mut(), 0, 4), read(address.as_mut(), 3, 1)), (0x8000_0800, 0xff));
        data.write(2, &[5, 6, 7, 8]);
        assert_eq!(read(data.as_mut(), 0, 4), 0x0605_0000, "cut at the end of the register");
        assert_eq!(read(data.as_mut(), 2, 4), 0xffff_0605);
    }

    #[test]
    fn the_bus_gets_full() {
        let root = Root::default();
        for number in 1..32 {
            assert_eq!(root.next().unwrap(), number);
            root.add(Box::new(Blank([0; LEN])));
        }
        let fail = root.next().unwrap_err().to_string();
        assert!(fail.contains("32 devices") && fail.contains("hint: "), "{fail}");
    }
}
