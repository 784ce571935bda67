//! Machine checks: the registers of SDM vol. 3, chapter 16, and KVM_X86_SETUP_MCE, KVM_X86_SET_MCE.
//!
//! Nothing of the engine's goes bad by itself: user space says what is to be found in a bank, and whether the
//! processor is interrupted for it. A vCPU that was not set up has no banks. Left out: CMCI, local machine checks.

use crate::clock::lock;
use crate::cpu::state::cr4;
use crate::cpu::{Cpu, Fault, Gp};
use crate::ioctl::{get, Answer};
use kvm_bindings::kvm_x86_mce;
use std::sync::atomic::{AtomicBool, Ordering::*};
use std::sync::Mutex;

pub(crate) const MAX_BANKS: usize = 32;
/// MCG_CTL_P and MCG_SER_P, beside the number of banks.
pub(crate) const SUPPORTED: u64 = CTL_P | 1 << 24;
const CTL_P: u64 = 1 << 8;
const BANK_COUNT: u64 = 0xff;
/// Reserved for the number of extended registers; KVM takes anything there.
const EXTENDED_COUNT: u64 = 0xff_0000;

const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const MCG_CTL: u32 = 0x17b;
const MC0_CTL: u32 = 0x400;
const CTL: usize = 0;
const STATUS: usize = 1;
/// IA32_MCG_STATUS: a machine check is being handled.
const MCIP: u64 = 1 << 2;
/// IA32_MCi_STATUS: there is an error, more than one came, it was not corrected.
const VAL: u64 = 1 << 63;
const OVER: u64 = 1 << 62;
const UC: u64 = 1 << 61;
const MACHINE_CHECK: u8 = 18;

#[derive(Default)]
struct Registers {
    cap: u64,
    status: u64,
    ctl: u64,
    /// CTL, STATUS, ADDR, MISC of each.
    banks: Vec<[u64; 4]>,
}

/// One vCPU's.
#[derive(Default)]
pub(crate) struct Mce {
    registers: Mutex<Registers>,
    /// An error came that the guest could not be told of.
    shutdown: AtomicBool,
}

impl Mce {
    /// KVM_X86_SETUP_MCE: IA32_MCG_CAP; every bank is enabled.
    pub fn set_up(&self, cap: u64) -> Answer {
        let count = (cap & BANK_COUNT) as usize;
        if count == 0 || count > MAX_BANKS || cap & !(SUPPORTED | BANK_COUNT | EXTENDED_COUNT) != 0 {
            return Err(libc::EINVAL);
        }
        let ctl = if cap & CTL_P != 0 { !0 } else { 0 };
        *lock(&self.registers) = Registers { cap, status: 0, ctl, banks: vec![[!0, 0, 0, 0]; count] };
        Ok(0)
    }

    /// RDMSR; `None` for what is none of these.
    pub fn read(&self, msr: u32) -> Option<Result<u64, Gp>> {
        let registers = lock(&self.registers);
        Some(Ok(match msr {
            MCG_CAP => registers.cap,
            MCG_STATUS => registers.status,
            MCG_CTL if registers.cap & CTL_P != 0 => registers.ctl,
            _ => {
                let (bank, which) = place(&registers, msr)?;
                registers.banks[bank][which]
            }
        }))
    }

    /// WRMSR; user space may also put errors there.
    pub fn write(&self, msr: u32, value: u64, host: bool) -> Option<Result<(), Gp>> {
        let mut registers = lock(&self.registers);
        match msr {
            MCG_CAP if host && value == registers.cap => {}
            MCG_CAP => return Some(Err(Gp)),
            MCG_STATUS => registers.status = value,
            MCG_CTL if registers.cap & CTL_P != 0 && (value == 0 || value == !0) => registers.ctl = value,
            MCG_CTL if registers.cap & CTL_P != 0 => return Some(Err(Gp)),
            _ => {
                let (bank, which) = place(&registers, msr)?;
                // Bit 10 of bank 4's control is cleared by Linux on some AMD processors, and every bank's may be.
                let wrong = match which {
                    CTL => value != 0 && value | 1 << 10 != !0,
                    STATUS => value != 0 && !host,
                    _ => false,
                };
                if wrong {
                    return Some(Err(Gp));
                }
                registers.banks[bank][which] = value;
            }
        }
        Some(Ok(()))
    }

    /// KVM_X86_SET_MCE: an error in a bank; one that was not corrected interrupts the processor.
    pub fn raise(&self, cpu: &mut Cpu, arg: &[u8]) -> Answer {
        let mce: kvm_x86_mce = get(arg)?;
        let mut registers = lock(&self.registers);
        let uncorrected = mce.status & UC != 0;
        let all_enabled = registers.cap & CTL_P == 0 || registers.ctl == !0;
        let busy = registers.status & MCIP != 0 || cpu.cr4 & cr4::MCE == 0;
        let Some(bank) = registers.banks.get_mut(mce.bank as usize).filter(|_| mce.status & VAL != 0) else {
            return Err(libc::EINVAL);
        };
        if uncorrected && (!all_enabled || bank[CTL] != !0) {
            return Ok(0);
        }
        if uncorrected && busy {
            self.shutdown.store(true, Relaxed);
            return Ok(0);
        }
        let before = bank[STATUS];
        if !uncorrected && before & (VAL | UC) == VAL | UC {
            // The worse one stays.
            bank[STATUS] |= OVER;
            return Ok(0);
        }
        let over = if before & VAL != 0 { OVER } else { 0 };
        *bank = [bank[CTL], mce.status | over, mce.addr, mce.misc];
        if uncorrected {
            registers.status = mce.mcg_status;
            cpu.pending.exception = Some(Fault { vector: MACHINE_CHECK, error: None, payload: 0 });
            cpu.halted = false;
        }
        Ok(0)
    }

    /// Whether an error came that the guest could not be told of: the processor shuts down.
    pub fn take_shutdown(&self) -> bool {
        self.shutdown.swap(false, Relaxed)
    }
}

/// Which bank's which register.
fn place(registers: &Registers, msr: u32) -> Option<(usize, usize)> {
    let at = msr.checked_sub(MC0_CTL)? as usize;
    (at / 4 < registers.banks.len()).then_some((at / 4, at % 4))
}
