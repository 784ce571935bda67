"""Modules and what they need, in depmod's list."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from ostler.errors import ImageError
from ostler.images import modules

DEP = """kernel/net/virtio-net.ko.xz: kernel/net/failover.ko kernel/virtio/virtio_ring.ko kernel/virtio/virtio.ko
kernel/net/failover.ko:
kernel/virtio/virtio_ring.ko: kernel/virtio/virtio.ko
kernel/virtio/virtio.ko:
kernel/a.ko: kernel/b.ko
kernel/b.ko: kernel/a.ko
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "modules.dep").write_text(DEP)
    for line in DEP.splitlines():
        path = tmp_path / line.partition(":")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(path.name.encode()) if path.suffix == ".xz" else path.name.encode())
    return tmp_path


def test_load_order_has_each_module_after_what_it_needs(tree: Path) -> None:
    order = list(modules.load_order(tree, ["virtio_net", "virtio"]))

    assert sorted(order) == ["failover", "virtio", "virtio_net", "virtio_ring"]
    assert order.index("virtio") < order.index("virtio_ring") < order.index("virtio_net")
    assert order.index("failover") < order.index("virtio_net")


def test_load_order_of_modules_that_need_each_other_ends(tree: Path) -> None:
    assert sorted(modules.load_order(tree, ["a"])) == ["a", "b"]


def test_in_order_unpacks_modules_and_leaves_out_built_in_ones(tree: Path) -> None:
    files = modules.in_order(tree, ["not-there", "virtio-net"])

    assert files["modules/virtio_net.ko"] == b"virtio-net.ko.xz"
    assert files["modules/order"].splitlines()[-1] == b"virtio_net.ko"
    assert len(files) == 5


def test_closure_of_a_tree_without_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"modules\.dep"):
        modules.closure(tmp_path, ["virtio"])
