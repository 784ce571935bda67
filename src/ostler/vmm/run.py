"""Running one guest from its specification to its end: what `ostler run` calls.

Phases, in order: read (kernel and initrd from disk, unpacking), create (accelerator, VM, board,
loading into memory), run. The caller owns the terminal; this module only reads and writes the
file descriptors it is given. Signals that raise in the main thread end the guest and pass on.

A guest that resets has ended, with status 0: there is no reboot. Kernels without a loaded pvpanic
driver report a panic by resetting (`panic=-1`, which is put on Linux's command line unless it has a
`panic=` of its own); a reset right after panic output on the console counts as the panic it is.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from ostler import accel
from ostler.accel.api import Accel
from ostler.backends.loop import Host
from ostler.boot.kernel import Kernel
from ostler.boot.kernel import Protocol as BootProtocol
from ostler.boot.load import read_file, read_kernel
from ostler.boot.unpacked import UnpackedKernels
from ostler.config.defaults import FIELDS
from ostler.devices.wiring import PowerEvent
from ostler.errors import AccelError, HostError, OstlerError, StateError
from ostler.host.folders import cache_root
from ostler.machine.board import Wiring
from ostler.machine.machine import Machine
from ostler.machine.surroundings import Surroundings
from ostler.vmm.console import ConsoleFactory, InputFilter, on_descriptors
from ostler.vmm.crash import crash_error, panic_line
from ostler.vmm.loop import EventLoop, HostClock
from ostler.vmm.processors import End, EndKind, Outcome, Processor
from ostler.vmm.shares import ProcessorShares
from ostler.vmm.steal import teller

if TYPE_CHECKING:
    from ostler.backends.disk_layers import DiskImage
    from ostler.config import GuestSpec
    from ostler.config.schedule import Schedule
    from ostler.devices.virtio.device import VirtioDevice
    from ostler.machine.networks import Network
    from ostler.machine.saved import SavedMachine

UNCLAIMED_SHOWN = 16

ORDERLY = {EndKind.POWER_OFF: 0, EndKind.RESET: 0, EndKind.QUIT: 0}
POWER_ENDS = {
    PowerEvent.POWER_OFF: EndKind.POWER_OFF,
    PowerEvent.RESET: EndKind.RESET,
    PowerEvent.PANIC: EndKind.PANIC,
    PowerEvent.DEBUG_EXIT: EndKind.DEBUG_EXIT,
    PowerEvent.HANG: EndKind.HANG,
}


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a guest ended that did not crash."""

    exit_status: int
    reason: str
    accelerator: str
    timings_s: dict[str, float]
    """Seconds by phase: read, create, first output, run."""
    masked_features: tuple[str, ...] = ()
    """Features of the default CPU model that the accelerator lacks."""


def run(
    spec: GuestSpec,
    *,
    console_in: int | None = None,
    console_out: int = 1,
    keys: InputFilter | None = None,
    accelerator: Accel | None = None,
) -> RunResult:
    """Run a guest to its end. Call in the main thread.

    Raises BadRequest for what the guest is made of, GuestCrash for how it ended, HostError for what
    the host refused, BrokenPipeError when nobody reads the console any more.
    """
    started = time.monotonic()
    kernel, initrd = read_material(spec)
    read_s = time.monotonic() - started
    with contextlib.ExitStack() as stack:
        opened = accelerator or accel.open(spec.accel)
        if accelerator is None:
            stack.callback(opened.close)
        process = stack.enter_context(GuestProcess(spec, opened, on_descriptors(console_in, console_out, keys)))
        process.machine.load(kernel, initrd=initrd, cmdline=command_line(spec.append, kernel))
        # The unpacked kernel is tens of megabytes, and the guest has its own copy now.
        del kernel, initrd
        create_s = time.monotonic() - started - read_s
        run_started_ns = time.monotonic_ns()
        end = process.run()
        run_s = (time.monotonic_ns() - run_started_ns) / 1e9
        timings = {"read": read_s, "create": create_s, "run": run_s}
        if process.console.first_byte_ns is not None:
            timings["first output"] = (process.console.first_byte_ns - run_started_ns) / 1e9
        status = process.judge(end)
        return RunResult(status, end.kind.value, opened.name, timings, tuple(process.machine.masked_features))


