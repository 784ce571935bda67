"""A virtual machine, wired and loaded: the accelerator's parts, guest memory, the board.

Order matters in three places. The interrupt controllers exist before the first processor, which
gets its local APIC from that. Processors get their CPUID before registers, because it decides
which bits are legal. Memory is registered before anything is loaded, so that the accelerator is
told of every write.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ostler.abi.kvm import board as kvm_board
from ostler.accel.api import VCPU, Accel, Cap, CpuidEntry2, IrqRoute, Route
from ostler.accel.fitting import Policy, fit, fit_default, gives_steal_time, install
from ostler.accel.models import DEFAULT_MODEL, model
from ostler.boot.acpi import install_tables
from ostler.boot.kernel import Kernel
from ostler.boot.load import load_guest
from ostler.devices.calls import Calls, leaves
from ostler.devices.virtio.device import VirtioDevice
from ostler.errors import BadRequest, HostError
from ostler.machine import machine_check
from ostler.machine.board import Board, Chipset, Wiring
from ostler.machine.doorbells import Doorbells
from ostler.machine.processor import enable_extended_states, enter, give_pics_their_vectors, wire_local_interrupts
from ostler.memory import GuestMemory
from ostler.memory.layout import GENERATION_ID, GENERATION_ID_BYTES, PAGE_SIZE

if TYPE_CHECKING:
    from ostler.config import GuestSpec

PIC_LINES, IOAPIC_LINES, CASCADE, PIT_PIN = 16, 24, 2, 2


class Machine:
    """Owns VM, processors and memory; a context manager. The board's lock guards its devices."""

    def __init__(
        self,
        spec: GuestSpec,
        accel: Accel,
        wiring: Wiring,
        *,
        functions: Sequence[tuple[str, VirtioDevice]] = (),
        image: int | None = None,
    ) -> None:
        """`functions` are virtio devices for the PCI bus, each under a name of its own, in the bus's order.

        `image` is a descriptor of what the memory is to hold, and is taken over; see GuestMemory.

        Raises BadRequest for processors the accelerator lacks or too many functions, HostError without memory.
        """
        self.spec = spec
        most = accel.check_extension(Cap.MAX_VCPUS)
        if spec.cpus > most:
            raise BadRequest(f"cpus {spec.cpus}: {accel.name} on this host gives a guest at most {most}")
        # Whoever names a model wants that model; the default gives way where a host is older.
        by_default = spec.cpu == DEFAULT_MODEL
        fitted = fit_default(accel) if by_default else fit(model(spec.cpu), accel, Policy.REFUSE)
        self.model, self.masked_features = fitted
        self._steal_time = gives_steal_time(accel)
        with contextlib.ExitStack() as stack:
            try:
                self.shares_memory = any(device.shares_memory for _, device in functions)
                shared = self.shares_memory or (image is None and not accel.pays_huge_pages)
                self.memory = stack.enter_context(GuestMemory.of_size(spec.memory_bytes, shared=shared, image=image))
            except OSError as error:
                raise HostError(f"guest memory of {spec.memory_bytes} bytes: {error.strerror or error}") from error
            self.vm = stack.enter_context(accel.create_vm())
            self.vm.create_irqchip()
            give_pics_their_vectors(self.vm)
            self.vm.create_pit2()
            self.vm.set_gsi_routing(pc_routes())
            self.memory.register(self.vm)
            self.memory.on_write(self.vm.memory_written)
            self.vcpus = [self._new_vcpu(number) for number in range(spec.cpus)]
            doorbells = stack.enter_context(Doorbells(self.vm, wiring))
            self.calls = Calls(self.memory)
            chipset = Chipset(self.vm.irq_line, self._flush_page, self._send_msi, doorbells.new)
            self.board = Board(
                wiring, chipset, cpus=spec.cpus, memory_bytes=spec.memory_bytes, test_devices=spec.test_devices
            )
            if spec.calls:
                self.board.claim_calls(self.calls)
            stack.callback(self._unplug)
            self.transports = [self.board.plug(name, device, self.memory) for name, device in functions]
            self._resources = stack.pop_all()

    def load(self, kernel: Kernel, *, initrd: bytes | None, cmdline: str) -> None:
        """Place tables, kernel and initrd and point the first processor at them. Raises BadRequest."""
        rsdp = install_tables(self.memory, self.board.acpi_platform())
        self.memory.write(GENERATION_ID, os.urandom(GENERATION_ID_BYTES))
        entry = load_guest(self.memory, kernel, initrd=initrd, cmdline=cmdline, rsdp=rsdp)
        enter(self.vcpus[0], entry)

    def begin_generation(self) -> None:
        """The guest goes on as another than it was: its kernel is told to draw random numbers of its own."""
        self.memory.write(GENERATION_ID, os.urandom(GENERATION_ID_BYTES))
        with self.board.lock:
            self.board.tell_generation()

    def _new_vcpu(self, number: int) -> VCPU:
        vcpu = self.vm.create_vcpu(number)
        install(self.model, vcpu, self.spec.cpus, steal_time=self._steal_time)
        if self.spec.calls:
            added = [CpuidEntry2(function=leaf, eax=eax, ebx=ebx, ecx=ecx, edx=edx)
                     for leaf, (eax, ebx, ecx, edx) in leaves().items()]  # fmt: skip
            vcpu.set_cpuid2([*vcpu.get_cpuid2(), *added])
        machine_check.enable(vcpu, self.model)
        wire_local_interrupts(vcpu)
        enable_extended_states(vcpu)
        return vcpu

    def _flush_page(self, gpa: int) -> None:
        """A test program wants the page at `gpa` looked at afresh."""
        self.vm.memory_written(gpa & ~(PAGE_SIZE - 1), PAGE_SIZE)

    @property
    def devices(self) -> dict[str, VirtioDevice]:
        """Virtio devices by the names they were given."""
        return {transport.name: transport.core.device for transport in self.transports}

    def _send_msi(self, address: int, data: int) -> None:
        # A message nobody takes is the guest's own mistake, as on a real bus.
        self.vm.signal_msi(address, data)

    def _unplug(self) -> None:
        """Devices let go of guest memory before it is unmapped."""
        for transport in getattr(self, "transports", ()):
            transport.core.reset()

    def close(self) -> None:
        """Release everything. No processor may be running."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pc_routes() -> list[Route]:
    """GSIs as on a PC: the PIT's line 0 is pin 2 of the IOAPIC, and the PIC's cascade has no line."""
    routes: list[Route] = []
    for gsi in range(IOAPIC_LINES):
        if gsi < PIC_LINES and gsi != CASCADE:
            chip = kvm_board.KVM_IRQCHIP_PIC_MASTER if gsi < 8 else kvm_board.KVM_IRQCHIP_PIC_SLAVE
            routes.append(IrqRoute(gsi, chip, gsi % 8))
        if gsi != CASCADE:
            routes.append(IrqRoute(gsi, kvm_board.KVM_IRQCHIP_IOAPIC, PIT_PIN if gsi == 0 else gsi))
    return routes
