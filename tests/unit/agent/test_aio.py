"""The asyncio client and the real agent: the same operations as the blocking one's."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from ostler.agent.aio import AsyncAgentClient
from ostler.agent.requests import Terminal
from ostler.agent.wire import STDERR
from ostler.errors import AgentError, AgentRefused, AgentUnavailable, CommandNotFound, CommandTimeout
from tests.unit.agent.test_client import alive_with, wait_until_gone


def talk(path: Path, work: Callable[[AsyncAgentClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), await AsyncAgentClient.connect_unix(path, timeout_s=20) as client:
            await work(client)

    asyncio.run(main())


def test_commands_run_at_once_and_give_their_output(agent_socket: Path) -> None:
    async def work(client: AsyncAgentClient) -> None:
        done = await asyncio.gather(
            *(client.run(["sh", "-c", f"cat; exit {n}"], input=b"x" * n * 100_000) for n in range(5))
        )
        assert [(each.returncode, len(each.stdout)) for each in done] == [(n, n * 100_000) for n in range(5)]

    talk(agent_socket, work)


def test_failures_are_the_same_exceptions(agent_socket: Path, tmp_path: Path) -> None:
    async def work(client: AsyncAgentClient) -> None:
        with pytest.raises(CommandNotFound):
            await client.run(["nonexistent-command"])
        with pytest.raises(CommandTimeout) as caught:
            await client.run(["sh", "-c", "echo before; sleep 9883"], timeout_s=0.3)
        assert caught.value.stdout == b"before\n"
        with pytest.raises(AgentError, match="more than 1000 bytes"):
            await client.run(["yes"], limit_bytes=1000)
        with pytest.raises(AgentRefused):
            await client.get("/nonexistent", tmp_path)
        with pytest.raises(AgentRefused):
            await client.put_bytes(b"x" * 1_000_000, "/proc/nowhere/file")

    talk(agent_socket, work)


def test_streams_lines_signals_and_terminal_work(agent_socket: Path) -> None:
    async def work(client: AsyncAgentClient) -> None:
        async with await client.start(["sh", "-c", "echo one; echo two; echo err >&2; read x; exit 9"]) as process:
            lines = process.lines()
            assert [await anext(lines), await anext(lines)] == [b"one\n", b"two\n"]
            assert await process.read(STDERR) == b"err\n"
            await process.write(b"go\n")
            assert await process.wait() == 9
        async with await client.start(["sh", "-c", "stty size; cat"], tty=Terminal(11, 22)) as process:
            assert await anext(process.lines()) == b"11 22\r\n"
            await process.terminate()
            assert await process.wait() == -15

    talk(agent_socket, work)


def test_cancelled_command_is_ended(agent_socket: Path) -> None:
    mark = f"9884.{os.getpid()}"

    async def work(client: AsyncAgentClient) -> None:
        running = asyncio.create_task(client.run(["sleep", mark]))
        while not alive_with(mark):
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    talk(agent_socket, work)
    wait_until_gone(mark)


def test_trees_and_bytes_go_both_ways(agent_socket: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "below" / "file").write_bytes(os.urandom(500_000))

    async def work(client: AsyncAgentClient) -> None:
        put = await client.put(source, str(tmp_path / "guest"))
        got = await client.get(str(tmp_path / "guest"), tmp_path / "back")
        assert put.bytes == got.bytes == 500_000
        await client.put_bytes(b"bytes", str(tmp_path / "bytes"))
        assert await client.get_bytes(str(tmp_path / "bytes")) == b"bytes"
        assert (await client.info()).cpus >= 1

    talk(agent_socket, work)
    assert (tmp_path / "back/below/file").read_bytes() == (source / "below/file").read_bytes()


def test_agent_that_is_not_there_is_said_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(AgentUnavailable, match="no answer"):
            await AsyncAgentClient.connect(tmp_path / "vsock.sock", timeout_s=0.1)

    asyncio.run(main())
