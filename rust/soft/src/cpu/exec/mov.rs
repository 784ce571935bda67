//! Data transfer. SDM vol. 2: MOV MOVZX MOVSX MOVSXD XCHG XADD CMPXCHG CMPXCHG8B/16B LEA BSWAP MOVBE
//! CMOVcc SETcc XLAT CBW CWD and their wider forms, MOVNTI, LAHF SAHF, flag instructions.

use super::system;
use crate::cpu::access::Int;
use crate::cpu::alu::{condition, Add, Alu2, AluInt, Cmp};
use crate::cpu::bind::{segment_number, Binder, Kind};
use crate::cpu::op::{Handler, Op, ADDR16, ADDR32, LOCK};
use crate::cpu::state::rflags;
use crate::cpu::table::Row;
use crate::cpu::{Cpu, R};
use crate::{rows, sized};

/// A yield costs about a microsecond, a PAUSE a few nanoseconds.
const PAUSES_PER_YIELD: u32 = 512;

unsafe fn mov_rr<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.set_reg(op.dst, cpu.reg::<T>(op.src));
    Ok(())
}

unsafe fn mov_ri<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.set_reg(op.dst, T::from_u64(op.imm));
    Ok(())
}

unsafe fn mov_rm<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let value: T = cpu.rd_op(op)?;
    cpu.set_reg(op.dst, value);
    Ok(())
}

unsafe fn mov_mr<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let value: T = cpu.reg(op.src);
    cpu.wr_op(op, value)
}

unsafe fn mov_mi<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.wr_op(op, T::from_u64(op.imm))
}

fn bind_mov(b: &mut Binder) -> Option<Handler> {
    let special = |index| {
        b.kind(index) == Kind::Reg && {
            let register = b.ins.op_register(index);
            segment_number(register).is_some() || register.is_cr() || register.is_dr() || register.is_tr()
        }
    };
    if special(0) || special(1) {
        return system::bind_mov_special(b);
    }
    let width = b.width(0);
    match (b.kind(0), b.kind(1)) {
        _ if b.op.has(LOCK) => None,
        (Kind::Reg, Kind::Reg) => sized!(width, mov_rr),
        (Kind::Reg, Kind::Imm) => sized!(width, mov_ri),
        (Kind::Reg, Kind::Mem) => sized!(width, mov_rm),
        (Kind::Mem, Kind::Reg) => sized!(width, mov_mr),
        (Kind::Mem, Kind::Imm) => sized!(width, mov_mi),
        _ => None,
    }
}

fn bind_movnti(b: &mut Binder) -> Option<Handler> {
    sized!(b.width(0), mov_mr)
}

unsafe fn extend_rr<S: Int, D: Int, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let value: S = cpu.reg(op.src);
    cpu.set_reg(op.dst, D::from_u64(if SIGNED { value.to_i64() as u64 } else { value.to_u64() }));
    Ok(())
}

unsafe fn extend_rm<S: Int, D: Int, const SIGNED: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let value: S = cpu.rd_op(op)?;
    cpu.set_reg(op.dst, D::from_u64(if SIGNED { value.to_i64() as u64 } else { value.to_u64() }));
    Ok(())
}

fn bind_extend<const SIGNED: bool>(b: &mut Binder) -> Option<Handler> {
    macro_rules! pick {
        ($f:ident) => {
            match (b.width(1), b.width(0)) {
                (1, 2) => Some($f::<u8, u16, SIGNED> as Handler),
                (1, 4) => Some($f::<u8, u32, SIGNED> as Handler),
                (1, 8) => Some($f::<u8, u64, SIGNED> as Handler),
                (2, 2) => Some($f::<u16, u16, SIGNED> as Handler),
                (2, 4) => Some($f::<u16, u32, SIGNED> as Handler),
                (2, 8) => Some($f::<u16, u64, SIGNED> as Handler),
                (4, 4) => Some($f::<u32, u32, SIGNED> as Handler),
                (4, 8) => Some($f::<u32, u64, SIGNED> as Handler),
                // MOVSXD r16, r/m32 takes 16 bits.
                (4, 2) => Some($f::<u16, u16, SIGNED> as Handler),
                _ => None,
            }
        };
    }
    if b.kind(1) == Kind::Reg {
        pick!(extend_rr)
    } else {
        pick!(extend_rm)
    }
}

unsafe fn lea<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.set_reg(op.dst, T::from_u64(cpu.effective_masked(op)));
    Ok(())
}

fn bind_lea(b: &mut Binder) -> Option<Handler> {
    if b.kind(1) != Kind::Mem {
        return None;
    }
    sized!(b.width(0), lea)
}

unsafe fn xchg_rr<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let (a, b): (T, T) = (cpu.reg(op.dst), cpu.reg(op.src));
    cpu.set_reg(op.dst, b);
    cpu.set_reg(op.src, a);
    Ok(())
}

