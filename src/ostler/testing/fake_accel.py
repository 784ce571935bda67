"""An accelerator whose processors follow scripts: the machine and its process, tested without a CPU.

A processor whose script has ended halts until it is kicked. Only the interface that machines use
is played; state structures are kept and given back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, cast

from ostler.accel.api import (
    VCPU,
    VM,
    Cap,
    CpuidEntry2,
    ExitReason,
    FailEntry,
    InternalError,
    Irqchip,
    LapicState,
    Mmio,
    PortIo,
    Regs,
    Route,
    Sregs,
    SystemEvent,
    Translation,
    Xcrs,
)
from ostler.accel.models import model
from ostler.memory.layout import PAGE_SIZE
from ostler.testing.fake_script import Action, Halt, In, Out, Script, Stop, Store


class _View:
    """The exit in flight."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.action: Any = None

    @property
    def io(self) -> PortIo:
        action = self.action
        count = getattr(action, "count", 1)
        return PortIo(isinstance(action, Out), action.port, action.size, count, memoryview(self.data))

    @property
    def mmio(self) -> Mmio:
        return Mmio(isinstance(self.action, Store), self.action.address, memoryview(self.data))

    @property
    def system_event(self) -> SystemEvent:
        return SystemEvent(self.action.code, ())

    @property
    def internal(self) -> InternalError:
        return InternalError(self.action.code, ())

    @property
    def fail_entry(self) -> FailEntry:
        return FailEntry(self.action.code, 0)


class FakeVcpu:
    """A processor that follows its script."""

    def __init__(self, vcpu_id: int, script: Script) -> None:
        self.id = vcpu_id
        self.exit = _View()
        self.regs, self.sregs, self.lapic = Regs(), Sregs(), LapicState()
        self.xcrs = Xcrs()
        self.cpuid: list[CpuidEntry2] = []
        self.msrs: dict[int, int] = {}
        self.runs = 0
        self._script = script
        self._begun = False
        self._wake = threading.Event()
        self._kicked = False

    def run(self) -> ExitReason:
        self.runs += 1
        if self._kicked:
            self._kicked = False
            return ExitReason.INTR
        try:
            action = self._advance()
        except StopIteration:
            action = Halt()
        if isinstance(action, Halt):
            self._wake.wait()
            self._wake.clear()
            self._kicked = False
            return ExitReason.INTR
        self.exit.action = action
        if isinstance(action, Stop):
            return action.reason
        size = action.size * getattr(action, "count", 1)
        self.exit.data = bytearray(getattr(action, "value", 0).to_bytes(size, "little"))
        return ExitReason.IO if isinstance(action, Out | In) else ExitReason.MMIO

    def _advance(self) -> Action:
        if not self._begun:
            self._begun = True
            return next(self._script)
        return self._script.send(int.from_bytes(self.exit.data, "little"))

    def kick(self) -> None:
        self._kicked = True
        self._wake.set()

    def kvmclock_ctrl(self) -> None:
        """No guest here has a clock that could have stood still."""

    def interrupt(self) -> None:
        """Wake from a Halt."""
        self._wake.set()

    def get_regs(self) -> Regs:
        return self.regs

    def set_regs(self, regs: Regs) -> None:
        self.regs = regs

    def get_sregs(self) -> Sregs:
        return self.sregs

    def set_sregs(self, sregs: Sregs) -> None:
        self.sregs = sregs

    def get_lapic(self) -> LapicState:
        return self.lapic

    def set_lapic(self, lapic: LapicState) -> None:
        self.lapic = lapic

    def set_cpuid2(self, entries: Sequence[CpuidEntry2]) -> None:
        self.cpuid = list(entries)

    def get_cpuid2(self) -> list[CpuidEntry2]:
        return self.cpuid

    def set_xcrs(self, xcrs: Xcrs) -> None:
        self.xcrs = xcrs

    def set_msrs(self, values: Mapping[int, int]) -> None:
        self.msrs.update(values)

    def get_tsc_khz(self) -> int:
        return 1_000_000

    def translate(self, linear: int) -> Translation:
        return Translation(linear_address=linear, physical_address=linear, valid=1)

    def close(self) -> None:
        self._script.close()


