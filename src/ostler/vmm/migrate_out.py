"""A guest's process moves its guest away: the control operations `migrate`, `migrate-cancel` and `migrate-limit`.

The migration runs in a thread; what concerns devices and processors it has done on the loop's thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ostler.abi.virtio.ring import used_bytes
from ostler.backends.disk import RawDisk
from ostler.backends.tap import Tap
from ostler.config import GuestSpec
from ostler.control import runtime
from ostler.control.wire import Message, pack_error
from ostler.devices.virtio.blk import Block
from ostler.errors import BadRequest, HostError, MigrationError, OstlerError
from ostler.migration import wire, witness
from ostler.migration.address import parse_address, tls_files
from ostler.migration.dirty import DirtyTracker
from ostler.migration.disks import Mirror
from ostler.migration.link import LinkLost
from ostler.migration.outgoing import Outgoing
from ostler.migration.pages import COMPRESSIONS
from ostler.migration.terms import Options, Progress
from ostler.snapshot.schema import encode
from ostler.vmm.run import GuestProcess
from ostler.vmm.server import Connection

T = TypeVar("T")
POST_COPY = ("never", "auto", "now")
MAX_DOWNTIME_MS, MAX_RATE = 60_000, 1 << 40
# Python's threads give way this often while the guest's processors and the migration share it.
SWITCH_INTERVAL_S = 0.001


class MovingGuest:
    """Implements `migration.terms.Guest`."""

    def __init__(self, process: GuestProcess, name: str, facts: Message) -> None:
        self._process, self._name, self._facts = process, name, facts
        self.memory = process.machine.memory
        self.tracker = DirtyTracker(self.memory, process.machine.vm)
        self._is_held = False
        self._ended = threading.Event()
        self._blocks = self._check_disks(process.machine.spec)
        self.mirrors: Sequence[tuple[int, Mirror]] = [
            (number, Mirror(block.disk)) for number, block, overlay in self._blocks if overlay
        ]

    def _check_disks(self, spec: GuestSpec) -> list[tuple[int, Block, bool]]:
        """Number, device, and whether it goes along. Raises BadRequest for what cannot move."""
        if spec.shares:
            raise BadRequest("migrate: a guest with shared folders of this host cannot leave it")
        found = []
        for number, disk in enumerate(spec.disks):
            block = self._process.machine.devices[f"disk{number}"]
            if not isinstance(block, Block):
                raise BadRequest(f"migrate: disk {disk.path} is served by another program, which cannot move; "
                                 "expected a raw disk")  # fmt: skip
            found.append((number, block, disk.overlay))
        return found

    def offer(self) -> dict[str, Any]:
        machine = self._process.machine
        model = ",".join([machine.model.name, *(f"-{feature}" for feature in machine.masked_features)])
        # The guest knows its disks by their serials, which come from their paths where nobody chose one.
        serials = {number: block.disk.serial for number, block, _ in self._blocks}
        disks = tuple(
            disk.model_copy(update={"serial": serials[number]}) for number, disk in enumerate(machine.spec.disks)
        )
        spec = machine.spec.model_copy(update={"cpu": model, "nets": self._cards(machine.spec), "disks": disks})
        return {
            "name": self._name,
            "spec": json.loads(spec.model_dump_json()),
            "facts": self._facts,
            "disks": [
                {"number": number, "size_bytes": block.disk.size_bytes, "goes_along": overlay}
                for number, block, overlay in self._blocks
            ],
        }

    def _cards(self, spec: GuestSpec) -> tuple[Any, ...]:
        """Cards keep their addresses under whatever name the guest has there. One that came to nothing stays out."""
        cards = {each.name: each for each in self._process.networks}
        return tuple(
            net.model_copy(update={"mac": cards[f"net{number}"].device.mac.hex(":")})
            for number, net in enumerate(spec.nets)
            if f"net{number}" in cards
        )

    def begin(self) -> None:
        with self._process.lock:
            for number, mirror in self.mirrors:
                self._block(number).disk = mirror
        self.tracker.start()

    def stop(self) -> bool:
        was_paused = self._process.is_paused
        self._process.pause()
        self._is_held = not was_paused
        return was_paused

    def save(self) -> bytes:
        state = encode(self._process.save_state(), self._process.machine.spec)
        # Devices write into their rings without a word until they interrupt.
        for transport in self._process.machine.transports:
            for queue in transport.core.running:
                if queue.enabled:
                    layout = queue.layout
                    self.tracker.mark(layout.device, used_bytes(layout.size))
        return state

    def go_on(self) -> None:
        self.tracker.stop()
        with self._process.lock:
            for number, mirror in self.mirrors:
                self._block(number).disk = mirror.disk
        if self._is_held:
            self._process.resume()

    def give_away(self) -> None:
        for _, block, overlay in self._blocks:
            if not overlay and isinstance(block.disk, RawDisk) and not block.disk.read_only:
                block.disk.unlock()

    def take_back(self) -> None:
        for _, block, overlay in self._blocks:
            if not overlay and isinstance(block.disk, RawDisk) and not block.disk.read_only:
                block.disk.lock(self._name)

    def strays(self) -> list[tuple[int, bytes]]:
        found = []
        for number, card in enumerate(self._process.networks):
            backend = card.device.backend
            if isinstance(backend, Tap):
                found += [(number, frame) for frame in backend.drain()]
        return found

    def on_loop(self, call: Callable[[], T]) -> T:
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(call())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        self._process.loop.call_soon(run)
        while not done.wait(0.1):
            if self._ended.is_set():
                raise MigrationError("migration: the guest has ended")
        if errors:
            raise errors[0]
        return results[0]

    def ended(self) -> None:
        """The loop runs no more."""
        self._ended.set()

    def _block(self, number: int) -> Block:
        return next(block for each, block, _ in self._blocks if each == number)


class Migration:
    """The one migration that a guest's process may have at a time. Loop thread, but where said otherwise."""

    def __init__(
        self, process: GuestProcess, entry: runtime.Entry, announce: Callable[..., None], moved: Callable[[], None]
    ) -> None:
        self._process, self._entry, self._announce, self._has_moved = process, entry, announce, moved
        self._outgoing: Outgoing | None = None
        self._guest: MovingGuest | None = None
        self._thread: threading.Thread | None = None
        self._asked: tuple[Connection, object] | None = None
        self._doubtful: MovingGuest | None = None
        self.moved_to: str | None = None

    def start(self, connection: Connection, number: object, arguments: Message) -> None:
        """Begin; the request is answered when the guest has moved, or has not. Raises BadRequest."""
        if self._outgoing is not None:
            raise BadRequest(f"guest {self._entry.name!r}: is being moved already")
        options = _options(arguments)
        name = runtime.check_name(str(arguments.get("name") or self._entry.name))
        self._guest = MovingGuest(self._process, name, self._entry.facts)
        self._outgoing = Outgoing(self._guest, options, self._told)
        self._asked = (connection, number)
        self._thread = threading.Thread(
            target=self._move, args=(self._outgoing, str(options.address)), name="migrate", daemon=True
        )
        self._thread.start()

    def cancel(self) -> Message:
        """Call it off. Raises BadRequest where there is none, MigrationError where it is too late."""
        if self._outgoing is None:
            raise BadRequest(f"guest {self._entry.name!r}: is not being moved")
        self._outgoing.cancel("called off")
        return {}

    def limit(self, arguments: Message) -> Message:
        """Another limit of bandwidth for the migration under way."""
        if self._outgoing is None:
            raise BadRequest(f"guest {self._entry.name!r}: is not being moved")
        self._outgoing.budget.bytes_per_s = _number(arguments, "bytes_per_s", 0, MAX_RATE) or None
        return {}

    def post_copy(self) -> Message:
        """Go over to post-copy. Raises BadRequest."""
        if self._outgoing is None:
            raise BadRequest(f"guest {self._entry.name!r}: is not being moved")
        self._outgoing.switch()
        return {}

    def status(self) -> Message | None:
        """How far it is; None where there is none."""
        return None if self._outgoing is None else _described(self._outgoing.progress)

    def _told(self, progress: Progress) -> None:
        """In the migration's thread."""
        described = _described(progress)
        self._process.loop.call_soon(lambda: self._announce("migration", **described))

    def _move(self, outgoing: Outgoing, address: str) -> None:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        try:
            outgoing.run()
        except OstlerError as error:
            # By a name that clients know.
            known = MigrationError(str(error)) if isinstance(error, LinkLost) else error
            self._process.loop.call_soon(lambda: self._failed(known))
        except Exception as error:
            import traceback

            traceback.print_exc()
            text = f"internal error: {type(error).__name__}: {error} (a bug of Ostler's)"
            self._process.loop.call_soon(lambda: self._failed(HostError(text)))
        else:
            self._process.loop.call_soon(lambda: self._moved(outgoing, address))
        finally:
            sys.setswitchinterval(interval)

    def _failed(self, error: OstlerError) -> None:
        self._announce("migration-failed", **pack_error(error))
        if self._asked is not None:
            connection, number = self._asked
            connection.send({"id": number, "error": pack_error(error)})
        if self._outgoing is not None and self._outgoing.is_in_doubt:
            self._doubtful = self._guest
        self._outgoing = self._guest = self._asked = None

    def take_back(self) -> None:
        """The user says that the guest does not run there: it is ours again, and about to be resumed. Loop thread."""
        guest, self._doubtful = self._doubtful, None
        if guest is not None:
            guest.take_back()
            guest.go_on()

    def _moved(self, outgoing: Outgoing, address: str) -> None:
        self.moved_to = address
        self._has_moved()
        facts = {"address": address, **_described(outgoing.progress)}
        self._announce("migrated", **facts)
        if self._asked is not None:
            connection, number = self._asked
            connection.reply(number, facts)
        self._process.quit()

    def close(self) -> None:
        """The guest has ended, or the process: nothing of a migration stays behind."""
        if self._outgoing is not None and self._guest is not None and self.moved_to is None:
            with contextlib.suppress(MigrationError):
                self._outgoing.cancel("the guest has ended")
            self._guest.ended()
        if self._thread is not None:
            self._thread.join(5.0)


