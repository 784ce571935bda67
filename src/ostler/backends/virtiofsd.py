"""virtiofsd as the program behind a shared folder.

It runs in namespaces of its own, without the host's network, and confines itself to the folder; an ordinary user gives
it a user namespace besides, where that user's files belong to the guest's root. A read-only share is mounted so before
virtiofsd sees it, whatever the guest asks. Root in a container that may not make namespaces does without them, and
cannot share read-only.

It is not started again when it dies: the guest's open files died with it.
"""

from __future__ import annotations

import os
import socket
import subprocess
from functools import cache
from pathlib import Path

from ostler.backends.helper_socket import connected
from ostler.errors import BadRequest
from ostler.host.helpers import Helper, find_program

PROGRAM, PACKAGE = "virtiofsd", "qemu-system-common (virtiofsd in newer releases)"
QUEUE_SIZE = 128
# In the helper's own mount namespace: $0 is the folder, the rest the program.
_READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && cd / && exec "$@"'


class Virtiofsd:
    """Starts virtiofsd for one folder; a `vhost_user.Launcher`."""

    restartable = False

    def __init__(self, folder: Path, *, read_only: bool) -> None:
        """Raises BadRequest when there is no such folder, HostError when there is no such program."""
        if not folder.is_dir():
            raise BadRequest(f"share {folder}: expected a folder of this host")
        if not os.access(folder, os.R_OK | os.X_OK):
            raise BadRequest(f"share {folder}: expected a folder that may be read")
        self.name = f"virtiofsd for {folder}"
        self._program = find_program(PROGRAM, package=PACKAGE)
        self._folder = folder.resolve()
        self._read_only = read_only

    def start(self) -> tuple[Helper, socket.socket]:
        """The program and a socket to it."""
        return connected(lambda fd: Helper(self.name, self.command(fd), pass_fds=[fd]))

    def command(self, fd: int) -> list[str]:
        """What is run, `fd` being the listening socket."""
        argv = [self._program, f"--fd={fd}", *self._options()]
        apart = ["unshare", "--mount", "--net", "--ipc"]
        if os.geteuid() != 0:
            apart.append("--map-root-user")
        elif not self._read_only and not _may_unshare():
            apart = []
        if self._read_only:
            argv = ["/bin/sh", "-c", _READ_ONLY, str(self._folder), *argv]
        return [*apart, *(["--"] if apart else []), *argv]

    def _options(self) -> list[str]:
        folder = str(self._folder)
        if "libexec" in self._program:
            # The successor, written anew, with options of another style.
            return ["--shared-dir", folder, "--cache", "auto", "--sandbox", "chroot"]
        escaped = folder.replace("\\", "\\\\").replace(",", "\\,")
        return ["-f", "-o", f"source={escaped}", "-o", "cache=auto", "-o", "sandbox=chroot", "-o", "log_level=warn"]


@cache
def _may_unshare() -> bool:
    """Whether root is root enough here."""
    return subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, check=False).returncode == 0
