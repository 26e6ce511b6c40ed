//! Registers of the boot processor at the entry of each boot protocol.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use crate::layout::{GDT, PAGE_TABLES};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always one.
const RFLAGS: u64 = 2;

/// Selectors of the Linux boot protocol: `__BOOT_CS` and `__BOOT_DS`.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TSS: u16 = 0x20;

/// A flat segment; `kind` is the descriptor's type field (Intel SDM volume 3, section 3.4.5.1).
fn flat(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// The descriptor table that the segment registers below come from, to be written at [`GDT`]: a guest that
/// reloads a selector finds what it had.
pub fn gdt(long: bool) -> [u8; 48] {
    let mut table = [0; 48];
    let code: u64 = if long { 0x00af_9b00_0000_ffff } else { 0x00cf_9b00_0000_ffff };
    let data: u64 = 0x00cf_9300_0000_ffff;
    let tss: u64 = 0x0000_8b00_0000_0067;
    for (slot, entry) in table.chunks_exact_mut(8).zip([0, 0, code, data, tss, 0]) {
        slot.copy_from_slice(&entry.to_le_bytes());
    }
    table
}

fn segments(sregs: &mut kvm_sregs, long: bool) {
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 47;
    // No interrupt table: an exception before the guest has set its own is a triple fault, and is reported.
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = flat(CODE, 0xb, long);
    let data = flat(DATA, 0x3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: TSS, type_: 0xb, present: 1, ..Default::default() };
}

/// 64-bit Linux boot protocol (`Documentation/arch/x86/boot.rst`): long mode, paging on, RSI at the zero page.
pub fn linux64(sregs: &mut kvm_sregs, entry: u64, zero_page: u64, stack: u64) -> kvm_regs {
    segments(sregs, true);
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer |= EFER_LME | EFER_LMA;
    kvm_regs { rip: entry, rsi: zero_page, rsp: stack, rbp: stack, rflags: RFLAGS, ..Default::default() }
}

/// PVH (Xen's `docs/misc/pvh.pandoc`): 32-bit protected mode, paging off, EBX at the start info.
pub fn pvh(sregs: &mut kvm_sregs, entry: u64, start_info: u64) -> kvm_regs {
    segments(sregs, false);
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    kvm_regs { rip: entry, rbx: start_info, rflags: RFLAGS, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_segment_registers_agree_with_the_table() {
        for long in [true, false] {
            let mut sregs = kvm_sregs::default();
            segments(&mut sregs, long);
            let table = gdt(long);
            for segment in [sregs.cs, sregs.ds] {
                let at = usize::from(segment.selector);
                let entry = u64::from_le_bytes(table[at..at + 8].try_into().unwrap());
                assert_eq!(entry >> 40 & 0xf, u64::from(segment.type_));
                assert_eq!(entry >> 53 & 1, u64::from(segment.l));
                assert_eq!(entry >> 54 & 1, u64::from(segment.db));
            }
        }
    }
}
