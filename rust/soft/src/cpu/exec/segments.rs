//! Instructions on segment registers, LDTR and TR. SDM vol. 2: MOV, PUSH, POP, LDS and kin, LAR,
//! LSL, VERR, VERW, ARPL, SLDT, STR, LLDT, LTR.
//!
//! MOV, PUSH and POP share their rows with the general forms; `exec/system.rs` and this file give
//! those rows their binders for special registers.

use crate::cpu::bind::{segment_number, Binder, Kind};
use crate::cpu::debug::shadow;
use crate::cpu::op::{Handler, Op};
use crate::cpu::segment::system;
use crate::cpu::state::{cr4, seg};
use crate::cpu::table::Row;
use crate::cpu::{Cpu, Stop, R};
use crate::{rows, sized};
use iced_x86::OpKind;

/// The r/m16 source: operand 0 of LLDT and its kin, `dst` holds its register.
fn rm16<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R<u16> {
    if MEM {
        cpu.rd_op(op)
    } else {
        Ok(cpu.reg(op.dst))
    }
}

/// The r/m16 source as operand 1.
fn rm16_source<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R<u16> {
    if MEM {
        cpu.rd_op(op)
    } else {
        Ok(cpu.reg(op.src))
    }
}

/// Stores a 16-bit system value: zero-extended to a register, 16 bits to memory.
pub(super) fn bind_store(b: &mut Binder, memory: Handler, registers: [Handler; 3]) -> Option<Handler> {
    match (b.kind(0), b.width(0)) {
        (Kind::Mem, _) => Some(memory),
        (_, 2) => Some(registers[0]),
        (_, 4) => Some(registers[1]),
        _ => Some(registers[2]),
    }
}

// ---- MOV, PUSH, POP, LDS ----------------------------------------------------------------

/// Loads a segment register and ends a load of SS with the interrupt shadow.
#[inline]
fn load(cpu: &mut Cpu, index: u8, selector: u16) -> R {
    cpu.load_segment(index as usize, selector)?;
    if index as usize == seg::SS {
        cpu.shadow = shadow::MOV_SS;
        return Err(Stop::Leave);
    }
    Ok(())
}

unsafe fn mov_to_sreg<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let selector = rm16_source::<MEM>(cpu, op)?;
    load(cpu, op.dst, selector)
}

unsafe fn mov_from_sreg<const WIDTH: usize>(cpu: &mut Cpu, op: &Op) -> R {
    let selector = cpu.segs[op.src as usize].selector;
    match WIDTH {
        0 => return cpu.wr_op(op, selector),
        2 => cpu.set_reg(op.dst, selector),
        4 => cpu.set_reg(op.dst, selector as u32),
        _ => cpu.set_reg(op.dst, selector as u64),
    }
    Ok(())
}

/// MOV's forms with a segment register; `None` when this is another MOV.
pub fn bind_mov_sreg(b: &mut Binder) -> Option<Handler> {
    let is = |index| b.ins.op_kind(index) == OpKind::Register && segment_number(b.ins.op_register(index)).is_some();
    if is(0) {
        return match (b.op.dst as usize, b.kind(1)) {
            (seg::CS, _) => None,
            (_, Kind::Mem) => Some(mov_to_sreg::<true>),
            _ => Some(mov_to_sreg::<false>),
        };
    }
    if !is(1) {
        return None;
    }
    bind_store(b, mov_from_sreg::<0>, [mov_from_sreg::<2>, mov_from_sreg::<4>, mov_from_sreg::<8>])
}

/// PUSH stores the selector's 16 bits and leaves the rest of the slot alone, as processors do.
unsafe fn push_sreg<const WIDTH: u64>(cpu: &mut Cpu, op: &Op) -> R {
    let sp = cpu.sp().wrapping_sub(WIDTH);
    let selector = cpu.segs[op.dst as usize].selector;
    if WIDTH == 8 {
        cpu.wr_stack(sp, selector as u64)?;
    } else {
        cpu.wr_stack(sp, selector)?;
    }
    cpu.set_sp(sp);
    Ok(())
}

