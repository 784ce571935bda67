"""Who asks: roles, tokens, what they did."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from ostler.hostd.definition import GuestName, Seconds
from ostler.hostd.models.base import View, Wish


class Role(StrEnum):
    """What a caller may do. Each may do what those before it may."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def allows(self, wanted: Role) -> bool:
        """Whether this role is enough where `wanted` is asked for."""
        order = list(Role)
        return order.index(self) >= order.index(wanted)


class Caller(View):
    """Who asks, as the service knows it."""

    name: str
    """`uid 1000`, `token ci`, `certificate alice`."""
    role: Role
    by: Literal["peer", "token", "certificate", "session"]


class SessionWish(Wish):
    token: Annotated[str, Field(max_length=200)]


class TokenWish(Wish):
    name: GuestName
    role: Role
    expires_in_s: Seconds | None = None


class TokenView(View):
    """A token without its secret."""

    id: str
    name: str
    role: Role
    created: float
    expires: float | None
    last_used: float | None


class NewToken(View):
    token: str
    """Shown once; the service keeps a hash."""
    view: TokenView


class TokenList(View):
    tokens: list[TokenView]


class AuditEntry(View):
    """One request that changed something, or was refused for who asked it."""

    time: float
    caller: str
    role: str | None
    address: str
    method: str
    path: str
    status: int
    detail: str


class AuditList(View):
    entries: list[AuditEntry]