class FakeVm:
    """Remembers what it was told."""

    def __init__(self, scripts: Sequence[Callable[[], Script]]) -> None:
        self._scripts = scripts
        self.order: list[str] = []
        self.slots: list[tuple[int, int, int]] = []
        self.routes: list[Route] = []
        self.lines: list[tuple[int, int]] = []
        self.messages: list[tuple[int, int]] = []
        self.ioeventfds: list[tuple[int, int, int]] = []
        self.vcpus: list[FakeVcpu] = []
        self.written: list[tuple[int, int]] = []
        self.chips: dict[int, Irqchip] = {}
        self.closed = False

    def create_irqchip(self) -> None:
        self.order.append("irqchip")

    def get_irqchip(self, chip_id: int) -> Irqchip:
        return self.chips.get(chip_id) or Irqchip(chip_id=chip_id)

    def set_irqchip(self, chip: Irqchip) -> None:
        self.chips[chip.chip_id] = chip

    def create_pit2(self) -> None:
        self.order.append("pit")

    def create_vcpu(self, vcpu_id: int) -> FakeVcpu:
        self.order.append(f"vcpu{vcpu_id}")
        script = self._scripts[vcpu_id] if vcpu_id < len(self._scripts) else _halted
        self.vcpus.append(FakeVcpu(vcpu_id, script()))
        return self.vcpus[-1]

    def set_gsi_routing(self, routes: Iterable[Route]) -> None:
        self.routes = list(routes)

    def set_user_memory_region(self, slot: int, gpa: int, size: int, host_address: int, flags: int = 0) -> None:  # noqa: ARG002
        self.slots.append((slot, gpa, size))

    def get_dirty_log(self, slot: int) -> bytearray:
        """No script writes memory."""
        return bytearray(-(-self.slots[slot][2] // PAGE_SIZE // 64) * 8)

    def irq_line(self, gsi: int, level: int) -> None:
        self.lines.append((gsi, level))
        if level:
            for vcpu in self.vcpus:
                vcpu.interrupt()

    def signal_msi(self, address: int, data: int) -> bool:
        self.messages.append((address, data))
        for vcpu in self.vcpus:
            vcpu.interrupt()
        return True

    def ioeventfd(
        self,
        fd: int,
        address: int,
        size: int,
        *,
        datamatch: int | None = None,  # noqa: ARG002
        pio: bool = False,  # noqa: ARG002
        deassign: bool = False,
    ) -> None:
        if deassign:
            self.ioeventfds.remove((fd, address, size))
        else:
            self.ioeventfds.append((fd, address, size))

    def memory_written(self, gpa: int, size: int) -> None:
        self.written.append((gpa, size))

    def statistics(self) -> dict[str, int]:
        return {"instructions": 1000, "exits": 2}

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FakeAccel:
    """Gives one FakeVm; `lacks` takes features out of what it supports."""

    name = "fake"
    max_vcpus = 8
    pays_huge_pages = False

    def __init__(self, *scripts: Callable[[], Script], supported_model: str | None = None) -> None:
        self.vm = FakeVm(scripts)
        self._model = model(supported_model) if supported_model else model()

    def create_vm(self) -> VM:
        return cast("VM", self.vm)

    def get_supported_cpuid(self) -> list[CpuidEntry2]:
        return self._model.cpuid(0, 1, 1_000_000)

    def get_feature_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        return {index: self._model.msrs.get(index, 0) for index in indices}

    def get_msr_index_list(self) -> list[int]:
        return []

    def check_extension(self, cap: int) -> int:
        return self.max_vcpus if cap == Cap.MAX_VCPUS else 1

    def close(self) -> None:
        """Nothing is open."""


def _halted() -> Script:
    yield Halt()


def as_vcpu(fake: FakeVcpu) -> VCPU:
    """The fake where the whole interface is asked for."""
    return cast("VCPU", fake)
