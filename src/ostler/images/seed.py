"""cloud-init's NoCloud seed: a small ISO 9660 image of volume `cidata` with what a cloud image reads at its first boot.

Source: cloud-init's documentation of the NoCloud data source (files user-data, meta-data, network-config, vendor-data;
volume label cidata). Written by pycdlib, so the host needs no tool. Same content, same bytes but for the dates.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ostler.errors import BadRequest, ImageError
from ostler.images import cache

VOLUME = "cidata"
SEED_FILE = "seed.iso"
MAX_BYTES = 16 << 20
_FILES = ("user-data", "meta-data", "network-config", "vendor-data")
_MARKS = (b"#cloud-config", b"#!", b"#include", b"#cloud-boothook", b"#part-handler", b"## template:", b"Content-Type:",
          b"From ", b"#cloud-config-archive")  # fmt: skip


def build(
    target: Path,
    *,
    user_data: bytes,
    meta_data: Mapping[str, Any] | bytes | None = None,
    network: Mapping[str, Any] | bytes | None = None,
    vendor_data: bytes | None = None,
) -> Path:
    """Write the seed to the new file `target` and return it.

    Without `meta_data` the instance is named by the digest of all the rest: another seed is another instance, for which
    cloud-init runs once more. Mappings are written as JSON, which is YAML too.

    Raises:
        BadRequest: user data that cloud-init would ignore, or too much of it.
        ImageError: the file cannot be written.
    """
    if user_data and not user_data.startswith(_MARKS):
        raise BadRequest("user-data: expected #cloud-config or another of cloud-init's marks in its first line")
    content = {"user-data": user_data, "network-config": _text(network), "vendor-data": vendor_data}
    instance = hashlib.sha256(repr(sorted(content.items())).encode()).hexdigest()[:16]
    content["meta-data"] = _text(meta_data) if meta_data is not None else _text({"instance-id": f"ostler-{instance}"})
    files = {name: data for name, data in content.items() if data is not None}
    if sum(map(len, files.values())) > MAX_BYTES:
        raise BadRequest(f"seed: larger than {MAX_BYTES >> 20} MiB")
    try:
        target.write_bytes(_iso(files))
    except OSError as error:
        raise ImageError(f"seed {target}: {error.strerror or error}") from error
    return target


def from_path(source: Path, target: Path) -> Path:
    """Build a seed from a folder with cloud-init's files, or from one file of user data.

    Raises:
        BadRequest: nothing there, or a folder without user-data and meta-data.
        ImageError: the seed cannot be written.
    """
    try:
        if not source.is_dir():
            return build(target, user_data=source.read_bytes())
        found = {name: (source / name).read_bytes() for name in _FILES if (source / name).is_file()}
    except OSError as error:
        raise BadRequest(f"seed {source}: {error.strerror}, expected user data or a folder of it") from error
    if not found.keys() & {"user-data", "meta-data"}:
        raise BadRequest(f"seed {source}: expected a file user-data or meta-data in the folder")
    return build(
        target, user_data=found.get("user-data", b""), meta_data=found.get("meta-data"),
        network=found.get("network-config"), vendor_data=found.get("vendor-data"),
    )  # fmt: skip


def obtain(source: Path) -> Path:
    """Return the seed of a file or folder, made once and kept in the cache; only its user may read it.

    Raises:
        BadRequest, ImageError: as `from_path`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        fresh = from_path(source, Path(scratch) / SEED_FILE)
        # Its dates differ every time, so the name comes from what went in.
        name = f"seeds/{_digest_of_source(source)}"

        def build_entry(folder: Path) -> dict[str, Any]:
            (folder / SEED_FILE).touch(mode=0o600)
            (folder / SEED_FILE).write_bytes(fresh.read_bytes())
            return {}

        return cache.obtain(name, build_entry).path / SEED_FILE


def _digest_of_source(source: Path) -> str:
    files = [source / name for name in _FILES] if source.is_dir() else [source]
    found = hashlib.sha256()
    for file in files:
        if file.is_file():
            data = file.read_bytes()
            found.update(f"{file.name if source.is_dir() else ''}\0{len(data)}\0".encode() + data)
    return found.hexdigest()[:32]


def _text(data: Mapping[str, Any] | bytes | None) -> bytes | None:
    return data if data is None or isinstance(data, bytes) else json.dumps(data, indent=2).encode() + b"\n"


def _iso(files: Mapping[str, bytes]) -> bytes:
    import pycdlib

    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=VOLUME)
    for name, data in files.items():
        short = name.upper().replace("-", "_")
        image.add_fp(
            io.BytesIO(data), len(data), f"/{short}.;1", rr_name=name, joliet_path=f"/{name}", file_mode=0o100444
        )
    out = io.BytesIO()
    image.write_fp(out)
    image.close()
    return out.getvalue()