/// XCHG with memory is locked without the prefix. `dst` is made the register by the binder.
unsafe fn xchg_mr<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let new: T = cpu.reg(op.dst);
    let linear = cpu.lin(op, T::SIZE as u64, true)?;
    let old: T = cpu.atomic_rmw(linear, op.seg(), |_, _| new)?;
    cpu.set_reg(op.dst, old);
    Ok(())
}

fn bind_xchg(b: &mut Binder) -> Option<Handler> {
    let width = b.width(0);
    match (b.kind(0), b.kind(1)) {
        (Kind::Mem, Kind::Reg) => {
            b.op.dst = b.op.src;
            sized!(width, xchg_mr)
        }
        (Kind::Reg, Kind::Mem) => sized!(width, xchg_mr),
        _ if b.op.has(LOCK) => None,
        _ => sized!(width, xchg_rr),
    }
}

unsafe fn xadd_rr<T: AluInt>(cpu: &mut Cpu, op: &Op) -> R {
    let (a, b): (T, T) = (cpu.reg(op.dst), cpu.reg(op.src));
    let sum = Add::run(a, b, &mut cpu.flags);
    cpu.set_reg(op.src, a);
    cpu.set_reg(op.dst, sum);
    Ok(())
}

unsafe fn xadd_mr<T: AluInt>(cpu: &mut Cpu, op: &Op) -> R {
    let b: T = cpu.reg(op.src);
    let linear = cpu.lin(op, T::SIZE as u64, true)?;
    let old: T = cpu.atomic_rmw(linear, op.seg(), |a: T, flags| Add::run(a, b, flags))?;
    cpu.set_reg(op.src, old);
    Ok(())
}

fn bind_xadd(b: &mut Binder) -> Option<Handler> {
    match (b.kind(0), b.op.has(LOCK)) {
        (Kind::Mem, _) => sized!(b.width(0), xadd_mr),
        (_, false) => sized!(b.width(0), xadd_rr),
        _ => None,
    }
}

unsafe fn cmpxchg_rr<T: AluInt>(cpu: &mut Cpu, op: &Op) -> R {
    let (accumulator, old): (T, T) = (cpu.reg(0), cpu.reg(op.dst));
    Cmp::run(accumulator, old, &mut cpu.flags);
    if accumulator == old {
        cpu.set_reg(op.dst, cpu.reg::<T>(op.src));
    } else {
        cpu.set_reg(0, old);
    }
    Ok(())
}

unsafe fn cmpxchg_mr<T: AluInt>(cpu: &mut Cpu, op: &Op) -> R {
    let (accumulator, new): (T, T) = (cpu.reg(0), cpu.reg(op.src));
    let linear = cpu.lin(op, T::SIZE as u64, true)?;
    let old: T = cpu.atomic_rmw(linear, op.seg(), |old: T, flags| {
        Cmp::run(accumulator, old, flags);
        if old == accumulator {
            new
        } else {
            old
        }
    })?;
    if old != accumulator {
        cpu.set_reg(0, old);
    }
    Ok(())
}

fn bind_cmpxchg(b: &mut Binder) -> Option<Handler> {
    match (b.kind(0), b.op.has(LOCK)) {
        (Kind::Mem, _) => sized!(b.width(0), cmpxchg_mr),
        (_, false) => sized!(b.width(0), cmpxchg_rr),
        _ => None,
    }
}

/// CMPXCHG8B (T = u32) and CMPXCHG16B (T = u64).
unsafe fn cmpxchg_pair<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let linear = cpu.lin(op, 2 * T::SIZE as u64, true)?;
    if T::SIZE == 8 && linear & 15 != 0 {
        return Err(cpu.gp(0));
    }
    let old = [cpu.reg::<T>(0), cpu.reg(2 * 8)];
    let new = [cpu.reg::<T>(3 * 8), cpu.reg(8)];
    let (seen, ok) = cpu.atomic_pair(linear, op.seg(), old, new)?;
    if ok {
        cpu.flags |= 0x4000;
    } else {
        cpu.flags &= !0x4000;
        cpu.set_reg(0, seen[0]);
        cpu.set_reg(2 * 8, seen[1]);
    }
    Ok(())
}

fn bind_cmpxchg8b(b: &mut Binder) -> Option<Handler> {
    (b.kind(0) == Kind::Mem).then_some(cmpxchg_pair::<u32>)
}

fn bind_cmpxchg16b(b: &mut Binder) -> Option<Handler> {
    (b.kind(0) == Kind::Mem).then_some(cmpxchg_pair::<u64>)
}

