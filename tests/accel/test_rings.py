"""Writes that KVM collects, and its ring of dirty pages; where the accelerator offers them."""

import pytest

from ostler.abi.kvm.board import KVM_MEM_LOG_DIRTY_PAGES
from ostler.accel.api import Cap
from ostler.accel.rings import CollectedWrite, DirtyPage
from tests.accel.conftest import Lab
from tests.accel.lab import MEMORY_SIZE
from tests.accel.prelude import LAYOUT

MMIO = LAYOUT["MMIO"]
SPLIT = 0x20_0000
RING_BYTES = 64 << 10


def test_collected_writes_come_in_order_and_the_next_access_leaves_the_guest(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     ebx, MMIO
        mov     eax, 0x11223344
        mov     [rbx], eax
        mov     dx, 0x3f8
        mov     al, 0x55
        out     dx, al
        mov     [rbx + 4], ax
        out     0x80, al
        finish
    """) as machine:
        if not machine.vm.check_extension(Cap.COALESCED_MMIO) or not machine.vm.check_extension(Cap.COALESCED_PIO):
            pytest.skip(f"{lab.name} on this host collects no writes")
        machine.vm.collect_writes(MMIO, 8)
        machine.vm.collect_writes(0x3F8, 1, pio=True)
        seen: list[CollectedWrite] = []
        machine.on_ask(lambda: seen.extend(machine.vcpus[0].collected_writes()))

        machine.run()

        assert seen == [
            CollectedWrite(False, MMIO, b"\x44\x33\x22\x11"),
            CollectedWrite(True, 0x3F8, b"\x55"),
            CollectedWrite(False, MMIO + 4, b"\x55\x33"),
        ]
        assert [port for _, port, _, _ in machine.exits] == [0x80]
        assert machine.vcpus[0].collected_writes() == []


def test_writes_no_longer_collected_leave_the_guest(lab: Lab) -> None:
    with lab.machine("""
    start:
        out     0x81, al
        out     0x80, al
        out     0x81, al
        finish
    """) as machine:
        if not machine.vm.check_extension(Cap.COALESCED_PIO):
            pytest.skip(f"{lab.name} on this host collects no writes")
        machine.vm.collect_writes(0x81, 1, pio=True)
        machine.on_ask(lambda: machine.vm.collect_writes(0x81, 1, pio=True, stop=True))

        machine.run()

        assert [port for _, port, _, _ in machine.exits] == [0x80, 0x81]
        assert len(machine.vcpus[0].collected_writes()) == 1


def test_dirty_ring_names_written_pages_again_after_a_reset(lab: Lab) -> None:
    if lab.accel.check_extension(Cap.DIRTY_LOG_RING) < RING_BYTES:
        pytest.skip(f"{lab.name} on this host has no dirty rings")
    with lab.machine(
        """
    start:
        mov     ds:[0x201000], eax
        mov     ds:[0x203000], eax
        mov     ds:[0x201008], eax
        out     0x80, al
        mov     ds:[0x203010], eax
        out     0x80, al
        finish
    """,
        lower_memory_end=SPLIT,
        prepare=lambda vm: vm.enable_cap(Cap.DIRTY_LOG_RING, RING_BYTES),
    ) as machine:
        machine.vm.set_user_memory_region(
            1, SPLIT, MEMORY_SIZE - SPLIT, machine.host_address + SPLIT, KVM_MEM_LOG_DIRTY_PAGES
        )
        ring = machine.vcpus[0].dirty_ring(RING_BYTES)
        looks: list[set[DirtyPage]] = []

        def look() -> None:
            found = list(ring.harvest())
            assert machine.vm.reset_dirty_rings() == len(found)
            # A page may be named more than once: by each write that KVM itself carries out.
            looks.append(set(found))

        machine.on_ask(look)
        machine.run()

        assert looks == [{DirtyPage(1, 1), DirtyPage(1, 3)}, {DirtyPage(1, 3)}]
