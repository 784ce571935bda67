"""The token bucket, with time moved by hand."""

from __future__ import annotations

from ostler.devices.virtio.rate_limit import RateLimit
from ostler.testing.fakes import FakeClock, FakeTimer


def test_bytes_that_pass_in_a_second_are_the_rate() -> None:
    clock, timer = FakeClock(), FakeTimer()
    limit = RateLimit(100_000, clock=clock, timer=timer, burst_bytes=1000)
    passed = 0
    resumed: list[int] = []
    while clock.now_ns < 10**9:
        if limit.ready(lambda: resumed.append(clock.now_ns)):
            limit.spend(700)
            passed += 700
        else:
            assert timer.deadline_ns is not None
            clock.now_ns = timer.deadline_ns
            limit.expired()

    assert 100_000 <= passed <= 102_000
    assert len(resumed) > 100


def test_item_larger_than_the_bucket_passes_and_the_next_waits() -> None:
    clock, timer = FakeClock(), FakeTimer()
    limit = RateLimit(1000, clock=clock, timer=timer, burst_bytes=10)

    assert limit.ready(_nothing)
    limit.spend(2000)
    assert not limit.ready(_nothing)
    assert timer.deadline_ns is not None
    assert 1.98e9 < timer.deadline_ns < 2.01e9


def test_reset_forgets_who_waited() -> None:
    timer = FakeTimer()
    limit = RateLimit(1000, clock=FakeClock(), timer=timer, burst_bytes=1)
    resumed: list[bool] = []
    limit.spend(100)
    limit.ready(lambda: resumed.append(True))

    limit.reset()
    limit.expired()

    assert not resumed
    assert timer.deadline_ns is None


def _nothing() -> None:
    """Nobody waits."""
