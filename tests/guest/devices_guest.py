"""A busybox guest for tests of devices: the modules they need, a script, and a VM process that runs it.

The guest tells the test how far it is by HTTP, over its own network, so nobody polls a log.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from ostler.config.guest import parse_guest
from ostler.control import runtime
from ostler.control.launch import launch
from ostler.images import initrd, kernels, modules

WAIT_S = 240
BASE_MODULES = ("virtio_pci", "virtio_net")
CHUNK_BYTES = 1 << 20

PROLOGUE = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /etc /www
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mount -t tmpfs -o size=90% tmpfs /tmp
/bin/busybox --install -s /bin
export PATH=/bin
while read -r file; do insmod "/modules/$file"; done </modules/order
ip link set lo up
for word in $(cat /proc/cmdline); do
    case "$word" in report=*) report=${word#report=} ;; esac
done
say() { wget -q -O /dev/null "http://$report/$1" || echo "[test] could not say $1"; }
"""
EPILOGUE = """
poweroff -f
"""
DHCP = """
cat >/tmp/lease <<'END'
#!/bin/sh
case "$1" in bound|renew)
    ip addr add "$ip/$mask" dev "$interface"
    ip route add default via "$router"
    for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf
    echo "$ip $router $dns" >/tmp/leased ;;
esac
END
chmod +x /tmp/lease
ip link set eth0 up
udhcpc -i eth0 -n -q -t 20 -T 1 -s /tmp/lease
"""


class Reports(BaseHTTPRequestHandler):
    """Puts what guests say into a queue."""

    said: ClassVar[queue.Queue[str]] = queue.Queue()
    blob: ClassVar[bytes] = b""

    def do_GET(self) -> None:
        body = self.blob if self.path == "/blob" else b""
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if self.path != "/blob":
            self.said.put(self.path[1:])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Tests are quiet."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A running guest of a test."""

    folder: Path
    said: queue.Queue[str]
    pid: int

    def next(self) -> str:
        """What the guest says next."""
        try:
            return self.said.get(timeout=WAIT_S)
        except queue.Empty:
            raise AssertionError(f"the guest says nothing:\n{self.console[-3000:]}") from None

    @property
    def console(self) -> str:
        """Everything on its console so far, and the VM process's own log."""
        log = (self.folder / runtime.VMM_LOG).read_text(errors="replace")
        return (self.folder / "console.log").read_text(errors="replace") + log


@contextmanager
def running(
    script: str,
    *,
    drivers: Sequence[str] = (),
    files: Mapping[str, bytes] | None = None,
    blob: bytes = b"",
    **spec: Any,
) -> Iterator[Guest]:
    """A guest that runs `script` and powers off; `spec` as `parse_guest` takes it, with a passt network if not said."""
    kernel = kernels.fetch(spec.pop("kernel", kernels.DEFAULT_KERNEL))
    image = image_of(script, kernel, drivers=drivers, files=files)
    with reports(blob, spec.pop("report_to", None)) as (said, host), contextlib.ExitStack() as stack:
        wanted = {"nets": ["passt"], "accel": "soft", "memory": "512M"} | spec
        append = f"console=ttyS0 loglevel=4 report={host} {wanted.pop('append', '')}"
        guest = parse_guest(kernel=kernel.image, initrd=image, append=append, **wanted)
        name = f"test-{os.getpid()}-{host.rpartition(':')[2]}"
        launched = launch(name, guest.model_dump_json(), facts={}, leash=True)
        assert launched.leash_fd is not None
        stack.callback(os.close, launched.leash_fd)
        stack.callback(launched.process.wait, 30)
        stack.callback(launched.process.terminate)
        yield Guest(launched.entry.path, said, launched.process.pid)


def image_of(
    script: str, kernel: kernels.Kernel, *, drivers: Sequence[str] = (), files: Mapping[str, bytes] | None = None
) -> Path:
    """The initrd of a guest that runs `script`."""
    return initrd.build({
        "init": (PROLOGUE + script + EPILOGUE).encode(),
        "bin/busybox": initrd.busybox_program().read_bytes(),
        **module_files(kernel, *BASE_MODULES, *drivers),
        **(files or {}),
    })  # fmt: skip


@contextmanager
def reports(blob: bytes, address: str | None = None) -> Iterator[tuple[queue.Queue[str], str]]:
    """A server for guests to talk to: what they say, and where it listens, of this host's addresses the usual one."""
    said: queue.Queue[str] = queue.Queue()
    with ThreadingHTTPServer(("0.0.0.0", 0), type("Handler", (Reports,), {"said": said, "blob": blob})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield said, f"{address or own_address()}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def module_files(kernel: kernels.Kernel, *names: str) -> dict[str, bytes]:
    """Modules with what they depend on, and `modules/order` to load them by. Built-in ones are left out."""
    return modules.in_order(kernels.module_tree(kernel) / "lib" / "modules" / kernel.release, names)


def own_address() -> str:
    """This host's address as others see it: where its default route leaves."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.254", 9))
        return str(probe.getsockname()[0])


def read_facts(guest: Guest) -> dict[str, Any]:
    """The specification that the VM process was given."""
    found: dict[str, Any] = json.loads((guest.folder / runtime.SPEC).read_text())
    return found
