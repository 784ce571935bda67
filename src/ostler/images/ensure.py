"""From a name to an image that can be run: found, else built, else pulled; a damaged one made again.

`ostler run NAME` and the Python API come through here. What cannot be made again (an imported file) is refused when it
is damaged, in one line that says how to get rid of it.
"""

from __future__ import annotations

from ostler.errors import ImageError
from ostler.images import debian, kernels, oci, rootdisk, store
from ostler.images.progress import Progress, silent


def ensure(name: str, progress: Progress = silent, *, insecure: bool = False) -> store.Image:
    """Return the image `name`, made first where it is missing or damaged.

    Names are looked up in the store; `debian` and `debian:RELEASE` are built; anything else is taken for a reference
    to a registry. `insecure` allows registries without TLS.

    Raises:
        NoSuchImage, BadRequest: the name means nothing.
        ImageError: it cannot be built or pulled; or it is damaged and cannot be made again.
    """
    try:
        image = store.find(name)
    except ImageError as error:
        return _again(name, error, progress, insecure=insecure)
    if image is not None:
        return image
    if debian.release_of(name):
        return debian.build(name, progress=progress)
    return oci.pull(name, insecure=insecure, progress=progress)


def _again(name: str, damage: ImageError, progress: Progress, *, insecure: bool) -> store.Image:
    recipe = store.recipe_of(name)
    if recipe is None or recipe.source not in ("debian", "oci"):
        raise ImageError(f"{damage}; `ostler image rm {name}` removes it") from damage
    progress(f"{damage}; making it again")
    given = recipe.build
    size_bytes = int(given.get("size_bytes") or rootdisk.DEFAULT_SIZE_BYTES)
    kernel = given.get("kernel") or None
    if recipe.source == "oci":
        return oci.pull(
            recipe.reference, name=name, insecure=insecure or bool(given.get("insecure")), size_bytes=size_bytes,
            kernel=kernel or kernels.DEFAULT_KERNEL, progress=progress,
        )  # fmt: skip
    include = [package for package in given.get("include", "").split(",") if package]
    return debian.build(
        recipe.reference, include=include, name=name, kernel=kernel, size_bytes=size_bytes, progress=progress,
    )  # fmt: skip
