"""A stock kernel that uses KVM's paravirtual calls: spinlocks that sleep, IPIs and yielding by a call."""

from __future__ import annotations

import pytest

import ostler
from ostler.snapshot import store

pytestmark = pytest.mark.usefixtures("needs_an_agent")
CALLS = ("kvm_pv_unhalt", "kvm_pv_send_ipi", "kvm_pv_sched_yield")
MODEL = ",".join(["ostler-v3.1", *(f"+{name}" for name in CALLS)])
# Eight processes on two processors: files in one folder, bytes to and fro, children, memory that all unmap.
LOAD = """
import mmap, os, threading
def files():
    for number in range(300):
        name = f"/dev/shm/{os.getpid()}-{number % 7}"
        with open(name, "wb") as file:
            file.write(b"x" * 100)
        os.unlink(name)
def bytes_to_and_fro():
    (a, b), (c, d) = os.pipe(), os.pipe()
    if not os.fork():
        for _ in range(300):
            os.write(d, os.read(a, 1))
        os._exit(0)
    for number in range(300):
        os.write(b, bytes([number & 255]))
        assert os.read(c, 1) == bytes([number & 255])
    assert os.wait()[1] == 0
def mappings():
    def work():
        for _ in range(100):
            with mmap.mmap(-1, 1 << 16) as area:
                area[0] = area[40000] = 1
    threads = [threading.Thread(target=work) for _ in range(4)]
    [each.start() for each in threads]
    [each.join() for each in threads]
for each in (files, bytes_to_and_fro, mappings, files) * 2:
    if not os.fork():
        each()
        os._exit(0)
assert [os.wait()[1] for _ in range(8)] == [0] * 8
print("all right")
"""


def test_linux_uses_the_calls_it_is_shown_stays_right_and_goes_on_from_a_snapshot() -> None:
    with ostler.VM("debian", memory="384M", cpus=2, cpu=MODEL, accel="soft", nets=["none"], cold=True) as vm:
        log = vm.run(["dmesg"], check=True).text
        for said in ("PV spinlocks enabled", "setup PV IPIs", "setup PV sched yield"):
            assert said in log
        assert vm.run(["python3", "-c", LOAD], check=True).text == "all right\n"
        name = f"{vm.name}-paravirtual"
        try:
            vm.snapshot(name)
            assert store.find(name).manifest.model == MODEL
            with ostler.VM.restore(name) as copy:
                assert copy.run(["python3", "-c", LOAD], check=True).text == "all right\n"
        finally:
            store.remove(name)
        assert not [line for line in vm.run(["dmesg"]).text.splitlines() if "lockup" in line or "stall" in line]
