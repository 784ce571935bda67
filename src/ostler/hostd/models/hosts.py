"""The host: what it has and what it has promised."""

from __future__ import annotations

from ostler.hostd.models.base import View


class Quantity(View):
    """How much there is of a resource, and how much of it is promised."""

    capacity: int
    """With over-commitment."""
    ratio: float
    promised: int
    left: int


class DiskFacts(View):
    path: str
    size_bytes: int
    free_bytes: int


class NetworkFacts(View):
    name: str
    mac: str | None
    mtu: int
    is_up: bool
    speed_bytes_per_s: int | None
    addresses: list[str]


class AcceleratorFacts(View):
    name: str
    usable: bool
    detail: str


class CpuFacts(View):
    """The host's processors as this process may use them."""

    count: int
    online: int
    model: str
    sockets: int
    cores: int
    threads_per_core: int
    numa_nodes: int


class MemoryFacts(View):
    size_bytes: int
    available_bytes: int
    swap_bytes: int
    huge_page_bytes: int
    huge_pages: int
    huge_pages_free: int


class Inventory(View):
    hostname: str
    kernel: str
    cpu: CpuFacts
    memory: MemoryFacts
    disks: list[DiskFacts]
    networks: list[NetworkFacts]
    accelerators: list[AcceleratorFacts]


class HostView(View):
    """The host and what it has promised."""

    version: str
    started: float
    """When the service did."""
    inventory: Inventory
    resources: dict[str, Quantity]
    guests: dict[str, int]
    """How many are in each state."""