unsafe fn pop_sreg<const WIDTH: u64>(cpu: &mut Cpu, op: &Op) -> R {
    let (old, sp) = (cpu.regs[4], cpu.sp());
    let selector: u16 = cpu.rd_stack(sp)?;
    cpu.set_sp(sp.wrapping_add(WIDTH));
    load(cpu, op.dst, selector).inspect_err(|&stop| {
        if stop != Stop::Leave {
            cpu.regs[4] = old;
        }
    })
}

/// Bytes a stack instruction moves: by prefix and code size.
fn stack_operand(b: &Binder) -> u64 {
    b.ins.stack_pointer_increment().unsigned_abs() as u64
}

/// PUSH of a segment register.
pub fn bind_push_sreg(b: &mut Binder) -> Option<Handler> {
    segment_number(b.ins.op0_register())?;
    match stack_operand(b) {
        2 => Some(push_sreg::<2>),
        4 => Some(push_sreg::<4>),
        _ => Some(push_sreg::<8>),
    }
}

/// POP of a segment register.
pub fn bind_pop_sreg(b: &mut Binder) -> Option<Handler> {
    segment_number(b.ins.op0_register())?;
    match stack_operand(b) {
        2 => Some(pop_sreg::<2>),
        4 => Some(pop_sreg::<4>),
        _ => Some(pop_sreg::<8>),
    }
}

unsafe fn load_pointer<T: crate::cpu::access::Int>(cpu: &mut Cpu, op: &Op) -> R {
    let (linear, segment) = (cpu.lin(op, T::SIZE as u64 + 2, false)?, op.seg());
    let offset: T = cpu.rd(linear, segment)?;
    let selector: u16 = cpu.rd(linear.wrapping_add(T::SIZE as u64), segment)?;
    let stop = load(cpu, op.src, selector);
    if matches!(stop, Ok(()) | Err(Stop::Leave)) {
        cpu.set_reg(op.dst, offset);
    }
    stop
}

fn bind_pointer<const SREG: u8>(b: &mut Binder) -> Option<Handler> {
    b.op.src = SREG;
    sized!(b.width(0), load_pointer)
}

// ---- LAR, LSL, VERR, VERW, ARPL ---------------------------------------------------------

fn set_zf(cpu: &mut Cpu, zf: bool) {
    cpu.flags = cpu.flags & !0x4000 | (zf as u16) << 14;
}

/// The descriptor, when the selector is not null, within its table and visible at this privilege.
fn visible(cpu: &mut Cpu, selector: u16) -> R<Option<crate::cpu::segment::Descriptor>> {
    if selector & 0xfffc == 0 {
        return Ok(None);
    }
    let Some(d) = cpu.try_descriptor(selector)? else {
        return Ok(None);
    };
    let privileged = d.dpl() < cpu.cpl.max(selector as u8 & 3);
    Ok((d.conforming() || !privileged).then_some(d))
}

unsafe fn lar<const MEM: bool, T: crate::cpu::access::Int>(cpu: &mut Cpu, op: &Op) -> R {
    need_protected(cpu)?;
    let selector = rm16_source::<MEM>(cpu, op)?;
    let long = cpu.lma();
    let fits = |kind| match kind {
        system::LDT | system::TSS32 | system::TSS32_BUSY | system::CALL32 => true,
        1 | 3 | system::CALL16 | system::TASK => !long,
        _ => false,
    };
    let found = visible(cpu, selector)?.filter(|d| d.s() || fits(d.kind()));
    if let Some(d) = found {
        let mask = if T::SIZE == 2 { 0xff00 } else { 0x00f0_ff00 };
        cpu.set_reg(op.dst, T::from_u64((d.0 >> 32) & mask));
    }
    set_zf(cpu, found.is_some());
    Ok(())
}

