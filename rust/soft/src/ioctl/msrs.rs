//! KVM_GET_MSRS and KVM_SET_MSRS: user space's view of the MSRs, and the lists of them.
//!
//! User space may restore what a guest may not write (read-only MSRs, a counter without side
//! effects), so this is apart from RDMSR and WRMSR. As in KVM, a request gives how many entries it
//! processed: it ends at the first it cannot.

use super::{get_at, put_at, Answer};
use crate::board::Local;
use crate::cpu::mmu::canonical;
use crate::cpu::state::{efer, seg};
use crate::cpu::Cpu;
use kvm_bindings::kvm_msr_entry;

/// MSR_IO's MAX_IO_MSRS.
const MAX_ENTRIES: u32 = 256;
const HEADER: usize = 8;
const ENTRY: usize = size_of::<kvm_msr_entry>();

#[allow(missing_docs)]
pub(crate) mod msr {
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1b;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const UCODE_REV: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const MISC_FEATURES: u32 = 0x140;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const XSS: u32 = 0xda0;
    pub const KVM_WALL_CLOCK: u32 = 0x11;
    pub const KVM_SYSTEM_TIME: u32 = 0x12;
    pub const KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;
    pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const HWCR: u32 = 0xc001_0015;
    pub const DE_CFG: u32 = 0xc001_1029;
}
use msr::*;

/// What a saved vCPU needs (KVM_GET_MSR_INDEX_LIST).
pub(crate) const SAVED: [u32; 28] = [
    TSC,
    TSC_ADJUST,
    SPEC_CTRL,
    UCODE_REV,
    ARCH_CAPABILITIES,
    MISC_FEATURES,
    SYSENTER_CS,
    SYSENTER_ESP,
    SYSENTER_EIP,
    MCG_STATUS,
    MISC_ENABLE,
    PAT,
    TSC_DEADLINE,
    XSS,
    KVM_WALL_CLOCK,
    KVM_SYSTEM_TIME,
    KVM_WALL_CLOCK_NEW,
    KVM_SYSTEM_TIME_NEW,
    STAR,
    LSTAR,
    CSTAR,
    SFMASK,
    KERNEL_GS_BASE,
    TSC_AUX,
    EFER,
    HWCR,
    DE_CFG,
    MTRR_DEF_TYPE,
];

/// What describes the model (KVM_GET_MSR_FEATURE_INDEX_LIST).
pub(crate) const FEATURES: [u32; 2] = [UCODE_REV, ARCH_CAPABILITIES];

/// IA32_ARCH_CAPABILITIES: RDCL_NO IBRS_ALL SKIP_L1DFL SSB_NO MDS_NO PSCHANGE_MC_NO TAA_NO
/// SBDR_SSDP_NO FBSDP_NO PSDP_NO BHI_NO PBRSB_NO GDS_NO RFDS_NO ITS_NO. The interpreter's guests
/// never run an instruction of theirs speculatively on the host.
const IMMUNITIES: u64 = 1 << 62 | 0b1101_0001_0000_1110_0001_0111_1011;
/// Microcode revision 1, in the upper half.
const MICROCODE: u64 = 1 << 32;

/// KVM_GET_MSR_INDEX_LIST and KVM_GET_MSR_FEATURE_INDEX_LIST.
pub(crate) fn list(arg: &mut [u8], msrs: &[u32]) -> Answer {
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
            UCODE_REV => MICROCODE,
            ARCH_CAPABILITIES => IMMUNITIES,
            _ => return None,
        };
        Some(())
    })
}

/// KVM_GET_MSRS of a vCPU.
pub(crate) fn get(cpu: &mut Cpu, local: &Local, arg: &mut [u8]) -> Answer {
    for_entries(arg, |entry| {
        entry.data = read(cpu, local, entry.index)?;
        Some(())
    })
}

/// KVM_SET_MSRS of a vCPU.
pub(crate) fn set(cpu: &mut Cpu, local: &Local, arg: &mut [u8]) -> Answer {
    for_entries(arg, |entry| write(cpu, local, entry.index, entry.data))
}

