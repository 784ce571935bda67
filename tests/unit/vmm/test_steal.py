"""Stolen time, added to the counter in guest memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from ostler.errors import AccelError
from ostler.memory import GuestMemory
from ostler.vmm.steal import MSR_KVM_STEAL_TIME, add_steal, teller

AT = 0x2040


class Registers:
    """A vCPU with one MSR, or with none."""

    def __init__(self, value: int | None) -> None:
        self.value = value
        self.asked = 0

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        self.asked += 1
        if self.value is None:
            raise AccelError("KVM_GET_MSRS: no such register")
        return dict.fromkeys(indices, self.value)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.of_size(1 << 20) as made:
        yield made


def counter(memory: GuestMemory) -> tuple[int, int]:
    return memory.read_int(AT, 8), memory.read_int(AT + 8, 4)


def test_counter_goes_on_from_what_is_there_with_an_even_version(memory: GuestMemory) -> None:
    memory.write_int(AT, 8, 700)
    memory.write_int(AT + 8, 4, 6)
    tell = teller(Registers(AT | 1), memory)  # type: ignore[arg-type]
    tell(33)
    assert counter(memory) == (733, 8)
    tell(1)
    assert counter(memory) == (734, 10)


def test_guest_that_did_not_switch_it_on_is_told_nothing(memory: GuestMemory) -> None:
    teller(Registers(AT), memory)(33)  # type: ignore[arg-type]
    assert counter(memory) == (0, 0)


def test_accelerator_without_the_register_is_asked_once(memory: GuestMemory) -> None:
    vcpu = Registers(None)
    tell = teller(vcpu, memory)  # type: ignore[arg-type]
    tell(33)
    tell(33)
    assert vcpu.asked == 1


def test_address_that_is_no_memory_gets_nothing_and_counter_and_version_wrap(memory: GuestMemory) -> None:
    add_steal(memory, 1 << 40, 33)
    memory.write(AT, b"\xff" * 12)
    add_steal(memory, AT, 1)
    assert counter(memory) == (0, 0)
    assert MSR_KVM_STEAL_TIME == 0x4B56_4D03
