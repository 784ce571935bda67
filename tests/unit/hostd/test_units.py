"""systemd's units: whole paths, the user's own, and what systemd itself says of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ostler.hostd import units

ANALYZE = shutil.which("systemd-analyze")


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("unit", units.UNITS)
def test_text_names_the_program_and_leaves_nothing_open(unit: str, user: bool) -> None:  # noqa: FBT001
    found = units.text(unit, "/opt/50% off/bin/ostler", user=user)

    assert "@" not in found
    assert "/opt/50%% off/bin/ostler" in found
    assert ("WantedBy=default.target" in found) == user
    assert ("systemctl --user" in found) == (user and unit == "guests")


@pytest.mark.skipif(ANALYZE is None, reason="systemd is not installed")
@pytest.mark.parametrize("user", [False, True])
def test_units_are_what_systemd_understands(tmp_path: Path, user: bool) -> None:  # noqa: FBT001
    assert ANALYZE is not None
    program = tmp_path / "ostler"
    program.symlink_to(sys.executable)
    for unit in units.UNITS:
        (tmp_path / units.file_name(unit)).write_text(units.text(unit, str(program), user=user))
    paths = [str(tmp_path / units.file_name(unit)) for unit in units.UNITS]

    done = subprocess.run(
        [ANALYZE, "verify", "--man=no", *paths], capture_output=True, text=True, check=False, timeout=60
    )

    said = [line for line in done.stderr.splitlines() if "ostler-" in line]
    assert (said, done.returncode) == ([], 0)
