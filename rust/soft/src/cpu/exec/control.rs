//! MOV to and from control and debug registers, CLTS, LMSW, SMSW. SDM vol. 2; vol. 3, 2.5, 4.10.4,
//! 9.8 (mode switches), 17.2.
//!
//! What the CPU model does not have is a reserved bit: CR4's writable bits follow from CPUID.

use super::segments::{bind_mov_sreg, bind_store, need_no_umip};
use crate::cpu::bind::{Binder, Kind};
use crate::cpu::debug::{dr6, dr7};
use crate::cpu::op::{Handler, Op};
use crate::cpu::state::{cr0, cr4, efer, seg, CodeSize};
use crate::cpu::table::Row;
use crate::cpu::{Cpu, Stop, R};
use crate::rows;
use iced_x86::Register;

/// CR0 bits that exist.
const CR0_KNOWN: u64 =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;
/// CR4 bits that choose how addresses translate.
const CR4_PAGING: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::PKS;

impl Cpu {
    /// The CR4 bits the CPU model has. Without any CPUID set, all that the interpreter knows.
    pub fn cr4_allowed(&mut self) -> u64 {
        let always = cr4::TSD | cr4::DE | cr4::PSE | cr4::PAE | cr4::MCE | cr4::PGE | cr4::PCE;
        let always = always | cr4::OSFXSR | cr4::OSXMMEXCPT;
        let optional = [
            (1, 3, 1, cr4::VME | cr4::PVI),
            (1, 2, 17, cr4::PCIDE),
            (1, 2, 26, cr4::OSXSAVE),
            (7, 1, 0, cr4::FSGSBASE),
            (7, 1, 7, cr4::SMEP),
            (7, 1, 20, cr4::SMAP),
            (7, 2, 2, cr4::UMIP),
            (7, 2, 3, cr4::PKE),
            (7, 2, 31, cr4::PKS),
        ];
        let none_set = self.cpuid.entries.is_empty();
        let has =
            |&&(leaf, register, bit, _): &&(u32, usize, u32, u64)| none_set || self.cpuid.has(leaf, register, bit);
        optional.iter().filter(has).fold(always, |mask, &(.., bits)| mask | bits)
    }

    /// MOV to CR0, LMSW: checks and effects.
    pub fn set_cr0(&mut self, value: u64) -> R {
        let old = self.cr0;
        let new = value & CR0_KNOWN | cr0::ET;
        let wrong = value >> 32 != 0
            || new & cr0::PG != 0 && new & cr0::PE == 0
            || new & cr0::NW != 0 && new & cr0::CD == 0
            || new & cr0::PG == 0 && self.cr4 & cr4::PCIDE != 0;
        if wrong {
            return Err(self.gp(0));
        }
        if (old ^ new) & cr0::PG != 0 {
            self.switch_paging(new & cr0::PG != 0)?;
        }
        self.cr0 = new;
        if (old ^ new) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.flush_all();
        }
        if new & cr0::PE == 0 {
            self.cpl = 0;
        }
        self.update_modes();
        Ok(())
    }

    /// Turns paging on or off, entering or leaving long mode with it.
    fn switch_paging(&mut self, on: bool) -> R {
        let cs_long = self.segs[seg::CS].l;
        if !on {
            if self.code_size == CodeSize::B64 {
                return Err(self.gp(0));
            }
            self.efer &= !efer::LMA;
            return Ok(());
        }
        if self.efer & efer::LME != 0 {
            let tss16 = self.tr.kind & 8 == 0;
            if self.cr4 & cr4::PAE == 0 || cs_long || tss16 {
                return Err(self.gp(0));
            }
            self.efer |= efer::LMA;
        } else if self.cr4 & cr4::PAE != 0 && !self.load_pdptrs() {
            return Err(self.gp(0));
        }
        Ok(())
    }

    /// PAE paging proper: its page-directory pointers are loaded with CR3.
    fn pae_paging(&self) -> bool {
        self.paging() && self.cr4 & cr4::PAE != 0 && !self.lma()
    }

    /// MOV to CR3.
    pub fn set_cr3(&mut self, value: u64) -> R {
        let keep = self.cr4 & cr4::PCIDE != 0 && value >> 63 != 0;
        let new = if keep { value & !(1 << 63) } else { value };
        if self.lma() && new >> self.phys_bits != 0 {
            return Err(self.gp(0));
        }
        let old = std::mem::replace(&mut self.cr3, new);
        if self.pae_paging() && !self.load_pdptrs() {
            self.cr3 = old;
            return Err(self.gp(0));
        }
        self.cr3_loaded(keep);
        Ok(())
    }

    /// MOV to CR4.
    pub fn set_cr4(&mut self, value: u64) -> R {
        let (old, changed) = (self.cr4, self.cr4 ^ value);
        let pcid_on = changed & value & cr4::PCIDE != 0;
        let wrong = value & !self.cr4_allowed() != 0
            || self.lma() && value & cr4::PAE == 0
            || pcid_on && (!self.lma() || self.cr3 & 0xfff != 0);
        if wrong {
            return Err(self.gp(0));
        }
        self.cr4 = value;
        if changed & CR4_PAGING != 0 && self.pae_paging() && !self.load_pdptrs() {
            self.cr4 = old;
            return Err(self.gp(0));
        }
        if changed & CR4_PAGING != 0 {
            self.flush_all();
        }
        self.update_modes();
        Ok(())
    }

    /// A debug register access: CPL, CR4.DE's aliases, general detection.
    fn debug_register(&mut self, number: u8) -> R<usize> {
        let alias = matches!(number, 4 | 5);
        if number > 7 || alias && self.cr4 & cr4::DE != 0 {
            return Err(self.ud());
        }
        self.need_cpl0()?;
        if self.dr[7] & dr7::GD != 0 {
            return Err(self.debug_exception(dr6::BD));
        }
        Ok(if alias { number + 2 } else { number } as usize)
    }
}

