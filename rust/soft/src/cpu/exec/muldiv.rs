//! Multiplication, division, decimal adjust. SDM vol. 2: MUL IMUL DIV IDIV MULX, AAA AAD AAM AAS DAA DAS.

use crate::cpu::access::Int;
use crate::cpu::bind::{Binder, Kind};
use crate::cpu::op::{Handler, Op};
use crate::cpu::table::Row;
use crate::cpu::{vector, Cpu, R};
use crate::{rows, sized};
use std::arch::asm;

const RDX: u8 = 16;

#[inline(always)]
fn operand<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R<T> {
    if MEM {
        cpu.rd_op(op)
    } else {
        Ok(cpu.reg(op.dst))
    }
}

macro_rules! multiply {
    ($name:ident, $ins:literal) => {
        /// The host's one-operand multiplication: low half, high half, flags.
        #[inline(always)]
        fn $name<T: Int>(a: T, b: T) -> (T, T, u16) {
            let (mut low, high, flags): (u64, u64, u64);
            low = a.to_u64();
            let b = b.to_u64();
            // SAFETY: register arithmetic only; the flags are kept before RAX is reused.
            unsafe {
                match T::SIZE {
                    1 => {
                        asm!(concat!($ins, " {b:l}"), "movzx {f:e}, ax", "lahf", "seto al",
                             b = in(reg) b, f = out(reg) high, inout("rax") low => flags, options(pure, nomem, nostack));
                        return (T::from_u64(high), T::from_u64(high >> 8), flags as u16);
                    }
                    2 => asm!(concat!($ins, " {b:x}"), "movzx {r:e}, ax", "lahf", "seto al",
                              b = in(reg) b, r = lateout(reg) low, inout("rax") low => flags, out("rdx") high,
                              options(pure, nomem, nostack)),
                    4 => asm!(concat!($ins, " {b:e}"), "mov {r:e}, eax", "lahf", "seto al",
                              b = in(reg) b, r = lateout(reg) low, inout("rax") low => flags, out("rdx") high,
                              options(pure, nomem, nostack)),
                    _ => asm!(concat!($ins, " {b}"), "mov {r}, rax", "lahf", "seto al",
                              b = in(reg) b, r = lateout(reg) low, inout("rax") low => flags, out("rdx") high,
                              options(pure, nomem, nostack)),
                }
            }
            (T::from_u64(low), T::from_u64(high), flags as u16)
        }
    };
}
multiply!(host_mul, "mul");
multiply!(host_imul, "imul");

unsafe fn mul<T: Int, const SIGNED: bool, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let b = operand::<T, MEM>(cpu, op)?;
    let a: T = cpu.reg(0);
    let (low, high, flags) = if SIGNED { host_imul(a, b) } else { host_mul(a, b) };
    cpu.flags = flags;
    cpu.set_reg(0, low);
    cpu.set_reg(if T::SIZE == 1 { 1 } else { RDX }, high);
    Ok(())
}

/// Two- and three-operand IMUL: the truncated product.
#[inline(always)]
fn imul2<T: Int>(a: T, b: T, flags: &mut u16) -> T {
    let (low, _, new) = host_imul(a, b);
    *flags = new;
    low
}

unsafe fn imul_rr<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let r = imul2::<T>(cpu.reg(op.dst), cpu.reg(op.src), &mut cpu.flags);
    cpu.set_reg(op.dst, r);
    Ok(())
}

unsafe fn imul_rm<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let b: T = cpu.rd_op(op)?;
    let r = imul2::<T>(cpu.reg(op.dst), b, &mut cpu.flags);
    cpu.set_reg(op.dst, r);
    Ok(())
}

unsafe fn imul_rri<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let r = imul2::<T>(cpu.reg(op.src), T::from_u64(op.imm), &mut cpu.flags);
    cpu.set_reg(op.dst, r);
    Ok(())
}

unsafe fn imul_rmi<T: Int>(cpu: &mut Cpu, op: &Op) -> R {
    let a: T = cpu.rd_op(op)?;
    let r = imul2::<T>(a, T::from_u64(op.imm), &mut cpu.flags);
    cpu.set_reg(op.dst, r);
    Ok(())
}

