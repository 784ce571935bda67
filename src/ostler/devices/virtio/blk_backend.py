"""What a block device works on, and who does what may take long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Disk(Protocol):
    """What a block device works on; `ostler.backends.disk` has it in full. Every method may raise OSError."""

    @property
    def size_bytes(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def serial(self) -> str: ...
    def readv(self, offset: int, views: Sequence[memoryview]) -> None: ...
    def writev(self, offset: int, views: Sequence[memoryview]) -> None: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, size: int) -> None: ...
    def write_zeroes(self, offset: int, size: int, *, unmap: bool) -> None: ...


class Worker(Protocol):
    """Who does what may take long; `ostler.backends.worker`."""

    def submit(self, job: Callable[[], None], done: Callable[[OSError | None], None]) -> None: ...
    def wait(self) -> None: ...


class AtOnce:
    """No worker: everything is done while the guest waits."""

    def submit(self, job: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        try:
            job()
        except OSError as error:
            done(error)
        else:
            done(None)

    def wait(self) -> None:
        """Nothing is ever under way."""
