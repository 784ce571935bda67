"""Which guest gives how much, and which pages become one: without guests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.client.relief import DIGEST_BYTES, NOT_THERE, TO_ZERO, ZERO, Spare, match, plan, relieve
from ostler.errors import BadRequest

MIB = 1 << 20


def digests(text: str) -> bytes:
    """A letter for each page: `.` is not there, `0` is zeroes."""
    special = {".": NOT_THERE, "0": ZERO}
    return b"".join(special.get(letter, letter.encode() * DIGEST_BYTES) for letter in text)


def test_plan_takes_in_proportion_and_leaves_a_quarter_of_what_is_available() -> None:
    spares = [Spare("a", 512 * MIB, 0, 400 * MIB), Spare("b", 512 * MIB, 100 * MIB, 200 * MIB)]
    kept = plan(spares, 1 << 40)
    assert kept == {"a": 212 * MIB, "b": 262 * MIB}
    half = plan(spares, 225 * MIB)
    assert half == {"a": 362 * MIB, "b": 337 * MIB}


@pytest.mark.parametrize("available", [None, 0, 32 * MIB])
def test_plan_takes_nothing_from_a_guest_that_has_nothing_to_spare(available: int | None) -> None:
    assert plan([Spare("a", 64 * MIB, 0, available)], MIB) == {}


def test_plan_without_need_is_empty() -> None:
    assert plan([Spare("a", 512 * MIB, 0, 400 * MIB)], 0) == {}


def test_match_finds_what_guests_have_in_common_and_who_donates_it() -> None:
    found = match({"a": digests("xyz.q00"), "b": digests("..xyzr0")})
    assert found.pages == 3
    assert found.donate == {"a": [(0, 0, 3)]}
    assert found.merge == {"a": [(0, 0, 3), (5, TO_ZERO, 2)], "b": [(2, 0, 3), (6, TO_ZERO, 1)]}


def test_match_within_one_guest_counts_too() -> None:
    found = match({"a": digests("xqx")})
    assert (found.pages, found.merge["a"]) == (1, [(0, 0, 1), (2, 0, 1)])


def test_match_keeps_the_longest_runs_where_there_are_too_many() -> None:
    found = match({"a": digests("xyz.x"), "b": digests("z.xyz")}, max_runs=1)
    assert found.merge == {"a": [(0, 0, 3)], "b": [(2, 0, 3)]}


PAGES = st.text(alphabet="ab0.cd", min_size=0, max_size=40)


@given(st.dictionaries(st.sampled_from("klm"), PAGES, min_size=1))
def test_match_never_maps_a_page_to_another_content(guests: dict[str, str]) -> None:
    found = match({name: digests(text) for name, text in guests.items()})
    common: dict[int, str] = {}
    for name, runs in found.donate.items():
        for page, target, count in runs:
            for each in range(count):
                assert common.setdefault(target + each, guests[name][page + each]) == guests[name][page + each]
    assert sorted(common) == [*range(found.pages)]
    for name, runs in found.merge.items():
        touched = []
        for page, source, count in runs:
            for each in range(count):
                expected = "0" if source == TO_ZERO else common[source + each]
                assert guests[name][page + each] == expected
                touched.append(page + each)
        assert len(touched) == len(set(touched))


def test_relieve_with_an_unknown_step_asks_nobody() -> None:
    with pytest.raises(BadRequest, match="step 'magic'"):
        relieve([], need_bytes=1, steps=["magic"])
