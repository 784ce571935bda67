"""The virtio console in a Linux guest: a terminal and a named port, each a socket on the host."""

from __future__ import annotations

import socket
from pathlib import Path

from ostler.control.runtime import AGENT_SOCKET, HVC_SOCKET
from tests.guest.devices_guest import DHCP, WAIT_S, running

# Only a port whose other end is there takes bytes, so the guest waits for the host's first word.
SCRIPT = (
    DHCP
    + """
port=$(grep -l org.ostler.agent /sys/class/virtio-ports/*/name | cut -d/ -f5)
say "port-$(cat /sys/class/virtio-ports/$port/name)"
read -r word </dev/$port
exec 5<>/dev/$port
echo "port got $word" >&5
read -r word </dev/hvc0
echo "terminal got $word" >/dev/hvc0
read -r word <&5
say "$word"
"""
)


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(WAIT_S)
    sock.connect(str(path))
    return sock


def test_terminal_and_named_port_carry_bytes_both_ways() -> None:
    with running(SCRIPT, drivers=["virtio_console"], virtio_console=True) as guest:
        assert guest.next() == "port-org.ostler.agent"
        with connected(guest.folder / AGENT_SOCKET) as port, connected(guest.folder / HVC_SOCKET) as terminal:
            port.sendall(b"one\n")
            assert port.makefile().readline() == "port got one\n"
            terminal.sendall(b"two\n")
            lines = terminal.makefile(newline="\n")
            while "terminal got two" not in lines.readline():
                """The terminal echoes what is typed."""
            port.sendall(b"end\n")
            assert guest.next() == "end"
