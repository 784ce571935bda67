"""What holds for every test."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# The same examples for everybody and every time, and no verdict on how long a shared machine took for one.
settings.register_profile(
    "ostler", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("ostler")

# Nothing that a test started is to be there after it; tests of the pool itself have one of their own.
os.environ.setdefault("OSTLER_POOL", "off")
# What tests say of a boot they say of a boot.
os.environ.setdefault("OSTLER_COLD", "1")
