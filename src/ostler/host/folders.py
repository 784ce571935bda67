"""Where Ostler keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Return the cache's folder: `OSTLER_CACHE`, else the user's cache directory. It need not exist."""
    chosen = os.environ.get("OSTLER_CACHE")
    if chosen:
        return Path(chosen)
    import platformdirs

    return platformdirs.user_cache_path("ostler")