unsafe fn lsl<const MEM: bool, T: crate::cpu::access::Int>(cpu: &mut Cpu, op: &Op) -> R {
    need_protected(cpu)?;
    let selector = rm16_source::<MEM>(cpu, op)?;
    let long = cpu.lma();
    let fits = |kind| match kind {
        system::LDT | system::TSS32 | system::TSS32_BUSY => true,
        1 | 3 => !long,
        _ => false,
    };
    let found = visible(cpu, selector)?.filter(|d| d.s() || fits(d.kind()));
    if let Some(d) = found {
        cpu.set_reg(op.dst, T::from_u64(d.limit() as u64));
    }
    set_zf(cpu, found.is_some());
    Ok(())
}

fn bind_lar(b: &mut Binder) -> Option<Handler> {
    match (b.kind(1), b.width(0)) {
        (Kind::Mem, 2) => Some(lar::<true, u16>),
        (Kind::Mem, 4) => Some(lar::<true, u32>),
        (Kind::Mem, _) => Some(lar::<true, u64>),
        (_, 2) => Some(lar::<false, u16>),
        (_, 4) => Some(lar::<false, u32>),
        _ => Some(lar::<false, u64>),
    }
}

fn bind_lsl(b: &mut Binder) -> Option<Handler> {
    match (b.kind(1), b.width(0)) {
        (Kind::Mem, 2) => Some(lsl::<true, u16>),
        (Kind::Mem, 4) => Some(lsl::<true, u32>),
        (Kind::Mem, _) => Some(lsl::<true, u64>),
        (_, 2) => Some(lsl::<false, u16>),
        (_, 4) => Some(lsl::<false, u32>),
        _ => Some(lsl::<false, u64>),
    }
}

unsafe fn verify<const MEM: bool, const WRITE: bool>(cpu: &mut Cpu, op: &Op) -> R {
    need_protected(cpu)?;
    let selector = rm16::<MEM>(cpu, op)?;
    let found = visible(cpu, selector)?;
    set_zf(cpu, found.is_some_and(|d| if WRITE { d.writable() } else { d.readable() }));
    Ok(())
}

unsafe fn arpl<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    need_protected(cpu)?;
    let rpl = cpu.reg::<u16>(op.src) & 3;
    let raised = |old: u16| if old & 3 < rpl { old & !3 | rpl } else { old };
    if MEM {
        let linear = cpu.lin(op, 2, true)?;
        return cpu.rmw(linear, op.seg(), |cpu, old: u16| {
            set_zf(cpu, old & 3 < rpl);
            raised(old)
        });
    }
    let old: u16 = cpu.reg(op.dst);
    set_zf(cpu, old & 3 < rpl);
    cpu.set_reg(op.dst, raised(old));
    Ok(())
}

// ---- LDTR and TR ------------------------------------------------------------------------

/// #UD in real and virtual-8086 mode.
fn need_protected(cpu: &mut Cpu) -> R {
    if cpu.protected() {
        Ok(())
    } else {
        Err(cpu.ud())
    }
}

/// UMIP: #GP(0) for what reveals system registers to user mode.
pub(super) fn need_no_umip(cpu: &mut Cpu) -> R {
    if cpu.cpl != 0 && cpu.cr4 & cr4::UMIP != 0 {
        return Err(cpu.gp(0));
    }
    Ok(())
}

unsafe fn store_system<const TR: bool, const WIDTH: usize>(cpu: &mut Cpu, op: &Op) -> R {
    need_protected(cpu)?;
    need_no_umip(cpu)?;
    let selector = if TR { cpu.tr.selector } else { cpu.ldtr.selector };
    match WIDTH {
        0 => return cpu.wr_op(op, selector),
        2 => cpu.set_reg(op.dst, selector),
        4 => cpu.set_reg(op.dst, selector as u32),
        _ => cpu.set_reg(op.dst, selector as u64),
    }
    Ok(())
}

