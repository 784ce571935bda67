"""`ostler image pull`: an image of an OCI registry becomes a guest's root disk.

skopeo fetches and checks every digest, umoci lays the layers out (whiteouts included); both work for plain users. What
a plain user cannot set, umoci leaves in an attribute of each file (`user.rootlesscontainers`), from which the disk gets
its owners. Of the image's configuration a guest takes over: Entrypoint, Cmd, Env, User, WorkingDir, ExposedPorts.

Left out: file capabilities (`security.capability`), which rootless unpacking cannot keep; images of other
architectures; Volumes, Healthcheck, StopSignal.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from ostler.errors import BadRequest, ImageError
from ostler.images import making, rootdisk, store, tools
from ostler.images.kernels import DEFAULT_KERNEL
from ostler.images.progress import Progress, silent
from ostler.images.schema import PORT_PATTERN
from ostler.images.trees import Attributes, Tree

# What registries accept, without their length limits; also keeps options and shell metacharacters out.
_REFERENCE = re.compile(r"[a-z0-9]([a-zA-Z0-9._:/-]*[a-zA-Z0-9])?(@sha256:[0-9a-f]{64})?", re.ASCII)
_ROOTLESS = "user.rootlesscontainers"
_RETRIES = "2"


def pull(
    reference: str,
    *,
    name: str | None = None,
    insecure: bool = False,
    kernel: str = DEFAULT_KERNEL,
    size_bytes: int = rootdisk.DEFAULT_SIZE_BYTES,
    progress: Progress = silent,
) -> store.Image:
    """Pull `reference` and give the image the name `name` (default: the reference).

    `insecure` allows registries without TLS or with a certificate nobody vouches for.

    Raises:
        BadRequest: that is no reference.
        ImageError: a tool is missing, the registry cannot be reached or has no such image, a digest does not match.
    """
    if not _REFERENCE.fullmatch(reference):
        raise BadRequest(f"image {reference!r}: neither here nor a reference to a registry, expected HOST/NAME:TAG")
    for program in ("skopeo", "umoci"):
        tools.require(program, package=program)
    with making.workspace() as scratch:
        layout = scratch / "layout"
        _fetch(reference, layout, insecure=insecure, progress=progress)
        manifest, config = _read_layout(reference, layout)
        progress("unpacking the layers")
        bundle = scratch / "bundle"
        rootless = ["--rootless"] if os.geteuid() != 0 else []
        tools.run(
            ["umoci", "--log", "error", "unpack", *rootless, "--image", f"{layout}:image", str(bundle)],
            package="umoci",
        )
        tree = Tree(bundle / "rootfs")
        if rootless:
            _read_owners(tree)
        recipe = {"insecure": "yes" if insecure else "", "size_bytes": str(size_bytes), "kernel": kernel}
        return making.add_tree(
            tree, _defaults(reference, manifest, config, recipe), names=(name or reference,), kernel=kernel,
            size_bytes=size_bytes, progress=progress,
        )  # fmt: skip


def _fetch(reference: str, layout: Path, *, insecure: bool, progress: Progress) -> None:
    progress(f"pulling {reference}")
    command = [
        "skopeo",
        "copy",
        "--quiet",
        "--retry-times",
        _RETRIES,
        "--override-os",
        "linux",
        "--override-arch",
        "amd64",
    ]
    command += ["--src-tls-verify=false"] if insecure else []
    # A host without a policy file gets skopeo's usual one: no signatures asked for, digests always checked.
    if not any(
        Path(path).exists() for path in (Path.home() / ".config/containers/policy.json", "/etc/containers/policy.json")
    ):
        command.insert(1, "--insecure-policy")
    try:
        tools.run([*command, f"docker://{reference}", f"oci:{layout}:image"], package="skopeo")
    except ImageError as error:
        raise ImageError(f"image {reference}: cannot be pulled: {_reason(str(error), insecure=insecure)}") from error


def _reason(text: str, *, insecure: bool) -> str:
    """Take the last link out of skopeo's chain of causes, which is long and quoted more than once."""
    message = re.search(r'msg="(.*)"', text)
    told = message[1].replace('\\"', '"') if message else text.removeprefix("skopeo: ")
    if "server gave HTTP response to HTTPS client" in told and not insecure:
        return "the registry speaks no TLS; --insecure allows that"
    for known in ("connection refused", "no such host", "manifest unknown", "unauthorized", "i/o timeout",
                  "certificate signed by unknown authority", "network is unreachable", "No space left on device",
                  "no space left on device"):  # fmt: skip
        if known in told:
            return known
    return told if len(told) < 300 else "…" + told[-300:]


