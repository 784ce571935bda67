"""The guest's console on two file descriptors of the host.

Output: processors append bytes to a buffer under the board's lock; the loop writes them out a few
milliseconds later, whole lines at a time. When nobody reads the other end, the buffer fills to a
limit and then processors wait outside of the lock: a slow terminal slows the guest down and loses
nothing.

Input: bytes are read while the UART takes them and not before, so that a file on standard input
waits for a guest that is not ready. The end of input is not the end of the guest.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Protocol

from ostler.devices.legacy.serial import Serial
from ostler.vmm.loop import NS_PER_MS, EventLoop

FLUSH_DELAY_NS = 4 * NS_PER_MS
RETRY_DELAY_NS = 20 * NS_PER_MS
# poll(2) promises room for this much in a pipe, so a write of it does not block.
CHUNK_BYTES = select.PIPE_BUF
CONGESTED_BYTES = 256 << 10
WAIT_SLICE_S = 0.1
READ_BYTES = 1024
# Enough for the report a kernel prints when it panics.
TAIL_BYTES = 8 << 10


class Congestion(Protocol):
    """Output as a processor sees it: something it may have to wait for. `congested` is looked at after every exit."""

    congested: bool

    def wait(self) -> None:
        """Block a while, as long as output is congested; not under the board's lock."""


class Console(Protocol):
    """What the guest's serial port is connected to. `put` and `on_room` run under the board's lock."""

    tail: bytearray
    """The end of what the guest has said."""

    @property
    def output(self) -> Congestion:
        """What processors look at after every port access."""

    @property
    def first_byte_ns(self) -> int | None:
        """When the guest said something first."""

    def put(self, byte: int) -> None:
        """One byte of output."""

    def on_room(self) -> None:
        """The UART takes bytes again; called in processor threads."""

    def connect(self, serial: Serial, on_quit: Callable[[], None]) -> None:
        """Start reading for this UART; `on_quit` ends the guest."""

    def release(self) -> None:
        """Let waiting processors go on: the guest has ended."""

    def finish(self) -> None:
        """Bring all output to where it goes."""


ConsoleFactory = Callable[[EventLoop, threading.Lock], Console]


class InputFilter(Protocol):
    """Takes the host's own keys out of what is typed."""

    quit: bool

    def feed(self, typed: bytes) -> bytes:
        """What of `typed` is the guest's."""


def on_descriptors(
    console_in: int | None, console_out: int, keys: InputFilter | None = None
) -> Callable[[EventLoop, threading.Lock], Console]:
    """The console on two file descriptors of this process; None where there is no input."""
    return lambda loop, lock: DescriptorConsole(console_in, console_out, keys, loop, lock)


class DescriptorConsole:
    """Output to one descriptor, input from another."""

    def __init__(
        self, console_in: int | None, console_out: int, keys: InputFilter | None, loop: EventLoop, lock: threading.Lock
    ) -> None:
        written = ConsoleOutput(console_out, loop, lock)
        self.output = written.gathered
        self._input = None if console_in is None else ConsoleInput(console_in, loop, lock, keys)
        self.put, self.release, self.finish = self.output.put, self.output.release, written.finish
        self.tail = self.output.tail

    @property
    def first_byte_ns(self) -> int | None:
        return self.output.first_byte_ns

    def on_room(self) -> None:
        if self._input:
            self._input.on_room()

    def connect(self, serial: Serial, on_quit: Callable[[], None]) -> None:
        if self._input:
            self._input.connect(serial, on_quit)


