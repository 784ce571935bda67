//! Integer arithmetic with exact flags: each operation is the host's own instruction, followed by
//! LAHF and SETO. Even flags the manual calls undefined come out as this host has them.
//!
//! A flags image is a `u16`: the high byte as LAHF gives it (SF ZF 0 AF 0 PF 1 CF), the low byte
//! OF as 0 or 1. The only file of the interpreter's integer part that is host-specific: a portable
//! build replaces it.

use super::access::Int;
use std::arch::asm;
use std::sync::OnceLock;

/// An operation on two operands.
pub trait Alu2 {
    /// The result; the flags image is read where the operation needs CF and replaced.
    fn run<T: AluInt>(a: T, b: T, flags: &mut u16) -> T;
    /// CMP and TEST: the result is not stored.
    const STORES: bool = true;
    /// The bus lock makes sense (all but CMP and TEST).
    const LOCKABLE: bool = Self::STORES;
}

/// An operation on one operand.
pub trait Alu1 {
    /// The result and new flags.
    fn run<T: AluInt>(a: T, flags: &mut u16) -> T;
}

/// A shift or rotate; the count is masked and not zero.
pub trait Shift {
    /// ROL and ROR: see [`host_rotates_keep_of`].
    const ROTATES: bool = false;
    /// The result and new flags.
    fn run<T: AluInt>(a: T, count: u8, flags: &mut u16) -> T;
}

macro_rules! each_width {
    ($($unsigned:ty, $class:ident, $modifier:literal;)*) => {
        $(impl AluInt for $unsigned {
            binary!($class, $modifier: add "add", or "or", and "and", sub "sub", xor "xor", test "test", cmp "cmp");
            binary_cf!($class, $modifier: adc "adc", sbb "sbb");
            unary!($class, $modifier: inc "inc", dec "dec", neg "neg");
            shifts!($class, $modifier: shl "shl", shr "shr", sar "sar", rol "rol", ror "ror", rcl "rcl", rcr "rcr");
        })*
    };
}

macro_rules! binary {
    ($class:ident, $m:literal: $($name:ident $ins:literal),*) => {
        $(#[inline(always)]
        fn $name(a: Self, b: Self, flags: &mut u16) -> Self {
            let mut r = a;
            let out: u16;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!(concat!($ins, " {r:", $m, "}, {b:", $m, "}"), "lahf", "seto al",
                     r = inout($class) r, b = in($class) b, out("ax") out, options(pure, nomem, nostack));
            }
            *flags = out;
            r
        })*
    };
}

macro_rules! binary_cf {
    ($class:ident, $m:literal: $($name:ident $ins:literal),*) => {
        $(#[inline(always)]
        fn $name(a: Self, b: Self, flags: &mut u16) -> Self {
            let mut r = a;
            let out: u16;
            // SAFETY: register arithmetic only.
            unsafe {
                asm!("bt ax, 8", concat!($ins, " {r:", $m, "}, {b:", $m, "}"), "lahf", "seto al",
                     r = inout($class) r, b = in($class) b, inout("ax") *flags => out, options(pure, nomem, nostack));
            }
            *flags = out;
            r
        })*
    };
}

macro_rules! unary {
    ($class:ident, $m:literal: $($name:ident $ins:literal),*) => {
        $(#[inline(always)]
        fn $name(a: Self, flags: &mut u16) -> Self {
            let mut r = a;
            let out: u16;
            // SAFETY: register arithmetic only; INC and DEC keep the CF that BT loads.
            unsafe {
                asm!("bt ax, 8", concat!($ins, " {r:", $m, "}"), "lahf", "seto al",
                     r = inout($class) r, inout("ax") *flags => out, options(pure, nomem, nostack));
            }
            *flags = out;
            r
        })*
    };
}

macro_rules! shifts {
    ($class:ident, $m:literal: $($name:ident $ins:literal),*) => {
        $(#[inline(always)]
        fn $name(a: Self, count: u8, flags: &mut u16) -> Self {
            let mut r = a;
            let out: u16;
            // SAFETY: register arithmetic only; ADD and SAHF give rotates the flags they keep.
            unsafe {
                asm!("add al, 0x7f", "sahf", concat!($ins, " {r:", $m, "}, cl"), "lahf", "seto al",
                     r = inout($class) r, in("cl") count, inout("ax") *flags => out, options(pure, nomem, nostack));
            }
            *flags = out;
            r
        })*
    };
}

