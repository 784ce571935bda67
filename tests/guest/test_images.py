"""Images of every kind boot, and their agent answers: Debian's, a registry's, a tree, a cloud-style disk with a seed.

The Debian images are the user's own, in the cache: whoever needs one first builds it, all later tests share it.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ostler.errors import ImageError
from ostler.host import files
from ostler.images import debian, importer, initrd, oci, qemu_img, store, tools
from tests.guest.harness import Boot

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # a first build fetches a distribution
    pytest.mark.skipif(not shutil.which("mmdebstrap"), reason="needs mmdebstrap"),
]
MIB = 1 << 20
needs_registry = pytest.mark.skipif(
    not all(map(shutil.which, ("docker-registry", "skopeo", "umoci"))), reason="needs docker-registry, skopeo, umoci"
)


@pytest.fixture
def named() -> Iterator[list[str]]:
    """Names of images to remove at the end."""
    names: list[str] = []
    yield names
    for name in names:
        if name in store.names():
            store.remove(name)


def busybox_tree(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    shutil.copy(initrd.busybox_program(), folder / "bin/busybox")
    (folder / "bin/sh").symlink_to("busybox")
    return folder


@pytest.mark.parametrize("reference", ["debian:12", "debian:13"])
def test_debian_image_is_whole_and_runs_python(boot: Boot, reference: str) -> None:
    image = store.ensure(reference)
    store.verify(image)
    check = [tools.require("e2fsck", package="e2fsprogs"), "-fn", str(image.disk)]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0

    run = boot(reference, "--", "python3", "-c", "print(6*7)")
    assert (run.status, run.console) == (0, "42\n"), run.log

    assert boot(reference, "--", "sh", "-c", "exit 7").status == 7
    store.verify(image)  # no guest has written to it


def test_tree_with_nothing_but_busybox(boot: Boot, tmp_path: Path, named: list[str]) -> None:
    named.append("ostler-test-busybox")
    importer.load(busybox_tree(tmp_path / "tree"), name=named[0], size_bytes=64 * MIB)

    run = boot(named[0], "--net", "none", "--", "sh", "-c", "echo from busybox; exit 7")

    assert (run.status, run.console) == (7, "from busybox\n"), run.log


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """A registry on a free port of this host, with the image `tools:2` in it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    (tmp_path / "config.yml").write_text(
        f"version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {tmp_path}/blobs\nhttp:\n  addr: {address}\n"
    )
    with subprocess.Popen(
        ["docker-registry", "serve", tmp_path / "config.yml"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            layout = f"{tmp_path}/layout:tools"
            for command in (["init", "--layout", f"{tmp_path}/layout"], ["new", "--image", layout],
                            ["unpack", "--rootless", "--image", layout, f"{tmp_path}/bundle"]):  # fmt: skip
                tools.run(["umoci", "--log", "error", *command], package="umoci")
            busybox_tree(tmp_path / "bundle/rootfs")
            (tmp_path / "bundle/rootfs/srv").mkdir()
            settings = ["--config.entrypoint", "/bin/sh", "--config.entrypoint", "-c", "--config.env", "GREETING=hello",
                        "--config.cmd", "echo $GREETING from $PWD", "--config.workingdir", "/srv"]  # fmt: skip
            tools.run(["umoci", "--log", "error", "repack", "--image", layout, f"{tmp_path}/bundle"], package="umoci")
            tools.run(["umoci", "--log", "error", "config", "--image", layout, *settings], package="umoci")
            _push(f"oci:{layout}", f"docker://{address}/tools:2")
            yield address
        finally:
            server.terminate()


def _push(source: str, target: str) -> None:
    command = ["skopeo", "--insecure-policy", "copy", "-q", "--retry-times", "5", "--dest-tls-verify=false"]
    tools.run([*command, source, target], package="skopeo")


@needs_registry
def test_image_of_a_registry_runs_as_it_says(boot: Boot, registry: str, named: list[str]) -> None:
    named.append(f"{registry}/tools:2")

    with pytest.raises(ImageError, match="speaks no TLS; --insecure allows that"):
        oci.pull(named[0])
    image = oci.pull(named[0], insecure=True, size_bytes=64 * MIB)

    assert image.config.entrypoint == ("/bin/sh", "-c")
    run = boot(named[0], "--net", "none")
    assert (run.status, run.console) == (0, "hello from /srv\n"), run.log
    run = boot(named[0], "--net", "none", "--env", "GREETING=bye", "--", "echo $GREETING")
    assert (run.status, run.console) == (0, "bye\n"), run.log


@needs_registry
def test_layer_that_was_altered_is_refused(registry: str, tmp_path: Path) -> None:
    blob = max(tmp_path.glob("blobs/**/data"), key=lambda path: path.stat().st_size)
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)

    with pytest.raises(ImageError, match="Digest did not match"):
        oci.pull(f"{registry}/tools:2", insecure=True)


def cloud_disk(folder: Path) -> Path:
    """A qcow2 disk as clouds have them: a partition table, systemd, cloud-init."""
    name, packages = "ostler-test-cloud-base", ["systemd-sysv", "cloud-init", "udev", "dbus"]
    base = store.find(name) or debian.build("debian:12", include=packages, name=name, size_bytes=3 << 30)
    raw = folder / "cloud.raw"
    entry = struct.pack("<B3sB3sII", 0x80, b"", 0x83, b"", 2048, base.config.disk.size_bytes // 512)
    with base.disk.open("rb") as source, raw.open("xb") as target:
        target.truncate(base.config.disk.size_bytes + MIB)
        os.pwrite(target.fileno(), entry + bytes(48) + b"\x55\xaa", 446)
        for start, size in files.data_extents(source.fileno()):
            for at in range(start, start + size, MIB):
                data = os.pread(source.fileno(), min(MIB, start + size - at), at)
                os.pwrite(target.fileno(), data, at + MIB)
    qemu_img.convert(raw, folder / "cloud.qcow2")
    raw.unlink()
    return folder / "cloud.qcow2"


def test_cloud_disk_starts_its_init_and_reads_its_seed(boot: Boot, tmp_path: Path, named: list[str]) -> None:
    named.append("ostler-test-cloud")
    image = importer.load(cloud_disk(tmp_path), name=named[0])
    assert (image.config.boot, image.config.disk.root) == ("init", "/dev/vda1")
    seed = tmp_path / "seed"
    seed.mkdir()
    (seed / "user-data").write_text(
        "#cloud-config\nwrite_files:\n  - path: /etc/from-seed\n    content: hello from the seed\n"
    )
    wait = "while ! grep -s hello /etc/from-seed; do sleep 1; done; readlink /proc/1/exe"

    run = boot(named[0], "--net", "none", "--memory", "1G", "--seed", str(seed), "--", "sh", "-c", wait)

    assert run.console == "hello from the seed\n/usr/lib/systemd/systemd\n", run.log
    assert run.status == 0
