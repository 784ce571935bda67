//! Bit instructions. SDM vol. 2: BT BTC BTR BTS, BSF BSR LZCNT TZCNT POPCNT, BMI1 and BMI2, ADCX
//! ADOX, CRC32.

use crate::cpu::access::Int;
use crate::cpu::alu::{Alu2, AluInt, And, Test};
use crate::cpu::bind::{register_offset, Binder, Kind};
use crate::cpu::op::{Handler, Op, LOCK};
use crate::cpu::table::Row;
use crate::cpu::{Cpu, R};
use crate::{rows, sized};
use std::arch::asm;

const CF: u16 = 0x100;
const ZF: u16 = 0x4000;

// ---- BT family -----------------------------------------------------------------------------

/// What to do with the bit: 0 test, 1 set, 2 reset, 3 complement (as in the opcode's low bits).
#[inline(always)]
fn change<const KIND: u8>(value: u64, bit: u32) -> u64 {
    match KIND {
        0 => value,
        1 => value | 1 << bit,
        2 => value & !(1 << bit),
        _ => value ^ 1 << bit,
    }
}

#[inline(always)]
fn set_cf(flags: &mut u16, value: u64, bit: u32) {
    *flags = *flags & !CF | ((value >> bit & 1) as u16) << 8;
}

unsafe fn bt_r<T: Int, const KIND: u8, const IMM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let raw = if IMM { op.imm } else { cpu.reg::<T>(op.src).to_u64() };
    let bit = raw as u32 & (T::BITS - 1);
    let value = cpu.reg::<T>(op.dst).to_u64();
    set_cf(&mut cpu.flags, value, bit);
    if KIND != 0 {
        cpu.set_reg(op.dst, T::from_u64(change::<KIND>(value, bit)));
    }
    Ok(())
}

/// With a register bit offset the memory operand is a bit string: the offset, signed, selects the
/// word (SDM vol. 2, 3.1.1.9).
unsafe fn bt_m<T: Int, const KIND: u8, const IMM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let mut at = *op;
    let bit = if IMM {
        op.imm as u32 & (T::BITS - 1)
    } else {
        let offset = cpu.reg::<T>(op.src).to_i64();
        let word = offset >> T::BITS.trailing_zeros();
        at.disp = at.disp.wrapping_add(word.wrapping_mul(T::SIZE as i64));
        offset as u32 & (T::BITS - 1)
    };
    let linear = cpu.lin(&at, T::SIZE as u64, KIND != 0)?;
    if KIND == 0 {
        let value: T = cpu.rd(linear, op.seg())?;
        set_cf(&mut cpu.flags, value.to_u64(), bit);
        return Ok(());
    }
    let step = move |value: T, flags: &mut u16| {
        set_cf(flags, value.to_u64(), bit);
        T::from_u64(change::<KIND>(value.to_u64(), bit))
    };
    if op.has(LOCK) {
        return cpu.atomic_rmw(linear, op.seg(), step).map(|_| ());
    }
    cpu.rmw(linear, op.seg(), |cpu, value| step(value, &mut cpu.flags))
}

fn bind_bt<const KIND: u8>(b: &mut Binder) -> Option<Handler> {
    macro_rules! pick {
        ($f:ident, $imm:literal) => {
            match b.width(0) {
                2 => Some($f::<u16, KIND, $imm> as Handler),
                4 => Some($f::<u32, KIND, $imm> as Handler),
                8 => Some($f::<u64, KIND, $imm> as Handler),
                _ => None,
            }
        };
    }
    match (b.kind(0), b.kind(1)) {
        (Kind::Reg, _) if b.op.has(LOCK) => None,
        (Kind::Mem, _) if KIND == 0 && b.op.has(LOCK) => None,
        (Kind::Reg, Kind::Reg) => pick!(bt_r, false),
        (Kind::Reg, _) => pick!(bt_r, true),
        (_, Kind::Reg) => pick!(bt_m, false),
        _ => pick!(bt_m, true),
    }
}

// ---- one source, one destination, flags of the host's instruction ----------------------------

/// An operation `dst = op(src)` that the host performs, also seeing the old destination.
trait Scan {
    fn run<T: Int>(src: u64, dst: u64, flags: &mut u16) -> u64;
}

