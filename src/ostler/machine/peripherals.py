"""From a specification to virtio devices and their back ends: what is plugged into the machine's PCI bus.

Back ends belong to the stack they are built on; the machine, which comes later on it, lets go of them first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from functools import partial

from ostler.abi.virtio import blk
from ostler.backends.console_port import PortSocket
from ostler.backends.disk import default_serial, open_raw
from ostler.backends.disk_layers import open_layered
from ostler.backends.disk_overlay import open_overlay
from ostler.backends.storage_daemon import StorageDaemon
from ostler.backends.vhost_user import Launcher, VhostUser
from ostler.backends.vhost_user_ring import RING_SIZE
from ostler.backends.virtiofsd import Virtiofsd
from ostler.backends.vsock import VsockSockets
from ostler.backends.worker import Worker
from ostler.config import GuestSpec
from ostler.config.devices import DiskSpec, ShareSpec
from ostler.control.runtime import AGENT_SOCKET, HVC_SOCKET, VSOCK_SOCKET
from ostler.devices.virtio.balloon import Balloon
from ostler.devices.virtio.blk import Block
from ostler.devices.virtio.blk_backend import Disk
from ostler.devices.virtio.console import ConsoleDevice
from ostler.devices.virtio.console_port import Port
from ostler.devices.virtio.device import VirtioDevice
from ostler.devices.virtio.external import ExternalBlock, SharedFolder
from ostler.devices.virtio.rng import Entropy
from ostler.devices.virtio.vsock import VsockDevice
from ostler.errors import BadRequest
from ostler.host.disk_format import disk_format
from ostler.machine.networks import Network
from ostler.machine.surroundings import Surroundings

MAX_BLOCK_QUEUES = 4
# Where the agent listens in a guest without vsock.
AGENT_PORT = "org.ostler.agent"
BLK_CONFIG_BYTES = 60
# What another program may offer a guest's block driver.
BLK_FEATURES = 1 << blk.VIRTIO_BLK_F_CONFIG_WCE | sum(
    1 << bit
    for bit in (
        blk.VIRTIO_BLK_F_SEG_MAX, blk.VIRTIO_BLK_F_RO, blk.VIRTIO_BLK_F_BLK_SIZE, blk.VIRTIO_BLK_F_FLUSH,
        blk.VIRTIO_BLK_F_TOPOLOGY, blk.VIRTIO_BLK_F_MQ, blk.VIRTIO_BLK_F_DISCARD, blk.VIRTIO_BLK_F_WRITE_ZEROES,
    )
)  # fmt: skip

Function = tuple[str, VirtioDevice]


def build(
    spec: GuestSpec, stack: contextlib.ExitStack, around: Surroundings, cards: Sequence[Network] = ()
) -> list[Function]:
    """Every PCI function of the guest, in the order of the bus, the network's `cards` among them.

    Raises OstlerError for what cannot be opened.
    """
    functions: list[Function] = []
    for number, disk in enumerate(spec.disks):
        functions.append((f"disk{number}", _disk(disk, f"disk{number}", spec, stack, around)))
    for number, share in enumerate(spec.shares):
        functions.append((f"share{number}", _share(share, f"share{number}", stack, around)))
    functions += [(card.name, card.device) for card in cards]
    if spec.balloon:
        functions.append(("balloon", Balloon(spec.memory_bytes)))
    if spec.rng:
        functions.append(("rng", Entropy(os.urandom)))
    if spec.vsock_cid is not None:
        functions.append(("vsock", _vsock(spec.vsock_cid, stack, around)))
    if spec.virtio_console:
        functions.append(("console", _console(stack, around)))
    return functions


def _console(stack: contextlib.ExitStack, around: Surroundings) -> VirtioDevice:
    if around.folder is None:
        raise BadRequest("virtio_console: expected a guest with a runtime folder, for the sockets in it")
    terminal, agent = (
        stack.enter_context(PortSocket(around.folder / name, around.host)) for name in (HVC_SOCKET, AGENT_SOCKET)
    )
    return ConsoleDevice([Port("console", terminal, is_console=True), Port(AGENT_PORT, agent)])


def _vsock(cid: int, stack: contextlib.ExitStack, around: Surroundings) -> VirtioDevice:
    if around.folder is None:
        raise BadRequest(f"vsock_cid {cid}: expected a guest with a runtime folder, for the sockets in it")
    sockets = stack.enter_context(VsockSockets(around.folder / VSOCK_SOCKET, around.host))
    around.when_moved.append(lambda folder: sockets.move(folder / VSOCK_SOCKET))
    device = VsockDevice(sockets, guest_cid=cid)
    sockets.attach(device)
    return device


def _disk(
    disk: DiskSpec, name: str, spec: GuestSpec, stack: contextlib.ExitStack, around: Surroundings
) -> VirtioDevice:
    """A raw disk is served here, any other format by QEMU's program."""
    # One queue a processor, as drivers like it, but no crowd of them.
    queue_count = min(spec.cpus, MAX_BLOCK_QUEUES)
    image_format = disk_format(disk.path, disk.format)
    if image_format == "raw":
        opened = _open(disk, name, stack, around)
        worker = stack.enter_context(Worker(name, around.host))
        return Block(opened, queue_count=queue_count, worker=worker, limit=around.limit(disk.rate))
    daemon = StorageDaemon(
        disk.path, image_format, read_only=disk.read_only, overlay=disk.overlay, queue_count=queue_count
    )
    stack.callback(daemon.close)
    server = _server(daemon, name, stack, around, queue_count=queue_count, config_bytes=BLK_CONFIG_BYTES)
    serial = disk.serial or default_serial(disk.path)
    return ExternalBlock(
        server, serial=serial, queue_sizes=(RING_SIZE,) * queue_count, feature_mask=BLK_FEATURES,
        limit=around.limit(disk.rate),
    )  # fmt: skip


def _share(share: ShareSpec, tag: str, stack: contextlib.ExitStack, around: Surroundings) -> VirtioDevice:
    virtiofsd = Virtiofsd(share.host, read_only=share.read_only)
    server = _server(virtiofsd, tag, stack, around, queue_count=SharedFolder.QUEUES, config_bytes=0)
    return SharedFolder(server, tag, queue_size=RING_SIZE)


def _server(
    launcher: Launcher, name: str, stack: contextlib.ExitStack, around: Surroundings, *,
    queue_count: int, config_bytes: int,
) -> VhostUser:  # fmt: skip
    report = partial(around.report, name)
    return stack.enter_context(
        VhostUser(launcher, around.host, queue_count=queue_count, config_bytes=config_bytes, report=report)
    )


def _open(disk: DiskSpec, name: str, stack: contextlib.ExitStack, around: Surroundings) -> Disk:
    if image := around.disks.get(name):
        layered = open_layered(image, serial=disk.serial)
        stack.callback(layered.close)
        return layered
    if disk.overlay:
        overlay = open_overlay(disk.path)
        stack.callback(overlay.close)
        overlay.serial = disk.serial or overlay.serial
        return overlay
    locked = disk.read_only or not around.is_incoming
    return stack.enter_context(open_raw(disk.path, read_only=disk.read_only, serial=disk.serial, locked=locked))
