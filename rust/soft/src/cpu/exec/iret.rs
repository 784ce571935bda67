//! IRET in every mode, and the software interrupts. SDM vol. 2, IRET, INT n/INTO/INT3/INT1, BOUND.
//!
//! IRETQ is frequent (Linux serialises with it): it changes no translation and drops no code.

use super::far::Target;
use crate::cpu::access::Int;
use crate::cpu::bind::Binder;
use crate::cpu::debug::guest_debug;
use crate::cpu::event::{Event, Source};
use crate::cpu::interrupt::Stack;
use crate::cpu::op::{Handler, Op};
use crate::cpu::segment::vm86_segment;
use crate::cpu::state::{cr4, rflags, seg};
use crate::cpu::table::Row;
use crate::cpu::{attention, vector, Cpu, Stop, R};
use crate::rows;

const ARITHMETIC: u64 = rflags::CF | rflags::PF | rflags::AF | rflags::ZF | rflags::SF | rflags::OF;

/// What IRET takes from the stack first.
struct Frame {
    offset: u64,
    selector: u16,
    flags: u64,
}

impl Cpu {
    /// The RFLAGS bits that IRET of `width` bytes changes at the present CPL. SDM vol. 2, IRET.
    fn iret_mask(&self, width: u64) -> u64 {
        let mut mask = ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
        if width > 2 {
            mask |= rflags::RF | rflags::AC | rflags::ID;
        }
        if self.cpl <= self.iopl() {
            mask |= rflags::IF;
        }
        if self.cpl == 0 {
            mask |= rflags::IOPL;
            if width > 2 {
                mask |= rflags::VIF | rflags::VIP;
            }
        }
        mask
    }

    fn merge_flags(&mut self, image: u64, mask: u64) {
        self.trace.loaded_rf = true;
        let merged = self.rflags() & !mask | image & mask;
        self.set_rflags(merged);
    }

    /// IRET of `width` bytes.
    fn iret(&mut self, width: u64, next: u64) -> R {
        // NMIs are unblocked even when IRET faults. SDM vol. 3, 6.7.1.
        self.nmi_blocked = false;
        if self.pending.nmi {
            self.shared.raise(attention::EVENT);
        }
        let protected = self.protected();
        if protected && self.sys_flags as u64 & rflags::NT != 0 {
            return if self.lma() { Err(self.gp(0)) } else { self.task_return(next) };
        }
        let mut stack = self.stack_now(!self.legacy, 0);
        let frame = Frame {
            offset: self.peek(&stack, 0, width)?,
            selector: self.peek(&stack, width, width)? as u16,
            flags: self.peek(&stack, 2 * width, width)?,
        };
        if !protected {
            return self.iret_real(frame, stack, width);
        }
        if frame.flags & rflags::VM != 0 && width == 4 && self.cpl == 0 && !self.lma() {
            return self.iret_to_vm86(frame, stack);
        }
        let target = self.return_target(frame.selector, frame.offset)?;
        let mask = self.iret_mask(width);
        if target.cpl == self.cpl && self.legacy {
            self.check_offset(&target)?;
            self.load_cs(&target)?;
            stack.advance(3 * width);
            self.regs[4] = stack.sp;
        } else {
            self.iret_with_stack(target, &stack, width)?;
        }
        self.merge_flags(frame.flags, mask);
        self.update_modes();
        Err(Stop::Branch)
    }

    /// To an outer level, or from 64-bit mode: SS and RSP come from the frame too.
    fn iret_with_stack(&mut self, target: Target, stack: &Stack, width: u64) -> R {
        let sp = self.peek(stack, 3 * width, width)?;
        let selector = self.peek(stack, 4 * width, width)? as u16;
        let to_long = self.lma() && target.descriptor.l();
        let segment = self.return_stack(selector, target.cpl, to_long)?;
        self.check_offset(&target)?;
        let outer = target.cpl != self.cpl;
        self.load_cs(&target)?;
        self.segs[seg::SS] = segment;
        self.set_return_sp(sp, to_long);
        if outer {
            self.drop_inner_segments();
        }
        Ok(())
    }

