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
from ostler.host.threads import RunDelay, cpu_time_ns
from ostler.machine.board import Board
from ostler.sched.usage import Usage
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


class EndKind(Enum):
    """Why a run ended."""

    POWER_OFF = "power-off"
    RESET = "reset"
    DEBUG_EXIT = "debug exit"
    QUIT = "ended from outside"
    PANIC = "panic"
    TRIPLE_FAULT = "triple fault"
    HANG = "hang"
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
        self.intercept: Callable[[End], bool] = _nobody
        """Asked first, in the announcing thread: true where it is not the end yet, and somebody else's to decide."""

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Call back, in the announcing thread, at the end; before processors start."""
        self._on_end.append(callback)

    def announce(self, end: End) -> bool:
        """Take it if it is the first; false where somebody else decides what becomes of it."""
        if self.end is None and self.intercept(end):
            return False
        self.decide(end)
        return True

    def decide(self, end: End) -> None:
        """This is the end, unless there was one before."""
        with self._lock:
            if self.end is not None:
                return
            self.end = end
        for callback in self._on_end:
            callback()


def _nobody(end: End) -> bool:  # noqa: ARG001
    """Every end is one."""
    return False


class Processor:
    """A virtual processor and its thread."""

    def __init__(self, vcpu: VCPU, board: Board, console: Congestion, outcome: Outcome) -> None:
        self.vcpu = vcpu
        self._board = board
        self._console = console
        self._outcome = outcome
        self._stopping = False
        # Held: to stay out of the guest until `go_on`; `_parked` says that it does. Barred: out until it is its turn.
        self._rest = threading.Condition()
        self._held = self._barred = self._must_rest = False
        self._parked = threading.Event()
        self._started_ns = self._barred_ns = self._held_ns = 0
        self._resting_since_ns: int | None = None
        self._delay: RunDelay | None = None
        self.after_turn: Callable[[int], None] | None = None
        """Called in the processor's thread, out of the guest, with the nanoseconds it had to wait for its turn."""
        self._thread = threading.Thread(target=self._main, name=f"vcpu{vcpu.id}", daemon=True)

    def start(self) -> None:
        """Begin to run the guest."""
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Leave the guest as soon as possible; from any thread."""
        self._stopping = True
        self._change()
        self.vcpu.kick()

    def hold(self) -> None:
        """Keep out of the guest from the next chance on, until `go_on`; before `start`, from the first on."""
        self._parked.clear()
        self._change(held=True)
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
        self._change(held=False)

    def bar(self) -> None:
        """It is others' turn: stay out of the guest until `unbar`. Holding is another matter, and may come on top."""
        self._change(barred=True)
        self.vcpu.kick()

    def unbar(self) -> None:
        """Undo `bar`."""
        self._change(barred=False)

    def _change(self, *, held: bool | None = None, barred: bool | None = None) -> None:
        with self._rest:
            self._held = self._held if held is None else held
            self._barred = self._barred if barred is None else barred
            self._must_rest = self._held or self._barred
            self._rest.notify_all()

    @property
    def cpu_time_ns(self) -> int:
        """Host processor time the thread has used, in the guest and serving its exits; 0 where it has ended."""
        tid = self._thread.native_id
        return 0 if tid is None else cpu_time_ns(tid)

    @property
    def thread_id(self) -> int | None:
        """The kernel's number of the thread, once it runs."""
        return self._thread.native_id

    def usage(self) -> Usage:
        """Where the time since the start has gone; from any thread."""
        with self._rest:
            barred_ns, held_ns, since_ns = self._barred_ns, self._held_ns, self._resting_since_ns
            now_ns = time.monotonic_ns()
            if since_ns is not None and self._held:
                held_ns += now_ns - since_ns
            elif since_ns is not None:
                barred_ns += now_ns - since_ns
        run_ns, delay_ns = self.cpu_time_ns, self._delay.read_ns() if self._delay else None
        return Usage(
            wall_ns=now_ns - self._started_ns if self._started_ns else 0, run_ns=run_ns, delay_ns=delay_ns,
            barred_ns=barred_ns, held_ns=held_ns,
        )  # fmt: skip

    def join(self) -> None:
        """Wait for the thread. Raises AccelError for a processor that no kick gets out of the guest."""
        deadline = time.monotonic() + STOP_LIMIT_S
        while self._thread.is_alive():
            # Once more: an earlier kick may have been spent on an exit that was under way.
            self.vcpu.kick()
            self._thread.join(JOIN_SLICE_S)
            if time.monotonic() > deadline:
                raise AccelError(f"vCPU {self.vcpu.id}: still in the guest {STOP_LIMIT_S} s after it was told to stop")
        if self._delay is not None:
            self._delay.close()

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
            self._delay = RunDelay(threading.get_native_id())
            self._started_ns = time.monotonic_ns()
            self._run()
        except BaseException as error:
            self._outcome.announce(End(EndKind.BUG, vcpu=self.vcpu.id, error=error))

    def _delay_ns(self) -> int:
        """Runnable without running, so far; 0 where the kernel does not say."""
        return (self._delay.read_ns() if self._delay else None) or 0

    def _stay_out(self) -> None:
        """Wait for as long as the processor is held or barred."""
        waited_ns = 0
        with self._rest:
            while self._must_rest and not self._stopping:
                if held := self._held:
                    self._parked.set()
                delayed_ns = self._delay_ns()
                self._resting_since_ns = since_ns = time.monotonic_ns()
                self._rest.wait()
                self._resting_since_ns = None
                # Let in again, the thread waits for a host CPU: the kernel counts that, and it is counted once.
                spent_ns = max(0, time.monotonic_ns() - since_ns - (self._delay_ns() - delayed_ns))
                if held:
                    self._held_ns += spent_ns
                else:
                    self._barred_ns += spent_ns
                    waited_ns += spent_ns
        if waited_ns and self.after_turn is not None and not self._stopping:
            self.after_turn(waited_ns)

    def _run(self) -> None:
        run, exit_view, console = self.vcpu.run, self.vcpu.exit, self._console
        ports, mmio, lock = self._board.ports, self._board.mmio, self._board.lock
        if self._must_rest:
            # Held before it ever ran: not one instruction until it may.
            self._stay_out()
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
                while console.congested and not self._held and not self._stopping:
                    console.wait()
            elif reason is ExitReason.MMIO:
                is_write, address, data = exit_view.mmio
                with lock:
                    if is_write:
                        mmio.write(address, len(data), int.from_bytes(data, "little"))
                    else:
                        data[:] = mmio.read(address, len(data)).to_bytes(len(data), "little")
            elif reason is ExitReason.INTR:
                if self._must_rest:
                    self._stay_out()
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
        if self._outcome.announce(end):
            self._stopping = True
            return
        # It cannot go on, and others decide whether it is to begin anew: until then it is one that is held.
        self._change(held=True)
        self._stay_out()

    def _system_event(self, kind: int) -> End:
        kinds = {
            KVM_SYSTEM_EVENT_SHUTDOWN: EndKind.POWER_OFF,
            KVM_SYSTEM_EVENT_RESET: EndKind.RESET,
            KVM_SYSTEM_EVENT_CRASH: EndKind.PANIC,
        }
        if kind in kinds:
            return End(kinds[kind], vcpu=self.vcpu.id)
        return End(EndKind.STUCK, vcpu=self.vcpu.id, text=f"unknown system event {kind}")
