"""Ostler: the hypervisor you can `pip install`.

Unmodified operating systems run as guests under Linux KVM or on Ostler's own software CPU, on the same board,
with the same devices and commands. Everything but that CPU is Python.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ostler")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
