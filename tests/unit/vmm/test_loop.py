"""The event loop: deadlines from any thread, calls, readers."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

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


def test_writer_and_reader_of_one_descriptor_are_told_apart() -> None:
    here, there = socket.socketpair()
    seen: list[str] = []
    with EventLoop() as loop, here, there:

        def writable() -> None:
            seen.append("write")
            loop.remove_writer(here.fileno())
            there.send(b"x")

        def readable() -> None:
            seen.append(here.recv(1).decode())
            loop.remove_reader(here.fileno())
            loop.remove_writer(here.fileno())
            loop.stop()

        loop.add_reader(here.fileno(), readable)
        loop.add_writer(here.fileno(), writable)
        loop.run()
        assert loop._watched == {}
    assert seen == ["write", "x"]


def test_hang_up_reaches_the_writer_only_where_nobody_reads() -> None:
    read, write = os.pipe()
    seen: list[str] = []
    with EventLoop() as loop:

        def broken() -> None:
            seen.append("writer")
            loop.remove_writer(write)
            loop.stop()

        os.close(read)
        loop.add_writer(write, broken)
        loop.run()
    os.close(write)
    assert seen == ["writer"]


def test_files_that_epoll_refuses_are_read_to_their_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    got = bytearray()
    with EventLoop() as loop, path.open("rb", buffering=0) as file:

        def readable() -> None:
            data = file.read(2)
            got.extend(data)
            if not data:
                loop.remove_reader(file.fileno())
                loop.stop()

        loop.add_reader(file.fileno(), readable)
        loop.run()
        assert loop._always_ready == set()
    assert got == b"abc"


def test_event_of_a_descriptor_given_up_is_not_told_its_successor() -> None:
    told: list[str] = []
    with EventLoop() as loop:
        pipes = [os.pipe() for _ in range(2)]
        quiet = os.pipe()

        def replace() -> None:
            """Whichever is served first gives both up, and something else gets the other one's number."""
            for read, _ in pipes:
                loop.remove_reader(read)
            for read, _ in pipes:
                os.dup2(quiet[0], read)
                loop.add_reader(read, lambda: told.append("successor"))
            loop.call_soon(loop.stop)

        for read, write in pipes:
            loop.add_reader(read, replace)
            os.write(write, b"x")
        loop.run()
    for fd in (*pipes[0], *pipes[1], *quiet):
        os.close(fd)
    assert told == []


def test_descriptor_given_up_and_watched_again_is_served_in_the_next_round() -> None:
    read, write = os.pipe()
    with EventLoop() as loop:

        def again() -> None:
            loop.remove_reader(read)
            loop.add_reader(read, loop.stop)

        loop.add_reader(read, again)
        os.write(write, b"x")
        loop.run()
    os.close(read)
    os.close(write)


def test_call_of_a_thread_held_up_on_its_way_is_not_lost() -> None:
    with EventLoop() as loop:
        # As far as a thread gets in `call_soon` before another one runs.
        held_up = loop._calls.append

        def served() -> None:
            held_up(loop.stop)
            loop._wake.signal()

        loop.call_soon(lambda: loop.call_soon(served))
        loop.run()
    assert not loop._calls


def test_call_that_asks_to_be_called_again_lets_the_loop_get_on() -> None:
    fired: list[str] = []
    with EventLoop() as loop:
        timer = loop.new_timer()
        timer.call(loop.stop)

        def again() -> None:
            fired.append("call")
            loop.call_soon(again)

        timer.arm(1)
        again()
        loop.run()
    assert fired == ["call", "call"]
