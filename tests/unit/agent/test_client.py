"""The blocking client and the real agent, which runs on this host: commands, their ends, misbehaving peers."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from ostler.agent import AgentClient, Terminal
from ostler.agent.link import Link
from ostler.agent.process import Process
from ostler.agent.protocol import VERSION, WINDOW_BYTES
from ostler.agent.wire import Kind, encode, encode_json
from ostler.errors import (
    AgentError,
    AgentLost,
    AgentProtocolError,
    AgentRefused,
    AgentUnavailable,
    BadRequest,
    CommandNotExecutable,
    CommandNotFound,
    CommandTimeout,
    GuestNotBooted,
)
from tests.unit.agent.conftest import Script

HELLO = encode_json(Kind.HELLO, {"protocol": "ostler-agent", "version": 1, "agent": "9.9", "features": ["exec"]})


def alive_with(text: str) -> list[int]:
    """Processes of this host whose command line holds `text`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if text.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def wait_until_gone(text: str) -> None:
    for _ in range(400):
        if not alive_with(text):
            return
        time.sleep(0.01)  # nothing tells when somebody else's process has ended
    raise AssertionError(f"still there: {alive_with(text)}")


def test_command_gives_its_output_and_status(agent: AgentClient) -> None:
    done = agent.run(["sh", "-c", "cat; echo oops >&2; exit 7"], input=b"abc")

    assert (done.returncode, done.stdout, done.stderr) == (7, b"abc", b"oops\n")


def test_greeting_says_version_and_features(agent: AgentClient) -> None:
    assert agent.hello is not None
    assert agent.hello.version == VERSION
    assert {"exec", "put", "get", "freeze"} <= agent.hello.features


