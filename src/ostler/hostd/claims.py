"""What a guest claims of its host, from its definition or its running process's specification."""

from __future__ import annotations

from typing import Any

from ostler.config.request import GuestRequest
from ostler.hostd import admission
from ostler.hostd.admission import Claim
from ostler.hostd.definition import Definition

# A guest's process beside its guest's memory: Python, the engine's code, device buffers.
PROCESS_BYTES = 64 << 20
# Admission counts in thousandths of a processor, schedules in percent of one.
PER_PERCENT = 10


def of_definition(definition: Definition) -> Claim:
    """All it reserves."""
    reserve = definition.host.reserve
    return Claim(
        definition.name,
        {
            admission.MEMORY: definition.request.memory + PROCESS_BYTES,
            admission.CPU: round(definition.request.cpu_reserve * PER_PERCENT),
            admission.DISK: reserve.disk,
            admission.DISK_BANDWIDTH: reserve.disk_bandwidth,
            admission.NETWORK_BANDWIDTH: reserve.network_bandwidth,
        },
        _exclusives(definition.request),
    )


def of_stranger(name: str, spec: dict[str, Any]) -> Claim:
    """Of a guest that runs without a definition: its memory, and the ports it has been given."""
    ports = frozenset(
        f"port {each.get('protocol', 'tcp')}/{each['host']}"
        for each in spec.get("ports", ())
        if isinstance(each, dict) and "host" in each
    )
    memory = spec.get("memory")
    quantities = {admission.MEMORY: (memory if isinstance(memory, int) else 0) + PROCESS_BYTES}
    return with_share(Claim(name, quantities, ports), spec)


def with_share(claim: Claim, spec: dict[str, Any]) -> Claim:
    """The claim of a guest that runs: what is reserved of processors may have been changed since its start."""
    reserve = spec.get("cpu_reserve")
    if not isinstance(reserve, int | float):
        return claim
    return Claim(claim.holder, {**claim.quantities, admission.CPU: round(reserve * PER_PERCENT)}, claim.exclusives)


def _exclusives(request: GuestRequest) -> frozenset[str]:
    found = {f"port {port.protocol}/{port.host}" for port in request.ports}
    for net in request.nets or ():
        # Behind passt every guest has a network of its own, in which addresses mean nothing to others.
        if net.ip is not None and net.kind != "passt":
            found.add(f"address {net.ip.partition('/')[0]}")
        if net.mac is not None and net.kind != "passt":
            found.add(f"mac {net.mac}")
        if net.kind == "tap":
            found.add(f"tap {net.interface}")
    found |= {f"disk {disk.path}" for disk in request.disks if not (disk.read_only or disk.overlay)}
    if request.persist is not None:
        found.add(f"persist {request.persist}")
    return frozenset(found)