macro_rules! scans {
    ($($name:ident $ins:literal;)*) => {
        $(struct $name;
        impl Scan for $name {
            #[inline(always)]
            fn run<T: Int>(src: u64, dst: u64, flags: &mut u16) -> u64 {
                let mut r = dst;
                let f: u16;
                // SAFETY: register arithmetic only.
                unsafe {
                    match T::SIZE {
                        2 => asm!("bt ax, 8", concat!($ins, " {r:x}, {s:x}"), "lahf", "seto al", r = inout(reg) r, s = in(reg) src, inout("ax") *flags => f, options(pure, nomem, nostack)),
                        4 => asm!("bt ax, 8", concat!($ins, " {r:e}, {s:e}"), "lahf", "seto al", r = inout(reg) r, s = in(reg) src, inout("ax") *flags => f, options(pure, nomem, nostack)),
                        _ => asm!("bt ax, 8", concat!($ins, " {r}, {s}"), "lahf", "seto al", r = inout(reg) r, s = in(reg) src, inout("ax") *flags => f, options(pure, nomem, nostack)),
                    }
                }
                *flags = f;
                r
            }
        })*
    };
}
scans! { Bsf "bsf"; Bsr "bsr"; Tzcnt "tzcnt"; Lzcnt "lzcnt"; Popcnt "popcnt"; }

// The whole 64-bit register goes in and out: BSF and BSR of zero leave it, a 32-bit result clears
// the upper half, just as the host does.
unsafe fn scan_r<T: Int, S: Scan>(cpu: &mut Cpu, op: &Op) -> R {
    let r = S::run::<T>(cpu.reg::<T>(op.src).to_u64(), cpu.reg::<u64>(op.dst), &mut cpu.flags);
    cpu.set_reg::<u64>(op.dst, r);
    Ok(())
}

unsafe fn scan_m<T: Int, S: Scan>(cpu: &mut Cpu, op: &Op) -> R {
    let src: T = cpu.rd_op(op)?;
    let r = S::run::<T>(src.to_u64(), cpu.reg::<u64>(op.dst), &mut cpu.flags);
    cpu.set_reg::<u64>(op.dst, r);
    Ok(())
}

fn bind_scan<S: Scan>(b: &mut Binder) -> Option<Handler> {
    if b.kind(1) == Kind::Reg {
        sized!(b.width(0), scan_r, S)
    } else {
        sized!(b.width(0), scan_m, S)
    }
}

// ---- BMI -----------------------------------------------------------------------------------

/// The operand that may be memory.
#[inline(always)]
fn rm<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op, register: u8) -> R<T> {
    if MEM {
        cpu.rd_op(op)
    } else {
        Ok(cpu.reg(register))
    }
}

macro_rules! by_kind {
    ($b:expr, $operand:literal, $f:ident $(, $extra:expr)*) => {
        match ($b.width(0), $b.kind($operand) == Kind::Mem) {
            (4, false) => Some($f::<u32, false $(, $extra)*> as Handler),
            (4, true) => Some($f::<u32, true $(, $extra)*> as Handler),
            (8, false) => Some($f::<u64, false $(, $extra)*> as Handler),
            (8, true) => Some($f::<u64, true $(, $extra)*> as Handler),
            _ => None,
        }
    };
}

const SF: u16 = 0x8000;
const AF_PF: u16 = 0x1400;

/// Flags of a result; AF and PF, which the manual leaves undefined, as Intel's CPUs have them. Translated code has
/// the host's.
fn flags_of<T: AluInt>(r: T, flags: &mut u16) {
    Test::run(r, r, flags);
    *flags &= !AF_PF;
}

/// Register offset of the third operand into `imm`.
fn third(b: &mut Binder) -> Option<()> {
    if b.kind(2) == Kind::Reg {
        b.op.imm = register_offset(b.ins.op_register(2))? as u64;
    }
    Some(())
}

/// ANDN dst, src1, r/m.
unsafe fn andn<T: AluInt, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let b = rm::<T, MEM>(cpu, op, op.imm as u8)?;
    let a = T::from_u64(!cpu.reg::<T>(op.src).to_u64());
    let r = And::run(a, b, &mut cpu.flags);
    cpu.flags &= !AF_PF;
    cpu.set_reg(op.dst, r);
    Ok(())
}

