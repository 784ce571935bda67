"""Ostler: the hypervisor you can `pip install`.

Unmodified operating systems run as guests under Linux KVM or on Ostler's own software CPU, on the same board,
with the same devices and commands. Everything but that CPU is Python.

    with ostler.VM("debian", memory="512M") as vm:
        print(vm.run(["uname", "-a"]).text)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ostler.client.async_vm import AsyncVM as AsyncVM
    from ostler.client.vm import VM as VM

    __version__: str

__all__ = ["VM", "AsyncVM", "__version__"]


def __getattr__(name: str) -> Any:
    """Bring what was asked for; `import ostler` alone costs next to nothing, and every guest's process does it."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("ostler")
        except PackageNotFoundError:  # run from a source tree that was never installed
            return "0+unknown"
    if name in {"VM", "AsyncVM"}:
        from ostler.client import async_vm, vm

        return {"VM": vm.VM, "AsyncVM": async_vm.AsyncVM}[name]
    raise AttributeError(f"module 'ostler' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
