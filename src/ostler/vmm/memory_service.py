"""The control protocol's operations on a guest's memory: `memory-roots`, `-translate`, `-pages`, `-read`, `-write`,
`-map`, `-watch`, and those of merging (`ostler.vmm.merging`).

What takes long has a thread of its own and answers when it is done, one at a time.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any, Self

from ostler.control.wire import Message, pack_error
from ostler.devices.virtio.balloon import Balloon
from ostler.errors import BadRequest, HostError, OstlerError
from ostler.host import footprint
from ostler.memory.layout import PAGE_SIZE
from ostler.vmm.mapper import PageMapper, Space
from ostler.vmm.merging import Merging
from ostler.vmm.run import GuestProcess
from ostler.vmm.server import Connection
from ostler.vmm.service import GuestService
from ostler.vmm.watching import Watch

MAX_WATCHED, MAX_INTERVAL_S = 64, 60.0
MAX_ADDRESS = (1 << 64) - 1


class MemoryService:
    """Adds its operations to the guest's service; a context manager."""

    def __init__(self, process: GuestProcess, service: GuestService, *, may_merge: bool = True) -> None:
        self._process, self._service = process, service
        self._mapper = PageMapper(process)
        self._merging = Merging(process, is_allowed=may_merge)
        self._worker: threading.Thread | None = None
        self._stopping = threading.Event()
        service.add_operations({
            "memory-roots": lambda *_: {"processors": self._mapper.roots()},
            "memory-translate": self._translate,
            "memory-pages": self._pages,
            "memory-read": self._read,
            "memory-write": self._write,
            "memory-map": self._map,
            "memory-watch": self._watch,
            "memory-digests": self._digests,
            "memory-donate": self._donate,
            "memory-merge": self._merge,
            "memory-mergeable": self._mergeable,
        })  # fmt: skip

    def _translate(self, _connection: Connection, _number: object, arguments: Message) -> Message:
        return self._mapper.translate(number_of(arguments, "address"), _space(arguments))

    def _pages(self, _connection: Connection, _number: object, arguments: Message) -> Message:
        address, count = number_of(arguments, "address"), number_of(arguments, "count")
        return {"physical": self._mapper.pages(address, count, _space(arguments))}

    def _read(self, _connection: Connection, _number: object, arguments: Message) -> Message:
        address, size = number_of(arguments, "address"), number_of(arguments, "size")
        return {"data": base64.b64encode(self._mapper.read(address, size, _space(arguments))).decode()}

    def _write(self, _connection: Connection, _number: object, arguments: Message) -> Message:
        try:
            data = base64.b64decode(str(arguments.get("data")), validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRequest(f"data: expected bytes in base64: {error}") from None
        self._mapper.write(number_of(arguments, "address"), data, _space(arguments))
        return {}

    def _map(self, _connection: Connection, _number: object, _arguments: Message) -> Message:
        """What the guest's memory is on this host: proc_pid_smaps(5) of its mapping, and the devices' share."""
        machine = self._process.machine
        mapping = machine.memory.mapping
        found = footprint.footprint(mapping.address, mapping.size_bytes)
        balloon = machine.devices.get("balloon")
        ballooned = balloon.actual_bytes if isinstance(balloon, Balloon) else 0
        discarded = balloon.discarded_bytes if isinstance(balloon, Balloon) else 0
        return {
            "size_bytes": machine.spec.memory_bytes,
            "touched_bytes": machine.memory.touched_bytes,
            "ballooned_bytes": ballooned,
            "given_back_bytes": discarded,
            "merged_bytes": machine.memory.merged_bytes,
            **found.as_dict(),
        }

    def _watch(self, connection: Connection, number: object, arguments: Message) -> None:
        interval_s = arguments.get("interval_s", 1.0)
        if isinstance(interval_s, bool) or not isinstance(interval_s, int | float):
            raise BadRequest(f"interval_s {interval_s!r}: expected seconds")
        if not 0 < interval_s <= MAX_INTERVAL_S:
            raise BadRequest(f"interval_s {interval_s!r}: expected more than 0 and at most {MAX_INTERVAL_S:g}")
        ranges = _ranges(arguments, self._process.machine.memory.contains)
        self._check_idle()
        watch = Watch(self._process.machine, ranges)
        watch.start()
        self._in_thread(connection, number, lambda: watch.finish(self._stopping, interval_s))

    def _digests(self, connection: Connection, number: object, arguments: Message) -> None:
        self._check_idle()
        work = self._merging.digests(text_of(arguments, "file"))
        self._in_thread(connection, number, lambda: work(self._stopping))

    def _donate(self, connection: Connection, number: object, arguments: Message) -> None:
        self._check_idle()
        work = self._merging.donate(text_of(arguments, "file"), text_of(arguments, "runs"))
        self._in_thread(connection, number, lambda: work(self._stopping))

    def _merge(self, connection: Connection, number: object, arguments: Message) -> None:
        self._check_idle()
        step = self._merging.merge(text_of(arguments, "file"), text_of(arguments, "runs"))

        def go_on() -> None:
            """A slice with the guest held, then the loop serves others, and the guest runs."""
            try:
                if (done := step()) is None:
                    self._process.loop.call_soon(go_on)
                    return
            except OstlerError as error:
                connection.send({"id": number, "error": pack_error(error)})
                return
            self._service.announce("memory-merged", **done)
            connection.reply(number, done)

        go_on()

    def _mergeable(self, _connection: Connection, _number: object, _arguments: Message) -> Message:
        """Let the host's kernel merge equal pages (KSM), where this memory is of the kind it merges."""
        return {"mergeable": self._merging.advise()}

    def _check_idle(self) -> None:
        if self._worker is not None and self._worker.is_alive():
            raise BadRequest("memory: is being watched or compared already; try again when that is done")

    def _in_thread(self, connection: Connection, number: object, work: Callable[[], Message]) -> None:
        def run() -> None:
            try:
                reply: Message = {"ok": work()}
            except OstlerError as error:
                reply = {"error": pack_error(error)}
            except OSError as error:
                reply = {"error": pack_error(HostError(f"memory: {error.strerror or error}"))}
            self._service.on_loop(lambda: answer(reply))

        def answer(reply: Message) -> None:
            if connection.is_open:
                connection.send({"id": number, **reply})

        self._worker = threading.Thread(target=run, name="memory", daemon=True)
        self._worker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stopping.set()
        if self._worker is not None:
            self._worker.join()


def number_of(arguments: Mapping[str, Any], name: str) -> int:
    """An address or a size: a number, or text such as 0x1000. Raises BadRequest."""
    value = arguments.get(name)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = int(value, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_ADDRESS:
        raise BadRequest(f"{name} {value!r}: expected a number from 0 to {MAX_ADDRESS:#x}")
    return value


def text_of(arguments: Mapping[str, Any], name: str) -> str:
    """Raises BadRequest."""
    value = arguments.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise BadRequest(f"{name} {value!r}: expected text")
    return value


def _space(arguments: Mapping[str, Any]) -> Space:
    space = arguments.get("space", "linear")
    if space not in ("linear", "physical"):
        raise BadRequest(f"space {space!r}: expected linear or physical")
    cr3 = number_of(arguments, "cr3") if arguments.get("cr3") is not None else None
    vcpu = number_of(arguments, "vcpu") if "vcpu" in arguments else 0
    return Space(vcpu, cr3, is_physical=space == "physical")


def _ranges(arguments: Mapping[str, Any], contains: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """Guest-physical ranges of whole pages that do not overlap. Raises BadRequest."""
    given = arguments.get("ranges", [])
    if not isinstance(given, list) or len(given) > MAX_WATCHED:
        raise BadRequest(f"ranges: expected a list of at most {MAX_WATCHED}")
    found: list[tuple[int, int]] = []
    for each in given:
        if not isinstance(each, list) or len(each) != 2:
            raise BadRequest(f"range {each!r}: expected [address, size_bytes]")
        gpa, size = (number_of({"range": value}, "range") for value in each)
        if gpa % PAGE_SIZE or size % PAGE_SIZE or not size or not contains(gpa, size):
            raise BadRequest(f"range {gpa:#x}+{size:#x}: expected whole pages of the guest's memory")
        found.append((gpa, size))
    ordered = sorted(found)
    for (gpa, size), (after, _) in itertools.pairwise(ordered):
        if gpa + size > after:
            raise BadRequest(f"range {after:#x}: overlaps the one at {gpa:#x}")
    return found