unsafe fn from_cr<const N: u8>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.need_cpl0()?;
    let value = match N {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        _ => cpu.board.cr8(),
    };
    cpu.set_wide(op.dst, value);
    Ok(())
}

unsafe fn to_cr<const N: u8>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.need_cpl0()?;
    cpu.serialise();
    let value = cpu.wide(op.src);
    match N {
        0 => cpu.set_cr0(value)?,
        2 => cpu.cr2 = value,
        3 => cpu.set_cr3(value)?,
        4 => cpu.set_cr4(value)?,
        _ if value > 15 => return Err(cpu.gp(0)),
        _ => cpu.board.set_cr8(value),
    }
    if N == 2 {
        return Ok(());
    }
    Err(Stop::Leave)
}

unsafe fn from_dr(cpu: &mut Cpu, op: &Op) -> R {
    let number = cpu.debug_register(op.src)?;
    cpu.set_wide(op.dst, cpu.dr[number]);
    Ok(())
}

unsafe fn to_dr(cpu: &mut Cpu, op: &Op) -> R {
    let number = cpu.debug_register(op.dst)?;
    let value = cpu.wide(op.src);
    if number >= 6 && value >> 32 != 0 {
        return Err(cpu.gp(0));
    }
    cpu.dr[number] = match number {
        // RTM (bit 16) is not in the model and reads as one.
        6 => value & 0xe00f | dr6::FIXED,
        7 => value & 0xffff_2bff | dr7::FIXED,
        _ => value,
    };
    cpu.breakpoints_changed();
    Err(Stop::Leave)
}

impl Cpu {
    /// A control register's operand: 64 bits in 64-bit mode, else 32.
    fn wide(&self, offset: u8) -> u64 {
        let value: u64 = self.reg(offset);
        if self.code_size == CodeSize::B64 {
            value
        } else {
            value & 0xffff_ffff
        }
    }

    fn set_wide(&mut self, offset: u8, value: u64) {
        if self.code_size == CodeSize::B64 {
            self.set_reg(offset, value);
        } else {
            self.set_reg(offset, value as u32);
        }
    }
}

/// MOV's forms with a segment, control or debug register; `None` when this is another MOV.
pub fn bind_mov_special(b: &mut Binder) -> Option<Handler> {
    let (target, source) = (b.ins.op_register(0), b.ins.op_register(1));
    match (source, target) {
        (Register::CR0, _) => Some(from_cr::<0>),
        (Register::CR2, _) => Some(from_cr::<2>),
        (Register::CR3, _) => Some(from_cr::<3>),
        (Register::CR4, _) => Some(from_cr::<4>),
        (Register::CR8, _) => Some(from_cr::<8>),
        (_, Register::CR0) => Some(to_cr::<0>),
        (_, Register::CR2) => Some(to_cr::<2>),
        (_, Register::CR3) => Some(to_cr::<3>),
        (_, Register::CR4) => Some(to_cr::<4>),
        (_, Register::CR8) => Some(to_cr::<8>),
        _ if source.is_dr() => Some(from_dr),
        _ if target.is_dr() => Some(to_dr),
        _ => bind_mov_sreg(b),
    }
}

unsafe fn clts(cpu: &mut Cpu, _: &Op) -> R {
    cpu.need_cpl0()?;
    cpu.cr0 &= !cr0::TS;
    cpu.update_modes();
    Err(Stop::Leave)
}

/// LMSW changes PE, MP, EM, TS, and cannot clear PE.
unsafe fn lmsw<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.need_cpl0()?;
    let value = if MEM { cpu.rd_op::<u16>(op)? } else { cpu.reg::<u16>(op.dst) } as u64;
    let keep = cpu.cr0 & !(cr0::MP | cr0::EM | cr0::TS);
    cpu.set_cr0(keep | value & (cr0::PE | cr0::MP | cr0::EM | cr0::TS))?;
    Err(Stop::Leave)
}

