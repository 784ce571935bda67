"""Files that describe an estate: TOML or JSON, judged by pydantic. docs/planning.md documents every field.

Several files are one estate: hosts and guests are put together, assumptions may stand in one of them.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError

from ostler.config.complaints import bad_request
from ostler.config.sizes import parse_size
from ostler.errors import BadRequest
from ostler.planning.estate import Amounts, Assumptions, Estate, Guest, Host

FORMAT: Literal["ostler-estate-1"] = "ostler-estate-1"
MAX_FILE_BYTES = 64 << 20
# Above these a model no longer fits memory and patience of one machine.
MAX_HOSTS, MAX_GUESTS, MAX_SAMPLES = 500, 5_000, 100_000


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


Name = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f]+$")]
Size = Annotated[int, BeforeValidator(_size), Field(ge=0, le=1 << 60)]
Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class HostTable(_Table):
    """One [[hosts]]."""

    name: Name
    cpus: Positive
    memory: Size
    disk: Size | None = None
    network_mbit_s: NonNegative | None = None
    capabilities: tuple[Name, ...] = ()
    idle_w: NonNegative = 100.0
    full_w: NonNegative = 250.0
    on: bool = True
    drain: bool = False


class GuestTable(_Table):
    """One [[guests]]."""

    name: Name
    memory: Size
    host: Name | None = None
    cpu: NonNegative | None = None
    mean_cpu: NonNegative | None = None
    cpu_samples: Annotated[tuple[NonNegative, ...], Field(max_length=MAX_SAMPLES)] | None = None
    memory_used: Size | None = None
    disk: Size = 0
    shared_disk: bool = True
    network_mbit_s: NonNegative = 0.0
    needs: tuple[Name, ...] = ()
    apart: tuple[Name, ...] = ()
    pinned: bool = False
    only_on: tuple[Name, ...] | None = None


class AssumptionsTable(_Table):
    """[assumptions]; what is absent keeps its default."""

    headroom_cpu: Share | None = None
    headroom_memory: Share | None = None
    headroom_disk: Share | None = None
    headroom_network: Share | None = None
    percentile: Annotated[float, Field(gt=0, le=100)] | None = None
    guest_overhead: Size | None = None
    pue: Annotated[float, Field(ge=1, le=10, allow_inf_nan=False)] | None = None
    price_per_kwh: NonNegative | None = None
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")] | None = None
    kg_co2_per_kwh: NonNegative | None = None
    hours_per_year: Annotated[float, Field(gt=0, le=8784)] | None = None
    move_mbit_s: Positive | None = None
    off_w: NonNegative | None = None


class EstateFile(_Table):
    """A whole file."""

    format: Literal["ostler-estate-1"] = "ostler-estate-1"
    assumptions: AssumptionsTable = AssumptionsTable()
    hosts: Annotated[tuple[HostTable, ...], Field(max_length=MAX_HOSTS)] = ()
    guests: Annotated[tuple[GuestTable, ...], Field(max_length=MAX_GUESTS)] = ()


def read_files(paths: Sequence[Path], *, drain: Sequence[str] = ()) -> Estate:
    """The estate that these files describe together. Raises BadRequest, in one line that names the file."""
    return assemble([(str(path), _judged(str(path), _parsed(path))) for path in paths], drain=drain)


def assemble(files: Sequence[tuple[str, EstateFile]], *, drain: Sequence[str] = ()) -> Estate:
    """Put files together; `drain` are hosts to be emptied. Raises BadRequest for what does not fit together."""
    hosts = [host for _, each in files for host in each.hosts]
    guests = [guest for _, each in files for guest in each.guests]
    _refuse_doubles("host", [host.name for host in hosts])
    _refuse_doubles("guest", [guest.name for guest in guests])
    if len(hosts) > MAX_HOSTS or len(guests) > MAX_GUESTS:
        raise BadRequest(f"{len(hosts)} hosts, {len(guests)} guests: expected at most {MAX_HOSTS} and {MAX_GUESTS}")
    known = {host.name for host in hosts}
    for name in drain:
        if name not in known:
            raise BadRequest(f"host {name!r} to drain: not described; there is {_some(known)}")
    assumptions = _merged(files)
    return Estate(
        hosts=tuple(_host(each, drain=each.drain or each.name in drain) for each in hosts),
        guests=tuple(_guest(each, known, assumptions) for each in guests),
        assumptions=assumptions,
    )


def percentile(samples: Sequence[float], rank: float) -> float:
    """The nearest-rank percentile: the least sample that at least `rank` % of all do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(rank / 100 * len(ordered)) - 1)]


