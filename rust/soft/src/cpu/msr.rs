//! Model-specific registers that RDMSR, WRMSR and user space reach. SDM vol. 4; the list is the
//! engine brief's. The board is asked first (APIC, TSC deadline, paravirtual clock); what nobody
//! knows is #GP(0).

use super::mmu::canonical;
use super::state::{efer, seg};
use super::{Cpu, Gp};

/// MSR numbers.
#[allow(missing_docs)]
pub mod index {
    pub const P5_MC_ADDR: u32 = 0;
    pub const P5_MC_TYPE: u32 = 1;
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const EBL_CR_POWERON: u32 = 0x2a;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_UPDT_TRIG: u32 = 0x79;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const FLUSH_CMD: u32 = 0x10b;
    pub const MISC_FEATURES: u32 = 0x140;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const PERF_STATUS: u32 = 0x198;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const LAST_BRANCH_FROM: u32 = 0x1db;
    pub const LAST_INT_TO: u32 = 0x1de;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const PKRS: u32 = 0x6e1;
    pub const XSS: u32 = 0xda0;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const K7_EVNTSEL0: u32 = 0xc001_0000;
    pub const K7_PERFCTR3: u32 = 0xc001_0007;
    pub const HWCR: u32 = 0xc001_0015;
    pub const DE_CFG: u32 = 0xc001_1029;
}
use index::*;

/// The CPU's own MSRs that hold state, for KVM_GET_MSR_INDEX_LIST (the board adds its own).
pub const STATEFUL: &[u32] = &[
    TSC,
    TSC_ADJUST,
    SPEC_CTRL,
    BIOS_SIGN_ID,
    ARCH_CAPABILITIES,
    MISC_FEATURES,
    SYSENTER_CS,
    SYSENTER_ESP,
    SYSENTER_EIP,
    MCG_STATUS,
    MISC_ENABLE,
    PAT,
    MTRR_DEF_TYPE,
    XSS,
    EFER,
    STAR,
    LSTAR,
    CSTAR,
    SFMASK,
    FS_BASE,
    GS_BASE,
    KERNEL_GS_BASE,
    TSC_AUX,
    HWCR,
    DE_CFG,
];

const IBRS_STIBP_SSBD: u64 = 7;
const BHI_DIS_S: u64 = 1 << 10;

fn when(ok: bool) -> Result<(), Gp> {
    if ok {
        Ok(())
    } else {
        Err(Gp)
    }
}

impl Cpu {
    /// RDMSR. `host`: user space asks, no feature needs to be advertised.
    pub fn read_msr(&mut self, msr: u32, host: bool) -> Result<u64, Gp> {
        if let Some(answer) = self.board.msr_read(msr) {
            return answer;
        }
        Ok(match msr {
            TSC => self.board.tsc(),
            TSC_ADJUST => self.msr.tsc_adjust,
            EFER => self.efer,
            STAR => self.msr.star,
            LSTAR => self.msr.lstar,
            CSTAR => self.msr.cstar,
            SFMASK => self.msr.sfmask,
            FS_BASE => self.segs[seg::FS].base,
            GS_BASE => self.segs[seg::GS].base,
            KERNEL_GS_BASE => self.msr.kernel_gs_base,
            TSC_AUX => self.msr.tsc_aux,
            SYSENTER_CS => self.msr.sysenter_cs,
            SYSENTER_ESP => self.msr.sysenter_esp,
            SYSENTER_EIP => self.msr.sysenter_eip,
            PAT => self.msr.pat,
            MISC_ENABLE => self.msr.misc_enable,
            SPEC_CTRL if host || self.has_spec_ctrl() => self.msr.spec_ctrl,
            ARCH_CAPABILITIES if host || self.cpuid.has(7, 3, 29) => self.msr.arch_capabilities,
            PKRS if host || self.has_pks() => self.msr.pkrs as u64,
            XSS if host || self.cpuid.has(0xd, 0, 0) => self.msr.xss,
            MCG_STATUS => self.msr.mcg_status,
            MTRR_DEF_TYPE => self.msr.mtrr_def_type,
            BIOS_SIGN_ID => self.msr.bios_sign_id,
            // AMD's four counters have no CPUID bit that denies them: they stay at zero.
            K7_EVNTSEL0..=K7_PERFCTR3 if self.cpuid.amd() => 0,
            HWCR => self.msr.hwcr,
            DE_CFG => self.msr.de_cfg,
            MISC_FEATURES => self.msr.misc_features,
            FEATURE_CONTROL => 1,
            P5_MC_ADDR
            | P5_MC_TYPE
            | PLATFORM_ID
            | EBL_CR_POWERON
            | PLATFORM_INFO
            | MTRR_CAP
            | MCG_CAP
            | PERF_STATUS
            | DEBUGCTL
            | LAST_BRANCH_FROM..=LAST_INT_TO => 0,
            _ => return Err(Gp),
        })
    }

