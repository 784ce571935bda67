"""Memory slots: dirty logs, read-only slots, moving slots under running vCPUs, eventfds on addresses.

Linux's Documentation/virt/kvm/api.rst: KVM_SET_USER_MEMORY_REGION, KVM_GET_DIRTY_LOG, KVM_IOEVENTFD.
"""

import os
import threading

import pytest

from ostler.abi.kvm.board import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from ostler.accel.api import Cap
from ostler.errors import AccelError
from tests.accel.conftest import Lab
from tests.accel.lab import MEMORY_SIZE, Machine
from tests.accel.prelude import LAYOUT

MMIO, FREE = LAYOUT["MMIO"], LAYOUT["FREE"]

# Programs run below 2 MiB; the slot under test lies behind, at 2 MiB, mapped by one large page.
SPLIT = 0x20_0000


def with_upper_slot(lab: Lab, source: str, flags: int) -> Machine:
    machine = lab.machine(source, lower_memory_end=SPLIT)
    machine.vm.set_user_memory_region(1, SPLIT, MEMORY_SIZE - SPLIT, machine.host_address + SPLIT, flags)
    return machine


def dirty_pages(bitmap: bytes | bytearray) -> set[int]:
    return {8 * at + bit for at, byte in enumerate(bitmap) for bit in range(8) if byte >> bit & 1}


def test_dirty_log_names_pages_written_since_the_last_look(lab: Lab) -> None:
    with with_upper_slot(
        lab,
        """
    start:
        mov     eax, ds:[0x200000]
        mov     ds:[0x201008], al
        mov     ds:[0x203ffe], eax                  # two pages
        lock inc dword ptr ds:[0x280000]
        out     0x80, al
        mov     edi, 0x210ff8
        mov     ecx, 2
        rep stosq
        finish
    """,
        KVM_MEM_LOG_DIRTY_PAGES,
    ) as machine:
        first: list[set[int]] = []
        machine.on_ask(lambda: first.append(dirty_pages(machine.vm.get_dirty_log(1))))

        machine.run()

        # KVM maps a page it reads writable at once where the host's own mapping is, and calls it dirty.
        merely_read = {0} if lab.name == "kvm" else set()
        assert {1, 3, 4, 0x80} <= first[0] <= {1, 3, 4, 0x80} | merely_read
        assert dirty_pages(machine.vm.get_dirty_log(1)) == {0x10, 0x11}
        assert dirty_pages(machine.vm.get_dirty_log(1)) == set()


def test_dirty_log_switched_on_later_starts_clean(lab: Lab) -> None:
    with with_upper_slot(
        lab,
        """
    start:
        mov     ds:[0x201000], eax
        out     0x80, al
        mov     ds:[0x202000], eax
        finish
    """,
        0,
    ) as machine:

        def log_from_now_on() -> None:
            machine.vm.set_user_memory_region(
                1, SPLIT, MEMORY_SIZE - SPLIT, machine.host_address + SPLIT, KVM_MEM_LOG_DIRTY_PAGES
            )

        machine.on_ask(log_from_now_on)

        machine.run()

        assert dirty_pages(machine.vm.get_dirty_log(1)) == {2}


def test_dirty_log_includes_the_walker_and_delivery(lab: Lab) -> None:
    """Accessed bits and exception frames are writes too."""
    with with_upper_slot(
        lab,
        f"""
    start:
        resume_at done
        mov     dword ptr ds:[0x206000], 0x207003   # a PT for 4 MiB on, in the slot
        mov     dword ptr ds:[0x207000], 0
        mov     rax, 0x206003
        mov     ds:[{LAYOUT["PD"] + 16:#x}], rax
        out     0x80, al
        mov     eax, ds:[0x400000]                  # sets the accessed bit in 0x206000
        mov     rsp, 0x209000
        ud2                                         # pushes to 0x208fd8
    done:
        finish
    """,
        KVM_MEM_LOG_DIRTY_PAGES,
    ) as machine:
        machine.on_ask(lambda: machine.vm.get_dirty_log(1))

        machine.run()

        assert {6, 8} <= dirty_pages(machine.vm.get_dirty_log(1)) <= {6, 8}


