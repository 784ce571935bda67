"""Network cards from their specification: the back end, the limits, and what the guest has to be told of it.

passt's networks are known down to the addresses, so the guest needs no DHCP client: `Network.settings` is what its
agent takes to configure the interface. Of a TAP interface or a bridge only what the user said is known.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ostler.backends.passt import Passt
from ostler.backends.passt_options import Address, Forward, GuestAddresses, PasstOptions, addresses
from ostler.backends.tap import Tap
from ostler.config.devices import NetSpec, PortSpec
from ostler.devices.virtio.net import NetDevice
from ostler.errors import BadRequest, HostError
from ostler.machine.surroundings import Surroundings

# The kernel puts the first free number in its place.
TAP_NAMES = "ostler%d"


@dataclass(frozen=True, slots=True)
class Network:
    """One card of a running guest."""

    name: str
    device: NetDevice
    settings: dict[str, Any]
    """`interfaces`, `routes` and `dns` as the agent's `configure` takes them; empty where the guest must ask."""


def build(
    nets: Sequence[NetSpec], ports: Sequence[PortSpec], stack: contextlib.ExitStack, around: Surroundings
) -> list[Network]:
    """Every card, its back end started and owned by `stack`. Main thread. Raises OstlerError."""
    first_passt = next((number for number, net in enumerate(nets) if net.kind == "passt"), None)
    if ports and first_passt is None:
        raise BadRequest(f"port {ports[0].host}:{ports[0].guest}: only passt forwards ports, expected --net passt")
    guest = around.folder.name if around.folder else "guest"
    found: list[Network] = []
    for number, net in enumerate(nets):
        try:
            found.append(_network(number, net, ports if number == first_passt else (), guest, stack, around))
        except HostError as error:
            if not net.optional:
                raise
            around.report(f"net{number}", f"the guest has no network: {error}")
    return found


def _network(
    number: int, net: NetSpec, ports: Sequence[PortSpec], guest: str, stack: contextlib.ExitStack, around: Surroundings
) -> Network:
    name = f"net{number}"
    mac = bytes.fromhex(net.mac.replace(":", "")) if net.mac else stable_mac(guest, number)

    def report(text: str) -> None:
        around.report(name, text)

    backend: Passt | Tap
    if net.kind == "passt":
        options = PasstOptions(mac, tuple(map(_forward, ports)), number)
        given = with_static(addresses(options), net)
        backend = passt = stack.enter_context(
            Passt(options, around.host, guest=given, report=report, wait=not around.goes_on)
        )
        known = passt.addresses
    else:
        bridge = net.interface if net.kind == "bridge" else None
        tap_name = TAP_NAMES if bridge else net.interface or ""
        backend = stack.enter_context(Tap(tap_name, around.host, report=report, bridge=bridge, mtu=net.mtu))
        known = with_static(GuestAddresses(mac, None, None, (), backend.mtu), net)
    limits = [around.limit(net.rate) for _ in range(2)]
    device = NetDevice(backend, mac=mac, tx_limit=limits[0], rx_limit=limits[1])
    backend.on_down = lambda: device.set_link(up=False)
    return Network(name, device, settings(known))


def rename(cards: Sequence[Network], nets: Sequence[NetSpec], guest: str) -> list[Network]:
    """The cards of a restored guest that gets its name only now, with the addresses that go with it."""
    found = []
    for card in cards:
        number = int(card.name.removeprefix("net"))
        if nets[number].mac is None:
            card.device.own_mac = stable_mac(guest, number)
        mac = {"mac": card.device.own_mac.hex(":")}
        interfaces = [{**each, **mac} for each in card.settings.get("interfaces", [])]
        found.append(replace(card, settings={**card.settings, "interfaces": interfaces} if interfaces else {}))
    return found


def stable_mac(guest: str, number: int) -> bytes:
    """The same address for the same guest and place among its cards: systems name interfaces after it."""
    digest = hashlib.sha256(f"ostler mac {guest} {number}".encode()).digest()
    # Locally administered, of one station.
    return bytes([digest[0] & 0xFC | 0x02]) + digest[1:6]


def with_static(known: GuestAddresses, net: NetSpec) -> GuestAddresses:
    """The addresses with those the user chose instead."""
    found = replace(known, mtu=net.mtu or known.mtu)
    if net.ip is None:
        return found
    chosen = ipaddress.ip_interface(net.ip)
    default = known.v4 if chosen.version == 4 else known.v6
    if net.gateway:
        gateway = net.gateway
    elif default:
        # passt answers for any gateway; the first address of the network is the usual one.
        gateway = str(chosen.network.network_address + 1)
    else:
        gateway = ""
    address = Address(str(chosen.ip), chosen.network.prefixlen, gateway)
    return replace(found, v4=address) if chosen.version == 4 else replace(found, v6=address)


def settings(known: GuestAddresses) -> dict[str, Any]:
    """What the guest's agent is told of one interface."""
    own = [each for each in (known.v4, known.v6) if each]
    if not own:
        return {}
    interface = {
        "mac": known.mac.hex(":"),
        "mtu": known.mtu,
        "addresses": [f"{each.address}/{each.prefix}" for each in own],
    }
    routes = [{"to": "default", "via": each.gateway} for each in own if each.gateway]
    return {"interfaces": [interface], "routes": routes, "dns": list(known.dns)}


def merged_settings(networks: Sequence[Network]) -> dict[str, Any]:
    """Of all cards together; default routes are those of the first card that has one for its protocol."""
    found: dict[str, Any] = {"interfaces": [], "routes": [], "dns": []}
    versions: set[int] = set()
    for network in networks:
        found["interfaces"] += network.settings.get("interfaces", [])
        found["dns"] += [each for each in network.settings.get("dns", []) if each not in found["dns"]]
        for route in network.settings.get("routes", []):
            version = ipaddress.ip_address(route["via"]).version
            if version not in versions:
                versions.add(version)
                found["routes"].append(route)
    return found


def _forward(port: PortSpec) -> Forward:
    return Forward(port.host, port.guest, port.protocol, port.host_address or "")
