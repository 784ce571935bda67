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
use crate::cpu::{vector, Cpu, Exit, Stop, R};
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
        let merged = self.rflags() & !mask | image & mask;
        self.set_rflags(merged);
    }

    /// IRET of `width` bytes.
    fn iret(&mut self, width: u64) -> R {
        // NMIs are unblocked even when IRET faults. SDM vol. 3, 6.7.1.
        self.nmi_blocked = false;
        let protected = self.protected();
        if protected && self.sys_flags as u64 & rflags::NT != 0 {
            return if self.lma() { Err(self.gp(0)) } else { self.task_return() };
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

unsafe fn iret<const WIDTH: u64>(cpu: &mut Cpu, _: &Op) -> R {
    cpu.iret(WIDTH)
}

unsafe fn int_n(cpu: &mut Cpu, op: &Op) -> R {
    cpu.software_interrupt(op, op.imm as u8, Source::IntN)
}

unsafe fn int3(cpu: &mut Cpu, op: &Op) -> R {
    if cpu.guest_debug & guest_debug::USE_SW_BP != 0 {
        let pc = cpu.next_rip(op).wrapping_sub(op.len as u64).wrapping_add(cpu.seg_base[seg::CS]);
        cpu.exit = Some(Exit::Debug { exception: vector::BP, pc, dr6: cpu.dr[6], dr7: cpu.dr[7] });
        return Err(Stop::Exit);
    }
    cpu.software_interrupt(op, vector::BP, Source::Trap)
}

unsafe fn int1(cpu: &mut Cpu, op: &Op) -> R {
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
