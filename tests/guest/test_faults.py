"""Every fault of docs/faults.md, on purpose, in a guest that runs: what comes of it, that it is told, and that the host
and the guest's process are none the worse."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import ostler
from ostler.backends import virtiofsd
from ostler.client import guests
from ostler.client.events import Events
from ostler.control import pool, runtime
from ostler.control.runtime import Entry
from ostler.errors import BadRequest, HostError
from ostler.host.helpers import find_program
from tests.guest.harness import OSTLER

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


def storage_daemon_missing() -> bool:
    return shutil.which("qemu-storage-daemon") is None or shutil.which("qemu-img") is None


def virtiofsd_missing() -> bool:
    try:
        return not find_program(virtiofsd.PROGRAM, package=virtiofsd.PACKAGE)
    except HostError:
        return True


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


@pytest.mark.skipif(storage_daemon_missing(), reason="no qemu-storage-daemon or qemu-img on this host")
def test_program_of_a_qcow2_disk_that_is_lost_is_told_started_again_and_asked_again(tmp_path: Path) -> None:
    disk = tmp_path / "data.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), str(DISK_BYTES)])
    write = (
        "seq 200000 | head -c 1M > /tmp/data; for i in $(seq 40); do dd if=/tmp/data of=/dev/vdb bs=64k oflag=direct"
    )
    with (
        ostler.VM("debian", memory="256M", accel="soft", nets=["none"], disks=[f"{disk},format=qcow2"]) as vm,
        vm.events(timeout_s=LIMIT_S) as events,
    ):
        with pytest.raises(BadRequest, match="expected a disk that this process serves"):
            vm.inject("disk-error", device="disk1")
        with vm.popen(["sh", "-c", f"{write} 2>/dev/null || exit 1; echo; done"]) as process:
            assert process.stdout.read(1, timeout_s=LIMIT_S) == b"\n"
            for _ in range(3):
                vm.inject("backend-lost", device="disk1")
                told = until(events, "fault")
                assert (told["fault"], told["policy"], told["injected"]) == ("backend-lost", "report", True)
            assert process.wait(LIMIT_S) == 0
        compare = "dd if=/dev/vdb bs=64k count=16 iflag=direct 2>/dev/null | cmp - /tmp/data"
        vm.run(["sh", "-c", compare], check=True, timeout_s=LIMIT_S)


@pytest.mark.skipif(virtiofsd_missing(), reason="no virtiofsd on this host")
def test_program_of_a_shared_folder_that_is_lost_is_told_and_the_guest_runs_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("there")
    with (
        ostler.VM("debian", memory="256M", accel="soft", nets=["none"], volumes=[f"{tmp_path}:/shared"]) as vm,
        vm.events(timeout_s=LIMIT_S) as events,
    ):
        assert vm.run(["cat", "/shared/file"], check=True).text == "there"
        vm.inject("backend-lost", device="share0")
        told = until(events, "fault")
        assert (told["fault"], told["message"]) == ("backend-lost", "share0: the program that serves it has ended")
        assert works(vm)
        # Who uses the folder waits for ever, or is refused; nobody else does.
        with vm.popen(["cat", "/shared/file"]) as process:
            assert works(vm)
            process.kill()
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


def test_detached_guest_that_is_reset_has_its_settings_and_its_command_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OSTLER_RUNTIME", str(tmp_path / "run"))
    (tmp_path / "run").mkdir(mode=0o700)
    command = ["sh", "-c", "echo begun on $(hostname); exec sleep 9999"]
    run([*OSTLER, "run", "-d", "--name", "web", "--memory", "256M", "--accel", "soft", "--net", "none", "--on",
         "panic=reset", "debian", "--", *command])  # fmt: skip
    try:
        entry = runtime.find("web")
        lines = followed(entry)
        assert next(lines) == b"begun on web"
        run([*OSTLER, "inject", "web", "panic"])
        assert next(lines) == b"begun on web"
        assert guests.request(entry, "status")["resets"] == 1
        assert run([*OSTLER, "exec", "web", "--", "hostname"]) == "web\n"
    finally:
        guests.remove(runtime.find("web"), force=True)
        pool.stop()


def followed(entry: Entry) -> Iterator[bytes]:
    """Lines of what a detached guest's command says, as they come."""
    text = b""
    for part in guests.follow_output(entry, lines=None, follow=True):
        text += part
        *whole, text = text.split(b"\n")
        yield from whole


def run(words: Sequence[str]) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=LIMIT_S).stdout
