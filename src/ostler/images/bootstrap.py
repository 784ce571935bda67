"""mmdebstrap: a Debian tree as a tar stream, for root and for plain users.

Root needs nothing more. A plain user gets a tree by a user namespace (mmdebstrap's mode unshare) where the host allows
them and the user has subordinate numbers, else by fakechroot. Which one works is mmdebstrap's own knowledge, so it
chooses; here its choice is foreseen only to say in one line what is missing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TypeVar

from ostler.errors import ImageError
from ostler.images import apt, tools
from ostler.images.progress import Progress, silent

LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/lintian/*")
_STEP = re.compile(r"^I: (?P<what>[^.]*)\.\.\.$")
_T = TypeVar("_T")


def debian(
    release: str, packages: Sequence[str], consume: Callable[[IO[bytes]], _T], *, progress: Progress = silent
) -> _T:
    """Make Debian's minimal system with `packages` and give its tar stream to `consume`; return what that returns.

    Raises:
        ImageError: mmdebstrap is missing, cannot work here, or failed; says its reason.
    """
    program = tools.require("mmdebstrap", package="mmdebstrap")
    mode = choose_mode()
    sources = "\n".join(apt.host_sources(release)) + "\n"
    command = [*tools.tied(), program, f"--mode={mode}", "--variant=minbase", "--architectures=amd64", "--format=tar"]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
    command += [f"--include={','.join(packages)}"] if packages else []
    command += [release, "-", "-"]
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as log:
        given.write(sources.encode())
        given.seek(0)
        # Messages go to a file, not a pipe: the stream is read here first, and a full pipe would stop both.
        with subprocess.Popen(
            command, stdin=given, stdout=subprocess.PIPE, stderr=log, env=tools.environment()
        ) as process:
            assert process.stdout is not None
            try:
                with _Teller(log, progress, f"Debian {release}"):
                    process.stdout.peek(1)  # type: ignore[attr-defined]  # the stream begins when the tree is made
                result, failure = None, None
                try:
                    result = consume(process.stdout)
                except ImageError as error:  # of a cut stream; why it was cut is mmdebstrap's to say
                    failure = error
                while process.stdout.read(1 << 20):
                    pass
            except BaseException:
                tools.stop(process)
                raise
        log.seek(0)
        said = log.read().decode(errors="replace")
        if process.returncode != 0:
            raise ImageError(f"mmdebstrap {release}: {tools.complaint(said, process.returncode)}")
        if failure:
            raise failure
    return result  # type: ignore[return-value]


def choose_mode() -> str:
    """Return the way mmdebstrap can work for this user.

    Raises:
        ImageError: there is none; says what to install.
    """
    if os.geteuid() == 0:
        return "root"
    if _can_unshare():
        return "unshare"
    if shutil.which("fakechroot") and shutil.which("fakeroot"):
        return "fakechroot"
    raise ImageError(
        "mmdebstrap: a plain user needs user namespaces with subordinate numbers (apt-get install uidmap; a line of "
        "yours in /etc/subuid and /etc/subgid) or fakechroot (apt-get install fakechroot)"
    )


def _can_unshare() -> bool:
    if not (shutil.which("newuidmap") and _has_subordinates("/etc/subuid") and _has_subordinates("/etc/subgid")):
        return False
    tried = subprocess.run(["unshare", "--user", "--map-root-user", "true"], capture_output=True, check=False)
    return tried.returncode == 0


def _has_subordinates(table: str) -> bool:
    import pwd

    try:
        owners = {line.split(":")[0] for line in Path(table).read_text().splitlines()}
        return not owners.isdisjoint({str(os.geteuid()), pwd.getpwuid(os.geteuid()).pw_name})
    except (OSError, KeyError):
        return False


class _Teller:
    """Tells mmdebstrap's steps while it works, from the file its messages go to. A context manager."""

    def __init__(self, log: IO[bytes], progress: Progress, prefix: str) -> None:
        import threading

        self._fd = log.fileno()
        self._progress = progress
        self._prefix = prefix
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="mmdebstrap", daemon=True)

    def __enter__(self) -> None:
        self._progress(f"{self._prefix}: preparing")
        self._thread.start()

    def __exit__(self, *_exc: object) -> None:
        self._end.set()
        self._thread.join()

    def _tell(self) -> None:
        at = 0
        ended = False
        while not ended:
            ended = self._end.wait(0.2)  # and one more look after the end
            text = os.pread(self._fd, 64 << 10, at)
            whole = text.rpartition(b"\n")[0]
            at += len(whole)
            for line in whole.decode(errors="replace").splitlines():
                if step := _STEP.match(line.strip("\r")):
                    self._progress(f"{self._prefix}: {step['what']}")
