"""Runs of pages, as sets of pages would have it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ostler.memory.layout import PAGE_SIZE
from ostler.migration.dirty import Run, merged, page_count, split, without

PAGES = st.sets(st.integers(0, 60))


def runs(pages: set[int]) -> list[Run]:
    """Lowest first, as few as there can be."""
    return merged([(page * PAGE_SIZE, 1) for page in pages], [])


def pages(runs: list[Run]) -> list[int]:
    return [gpa // PAGE_SIZE + number for gpa, count in runs for number in range(count)]


@given(one=PAGES, other=PAGES)
def test_merged_runs_are_the_union_and_without_is_the_difference(one: set[int], other: set[int]) -> None:
    assert pages(merged(runs(one), runs(other))) == sorted(one | other)
    assert pages(without(runs(one), runs(other))) == sorted(one - other)


@given(all_of_them=PAGES, wanted=st.integers(0, 70))
def test_split_takes_the_first_pages_and_leaves_the_others(all_of_them: set[int], wanted: int) -> None:
    first, others = split(runs(all_of_them), wanted)
    assert page_count(first) == min(wanted, len(all_of_them))
    assert pages(first) + pages(others) == sorted(all_of_them)
