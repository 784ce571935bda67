"""Progress of fetching and building, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ostler.images.progress import Progress


@contextmanager
def shown() -> Iterator[Progress]:
    """Give a listener that draws a bar on a terminal and writes one line per step elsewhere."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30))
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None, visible=False)

        def draw(step: str, fraction: float | None = None) -> None:
            bars.update(task, description=step, total=None if fraction is None else 1.0, completed=fraction or 0.0)
            bars.update(task, visible=True)

        yield draw


def _lines() -> Progress:
    said: set[str] = set()

    def write(step: str, fraction: float | None = None) -> None:  # noqa: ARG001
        if step not in said:
            said.add(step)
            sys.stderr.write(f"ostler: {step}\n")

    return write