unsafe fn smsw<const WIDTH: usize>(cpu: &mut Cpu, op: &Op) -> R {
    if cpu.protected() || cpu.vm86() {
        need_no_umip(cpu)?;
    }
    match WIDTH {
        0 => return cpu.wr_op(op, cpu.cr0 as u16),
        2 => cpu.set_reg(op.dst, cpu.cr0 as u16),
        4 => cpu.set_reg(op.dst, cpu.cr0 as u32),
        _ => cpu.set_reg(op.dst, cpu.cr0),
    }
    Ok(())
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    System "SDM vol. 2, CLTS LMSW SMSW; vol. 3, 2.5" {
        Clts => |_| Some(clts),
        Lmsw => |b| Some(if b.kind(0) == Kind::Mem { lmsw::<true> } else { lmsw::<false> }),
        Smsw => |b| bind_store(b, smsw::<0>, [smsw::<2>, smsw::<4>, smsw::<8>]),
    }
};

#[cfg(test)]
mod tests {
    use crate::cpu::fixture::{handler, sel};
    use crate::cpu::state::{cr0, cr4, efer, CodeSize, CpuidEntry};
    use crate::cpu::testing::Bench;

    const CODE: u64 = 0x1_0000;

    fn gp(result: crate::cpu::R) -> bool {
        result.is_err()
    }

    #[test]
    fn test_cr0_combinations_that_fault() {
        let mut bench = Bench::new(1 << 20).protected(CODE);
        let cpu = &mut bench.cpu;
        assert!(gp(cpu.set_cr0(cr0::PG)));
        assert!(gp(cpu.set_cr0(cr0::PE | cr0::NW)));
        assert!(gp(cpu.set_cr0(1 << 32 | cr0::PE)));
        assert_eq!(cpu.cr0, cr0::PE | cr0::NE | cr0::ET);
        let cpu = &mut Bench::new(1 << 20).long(CODE).cpu;
        assert!(gp(cpu.set_cr0(cr0::PE)));
        assert!(gp(cpu.set_cr4(0)));
        assert!(gp(cpu.set_cr4(cr4::PAE | cr4::LA57)));
        assert!(gp(cpu.set_cr3(1 << 52)));
        cpu.cr3 = 0x1005;
        assert!(gp(cpu.set_cr4(cr4::PAE | cr4::PCIDE)));
    }

    #[test]
    fn test_cr4_follows_cpuid() {
        let cpu = &mut Bench::new(1 << 20).long(CODE).cpu;
        cpu.cpuid.entries = vec![CpuidEntry { function: 7, ebx: 1 << 7, ..CpuidEntry::default() }];
        assert!(gp(cpu.set_cr4(cr4::PAE | cr4::SMAP)));
        assert!(cpu.set_cr4(cr4::PAE | cr4::SMEP).is_ok());
    }

    #[test]
    fn test_protected_mode_to_64_bit_mode() {
        // ljmp CODE64:0x1_0007; (64-bit) mov rax, cr0
        let code = [0xea, 7, 0, 1, 0, sel::CODE64 as u8, 0, 0x0f, 0x20, 0xc0];
        let mut bench = Bench::new(1 << 20).long_mode(0, false);
        (bench.cpu.efer, bench.cpu.cr4) = (0, 0);
        let mut bench = bench.protected(CODE).code(&code);
        let cpu = &mut bench.cpu;
        assert!(cpu.set_cr4(cr4::PAE).is_ok());
        assert_eq!(cpu.write_msr(0xc000_0080, efer::LME, false), Ok(()));
        assert!(cpu.set_cr0(cpu.cr0 | cr0::PG).is_ok());
        assert_eq!((cpu.efer, cpu.code_size), (efer::LME | efer::LMA, CodeSize::B32));
        bench.step();
        assert_eq!((bench.cpu.code_size, bench.cpu.rip), (CodeSize::B64, CODE + 7));
        bench.step();
        assert_eq!(bench.cpu.regs[0], bench.cpu.cr0);
        assert_eq!(bench.cpu.write_msr(0xc000_0080, 0, false), Err(crate::cpu::Gp));
    }

    #[test]
    fn test_privileged_moves_in_user_mode_are_gp() {
        for code in [[0x0f, 0x20, 0xc0], [0x0f, 0x22, 0xd8], [0x0f, 0x21, 0xf8], [0x0f, 0x06, 0x90]] {
            let mut bench = Bench::new(1 << 20).long(CODE).user().code(&code);
            bench.step();
            assert_eq!(bench.cpu.rip, handler(13), "{code:x?}");
        }
    }

    #[test]
    fn test_lmsw_cannot_clear_pe() {
        let mut bench = Bench::new(1 << 20).protected(CODE).code(&[0x0f, 1, 0xf0]);
        bench.cpu.regs[0] = cr0::TS;
        bench.step();
        assert_eq!(bench.cpu.cr0 & 0xf, cr0::PE | cr0::TS);
    }

    #[test]
    fn test_debug_registers_with_gd_raise_db() {
        let mut bench = Bench::new(1 << 20).long(CODE).code(&[0x0f, 0x23, 0xc0]);
        bench.cpu.dr[7] |= 1 << 13;
        bench.step();
        assert_eq!(bench.cpu.rip, handler(1));
        assert_eq!(bench.cpu.dr[6], 0xffff_0ff0 | 1 << 13);
        assert_eq!(bench.cpu.dr[7], 0x400);
    }
}
