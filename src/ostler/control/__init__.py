"""Guests of this user and how to reach them: the runtime folder, the control socket, starting a VM process.

Everything here works without a machine: a VM process is another process, behind a socket (docs/control-protocol.md).
"""