class Gathered:
    """Output on its way from processors to the loop: bytes that wait a few milliseconds for more, and their limit."""

    def __init__(self, loop: EventLoop, lock: threading.Lock, flush: Callable[[], None]) -> None:
        self._lock = lock
        self._timer = loop.new_timer()
        self._timer.call(flush)
        self._drained = threading.Event()
        self.waiting = bytearray()
        self.tail = bytearray()
        self.first_byte_ns: int | None = None
        self.congested = False

    def put(self, byte: int) -> None:
        """One byte of output; under the board's lock."""
        self.waiting.append(byte)
        if self._timer.deadline_ns is None:
            self.again(FLUSH_DELAY_NS)
        if len(self.waiting) >= CONGESTED_BYTES:
            self._drained.clear()
            self.congested = True

    def wait(self) -> None:
        """Block a processor a while, as long as too much waits; not under the lock."""
        self._drained.wait(WAIT_SLICE_S)

    def release(self) -> None:
        """Let waiting processors go on."""
        self.congested = False
        self._drained.set()

    def again(self, delay_ns: int) -> None:
        """Have `flush` called."""
        self._timer.arm(time.monotonic_ns() + delay_ns)

    def taken(self, size_bytes: int) -> bytes:
        """Take what went out off the front of what waits, and remember the end of it. Loop thread only."""
        with self._lock:
            data = bytes(self.waiting[:size_bytes])
            del self.waiting[:size_bytes]
        if data and self.first_byte_ns is None:
            self.first_byte_ns = time.monotonic_ns()
        self.tail += data
        del self.tail[:-TAIL_BYTES]
        return data


class ConsoleOutput:
    """From the guest to a file descriptor. Loop thread only."""

    def __init__(self, fd: int, loop: EventLoop, lock: threading.Lock) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self.gathered = Gathered(loop, lock, self.flush)

    def flush(self) -> None:
        """Write what the other end takes now; come back for the rest.

        Raises BrokenPipeError when the other end has gone.
        """
        while self.gathered.waiting:
            if not self._poll.poll(0):
                self.gathered.again(RETRY_DELAY_NS)
                return
            self._write()
        if self.gathered.congested:
            self.gathered.release()

    def finish(self) -> None:
        """Write everything, however long the other end takes."""
        while self.gathered.waiting:
            self._write()

    def _write(self) -> None:
        self.gathered.taken(os.write(self._fd, self.gathered.waiting[:CHUNK_BYTES]))


class ConsoleInput:
    """From a file descriptor to the guest. Loop thread only, but for `on_room`."""

    def __init__(self, fd: int, loop: EventLoop, lock: threading.Lock, keys: InputFilter | None) -> None:
        self._fd = fd
        self._loop = loop
        self._lock = lock
        self._keys = keys
        self._pending = b""
        self._ended = False
        self._called = False
        self._serial: Serial | None = None
        self._on_quit: Callable[[], None] = _nothing

    def connect(self, serial: Serial, on_quit: Callable[[], None]) -> None:
        """Start reading for this UART; `on_quit` is told when the filter says so."""
        self._serial, self._on_quit = serial, on_quit
        self._watch()

    def on_room(self) -> None:
        """The UART takes bytes again; called in processor threads."""
        if self._pending and not self._called:
            self._called = True
            self._loop.call_soon(self._deliver)

    def _readable(self) -> None:
        try:
            typed = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            # A terminal that hung up (EIO) has ended like any other input.
            typed = b""
        if not typed:
            self._ended = True
            self._loop.remove_reader(self._fd)
            return
        self._pending += self._keys.feed(typed) if self._keys else typed
        if self._keys and self._keys.quit:
            self._loop.remove_reader(self._fd)
            self._on_quit()
            return
        self._deliver()

    def _deliver(self) -> None:
        if self._serial is None:
            return
        with self._lock:
            self._called = False
            taken = self._serial.receive(self._pending)
            self._pending = self._pending[taken:]
        self._watch()

    def _watch(self) -> None:
        """Read on as long as nothing waits; with a filter always, for its keys must work."""
        if self._pending and (self._keys is None or len(self._pending) > READ_BYTES):
            self._loop.remove_reader(self._fd)
        elif not self._ended:
            self._loop.add_reader(self._fd, self._readable)


def _nothing() -> None:
    """Nobody is connected yet."""
