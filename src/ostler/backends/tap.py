"""TAP interfaces: the guest's frames on a network of the host, with checksums and segmentation left to its kernel.

`tap=NAME` uses an interface that an administrator made for this user; `bridge=NAME` makes one for the life of the guest
and puts it on a bridge, which needs CAP_NET_ADMIN. Frames carry the virtio header both ways (IFF_VNET_HDR), so whatever
the driver leaves undone, the host's kernel finishes, and the other way round.
Source: Documentation/networking/tuntap.rst and include/uapi/linux/if_tun.h of the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from ostler.backends.loop import Host
from ostler.errors import BadRequest, HostError

TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x4004_54CA, 0x4004_54D0, 0x4004_54D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN = 1, 2, 4, 8
# struct ifreq: the name, the flags, and padding up to its 40 bytes.
IFREQ = struct.Struct("16sH22x")
NAME_BYTES = 15
HEADER_BYTES = 12
# VIRTIO_NET_F_GUEST_*: what the guest takes unfinished, in the driver's bits and in the kernel's.
GUEST_OFFLOADS = {1 << 1: TUN_F_CSUM, 1 << 7: TUN_F_TSO4, 1 << 8: TUN_F_TSO6, 1 << 9: TUN_F_TSO_ECN}
# VIRTIO_NET_F_CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN.
HOST_OFFLOADS = 1 << 0 | 1 << 11 | 1 << 12 | 1 << 13
MAX_FRAME_BYTES = HEADER_BYTES + 65535 + 14 + 8
MAX_DRAINED = 4096
RECEIVE_BYTES, RECEIVE_FRAMES = 16 * MAX_FRAME_BYTES, 64

INTERFACES = Path("/sys/class/net")


class Tap:
    """One TAP interface: a back end of `NetDevice`; a context manager."""

    features = HOST_OFFLOADS | sum(GUEST_OFFLOADS)
    header_bytes = HEADER_BYTES

    def __init__(
        self,
        name: str,
        host: Host,
        *,
        report: Callable[[str], None],
        bridge: str | None = None,
        mtu: int | None = None,
    ) -> None:
        """Use the interface `name`, or with `bridge` make one for it, `name` being a pattern such as `ostler%d`.

        `mtu` is the interface's if not given. `report` is told one line when the interface goes away.
        Raises BadRequest, HostError.
        """
        self._host = host
        self._report = report
        self._deliver: Callable[[Sequence[memoryview]], int] = len
        self.on_down: Callable[[], None] = _nothing
        """Called under the lock when the interface has gone away."""
        self._reading = False
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self._waiting: list[memoryview] = []
        what = f"bridge {bridge!r}" if bridge else f"tap {name!r}"
        _check_interface(bridge or name, what)
        self._fd, self.name = _open(name, what)
        try:
            if bridge:
                _join(self.name, bridge)
            self.mtu = mtu or int((INTERFACES / self.name / "mtu").read_text())
        except BaseException:
            os.close(self._fd)
            raise
        self.dropped = 0
        """Frames the kernel refused: an impossible header, an interface that is down."""

    # -- asked by the device ----------------------------------------------------------------

    def attach(self, deliver: Callable[[Sequence[memoryview]], int], writable: Callable[[], None]) -> None:  # noqa: ARG002
        """A TAP interface never keeps a sender waiting: its queue drops."""
        self._deliver = deliver
        self._watch()

    def configure(self, offloads: int) -> None:
        flags = sum(kernel for driver, kernel in GUEST_OFFLOADS.items() if offloads & driver)
        if not flags & TUN_F_CSUM:
            flags = 0
        fcntl.ioctl(self._fd, TUNSETOFFLOAD, flags)

    def send(self, frames: Sequence[list[memoryview]]) -> bool:
        for frame in frames:
            try:
                os.writev(self._fd, frame)
            except OSError:
                # As on a wire: what the other side does not take is lost.
                self.dropped += 1
        return True

    def resume(self) -> None:
        self._host.loop.call_soon(self._retry)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._host.loop.call_soon(self._host.locked(callback))

    # -- the loop's events ------------------------------------------------------------------

    def _watch(self) -> None:
        wanted = self._fd >= 0 and not self._waiting
        if wanted is not self._reading:
            self._reading = wanted
            loop = self._host.loop
            loop.add_reader(self._fd, self._readable) if wanted else loop.remove_reader(self._fd)

    def _readable(self) -> None:
        frames: list[memoryview] = []
        buffer, at = self._buffer, 0
        while len(frames) < RECEIVE_FRAMES and at + MAX_FRAME_BYTES <= RECEIVE_BYTES:
            try:
                size = os.readv(self._fd, [buffer[at : at + MAX_FRAME_BYTES]])
            except BlockingIOError:
                break
            except OSError as error:
                self._lost(error)
                break
            frames.append(buffer[at : at + size])
            at += size
        self._hand_over(frames)

    def _hand_over(self, frames: list[memoryview]) -> None:
        with self._host.lock:
            taken = self._deliver(frames)
        self._waiting = frames[taken:]
        self._watch()

    def _retry(self) -> None:
        if self._waiting and self._fd >= 0:
            self._hand_over(self._waiting)

    def _lost(self, error: OSError) -> None:
        self._report(f"tap {self.name}: {error.strerror or error}; the network is down")
        self.close()
        with self._host.lock:
            self.on_down()

    def drain(self) -> list[bytes]:
        """Take every frame that has come and that the device has not got. Loop thread only."""
        frames = [bytes(each) for each in self._waiting]
        self._waiting = []
        while self._fd >= 0 and len(frames) < MAX_DRAINED:
            try:
                frames.append(os.read(self._fd, MAX_FRAME_BYTES))
            except OSError:
                break
        return frames

    def close(self) -> None:
        """Let go of the interface; one made here vanishes. Loop thread, or after the loop's end."""
        if self._fd >= 0:
            self._host.loop.remove_reader(self._fd)
            self._reading = False
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _check_interface(name: str, what: str) -> None:
    if not 0 < len(name) <= NAME_BYTES or "/" in name or name in (".", ".."):
        raise BadRequest(f"{what}: expected the name of an interface, at most {NAME_BYTES} characters")
    if not (INTERFACES / name).exists():
        raise BadRequest(f"{what}: this host has no such interface")


