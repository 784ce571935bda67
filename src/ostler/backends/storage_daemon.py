"""qemu-storage-daemon as the program behind a disk: qcow2 and whatever else QEMU's block layer knows.

It opens and locks the image itself. A daemon that dies is started again: the disk's content is in its file, and what
was not answered is asked again.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ostler.backends.helper_socket import connected
from ostler.errors import HostError
from ostler.host.helpers import Helper, find_program
from ostler.host.locks import claim_disk

PROGRAM, PACKAGE = "qemu-storage-daemon", "qemu-system-common"


class StorageDaemon:
    """Starts the daemon for one image; a `vhost_user.Launcher`."""

    restartable = True

    def __init__(self, path: Path, image_format: str, *, read_only: bool, overlay: bool, queue_count: int) -> None:
        """`overlay` keeps what is written apart and throws it away.

        Raises BadRequest for a disk that cannot be opened, DiskBusy for one in use, HostError without the program.
        """
        self.name = f"qemu-storage-daemon for {path}"
        self._program = find_program(PROGRAM, package=PACKAGE, instead="convert the disk to raw")
        # The daemon locks the disk itself; asking first gives the better complaint.
        claim_disk(path, write=not (read_only or overlay))
        self._queue_count = queue_count
        self._read_only = read_only
        self._node = _node(image_format, str(path), read_only=read_only or overlay)
        self._layer = -1
        if overlay:
            self._layer = _throw_away_layer(path, image_format)
            above = _node("qcow2", f"/proc/self/fd/{self._layer}", read_only=False)
            self._node = {**above, "backing": self._node}
        self._node["node-name"] = "disk"

    def start(self) -> tuple[Helper, socket.socket]:
        """The daemon and a socket to its export."""

        def run(fd: int) -> Helper:
            export = {
                "type": "vhost-user-blk", "id": "export", "node-name": "disk", "writable": not self._read_only,
                "num-queues": self._queue_count, "addr": {"type": "fd", "str": str(fd)},
            }  # fmt: skip
            argv = [self._program, "--blockdev", json.dumps(self._node), "--export", json.dumps(export)]
            return Helper(self.name, argv, pass_fds=[fd, *([self._layer] if self._layer >= 0 else [])])

        return connected(run)

    def close(self) -> None:
        """Throw the layer away. Closing twice is harmless."""
        if self._layer >= 0:
            os.close(self._layer)
            self._layer = -1


def _node(driver: str, path: str, *, read_only: bool) -> dict[str, Any]:
    common = {"read-only": read_only, "discard": "unmap"}
    return {"driver": driver, **common, "file": {"driver": "file", "filename": path, **common}}


def _throw_away_layer(path: Path, image_format: str) -> int:
    """An empty qcow2 file without a name above `path`; its descriptor. Raises HostError."""
    with tempfile.TemporaryFile() as file:
        layer = os.dup(file.fileno())
    try:
        program = find_program("qemu-img", package="qemu-utils")
        argv = [program, "create", "-q", "-f", "qcow2", "-F", image_format, "-b", str(path.resolve())]
        done = subprocess.run([*argv, f"/proc/self/fd/{layer}"], pass_fds=[layer], capture_output=True, check=False)
        if done.returncode:
            said = " ".join(done.stderr.decode(errors="replace").split())
            raise HostError(f"throw-away layer above {path}: {said}")
    except BaseException:
        os.close(layer)
        raise
    return layer
