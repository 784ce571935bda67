//! CPUID tables: what the engine can give (KVM_GET_SUPPORTED_CPUID) and what a vCPU shows.
//!
//! SDM vol. 2A, CPUID; Documentation/virt/kvm/x86/cpuid.rst for leaves 0x4000_00xx. The set is that
//! of the instructions the interpreter has; it is the same on every host, but that AVX, AVX2, FMA and
//! F16C are offered where the host has them all. What a guest sees is user space's choice, made with KVM_SET_CPUID2.

use super::{get_at, put_at, Answer};
use crate::cpu::state::{CpuidEntry, CpuidTable};
use crate::cpu::Cpu;
use crate::host::fpstate::YMM_HIGH;
use crate::host::vex::host_has_all;
use kvm_bindings::{kvm_cpuid_entry2, KVM_CPUID_FLAG_SIGNIFCANT_INDEX};

/// KVM_MAX_CPUID_ENTRIES.
const MAX_ENTRIES: usize = 256;
const HEADER: usize = 8;
const ENTRY: usize = size_of::<kvm_cpuid_entry2>();

/// Leaves whose answer depends on ECX.
const INDEXED: [u32; 4] = [0x4, 0x7, 0xb, 0xd];

/// Features of leaf 1: FPU DE PSE TSC MSR PAE MCE CX8 APIC SEP PGE MCA CMOV PAT PSE36 CLFLUSH MMX FXSR SSE SSE2.
const LEAF1_EDX: u32 = bits(&[0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26]);
/// SSE3 PCLMULQDQ SSSE3 CX16 PCID SSE4.1 SSE4.2 X2APIC MOVBE POPCNT TSC-deadline AES XSAVE RDRAND hypervisor.
const LEAF1_ECX: u32 = bits(&[0, 1, 9, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 30, 31]);
/// FMA AVX F16C.
const LEAF1_ECX_VEX: u32 = bits(&[12, 28, 29]);
/// AVX2.
const LEAF7_EBX_VEX: u32 = bits(&[5]);
/// FSGSBASE TSC_ADJUST BMI1 SMEP BMI2 ERMS INVPCID RDSEED ADX SMAP CLFLUSHOPT SHA.
const LEAF7_EBX: u32 = bits(&[0, 1, 3, 7, 8, 9, 10, 18, 19, 20, 23, 29]);
/// UMIP PKU PKS.
const LEAF7_ECX: u32 = bits(&[2, 3, 31]);
/// FSRM SPEC_CTRL ARCH_CAPABILITIES SSBD.
const LEAF7_EDX: u32 = bits(&[4, 26, 29, 31]);
/// Subleaf 2: BHI_CTRL.
const LEAF7_2_EDX: u32 = bits(&[4]);
/// XSAVEOPT XSAVEC XGETBV1 XSAVES.
const LEAFD1_EAX: u32 = bits(&[0, 1, 2, 3]);
/// SYSCALL NX 1GiB-pages RDTSCP LM.
const EXTENDED_EDX: u32 = bits(&[11, 20, 26, 27, 29]);
/// LAHF-LM LZCNT 3DNow-prefetch.
const EXTENDED_ECX: u32 = bits(&[0, 5, 8]);
/// kvmclock by both pairs of MSRs, no port delays, steal time, kicks out of a halt, IPIs and yielding by a call, a
/// stable clock.
const KVM_FEATURES: u32 = bits(&[0, 1, 3, 5, 7, 11, 13, 24]);
/// Frequency the local APIC's timer counts at.
const LAPIC_KHZ: u32 = 1_000_000;
/// MAXPHYADDR offered.
const PHYSICAL_BITS: u32 = 46;
/// Legacy area and header of an XSAVE image.
const XSAVE_BYTES: u32 = 576;
/// The component of YMM registers' upper halves, behind them.
const YMM_BYTES: u32 = 256;

const fn bits(list: &[u32]) -> u32 {
    let (mut mask, mut index) = (0, 0);
    while index < list.len() {
        mask |= 1 << list[index];
        index += 1;
    }
    mask
}

fn words(text: &[u8; 12]) -> [u32; 3] {
    let word = |at: usize| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
    [word(0), word(4), word(8)]
}

