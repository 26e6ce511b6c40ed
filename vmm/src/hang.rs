//! Where a guest hangs: what each vCPU does, by the name of the code it is in.
//!
//! What stands in the guest's registers and memory is a claim. It is read with bounds, and names come from the kernel's
//! file on this side alone.

use std::path::{Path, PathBuf};

use base::memory::Memory;
use boot::kernel::{Kernel, Symbols};
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress};

use crate::hv::{Activity, Stand};

/// Words of a stack that are looked at: the part in use of a kernel's 16 KiB is seldom larger.
const WORDS: u64 = 512;
/// Callers that are told of.
const CALLERS: usize = 8;
const PAGE: u64 = 4096;
/// RFLAGS: interrupts are taken.
const INTERRUPTS: u64 = 1 << 9;
/// EFER: 64-bit mode is on.
const LONG_MODE: u64 = 1 << 10;
/// A segment's selector: the ring.
const RING: u16 = 3;

/// Where all vCPUs stood when the run was ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Hang {
    /// How far the kernel is from where it was linked (KASLR); `None` if nothing tells, and then nothing has a name.
    #[serde(serialize_with = "hex")]
    pub slide: Option<u64>,
    /// Each vCPU.
    pub vcpus: Vec<Place>,
}

/// Where one vCPU stood.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Its number.
    pub vcpu: usize,
    /// In what.
    pub mode: Mode,
    /// It waited for an interrupt.
    pub halted: bool,
    /// It took interrupts.
    pub interrupts: bool,
    /// The address of its instruction.
    #[serde(serialize_with = "hex")]
    pub rip: Option<u64>,
    /// The function it was in.
    pub symbol: Option<String>,
    /// Places in code that stand on its stack as if they had called: a guess, the latest first.
    pub callers: Vec<String>,
}

/// What a vCPU executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The kernel.
    Kernel,
    /// A program.
    User,
    /// Something before 64-bit mode.
    Early,
    /// Nothing yet: no other vCPU has started it.
    NotStarted,
}

fn hex<S: serde::Serializer>(value: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
    value.map(|value| format!("{value:#x}")).serialize(serializer)
}

impl Hang {
    /// Reads it off the vCPUs; `image` is the kernel's file, of which names come if there are any.
    pub fn read(stands: &[Option<Stand>], memory: &Memory, image: Option<&Path>) -> Hang {
        let entry = stands.iter().flatten().map(|stand| stand.lstar).find(|lstar| *lstar != 0);
        let found = image.filter(|_| !stands.is_empty()).and_then(|image| symbols(image, entry));
        Hang::of(stands, memory, found.as_ref())
    }

    fn of(stands: &[Option<Stand>], memory: &Memory, found: Option<&(Symbols, u64)>) -> Hang {
        let name = |address: u64| {
            let (symbols, slide) = found?;
            symbols.name(address.checked_sub(*slide)?)
        };
        let known = stands.iter().enumerate().filter_map(|(vcpu, stand)| Some((vcpu, (*stand)?)));
        let vcpus = known.map(|(vcpu, stand)| place(vcpu, &stand, memory, &name)).collect();
        Hang { slide: found.map(|(_, slide)| *slide), vcpus }
    }

    /// One line for each vCPU, and one for what seems to have called.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for place in &self.vcpus {
            lines.push(place.line());
            if !place.callers.is_empty() {
                lines.push(format!("    called, as its stack seems to say, by {}", place.callers.join(", ")));
            }
        }
        lines
    }
}

impl Place {
    fn line(&self) -> String {
        let at = match (&self.symbol, self.rip) {
            (Some(symbol), _) => format!(" at {symbol}"),
            (None, Some(rip)) => format!(" at {rip:#x}"),
            (None, None) => String::new(),
        };
        let what = match (self.mode, self.halted, self.interrupts) {
            (Mode::NotStarted, ..) => return format!("  vcpu{}: not started", self.vcpu),
            (Mode::User, ..) => "runs a program",
            (Mode::Early, ..) => "runs code before 64-bit mode",
            (Mode::Kernel, true, true) => "waits for an interrupt in the kernel",
            (Mode::Kernel, true, false) => "has halted for good in the kernel, with interrupts off",
            (Mode::Kernel, false, true) => "runs the kernel",
            (Mode::Kernel, false, false) => "runs the kernel, with interrupts off",
        };
        format!("  vcpu{}: {what}{at}", self.vcpu)
    }
}

fn place(vcpu: usize, stand: &Stand, memory: &Memory, name: &dyn Fn(u64) -> Option<String>) -> Place {
    let mode = match stand.activity {
        Activity::Parked => Mode::NotStarted,
        _ if stand.sregs.cs.selector & RING == RING => Mode::User,
        _ if stand.sregs.efer & LONG_MODE == 0 => Mode::Early,
        _ => Mode::Kernel,
    };
    let in_kernel = mode == Mode::Kernel;
    Place {
        vcpu,
        mode,
        halted: stand.activity == Activity::Halted,
        interrupts: stand.regs.rflags & INTERRUPTS != 0,
        rip: (mode != Mode::NotStarted).then_some(stand.regs.rip),
        symbol: name(stand.regs.rip).filter(|_| in_kernel),
        callers: if in_kernel { callers(stand, memory, name) } else { Vec::new() },
    }
}

