"""The virtio block device, virtio 1.2 section 5.2.

Requests are taken in the order of their queue; data moves between the disk and guest memory without a copy.
Transfers, which the host's page cache answers in microseconds, are done on the event loop; what waits for the disk
itself (a flush, a discard) is given to a worker, if there is one, and answered when it is done.
What the disk refuses is VIRTIO_BLK_S_IOERR, what the device does not know VIRTIO_BLK_S_UNSUPP; a chain without room for
header and status is no request at all and stops the device.

Without VIRTIO_BLK_F_FLUSH, or while the driver has switched the write cache off, every write is on stable
storage before it is answered.

Left out on purpose: geometry (nobody asks), secure erase, zones, lifetime information.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from ostler.abi.virtio import blk as abi
from ostler.abi.virtio.common import DeviceId
from ostler.devices.state import Saved, load, save, uint
from ostler.devices.virtio.blk_backend import AtOnce, Disk, Worker
from ostler.devices.virtio.chain import Chain, QueueError
from ostler.devices.virtio.device import VirtioDevice, read_field
from ostler.devices.virtio.queue import Virtqueue
from ostler.devices.virtio.rate_limit import Pace, RateLimit
from ostler.errors import HostError

QUEUE_SIZE = 512
# Header and status go into every chain; the rest may be data.
SEG_MAX = QUEUE_SIZE - 2
BLOCK_BYTES, PHYSICAL_EXPONENT, OPTIMAL_BLOCKS = 512, 3, 256
# A discard may cover the whole disk at once, in ranges of less than 2 GiB.
MAX_RANGE_SECTORS, MAX_RANGES = (1 << 22) - 1, 256
DISCARD_ALIGN_SECTORS = 8
OK, IOERR, UNSUPP = (bytes([status]) for status in (0, 1, 2))


# What tests of faults call requests.
KINDS = {abi.VIRTIO_BLK_T_IN: "read", abi.VIRTIO_BLK_T_OUT: "write", abi.VIRTIO_BLK_T_FLUSH: "flush"}


@dataclass(slots=True)
class BlkState:
    """What a driver can write."""

    writeback: int = uint(1, 1)


class Unsupported(Exception):
    """A request with parts this device does not know."""


class Block(VirtioDevice):
    """A disk with `queue_count` request queues."""

    device_type = DeviceId.BLOCK

    def __init__(
        self, disk: Disk, *, queue_count: int = 1, worker: Worker | None = None, limit: RateLimit | None = None
    ) -> None:
        """`limit` is of what is read and written together."""
        super().__init__()
        self._pace = Pace(limit, self)
        self._worker = worker or AtOnce()
        self.disk = disk
        self.queue_sizes = (QUEUE_SIZE,) * queue_count
        self.features = _features(read_only=disk.read_only)
        self.judge: Callable[[OSError], bool] = _is_reported
        """Asked of each request the disk could not do: true keeps it until `retry`, unanswered."""
        self.inject: Callable[[str], None] = _nothing
        """Told of each request (`read`, `write`, `flush`) before it is done; raises OSError to have it fail."""
        self._kept: list[tuple[Virtqueue, Chain]] = []
        self.io_errors = 0
        """Requests the disk refused."""
        self._reads = self._read_bytes = self._writes = self._written_bytes = 0
        self._state = BlkState()
        self._queues: Sequence[Virtqueue] = ()
        self._write_through = False
        self._negotiated = 0
        # What they return is still to be done, by the worker.
        self._operations: dict[int, Callable[[Chain, list[memoryview], int], Callable[[], None] | None]] = {
            abi.VIRTIO_BLK_T_IN: self._read,
            abi.VIRTIO_BLK_T_OUT: self._write,
            abi.VIRTIO_BLK_T_FLUSH: self._flush,
            abi.VIRTIO_BLK_T_GET_ID: self._get_id,
            abi.VIRTIO_BLK_T_DISCARD: self._discard,
            abi.VIRTIO_BLK_T_WRITE_ZEROES: self._write_zeroes,
        }

    # -- the transport's calls --------------------------------------------------------------------

    def activate(self, queues: Sequence[Virtqueue], features: int) -> None:
        self._queues = queues
        self._negotiated = features
        self._choose_cache()

    def kicked(self, index: int) -> None:
        queue = self._queues[index]
        # One kick is worth a full ring: a driver that never stops must not keep the event loop for itself.
        for _ in range(queue.size):
            if not self._pace.may_pass(index) or (chain := queue.pop()) is None:
                break
            self._pace.spend(chain.readable_bytes + chain.writable_bytes)
            self._serve(queue, chain)
        else:
            self.kick_again(index)
        queue.flush()

    def reset(self) -> None:
        # What was begun is finished and answered: afterwards nothing may touch the guest's memory or the disk.
        self._worker.wait()
        self._pace.reset()
        self._queues = ()
        self._kept = []
        self._negotiated = 0
        self._state = BlkState()

    def read_config(self, offset: int, size: int) -> int:
        return read_field(self._config(), offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        if (offset, size) == (abi.WRITEBACK_OFFSET, 1) and self._negotiated >> abi.VIRTIO_BLK_F_CONFIG_WCE & 1:
            self._state.writeback = value & 1
            self._choose_cache()

    def resized(self) -> None:
        """The disk has grown: the driver is told to look at the capacity again."""
        self.config_changed()

    def counters(self) -> dict[str, int]:
        """Requests the disk has served, their bytes, and those it refused."""
        return {
            "reads": self._reads,
            "read_bytes": self._read_bytes,
            "writes": self._writes,
            "written_bytes": self._written_bytes,
            "errors": self.io_errors,
        }

    @property
    def is_waiting(self) -> bool:
        """Whether requests are kept that could not be done."""
        return bool(self._kept)

    def retry(self) -> None:
        """Do the requests again that were kept; they may fail again."""
        kept, self._kept = self._kept, []
        for queue, chain in kept:
            if queue.enabled:
                self._serve(queue, chain)
                queue.flush()

    def drain(self) -> None:
        """Raises HostError while requests are kept: a guest that is saved now would never get an answer."""
        self._worker.wait()
        if self._kept:
            raise HostError("a disk has requests that could not be done yet: see the guest's events")

    def save(self) -> Saved:
        return save(self._state)

    def restore(self, data: Mapping[str, object]) -> None:
        self._state = load(BlkState, "block device", data)

    def _choose_cache(self) -> None:
        has_flush = self._negotiated >> abi.VIRTIO_BLK_F_FLUSH & 1
        self._write_through = not (has_flush and self._state.writeback)

    def _config(self) -> bytes:
        return abi.CONFIG.pack(
            self.disk.size_bytes // abi.SECTOR_BYTES, 0, SEG_MAX, 0, 0, 0, BLOCK_BYTES,
            PHYSICAL_EXPONENT, 0, 1 << PHYSICAL_EXPONENT, OPTIMAL_BLOCKS, self._state.writeback,
            len(self.queue_sizes), MAX_RANGE_SECTORS, MAX_RANGES, DISCARD_ALIGN_SECTORS,
            MAX_RANGE_SECTORS, MAX_RANGES, 1,
        )  # fmt: skip

    # -- requests ---------------------------------------------------------------------------------

    def _serve(self, queue: Virtqueue, chain: Chain) -> None:
        """Answer one request, now or later. Raises QueueError."""
        if chain.readable_bytes < abi.REQUEST.size or not chain.writable_bytes:
            raise QueueError(f"block request of {chain.readable_bytes} readable, {chain.writable_bytes} writable bytes")
        kind, _priority, sector = abi.REQUEST.unpack(_head(chain))
        data, status = _split_status(chain)
        operation = self._operations.get(kind)
        try:
            if operation is None:
                raise Unsupported
            self.inject(KINDS.get(kind, "flush"))
            rest = operation(chain, data, sector)
        except Unsupported:
            status[:] = UNSUPP
        except OSError as error:
            if self.judge(error):
                self._kept.append((queue, chain))
                return
            self.io_errors += 1
            status[:] = IOERR
        else:
            if rest is not None:
                self._worker.submit(rest, partial(self._finish, queue, chain))
                return
            status[:] = OK
        # The status is the last byte, so all of it counts as written.
        queue.push(chain, chain.writable_bytes)

    def _finish(self, queue: Virtqueue, chain: Chain, error: OSError | None) -> None:
        """The worker is done with a request."""
        if error is not None and queue.enabled and self.judge(error):
            self._kept.append((queue, chain))
            return
        self.io_errors += error is not None
        if queue.enabled:
            _split_status(chain)[1][:] = OK if error is None else IOERR
            queue.push(chain, chain.writable_bytes)
            queue.flush()

    def _read(self, chain: Chain, data: list[memoryview], sector: int) -> None:
        size = chain.writable_bytes - 1
        self.disk.readv(self._checked(sector, size), data)
        self._reads += 1
        self._read_bytes += size

    def _write(self, chain: Chain, data: list[memoryview], sector: int) -> Callable[[], None] | None:  # noqa: ARG002
        size = chain.readable_bytes - abi.REQUEST.size
        offset = self._checked(sector, size)
        if self.disk.read_only:
            raise OSError("write to a read-only disk")
        self.disk.writev(offset, _payload(chain))
        self._writes += 1
        self._written_bytes += size
        return self.disk.flush if self._write_through else None

    def _flush(self, chain: Chain, data: list[memoryview], sector: int) -> Callable[[], None]:  # noqa: ARG002
        return self.disk.flush

    def _get_id(self, chain: Chain, data: list[memoryview], sector: int) -> None:  # noqa: ARG002
        """The serial, padded with zeroes to 20 bytes; none behind it if it fills them."""
        serial = self.disk.serial.encode("ascii", "replace")[: abi.VIRTIO_BLK_ID_BYTES]
        if chain.writable_bytes - 1 < abi.VIRTIO_BLK_ID_BYTES:
            raise Unsupported
        left = memoryview(serial.ljust(abi.VIRTIO_BLK_ID_BYTES, b"\0"))
        for view in data:
            part = left[: len(view)]
            view[: len(part)] = part
            left = left[len(part) :]

    def _discard(self, chain: Chain, data: list[memoryview], sector: int) -> Callable[[], None]:  # noqa: ARG002
        ranges = self._ranges(chain, known_flags=0)

        def discard() -> None:
            for offset, size, _unmap in ranges:
                self.disk.discard(offset, size)

        return discard

    def _write_zeroes(self, chain: Chain, data: list[memoryview], sector: int) -> Callable[[], None]:  # noqa: ARG002
        ranges = self._ranges(chain, known_flags=abi.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
        durable = self._write_through

        def write_zeroes() -> None:
            for offset, size, unmap in ranges:
                self.disk.write_zeroes(offset, size, unmap=unmap)
            if durable:
                self.disk.flush()

        return write_zeroes

    def _ranges(self, chain: Chain, *, known_flags: int) -> list[tuple[int, int, bool]]:
        """Offset, size and unmap flag of each range; all are checked before any is touched."""
        size = chain.readable_bytes - abi.REQUEST.size
        if not size or size % abi.RANGE.size or size > MAX_RANGES * abi.RANGE.size:
            raise Unsupported
        ranges = list(abi.RANGE.iter_unpack(chain.read()[abi.REQUEST.size :]))
        if any(flags & ~known_flags for _, _, flags in ranges):
            raise Unsupported
        if self.disk.read_only or any(count > MAX_RANGE_SECTORS for _, count, _ in ranges):
            raise OSError("not a range of a disk that can be written")
        return [
            (self._checked(sector, count * abi.SECTOR_BYTES), count * abi.SECTOR_BYTES, bool(flags))
            for sector, count, flags in ranges
        ]

    def _checked(self, sector: int, size_bytes: int) -> int:
        """The offset in bytes. Raises OSError for what is not whole sectors inside the disk."""
        offset = sector * abi.SECTOR_BYTES
        if size_bytes % abi.SECTOR_BYTES or offset + size_bytes > self.disk.size_bytes:
            raise OSError(f"{size_bytes} bytes at sector {sector}: not inside the disk")
        return offset


def _is_reported(error: OSError) -> bool:  # noqa: ARG001
    """The guest gets to know of every error."""
    return False


def _nothing(kind: str) -> None:
    """Nothing fails on purpose."""


def _features(*, read_only: bool) -> int:
    bits = {
        abi.VIRTIO_BLK_F_SEG_MAX,
        abi.VIRTIO_BLK_F_BLK_SIZE,
        abi.VIRTIO_BLK_F_FLUSH,
        abi.VIRTIO_BLK_F_TOPOLOGY,
        abi.VIRTIO_BLK_F_CONFIG_WCE,
        abi.VIRTIO_BLK_F_MQ,
    }
    bits |= {abi.VIRTIO_BLK_F_RO} if read_only else {abi.VIRTIO_BLK_F_DISCARD, abi.VIRTIO_BLK_F_WRITE_ZEROES}
    return sum(1 << bit for bit in bits)


def _head(chain: Chain) -> bytes | memoryview:
    """The request header, which drivers put into a part of its own and need not."""
    first = chain.readable[0]
    return first if len(first) == abi.REQUEST.size else chain.read(abi.REQUEST.size)


def _payload(chain: Chain) -> list[memoryview]:
    """The readable parts behind the header."""
    skip, parts = abi.REQUEST.size, chain.readable
    while parts and skip >= len(parts[0]):
        skip -= len(parts[0])
        parts = parts[1:]
    return [parts[0][skip:], *parts[1:]] if skip else parts


def _split_status(chain: Chain) -> tuple[list[memoryview], memoryview]:
    """The writable parts without their last byte, and that byte."""
    *data, last = chain.writable
    if len(last) > 1:
        data.append(last[:-1])
    return data, last[-1:]
