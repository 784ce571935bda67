"""A guest's process on the receiving side: made from what the source offers, filled, restored, and then it runs.

The listener (`ostler.client.receive`) has read the preamble of the first connection. It hands it over on a socket of
its own, where further streams follow and where this process says what it has come to, one line of JSON each time:
`receiving`, `running`, `failed`. From `running` on the guest is like any other of this host.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from ostler import accel
from ostler.backends.disk import RawDisk
from ostler.config import GuestSpec, parse_guest
from ostler.control import runtime
from ostler.control.logfile import RotatedLog
from ostler.control.wire import Message, pack_error
from ostler.devices.virtio.blk import Block
from ostler.errors import MigrationError, MigrationRefused, OstlerError
from ostler.machine.networks import merged_settings
from ostler.migration import witness
from ostler.migration.address import TlsFiles, tls_files
from ostler.migration.incoming import Incoming, WritableDisk
from ostler.migration.link import Link, accept_link
from ostler.migration.target import Offer, Target
from ostler.migration.wire import POST_COPY_STREAM
from ostler.migration.witness import Witness
from ostler.snapshot.schema import decode
from ostler.vmm.announce import announce_cards
from ostler.vmm.calls import CallService
from ostler.vmm.hub import HubConsole
from ostler.vmm.injection import serve_faults
from ostler.vmm.late_pages import LatePages
from ostler.vmm.memory_service import MemoryService
from ostler.vmm.migrate_out import witness_folder
from ostler.vmm.processors import End
from ostler.vmm.run import GuestProcess
from ostler.vmm.served import handle_signals, leave, listen
from ostler.vmm.service import GuestService, describe
from ostler.vmm.snapshots import SnapshotService

MAX_FACT = 200
FACTS = {"image": str, "digest": str, "command": list, "ports": list, "volumes": list, "durable": bool, "service": bool}
MAX_OPTIONS_BYTES = 64 << 10


class Listener:
    """The socket to the listener: streams come in, lines go out. It may end at any time; the guest does not mind."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def options(self) -> tuple[dict[str, Any], socket.socket]:
        """What the listener was started with, and the first stream."""
        data, fds, _, _ = socket.recv_fds(self._socket, MAX_OPTIONS_BYTES, 1)
        return json.loads(data), socket.socket(fileno=fds[0])

    def next_stream(self) -> tuple[int, socket.socket] | None:
        """A further stream's number and socket; None when there are no more."""
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, 64, 1)
        except OSError:
            return None
        return (int(data), socket.socket(fileno=fds[0])) if fds else None

    def say(self, state: str, **facts: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps({"state": state, **facts}).encode() + b"\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


def serve_incoming(control_fd: int) -> int:
    """Take one guest in and run it to its end; returns this process's exit status."""
    os.set_inheritable(control_fd, False)
    listener = Listener(socket.socket(fileno=control_fd))
    try:
        options, first = listener.options()
        tls = tls_files(*[Path(each) if each else None for each in options["tls"]])
        with accept_link(first, tls) as link:
            return _Arrival(listener, link, tls, options).serve()
    except OstlerError as error:
        listener.say("failed", error=pack_error(error))
        return error.exit_status
    except Exception as error:
        traceback.print_exc()
        text = f"internal error: {type(error).__name__}: {error} (a bug of Ostler's)"
        listener.say("failed", error=pack_error(MigrationError(text)))
        return 1


class _Arrival:
    """One guest's arrival."""

    def __init__(self, listener: Listener, link: Link, tls: TlsFiles | None, options: dict[str, Any]) -> None:
        self._listener, self._link, self._tls, self._options = listener, link, tls, options
        self._target = Target()
        self._stack = contextlib.ExitStack()
        self._pages: LatePages | None = None

    def serve(self) -> int:
        try:
            offer = self._target.hello(self._link.receive())
            spec = self._spec(offer)
            claim = self._stack.enter_context(runtime.claim(offer.name, _facts(offer), spec.model_dump_json()))
        except OstlerError as error:
            self._refuse(error)
            raise
        entry = claim.entry
        end: Message = {"status": 1, "reason": "migration failed", "message": ""}
        try:
            (entry.path / runtime.PID).write_text(f"{os.getpid()}\n")
            _log_to(entry.path / runtime.VMM_LOG)
            with self._stack:
                end = self._run(entry, offer, spec)
        except OstlerError as error:
            runtime.forget_own(entry)
            raise error
        finally:
            if entry.path.exists():
                leave(entry, end)
        return int(end["status"])

    def _spec(self, offer: Offer) -> GuestSpec:
        """What the guest is made of here."""
        runtime.check_name(offer.name)
        given = {**offer.spec, "accel": self._options.get("accel") or "auto"}
        try:
            return parse_guest(**given)
        except TypeError as error:
            raise MigrationRefused("the specification makes no sense here") from error

    def _refuse(self, error: OstlerError) -> None:
        with contextlib.suppress(MigrationError):
            self._link.send(self._target.refuse(str(error)))

    def _run(self, entry: runtime.Entry, offer: Offer, spec: GuestSpec) -> Message:
        stack = self._stack
        try:
            opened = accel.open(spec.accel)
            stack.callback(opened.close)
            log = RotatedLog(entry.console_log)
            hubs: list[HubConsole] = []

            def make_console(*arguments: object) -> HubConsole:
                hubs.append(HubConsole(log, *arguments))  # type: ignore[arg-type]
                return hubs[0]

            process = stack.enter_context(GuestProcess(spec, opened, make_console, folder=entry.path, is_incoming=True))
            witnessed = stack.enter_context(
                Witness(witness_folder() / f"{self._options['session']}.target", witness.RECEIVING)
            )
            server = stack.enter_context(listen(entry, process))
            disks = _disks(offer, process)
        except OstlerError as error:
            self._refuse(error)
            raise
        facts = {
            "name": entry.name, "accelerator": opened.name, "masked_features": list(process.machine.masked_features),
            "spec": json.loads(spec.model_dump_json()), "network": merged_settings(process.networks),
            "troubles": process.early_troubles,
        }  # fmt: skip
        service = GuestService(process, server, hubs[0], facts, entry)
        server.service = service
        process.report = service.report
        stack.enter_context(SnapshotService(process, service, entry, base=None))
        handle_signals(process)
        incoming = Incoming(self._target, self._link, process.machine.memory, disks, witnessed)
        stack.callback(incoming.close)
        streams = min(offer.streams, int(self._options["streams"]), POST_COPY_STREAM)
        pages = self._pages = stack.enter_context(LatePages(process.machine.memory)) if _may_come_late(offer) else None
        stack.enter_context(MemoryService(process, service, may_merge=pages is None))
        serve_faults(process, service)
        CallService(process, service, entry.name)
        self._link.send(
            self._target.welcome(
                streams=streams, post_copy=pages is not None, boot=witness.boot_id(), witness=str(witnessed.path)
            )
        )
        self._listener.say("receiving", name=entry.name)
        running = _Running(process, incoming, self._listener, entry.name, pages)
        if streams > 1 or pages is not None:
            threading.Thread(target=self._take_streams, args=(incoming,), name="streams", daemon=True).start()
        threading.Thread(target=running.receive, name="receive", daemon=True).start()
        try:
            return _to_the_end(process, service, running)
        finally:
            service.close()
            self._listener.close()

    def _take_streams(self, incoming: Incoming) -> None:
        while (found := self._listener.next_stream()) is not None:
            number, connected = found
            threading.Thread(
                target=self._take_stream, args=(incoming, number, connected), name=f"receive{number}", daemon=True
            ).start()

    def _take_stream(self, incoming: Incoming, number: int, connected: socket.socket) -> None:
        if number == POST_COPY_STREAM:
            with connected:
                if self._pages is not None:
                    self._pages.start(connected, self._options["tls"], self._target.secret)
            return
        with contextlib.suppress(MigrationError):
            incoming.join(accept_link(connected, self._tls), number)


class _Running:
    """From the first page to the guest's first instruction here."""

    def __init__(
        self, process: GuestProcess, incoming: Incoming, listener: Listener, name: str, pages: LatePages | None
    ) -> None:
        self._process, self._incoming, self._listener, self._name = process, incoming, listener, name
        self._pages = pages
        self.error: BaseException | None = None
        self.runs = False

    def receive(self) -> None:
        """A thread of its own."""
        try:
            self._incoming.receive()
        except BaseException as error:
            self._give_up(error)
            return
        self._process.loop.call_soon(self._take_over)

    def _take_over(self) -> None:
        """On the loop's thread, which nobody else gets before this is decided."""
        process = self._process
        try:
            self._incoming.take_over(self._restore, self._acquire)
        except BaseException as error:
            self._give_up(error)
            return
        self.runs = True
        if not self._incoming.target.stays_paused:
            process.resume()
        # Before the source hears of it: frames that still go to it are passed on here, and those are all of them.
        announce_cards(process)
        self._incoming.say_running()
        self._listener.say("running", name=self._name)
        threading.Thread(target=self._incoming.strays, args=(self._stray,), name="strays", daemon=True).start()

    def _stray(self, card: int, frame: bytes) -> None:
        """In a thread of its own."""
        networks = self._process.networks
        if card < len(networks):
            deliver = networks[card].device.deliver

            def now() -> None:
                with self._process.lock:
                    deliver([memoryview(frame)])

            self._process.loop.call_soon(now)

    def _restore(self, data: bytes) -> None:
        saved, _ = decode(data)
        if self._incoming.target.is_post_copy and self._pages is not None:
            self._pages.begin()
        self._process.restore_state(saved)

    def _acquire(self) -> None:
        for name, device in self._process.machine.devices.items():
            disk = device.disk if isinstance(device, Block) else None
            if isinstance(disk, RawDisk) and not disk.read_only:
                try:
                    disk.lock(name)
                except (OstlerError, OSError) as error:
                    # The guest is nowhere else any more: it runs, and whoever is in its way is named.
                    self._process.report(name, f"not locked: {error}")

    def _give_up(self, error: BaseException) -> None:
        self.error = error
        if not isinstance(error, OstlerError):
            traceback.print_exc()
        self._incoming.fail(str(error))
        self._incoming.close()
        self._process.quit()


def _may_come_late(offer: Offer) -> bool:
    if not offer.post_copy:
        return False
    from ostler.host.userfault import is_available

    return is_available()


def _to_the_end(process: GuestProcess, service: GuestService, running: _Running) -> Message:
    try:
        ended: End = process.run(paused=True)
        if not running.runs:
            raise running.error or MigrationError("migration: ended from here")
        process.judge(ended)
        end = {**describe(ended, killed=service.killed), **service.verdict}
    except OstlerError as error:
        if not running.runs:
            raise
        end = {"status": error.exit_status, **pack_error(error)}
        end["reason"] = end.pop("kind")
    service.ended(end)
    return end


def _facts(offer: Offer) -> dict[str, Any]:
    """What is known of the guest's making, as far as it is what it should be: it is shown to users."""
    found: dict[str, Any] = {"remove": True}
    for name, kind in FACTS.items():
        value = offer.facts.get(name)
        if not isinstance(value, kind):
            continue
        if isinstance(value, str):
            value = _shown(value)
        elif isinstance(value, list):
            value = [_shown(str(each)) for each in value[:64]]
        found[name] = value
    return found


def _shown(text: str) -> str:
    return "".join(sign for sign in text[:MAX_FACT] if sign.isprintable())


def _disks(offer: Offer, process: GuestProcess) -> dict[int, WritableDisk]:
    """The disks that come along. Raises MigrationRefused where they are of another size than here."""
    found: dict[int, WritableDisk] = {}
    for each in offer.disks:
        number, size = each.get("number"), each.get("size_bytes")
        device = process.machine.devices.get(f"disk{number}")
        if not isinstance(device, Block) or device.disk.size_bytes != size:
            raise MigrationRefused(f"disk {number}: expected one of {size} bytes under the same path here")
        if each.get("goes_along"):
            found[int(str(number))] = device.disk
    return found


def _log_to(path: Path) -> None:
    """What this process complains of goes where its guest's other logs are."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for stream in (1, 2):
        os.dup2(fd, stream)
    os.close(fd)
    sys.stdout.flush()


def main() -> int:
    """`python -m ostler.vmm.migrate_in FD`; see the head of the file."""
    return serve_incoming(int(sys.argv[1]))


if __name__ == "__main__":
    sys.exit(main())