macro_rules! by_width_and_kind {
    ($b:expr, $f:ident, $signed:literal) => {
        match ($b.width(0), $b.kind(0) == Kind::Mem) {
            (1, false) => Some($f::<u8, $signed, false> as Handler),
            (2, false) => Some($f::<u16, $signed, false> as Handler),
            (4, false) => Some($f::<u32, $signed, false> as Handler),
            (8, false) => Some($f::<u64, $signed, false> as Handler),
            (1, true) => Some($f::<u8, $signed, true> as Handler),
            (2, true) => Some($f::<u16, $signed, true> as Handler),
            (4, true) => Some($f::<u32, $signed, true> as Handler),
            (8, true) => Some($f::<u64, $signed, true> as Handler),
            _ => None,
        }
    };
}

fn bind_imul(b: &mut Binder) -> Option<Handler> {
    let width = b.width(0);
    match (b.ins.op_count(), b.kind(1)) {
        (1, _) => by_width_and_kind!(b, mul, true),
        (2, Kind::Reg) => sized!(width, imul_rr),
        (2, _) => sized!(width, imul_rm),
        (_, Kind::Reg) => sized!(width, imul_rri),
        _ => sized!(width, imul_rmi),
    }
}

/// DIV and IDIV; #DE for zero and for quotients that do not fit. Flags stay as they are: the manual
/// leaves them undefined.
unsafe fn div<T: Int, const SIGNED: bool, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let divisor = operand::<T, MEM>(cpu, op)?;
    let high: T = cpu.reg(if T::SIZE == 1 { 1 } else { RDX });
    let low: T = cpu.reg(0);
    let result = if SIGNED {
        let dividend = (high.to_i64() as i128) << T::BITS | low.to_u64() as i128;
        signed_quotient::<T>(dividend, divisor.to_i64() as i128)
    } else {
        let dividend = (high.to_u64() as u128) << T::BITS | low.to_u64() as u128;
        unsigned_quotient::<T>(dividend, divisor.to_u64() as u128)
    };
    let Some((quotient, remainder)) = result else { return Err(cpu.raise(vector::DE, None)) };
    cpu.set_reg(0, T::from_u64(quotient));
    cpu.set_reg(if T::SIZE == 1 { 1 } else { RDX }, T::from_u64(remainder));
    Ok(())
}

#[inline(always)]
fn unsigned_quotient<T: Int>(dividend: u128, divisor: u128) -> Option<(u64, u64)> {
    if divisor == 0 || dividend >> T::BITS >= divisor {
        return None;
    }
    if dividend >> 64 == 0 {
        // Most divisions: the host's 64-bit division is much faster than the 128-bit routine.
        return Some((dividend as u64 / divisor as u64, dividend as u64 % divisor as u64));
    }
    Some(((dividend / divisor) as u64, (dividend % divisor) as u64))
}

#[inline(always)]
fn signed_quotient<T: Int>(dividend: i128, divisor: i128) -> Option<(u64, u64)> {
    if divisor == 0 {
        return None;
    }
    let (quotient, remainder) = match (i64::try_from(dividend), divisor) {
        (Ok(dividend), divisor) if divisor != -1 => {
            let divisor = divisor as i64;
            ((dividend / divisor) as i128, (dividend % divisor) as i128)
        }
        _ => (dividend.checked_div(divisor)?, dividend.checked_rem(divisor)?),
    };
    let (least, most) = (-1i128 << (T::BITS - 1), (1i128 << (T::BITS - 1)) - 1);
    (least..=most).contains(&quotient).then_some((quotient as u64, remainder as u64))
}

/// MULX: `dst` high, `src` low, rDX times the third operand (register offset in `imm`).
unsafe fn mulx<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let b: T = if MEM { cpu.rd_op(op)? } else { cpu.reg(op.imm as u8) };
    let product = cpu.reg::<T>(RDX).to_u64() as u128 * b.to_u64() as u128;
    // When both destinations are one register it gets the high half.
    cpu.set_reg(op.src, T::from_u64(product as u64));
    cpu.set_reg(op.dst, T::from_u64((product >> T::BITS) as u64));
    Ok(())
}

