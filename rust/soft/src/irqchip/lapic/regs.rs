//! Names of the local APIC's registers and bits (Intel SDM volume 3, table "Local APIC Register
//! Address Map"). An x2APIC MSR number is 0x800 plus the offset divided by 16.

pub(crate) const ID: u32 = 0x020;
pub(crate) const VERSION: u32 = 0x030;
pub(crate) const TPR: u32 = 0x080;
pub(crate) const APR: u32 = 0x090;
pub(crate) const PPR: u32 = 0x0a0;
pub(crate) const EOI: u32 = 0x0b0;
pub(crate) const LDR: u32 = 0x0d0;
pub(crate) const DFR: u32 = 0x0e0;
pub(crate) const SVR: u32 = 0x0f0;
/// First of eight registers of 32 vectors each; so are TMR and IRR.
pub(crate) const ISR: u32 = 0x100;
pub(crate) const TMR: u32 = 0x180;
pub(crate) const IRR: u32 = 0x200;
pub(crate) const IRR_LAST: u32 = 0x270;
pub(crate) const ESR: u32 = 0x280;
pub(crate) const ICR: u32 = 0x300;
pub(crate) const ICR2: u32 = 0x310;
pub(crate) const LVT_TIMER: u32 = 0x320;
pub(crate) const LVT_ERROR: u32 = 0x370;
pub(crate) const TIMER_INITIAL: u32 = 0x380;
pub(crate) const TIMER_CURRENT: u32 = 0x390;
pub(crate) const TIMER_DIVIDE: u32 = 0x3e0;
pub(crate) const SELF_IPI: u32 = 0x3f0;

/// An integrated APIC with six LVT entries and without suppression of EOI broadcasts.
pub(crate) const VERSION_VALUE: u32 = 0x0005_0014;

/// Indices into the local vector table, in the order of the register addresses (1 is thermal, 2
/// performance).
pub(crate) const TIMER: usize = 0;
pub(crate) const LINT0: usize = 3;
pub(crate) const LINT1: usize = 4;
pub(crate) const ERROR: usize = 5;
pub(crate) const LVT_COUNT: usize = 6;

pub(crate) const LVT_MASKED: u32 = 1 << 16;
/// Delivery status and remote IRR: read-only, so writes neither change them nor fault.
pub(crate) const LVT_READ_ONLY: u32 = (1 << 12) | (1 << 14);
/// Bits that exist in each LVT entry.
pub(crate) const LVT_BITS: [u32; LVT_COUNT] =
    [0x0007_10ff, 0x0001_17ff, 0x0001_17ff, 0x0001_f7ff, 0x0001_f7ff, 0x0001_10ff];
/// The timer entry's TSC-deadline mode.
pub(crate) const LVT_TSC_DEADLINE: u32 = 1 << 18;
pub(crate) const LVT_EXTINT: u32 = 7 << 8;

pub(crate) const SVR_ENABLED: u32 = 1 << 8;
pub(crate) const SVR_BITS: u32 = 0x0000_03ff;

pub(crate) const ESR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
pub(crate) const ESR_RECEIVED_ILLEGAL_VECTOR: u32 = 1 << 6;
pub(crate) const ESR_ILLEGAL_ADDRESS: u32 = 1 << 7;

/// ICR bits software may set; bit 12 (delivery status) always reads 0, messages go out at once.
pub(crate) const ICR_LOW_BITS: u32 = 0x000c_cfff;
/// Bits whose setting faults in an x2APIC ICR write (bit 12 is tolerated, as in KVM).
pub(crate) const X2APIC_ICR_RESERVED: u64 = 0xfff3_2000;

pub(crate) const APIC_BASE_BSP: u64 = 1 << 8;
pub(crate) const APIC_BASE_EXTD: u64 = 1 << 10;
pub(crate) const APIC_BASE_ENABLE: u64 = 1 << 11;
pub(crate) const APIC_BASE_ADDRESS: u64 = 0xffff_ffff_ffff_f000;
/// Where the register page lies after reset.
pub(crate) const DEFAULT_BASE: u64 = 0xfee0_0000;

/// Vectors below this one are reserved for exceptions: the APIC never accepts them.
pub(crate) const FIRST_LEGAL_VECTOR: u8 = 16;
