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
    """Of a guest that runs without a definition: its memory, and the ports and addresses it has been given."""
    found = {f"port {each.get('protocol', 'tcp')}/{each['host']}" for each in _tables(spec, "ports") if "host" in each}
    for each in _tables(spec, "nets"):
        found |= _of_net(each.get("kind"), each.get("ip"), each.get("mac"), each.get("interface"))
    memory = spec.get("memory")
    quantities = {admission.MEMORY: (memory if isinstance(memory, int) else 0) + PROCESS_BYTES}
    return with_share(Claim(name, quantities, frozenset(found)), spec)


def of_copy(name: str, spec: dict[str, Any], *, ports: bool) -> Claim:
    """Of a guest to be, which goes on from another one; its disks are layers of its own."""
    return of_stranger(name, spec if ports else {**spec, "ports": ()})


def _tables(spec: dict[str, Any], name: str) -> list[dict[str, Any]]:
    listed = spec.get(name)
    return [each for each in listed if isinstance(each, dict)] if isinstance(listed, list | tuple) else []


def with_share(claim: Claim, spec: dict[str, Any]) -> Claim:
    """The claim of a guest that runs: what is reserved of processors may have been changed since its start."""
    reserve = spec.get("cpu_reserve")
    if not isinstance(reserve, int | float):
        return claim
    return Claim(claim.holder, {**claim.quantities, admission.CPU: round(reserve * PER_PERCENT)}, claim.exclusives)


def _of_net(kind: str | None, ip: str | None, mac: str | None, interface: str | None) -> set[str]:
    # Behind passt every guest has a network of its own, in which addresses mean nothing to others.
    if kind not in {"tap", "bridge"}:
        return set()
    found = {f"address {ip.partition('/')[0]}"} if ip else set()
    if mac:
        found.add(f"mac {mac}")
    if kind == "tap":
        found.add(f"tap {interface}")
    return found


def _exclusives(request: GuestRequest) -> frozenset[str]:
    found = {f"port {port.protocol}/{port.host}" for port in request.ports}
    for net in request.nets or ():
        found |= _of_net(net.kind, net.ip, net.mac, net.interface)
    found |= {f"disk {disk.path}" for disk in request.disks if not (disk.read_only or disk.overlay)}
    if request.persist is not None:
        found.add(f"persist {request.persist}")
    return frozenset(found)
