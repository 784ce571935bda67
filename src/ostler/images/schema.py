"""`image.json`: what an image is made of and what a guest of it does unless told otherwise.

The same models are what `ostler image inspect --json` prints. A file that does not validate is a damaged image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

KERNEL_FILE = "vmlinuz"
DISK_FILE = "disk.raw"
MODULES_FOLDER = "modules"
PORT_PATTERN = r"[0-9]{1,5}/(tcp|udp|sctp)"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OsRelease(_Model):
    """Of the image's own /etc/os-release; empty where it has none."""

    id: str = ""
    version: str = ""
    pretty_name: str = ""


class KernelInfo(_Model):
    """The kernel the image boots, one of `ostler kernel ls`."""

    name: str
    release: str
    """As `uname -r` says it in the guest."""
    package_version: str


class DiskInfo(_Model):
    """The root disk, a raw file beside this one."""

    size_bytes: Annotated[int, Field(gt=0, multiple_of=512)]
    root: str = "/dev/vda"
    """The device with the root file system, as the guest names it if this is its first disk."""
    filesystem: str = "ext4"


class ImageConfig(_Model):
    """Everything about an image but its bytes."""

    format: Literal[1] = 1
    reference: str
    """What it was made of, in the words of the command: debian:bookworm, registry/name:tag, a file's name."""
    source: Literal["debian", "oci", "disk", "tree"]
    boot: Literal["agent", "init"] = "agent"
    """Whether the agent stays the guest's first process, or hands over to the image's own."""
    os: OsRelease = OsRelease()
    kernel: KernelInfo
    disk: DiskInfo
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: dict[str, str] = {}
    user: str = ""
    """Name or number, with a group behind a colon or without; empty means root."""
    workdir: str = ""
    ports: tuple[Annotated[str, StringConstraints(pattern=f"^{PORT_PATTERN}$")], ...] = ()
    """What its programs listen on: 80/tcp."""
    build: dict[str, str] = {}
    """How to make it again: the arguments of the command that did."""
    origin: dict[str, str] = {}
    """Digests and versions of what it was made of."""
    created: AwareDatetime

    def arguments(self, command: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Return what to run, where `command` (if any) takes the place of the image's, as OCI has it."""
        return self.entrypoint + (command or self.command)

    def digest(self, files: Mapping[str, str]) -> str:
        """Return the digest of an image of this configuration and these files (name → digest), in hexadecimal.

        The time of its making does not count: the same content has the same digest.
        """
        content = {"config": self.model_dump(mode="json", exclude={"created"}), "files": dict(files)}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
