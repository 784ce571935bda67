"""What users may ask for, in texts and in files, and how they are told what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostler.config import parse_request
from ostler.config.devices import DiskSpec, NetSpec, PortSpec, ShareSpec
from ostler.config.request import GuestRequest, read_request, schema
from ostler.errors import BadRequest

DESCRIPTION = """
image = "debian"
memory = "1G"
command = ["python3", "-m", "http.server"]
ports = ["8080:80", { host = 5353, guest = 53, protocol = "udp" }]
disks = ["data.img,ro", { path = "/dev/sdz", serial = "D1" }]
volumes = ["www:/srv:ro"]
env = { TERM = "dumb" }
[[nets]]
kind = "tap"
interface = "tap0"
rate = "10M"
"""


def test_texts_and_tables_mean_the_same() -> None:
    request = parse_request(
        disks=["/a,ro,format=qcow2", {"path": "/b", "overlay": True}],
        nets=["bridge=br0,mac=52:54:00:AB:cd:ef,ip=10.0.0.2/8"],
        ports=["127.0.0.1:80:8080/udp", "[::1]:1:2", "3:4"],
        volumes=["/h:/g", "/h:/g:ro"],
        env=["A=1=2", "B="],
    )
    assert request.disks == (
        DiskSpec(path=Path("/a"), read_only=True, format="qcow2"),
        DiskSpec(path=Path("/b"), overlay=True),
    )
    assert request.nets == (NetSpec(kind="bridge", interface="br0", mac="52:54:00:ab:cd:ef", ip="10.0.0.2/8"),)
    assert request.ports == (
        PortSpec(host_address="127.0.0.1", host=80, guest=8080, protocol="udp"),
        PortSpec(host_address="::1", host=1, guest=2),
        PortSpec(host=3, guest=4),
    )
    assert request.volumes == (
        ShareSpec(host=Path("/h"), guest="/g"),
        ShareSpec(host=Path("/h"), guest="/g", read_only=True),
    )
    assert request.env == {"A": "1=2", "B": ""}


def test_no_network_and_nothing_said_of_networks_differ() -> None:
    assert parse_request(nets=["none"]).nets == ()
    assert parse_request().nets is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nets": ["wifi"]}, "nets 'wifi': expected passt, tap=NAME, bridge=NAME or none"),
        ({"nets": ["tap="]}, "nets 'tap='"),
        ({"nets": ["passt,mac=01:00:00:00:00:00"]}, "expected a unicast MAC address"),
        ({"nets": ["none", "passt"]}, "expected none, or networks, not both"),
        ({"ports": ["1:0"]}, "ports '1:0': expected [ADDRESS:]HOST:GUEST[/udp]"),
        ({"ports": ["99999:1"]}, "ports from 1 to 65535"),
        ({"ports": ["nowhere:1:1"]}, "expected an IP address"),
        ({"disks": ["a,rw"]}, "'rw' is no option of it; expected ro, overlay, format=…, serial=…, rate=…"),
        ({"disks": ["a,rate=0"]}, "disks.0.rate '0': expected a size"),
        ({"disk_rate": "fast"}, "disk_rate 'fast'"),
        ({"disks": [""]}, "disks ''"),
        ({"disks": [{"serial": "x"}]}, "disks.0.path: missing"),
        ({"volumes": ["/a"]}, "expected HOST:GUEST[:ro]"),
        ({"volumes": ["/a:b"]}, "expected an absolute path in the guest"),
        ({"env": ["A"]}, "'A': expected NAME=VALUE"),
        ({"env": {"1A": "x"}}, "'1A': expected NAME=VALUE"),
        ({"name": "a b"}, "name 'a b': expected up to 40 letters"),
        ({"command": "ls"}, "command 'ls': expected a list of words"),
        ({"command": ["a\0"]}, "command"),
        ({"image": "a", "kernel": "b"}, "only one kernel"),
        ({"colour": "red"}, "colour 'red': not known here"),
    ],
)
def test_bad_value_is_one_line_naming_it(values: dict[str, object], message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_request(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=40), st.sampled_from(["nets", "ports", "disks", "volumes", "env"]))
def test_any_text_is_understood_or_a_bad_request(text: str, field: str) -> None:
    try:
        parse_request(**{field: [text]})
    except BadRequest as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_file_is_read_relative_to_itself_and_options_win(tmp_path: Path) -> None:
    path = tmp_path / "guest.toml"
    path.write_text(DESCRIPTION)

    request = read_request(path, memory="2G", name="x", cpus=None)

    assert (request.memory, request.name, request.cpus) == (2 << 30, "x", 1)
    assert [disk.path for disk in request.disks] == [tmp_path / "data.img", Path("/dev/sdz")]
    assert request.volumes[0].host == tmp_path / "www"
    assert request.nets == (NetSpec(kind="tap", interface="tap0", rate=10 << 20),)
    assert request.ports[1].protocol == "udp"
    assert request.env == {"TERM": "dumb"}


@pytest.mark.parametrize(("text", "message"), [("image =", "not TOML"), ("x = 1", "x '1': not known here")])
def test_bad_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "guest.toml"
    path.write_text(text)
    with pytest.raises(BadRequest, match=message):
        read_request(path)
    with pytest.raises(BadRequest, match="No such file"):
        read_request(tmp_path / "other.toml")


def test_schema_covers_every_field_and_allows_texts() -> None:
    found = json.loads(json.dumps(schema()))
    assert set(found["properties"]) == set(GuestRequest.model_fields)
    assert {"type": "string", "examples": ["8080:80"]} in found["$defs"]["PortSpec"]["anyOf"]