    /// In real mode, and in virtual-8086 mode with its IOPL rules.
    fn iret_real(&mut self, frame: Frame, mut stack: Stack, width: u64) -> R {
        let mut mask = self.iret_mask(width) & !(rflags::VIF | rflags::VIP);
        let mut image = frame.flags;
        if self.vm86() {
            mask &= !rflags::IOPL;
            if self.iopl() < 3 {
                let busy = image & rflags::IF != 0 && self.sys_flags as u64 & rflags::VIP != 0;
                if self.cr4 & cr4::VME == 0 || width != 2 || busy || image & rflags::TF != 0 {
                    return Err(self.gp(0));
                }
                mask = mask & !rflags::IF | rflags::VIF;
                image = image & !rflags::VIF | if image & rflags::IF != 0 { rflags::VIF } else { 0 };
            }
        }
        self.load_real_cs(frame.selector, frame.offset)?;
        stack.advance(3 * width);
        self.regs[4] = stack.sp;
        self.merge_flags(image, mask);
        self.update_modes();
        Err(Stop::Branch)
    }

    /// From CPL 0 to virtual-8086 mode.
    fn iret_to_vm86(&mut self, frame: Frame, stack: Stack) -> R {
        let mut words = [0; 6];
        for (index, word) in words.iter_mut().enumerate() {
            *word = self.peek(&stack, 12 + 4 * index as u64, 4)?;
        }
        if frame.offset > 0xffff {
            return Err(self.gp(0));
        }
        let [sp, ss, es, ds, fs, gs] = words;
        let selectors = [
            (seg::CS, frame.selector as u64),
            (seg::SS, ss),
            (seg::ES, es),
            (seg::DS, ds),
            (seg::FS, fs),
            (seg::GS, gs),
        ];
        for (index, selector) in selectors {
            self.segs[index] = vm86_segment(selector as u16);
        }
        self.regs[4] = sp;
        self.rip = frame.offset;
        self.cpl = 3;
        self.trace.loaded_rf = true;
        self.set_rflags(frame.flags);
        self.update_modes();
        Err(Stop::Branch)
    }

    /// Enters the handler of a software interrupt; RIP is the next instruction's.
    fn software_interrupt(&mut self, op: &Op, vector: u8, source: Source) -> R {
        let before = self.rip;
        self.rip = self.next_rip(op);
        match self.enter_handler(Event::plain(vector, source)) {
            Ok(()) => {
                self.trace.tf = false;
                Err(Stop::Branch)
            }
            Err(stop) => {
                self.rip = before;
                Err(stop)
            }
        }
    }
}

unsafe fn iret<const WIDTH: u64>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.serialise();
    cpu.iret(WIDTH, cpu.next_rip(op))
}

unsafe fn int_n(cpu: &mut Cpu, op: &Op) -> R {
    cpu.software_interrupt(op, op.imm as u8, Source::IntN)
}

unsafe fn int3(cpu: &mut Cpu, op: &Op) -> R {
    if cpu.guest_debug & guest_debug::USE_SW_BP != 0 {
        let pc = cpu.next_rip(op).wrapping_sub(op.len as u64).wrapping_add(cpu.seg_base[seg::CS]);
        return Err(cpu.debug_exit(vector::BP, pc, 0));
    }
    cpu.software_interrupt(op, vector::BP, Source::Trap)
}

unsafe fn int1(cpu: &mut Cpu, op: &Op) -> R {
    // Breakpoints that a MOV SS before it held off are one #DB with this.
    let held = std::mem::take(&mut cpu.trace.hits);
    if held != 0 {
        cpu.note_debug_exception(held);
    }
    cpu.software_interrupt(op, vector::DB, Source::Int1)
}

