"""Every fault of docs/faults.md, on purpose, in a guest that runs: what comes of it, that it is told, and that the host
and the guest's process are none the worse."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ostler
from ostler.client import guests
from ostler.client.events import Events

pytestmark = pytest.mark.usefixtures("needs_an_agent")
LIMIT_S = 90.0
DISK_BYTES = 8 << 20
# Two seconds, and then nobody feeds it unless this program does.
FEEDS = """
import fcntl, os, struct, time
fd = os.open('/dev/watchdog', os.O_WRONLY)
fcntl.ioctl(fd, 0xC0045706, struct.pack('i', 2))
print('fed', flush=True)
while True:
    os.write(fd, b'.')
    time.sleep(0.3)
"""


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ostler.VM]:
    disk = tmp_path_factory.mktemp("faults") / "data.img"
    disk.write_bytes(bytes(DISK_BYTES))
    nets = ["passt"] if shutil.which("passt") else ["none"]
    with ostler.VM("debian", memory="384M", accel="soft", nets=nets, disks=[f"{disk},format=raw"], cold=True) as vm:
        yield vm


def until(events: Events, name: str, **values: object) -> dict[str, Any]:
    """The next event of that name; those before it are of no interest."""
    for each in events:
        if each["event"] == name and values.items() <= each.items():
            return each
    raise AssertionError(f"the guest ended before {name}")


def works(vm: ostler.VM) -> bool:
    return vm.run(["echo", "works"], timeout_s=LIMIT_S).text == "works\n"


def test_disk_error_is_the_guests_to_see_and_does_not_stay(vm: ostler.VM) -> None:
    read = ["dd", "if=/dev/vdb", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"]
    with vm.events(timeout_s=LIMIT_S) as events:
        assert vm.inject("disk-error", device="disk1", requests=["read"]) == {"device": "disk1", "count": 1}
        assert b"Input/output error" in vm.run(read).stderr
        told = until(events, "fault")
        assert (told["fault"], told["policy"], told["injected"]) == ("disk-error", "report", True)
    assert vm.run(read).returncode == 0


def test_disk_without_space_pauses_the_guest_until_there_is_some(vm: ostler.VM) -> None:
    with vm.events(timeout_s=LIMIT_S) as events:
        vm.inject("no-space", device="disk1", count=2)
        process = vm.popen(["dd", "if=/dev/zero", "of=/dev/vdb", "bs=4096", "count=1", "oflag=direct", "conv=notrunc"])
        with process:
            assert until(events, "fault")["fault"] == "no-space"
            assert until(events, "paused")["fault"] == "no-space"
            assert until(events, "resumed")["fault"] == "no-space"
            assert process.wait(LIMIT_S) == 0


def test_hang_is_noticed_by_the_watchdog_that_the_guest_feeds(vm: ostler.VM) -> None:
    vm.run(["modprobe", "wdat_wdt"], check=True)
    vm.on_fault(hang="pause")
    with vm.popen(["python3", "-c", FEEDS]) as process, vm.events(timeout_s=LIMIT_S) as events:
        assert process.stdout.read(4, timeout_s=LIMIT_S) == b"fed\n"
        assert vm.inject("hang", seconds=60) == {"watchdog": True, "watchdog_timeout_s": 2.0}
        told = until(events, "fault", fault="hang")
        assert (told["policy"], told["injected"]) == ("pause", True)
        until(events, "paused", fault="hang")
        vm.resume()
        assert works(vm)
        process.kill()
        process.wait()
    vm.on_fault(hang="ignore")


def test_panic_is_told_and_pauses_where_that_is_the_policy(vm: ostler.VM) -> None:
    vm.on_fault(panic="pause")
    with vm.events(timeout_s=LIMIT_S) as events:
        vm.inject("panic")
        assert until(events, "fault")["fault"] == "panic"
        until(events, "paused")
    vm.resume()
    assert works(vm)


def test_unknown_nmi_is_the_guests_own_business(vm: ostler.VM) -> None:
    vm.inject("nmi")
    assert works(vm)
    assert "NMI received for unknown reason" in vm.run(["dmesg"]).text


@pytest.mark.skipif(shutil.which("passt") is None, reason="no passt on this host")
def test_back_end_that_is_lost_is_told_and_comes_back(vm: ostler.VM) -> None:
    with vm.events(timeout_s=LIMIT_S) as events:
        vm.inject("backend-lost", device="net0")
        assert until(events, "fault")["fault"] == "backend-lost"
    assert works(vm)


def test_memory_error_that_is_ignored_is_told(vm: ostler.VM) -> None:
    vm.on_fault(memory_error="ignore")
    with vm.events(timeout_s=LIMIT_S) as events:
        vm.inject("memory-error", address=0x123_4567)
        assert until(events, "fault")["message"] == "memory error at guest-physical address 0x1234567"
    assert works(vm)


def test_triple_fault_ends_the_guest_as_a_crash(vm: ostler.VM) -> None:
    """The last of this guest."""
    entry = vm._running().entry
    with vm.events(timeout_s=LIMIT_S) as events:
        vm.inject("triple-fault")
        told = until(events, "fault")
        assert (told["fault"], told["policy"], told["vcpu"]) == ("triple-fault", "poweroff", 0)
        end = until(events, "ended")
        assert (end["status"], end["reason"]) == (3, "TripleFault")
    assert entry.name not in [each.name for each in guests.summaries() if each.state == "running"]


@pytest.mark.parametrize("fault", ["panic", "triple-fault", "real panic"])
def test_guest_that_is_reset_boots_again_in_its_own_process(fault: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"on_panic": "reset", "on_triple_fault": "reset"}
    disk = tmp_path / "data.img"
    disk.write_bytes(bytes(DISK_BYTES))
    options["disks"] = [f"{disk},format=raw"]
    with ostler.VM("debian", memory="384M", accel="soft", nets=["none"], cpus=2, cold=True, **options) as vm:
        pid = guests.request(vm._running().entry, "status")["pid"]
        vm.run(["sh", "-c", "echo kept | dd of=/dev/vdb oflag=sync; touch /run/of-this-boot"], check=True)
        with vm.events(timeout_s=LIMIT_S) as events:
            if fault == "real panic":
                with vm.popen(["sh", "-c", "echo c > /proc/sysrq-trigger"]):
                    until(events, "reset")
            else:
                vm.inject(fault)
                until(events, "reset")
        vm.reconnect()
        assert vm.run(["head", "-c", "4", "/dev/vdb"], timeout_s=LIMIT_S).text == "kept"
        assert vm.run(["test", "-e", "/run/of-this-boot"]).returncode == 1
        assert guests.request(vm._running().entry, "status")["pid"] == pid
        assert vm.run(["nproc"]).text == "2\n"
