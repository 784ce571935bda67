"""From a specification to virtio devices and their back ends: what is plugged into the machine's PCI bus.

Back ends belong to the stack they are built on; the machine, which comes later on it, lets go of them first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ostler.backends.disk import open_raw
from ostler.backends.disk_overlay import open_overlay
from ostler.backends.loop import Host
from ostler.backends.vsock import VsockSockets
from ostler.config import GuestSpec
from ostler.config.devices import DiskSpec
from ostler.control.runtime import VSOCK_SOCKET
from ostler.devices.virtio.balloon import Balloon
from ostler.devices.virtio.blk import Block, Disk
from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.virtio.rng import Entropy
from ostler.devices.virtio.vsock import VsockDevice
from ostler.errors import BadRequest

MAX_BLOCK_QUEUES = 4
QCOW2_MAGIC = b"QFI\xfb"

Function = tuple[str, VirtioDevice]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What back ends need of the process they live in."""

    host: Host
    folder: Path | None
    """The guest's runtime folder, where its sockets are; None where it has none, and then it has no vsock."""
    report: Callable[[str, str], None]
    """Tell the user of a device's trouble: the device, one line. On the loop's thread."""


def build(spec: GuestSpec, stack: contextlib.ExitStack, around: Surroundings) -> list[Function]:
    """Every PCI function of the guest, in the order of the bus. Raises OstlerError for what cannot be opened."""
    functions: list[Function] = []
    for number, disk in enumerate(spec.disks):
        # One queue a processor, as drivers like it, and no more threads' worth than the host will serve.
        device = Block(_open(disk, stack), queue_count=min(spec.cpus, MAX_BLOCK_QUEUES))
        functions.append((f"disk{number}", device))
    if spec.balloon:
        functions.append(("balloon", Balloon(spec.memory_bytes)))
    if spec.rng:
        functions.append(("rng", Entropy(os.urandom)))
    if spec.vsock_cid is not None:
        functions.append(("vsock", _vsock(spec.vsock_cid, stack, around)))
    return functions


def _vsock(cid: int, stack: contextlib.ExitStack, around: Surroundings) -> VirtioDevice:
    if around.folder is None:
        raise BadRequest(f"vsock_cid {cid}: expected a guest with a runtime folder, for the sockets in it")
    sockets = stack.enter_context(VsockSockets(around.folder / VSOCK_SOCKET, around.host))
    device = VsockDevice(sockets, guest_cid=cid)
    sockets.attach(device)
    return device


def _open(disk: DiskSpec, stack: contextlib.ExitStack) -> Disk:
    if disk.format == "qcow2" or (disk.format == "auto" and _is_qcow2(disk.path)):
        raise BadRequest(f"disk {disk.path}: qcow2 is not served yet, expected a raw file or block device")
    if disk.overlay:
        overlay = open_overlay(disk.path)
        stack.callback(overlay.close)
        overlay.serial = disk.serial or overlay.serial
        return overlay
    return stack.enter_context(open_raw(disk.path, read_only=disk.read_only, serial=disk.serial))


def _is_qcow2(path: Path) -> bool:
    """Whether the file says so itself; one that cannot be read is for `open_raw` to complain of."""
    try:
        with path.open("rb") as file:
            return file.read(4) == QCOW2_MAGIC
    except OSError:
        return False
