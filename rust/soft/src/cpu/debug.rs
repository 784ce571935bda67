//! Debug registers: breakpoints, single step, guest debugging by user space.
//!
//! SDM vol. 3, 17.2-17.3; `KVM_SET_GUEST_DEBUG` of the KVM API.

use super::state::{cr4, rflags, seg};
use super::{attention, vector, Cpu, Exit, Fault, Stop, R};
use std::sync::atomic::Ordering::Relaxed;

/// DR6 bits.
#[allow(missing_docs)]
pub mod dr6 {
    pub const HITS: u64 = 0xf;
    pub const BD: u64 = 1 << 13;
    pub const BS: u64 = 1 << 14;
    pub const BT: u64 = 1 << 15;
    /// Bits that read as one.
    pub const FIXED: u64 = 0xffff_0ff0;
}

/// DR7 bits.
#[allow(missing_docs)]
pub mod dr7 {
    pub const ENABLES: u64 = 0xff;
    pub const GD: u64 = 1 << 13;
    /// Reads as one.
    pub const FIXED: u64 = 0x400;
}

/// Values of `Cpu::shadow`, as in `kvm_vcpu_events.interrupt.shadow`.
#[allow(missing_docs)]
pub mod shadow {
    pub const MOV_SS: u8 = 1;
    pub const STI: u8 = 2;
}

/// `kvm_guest_debug.control` bits.
#[allow(missing_docs)]
pub mod guest_debug {
    pub const ENABLE: u32 = 1;
    pub const SINGLE_STEP: u32 = 2;
    pub const USE_SW_BP: u32 = 1 << 16;
    pub const USE_HW_BP: u32 = 1 << 17;
}

/// What is noted about the instruction in progress, and what is watched.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trace {
    /// TF was set at its start; software interrupts and system calls clear it here too.
    pub(crate) tf: bool,
    /// It was IRET: the RF it loaded is for the next instruction.
    pub(crate) loaded_rf: bool,
    /// Data and I/O breakpoints it met, as DR6 bits.
    pub(crate) hits: u64,
    /// Those of a MOV SS: they are due after the next instruction.
    pub(crate) deferred: u64,
    /// Data breakpoints are enabled: no access may take the fast path.
    pub(crate) watching: bool,
    /// User space is owed a step's exit, after the writes the instruction posted.
    exit_due: bool,
}

/// What a breakpoint waits for: DR7's R/W field.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Condition {
    Execute,
    Write,
    Port,
    Access,
}

/// One enabled breakpoint.
#[derive(Clone, Copy)]
struct Breakpoint {
    bit: u64,
    condition: Condition,
    address: u64,
    size: u64,
}

impl Breakpoint {
    fn meets(&self, address: u64, size: u64) -> bool {
        address.wrapping_sub(self.address) < self.size || self.address.wrapping_sub(address) < size
    }
}

/// The breakpoints a set of debug registers enables. SDM vol. 3, 17.2.4.
fn breakpoints(dr: [u64; 8]) -> impl Iterator<Item = Breakpoint> {
    (0..4).filter(move |index| dr[7] >> (2 * index) & 3 != 0).map(move |index| {
        let field = dr[7] >> (16 + 4 * index) & 15;
        let condition = match field & 3 {
            0 => Condition::Execute,
            1 => Condition::Write,
            2 => Condition::Port,
            _ => Condition::Access,
        };
        let size = [1, 2, 8, 4][(field >> 2) as usize];
        Breakpoint { bit: 1 << index, condition, address: dr[index] & !(size - 1), size }
    })
}

impl Cpu {
    /// Stops with #DB; `bits` go into DR6 when it is delivered.
    #[cold]
    pub fn debug_exception(&mut self, bits: u64) -> Stop {
        self.fault = Fault { vector: vector::DB, error: None, payload: bits };
        Stop::Fault
    }

