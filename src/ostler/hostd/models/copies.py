"""Snapshots, copies, moves; the images guests are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ostler.hostd.definition import GuestName, Size
from ostler.hostd.models.base import MAX_COPIES, Flag, Line, View, Wish


class SnapshotWish(Wish):
    name: GuestName
    incremental: Flag = False
    freeze: Flag = False
    replace: Flag = False


class RestoreWish(Wish):
    name: GuestName | None = None
    """Of the new guest; made up where there is none. With a count, the names are numbered."""
    count: Annotated[int, Field(strict=True, ge=1, le=MAX_COPIES)] = 1
    accel: Literal["auto", "kvm", "soft"] | None = None


class ForkWish(Wish):
    name: GuestName | None = None
    count: Annotated[int, Field(strict=True, ge=1, le=MAX_COPIES)] = 1


class MigrateWish(Wish):
    """Where `ostler receive` listens; the files are this host's."""

    address: Line
    tls_cert: Line | None = None
    tls_key: Line | None = None
    tls_ca: Line | None = None
    insecure: Flag = False
    streams: Annotated[int, Field(strict=True, ge=1, le=16)] = 1
    compression: Literal["none", "zlib", "zstd"] = "none"
    bytes_per_s: Size = 0
    downtime_ms: Annotated[float, Field(strict=True, ge=0, le=60_000, allow_inf_nan=False)] = 40
    post_copy: Literal["never", "auto", "now"] = "never"
    name: GuestName | None = None


class SnapshotView(View):
    name: str
    guest: str | None = None
    image: str | None = None
    created: float | None = None
    memory_bytes: int | None = None
    disk_bytes: int | None = None
    parent: str | None = None
    frozen: bool | None = None
    error: str | None = None
    """Why it cannot be read."""


class SnapshotList(View):
    snapshots: list[SnapshotView]


class ImageView(View):
    name: str
    digest: str
    size_bytes: int | None


class ImageList(View):
    images: list[ImageView]