def _read_layout(reference: str, layout: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return manifest and configuration; both were checked against their digests when they were fetched."""
    try:
        index = json.loads((layout / "index.json").read_text())
        manifest = _blob(layout, index["manifests"][0])
        config = _blob(layout, manifest["config"])
        architecture = config.get("architecture", "amd64")
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ImageError(f"image {reference}: its manifest or configuration cannot be read ({error})") from error
    if architecture != "amd64":
        raise ImageError(f"image {reference}: made for {architecture}, expected amd64")
    return {**manifest, "digest": index["manifests"][0]["digest"]}, config


def _blob(layout: Path, descriptor: dict[str, Any]) -> dict[str, Any]:
    kind, _, digest = str(descriptor["digest"]).partition(":")
    if not re.fullmatch(r"[a-z0-9]+", kind) or not re.fullmatch(r"[0-9a-f]+", digest):
        raise ValueError(f"digest {descriptor['digest']!r}")
    found = json.loads((layout / "blobs" / kind / digest).read_text())
    if not isinstance(found, dict):
        raise TypeError("not an object")
    return found


def _defaults(
    reference: str, manifest: dict[str, Any], config: dict[str, Any], recipe: dict[str, str]
) -> making.Defaults:
    given = config.get("config") or {}
    environment = dict(each.partition("=")[::2] for each in given.get("Env") or () if "=" in each)
    ports = [port if "/" in port else f"{port}/tcp" for port in given.get("ExposedPorts") or ()]
    return making.Defaults(
        reference=reference,
        source="oci",
        entrypoint=tuple(given.get("Entrypoint") or ()),
        command=tuple(given.get("Cmd") or ()),
        env=environment,
        user=str(given.get("User") or ""),
        workdir=str(given.get("WorkingDir") or ""),
        ports=tuple(sorted(port for port in ports if re.fullmatch(PORT_PATTERN, port))),
        build=recipe,
        origin={"manifest": str(manifest["digest"]), "config": str(manifest["config"]["digest"])},
    )


def _read_owners(tree: Tree) -> None:
    """Take owners from the attribute that umoci leaves where it may not set them."""
    for path in [tree.path, *tree.path.rglob("*")]:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):  # such attributes cannot be on links, and their owner matters to nobody
            continue
        try:
            uid, gid = decode_owner(os.getxattr(path, _ROOTLESS, follow_symlinks=False))
        except (OSError, ValueError):
            uid, gid = 0, 0
        tree.attributes[str(path.relative_to(tree.path))] = Attributes(uid, gid, status.st_mode)


def decode_owner(value: bytes) -> tuple[int, int]:
    """Return uid and gid of a rootlesscontainers.Resource message: two varint fields, 1 and 2, absent where 0.

    Raises ValueError for anything else; 2**32-1 means no change and gives 0.
    """
    fields = {1: 0, 2: 0}
    at = 0
    while at < len(value):
        key, at = _varint(value, at)
        number, at = _varint(value, at)
        if key & 7 or key >> 3 not in fields:
            raise ValueError(f"field {key:#x}")
        fields[key >> 3] = 0 if number == 0xFFFF_FFFF else number
    return fields[1], fields[2]


def _varint(value: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while at < len(value) and shift < 64:
        byte = value[at]
        result |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return result, at
    raise ValueError("varint without an end")
