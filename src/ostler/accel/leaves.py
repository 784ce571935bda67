"""CPUID leaves of a processor model (Intel SDM volume 2A, CPUID; Linux's Documentation/virt/kvm/x86/cpuid.rst).

Bits that follow a register (OSXSAVE, APIC enabled) are the accelerator's to keep, and so are the sizes in leaf 0xD
that follow XCR0; where a model has AVX, the upper halves of its registers are the one component behind x87 and SSE.
"""

from dataclasses import dataclass

from ostler.abi.kvm.state import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, CpuidEntry2
from ostler.accel.features import FEATURES

Registers = tuple[int, int, int, int]

VENDORS = {"intel": b"GenuineIntel", "amd": b"AuthenticAMD"}
_KVM_SIGNATURE = b"KVMKVMKVM\0\0\0"
_REGISTERS = ("eax", "ebx", "ecx", "edx")

_LAST_BASIC = 0x16
_LAST_HYPERVISOR = 0x4000_0010
_LAST_EXTENDED = 0x8000_0008
_INDEXED = (0x4, 0x7, 0xB, 0xD)

# Only what the engine has too: kvmclock by both pairs of MSRs, no port delays, a stable clock. No asynchronous page
# faults, paravirtual EOI or TLB flush. Steal time is added where the accelerator has it, calls where asked for.
_KVM_FEATURES = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 24

# KVM's local APIC counts at 1 GHz. Calling that the core crystal makes leaves 0x15 and 0x4000_0010 agree with it.
LAPIC_KHZ = 1_000_000

_XSAVE_SIZE = 576  # legacy area and header
_X87_SSE, _AVX = 0b11, 0b100
_YMM_OFFSET, _YMM_SIZE = 576, 256
_LINE = 64


@dataclass(frozen=True, slots=True)
class Processor:
    """What does not depend on the vCPU."""

    signature: int
    brand: str
    features: frozenset[str]
    physical_bits: int
    vendor: str = "intel"


@dataclass(frozen=True, slots=True)
class Place:
    """What does."""

    vcpu_id: int
    vcpus: int
    tsc_khz: int

    @property
    def core_bits(self) -> int:
        """Bits of the APIC ID that number the core."""
        return (self.vcpus - 1).bit_length()


def signature(*, family: int, model: int, stepping: int) -> int:
    """Leaf 1's EAX, for families up to 15."""
    return (model >> 4) << 16 | family << 8 | (model & 0xF) << 4 | stepping