fn bind_store_system<const TR: bool>(b: &mut Binder) -> Option<Handler> {
    bind_store(b, store_system::<TR, 0>, [store_system::<TR, 2>, store_system::<TR, 4>, store_system::<TR, 8>])
}

unsafe fn lldt<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    need_protected(cpu)?;
    cpu.need_cpl0()?;
    let selector = rm16::<MEM>(cpu, op)?;
    cpu.load_ldtr(selector)
}

unsafe fn ltr<const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    need_protected(cpu)?;
    cpu.need_cpl0()?;
    let selector = rm16::<MEM>(cpu, op)?;
    cpu.load_tr(selector)
}

fn pick(b: &mut Binder, memory: Handler, register: Handler) -> Option<Handler> {
    Some(if b.kind(0) == Kind::Mem { memory } else { register })
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    System "SDM vol. 2, segment registers; vol. 3, 3.4" {
        Lds => bind_pointer::<3>, Les => bind_pointer::<0>, Lss => bind_pointer::<2>,
        Lfs => bind_pointer::<4>, Lgs => bind_pointer::<5>,
        Lar => bind_lar, Lsl => bind_lsl,
        Verr => |b| pick(b, verify::<true, false>, verify::<false, false>),
        Verw => |b| pick(b, verify::<true, true>, verify::<false, true>),
        Arpl => |b| pick(b, arpl::<true>, arpl::<false>),
        Sldt => bind_store_system::<false>, Str => bind_store_system::<true>,
        Lldt => |b| pick(b, lldt::<true>, lldt::<false>),
        Ltr => |b| pick(b, ltr::<true>, ltr::<false>),
    }
};

#[cfg(test)]
mod tests {
    use crate::cpu::fixture::{handler, sel, GDT};
    use crate::cpu::state::seg;
    use crate::cpu::testing::Bench;

    const CODE: u64 = 0x1_0000;

    /// MOV of AX to a segment register by number: its vector and error code, or none.
    fn load(bench: Bench, index: usize, selector: u16) -> (Bench, Option<(u8, Option<u32>)>) {
        let mut bench = bench.code(&[0x8e, 0xc0 | (index as u8) << 3]);
        bench.cpu.regs[0] = selector as u64;
        let fault = bench.cpu.step_raw().is_err().then_some(bench.cpu.fault);
        (bench, fault.map(|fault| (fault.vector, fault.error)))
    }

    #[test]
    fn test_mov_to_data_segment_checks() {
        let cases = [
            (sel::DATA, None),
            (sel::CONFORMING, Some((13, Some(0x48)))),
            (sel::CODE32, None),
            (0, None),
            (3, None),
            (sel::ABSENT, Some((11, Some(0x50)))),
            (sel::BEYOND, Some((13, Some(0x100)))),
            (sel::EXECUTE_ONLY, Some((13, Some(0x88)))),
            (sel::LDT, Some((13, Some(0x70)))),
            (4, Some((13, Some(4)))),
        ];
        for (selector, expected) in cases {
            let mut bench = Bench::new(1 << 20).protected(CODE);
            bench.cpu.ldtr.unusable = true;
            // Execute-only conforming code.
            bench.load(GDT + 0x4d, &[0x9c]);
            let (bench, fault) = load(bench, seg::DS, selector);
            assert_eq!(fault, expected, "{selector:#x}");
            if expected.is_none() {
                assert_eq!(bench.cpu.segs[seg::DS].unusable, selector < 4);
            }
        }
    }