    /// Stops with a debug exit to user space.
    #[cold]
    pub fn debug_exit(&mut self, exception: u8, pc: u64, bits: u64) -> Stop {
        self.exit = Some(Exit::Debug { exception, pc, dr6: dr6::FIXED | bits, dr7: self.dr_now()[7] });
        Stop::Exit
    }

    /// DR6 and DR7 at the delivery of #DB: the breakpoint bits are set anew, BD BS BT add up, GD
    /// is cleared so that the handler can use the registers.
    pub(super) fn note_debug_exception(&mut self, bits: u64) {
        self.dr[6] = self.dr[6] & !dr6::HITS | dr6::FIXED | bits;
        self.dr[7] &= !dr7::GD;
    }

    fn host_breakpoints(&self) -> bool {
        self.guest_debug & guest_debug::USE_HW_BP != 0
    }

    /// The debug registers in force: user space's, when it debugs by hardware breakpoints.
    fn dr_now(&self) -> [u64; 8] {
        if self.host_breakpoints() {
            self.guest_debug_dr
        } else {
            self.dr
        }
    }

    /// Whether any breakpoint is enabled.
    fn breakpoints_armed(&self) -> bool {
        let dr7 = if self.host_breakpoints() { self.guest_debug_dr[7] } else { self.dr[7] };
        dr7 & dr7::ENABLES != 0
    }

    /// Reacts to changed debug registers or guest-debug settings; call it after setting either.
    pub fn breakpoints_changed(&mut self) {
        let data = |b: Breakpoint| matches!(b.condition, Condition::Write | Condition::Access);
        self.trace.watching = breakpoints(self.dr_now()).any(data);
        self.trace.exit_due &= self.guest_debug & guest_debug::SINGLE_STEP != 0;
        self.update_mmu_mode();
        if self.single_step_wanted() {
            self.shared.attention.fetch_or(attention::SINGLE, Relaxed);
        }
    }

    /// TF, RF, enabled breakpoints or guest debugging ask for one instruction at a time.
    pub fn single_step_wanted(&self) -> bool {
        let flags = self.sys_flags as u64 & (rflags::TF | rflags::RF) != 0;
        flags || self.breakpoints_armed() || self.guest_debug & guest_debug::SINGLE_STEP != 0
    }

    /// Linear address of the instruction at RIP.
    fn pc(&self) -> u64 {
        let linear = self.rip.wrapping_add(self.seg_base[seg::CS]);
        if self.legacy {
            linear & 0xffff_ffff
        } else {
            linear
        }
    }

    /// Instruction breakpoints, before an instruction: `Err(Fault)` with #DB or `Err(Exit)`.
    pub fn debug_before(&mut self) -> R {
        let pc = self.pc();
        if std::mem::take(&mut self.trace.exit_due) {
            return Err(self.debug_exit(vector::DB, pc, dr6::BS));
        }
        let flags = self.sys_flags as u64;
        let Trace { watching, deferred, .. } = self.trace;
        self.trace = Trace { tf: flags & rflags::TF != 0, hits: deferred, watching, ..Trace::default() };
        if flags & rflags::RF != 0 || self.shadow == shadow::MOV_SS {
            return Ok(());
        }
        let here = |b: &Breakpoint| b.condition == Condition::Execute && b.address == pc;
        let bits = breakpoints(self.dr_now()).filter(here).fold(0, |bits, b| bits | b.bit);
        match bits {
            0 => Ok(()),
            _ if self.host_breakpoints() => Err(self.debug_exit(vector::DB, pc, bits)),
            _ => Err(self.debug_exception(bits)),
        }
    }

