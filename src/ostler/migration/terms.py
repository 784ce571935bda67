"""What a migration is given and what it tells: the guest as its VM process shows it, how to move it, how far it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ostler.memory import GuestMemory
from ostler.migration.address import Address, TlsFiles
from ostler.migration.dirty import DirtyTracker
from ostler.migration.disks import Mirror

T = TypeVar("T")


class Guest(Protocol):
    """The guest that moves, as its VM process shows it. Every method but `on_loop` is for the loop's thread."""

    memory: GuestMemory
    mirrors: Sequence[tuple[int, Mirror]]
    """Disks that go along, by their number."""

    def offer(self) -> dict[str, Any]:
        """name, spec, facts, disks: what HELLO says."""

    tracker: DirtyTracker

    def begin(self) -> None:
        """The tracker starts, the mirrors take the disks' places."""

    def stop(self) -> bool:
        """Hold the processors; whether somebody had paused the guest before, who is to find it so there too."""

    def save(self) -> bytes:
        """The state; what devices have under way ends, and every queue counts as written."""

    def go_on(self) -> None:
        """The guest runs on here, whatever it was doing; tracker and mirrors go."""

    def give_away(self) -> None:
        """Let the other side have what only one may hold: locks of disks."""

    def take_back(self) -> None:
        """Undo `give_away`."""

    def strays(self) -> Sequence[tuple[int, bytes]]:
        """Network frames that came while the guest stood still, by its cards' numbers."""

    def on_loop(self, call: Callable[[], T]) -> T:
        """Run it in the loop's thread and wait for its end."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to move a guest."""

    address: Address
    witness_folder: Path
    tls: TlsFiles | None = None
    streams: int = 1
    compression: str = "none"
    bytes_per_s: float | None = None
    downtime_s: float = 0.04
    timeout_s: float = 30.0
    post_copy: str = "never"
    """`never`; `auto`: where memory changes faster than it is sent; `now`: after one round."""


@dataclass(slots=True)
class Progress:
    """What can be said of a migration at any time; seconds and bytes."""

    phase: str = "connecting"
    round: int = 0
    sent_bytes: int = 0
    left_bytes: int = 0
    total_bytes: int = 0
    zero_bytes: int = 0
    bytes_per_s: float = 0.0
    dirty_bytes_per_s: float = 0.0
    eta_s: float | None = None
    pause_s: float | None = None
    elapsed_s: float = 0.0
    asked: int = 0
    """Pages that the guest waited for after it had gone."""
    pause_parts: dict[str, float] = field(default_factory=dict)
