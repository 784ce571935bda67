"""Doorbells: attached, moved, refused by the accelerator, rung."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import cast

from ostler.accel.api import VM
from ostler.errors import AccelError
from ostler.machine.doorbells import Doorbells
from ostler.testing.fake_accel import FakeAccel, FakeVm
from tests.unit.machine.test_machine import wiring


def rig() -> tuple[Doorbells, FakeVm, dict[int, Callable[[], None]], threading.Lock]:
    readers: dict[int, Callable[[], None]] = {}
    base = wiring()
    wired = replace(base, add_reader=readers.__setitem__, remove_reader=readers.__delitem__)
    vm = FakeAccel().vm
    return Doorbells(cast("VM", vm), wired), vm, readers, wired.lock


def test_doorbell_listens_at_one_address_at_a_time() -> None:
    doorbells, vm, readers, _ = rig()
    with doorbells:
        bell = doorbells.new(lambda: None)
        (fd,) = readers
        bell.attach(0x1000)
        bell.attach(0x1000)
        assert vm.ioeventfds == [(fd, 0x1000, 2)]
        bell.attach(0x2000)
        assert vm.ioeventfds == [(fd, 0x2000, 2)]
        bell.detach()
        bell.detach()
        assert vm.ioeventfds == []
    assert readers == {}


def test_ring_calls_back_under_the_lock_once_for_several() -> None:
    doorbells, _, readers, lock = rig()
    held: list[bool] = []
    with doorbells:
        bell = doorbells.new(lambda: held.append(lock.locked()))
        bell.ring()
        bell.ring()
        ((fd, callback),) = readers.items()
        callback()
        assert select.select([fd], [], [], 0)[0] == []
    assert held == [True]


def test_accelerator_that_refuses_leaves_the_write_to_an_exit() -> None:
    doorbells, vm, _, _ = rig()

    def refuse(*_given: object, **_options: object) -> None:
        raise AccelError("KVM_IOEVENTFD: too many")

    vm.ioeventfd = refuse  # type: ignore[method-assign]
    with doorbells:
        bell = doorbells.new(lambda: None)
        bell.attach(0x1000)
        bell.detach()
