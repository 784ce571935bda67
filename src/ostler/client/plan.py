"""From what a user asks for to what a VM process is given: images found, folders absolute, nothing left to choose.

A name is looked up in the store, else built (debian and its releases) or pulled from a registry. A persistent disk
brings its own image along: the one it was made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ostler.client.job import Job
from ostler.config import GuestRequest, GuestSpec, parse_guest
from ostler.config.devices import DiskSpec, NetSpec
from ostler.control.runtime import check_name, new_name
from ostler.errors import BadRequest, NoSuchImage
from ostler.images import KERNELS, debian, initrd, persist, seed, store
from ostler.images.ensure import ensure
from ostler.images.progress import Progress, silent

if TYPE_CHECKING:
    from ostler.images.store import Image

GUEST_CID = 3
SHELL = ("/bin/sh", "-l")
# What images of systems and languages have as their command: programs that talk to whoever is at a terminal.
_TALKERS = frozenset({"ash", "bash", "dash", "fish", "ksh", "sh", "zsh", "irb", "node", "python", "python3"})
_TALKER_OPTIONS = frozenset({"-", "-i", "-l", "--login"})


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that starting a guest takes."""

    name: str
    spec: GuestSpec
    job: Job
    boot: str
    """`agent` or `init`: who the guest's first process is."""
    is_service: bool
    """Whether the command is one to stay with when nobody is attached: it was given, or it is what a registry's image
    is there for, and not a shell. A guest without one stays until it is stopped."""
    is_durable: bool
    """Whether it may have written to something that outlives it, and so has to be shut down in order."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Recorded in the runtime folder, for `ostler ps` and `inspect`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """For the agent: hostname, name servers, keys, mounts, and interfaces with addresses of their own."""

    @property
    def spec_json(self) -> str:
        return self.spec.model_dump_json()


def make(request: GuestRequest, *, progress: Progress = silent) -> Plan:
    """Find, build or pull the image and say how to start its guest.

    Raises:
        BadRequest: the request cannot be met.
        ImageError: the image is not to be had.
    """
    if request.image is None:
        raise BadRequest("image: missing, expected the name of one; `ostler image ls` shows which are there")
    # Ports are asked for, so the network is too; else a host without one can still run the guest.
    nets = request.nets if request.nets is not None else (NetSpec(optional=not request.ports),)
    if request.ports and not any(net.kind == "passt" for net in nets):
        raise BadRequest("ports: expected a passt network beside them, which is what forwards them")
    image = _image(request.image, request.persist, progress)
    name = check_name(request.name) if request.name else new_name(request.image.rpartition("/")[2])
    root, is_kept = _root_disk(request, image)
    ramdisk = initrd.agent_initrd(image.modules, progress)
    spec = parse_guest(
        kernel=image.kernel, initrd=ramdisk, append=_command_line(request, image),
        memory=request.memory, cpus=request.cpus, cpu=request.cpu, accel=request.accel,
        disks=request.paced(root, *_seed(request), *request.disks), nets=nets, ports=request.ports,
        shares=request.volumes,
        vsock_cid=GUEST_CID, rng=request.rng, balloon=request.balloon,
        test_devices=request.test_devices, **request.treatment,
    )  # fmt: skip
    is_durable = (
        is_kept
        or any(not (disk.read_only or disk.overlay) for disk in request.disks)
        # What the guest has mapped into memory reaches a shared folder when it is told to.
        or any(not share.read_only for share in request.volumes)
    )
    is_service = bool(request.command) or (
        image.config.source == "oci" and not needs_a_terminal(image.config.arguments())
    )
    return Plan(
        name=name,
        spec=spec,
        job=_job(request, image),
        boot=image.config.boot,
        is_service=is_service,
        is_durable=is_durable,
        facts={**_facts(request, image), "durable": is_durable, "service": is_service},
        settings=_settings(request, name),
    )


def needs_a_terminal(argv: Sequence[str]) -> bool:
    """Whether a command is a shell or the like that has nothing to do without a terminal, and would end at once."""
    if not argv:
        return False
    program, *options = argv
    return program.rpartition("/")[2] in _TALKERS and _TALKER_OPTIONS.issuperset(options)


def _image(name: str, persistent: str | None, progress: Progress) -> Image:
    """The image; for a persistent disk its own copy of the one it was made of."""
    if persistent is not None:
        return persist.obtain(persistent, name, lambda: _image(name, None, progress), progress)
    # A registry's images are asked for by host or path: a mistyped name must not cost a look at one.
    if not set(name) & set("/:.") and debian.release_of(name) is None and store.find(name) is None:
        known = sorted({*store.names(), "debian", *KERNELS})
        raise NoSuchImage(
            f"image {name!r}: not known; expected one of {', '.join(known)}, or a registry's HOST/NAME:TAG"
        )
    return ensure(name, progress)


def _root_disk(request: GuestRequest, image: Image) -> tuple[DiskSpec, bool]:
    """The disk with the root file system, and whether what is written to it stays."""
    if request.persist is None:
        return DiskSpec(path=image.disk, format="raw", overlay=True), False
    return DiskSpec(path=image.disk, format="raw"), True


def _seed(request: GuestRequest) -> tuple[DiskSpec, ...]:
    """The disk that a cloud image's first boot looks for."""
    if request.seed is None:
        return ()
    return (DiskSpec(path=seed.obtain(request.seed), format="raw", read_only=True, serial=seed.VOLUME),)


def _command_line(request: GuestRequest, image: Image) -> str:
    # The kernel's tests of its own cryptography are half of what an emulated processor does until it is up.
    words = ["console=ttyS0", "cryptomgr.notests", f"ostler.root={image.config.disk.root}"]
    if image.config.boot == "init":
        words.append("ostler.init=auto")
    # On an emulated processor the kernel's chatter costs a tenth of the boot.
    return " ".join([*words, request.append or "quiet"])


def _job(request: GuestRequest, image: Image) -> Job:
    config = image.config
    return Job(
        argv=config.arguments(request.command),
        env={**config.env, **request.env},
        cwd=request.workdir or config.workdir or None,
        user=request.user or config.user or None,
    )


def _facts(request: GuestRequest, image: Image) -> dict[str, Any]:
    ports = [str(port) for port in request.ports]
    return {
        "image": request.image,
        "digest": image.digest,
        "command": list(image.config.arguments(request.command)),
        "ports": ports,
        "volumes": [f"{each.host}:{each.guest}{':ro' if each.read_only else ''}" for each in request.volumes],
    }


def _settings(request: GuestRequest, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"hostname": request.hostname or as_hostname(name)}
    if request.dns:
        found["dns"] = list(request.dns)
    if request.ssh_keys:
        found["ssh_keys"] = {"root": list(request.ssh_keys)}
    if request.volumes:
        found["mounts"] = [
            {"tag": f"share{number}", "path": share.guest, "read_only": share.read_only}
            for number, share in enumerate(request.volumes)
        ]
    return found


def as_hostname(name: str) -> str:
    """What of a guest's name may be its hostname."""
    cleaned = "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in name).strip("-")
    return cleaned or "guest"
