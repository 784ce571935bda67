"""Whether a placement keeps every rule: written from docs/planning.md and not from the solver's model.

It computes with exact fractions of the estate's own units, so a rounding of the model's cannot hide in it.
Every plan passes here before anybody sees it.
"""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

from ostler.planning.estate import Estate, Guest, Host, Placement


def violations(estate: Estate, placement: Placement) -> list[str]:
    """One line for each broken rule; none for a placement that may be."""
    hosts = {host.name: host for host in estate.hosts}
    found: list[str] = []
    on_host: dict[str, list[Guest]] = defaultdict(list)
    for guest in estate.guests:
        where = placement.get(guest.name)
        if where is None or where not in hosts:
            found.append(f"guest {guest.name!r}: placed on {where!r}, which is no host")
            continue
        on_host[where].append(guest)
        found += _of_guest(guest, hosts[where])
    for name, guests in on_host.items():
        found += _too_full(estate, hosts[name], guests) + _too_close(name, guests)
    return found


def _of_guest(guest: Guest, host: Host) -> list[str]:
    found = []
    if host.drain:
        found.append(f"guest {guest.name!r}: on {host.name!r}, which is to be empty")
    if guest.pinned and guest.host != host.name:
        found.append(f"guest {guest.name!r}: pinned to {guest.host!r}, placed on {host.name!r}")
    if guest.only_on is not None and host.name not in guest.only_on:
        found.append(f"guest {guest.name!r}: not allowed on {host.name!r}")
    if lacks := sorted(guest.capabilities - host.capabilities):
        found.append(f"guest {guest.name!r}: {host.name!r} lacks {', '.join(lacks)}")
    return found


def _too_full(estate: Estate, host: Host, guests: list[Guest]) -> list[str]:
    given = estate.assumptions
    overhead = given.guest_overhead_bytes * len(guests)
    rows: list[tuple[str, float | None, float, list[float | None], int]] = [
        ("CPUs", host.has.cpus, given.headroom_cpu, [guest.needs.cpus for guest in guests], 0),
        ("bytes of memory", host.has.memory_bytes, given.headroom_memory,
         [guest.needs.memory_bytes for guest in guests], overhead),
        ("bytes of disk", host.has.disk_bytes, given.headroom_disk, [guest.needs.disk_bytes for guest in guests], 0),
        ("bit/s", host.has.network_bits_per_s, given.headroom_network,
         [guest.needs.network_bits_per_s for guest in guests], 0),
    ]  # fmt: skip
    found = []
    for what, has, headroom, asked, extra in rows:
        if has is None:
            continue
        may = Fraction(str(has)) * (1 - Fraction(str(headroom)))
        used = sum((Fraction(str(each or 0)) for each in asked), Fraction(extra))
        if used > may:
            found.append(f"host {host.name!r}: {float(used):g} {what} used of {float(may):g}")
    return found


def _too_close(host: str, guests: list[Guest]) -> list[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for guest in guests:
        for group in guest.apart:
            groups[group].append(guest.name)
    return [
        f"host {host!r}: {', '.join(names)} are to be apart ({group})"
        for group, names in sorted(groups.items())
        if len(names) > 1
    ]
