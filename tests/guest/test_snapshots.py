"""Guests saved, begun again and forked while they run: what they were doing goes on, and each is one of its own."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ostler
from ostler.control import pool
from ostler.errors import BadRequest
from ostler.snapshot import store

pytestmark = pytest.mark.usefixtures("needs_an_agent")

# Counts in memory and on disk, in step; whoever reads both sees whether they belong together.
COUNTER = "n=0; while :; do n=$((n + 1)); echo $n > /dev/shm/count; echo $n > /root/count; sleep 0.02; done"
WARM_S = 60


@pytest.fixture(scope="module", autouse=True)
def _own_data() -> Iterator[None]:
    """Snapshots of the tests' own, and a pool that ends with them."""
    with tempfile.TemporaryDirectory(prefix="ostler-") as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OSTLER_DATA", name)
        patch.setenv("OSTLER_POOL", "on")
        patch.setenv("OSTLER_RUNTIME", str(Path(name) / "run"))
        pool.start()
        assert pool.wait_until_warm(WARM_S)
        yield
        assert pool.stop()


@pytest.fixture(scope="module")
def parent(_own_data: None) -> Iterator[ostler.VM]:
    with ostler.VM("debian", accel="soft", nets=[], name="parent") as vm:
        vm.run(["sh", "-c", f"({COUNTER}) > /dev/null 2>&1 &"], check=True)
        yield vm


def counts(vm: ostler.VM) -> tuple[int, int]:
    return whole_number(vm, "/dev/shm/count"), whole_number(vm, "/root/count")


def whole_number(vm: ostler.VM, path: str) -> int:
    """What is in a file that the shell empties before it writes to it: for a moment there is nothing."""
    for _ in range(100):
        if text := vm.read(path):
            return int(text)
    raise AssertionError(f"{path} stays empty")


def uptime_s(vm: ostler.VM) -> float:
    return float(vm.read("/proc/uptime").split()[0])


def test_restored_guest_goes_on_as_another(parent: ostler.VM) -> None:
    parent.write("/root/before", "snapshot")
    done = parent.snapshot("one", freeze=True)
    before = counts(parent)[0]
    parent.write("/root/after", "snapshot")
    assert 0 < done["pause_ms"] < 10_000
    with ostler.VM.restore("one", name="again") as vm:
        assert vm.run(["hostname"]).text == "again\n"
        assert vm.read("/root/before") == b"snapshot"
        assert vm.run(["test", "-e", "/root/after"]).returncode == 1
        assert abs(float(vm.run(["date", "+%s.%N"]).text) - time.time()) < 30
        memory, disk = counts(vm)
        assert memory > 0
        assert abs(memory - disk) <= 2, (before, memory, disk)
    assert parent.run(["hostname"]).text == "parent\n"
    store.remove("one")


def test_guest_made_ahead_has_a_name_and_a_time_of_its_own(parent: ostler.VM) -> None:
    parent.snapshot("ahead")
    saved_at_most = uptime_s(parent)
    names, ids = [], []
    for number in range(3):
        began = time.monotonic()
        with ostler.VM.restore("ahead", ports=False) as vm:
            names.append(vm.run(["hostname"]).text.strip() == vm.name)
            ids.append(vm.read("/proc/sys/kernel/random/uuid"))
            assert abs(float(vm.run(["date", "+%s.%N"]).text) - time.time()) < 60
            # No clock of its may have gone on while it waited, which is seconds; /proc/uptime has hundredths of them.
            assert uptime_s(vm) <= saved_at_most + (time.monotonic() - began) + 0.05
        assert pool.wait_until_warm(WARM_S, ready=1), number
    store.remove("ahead")
    assert names == [True] * 3
    assert len({*ids}) == 3


