"""Kernel modules for an initrd: the wanted ones and everything they need, out of a tree with depmod's `modules.dep`.

Modules are unpacked here rather than in the guest, where it would cost its processor's time at every start.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from backports import zstd

from ostler.errors import ImageError

_SUFFIX = re.compile(r"\.ko(\.xz|\.zst)?$")


def closure(tree: Path, wanted: Iterable[str]) -> dict[str, tuple[Path, tuple[str, ...]]]:
    """Return for each wanted module and each it needs: its file, and the names of those it needs itself.

    `tree` is a `lib/modules/<release>` folder. Names have underscores, as in `/proc/modules`. A module that the tree
    does not have is left out: the kernel has it built in, or does without.

    Raises:
        ImageError: the tree has no `modules.dep`.
    """
    known = _read(tree)
    found: dict[str, tuple[Path, tuple[str, ...]]] = {}
    open_ = [name.replace("-", "_") for name in wanted]
    while open_:
        name = open_.pop()
        if name in known and name not in found:
            found[name] = known[name]
            open_ += known[name][1]
    return dict(sorted(found.items()))


def load_order(tree: Path, wanted: Iterable[str]) -> dict[str, Path]:
    """Return the same modules with their files, each after those that it needs. Raises ImageError."""
    names = [name.replace("-", "_") for name in wanted]
    found = closure(tree, names)
    order: dict[str, Path] = {}
    # Entered once, so that modules that need each other come to an end as well.
    entered: set[str] = set()

    def add(name: str) -> None:
        if name in found and name not in entered:
            entered.add(name)
            path, needs = found[name]
            for need in needs:
                add(need)
            order[name] = path

    for name in names:
        add(name)
    return order


def in_order(tree: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Return the files of an initrd whose init loads modules: `modules/<name>.ko`, `modules/order` with a name a line.

    Raises ImageError.
    """
    order = load_order(tree, wanted)
    files = {f"modules/{name}.ko": content(path) for name, path in order.items()}
    return {**files, "modules/order": "".join(f"{name}.ko\n" for name in order).encode()}


def content(path: Path) -> bytes:
    """Return a module as the kernel loads it. Raises ImageError."""
    try:
        data = path.read_bytes()
        match path.suffix:
            case ".xz":
                return lzma.decompress(data)
            case ".zst":
                return zstd.decompress(data)
        return data
    except (OSError, lzma.LZMAError, zstd.ZstdError) as error:
        raise ImageError(f"module {path}: {error}") from error


def _read(tree: Path) -> Mapping[str, tuple[Path, tuple[str, ...]]]:
    try:
        text = (tree / "modules.dep").read_text()
    except OSError as error:
        raise ImageError(f"modules {tree}: {error.strerror}; expected a folder with depmod's modules.dep") from error
    known = {}
    for line in text.splitlines():
        file, _, needs = line.partition(":")
        known[_name(file)] = (tree / file, tuple(_name(need) for need in needs.split()))
    return known


def _name(file: str) -> str:
    return _SUFFIX.sub("", file.rpartition("/")[2]).replace("-", "_")
