"""`ostler migrate` and `ostler receive`: guests that move while they run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ostler.cli.guests import complete_running
from ostler.cli.output import Json, print_json, size

MIB = 1 << 20
Cert = Annotated[Path | None, typer.Option("--tls-cert", metavar="FILE", help="This side's certificate, PEM.")]
Key = Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="Its key, PEM.")]
Authority = Annotated[
    Path | None, typer.Option("--tls-ca", metavar="FILE", help="Whoever signed the other side's, PEM.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Without TLS on a network: memory and keys of guests go over it readable.")
]


def _address(incomplete: str) -> list[str]:
    return [each for each in ("tcp://", "unix:") if each.startswith(incomplete)]


def migrate(  # noqa: PLR0913 - one for each option
    where: Annotated[
        list[str], typer.Argument(metavar="[GUEST…] ADDRESS", help="tcp://HOST:PORT or unix:PATH at the end.",
                                  autocompletion=lambda incomplete: complete_running(incomplete) + _address(incomplete))
    ],
    everything: Annotated[bool, typer.Option("--all", help="Every running guest.")] = False,  # noqa: FBT002
    cancel: Annotated[bool, typer.Option("--cancel", help="Call off what is under way; give guests only.")] = False,  # noqa: FBT002
    cert: Cert = None,
    key: Key = None,
    authority: Authority = None,
    insecure: Insecure = False,  # noqa: FBT002
    streams: Annotated[int, typer.Option(min=1, max=16, help="Connections that carry memory.")] = 1,
    compress: Annotated[str, typer.Option(metavar="none|zlib|zstd", help="How memory is compressed.")] = "none",
    bandwidth: Annotated[
        str | None, typer.Option(metavar="SIZE", help="At most so much a second, all guests together: 100M.")
    ] = None,
    at_once: Annotated[int, typer.Option("--at-once", min=1, max=64, help="Guests on their way at a time.")] = 2,
    downtime: Annotated[float, typer.Option(min=0, max=60000, metavar="MS", help="Wanted pause at most.")] = 40,
    post_copy: Annotated[
        str, typer.Option(metavar="never|auto|now", help="Whether a guest may go before its memory has.")
    ] = "never",
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="What the guest is called there.")] = None,
    as_json: Json = False,  # noqa: FBT002
) -> None:  # fmt: skip
    """Move running guests to where `ostler receive` listens. Ctrl-C calls it off; they run on here then.

    [bold]Examples:[/bold]

      ostler migrate web tcp://other:7777 --tls-cert me.pem --tls-key me.key --tls-ca ca.pem

      ostler migrate --all --bandwidth 200M unix:/run/ostler-in

      ostler migrate --cancel web
    """
    from ostler.client import moving
    from ostler.control import runtime
    from ostler.errors import BadRequest
    from ostler.migration.address import tls_files

    if cancel:
        for entry in [runtime.find(each) for each in where]:
            moving.cancel(entry)
        return
    *names, address = where
    if everything and names:
        raise BadRequest(f"guest {names[0]!r}: expected no names beside --all")
    if not everything and not names:
        raise BadRequest(f"guest: missing before the address {address!r}; --all means every one")
    if name is not None and (everything or len(names) > 1):
        raise BadRequest(f"name {name!r}: expected one guest beside it")
    wish = moving.Wish(
        address=address, tls=tls_files(cert, key, authority), insecure=insecure, streams=streams,
        compression=compress, bytes_per_s=_rate(bandwidth), downtime_ms=downtime, name=name, post_copy=post_copy,
        at_once=at_once,
    )  # fmt: skip
    wish.check()
    entries = (
        [each for each in runtime.entries() if each.is_running()]
        if everything
        else [runtime.find(each) for each in names]
    )
    with _Shown() as told:
        found = moving.migrate_all(entries, wish, told=told)
    failed = [error for error in found.values() if isinstance(error, Exception)]
    if as_json:
        print_json(
            {name: {"error": str(each)} if isinstance(each, Exception) else each for name, each in found.items()}
        )
    else:
        for each, facts in found.items():
            line = f"{each}: {facts}" if isinstance(facts, Exception) else _summary(each, facts)
            sys.stderr.write(f"ostler: {line}\n")
    if failed:
        raise typer.Exit(1)


def receive(
    address: Annotated[str, typer.Argument(help="tcp://HOST:PORT or unix:PATH to listen on.", autocompletion=_address)],
    cert: Cert = None,
    key: Key = None,
    authority: Authority = None,
    insecure: Insecure = False,  # noqa: FBT002
    accel: Annotated[
        str | None, typer.Option(metavar="auto|kvm|soft", help="What guests run on here; the source's may differ.")
    ] = None,
    streams: Annotated[int, typer.Option(min=1, max=16, help="Connections for one guest, at most.")] = 16,
    once: Annotated[bool, typer.Option("--once", help="End when one guest has come, or has failed to.")] = False,  # noqa: FBT002
) -> None:
    """Take in guests that `ostler migrate` sends here. They go on when this command ends.

    [bold]Examples:[/bold]

      ostler receive tcp://0.0.0.0:7777 --tls-cert me.pem --tls-key me.key --tls-ca ca.pem

      ostler receive --once unix:/run/ostler-in
    """
    from ostler.client.receive import Receiver
    from ostler.migration.address import parse_address, tls_files

    status = 0

    def say(state: str, facts: dict[str, Any]) -> None:
        nonlocal status
        who = f"{facts['name']}: " if "name" in facts else ""
        text = f"{who}{facts['error']}" if "error" in facts else f"{who}{state}"
        sys.stderr.write(f"ostler: {text}\n")
        if state == "failed" and once:
            status = 1

    files = tls_files(cert, key, authority)
    with Receiver(
        parse_address(address), say, tls=files, insecure=insecure, accel=accel, streams=streams, once=once
    ) as receiver:
        sys.stderr.write(f"ostler: listening on {receiver.address}\n")
        receiver.serve()
    if status:
        raise typer.Exit(status)


def _rate(text: str | None) -> float | None:
    from ostler.config import parse_size
    from ostler.errors import BadRequest

    if text is None:
        return None
    try:
        return float(parse_size(text))
    except ValueError as error:
        raise BadRequest(f"bandwidth {text!r}: {error}") from error


def _summary(name: str, facts: dict[str, Any]) -> str:
    return (
        f"{name}: moved to {facts['address']} in {facts['elapsed_s']:.1f} s, "
        f"paused for {facts['pause_s'] * 1000:.0f} ms, {size(facts['sent_bytes'])} sent in {facts['round']} rounds"
    )


class _Shown:
    """Progress on a terminal's last line; elsewhere nothing but the end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: dict[str, str] = {}

    def __enter__(self) -> Callable[[str, dict[str, Any]], None] | None:
        return self._told if sys.stderr.isatty() else None

    def _told(self, name: str, facts: dict[str, Any]) -> None:
        eta = facts.get("eta_s")
        until = "" if eta is None else f", {eta:.0f} s to go"
        with self._lock:
            self._lines[name] = (
                f"{name}: {facts['phase']}, round {facts['round']}, {size(facts['left_bytes'])} left at "
                f"{size(int(facts['bytes_per_s']))}/s, guest writes {size(int(facts['dirty_bytes_per_s']))}/s{until}"
            )
            sys.stderr.write("\r\x1b[K" + " | ".join(self._lines.values()))
            sys.stderr.flush()

    def __exit__(self, *_exc: object) -> None:
        if self._lines:
            sys.stderr.write("\r\x1b[K")
