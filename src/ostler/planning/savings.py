"""What a placement costs in electricity, and so what a plan saves: a linear model with its assumptions in the open.

A host that is on draws `idle_w` plus, for each of its CPUs kept busy on the average, an equal part of the way to
`full_w`; one that is off draws `off_w`. Cooling and distribution take (PUE - 1) watts for each of those.
"""

from __future__ import annotations

from dataclasses import dataclass

from ostler.planning.estate import Assumptions, Estate, Host, Placement, hosts_used


@dataclass(frozen=True, slots=True)
class Draw:
    """Electric power of a whole placement."""

    hosts_on: int
    servers_w: float
    cooling_w: float

    @property
    def total_w(self) -> float:
        """Servers and cooling."""
        return self.servers_w + self.cooling_w


@dataclass(frozen=True, slots=True)
class Savings:
    """Two placements compared; figures of a year."""

    before: Draw
    after: Draw
    servers_kwh: float
    cooling_kwh: float
    money: float
    co2_kg: float

    @property
    def total_kwh(self) -> float:
        """Servers and cooling."""
        return self.servers_kwh + self.cooling_kwh


def savings(estate: Estate, placement: Placement) -> Savings:
    """Compare today, hosts that are on without a guest included, with the plan, whose unused hosts are off.

    Guests that run nowhere today are load of both, so that the comparison is one of places alone.
    """
    given = estate.assumptions
    today = {guest.name: guest.host or placement[guest.name] for guest in estate.guests}
    on_today = {host.name for host in estate.hosts if host.on} | hosts_used(today)
    before = draw(estate, today, on_today)
    after = draw(estate, placement, set(hosts_used(placement)))
    servers, cooling = (
        _kwh(before.servers_w - after.servers_w, given), _kwh(before.cooling_w - after.cooling_w, given),
    )  # fmt: skip
    total = servers + cooling
    return Savings(before, after, servers, cooling, total * given.price_per_kwh, total * given.kg_co2_per_kwh)


def draw(estate: Estate, placement: Placement, on: set[str]) -> Draw:
    """Power with these hosts on and the others off."""
    busy = dict.fromkeys((host.name for host in estate.hosts), 0.0)
    for guest in estate.guests:
        busy[placement[guest.name]] += guest.mean_cpus
    servers = sum(
        _host_w(host, busy[host.name]) if host.name in on else min(estate.assumptions.off_w, host.idle_w)
        for host in estate.hosts
    )
    return Draw(len(on), servers, servers * (estate.assumptions.pue - 1))


def _host_w(host: Host, busy_cpus: float) -> float:
    share = min(1.0, busy_cpus / host.has.cpus)
    return host.idle_w + (host.full_w - host.idle_w) * share


def _kwh(watts: float, given: Assumptions) -> float:
    return watts * given.hours_per_year / 1000