/// Everything the engine supports, as `(function, index, [eax, ebx, ecx, edx])`.
fn table(tsc_khz: u32) -> Vec<(u32, u32, [u32; 4])> {
    let vendor = words(b"GenuntelineI");
    let vex = host_has_all();
    let only_vex = |mask: u32| if vex { mask } else { 0 };
    let (components, area) = (3 | only_vex(4), XSAVE_BYTES + only_vex(YMM_BYTES));
    let kvm = words(b"KVMKVMKVM\0\0\0");
    vec![
        (0x0, 0, [0x16, vendor[0], vendor[1], vendor[2]]),
        (0x1, 0, [0x000f_06e1, 8 << 8, LEAF1_ECX | only_vex(LEAF1_ECX_VEX), LEAF1_EDX]),
        (0x2, 0, [0x00ff01, 0, 0, 0]),
        (0x4, 0, [0, 0, 0, 0]),
        (0x6, 0, [1 << 2, 0, 0, 0]),
        (0x7, 0, [2, LEAF7_EBX | only_vex(LEAF7_EBX_VEX), LEAF7_ECX, LEAF7_EDX]),
        (0x7, 1, [0, 0, 0, 0]),
        (0x7, 2, [0, 0, 0, LEAF7_2_EDX]),
        (0xb, 0, [0, 0, 0, 0]),
        (0xd, 0, [components, area, area, 0]),
        (0xd, 1, [LEAFD1_EAX, area, 0, 0]),
        (0xd, 2, [only_vex(YMM_BYTES), only_vex(YMM_HIGH as u32), 0, 0]),
        (0x15, 0, [LAPIC_KHZ, tsc_khz, LAPIC_KHZ * 1000, 0]),
        (0x16, 0, [tsc_khz / 1000, tsc_khz / 1000, 100, 0]),
        (0x4000_0000, 0, [0x4000_0010, kvm[0], kvm[1], kvm[2]]),
        (0x4000_0001, 0, [KVM_FEATURES, 0, 0, 0]),
        (0x4000_0010, 0, [tsc_khz, LAPIC_KHZ, 0, 0]),
        (0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        (0x8000_0001, 0, [0, 0, EXTENDED_ECX, EXTENDED_EDX]),
        (0x8000_0006, 0, [0, 0, 1024 << 16 | 8 << 12 | 64, 0]),
        (0x8000_0007, 0, [0, 0, 0, 1 << 8]),
        (0x8000_0008, 0, [48 << 8 | PHYSICAL_BITS, 0, 0, 0]),
    ]
}

/// KVM_GET_SUPPORTED_CPUID.
pub(crate) fn supported(arg: &mut [u8], tsc_khz: u32) -> Answer {
    let entry = |(function, index, [eax, ebx, ecx, edx]): (u32, u32, [u32; 4])| kvm_cpuid_entry2 {
        function,
        index,
        flags: if INDEXED.contains(&function) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax,
        ebx,
        ecx,
        edx,
        padding: [0; 3],
    };
    store(arg, table(tsc_khz).into_iter().map(entry))
}

/// Writes header and entries; E2BIG when user space has room for fewer, as KVM does.
fn store(arg: &mut [u8], entries: impl ExactSizeIterator<Item = kvm_cpuid_entry2>) -> Answer {
    let room: u32 = get_at(arg, 0)?;
    if (room as usize) < entries.len() {
        return Err(libc::E2BIG);
    }
    put_at(arg, 0, &(entries.len() as u32))?;
    for (index, entry) in entries.enumerate() {
        put_at(arg, HEADER + ENTRY * index, &entry)?;
    }
    Ok(0)
}

/// KVM_GET_CPUID2.
pub(crate) fn get(cpu: &Cpu, arg: &mut [u8]) -> Answer {
    let entries = cpu.cpuid.entries.iter().map(|entry| kvm_cpuid_entry2 {
        function: entry.function,
        index: entry.index,
        flags: if entry.indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
        padding: [0; 3],
    });
    store(arg, entries)
}

/// KVM_SET_CPUID2. Gives the model's MAXPHYADDR, which the local APIC wants to know too.
pub(crate) fn set(cpu: &mut Cpu, arg: &[u8]) -> Answer<u8> {
    let count = get_at::<u32>(arg, 0)? as usize;
    if count > MAX_ENTRIES {
        return Err(libc::E2BIG);
    }
    let mut entries = Vec::with_capacity(count);
    for index in 0..count {
        let entry: kvm_cpuid_entry2 = get_at(arg, HEADER + ENTRY * index)?;
        entries.push(CpuidEntry {
            function: entry.function,
            index: entry.index,
            indexed: entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        });
    }
    let widest = entries.iter().find(|entry| entry.function == 0x8000_0008).map_or(36, |entry| entry.eax as u8);
    cpu.phys_bits = widest.clamp(36, 52);
    cpu.cpuid = CpuidTable { entries };
    cpu.flush_all();
    Ok(cpu.phys_bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_supported_without_room_is_too_big_and_with_room_counts() {
        let mut small = vec![0; HEADER + ENTRY];
        small[0] = 1;
        assert_eq!(supported(&mut small, 1), Err(libc::E2BIG));
        let mut large = vec![0; HEADER + ENTRY * 64];
        large[0] = 64;
        assert_eq!(supported(&mut large, 2_000_000), Ok(0));
        assert_eq!(get_at::<u32>(&large, 0), Ok(table(1).len() as u32));
        let vendor: kvm_cpuid_entry2 = get_at(&large, HEADER).unwrap();
        assert_eq!((&vendor.ebx.to_le_bytes(), &vendor.edx.to_le_bytes()), (b"Genu", b"ineI"));
        assert_eq!(&vendor.ecx.to_le_bytes(), b"ntel");
    }

    #[test]
    fn test_supported_count_beyond_the_buffer_is_a_fault() {
        let mut lying = vec![0; HEADER + ENTRY];
        lying[0] = 64;
        assert_eq!(supported(&mut lying, 1), Err(libc::EFAULT));
    }
}