def _described(progress: Progress) -> Message:
    return dataclasses.asdict(progress)


def _options(arguments: Message) -> Options:
    address = parse_address(str(arguments.get("address", "")))
    tls = [Path(str(arguments[key])) if arguments.get(key) else None for key in ("tls_cert", "tls_key", "tls_ca")]
    compression = str(arguments.get("compression", "none"))
    if compression not in COMPRESSIONS:
        raise BadRequest(f"compression {compression!r}: expected one of {', '.join(COMPRESSIONS)}")
    files = tls_files(*tls)
    post_copy = str(arguments.get("post_copy", "never"))
    if post_copy not in POST_COPY:
        raise BadRequest(f"post_copy {post_copy!r}: expected one of {', '.join(POST_COPY)}")
    if files is not None:
        files.context(server=False)
    return Options(
        address=address,
        tls=files,
        streams=int(_number(arguments, "streams", 1, wire.MAX_STREAMS)) or 1,
        compression=compression,
        bytes_per_s=_number(arguments, "bytes_per_s", 0, MAX_RATE) or None,
        downtime_s=_number(arguments, "downtime_ms", 40, MAX_DOWNTIME_MS) / 1000,
        witness_folder=witness_folder(),
        post_copy=post_copy,
    )


def witness_folder() -> Path:
    """Where both sides of a migration on this host look. Raises HostError."""
    folder = runtime.root() / "migrations"
    folder.mkdir(mode=0o700, exist_ok=True)
    witness.tidy(folder)
    return folder


def _number(arguments: Message, name: str, default: float, limit: float) -> float:
    value = arguments.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= limit:
        raise BadRequest(f"{name} {value!r}: expected a number from 0 to {limit:g}")
    return float(value)
