"""What the kernel says of threads of this process."""

from __future__ import annotations

import os
import threading

from ostler.host.threads import IdleTimes, RunDelay, cpu_time_ns, pin, usable_cpus

# Linux numbers threads up to 2^22.
NO_THREAD = 2**22 + 1


def test_cpu_time_of_a_thread_grows_with_its_work_and_is_zero_where_there_is_none() -> None:
    tid = threading.get_native_id()
    before = cpu_time_ns(tid)
    assert sum(number * number for number in range(10_000)) > 0
    assert cpu_time_ns(tid) > before
    assert cpu_time_ns(NO_THREAD) == 0


def test_run_delay_counts_up_and_is_unknown_for_no_thread() -> None:
    delay = RunDelay(threading.get_native_id())
    first = delay.read_ns()
    assert first is None or delay.read_ns() >= first  # type: ignore[operator]
    delay.close()
    delay.close()
    assert delay.read_ns() is None
    assert RunDelay(2**30).read_ns() is None


def test_thread_is_pinned_to_what_is_there_and_to_nothing_else() -> None:
    tid, before = threading.get_native_id(), os.sched_getaffinity(0)
    try:
        assert pin(tid, {min(usable_cpus())})
        assert os.sched_getaffinity(tid) == {min(before)}
        assert not pin(tid, {1023})
    finally:
        os.sched_setaffinity(tid, before)
    assert pin(NO_THREAD, before)


def test_idle_times_are_those_of_single_cpus() -> None:
    text = b"cpu  10 0 10 300 7 0 0 0 0 0\ncpu0 5 0 5 100 3 0 0\ncpu12 5 0 5 200 4 0 0\nintr 5 0 0 0 0 0 0\nctxt 7\n"
    tick_ns = 10**9 // os.sysconf("SC_CLK_TCK")
    assert IdleTimes().parse(text) == {0: 103 * tick_ns, 12: 204 * tick_ns}
    assert IdleTimes().parse(b"") == {}