def read_material(spec: GuestSpec) -> tuple[Kernel, bytes | None]:
    """Both files. An initrd larger than memory is refused before it is read."""
    initrd = read_file(spec.initrd, "initrd", max_bytes=spec.memory_bytes) if spec.initrd else None
    unpacked = UnpackedKernels(cache_root() / "unpacked")
    return read_kernel(Path(spec.kernel), unpacked=unpacked), initrd


def command_line(append: str, kernel: Kernel) -> str:
    """The guest's, with what makes a panic end the run."""
    if kernel.protocol is BootProtocol.MULTIBOOT or any(word.startswith("panic=") for word in append.split()):
        return append
    return f"panic=-1 {append}".rstrip()


class Beginning(Protocol):
    """What memory and disks hold at the start of a guest that goes on from somewhere."""

    @property
    def disks(self) -> Mapping[str, DiskImage]:
        """Of throw-away disks, by the devices' names."""

    def open_memory(self) -> int:
        """A descriptor of the memory's image, for the caller to own. Raises StateError."""


class GuestProcess:
    """A machine, its threads and its loop, alive together; a context manager."""

    def __init__(
        self,
        spec: GuestSpec,
        opened: Accel,
        make_console: ConsoleFactory,
        *,
        folder: Path | None = None,
        beginning: Beginning | None = None,
        is_incoming: bool = False,
    ) -> None:
        """`folder` is where the guest's sockets are; `is_incoming` is one that still runs elsewhere.

        Raises OstlerError for what it cannot be made of.
        """
        self.early_troubles: list[str] = []
        """What was reported before anybody listened."""
        self.report: Callable[[str, str], None] = self._note_trouble
        self.lock = threading.Lock()
        self._accel = opened
        self._outcome = Outcome()
        self._outcome.intercept = self._intercept
        self.on_fault: Callable[[End], bool] = _is_the_end
        """Asked before a fault ends the guest, in any thread; true where it does not (`ostler.vmm.faults`)."""
        self.when_resumed: Callable[[], None] = _nothing
        self.is_paused = False
        with contextlib.ExitStack() as undo:
            self.loop = undo.enter_context(EventLoop())
            self.console = make_console(self.loop, self.lock)
            wiring = Wiring(
                lock=self.lock,
                clock=HostClock(),
                new_timer=lambda: self.loop.new_timer(lock=self.lock),
                power=self.power,
                console_sink=self.console.put,
                console_room=self.console.on_room,
                add_reader=self.loop.add_reader,
                remove_reader=self.loop.remove_reader,
            )
            host = Host(self.loop, self.lock)
            disks = beginning.disks if beginning else {}
            around = Surroundings(
                host, folder, self._report, wiring.clock, wiring.new_timer, disks, is_incoming,
                goes_on=beginning is not None,
            )  # fmt: skip
            self._when_moved = around.when_moved
            self.networks = _networks(spec, undo, around)
            functions = _functions(spec, undo, around, self.networks)
            image = beginning.open_memory() if beginning else None
            self.machine = undo.enter_context(Machine(spec, opened, wiring, functions=functions, image=image))
            self.processors = [
                Processor(vcpu, self.machine.board, self.console.output, self._outcome) for vcpu in self.machine.vcpus
            ]
            for processor in self.processors:
                processor.after_turn = teller(processor.vcpu, self.machine.memory)
            self.shares = ProcessorShares(
                self.processors, spec.schedule, name=folder.name if folder else "kernel", report=self._report
            )
            self._power_on = self._state_at_power_on(spec)
            self.resets = 0
            """How often the guest has begun anew."""
            self._resources = undo.pop_all()
        for processor in self.processors:
            self._outcome.when_ended(processor.ask_to_stop)
        self._outcome.when_ended(self.loop.stop)

    def run(self, *, paused: bool = False) -> End:
        """Start everything, serve until the end, stop everything whatever happens.

        With `paused` the loop serves everybody, and the guest stands still until `resume`.
        """
        if paused:
            for processor in self.processors:
                processor.hold()
            self.is_paused = True
        self.console.connect(self.machine.board.serial, self.quit)
        started: list[Processor] = []
        try:
            for processor in self.processors:
                started.append(processor)
                processor.start()
            self.shares.start()
            self.loop.run()
        finally:
            # Also the way out of a signal or of a console that is gone: nobody may stay in the guest.
            self.quit()
            self.console.release()
            self.shares.close()
            for processor in started:
                processor.join()
        self.console.finish()
        self._log_unclaimed()
        return self._outcome.end or End(EndKind.QUIT)

    def quit(self) -> None:
        """End the run from outside; from any thread. The processors are stopped when `run` returns."""
        self._outcome.announce(End(EndKind.QUIT))

    def pause(self) -> None:
        """Hold every processor outside of the guest; devices finish what they have begun. Loop thread only.

        Raises AccelError for a processor that does not leave the guest.
        """
        if self.is_paused:
            return
        for processor in self.processors:
            processor.hold()
        for processor in self.processors:
            processor.wait_until_held()
        self.is_paused = True

    def resume(self) -> None:
        """Undo `pause`. Time has gone on; the guest's watchdogs are told that it stood still. Loop thread only."""
        if not self.is_paused:
            return
        self.is_paused = False
        for processor in self.processors:
            # Refused where the guest has no kvmclock, and then there is nobody to tell.
            with contextlib.suppress(OstlerError):
                processor.vcpu.kvmclock_ctrl()
            processor.go_on()
        self.when_resumed()

    @property
    def can_reset(self) -> bool:
        """Whether the guest was started with a policy that resets it."""
        return self._power_on is not None

    def reset(self) -> None:
        """Begin anew, as after power-on: processors, devices, memory, kernel. Disks keep what they hold.

        Loop thread only. The guest runs when this returns. Raises HostError for one that was not started for it.
        """
        from ostler.machine import saved

        if self._power_on is None:
            raise HostError("the guest cannot be reset: expected one that was started with a policy that does")
        self.resets += 1
        self.pause()
        machine = self.machine
        with self.lock:
            for transport in machine.transports:
                transport.core.reset()
        for region in machine.memory.regions:
            machine.memory.discard(region.start, region.size_bytes)
        saved.restore(self._power_on, machine, self._accel)
        self.console.tail.clear()
        kernel, initrd = read_material(machine.spec)
        machine.load(kernel, initrd=initrd, cmdline=command_line(machine.spec.append, kernel))
        self.resume()

    def _intercept(self, end: End) -> bool:
        # Looked up at the time: the policies come after the processors.
        return self.on_fault(end)

    def end(self, end: End) -> None:
        """This is the guest's end, whatever policies say; from any thread."""
        self._outcome.decide(end)

    def _state_at_power_on(self, spec: GuestSpec) -> SavedMachine | None:
        """What `reset` goes back to, kept where a policy may want it."""
        if not any(getattr(spec, field) == "reset" for field in FIELDS):
            return None
        from ostler.machine import saved

        return saved.save(self.machine, self._accel)

    def schedule(self, schedule: Schedule) -> None:
        """Give the guest another share of the host's processors; it keeps that wherever it goes. Raises BadRequest."""
        self.shares.change(schedule)
        self.machine.spec = self.machine.spec.scheduled(schedule)

    def save_state(self) -> SavedMachine:
        """The machine's state but memory and disks; the guest is paused. Loop thread only. Raises AccelError.

        What devices had under way at their back ends has ended when this returns.
        """
        from ostler.machine import saved

        if not self.is_paused:
            raise HostError("the guest is to be paused while its state is saved")
        return saved.save(self.machine, self._accel)

    def restore_state(self, state: SavedMachine) -> None:
        """Go on from there; before `run`, or before the first `resume` of a guest that was started paused.

        Its memory is filled already. Raises StateError for a state of another machine, or of none; the guest is of no
        use then.
        """
        from ostler.machine import saved

        try:
            saved.restore(state, self.machine, self._accel)
        except AccelError as error:
            raise StateError(f"saved state is not one that {self._accel.name} takes: {error}") from error

    def become(self, folder: Path, state: SavedMachine) -> None:
        """Be the guest of that folder: one that was restored from `state` before anybody knew whose it would be.

        Before `run`. Raises HostError, StateError.
        """
        from ostler.machine import networks, saved

        for move in self._when_moved:
            move(folder)
        self.shares.rename(folder.name)
        self.networks = networks.rename(self.networks, self.machine.spec.nets, folder.name)
        saved.restart(state, self.machine, self._accel)

    def _log_unclaimed(self) -> None:
        """What the guest looked for in vain, most often first."""
        # Not imported here: it brings 12 MiB along, and whoever set logging up has imported it. Where nobody did,
        # structlog's own default would write into the guest's console.
        structlog = sys.modules.get("structlog")
        if structlog is None or not structlog.is_configured():
            return
        log = structlog.get_logger(__name__)
        for what, bus in (("ports", self.machine.board.ports), ("memory", self.machine.board.mmio)):
            found = bus.unclaimed.by_address.most_common(UNCLAIMED_SHOWN)
            if found:
                shown = " ".join(f"{address:#x}:{count}" for address, count in found)
                log.debug("accesses nobody claimed", what=what, total=bus.unclaimed.total, most=shown)

    def judge(self, end: End) -> int:
        """The exit status of an orderly end. Raises GuestCrash, or the bug that ended the run."""
        if end.error is not None:
            raise end.error
        if end.kind is EndKind.RESET and panic_line(self.console.tail) is not None:
            end = replace(end, kind=EndKind.PANIC)
        if end.kind in ORDERLY:
            return ORDERLY[end.kind]
        if end.kind is EndKind.DEBUG_EXIT:
            return end.code
        vcpu = self.machine.vcpus[end.vcpu or 0]
        raise crash_error(end, vcpu, self.machine.memory, self.console.tail)

    def _note_trouble(self, device: str, text: str) -> None:
        self.early_troubles.append(f"{device}: {text}")
        print(f"ostler: {device}: {text}", file=sys.stderr)  # noqa: T201

    def _report(self, device: str, text: str) -> None:
        # Looked up at the time: whoever listens comes after the devices.
        self.report(device, text)

    def power(self, event: PowerEvent, code: int = 0) -> None:
        """A device ends the run; called in the thread of the processor that did it."""
        if event not in POWER_ENDS:
            # A crash kernel is about to take over: the guest goes on.
            return
        if event is PowerEvent.HANG and self.is_paused:
            # It could not feed its watchdog: it was not let.
            self.machine.board.watchdog.feed()
            return
        vcpu = next((each.vcpu.id for each in self.processors if each.is_current), None)
        text = "the guest did not feed its watchdog" if event is PowerEvent.HANG else ""
        self._outcome.announce(End(POWER_ENDS[event], code=code, vcpu=vcpu, text=text))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A processor that would not stop still uses the memory: leaving it mapped is the lesser evil.
        if not any(processor.is_alive for processor in self.processors):
            self._resources.close()


def _is_the_end(end: End) -> bool:  # noqa: ARG001
    """Without policies every fault is."""
    return False


def _nothing() -> None:
    """Nobody waits for the guest to go on."""


def _networks(spec: GuestSpec, stack: contextlib.ExitStack, around: Surroundings) -> list[Network]:
    if not spec.nets and not spec.ports:
        return []
    from ostler.machine import networks

    return networks.build(spec.nets, spec.ports, stack, around)


def _functions(
    spec: GuestSpec, stack: contextlib.ExitStack, around: Surroundings, cards: list[Network]
) -> list[tuple[str, VirtioDevice]]:
    """The guest's virtio devices. Back ends are many modules, and a kernel alone needs none of them."""
    if spec.disks or spec.shares or cards or spec.balloon or spec.vsock_cid is not None:
        from ostler.machine import peripherals

        return peripherals.build(spec, stack, around, cards)
    if not spec.rng:
        return []
    from ostler.devices.virtio.rng import Entropy

    return [("rng", Entropy(os.urandom))]
