"""A service without machines, and clients of it in the same process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from argon2 import PasswordHasher
from starlette.testclient import TestClient

from ostler.api.app import create_app
from ostler.api.service import Service
from ostler.hostd.access import Access
from ostler.hostd.audit import Audit
from ostler.hostd.inventory import inventory
from ostler.hostd.models import Role
from ostler.hostd.stats import Statistics
from ostler.planning import history
from tests.unit.hostd.fakes import FakeLauncher, opened

# The real parameters take 64 MiB and tens of milliseconds, on purpose.
QUICK = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


@contextlib.contextmanager
def served(folder: Path, launcher: FakeLauncher | None = None) -> Iterator[Service]:
    """A service over a fake launcher."""
    with opened(folder, launcher or FakeLauncher()) as host, contextlib.closing(Audit(folder)) as audit:
        yield Service(
            host=host, access=Access(host.store, hasher=QUICK), audit=audit, statistics=Statistics(host),
            inventory=inventory(probe=False), peers={0: Role.ADMIN}, certificates={},
            samples=folder / history.FILE,
        )  # fmt: skip


def client(service: Service, role: Role | None) -> TestClient:
    """One with a token of that role; without any credentials for None."""
    headers = {}
    if role is not None:
        name = f"{role.value}-{len(service.access.tokens())}"
        headers = {"authorization": f"Bearer {service.access.make_token(name, role, None).token}"}
    return TestClient(create_app(service), headers=headers, raise_server_exceptions=False)
