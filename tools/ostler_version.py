"""The version of Ostler, read from rust/Cargo.toml, for the builds that maturin does not make."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

# Pip shows no output of a build that went well, but it always names the version it installed. So a wheel
# without the engine says so in its local version label: "Successfully installed ostler-0.1.0+without.software.cpu".
LABEL_VARIABLE = "OSTLER_BUILD_LABEL"


def version() -> str:
    """Return the workspace's version, with the local label the build backend asked for, if any."""
    manifest = Path(__file__).resolve().parent.parent / "rust" / "Cargo.toml"
    base: str = tomllib.loads(manifest.read_text())["workspace"]["package"]["version"]
    label = os.environ.get(LABEL_VARIABLE, "")
    return f"{base}+{label}" if label else base
