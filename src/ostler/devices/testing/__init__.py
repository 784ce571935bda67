"""Devices for test programs; no guest gets them unless it is asked for."""
