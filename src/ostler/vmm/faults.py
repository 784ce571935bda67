"""What becomes of a guest when something goes wrong, and making it go wrong on purpose: docs/faults.md.

Whatever notices a fault (a processor, the watchdog, a disk) stops the processors and leaves the rest to the loop,
where the policy is carried out and everybody is told by an event. Without this service, as in `ostler run` of a kernel
alone, every crash ends the guest.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ostler.abi.kvm.state import KVM_VCPUEVENT_VALID_SHADOW
from ostler.config.defaults import POLICIES, Fault, checked
from ostler.control.wire import Message
from ostler.devices.virtio.blk import Block
from ostler.devices.wiring import PowerEvent
from ostler.errors import BadRequest, OstlerError
from ostler.machine import machine_check
from ostler.vmm.crash import panic_line
from ostler.vmm.mapper import held
from ostler.vmm.processors import End, EndKind
from ostler.vmm.run import GuestProcess
from ostler.vmm.server import Connection

if TYPE_CHECKING:
    from ostler.vmm.service import GuestService

OF_END = {EndKind.PANIC: Fault.PANIC, EndKind.TRIPLE_FAULT: Fault.TRIPLE_FAULT, EndKind.HANG: Fault.HANG}
MEANING = {
    Fault.PANIC: "the guest's kernel reported a panic", Fault.TRIPLE_FAULT: "triple fault",
    Fault.HANG: "the guest did not feed its watchdog",
}  # fmt: skip
UNDEFINED_INSTRUCTION = 6
RETRY_NS = 1_000_000_000
MAX_COUNT, MAX_HANG_S, DEFAULT_HANG_S = 1 << 20, 3600.0, 60.0
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(slots=True)
class Injected:
    """What one disk's requests are to come to, and how many of them."""

    number: int
    left: int
    kinds: frozenset[str]


