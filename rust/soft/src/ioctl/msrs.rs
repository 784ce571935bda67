//! KVM_GET_MSRS and KVM_SET_MSRS: user space's view of the MSRs, and the lists of them.
//!
//! User space may restore what a guest may not write (read-only MSRs, a counter without side
//! effects), so this is apart from RDMSR and WRMSR. As in KVM, a request gives how many entries it
//! processed: it ends at the first it cannot.

use super::{get_at, put_at, Answer};
use crate::board::Local;
use crate::cpu::msr::index::{ARCH_CAPABILITIES, BIOS_SIGN_ID};
use crate::cpu::msr::STATEFUL;
use crate::cpu::Cpu;
use kvm_bindings::kvm_msr_entry;

/// MSR_IO's MAX_IO_MSRS.
const MAX_ENTRIES: u32 = 256;
const HEADER: usize = 8;
const ENTRY: usize = size_of::<kvm_msr_entry>();

/// MSRs that the board keeps.
#[allow(missing_docs)]
pub(crate) mod msr {
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1b;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const KVM_WALL_CLOCK: u32 = 0x11;
    pub const KVM_SYSTEM_TIME: u32 = 0x12;
    pub const KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
    pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    pub const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
}
use msr::*;

/// What of the board's a saved vCPU needs besides what the CPU lists; IA32_APIC_BASE is in SREGS.
const BOARD_STATE: [u32; 6] =
    [TSC_DEADLINE, KVM_WALL_CLOCK, KVM_SYSTEM_TIME, KVM_WALL_CLOCK_NEW, KVM_SYSTEM_TIME_NEW, KVM_STEAL_TIME];

/// What describes the model (KVM_GET_MSR_FEATURE_INDEX_LIST).
const FEATURES: [u32; 2] = [BIOS_SIGN_ID, ARCH_CAPABILITIES];

/// IA32_ARCH_CAPABILITIES: RDCL_NO IBRS_ALL SKIP_L1DFL SSB_NO MDS_NO PSCHANGE_MC_NO TAA_NO
/// SBDR_SSDP_NO FBSDP_NO PSDP_NO BHI_NO PBRSB_NO GDS_NO RFDS_NO ITS_NO. The interpreter's guests
/// never run an instruction of theirs speculatively on the host.
const IMMUNITIES: u64 = 1 << 62 | 0b1101_0001_0000_1110_0001_0111_1011;
/// Microcode revision 1, in the upper half.
const MICROCODE: u64 = 1 << 32;

/// KVM_GET_MSR_INDEX_LIST: what a saved vCPU needs.
pub(crate) fn saved(arg: &mut [u8]) -> Answer {
    list(arg, &[STATEFUL, &BOARD_STATE].concat())
}

/// KVM_GET_MSR_FEATURE_INDEX_LIST.
pub(crate) fn features(arg: &mut [u8]) -> Answer {
    list(arg, &FEATURES)
}

fn list(arg: &mut [u8], msrs: &[u32]) -> Answer {
    let room: u32 = get_at(arg, 0)?;
    put_at(arg, 0, &(msrs.len() as u32))?;
    if (room as usize) < msrs.len() {
        return Err(libc::E2BIG);
    }
    for (index, msr) in msrs.iter().enumerate() {
        put_at(arg, 4 + 4 * index, msr)?;
    }
    Ok(0)
}

/// Calls `each` on every entry until it gives `None`; the count of entries done.
fn for_entries(arg: &mut [u8], mut each: impl FnMut(&mut kvm_msr_entry) -> Option<()>) -> Answer {
    let count: u32 = get_at(arg, 0)?;
    if count >= MAX_ENTRIES {
        return Err(libc::E2BIG);
    }
    for index in 0..count as usize {
        let at = HEADER + ENTRY * index;
        let mut entry: kvm_msr_entry = get_at(arg, at)?;
        if each(&mut entry).is_none() {
            return Ok(index as i64);
        }
        put_at(arg, at, &entry)?;
    }
    Ok(count as i64)
}

/// KVM_GET_MSRS of the system: the feature MSRs.
pub(crate) fn get_features(arg: &mut [u8]) -> Answer {
    for_entries(arg, |entry| {
        entry.data = match entry.index {
            BIOS_SIGN_ID => MICROCODE,
            ARCH_CAPABILITIES => IMMUNITIES,
            _ => return None,
        };
        Some(())
    })
}

/// KVM_GET_MSRS of a vCPU.
pub(crate) fn get(cpu: &mut Cpu, arg: &mut [u8]) -> Answer {
    for_entries(arg, |entry| {
        entry.data = cpu.read_msr(entry.index, true).ok()?;
        Some(())
    })
}

/// KVM_SET_MSRS of a vCPU.
pub(crate) fn set(cpu: &mut Cpu, local: &Local, arg: &mut [u8]) -> Answer {
    for_entries(arg, |entry| {
        // The board's first: restoring one of its MSRs is not the guest's write.
        match local.msr_restore(entry.index, entry.data) {
            Some(result) => result.ok(),
            None => cpu.write_msr(entry.index, entry.data, true).ok(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(entries: &[(u32, u64)]) -> Vec<u8> {
        let mut arg = vec![0; HEADER + ENTRY * entries.len()];
        put_at(&mut arg, 0, &(entries.len() as u32)).unwrap();
        for (number, &(index, data)) in entries.iter().enumerate() {
            let entry = kvm_msr_entry { index, reserved: 0, data };
            put_at(&mut arg, HEADER + ENTRY * number, &entry).unwrap();
        }
        arg
    }

    #[test]
    fn test_get_features_stops_at_the_first_unknown() {
        let mut arg = request(&[(ARCH_CAPABILITIES, 0), (0x1234, 0), (BIOS_SIGN_ID, 0)]);
        assert_eq!(get_features(&mut arg), Ok(1));
        let entry: kvm_msr_entry = get_at(&arg, HEADER).unwrap();
        assert_eq!(entry.data, IMMUNITIES);
    }

    #[test]
    fn test_immunities_are_the_named_bits() {
        let named = [0, 1, 3, 4, 5, 6, 8, 13, 14, 15, 20, 24, 26, 27, 62];
        assert_eq!(IMMUNITIES, named.iter().map(|bit| 1 << bit).sum::<u64>());
    }

    #[test]
    fn test_list_too_small_says_how_many() {
        let mut arg = vec![0; 8];
        assert_eq!(saved(&mut arg), Err(libc::E2BIG));
        assert_eq!(get_at::<u32>(&arg, 0), Ok((STATEFUL.len() + BOARD_STATE.len()) as u32));
    }

    #[test]
    fn test_entry_count_beyond_buffer_or_bound_is_refused() {
        let mut arg = vec![0; 16];
        put_at(&mut arg, 0, &255u32).unwrap();
        assert_eq!(get_features(&mut arg), Err(libc::EFAULT));
        put_at(&mut arg, 0, &256u32).unwrap();
        assert_eq!(get_features(&mut arg), Err(libc::E2BIG));
    }
}