    /// WRMSR. `host`: user space restores state; EFER.LMA and read-only MSRs are then writable.
    pub fn write_msr(&mut self, msr: u32, value: u64, host: bool) -> Result<(), Gp> {
        if let Some(answer) = self.board.msr_write(msr, value) {
            return answer;
        }
        match msr {
            TSC => self.write_tsc(value),
            TSC_ADJUST => {
                let delta = value.wrapping_sub(self.msr.tsc_adjust);
                self.msr.tsc_adjust = value;
                if !host {
                    let tsc = self.board.tsc().wrapping_add(delta);
                    self.board.set_tsc(tsc);
                }
            }
            EFER => self.write_efer(value, host)?,
            STAR => self.msr.star = value,
            LSTAR | CSTAR | FS_BASE | GS_BASE | KERNEL_GS_BASE | SYSENTER_ESP | SYSENTER_EIP => {
                when(canonical(value))?;
                self.write_address_msr(msr, value);
            }
            SFMASK => self.msr.sfmask = value & 0xffff_ffff,
            SYSENTER_CS => self.msr.sysenter_cs = value & 0xffff_ffff,
            TSC_AUX => {
                when(value >> 32 == 0)?;
                self.msr.tsc_aux = value;
            }
            PAT => {
                when(value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)))?;
                self.msr.pat = value;
            }
            _ => self.write_other_msr(msr, value, host)?,
        }
        Ok(())
    }

    fn write_address_msr(&mut self, msr: u32, value: u64) {
        match msr {
            LSTAR => self.msr.lstar = value,
            CSTAR => self.msr.cstar = value,
            FS_BASE => self.set_base(seg::FS, value),
            GS_BASE => self.set_base(seg::GS, value),
            KERNEL_GS_BASE => self.msr.kernel_gs_base = value,
            SYSENTER_ESP => self.msr.sysenter_esp = value,
            _ => self.msr.sysenter_eip = value,
        }
    }

    /// Replaces the base of FS or GS alone.
    #[inline]
    pub fn set_base(&mut self, index: usize, base: u64) {
        self.segs[index].base = base;
        self.seg_base[index] = base;
    }

    fn write_other_msr(&mut self, msr: u32, value: u64, host: bool) -> Result<(), Gp> {
        match msr {
            MISC_ENABLE => self.msr.misc_enable = value,
            SPEC_CTRL => {
                when(host || self.has_spec_ctrl() && value & !self.spec_ctrl_bits() == 0)?;
                self.msr.spec_ctrl = value;
            }
            PRED_CMD => when(self.has_spec_ctrl() && value & !1 == 0)?,
            FLUSH_CMD => when(self.cpuid.has(7, 3, 28) && value & !1 == 0)?,
            ARCH_CAPABILITIES if host => self.msr.arch_capabilities = value,
            PKRS => {
                when((host || self.has_pks()) && value >> 32 == 0)?;
                self.msr.pkrs = value as u32;
                self.keys_changed();
            }
            XSS => {
                when(value == 0)?;
                self.msr.xss = value;
            }
            MCG_STATUS => self.msr.mcg_status = value,
            MTRR_DEF_TYPE => self.msr.mtrr_def_type = value,
            BIOS_SIGN_ID if host => self.msr.bios_sign_id = value,
            K7_EVNTSEL0..=K7_PERFCTR3 => when(self.cpuid.amd() && value == 0)?,
            HWCR => self.msr.hwcr = value,
            DE_CFG => self.msr.de_cfg = value,
            MISC_FEATURES => {
                when(host || value == 0)?;
                self.msr.misc_features = value;
            }
            // The revision is loaded by CPUID; there is no microcode to update.
            BIOS_SIGN_ID | BIOS_UPDT_TRIG | EBL_CR_POWERON => {}
            P5_MC_ADDR | P5_MC_TYPE | DEBUGCTL | FEATURE_CONTROL | PLATFORM_INFO => when(host || value == 0)?,
            _ => return Err(Gp),
        }
        Ok(())
    }

    fn has_pks(&self) -> bool {
        self.cpuid.has(7, 2, 31)
    }

    fn has_spec_ctrl(&self) -> bool {
        self.cpuid.has(7, 3, 26) || self.cpuid.has(7, 3, 31)
    }

    /// What of SPEC_CTRL a guest may set. Nothing is speculated here, so no bit changes anything.
    fn spec_ctrl_bits(&self) -> u64 {
        let bhi_ctrl = self.cpuid.find(7, 2).is_some_and(|leaf| leaf.edx & 1 << 4 != 0);
        IBRS_STIBP_SSBD | if bhi_ctrl { BHI_DIS_S } else { 0 }
    }

    /// A write of the TSC moves TSC_ADJUST with it.
    fn write_tsc(&mut self, value: u64) {
        let delta = value.wrapping_sub(self.board.tsc());
        self.msr.tsc_adjust = self.msr.tsc_adjust.wrapping_add(delta);
        self.board.set_tsc(value);
    }

    fn write_efer(&mut self, value: u64, host: bool) -> Result<(), Gp> {
        let known = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        when(value & !known == 0)?;
        let mut new = value;
        if !host {
            when((value ^ self.efer) & efer::LME == 0 || !self.paging())?;
            new = value & !efer::LMA | self.efer & efer::LMA;
        }
        let changed = new ^ self.efer;
        self.efer = new;
        if changed & !efer::SCE != 0 {
            self.flush_all();
            self.update_modes();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::state::CpuidEntry;
    use crate::cpu::testing::Bench;

    #[test]
    fn test_write_msr_spec_ctrl_takes_what_cpuid_offers() {
        let mut cpu = Bench::new(4096).cpu;
        let leaf = |index, edx| CpuidEntry { function: 7, index, indexed: true, edx, ..CpuidEntry::default() };
        cpu.cpuid.entries = vec![leaf(0, 1 << 26)];
        assert_eq!(cpu.write_msr(SPEC_CTRL, 1, false), Ok(()));
        assert_eq!(cpu.write_msr(SPEC_CTRL, 1 | BHI_DIS_S, false), Err(Gp));
        cpu.cpuid.entries.push(leaf(2, 1 << 4));
        assert_eq!(cpu.write_msr(SPEC_CTRL, 1 | BHI_DIS_S, false), Ok(()));
        assert_eq!(cpu.read_msr(SPEC_CTRL, false), Ok(1 | BHI_DIS_S));
        assert_eq!(cpu.write_msr(SPEC_CTRL, 1 << 11, false), Err(Gp));
    }
}