def _parsed(path: Path) -> object:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror or error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadRequest(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        text = data.decode()
        return json.loads(text) if text.lstrip()[:1] == "{" else tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path}: not UTF-8 text, expected TOML or JSON") from error
    except RecursionError as error:
        raise BadRequest(f"{path}: nested too deeply") from error
    except json.JSONDecodeError as error:
        raise BadRequest(f"{path}: no JSON, {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise BadRequest(f"{path}: neither TOML ({error}) nor a JSON object") from error


def _judged(path: str, value: object) -> EstateFile:
    try:
        return EstateFile.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            where = ".".join(str(part) for part in first["loc"])
            raise BadRequest(f"{path}: {where}: not known here; docs/planning.md says what there is") from error
        raise BadRequest(f"{path}: {bad_request(error, whole='estate')}") from error


def _refuse_doubles(what: str, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BadRequest(f"{what} {name!r}: described twice")
        seen.add(name)


def _merged(files: Sequence[tuple[str, EstateFile]]) -> Assumptions:
    given: dict[str, Any] = {}
    for path, each in files:
        for name, value in each.assumptions.model_dump(exclude_none=True).items():
            if given.setdefault(name, value) != value:
                raise BadRequest(f"{path}: assumption {name} {value!r}: another file says {given[name]!r}")
    if "guest_overhead" in given:
        given["guest_overhead_bytes"] = given.pop("guest_overhead")
    if "move_mbit_s" in given:
        given["move_bits_per_s"] = round(given.pop("move_mbit_s") * 1e6)
    names = {each.name for each in fields(Assumptions)}
    return Assumptions(**{name: value for name, value in given.items() if name in names})


def _host(table: HostTable, *, drain: bool) -> Host:
    if table.full_w < table.idle_w:
        raise BadRequest(f"host {table.name!r}: full_w {table.full_w:g} is less than idle_w {table.idle_w:g}")
    has = Amounts(table.cpus, table.memory, table.disk, _bits(table.network_mbit_s))
    return Host(
        table.name, has, frozenset(table.capabilities), idle_w=table.idle_w, full_w=table.full_w, on=table.on,
        drain=drain,
    )  # fmt: skip


def _guest(table: GuestTable, hosts: set[str], assumptions: Assumptions) -> Guest:
    for name in (table.host, *(table.only_on or ())):
        if name is not None and name not in hosts:
            raise BadRequest(f"guest {table.name!r}: host {name!r} is not described; there is {_some(hosts)}")
    if table.pinned and table.host is None:
        raise BadRequest(f"guest {table.name!r}: pinned, but it runs on no host")
    peak, mean = _cpu(table, assumptions.percentile)
    memory = table.memory_used if table.memory_used is not None else table.memory
    return Guest(
        name=table.name,
        needs=Amounts(peak, table.memory, table.disk, _bits(table.network_mbit_s)),
        host=table.host,
        mean_cpus=mean,
        capabilities=frozenset(table.needs),
        apart=frozenset(table.apart),
        pinned=table.pinned,
        only_on=None if table.only_on is None else frozenset(table.only_on),
        moved_bytes=memory + (0 if table.shared_disk else table.disk),
    )


def _cpu(table: GuestTable, rank: float) -> tuple[float, float]:
    """The CPUs to keep for it, and those it uses on the average."""
    if table.cpu_samples:
        mean = sum(table.cpu_samples) / len(table.cpu_samples)
        return percentile(table.cpu_samples, rank) if table.cpu is None else table.cpu, mean
    if table.cpu is None:
        raise BadRequest(f"guest {table.name!r}: expected cpu or cpu_samples, in CPUs")
    return table.cpu, table.cpu if table.mean_cpu is None else table.mean_cpu


def _bits(mbit_s: float | None) -> int | None:
    return None if mbit_s is None else round(mbit_s * 1e6)


def _some(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (", …" if len(names) > 5 else "") if shown else "none"
