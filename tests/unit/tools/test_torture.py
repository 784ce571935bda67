"""The torture tool finds what is missing: a check that cannot fail would promise nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from benches import torture


def lay_out(folder: Path, last: int) -> torture.Account:
    """Write what a guest would have written up to `last`."""
    log = b""
    for number in range(last + 1):
        data = torture.record(number)
        if number % 3 == 0:
            log += data + bytes(-len(data) % torture.BLOCK)
        elif number % 3 == 1:
            (folder / f"file-{number}").write_bytes(data)
        else:
            (folder / "current").write_bytes(data)
    (folder / "log").write_bytes(log)
    return torture.Account(acknowledged=list(range(last + 1)))


def test_everything_there_is_nothing_wrong(tmp_path: Path) -> None:
    account = lay_out(tmp_path, 30)

    torture.compare(account, tmp_path)

    assert account.wrong == []


@pytest.mark.parametrize("missing", ["log", "file-28", "current"])
def test_lost_record_is_found(tmp_path: Path, missing: str) -> None:
    account = lay_out(tmp_path, 30)
    path = tmp_path / missing
    if missing == "log":
        path.write_bytes(path.read_bytes()[: -torture.BLOCK])
    elif missing == "current":
        path.write_bytes(torture.record(26))
    else:
        path.unlink()

    torture.compare(account, tmp_path)

    assert len(account.wrong) == 1


def test_altered_record_is_found(tmp_path: Path) -> None:
    account = lay_out(tmp_path, 30)
    log = bytearray((tmp_path / "log").read_bytes())
    log[50] ^= 1
    (tmp_path / "log").write_bytes(log)

    torture.compare(account, tmp_path)

    assert account.wrong == ["record 0: acknowledged and not there"]
