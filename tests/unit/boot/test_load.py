"""Kernel formats: what is loaded where, and one line for everything malformed."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ostler.boot.entry import CpuMode
from ostler.boot.kernel import Kernel, Protocol
from ostler.boot.load import load_guest, parse_kernel, read_kernel
from ostler.boot.lowmem import CMDLINE_BASE, INFO_BASE, PAGE_TABLES, ZERO_PAGE
from ostler.errors import BadRequest
from ostler.memory import GuestMemory
from ostler.testing import kernels

MIB = 1 << 20
PVH_ELF = kernels.elf64(note=kernels.xen_note(0x10_0010), memory_size=0x2000)


def parse(data: bytes, protocol: Protocol | None = None) -> Kernel:
    return parse_kernel(memoryview(data), "kernel.img", protocol=protocol)


def integer(memory: GuestMemory, gpa: int, size: int = 4) -> int:
    return memory.read_int(gpa, size)


@pytest.mark.parametrize("method", sorted(kernels.COMPRESSORS))
def test_bzimage_payload_every_compression_yields_pvh_kernel(method: str) -> None:
    kernel = parse(kernels.bzimage(kernels.payload(PVH_ELF, method)))
    assert (kernel.protocol, kernel.entry) == (Protocol.PVH, 0x10_0010)
    assert bytes(kernel.segments[0].data) == b"\xf4" * 64
    assert kernel.segments[0].size_bytes == 0x2000


def test_bzimage_without_note_falls_back_to_64_bit_entry() -> None:
    kernel = parse(kernels.bzimage(kernels.payload(kernels.elf64(), "gzip")))
    assert (kernel.protocol, kernel.entry) == (Protocol.LINUX64, 0x100_0200)


def test_pvh_start_info_points_to_everything() -> None:
    with GuestMemory.of_size(32 * MIB) as memory:
        entry = load_guest(memory, parse(PVH_ELF), initrd=b"initrd!", cmdline="console=ttyS0", rsdp=0xE_0000)
        magic, version, _, modules, module_at, line, rsdp, map_at, entries, _ = struct.unpack(
            "<4I4Q2I", memory.read(INFO_BASE, 56)
        )
        assert (magic, version, modules, rsdp) == (0x336EC578, 1, 1, 0xE_0000)
        assert memory.read(line, 14) == b"console=ttyS0\0"
        start, size = struct.unpack("<2Q", memory.read(module_at, 16))
        assert memory.read(start, size) == b"initrd!"
        ram = [struct.unpack("<QQII", memory.read(map_at + 24 * i, 24)) for i in range(entries)]
        assert (0x10_0000, 31 * MIB, 1, 0) in ram
        assert memory.read(0x10_0000, 64) == b"\xf4" * 64
    assert (entry.mode, entry.rip, entry.registers) == (CpuMode.PROTECTED_32, 0x10_0010, {"rbx": INFO_BASE})


def test_linux64_zero_page_and_page_tables() -> None:
    image = kernels.bzimage(kernels.payload(PVH_ELF, "gzip"))
    with GuestMemory.of_size(64 * MIB) as memory:
        kernel = parse(image, Protocol.LINUX64)
        entry = load_guest(memory, kernel, initrd=b"x" * 5000, cmdline="quiet", rsdp=0xE_0000)
        assert memory.read(ZERO_PAGE + 0x202, 4) == b"HdrS"
        assert integer(memory, ZERO_PAGE + 0x228) == CMDLINE_BASE
        assert integer(memory, ZERO_PAGE + 0x70, 8) == 0xE_0000
        assert integer(memory, ZERO_PAGE + 0x21C) == 5000
        assert integer(memory, ZERO_PAGE + 0x218) == 62 * MIB + 2 * MIB - 8192
        assert integer(memory, ZERO_PAGE + 0x1E8, 1) == 5
        assert integer(memory, PAGE_TABLES, 8) == PAGE_TABLES + 0x1003
        assert integer(memory, PAGE_TABLES + 0x2000 + 8 * 2047, 8) == 0xFFE0_0083
    assert (entry.mode, entry.rip, entry.page_table) == (CpuMode.LONG_64, 0x100_0200, PAGE_TABLES)
    assert entry.registers == {"rsi": ZERO_PAGE}


def test_multiboot_elf32_gets_info_and_module() -> None:
    image = kernels.elf32(kernels.multiboot_header() + b"\xf4" * 32, load=0x40_0000)
    with GuestMemory.of_size(16 * MIB) as memory:
        entry = load_guest(memory, parse(image), initrd=b"ENV=1", cmdline="one two")
        info = struct.unpack("<7I", memory.read(INFO_BASE, 28))
        assert info[0] & 0x4D == 0x4D
        assert (info[1], info[2]) == (639, 15 * 1024)
        assert memory.read(info[4], 19) == b"kernel.img one two\0"
        start, end = struct.unpack("<2I", memory.read(info[6], 8))
        assert memory.read(start, end - start) == b"ENV=1"
        assert start % 4096 == 0
        size, at = integer(memory, INFO_BASE + 44), integer(memory, INFO_BASE + 48)
        assert size == 5 * 24
        assert integer(memory, at) == 20
    assert (entry.rip, entry.registers["rax"]) == (0x40_0000, 0x2BADB002)


def test_multiboot_address_fields_place_a_flat_file() -> None:
    fields = (0x10_0000, 0x10_0000, 0x10_0040, 0x10_1000, 0x10_0020)
    image = kernels.multiboot_header(1 << 16, fields).ljust(64, b"\xf4")
    kernel = parse(image)
    assert (kernel.entry, kernel.segments[0].gpa, kernel.segments[0].size_bytes) == (0x10_0020, 0x10_0000, 0x1000)


def test_plain_elf64_enters_at_its_entry_in_long_mode() -> None:
    with GuestMemory.of_size(16 * MIB) as memory:
        entry = load_guest(memory, parse(kernels.elf64(entry=0x10_0004)))
    assert (entry.mode, entry.rip) == (CpuMode.LONG_64, 0x10_0004)


BAD = {
    "empty file": (b"", "empty file"),
    "text file": (b"#!/bin/sh\necho hello\n" * 50, "text file"),
    "other machine": (kernels.elf64(machine=kernels.EM_AARCH64), "EM_AARCH64"),
    "ELF32 without note": (kernels.elf32(), "32-bit ELF"),
    "entry outside": (kernels.elf64(entry=0x5), "entry 0x5"),
    "cut ELF": (kernels.elf64()[:80], "ELF"),
    "cut segment": (kernels.elf64()[:-8], "segment ends"),
    "old protocol": (kernels.bzimage(b"", version=0x0202), "2.02"),
    "truncated bzImage": (kernels.bzimage(kernels.payload(PVH_ELF, "gzip"))[:-64], "truncated"),
    "header only": (kernels.bzimage(b"")[:0x220], "cut off"),
    "bad payload": (kernels.bzimage(kernels.payload(PVH_ELF, "xz")[:40] + bytes(64) + b"\0\1\0\0"), "does not unpack"),
    "unknown payload": (kernels.bzimage(b"\x89LZO" + bytes(60) + b"\0\1\0\0"), "payload starts with 89 4c 5a 4f"),
    "bomb": (kernels.bzimage(kernels.payload(bytes(MIB), "gzip", claimed_size=100)), "expected 100"),
    "huge claim": (kernels.bzimage(kernels.payload(PVH_ELF, "LZ4", claimed_size=1 << 31)), "at most"),
    "no entry": (kernels.bzimage(kernels.payload(kernels.elf64(), "gzip"), xloadflags=0), "neither a PVH note"),
    "video mode": (kernels.elf32(kernels.multiboot_header(4)), "flags 0x4"),
    "no addresses": (kernels.multiboot_header().ljust(99, b"\1"), "no load addresses"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_malformed_kernel_is_one_line_naming_file_and_cause(case: str) -> None:
    data, expected = BAD[case]
    with pytest.raises(BadRequest) as caught:
        parse(data)
    text = str(caught.value)
    assert text.startswith("kernel.img: ")
    assert expected in text
    assert "\n" not in text


def test_kernel_above_memory_is_refused() -> None:
    with (
        GuestMemory.of_size(16 * MIB) as memory,
        pytest.raises(BadRequest, match="guest has 16 MiB"),
    ):
        load_guest(memory, parse(kernels.elf64(load=0x100_0000)))


@pytest.mark.parametrize("load", [0x0, 0x6800, 0x7000, 0x2_F000, 0x9_F000, 0xE_0000])
def test_kernel_over_boot_structures_is_refused(load: int) -> None:
    with GuestMemory.of_size(16 * MIB) as memory, pytest.raises(BadRequest, match="is taken at boot"):
        load_guest(memory, parse(kernels.elf64(load=load, memory_size=0x2000)))


def test_multiboot_program_in_low_memory_is_loaded() -> None:
    image = kernels.elf32(kernels.multiboot_header() + b"\xf4" * 0x2000, load=0x8000)
    with GuestMemory.of_size(16 * MIB) as memory:
        assert load_guest(memory, parse(image)).rip == 0x8000
        assert memory.read(0x800C, 4) == b"\xf4" * 4


def test_initrd_larger_than_memory_is_refused() -> None:
    with GuestMemory.of_size(16 * MIB) as memory, pytest.raises(BadRequest, match="initrd of 16777216 bytes"):
        load_guest(memory, parse(PVH_ELF), initrd=bytes(16 * MIB))


def test_cmdline_longer_than_kernel_takes_is_refused() -> None:
    with GuestMemory.of_size(16 * MIB) as memory, pytest.raises(BadRequest, match="at most 2047"):
        load_guest(memory, parse(PVH_ELF), cmdline="x" * 2048)


def test_read_kernel_missing_or_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="does not exist"):
        read_kernel(tmp_path / "none")
    with pytest.raises(BadRequest, match="not a regular file"):
        read_kernel(tmp_path)


SEEDS = [
    PVH_ELF,
    kernels.elf32(kernels.multiboot_header()),
    kernels.multiboot_header(1 << 16, (0x10_0000, 0x10_0000, 0, 0, 0x10_0020)).ljust(64, b"\xf4"),
    *(kernels.bzimage(kernels.payload(PVH_ELF, method)) for method in sorted(kernels.COMPRESSORS)),
]


@settings(max_examples=400, deadline=None)
@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 64),
)
def test_mutated_kernel_loads_or_is_a_bad_request(seed: bytes, edits: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(seed[: len(seed) - cut] if cut > 32 else seed)
    for at, value in edits if data else []:
        data[at % len(data)] = value
    complaint = ""
    with GuestMemory.of_size(16 * MIB) as memory:
        try:
            load_guest(memory, parse(bytes(data)), initrd=b"initrd", cmdline="x")
        except BadRequest as error:
            complaint = str(error)
    assert "\n" not in complaint


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2048))
def test_random_bytes_load_or_are_a_bad_request(data: bytes) -> None:
    complaint = ""
    try:
        parse(data)
    except BadRequest as error:
        complaint = str(error)
    assert "\n" not in complaint