def _open(name: str, what: str) -> tuple[int, str]:
    """The interface's descriptor and real name. Raises BadRequest, HostError."""
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise HostError(f"{what}: /dev/net/tun: {error.strerror or error}") from error
    try:
        request = IFREQ.pack(name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
        answer = fcntl.ioctl(fd, TUNSETIFF, request)
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER_BYTES))
    except OSError as error:
        os.close(fd)
        raise BadRequest(f"{what}: {_explain(error)}") from error
    return fd, IFREQ.unpack(answer)[0].rstrip(b"\0").decode()


def _explain(error: OSError) -> str:
    if error.errno == errno.EPERM:
        return "not permitted: have root make one (ip tuntap add dev NAME mode tap user USER) and use --net tap=NAME"
    if error.errno == errno.EBUSY:
        return "in use by another process"
    if error.errno == errno.EINVAL:
        return "not a TAP interface, or one with other flags"
    return error.strerror or str(error)


def _join(name: str, bridge: str) -> None:
    """Put the new interface on the bridge, with its MTU, and up. Raises HostError."""
    from pyroute2 import IPRoute, NetlinkError

    mtu = int((INTERFACES / bridge / "mtu").read_text())
    try:
        with IPRoute() as route:
            (master,) = route.link_lookup(ifname=bridge)
            (index,) = route.link_lookup(ifname=name)
            route.link("set", index=index, mtu=mtu, master=master)
            route.link("set", index=index, state="up")
    except (NetlinkError, ValueError) as error:
        raise HostError(f"bridge {bridge!r}: {name} cannot be put on it: {error}") from error


def _nothing() -> None:
    """No device is attached yet."""
