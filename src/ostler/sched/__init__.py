"""Sharing the host's processors among guests: the policy, the table guests agree by, and what enforces it."""
