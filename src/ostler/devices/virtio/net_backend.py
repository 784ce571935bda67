"""What a network card is plugged into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class NetBackend(Protocol):
    """The wire. Called under the board's lock."""

    features: int
    """Offloads it can take or give, as feature bits."""
    header_bytes: int
    """0, or HEADER_BYTES when its frames carry the header."""
    mtu: int
    """Largest IP packet of both sides."""

    def configure(self, offloads: int) -> None:
        """What the driver accepts of `features` from now on."""

    def attach(self, deliver: Callable[[Sequence[memoryview]], int], writable: Callable[[], None]) -> None:
        """Begin. `deliver` takes frames and says how many it took; fewer means: `pause` yourself until `resume`.

        `writable` is to be called when `send` can be called again.
        """

    def send(self, frames: Sequence[list[memoryview]]) -> bool:
        """Send all of these, each in pieces; false when no more should come until `writable`."""

    def resume(self) -> None:
        """There is room again for frames that were not taken."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run on the event loop, under the board's lock."""
