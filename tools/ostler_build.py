"""The build backend (PEP 517, PEP 660): maturin where a new enough cargo is, else a wheel without the engine.

A machine without Rust must still be able to install Ostler: everything but the software CPU is Python, and
KVM needs no compiler. So the choice is made here, before anything is downloaded, and it is announced. A build that
*has* a cargo and fails stays a failure: falling back silently would hide a broken engine.

`OSTLER_BUILD_SOFT` overrules the look at cargo: `never` builds without the engine, `always` insists on it.

The agent (rust/agent), the static program that runs inside guests, is built beside it wherever cargo can, engine or
not, and goes into the package as data. One that is there already goes into a wheel without any cargo.
`OSTLER_BUILD_AGENT` says `never` or `always` in the same way.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ostler_version import LABEL_VARIABLE

ROOT = Path(__file__).resolve().parent.parent
MATURIN = "maturin>=1.9,<2"
HATCHLING = "hatchling>=1.27"
AGENT_SOURCE = ROOT / "rust" / "agent"
AGENT_TARGET = "x86_64-unknown-linux-gnu"
AGENT = ROOT / "src" / "ostler" / "agent" / "data" / "ostler-agent"
LABEL_WITHOUT_ENGINE = "without.software.cpu"

Settings = dict[str, Any] | None


def required_rust() -> tuple[int, int]:
    """Return the oldest Rust release the workspace builds with, from its own manifest."""
    manifest = tomllib.loads((ROOT / "rust" / "Cargo.toml").read_text())
    major, minor = manifest["workspace"]["package"]["rust-version"].split(".")[:2]
    return int(major), int(minor)


def tool_version(tool: str) -> tuple[int, int] | None:
    """Return (major, minor) of `cargo` or `rustc`, or None where it does not run."""
    try:
        shown = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"(\d+)\.(\d+)", shown)
    return (int(found[1]), int(found[2])) if found else None


def why_no_engine() -> str | None:
    """Return the reason why the engine cannot be built here, or None where it can."""
    return _why_not("OSTLER_BUILD_SOFT")


def why_no_agent() -> str | None:
    """Return the reason why the agent cannot be built here, or None where it can."""
    return _why_not("OSTLER_BUILD_AGENT")


def _why_not(variable: str) -> str | None:
    wish = os.environ.get(variable, "auto")
    if wish == "never":
        return f"{variable}=never"
    if wish == "always":
        return None
    needed = required_rust()
    for tool in (os.environ.get("CARGO", "cargo"), os.environ.get("RUSTC", "rustc")):
        found = tool_version(tool)
        if found is None:
            return f"no {tool} that runs; {needed[0]}.{needed[1]} or newer is needed"
        if found < needed:
            return f"{tool} is {found[0]}.{found[1]}; {needed[0]}.{needed[1]} or newer is needed"
    return None


def build_agent() -> None:
    """Build the guest's agent into the source tree's package, where both back ends find it.

    It has a workspace of its own, whose configuration (static linking) cargo takes from the folder it runs in.
    """
    reason = why_no_agent()
    if reason is None:
        target = Path(os.environ.get("CARGO_TARGET_DIR", AGENT_SOURCE / "target"))
        cargo = os.environ.get("CARGO", "cargo")
        # Flags from outside would replace the static ones of .cargo/config.toml.
        environment = {name: value for name, value in os.environ.items() if "RUSTFLAGS" not in name}
        command = [cargo, "build", "--release", "--locked", "--quiet", "--target-dir", str(target)]
        subprocess.run(command, cwd=AGENT_SOURCE, check=True, env=environment)
        AGENT.parent.mkdir(parents=True, exist_ok=True)
        # Beside it and renamed: a guest that is just being started must not read half of it.
        part = AGENT.with_suffix(".part")
        shutil.copy2(target / AGENT_TARGET / "release" / AGENT.name, part)
        part.replace(AGENT)
    elif not AGENT.exists():
        print(
            f"ostler: built without the agent ({reason}). Guests with an image need it; "
            "install Rust and install Ostler again to get it.",
            file=sys.stderr,
            flush=True,
        )


def announce(reason: str) -> None:
    """Say on standard error that this installation has no software CPU, and how to get one."""
    print(
        f"ostler: built without the software CPU ({reason}). "
        "Guests need KVM here; install Rust and install Ostler again to get it.",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """Have hatchling add `label` to the version; see ostler_version."""
    os.environ[LABEL_VARIABLE] = label
    try:
        yield
    finally:
        del os.environ[LABEL_VARIABLE]


def _requirements() -> list[str]:
    return [HATCHLING] if why_no_engine() else [MATURIN]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:  # noqa: ARG001
    return _requirements()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:  # noqa: ARG001
    return _requirements()


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:  # noqa: ARG001
    return [HATCHLING]


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    build_agent()
    reason = why_no_engine()
    if reason is None:
        import maturin

        return str(maturin.build_wheel(wheel_directory, config_settings, metadata_directory))
    from hatchling import build

    announce(reason)
    with labelled(LABEL_WITHOUT_ENGINE):
        return str(build.build_wheel(wheel_directory, config_settings))


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    build_agent()
    reason = why_no_engine()
    if reason is None:
        import maturin

        return str(maturin.build_editable(wheel_directory, config_settings, metadata_directory))
    from hatchling import build

    announce(reason)
    # An engine left in the source tree by an earlier build would be imported although this build has none.
    for stale in (ROOT / "src" / "ostler").glob("_soft*.so"):
        stale.unlink()
    with labelled(LABEL_WITHOUT_ENGINE):
        return str(build.build_editable(wheel_directory, config_settings))


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    from hatchling import build

    return str(build.build_sdist(sdist_directory, config_settings))
