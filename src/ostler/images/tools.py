"""Programs of the host that make images: run to their end, their complaint as one line, none left behind.

A program that is missing is named with the Debian package that brings it. On any exception, Ctrl-C among them, the
program is killed and waited for before it goes on. Looked for in the system folders too, which a plain user's PATH
does not have.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ostler.errors import ImageError

SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
Argument = str | Path


def search_path() -> str:
    """Return PATH with the system folders behind it."""
    return f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}"


def environment(**more: str) -> dict[str, str]:
    """Return the environment programs get: messages in English, system folders on the path."""
    return {**os.environ, "PATH": search_path(), "LC_ALL": "C.UTF-8", **more}


def require(program: str, *, package: str) -> str:
    """Return where `program` is. Raises ImageError naming the package that has it."""
    found = shutil.which(program, path=search_path())
    if found is None:
        raise ImageError(f"{program}: not on this host, and this is done with it (apt-get install {package})")
    return found


def run(
    command: Sequence[Argument],
    *,
    package: str,
    stdin: bytes | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run a program to its end and return its standard output.

    Raises:
        ImageError: it is missing, or ended with another status than 0; says its last complaint.
    """
    program = require(str(command[0]), package=package)
    done = subprocess.run(
        [program, *command[1:]], input=stdin if stdin is not None else b"", capture_output=True, cwd=cwd,
        env=env or environment(), check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise ImageError(f"{command[0]}: {complaint(done.stderr.decode(errors='replace'), done.returncode)}")
    return done.stdout.decode(errors="replace")


def stop(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """End a program that is not wanted any more: asked, so that it cleans up after itself, then killed."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def tied() -> list[str]:
    """Return the words before a long command that make it end with this process, were that killed outright.

    By SIGTERM, so that it still cleans up after itself. Empty where the host lacks setpriv.
    """
    program = shutil.which("setpriv", path=search_path())
    return [program, "--pdeathsig", "TERM", "--"] if program else []


def complaint(stderr: str, status: int) -> str:
    """Return the most telling line of a program's standard error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "error", "Error", "fatal", "FATA"))]
    if any("No space left on device" in line for line in lines):
        return "No space left on device"
    return (errors or lines or [f"ended with status {status} and no message"])[-1].removeprefix("E: ")


def complaints(command: Sequence[Argument], *, stdin: bytes) -> str:
    """Run a program whose exit status says nothing and return its standard error."""
    done = subprocess.run(command, input=stdin, capture_output=True, env=environment(), check=False)
    return done.stderr.decode(errors="replace")
