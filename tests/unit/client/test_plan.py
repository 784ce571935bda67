"""From a request to a specification, with an image that is said to be there."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from ostler.client import plan
from ostler.config import parse_request
from ostler.config.devices import NetSpec
from ostler.errors import BadRequest, NoSuchImage
from ostler.images import initrd
from ostler.images.schema import DiskInfo, ImageConfig, KernelInfo
from ostler.images.store import Image


@pytest.fixture
def image(monkeypatch: pytest.MonkeyPatch) -> ImageConfig:
    """Stands for a store with one image, whatever it is asked for."""
    config = ImageConfig(
        reference="debian:12", source="debian", kernel=KernelInfo(name="k", release="6.1", package_version="1"),
        disk=DiskInfo(size_bytes=512), command=("bash",), env={"LANG": "C", "A": "image"}, user="www", workdir="/srv",
        created=datetime.now(UTC),
    )  # fmt: skip
    found = Image("debian", "d" * 64, Path("/images/d"), config)
    monkeypatch.setattr(plan, "ensure", lambda *_: found)
    monkeypatch.setattr(initrd, "agent_initrd", lambda *_: Path("/initrd"))
    return config


def make(**values: object) -> plan.Plan:
    return plan.make(parse_request(image="debian:12", **values))


def test_plain_request_is_a_throw_away_guest_with_an_agent_and_a_network(image: ImageConfig) -> None:
    made = make(command=["true"])

    root = made.spec.disks[0]
    assert (root.path, root.overlay, root.read_only) == (Path("/images/d/disk.raw"), True, False)
    assert made.spec.nets == (NetSpec(optional=True),)
    assert make(ports=["1:2"]).spec.nets == (NetSpec(),)
    assert made.spec.vsock_cid == 3
    assert "ostler.root=/dev/vda" in made.spec.append.split()
    assert made.spec.append.endswith(" quiet")
    assert not made.is_durable
    assert made.is_service
    assert made.facts["command"] == ["true"]
    assert image.boot == made.boot == "agent"


@pytest.mark.usefixtures("image")
def test_disk_rate_is_every_disks_that_has_none_of_its_own() -> None:
    made = make(disk_rate="10M", disks=["/a,rate=1M", "/b"])
    assert [disk.rate for disk in made.spec.disks] == [10 << 20, 1 << 20, 10 << 20]
    assert [disk.rate for disk in make(disks=["/a"]).spec.disks] == [None, None]


def test_images_defaults_are_filled_in_and_given_way_to(image: ImageConfig) -> None:
    assert make().job.argv == image.command
    assert not make().is_service
    job = make(command=["ls"], env=["A=b"], user="root", workdir="/").job
    assert (job.argv, job.env, job.user, job.cwd) == (("ls",), {"LANG": "C", "A": "b"}, "root", "/")
    assert (make().job.user, make().job.cwd) == ("www", "/srv")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), False),
        (("bash",), True),
        (("/bin/sh", "-l"), True),
        (("python3",), True),
        (("sh", "-c", "serve"), False),
        (("python3", "app.py"), False),
        (("nginx", "-g", "daemon off;"), False),
    ],
)
def test_only_a_shell_without_work_needs_a_terminal(argv: tuple[str, ...], expected: bool) -> None:  # noqa: FBT001
    assert plan.needs_a_terminal(argv) is expected


@pytest.mark.parametrize(("command", "service"), [(("bash",), False), (("nginx",), True)])
def test_registry_image_whose_command_is_a_shell_stays_until_it_is_stopped(
    monkeypatch: pytest.MonkeyPatch, image: ImageConfig, command: tuple[str, ...], service: bool  # noqa: FBT001
) -> None:  # fmt: skip
    config = image.model_copy(update={"source": "oci", "command": command})
    monkeypatch.setattr(plan, "ensure", lambda *_: Image("system", "d" * 64, Path("/images/d"), config))

    made = make()

    assert made.is_service is service
    assert made.facts["service"] is service
    assert make(command=["bash"]).is_service


@pytest.mark.usefixtures("image")
@pytest.mark.parametrize(
    ("staying", "passing"),
    [
        ({"disks": ["/x"]}, {"disks": ["/x,ro", "/y,overlay"]}),
        ({"volumes": ["/tmp:/mnt"]}, {"volumes": ["/tmp:/mnt:ro"]}),
    ],
)
def test_guest_is_shut_down_in_order_only_where_something_stays(
    staying: dict[str, object], passing: dict[str, object]
) -> None:
    assert make(**staying).is_durable
    assert not make(**passing).is_durable


@pytest.mark.usefixtures("image")
def test_settings_are_what_the_agent_is_told() -> None:
    made = make(name="web.1", dns=["9.9.9.9"], ssh_keys=["ssh-ed25519 A"], volumes=["/tmp:/a", "/tmp:/b:ro"])
    assert made.name == "web.1"
    assert made.settings == {
        "hostname": "web-1",
        "dns": ["9.9.9.9"],
        "ssh_keys": {"root": ["ssh-ed25519 A"]},
        "mounts": [
            {"tag": "share0", "path": "/a", "read_only": False},
            {"tag": "share1", "path": "/b", "read_only": True},
        ],
    }
    assert make(hostname="h").settings == {"hostname": "h"}


@pytest.mark.usefixtures("image")
def test_names_are_made_of_the_images() -> None:
    assert make().name.startswith("debian-12-")
    assert make().name != make().name


@pytest.mark.usefixtures("image")
def test_ports_without_what_forwards_them_are_refused_before_anything_is_fetched() -> None:
    with pytest.raises(BadRequest, match="expected a passt network"):
        make(ports=["1:2"], nets=["none"])


def test_name_that_means_nothing_costs_no_look_at_a_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OSTLER_CACHE", str(tmp_path))
    with pytest.raises(NoSuchImage, match="image 'debain': not known; expected one of debian, debian-12"):
        plan.make(parse_request(image="debain"))
    with pytest.raises(BadRequest, match="image: missing"):
        plan.make(parse_request())