/// Operand types with the primitive operations; use them through [`Alu2`], [`Alu1`], [`Shift`].
#[allow(missing_docs)]
pub trait AluInt: Int {
    fn add(a: Self, b: Self, flags: &mut u16) -> Self;
    fn or(a: Self, b: Self, flags: &mut u16) -> Self;
    fn and(a: Self, b: Self, flags: &mut u16) -> Self;
    fn sub(a: Self, b: Self, flags: &mut u16) -> Self;
    fn xor(a: Self, b: Self, flags: &mut u16) -> Self;
    fn test(a: Self, b: Self, flags: &mut u16) -> Self;
    fn cmp(a: Self, b: Self, flags: &mut u16) -> Self;
    fn adc(a: Self, b: Self, flags: &mut u16) -> Self;
    fn sbb(a: Self, b: Self, flags: &mut u16) -> Self;
    fn inc(a: Self, flags: &mut u16) -> Self;
    fn dec(a: Self, flags: &mut u16) -> Self;
    fn neg(a: Self, flags: &mut u16) -> Self;
    fn shl(a: Self, count: u8, flags: &mut u16) -> Self;
    fn shr(a: Self, count: u8, flags: &mut u16) -> Self;
    fn sar(a: Self, count: u8, flags: &mut u16) -> Self;
    fn rol(a: Self, count: u8, flags: &mut u16) -> Self;
    fn ror(a: Self, count: u8, flags: &mut u16) -> Self;
    fn rcl(a: Self, count: u8, flags: &mut u16) -> Self;
    fn rcr(a: Self, count: u8, flags: &mut u16) -> Self;
}

each_width! {
    u8, reg_byte, "";
    u16, reg, "x";
    u32, reg, "e";
    u64, reg, "r";
}

macro_rules! ops2 {
    ($($name:ident $method:ident $stores:literal;)*) => {
        $(#[allow(missing_docs)]
        pub struct $name;
        impl Alu2 for $name {
            const STORES: bool = $stores;
            #[inline(always)]
            fn run<T: AluInt>(a: T, b: T, flags: &mut u16) -> T {
                <T as AluInt>::$method(a, b, flags)
            }
        })*
    };
}
ops2! {
    Add add true; Or or true; Adc adc true; Sbb sbb true; And and true; Sub sub true; Xor xor true;
    Cmp cmp false; Test test false;
}

macro_rules! ops1 {
    ($($name:ident $method:ident;)*) => {
        $(#[allow(missing_docs)]
        pub struct $name;
        impl Alu1 for $name {
            #[inline(always)]
            fn run<T: AluInt>(a: T, flags: &mut u16) -> T {
                T::$method(a, flags)
            }
        })*
    };
}
ops1! { Inc inc; Dec dec; Neg neg; }

/// NOT changes no flag.
pub struct Not;
impl Alu1 for Not {
    #[inline(always)]
    fn run<T: AluInt>(a: T, _: &mut u16) -> T {
        T::from_u64(!a.to_u64())
    }
}

macro_rules! shift_ops {
    ($($name:ident $method:ident $rotates:literal;)*) => {
        $(#[allow(missing_docs)]
        pub struct $name;
        impl Shift for $name {
            const ROTATES: bool = $rotates;
            #[inline(always)]
            fn run<T: AluInt>(a: T, count: u8, flags: &mut u16) -> T {
                T::$method(a, count, flags)
            }
        })*
    };
}
shift_ops! { Shl shl false; Shr shr false; Sar sar false; Rol rol true; Ror ror true; Rcl rcl false; Rcr rcr false; }

/// Whether this host's ROL and ROR of a register by an immediate above 1 leave OF alone, unlike those
/// of memory or by CL. The
/// manual calls it undefined; Intel's CPUs do.
pub fn host_rotates_keep_of() -> bool {
    static KEEP: OnceLock<bool> = OnceLock::new();
    *KEEP.get_or_init(|| {
        let of: u8;
        // SAFETY: register arithmetic only; the addition sets OF, rotating zero would clear it.
        unsafe {
            asm!("mov al, 1", "add al, 0x7f", "mov al, 0", "rol al, 2", "seto al", out("al") of, options(pure, nomem, nostack));
        }
        of != 0
    })
}

/// Whether a condition code (the low 4 bits of Jcc's opcode) holds.
#[inline(always)]
pub fn condition<const CC: u8>(flags: u16) -> bool {
    let (cf, zf, sf, pf, of) =
        (flags & 0x100 != 0, flags & 0x4000 != 0, flags & 0x8000 != 0, flags & 0x400 != 0, flags & 1 != 0);
    let holds = match CC >> 1 {
        0 => of,
        1 => cf,
        2 => zf,
        3 => cf | zf,
        4 => sf,
        5 => pf,
        6 => sf != of,
        _ => zf | (sf != of),
    };
    holds != (CC & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_add_overflow_sets_of_and_sf() {
        let mut flags = 0;
        assert_eq!(Add::run(0x7fff_ffffu32, 1, &mut flags), 0x8000_0000);
        assert!(condition::<0>(flags) && condition::<8>(flags) && !condition::<2>(flags));
    }

    #[test]
    fn test_adc_takes_the_carry_of_the_image() {
        let mut flags = 0x0300;
        assert_eq!(Adc::run(0xffu8, 0, &mut flags), 0);
        assert!(condition::<2>(flags) && condition::<4>(flags));
    }

    #[test]
    fn test_inc_keeps_carry() {
        let mut flags = 0x0300;
        assert_eq!(Inc::run(5u64, &mut flags), 6);
        assert!(condition::<2>(flags));
    }

    #[test]
    fn test_rotate_keeps_zf() {
        let mut flags = 0x4200;
        assert_eq!(Rol::run(0x81u8, 1, &mut flags), 3);
        assert!(condition::<4>(flags) && condition::<2>(flags));
    }
}
