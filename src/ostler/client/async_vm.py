"""`ostler.VM` for asyncio: the same methods, whose work is done in threads."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar

from ostler.client import guests
from ostler.client.vm import VM, Argument
from ostler.errors import OstlerError

if TYPE_CHECKING:
    from ostler.agent.answers import Info
    from ostler.agent.requests import Completed

P = ParamSpec("P")
T = TypeVar("T")


class AsyncVM:
    """A VM for asyncio: the same methods, awaited. `async with VM(…)` gives one."""

    def __init__(self, vm: VM) -> None:
        self.vm = vm

    async def start(self) -> Self:
        await _in_thread(self.vm.start)
        return self

    async def stop(self, *, grace_s: float = guests.DEFAULT_GRACE_S) -> None:
        await _in_thread(self.vm.stop, grace_s=grace_s)

    async def close(self) -> None:
        await _in_thread(self.vm.close)

    @property
    def name(self) -> str:
        return self.vm.name

    async def info(self) -> Info:
        return await _in_thread(self.vm.info)

    async def stats(self) -> dict[str, Any]:
        return await _in_thread(self.vm.stats)

    async def run(
        self, argv: Sequence[Argument], *, input: bytes | str | None = None, env: Mapping[str, str] | None = None,  # noqa: A002
        cwd: Argument | None = None, user: str | None = None, timeout_s: float | None = None, check: bool = False,
    ) -> Completed:  # fmt: skip
        """As `VM.run`. A task that is cancelled leaves the command to its time-out."""
        return await _in_thread(
            self.vm.run, argv, input=input, env=env, cwd=cwd, user=user, timeout_s=timeout_s, check=check
        )

    async def put(self, source: str | os.PathLike[str], target: str) -> None:
        await _in_thread(self.vm.put, source, target)

    async def get(self, source: str, target: str | os.PathLike[str]) -> None:
        await _in_thread(self.vm.get, source, target)

    async def write(self, path: str, content: bytes | str, *, mode: int = 0o644) -> None:
        await _in_thread(self.vm.write, path, content, mode=mode)

    async def read(self, path: str) -> bytes:
        return await _in_thread(self.vm.read, path)

    async def pause(self) -> None:
        await _in_thread(self.vm.pause)

    async def resume(self) -> None:
        await _in_thread(self.vm.resume)

    async def snapshot(
        self, name: str, *, incremental: bool = False, freeze: bool = False, replace: bool = False
    ) -> dict[str, Any]:
        """As `VM.snapshot`."""
        return await _in_thread(self.vm.snapshot, name, incremental=incremental, freeze=freeze, replace=replace)

    @classmethod
    async def restore(
        cls, snapshot: str, *, name: str | None = None, ports: bool = True, accel: str | None = None
    ) -> Self:
        """As `VM.restore`."""
        return cls(await _in_thread(VM.restore, snapshot, name=name, ports=ports, accel=accel))

    async def fork(self, count: int = 1, *, names: Sequence[str] | None = None) -> list[AsyncVM]:
        """As `VM.fork`."""
        return [AsyncVM(child) for child in await _in_thread(self.vm.fork, count, names=names)]

    async def migrate(self, address: str, **wish: Any) -> dict[str, Any]:
        """As `VM.migrate`; a task that is cancelled calls it off."""
        from ostler.client import moving

        moved = asyncio.create_task(_in_thread(self.vm.migrate, address, **wish))
        try:
            return await asyncio.shield(moved)
        except asyncio.CancelledError:
            with contextlib.suppress(OstlerError):
                await _in_thread(moving.cancel, self.vm._running().entry)
            with contextlib.suppress(OstlerError):
                await moved
            raise

    async def set_memory(self, size: str | int) -> None:
        await _in_thread(self.vm.set_memory, size)

    async def schedule(self, **shares: Any) -> dict[str, Any]:
        """As `VM.schedule`."""
        return await _in_thread(self.vm.schedule, **shares)

    async def wait(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        return await _in_thread(self.vm.wait, timeout_s=timeout_s)

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """As `VM.events`."""
        with self.vm.events() as events:
            while (event := await _in_thread(next, events, None)) is not None:
                yield event

    async def __aenter__(self) -> Self:
        return self if self.vm._guest is not None else await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _in_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    return await asyncio.to_thread(call, *args, **kwargs)
