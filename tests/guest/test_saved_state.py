"""A running Linux, its whole state saved and put into a new machine, goes on there as if nothing had been."""

from __future__ import annotations

import hashlib
from contextlib import closing

import pytest

from ostler import accel
from ostler.boot.load import read_kernel
from ostler.config import GuestSpec
from ostler.images import initrd, kernels
from ostler.machine import saved
from ostler.testing.watched import watched
from ostler.vmm.processors import EndKind

# Ticks say where the guest is; what the last line holds depends on every one of them.
WORKLOAD = b"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /tmp
/bin/busybox mount -t proc proc /proc
n=0 sum=start
while [ $n -lt 40 ]; do
    n=$((n + 1))
    sum=$(echo "$sum $n" | /bin/busybox sha256sum)
    echo "tick $n"
done
echo "end $sum"
/bin/busybox poweroff -f
"""


GENERATION = b"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /tmp
/bin/busybox mount -t proc proc /proc
echo "before"
n=0
while [ $n -lt 200 ] && ! /bin/busybox dmesg | /bin/busybox grep "crng reseeded due to virtual machine fork"; do
    n=$((n + 1))
    /bin/busybox usleep 20000
done
/bin/busybox poweroff -f
"""


def test_guest_that_goes_on_as_another_draws_other_random_numbers() -> None:
    opened = accel.open("soft")
    # The kernel of Debian 12's cloud has no driver for the generation ID.
    kernel = kernels.fetch("debian-13-cloud")
    image = initrd.build({"init": GENERATION, "bin/busybox": initrd.busybox_program().read_bytes()})
    spec = GuestSpec(kernel=kernel.image, initrd=image, memory="192M", append="console=ttyS0 quiet")
    with closing(opened), watched(spec, opened) as guest:
        machine = guest.process.machine
        machine.load(read_kernel(kernel.image), initrd=image.read_bytes(), cmdline="console=ttyS0 quiet panic=-1")
        end = guest.run([(b"before", 0)], then=machine.begin_generation)
    assert end.kind is EndKind.POWER_OFF
    assert b"crng reseeded due to virtual machine fork" in guest.console, guest.console[-2000:]


@pytest.mark.parametrize("cpus", [1, 2])
def test_saved_state_of_running_linux_goes_on_in_a_new_machine(cpus: int) -> None:
    opened = accel.open("soft")
    kernel = kernels.fetch()
    image = initrd.build({"init": WORKLOAD, "bin/busybox": initrd.busybox_program().read_bytes()})
    spec = GuestSpec(kernel=kernel.image, initrd=image, memory="128M", cpus=cpus, append="console=ttyS0 quiet")
    with closing(opened), watched(spec, opened) as first, watched(spec, opened) as second:
        first.process.machine.load(
            read_kernel(kernel.image), initrd=image.read_bytes(), cmdline="console=ttyS0 quiet panic=-1"
        )
        assert first.run([(b"tick 7", 0)]).kind is EndKind.QUIT
        state = saved.save(first.process.machine, opened)
        memory = first.process.machine.memory
        saved.copy_memory(
            memory, second.process.machine.memory, {region.start: region.size_bytes for region in memory.regions}
        )
        saved.restore(state, second.process.machine, opened)
        end = second.run()

    text = (first.console + second.console).decode()
    assert end.kind is EndKind.POWER_OFF, text[-2000:]
    assert [line for line in text.splitlines() if line.startswith("tick")] == [f"tick {n}" for n in range(1, 41)]
    assert f"end {expected()}" in text


def expected() -> str:
    """The workload's last line, worked out here."""
    value = "start"
    for n in range(1, 41):
        value = hashlib.sha256(f"{value} {n}\n".encode()).hexdigest() + "  -"
    return value
