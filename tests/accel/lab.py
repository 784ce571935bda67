"""A small machine for bare-metal programs: memory, tables, a log, and a run loop with a time limit.

Programs are assembly (GNU as, Intel syntax) beside the test that judges them. They start in long mode (identity
paging), in 32-bit protected mode or in real mode, append 64-bit values to a log in memory with `report`, and
end with `finish`. Exceptions come to stubs that log a record and go on at the address in `RESUME`; interrupts
above 31 to stubs that log 0x100 + vector and signal EOI to the local APIC.

Guest-physical layout, all below 2 MiB mapped one to one:

    0x01000 GDT       0x02000 IDT        0x03000 TSS
    0x04000 RESUME, LOG_COUNT, LOG
    0x05000 stack of ring 0, growing down from 0x06000; 0x07000 the TSS's RSP0; 0x07800 IST 1; 0x08000 IST 2
    0x08000 section .text
    0x10000 page tables: PML4, PDPT, PD of the first GiB, PT of the first 2 MiB, PD of the fourth GiB
    0x20000 to 0x80000 free, for ring 0 only
    0x80000 section .user and, up to 0xa0000, memory ring 3 may read, write and execute
    3 GiB to 4 GiB mapped one to one by 2 MiB pages: MMIO, IOAPIC, local APIC
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import mmap
import os
import shutil
import subprocess
import tempfile
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from ostler.accel.api import VCPU, VM, Accel, ExitReason, Sregs
from ostler.accel.fitting import install
from ostler.accel.models import CpuModel, model
from ostler.host.folders import cache_root
from tests.accel.prelude import DONE_PORT, LAYOUT, PRELUDE

MEMORY_SIZE = 0x40_0000
TIME_LIMIT_S = 60.0

CODE64, DATA, USER_CODE32, USER_DATA, USER_CODE64, CODE32, TSS_SELECTOR = 0x08, 0x10, 0x1B, 0x23, 0x2B, 0x38, 0x40

# GDT from selector 8 on. Access and flag bytes: present, DPL, type; granularity, size, limit 0xf_ffff.
_DESCRIPTORS = {
    0x08: 0x00AF_9B00_0000_FFFF,  # code, 64-bit, ring 0
    0x10: 0x00CF_9300_0000_FFFF,  # data, ring 0
    0x18: 0x00CF_FB00_0000_FFFF,  # code, 32-bit, ring 3
    0x20: 0x00CF_F300_0000_FFFF,  # data, ring 3
    0x28: 0x00AF_FB00_0000_FFFF,  # code, 64-bit, ring 3
    0x30: 0x00CF_F300_0000_FFFF,  # data, ring 3, where SYSEXIT to 64 bits looks for it
    0x38: 0x00CF_9B00_0000_FFFF,  # code, 32-bit, ring 0
    0x50: 0x0000_9B00_0000_FFFF,  # code, 16-bit, ring 0
    0x58: 0x0000_9300_0000_FFFF,  # data, 16-bit, ring 0
}
_GDT_LIMIT = 0xFF

INTERRUPT_GATE, TRAP_GATE = 0xE, 0xF


@dataclass(frozen=True, slots=True)
class Program:
    """An assembled program: its bytes from `origin` on, and its labels."""

    origin: int
    image: bytes
    symbols: dict[str, int]


@functools.cache
def assemble(source: str) -> Program:
    """Assemble and link, or take what that came to earlier; skips the test where there are no binutils."""
    kept = _kept_programs() / hashlib.sha256(f"{PRELUDE}{LAYOUT}{source}".encode()).hexdigest()
    try:
        header, _, image = kept.read_bytes().partition(b"\n")
        return Program(LAYOUT["TEXT"], zlib.decompress(image), json.loads(header))
    except (OSError, ValueError, zlib.error):
        program = _assemble(source)
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(json.dumps(program.symbols).encode() + b"\n" + zlib.compress(program.image))
        Path(file.name).replace(kept)
    return program


def _kept_programs() -> Path:
    """The nested lab, where starting an assembler takes longer than most tests, is given what the host has."""
    return Path(os.environ.get("OSTLER_TEST_PROGRAMS") or cache_root() / "programs")


def _assemble(source: str) -> Program:
    for tool in ("as", "ld", "objcopy", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} to assemble bare-metal programs with (Debian: binutils)")
    with tempfile.TemporaryDirectory() as folder:
        text, unit, linked, flat = (Path(folder) / name for name in ("a.s", "a.o", "a.elf", "a.bin"))
        text.write_text(PRELUDE + source)
        _tool("as", "--64", "-o", unit, text)
        sections = f"--section-start=.text={LAYOUT['TEXT']:#x}", f"--section-start=.user={LAYOUT['USER']:#x}"
        _tool("ld", "-m", "elf_x86_64", "--no-warn-rwx-segments", "-e", "start", *sections, "-o", linked, unit)
        _tool("objcopy", "-O", "binary", "-j", ".text", "-j", ".user", linked, flat)
        names = [line.split() for line in _tool("nm", linked).splitlines()]
        symbols = {name: int(value, 16) for value, _, name in names}
        return Program(LAYOUT["TEXT"], flat.read_bytes(), symbols)


def _tool(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Given "in" or "out", "read" or "write"; the port or address; the data, to be read or filled.
AccessHandler = Callable[[str, int, memoryview], None]


class Machine:
    """One VM with its memory and vCPUs, loaded with a program."""

    def __init__(  # noqa: PLR0913 - a program runs under many conditions
        self,
        accel: Accel,
        source: str,
        *,
        mode: str = "long",
        vcpus: int = 1,
        irqchip: bool = True,
        pit: bool = False,
        cpu: CpuModel | None = None,
        lower_memory_end: int = MEMORY_SIZE,
        prepare: Callable[[VM], object] = lambda _vm: None,
    ) -> None:
        self.program = assemble(source)
        self.memory = mmap.mmap(-1, MEMORY_SIZE)
        self.host_address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.exits: list[tuple[str, int, int, bytes]] = []
        self.ports: dict[int, AccessHandler] = {}
        self.mmio: AccessHandler | None = None
        self._load()
        self.vm = accel.create_vm()
        prepare(self.vm)
        self.vm.set_user_memory_region(0, 0, lower_memory_end, self.host_address)
        if irqchip:
            self.vm.create_irqchip()
        if pit:
            self.vm.create_pit2()
        self.vcpus: list[VCPU] = [self.vm.create_vcpu(number) for number in range(vcpus)]
        for vcpu in self.vcpus:
            install(cpu or model(), vcpu, vcpus)
        self.vm.memory_written(0, lower_memory_end)
        self.start(self.vcpus[0], mode)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.vm.close()

    def on_ask(self, *actions: Callable[[], object]) -> None:
        """What the host does at each write to port 0x80, in turn; the last one at every further write."""
        waiting = list(actions)

        def handler(_kind: str, _port: int, _data: memoryview) -> None:
            (waiting.pop(0) if len(waiting) > 1 else waiting[0])()

        self.ports[0x80] = handler

    # Memory

    def read(self, address: int, size: int = 8) -> int:
        """A little-endian value."""
        return int.from_bytes(self.memory[address : address + size], "little")

    def write(self, address: int, value: int, size: int = 8) -> None:
        """Set a little-endian value."""
        self.memory[address : address + size] = value.to_bytes(size, "little")

    @property
    def log(self) -> list[int]:
        """What the program reported."""
        count = self.read(LAYOUT["LOG_COUNT"], 4)
        return [self.read(LAYOUT["LOG"] + 8 * index) for index in range(count)]

    def label(self, name: str) -> int:
        """Address of a label."""
        return self.program.symbols[name]

    def set_gate(self, vector: int, label: str, *, ist: int = 0, dpl: int = 0, kind: int = INTERRUPT_GATE) -> None:
        """Point a vector of the 64-bit IDT at a label."""
        target = self.label(label)
        low = (
            (target & 0xFFFF)
            | CODE64 << 16
            | ist << 32
            | (0x80 | dpl << 5 | kind) << 40
            | (target >> 16 & 0xFFFF) << 48
        )
        self.write(LAYOUT["IDT"] + 16 * vector, low)
        self.write(LAYOUT["IDT"] + 16 * vector + 8, target >> 32)

    def map_page(self, linear: int, entry: int) -> None:
        """Set the 4 KiB page-table entry of an address below 2 MiB."""
        self.write(LAYOUT["PT"] + 8 * (linear >> 12), entry)

    def _load(self) -> None:
        end = self.program.origin + len(self.program.image)
        self.memory[self.program.origin : end] = self.program.image
        for selector, descriptor in _DESCRIPTORS.items():
            self.write(LAYOUT["GDT"] + selector, descriptor)
        tss = LAYOUT["TSS"]
        self.write(LAYOUT["GDT"] + TSS_SELECTOR, 0x0000_8B00_0000_0067 | tss << 16)
        self.write(tss + 4, LAYOUT["RSP0"])
        self.write(tss + 0x24, LAYOUT["IST1"])
        self.write(tss + 0x2C, LAYOUT["IST2"])
        self.write(tss + 0x66, 0x68, 2)  # the I/O bitmap lies beyond the limit: no port for ring 3
        self.write(LAYOUT["RESUME"], self.label("lost"))
        for vector in range(256):
            name = f"exception_{vector}" if vector < 32 else f"interrupt_{vector}"
            self.set_gate(vector, name, dpl=3 if vector in (3, 4) else 0)
        self._fill_page_tables()

    def _fill_page_tables(self) -> None:
        present_write, user, large = 0x3, 0x4, 0x80
        self.write(LAYOUT["PML4"], LAYOUT["PDPT"] | present_write | user)
        self.write(LAYOUT["PDPT"], LAYOUT["PD"] | present_write | user)
        self.write(LAYOUT["PDPT"] + 24, LAYOUT["PD3"] | present_write)
        self.write(LAYOUT["PD"], LAYOUT["PT"] | present_write | user)
        self.write(LAYOUT["PD"] + 8, 0x20_0000 | present_write | large)
        for page in range(512):
            in_window = LAYOUT["USER"] <= page << 12 < LAYOUT["USER_END"]
            self.map_page(page << 12, page << 12 | present_write | (user if in_window else 0))
            self.write(LAYOUT["PD3"] + 8 * page, 3 << 30 | page << 21 | present_write | large)

    # Processors

    def start(self, vcpu: VCPU, mode: str, label: str = "start") -> None:
        """Put a vCPU at a label in `long`, `protected` or `real` mode."""
        sregs = vcpu.get_sregs()
        {"long": _long_mode, "protected": _protected_mode, "real": _real_mode}[mode](sregs)
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rip, regs.rsp, regs.rflags = self.label(label), LAYOUT["STACK"], 2
        vcpu.set_regs(regs)

    def run(self, vcpu: VCPU | None = None) -> list[int]:
        """Run until `finish`, noting exits; returns the log."""
        reason = self.run_until_exit(vcpu)
        assert reason is None, f"{reason.name} at {(vcpu or self.vcpus[0]).get_regs().rip:#x}, log {self.log[:24]}"
        return self.log

    def run_until_exit(self, vcpu: VCPU | None = None) -> ExitReason | None:
        """Run until `finish` (None) or an exit that is neither a port nor MMIO access."""
        vcpu = vcpu or self.vcpus[0]
        watchdog = threading.Timer(TIME_LIMIT_S, vcpu.kick)
        watchdog.daemon = True
        watchdog.start()
        try:
            while True:
                reason = vcpu.run()
                if reason is ExitReason.IO:
                    if vcpu.exit.io.port == DONE_PORT:
                        return None
                    self._port(vcpu)
                elif reason is ExitReason.MMIO:
                    self._mmio(vcpu)
                else:
                    return reason
        finally:
            watchdog.cancel()

    def run_all(self) -> list[int]:
        """Run every vCPU in a thread of its own until the first one reaches `finish`."""
        errors: list[BaseException] = []

        def body(vcpu: VCPU) -> None:
            try:
                reason = self.run_until_exit(vcpu)
                if reason is not None and not stopping.is_set():
                    raise AssertionError(f"vCPU {vcpu.id}: {reason.name} at {vcpu.get_regs().rip:#x}")
            except BaseException as error:
                errors.append(error)

        stopping = threading.Event()
        threads = [threading.Thread(target=body, args=(vcpu,)) for vcpu in self.vcpus]
        for thread in threads:
            thread.start()
        threads[0].join()
        stopping.set()
        for vcpu, thread in zip(self.vcpus[1:], threads[1:], strict=True):
            vcpu.kick()
            thread.join()
        assert not errors, errors
        return self.log

    def _port(self, vcpu: VCPU) -> None:
        access = vcpu.exit.io
        kind = "out" if access.is_write else "in"
        if handler := self.ports.get(access.port):
            handler(kind, access.port, access.data)
        self.exits.append((kind, access.port, access.size, bytes(access.data)))

    def _mmio(self, vcpu: VCPU) -> None:
        access = vcpu.exit.mmio
        kind = "write" if access.is_write else "read"
        if self.mmio:
            self.mmio(kind, access.address, access.data)
        self.exits.append((kind, access.address, len(access.data), bytes(access.data)))


def _long_mode(sregs: Sregs) -> None:
    _tables(sregs)
    sregs.cr3 = LAYOUT["PML4"]
    sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10  # PAE, OSFXSR, OSXMMEXCPT
    sregs.cr0 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1 << 1 | 1  # PG, WP, NE, ET, MP, PE
    sregs.efer = 1 << 11 | 1 << 10 | 1 << 8 | 1  # NXE, LMA, LME, SCE
    _flat(sregs, CODE64)
    sregs.cs.l, sregs.cs.db = 1, 0


def _protected_mode(sregs: Sregs) -> None:
    _tables(sregs)
    sregs.cr0 = 1 << 5 | 1 << 4 | 1 << 1 | 1  # NE, ET, MP, PE
    sregs.cr4 = 1 << 9 | 1 << 10
    _flat(sregs, CODE32)


def _real_mode(sregs: Sregs) -> None:
    for segment in (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        segment.base, segment.selector = 0, 0


def _tables(sregs: Sregs) -> None:
    sregs.gdt.base, sregs.gdt.limit = LAYOUT["GDT"], _GDT_LIMIT
    sregs.idt.base, sregs.idt.limit = LAYOUT["IDT"], 0xFFF
    tr = sregs.tr
    tr.base, tr.limit, tr.selector, tr.type, tr.present, tr.s = LAYOUT["TSS"], 0x67, TSS_SELECTOR, 11, 1, 0


def _flat(sregs: Sregs, code_selector: int) -> None:
    for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.cs):
        segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, DATA
        segment.type, segment.present, segment.dpl, segment.s = 3, 1, 0, 1
        segment.db, segment.l, segment.g, segment.unusable = 1, 0, 1, 0
    sregs.cs.selector, sregs.cs.type = code_selector, 11
