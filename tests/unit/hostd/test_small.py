"""The service's smaller parts: systemd, settings, definitions in folders."""

from __future__ import annotations

import os
import socket
from fractions import Fraction
from pathlib import Path

import pytest

from ostler.api.running import read_folder
from ostler.api.serving import listen_tcp
from ostler.config.request import read_request
from ostler.errors import BadRequest
from ostler.hostd import inventory, settings
from ostler.hostd.models import Role
from ostler.hostd.notify import notify


def test_notify_sends_to_where_systemd_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1", "STATUS=3 guests")

        assert systemd.recv(100) == b"READY=1\nSTATUS=3 guests"


def test_notify_without_systemd_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)

    notify("READY=1")


def test_settings_change_what_there_is(tmp_path: Path) -> None:
    path = tmp_path / "host.toml"
    path.write_text(
        '[overcommit]\nmemory = 1.5\n[keep]\nmemory = "1G"\n[capacity]\ncpu = 1.5\n[peers]\nroot = "viewer"\n'
    )
    said = settings.read(path)

    assert said.ratios()["memory"] == Fraction(3, 2)
    found = said.capacities({"memory": 4 << 30, "cpu": 8000})
    assert found == {"memory": 3 << 30, "cpu": 1500}
    assert said.peer_roles() == {0: Role.VIEWER}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[overcommit]\nmemory = 0.5\n", "overcommit.memory '0.5'"),
        ("[what]\n", "what '{}'"),
        ("[peers]\nalice = 'king'\n", "peers.alice 'king'"),
    ],
)
def test_settings_bad_value_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "host.toml"
    path.write_text(text)

    with pytest.raises(BadRequest) as caught:
        settings.read(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_folder_file_names_the_guest_and_run_reads_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "db.toml"
    path.write_text('image = "debian"\ndisks = ["data.img"]\n[host]\nautostart = true\n')
    found = read_folder(tmp_path)["db"]

    assert found.host.autostart
    assert found.request.disks[0].path == tmp_path / "data.img"
    assert read_request(path).image == "debian"


def test_read_folder_malformed_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "db.toml").write_text('image = "debian"\n[host]\nautostart = "perhaps"\n')

    with pytest.raises(BadRequest, match=r"db.toml.*host.autostart 'perhaps'"):
        read_folder(tmp_path)


def test_listen_tcp_tokens_do_not_go_over_a_network_in_the_clear() -> None:
    with pytest.raises(BadRequest, match="expected TLS, or a loopback address"):
        listen_tcp("0.0.0.0:0", None)


def test_inventory_is_of_this_host() -> None:
    found = inventory.inventory(probe=False)

    assert found.cpu.count == len(os.sched_getaffinity(0))
    assert found.memory.size_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert any(each.name == "lo" for each in found.networks)
