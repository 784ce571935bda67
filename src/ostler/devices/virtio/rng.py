"""The entropy device, virtio 1.2 section 5.4: fills what it is given with random bytes.

One request yields at most 64 KiB, which is more than any driver asks for: entropy costs the host time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ostler.abi.virtio.common import DeviceId
from ostler.devices.virtio.chain import QueueError
from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.virtio.queue import Virtqueue

QUEUE_SIZE = 64
MAX_REQUEST_BYTES = 64 << 10


class Entropy(VirtioDevice):
    """Random bytes for the guest."""

    device_type = DeviceId.RNG
    queue_sizes = (QUEUE_SIZE,)

    def __init__(self, source: Callable[[int], bytes]) -> None:
        """`source(count)` gives that many random bytes, as os.urandom does."""
        super().__init__()
        self._source = source
        self._queue: Virtqueue | None = None

    def activate(self, queues: Sequence[Virtqueue], features: int) -> None:  # noqa: ARG002 - it has none
        self._queue = queues[0]

    def kicked(self, index: int) -> None:
        queue = self._queue
        if queue is None:
            return
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            if not chain.writable_bytes:
                raise QueueError("entropy request without room for any")
            queue.push(chain, chain.write(self._source(min(chain.writable_bytes, MAX_REQUEST_BYTES))))
        else:
            self.kick_again(index)
        queue.flush()

    def reset(self) -> None:
        self._queue = None
