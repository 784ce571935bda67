"""User-mode network by passt(1): no privileges, no interface on the host; the guest's connections become sockets.

passt runs as a helper on one end of a socket pair, frames on it have a length of four bytes before them and nothing
else. It takes payloads out of the guest's segments and makes segments of its own, so it neither looks at the guest's
checksums nor minds segments larger than the MTU, and what it delivers has right checksums: hence the offloads offered.
Its MTU is the largest there is: a segment of 64 KiB costs hardly more than one of 1500 bytes.

passt gives up when the socket closes, so it cannot outlive this process. If it dies the device carries on with a new
one, a limited number of times in a minute; connections through the old one are lost.

The guest's addresses are chosen here and not copied from the host, so that it can be configured without DHCP and can
reach the host's own address. The host's loopback services stay out of reach unless `host_loopback` is asked for.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Self

from ostler.backends.loop import Host
from ostler.backends.passt_options import GuestAddresses, PasstOptions, addresses, arguments, check_port
from ostler.errors import HostError
from ostler.host.helpers import Helper, find_program

# VIRTIO_NET_F_CSUM, GUEST_CSUM, HOST_TSO4, HOST_TSO6.
OFFLOADS = 1 << 0 | 1 << 1 | 1 << 11 | 1 << 12
LENGTH = struct.Struct("!I")
MAX_FRAME_BYTES = 65535 + 14
RECEIVE_BYTES = 1 << 20
SOCKET_BUFFER_BYTES = 4 << 20
IOV_MAX = 1024
MAX_RESTARTS, RESTART_WINDOW_S = 5, 60.0

_NOISE = re.compile(r"(Failed to send \d+ bytes to syslog(; )?)")


class Passt:
    """The helper and this side of its socket: a back end of `NetDevice`; a context manager.

    Start it in the main thread before the loop runs.
    """

    features = OFFLOADS
    header_bytes = 0

    def __init__(
        self,
        options: PasstOptions,
        host: Host,
        *,
        report: Callable[[str], None],
        guest: GuestAddresses | None = None,
        wait: bool = True,
    ) -> None:
        """`report` is told one line when passt dies; `guest` are addresses other than the usual ones.

        Without `wait` passt may still be starting when this returns; frames wait for it in its socket.

        Raises HostError, BadRequest for ports that cannot be had.
        """
        self.addresses = guest or addresses(options)
        self.mtu = self.addresses.mtu
        self.on_down: Callable[[], None] = _nothing
        """Called under the lock when the network is gone for good."""
        self.when_died: Callable[[], None] = _nothing
        """Called on the loop's thread each time passt has ended by itself."""
        self._options = options
        self._host = host
        self._report = report
        self._program = find_program("passt", package="passt", instead="use --net none")
        self._deliver: Callable[[Sequence[memoryview]], int] = len
        self._writable: Callable[[], None] = _nothing
        # A mapping: what is never filled of it takes no memory.
        self._buffer = memoryview(mmap.mmap(-1, RECEIVE_BYTES))
        # Of the buffer: bytes received, and those of them that whole frames are made of.
        self._filled = self._consumed = 0
        self._waiting: list[memoryview] = []
        self._unsent = bytearray()
        self._restarts: list[float] = []
        self._closed = self._reading = self._lost = False
        self._saying = -1
        for forward in options.forwards:
            check_port(forward)
        self._socket, self._helper = self._start(wait=wait)

    # -- asked by the device ----------------------------------------------------------------

    def attach(self, deliver: Callable[[Sequence[memoryview]], int], writable: Callable[[], None]) -> None:
        self._deliver, self._writable = deliver, writable
        self._watch()

    def configure(self, offloads: int) -> None:
        """Nothing to be told: passt minds neither way."""

    def send(self, frames: Sequence[list[memoryview]]) -> bool:
        pieces: list[memoryview] = []
        for frame in frames:
            size = sum(map(len, frame))
            if size <= MAX_FRAME_BYTES:
                pieces.append(memoryview(LENGTH.pack(size)))
                pieces += frame
        for start in range(0, len(pieces), IOV_MAX):
            batch = pieces[start : start + IOV_MAX]
            sent = 0 if self._unsent else self._write(batch)
            for piece in batch:
                if sent < len(piece):
                    self._unsent += piece[sent:]
                sent = max(sent - len(piece), 0)
        if self._unsent and not self._lost:
            self._host.loop.add_writer(self._socket.fileno(), self._flush)
        return not self._unsent

    def resume(self) -> None:
        self._host.loop.call_soon(self._retry)

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._host.loop.call_soon(self._host.locked(callback))

    def _write(self, pieces: list[memoryview]) -> int:
        try:
            return self._socket.sendmsg(pieces, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            # It died; the loop hears of that too. What is lost, TCP sends again.
            return sum(map(len, pieces))

    # -- the loop's events ------------------------------------------------------------------

    def _watch(self) -> None:
        wanted = not self._closed and not self._lost and not self._waiting
        if wanted is not self._reading:
            self._reading = wanted
            fd = self._socket.fileno()
            self._host.loop.add_reader(fd, self._readable) if wanted else self._host.loop.remove_reader(fd)

    def _readable(self) -> None:
        try:
            count = self._socket.recv_into(self._buffer[self._filled :])
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self._gone()
            return
        self._filled += count
        self._hand_over(self._parse())

    def _parse(self) -> list[memoryview]:
        """All whole frames received; what is behind them stays."""
        frames: list[memoryview] = []
        buffer, at = self._buffer, 0
        while self._filled - at >= LENGTH.size:
            (size,) = LENGTH.unpack_from(buffer, at)
            if size > MAX_FRAME_BYTES:
                # Not passt's language: there is no way back into step but a new one.
                self._report(f"passt: a frame of {size} bytes, expected at most {MAX_FRAME_BYTES}")
                self._filled = 0
                self._gone()
                return frames
            if self._filled - at < LENGTH.size + size:
                break
            frames.append(buffer[at + LENGTH.size : at + LENGTH.size + size])
            at += LENGTH.size + size
        self._consumed = at
        return frames

    def _hand_over(self, frames: list[memoryview]) -> None:
        with self._host.lock:
            taken = self._deliver(frames)
        self._waiting = frames[taken:]
        if not self._waiting:
            rest = self._filled - self._consumed
            if rest > 0:
                self._buffer[:rest] = bytes(self._buffer[self._consumed : self._filled])
            self._filled, self._consumed = max(rest, 0), 0
        self._watch()

    def _retry(self) -> None:
        if self._waiting and not self._closed:
            self._hand_over(self._waiting)

    def _flush(self) -> None:
        with self._host.lock:
            if self._unsent:
                with memoryview(self._unsent) as kept:
                    sent = self._write([kept])
                del self._unsent[:sent]
            if not self._unsent:
                self._host.loop.remove_writer(self._socket.fileno())
                self._writable()

    # -- the helper -------------------------------------------------------------------------

    def _start(self, *, wait: bool = True) -> tuple[socket.socket, Helper]:
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, reading)
            with theirs:
                try:
                    for sock in (ours, theirs):
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
                    argv = [self._program, *arguments(self._options, self.addresses, theirs.fileno())]
                    helper = Helper("passt", argv, pass_fds=[theirs.fileno()], stdout=writing)
                except BaseException:
                    ours.close()
                    raise
                finally:
                    os.close(writing)
            try:
                if wait:
                    helper.wait_for(reading)
                else:
                    self._close_when_said(os.dup(reading))
            except HostError as error:
                ours.close()
                helper.stop()
                raise HostError(_NOISE.sub("", str(error))) from error
        ours.setblocking(False)
        helper.watch(self._host.loop, self._died)
        return ours, helper

    def _close_when_said(self, reading: int) -> None:
        """Take the pipe on which passt says that it is ready: closed before that, it would be passt's death."""
        self._saying = reading
        self._host.loop.add_reader(reading, self._close_pipe)

    def _close_pipe(self) -> None:
        if self._saying >= 0:
            self._host.loop.remove_reader(self._saying)
            os.close(self._saying)
            self._saying = -1

    def kill(self) -> None:
        """End the program, as if the host had."""
        self._helper.kill()

    def _died(self, helper: Helper) -> None:
        if helper is self._helper:
            self._gone()

    def _gone(self) -> None:
        """Report, and start another one if that is not the rule by now. Loop thread, without the lock."""
        if self._closed or self._lost:
            return
        self._disconnect()
        self.when_died()
        report = _NOISE.sub("", self._helper.obituary())
        now = time.monotonic()
        self._restarts = [*(at for at in self._restarts if now - at < RESTART_WINDOW_S), now]
        try:
            if len(self._restarts) > MAX_RESTARTS:
                raise HostError(f"{MAX_RESTARTS} times in {RESTART_WINDOW_S:g} s: not started again")
            self._socket, self._helper = self._start()
        except HostError as error:
            self._report(f"{report}; the network is down: {error}")
            with self._host.lock:
                self.on_down()
                # Whoever waited to send may go on: it is thrown away now.
                self._writable()
            return
        self._lost = False
        self._report(f"{report}; started again, open connections are lost")
        self._watch()
        with self._host.lock:
            self._writable()

    def _disconnect(self) -> None:
        self._lost = True
        self._host.loop.remove_writer(self._socket.fileno())
        self._filled = self._consumed = 0
        self._waiting = []
        self._unsent.clear()
        self._watch()
        self._socket.close()
        self._helper.stop()

    def close(self) -> None:
        """Stop passt. Loop thread, or after the loop's end; more calls do nothing."""
        if not self._closed:
            self._closed = True
            self._close_pipe()
            if not self._lost:
                self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def _nothing() -> None:
    """No device is attached yet."""
