"""Page-table walks in Python against the accelerator's own (KVM_TRANSLATE), over random tables in every mode."""

from __future__ import annotations

import random

import pytest

from ostler.accel.models import model
from ostler.memory.paging import (
    CR0_PG,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
    EFER_NXE,
    EXECUTE_DISABLE,
    Mode,
    Paging,
    Walker,
)
from tests.accel.conftest import Lab
from tests.accel.lab import MEMORY_SIZE, Machine

ROOT, TABLES, ADDRESSES = 0x10_0000, 0x10_0000, 3000
TABLE_PAGES = 64
EFER_LME, PE = 1 << 8, 1


def fill(machine: Machine, rng: random.Random, *, entry_bytes: int, pae_root: bool) -> None:
    """Pages of entries that mostly lead to one another, and sometimes nowhere, beyond memory, or have odd bits."""
    for at in range(TABLES, TABLES + TABLE_PAGES * 0x1000, entry_bytes):
        value = TABLES + rng.randrange(TABLE_PAGES) * 0x1000 | rng.choice((0b111, 0b111, 0b101, 0b011, 0b110))
        value |= rng.choice((0, 0, 0, 1 << 5, 3 << 5))
        kind = rng.random()
        if kind < 0.2:
            value |= 1 << 7
        elif kind < 0.25:
            value |= rng.randrange(1 << 20) << 12
        if entry_bytes == 8 and rng.random() < 0.1:
            value |= rng.choice((EXECUTE_DISABLE, 1 << rng.randrange(39, 63)))
        if kind < 0.12:
            # Large pages that are in order: where the others begin does not matter to them.
            value &= ~0x3F_F000
        machine.write(at, value & (1 << 8 * entry_bytes) - 1, entry_bytes)
    if pae_root:
        for number in range(4):
            machine.write(ROOT + 8 * number, TABLES + (number + 1) * 0x1000 | 1)


@pytest.mark.parametrize(
    ("mode", "cr4", "efer"),
    [
        (Mode.LEVEL_4, CR4_PAE, EFER_LME | EFER_LMA | EFER_NXE),
        (Mode.LEVEL_4, CR4_PAE, EFER_LME | EFER_LMA),
        (Mode.PAE, CR4_PAE, EFER_NXE),
        (Mode.PAE, CR4_PAE, 0),
        (Mode.BITS_32, CR4_PSE, 0),
        (Mode.BITS_32, 0, 0),
    ],
)
def test_walks_find_what_the_accelerator_finds(lab: Lab, mode: Mode, cr4: int, efer: int) -> None:
    lab.skip_where_emulated("its KVM_TRANSLATE walks shadow tables")
    rng = random.Random(20261130)
    with lab.machine("start: finish", mode="long" if mode is Mode.LEVEL_4 else "protected") as machine:
        fill(machine, rng, entry_bytes=4 if mode is Mode.BITS_32 else 8, pae_root=mode is Mode.PAE)
        machine.vm.memory_written(0, MEMORY_SIZE)
        vcpu = machine.vcpus[0]
        sregs = vcpu.get_sregs()
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = sregs.cr0 | CR0_PG | PE, ROOT, cr4, efer
        vcpu.set_sregs(sregs)
        paging = Paging(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer, model().physical_bits)
        walker = Walker(paging, lambda gpa, size: read(machine, gpa, size), outside=IndexError)
        assert walker.mode is mode

        valid = 0
        for _ in range(ADDRESSES):
            linear = rng.randrange(1 << 32)
            if mode is Mode.LEVEL_4:
                linear |= rng.choice((rng.randrange(1 << 15) << 32, 0xFFFF_8000_0000_0000))
            theirs, ours = vcpu.translate(linear), walker.walk(linear)
            assert bool(theirs.valid) is (ours.physical is not None), f"{linear:#x}: {ours}"
            if ours.physical is not None:
                assert theirs.physical_address == ours.physical, f"{linear:#x}: {ours}"
                valid += 1

    assert ADDRESSES // 20 < valid < ADDRESSES


def read(machine: Machine, gpa: int, size: int) -> bytes:
    if gpa + size > MEMORY_SIZE:
        raise IndexError(gpa)
    return machine.memory[gpa : gpa + size]
