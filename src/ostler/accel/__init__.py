"""Accelerators: what runs a guest's processors. `ostler.accel.api` is the contract.

Nothing above this package asks which accelerator it has; it may ask for capabilities.
"""