    #[test]
    fn test_mov_to_ss_checks() {
        let cases = [
            (sel::DATA, None),
            (0, Some((13, Some(0)))),
            (sel::USER_DATA, Some((13, Some(0x20)))),
            (sel::READ_ONLY, Some((13, Some(0x80)))),
            (sel::ABSENT, Some((12, Some(0x50)))),
        ];
        for (selector, expected) in cases {
            let (_, fault) = load(Bench::new(1 << 20).protected(CODE), seg::SS, selector);
            assert_eq!(fault, expected, "{selector:#x}");
        }
        let (bench, fault) = load(Bench::new(1 << 20).long(CODE), seg::SS, 0);
        assert_eq!(fault, None);
        assert!(bench.cpu.segs[seg::SS].unusable && bench.cpu.shadow != 0);
    }

    #[test]
    fn test_mov_to_segment_sets_the_accessed_bit() {
        let (bench, _) = load(Bench::new(1 << 20).protected(CODE), seg::ES, sel::READ_ONLY);
        assert_eq!(bench.word(GDT + 0x85) & 0xff, 0x91);
    }

    #[test]
    fn test_lar_lsl_verr_verw_report_by_zf() {
        // lar ecx, eax; lsl edx, eax; verr ax; setz bl; verw ax; setz bh
        let code = [0x0f, 2, 0xc8, 0x0f, 3, 0xd0, 0x0f, 0, 0xe0, 0x0f, 0x94, 0xc3, 0x0f, 0, 0xe8, 0x0f, 0x94, 0xc7];
        let cases = [
            (sel::DATA, 0xc0_9200, 0xffff_ffff, 0x0101),
            (sel::READ_ONLY, 0xc0_9000, 0xffff_ffff, 0x0001),
            (sel::EXECUTE_ONLY, 0xc0_9800, 0xffff_ffff, 0),
            (sel::LDT, 0x00_8200, 0xff, 0),
            (sel::BEYOND, 7, 7, 0),
        ];
        for (selector, access, limit, verify) in cases {
            let mut bench = Bench::new(1 << 20).protected(CODE).code(&code);
            (bench.cpu.regs[0], bench.cpu.regs[1], bench.cpu.regs[2]) = (selector as u64, 7, 7);
            for _ in 0..6 {
                bench.step();
            }
            let regs = bench.cpu.regs;
            assert_eq!((regs[1], regs[2], regs[3]), (access, limit, verify), "{selector:#x}");
        }
    }

    #[test]
    fn test_ltr_of_a_busy_tss_is_gp() {
        let mut bench = Bench::new(1 << 20).protected(CODE).code(&[0x0f, 0, 0xd8]);
        bench.cpu.regs[0] = sel::TSS as u64;
        bench.step();
        assert_eq!(bench.cpu.rip, handler(13));
        let mut bench = Bench::new(1 << 20).protected(CODE).code(&[0x0f, 0, 0xd8]);
        bench.cpu.regs[0] = sel::TSS2 as u64;
        bench.step();
        assert_eq!(bench.cpu.tr.kind, 11);
        assert_eq!(bench.word(GDT + sel::TSS2 as u64 + 5) & 0xff, 0x8b);
    }

    #[test]
    fn test_pop_ss_that_faults_keeps_rsp() {
        let mut bench = Bench::new(1 << 20).protected(CODE).code(&[0x17]);
        bench.load(0x8000, &sel::READ_ONLY.to_le_bytes());
        assert!(bench.cpu.step_raw().is_err());
        assert_eq!((bench.cpu.regs[4], bench.cpu.rip), (0x8000, CODE));
    }

    #[test]
    fn test_push_and_pop_of_fs_in_64_bit_mode() {
        let mut bench = Bench::new(1 << 20).long(CODE).code(&[0x0f, 0xa0, 0x0f, 0xa9]);
        bench.cpu.segs[seg::FS].selector = sel::DATA;
        bench.step();
        assert_eq!((bench.cpu.regs[4], bench.word(0x7ff8)), (0x7ff8, sel::DATA as u64));
        bench.step();
        assert_eq!((bench.cpu.regs[4], bench.cpu.segs[seg::GS].selector), (0x8000, sel::DATA));
    }
}
