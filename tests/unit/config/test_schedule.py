"""Shares of the host's processors, as users ask for them."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.config import parse_guest, parse_request
from ostler.config.schedule import Schedule, format_cpus
from ostler.errors import BadRequest

HERE = min(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("given_", "shares"),
    [
        ({}, (100, None, 0.0, None)),
        ({"weight": "250", "cap": "25%", "reserve": "10", "pin": "0,2-3"}, (250, 25.0, 10.0, (0, 2, 3))),
        ({"weight": 1, "cap": 150, "reserve": 12.5, "pin": [3, 3, "1"]}, (1, 150.0, 12.5, (1, 3))),
        ({"cap": "none", "reserve": "none", "pin": "none"}, (100, None, 0.0, None)),
    ],
)
def test_shares_in_every_way_they_are_written(given_: dict[str, object], shares: tuple[object, ...]) -> None:
    found = Schedule().changed(**given_)
    assert (found.weight, found.cap, found.reserve, found.pin) == shares


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"weight": 0}, "weight '0': expected 1 to 10000"),
        ({"weight": "10001"}, "weight '10001': expected 1 to 10000"),
        ({"weight": True}, "weight 'True'"),
        ({"weight": "1e3"}, "weight '1e3'"),
        ({"cap": "0"}, "cap '0': expected 1 percent of one host CPU at least, or none"),
        ({"cap": "half"}, "cap 'half': expected percent of one host CPU, such as 25 or 150%"),
        ({"cap": "-5"}, "cap '-5'"),
        ({"cap": "nan"}, "cap 'nan'"),
        ({"reserve": "9999999"}, "reserve '9999999'"),
        ({"pin": ""}, "pin '': expected host CPUs, such as 0,2-3, or none"),
        ({"pin": []}, "pin"),
        ({"pin": "3-1"}, "pin '3-1'"),
        ({"pin": "1024"}, "pin '1024'"),
        ({"pin": [True]}, "pin"),
        ({"cap": 20, "reserve": 30}, "expected a reservation of at most the cap, 20 %, not 30 %"),
        ({"nice": 5}, "nice '5'"),
    ],
)
def test_what_makes_no_sense_is_one_line_naming_it(given_: dict[str, object], message: str) -> None:
    with pytest.raises(BadRequest) as error:
        Schedule().changed(**given_)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@given(st.one_of(st.text(max_size=8), st.lists(st.integers(), max_size=3), st.integers(), st.floats(), st.booleans()))
def test_any_value_is_taken_or_refused_in_one_line(value: object) -> None:
    for name in ("weight", "cap", "reserve", "pin"):
        try:
            Schedule().changed(**{name: value})
        except BadRequest as error:
            assert name in str(error)  # noqa: PT017


def test_change_keeps_what_it_does_not_name() -> None:
    first = Schedule().changed(weight=300, cap=50)
    assert first.changed(cap=None) == Schedule(weight=300)


def test_guest_keeps_its_shares_as_fields_of_its_own() -> None:
    spec = parse_guest(kernel="vmlinuz", cpu_weight="200", cpu_cap=75, cpu_pin="0-1")
    assert spec.schedule == Schedule(weight=200, cap=75.0, pin=(0, 1))
    again = parse_guest(**spec.scheduled(Schedule(reserve=5.0)).model_dump())
    assert again.schedule == Schedule(reserve=5.0)


def test_reservation_is_no_more_than_the_guests_processors_can_use() -> None:
    with pytest.raises(BadRequest, match="at most 100 % for each of its 2 processors, not 201 %"):
        parse_guest(kernel="vmlinuz", cpus=2, cpu_reserve=201)
    with pytest.raises(BadRequest, match=r"^guest: expected a reservation of at most the cap"):
        parse_guest(kernel="vmlinuz", cpu_reserve=20, cpu_cap=10)


def test_request_is_refused_where_the_host_has_no_such_cpu() -> None:
    assert parse_request(image="debian", cpu_pin=[HERE]).treatment["cpu_pin"] == (HERE,)
    with pytest.raises(BadRequest, match="cpu_pin '1023': host CPU 1023 is not one that this process may use"):
        parse_request(image="debian", cpu_pin="1023")


def test_cpus_are_shown_as_they_are_written() -> None:
    assert format_cpus((0, 2, 3, 4, 9)) == "0,2-4,9"
