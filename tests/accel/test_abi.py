"""Every structure, ioctl number and constant of `ostler.abi.kvm` against the kernel's own header.

A C program that includes <linux/kvm.h> prints what the compiler makes of each; nothing is typed twice.
"""

import ctypes
import enum
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ostler.abi.kvm import board, requests, run, state
from ostler.abi.kvm.caps import Cap
from ostler.accel.exits import ExitReason
from ostler.accel.transport import request_name

STRUCTURES: dict[type[ctypes.Structure], str] = {
    state.Regs: "kvm_regs",
    state.Segment: "kvm_segment",
    state.Dtable: "kvm_dtable",
    state.Sregs: "kvm_sregs",
    state.Fpu: "kvm_fpu",
    state.Xsave: "kvm_xsave",
    state.Xcr: "kvm_xcr",
    state.Xcrs: "kvm_xcrs",
    state.MsrEntry: "kvm_msr_entry",
    state.Msrs: "kvm_msrs",
    state.MsrList: "kvm_msr_list",
    state.CpuidEntry2: "kvm_cpuid_entry2",
    state.Cpuid2: "kvm_cpuid2",
    state.LapicState: "kvm_lapic_state",
    state.Debugregs: "kvm_debugregs",
    state.GuestDebug: "kvm_guest_debug",
    state.VcpuEvents: "kvm_vcpu_events",
    state.MpState: "kvm_mp_state",
    state.X86Mce: "kvm_x86_mce",
    state.Translation: "kvm_translation",
    state.EnableCap: "kvm_enable_cap",
    board.UserspaceMemoryRegion: "kvm_userspace_memory_region",
    board.DirtyLog: "kvm_dirty_log",
    board.ClearDirtyLog: "kvm_clear_dirty_log",
    board.IrqLevel: "kvm_irq_level",
    board.CoalescedMmioZone: "kvm_coalesced_mmio_zone",
    board.CoalescedMmio: "kvm_coalesced_mmio",
    board.DirtyGfn: "kvm_dirty_gfn",
    board.PicState: "kvm_pic_state",
    board.IoapicState: "kvm_ioapic_state",
    board.Irqchip: "kvm_irqchip",
    board.PitConfig: "kvm_pit_config",
    board.PitChannelState: "kvm_pit_channel_state",
    board.PitState2: "kvm_pit_state2",
    board.IrqRoutingIrqchip: "kvm_irq_routing_irqchip",
    board.IrqRoutingMsi: "kvm_irq_routing_msi",
    board.IrqRoutingEntry: "kvm_irq_routing_entry",
    board.IrqRouting: "kvm_irq_routing",
    board.Irqfd: "kvm_irqfd",
    board.Ioeventfd: "kvm_ioeventfd",
    board.Msi: "kvm_msi",
    board.ClockData: "kvm_clock_data",
    board.DeviceAttr: "kvm_device_attr",
    requests.SignalMask: "kvm_signal_mask",
    run.Run: "kvm_run",
}

# Members the kernel reaches by another path.
RENAMED = {
    "kvm_guest_debug.debugreg": "arch.debugreg",
    "kvm_run.debug.exception": "debug.arch.exception",
    "kvm_run.debug.pad": "debug.arch.pad",
    "kvm_run.debug.pc": "debug.arch.pc",
    "kvm_run.debug.dr6": "debug.arch.dr6",
    "kvm_run.debug.dr7": "debug.arch.dr7",
    "kvm_run.debug": "debug",
    "kvm_run.exits": "hw",
}


def members(kind: type[ctypes.Structure | ctypes.Union], path: str = "", at: int = 0) -> Iterator[tuple[str, int, int]]:
    """Path, offset and size of every member, those inside nested structures too."""
    for name, member, *_ in kind._fields_:
        offset = at + getattr(kind, name).offset
        anonymous = name in getattr(kind, "_anonymous_", ())
        inner = path if anonymous else f"{path}{name}."
        if not anonymous:
            yield f"{path}{name}", offset, ctypes.sizeof(member)
        if issubclass(member, ctypes.Structure | ctypes.Union):
            yield from members(member, inner, offset)


def constants() -> Iterator[tuple[str, int]]:
    """Name in the header and our value."""
    for module in (state, board, run, requests):
        for name, value in vars(module).items():
            if name.startswith("KVM") and isinstance(value, int):
                yield name, value
    enumerations: tuple[tuple[str, type[enum.IntEnum]], ...] = (("KVM_CAP_", Cap), ("KVM_EXIT_", ExitReason))
    for prefix, enumeration in enumerations:
        for constant in enumeration:
            yield prefix + constant.name, int(constant)


def expectations() -> Iterator[tuple[str, str, int]]:
    """A C expression, what it is in our words, and our value."""
    for kind, name in STRUCTURES.items():
        yield f"sizeof(struct {name})", f"size of {name}", ctypes.sizeof(kind)
        for path, offset, size in members(kind):
            real = RENAMED.get(f"{name}.{path}", path)
            yield f"offsetof(struct {name}, {real})", f"offset of {name}.{path}", offset
            yield f"sizeof(((struct {name} *)0)->{real})", f"size of {name}.{path}", size
    for name, value in constants():
        yield f"(unsigned long)({name})", name, value


@pytest.fixture(scope="module")
def compiler() -> str:
    for candidate in ("cc", "gcc", "clang"):
        if path := shutil.which(candidate):
            return path
    pytest.skip("no C compiler to ask for the kernel's layouts (Debian: gcc, linux-libc-dev)")


def test_layouts_and_numbers_equal_the_kernels(compiler: str, tmp_path: Path) -> None:
    wanted = list(expectations())
    lines = [f'    printf("%lu\\n", (unsigned long){expression});' for expression, _, _ in wanted]
    source = tmp_path / "layouts.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\nint main(void)\n{\n"
        + "\n".join(lines)
        + "\n    return 0;\n}\n"
    )
    program = tmp_path / "layouts"

    built = subprocess.run([compiler, "-w", "-o", program, source], capture_output=True, text=True, check=False)
    if "linux/kvm.h: No such file" in built.stderr:
        pytest.skip("no <linux/kvm.h> to compare with (Debian: linux-libc-dev)")
    assert built.returncode == 0, built.stderr
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()

    found = {words: int(value) for (_, words, _), value in zip(wanted, printed, strict=True)}
    assert found == {words: value for _, words, value in wanted}


def test_request_names_are_unambiguous() -> None:
    numbers = [value for name, value in vars(requests).items() if name.startswith("KVM_") and value != 12]

    assert len(numbers) == len(set(numbers))
    assert request_name(requests.KVM_SET_SREGS) == "KVM_SET_SREGS"
    assert request_name(0x1234) == "request 0x00001234"
