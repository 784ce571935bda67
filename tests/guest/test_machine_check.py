"""A page that has gone bad, as Linux in the guest sees it: logged, taken away, fatal to who touches it."""

from __future__ import annotations

import pytest

import ostler
from ostler.errors import BadRequest

pytestmark = pytest.mark.usefixtures("needs_an_agent")
LIMIT_S = 90.0
# A page of its own, where it is, and then, when told to, what is in it.
PROGRAM = """
import mmap, struct, sys, ctypes
area = mmap.mmap(-1, mmap.PAGESIZE)
area[:] = b'x' * mmap.PAGESIZE
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
with open('/proc/self/pagemap', 'rb') as file:
    file.seek(address // mmap.PAGESIZE * 8)
    print(f"{struct.unpack('Q', file.read(8))[0] & (1 << 55) - 1:016x}", flush=True)
sys.stdin.readline()
print(area[0])
"""
SIGBUS = 7


def test_bad_page_is_logged_taken_away_and_ends_who_touches_it() -> None:
    # Debian 12's kernel for virtual machines is made without machine checks; this one has them.
    model = "ostler-v3.1,+mce,+mca"
    with ostler.VM(
        "debian:13", memory="384M", cpus=2, cpu=model, accel="soft", nets=["none"], cold=True, on_memory_error="report"
    ) as vm:
        with vm.popen(["python3", "-c", PROGRAM]) as process:
            page = int(process.stdout.read(17, timeout_s=LIMIT_S), 16)
            vm.inject("memory-error", address=page << 12)
            log = vm.run(["sh", "-c", f"until dmesg | grep 'Memory failure: {page:#x}:.*ecovered'; do sleep 0.1; done"],
                         timeout_s=LIMIT_S).text  # fmt: skip
            assert "Recovered" in log
            process.stdin.write(b"\n")
            assert process.wait(LIMIT_S) == -SIGBUS
        assert "Machine check events logged" in vm.run(["dmesg"]).text
        assert vm.run(["echo", "works"], timeout_s=LIMIT_S).text == "works\n"


def test_guest_without_machine_checks_cannot_be_told() -> None:
    with (
        ostler.VM("debian", memory="256M", accel="soft", nets=["none"], on_memory_error="report") as vm,
        pytest.raises(BadRequest, match=r"has no machine checks; expected one with mce and mca"),
    ):
        vm.inject("memory-error", address=0x10_0000)
