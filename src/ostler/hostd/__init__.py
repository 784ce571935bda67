"""The host service: guests defined once, started with the host, watched, restarted, adopted after its own crash.

A guest stays what it is without the service: a process of its own (`ostler.control`), reached by its socket. What the
service adds is memory: definitions and jobs in a database, admission before a guest starts, order at the start and the
end. `ostler.api` puts HTTP in front of it.
"""
