"""Frames and batches: what is sent comes back, and what nobody would send is refused, 10,000 mutations of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostler.errors import MigrationError
from ostler.memory import GuestMemory, ram_regions
from ostler.migration import pages, wire
from ostler.migration.source import Source
from ostler.migration.target import Target
from ostler.migration.wire import PAGE_BYTES, Decoder, Encoding, Frame, Kind

MEMORY_BYTES = 64 * PAGE_BYTES
MUTATIONS = 10_000


class Memory:
    """Plain bytes as guest memory."""

    def __init__(self, size_bytes: int = MEMORY_BYTES) -> None:
        self.data = memoryview(bytearray(size_bytes))

    def view(self, gpa: int, size_bytes: int) -> memoryview:
        return self.data[gpa : gpa + size_bytes]

    def contains(self, gpa: int, size_bytes: int) -> bool:
        return gpa >= 0 and gpa + size_bytes <= len(self.data)


def filled(seed: int) -> Memory:
    memory = Memory()
    source = random.Random(seed)
    for page in range(0, MEMORY_BYTES, PAGE_BYTES):
        if source.random() < 0.6:
            memory.data[page : page + PAGE_BYTES] = (source.randbytes(64) * (PAGE_BYTES // 64))[:PAGE_BYTES]
    return memory


def apply(frame: Frame, memory: Memory) -> None:
    batch = pages.parse_batch(memoryview(frame.payload), allowed=memory.contains)
    if not batch.content:
        for gpa, count in batch.runs:
            memory.data[gpa : gpa + count * PAGE_BYTES] = bytes(count * PAGE_BYTES)
    else:
        for gpa, content in batch.parts():
            memory.data[gpa : gpa + len(content)] = content


@pytest.mark.parametrize("encoding", [Encoding.RAW, Encoding.ZLIB, Encoding.ZSTD])
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_pages_sent_in_any_cut_arrive_as_they_were(encoding: Encoding, seed: int, cuts: list[int]) -> None:
    source, target = filled(seed), filled(seed + 1)
    runs, at = [], 0
    for cut in [*cuts, 64]:
        count = min(cut, 64 - at)
        if count:
            runs.append((at * PAGE_BYTES, count))
            at += count
    stream = bytearray()
    for batch in pages.batches(runs):
        full, zero = pages.split_zero(source, batch)
        for part, how in ((full, encoding), (zero, Encoding.ZERO)):
            if part:
                stream += b"".join(pages.pack_batch(source, part, how))
    decoder = Decoder()
    for at in range(0, len(stream), 1000):
        decoder.feed(bytes(stream[at : at + 1000]))
        while (frame := decoder.next()) is not None:
            apply(frame, target)
    assert target.data == source.data


def test_batches_hold_no_more_than_their_bound() -> None:
    cut = list(pages.batches([(0, 600), (1 << 30, 1)]))
    assert [sum(count for _, count in batch) for batch in cut] == [256, 256, 89]


@pytest.mark.parametrize("how", ["zlib", "zstd"])
def test_compressed_bomb_is_refused_without_unpacking_it(how: str) -> None:
    memory = Memory()
    packed = pages.compress(bytes(64 << 20), pages.COMPRESSIONS[how])
    payload = wire.BATCH.pack(pages.COMPRESSIONS[how], 0, 1, len(packed)) + wire.RUN.pack(0, 1) + packed
    with pytest.raises(MigrationError):
        pages.parse_batch(memoryview(payload), allowed=memory.contains)


@pytest.mark.parametrize("run", [(1, 1), (0, 0), (0, 257), (MEMORY_BYTES, 1), (1 << 60, 1), (63 * PAGE_BYTES, 2)])
def test_pages_the_guest_has_not_got_are_refused(run: tuple[int, int]) -> None:
    memory = Memory()
    payload = wire.BATCH.pack(Encoding.ZERO, 0, 1, 0) + wire.RUN.pack(*run)
    with pytest.raises(MigrationError):
        pages.parse_batch(memoryview(payload), allowed=memory.contains)


def test_frame_longer_than_its_kind_allows_is_refused_by_its_head() -> None:
    decoder = Decoder()
    decoder.feed(wire.HEADER.pack(Kind.COMMIT, 0, 0, 1))
    with pytest.raises(MigrationError, match="COMMIT of 1 bytes"):
        decoder.next()


@pytest.mark.parametrize("data", [b"", b"x" * 32, b"OSTLMIG\x02" + bytes(24), b"OSTLMIG\x01" + bytes(16) + b"\xff" * 8])
def test_preambles_of_others_are_refused(data: bytes) -> None:
    with pytest.raises(MigrationError):
        wire.parse_preamble(data)


def good_stream() -> bytes:
    """What a source sends, from HELLO to COMMIT."""
    source, memory = Source(), filled(7)
    offer = {"name": "g", "spec": {}, "facts": {}, "boot": "", "witness": "", "streams": 1,
             "compression": "zstd", "post_copy": False, "disks": []}  # fmt: skip
    stream = source.offer(offer)
    full, zero = pages.split_zero(memory, [(0, 64)])
    for part, how in ((full, Encoding.RAW), (full, Encoding.ZLIB), (full, Encoding.ZSTD), (zero, Encoding.ZERO)):
        for batch in pages.batches(part):
            stream += b"".join(pages.pack_batch(memory, batch[:4], how))
    stream += pages.pack_disk_part(0, 4096, bytes(memory.data[:4096]), Encoding.ZSTD)
    stream += wire.pack(Kind.STATE, b"s" * 100) + wire.pack(Kind.FINAL, b"{}") + wire.pack(Kind.COMMIT)
    return stream


def taken(stream: bytes, memory: GuestMemory) -> Target:
    """A target that is given these bytes."""
    target, decoder = Target(), Decoder()
    decoder.feed(stream)
    while (frame := decoder.next()) is not None:
        if target.offer is None:
            target.hello(frame)
            target.welcome(streams=1, post_copy=False, boot="", witness="")
            continue
        target.received(frame)
        if frame.kind is Kind.PAGES:
            pages.parse_batch(memoryview(frame.payload), allowed=memory.contains)
        elif frame.kind is Kind.DISK:
            pages.parse_disk_part(memoryview(frame.payload))
        if target.is_complete and not target.may_run and frame.kind is Kind.FINAL:
            target.prepared()
    return target


def test_ten_thousand_mutated_streams_are_refused_or_harmless() -> None:
    """No other exception than MigrationError, and nothing runs that had not been wholly announced."""
    good = good_stream()
    chance = random.Random(20261122)
    with GuestMemory(ram_regions(MEMORY_BYTES)) as memory:
        assert taken(good, memory).may_run
        refused: list[str] = []
        for _ in range(MUTATIONS):
            mutated = bytearray(good)
            for _ in range(chance.randint(1, 4)):
                at = chance.randrange(len(mutated))
                way = chance.randrange(4)
                if way == 0:
                    mutated[at] ^= 1 << chance.randrange(8)
                elif way == 1:
                    del mutated[at : at + chance.randint(1, 64)]
                elif way == 2:
                    mutated[at:at] = chance.randbytes(chance.randint(1, 16))
                else:
                    # Heads are where the damage is.
                    head = chance.randrange(40)
                    mutated[head] = chance.randrange(256)
                if not mutated:
                    break
            try:
                taken(bytes(mutated), memory)
            except MigrationError as error:
                refused.append(str(error))
        assert len(refused) > MUTATIONS // 2
        assert not any("\n" in each for each in refused)