    /// Data and I/O breakpoints and single step, after an instruction or a step of a repeated one
    /// ended with `stop`; RIP is the next one's. The #DB is a trap. MOV SS holds it off for one
    /// instruction. SDM vol. 3, 17.3.1, 6.8.3.
    pub fn debug_after(&mut self, stop: Stop) -> R {
        if !self.trace.loaded_rf {
            self.sys_flags &= !(rflags::RF as u32);
        }
        if self.shadow == shadow::MOV_SS {
            self.trace.deferred = self.trace.hits;
            return Ok(());
        }
        let bits = self.trace.hits;
        if self.host_breakpoints() && bits != 0 || self.guest_debug & guest_debug::SINGLE_STEP != 0 {
            return self.step_exit(stop, bits);
        }
        let bits = bits | if self.trace.tf { dr6::BS } else { 0 };
        if bits != 0 {
            return Err(self.debug_exception(bits));
        }
        Ok(())
    }

    /// Tells user space of a step; after the writes the instruction posted.
    fn step_exit(&mut self, stop: Stop, bits: u64) -> R {
        let step = self.guest_debug & guest_debug::SINGLE_STEP != 0;
        if stop == Stop::ExitAfter || !self.io.queue.is_empty() {
            self.trace.exit_due = step;
            return Ok(());
        }
        let pc = self.pc();
        Err(self.debug_exit(vector::DB, pc, bits | if step { dr6::BS } else { 0 }))
    }

    /// Notes a data access; called for every access while `Trace::watching`.
    #[cold]
    pub(crate) fn data_breakpoint(&mut self, linear: u64, size: u64, write: bool) {
        let meets = |b: &Breakpoint| {
            let kind = b.condition == Condition::Access || write && b.condition == Condition::Write;
            kind && b.meets(linear, size)
        };
        self.trace.hits |= breakpoints(self.dr_now()).filter(meets).fold(0, |bits, b| bits | b.bit);
    }