def test_incremental_snapshot_goes_on_from_its_parent(parent: ostler.VM) -> None:
    parent.snapshot("whole")
    with ostler.VM.restore("whole") as vm:
        vm.write("/dev/shm/later", "in memory")
        vm.write("/root/later", "on disk")
        done = vm.snapshot("changes", incremental=True)
        assert str(done["parent"]).startswith("whole:")
    whole, changes = store.find("whole"), store.find("changes")
    assert changes.disk_bytes < whole.disk_bytes / 2
    with ostler.VM.restore("changes") as vm:
        assert vm.read("/dev/shm/later") == b"in memory"
        assert vm.read("/root/later") == b"on disk"
    with pytest.raises(BadRequest, match="changes go on from it"):
        store.remove("whole")
    store.verify(changes, everything=True)
    store.remove("changes")
    store.remove("whole")


def test_children_are_unlike_each_other_and_their_parent(parent: ostler.VM) -> None:
    parent.write("/root/family", "all")
    first = parent.fork(names=["child-1", "child-2"])
    # A second generation of layers and of memory, caught another way.
    second = first[0].fork(names=["grandchild"])
    children = [*first, *second]
    try:
        said = [vm.run(["sh", "-c", "hostname; head -c 16 /dev/urandom | od -An -tx1"]).text for vm in children]
        assert [each.split("\n")[0] for each in said] == ["child-1", "child-2", "grandchild"]
        assert len({each.split("\n")[1] for each in said}) == 3
        for vm in children:
            vm.write("/root/family", vm.name)
        assert [vm.read("/root/family").decode() for vm in children] == ["child-1", "child-2", "grandchild"]
        assert parent.read("/root/family") == b"all"
        assert all(counts(vm)[0] > 0 for vm in children)
    finally:
        for vm in children:
            vm.close()
    folders = [each.name for each in (Path(os.environ["OSTLER_RUNTIME"]) / "guests" / "parent").iterdir()]
    assert not [each for each in folders if each.startswith("fork-")]


def test_guest_with_a_disk_of_its_own_is_copied_but_not_forked(tmp_path: Path) -> None:
    disk = tmp_path / "data.raw"
    disk.write_bytes(bytes(1 << 20))
    with ostler.VM("debian", accel="soft", nets=[], disks=[f"{disk},format=raw"]) as vm:
        vm.run(["sh", "-c", "echo first > /dev/vdb; sync"], check=True)
        with pytest.raises(BadRequest, match="no child can share it"):
            vm.fork()
        vm.snapshot("own")
        vm.run(["sh", "-c", "echo later > /dev/vdb; sync"], check=True)
        with ostler.VM.restore("own") as again:
            assert again.run(["head", "-c", "5", "/dev/vdb"]).text == "first"
    assert disk.read_bytes()[:5] == b"later"
    store.remove("own")


def test_second_run_begins_booted_and_is_nobody_elses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OSTLER_COLD")
    monkeypatch.setattr("ostler.client.warm.root", lambda: tmp_path)

    def boot(name: str) -> tuple[str, str]:
        with ostler.VM("debian", accel="soft", nets=[], name=name) as vm:
            found = vm.run(["sh", "-c", "hostname; test -e /root/mark; echo $?; echo x > /root/mark"]).text
            return found, vm.run(["cat", "/proc/sys/kernel/random/uuid"]).text

    first, second, third = boot("first"), boot("second"), boot("third")
    (folder,) = tmp_path.iterdir()
    assert (folder / "manifest.json").exists()
    assert [each[0] for each in (first, second, third)] == ["first\n1\n", "second\n1\n", "third\n1\n"]
    assert len({each[1] for each in (first, second, third)}) == 3
    # What is damaged is not believed: the guest boots, and leaves another. One made ahead has read it before.
    monkeypatch.setenv("OSTLER_POOL", "bare")
    (folder / "state").write_bytes(b"damaged")
    assert boot("fourth")[0] == "fourth\n1\n"
    assert (folder / "state").read_bytes() != b"damaged"


def test_documented_example_runs() -> None:
    document = Path(__file__).parents[2] / "docs" / "snapshots.md"
    (example,) = re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(example, str(document), "exec"), {})
    store.remove("docs")
