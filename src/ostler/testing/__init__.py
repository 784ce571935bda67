"""Fakes that ship for the tests of whoever builds on Ostler."""
