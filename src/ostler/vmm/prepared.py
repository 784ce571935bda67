"""A guest made before it is asked for: wired, restored, its processors where the snapshot left them.

What is left to do when it is asked for is to become that guest: its folder with the sockets in it, its name's
addresses, the clocks, a generation of its own. Nothing of it has run by then: what it knows is what the snapshot does.
`ostler.vmm.pool` keeps such guests for a while, of what was asked for last.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ostler import accel
from ostler.config import GuestSpec
from ostler.control import runtime
from ostler.control.logfile import RotatedLog
from ostler.errors import BadRequest
from ostler.snapshot import manifest
from ostler.snapshot.store import Snapshot
from ostler.vmm.hub import HubConsole
from ostler.vmm.run import Beginning, GuestProcess

if TYPE_CHECKING:
    from ostler.vmm.origin import Origin


@dataclass(frozen=True, slots=True)
class Made:
    """A guest's process that nobody can reach yet."""

    process: GuestProcess
    hub: HubConsole
    log: RotatedLog
    accelerator: str


def make(spec: GuestSpec, folder: Path, stack: contextlib.ExitStack, *, beginning: Beginning | None) -> Made:
    """Wire a machine whose sockets are in `folder`; all of it is `stack`'s. Raises OstlerError."""
    opened = accel.open(spec.accel)
    stack.callback(opened.close)
    log = RotatedLog(folder / runtime.CONSOLE_LOG)
    hubs: list[HubConsole] = []

    def make_console(*arguments: Any) -> HubConsole:
        hubs.append(HubConsole(log, *arguments))
        return hubs[0]

    process = stack.enter_context(GuestProcess(spec, opened, make_console, folder=folder, beginning=beginning))
    return Made(process, hubs[0], log, opened.name)


class Prepared:
    """One guest, and what it was made of; a context manager."""

    def __init__(self, spec: str, origin: Mapping[str, Any], place: Path) -> None:
        """`spec` and `origin` are what the folder of a guest has. Raises OstlerError; BadRequest for what only a guest
        that is asked for can be given."""
        from ostler.vmm.origin import Origin

        wanted = GuestSpec.model_validate_json(spec)
        if wanted.ports or wanted.shares or wanted.virtio_console or any(net.kind != "passt" for net in wanted.nets):
            raise BadRequest("ports, shared folders and interfaces of the host's: expected none")
        source = Path(origin["snapshot"])
        self._asked_for = (spec, dict(origin))
        self._known_as = _known_as(source)
        self.origin: Origin = Origin.read(Snapshot(source, manifest.load(source)))
        with contextlib.ExitStack() as undo:
            self._folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="guest-", dir=place)))
            self.made = make(wanted, self._folder, undo, beginning=self.origin)
            self.origin.complete(self.made.process.machine.memory)
            self.made.process.restore_state(self.origin.saved)
            self._resources = undo.pop_all()

    def is_for(self, entry: runtime.Entry) -> bool:
        """Whether the guest of that folder can begin with it: the same, and the snapshot has not been replaced."""
        spec = (entry.path / runtime.SPEC).read_text()
        return (spec, runtime.origin_of(entry)) == self._asked_for and _known_as(
            self.origin.snapshot.folder
        ) == self._known_as

    def become(self, entry: runtime.Entry) -> Made:
        """Be that guest. Raises OstlerError; it is of no use then."""
        self.made.process.become(entry.path, self.origin.saved)
        self.made.log.move(entry.console_log)
        with contextlib.suppress(OSError):
            self._folder.rmdir()
        return self.made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._resources.close()


def _known_as(folder: Path) -> tuple[int, int, int]:
    """What changes when a snapshot is replaced: manifests are written once, and renamed into place."""
    with contextlib.suppress(OSError):
        found = (folder / manifest.MANIFEST).stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return 0, 0, 0
