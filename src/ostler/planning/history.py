"""Utilisation kept over time: a bounded SQLite file of samples of this host and its guests.

One process writes (the host's service, once a minute), any number read; WAL keeps them out of each other's way. It
is bounded twice: samples older than `KEPT_S` go, and beyond `MAX_ROWS` the oldest. A file that is no database is set
aside under another name, for measurements are worth less than a service that starts.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, astuple, dataclass, fields
from pathlib import Path
from typing import Self

from ostler.errors import HostError

FILE = "usage.sqlite"
INTERVAL_S = 60.0
KEPT_S = 14 * 86_400
MAX_ROWS = 1_000_000
HOST = ""
"""The guest of a sample that is the whole host's."""
_VERSION = 2
_TIDY_EVERY = 200


@dataclass(frozen=True, slots=True)
class Sample:
    """What a guest, or the host, used from the sample before to this one."""

    time_s: float
    """Seconds since 1970."""
    guest: str
    """Its name, or HOST."""
    interval_s: float
    cpus: float
    """Host CPUs that its whole process kept busy."""
    memory_bytes: int
    """Its size."""
    resident_bytes: int
    """What its process holds of the host's memory; of the host, what is in use."""
    read_bytes_per_s: float
    written_bytes_per_s: float
    received_bytes_per_s: float
    sent_bytes_per_s: float
    vcpus: int
    run_cpus: float = 0.0
    """Host CPUs that its virtual processors kept busy."""
    wait_cpus: float = 0.0
    """Host CPUs that they wanted and had not: steal."""


_COLUMNS = ", ".join(each.name for each in fields(Sample))
_TYPES = {"str": "TEXT", "float": "REAL", "int": "INTEGER"}
_DEFAULTS = {each.name: f" DEFAULT {each.default}" for each in fields(Sample) if each.default is not MISSING}
_DECLARED = [f"{each.name} {_TYPES[str(each.type)]} NOT NULL{_DEFAULTS.get(each.name, '')}" for each in fields(Sample)]
# What a file of the version before has not got.
_ADDED = {1: _DECLARED[-2:]}


def default_path() -> Path:
    """Where the host's service keeps its samples: in OSTLER_STATE's folder, else in the user's state folder."""
    if chosen := os.environ.get("OSTLER_STATE"):
        return Path(chosen) / FILE
    import platformdirs

    return platformdirs.user_state_path("ostler") / "host" / FILE


class History:
    """The file. A context manager; its owner alone writes."""

    def __init__(self, path: Path, *, max_rows: int = MAX_ROWS, kept_s: float = KEPT_S) -> None:
        """Open or make it. Raises HostError where the folder or the file cannot be written."""
        self._path, self._max_rows, self._kept_s = path, max_rows, kept_s
        self._until_tidy = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise HostError(f"{path}: {error}") from error
            self._set_aside()
            self._database = self._open()
        except OSError as error:
            raise HostError(f"{path}: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def add(self, samples: Iterable[Sample]) -> None:
        """Keep these; now and then forget the oldest. Raises HostError where the disk is full."""
        marks = ", ".join("?" * len(fields(Sample)))
        try:
            with self._database as database:
                database.executemany(
                    f"INSERT INTO samples ({_COLUMNS}) VALUES ({marks})", [astuple(each) for each in samples]
                )
                self._until_tidy -= 1
                if self._until_tidy < 0:
                    self._until_tidy = _TIDY_EVERY
                    self._tidy()
        except sqlite3.Error as error:
            raise HostError(f"{self._path}: {error}") from error

    def _tidy(self) -> None:
        self._database.execute("DELETE FROM samples WHERE time_s < ?", (time.time() - self._kept_s,))
        (rows,) = self._database.execute("SELECT count(*) FROM samples").fetchone()
        if rows > self._max_rows:
            self._database.execute(
                "DELETE FROM samples WHERE rowid IN (SELECT rowid FROM samples ORDER BY time_s LIMIT ?)",
                (rows - self._max_rows,),
            )

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=5, check_same_thread=False)
        try:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
            self._bring_up(database)
        except BaseException:
            database.close()
            raise
        return database

    def _bring_up(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, *_ADDED, _VERSION):
            raise HostError(f"{self._path}: version {version} of another Ostler, expected {_VERSION}")
        # The version is part of the transaction: a file is of one or of the other.
        with database:
            database.execute("BEGIN IMMEDIATE")
            database.execute(f"CREATE TABLE IF NOT EXISTS samples ({', '.join(_DECLARED)})")
            database.execute("CREATE INDEX IF NOT EXISTS by_time ON samples (time_s)")
            database.execute("CREATE INDEX IF NOT EXISTS by_guest ON samples (guest, time_s)")
            for column in _ADDED.get(version, ()):
                database.execute(f"ALTER TABLE samples ADD COLUMN {column}")
            database.execute(f"PRAGMA user_version={_VERSION}")

    def _set_aside(self) -> None:
        self._path.replace(self._path.with_name(self._path.name + ".damaged"))
        for suffix in ("-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)


def read(
    path: Path, *, since_s: float = 0.0, until_s: float = float("inf"), guest: str | None = None,
    limit: int = MAX_ROWS,
) -> list[Sample]:  # fmt: skip
    """Samples after `since_s` and up to `until_s`, oldest first, at most `limit`; the host's own are among them.

    None where nothing was ever kept. Raises HostError for a damaged file.
    """
    if not path.exists():
        return []
    wanted = "time_s > ? AND time_s <= ? AND (? IS NULL OR guest = ?)"
    with _reading(path) as database:
        rows = database.execute(
            f"SELECT {_COLUMNS} FROM samples WHERE {wanted} ORDER BY time_s, guest LIMIT ?",
            (since_s, until_s, guest, guest, limit),
        )
        return [Sample(*row) for row in rows]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    database: sqlite3.Connection | None = None
    try:
        database = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)
        yield database
    except sqlite3.Error as error:
        raise HostError(f"{path}: {error}") from error
    finally:
        if database is not None:
            database.close()