def test_command_that_is_not_there_or_not_executable_is_told_as_shells_do(agent: AgentClient, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    orphan = tmp_path / "orphan"
    orphan.write_text("#!/nonexistent/interpreter\n")
    orphan.chmod(0o755)

    for argv in (["nonexistent-command"], ["/nonexistent/command"]):
        with pytest.raises(CommandNotFound, match="not found"):
            agent.run(argv)
    for path in (plain, orphan, tmp_path):
        with pytest.raises(CommandNotExecutable):
            agent.run([path])


def test_environment_folder_and_defaults_are_the_commands(agent: AgentClient, tmp_path: Path) -> None:
    done = agent.run(["sh", "-c", "echo $GREETING; pwd; echo $PATH"], env={"GREETING": "hi there"}, cwd=tmp_path)

    assert done.text.splitlines() == [
        "hi there",
        str(tmp_path),
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]


def test_folder_or_user_that_is_not_there_is_refused(agent: AgentClient) -> None:
    with pytest.raises(AgentRefused, match="nonexistent") as refusal:
        agent.run(["true"], cwd="/nonexistent")
    assert refusal.value.code == "no-folder"
    with pytest.raises(AgentRefused, match="no-such-user") as refusal:
        agent.run(["true"], user="no-such-user")
    assert refusal.value.code == "no-user"


def test_user_has_its_numbers_groups_and_home(agent: AgentClient, is_root: bool) -> None:  # noqa: FBT001
    if not is_root:
        pytest.skip("only root becomes somebody else")
    done = agent.run(["sh", "-c", "id -u; id -g; id -G; echo $HOME $USER"], user="4242:99")

    assert done.text.splitlines() == ["4242", "99", "99", "/ 4242"]


def test_arguments_survive_as_bytes(agent: AgentClient) -> None:
    odd = b'caf\xe9 "\n\\ \xf0\x9f\x90\xb4'

    assert agent.run(["printf", "%s", odd]).stdout == odd


def test_bad_requests_are_refused_before_anything_is_sent(agent: AgentClient) -> None:
    for argv in ([], "ls", ["a\0b"]):
        with pytest.raises(BadRequest):
            agent.run(argv)
    with pytest.raises(BadRequest):
        agent.run(["true"], env={"A=B": "c"})
    with pytest.raises(AgentRefused, match="at most"):
        agent.run(["echo", "x" * 70_000])


def test_command_killed_by_a_signal_has_a_negative_status(agent: AgentClient) -> None:
    assert agent.run(["sh", "-c", "kill -USR1 $$"]).returncode == -signal.SIGUSR1
    # Real-time signals have no name, and are no reason to lose the status.
    assert agent.run(["sh", "-c", "kill -40 $$"]).returncode == -40


def test_command_killed_by_its_time_leaves_nobody(agent: AgentClient) -> None:
    mark = f"9876.{os.getpid()}"
    script = f"(setsid sh -c 'sleep {mark}; sleep {mark}' & setsid sleep {mark} &); echo before; sleep {mark}"

    with pytest.raises(CommandTimeout, match=r"killed after 0\.5 s") as caught:
        agent.run(["sh", "-c", script], timeout_s=0.5)

    assert caught.value.stdout == b"before\n"
    assert alive_with(mark) == []


def test_command_whose_host_is_gone_is_ended(agent: AgentClient) -> None:
    mark = f"9877.{os.getpid()}"
    process = agent.start(["sh", "-c", f"trap '' HUP; echo up; sleep {mark}"])
    assert process.stdout.read(10) == b"up\n"

    process.close()

    wait_until_gone(mark)


def test_daemon_left_behind_by_a_command_lives_on_and_is_not_waited_for(agent: AgentClient) -> None:
    done = agent.run(["sh", "-c", "sleep 9878 & echo $!"])

    daemon = int(done.text)
    assert Path(f"/proc/{daemon}").exists()
    assert agent.run(["kill", "-9", str(daemon)]).returncode == 0


def test_large_input_and_output_pass_unaltered(agent: AgentClient) -> None:
    content = os.urandom(3_000_000)

    done = agent.run(["sh", "-c", "tee /dev/stderr"], input=content)

    assert done.stdout == content
    assert done.stderr == content


def test_more_output_than_allowed_ends_the_command(agent: AgentClient) -> None:
    mark = f"y{os.getpid()}y"
    with pytest.raises(AgentError, match="more than 100000 bytes"):
        agent.run(["yes", mark], limit_bytes=100_000)

    wait_until_gone(mark)


def test_stream_nobody_reads_stalls_only_itself(agent: AgentClient) -> None:
    script = "head -c 2000000 /dev/zero & echo heard >&2; wait"
    with agent.start(["sh", "-c", script]) as process:
        assert process.stderr.read(6, timeout_s=20) == b"heard\n"
        assert len(process._state.buffers[1]) * 1 <= WINDOW_BYTES
        assert len(process.stdout.read()) == 2_000_000
        assert process.wait(20) == 0


def test_input_that_nobody_reads_does_not_hold_the_end_up(agent: AgentClient) -> None:
    assert agent.run(["true"], input=b"x" * 2_000_000).returncode == 0


def test_terminal_has_its_size_and_takes_another(agent: AgentClient) -> None:
    script = "trap 'stty size; exit 3' WINCH; stty size; echo ready; while :; do sleep 0.01; done"
    with agent.start(["sh", "-c", script], tty=Terminal(33, 99, "vt100")) as process:
        assert b"33 99\r\nready" in _read_until(process, b"ready")
        process.resize(10, 20)
        assert b"10 20" in _read_until(process, b"10 20")
        assert process.wait(20) == 3


def test_interrupt_typed_on_a_terminal_reaches_the_command(agent: AgentClient) -> None:
    with agent.start(["sh", "-c", "echo ready; exec sleep 9879"], tty=Terminal()) as process:
        _read_until(process, b"ready")
        process.stdin.write(b"\x03")
        assert process.wait(20) == -signal.SIGINT


def test_end_of_input_on_a_terminal_ends_a_reader(agent: AgentClient) -> None:
    with agent.start(["cat"], tty=Terminal()) as process:
        process.stdin.write(b"one\n")
        process.stdin.close()
        assert process.wait(20) == 0
        assert process.stdout.read() == b"one\r\none\r\n"


def test_signal_reaches_the_whole_group(agent: AgentClient) -> None:
    with agent.start(["sh", "-c", "trap 'echo got; exit 5' TERM; echo ready; sleep 9880 & wait"]) as process:
        _read_until(process, b"ready")
        process.terminate()
        assert process.wait(20) == 5
        assert process.stdout.read() == b"got\n"


def test_relay_connects_descriptors(agent: AgentClient) -> None:
    in_reader, in_writer = os.pipe()
    out_reader, out_writer = os.pipe()
    os.write(in_writer, b"line\n")
    os.close(in_writer)
    with agent.start(["sh", "-c", "cat; echo more; exit 4"]) as process:
        assert process.relay(in_reader, out_writer, out_writer) == 4
    os.close(out_writer)
    assert os.read(out_reader, 100) == b"line\nmore\n"
    for fd in (in_reader, out_reader):
        os.close(fd)


def test_two_hundred_commands_in_a_row_are_answered(agent: AgentClient) -> None:
    assert [agent.run(["echo", str(number)]).text for number in range(200)] == [f"{n}\n" for n in range(200)]


def test_commands_at_once_from_several_threads_do_not_mix(agent: AgentClient) -> None:
    found: dict[int, bytes] = {}

    def work(number: int) -> None:
        found[number] = agent.run(["sh", "-c", f"head -c 300000 /dev/zero | tr '\\0' {number}"]).stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: str(number).encode() * 300_000 for number in range(5)}