    /// Notes a port access; I/O breakpoints need CR4.DE.
    #[inline]
    pub(crate) fn port_breakpoint(&mut self, port: u16, size: u64) {
        if self.breakpoints_armed() && self.cr4 & cr4::DE != 0 {
            let meets = |b: &Breakpoint| b.condition == Condition::Port && b.meets(port as u64, size);
            self.trace.hits |= breakpoints(self.dr_now()).filter(meets).fold(0, |bits, b| bits | b.bit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::fixture::{handler, sel};
    use crate::cpu::run::RunEnd;
    use crate::cpu::testing::Bench;

    const CODE: u64 = 0x1_0000;

    #[test]
    fn test_tf_set_by_popf_traps_after_the_next_instruction() {
        // popfq; nop; nop
        let mut bench = Bench::new(1 << 20).long(CODE).code(&[0x9d, 0x90, 0x90]);
        bench.load(0x8000, &(rflags::TF | 2).to_le_bytes());
        bench.step();
        assert_eq!(bench.cpu.rip, CODE + 1);
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.dr[6]), (handler(1), dr6::FIXED | dr6::BS));
        assert_eq!(bench.word(bench.cpu.regs[4]), CODE + 2);
        assert_eq!(bench.word(bench.cpu.regs[4] + 16), rflags::TF | 2);
        assert_eq!(bench.cpu.sys_flags as u64 & rflags::TF, 0);
    }

    #[test]
    fn test_mov_ss_holds_off_the_single_step() {
        // mov ss, eax; nop
        let mut bench = Bench::new(1 << 20).long(CODE).code(&[0x8e, 0xd0, 0x90]);
        bench.cpu.set_rflags(rflags::TF);
        bench.cpu.regs[0] = sel::DATA as u64;
        bench.step();
        assert_eq!(bench.cpu.rip, CODE + 2);
        bench.step();
        assert_eq!(bench.cpu.rip, handler(1));
    }

    #[test]
    fn test_data_breakpoint_on_mov_ss_waits_for_the_next_instruction() {
        // mov ss, [0x2_0000]; nop; out 0x80, al
        let code = [0x8e, 0x14, 0x25, 0, 0, 2, 0, 0x90, 0xe6, 0x80];
        let mut bench = Bench::new(1 << 20).long(CODE).code(&code);
        bench.load(0x2_0000, &sel::DATA.to_le_bytes());
        bench.load(handler(1), &[0xe6, 0x81]);
        (bench.cpu.dr[0], bench.cpu.dr[7]) = (0x2_0000, dr7::FIXED | 1 | 3 << 16);
        bench.cpu.breakpoints_changed();
        assert_eq!(bench.cpu.run(), RunEnd::Exit(Exit::Io { port: 0x81, size: 1, write: Some(0) }));
        assert_eq!(bench.word(bench.cpu.regs[4]), CODE + 8);
        assert_eq!(bench.cpu.dr[6], dr6::FIXED | 1);
    }

    #[test]
    fn test_instruction_breakpoint_is_a_fault_that_rf_passes() {
        let mut bench = Bench::new(1 << 20).long(CODE).code(&[0x90, 0x90]);
        (bench.cpu.dr[0], bench.cpu.dr[7]) = (CODE, dr7::FIXED | 1);
        bench.cpu.breakpoints_changed();
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.dr[6]), (handler(1), dr6::FIXED | 1));
        assert_eq!(bench.word(bench.cpu.regs[4]), CODE);
        bench.cpu.rip = CODE;
        bench.cpu.set_rflags(rflags::RF);
        bench.step();
        assert_eq!(bench.cpu.rip, CODE + 1);
        assert_eq!(bench.cpu.sys_flags as u64 & rflags::RF, 0);
    }

    #[test]
    fn test_data_breakpoint_traps_after_the_store_even_on_a_cached_page() {
        // mov [0x2_0004], eax, twice
        let store = [0x89, 0x04, 0x25, 4, 0, 2, 0];
        let mut bench = Bench::new(1 << 20).long(CODE).code(&[store, store].concat());
        bench.step();
        (bench.cpu.dr[3], bench.cpu.dr[7]) = (0x2_0006, dr7::FIXED | 0xc0 | 0b0101 << 28);
        bench.cpu.breakpoints_changed();
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.dr[6]), (handler(1), dr6::FIXED | 8));
        assert_eq!(bench.word(bench.cpu.regs[4]), CODE + 14);
    }

    #[test]
    fn test_io_breakpoint_needs_cr4_de() {
        // out 0x80, al
        for (de, rip) in [(0, CODE + 2), (cr4::DE, handler(1))] {
            let mut bench = Bench::new(1 << 20).long(CODE).code(&[0xe6, 0x80]);
            bench.cpu.cr4 |= de;
            (bench.cpu.dr[0], bench.cpu.dr[7]) = (0x80, dr7::FIXED | 1 | 2 << 16);
            bench.cpu.breakpoints_changed();
            let _ = bench.cpu.step();
            assert_eq!(bench.cpu.rip, rip);
        }
    }

    #[test]
    fn test_guest_debug_single_step_exits_with_the_next_rip() {
        let mut bench = Bench::new(1 << 20).long(CODE).code(&[0x90, 0xcc]);
        bench.cpu.guest_debug = guest_debug::ENABLE | guest_debug::SINGLE_STEP | guest_debug::USE_SW_BP;
        bench.cpu.breakpoints_changed();
        let step = Exit::Debug { exception: 1, pc: CODE + 1, dr6: dr6::FIXED | dr6::BS, dr7: 0x400 };
        assert_eq!(bench.cpu.run(), RunEnd::Exit(step));
        let breakpoint = Exit::Debug { exception: 3, pc: CODE + 1, dr6: dr6::FIXED, dr7: 0x400 };
        assert_eq!(bench.cpu.run(), RunEnd::Exit(breakpoint));
        assert_eq!(bench.cpu.rip, CODE + 1);
    }

    #[test]
    fn test_breakpoints_decode_length_and_alignment() {
        let mut dr = [0; 8];
        dr[1] = 0x1003;
        dr[7] = 0b1100 | 0b1101 << 20;
        let found: Vec<_> = breakpoints(dr).collect();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].bit, found[0].address, found[0].size), (2, 0x1000, 4));
        assert!(found[0].meets(0xffe, 4) && !found[0].meets(0x1004, 8));
    }
}