def build(processor: Processor, place: Place) -> list[CpuidEntry2]:
    """All leaves, in order."""
    table: dict[tuple[int, int], Registers] = {
        (0x0, 0): _vendor(processor.vendor, _LAST_BASIC),
        (0x1, 0): (processor.signature, _leaf_1_ebx(place), 0, (place.vcpus > 1) << 28),
        (0x2, 0): (0x00FF01, 0, 0, 0),  # "see leaf 4"
        **_caches(place),
        (0x5, 0): (0, 0, 0, 0),
        (0x6, 0): (0, 0, 0, 0),
        (0x7, 0): (2, 0, 0, 0),
        (0x7, 1): (0, 0, 0, 0),
        (0x7, 2): (0, 0, 0, 0),
        (0xA, 0): (0, 0, 0, 0),
        **_topology(place),
        **_xsave(processor),
        (0x15, 0): (LAPIC_KHZ, place.tsc_khz, LAPIC_KHZ * 1000, 0),
        (0x16, 0): (place.tsc_khz // 1000, place.tsc_khz // 1000, 100, 0),
        (0x4000_0000, 0): (_LAST_HYPERVISOR, *_words(_KVM_SIGNATURE)),
        (0x4000_0001, 0): (_KVM_FEATURES, 0, 0, 0),
        (0x4000_0010, 0): (place.tsc_khz, LAPIC_KHZ, 0, 0),
        (0x8000_0000, 0): (_LAST_EXTENDED, 0, 0, 0),
        (0x8000_0001, 0): (0, 0, 0, 0),
        **_brand(processor.brand),
        (0x8000_0005, 0): (0, 0, 0, 0),
        (0x8000_0006, 0): (0, 0, 1024 << 16 | 8 << 12 | _LINE, 0),  # L2: 1 MiB, 16 ways
        (0x8000_0007, 0): (0, 0, 0, 0),
        (0x8000_0008, 0): (48 << 8 | processor.physical_bits, 0, 0, 0),
    }
    for name in processor.features:
        _set_feature(table, name)
    return [_entry(leaf, subleaf, registers) for (leaf, subleaf), registers in sorted(table.items())]


def _set_feature(table: dict[tuple[int, int], Registers], name: str) -> None:
    leaf, subleaf, register, bit = FEATURES[name]
    registers = list(table[leaf, subleaf])
    registers[_REGISTERS.index(register)] |= 1 << bit
    eax, ebx, ecx, edx = registers
    table[leaf, subleaf] = (eax, ebx, ecx, edx)


def _entry(leaf: int, subleaf: int, registers: Registers) -> CpuidEntry2:
    eax, ebx, ecx, edx = registers
    flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX if leaf in _INDEXED else 0
    return CpuidEntry2(function=leaf, index=subleaf, flags=flags, eax=eax, ebx=ebx, ecx=ecx, edx=edx)


def _words(text: bytes) -> tuple[int, int, int]:
    first, second, third = (int.from_bytes(text[at : at + 4], "little") for at in (0, 4, 8))
    return first, second, third


def _vendor(vendor: str, last_leaf: int) -> Registers:
    ebx, edx, ecx = _words(VENDORS[vendor])  # the name reads on through EBX, EDX, ECX
    return last_leaf, ebx, ecx, edx


def _leaf_1_ebx(place: Place) -> int:
    count = min(1 << place.core_bits, 255)
    return (place.vcpu_id & 0xFF) << 24 | count << 16 | (_LINE // 8) << 8


def _caches(place: Place) -> dict[tuple[int, int], Registers]:
    """Leaf 4: 32 KiB first-level caches and 1 MiB second-level ones for each core, 16 MiB shared."""
    core_ids = min(1 << place.core_bits, 64) - 1
    everyone = min(1 << place.core_bits, 4096) - 1

    def cache(kind: int, level: int, sharing: int, ways: int, sets: int) -> Registers:
        return (
            core_ids << 26 | sharing << 14 | 1 << 8 | level << 5 | kind,
            (ways - 1) << 22 | _LINE - 1,
            sets - 1,
            0,
        )

    data, code, unified = 1, 2, 3
    return {
        (0x4, 0): cache(data, 1, 0, 8, 64),
        (0x4, 1): cache(code, 1, 0, 8, 64),
        (0x4, 2): cache(unified, 2, 0, 16, 1024),
        (0x4, 3): cache(unified, 3, everyone, 16, 16384),
        (0x4, 4): (0, 0, 0, 0),
    }


def _topology(place: Place) -> dict[tuple[int, int], Registers]:
    """Leaf 0xB: one thread in a core, all cores in one package."""
    thread, core = 1 << 8, 2 << 8
    return {
        (0xB, 0): (0, 1, thread | 0, place.vcpu_id),
        (0xB, 1): (place.core_bits, place.vcpus, core | 1, place.vcpu_id),
        (0xB, 2): (0, 0, 2, place.vcpu_id),
    }


def _xsave(processor: Processor) -> dict[tuple[int, int], Registers]:
    if "xsave" not in processor.features:
        return {(0xD, 0): (0, 0, 0, 0)}
    avx = "avx" in processor.features
    size = _XSAVE_SIZE + (_YMM_SIZE if avx else 0)
    return {
        (0xD, 0): (_X87_SSE | (_AVX if avx else 0), size, size, 0),
        (0xD, 1): (0, size, 0, 0),
        (0xD, 2): (_YMM_SIZE, _YMM_OFFSET, 0, 0) if avx else (0, 0, 0, 0),
    }


def _brand(text: str) -> dict[tuple[int, int], Registers]:
    padded = text.encode("ascii").ljust(48, b"\0")
    table: dict[tuple[int, int], Registers] = {}
    for part in range(3):
        eax, ebx, ecx = _words(padded[16 * part : 16 * part + 12])
        edx = int.from_bytes(padded[16 * part + 12 : 16 * part + 16], "little")
        table[0x8000_0002 + part, 0] = (eax, ebx, ecx, edx)
    return table