def test_dirty_log_cleared_by_hand_keeps_what_was_not_named(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine:
        if not machine.vm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2):
            pytest.skip("no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
    with lab.machine(
        """
    start:
        mov     ds:[0x201000], eax
        mov     ds:[0x242000], eax
        finish
    """,
        lower_memory_end=SPLIT,
    ) as machine:
        machine.vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, 1)
        machine.vm.set_user_memory_region(
            1, SPLIT, MEMORY_SIZE - SPLIT, machine.host_address + SPLIT, KVM_MEM_LOG_DIRTY_PAGES
        )

        machine.run()

        assert dirty_pages(machine.vm.get_dirty_log(1)) == {1, 0x42}
        assert dirty_pages(machine.vm.get_dirty_log(1)) == {1, 0x42}
        machine.vm.clear_dirty_log(1, 64, 64, b"\xff" * 8)
        assert dirty_pages(machine.vm.get_dirty_log(1)) == {1}


def test_read_only_slot_reads_as_memory_and_writes_as_mmio(lab: Lab) -> None:
    with with_upper_slot(
        lab,
        """
    start:
        mov     eax, ds:[0x200010]
        report  rax
        mov     dword ptr ds:[0x200010], 0x1234
        mov     eax, ds:[0x200010]
        report  rax
        mov     ecx, 0x200020
        call    rcx                                 # it executes, too
        report  rax
        finish
    """,
        KVM_MEM_READONLY,
    ) as machine:
        machine.write(0x20_0010, 0x77, 4)
        machine.memory[0x20_0020:0x20_0026] = b"\xb8\x99\0\0\0\xc3"  # mov eax, 0x99; ret

        assert machine.run() == [0x77, 0x77, 0x99]
        assert machine.exits == [("write", 0x20_0010, 4, b"\x34\x12\0\0")]


def test_slot_removed_becomes_mmio_and_comes_back(lab: Lab) -> None:
    with with_upper_slot(
        lab,
        """
    start:
        mov     eax, ds:[0x200000]
        report  rax
        out     0x80, al
        mov     eax, ds:[0x200000]
        report  rax
        out     0x80, al
        mov     eax, ds:[0x200000]
        report  rax
        finish
    """,
        0,
    ) as machine:
        machine.write(SPLIT, 0x11, 4)

        def fill(_kind: str, _address: int, data: memoryview) -> None:
            data[:] = b"\x22\0\0\0"

        machine.mmio = fill
        vm, host = machine.vm, machine.host_address
        machine.on_ask(
            lambda: vm.set_user_memory_region(1, SPLIT, 0, host + SPLIT),
            lambda: vm.set_user_memory_region(1, SPLIT, MEMORY_SIZE - SPLIT, host + SPLIT),
        )

        assert machine.run() == [0x11, 0x22, 0x11]
        assert [(kind, at) for kind, at, _, _ in machine.exits if kind == "read"] == [("read", SPLIT)]


def test_slot_replaced_while_a_vcpu_spins_on_it_takes_effect(lab: Lab) -> None:
    """The vCPU has the old page in its TLB; between the two slots there is none, and its reads leave as MMIO."""
    with with_upper_slot(
        lab,
        """
    start:
        mov     eax, ds:[0x200100]
        mov     ds:[FREE], eax                      # tells the host that it spins
        cmp     eax, 2
        jne     start
        report  rax
        finish
    """,
        0,
    ) as machine:
        half = (MEMORY_SIZE - SPLIT) // 2
        machine.write(SPLIT + 0x100, 1)
        machine.write(SPLIT + half + 0x100, 2)

        def replace() -> None:
            while machine.read(FREE) != 1:
                pass
            machine.vm.set_user_memory_region(1, SPLIT, 0, machine.host_address + SPLIT)
            machine.vm.set_user_memory_region(1, SPLIT, half, machine.host_address + SPLIT + half)

        replacer = threading.Thread(target=replace)
        replacer.start()

        assert machine.run() == [2]
        replacer.join()