/// BLSI (0), BLSMSK (1), BLSR (2): dst, r/m.
unsafe fn bls<T: AluInt, const MEM: bool, const KIND: u8>(cpu: &mut Cpu, op: &Op) -> R {
    let a = rm::<T, MEM>(cpu, op, op.src)?;
    let v = a.to_u64();
    let (r, cf) = match KIND {
        0 => (v & v.wrapping_neg(), v != 0),
        1 => (v ^ v.wrapping_sub(1), v == 0),
        _ => (v & v.wrapping_sub(1), v == 0),
    };
    let r = T::from_u64(r);
    flags_of(r, &mut cpu.flags);
    cpu.flags = cpu.flags & !CF | (cf as u16) << 8;
    if KIND == 1 {
        cpu.flags &= !ZF;
    }
    cpu.set_reg(op.dst, r);
    Ok(())
}

/// BEXTR dst, r/m, control.
unsafe fn bextr<T: AluInt, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let value = rm::<T, MEM>(cpu, op, op.src)?.to_u64();
    let control: u64 = cpu.reg::<T>(op.imm as u8).to_u64();
    let (start, length) = (control as u32 & 0xff, control as u32 >> 8 & 0xff);
    let shifted = if start < T::BITS { value >> start } else { 0 };
    let r = T::from_u64(if length < 64 { shifted & ((1 << length) - 1) } else { shifted });
    flags_of(r, &mut cpu.flags);
    // Undefined, too.
    cpu.flags &= !SF;
    cpu.set_reg(op.dst, r);
    Ok(())
}

/// BZHI dst, r/m, index.
unsafe fn bzhi<T: AluInt, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let value = rm::<T, MEM>(cpu, op, op.src)?.to_u64();
    let index = cpu.reg::<T>(op.imm as u8).to_u64() as u32 & 0xff;
    let r = T::from_u64(if index < T::BITS { value & ((1u64 << index) - 1) } else { value });
    flags_of(r, &mut cpu.flags);
    if index >= T::BITS {
        cpu.flags |= CF;
    }
    cpu.set_reg(op.dst, r);
    Ok(())
}

/// SARX (0), SHLX (1), SHRX (2): dst, r/m, count; no flags.
unsafe fn shiftx<T: AluInt, const MEM: bool, const KIND: u8>(cpu: &mut Cpu, op: &Op) -> R {
    let value = rm::<T, MEM>(cpu, op, op.src)?;
    let count = cpu.reg::<T>(op.imm as u8).to_u64() as u32 & (T::BITS - 1);
    let r = match KIND {
        0 => (value.to_i64() >> count) as u64,
        1 => value.to_u64() << count,
        _ => value.to_u64() >> count,
    };
    cpu.set_reg(op.dst, T::from_u64(r));
    Ok(())
}

/// RORX dst, r/m, imm8.
unsafe fn rorx<T: AluInt, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let value = rm::<T, MEM>(cpu, op, op.src)?.to_u64();
    let count = op.imm as u32 & (T::BITS - 1);
    let r = if count == 0 { value } else { value >> count | value << (T::BITS - count) };
    cpu.set_reg(op.dst, T::from_u64(r));
    Ok(())
}

/// PDEP (deposit) and PEXT: dst, src, r/m mask.
unsafe fn pdep_pext<T: AluInt, const MEM: bool, const DEPOSIT: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let mut mask = rm::<T, MEM>(cpu, op, op.imm as u8)?.to_u64();
    let src = cpu.reg::<T>(op.src).to_u64();
    let (mut r, mut from) = (0u64, 0u32);
    while mask != 0 {
        let low = mask.trailing_zeros();
        r |= if DEPOSIT { (src >> from & 1) << low } else { (src >> low & 1) << from };
        mask &= mask - 1;
        from += 1;
    }
    cpu.set_reg(op.dst, T::from_u64(r));
    Ok(())
}

