"""The service's database: SQLite with a write-ahead log, in a state folder that one service at a time uses.

    <state>/lock          held (flock) by the service
    <state>/host.db       definitions, jobs, tokens
    <state>/host.backup.db   the last that was whole, with the definitions and tokens of then
    <state>/usage.sqlite  samples (`ostler.planning.history`)
    <state>/audit.log     who changed what

Guests do not depend on it: a damaged database is refused, and they run on. A write that finds no space changes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import sqlalchemy as sa
from sqlalchemy import event, exc

from ostler.errors import DatabaseDamaged, DatabaseFull, HostError

if TYPE_CHECKING:
    from alembic.config import Config

LOCK, DATABASE, BACKUP = "lock", "host.db", "host.backup.db"
BUSY_TIMEOUT_S = 10
MIGRATIONS = "ostler.hostd:migrations"
# The newest of them: a database that has it is not looked at by Alembic, which takes half a second to read.
VERSION = "0002"
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}

metadata = sa.MetaData()
META = sa.Table("meta", metadata, sa.Column("name", sa.Text, primary_key=True), sa.Column("value", sa.Text))
DEFINITIONS = sa.Table(
    "definitions", metadata, sa.Column("name", sa.Text, primary_key=True), sa.Column("content", sa.JSON),
    sa.Column("created", sa.Float), sa.Column("changed", sa.Float),
)  # fmt: skip
GUESTS = sa.Table(
    "guests", metadata, sa.Column("name", sa.Text, primary_key=True), sa.Column("is_wanted", sa.Boolean),
    sa.Column("phase", sa.Text), sa.Column("restarts", sa.Integer), sa.Column("ending", sa.JSON(none_as_null=True)),
)  # fmt: skip
JOBS = sa.Table(
    "jobs", metadata, sa.Column("id", sa.Text, primary_key=True), sa.Column("kind", sa.Text),
    sa.Column("guest", sa.Text), sa.Column("state", sa.Text), sa.Column("created", sa.Float),
    sa.Column("content", sa.JSON),
)  # fmt: skip
TOKENS = sa.Table(
    "tokens", metadata, sa.Column("id", sa.Text, primary_key=True), sa.Column("name", sa.Text),
    sa.Column("role", sa.Text), sa.Column("hash", sa.Text), sa.Column("created", sa.Float),
    sa.Column("expires", sa.Float), sa.Column("last_used", sa.Float),
)  # fmt: skip


class StateFolder:
    """The folder, held by this process until closed; a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises HostError where another service has it, or it cannot be had."""
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)
            self._fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostError(f"state folder {path}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._fd, 32).decode(errors="replace").strip()
            os.close(self._fd)
            raise HostError(
                f"state folder {path}: another service has it{f' (process {holder})' if holder else ''}; "
                "expected one service for each folder"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    @property
    def database(self) -> Path:
        return self.path / DATABASE

    @property
    def backup(self) -> Path:
        return self.path / BACKUP

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


class Database:
    """Opened, whole, and of this version; a context manager. Any thread."""

    def __init__(self, folder: StateFolder) -> None:
        """Raises DatabaseDamaged, DatabaseFull, HostError for one that a newer Ostler made."""
        self._folder = folder
        self._writing = threading.RLock()
        self._engine = sa.create_engine(
            f"sqlite:///{folder.database}",
            connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
            json_deserializer=_content,
        )
        event.listen(self._engine, "connect", _prepare)
        try:
            self._check()
            self._migrate()
        except BaseException:
            self._engine.dispose()
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection to read with."""
        with self._explained(), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction: all of it, or an exception and nothing. Raises DatabaseFull, DatabaseDamaged, HostError."""
        with self._writing, self._explained(), self._engine.begin() as connection:
            yield connection

    def meta(self, name: str) -> str | None:
        """A value of the service's own."""
        with self.reading() as connection:
            value: str | None = connection.scalar(sa.select(META.c.value).where(META.c.name == name))
            return value

    def set_meta(self, name: str, value: str) -> None:
        """Keep it."""
        with self.writing() as connection:
            connection.execute(sa.delete(META).where(META.c.name == name))
            connection.execute(sa.insert(META).values(name=name, value=value))

    def back_up(self) -> None:
        """Put a whole copy aside, in place of the one before. A full disk leaves that one."""
        part = self._folder.backup.with_suffix(".part")
        with self._writing, contextlib.suppress(sqlite3.Error, OSError):
            part.unlink(missing_ok=True)
            with (
                contextlib.closing(sqlite3.connect(self._folder.database)) as ours,
                contextlib.closing(sqlite3.connect(part)) as copy,
            ):
                ours.backup(copy)
            part.chmod(0o600)
            part.rename(self._folder.backup)

    def limit_pages(self, pages: int) -> None:
        """Let the file grow to so many pages: how tests fill its disk. 0 lifts it."""
        with self._writing:
            self._engine.dispose()
            event.listen(self._engine, "connect", lambda raw, _record: _limit(raw, pages))

    def close(self) -> None:
        self._engine.dispose()

    def _check(self) -> None:
        path = self._folder.database
        existed = path.exists()
        with self._explained(), self._engine.connect() as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if not existed:
            path.chmod(0o600)
        if found != "ok":
            raise damaged(path, str(found))

    def _migrate(self) -> None:
        with self.reading() as connection:
            version = None
            if sa.inspect(connection).has_table("alembic_version"):
                version = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        if version == VERSION:
            return
        from alembic import command

        config = migrations()
        if version is not None and version not in revisions(config):
            raise HostError(
                f"database {self._folder.database}: of version {version}, which this Ostler does not know; "
                "expected one that it or an older one has made"
            )
        with self.writing() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except exc.DBAPIError as error:
            raise self._explain(error) from error

    def _explain(self, error: exc.DBAPIError) -> HostError:
        path, code = self._folder.database, getattr(error.orig, "sqlite_errorcode", 0)
        if code & 0xFF in _DAMAGED:
            return damaged(path, str(error.orig))
        if code & 0xFF == sqlite3.SQLITE_FULL or (code & 0xFF == sqlite3.SQLITE_IOERR and _is_full(path.parent)):
            return DatabaseFull(f"database {path}: no space left on its disk; nothing was changed")
        return HostError(f"database {path}: {error.orig}")


