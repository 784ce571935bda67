"""Accelerators: what runs a guest's processors. `ostler.accel.api` is the contract.

Nothing above this package asks which accelerator it has; it may ask for capabilities.
"""

from ostler.accel.opener import open_accelerator as open  # noqa: A004 - accel.open() is the contract's name

__all__ = ["open"]
