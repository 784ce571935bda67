"""One thread per virtual processor: run, serve the exit, run again.

The path of a port exit is the hot one of the whole Python side; it does one lookup and one call
under the board's lock. What ends a run is decided once, by whoever is first (`Outcome`), and
everybody else is kicked out of the guest.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ostler.accel.api import VCPU, ExitReason
from ostler.errors import AccelError
from ostler.machine.board import Board
from ostler.vmm.console import Congestion

KVM_SYSTEM_EVENT_SHUTDOWN, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_CRASH = 1, 2, 3
# KVM_INTERNAL_ERROR_*, as Documentation/virt/kvm/api.rst explains them.
INTERNAL_ERRORS = {
    1: "an instruction that it cannot emulate",
    2: "two exceptions at once that cannot be",
    3: "an event that could not be delivered",
    4: "an exit of the processor's that it does not know",
}
JOIN_SLICE_S, STOP_LIMIT_S = 0.05, 10
PARK_SLICE_S, PARK_LIMIT_S = 0.005, 10
CPUCLOCK_SCHED, CPUCLOCK_PER_THREAD = 2, 4


class EndKind(Enum):
    """Why a run ended."""

    POWER_OFF = "power-off"
    RESET = "reset"
    DEBUG_EXIT = "debug exit"
    QUIT = "ended from outside"
    PANIC = "panic"
    TRIPLE_FAULT = "triple fault"
    STUCK = "cannot go on"
    BUG = "internal error"


@dataclass(frozen=True, slots=True)
class End:
    """The end of a run, and the processor that brought it about."""

    kind: EndKind
    code: int = 0
    vcpu: int | None = None
    text: str = ""
    error: BaseException | None = None


class Outcome:
    """Keeps the first end announced and tells everyone who must then stop; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._on_end: list[Callable[[], None]] = []
        self.end: End | None = None

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Call back, in the announcing thread, at the end; before processors start."""
        self._on_end.append(callback)

    def announce(self, end: End) -> None:
        """Take it if it is the first."""
        with self._lock:
            if self.end is not None:
                return
            self.end = end
        for callback in self._on_end:
            callback()


class Processor:
    """A virtual processor and its thread."""

    def __init__(self, vcpu: VCPU, board: Board, console: Congestion, outcome: Outcome) -> None:
        self.vcpu = vcpu
        self._board = board
        self._console = console
        self._outcome = outcome
        self._stopping = False
        # Clear while the processor is to stay out of the guest; `_parked` says that it does.
        self._released = threading.Event()
        self._released.set()
        self._parked = threading.Event()
        self._thread = threading.Thread(target=self._main, name=f"vcpu{vcpu.id}", daemon=True)

    def start(self) -> None:
        """Begin to run the guest."""
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Leave the guest as soon as possible; from any thread."""
        self._stopping = True
        self._released.set()
        self.vcpu.kick()

    def hold(self) -> None:
        """Keep out of the guest from the next chance on, until `go_on`; before `start`, from the first on."""
        self._parked.clear()
        self._released.clear()
        self.vcpu.kick()

    def wait_until_held(self) -> None:
        """Wait until the processor is out of the guest; not under the board's lock, which it may need first.

        Raises AccelError for one that no kick gets out.
        """
        deadline = time.monotonic() + PARK_LIMIT_S
        while self._thread.is_alive() and not self._stopping and not self._parked.wait(PARK_SLICE_S):
            self.vcpu.kick()
            if time.monotonic() > deadline:
                raise AccelError(f"vCPU {self.vcpu.id}: still in the guest {PARK_LIMIT_S} s after it was to pause")

    def go_on(self) -> None:
        """Undo `hold`."""
        self._released.set()

    @property
    def cpu_time_ns(self) -> int:
        """Host processor time the thread has used, in the guest and serving its exits; 0 where it has ended."""
        tid = self._thread.native_id
        if tid is None:
            return 0
        try:
            # The thread's clock by the kernel's own encoding (include/linux/posix-timers_types.h): asking libc
            # for it (pthread_getcpuclockid) must not be done for a thread that may have ended.
            return time.clock_gettime_ns(~tid << 3 | CPUCLOCK_PER_THREAD | CPUCLOCK_SCHED)
        except OSError:
            return 0

    def join(self) -> None:
        """Wait for the thread. Raises AccelError for a processor that no kick gets out of the guest."""
        deadline = time.monotonic() + STOP_LIMIT_S
        while self._thread.is_alive():
            # Once more: an earlier kick may have been spent on an exit that was under way.
            self.vcpu.kick()
            self._thread.join(JOIN_SLICE_S)
            if time.monotonic() > deadline:
                raise AccelError(f"vCPU {self.vcpu.id}: still in the guest {STOP_LIMIT_S} s after it was told to stop")

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether the caller runs in this processor's thread."""
        return threading.current_thread() is self._thread

    def _main(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self._outcome.announce(End(EndKind.BUG, vcpu=self.vcpu.id, error=error))

    def _run(self) -> None:
        run, exit_view, console = self.vcpu.run, self.vcpu.exit, self._console
        ports, mmio, lock = self._board.ports, self._board.mmio, self._board.lock
        if not self._released.is_set():
            # Held before it ever ran: not one instruction until it may.
            self._parked.set()
            self._released.wait()
        while not self._stopping:
            reason = run()
            if reason is ExitReason.IO:
                is_write, port, size, count, data = exit_view.io
                if count != 1:
                    self._string_io(is_write=is_write, port=port, size=size, data=data)
                elif is_write:
                    value = data[0] if size == 1 else int.from_bytes(data, "little")
                    with lock:
                        ports.write(port, size, value)
                else:
                    with lock:
                        value = ports.read(port, size)
                    if size == 1:
                        data[0] = value
                    else:
                        data[:] = value.to_bytes(size, "little")
                while console.congested and self._released.is_set() and not self._stopping:
                    console.wait()
            elif reason is ExitReason.MMIO:
                is_write, address, data = exit_view.mmio
                with lock:
                    if is_write:
                        mmio.write(address, len(data), int.from_bytes(data, "little"))
                    else:
                        data[:] = mmio.read(address, len(data)).to_bytes(len(data), "little")
            elif reason is ExitReason.INTR:
                if not self._released.is_set():
                    self._parked.set()
                    self._released.wait()
            else:
                self._serve_rare(reason)

    def _string_io(self, *, is_write: bool, port: int, size: int, data: memoryview) -> None:
        """INS and OUTS: several items at one port."""
        ports = self._board.ports
        with self._board.lock:
            for at in range(0, len(data), size):
                item = data[at : at + size]
                if is_write:
                    ports.write(port, size, int.from_bytes(item, "little"))
                else:
                    item[:] = ports.read(port, size).to_bytes(size, "little")

    def _serve_rare(self, reason: ExitReason) -> None:
        """Exits that end the run, all of them."""
        vcpu = self.vcpu
        if reason is ExitReason.SHUTDOWN:
            end = End(EndKind.TRIPLE_FAULT, vcpu=vcpu.id)
        elif reason is ExitReason.SYSTEM_EVENT:
            end = self._system_event(vcpu.exit.system_event.kind)
        elif reason is ExitReason.INTERNAL_ERROR:
            error = vcpu.exit.internal
            data = " ".join(f"{word:#x}" for word in error.data)
            meaning = INTERNAL_ERRORS.get(error.suberror, "an unknown one")
            text = f"internal error {error.suberror} of the accelerator, {meaning} ({data or 'no data'})"
            end = End(EndKind.STUCK, vcpu=vcpu.id, text=text)
        elif reason is ExitReason.FAIL_ENTRY:
            end = End(EndKind.STUCK, vcpu=vcpu.id, text=f"guest state refused, reason {vcpu.exit.fail_entry.reason:#x}")
        else:
            end = End(EndKind.STUCK, vcpu=vcpu.id, text=f"unexpected exit {reason.name}")
        self._outcome.announce(end)
        self._stopping = True

    def _system_event(self, kind: int) -> End:
        kinds = {
            KVM_SYSTEM_EVENT_SHUTDOWN: EndKind.POWER_OFF,
            KVM_SYSTEM_EVENT_RESET: EndKind.RESET,
            KVM_SYSTEM_EVENT_CRASH: EndKind.PANIC,
        }
        if kind in kinds:
            return End(kinds[kind], vcpu=self.vcpu.id)
        return End(EndKind.STUCK, vcpu=self.vcpu.id, text=f"unknown system event {kind}")
