"""Catching a running guest: a pause of milliseconds, then files written while it runs on.

What must be of one instant is taken while the processors stand still: their state and the devices', which disk blocks
and which memory pages there are. `image` and `disk_overlay` make the latter a matter of a system call each; what they
caught is written by a thread. The guest's connections over vsock go on in the guest that was caught; whoever begins
with its state finds them reset.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ostler.backends import disk_layers
from ostler.backends.disk import RawDisk
from ostler.backends.disk_overlay import FrozenLayers
from ostler.devices.virtio.blk import Block
from ostler.errors import BadRequest, HostError, OstlerError
from ostler.host import files
from ostler.snapshot import image, manifest, schema, store
from ostler.snapshot.manifest import DiskFacts, Manifest
from ostler.vmm.run import GuestProcess

if TYPE_CHECKING:
    from ostler.config import GuestSpec
    from ostler.machine.saved import SavedMachine

CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


@dataclass(slots=True)
class Caught:
    """A guest at one instant."""

    saved: SavedMachine
    spec: GuestSpec
    wall_s: float
    pause_ms: float = 0.0
    disks: dict[str, DiskFacts] = field(default_factory=dict)
    frozen: dict[str, FrozenLayers] = field(default_factory=dict)

    @property
    def state(self) -> bytes:
        """As it is written; made when the guest runs on."""
        return schema.encode(self.saved, self.spec)


class Capturer:
    """Catches one guest, as often as it is asked to; on the loop's thread but for what is said to run elsewhere."""

    def __init__(self, process: GuestProcess, name: str, *, base: str | None = None) -> None:
        """`base` is the name and id of the snapshot whose memory the guest began with."""
        self._process = process
        self._name = name
        self._base = base

    # -- snapshots ----------------------------------------------------------------------------------

    def to_folder(
        self, folder: Path, given: Mapping[str, Any], *, incremental: bool = False, sync: bool = True
    ) -> Callable[[], dict[str, Any]]:
        """Catch the guest; what is returned writes the snapshot into `folder`, in another thread, and says what it was.

        `given` goes into the manifest. With `sync` the snapshot outlives a crash of the host. Raises OstlerError.
        """
        self._check(forked=False)
        machine = self._process.machine
        can_freeze = image.can_freeze(machine.memory, shared=machine.shares_memory)
        base = self._known_base() if incremental else None
        identity = secrets.token_hex(8)
        with contextlib.ExitStack() as undo:
            memory = os.open(folder / manifest.MEMORY, CREATE, 0o600)
            undo.callback(os.close, memory)
            ranges = None
            if base is not None:
                ranges = os.open(folder / manifest.RANGES, CREATE, 0o600)
                undo.callback(os.close, ranges)

            def catch(caught: Caught) -> image.Capture:
                self._copy_own_disks(folder, caught)
                return image.capture(machine.memory, memory, shared=machine.shares_memory, ranges=ranges)

            caught, capture = self._catch(catch)
            undo.callback(capture.close)
            held = undo.pop_all()
        if can_freeze:
            self._base = f"{given['name']}:{identity}"

        def write() -> dict[str, Any]:
            with held:
                capture.finish()
                (folder / manifest.STATE).write_bytes(caught.state)
                for name, frozen in caught.frozen.items():
                    self._write_disk(folder, name, frozen, caught)
                return self._describe(folder, caught, {**given, "id": identity, "parent": base}, sync=sync)

        return write

    def _known_base(self) -> str:
        if self._base is None:
            raise BadRequest("incremental: there is no snapshot that this guest goes on from; make a whole one")
        name, _, identity = self._base.partition(":")
        with contextlib.suppress(OstlerError):
            if store.find(name).manifest.id == identity:
                return self._base
        raise BadRequest(f"incremental: snapshot {name!r}, which this guest goes on from, is gone; make a whole one")

    def _write_disk(self, folder: Path, name: str, frozen: FrozenLayers, caught: Caught) -> None:
        blocks, block_map = name + disk_layers.BLOCKS_SUFFIX, name + disk_layers.MAP_SUFFIX
        fd = os.open(folder / blocks, CREATE, 0o600)
        try:
            disk_layers.save_blocks(frozen, fd)
        finally:
            os.close(fd)
        disk_layers.save_map(frozen, folder / block_map, flat=True)
        caught.disks[name] = caught.disks[name].model_copy(update={"layers": (blocks,), "block_map": block_map})

    def _copy_own_disks(self, folder: Path, caught: Caught) -> None:
        """Disks that the guest writes to directly go on changing: the snapshot has a copy of them."""
        for name, facts in caught.disks.items():
            if facts.read_only or name in caught.frozen:
                continue
            block = self._process.machine.devices[name]
            assert isinstance(block, Block)
            assert isinstance(block.disk, RawDisk)
            own = name + disk_layers.BLOCKS_SUFFIX
            fd = os.open(folder / own, CREATE, 0o600)
            try:
                files.copy_sparse(block.disk.fileno(), fd)
                found = os.fstat(fd)
            finally:
                os.close(fd)
            copied = {"base": own, "base_bytes": found.st_size, "base_mtime_ns": found.st_mtime_ns}
            caught.disks[name] = facts.model_copy(update=copied)

    def _describe(self, folder: Path, caught: Caught, given: Mapping[str, Any], *, sync: bool) -> dict[str, Any]:
        names = [each.name for each in folder.iterdir()]
        found = self._manifest(caught, given, files={name: store.describe(folder, name, sync=sync) for name in names})
        manifest.save(found, folder)
        return {"pause_ms": caught.pause_ms, "id": found.id, "parent": found.parent}

    # -- forks --------------------------------------------------------------------------------------

    def to_seed(self, folder: Path, given: Mapping[str, Any]) -> Seed:
        """Catch the guest for children that begin while this process lives; `finish` it in another thread.

        Raises OstlerError.
        """
        self._check(forked=True)
        machine = self._process.machine
        can_freeze = image.can_freeze(machine.memory, shared=machine.shares_memory)
        # What stays as it is need not be copied once more: children have it, and what was written since over it.
        base = image.base(machine.memory, shared=machine.shares_memory)

        def catch(_caught: Caught) -> tuple[int, image.Capture | None]:
            if can_freeze:
                return image.freeze(machine.memory), None
            with contextlib.ExitStack() as undo, contextlib.ExitStack() as always:
                target = os.memfd_create("ostler-fork", os.MFD_CLOEXEC)
                undo.callback(os.close, target)
                changes = {}
                for key, name in (("ranges", manifest.RANGES), ("holes", manifest.HOLES)) if base is not None else ():
                    changes[key] = os.open(folder / name, CREATE, 0o600)
                    always.callback(os.close, changes[key])
                made = image.capture(machine.memory, target, shared=machine.shares_memory, **changes)
                undo.pop_all()
            return target, made

        caught, (memory, capture) = self._catch(catch)

        def write() -> None:
            (folder / manifest.STATE).write_bytes(caught.state)
            for name, frozen in caught.frozen.items():
                block_map = name + disk_layers.MAP_SUFFIX
                disk_layers.save_map(frozen, folder / block_map, flat=False)
                layers = tuple(_own_path(fd) for fd in frozen.layers)
                caught.disks[name] = caught.disks[name].model_copy(update={"layers": layers, "block_map": block_map})
            identity = {
                "id": secrets.token_hex(8), "memory": _own_path(memory),
                "memory_base": _own_path(base) if base is not None and not can_freeze else None,
            }  # fmt: skip
            manifest.save(self._manifest(caught, {**given, **identity}), folder)

        return Seed(folder, memory, capture, write, caught.pause_ms)

    # -- both ---------------------------------------------------------------------------------------

    def _check(self, *, forked: bool) -> None:
        """Refuse what cannot be caught. Raises BadRequest."""
        spec = self._process.machine.spec
        if spec.shares:
            raise BadRequest(
                f"guest {self._name!r}: has shared folders, whose open files cannot be saved; expected a guest without"
            )
        for number, disk in enumerate(spec.disks):
            device = self._process.machine.devices[f"disk{number}"]
            if disk.read_only:
                continue
            if not isinstance(device, Block):
                raise BadRequest(
                    f"disk {disk.path}: is not raw, and written to by another program; expected a raw disk"
                )
            if forked and not hasattr(device.disk, "freeze"):
                raise BadRequest(
                    f"disk {disk.path}: is written to directly, and no child can share it; expected a throw-away layer"
                )

    def _catch(self, catch_memory: Callable[[Caught], Any]) -> tuple[Caught, Any]:
        """Stop the guest, take its state, call back for its memory, let it go on."""
        process = self._process
        was_paused = process.is_paused
        started = time.perf_counter()
        process.pause()
        try:
            saved = process.save_state()
            caught = Caught(saved, process.machine.spec, time.time())
            with process.lock:
                self._catch_disks(caught)
                memory = catch_memory(caught)
        except OSError as error:
            raise HostError(f"guest {self._name!r} cannot be saved: {error.strerror or error}") from error
        finally:
            if not was_paused:
                process.resume()
        caught.pause_ms = (time.perf_counter() - started) * 1000
        return caught, memory

    def _catch_disks(self, caught: Caught) -> None:
        spec = self._process.machine.spec
        for number, disk in enumerate(spec.disks):
            name = f"disk{number}"
            device = self._process.machine.devices[name]
            found, size_bytes = disk.path.stat(), None
            if isinstance(device, Block) and not disk.read_only:
                size_bytes = device.disk.size_bytes
                if (freeze := getattr(device.disk, "freeze", None)) is not None:
                    caught.frozen[name] = freeze()
                    found = os.fstat(caught.frozen[name].base.fileno())
            caught.disks[name] = DiskFacts(
                base=str(disk.path), read_only=disk.read_only, base_bytes=found.st_size,
                base_mtime_ns=found.st_mtime_ns, size_bytes=size_bytes or found.st_size,
            )  # fmt: skip

    def _manifest(self, caught: Caught, given: Mapping[str, Any], **more: Any) -> Manifest:
        machine = self._process.machine
        return Manifest(
            guest=self._name, created=caught.wall_s, model=caught.saved.model,
            spec=json.loads(machine.spec.model_dump_json()), memory_bytes=machine.spec.memory_bytes,
            image_bytes=len(machine.memory.whole), disks=caught.disks, **given, **more,
        )  # fmt: skip


class Seed:
    """What children of a fork begin with, in a folder of the parent's; good as long as it is open."""

    def __init__(
        self, folder: Path, memory: int, capture: image.Capture | None, write: Callable[[], None], pause_ms: float
    ) -> None:
        """Takes over `memory`."""
        self._write = write
        self.folder = folder
        self.pause_ms = pause_ms
        self._memory = memory
        self._capture = capture

    def finish(self) -> None:
        """Return when everything that children begin with is there; in another thread. Raises HostError."""
        self._write()
        if self._capture is not None:
            self._capture.finish()

    def close(self) -> None:
        """Let go of the memory and remove the folder."""
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
        for each in self.folder.iterdir():
            each.unlink(missing_ok=True)
        self.folder.rmdir()


def _own_path(fd: int) -> str:
    """Where another process of this user's finds a file of no name."""
    return f"/proc/{os.getpid()}/fd/{fd}"
