"""QEMU's firmware configuration device, ports 0x510 and 0x511 (docs/specs/fw_cfg).

Bare-metal test programs learn the number of processors and the size of memory from it. Only the
selector and the data port are offered: the identity's DMA bit is clear. Items are read-only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ostler.devices.state import Saved, load, save, uint

FW_CFG_PORT, FW_CFG_PORTS = 0x510, 2

SIGNATURE, ID, UUID, RAM_SIZE, NOGRAPHIC, NB_CPUS = range(6)
MAX_CPUS = 0x0F
FILE_DIRECTORY = 0x19
FIRST_FILE = 0x20
# By the specification; a longer name does not fit its directory entry.
MAX_FILE_NAME = 55


@dataclass(slots=True)
class FwCfgState:
    """What is selected and how far it is read; the items come from the specification."""

    key: int = uint(16)
    cursor: int = uint(32)


class FwCfg:
    """A selector and a cursor into the selected item; behind its end everything reads zero."""

    def __init__(self, *, cpus: int, ram_bytes: int, files: Mapping[str, bytes] | None = None) -> None:
        self._items: dict[int, bytes] = {
            SIGNATURE: b"QEMU",
            ID: (1).to_bytes(4, "little"),
            UUID: bytes(16),
            RAM_SIZE: ram_bytes.to_bytes(8, "little"),
            NOGRAPHIC: (1).to_bytes(2, "little"),
            NB_CPUS: cpus.to_bytes(2, "little"),
            MAX_CPUS: cpus.to_bytes(2, "little"),
        }
        self._add_files(files or {})
        self._state = FwCfgState()
        self._selected = self._items[SIGNATURE]

    def _add_files(self, files: Mapping[str, bytes]) -> None:
        directory = len(files).to_bytes(4, "big")
        for key, (name, data) in enumerate(sorted(files.items()), start=FIRST_FILE):
            if len(name.encode()) > MAX_FILE_NAME:
                raise ValueError(f"fw_cfg file {name!r}: name longer than {MAX_FILE_NAME} bytes")
            self._items[key] = data
            directory += len(data).to_bytes(4, "big") + key.to_bytes(2, "big") + bytes(2)
            directory += name.encode().ljust(MAX_FILE_NAME + 1, b"\0")
        self._items[FILE_DIRECTORY] = directory

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        cursor = self._state.cursor
        if offset == 0 or cursor >= len(self._selected):
            return 0
        self._state.cursor = cursor + 1
        return self._selected[cursor]

    def write(self, offset: int, size: int, value: int) -> None:
        # The selector is a 16-bit register; a byte written to the data port changes nothing.
        if offset == 0 and size == 2:
            self._select(FwCfgState(value))

    def save(self) -> Saved:
        return save(self._state)

    def restore(self, data: Mapping[str, object]) -> None:
        """Raises StateError and then changes nothing."""
        self._select(load(FwCfgState, "fw_cfg", data))

    def _select(self, state: FwCfgState) -> None:
        self._state = state
        self._selected = self._items.get(state.key, b"")