/// BSWAP of a 16-bit register is undefined; processors clear it.
unsafe fn bswap<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let value = cpu.reg::<T>(op.dst).to_u64();
    cpu.set_reg(op.dst, T::from_u64(if T::SIZE == 2 { 0 } else { value.swap_bytes() >> (64 - T::BITS) }));
    Ok(())
}

unsafe fn movbe_load<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let value: T = cpu.rd_op(op)?;
    cpu.set_reg(op.dst, T::from_u64(value.to_u64().swap_bytes() >> (64 - T::BITS)));
    Ok(())
}

unsafe fn movbe_store<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let value = cpu.reg::<T>(op.src).to_u64();
    cpu.wr_op(op, T::from_u64(value.swap_bytes() >> (64 - T::BITS)))
}

fn bind_movbe(b: &mut Binder) -> Option<Handler> {
    match b.kind(0) {
        Kind::Reg => sized!(b.width(0), movbe_load),
        _ => sized!(b.width(0), movbe_store),
    }
}

// A 32-bit CMOV clears the upper half even when the condition is false; a faulting load faults
// whatever the condition.
unsafe fn cmov_rr<T: Int, const CC: u8>(cpu: &mut Cpu, op: &Op) -> R {
    let from = if condition::<CC>(cpu.flags) { op.src } else { op.dst };
    cpu.set_reg(op.dst, cpu.reg::<T>(from));
    Ok(())
}

unsafe fn cmov_rm<T: Int, const CC: u8>(cpu: &mut Cpu, op: &Op) -> R {
    let value: T = cpu.rd_op(op)?;
    cpu.set_reg(op.dst, if condition::<CC>(cpu.flags) { value } else { cpu.reg(op.dst) });
    Ok(())
}

fn bind_cmov<const CC: u8>(b: &mut Binder) -> Option<Handler> {
    macro_rules! pick {
        ($f:ident) => {
            match b.width(0) {
                2 => Some($f::<u16, CC> as Handler),
                4 => Some($f::<u32, CC> as Handler),
                8 => Some($f::<u64, CC> as Handler),
                _ => None,
            }
        };
    }
    if b.kind(1) == Kind::Reg {
        pick!(cmov_rr)
    } else {
        pick!(cmov_rm)
    }
}

unsafe fn set_r<const CC: u8>(cpu: &mut Cpu, op: &Op) -> R {
    cpu.set_reg(op.dst, condition::<CC>(cpu.flags) as u8);
    Ok(())
}

unsafe fn set_m<const CC: u8>(cpu: &mut Cpu, op: &Op) -> R {
    let value = condition::<CC>(cpu.flags) as u8;
    cpu.wr_op(op, value)
}

fn bind_set<const CC: u8>(b: &mut Binder) -> Option<Handler> {
    Some(if b.kind(0) == Kind::Reg { set_r::<CC> } else { set_m::<CC> })
}

/// XLAT: AL = [rBX + AL]. iced gives base rBX and index AL.
unsafe fn xlat(cpu: &mut Cpu, op: &Op) -> R {
    let mask = if op.has(ADDR16) {
        0xffff
    } else if op.has(ADDR32) {
        0xffff_ffff
    } else {
        u64::MAX
    };
    let offset = cpu.regs[3].wrapping_add(cpu.regs[0] & 0xff) & mask;
    let linear = cpu.linear(op.seg(), offset, 1, false)?;
    let value: u8 = cpu.rd(linear, op.seg())?;
    cpu.set_reg(0, value);
    Ok(())
}

/// CBW, CWDE, CDQE: the accumulator sign-extended to its double width D.
unsafe fn widen<S: Int, D: Int>(cpu: &mut Cpu, _: &Op) -> R {
    cpu.set_reg(0, D::from_u64(cpu.reg::<S>(0).to_i64() as u64));
    Ok(())
}

/// CWD, CDQ, CQO: rDX filled with the accumulator's sign.
unsafe fn spread<T: Int>(cpu: &mut Cpu, _: &Op) -> R {
    cpu.set_reg(2 * 8, T::from_u64((cpu.reg::<T>(0).to_i64() >> 63) as u64));
    Ok(())
}

unsafe fn lahf(cpu: &mut Cpu, _: &Op) -> R {
    cpu.set_reg(1, (cpu.flags >> 8) as u8 & 0xd5 | 2);
    Ok(())
}

unsafe fn sahf(cpu: &mut Cpu, _: &Op) -> R {
    let ah: u8 = cpu.reg(1);
    cpu.flags = cpu.flags & 1 | ((ah & 0xd5 | 2) as u16) << 8;
    Ok(())
}

unsafe fn clc(cpu: &mut Cpu, _: &Op) -> R {
    cpu.flags &= !0x100;
    Ok(())
}

unsafe fn stc(cpu: &mut Cpu, _: &Op) -> R {
    cpu.flags |= 0x100;
    Ok(())
}

