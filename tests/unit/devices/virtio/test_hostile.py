"""A hostile guest at every device, the short way; `make hostile` takes a million attempts at each."""

from __future__ import annotations

import random

import pytest

from ostler.testing.hostile import HostileGuest
from ostler.testing.hostile_devices import VICTIMS

ATTEMPTS = 6_000


@pytest.mark.parametrize("name", VICTIMS)
def test_device_survives_a_hostile_guest(name: str) -> None:
    device, seeds = VICTIMS[name]()
    with HostileGuest(device, seeds, random.Random(name)) as guest:
        guest.attack(ATTEMPTS)
        assert guest.counts["needed reset"] > 0
        assert guest.interrupts > 0
