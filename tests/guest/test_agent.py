"""The agent inside a real guest: root disk, commands, copies, freezing, growing, power-off; a root that is missing.

The guest has a busybox and nothing else, so this is also the proof that the agent needs nothing of the guest's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ostler.agent import AgentClient
from ostler.config import parse_guest
from ostler.control.connection import Connection
from ostler.control.launch import Launched, launch
from ostler.control.runtime import AGENT_SOCKET
from ostler.errors import CommandNotFound, CommandTimeout, GuestNotBooted, OstlerError
from ostler.images import initrd, kernels

pytestmark = pytest.mark.usefixtures("needs_an_agent")

MIB = 1 << 20
APPLETS = ("sh", "cat", "sleep", "setsid", "sha256sum", "echo", "touch", "ls", "grep", "hostname", "id", "date")


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder of the test's own, with a name short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="ostler-") as folder:
        Path(folder).chmod(0o700)
        monkeypatch.setenv("OSTLER_RUNTIME", folder)
        yield Path(folder)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An ext4 of 32 MiB with busybox, on a disk of 64 MiB."""
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "etc").mkdir()
    (tree / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\nann:x:1000:100::/:/bin/sh\n")
    (tree / "bin" / "busybox").write_bytes(initrd.busybox_program().read_bytes())
    (tree / "bin" / "busybox").chmod(0o755)
    for applet in APPLETS:
        (tree / "bin" / applet).symlink_to("busybox")
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(32 * MIB)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-E", "resize=1048576", "-d", tree, path], check=True)
    with path.open("r+b") as file:
        file.truncate(64 * MIB)
    return path


@contextlib.contextmanager
def guest(disk: Path, append: str) -> Iterator[Launched]:
    kernel = kernels.fetch()
    spec = parse_guest(
        kernel=kernel.image, initrd=initrd.agent_initrd(kernel), accel="soft", memory="256M", vsock_cid=3,
        append=f"console=ttyS0 quiet cryptomgr.notests {append}",
        virtio_console=True, disks=[{"path": str(disk), "serial": "root-disk", "format": "raw"}],
    )  # fmt: skip
    launched = launch(f"agent-{os.getpid()}", spec.model_dump_json(), facts={}, leash=True)
    assert launched.leash_fd is not None
    try:
        yield launched
    finally:
        os.close(launched.leash_fd)
        launched.process.wait(60)


def test_agent_serves_a_guest_that_has_only_busybox(runtime: Path, disk: Path, tmp_path: Path) -> None:
    assert runtime.is_dir()
    with guest(disk, "ostler.root=serial=root-disk ostler.hostname=small") as launched:
        entry = launched.entry
        with AgentClient.connect(entry.vsock_socket, timeout_s=200, alive=entry.is_running) as agent:
            commands(agent)
            copies(agent, tmp_path)
            file_systems(agent)
        with AgentClient.connect_console(entry.path / AGENT_SOCKET, timeout_s=100) as agent:
            assert agent.run(["cat"], input=b"x" * MIB).stdout == b"x" * MIB
            agent.put_bytes(b"by console", "/console")
        with AgentClient.connect_console(entry.path / AGENT_SOCKET, timeout_s=100) as agent:
            assert agent.get_bytes("/console") == b"by console"
            agent.shutdown()
        assert launched.process.wait(60) == 0


def commands(agent: AgentClient) -> None:
    done = agent.run(["sh", "-c", "cat; hostname; echo $0 >&2; exit 7"], input=b"in\n")
    assert (done.returncode, done.text, done.stderr) == (7, "in\nsmall\n", b"sh\n")
    assert agent.run(["cat", "/proc/1/comm"]).text == "init\n"
    assert agent.run(["id", "-un"], user="ann").text == "ann\n"
    with pytest.raises(CommandNotFound):
        agent.run(["nonexistent"])
    with pytest.raises(CommandTimeout):
        agent.run(["sh", "-c", "setsid sleep 4321 & sleep 4321"], timeout_s=1)
    assert agent.run(["sh", "-c", "grep -l [s]leep.4321 /proc/[0-9]*/cmdline"]).text == ""
    assert [agent.run(["echo", str(number)]).text for number in range(10)] == [f"{n}\n" for n in range(10)]
    info = agent.info()
    assert info.init == "agent"
    assert info.hostname == "small"


def copies(agent: AgentClient, folder: Path) -> None:
    content = os.urandom(2 * MIB)
    (folder / "sent").write_bytes(content)
    agent.put(folder / "sent", "/data/received")
    assert agent.run(["sha256sum", "/data/received"]).text.split()[0] == hashlib.sha256(content).hexdigest()
    agent.get("/data", folder / "back")
    assert (folder / "back" / "received").read_bytes() == content


def file_systems(agent: AgentClient) -> None:
    grown = agent.grow_root()
    assert grown.device_bytes == 64 * MIB
    assert grown.before_bytes < 32 * MIB < grown.after_bytes
    with agent.frozen(limit_s=20):
        with agent.start(["touch", "/written"]) as waiting:
            pass  # started in a frozen system, it may only end after the thaw
        assert waiting.returncode is None
    assert agent.run(["touch", "/written"]).returncode == 0
    agent.set_time(2_000_000_000 * 10**9)
    assert int(agent.run(["date", "+%s"]).text) >= 2_000_000_000
    agent.add_entropy()


def test_root_that_is_missing_is_told_by_the_agent_and_the_power_button_works(runtime: Path, disk: Path) -> None:
    assert runtime.is_dir()
    with guest(disk, "ostler.root=serial=another") as launched:
        entry = launched.entry
        with pytest.raises(GuestNotBooted, match=r"serial=another: no such disk .* vda"):
            AgentClient.connect(entry.vsock_socket, timeout_s=200, alive=entry.is_running)
        press_until_off(launched)


def press_until_off(launched: Launched) -> None:
    """A button pressed before its driver is loaded is not heard, so it is pressed again."""
    for _ in range(30):
        with contextlib.suppress(OstlerError), Connection.to(launched.entry) as control:
            control.request("power-button")
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert launched.process.wait(5) == 0
            return
    raise AssertionError("the guest does not hear its power button")
