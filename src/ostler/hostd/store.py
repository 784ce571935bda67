"""What the service keeps, by subject. Each method is one transaction; `ostler.hostd.database` says what it raises."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError

from ostler.hostd.database import DEFINITIONS, GUESTS, JOBS, TOKENS, Database
from ostler.hostd.models import JobState, JobView, Role

KEPT_JOBS = 2000
_OPEN = (JobState.QUEUED.value, JobState.RUNNING.value)
_ROLES = frozenset(each.value for each in Role)


@dataclass(frozen=True, slots=True)
class Remembered:
    """What is known of a guest beyond its definition."""

    is_wanted: bool = False
    """Whether it was last asked to run."""
    phase: str = ""
    """`launching`, `ready` or nothing: how far its start was."""
    restarts: int = 0
    ending: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A token, by its hash."""

    id: str
    name: str
    role: Role
    hash: str
    created: float
    expires: float | None
    last_used: float | None


class Store:
    """Over an open database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def definitions(self) -> dict[str, dict[str, Any]]:
        """All tables by name, as they were given."""
        with self.database.reading() as connection:
            rows = connection.execute(sa.select(DEFINITIONS.c.name, DEFINITIONS.c.content).order_by(DEFINITIONS.c.name))
            return {row.name: row.content for row in rows}

    def put_definitions(self, tables: dict[str, dict[str, Any]]) -> None:
        """Define them, or define them anew: all or none."""
        now = time.time()
        with self.database.writing() as connection:
            for name, content in tables.items():
                changed = connection.execute(
                    sa.update(DEFINITIONS).where(DEFINITIONS.c.name == name).values(content=content, changed=now)
                )
                if not changed.rowcount:
                    connection.execute(
                        sa.insert(DEFINITIONS).values(name=name, content=content, created=now, changed=now)
                    )

    def drop_definition(self, name: str) -> None:
        """Forget a guest."""
        with self.database.writing() as connection:
            connection.execute(sa.delete(DEFINITIONS).where(DEFINITIONS.c.name == name))
            connection.execute(sa.delete(GUESTS).where(GUESTS.c.name == name))

    def guests(self) -> dict[str, Remembered]:
        """What is remembered of each."""
        with self.database.reading() as connection:
            rows = connection.execute(sa.select(GUESTS))
            return {row.name: _remembered(row) for row in rows}

    def put_guest(self, name: str, known: Remembered) -> None:
        """Remember it."""
        values = {
            "is_wanted": known.is_wanted, "phase": known.phase, "restarts": known.restarts, "ending": known.ending,
        }  # fmt: skip
        with self.database.writing() as connection:
            if not connection.execute(sa.update(GUESTS).where(GUESTS.c.name == name).values(values)).rowcount:
                connection.execute(sa.insert(GUESTS).values(name=name, **values))

    def put_jobs(self, jobs: Sequence[JobView]) -> None:
        """Keep jobs as they are now; the oldest ended ones give way."""
        with self.database.writing() as connection:
            for job in jobs:
                values = {
                    "kind": job.kind, "guest": job.guest, "state": job.state.value, "created": job.created,
                    "content": job.model_dump(mode="json"),
                }  # fmt: skip
                if not connection.execute(sa.update(JOBS).where(JOBS.c.id == job.id).values(values)).rowcount:
                    connection.execute(sa.insert(JOBS).values(id=job.id, **values))
            oldest = sa.select(JOBS.c.id).where(JOBS.c.state.not_in(_OPEN)).order_by(JOBS.c.created.desc())
            connection.execute(sa.delete(JOBS).where(JOBS.c.id.in_(oldest.offset(KEPT_JOBS))))

    def open_jobs(self) -> list[JobView]:
        """Those that had not ended when they were last kept, oldest first."""
        return self._jobs(sa.select(JOBS).where(JOBS.c.state.in_(_OPEN)).order_by(JOBS.c.created))

    def jobs(self, *, guest: str | None, state: JobState | None, limit: int) -> list[JobView]:
        """Newest first."""
        wanted = sa.select(JOBS).order_by(JOBS.c.created.desc()).limit(limit)
        if guest is not None:
            wanted = wanted.where(JOBS.c.guest == guest)
        if state is not None:
            wanted = wanted.where(JOBS.c.state == state.value)
        return self._jobs(wanted)

    def job(self, identifier: str) -> JobView | None:
        """One of them."""
        found = self._jobs(sa.select(JOBS).where(JOBS.c.id == identifier))
        return found[0] if found else None

    def _jobs(self, wanted: sa.Select[Any]) -> list[JobView]:
        with self.database.reading() as connection:
            return [_job(each) for each in connection.execute(wanted)]

    def tokens(self) -> list[Token]:
        """All, oldest first."""
        with self.database.reading() as connection:
            rows = connection.execute(sa.select(TOKENS).order_by(TOKENS.c.created))
            # A role that this Ostler does not know gives no rights.
            return [
                Token(row.id, row.name, Role(row.role), row.hash, row.created, row.expires, row.last_used)
                for row in rows
                if row.role in _ROLES
            ]

    def put_token(self, token: Token) -> None:
        """Keep a new one."""
        with self.database.writing() as connection:
            connection.execute(
                sa.insert(TOKENS).values(
                    id=token.id, name=token.name, role=token.role.value, hash=token.hash, created=token.created,
                    expires=token.expires, last_used=token.last_used,
                )
            )  # fmt: skip

    def touch_token(self, identifier: str, when: float) -> None:
        """It was used."""
        with self.database.writing() as connection:
            connection.execute(sa.update(TOKENS).where(TOKENS.c.id == identifier).values(last_used=when))

    def drop_token(self, identifier: str) -> bool:
        """Forget it; whether there was one."""
        with self.database.writing() as connection:
            return bool(connection.execute(sa.delete(TOKENS).where(TOKENS.c.id == identifier)).rowcount)


def _remembered(row: sa.Row[Any]) -> Remembered:
    ending = row.ending if isinstance(row.ending, dict) else None
    return Remembered(row.is_wanted, row.phase, row.restarts, ending)


def _job(row: sa.Row[Any]) -> JobView:
    try:
        return JobView.model_validate(row.content)
    except ValidationError:
        return JobView(
            id=row.id, kind=row.kind, guest=row.guest, state=JobState.INTERRUPTED, progress=None,
            message="its record cannot be read", created=row.created, started=None, ended=None, by="", result=None,
            problem=None,
        )  # fmt: skip
