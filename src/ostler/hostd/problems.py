"""Errors as the API tells them: a status, a class, one line."""

from __future__ import annotations

import dataclasses

from ostler import errors
from ostler.hostd.models import Problem, Refusal

_STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (errors.AdmissionRefused, 409),
    (errors.GuestNotFound, 409),
    (errors.NoSuchImage, 409),
    (errors.BadRequest, 409),
    (errors.DatabaseFull, 507),
    (errors.DatabaseDamaged, 500),
    (errors.CommandTimeout, 504),
    (errors.AgentUnavailable, 504),
    (errors.AgentError, 502),
    (errors.MigrationRefused, 409),
    (errors.DiskBusy, 409),
    (errors.OstlerError, 502),
)


class NotFound(errors.BadRequest):
    """There is no such thing under that path."""


class NotUnderstood(errors.BadRequest):
    """A value was not what was expected."""


def problem_of(error: Exception) -> Problem:
    """What to tell of an error; of a bug, no more than its class."""
    if isinstance(error, NotFound):
        status = 404
    elif isinstance(error, NotUnderstood):
        status = 422
    else:
        status = next((status for kind, status in _STATUSES if isinstance(error, kind)), 500)
    if not isinstance(error, errors.OstlerError):
        return Problem(
            status=500, kind="Internal", message=f"internal error: {type(error).__name__} (a bug of Ostler's)"
        )
    lack = getattr(error, "lack", None)
    refusal = (
        Refusal.model_validate(dataclasses.asdict(lack))
        if dataclasses.is_dataclass(lack) and not isinstance(lack, type)
        else None
    )
    message = " ".join(str(error).split()) or type(error).__name__
    return Problem(status=status, kind=type(error).__name__, message=message, refusal=refusal)
