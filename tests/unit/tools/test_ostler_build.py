"""The build backend: which build it chooses, and what a build without cargo leaves out."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import ostler_build
import ostler_version


def put_tool(folder: Path, name: str, version: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\necho '{name} {version} (0123456 2020-01-01)'\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the whole search path."""
    for name in ("CARGO", "RUSTC", "OSTLER_BUILD_SOFT", "OSTLER_BUILD_AGENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_engine_is_built_where_cargo_and_rustc_are_new_enough(path: Path) -> None:
    major, minor = ostler_build.required_rust()
    put_tool(path, "cargo", f"{major}.{minor}.0")
    put_tool(path, "rustc", f"{major}.{minor + 7}.1-nightly")

    assert ostler_build.why_no_engine() is None
    assert ostler_build.get_requires_for_build_wheel() == [ostler_build.MATURIN]


def test_engine_is_left_out_without_cargo(path: Path) -> None:
    assert path.exists()
    assert "no cargo" in (ostler_build.why_no_engine() or "")
    assert ostler_build.get_requires_for_build_editable() == [ostler_build.HATCHLING]


def test_engine_is_left_out_where_rustc_is_too_old(path: Path) -> None:
    put_tool(path, "cargo", "1.99.0")
    put_tool(path, "rustc", "1.63.0")

    assert "rustc is 1.63; " in (ostler_build.why_no_engine() or "")


def test_cargo_that_does_not_run_counts_as_none(path: Path) -> None:
    (path / "cargo").write_text("#!/bin/sh\nexit 1\n")
    (path / "cargo").chmod(0o755)

    assert "no cargo that runs" in (ostler_build.why_no_engine() or "")


@pytest.mark.parametrize(("wish", "left_out"), [("never", True), ("always", False)])
def test_wish_overrules_the_look_at_cargo(
    path: Path, monkeypatch: pytest.MonkeyPatch, wish: str, left_out: bool  # noqa: FBT001
) -> None:  # fmt: skip
    assert path.exists()
    monkeypatch.setenv("OSTLER_BUILD_SOFT", wish)

    assert bool(ostler_build.why_no_engine()) == left_out


def build(what: str, into: Path, tree: Path = ostler_build.ROOT) -> tuple[str, str]:
    """Let the backend build as pip does, without a cargo; return the file's name and what was said."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, ostler_build; print(ostler_build.{what}(sys.argv[1]))", into],
        env={"PATH": "/nonexistent", "PYTHONPATH": str(tree / "tools")}, cwd=tree,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()[-1], done.stderr


def test_wheel_without_cargo_has_the_package_and_says_what_it_lacks(tmp_path: Path) -> None:
    name, said = build("build_wheel", tmp_path)

    assert name == f"ostler-{ostler_version.version()}+without.software.cpu-py3-none-any.whl"
    assert "without the software CPU" in said
    members = zipfile.ZipFile(tmp_path / name).namelist()
    assert {"ostler/cli/__init__.py", "ostler/images/data/init", "ostler/py.typed"} <= set(members)
    assert not [member for member in members if member.endswith(".so")]


def plain_tree(tree: Path) -> Path:
    """Make a source tree that has what a build without cargo needs, and nothing of what cargo builds."""
    for name in ("pyproject.toml", "README.md", "LICENSE", "rust/Cargo.toml", "rust/agent/Cargo.toml", ".gitignore"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ostler_build.ROOT / name, tree / name)
    shutil.copytree(ostler_build.ROOT / "tools", tree / "tools")
    (tree / "src/ostler/agent").mkdir(parents=True)
    (tree / "src/ostler/__init__.py").touch()
    return tree


def test_wheel_without_cargo_takes_an_agent_that_is_there(tmp_path: Path) -> None:
    tree = plain_tree(tmp_path / "tree")
    (tree / "src/ostler/agent/data").mkdir()
    (tree / "src/ostler/agent/data/ostler-agent").write_bytes(b"\x7fELF")

    name, said = build("build_wheel", tmp_path, tree)

    assert "without the agent" not in said
    with zipfile.ZipFile(tmp_path / name) as wheel:
        assert wheel.read("ostler/agent/data/ostler-agent") == b"\x7fELF"


def test_wheel_without_cargo_and_agent_says_so(tmp_path: Path) -> None:
    tree = plain_tree(tmp_path / "tree")

    name, said = build("build_wheel", tmp_path, tree)

    assert "ostler: built without the agent (no cargo" in said
    assert "ostler/agent/data/ostler-agent" not in zipfile.ZipFile(tmp_path / name).namelist()


def test_agent_is_built_in_its_own_folder_without_flags_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, program = tmp_path / "agent", tmp_path / "package" / "ostler-agent"
    source.mkdir()
    cargo = tmp_path / "cargo"
    cargo.write_text(
        "#!/bin/sh\n"
        '[ "$1" = build ] || exit 1\n'
        'mkdir -p "$6/x86_64-unknown-linux-gnu/release"\n'
        'echo "$(pwd) ${RUSTFLAGS-no flags}" >"$6/x86_64-unknown-linux-gnu/release/ostler-agent"\n'
    )
    cargo.chmod(0o755)
    for name, value in (("CARGO", str(cargo)), ("RUSTFLAGS", "-C nonsense"), ("OSTLER_BUILD_AGENT", "always")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CARGO_TARGET_DIR", raising=False)
    monkeypatch.setattr(ostler_build, "AGENT_SOURCE", source)
    monkeypatch.setattr(ostler_build, "AGENT", program)

    ostler_build.build_agent()

    assert program.read_text() == f"{source} no flags\n"


def test_agent_has_the_version_and_the_rust_of_the_engine() -> None:
    def read(place: str) -> dict[str, Any]:
        return tomllib.loads((ostler_build.ROOT / "rust" / place / "Cargo.toml").read_text())

    engine, agent = read(".")["workspace"]["package"], read("agent")["package"]

    assert [agent[name] for name in ("version", "rust-version", "edition")] == [
        engine[name] for name in ("version", "rust-version", "edition")
    ]


def test_sdist_brings_what_a_build_with_cargo_needs(tmp_path: Path) -> None:
    name, _ = build("build_sdist", tmp_path)

    assert name == f"ostler-{ostler_version.version()}.tar.gz"
    with tarfile.open(tmp_path / name) as archive:
        members = {member.partition("/")[2] for member in archive.getnames()}
    assert {"rust/agent/Cargo.lock", "rust/agent/.cargo/config.toml", "rust/agent/src/main.rs"} <= members
    assert not [member for member in members if member.startswith("rust/agent/target/")]
    assert {"rust/Cargo.toml", "rust/Cargo.lock", "rust/soft-py/Cargo.toml", "tools/ostler_build.py"} <= members
    assert not [member for member in members if member.startswith((".venv/", "rust/target/"))]


def test_editable_without_cargo_points_to_the_tree_and_drops_a_stale_engine(tmp_path: Path) -> None:
    tree = plain_tree(tmp_path / "tree")
    (tree / "src/ostler/_soft.abi3.so").touch()

    name, said = build("build_editable", tmp_path, tree)

    assert "without the software CPU" in said
    assert not (tree / "src/ostler/_soft.abi3.so").exists()
    with zipfile.ZipFile(tmp_path / name) as wheel:
        paths = [wheel.read(member).decode().strip() for member in wheel.namelist() if member.endswith(".pth")]
    assert paths == [str(tree / "src")]
