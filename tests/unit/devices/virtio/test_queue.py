"""Virtqueues: chains, event index, bounds, and rings nobody should write."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostler.abi.virtio.ring import VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE
from ostler.devices.virtio.chain import Chain, QueueError
from ostler.devices.virtio.queue import MAX_CHAIN_PARTS, QueueLayout, Virtqueue
from ostler.memory import GuestMemory
from ostler.testing.virtio import Arena, DriverQueue

NEXT, WRITE, INDIRECT = VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_DESC_F_INDIRECT
MEMORY = 1 << 20
BUFFERS = 0x1_0000


class Pair:
    """Both ends of one ring."""

    def __init__(self, memory: GuestMemory, size: int = 8, *, event_idx: bool = False, indirect: bool = True) -> None:
        self.memory = memory
        self.driver = DriverQueue(memory, 0x1000, size, Arena(BUFFERS, MEMORY))
        self.interrupts = 0
        self.device = Virtqueue(
            memory, self.driver.layout, interrupt=self._interrupt, event_idx=event_idx, indirect=indirect
        )

    def _interrupt(self) -> None:
        self.interrupts += 1

    def pop(self) -> Chain:
        chain = self.device.pop()
        assert chain is not None
        return chain

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.device.close()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def memory(stack: ExitStack) -> GuestMemory:
    return stack.enter_context(GuestMemory.of_size(MEMORY))


PairMaker = Callable[..., Pair]


@pytest.fixture
def new_pair(stack: ExitStack, memory: GuestMemory) -> PairMaker:
    """Makes pairs that are closed before their memory."""
    return lambda **options: stack.enter_context(Pair(memory, **options))


@pytest.mark.parametrize("indirect", [False, True])
def test_pop_chain_gives_views_of_guest_memory(new_pair: PairMaker, *, indirect: bool) -> None:
    pair = new_pair()
    sent = pair.driver.add([b"head", b"data"], [16, 1], indirect=indirect)
    chain = pair.pop()
    assert (chain.read(), chain.readable_bytes, chain.writable_bytes) == (b"headdata", 8, 17)
    assert chain.read(6) == b"headda"
    assert chain.write(b"x" * 16 + b"\x07") == 17
    pair.device.push(chain, 17)
    assert pair.driver.collect() == [sent]
    assert (sent.written, pair.driver.contents(sent)) == (17, b"x" * 16 + b"\x07")


def test_pop_empty_queue_gives_none_and_asks_for_a_kick(new_pair: PairMaker) -> None:
    pair = new_pair(event_idx=True)
    assert pair.device.pop() is None
    pair.driver.add([b"a"])
    pair.driver.add([b"b"])
    assert [pair.pop().read(), pair.pop().read()] == [b"a", b"b"]
    assert pair.driver.kick_after == 0
    assert pair.device.pop() is None
    assert pair.driver.kick_after == 2


def test_push_announces_what_was_written_and_no_more(new_pair: PairMaker, memory: GuestMemory) -> None:
    pair = new_pair()
    sent = pair.driver.add(writable=[24, 64, 32])
    seen: list[tuple[int, int]] = []
    memory.on_write(lambda gpa, size: seen.append((gpa, size)))
    pair.device.push(pair.pop(), 40)
    assert seen == [(sent.writable[0][0], 24), (sent.writable[1][0], 16)]


@pytest.mark.parametrize("indirect", [False, True])
def test_neighbouring_parts_are_one_view(new_pair: PairMaker, *, indirect: bool) -> None:
    pair = new_pair()
    pair.driver.add([b"a" * 16, b"b" * 16], [16, 16, 8], indirect=indirect)
    chain = pair.pop()
    assert ([len(view) for view in chain.readable], [len(view) for view in chain.writable]) == ([32], [40])
    assert (chain.parts[1:], chain.writable_bytes) == (chain.ranges, 40)


def test_indirect_table_in_any_order_is_followed(new_pair: PairMaker, memory: GuestMemory) -> None:
    pair = new_pair()
    for index, (at, flags, following) in enumerate([(0x100, NEXT, 2), (0x300, 0, 0), (0x200, NEXT, 1)]):
        memory.write(BUFFERS + at, bytes([index]) * 4)
        memory.write(BUFFERS + 0x400 + 16 * index, struct.pack("<QIHH", BUFFERS + at, 4, flags, following))
    pair.driver.raw_descriptor(0, BUFFERS + 0x400, 48, INDIRECT, 0)
    pair.driver.raw_available(0)
    assert pair.pop().read() == b"\0\0\0\0\2\2\2\2\1\1\1\1"


@pytest.mark.parametrize("following", [1, 0, 3])
def test_indirect_table_that_leaves_itself_or_loops_is_an_error(
    new_pair: PairMaker, memory: GuestMemory, following: int
) -> None:
    pair = new_pair()
    memory.write(BUFFERS + 0x400, struct.pack("<QIHH", BUFFERS, 4, NEXT, following))
    pair.driver.raw_descriptor(0, BUFFERS + 0x400, 16, INDIRECT, 0)
    pair.driver.raw_available(0)
    with pytest.raises(QueueError, match=r"table|loops"):
        pair.device.pop()


def test_flush_interrupts_once_for_a_batch_and_not_for_nothing(new_pair: PairMaker) -> None:
    pair = new_pair()
    for _ in range(3):
        pair.driver.add([b"a"])
    for _ in range(3):
        pair.device.push(pair.pop(), 0)
    pair.device.flush()
    pair.device.flush()
    assert pair.interrupts == 1


def test_flush_driver_that_wants_no_interrupt_gets_none(new_pair: PairMaker) -> None:
    pair = new_pair()
    pair.driver.suppress_interrupts()
    pair.driver.add([b"a"])
    pair.device.push(pair.pop(), 0)
    pair.device.flush()
    assert pair.interrupts == 0


@pytest.mark.parametrize(("event", "expected"), [(0, 1), (1, 1), (2, 1), (3, 0), (0xFFFF, 0)])
def test_flush_event_index_interrupts_when_the_batch_passes_it(new_pair: PairMaker, event: int, expected: int) -> None:
    pair = new_pair(event_idx=True)
    pair.driver.ask_interrupt_after(event)
    for _ in range(3):
        pair.driver.add([b"a"])
        pair.device.push(pair.pop(), 0)
    pair.device.flush()
    assert pair.interrupts == expected


def test_indices_wrap_round_at_sixteen_bits(new_pair: PairMaker) -> None:
    pair = new_pair(event_idx=True)
    for number in range(0x1_0010):
        pair.driver.ask_interrupt_after(number)
        sent = pair.driver.add(writable=[1])
        pair.device.push(pair.pop(), 1)
        pair.device.flush()
        assert pair.driver.collect() == [sent]
    assert pair.interrupts == 0x1_0010


def test_layout_counts_chains_in_flight_as_not_taken(new_pair: PairMaker, memory: GuestMemory) -> None:
    pair = new_pair()
    for data in (b"a", b"b", b"c"):
        pair.driver.add([data])
    pair.device.push(pair.pop(), 0)
    pair.pop()
    saved = pair.device.layout
    again = Virtqueue(memory, saved, interrupt=pair._interrupt, event_idx=False, indirect=True)
    chain = again.pop()
    again.close()
    assert chain is not None
    assert (saved.next_avail, saved.next_used, chain.read()) == (1, 1, b"b")


def test_unpop_gives_the_chain_again(new_pair: PairMaker) -> None:
    pair = new_pair()
    pair.driver.add([b"a"])
    pair.pop()
    pair.device.unpop()
    assert pair.pop().read() == b"a"


def test_closed_queue_ignores_late_completions(new_pair: PairMaker) -> None:
    pair = new_pair()
    pair.driver.add(writable=[4])
    pair.driver.add(writable=[4])
    chain = pair.pop()
    pair.device.close()
    pair.device.push(chain, 4)
    pair.device.flush()
    assert (pair.driver.collect(), pair.interrupts, pair.device.pop(), pair.device.enabled) == ([], 0, None, False)


def test_unused_queue_is_empty(memory: GuestMemory) -> None:
    queue = Virtqueue.unused(memory)
    queue.flush()
    assert (queue.pop(), queue.enabled) == (None, False)


@pytest.mark.parametrize(
    ("layout", "complaint"),
    [
        (QueueLayout(3, 0, 0x1000, 0x2000), "power of two"),
        (QueueLayout(0, 0, 0x1000, 0x2000), "power of two"),
        (QueueLayout(1 << 16, 0, 0x1000, 0x2000), "power of two"),
        (QueueLayout(8, 8, 0x1000, 0x2000), "descriptor table at 0x8: expected a multiple of 16"),
        (QueueLayout(8, 0, 0x1001, 0x2000), "driver area at 0x1001"),
        (QueueLayout(8, 0, 0x1000, 0x2002), "device area at 0x2002"),
        (QueueLayout(8, MEMORY, 0x1000, 0x2000), "outside"),
        (QueueLayout(8, 0, MEMORY - 16, 0x2000), "outside"),
        (QueueLayout(8, 0, 0x1000, (1 << 64) - 4), "outside"),
    ],
)
def test_queue_impossible_layout_is_refused(memory: GuestMemory, layout: QueueLayout, complaint: str) -> None:
    with pytest.raises(QueueError, match=complaint):
        Virtqueue(memory, layout, interrupt=lambda: None, event_idx=False, indirect=False)


@pytest.mark.parametrize(
    ("descriptors", "complaint"),
    [
        ([(BUFFERS, 4, NEXT, 8)], "descriptor 8: the table has 8"),
        ([(BUFFERS, 4, NEXT, 0)], "loops"),
        ([(BUFFERS, 4, NEXT, 1), (BUFFERS, 4, NEXT, 0)], "loops"),
        ([(BUFFERS, 0, 0, 0)], "no bytes"),
        ([(MEMORY - 2, 4, 0, 0)], "outside"),
        ([((1 << 64) - 1, 0xFFFF_FFFF, WRITE, 0)], "outside"),
        ([(BUFFERS, 4, WRITE | NEXT, 1), (BUFFERS, 4, 0, 0)], "behind a writable"),
        ([(BUFFERS, 16, INDIRECT | NEXT, 1)], "has a next one"),
        ([(BUFFERS, 0, INDIRECT, 0)], "multiple of 16"),
        ([(BUFFERS, 24, INDIRECT, 0)], "multiple of 16"),
        ([(BUFFERS, 16 * (MAX_CHAIN_PARTS + 1), INDIRECT, 0)], "at most 1024"),
        ([(MEMORY - 8, 16, INDIRECT, 0)], "indirect table: guest memory"),
    ],
)
def test_pop_malformed_chain_is_an_error(
    new_pair: PairMaker, descriptors: list[tuple[int, int, int, int]], complaint: str
) -> None:
    pair = new_pair()
    for index, descriptor in enumerate(descriptors):
        pair.driver.raw_descriptor(index, *descriptor)
    pair.driver.raw_available(0)
    with pytest.raises(QueueError, match=complaint):
        pair.device.pop()


def test_pop_indirect_inside_indirect_is_an_error(new_pair: PairMaker) -> None:
    pair = new_pair()
    pair.driver.add_parts([(BUFFERS, 16, INDIRECT)], [], indirect=True)
    with pytest.raises(QueueError, match="inside another"):
        pair.device.pop()


def test_pop_indirect_not_negotiated_is_an_error(new_pair: PairMaker) -> None:
    pair = new_pair(indirect=False)
    pair.driver.add([b"a"], indirect=True)
    with pytest.raises(QueueError, match="without VIRTIO_F_INDIRECT_DESC"):
        pair.device.pop()


def test_pop_indirect_behind_direct_parts_is_one_chain(new_pair: PairMaker, memory: GuestMemory) -> None:
    pair = new_pair()
    memory.write(BUFFERS, b"direct")
    memory.write(BUFFERS + 0x100, b"table")
    pair.driver.raw_descriptor(0, BUFFERS, 6, NEXT, 1)
    pair.driver.raw_descriptor(1, BUFFERS + 0x200, 16, INDIRECT | WRITE, 0)
    memory.write(BUFFERS + 0x200, (BUFFERS + 0x100).to_bytes(8, "little") + b"\x05" + bytes(7))
    pair.driver.raw_available(0)
    assert pair.pop().read() == b"directtable"


def test_pop_index_ahead_of_the_ring_is_an_error(new_pair: PairMaker) -> None:
    pair = new_pair()
    pair.driver.raw_index(9)
    with pytest.raises(QueueError, match="more than 8 ahead"):
        pair.device.pop()


def test_pop_chain_beyond_four_gibibytes_is_an_error() -> None:
    with GuestMemory.of_size(2 << 30) as memory, Pair(memory) as pair:
        for index in range(5):
            pair.driver.raw_descriptor(index, 0, 1 << 30, NEXT if index < 4 else 0, index + 1)
        pair.driver.raw_available(0)
        with pytest.raises(QueueError, match="longer than"):
            pair.device.pop()


ADDRESSES = st.one_of(
    st.integers(0, MEMORY - 1), st.integers(0, (1 << 64) - 1), st.sampled_from([0x1000, BUFFERS, MEMORY - 16])
)
LENGTHS = st.one_of(st.integers(0, 256), st.sampled_from([16, 32, 4096, 16384]), st.integers(0, 0xFFFF_FFFF))
FLAGS = st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF))
DESCRIPTORS = st.tuples(ADDRESSES, LENGTHS, FLAGS, st.integers(0, 9))


@settings(max_examples=300, deadline=None)
@given(
    table=st.lists(DESCRIPTORS, max_size=8),
    inner=st.lists(DESCRIPTORS, max_size=8),
    heads=st.lists(st.integers(0, 10), max_size=12),
    index=st.one_of(st.none(), st.integers(0, 0xFFFF)),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_hostile_ring_yields_bounded_chains_or_queue_error(
    table: list[tuple[int, int, int, int]],
    inner: list[tuple[int, int, int, int]],
    heads: list[int],
    index: int | None,
    flags: tuple[bool, bool],
) -> None:
    with GuestMemory.of_size(MEMORY) as memory:
        pair = Pair(memory, event_idx=flags[0], indirect=flags[1])
        elsewhere = DriverQueue(memory, BUFFERS, 8, Arena(BUFFERS, MEMORY))
        for number, descriptor in enumerate(table):
            pair.driver.raw_descriptor(number, *descriptor)
        for number, descriptor in enumerate(inner):
            elsewhere.raw_descriptor(number, *descriptor)
        for head in heads:
            pair.driver.raw_available(head)
        if index is not None:
            pair.driver.raw_index(index)
        try:
            for _ in range(20):
                chain = pair.device.pop()
                if chain is None:
                    break
                assert 0 < len(chain.readable) + len(chain.writable) <= MAX_CHAIN_PARTS
                assert chain.readable_bytes == sum(map(len, chain.readable))
                assert chain.writable_bytes == sum(map(len, chain.writable)) == sum(n for _, n in chain.ranges)
                pair.device.push(chain, min(chain.writable_bytes, 8))
                pair.device.flush()
                del chain
        except QueueError:
            pass
        finally:
            pair.device.close()
