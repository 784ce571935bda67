"""Token bucket: how many bytes a device may move in a time. State and time are plain data, so tests move the clock.

The bucket may go into debt by one item, which makes any item pass whatever its size; the next one waits longer.
"""

from __future__ import annotations

from collections.abc import Callable

from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.wiring import NS_PER_SECOND, Clock, Timer

DEFAULT_BURST_S = 0.1
MIN_BURST_BYTES = 128 << 10


class RateLimit:
    """One direction of one device. Calls must be serialised by the owner; the timer calls `expired`."""

    def __init__(self, bytes_per_s: int, *, clock: Clock, timer: Timer, burst_bytes: int | None = None) -> None:
        """`burst_bytes` pass at once after a pause; a tenth of a second's worth if not given."""
        self._rate = bytes_per_s
        self._burst = burst_bytes or max(int(bytes_per_s * DEFAULT_BURST_S), MIN_BURST_BYTES)
        self._tokens = float(self._burst)
        self._clock, self._timer = clock, timer
        self._filled_ns = clock.monotonic_ns()
        self._resume: Callable[[], None] | None = None

    def ready(self, resume: Callable[[], None]) -> bool:
        """Whether more may pass now; if not, `resume` is called when it may."""
        now_ns = self._clock.monotonic_ns()
        passed_s = (now_ns - self._filled_ns) / NS_PER_SECOND
        self._filled_ns = now_ns
        self._tokens = min(self._tokens + passed_s * self._rate, self._burst)
        if self._tokens > 0:
            return True
        self._resume = resume
        self._timer.arm(now_ns + int((1 - self._tokens) / self._rate * NS_PER_SECOND) + 1)
        return False

    def spend(self, size_bytes: int) -> None:
        """These bytes pass."""
        self._tokens -= size_bytes

    def expired(self) -> None:
        """The timer's expiry."""
        resume, self._resume = self._resume, None
        if resume:
            resume()

    def reset(self) -> None:
        """Nobody waits any more."""
        self._resume = None
        self._timer.disarm()


class Pace:
    """One limit, if any, over all queues of a device: those that had to wait are kicked when more may pass."""

    def __init__(self, limit: RateLimit | None, device: VirtioDevice) -> None:
        self._limit, self._device = limit, device
        self._waiting: set[int] = set()

    def may_pass(self, queue: int) -> bool:
        """Whether the queue may go on; if not, it is kicked when it may."""
        if self._limit is None or self._limit.ready(self._resume):
            return True
        self._waiting.add(queue)
        return False

    def spend(self, size_bytes: int) -> None:
        """These bytes pass."""
        if self._limit is not None:
            self._limit.spend(size_bytes)

    def reset(self) -> None:
        """Nobody waits any more."""
        self._waiting.clear()
        if self._limit is not None:
            self._limit.reset()

    def _resume(self) -> None:
        waiting, self._waiting = sorted(self._waiting), set()
        for queue in waiting:
            self._device.kick_again(queue)