class FaultService:
    """Adds `inject` and `fault-policy` to the guest's service, and carries policies out."""

    def __init__(self, process: GuestProcess, service: GuestService) -> None:
        self._process, self._service = process, service
        spec = process.machine.spec
        self._policies: dict[Fault, str] = {fault: getattr(spec, f"on_{fault.name.lower()}") for fault in POLICIES}
        self._injected: dict[str, Injected] = {}
        self._by_request: set[Fault] = set()
        self._waiting: dict[str, Block] = {}
        self._retry = process.loop.new_timer()
        self._retry.call(self._try_again)
        self._unhang = process.loop.new_timer()
        self._unhang.call(self._end_hang)
        process.on_fault = self._intercept
        process.when_resumed = self._resumed
        for name, device in process.machine.devices.items():
            if isinstance(device, Block):
                device.inject = partial(self._inject_into, name)
                device.judge = partial(self._judge, name, device)
        for name, backend in self._backends().items():
            backend.when_died = partial(self._backend_died, name)
        self._faults: dict[str, Callable[[Mapping[str, Any]], Message]] = {
            "panic": self._panic, "triple-fault": self._triple_fault, "hang": self._hang, "nmi": self._nmi,
            "disk-error": self._disk_error, "no-space": self._disk_error, "backend-lost": self._backend_lost,
            "memory-error": self._memory_error, "clear": self._clear,
        }  # fmt: skip
        service.add_operations({"inject": self._inject, "fault-policy": self._policy})

    # -- faults as they come ------------------------------------------------------------------------

    def _intercept(self, end: End) -> bool:
        """Whether the end is a fault with a policy: then it is not the end yet. Any thread."""
        if end.kind is EndKind.RESET and panic_line(self._process.console.tail) is not None:
            # How a kernel without a driver for pvpanic says it.
            end = replace(end, kind=EndKind.PANIC)
        fault = OF_END.get(end.kind)
        if fault is None:
            return False
        policy = self._policies[fault]
        if policy != "ignore":
            for processor in self._process.processors:
                processor.hold()
        self._process.loop.call_soon(lambda: self._act(fault, policy, end, MEANING[fault]))
        return True

    def _judge(self, name: str, device: Block, error: OSError) -> bool:
        """Whether the disk is to keep a request it could not do. On the loop's thread or a processor's, locked."""
        if error.errno is None:
            # The guest's own mistake: there is no such sector.
            return False
        fault = Fault.NO_SPACE if error.errno in NO_SPACE else Fault.DISK_ERROR
        policy = self._policies[fault]
        text = f"{name}: {error.strerror or error}"
        is_known = name in self._waiting
        if policy != "report":
            self._waiting[name] = device
        if not is_known:
            end = End(EndKind.STUCK, text=text)
            self._process.loop.call_soon(lambda: self._act(fault, policy, end, text))
        return policy != "report"

    def _act(self, fault: Fault, policy: str, end: End, text: str) -> None:
        """Say it and do what the policy wants; on the loop's thread."""
        injected = fault in self._by_request
        self._by_request.discard(fault)
        self._service.announce(
            "fault", fault=fault.value, policy=policy, message=text, vcpu=end.vcpu, injected=injected
        )
        try:
            if policy == "pause":
                self._pause(fault)
            elif policy == "reset":
                self._process.reset()
                self._service.announce("reset", fault=fault.value)
            elif policy == "poweroff":
                self._process.end(end)
            if fault is Fault.HANG:
                with self._process.lock:
                    self._process.machine.board.watchdog.feed()
        except OstlerError as error:
            self._service.report("faults", f"{fault.value}: {policy} failed: {error}")
            self._process.end(end)

    def _pause(self, fault: Fault) -> None:
        self._unhang.disarm()
        # Held already, perhaps, by whoever noticed: what is missing is that everybody knows.
        self._process.pause()
        self._service.announce("paused", fault=fault.value)
        if fault is Fault.NO_SPACE:
            self._retry.arm(time.monotonic_ns() + RETRY_NS)

    # -- requests that wait -------------------------------------------------------------------------

    def _try_again(self) -> None:
        """Once a second: is there space now? Then the guest goes on."""
        if not self._waiting or not self._process.is_paused:
            return
        self._do_again()
        if any(device.is_waiting for device in self._waiting.values()):
            self._retry.arm(time.monotonic_ns() + RETRY_NS)
            return
        self._waiting.clear()
        self._process.resume()
        self._service.announce("resumed", fault=Fault.NO_SPACE.value)

    def _do_again(self) -> None:
        for device in self._waiting.values():
            with self._process.lock:
                device.retry()

    def _resumed(self) -> None:
        """Somebody let the guest go on: what could not be done is tried again, and may fail anew."""
        if self._waiting:
            waiting, self._waiting = self._waiting, {}
            for device in waiting.values():
                with self._process.lock:
                    device.retry()

    # -- on request ---------------------------------------------------------------------------------

    def _policy(self, _connection: Connection, _number: object, arguments: Message) -> Message:
        """Change what is to happen; says what holds."""
        for name, value in arguments.items():
            if name in ("id", "op"):
                continue
            fault = next((each for each in POLICIES if each.value == name), None)
            if fault is None:
                raise BadRequest(f"fault {name!r}: expected one of {', '.join(each.value for each in POLICIES)}")
            if checked(fault, value) == "reset" and not self._process.can_reset:
                raise BadRequest(f"policy 'reset' of {name}: expected a guest that was started with such a policy")
            self._policies[fault] = value
        return {fault.value: policy for fault, policy in self._policies.items()}

    def _inject(self, _connection: Connection, _number: object, arguments: Message) -> Message:
        name = arguments.get("fault")
        inject = self._faults.get(name) if isinstance(name, str) else None
        if inject is None:
            raise BadRequest(f"fault {name!r}: expected one of {', '.join(self._faults)}")
        if self._process.is_paused and name not in ("clear", "disk-error", "no-space"):
            raise BadRequest(f"fault {name!r}: expected a guest that runs, and this one is paused")
        self._by_request |= {each for each in POLICIES if each.value == name}
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
        self._by_request.discard(Fault.HANG)
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
        backend = self._backends().get(name)
        if backend is None:
            raise BadRequest(f"device {name!r}: expected one that another program serves")
        backend.kill()
        return {"device": name}

    def _backends(self) -> dict[str, Any]:
        """Other programs that serve this guest, by their devices' names."""
        found: dict[str, Any] = {each.name: each.device.backend for each in self._process.networks}
        served = ((name, getattr(device, "server", None)) for name, device in self._process.machine.devices.items())
        found |= {name: server for name, server in served if server is not None}
        return {name: backend for name, backend in found.items() if hasattr(backend, "when_died")}

    def _backend_died(self, name: str) -> None:
        """It is started again where it can be; the policy says what the guest does meanwhile."""
        text, fault = f"{name}: the program that serves it has ended", Fault.BACKEND_LOST
        end = End(EndKind.STUCK, text=text)
        self._process.loop.call_soon(lambda: self._act(fault, self._policies[fault], end, text))

    def _memory_error(self, arguments: Mapping[str, Any]) -> Message:
        """A page of the host's has gone bad under the guest: its content is lost."""
        address = int(_number(arguments, "address", 0, float(1 << 52)))
        page = address & ~0xFFF
        if not self._process.machine.memory.contains(page, 0x1000):
            raise BadRequest(f"address {address:#x}: expected guest memory")
        policy = self._policies[Fault.MEMORY_ERROR]
        model = self._process.machine.model
        if policy == "report" and not machine_check.is_possible(model):
            raise BadRequest(
                f"fault 'memory-error': its policy is to report it, and CPU model {model.name} has "
                "no machine checks; expected one with mce and mca, such as ostler-v3.1,+mce,+mca"
            )
        text = f"memory error at guest-physical address {address:#x}"
        self._act(Fault.MEMORY_ERROR, policy, End(EndKind.STUCK, text=text), text)
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


def _number(arguments: Mapping[str, Any], name: str, default: float, most: float) -> float:
    value = arguments.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise BadRequest(f"{name} {value!r}: expected a number from 0 to {most:g}")
    return value
