"""`host.toml`: what the host may promise, and who may do what.

[capacity]                    # instead of what the host is found to have
memory = "14G"
network_bandwidth = "1G"      # bytes a second; there is no way to measure it

[overcommit]                  # 1 where nothing is said
memory = 1.5
cpu = 4

[keep]                        # for the host itself, of what it is found to have
memory = "512M"

[relief]                      # memory taken back from guests while less than `below` is available, until `until` is
below = "1G"                  # by default a twentieth of the host's memory; 0: never
until = "2G"                  # by default twice that
steps = ["reporting", "balloon", "merge"]   # by default without merging

[peers]                       # other users at the UNIX socket
alice = "operator"

[certificates]                # common names of clients' certificates
backup = "viewer"
"""

from __future__ import annotations

import pwd
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ostler.config.complaints import bad_request
from ostler.config.request import read_table
from ostler.errors import BadRequest
from ostler.hostd import admission
from ostler.hostd.definition import Size
from ostler.hostd.models import Role

FILE = "host.toml"
Ratio = Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Capacity(_Part):
    memory: Size | None = None
    cpu: Annotated[float, Field(ge=0, le=4096, allow_inf_nan=False)] | None = None
    disk: Size | None = None
    disk_bandwidth: Size | None = None
    network_bandwidth: Size | None = None


class Overcommit(_Part):
    memory: Ratio = 1
    cpu: Ratio = 1
    disk: Ratio = 1
    disk_bandwidth: Ratio = 1
    network_bandwidth: Ratio = 1


class Keep(_Part):
    memory: Size = 512 << 20
    disk: Size = 1 << 30


class Relief(_Part):
    """Merging is not done unless it is named: a guest can measure that another one has the same page."""

    below: Size | None = None
    until: Size | None = None
    steps: tuple[Literal["reporting", "balloon", "merge"], ...] = ("reporting", "balloon")

    def bounds(self, memory_bytes: int) -> tuple[int, int]:
        """`below` and `until` on a host of so much memory; `until` is never the lesser."""
        below = self.below if self.below is not None else memory_bytes // 20
        return below, max(below, self.until if self.until is not None else 2 * below)


class Settings(_Part):
    """All of the file."""

    capacity: Capacity = Capacity()
    overcommit: Overcommit = Overcommit()
    keep: Keep = Keep()
    relief: Relief = Relief()
    peers: dict[str, Role] = {}
    certificates: dict[str, Role] = {}
    parallel_starts: Annotated[int, Field(ge=1, le=64)] = 4
    """Guests that boot at once: more only take turns."""

    def ratios(self) -> dict[str, Fraction]:
        """Of over-commitment."""
        return {name: Fraction(str(getattr(self.overcommit, name))) for name in admission.QUANTITIES}

    def capacities(self, found: dict[str, int]) -> dict[str, int]:
        """What the host has, with what is said of it here over what was found."""
        result = dict(found)
        for name in admission.QUANTITIES:
            said = getattr(self.capacity, name)
            if said is not None:
                result[name] = round(said * 1000) if name == admission.CPU else said
            elif name in found and name in Keep.model_fields:
                result[name] = max(0, found[name] - getattr(self.keep, name))
        return result

    def peer_roles(self) -> dict[int, Role]:
        """By user number. Raises BadRequest for a user the host does not know."""
        found = {}
        for name, role in self.peers.items():
            try:
                found[int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid] = role
            except KeyError as error:
                raise BadRequest(f"peers.{name}: expected a user of this host") from error
        return found


def read(path: Path) -> Settings:
    """The file's; without a file, none. Raises BadRequest of one line."""
    if not path.exists():
        return Settings()
    try:
        return Settings.model_validate(read_table(path))
    except ValidationError as error:
        raise BadRequest(f"file {str(path)!r}: {bad_request(error, whole='settings')}") from error
