//! Tests' system tables: GDT, IDT and TSS in a [`Bench`]'s RAM.

use super::segment::system;
use super::state::{cr0, seg, DescriptorTable, Segment};
use super::testing::Bench;

/// Selectors of [`Bench::tables`]' GDT.
pub mod sel {
    pub const CODE64: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const USER32: u16 = 0x1b;
    pub const USER_DATA: u16 = 0x23;
    pub const USER64: u16 = 0x2b;
    pub const TSS: u16 = 0x30;
    pub const CODE32: u16 = 0x40;
    pub const CONFORMING: u16 = 0x48;
    pub const ABSENT: u16 = 0x50;
    pub const TSS2: u16 = 0x58;
    pub const GATE: u16 = 0x63;
    pub const LDT: u16 = 0x70;
    pub const READ_ONLY: u16 = 0x80;
    pub const EXECUTE_ONLY: u16 = 0x88;
    pub const BEYOND: u16 = 0x100;
}

pub const GDT: u64 = 0x4000;
pub const IDT: u64 = 0x5000;
pub const TSS: u64 = 0x6000;
pub const TSS2: u64 = 0x6800;
/// RSP0 and IST1 of the TSS.
pub const RSP0: u64 = 0xa000;
pub const IST1: u64 = 0xb000;
/// Handlers are 16 bytes apart.
pub const HANDLERS: u64 = 0x9000;

/// Where `vector`'s handler is.
pub fn handler(vector: u8) -> u64 {
    HANDLERS + 16 * vector as u64
}

/// A code or data descriptor: flat, present; `access` is the access byte, `flags` G D L AVL.
fn flat(access: u64, flags: u64) -> u64 {
    0xffff | access << 40 | 0xf << 48 | flags << 52
}

fn system_descriptor(base: u64, limit: u64, access: u64) -> u64 {
    limit & 0xffff | (base & 0xff_ffff) << 16 | access << 40
}

impl Bench {
    fn put(&mut self, at: u64, value: u64) {
        self.load(at, &value.to_le_bytes());
    }

    /// Writes an IDT gate; its size follows the mode.
    pub fn gate(&mut self, vector: u8, kind: u8, dpl: u8, ist: u8) {
        let long = self.cpu.lma();
        let code = if long { sel::CODE64 } else { sel::CODE32 };
        let low =
            handler(vector) | (code as u64) << 16 | (ist as u64) << 32 | (0x80 | (dpl as u64 * 32) | kind as u64) << 40;
        let size = if long { 16 } else { 8 };
        self.put(IDT + size * vector as u64, low);
        if long {
            self.put(IDT + size * vector as u64 + 8, 0);
        }
    }

    /// Removes a gate.
    pub fn no_gate(&mut self, vector: u8) {
        let size = if self.cpu.lma() { 16 } else { 8 };
        self.put(IDT + size * vector as u64, 0);
    }

    /// GDT, LDT-less, TSS and interrupt gates for vectors 0-63, those 3, 4 and 0x20 open to users.
    pub fn tables(mut self) -> Self {
        let gdt = [
            (sel::CODE64, flat(0x9a, 0xa)),
            (sel::DATA, flat(0x92, 0xc)),
            (sel::USER32, flat(0xfa, 0xc)),
            (sel::USER_DATA, flat(0xf2, 0xc)),
            (sel::USER64, flat(0xfa, 0xa)),
            (sel::TSS, system_descriptor(TSS, 0x2067, 0x89)),
            (sel::CODE32, flat(0x9a, 0xc)),
            (sel::CONFORMING, flat(0x9e, 0xc)),
            (sel::ABSENT, flat(0x12, 0xc)),
            (sel::TSS2, system_descriptor(TSS2, 0x67, 0x89)),
            (sel::LDT, system_descriptor(0x7000, 0xff, 0x82)),
            (sel::READ_ONLY, flat(0x90, 0xc)),
            (sel::EXECUTE_ONLY, flat(0x98, 0xc)),
        ];
        for (selector, descriptor) in gdt {
            self.put(GDT + (selector & 0xfff8) as u64, descriptor);
        }
        self.cpu.gdtr = DescriptorTable { base: GDT, limit: 0xff };
        self.cpu.idtr = DescriptorTable { base: IDT, limit: 0x3ff };
        for vector in 0..64 {
            let dpl = if matches!(vector, 3 | 4 | 0x20) { 3 } else { 0 };
            self.gate(vector, system::INT32, dpl, 0);
        }
        self.put(TSS + 4, if self.cpu.lma() { RSP0 } else { RSP0 | (sel::DATA as u64) << 32 });
        self.put(TSS + 0x24, IST1);
        // The I/O bitmap at 0x68; all ports forbidden.
        self.put(TSS + 0x64, 0x68 << 16);
        for at in (0x68..0x2068).step_by(8) {
            self.put(TSS + at, u64::MAX);
        }
        let kind = system::TSS32_BUSY;
        self.cpu.tr =
            Segment { base: TSS, limit: 0x2067, selector: sel::TSS, kind, present: true, ..Segment::default() };
        self.put(GDT + sel::TSS as u64, system_descriptor(TSS, 0x2067, 0x8b));
        self
    }

    /// 32-bit protected mode without paging at CPL 0, with [`Bench::tables`].
    pub fn protected(mut self, rip: u64) -> Self {
        let cpu = &mut self.cpu;
        cpu.cr0 = cr0::PE | cr0::NE | cr0::ET;
        let base =
            Segment { limit: u32::MAX, kind: 3, present: true, s: true, db: true, g: true, ..Segment::default() };
        cpu.segs = [Segment { selector: sel::DATA, ..base }; 6];
        cpu.segs[seg::CS] = Segment { kind: 11, selector: sel::CODE32, ..base };
        cpu.rip = rip;
        cpu.regs[4] = 0x8000;
        cpu.flush_all();
        cpu.update_modes();
        self.tables()
    }

    /// 64-bit mode with user pages and [`Bench::tables`], at CPL 0.
    pub fn long(self, rip: u64) -> Self {
        let mut bench = self.long_mode(rip, true).tables();
        bench.cpu.segs[seg::SS].selector = sel::DATA;
        bench
    }

    /// Drops to CPL 3 in the code segment's user counterpart.
    pub fn user(mut self) -> Self {
        let long = self.cpu.lma();
        let cs = if long { sel::USER64 } else { sel::USER32 };
        self.cpu.segs[seg::CS] = Segment { selector: cs, dpl: 3, ..self.cpu.segs[seg::CS] };
        for index in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            self.cpu.segs[index] = Segment { selector: sel::USER_DATA, dpl: 3, ..self.cpu.segs[index] };
        }
        self.cpu.cpl = 3;
        self.cpu.update_modes();
        self
    }

    /// Puts code at RIP.
    pub fn code(mut self, bytes: &[u8]) -> Self {
        let at = self.cpu.rip;
        self.load(at, bytes);
        self
    }

    /// Executes one instruction, whose exception is delivered; it must not need user space.
    pub fn step(&mut self) {
        assert_eq!(self.cpu.step(), None);
    }

    /// `count` 32-bit words of RAM.
    pub fn words(&self, at: u64, count: u64) -> Vec<u64> {
        (0..count).map(|index| self.word(at + 4 * index) & 0xffff_ffff).collect()
    }

    /// `count` 64-bit words of RAM.
    pub fn quads(&self, at: u64, count: u64) -> Vec<u64> {
        (0..count).map(|index| self.word(at + 8 * index)).collect()
    }
}
