"""The audit log: one line of JSON for each request that changed something, or was refused for who asked it."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path

from ostler.control import logfile
from ostler.control.logfile import RotatedLog
from ostler.hostd.models import AuditEntry

FILE = "audit.log"
LOG_BYTES = 16 << 20


class Audit:
    """Appends; any thread."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._log = RotatedLog(self._path, LOG_BYTES)
        self._lock = threading.Lock()

    def write(self, entry: AuditEntry) -> None:
        """Keep it. A full disk loses the line, not the service."""
        with self._lock:
            self._log.write(entry.model_dump_json().encode() + b"\n")

    def read(self, limit: int) -> list[AuditEntry]:
        """The newest, newest first; a line that was cut off is passed over."""
        found: list[AuditEntry] = []
        for line in reversed(logfile.read(self._path).splitlines()):
            if len(found) == limit:
                break
            with contextlib.suppress(ValueError):
                found.append(AuditEntry.model_validate(json.loads(line)))
        return found

    def close(self) -> None:
        self._log.close()
