"""Guests from Python: `ostler.VM`."""
