"""The VM process: processor threads, one event loop, the console, and how a run ends."""

from ostler.vmm.run import RunResult, run

__all__ = ["RunResult", "run"]
