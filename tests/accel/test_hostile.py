"""Random state and random code: whatever user space or a guest hands an accelerator, the process lives on.

A refused request is an OSError; an engine's defect would be a RuntimeError and fails the test. Seeds are fixed, so
that a failure repeats. Only the software CPU is asked: KVM has fuzzers of its own, and its crash is the host's.
"""

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ostler.abi.kvm import requests
from ostler.accel.api import Accel, ExitReason
from ostler.accel.opener import open_accelerator
from ostler.errors import AccelUnavailable
from tests.accel.lab import Machine
from tests.accel.prelude import LAYOUT

# Requests that carry host addresses or descriptors, which user space vouches for.
NOT_DATA = {
    "KVM_SET_USER_MEMORY_REGION",
    "KVM_GET_DIRTY_LOG",
    "KVM_CLEAR_DIRTY_LOG",
    "KVM_IRQFD",
    "KVM_IOEVENTFD",
    "KVM_RUN",
    "KVM_CREATE_VM",
    "KVM_CREATE_VCPU",
}
SIZE_SHIFT, SIZE_MASK = 16, 0x3FFF


@pytest.fixture(scope="module")
def accel() -> Iterator[Accel]:
    try:
        opened = open_accelerator("soft")
    except AccelUnavailable as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


def fuzzed(generator: random.Random, size: int) -> bytearray:
    """Bytes of several characters: all random, mostly zero, or extreme."""
    style = generator.randrange(3)
    if style == 0:
        return bytearray(generator.randbytes(size))
    pool = (b"\0", b"\xff", b"\x80", b"\x01") if style == 1 else (b"\0",) * 7 + (b"\x01",)
    return bytearray(b"".join(generator.choice(pool) for _ in range(size)))


def attempt(channel: Any, request: int, argument: bytearray | int) -> None:
    try:
        channel.ioctl(request, argument)
    except OSError:
        return


def data_requests() -> list[int]:
    return [
        number
        for name, number in vars(requests).items()
        if name.startswith("KVM_") and number != requests.KVM_API_VERSION and name not in NOT_DATA
    ]


@pytest.mark.parametrize("seed", range(4))
def test_random_structures_are_taken_or_refused(accel: Accel, seed: int) -> None:
    generator = random.Random(seed)
    with Machine(accel, "start:\nfinish\n", pit=True) as machine:
        vm: Any = machine.vm
        vcpu: Any = machine.vcpus[0]
        for _ in range(400):
            request = generator.choice(data_requests())
            size = request >> SIZE_SHIFT & SIZE_MASK
            # Tables have their entries behind the header; some arguments are too short.
            size += generator.choice((0, 0, 16, 400, -1))
            argument = fuzzed(generator, max(size, 0)) if request >> 30 else generator.getrandbits(32)
            attempt(generator.choice((vm._transport, vcpu._transport)), request, argument)
        run_a_little(machine)


@pytest.mark.parametrize("mode", ["real", "protected", "long"])
@pytest.mark.parametrize("seed", range(6))
def test_random_code_leaves_the_process_alive(accel: Accel, seed: int, mode: str) -> None:
    generator = random.Random(seed)
    with Machine(accel, "start:\nfinish\n", mode=mode, pit=True) as machine:
        start = LAYOUT["TEXT"]
        for _ in range(10):
            machine.memory[start : start + 0x4000] = generator.randbytes(0x4000)
            machine.vm.memory_written(start, 0x4000)
            machine.start(machine.vcpus[0], mode)
            regs = machine.vcpus[0].get_regs()
            regs.rbx, regs.rcx, regs.rdi = generator.getrandbits(64), generator.getrandbits(12), 0x9000
            machine.vcpus[0].set_regs(regs)
            run_a_little(machine)


@pytest.mark.parametrize("seed", range(6))
def test_random_control_state_leaves_the_process_alive(accel: Accel, seed: int) -> None:
    generator = random.Random(seed)
    with Machine(accel, "start:\nfinish\n") as machine:
        vcpu: Any = machine.vcpus[0]
        whole = bytearray(vcpu.get_sregs())
        for _ in range(30):
            sregs = bytearray(whole)
            for _ in range(generator.randrange(1, 6)):
                sregs[generator.randrange(len(sregs))] = generator.getrandbits(8)
            attempt(vcpu._transport, requests.KVM_SET_SREGS, sregs)
            regs = vcpu.get_regs()
            regs.rip, regs.rsp = generator.getrandbits(64) >> generator.choice((0, 17, 44)), generator.getrandbits(20)
            vcpu.set_regs(regs)
            run_a_little(machine)


def run_a_little(machine: Machine) -> None:
    """Some exits' worth, each answered with what is in the page, and ended after a moment."""
    vcpu = machine.vcpus[0]
    timer = threading.Timer(0.005, vcpu.kick)
    timer.start()
    while vcpu.run() in (ExitReason.IO, ExitReason.MMIO):
        pass
    timer.join()
    # The kick may have come too late to be noticed: the next run takes it.
    vcpu.immediate_exit = True
    while vcpu.run() is not ExitReason.INTR:
        pass
    vcpu.immediate_exit = False
