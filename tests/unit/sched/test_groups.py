"""Control groups, as files in a folder that looks like the kernel's."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from ostler.sched.groups import FOLDER, PLACE_FILE, V1, V2, Group, Kind, effective_weight, find_group
from ostler.sched.policy import Due
from ostler.sched.table import Share

UNCONTENDED = Due(math.inf, math.inf)
FILES = {
    V1: ("cgroup.procs", "tasks", "cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us"),
    V2: ("cgroup.procs", "cgroup.threads", "cgroup.type", "cgroup.subtree_control", "cpu.weight", "cpu.max"),
}


def kernel_folder(path: Path, kind: Kind) -> Path:
    """A group as the kernel makes one."""
    path.mkdir(parents=True, exist_ok=True)
    for name in FILES[kind]:
        (path / name).touch()
    if kind is V2:
        (path / "cgroup.controllers").write_text("cpu memory\n")
    return path


def group(root: Path, kind: Kind, name: str = "web-7") -> Group:
    home, place = kernel_folder(root, kind), kernel_folder(root / FOLDER, kind)
    kernel_folder(place / name, kind)
    return Group(kind, place, name, home, lambda: [11, 12])


def read(path: Path) -> str:
    return path.read_text()


def test_v2_threads_are_parted_from_their_process_which_moves_first(tmp_path: Path) -> None:
    made = group(tmp_path, V2)
    made.join()
    place = tmp_path / FOLDER
    assert read(tmp_path / "cgroup.subtree_control") == read(place / "cgroup.subtree_control") == "+cpu"
    assert read(place / "cgroup.procs") == str(os.getpid())
    assert read(made.path / "cgroup.type") == "threaded"
    assert read(made.path / "cgroup.threads") == "12"  # the last written; a file here keeps one


def test_v1_moves_threads_alone(tmp_path: Path) -> None:
    made = group(tmp_path, V1)
    made.join()
    assert read(tmp_path / FOLDER / "cgroup.procs") == ""
    assert read(made.path / "tasks") == "12"


def test_v2_weight_and_cap(tmp_path: Path) -> None:
    made = group(tmp_path, V2)
    made.join()
    made.apply(Share(250, cap=0.25), Due(0.2, 0.001), weights=700)
    assert (read(made.path / "cpu.weight"), read(made.path / "cpu.max")) == ("250", "25000 100000")
    assert read(tmp_path / FOLDER / "cpu.weight") == "700"
    made.relax()
    assert (read(made.path / "cpu.weight"), read(made.path / "cpu.max")[:3]) == ("100", "max")


def test_v1_weight_and_cap(tmp_path: Path) -> None:
    made = group(tmp_path, V1)
    made.join()
    made.apply(Share(250, cap=1.5), Due(0.2, 0.001))
    assert read(made.path / "cpu.shares") == "2560"
    assert (read(made.path / "cpu.cfs_quota_us"), read(made.path / "cpu.cfs_period_us")) == ("150000", "100000")
    made.relax()
    assert read(made.path / "cpu.cfs_quota_us")[:2] == "-1"


def test_what_has_not_changed_is_not_written_again(tmp_path: Path) -> None:
    made = group(tmp_path, V1)
    made.join()
    made.apply(Share(250), UNCONTENDED)
    (made.path / "cpu.shares").write_text("")
    made.apply(Share(250), UNCONTENDED)
    assert read(made.path / "cpu.shares") == ""


def test_kernel_that_refuses_is_an_os_error(tmp_path: Path) -> None:
    made = group(tmp_path, V2)
    (tmp_path / "cgroup.subtree_control").unlink()
    with pytest.raises(FileNotFoundError):
        made.join()


@pytest.mark.parametrize(
    ("share", "due", "weight"),
    [
        pytest.param(Share(300), Due(0.1, 0.001), 300, id="none reserved"),
        pytest.param(Share(100, reserve=0.3), Due(0.3, 0.0007), 0.3 / 0.0007, id="reservation above its weight's due"),
        pytest.param(Share(500, reserve=0.3), Due(0.5, 0.001), 500, id="weight above its reservation"),
        pytest.param(Share(100, reserve=0.3), UNCONTENDED, 100, id="nobody waits"),
        pytest.param(Share(100, reserve=0.3), Due(0.1, 0.01), 100, id="it does not want all that is reserved"),
        pytest.param(Share(100, reserve=0.8), Due(0.5, -0.4), 5000, id="reserved too much"),
    ],
)
def test_reservation_is_a_weight_again(share: Share, due: Due, weight: float) -> None:
    assert effective_weight(share, due) == pytest.approx(weight)


def proc(folder: Path, mounts: str, groups: str) -> Path:
    folder.mkdir()
    (folder / "mountinfo").write_text(mounts)
    (folder / "cgroup").write_text(groups)
    return folder


def mount(kind: str, at: Path, options: str = "rw") -> str:
    return f"35 24 0:30 / {at} rw,nosuid - {kind} cgroup {options}\n"


def test_v2_highest_delegated_group_with_the_controller_is_chosen(tmp_path: Path) -> None:
    root = tmp_path / "sys"
    home = kernel_folder(root / "slice/user/session", V2)
    kernel_folder(root / "slice/user", V2)
    kernel_folder(root / "slice", V2)
    (root / "slice/cgroup.controllers").write_text("memory\n")
    me = proc(tmp_path / "proc", mount("cgroup2", root), "0::/slice/user/session\n")
    found = find_group("web-7", tmp_path, list, proc=me)
    assert found is not None
    assert (found.kind, found.path) == ("cgroup v2", home.parent / FOLDER / "web-7")
    assert read(tmp_path / PLACE_FILE) == f"cgroup v2: {home.parent / FOLDER}"


def test_v1_is_taken_where_v2_has_no_cpu_controller_and_others_follow(tmp_path: Path) -> None:
    unified, cpu = kernel_folder(tmp_path / "unified", V2), kernel_folder(tmp_path / "cpu", V1)
    (unified / "cgroup.controllers").write_text("hugetlb\n")
    mounts = mount("cgroup2", unified) + mount("cgroup", cpu, "rw,cpu,cpuacct") + mount("cgroup", tmp_path, "rw,pids")
    me = proc(tmp_path / "proc", mounts, "3:pids:/\n1:cpu,cpuacct:/\n0::/\n")
    found = find_group("web-7", tmp_path, list, proc=me)
    assert found is not None
    assert (found.kind, found.path) == ("cgroup v1", cpu / FOLDER / "web-7")
    kernel_folder(cpu / "elsewhere", V1)
    other = proc(tmp_path / "other", mounts, "1:cpu,cpuacct:/elsewhere\n0::/\n")
    followed = find_group("db-8", tmp_path, list, proc=other)
    assert followed is not None
    assert followed.path == cpu / FOLDER / "db-8"


@pytest.mark.parametrize("groups", ["0::/\n", "1:cpu:/\n", "", "nonsense\n"])
def test_no_controller_is_no_group(tmp_path: Path, groups: str) -> None:
    me = proc(tmp_path / "proc", mount("cgroup2", tmp_path / "nothing"), groups)
    assert find_group("web-7", tmp_path, list, proc=me) is None