def test_operations_follow_each_other_on_one_stream(agent_socket: Path, tmp_path: Path) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(agent_socket))
    with AgentClient.over(sock, timeout_s=20) as client:
        assert client.run(["echo", "one"]).text == "one\n"
        with pytest.raises(CommandNotFound):
            client.run(["nonexistent-command"])
        with pytest.raises(AgentRefused):
            client.put_bytes(b"x" * 300_000, "/proc/nowhere/file")
        client.put_bytes(b"two", str(tmp_path / "two"))
        assert client.get_bytes(str(tmp_path / "two")) == b"two"
        with pytest.raises(CommandTimeout):
            client.run(["sleep", "9881"], timeout_s=0.1)
        assert client.info().cpus >= 1


def test_next_operation_takes_the_connection_of_one_that_has_ended(agent: AgentClient) -> None:
    parents = {agent.run(["sh", "-c", "echo $PPID"]).text for _ in range(3)}
    with pytest.raises(CommandNotFound):
        agent.run(["nonexistent-command"])
    with pytest.raises(AgentError, match="more than 10 bytes"):
        agent.run(["yes"], limit_bytes=10)
    parents.add(agent.run(["sh", "-c", "echo $PPID"]).text)

    assert len(parents) == 2  # output that was too much broke one off


def test_kept_connection_that_the_guest_ended_is_not_used(agent: AgentClient) -> None:
    served_by = int(agent.run(["sh", "-c", "echo $PPID"]).text)
    os.kill(served_by, signal.SIGKILL)
    while Path(f"/proc/{served_by}").exists():
        time.sleep(0.01)

    assert agent.run(["echo", "fine"]).text == "fine\n"


def test_info_says_what_the_guest_is(agent: AgentClient) -> None:
    info = agent.info()

    assert info.kernel == os.uname().release
    assert info.memory.total_bytes is not None
    assert info.memory.total_bytes > 1 << 20
    assert any(address.address == "127.0.0.1" and address.prefix == 8 for address in info.addresses)
    assert agent.ping() < 20


def test_unknown_operation_is_refused_and_the_connection_goes_on(agent_socket: Path) -> None:
    with AgentClient.connect_unix(agent_socket) as client, client._link() as connection:
        with pytest.raises(AgentRefused, match="does not know") as refusal:
            connection.call("fly", {}, 20)
        assert refusal.value.code == "unsupported"
        assert connection.call("ping", {}, 20) == {}


