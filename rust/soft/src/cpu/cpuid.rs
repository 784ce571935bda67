//! CPUID: look-up of the entries user space set, as KVM does it, and the bits that follow the state.
//!
//! SDM vol. 2, CPUID.

use super::state::{cr4, CpuidEntry, CpuidTable};
use super::Cpu;

const OSXSAVE: u32 = 1 << 27;
const OSPKE: u32 = 1 << 4;
const APIC: u32 = 1 << 9;
const APIC_BASE_MSR: u32 = 0x1b;
const APIC_ENABLE: u64 = 1 << 11;
/// Legacy region and header of an XSAVE area.
const XSAVE_HEADER_END: u32 = 576;

impl CpuidTable {
    /// The entry of a leaf and subleaf.
    pub fn find(&self, function: u32, index: u32) -> Option<&CpuidEntry> {
        self.entries.iter().find(|e| e.function == function && (!e.indexed || e.index == index))
    }

    /// One bit of a leaf's subleaf 0; `register` counts EAX EBX ECX EDX.
    pub fn has(&self, function: u32, register: usize, bit: u32) -> bool {
        self.find(function, 0).is_some_and(|e| [e.eax, e.ebx, e.ecx, e.edx][register] >> bit & 1 != 0)
    }

    /// The vendor is AMD.
    pub fn amd(&self) -> bool {
        self.find(0, 0).is_some_and(|e| e.ebx == u32::from_le_bytes(*b"Auth"))
    }

    /// What an unknown leaf gives: beyond its class's last one, Intel answers with the last basic
    /// leaf; within, with zeros (but for the topology leaves).
    fn fallback(&self, function: u32, index: u32) -> CpuidEntry {
        let zero = CpuidEntry::default();
        let Some(basic) = self.find(0, 0) else {
            return zero;
        };
        let class = match function {
            0x4000_0000..=0x4fff_ffff => function & 0xffff_ff00,
            0xc000_0000.. => 0xc000_0000,
            _ => function & 0x8000_0000,
        };
        if self.find(class, 0).is_none_or(|c| function > c.eax) {
            return self.find(basic.eax, index).copied().unwrap_or(zero);
        }
        if matches!(function, 0xb | 0x1f) {
            if let Some(topology) = self.find(function, 1) {
                return CpuidEntry { ecx: index & 0xff, edx: topology.edx, ..zero };
            }
        }
        zero
    }

    /// Bytes of an XSAVE area for the components `mask`, in standard or compacted form.
    fn xsave_size(&self, mask: u64, compacted: bool) -> u32 {
        (2..63).filter(|component| mask >> component & 1 != 0).fold(XSAVE_HEADER_END, |end, component| {
            let Some(e) = self.find(0xd, component).filter(|e| e.eax != 0) else {
                return end;
            };
            match compacted {
                // The numbers are user space's.
                false => end.max(e.ebx.saturating_add(e.eax)),
                true if e.ecx & 2 != 0 => (end.saturating_add(63) & !63).saturating_add(e.eax),
                true => end.saturating_add(e.eax),
            }
        })
    }
}

impl Cpu {
    /// EAX, EBX, ECX, EDX of a leaf.
    pub fn cpuid(&mut self, function: u32, index: u32) -> [u32; 4] {
        let found = self.cpuid.find(function, index).copied();
        let mut e = found.unwrap_or_else(|| self.cpuid.fallback(function, index));
        match function {
            1 => self.dynamic_features(&mut e),
            7 if index == 0 => e.ecx = e.ecx & !OSPKE | if self.cr4 & cr4::PKE != 0 { OSPKE } else { 0 },
            0xd if index == 0 => e.ebx = self.cpuid.xsave_size(self.xcr0, false),
            0xd if index == 1 && e.eax & 0xa != 0 => {
                e.ebx = self.cpuid.xsave_size(self.xcr0 | self.msr.xss, true);
            }
            _ => {}
        }
        [e.eax, e.ebx, e.ecx, e.edx]
    }

    fn dynamic_features(&mut self, e: &mut CpuidEntry) {
        e.ecx = e.ecx & !OSXSAVE | if self.cr4 & cr4::OSXSAVE != 0 { OSXSAVE } else { 0 };
        if let Some(Ok(base)) = self.board.msr_read(APIC_BASE_MSR) {
            e.edx = e.edx & !APIC | if base & APIC_ENABLE != 0 { APIC } else { 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: Option<u32>, eax: u32) -> CpuidEntry {
        CpuidEntry { function, index: index.unwrap_or(0), indexed: index.is_some(), eax, ..CpuidEntry::default() }
    }

    fn table() -> CpuidTable {
        let entries = vec![
            entry(0, None, 0xd),
            entry(1, None, 0x600),
            entry(0xd, Some(0), 7),
            CpuidEntry { ebx: 576, ..entry(0xd, Some(2), 256) },
            entry(0x8000_0000, None, 0x8000_0008),
        ];
        CpuidTable { entries }
    }

    #[test]
    fn test_fallback_beyond_the_last_leaf_answers_as_the_last_basic_one() {
        assert_eq!(table().fallback(0x20, 0).eax, 7);
        assert_eq!(table().fallback(0x8000_0020, 0).eax, 7);
        assert_eq!(table().fallback(0x5, 0), CpuidEntry::default());
    }

    #[test]
    fn test_xsave_size_follows_the_components() {
        assert_eq!(table().xsave_size(3, false), 576);
        assert_eq!(table().xsave_size(7, false), 832);
        assert_eq!(table().xsave_size(7, true), 832);
    }
}