/// What on the stack looks like the way back to a caller: an address in code with a call before it.
fn callers(stand: &Stand, memory: &Memory, name: &dyn Fn(u64) -> Option<String>) -> Vec<String> {
    let physical = |address: u64| {
        arch::paging::translate(&stand.sregs, address, |at| memory.ram().read_obj(GuestAddress(at)).ok())
    };
    let byte = |address: u64| memory.ram().read_obj::<u8>(GuestAddress(physical(address)?)).ok();
    // A direct call has five bytes; one through a register or memory two to seven.
    let called = |back: u64| {
        byte(back.wrapping_sub(5)) == Some(0xe8)
            || [2, 3, 6, 7].into_iter().any(|len| byte(back.wrapping_sub(len)) == Some(0xff))
    };
    let mut found = Vec::new();
    let mut page = None;
    for nth in 0..WORDS {
        let Some(at) = (stand.regs.rsp & !7).checked_add(8 * nth) else { break };
        // The tables are asked once a page.
        let base = match page {
            Some((first, base)) if first == at / PAGE => base,
            _ => {
                let Some(base) = physical(at - at % PAGE) else { break };
                page = Some((at / PAGE, base));
                base
            }
        };
        let Ok(word) = memory.ram().read_obj::<u64>(GuestAddress(base.saturating_add(at % PAGE))) else {
            break;
        };
        // What would come back to the beginning of a function comes back to nobody.
        let name = name(word).filter(|name| !name.ends_with("+0x0") && called(word));
        if let Some(name) = name {
            found.push(name);
            if found.len() == CALLERS {
                break;
            }
        }
    }
    found
}

/// The symbols of the kernel in `image`, and its slide: its own, or those of a file beside it. `entry` has to be one of
/// them, or they are another kernel's. Before the guest has told of it, a kernel is where it was linked if it was unpacked on
/// this side: it is its own unpacking that moves it.
fn symbols(image: &Path, entry: Option<u64>) -> Option<(Symbols, u64)> {
    let placed = |symbols: Symbols, unpacked: bool| {
        let slide = entry.map_or(unpacked.then_some(0), |entry| symbols.slide(entry));
        slide.map(|slide| (symbols, slide))
    };
    let own = Kernel::open(image).ok().and_then(|kernel| Symbols::of(&kernel));
    let own = own.and_then(|symbols| placed(symbols, true));
    own.or_else(|| beside(image).iter().find_map(|path| placed(Symbols::read(path)?, false)))
}

