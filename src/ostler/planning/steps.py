"""The order of a plan's moves: no move may overfill its target, so some have to wait for others.

Where guests would have to change places, one of them makes a stop on a third host with room. What even that does not
resolve is said: those moves need a stop of the guest, or a host more for a while.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ostler.planning.draining import Room
from ostler.planning.estate import Dimension, Estate, Guest, Host, Placement, dimensions, moves

Kind = Literal["move", "detour", "blocked", "start"]


@dataclass(frozen=True, slots=True)
class Step:
    """One move. `detour` brings the guest out of the way; another step brings it to its place."""

    kind: Kind
    guest: Guest
    source: str | None
    target: str

    @property
    def sent_bytes(self) -> int:
        """What it sends; nothing for a guest that does not run yet."""
        return 0 if self.source is None else self.guest.moved_bytes


def ordered(estate: Estate, placement: Placement) -> list[Step]:
    """Moves in an order in which each target has room, headroom included, when its guest arrives."""
    sequence = _Sequence(estate, placement)
    sequence.run()
    return sequence.steps


class _Sequence:
    def __init__(self, estate: Estate, placement: Placement) -> None:
        sizes: tuple[Dimension, ...] = dimensions(estate)
        self._hosts = {host.name: host for host in estate.hosts}
        self._placement = placement
        self._room = Room(estate, sizes)
        self._where = estate.today()
        for guest in estate.guests:
            if guest.host is not None:
                self._room.put(guest, guest.host)
        # Large guests first: small ones fit in afterwards.
        self._waiting = sorted(moves(estate, placement), key=lambda guest: guest.moved_bytes, reverse=True)
        self._new = [guest for guest in estate.guests if guest.host is None]
        self._detoured: set[str] = set()
        self.steps: list[Step] = []

    def run(self) -> None:
        while self._waiting:
            if not self._move_what_fits() and not self._make_a_detour():
                break
        for guest in self._waiting:
            self._go(guest, self._placement[guest.name], "blocked")
        for guest in self._new:
            self._go(guest, self._placement[guest.name], "start")

    def _move_what_fits(self) -> bool:
        for guest in self._waiting:
            target = self._hosts[self._placement[guest.name]]
            if self._room.fits(guest, target):
                self._waiting.remove(guest)
                self._go(guest, target.name, "move")
                return True
        return False

    def _make_a_detour(self) -> bool:
        """Bring the smallest guest that can leave out of the others' way; each at most once, so this ends."""
        for guest in reversed(self._waiting):
            if guest.name in self._detoured or guest.pinned:
                continue
            spare = next((host for host in self._hosts.values() if self._may_stop_at(guest, host)), None)
            if spare is not None:
                self._detoured.add(guest.name)
                self._go(guest, spare.name, "detour")
                return True
        return False

    def _may_stop_at(self, guest: Guest, host: Host) -> bool:
        return host.name != self._where[guest.name] and self._room.fits(guest, host)

    def _go(self, guest: Guest, target: str, kind: Kind) -> None:
        source = self._where.get(guest.name)
        if source is not None:
            self._room.take(guest, source)
        self._room.put(guest, target)
        self._where[guest.name] = target
        self.steps.append(Step(kind, guest, source, target))