unsafe fn cmc(cpu: &mut Cpu, _: &Op) -> R {
    cpu.flags ^= 0x100;
    Ok(())
}

unsafe fn cld(cpu: &mut Cpu, _: &Op) -> R {
    cpu.sys_flags &= !(rflags::DF as u32);
    Ok(())
}

unsafe fn std(cpu: &mut Cpu, _: &Op) -> R {
    cpu.sys_flags |= rflags::DF as u32;
    Ok(())
}

unsafe fn nop(_: &mut Cpu, _: &Op) -> R {
    Ok(())
}

/// Waits in a loop for another vCPU, which may want the host CPU that this one burns.
unsafe fn pause(cpu: &mut Cpu, _: &Op) -> R {
    cpu.pauses = cpu.pauses.wrapping_add(1);
    if cpu.pauses.is_multiple_of(PAUSES_PER_YIELD) {
        std::thread::yield_now();
    }
    Ok(())
}

/// SALC (undocumented, outside of 64-bit mode): AL = CF ? FF : 00.
unsafe fn salc(cpu: &mut Cpu, _: &Op) -> R {
    let value = if cpu.cf() { 0xffu8 } else { 0 };
    cpu.set_reg(0, value);
    Ok(())
}

fn bind_nop(_: &mut Binder) -> Option<Handler> {
    Some(nop)
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    User "SDM vol. 2, data transfer" {
        Mov => bind_mov, Movnti => bind_movnti,
        Movzx => bind_extend::<false>, Movsx => bind_extend::<true>, Movsxd => bind_extend::<true>,
        Lea => bind_lea, Xchg => bind_xchg, Xadd => bind_xadd, Cmpxchg => bind_cmpxchg,
        Cmpxchg8b => bind_cmpxchg8b, Cmpxchg16b => bind_cmpxchg16b,
        Bswap => |b| sized!(b.width(0), bswap), Movbe => bind_movbe,
        Xlatb => |_| Some(xlat),
        Cbw => |_| Some(widen::<u8, u16>), Cwde => |_| Some(widen::<u16, u32>), Cdqe => |_| Some(widen::<u32, u64>),
        Cwd => |_| Some(spread::<u16>), Cdq => |_| Some(spread::<u32>), Cqo => |_| Some(spread::<u64>),
    }
    User "SDM vol. 2, CMOVcc" {
        Cmovo => bind_cmov::<0>, Cmovno => bind_cmov::<1>, Cmovb => bind_cmov::<2>, Cmovae => bind_cmov::<3>,
        Cmove => bind_cmov::<4>, Cmovne => bind_cmov::<5>, Cmovbe => bind_cmov::<6>, Cmova => bind_cmov::<7>,
        Cmovs => bind_cmov::<8>, Cmovns => bind_cmov::<9>, Cmovp => bind_cmov::<10>, Cmovnp => bind_cmov::<11>,
        Cmovl => bind_cmov::<12>, Cmovge => bind_cmov::<13>, Cmovle => bind_cmov::<14>, Cmovg => bind_cmov::<15>,
    }
    User "SDM vol. 2, SETcc" {
        Seto => bind_set::<0>, Setno => bind_set::<1>, Setb => bind_set::<2>, Setae => bind_set::<3>,
        Sete => bind_set::<4>, Setne => bind_set::<5>, Setbe => bind_set::<6>, Seta => bind_set::<7>,
        Sets => bind_set::<8>, Setns => bind_set::<9>, Setp => bind_set::<10>, Setnp => bind_set::<11>,
        Setl => bind_set::<12>, Setge => bind_set::<13>, Setle => bind_set::<14>, Setg => bind_set::<15>,
    }
    User "SDM vol. 2, flag control" {
        Lahf => |_| Some(lahf), Sahf => |_| Some(sahf), Clc => |_| Some(clc), Stc => |_| Some(stc),
        Cmc => |_| Some(cmc), Cld => |_| Some(cld), Std => |_| Some(std), Salc => |_| Some(salc),
    }
    User "SDM vol. 2, NOP and hints; fences order nothing here beyond what the host orders" {
        Nop => bind_nop, Pause => |_| Some(pause), Endbr64 => bind_nop, Endbr32 => bind_nop,
        Reservednop => bind_nop,
        Prefetchnta => bind_nop, Prefetcht0 => bind_nop, Prefetcht1 => bind_nop, Prefetcht2 => bind_nop,
        Prefetchw => bind_nop, Prefetch => bind_nop, Prefetchwt1 => bind_nop,
        Lfence => bind_nop, Sfence => bind_nop, Mfence => |_| Some(mfence),
    }
};

unsafe fn mfence(_: &mut Cpu, _: &Op) -> R {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}
