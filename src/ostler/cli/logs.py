"""Logs: structured events, on standard error, where the guest's console never is."""

from __future__ import annotations

import sys


def configure(*, debug: bool) -> None:
    """With `debug`, send structlog's events to standard error.

    Without, structlog is not even imported, for events nobody would see: with asyncio, ssl and rich it is 12 MiB in
    every guest's process and a third of its start. Who has something to log asks whether structlog is configured.
    """
    if not debug:
        return
    import structlog

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def event(text: str, **values: object) -> None:
    """Log an event, where somebody wants to see it."""
    if structlog := sys.modules.get("structlog"):
        structlog.get_logger().info(text, **values)
