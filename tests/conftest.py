"""For all tests: none fails because the machine was busy with something else."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("ostler", deadline=None)
settings.load_profile("ostler")
