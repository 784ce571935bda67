"""The event loop: deadlines from any thread, calls, readers."""

from __future__ import annotations

import os
import threading
import time

from ostler.vmm.loop import EventLoop


def test_timers_fire_in_turn_and_stop_ends_the_loop() -> None:
    fired: list[str] = []
    with EventLoop() as loop:
        first, second, never = loop.new_timer(), loop.new_timer(), loop.new_timer()

        def on_first() -> None:
            fired.append("first")
            second.arm(time.monotonic_ns() + 1)

        def on_second() -> None:
            fired.append("second")
            loop.stop()

        first.call(on_first)
        second.call(on_second)
        never.call(lambda: fired.append("never"))
        never.arm(time.monotonic_ns() + 10**6)
        never.disarm()
        first.arm(0)
        loop.run()
    assert fired == ["first", "second"]


def test_timer_armed_by_another_thread_wakes_a_sleeping_loop() -> None:
    with EventLoop() as loop:
        far, near = loop.new_timer(), loop.new_timer()
        near.call(loop.stop)
        far.arm(time.monotonic_ns() + 10**12)
        thread = threading.Thread(target=lambda: near.arm(1))
        # Started from inside the loop, so that it is about to sleep or asleep.
        loop.call_soon(thread.start)
        loop.run()
        thread.join()
    assert far.deadline_ns is not None


def test_timer_expires_under_its_lock() -> None:
    lock = threading.Lock()
    held: list[bool] = []
    with EventLoop() as loop:
        timer = loop.new_timer(lock=lock)

        def expired() -> None:
            held.append(lock.locked())
            loop.stop()

        timer.call(expired)
        timer.arm(1)
        loop.run()
    assert held == [True]
    assert not lock.locked()


def test_timer_armed_and_disarmed_without_end_keeps_loop_small() -> None:
    with EventLoop() as loop:
        timer = loop.new_timer()
        for number in range(10_000):
            timer.arm(10**18 + number)
            timer.disarm()
        assert loop._timers == [timer]


def test_reader_is_called_until_removed() -> None:
    read, write = os.pipe()
    got: list[bytes] = []
    with EventLoop() as loop:

        def readable() -> None:
            got.append(os.read(read, 1))
            if len(got) == 2:
                loop.remove_reader(read)
                loop.remove_reader(read)
                loop.stop()

        loop.add_reader(read, readable)
        os.write(write, b"abc")
        loop.run()
    os.close(read)
    os.close(write)
    assert got == [b"a", b"b"]