unsafe fn into(cpu: &mut Cpu, op: &Op) -> R {
    if cpu.flags & 1 == 0 {
        return Ok(());
    }
    cpu.software_interrupt(op, vector::OF, Source::Trap)
}

unsafe fn bound<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let linear = cpu.lin(op, 2 * T::SIZE as u64, false)?;
    let lower: T = cpu.rd(linear, op.seg())?;
    let upper: T = cpu.rd(linear.wrapping_add(T::SIZE as u64), op.seg())?;
    let index = cpu.reg::<T>(op.dst).to_i64();
    if index < lower.to_i64() || index > upper.to_i64() {
        return Err(cpu.raise(vector::BR, None));
    }
    Ok(())
}

fn bind_bound(b: &mut Binder) -> Option<Handler> {
    Some(if b.width(0) == 2 { bound::<u16> } else { bound::<u32> })
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    System "SDM vol. 2A, IRET, INT n" {
        Iret => |_| Some(iret::<2>), Iretd => |_| Some(iret::<4>), Iretq => |_| Some(iret::<8>),
        Int => |_| Some(int_n), Int3 => |_| Some(int3), Int1 => |_| Some(int1), Into => |_| Some(into),
        Bound => bind_bound,
    }
};

#[cfg(test)]
mod tests {
    use crate::cpu::fixture::{handler, sel, RSP0};
    use crate::cpu::state::{cr4, rflags, seg, CodeSize};
    use crate::cpu::testing::Bench;

    const CODE: u64 = 0x1_0000;
    const IRETQ: &[u8] = &[0x48, 0xcf];

    fn with_frame(frame: [u64; 5]) -> Bench {
        let mut bench = Bench::new(1 << 20).long(CODE).code(IRETQ);
        bench.cpu.regs[4] = 0x7f00;
        for (index, value) in frame.into_iter().enumerate() {
            bench.load(0x7f00 + 8 * index as u64, &value.to_le_bytes());
        }
        bench
    }

