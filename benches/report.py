"""Figures of several sides as a table, ratio first, and as a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One workload: medians by side, of figures corrected for the CPU time a side got, and as the clock had them."""

    name: str
    unit: str
    medians: dict[str, float]
    more_is_better: bool
    bar: float | None
    """How many times better than the second side the first one is to be."""
    clock: dict[str, float] = field(default_factory=dict)

    def ratio(self, ours: str, other: str, *, by_clock: bool = False) -> float | None:
        """How many times better `ours` is; None where one of them has no figure."""
        medians = self.clock if by_clock else self.medians
        if not medians.get(ours) or not medians.get(other):
            return None
        quotient = medians[other] / medians[ours]
        return 1 / quotient if self.more_is_better else quotient


def note(text: str) -> None:
    """Progress, on standard error."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def table(rows: Sequence[Row], sides: Sequence[str]) -> None:
    """Print it; the first side is ours."""
    ours, *others = sides
    kinds = (False, True) if any(row.clock for row in rows) else (False,)
    drawn = Table(title="medians; ratios above 1 say that Ostler is quicker", title_justify="left")
    drawn.add_column("workload")
    for other in others:
        drawn.add_column(f"ratio to {other}", justify="right")
        if kinds[1:]:
            drawn.add_column("by the clock", justify="right")
    drawn.add_column("wanted", justify="right")
    for side in sides:
        drawn.add_column(side, justify="right")
    drawn.add_column("unit")
    for row in rows:
        ratios = [row.ratio(ours, other, by_clock=by_clock) for other in others for by_clock in kinds]
        drawn.add_row(
            row.name,
            *(f"{ratio:.2f}" if ratio else "-" for ratio in ratios),
            f"{row.bar or 1:g}" if others else "",
            *(f"{row.medians[side]:.3g}" if side in row.medians else "-" for side in sides),
            row.unit,
        )
    Console(width=160 if not sys.stdout.isatty() else None).print(drawn)


def markdown(rows: Sequence[Row], sides: Sequence[str]) -> str:
    """The table for a document: ratio to the second side, corrected and by the clock, then every side's figure."""
    ours, other = sides[0], sides[1]
    lines = [
        f"| workload | times {other} | by the clock | wanted | {' | '.join(sides)} | unit |",
        "|---|---|---|---|" + "---|" * len(sides) + "---|",
    ]
    for row in rows:
        ratios = [row.ratio(ours, other, by_clock=by_clock) for by_clock in (False, True)]
        cells = [
            row.name,
            *(f"{ratio:.2f}" if ratio else "-" for ratio in ratios),
            f"{row.bar or 1:g}",
            *(f"{row.medians[side]:.3g}" if side in row.medians else "-" for side in sides),
            row.unit,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[Row], sides: Sequence[str], path: Path) -> None:
    """Bars of the ratio to the second side, on a logarithmic scale with 1 in the middle."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    ours, other = sides[0], sides[1]
    known = [(row.name, ratio) for row in rows if (ratio := row.ratio(ours, other))]
    figure, axes = plt.subplots(figsize=(8, 0.35 * len(known) + 1.5), layout="constrained")
    names, ratios = [name for name, _ in known], [ratio for _, ratio in known]
    bars = axes.barh(names, [ratio - 1 for ratio in ratios], left=1)
    for bar, ratio in zip(bars, ratios, strict=True):
        bar.set_color("tab:green" if ratio >= 1 else "tab:red")
    axes.bar_label(bars, labels=[f"{ratio:.2f}" for ratio in ratios], padding=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(f"times quicker than {other}")
    figure.savefig(path)
    plt.close(figure)
