"""Live migration: a running guest goes on in another process, here or on another host (docs/migration.md).

`wire`, `source` and `target` are the protocol, without I/O; `streams` are sockets and TLS; the rest moves memory.
"""