def migrations() -> Config:
    """Alembic's way to the versions."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", MIGRATIONS)
    config.set_main_option("path_separator", "os")
    return config


def revisions(config: Config) -> list[str]:
    """All there are, newest first."""
    from alembic.script import ScriptDirectory

    return [each.revision for each in ScriptDirectory.from_config(config).walk_revisions()]


def damaged(path: Path, what: str) -> DatabaseDamaged:
    """The refusal, with the way out."""
    said = " ".join(what.split())[:120]
    return DatabaseDamaged(
        f"database {path}: damaged ({said}); guests run on; `ostler host recover` puts it aside and goes on from "
        "the last whole copy"
    )


def recover(folder: StateFolder) -> str:
    """Put a damaged database aside, and its last whole copy in its place; what was done, in one line.

    Raises HostError where the database is whole.
    """
    try:
        with contextlib.closing(Database(folder)):
            raise HostError(f"database {folder.database}: is whole; expected a damaged one")
    except DatabaseDamaged:
        pass
    aside = folder.path / f"{DATABASE}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    folder.database.rename(aside)
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            folder.database.with_name(DATABASE + suffix).rename(aside.with_name(aside.name + suffix))
    if _is_whole(folder.backup):
        folder.database.write_bytes(folder.backup.read_bytes())
        folder.database.chmod(0o600)
        return f"{aside} put aside; definitions and tokens are those of the last whole copy"
    return f"{aside} put aside; there is no whole copy, guests have to be defined anew"


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as opened:
            return bool(opened.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
    except sqlite3.Error:
        return False


def _prepare(raw: Any, _record: object) -> None:
    # Power may fail at any time: what was answered with "done" is on the disk.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        raw.execute(f"PRAGMA {pragma}")


def _content(text: str) -> Any:
    # What is not JSON is one broken row, which whoever reads it tells as such: the others are read on.
    try:
        return json.loads(text)
    except ValueError:
        return None


def _limit(raw: Any, pages: int) -> None:
    raw.execute(f"PRAGMA max_page_count={pages or 1 << 30}")


def _is_full(folder: Path) -> bool:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize < 1 << 20