/// Where a build or a distribution puts the symbols of an image.
fn beside(image: &Path) -> Vec<PathBuf> {
    let mut places = Vec::new();
    let Some(dir) = image.parent() else { return places };
    if let Some(tree) = dir.to_str().and_then(|dir| dir.strip_suffix("arch/x86/boot")) {
        places.extend(["vmlinux", "System.map"].map(|name| Path::new(tree).join(name)));
    }
    let name = image.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match name.strip_prefix("vmlinuz-") {
        None => places.push(dir.join("System.map")),
        Some(release) => {
            places.extend(["System.map", "vmlinux"].map(|name| dir.join(format!("{name}-{release}"))));
            let modules = dir.join("../lib/modules").join(release);
            places.extend(["System.map", "build/vmlinux"].map(|name| modules.join(name)));
            places.push(format!("/usr/lib/debug/boot/vmlinux-{release}").into());
        }
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::{kvm_regs, kvm_sregs};

    const TEXT: u64 = 0xffff_ffff_8100_0000;
    const SLIDE: u64 = 0x1200_0000;
    const MAP: &str = "ffffffff81000000 T _stext\nffffffff81000100 T schedule\nffffffff81000200 t wait\n\
        ffffffff81000300 T entry_SYSCALL_64\nffffffff81000400 T _etext\n";

    fn map() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("System.map-1.2"), MAP).unwrap();
        let image = dir.path().join("vmlinuz-1.2");
        (dir, image)
    }

    /// Memory in which the kernel's text, and a stack behind it, are one page each; the stack holds these words.
    fn memory(words: &[u64]) -> (Memory, u64) {
        let memory = Memory::new(&[(0, 1 << 20)]).unwrap();
        let put = |at: u64, value: u64| memory.ram().write_obj(value, GuestAddress(at)).unwrap();
        let slot = |level: u64| (TEXT + SLIDE) >> (12 + 9 * level) & 511;
        for (level, table) in [(3, 0x1000), (2, 0x2000), (1, 0x3000)] {
            put(table + 8 * slot(level), (table + 0x1000) | 3);
        }
        put(0x4000 + 8 * slot(0), 0x5003);
        put(0x4000 + 8 * (slot(0) + 1), 0x6003);
        for (nth, word) in (0..).zip(words) {
            put(0x6800 + 8 * nth, *word);
        }
        (memory, TEXT + SLIDE + 0x1800)
    }

    fn stand(rip: u64, rsp: u64) -> Stand {
        let mut sregs =
            kvm_sregs { cr0: 1 << 31, cr3: 0x1000, cr4: 1 << 5, efer: LONG_MODE, ..Default::default() };
        sregs.cs.selector = 0x10;
        let regs = kvm_regs { rip, rsp, rflags: INTERRUPTS, ..Default::default() };
        Stand { activity: Activity::Running, regs, sregs, lstar: TEXT + SLIDE + 0x300 }
    }

    #[test]
    fn each_vcpu_is_told_of_by_the_name_of_what_it_does() {
        let (_dir, image) = map();
        let back = TEXT + SLIDE + 0x150;
        let (memory, rsp) = memory(&[7, back, TEXT + SLIDE + 0x250, u64::MAX, back + 0x10]);
        // Before the first, a direct call; before the last, one through a register.
        memory.ram().write_obj(0xe8u8, GuestAddress(0x5150 - 5)).unwrap();
        memory.ram().write_obj(0xffu8, GuestAddress(0x5160 - 2)).unwrap();
        let running = stand(TEXT + SLIDE + 0x204, rsp);
        let mut halted = Stand { activity: Activity::Halted, ..stand(TEXT + SLIDE + 0x101, 0) };
        let idle = halted;
        halted.regs.rflags = 2;
        let mut user = stand(0x40_1000, rsp);
        user.sregs.cs.selector = 0x33;
        let parked = Stand { activity: Activity::Parked, lstar: 0, ..stand(0xfff0, 0) };
        let early = Stand { sregs: kvm_sregs::default(), ..stand(0x7c00, 0) };
        let all = [running, idle, halted, user, parked, early].map(Some);
        let hang = Hang::read(&all, &memory, Some(&image));
        assert_eq!(hang.slide, Some(SLIDE));
        assert_eq!(
            hang.lines(),
            [
                "  vcpu0: runs the kernel at wait+0x4",
                "    called, as its stack seems to say, by schedule+0x50, schedule+0x60",
                "  vcpu1: waits for an interrupt in the kernel at schedule+0x1",
                "  vcpu2: has halted for good in the kernel, with interrupts off at schedule+0x1",
                "  vcpu3: runs a program at 0x401000",
                "  vcpu4: not started",
                "  vcpu5: runs code before 64-bit mode at 0x7c00",
            ]
        );
        let json = serde_json::to_value(&hang).unwrap();
        assert_eq!(json["slide"], "0x12000000");
        assert_eq!(
            json["vcpus"][0],
            serde_json::json!({"vcpu": 0, "mode": "kernel", "halted": false, "interrupts": true,
                "rip": "0xffffffff93000204", "symbol": "wait+0x4", "callers": ["schedule+0x50", "schedule+0x60"]})
        );
        assert_eq!(json["vcpus"][4]["mode"], "not-started");
        assert_eq!(json["vcpus"][4]["rip"], serde_json::Value::Null);
    }

    #[test]
    fn what_cannot_be_placed_has_an_address_alone() {
        let (_dir, image) = map();
        let (memory, rsp) = memory(&[]);
        let at = TEXT + SLIDE + 0x204;
        let line = "  vcpu0: runs the kernel at 0xffffffff93000204";
        // Before the kernel has said where it is; another kernel; no symbols; no image.
        for (lstar, image) in [
            (0, Some(image.as_path())),
            (TEXT + SLIDE + 0x308, Some(image.as_path())),
            (TEXT + SLIDE + 0x300, Some(Path::new("/nowhere/vmlinuz-1.2"))),
            (TEXT + SLIDE + 0x300, None),
        ] {
            let hang = Hang::read(&[Some(Stand { lstar, ..stand(at, rsp) }), None], &memory, image);
            assert_eq!((hang.slide, hang.lines()), (None, vec![line.to_owned()]), "{lstar:#x}");
        }
    }

    #[test]
    fn a_stack_that_leads_nowhere_is_left() {
        let (_dir, image) = map();
        let (memory, _) = memory(&[]);
        for rsp in
            [0, 7, 0x8000_0000_0000, TEXT + SLIDE + 0x1ff8, TEXT + SLIDE + 0x5000, u64::MAX - 3, u64::MAX]
        {
            let hang = Hang::read(&[Some(stand(TEXT + SLIDE + 0x204, rsp))], &memory, Some(&image));
            assert_eq!(hang.lines(), ["  vcpu0: runs the kernel at wait+0x4"], "{rsp:#x}");
        }
    }
}
