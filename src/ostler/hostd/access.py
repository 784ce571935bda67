"""Who may do what: tokens as argon2id hashes, roles of users and certificates, sessions of browsers.

A token is `ostler_ID_SECRET`. Its secret is 256 random bits, so nobody guesses it; argon2 guards the database that was
copied. One verification costs tens of milliseconds, so what was verified is remembered for a while, by a keyed hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from ostler.errors import BadRequest, OstlerError
from ostler.hostd.models import Caller, NewToken, Role, TokenView
from ostler.hostd.store import Store, Token

PREFIX = "ostler"
REMEMBERED_FOR_S, MAX_REMEMBERED = 60.0, 1024
SESSION_S, MAX_SESSIONS = 12 * 3600.0, 1024
USED_EVERY_S = 3600.0
# Verifications at a time: each takes 64 MiB, and whoever tries tokens must not take the host.
AT_A_TIME = 2


class Access:
    """Tokens and sessions. Any thread; `caller_of_token` may take tens of milliseconds."""

    def __init__(self, store: Store, *, hasher: PasswordHasher | None = None, clock: Callable[[], float] = time.time):
        self._store, self._clock = store, clock
        self._hasher = hasher or PasswordHasher()
        self._key = secrets.token_bytes(32)
        self._verified: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._sessions: OrderedDict[str, tuple[Caller, str, float]] = OrderedDict()
        self._lock = threading.Lock()
        self._turns = threading.BoundedSemaphore(AT_A_TIME)
        self._tokens = {each.id: each for each in store.tokens()}

    def make_token(self, name: str, role: Role, expires_in_s: float | None) -> NewToken:
        """A new token; only now does anybody see it. Raises BadRequest for a name in use."""
        with self._lock:
            if any(each.name == name for each in self._tokens.values()):
                raise BadRequest(f"token {name!r}: is there already; expected another name")
            identifier, secret = secrets.token_hex(6), secrets.token_hex(32)
            now = self._clock()
            expires = now + expires_in_s if expires_in_s is not None else None
            token = Token(identifier, name, role, self._hasher.hash(secret), now, expires, None)
            self._store.put_token(token)
            self._tokens[identifier] = token
        return NewToken(token=f"{PREFIX}_{identifier}_{secret}", view=view_of(token))

    def tokens(self) -> list[TokenView]:
        """All, without their secrets."""
        return [view_of(each) for each in self._store.tokens()]

    def drop_token(self, identifier: str) -> bool:
        """The token is worth nothing from now on, nor are sessions begun with it; whether there was one."""
        found = self._store.drop_token(identifier)
        with self._lock:
            self._tokens.pop(identifier, None)
            self._verified.clear()
            for key in [key for key, (_, token, _) in self._sessions.items() if token == identifier]:
                del self._sessions[key]
        return found

    def known_token(self, text: str) -> Caller | None:
        """Who has the token, if it was verified a moment ago: no more than a look."""
        with self._lock:
            found = self._verified.get(self._digest(text))
            if found is None or found[1] < self._clock():
                return None
            return self._caller(found[0])

    def caller_of_token(self, text: str) -> Caller | None:
        """Who has the token; None for one that is not one, or not any more."""
        if (known := self.known_token(text)) is not None:
            return known
        prefix, _, rest = text.partition("_")
        identifier, _, secret = rest.partition("_")
        token = self._tokens.get(identifier)
        if prefix != PREFIX or token is None or not secret:
            return None
        with self._turns:
            try:
                self._hasher.verify(token.hash, secret)
            except (Argon2Error, InvalidHashError):
                return None
        with self._lock:
            self._verified[self._digest(text)] = identifier, self._clock() + REMEMBERED_FOR_S
            while len(self._verified) > MAX_REMEMBERED:
                self._verified.popitem(last=False)
            found = self._caller(identifier)
        self._note_use(identifier)
        return found

    def begin_session(self, token: str) -> tuple[str, Caller] | None:
        """A session for a browser; its secret and who it is."""
        caller = self.caller_of_token(token)
        if caller is None:
            return None
        key = secrets.token_hex(32)
        session = Caller(name=caller.name, role=caller.role, by="session")
        with self._lock:
            self._sessions[key] = session, token.split("_")[1], self._clock() + SESSION_S
            while len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return key, session

    def caller_of_session(self, key: str) -> Caller | None:
        """Whose session it is, if it has not ended."""
        with self._lock:
            found = self._sessions.get(key)
            if found is None or found[2] < self._clock() or self._caller(found[1]) is None:
                return None
            return found[0]

    def end_session(self, key: str) -> None:
        """It is worth nothing from now on."""
        with self._lock:
            self._sessions.pop(key, None)

    def _caller(self, identifier: str) -> Caller | None:
        token = self._tokens.get(identifier)
        if token is None or (token.expires is not None and token.expires <= self._clock()):
            return None
        return Caller(name=f"token {token.name}", role=token.role, by="token")

    def _digest(self, text: str) -> bytes:
        return hmac.digest(self._key, text.encode(errors="replace"), hashlib.sha256)

    def _note_use(self, identifier: str) -> None:
        token, now = self._tokens.get(identifier), self._clock()
        if token is not None and now - (token.last_used or 0) > USED_EVERY_S:
            # A database that is full keeps nobody out.
            with contextlib.suppress(OstlerError):
                self._store.touch_token(identifier, now)


def view_of(token: Token) -> TokenView:
    """Without the hash."""
    return TokenView(
        id=token.id, name=token.name, role=token.role, created=token.created, expires=token.expires,
        last_used=token.last_used,
    )  # fmt: skip
