//! Shifts, rotates, double shifts. SDM vol. 2: SAL SAR SHL SHR RCL RCR ROL ROR SHLD SHRD.

use crate::cpu::access::Int;
use crate::cpu::alu::*;
use crate::cpu::bind::{Binder, Kind};
use crate::cpu::op::{Handler, Op, LOCK};
use crate::cpu::table::Row;
use crate::cpu::{Cpu, R};
use crate::rows;
use std::arch::asm;

/// The count in CL; immediate counts are in `imm`.
const CL: u8 = 8;

#[inline(always)]
fn count<T: Int, const BY_CL: bool>(cpu: &Cpu, op: &Op) -> u8 {
    let raw = if BY_CL { cpu.reg::<u8>(CL) } else { op.imm as u8 };
    raw & if T::SIZE == 8 { 63 } else { 31 }
}

/// The shift of a register; the count is not zero.
#[inline(always)]
fn shift<T: AluInt, O: Shift, const BY_CL: bool>(value: T, count: u8, flags: &mut u16) -> T {
    let before = *flags;
    let result = O::run(value, count, flags);
    if O::ROTATES && !BY_CL && count > 1 && host_rotates_keep_of() {
        *flags = *flags & !1 | before & 1;
    }
    result
}

unsafe fn shift_r<T: AluInt, O: Shift, const BY_CL: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let count = count::<T, BY_CL>(cpu, op);
    let mut value: T = cpu.reg(op.dst);
    if count != 0 {
        value = shift::<T, O, BY_CL>(value, count, &mut cpu.flags);
    }
    // With a count of zero a 32-bit destination is still cleared above.
    cpu.set_reg(op.dst, value);
    Ok(())
}

unsafe fn shift_m<T: AluInt, O: Shift, const BY_CL: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let count = count::<T, BY_CL>(cpu, op);
    let linear = cpu.lin(op, T::SIZE as u64, true)?;
    cpu.rmw(linear, op.seg(), |cpu, value: T| match count {
        0 => value,
        _ => O::run(value, count, &mut cpu.flags),
    })
}

fn bind_shift<O: Shift>(b: &mut Binder) -> Option<Handler> {
    macro_rules! pick {
        ($f:ident, $by_cl:literal) => {
            match b.width(0) {
                1 => Some($f::<u8, O, $by_cl> as Handler),
                2 => Some($f::<u16, O, $by_cl> as Handler),
                4 => Some($f::<u32, O, $by_cl> as Handler),
                8 => Some($f::<u64, O, $by_cl> as Handler),
                _ => None,
            }
        };
    }
    match (b.kind(0), b.kind(1)) {
        _ if b.op.has(LOCK) => None,
        (Kind::Reg, Kind::Reg) => pick!(shift_r, true),
        (Kind::Reg, _) => pick!(shift_r, false),
        (_, Kind::Reg) => pick!(shift_m, true),
        _ => pick!(shift_m, false),
    }
}

macro_rules! double_shift {
    ($name:ident, $ins:literal) => {
        /// The double shift by the host's own instruction; the count is not zero.
        #[inline(always)]
        fn $name<T: Int>(a: T, b: T, count: u8, flags: &mut u16) -> T {
            let mut r = a.to_u64();
            let b = b.to_u64();
            let mut f = *flags;
            // SAFETY: register arithmetic only.
            unsafe {
                match T::SIZE {
                    2 => asm!("add al, 0x7f", "sahf", concat!($ins, " {r:x}, {b:x}, cl"), "lahf", "seto al",
                              r = inout(reg) r, b = in(reg) b, in("cl") count, inout("ax") f, options(pure, nomem, nostack)),
                    4 => asm!("add al, 0x7f", "sahf", concat!($ins, " {r:e}, {b:e}, cl"), "lahf", "seto al",
                              r = inout(reg) r, b = in(reg) b, in("cl") count, inout("ax") f, options(pure, nomem, nostack)),
                    _ => asm!("add al, 0x7f", "sahf", concat!($ins, " {r}, {b}, cl"), "lahf", "seto al",
                              r = inout(reg) r, b = in(reg) b, in("cl") count, inout("ax") f, options(pure, nomem, nostack)),
                }
            }
            *flags = f;
            T::from_u64(r)
        }
    };
}
double_shift!(host_shld, "shld");
double_shift!(host_shrd, "shrd");

#[inline(always)]
fn double<T: Int, const LEFT: bool>(a: T, b: T, count: u8, flags: &mut u16) -> T {
    match (count, LEFT) {
        (0, _) => a,
        (_, true) => host_shld(a, b, count, flags),
        (_, false) => host_shrd(a, b, count, flags),
    }
}

unsafe fn double_r<T: Int, const LEFT: bool, const BY_CL: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let count = count::<T, BY_CL>(cpu, op);
    let (a, b): (T, T) = (cpu.reg(op.dst), cpu.reg(op.src));
    let r = double::<T, LEFT>(a, b, count, &mut cpu.flags);
    cpu.set_reg(op.dst, r);
    Ok(())
}

unsafe fn double_m<T: Int, const LEFT: bool, const BY_CL: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let count = count::<T, BY_CL>(cpu, op);
    let b: T = cpu.reg(op.src);
    let linear = cpu.lin(op, T::SIZE as u64, true)?;
    cpu.rmw(linear, op.seg(), |cpu, a: T| double::<T, LEFT>(a, b, count, &mut cpu.flags))
}

fn bind_double<const LEFT: bool>(b: &mut Binder) -> Option<Handler> {
    macro_rules! pick {
        ($f:ident, $by_cl:literal) => {
            match b.width(0) {
                2 => Some($f::<u16, LEFT, $by_cl> as Handler),
                4 => Some($f::<u32, LEFT, $by_cl> as Handler),
                8 => Some($f::<u64, LEFT, $by_cl> as Handler),
                _ => None,
            }
        };
    }
    match (b.kind(0), b.kind(2)) {
        (Kind::Reg, Kind::Reg) => pick!(double_r, true),
        (Kind::Reg, _) => pick!(double_r, false),
        (_, Kind::Reg) => pick!(double_m, true),
        _ => pick!(double_m, false),
    }
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    User "SDM vol. 2B, SAL/SAR/SHL/SHR, RCL/RCR/ROL/ROR" {
        Shl => bind_shift::<Shl>, Sal => bind_shift::<Shl>, Shr => bind_shift::<Shr>, Sar => bind_shift::<Sar>,
        Rol => bind_shift::<Rol>, Ror => bind_shift::<Ror>, Rcl => bind_shift::<Rcl>, Rcr => bind_shift::<Rcr>,
    }
    User "SDM vol. 2B, SHLD, SHRD" {
        Shld => bind_double::<true>, Shrd => bind_double::<false>,
    }
};
