"""Devices: state machines with time, interrupts, memory and back ends injected."""