fn bind_mulx(b: &mut Binder) -> Option<Handler> {
    let memory = b.kind(2) == Kind::Mem;
    if !memory {
        b.op.imm = crate::cpu::bind::register_offset(b.ins.op_register(2))? as u64;
    }
    match (b.width(0), memory) {
        (4, false) => Some(mulx::<u32, false>),
        (4, true) => Some(mulx::<u32, true>),
        (8, false) => Some(mulx::<u64, false>),
        _ => Some(mulx::<u64, true>),
    }
}

// ---- decimal adjust: outside of 64-bit mode only -------------------------------------------

fn set_szp(cpu: &mut Cpu, value: u8, cf: bool, af: bool, of: bool) {
    let parity = value.count_ones().is_multiple_of(2);
    let low =
        (value & 0x80) as u16 | ((value == 0) as u16) << 6 | (af as u16) << 4 | (parity as u16) << 2 | 2 | cf as u16;
    cpu.flags = low << 8 | of as u16;
}

unsafe fn daa_das<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op) -> R {
    let (old, old_cf, old_af): (u8, bool, bool) = (cpu.reg(0), cpu.cf(), cpu.flags & 0x1000 != 0);
    let apply = |value: u8, by: u8| if SUBTRACT { value.wrapping_sub(by) } else { value.wrapping_add(by) };
    let (mut al, mut cf, mut af) = (old, false, false);
    if old & 0xf > 9 || old_af {
        cf = old_cf || if SUBTRACT { old < 6 } else { old > 0xf9 };
        al = apply(al, 6);
        af = true;
    }
    if old > 0x99 || old_cf {
        al = apply(al, 0x60);
        cf = true;
    } else if !SUBTRACT {
        cf = false;
    }
    cpu.set_reg(0, al);
    set_szp(cpu, al, cf, af, false);
    Ok(())
}

unsafe fn aaa_aas<const SUBTRACT: bool>(cpu: &mut Cpu, _: &Op) -> R {
    let ax: u16 = cpu.reg(0);
    let adjust = ax & 0xf > 9 || cpu.flags & 0x1000 != 0;
    let mut result = ax;
    if adjust {
        result = if SUBTRACT { ax.wrapping_sub(0x106) } else { ax.wrapping_add(0x106) };
    }
    result &= 0xff0f;
    cpu.set_reg(0, result);
    set_szp(cpu, result as u8, adjust, adjust, false);
    Ok(())
}

unsafe fn aam(cpu: &mut Cpu, op: &Op) -> R {
    let base = op.imm as u8;
    if base == 0 {
        return Err(cpu.raise(vector::DE, None));
    }
    let al: u8 = cpu.reg(0);
    cpu.set_reg(0, (al / base) as u16 * 256 + (al % base) as u16);
    set_szp(cpu, al % base, false, false, false);
    Ok(())
}

unsafe fn aad(cpu: &mut Cpu, op: &Op) -> R {
    let (al, ah): (u8, u8) = (cpu.reg(0), cpu.reg(1));
    let result = al.wrapping_add(ah.wrapping_mul(op.imm as u8));
    cpu.set_reg(0, result as u16);
    set_szp(cpu, result, false, false, false);
    Ok(())
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    User "SDM vol. 2, MUL, IMUL, DIV, IDIV, MULX" {
        Mul => |b| by_width_and_kind!(b, mul, false), Imul => bind_imul,
        Div => |b| by_width_and_kind!(b, div, false), Idiv => |b| by_width_and_kind!(b, div, true),
        Mulx => bind_mulx,
    }
    User "SDM vol. 2, decimal adjust" {
        Daa => |_| Some(daa_das::<false>), Das => |_| Some(daa_das::<true>),
        Aaa => |_| Some(aaa_aas::<false>), Aas => |_| Some(aaa_aas::<true>),
        Aam => |_| Some(aam), Aad => |_| Some(aad),
    }
};
