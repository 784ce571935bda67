"""The state of a machine as plain data, taken from stopped processors and put into a machine just wired.

Everything is KVM's own structures as bytes, so what was saved on one accelerator restores on another. The order of
restoring matters (as Documentation/virt/kvm/api.rst and every user of KVM has learnt): the APIC base in `sregs` before
the local APIC, the TSC before its deadline, events last. Guest memory travels apart: see `copy_memory`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ostler.abi.kvm import board as kvm_board
from ostler.abi.kvm import state as kvm_state
from ostler.accel.api import VCPU, Accel, ExitReason
from ostler.accel.models import model
from ostler.devices.state import Saved
from ostler.errors import BadRequest, StateError
from ostler.machine.machine import Machine
from ostler.memory import GuestMemory
from ostler.memory.layout import PAGE_SIZE

MSR_TSC, MSR_TSC_DEADLINE = 0x10, 0x6E0
CHIPS = (kvm_board.KVM_IRQCHIP_PIC_MASTER, kvm_board.KVM_IRQCHIP_PIC_SLAVE, kvm_board.KVM_IRQCHIP_IOAPIC)
# What Linux and the CPU model use; an accelerator that lacks one of them has nothing to save there.
MSRS = (
    MSR_TSC, 0x3B, 0x48, 0x174, 0x175, 0x176, 0x277, 0x1A0, 0xDA0,
    0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0102, 0xC000_0103,
    0x11, 0x12, 0x4B56_4D00, 0x4B56_4D01, 0x4B56_4D03,
)  # fmt: skip

# In the XSAVE area's header, as words of four bytes.
XSTATE_BV_WORDS = 512 // 4, 516 // 4
XSTATE_X87_SSE = 0b11

StructureT = TypeVar("StructureT", bound=ctypes.Structure)


@dataclass(frozen=True, slots=True)
class SavedProcessor:
    """One processor: KVM structures by name, MSRs by number."""

    structures: Mapping[str, bytes]
    msrs: Mapping[int, int]
    mp_state: int
    tsc_khz: int


@dataclass(frozen=True, slots=True)
class SavedMachine:
    """Everything of a machine but its memory."""

    model: str
    """By name, less what the host it ran on could not give: `ostler-v2.1,-pku`."""
    processors: tuple[SavedProcessor, ...]
    chips: tuple[bytes, ...]
    pit: bytes
    clock_ns: int
    board: Mapping[str, Saved]


def finish_exits(vcpu: VCPU) -> None:
    """Let the processor complete the access it last left for: only then is its state whole."""
    vcpu.immediate_exit = True
    try:
        while vcpu.run() is not ExitReason.INTR:
            pass
    finally:
        vcpu.immediate_exit = False


def save(machine: Machine, accel: Accel) -> SavedMachine:
    """Return the state of `machine`, whose processors are all stopped."""
    for vcpu in machine.vcpus:
        finish_exits(vcpu)
    known = set(accel.get_msr_index_list())
    with machine.board.lock:
        board = machine.board.save()
    return SavedMachine(
        model=_model_name(machine),
        processors=tuple(_save_processor(vcpu, known) for vcpu in machine.vcpus),
        chips=tuple(bytes(machine.vm.get_irqchip(chip)) for chip in CHIPS),
        pit=bytes(machine.vm.get_pit2()),
        clock_ns=machine.vm.get_clock().clock,
        board=board,
    )


def restore(saved: SavedMachine, machine: Machine, accel: Accel) -> None:
    """Put `saved` into `machine`, new and of the same shape, on `accel`. Its memory is restored already.

    Raises StateError where the shapes differ or data is not what the machine could have saved.
    """
    _check_model(saved.model, machine)
    if len(saved.processors) != len(machine.vcpus):
        raise StateError(f"saved with {len(saved.processors)} processors, the machine has {len(machine.vcpus)}")
    _restore_processors(saved, machine, accel)
    with machine.board.lock:
        machine.board.restore(saved.board)


def restart(saved: SavedMachine, machine: Machine, accel: Accel) -> None:
    """Undo the passing of time in a machine that `saved` was put into and that has not run since."""
    _restore_processors(saved, machine, accel)
    with machine.board.lock:
        machine.board.restart(saved.board)


def _restore_processors(saved: SavedMachine, machine: Machine, accel: Accel) -> None:
    """What the accelerator keeps: everything but memory and the board's devices."""
    clock = kvm_board.ClockData()
    clock.clock = saved.clock_ns
    machine.vm.set_clock(clock)
    for chip in saved.chips:
        machine.vm.set_irqchip(_structure(kvm_board.Irqchip, "irqchip", chip))
    machine.vm.set_pit2(_structure(kvm_board.PitState2, "pit", saved.pit))
    known = set(accel.get_msr_index_list())
    # One value for all: accelerators see writes of the same TSC to several processors as one clock.
    for processor, vcpu in zip(saved.processors, machine.vcpus, strict=True):
        _restore_processor(processor, vcpu, known)


