"""qcow2 disks: qemu-storage-daemon serves one over vhost-user-blk, and the device's front end talks to its socket.

The daemon is a helper of the VM process: it ends with it, and its death is reported. Its listening socket is made here
and stays open here, so that a daemon started again serves the same socket, and a front end that reconnects needs to
know nothing. It says that it is ready by its monitor's greeting: the monitor comes last on its command line, when disk
and export are there.

Locks are the daemon's own, and the same as `host.locks`; asking here first only gives a better message.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Self

from ostler.errors import BadRequest, HostError
from ostler.host.helpers import Helper, Watcher, find_program
from ostler.host.locks import claim_disk

PROGRAM = "qemu-storage-daemon"
PACKAGE = "qemu-system-common"
# A daemon that dies again and again has a reason that starting it does not remove.
MAX_RESTARTS = 3


class StorageDaemon:
    """One daemon with one disk. A context manager; make it in the main thread (see host.helpers)."""

    def __init__(
        self, path: Path, address: Path, *, disk_format: str = "qcow2", read_only: bool = False, queue_count: int = 1
    ) -> None:
        """Serve the disk `path` at the UNIX socket `address`, which must not exist yet.

        Raises:
            BadRequest: no such disk, or not of this format.
            DiskBusy: somebody else has it open.
            HostError: there is no daemon on this host, or it does not start; says its last words.
        """
        self._program = find_program(PROGRAM, package=PACKAGE, instead="convert the disk: ostler disk convert")
        claim_disk(path, write=not read_only)
        self.path = path
        self.address = address
        self.restarts = 0
        self._format = disk_format
        self._read_only = read_only
        self._queue_count = queue_count
        self._monitor: socket.socket | None = None
        self._helper: Helper | None = None
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listening.bind(str(address))
            self._listening.listen(1)
            self._start()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise HostError(f"disk {path}: no socket at {address} ({error.strerror or error})") from error
            raise

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self._running().pid

    def watch(self, watcher: Watcher, on_death: Callable[[StorageDaemon, str], None]) -> None:
        """Call `on_death` with the daemon's obituary when it ends by itself. Loop thread, or before the loop runs."""

        def died(helper: Helper) -> None:
            on_death(self, helper.obituary())

        self._running().watch(watcher, died)

    def restart(self) -> None:
        """Start a dead daemon again at the same socket. Raises HostError if that fails, or has been done too often."""
        if self.restarts >= MAX_RESTARTS:
            raise HostError(f"disk {self.path}: {PROGRAM} died {self.restarts + 1} times and is not started again")
        self.restarts += 1
        self._stop()
        self._start()

    def close(self) -> None:
        """Stop the daemon and take its socket away. More calls do nothing."""
        self._stop()
        if self._listening.fileno() >= 0:
            self._listening.close()
            with contextlib.suppress(OSError):
                self.address.unlink()

    def _start(self) -> None:
        self._monitor, theirs = socket.socketpair()
        with theirs:
            fds = (self._listening.fileno(), theirs.fileno())
            self._helper = Helper(PROGRAM, [self._program, *self._arguments(*fds)], pass_fds=fds)
        try:
            self._helper.wait_for(self._monitor.fileno())
        except HostError as error:
            reason = str(error)
            if "not in qcow2 format" in reason or "Image is corrupt" in reason:
                raise BadRequest(f"disk {self.path}: no {self._format} disk, or a damaged one") from error
            raise HostError(f"disk {self.path}: {reason}") from error

    def _arguments(self, listening: int, monitor: int) -> list[str]:
        mode = "on" if self._read_only else "off"
        file = f"driver=file,node-name=file,filename={_escaped(self.path)},read-only={mode},discard=unmap"
        disk = f"driver={self._format},node-name=disk,file=file,read-only={mode},discard=unmap,detect-zeroes=unmap"
        writable = "off" if self._read_only else "on"
        export = f"vhost-user-blk,id=export,node-name=disk,addr.type=fd,addr.str={listening}"
        return [
            "--blockdev", file,
            "--blockdev", disk,
            "--export", f"{export},writable={writable},num-queues={self._queue_count}",
            "--chardev", f"socket,id=monitor,fd={monitor}",
            "--monitor", "monitor",
        ]  # fmt: skip

    def _running(self) -> Helper:
        if self._helper is None:
            raise HostError(f"disk {self.path}: {PROGRAM} does not run")
        return self._helper

    def _stop(self) -> None:
        if self._helper is not None:
            self._helper.stop()
            self._helper = None
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _escaped(path: Path) -> str:
    """Write a path as a value of QEMU's options, where a comma is doubled."""
    return os.path.abspath(path).replace(",", ",,")  # noqa: PTH100 - links stay as they were written
