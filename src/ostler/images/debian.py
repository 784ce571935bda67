"""`ostler image build debian[:RELEASE]`: Debian's minimal system with python3, from the host's own mirror."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ostler.errors import BadRequest
from ostler.images import bootstrap, making, store, trees
from ostler.images.progress import Progress, silent
from ostler.images.rootdisk import DEFAULT_SIZE_BYTES
from ostler.images.trees import Tree

# Number → code name; the first is what plain `debian` means.
RELEASES = {"12": "bookworm", "13": "trixie"}
# What most who open a guest reach for at once: a Python, addresses, certificates, processes, modules.
DEFAULT_PACKAGES = ("ca-certificates", "iproute2", "kmod", "netbase", "procps", "python3")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def release_of(reference: str) -> str | None:
    """Return the code name of what `reference` names (debian, debian:12, debian:trixie), None if it is not Debian's.

    Raises:
        BadRequest: it is Debian's, and there is no such release.
    """
    name, _, wanted = reference.partition(":")
    if name != "debian":
        return None
    number = wanted or next(iter(RELEASES))
    release = RELEASES.get(number, number)
    if release not in RELEASES.values():
        known = ", ".join(f"{number} ({name})" for number, name in RELEASES.items())
        raise BadRequest(f"image {reference}: no such release, expected one of {known}")
    return release


def kernel_of(release: str) -> str:
    """Return the kernel that goes with a release, as `ostler kernel ls` names it."""
    return next(f"debian-{number}-cloud" for number, name in RELEASES.items() if name == release)


def build(
    reference: str = "debian",
    *,
    include: Sequence[str] = (),
    name: str | None = None,
    size_bytes: int = DEFAULT_SIZE_BYTES,
    kernel: str | None = None,
    progress: Progress = silent,
) -> store.Image:
    """Build a Debian image and give it the name `name` (default: the reference, and what it means in full).

    Raises:
        BadRequest: the reference is not Debian's or its release is not known.
        ImageError: the archive cannot be reached, a tool is missing, a package does not exist, the disk is full.
    """
    release = release_of(reference)
    if release is None:
        raise BadRequest(f"image {reference}: cannot be built, expected debian or debian:RELEASE")
    packages = sorted({*DEFAULT_PACKAGES, *include})
    names = (name,) if name else (reference, *_aliases(release, reference))
    recipe = {"include": ",".join(sorted(include)), "size_bytes": str(size_bytes), "kernel": kernel or ""}
    with making.workspace() as scratch:
        folder = Path(tempfile.mkdtemp(prefix="tree-", dir=scratch))
        folder.chmod(0o755)
        tree = bootstrap.debian(release, packages, lambda stream: trees.unpack(stream, folder), progress=progress)
        _tidy(tree)
        return making.add_tree(
            tree,
            making.Defaults(
                reference=reference, source="debian", command=("bash",), env={"PATH": _PATH}, build=recipe,
                origin={"release": release, "packages": ",".join(packages)},
            ),
            names=names, kernel=kernel or kernel_of(release), size_bytes=size_bytes, progress=progress,
        )  # fmt: skip


def _aliases(release: str, reference: str) -> tuple[str, ...]:
    number = next(number for number, name in RELEASES.items() if name == release)
    names = [f"debian:{number}", f"debian:{release}"]
    if number == next(iter(RELEASES)):
        names.insert(0, "debian")
    return tuple(name for name in names if name != reference)


def _tidy(tree: Tree) -> None:
    """Take out what mmdebstrap brought from the host; the agent sets both at every start."""
    for name in ("etc/hostname", "etc/resolv.conf"):
        (tree.path / name).unlink(missing_ok=True)