def test_agent_that_is_not_there_is_said_in_time(tmp_path: Path) -> None:
    with pytest.raises(AgentUnavailable, match="no answer"):
        AgentClient.connect(tmp_path / "vsock.sock", timeout_s=0.1)
    with pytest.raises(AgentUnavailable, match="ended before"):
        AgentClient.connect(tmp_path / "vsock.sock", timeout_s=60, alive=lambda: False)


def test_vsock_that_refuses_the_port_counts_as_not_there_yet(tmp_path: Path) -> None:
    path = Path(os.path.relpath(tmp_path / "v.sock"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        asked: list[bytes] = []

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(100))
                connection.sendall(b"x" * 1000)  # never a line

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(AgentUnavailable):
            AgentClient.connect(path, timeout_s=0.1)
        thread.join(20)
    assert asked == [b"CONNECT 1024\n"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"", AgentLost),
        (HELLO[:10], AgentLost),
        (b"\xff" * 100, AgentProtocolError),
        (encode_json(Kind.ERROR, {"code": "version", "message": "too old"}), AgentRefused),
        (encode_json(Kind.HELLO, {"protocol": "ostler-agent", "version": 1, "agent": "1", "features": [],
                                  "trouble": "root serial=x: no such disk"}), GuestNotBooted),
    ],
)  # fmt: skip
def test_agent_that_greets_badly_is_an_error(scripted: Script, said: bytes, expected: type[AgentError]) -> None:
    link = scripted(said)
    with pytest.raises(expected):
        link.greet(20)
    link.close()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (encode_json(Kind.REPLY, {"pid": 5}) + encode(Kind.DATA, b"some", 1), AgentLost),
        (encode_json(Kind.REPLY, {"pid": "five"}), AgentProtocolError),
        (encode_json(Kind.REPLY, {"pid": 5}) * 2, AgentProtocolError),
        (encode_json(Kind.REPLY, {"pid": 5}) + encode(Kind.DATA, b"x" * 65536, 1) * 5, AgentProtocolError),
    ],
)
def test_agent_that_breaks_off_a_command_is_an_error(scripted: Script, said: bytes, expected: type[AgentError]) -> None:
    link = scripted(HELLO + said)
    with pytest.raises(expected):
        _talk(link)
    link.close()


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        encode(Kind.HELLO, b"{}"),
        encode(Kind.REQUEST, b'{"op":"info"}'),
        encode_json(Kind.HELLO, {"protocol": "ostler-agent", "versions": [1, 1]}) + encode(Kind.HELLO, b""),
        encode_json(Kind.HELLO, {"protocol": "ostler-agent", "versions": [1, 1]}) * 2,
        encode_json(Kind.HELLO, {"protocol": "ostler-agent", "versions": [7, 9]}),
        encode_json(Kind.HELLO, {"protocol": "ostler-agent", "versions": [1, 1]}) + b"\xff" * 64,
        encode_json(Kind.HELLO, {"protocol": "ostler-agent", "versions": [1, 1]}) + encode(Kind.REQUEST, b"[" * 60_000),
        encode_json(Kind.HELLO, {"protocol": "ostler-agent", "versions": [1, 1]})
        + encode_json(Kind.REQUEST, {"op": "exec", "argv": ["cat"], "stdin": True})
        + encode(Kind.DATA, b"x" * 65536) * 9,
    ],
)  # fmt: skip
def test_agent_survives_a_host_that_talks_nonsense(agent: AgentClient, agent_socket: Path, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(agent_socket))
        try:
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
        except ConnectionError:
            pass  # hung up on, which is fine
    assert agent.run(["echo", "fine"]).text == "fine\n"


def _talk(link: Link) -> None:
    request = link.conversation.request("exec", {"argv": ["x"]})
    link.greet(20)
    link.send(request)
    Process(link, ["x"], start_timeout_s=20).wait(20)


def _read_until(process: Process, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        piece = process.stdout.read(1000, timeout_s=20)
        assert piece, seen
        seen += piece
    return seen
