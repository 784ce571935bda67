"""Sizes as people write them: 512M, 1G, 1.5G."""

from __future__ import annotations

import re
from fractions import Fraction

_PATTERN = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)\s*([KMGT])(?:i?B)?", re.IGNORECASE | re.ASCII)
_SHIFTS = {"K": 10, "M": 20, "G": 30, "T": 40}

MIB = 1 << 20


def parse_size(text: str) -> int:
    """Bytes, powers of 1024, cut to whole bytes. Raises ValueError with what was expected.

    A bare number is refused: half of all programs take it for bytes, the other half for MiB.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError("expected a size such as 512M, 1G or 1.5G")
    return int(Fraction(match[1]) * (1 << _SHIFTS[match[2].upper()]))


def format_size(size_bytes: int) -> str:
    """The size in whole MiB, cut, for messages."""
    return f"{size_bytes // MIB} MiB"