def test_slots_that_overlap_are_refused(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine, pytest.raises(AccelError, match="File exists"):
        machine.vm.set_user_memory_region(1, 0x1000, 0x1000, machine.host_address)


def test_slot_that_is_not_page_aligned_is_refused(lab: Lab) -> None:
    with lab.machine("start:\nfinish\n") as machine, pytest.raises(AccelError, match="Invalid argument"):
        machine.vm.set_user_memory_region(1, 0x1000_0800, 0x1000, machine.host_address)


def test_code_the_host_wrote_runs_after_memory_written(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     edi, 3
    again:
        call    patched
        report  rax
        out     0x80, al
        dec     edi
        jnz     again
        finish
    patched:
        mov     eax, 1
        ret
    """) as machine:
        at = machine.label("patched") + 1
        count = 1

        def patch() -> None:
            nonlocal count
            count += 1
            machine.write(at, count, 4)
            machine.vm.memory_written(at, 4)

        machine.on_ask(patch)

        assert machine.run() == [1, 2, 3]


def test_code_the_guest_wrote_runs(lab: Lab) -> None:
    with lab.machine("""
    start:
        mov     edi, 3
    again:
        call    patched
        report  rax
        inc     byte ptr [patched + 1]
        mov     byte ptr [next + 1], 9              # in the block that runs
    next:
        mov     al, 1
        movzx   eax, al
        report  rax
        dec     edi
        jnz     again
        finish
    patched:
        mov     eax, 1
        ret
    """) as machine:
        assert machine.run() == [1, 9, 2, 9, 3, 9]


class Events:
    """eventfds closed at the end; `value` reads and clears one."""

    def __init__(self, count: int) -> None:
        self.fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]

    def __enter__(self) -> list[int]:
        return self.fds

    def __exit__(self, *_: object) -> None:
        for fd in self.fds:
            os.close(fd)


def value(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def test_ioeventfd_takes_matching_mmio_writes(lab: Lab) -> None:
    with (
        Events(3) as (any_value, only_seven, any_length),
        lab.machine("""
    start:
        mov     ebx, MMIO
        mov     dword ptr [rbx], 1
        mov     dword ptr [rbx], 2
        mov     word ptr [rbx], 3                   # another length: an exit
        mov     dword ptr [rbx + 0x10], 7
        mov     dword ptr [rbx + 0x10], 8           # another value: an exit
        mov     byte ptr [rbx + 0x20], 1
        mov     qword ptr [rbx + 0x20], 2
        mov     eax, [rbx]                          # a read: an exit
        finish
    """) as machine,
    ):
        machine.vm.ioeventfd(any_value, MMIO, 4)
        machine.vm.ioeventfd(only_seven, MMIO + 0x10, 4, datamatch=7)
        machine.vm.ioeventfd(any_length, MMIO + 0x20, 0)

        machine.run()

        assert [value(fd) for fd in (any_value, only_seven, any_length)] == [2, 1, 2]
        assert [(kind, at - MMIO, size) for kind, at, size, _ in machine.exits] == [
            ("write", 0, 2),
            ("write", 0x10, 4),
            ("read", 0, 4),
        ]


def test_ioeventfd_takes_matching_port_writes_until_deassigned(lab: Lab) -> None:
    with (
        Events(1) as (event,),
        lab.machine("""
    start:
        mov     dx, 0x510
        mov     ax, 5
        out     dx, ax
        mov     ax, 6
        out     dx, ax
        out     0x80, al
        mov     ax, 5
        out     dx, ax
        finish
    """) as machine,
    ):
        machine.vm.ioeventfd(event, 0x510, 2, datamatch=5, pio=True)
        machine.on_ask(lambda: machine.vm.ioeventfd(event, 0x510, 2, datamatch=5, pio=True, deassign=True))

        machine.run()

        assert value(event) == 1
        assert [data for _, port, _, data in machine.exits if port == 0x510] == [b"\x06\0", b"\x05\0"]


def test_ioeventfd_twice_at_one_place_is_refused(lab: Lab) -> None:
    with Events(2) as (one, two), lab.machine("start:\nfinish\n") as machine:
        machine.vm.ioeventfd(one, MMIO, 4)

        with pytest.raises(AccelError, match="File exists"):
            machine.vm.ioeventfd(two, MMIO, 4)


def test_dirty_log_misses_nothing_while_it_is_read(lab: Lab) -> None:
    """Every page the vCPU counted as written shows in one of the looks taken meanwhile."""
    with with_upper_slot(
        lab,
        """
    start:
        mov     ecx, 0x200000
    next:
        mov     ds:[rcx], rcx
        add     ecx, 0x1000
        cmp     ecx, 0x400000
        jb      next
        finish
    """,
        KVM_MEM_LOG_DIRTY_PAGES,
    ) as machine:
        seen: set[int] = set()
        done = threading.Event()

        def look() -> None:
            while not done.is_set():
                seen.update(dirty_pages(machine.vm.get_dirty_log(1)))

        looker = threading.Thread(target=look)
        looker.start()
        machine.run()
        done.set()
        looker.join()

        assert seen | dirty_pages(machine.vm.get_dirty_log(1)) == set(range(0x200))