fn read(cpu: &Cpu, local: &Local, index: u32) -> Option<u64> {
    Some(match index {
        SPEC_CTRL => cpu.msr.spec_ctrl,
        PRED_CMD | MTRR_CAP | MCG_CAP | PLATFORM_INFO => 0,
        UCODE_REV => cpu.msr.bios_sign_id,
        ARCH_CAPABILITIES => cpu.msr.arch_capabilities,
        MISC_FEATURES => cpu.msr.misc_features,
        SYSENTER_CS => cpu.msr.sysenter_cs,
        SYSENTER_ESP => cpu.msr.sysenter_esp,
        SYSENTER_EIP => cpu.msr.sysenter_eip,
        MCG_STATUS => cpu.msr.mcg_status,
        MISC_ENABLE => cpu.msr.misc_enable,
        PAT => cpu.msr.pat,
        MTRR_DEF_TYPE => cpu.msr.mtrr_def_type,
        XSS => cpu.msr.xss,
        EFER => cpu.efer,
        STAR => cpu.msr.star,
        LSTAR => cpu.msr.lstar,
        CSTAR => cpu.msr.cstar,
        SFMASK => cpu.msr.sfmask,
        FS_BASE => cpu.segs[seg::FS].base,
        GS_BASE => cpu.segs[seg::GS].base,
        KERNEL_GS_BASE => cpu.msr.kernel_gs_base,
        TSC_AUX => cpu.msr.tsc_aux,
        HWCR => cpu.msr.hwcr,
        DE_CFG => cpu.msr.de_cfg,
        _ => return local.msr_read(index)?.ok(),
    })
}

fn write(cpu: &mut Cpu, local: &Local, index: u32, value: u64) -> Option<()> {
    let narrow = value <= u32::MAX as u64;
    match index {
        SPEC_CTRL if value & !0x7 == 0 => cpu.msr.spec_ctrl = value,
        PRED_CMD if value & !1 == 0 => {}
        UCODE_REV => cpu.msr.bios_sign_id = value,
        ARCH_CAPABILITIES => cpu.msr.arch_capabilities = value,
        MISC_FEATURES if value == 0 => cpu.msr.misc_features = 0,
        SYSENTER_CS if narrow => cpu.msr.sysenter_cs = value,
        SYSENTER_ESP if canonical(value) => cpu.msr.sysenter_esp = value,
        SYSENTER_EIP if canonical(value) => cpu.msr.sysenter_eip = value,
        MCG_STATUS => cpu.msr.mcg_status = value,
        MISC_ENABLE => cpu.msr.misc_enable = value,
        PAT if pat_is_valid(value) => cpu.msr.pat = value,
        MTRR_DEF_TYPE if value & !0xcff == 0 => cpu.msr.mtrr_def_type = value,
        XSS if value == 0 => cpu.msr.xss = 0,
        EFER => return write_efer(cpu, value),
        STAR => cpu.msr.star = value,
        LSTAR if canonical(value) => cpu.msr.lstar = value,
        CSTAR if canonical(value) => cpu.msr.cstar = value,
        SFMASK if narrow => cpu.msr.sfmask = value,
        FS_BASE if canonical(value) => set_base(cpu, seg::FS, value),
        GS_BASE if canonical(value) => set_base(cpu, seg::GS, value),
        KERNEL_GS_BASE if canonical(value) => cpu.msr.kernel_gs_base = value,
        TSC_AUX if narrow => cpu.msr.tsc_aux = value,
        HWCR => cpu.msr.hwcr = value,
        DE_CFG => cpu.msr.de_cfg = value,
        PRED_CMD | MISC_FEATURES | SPEC_CTRL | SYSENTER_CS | SYSENTER_ESP | SYSENTER_EIP | PAT => return None,
        MTRR_DEF_TYPE | XSS | LSTAR | CSTAR | SFMASK | FS_BASE | GS_BASE | KERNEL_GS_BASE | TSC_AUX => return None,
        _ => return local.msr_restore(index, value),
    }
    Some(())
}

fn set_base(cpu: &mut Cpu, segment: usize, base: u64) {
    cpu.segs[segment].base = base;
    cpu.update_modes();
}

/// As KVM_SET_MSRS does, LMA stays: it follows CR0.PG, which KVM_SET_SREGS sets.
fn write_efer(cpu: &mut Cpu, value: u64) -> Option<()> {
    if value & !(efer::SCE | efer::LME | efer::LMA | efer::NXE) != 0 {
        return None;
    }
    cpu.efer = value & !efer::LMA | cpu.efer & efer::LMA;
    cpu.flush_all();
    cpu.update_modes();
    Some(())
}

/// Each byte is one of the memory types UC, WC, WT, WP, WB, UC-. SDM vol. 3, 11.12.
fn pat_is_valid(value: u64) -> bool {
    value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7))
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
        let mut arg = request(&[(ARCH_CAPABILITIES, 0), (0x1234, 0), (UCODE_REV, 0)]);
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
        assert_eq!(list(&mut arg, &SAVED), Err(libc::E2BIG));
        assert_eq!(get_at::<u32>(&arg, 0), Ok(SAVED.len() as u32));
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
