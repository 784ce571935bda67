"""A plan as a picture: every host's load today and in the plan, and what the plan saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ostler.errors import BadRequest, HostError
from ostler.planning.report import HostLoad, Plan
from ostler.planning.solve import INSTALL

FORMATS = (".png", ".svg", ".pdf")
_COLOURS = {"cpu": "#2f6fde", "memory": "#12a594", "disk": "#9a5cd0", "network": "#e08a00"}
_INK, _FAINT, _OFF = "#1c2024", "#8b8d98", "#f0f0f3"


def check_name(path: Path) -> Path:
    """The path again. Raises BadRequest for an ending that is no picture's."""
    if path.suffix.lower() not in FORMATS:
        raise BadRequest(f"picture {str(path)!r}: expected a name that ends in {', '.join(FORMATS)}")
    return path


def draw(plan: Plan, path: Path) -> None:
    """Write the picture. Raises HostError where the file cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise BadRequest(INSTALL) from error
    height = 1.7 + 0.34 * len(plan.hosts)
    figure: Any = Figure(figsize=(11, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, plan.hosts, after=False)
    _panel(right, plan.hosts, after=True)
    left.set_title(f"Today: {plan.savings.before.hosts_on} hosts, {plan.savings.before.total_w:,.0f} W", loc="left")
    right.set_title(f"Plan: {plan.savings.after.hosts_on} hosts, {plan.savings.after.total_w:,.0f} W", loc="left")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(_headline(plan), x=0.01, ha="left", fontsize=11, color=_INK, weight="bold")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise HostError(f"picture {str(path)!r}: {error.strerror or error}") from error


def _headline(plan: Plan) -> str:
    saved, given = plan.savings, plan.estate.assumptions
    fewer = saved.before.hosts_on - saved.after.hosts_on
    return (
        f"{fewer} hosts fewer · {len(plan.steps)} moves, {plan.sent_bytes / (1 << 30):,.0f} GiB · "
        f"{saved.total_kwh:,.0f} kWh and {saved.money:,.0f} {given.currency} a year "
        f"(PUE {given.pue:g}, {given.price_per_kwh:g} {given.currency}/kWh)"
    )


def _panel(axes: Any, hosts: list[HostLoad], *, after: bool) -> None:
    resources = sorted({name for host in hosts for name in host.before}, key=list(_COLOURS).index)
    thickness = 0.8 / max(1, len(resources))
    for index, resource in enumerate(resources):
        offsets = [row - 0.4 + (index + 0.5) * thickness for row in range(len(hosts))]
        # A host that is too full today reaches the edge and no further.
        shares = [min(120.0, 100 * (host.after if after else host.before).get(resource, 0)) for host in hosts]
        axes.barh(offsets, shares, height=thickness * 0.92, color=_COLOURS[resource], label=resource)
    for row, host in enumerate(hosts):
        on, count = (host.on_after, host.guests_after) if after else (host.on_before, host.guests_before)
        if not on:
            axes.axhspan(row - 0.46, row + 0.46, color=_OFF, zorder=0)
        text = f"{count} guest{'' if count == 1 else 's'}" if on else "off"
        axes.text(119, row, text, ha="right", va="center", fontsize=8, color=_INK if on else _FAINT)
    axes.axvline(100, color=_FAINT, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 120)
    axes.set_xticks(range(0, 101, 25))
    axes.set_yticks(range(len(hosts)), [host.name for host in hosts], fontsize=9)
    axes.set_ylim(len(hosts) - 0.4, -0.6)
    axes.set_xlabel("% of what is usable below the headroom", fontsize=9, color=_FAINT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