    #[test]
    fn test_iretq_to_user_loads_everything_and_drops_inner_segments() {
        let flags = rflags::IF | rflags::AC | 0x8d7;
        let mut bench = with_frame([0x2_0000, sel::USER64 as u64, flags, 0x6ff8, sel::USER_DATA as u64]);
        bench.cpu.nmi_blocked = true;
        let epoch = bench.cpu.exec_epoch;
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.cpl, bench.cpu.regs[4]), (0x2_0000, 3, 0x6ff8));
        assert_eq!(bench.cpu.rflags(), flags);
        assert!(bench.cpu.segs[seg::DS].unusable);
        assert!(!bench.cpu.nmi_blocked);
        assert_eq!(bench.cpu.exec_epoch, epoch);
    }

    #[test]
    fn test_iretq_within_the_kernel_takes_a_null_stack_segment() {
        let mut bench = with_frame([0x2_0000, sel::CODE64 as u64, 2, 0x6000, 0]);
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.cpl, bench.cpu.regs[4]), (0x2_0000, 0, 0x6000));
        assert!(bench.cpu.segs[seg::SS].unusable);
    }

    #[test]
    fn test_iretq_to_compatibility_mode_decodes_32_bit_code() {
        let mut bench = with_frame([0x2_0000, sel::USER32 as u64, 2, 0x6000, sel::USER_DATA as u64]);
        bench.step();
        assert_eq!(bench.cpu.code_size, CodeSize::B32);
    }

    #[test]
    fn test_iretq_to_non_canonical_rip_is_gp_in_the_kernel() {
        let mut bench = with_frame([1 << 47, sel::USER64 as u64, 2, 0x6ff8, sel::USER_DATA as u64]);
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.cpl), (handler(13), 0));
        assert_eq!(bench.word(bench.cpu.regs[4]), 0);
        assert_eq!(bench.word(bench.cpu.regs[4] + 8), CODE);
    }

    #[test]
    fn test_iretq_null_stack_for_user_is_gp() {
        let mut bench = with_frame([0x2_0000, sel::USER64 as u64, 2, 0x6ff8, 3]);
        bench.step();
        assert_eq!(bench.cpu.rip, handler(13));
    }

    #[test]
    fn test_iret_at_user_level_keeps_iopl_and_if() {
        let mut bench = with_frame([0x2_0000, sel::USER64 as u64, 0x3202, 0x6ff8, sel::USER_DATA as u64]).user();
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.rflags()), (0x2_0000, 2));
    }

    #[test]
    fn test_iretd_to_virtual_8086_mode_and_back_by_an_exception() {
        let mut bench = Bench::new(1 << 20).protected(CODE).code(&[0xcf]);
        let frame = [0x10u32, 0x2000, 0x2_3202, 0x8000, 0x3000, 1, 2, 3, 4];
        bench.cpu.regs[4] = 0x7f00;
        for (index, value) in frame.into_iter().enumerate() {
            bench.load(0x7f00 + 4 * index as u64, &value.to_le_bytes());
        }
        bench.load(0x2_0010, &[0x0f, 0x0b]);
        bench.step();
        assert!(bench.cpu.vm86());
        assert_eq!((bench.cpu.cpl, bench.cpu.segs[seg::CS].base, bench.cpu.rip), (3, 0x2_0000, 0x10));
        assert_eq!(bench.cpu.segs[seg::GS].base, 0x40);
        bench.step();
        assert_eq!((bench.cpu.rip, bench.cpu.cpl), (handler(6), 0));
        let saved = bench.words(RSP0 - 36, 9);
        assert_eq!(saved, [0x10, 0x2000, 0x3_3202, 0x8000, 0x3000, 1, 2, 3, 4]);
        assert!(bench.cpu.segs[seg::DS].unusable);
    }

    #[test]
    fn test_int_in_virtual_8086_mode_follows_iopl_and_the_redirection_bitmap() {
        let start = |iopl: u64, vme: bool| {
            let mut bench = Bench::new(1 << 20).protected(CODE).user();
            bench.cpu.set_rflags(rflags::VM | iopl << 12);
            for index in 0..6 {
                bench.cpu.load_segment(index, 0x1000).unwrap();
            }
            bench.cpu.segs[seg::CS] = crate::cpu::segment::vm86_segment(0x1000);
            bench.cpu.update_modes();
            (bench.cpu.rip, bench.cpu.regs[4]) = (0, 0x8000);
            bench.cpu.cr4 |= if vme { cr4::VME } else { 0 };
            bench.load(CODE, &[0xcd, 0x20]);
            bench.load(0x20 * 4, &[0x78, 0x56, 0x00, 0x30]);
            bench
        };
        let mut bench = start(0, false);
        bench.step();
        assert_eq!(bench.cpu.rip, handler(13));
        let mut bench = start(3, false);
        bench.step();
        assert_eq!(bench.cpu.rip, handler(0x20));
        let mut bench = start(0, true);
        // The redirection bitmap is the 32 bytes before the I/O bitmap: move that up and clear them.
        bench.load(0x6066, &0x88u16.to_le_bytes());
        bench.load(0x6068, &[0; 32]);
        bench.step();
        assert!(bench.cpu.vm86());
        assert_eq!((bench.cpu.rip, bench.cpu.segs[seg::CS].base), (0x5678, 0x3_0000));
    }

    #[test]
    fn test_bound_outside_is_br() {
        let mut bench = Bench::new(1 << 20).protected(CODE).code(&[0x62, 0x05, 0, 0, 2, 0]);
        bench.load(0x2_0000, &[0xff, 0xff, 0xff, 0xff, 5, 0, 0, 0]);
        bench.cpu.regs[0] = 6;
        bench.step();
        assert_eq!(bench.cpu.rip, handler(5));
    }
}