def _model_name(machine: Machine) -> str:
    return ",".join([machine.model.name, *(f"-{feature}" for feature in machine.masked_features)])


def _check_model(name: str, machine: Machine) -> None:
    """A guest has looked at its processor once, and uses what it saw. Raises StateError where that is not all here."""
    try:
        wanted = model(name)
    except BadRequest as error:
        raise StateError(f"saved under a CPU model that is not known here: {error}") from error
    here = machine.model
    lacking = sorted((wanted.features - here.features) | (wanted.immunities - here.immunities))
    if lacking:
        raise StateError(f"saved under CPU model {name}: the machine has {here.name}, without {', '.join(lacking)}")
    if (wanted.vendor, wanted.signature) != (here.vendor, here.signature):
        raise StateError(f"saved under CPU model {name}: the machine has {here.name}, which is another processor")


def _save_processor(vcpu: VCPU, known: set[int]) -> SavedProcessor:
    wanted = [index for index in MSRS if index in known]
    msrs = vcpu.get_msrs(wanted)
    if MSR_TSC_DEADLINE in known:
        msrs |= vcpu.get_msrs([MSR_TSC_DEADLINE])
    getters: dict[str, Callable[[], Any]] = {
        "regs": vcpu.get_regs, "sregs": vcpu.get_sregs, "xcrs": vcpu.get_xcrs, "xsave": vcpu.get_xsave,
        "lapic": vcpu.get_lapic, "debugregs": vcpu.get_debugregs, "events": vcpu.get_vcpu_events,
    }  # fmt: skip
    structures = {name: bytes(get()) for name, get in getters.items()}
    return SavedProcessor(structures, msrs, vcpu.get_mp_state(), vcpu.get_tsc_khz())


def _restore_processor(saved: SavedProcessor, vcpu: VCPU, known: set[int]) -> None:
    if vcpu.get_tsc_khz() != saved.tsc_khz:
        vcpu.set_tsc_khz(saved.tsc_khz)
    parts = saved.structures
    vcpu.set_sregs(_structure(kvm_state.Sregs, "sregs", parts["sregs"]))
    vcpu.set_regs(_structure(kvm_state.Regs, "regs", parts["regs"]))
    vcpu.set_xcrs(_structure(kvm_state.Xcrs, "xcrs", parts["xcrs"]))
    vcpu.set_xsave(_of_the_model(_structure(kvm_state.Xsave, "xsave", parts["xsave"]), vcpu))
    msrs = _known_here(saved.msrs, known)
    deadline = msrs.pop(MSR_TSC_DEADLINE, None)
    vcpu.set_msrs(msrs)
    vcpu.set_debugregs(_structure(kvm_state.Debugregs, "debugregs", parts["debugregs"]))
    vcpu.set_lapic(_structure(kvm_state.LapicState, "lapic", parts["lapic"]))
    if deadline is not None:
        vcpu.set_msrs({MSR_TSC_DEADLINE: deadline})
    vcpu.set_mp_state(saved.mp_state)
    vcpu.set_vcpu_events(_structure(kvm_state.VcpuEvents, "events", parts["events"]))


def _of_the_model(xsave: kvm_state.Xsave, vcpu: VCPU) -> kvm_state.Xsave:
    """Without the states the guest's processor has not got: KVM saves what the host's has, such as PKRU."""
    states = next((leaf.eax for leaf in vcpu.get_cpuid2() if (leaf.function, leaf.index) == (0xD, 0)), 0)
    low, high = XSTATE_BV_WORDS
    xsave.region[low] &= states or XSTATE_X87_SSE
    xsave.region[high] = 0
    return xsave


def _known_here(msrs: Mapping[int, int], known: set[int]) -> dict[int, int]:
    """The registers this accelerator has. One that holds what it holds after reset is not missed.

    Raises StateError for another.
    """
    lost = [index for index, value in msrs.items() if index not in known and value]
    if lost:
        raise StateError(f"saved MSR {lost[0]:#x} holds {msrs[lost[0]]:#x}: the accelerator here has no such register")
    return {index: value for index, value in msrs.items() if index in known}


def _structure(kind: type[StructureT], name: str, data: bytes) -> StructureT:
    if len(data) != ctypes.sizeof(kind):
        raise StateError(f"saved {name}: {len(data)} bytes; expected {ctypes.sizeof(kind)}")
    return kind.from_buffer_copy(data)


def copy_memory(source: GuestMemory, target: GuestMemory, ranges: Mapping[int, int]) -> None:
    """Copy guest memory (address → bytes), skipping pages that are zero: the target is new."""
    zero = bytes(PAGE_SIZE)
    for start, size in ranges.items():
        for gpa in range(start, start + size, PAGE_SIZE):
            page = source.view(gpa, PAGE_SIZE)
            if page != zero:
                target.view(gpa, PAGE_SIZE)[:] = page
