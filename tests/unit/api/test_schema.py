"""schemathesis: requests made of the API's own description, right ones and wrong ones, and answers held against it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from ostler.api.app import build, create_app
from ostler.api.service import Service
from ostler.hostd.models import Role
from tests.unit.api.fakes import served
from tests.unit.api.test_access import CASES
from tests.unit.hostd.fakes import guest

# More of them find more: OSTLER_EXAMPLES=100 takes some minutes.
EXAMPLES = int(os.environ.get("OSTLER_EXAMPLES", "4"))
# Names that no guest has, and tables no schema can say all about, are refused by routes that understand them; who may
# use a route is test_access.py's.
EXCLUDED = [checks.positive_data_acceptance, checks.ignored_auth]
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    # The snapshots and images that the routes list are this module's own: none.
    patch = pytest.MonkeyPatch()
    for name in ("OSTLER_DATA", "OSTLER_CACHE", "OSTLER_RUNTIME"):
        patch.setenv(name, str(tmp_path_factory.mktemp("empty")))
    with served(tmp_path_factory.mktemp("state")) as found:
        found.host.define([guest("db"), guest("web", depends_on=["db"])], replace=False)
        yield found
    patch.undo()


@pytest.fixture(scope="module")
def schema(service: Service) -> Any:
    token = service.access.make_token("schemathesis", Role.ADMIN, None).token
    loaded = schemathesis.openapi.from_dict(build(service).openapi())
    loaded.app = create_app(service)
    return loaded, {"authorization": f"Bearer {token}"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("method", "path"), [(method, path) for method, path, _ in CASES])
def test_operation_answers_as_it_is_described(schema: Any, method: str, path: str, mode: GenerationMode) -> None:
    loaded, headers = schema
    operation = loaded[path][method.lower()]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        case.call_and_validate(headers=headers, excluded_checks=EXCLUDED)

    try:
        check()
    except Unsatisfiable:
        # What takes nothing cannot be asked wrongly.
        assert mode is GenerationMode.NEGATIVE
