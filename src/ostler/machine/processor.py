"""Putting the first processor where a boot protocol wants it, and all of them, with the PICs, behind a firmware.

Field meanings: Intel SDM volume 3, sections 3.4 (descriptors) and 11.5 (local vector table).
"""

from __future__ import annotations

from ostler.abi.kvm import board as kvm_board
from ostler.abi.kvm.state import Segment, Sregs, Xcrs
from ostler.accel.api import VCPU, VM, Regs
from ostler.boot.entry import CpuMode, EntryState
from ostler.boot.lowmem import BOOT_CODE, BOOT_DATA, BOOT_TSS

CR0_PE, CR0_ET, CR0_PG = 1 << 0, 1 << 4, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
RFLAGS_FIXED = 1 << 1
TYPE_CODE, TYPE_DATA, TYPE_BUSY_TSS = 0xB, 0x3, 0xB
FLAT_LIMIT, TSS_LIMIT = 0xFFFF_FFFF, 0x67

LAPIC_LVT_LINT0, LAPIC_LVT_LINT1 = 0x350, 0x360
DELIVERY_NMI, DELIVERY_EXTINT = 0x400, 0x700

# Where the interrupt vector table of real mode has the lines of the two PICs.
PIC_VECTORS = {kvm_board.KVM_IRQCHIP_PIC_MASTER: 0x08, kvm_board.KVM_IRQCHIP_PIC_SLAVE: 0x70}


def enter(vcpu: VCPU, entry: EntryState) -> None:
    """Set the boot processor to its first instruction."""
    sregs = vcpu.get_sregs()
    _set_segments(sregs, entry)
    if entry.mode is CpuMode.LONG_64:
        sregs.cr0, sregs.cr3, sregs.cr4 = CR0_PE | CR0_ET | CR0_PG, entry.page_table, CR4_PAE
        sregs.efer = EFER_LME | EFER_LMA
    else:
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = CR0_PE | CR0_ET, 0, 0, 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(Regs(rip=entry.rip, rflags=RFLAGS_FIXED, **entry.registers))


def _set_segments(sregs: Sregs, entry: EntryState) -> None:
    long_mode = entry.mode is CpuMode.LONG_64
    sregs.cs = _flat(BOOT_CODE, TYPE_CODE)
    sregs.cs.l, sregs.cs.db = long_mode, not long_mode
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, _flat(BOOT_DATA, TYPE_DATA))
    sregs.tr = Segment(selector=BOOT_TSS, limit=TSS_LIMIT, type=TYPE_BUSY_TSS, present=1)
    sregs.ldt = Segment(unusable=1, type=2)
    sregs.gdt.base, sregs.gdt.limit = entry.gdt_base, max(entry.gdt_size_bytes - 1, 0)
    sregs.idt.base, sregs.idt.limit = 0, 0


def _flat(selector: int, kind: int) -> Segment:
    return Segment(selector=selector, limit=FLAT_LIMIT, type=kind, present=1, s=1, db=1, g=1)


def wire_local_interrupts(vcpu: VCPU) -> None:
    """What firmware leaves behind: the PIC's output on LINT0, NMI on LINT1."""
    lapic = vcpu.get_lapic()
    for register, mode in ((LAPIC_LVT_LINT0, DELIVERY_EXTINT), (LAPIC_LVT_LINT1, DELIVERY_NMI)):
        lapic.regs[register : register + 4] = mode.to_bytes(4, "little")
    vcpu.set_lapic(lapic)


def enable_extended_states(vcpu: VCPU) -> None:
    """What firmware leaves behind: XCR0 with every state the processor has, which INIT keeps.

    Linux sets it anyway. But a KVM on a processor whose SVM does not intercept XSETBV (QEMU 7.2's emulation of one)
    would never learn of that, and give the guest the XCR0 it knows of back after each exit.
    """
    states = next((leaf.eax for leaf in vcpu.get_cpuid2() if (leaf.function, leaf.index) == (0xD, 0)), 0)
    if states:
        xcrs = Xcrs(nr_xcrs=1)
        xcrs.xcrs[0].xcr, xcrs.xcrs[0].value = 0, states
        vcpu.set_xcrs(xcrs)


def give_pics_their_vectors(vm: VM) -> None:
    """What firmware leaves behind: a PIC nobody initialised would call vector 0 and up, the exceptions'."""
    for chip_id, first_vector in PIC_VECTORS.items():
        chip = vm.get_irqchip(chip_id)
        chip.chip.pic.irq_base = first_vector
        vm.set_irqchip(chip)
