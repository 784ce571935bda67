"""Everything the routes reach: one object, put into the application's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ostler.hostd.access import Access
from ostler.hostd.audit import Audit
from ostler.hostd.host import Host
from ostler.hostd.models import Inventory, Role
from ostler.hostd.stats import Statistics


@dataclass(frozen=True, slots=True)
class Service:
    """A running host service."""

    host: Host
    access: Access
    audit: Audit
    statistics: Statistics
    inventory: Inventory
    samples: Path
    """The file of what was used over time."""
    peers: Mapping[int, Role] = field(default_factory=dict)
    """Roles of users at the UNIX socket."""
    certificates: Mapping[str, Role] = field(default_factory=dict)
    """Roles of clients' certificates, by common name."""