/// ADCX (carry in CF) and ADOX (carry in OF): no other flag changes.
unsafe fn adx<T: AluInt, const MEM: bool, const BY_OF: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let b = rm::<T, MEM>(cpu, op, op.src)?.to_u64();
    let a = cpu.reg::<T>(op.dst).to_u64();
    let carry = if BY_OF { cpu.flags & 1 } else { cpu.flags >> 8 & 1 };
    let sum = a as u128 + b as u128 + carry as u128;
    let out = (sum >> T::BITS & 1) as u16;
    cpu.flags = if BY_OF { cpu.flags & !1 | out } else { cpu.flags & !CF | out << 8 };
    cpu.set_reg(op.dst, T::from_u64(sum as u64));
    Ok(())
}

/// CRC32 dst, r/m of type S. SSE4.2 is in every CPU model, and in every host of x86-64-v2.
unsafe fn crc32<S: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op) -> R {
    let data = rm::<S, MEM>(cpu, op, op.src)?.to_u64();
    let mut crc: u64 = cpu.reg::<u32>(op.dst) as u64;
    // SAFETY: register arithmetic only.
    unsafe {
        match S::SIZE {
            1 => asm!("crc32 {c:e}, {d:l}", c = inout(reg) crc, d = in(reg) data, options(pure, nomem, nostack)),
            2 => asm!("crc32 {c:e}, {d:x}", c = inout(reg) crc, d = in(reg) data, options(pure, nomem, nostack)),
            4 => asm!("crc32 {c:e}, {d:e}", c = inout(reg) crc, d = in(reg) data, options(pure, nomem, nostack)),
            _ => asm!("crc32 {c}, {d}", c = inout(reg) crc, d = in(reg) data, options(pure, nomem, nostack)),
        }
    }
    cpu.set_reg::<u64>(op.dst, crc & 0xffff_ffff);
    Ok(())
}

fn bind_crc32(b: &mut Binder) -> Option<Handler> {
    match (b.width(1), b.kind(1) == Kind::Mem) {
        (1, false) => Some(crc32::<u8, false>),
        (2, false) => Some(crc32::<u16, false>),
        (4, false) => Some(crc32::<u32, false>),
        (8, false) => Some(crc32::<u64, false>),
        (1, true) => Some(crc32::<u8, true>),
        (2, true) => Some(crc32::<u16, true>),
        (4, true) => Some(crc32::<u32, true>),
        _ => Some(crc32::<u64, true>),
    }
}

macro_rules! bind3 {
    ($operand:literal, $f:ident $(, $extra:expr)*) => {
        |b| {
            third(b)?;
            by_kind!(b, $operand, $f $(, $extra)*)
        }
    };
}

/// Rows of the opcode table.
pub const ROWS: &[Row] = rows! {
    User "SDM vol. 2A, BT, BTC, BTR, BTS" {
        Bt => bind_bt::<0>, Bts => bind_bt::<1>, Btr => bind_bt::<2>, Btc => bind_bt::<3>,
    }
    User "SDM vol. 2, BSF, BSR, LZCNT, TZCNT, POPCNT" {
        Bsf => bind_scan::<Bsf>, Bsr => bind_scan::<Bsr>, Tzcnt => bind_scan::<Tzcnt>,
        Lzcnt => bind_scan::<Lzcnt>, Popcnt => bind_scan::<Popcnt>,
    }
    User "SDM vol. 2, BMI1, BMI2" {
        Andn => bind3!(2, andn), Blsi => |b| by_kind!(b, 1, bls, 0), Blsmsk => |b| by_kind!(b, 1, bls, 1),
        Blsr => |b| by_kind!(b, 1, bls, 2), Bextr => bind3!(1, bextr), Bzhi => bind3!(1, bzhi),
        Sarx => bind3!(1, shiftx, 0), Shlx => bind3!(1, shiftx, 1), Shrx => bind3!(1, shiftx, 2),
        Rorx => |b| by_kind!(b, 1, rorx), Pdep => bind3!(2, pdep_pext, true), Pext => bind3!(2, pdep_pext, false),
    }
    User "SDM vol. 2A, ADCX, ADOX, CRC32" {
        Adcx => |b| by_kind!(b, 1, adx, false), Adox => |b| by_kind!(b, 1, adx, true), Crc32 => bind_crc32,
    }
};
