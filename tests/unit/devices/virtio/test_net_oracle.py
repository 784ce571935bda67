"""Random frames through the network card, against the plain rule: what goes in comes out, whole, in order, once."""

from __future__ import annotations

import itertools
import os
import random

import pytest

from ostler.devices.virtio import net_header as net
from ostler.devices.virtio.net_header import HEADER, HEADER_BYTES
from tests.unit.devices.virtio.net_fakes import Card

STEPS = int(os.environ.get("OSTLER_TEST_STEPS", "400"))


def shape(rng: random.Random, size: int) -> list[int]:
    """`size` bytes of buffer in a few descriptors."""
    cuts = sorted(rng.sample(range(1, size), min(rng.randrange(4), size - 1)))
    return [end - start for start, end in zip([0, *cuts], [*cuts, size], strict=True)]


@pytest.mark.parametrize("seed", range(6))
def test_every_frame_arrives_once_whole_and_in_order(seed: int) -> None:
    rng = random.Random(seed)
    with Card(features=net.F_MRG_RXBUF, offloads=0, header_bytes=rng.choice((0, HEADER_BYTES))) as card:
        prefix = bytes(card.wire.header_bytes)
        sent, delivered, got = [], [], []
        for _ in range(STEPS):
            choice = rng.randrange(3)
            if choice == 0 and len(card.rx.sent) < 12:
                card.give(1, *shape(rng, rng.choice((60, 1526, 4096))))
            elif choice == 1 and len(card.wire.waiting) < 8:
                frame = rng.randbytes(rng.choice((14, 60, 1514, 9000)))
                delivered.append(frame)
                card.wire.receive(prefix + frame)
            else:
                frame = rng.randbytes(rng.choice((14, 60, 1514, 60_000)))
                sent.append(frame)
                parts = rng.randrange(1, 5)
                whole = bytes(HEADER_BYTES) + frame
                cuts = [0, *sorted(rng.sample(range(1, len(whole)), parts - 1)), len(whole)]
                card.tx.add([whole[a:b] for a, b in itertools.pairwise(cuts)])
                card.driver.kick(1)
                card.tx.collect()
            got += merged(card.received())
        for _ in range(200):
            if not card.wire.waiting:
                break
            card.give(1, 4096)
            got += merged(card.received())

    assert got == delivered
    assert card.wire.sent == [prefix + frame for frame in sent]
    assert (card.device.dropped, card.driver.errors) == (0, [])


def merged(buffers: list[bytes]) -> list[bytes]:
    """Frames out of the buffers they were spread over. A frame's buffers are published together."""
    frames = []
    while buffers:
        count = HEADER.unpack(buffers[0][:HEADER_BYTES])[6]
        frames.append(b"".join(buffers[:count])[HEADER_BYTES:])
        del buffers[:count]
    return frames
