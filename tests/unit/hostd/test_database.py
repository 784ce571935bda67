"""The database: damaged, full, another's, another version's."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from ostler.errors import DatabaseDamaged, DatabaseFull, HostError
from ostler.hostd.database import TOKENS, VERSION, Database, StateFolder, migrations, recover, revisions
from ostler.hostd.models import Role
from ostler.hostd.store import Store, Token


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Store]:
    with StateFolder(path) as folder, contextlib.closing(Database(folder)) as database:
        yield Store(database)


def test_state_folder_second_service_is_refused(tmp_path: Path) -> None:
    with StateFolder(tmp_path), pytest.raises(HostError, match="another service has it"):
        StateFolder(tmp_path)


def test_database_keeps_what_was_put(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put_definitions({"db": {"image": "debian"}})
        store.put_definitions({"db": {"image": "debian:13"}})
    with opened(tmp_path) as store:
        assert store.definitions() == {"db": {"image": "debian:13"}}
    assert (tmp_path / "host.db").stat().st_mode & 0o777 == 0o600


def test_database_full_write_changes_nothing_and_says_so(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put_definitions({"small": {"image": "debian"}})
        store.database.limit_pages(1)
        with pytest.raises(DatabaseFull, match="no space left on its disk; nothing was changed"):
            store.put_definitions({"large": {"append": "x" * 200_000}})
        assert list(store.definitions()) == ["small"]
        store.database.limit_pages(0)
        store.put_definitions({"large": {"append": "x" * 200_000}})
        assert sorted(store.definitions()) == ["large", "small"]


def test_database_damaged_is_refused_with_the_way_out_and_recovered(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put_definitions({"db": {"image": "debian"}})
        store.database.back_up()
    (tmp_path / "host.db").write_bytes(b"rubbish" * 1000)

    with pytest.raises(DatabaseDamaged, match="guests run on; `ostler host recover`"), opened(tmp_path):
        pass
    with StateFolder(tmp_path) as folder:
        assert "those of the last whole copy" in recover(folder)
    with opened(tmp_path) as store:
        assert list(store.definitions()) == ["db"]
    assert len([*tmp_path.glob("host.db.damaged-*")]) == 1


def test_database_page_damaged_in_the_middle_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        store.put_definitions({f"guest-{number}": {"append": "x" * 3000} for number in range(50)})
    with (tmp_path / "host.db").open("r+b") as file:
        file.seek(4096 * 8)
        file.write(b"\xff" * 4096 * 4)

    with pytest.raises(DatabaseDamaged), opened(tmp_path):
        pass


def test_recover_whole_database_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    with StateFolder(tmp_path) as folder, pytest.raises(HostError, match="is whole"):
        recover(folder)


def test_version_is_the_newest_there_is() -> None:
    assert revisions(migrations())[0] == VERSION


def test_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    with contextlib.closing(sqlite3.connect(tmp_path / "host.db")) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
        raw.commit()

    with pytest.raises(HostError, match="of version 9999, which this Ostler does not know"), opened(tmp_path):
        pass


def test_store_token_of_an_unknown_role_is_nobodys(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        for name, role in (("good", "viewer"), ("odd", "emperor")):
            store.put_token(Token(name, name, Role.VIEWER, "hash", 0.0, None, None))
            with store.database.writing() as connection:
                connection.execute(sa.update(TOKENS).where(TOKENS.c.id == name).values(role=role))
        assert [each.name for each in store.tokens()] == ["good"]
