"""`--net` and `-p` as users write them, well and badly."""

from __future__ import annotations

import pytest

from ostler.config.net import ForwardSpec, NetSpec, parse_forward, parse_net, with_forwards
from ostler.errors import BadRequest


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("none", NetSpec(kind="none")),
        ("passt", NetSpec()),
        ("tap=tap0", NetSpec(kind="tap", name="tap0")),
        ("bridge=br0,mac=52:54:00:AB:cd:01", NetSpec(kind="bridge", name="br0", mac="52:54:00:ab:cd:01")),
        ("passt,rate=10M", NetSpec(rx_bytes_per_s=10 << 20, tx_bytes_per_s=10 << 20)),
        ("passt,rx=1M,tx=2M,loopback=on", NetSpec(rx_bytes_per_s=1 << 20, tx_bytes_per_s=2 << 20, host_loopback=True)),
    ],
)
def test_net_is_parsed(text: str, spec: NetSpec) -> None:
    assert parse_net(text) == spec


@pytest.mark.parametrize(
    "text",
    [
        "", "slirp", "tap", "tap=", "tap=a/b", "tap=0123456789abcdef", "passt=x", "none,rate=1M", "passt,mac=52:54",
        "passt,mac=01:00:5e:00:00:01", "passt,rate=fast", "passt,rate=1", "passt,speed=1M", "tap=x,loopback=on",
        "passt,", "bridge=a b",
    ],
)  # fmt: skip
def test_bad_net_is_one_line_that_names_it(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_net(text)

    assert str(caught.value).startswith(f"net {text!r}: ")
    assert "expected" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("8080:80", ForwardSpec(host_port=8080, guest_port=80)),
        ("127.0.0.1:53:5353/udp", ForwardSpec(host_port=53, guest_port=5353, protocol="udp", host_address="127.0.0.1")),
        ("[::1]:1:65535/tcp", ForwardSpec(host_port=1, guest_port=65535, host_address="::1")),
    ],
)
def test_forward_is_parsed(text: str, spec: ForwardSpec) -> None:
    assert parse_forward(text) == spec


@pytest.mark.parametrize(
    "text",
    ["", "80", "0:80", "80:0", "80:65536", "a:80", "80:80/sctp", ":80:80", "300.0.0.1:80:80", "80:80/", "99999999:1"],
)
def test_bad_forward_is_one_line_that_names_it(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_forward(text)

    assert str(caught.value).startswith(f"port {text!r}: expected ")


def test_address_is_stable_local_and_of_one_station() -> None:
    spec = NetSpec()

    first = spec.mac_bytes("web", 0)

    assert first == spec.mac_bytes("web", 0)
    assert first != spec.mac_bytes("web", 1)
    assert (first[0] & 3, len(first)) == (2, 6)
    assert NetSpec(mac="52:54:00:00:00:01").mac_bytes("web", 0) == b"\x52\x54\0\0\0\1"


def test_forwards_go_to_the_passt_interface() -> None:
    forward = parse_forward("8080:80")

    nets = with_forwards((parse_net("tap=t"), parse_net("passt")), (forward,))

    assert nets[1].forwards == (forward,)
    assert nets[0].forwards == ()


@pytest.mark.parametrize(
    ("net", "ports", "reason"),
    [("none", ["1:1"], "expected --net passt"), ("passt", ["1:1", "1:2"], "given twice")],
)
def test_forwards_that_cannot_be_are_refused(net: str, ports: list[str], reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        with_forwards((parse_net(net),), tuple(parse_forward(port) for port in ports))
