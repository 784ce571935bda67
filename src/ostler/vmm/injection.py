"""Making things go wrong in a running guest on purpose: docs/faults.md.

What a fault then comes to is `ostler.vmm.faults`' business, as if nobody had asked for it.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ostler.abi.kvm.state import KVM_VCPUEVENT_VALID_SHADOW
from ostler.config.defaults import POLICIES, Fault
from ostler.control.wire import Message
from ostler.devices.virtio.blk import Block
from ostler.devices.wiring import PowerEvent
from ostler.errors import BadRequest
from ostler.machine import machine_check
from ostler.vmm.faults import FaultService, backends
from ostler.vmm.mapper import held
from ostler.vmm.processors import End, EndKind
from ostler.vmm.run import GuestProcess
from ostler.vmm.server import Connection

if TYPE_CHECKING:
    from ostler.vmm.service import GuestService

UNDEFINED_INSTRUCTION = 6
MAX_COUNT, MAX_HANG_S, DEFAULT_HANG_S = 1 << 20, 3600.0, 60.0


@dataclass(slots=True)
class Injected:
    """What one disk's requests are to come to, and how many of them."""

    number: int
    left: int
    kinds: frozenset[str]


class Injection:
    """Adds `inject` to the guest's service."""

    def __init__(self, process: GuestProcess, service: GuestService, faults: FaultService) -> None:
        self._process, self._outcome = process, faults
        self._injected: dict[str, Injected] = {}
        self._unhang = process.loop.new_timer()
        self._unhang.call(self._end_hang)
        faults.when_paused = self._unhang.disarm
        for name, device in process.machine.devices.items():
            if isinstance(device, Block):
                device.inject = partial(self._inject_into, name)
        self._faults: dict[str, Callable[[Mapping[str, Any]], Message]] = {
            "panic": self._panic, "triple-fault": self._triple_fault, "hang": self._hang, "nmi": self._nmi,
            "disk-error": self._disk_error, "no-space": self._disk_error, "backend-lost": self._backend_lost,
            "memory-error": self._memory_error, "clear": self._clear,
        }  # fmt: skip
        service.add_operations({"inject": self._inject})

    def _inject(self, _connection: Connection, _number: object, arguments: Message) -> Message:
        name = arguments.get("fault")
        inject = self._faults.get(name) if isinstance(name, str) else None
        if inject is None:
            raise BadRequest(f"fault {name!r}: expected one of {', '.join(self._faults)}")
        if self._process.is_paused and name not in ("clear", "disk-error", "no-space"):
            raise BadRequest(f"fault {name!r}: expected a guest that runs, and this one is paused")
        self._outcome.by_request |= {each for each in POLICIES if each.value == name}
        return inject(arguments)

    def _panic(self, _arguments: Mapping[str, Any]) -> Message:
        """As if the guest's kernel had told pvpanic."""
        self._process.power(PowerEvent.PANIC)
        return {}

    def _triple_fault(self, arguments: Mapping[str, Any]) -> Message:
        """A real one: an exception without a table of handlers."""
        vcpu = self._vcpu(arguments)
        with held(self._process):
            sregs = vcpu.get_sregs()
            sregs.idt.limit = 0
            vcpu.set_sregs(sregs)
            events = vcpu.get_vcpu_events()
            events.exception.injected, events.exception.nr = 1, UNDEFINED_INSTRUCTION
            events.exception.has_error_code = 0
            events.flags &= KVM_VCPUEVENT_VALID_SHADOW
            vcpu.set_vcpu_events(events)
        return {}

    def _hang(self, arguments: Mapping[str, Any]) -> Message:
        """The processors do nothing, and nobody is told: only the guest's watchdog can notice."""
        seconds = _number(arguments, "seconds", DEFAULT_HANG_S, MAX_HANG_S)
        for processor in self._process.processors:
            processor.hold()
        self._unhang.arm(time.monotonic_ns() + int(seconds * 1e9))
        watchdog = self._process.machine.board.watchdog
        return {"watchdog": watchdog.is_running, "watchdog_timeout_s": watchdog.timeout_s}

    def _end_hang(self) -> None:
        self._outcome.by_request.discard(Fault.HANG)
        if not self._process.is_paused:
            for processor in self._process.processors:
                processor.go_on()

    def _nmi(self, arguments: Mapping[str, Any]) -> Message:
        self._vcpu(arguments).nmi()
        return {}

    def _disk_error(self, arguments: Mapping[str, Any]) -> Message:
        """The next requests of a disk fail, with EIO or ENOSPC."""
        name = str(arguments.get("device", "disk0"))
        if not isinstance(self._process.machine.devices.get(name), Block):
            raise BadRequest(f"device {name!r}: expected a disk that this process serves, such as disk0")
        kinds = arguments.get("requests", ["write"] if arguments["fault"] == "no-space" else ["read", "write", "flush"])
        if not isinstance(kinds, list) or not kinds or not set(map(str, kinds)) <= {"read", "write", "flush"}:
            raise BadRequest(f"requests {kinds!r}: expected some of read, write, flush")
        count = int(_number(arguments, "count", 1, MAX_COUNT))
        number = errno.ENOSPC if arguments["fault"] == "no-space" else errno.EIO
        self._injected[name] = Injected(number, count, frozenset(map(str, kinds)))
        return {"device": name, "count": count}

    def _inject_into(self, name: str, kind: str) -> None:
        """A disk is about to serve a request. Raises OSError where it was asked for."""
        wanted = self._injected.get(name)
        if wanted is None or kind not in wanted.kinds:
            return
        wanted.left -= 1
        if wanted.left <= 0:
            del self._injected[name]
        raise OSError(wanted.number, "injected: " + ("no space" if wanted.number == errno.ENOSPC else "disk error"))

    def _backend_lost(self, arguments: Mapping[str, Any]) -> Message:
        """The program that serves a device is killed, as by the kernel when memory is short."""
        name = str(arguments.get("device", "net0"))
        backend = backends(self._process).get(name)
        if backend is None:
            raise BadRequest(f"device {name!r}: expected one that another program serves")
        backend.kill()
        return {"device": name}

    def _memory_error(self, arguments: Mapping[str, Any]) -> Message:
        """A page of the host's has gone bad under the guest: its content is lost."""
        address = int(_number(arguments, "address", 0, float(1 << 52)))
        page = address & ~0xFFF
        if not self._process.machine.memory.contains(page, 0x1000):
            raise BadRequest(f"address {address:#x}: expected guest memory")
        policy = self._outcome.policies[Fault.MEMORY_ERROR]
        model = self._process.machine.model
        if policy == "report" and not machine_check.is_possible(model):
            raise BadRequest(
                f"fault 'memory-error': its policy is to report it, and CPU model {model.name} has "
                "no machine checks; expected one with mce and mca, such as ostler-v3.1,+mce,+mca"
            )
        text = f"memory error at guest-physical address {address:#x}"
        self._outcome.act(Fault.MEMORY_ERROR, policy, End(EndKind.STUCK, text=text), text)
        if policy == "report":
            with held(self._process):
                machine_check.tell_of_bad_page(self._process.machine.vcpus, page)
        return {}

    def _clear(self, _arguments: Mapping[str, Any]) -> Message:
        """Disks work again; a hang ends."""
        self._injected.clear()
        self._unhang.disarm()
        self._end_hang()
        return {}

    def _vcpu(self, arguments: Mapping[str, Any]) -> Any:
        vcpus = self._process.machine.vcpus
        return vcpus[int(_number(arguments, "vcpu", 0, len(vcpus) - 1))]


def serve_faults(process: GuestProcess, service: GuestService) -> None:
    """Policies, and faults on demand."""
    Injection(process, service, FaultService(process, service))


def _number(arguments: Mapping[str, Any], name: str, default: float, most: float) -> float:
    value = arguments.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise BadRequest(f"{name} {value!r}: expected a number from 0 to {most:g}")
    return value
