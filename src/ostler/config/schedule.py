"""A guest's share of the host's processors, as a user asks for it; see docs/scheduling.md.

weight    1 to 10000, 100 by default: shares of guests that compete are as their weights
cap       percent of one host CPU it may use at most: 25, 150%
reserve   percent of one host CPU it is to have whatever the others want
pin       host CPUs it runs on: 0,2-3
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from ostler.config.complaints import bad_request
from ostler.config.defaults import PlainTreatment
from ostler.host.threads import usable_cpus

MAX_WEIGHT = 10_000
MIN_CAP_PERCENT, MAX_PERCENT = 1.0, 100.0 * 1024
MAX_HOST_CPU = 1023
_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)
_NUMBER = re.compile(r"\d{1,6}(\.\d{1,6})?", re.ASCII)


def _weight(value: object) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not (text.isascii() and text.isdigit() and len(text) <= 6):
        raise ValueError(f"expected 1 to {MAX_WEIGHT}")
    if not 1 <= int(text) <= MAX_WEIGHT:
        raise ValueError(f"expected 1 to {MAX_WEIGHT}")
    return int(text)


def _percent(value: object) -> float:
    text = str(value).strip().removesuffix("%").strip()
    if isinstance(value, bool) or not _NUMBER.fullmatch(text) or float(text) > MAX_PERCENT:
        raise ValueError("expected percent of one host CPU, such as 25 or 150%")
    return float(text)


def _cap(value: object) -> float | None:
    if value is None or value == "none":
        return None
    percent = _percent(value)
    if percent < MIN_CAP_PERCENT:
        raise ValueError(f"expected {MIN_CAP_PERCENT:g} percent of one host CPU at least, or none")
    return percent


def _reserve(value: object) -> float:
    return 0.0 if value == "none" else _percent(value)


def _cpus(value: object) -> tuple[int, ...] | None:
    if value is None or value == "none":
        return None
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    found: set[int] = set()
    for word in words:
        match = None if isinstance(word, bool) else _RANGE.fullmatch(str(word).strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last > MAX_HOST_CPU:
            raise ValueError("expected host CPUs, such as 0,2-3, or none")
        found.update(range(first, last + 1))
    if not found:
        raise ValueError("expected host CPUs, such as 0,2-3, or none")
    return tuple(sorted(found))


def _cpus_here(value: object) -> tuple[int, ...] | None:
    cpus, here = _cpus(value), usable_cpus()
    if cpus is not None and (missing := sorted(set(cpus) - here)):
        raise ValueError(f"host CPU {missing[0]} is not one that this process may use; there are {format_cpus(here)}")
    return cpus


def format_cpus(cpus: Any) -> str:
    """`0,2-3`."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][1] == cpu - 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


_PERCENT_SCHEMA: dict[str, Any] = {"type": ["number", "string", "null"], "examples": [25, "150%"]}
_CPUS_SCHEMA: dict[str, Any] = {"type": ["string", "array", "null"], "examples": ["0,2-3"]}
Weight = Annotated[int, BeforeValidator(_weight), WithJsonSchema({"type": "integer", "minimum": 1, "maximum": 10_000})]
Cap = Annotated[float | None, BeforeValidator(_cap), WithJsonSchema(_PERCENT_SCHEMA)]
Reserve = Annotated[float, BeforeValidator(_reserve), WithJsonSchema(_PERCENT_SCHEMA)]
HostCpus = Annotated[tuple[int, ...] | None, BeforeValidator(_cpus), WithJsonSchema(_CPUS_SCHEMA)]
HostCpusHere = Annotated[tuple[int, ...] | None, BeforeValidator(_cpus_here), WithJsonSchema(_CPUS_SCHEMA)]


class Schedule(BaseModel):
    """What of the host's processors a guest is given. Frozen; a new one is made of it by `changed`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: Weight = PlainTreatment.cpu_weight
    cap: Cap = Field(None, description="Percent of one host CPU.")
    reserve: Reserve = Field(0.0, description="Percent of one host CPU.")
    pin: HostCpus = None

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        check_shares(self.cap, self.reserve)
        return self

    def changed(self, **values: Any) -> Schedule:
        """With some of it otherwise. Raises BadRequest naming what is wrong."""
        try:
            return Schedule.model_validate({**self.model_dump(), **values})
        except ValidationError as error:
            raise bad_request(error, whole="shares") from error


def check_shares(cap: float | None, reserve: float) -> None:
    """Raises ValueError for more reserved than allowed."""
    if cap is not None and reserve > cap:
        raise ValueError(f"expected a reservation of at most the cap, {cap:g} %, not {reserve:g} %")


def check_reserve(reserve: float, vcpus: int) -> None:
    """Raises ValueError for more than the guest's processors can use."""
    if reserve > 100 * vcpus:
        raise ValueError(
            f"expected a reservation of at most 100 % for each of its {vcpus} processors, not {reserve:g} %"
        )
