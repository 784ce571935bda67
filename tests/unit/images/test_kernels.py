"""Taking a kernel out of a Debian package."""

from __future__ import annotations

import json
import lzma
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ostler.errors import BadRequest, ImageError
from ostler.images import cache, kernels


def make_package(folder: Path, *, kernel: bool = True) -> Path:
    tree = folder / "tree"
    modules = tree / "lib/modules/6.0-x/kernel/drivers/misc/pvpanic"
    for path in (tree / "DEBIAN", tree / "boot", modules):
        path.mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        "Package: linux-image-6.0-x\nVersion: 6.0\nArchitecture: amd64\nMaintainer: A <a@example.org>\nDescription: x\n"
    )
    if kernel:
        (tree / "boot/vmlinuz-6.0-x").write_bytes(b"kernel" * 1000)
    (tree / "boot/config-6.0-x").write_text("CONFIG_X=y\n")
    (modules / "pvpanic.ko").write_bytes(b"plain")
    (modules / "pvpanic-mmio.ko.xz").write_bytes(lzma.compress(b"packed"))
    (modules / "other.ko").write_bytes(b"other")
    package = folder / "linux-image-6.0-x_6.0_amd64.deb"
    subprocess.run(["dpkg-deb", "--build", tree, package], check=True, capture_output=True)
    return package


class FakeApt:
    """Stands for apt: any package is the one made beside it."""

    package: Path

    def __init__(self, release: str) -> None:
        assert release == "bookworm"

    def show(self, package: str, progress: Any) -> dict[str, str]:  # noqa: ARG002
        assert package == "linux-image-cloud-amd64"
        return {"Depends": "linux-image-6.0-x (= 6.0), other"}

    def download(self, package: str, into: Path, progress: Any) -> tuple[Path, dict[str, str]]:  # noqa: ARG002
        assert package == "linux-image-6.0-x"
        return self.package, {"Package": package, "Version": "6.0"}


@pytest.fixture(autouse=True)
def _fake_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSTLER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "Apt", FakeApt)


def test_fetch_takes_kernel_config_and_panic_modules_out_of_the_package(tmp_path: Path) -> None:
    FakeApt.package = make_package(tmp_path)

    kernel = kernels.fetch("debian-12-cloud")

    assert kernel.release == "6.0-x"
    assert kernel.image.read_bytes() == b"kernel" * 1000
    assert kernel.config.read_text() == "CONFIG_X=y\n"
    assert {module.name: module.read_bytes() for module in kernel.modules} == {
        "pvpanic.ko": b"plain",
        "pvpanic-mmio.ko": b"packed",
    }
    assert [each.name for each in kernels.cached()] == ["debian-12-cloud"]


def test_module_tree_has_every_module_and_depmods_order(tmp_path: Path) -> None:
    FakeApt.package = make_package(tmp_path)

    tree = kernels.module_tree(kernels.fetch("debian-12-cloud"))

    place = tree / "lib/modules/6.0-x"
    assert {path.name for path in (place / "kernel").rglob("*.ko*")} == {"pvpanic.ko", "pvpanic-mmio.ko.xz", "other.ko"}
    assert (place / "modules.dep").exists()


def test_kernel_of_an_older_ostler_without_its_package_is_fetched_again(tmp_path: Path) -> None:
    FakeApt.package = make_package(tmp_path)
    kernel = kernels.fetch("debian-12-cloud")
    kernel.package.unlink()
    manifest = kernel.image.parent / cache.MANIFEST
    recorded = json.loads(manifest.read_text())
    del recorded["files"]["package.deb"]
    manifest.write_text(json.dumps(recorded))
    FakeApt.package = make_package(tmp_path / "again")

    assert kernels.fetch("debian-12-cloud").package.exists()


def test_fetch_package_without_kernel_fails_and_caches_nothing(tmp_path: Path) -> None:
    FakeApt.package = make_package(tmp_path, kernel=False)

    with pytest.raises(ImageError, match="no whole kernel"):
        kernels.fetch("debian-12-cloud")

    assert cache.find("kernels/debian-12-cloud") is None


def test_fetch_unknown_name_says_which_there_are() -> None:
    with pytest.raises(BadRequest, match=r"'debian-1'.*debian-12-cloud"):
        kernels.fetch("debian-1")
