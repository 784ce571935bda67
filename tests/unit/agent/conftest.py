"""The real agent as an ordinary process of the host's, and a scripted one that misbehaves."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ostler.agent import AgentClient
from ostler.agent.link import Link
from ostler.errors import BadRequest
from ostler.images.initrd import agent_program

Script = Callable[[bytes], Link]


@pytest.fixture(scope="session")
def agent_socket() -> Iterator[Path]:
    """The socket of an agent that runs as whoever runs the tests."""
    try:
        program = agent_program()
    except BadRequest as error:
        pytest.skip(str(error))
    # Not pytest's own folder: its path may be longer than a socket's can be.
    with tempfile.TemporaryDirectory(prefix="ostler-") as folder:
        path = Path(folder) / "agent.sock"
        local = Path(folder) / "ostler-agent"
        local.write_bytes(program.read_bytes())  # a wheel does not keep it executable
        local.chmod(0o755)
        # Deaf to what a terminal sends, as in a job that a shell put into the background: no command may be.
        deaf = ["env", "--ignore-signal=INT", "--ignore-signal=QUIT"]
        with subprocess.Popen([*deaf, local, "--listen", f"unix:{path}"], start_new_session=True) as process:
            try:
                AgentClient.connect_unix(path, timeout_s=20).close()
                yield path
            finally:
                process.terminate()


@pytest.fixture
def agent(agent_socket: Path) -> Iterator[AgentClient]:
    """A client of that agent."""
    with AgentClient.connect_unix(agent_socket, timeout_s=20) as client:
        yield client


@pytest.fixture
def scripted() -> Iterator[Script]:
    """`scripted(bytes)` is a link to an agent that sends these bytes, whatever it is told, and then hangs up."""
    threads: list[threading.Thread] = []

    def make(said: bytes) -> Link:
        ours, theirs = socket.socketpair()

        def speak() -> None:
            with theirs:
                try:
                    theirs.sendall(said)
                    theirs.shutdown(socket.SHUT_WR)
                    while theirs.recv(1 << 16):
                        pass
                except OSError:
                    pass  # the host hung up first, as it should

        threads.append(threading.Thread(target=speak))
        threads[-1].start()
        return Link(ours)

    yield make
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def is_root() -> bool:
    return os.geteuid() == 0
