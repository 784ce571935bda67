"""Debian packages through apt's own client, without root and without touching the host's package state.

Apt gets a state and a cache folder of its own. From the host it takes what reaches the archive: the source entries
(as `apt-get update --print-uris` resolves them, with the suite exchanged for the one wanted), the `Acquire` settings
(proxies, certificates) and the keys. Hooks of the host's configuration (`APT::Update::Post-Invoke` and the like) are
left behind: they are written for root. Apt verifies signatures and hashes; nothing here repeats that.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from ostler.errors import ImageError
from ostler.images import cache
from ostler.images.progress import Progress, silent

_INRELEASE = re.compile(r"^'(?P<base>[^']+)/dists/(?P<suite>[^'/]+)/InRelease'")
_PARTS_OF_A_RELEASE = ("", "-updates", "-security")


def host_release() -> str | None:
    """Return the code name of the host's own Debian release, or None on another system."""
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME")
    except OSError:
        return None


def exchange_suite(print_uris: Iterable[str], host: str, wanted: str) -> list[str]:
    """Turn `apt-get update --print-uris` output into source lines of the release `wanted`.

    Entries that are not of the host's own Debian release (third-party archives, backports) are dropped.
    """
    lines = []
    for line in print_uris:
        found = _INRELEASE.match(line)
        if found and found["suite"] in {host + part for part in _PARTS_OF_A_RELEASE}:
            suite = wanted + found["suite"].removeprefix(host)
            lines.append(f"deb [arch=amd64] {found['base']} {suite} main")
    return list(dict.fromkeys(lines))


def host_sources(wanted: str) -> list[str]:
    """Return source lines for the Debian release `wanted`, reached as this host reaches its own.

    Raises:
        ImageError: there is no apt here, or no Debian source in its configuration.
    """
    if shutil.which("apt-get") is None:
        raise ImageError("apt-get: not on this host, so no guest material can be fetched; give --kernel and --initrd")
    host = host_release()
    uris = _output(["apt-get", "update", "--print-uris"], os.environ).splitlines()
    sources = exchange_suite(uris, host, wanted) if host else []
    if not sources:
        raise ImageError(f"apt: this host ({host or 'unknown release'}) has no Debian source to fetch from")
    return sources


class Apt:
    """Apt's client for one Debian release, with private state below the cache folder."""

    def __init__(self, release: str) -> None:
        self.release = release
        self._root = cache.root() / "apt" / release
        self._sources = host_sources(release)

    def download(self, package: str, into: Path, progress: Progress = silent) -> tuple[Path, dict[str, str]]:
        """Fetch the newest `package` into the folder `into`; return the file and the package's control fields.

        Raises:
            ImageError: the archive cannot be reached, or does not have the package.
        """
        with cache.locked(f"apt-{self.release}", progress):
            fresh = self._prepare(progress)
            try:
                return self._download(package, into, progress)
            except ImageError:
                # Lists that have grown old name files the archive no longer holds.
                if fresh:
                    raise
                self._update(progress)
                return self._download(package, into, progress)

    def show(self, package: str, progress: Progress = silent) -> dict[str, str]:
        """Return the control fields of the newest version of `package`."""
        with cache.locked(f"apt-{self.release}", progress):
            self._prepare(progress)
            return self._show(package)

    def _prepare(self, progress: Progress) -> bool:
        """Write the private configuration; update the lists if there are none. True if they are fresh."""
        self._write_configuration()
        if any((self._root / "lists").glob("*_Packages*")):
            return False
        self._update(progress)
        return True

    def _write_configuration(self) -> None:
        for folder in ("lists/partial", "cache/archives/partial", "etc/parts"):
            (self._root / folder).mkdir(parents=True, exist_ok=True)
        (self._root / "status").touch()
        (self._root / "etc" / "sources.list").write_text("\n".join(self._sources) + "\n")
        settings = {
            "Dir::State": self._root,
            "Dir::State::lists": self._root / "lists",
            "Dir::State::status": self._root / "status",
            "Dir::Cache": self._root / "cache",
            "Dir::Etc::parts": self._root / "etc" / "parts",
            "Dir::Etc::main": self._root / "etc" / "none",
            "Dir::Etc::sourcelist": self._root / "etc" / "sources.list",
            "Dir::Etc::sourceparts": self._root / "etc" / "parts",
            "Dir::Etc::preferences": self._root / "etc" / "none",
            "Dir::Etc::preferencesparts": self._root / "etc" / "parts",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
            "Acquire::Languages": "none",
            "Acquire::PDiffs": "false",
            "Acquire::Retries": "3",
        }
        acquire = _output(["apt-config", "dump", "Acquire"], os.environ)
        # What desktops add to every update (screenshots, command indexes) is of no use here.
        kept = [line for line in acquire.splitlines() if line and "::IndexTargets::" not in line]
        own = [f'{name} "{value}";' for name, value in settings.items()]
        (self._root / "etc" / "apt.conf").write_text("\n".join(kept + own) + "\n")

    def _update(self, progress: Progress) -> None:
        progress(f"reading the package lists of Debian {self.release}")
        _output(["apt-get", "--quiet", "--error-on=any", "update"], self._environment())

    def _show(self, package: str) -> dict[str, str]:
        text = _output(["apt-cache", "--no-all-versions", "show", package], self._environment())
        fields = (line.partition(": ") for line in text.splitlines() if line and not line[0].isspace())
        return {name: value for name, _, value in fields}

    def _download(self, package: str, into: Path, progress: Progress) -> tuple[Path, dict[str, str]]:
        fields = self._show(package)
        step = f"fetching {package} {fields.get('Version', '')}".rstrip()
        progress(step, 0.0)
        read, write = os.pipe()
        with os.fdopen(read) as status:
            try:
                process = subprocess.Popen(
                    ["apt-get", "--quiet", "-o", f"APT::Status-Fd={write}", "download", package],
                    cwd=into, env=self._environment(), pass_fds=(write,),
                    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                )  # fmt: skip
            finally:
                os.close(write)
            for line in status:  # "dlstatus:1:45.3:Retrieving file 1 of 1"
                if line.startswith("dlstatus:"):
                    progress(step, float(line.split(":")[2]) / 100)
        _, complaint = process.communicate()
        files = list(into.glob(f"{package}_*.deb"))
        if process.returncode != 0 or not files:
            raise ImageError(f"apt: {package} of {self.release} not fetched: {_last_error(complaint)}")
        progress(step, 1.0)
        return files[0], fields

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "APT_CONFIG": str(self._root / "etc" / "apt.conf"), "LC_ALL": "C"}


def _output(command: list[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "LC_ALL": "C"}, check=False)
    if done.returncode != 0:
        shown = " ".join(word for word in command if not word.startswith("-"))
        raise ImageError(f"{shown}: {_last_error(done.stderr)}")
    return done.stdout


def _last_error(text: str) -> str:
    """Return the most telling of apt's complaints, as one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E:")]
    return (errors or lines or ["no reason given"])[0].removeprefix("E: ")
