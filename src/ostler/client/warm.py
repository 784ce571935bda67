"""Guests that begin booted: a snapshot taken at a first boot stands in for the boots that follow.

    <cache>/booted/<key>/    a snapshot (`ostler.snapshot.manifest`) of a guest that had just booted

The key is made of everything a boot depends on: the whole specification (image, kernel, initrd, processor, memory,
devices) and this installation of Ostler. What belongs to one guest is not in it and is handed over afterwards, as after
any boot: hostname, keys, name servers, the time, random numbers, the host's ports.

A guest is only kept in the cache when nothing that another could see goes with it: no disk but its throw-away one, no
shared folder, no seed. OSTLER_COLD=1 and `--cold` always boot.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ostler.client import guests, running
from ostler.client.restored import RestoredGuest
from ostler.client.running import RunningGuest
from ostler.client.snapshots import described
from ostler.config.schedule import Schedule
from ostler.control.pool import installation_stamp
from ostler.errors import OstlerError
from ostler.host.folders import cache_root
from ostler.snapshot import manifest, store

if TYPE_CHECKING:
    from ostler.client.plan import Plan
    from ostler.control.launch import Launched

# A guest of 512 MiB leaves 70 MiB.
KEPT = 8
KEY_DIGITS = 32
# Programs that every command needs are read from the disk once, before the snapshot.
FIRST_COMMAND = ("/bin/true",)


def start(plan: Plan, *, leash: bool, remove: bool, cold: bool = False) -> RunningGuest:
    """As `running.start`, from a cached booted snapshot where there is one; where there could be, the guest leaves one.

    A cached snapshot that cannot be used is forgotten, and the guest boots.
    """
    if cold or os.environ.get("OSTLER_COLD") or not is_fit(plan):
        return running.start(plan, leash=leash, remove=remove)
    folder = root() / key(plan)
    if folder.is_dir():
        try:
            return _restored(plan, folder, leash=leash, remove=remove)
        except OstlerError:
            # Whatever is wrong with the request itself the boot will say.
            shutil.rmtree(folder, ignore_errors=True)
    launched = running.launch_plan(plan, leash=leash, remove=remove)
    return running.hold(launched, lambda: FirstGuest(launched, plan, folder))


def is_fit(plan: Plan) -> bool:
    """Whether a snapshot of the booted guest holds nothing of this guest's own."""
    spec = plan.spec
    only_root = len(spec.disks) == 1 and spec.disks[0].overlay
    quiet = not spec.shares and not plan.is_durable and not spec.test_devices and not spec.virtio_console
    nets = all(net.kind == "passt" and net.ip is None and net.mac is None for net in spec.nets) and len(spec.nets) < 2
    return plan.boot == "agent" and only_root and quiet and nets and spec.vsock_cid is not None


def cached(plan: Plan) -> tuple[Plan, Path] | None:
    """How a guest like this one is started from a cached snapshot, and that; None where there is none."""
    folder = root() / key(plan) if is_fit(plan) else None
    with contextlib.suppress(OstlerError):
        if folder is not None and folder.is_dir():
            return _as_saved(plan, manifest.load(folder)), folder
    return None


def _as_saved(plan: Plan, found: manifest.Manifest) -> Plan:
    """With the processor that the snapshot was taken of."""
    return dataclasses.replace(plan, spec=plan.spec.model_copy(update={"cpu": found.model}))


def key(plan: Plan) -> str:
    """What the boot depends on."""
    spec = plan.spec.model_copy(update={"ports": ()}).scheduled(Schedule())
    image = plan.facts.get("digest")
    files = [(str(path), path.stat().st_mtime_ns) for path in (spec.kernel, spec.initrd) if path is not None]
    what = repr((spec.model_dump_json(), image, files, sys.executable, installation_stamp()))
    return hashlib.sha256(what.encode()).hexdigest()[:KEY_DIGITS]


def root() -> Path:
    """Where they are."""
    return cache_root() / "booted"


def _restored(plan: Plan, folder: Path, *, leash: bool, remove: bool) -> RunningGuest:
    made = _as_saved(plan, manifest.load(folder))
    os.utime(folder)
    launched = running.launch_plan(made, leash=leash, remove=remove, origin={"snapshot": str(folder)})
    return running.hold(launched, lambda: RestoredGuest(launched, made))


class FirstGuest(RunningGuest):
    """One that booted, and leaves a snapshot of that for others while its command runs."""

    def __init__(self, launched: Launched, plan: Plan, folder: Path) -> None:
        super().__init__(launched, plan)
        self._folder = folder
        self._saving: threading.Thread | None = None

    def configure(self) -> None:
        network = self._network()
        if not self.troubles:
            # Without the network it was to have it is not what others want.
            self._say({"hostname": "ostler", **network})
            with contextlib.suppress(OstlerError):
                self.agent.run(FIRST_COMMAND)
                self._leave_snapshot()
        self._say({**network, **self.plan.settings})

    def end(self) -> dict[str, Any]:
        self._finish()
        return super().end()

    def release(self) -> None:
        self._finish()
        super().release()

    def _leave_snapshot(self) -> None:
        caught = threading.Event()
        self._saving = threading.Thread(target=self._save, args=(caught,), name="booted", daemon=True)
        self._saving.start()
        # What is said to the guest from here on must not be in it.
        caught.wait()

    def _save(self, caught: threading.Event) -> None:
        given = {"name": "booted", **described(self.entry)}
        try:
            with store.workspace(self._folder.name, replace=True, within=self._folder.parent) as part:
                guests.request_announced(
                    self.entry, "snapshot", caught.set, folder=str(part), manifest=given, sync=False
                )
            forget_old()
        except OstlerError:
            pass  # the next guest tries again
        finally:
            caught.set()

    def _finish(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.join()


def forget_old() -> None:
    """Keep those used last."""
    with contextlib.suppress(OSError):
        found = sorted(root().glob("[!.]*"), key=lambda each: each.stat().st_mtime, reverse=True)
        for each in found[KEPT:]:
            shutil.rmtree(each, ignore_errors=True)
