"""Electricity of placements, by hand."""

from __future__ import annotations

from dataclasses import replace

from ostler.planning.estate import Estate
from ostler.planning.savings import savings
from tests.unit.planning.estates import NO_HEADROOM, guest, host

GIVEN = replace(NO_HEADROOM, pue=1.5, price_per_kwh=0.2, kg_co2_per_kwh=0.5, hours_per_year=1000, off_w=4)


def test_savings_one_of_two_hosts_off_saves_its_idle_power_and_its_cooling() -> None:
    hosts = (host("a", idle_w=100, full_w=200), host("b", idle_w=100, full_w=200))
    estate = Estate(hosts, (guest("x", "a", cpus=1), guest("y", "b", cpus=2)), GIVEN)

    found = savings(estate, {"x": "a", "y": "a"})

    # Before 125 + 150 W; after 175 W and 4 W of the management controller.
    assert (found.before.servers_w, found.after.servers_w) == (275, 179)
    assert (found.before.cooling_w, found.after.cooling_w) == (137.5, 89.5)
    assert (found.servers_kwh, found.cooling_kwh, found.total_kwh) == (96, 48, 144)
    assert round(found.money, 6) == 28.8
    assert found.co2_kg == 72


def test_savings_host_that_is_off_today_saves_nothing() -> None:
    estate = Estate((host("a"), host("b", on=False)), (guest("x", "a"),), GIVEN)

    found = savings(estate, {"x": "a"})

    assert (found.before.hosts_on, found.after.hosts_on, found.total_kwh) == (1, 1, 0)


def test_savings_new_guest_is_load_of_both_sides() -> None:
    estate = Estate((host("a"), host("b", on=False)), (guest("x", "a"), guest("new", None)), GIVEN)

    assert savings(estate, {"x": "a", "new": "a"}).total_kwh == 0


def test_savings_load_above_a_hosts_cpus_draws_no_more_than_full_power() -> None:
    estate = Estate((host("a", cpus=1, idle_w=50, full_w=90),), (guest("x", "a", cpus=5),), GIVEN)

    assert savings(estate, {"x": "a"}).before.servers_w == 90
