"""What the guest's agent is told of its network, and which addresses cards have."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from ostler.backends.passt_options import Address, GuestAddresses
from ostler.config.devices import NetSpec, PortSpec
from ostler.devices.virtio.net import NetDevice
from ostler.errors import BadRequest
from ostler.machine.networks import Network, build, merged_settings, rename, settings, stable_mac, with_static
from tests.unit.devices.virtio.net_fakes import MAC, FakeWire

PASST = GuestAddresses(
    MAC, Address("10.213.77.2", 24, "10.213.77.1"), Address("fd00::2", 64, "fd00::1"), ("192.0.2.9",)
)


def test_settings_are_what_the_agent_takes() -> None:
    assert settings(PASST) == {
        "interfaces": [{"mac": "52:54:00:12:34:56", "mtu": 65520, "addresses": ["10.213.77.2/24", "fd00::2/64"]}],
        "routes": [{"to": "default", "via": "10.213.77.1"}, {"to": "default", "via": "fd00::1"}],
        "dns": ["192.0.2.9"],
    }


def test_interface_of_which_nothing_is_known_is_the_guests_own_business() -> None:
    assert settings(GuestAddresses(MAC, None, None, ())) == {}


@pytest.mark.parametrize(
    ("net", "address"),
    [
        ({"ip": "10.0.0.7/8"}, Address("10.0.0.7", 8, "10.0.0.1")),
        ({"ip": "10.0.0.7/8", "gateway": "10.9.9.9"}, Address("10.0.0.7", 8, "10.9.9.9")),
    ],
)
def test_static_address_replaces_the_one_of_its_protocol(net: dict[str, str], address: Address) -> None:
    found = with_static(PASST, NetSpec.model_validate({"kind": "passt", **net}))

    assert (found.v4, found.v6) == (address, PASST.v6)


def test_tap_without_a_gateway_has_no_default_route() -> None:
    spec = NetSpec.model_validate("tap=tap0,ip=198.51.100.2/24")

    assert settings(with_static(GuestAddresses(MAC, None, None, (), 1500), spec))["routes"] == []


def test_first_card_with_a_gateway_has_the_default_route() -> None:
    cards = [Network(f"net{n}", NetDevice(FakeWire(), mac=MAC), settings(PASST)) for n in range(2)]

    found = merged_settings(cards)

    assert [route["via"] for route in found["routes"]] == ["10.213.77.1", "fd00::1"]
    assert (len(found["interfaces"]), found["dns"]) == (2, ["192.0.2.9"])


def test_address_of_a_card_is_stable_local_and_of_one_station() -> None:
    first = stable_mac("web", 0)

    assert first == stable_mac("web", 0)
    assert len({first, stable_mac("web", 1), stable_mac("db", 0)}) == 3
    assert (first[0] & 3, len(first)) == (2, 6)


def test_ports_without_passt_are_refused() -> None:
    with contextlib.ExitStack() as stack, pytest.raises(BadRequest, match="only passt forwards ports"):
        build([], [PortSpec.model_validate("80:80")], stack, None)  # type: ignore[arg-type]


def test_card_of_a_guest_that_gets_its_name_later_has_the_address_that_goes_with_it() -> None:
    cards = [Network(f"net{number}", NetDevice(FakeWire(), mac=MAC), settings(PASST)) for number in range(2)]
    nets = [NetSpec(), NetSpec.model_validate({"kind": "passt", "mac": MAC.hex(":")})]

    own, chosen = rename(cards, nets, "late")

    assert own.device.own_mac == stable_mac("late", 0)
    assert own.settings == settings(replace(PASST, mac=stable_mac("late", 0)))
    # The driver goes on with the one it knows until it is told.
    assert own.device.mac == MAC
    assert (chosen.device.own_mac, chosen.settings) == (MAC, settings(PASST))
