"""Logs: structured events, on standard error, where the guest's console never is."""

from __future__ import annotations

import logging
import sys

import structlog


def configure(*, debug: bool) -> None:
    """Send structlog's events to standard error: warnings and worse, or with `debug` everything."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f", utc=False),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if debug else logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
