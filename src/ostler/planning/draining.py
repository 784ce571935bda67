"""A quick placement without a solver: what runs stays, and the emptiest hosts are emptied one after another.

It is where the search begins, and its answer where there is no time for one. It keeps every rule, but proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ostler.planning.estate import Dimension, Estate, Guest, Host, Placement


class Room:
    """What is left on each host while guests are put there and taken away."""

    def __init__(self, estate: Estate, sizes: tuple[Dimension, ...]) -> None:
        self._estate, self._sizes = estate, sizes
        self.guests: dict[str, dict[str, Guest]] = {host.name: {} for host in estate.hosts}
        self._used = [dict.fromkeys(self.guests, 0) for _ in sizes]

    def fits(self, guest: Guest, host: Host) -> bool:
        """Whether the rules and the room let it come here, beside those that are here."""
        if not self._estate.may_run(guest, host) or not self.has_room(guest, host.name):
            return False
        return not guest.apart or not any(guest.apart & other.apart for other in self.guests[host.name].values())

    def has_room(self, guest: Guest, host: str) -> bool:
        """Whether its needs fit into what is left."""
        return all(
            host not in each.has or used[host] + each.needs[guest.name] <= each.has[host]
            for each, used in zip(self._sizes, self._used, strict=True)
        )

    def put(self, guest: Guest, host: str) -> None:
        """It runs here now."""
        self.guests[host][guest.name] = guest
        self._count(guest, host, 1)

    def take(self, guest: Guest, host: str) -> None:
        """It no longer does."""
        del self.guests[host][guest.name]
        self._count(guest, host, -1)

    def filled(self, host: str) -> float:
        """The fullest resource's share, 0 to 1."""
        return max(
            (used[host] / each.has[host] for each, used in zip(self._sizes, self._used, strict=True)
             if each.has.get(host)), default=0.0,
        )  # fmt: skip

    def placement(self) -> Placement:
        """Guest → host, as it is now."""
        return {guest: host for host, guests in self.guests.items() for guest in guests}

    def _count(self, guest: Guest, host: str, sign: int) -> None:
        for each, used in zip(self._sizes, self._used, strict=True):
            used[host] += sign * each.needs[guest.name]


def drained(estate: Estate, sizes: tuple[Dimension, ...]) -> Placement | None:
    """A placement that keeps all rules, or None where this simple way finds none."""
    room = Room(estate, sizes)
    hosts = {host.name: host for host in estate.hosts}
    largest_first = sorted(estate.guests, key=_size_by(sizes), reverse=True)
    homeless = [
        guest for guest in largest_first
        if guest.host is None or not _put_back(room, guest, hosts[guest.host])
    ]  # fmt: skip
    for guest in homeless:
        if not _place(room, guest, hosts.values()):
            return None
    for host in sorted(estate.hosts, key=lambda each: room.filled(each.name)):
        _empty(room, host, estate.hosts)
    return room.placement()


def _put_back(room: Room, guest: Guest, host: Host) -> bool:
    if not room.fits(guest, host):
        return False
    room.put(guest, host.name)
    return True


def _place(room: Room, guest: Guest, hosts: Iterable[Host]) -> bool:
    """Put it on the fullest host that takes it: best fit."""
    best = max(
        (host for host in hosts if room.fits(guest, host)), key=lambda each: room.filled(each.name), default=None
    )
    if best is None:
        return False
    room.put(guest, best.name)
    return True


def _empty(room: Room, host: Host, hosts: tuple[Host, ...]) -> None:
    """Move everything off this host onto others that are in use, or leave it all as it was."""
    guests = list(room.guests[host.name].values())
    others = [each for each in hosts if each is not host and room.guests[each.name]]
    for guest in guests:
        room.take(guest, host.name)
    placed: list[Guest] = []
    for guest in guests:
        if not _place(room, guest, others):
            break
        placed.append(guest)
    if len(placed) == len(guests):
        return
    where = room.placement()
    for guest in placed:
        room.take(guest, where[guest.name])
    for guest in guests:
        room.put(guest, host.name)


def _size_by(sizes: tuple[Dimension, ...]) -> Callable[[Guest], float]:
    largest = [max(each.has.values(), default=0) or 1 for each in sizes]

    def size(guest: Guest) -> float:
        return max((each.needs[guest.name] / most for each, most in zip(sizes, largest, strict=True)), default=0.0)

    return size
