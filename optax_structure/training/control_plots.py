"""The picture of a run's control: loss, learning rate, momentum, rule weights, share frozen. Needs matplotlib."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_structure.training.logging import Record, RollingLog, read_csv, read_jsonl
from optax_structure.training.rate_plots import GREY, INK, LOG_FROM, OTHER_COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072b2", "#e69f00"
# A rule has one colour in all pictures, and those of both kinds that are alike have the same.
RULES = {
    "trend": "#0072b2",
    "variance": "#e69f00",
    "grad_norm": "#009e73",
    "cyclical": "#cc79a7",
    "hypergradient": "#d55e00",
    "relative": "#0072b2",
    "inverse": "#56b4e9",
    "normalized": "#cc79a7",
}
MOST_POINTS = 4000
"""Of a filled area; more are not to be seen, and more than matplotlib can fill."""

Lines = Mapping[str, tuple[np.ndarray, np.ndarray]]


def plot_control(
    log: RollingLog | Sequence[Record] | str | os.PathLike[str], path: str | os.PathLike[str] | None = None
) -> Figure:
    """Draw what the control of a run did: one panel below the other over the same steps.

    From above: the loss (``loss`` and ``loss_ema``), the learning rate (``lr``; ``lr_scale`` where it is not known),
    the momentum, the weights of the rules stacked (``w_lr/...``, ``w_momentum/...``), the share of frozen parameters.
    What was not logged has no panel. Several feedbacks (``head/lr``) are several lines, and have panels of weights of
    their own. Of a step that is there twice (a run was set back to a checkpoint) the later record counts.

    Args:
      log: a ``RollingLog``, its records, or a file: of ``csv_sink`` where it ends in ``.csv``, else of ``jsonl_sink``.
      path: a picture to write, whole or not at all; its ending says the format.

    Returns:
      The figure.

    Raises:
      ImportError: when matplotlib is not installed.
      ValueError: when nothing of this was logged.

    Example:
      >>> import tempfile
      >>> from optax_structure.training.control_plots import plot_control
      >>> from optax_structure.training.logging import RollingLog
      >>> log = RollingLog()
      >>> for step in range(9):
      ...     log.append(step, {"loss": 2.0 / (step + 1), "lr": 0.1, "w_lr/trend": 0.6, "w_lr/variance": 0.4})
      >>> figure = plot_control(log, tempfile.mkdtemp() + "/control.png")
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['loss', 'learning rate', 'weights of the\\nrate rules']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_control needs matplotlib: pip install matplotlib") from error
    series = _series(_records(log))
    panels = [(name, kind, lines) for name, kind, lines in _panels(series) if lines]
    if not panels:
        raise ValueError(f"log has nothing of the control to draw; it has {sorted(series)}: log snapshot(state).")
    heights = [1.6 if name == "loss" else 1.0 for name, _, _ in panels]
    figure = Figure(figsize=(7, 0.6 + 1.25 * sum(heights)), dpi=150, layout="constrained")
    column = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    draw = {"loss": _draw_loss, "log": _draw_rates, "line": _draw_lines, "stack": _draw_stack, "share": _draw_share}
    for axes, (name, kind, lines) in zip(column, panels, strict=True):
        draw[kind](axes, lines)
        axes.set_ylabel(name, color=INK, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels(column)
    steps = np.concatenate([steps for _, _, lines in panels for steps, _ in lines.values()])
    column[-1].set_xlim(steps.min(), max(steps.max(), steps.min() + 1))
    column[-1].set_xlabel("training step", color=INK, fontsize=8)
    if path is not None:
        path = Path(path)
        partial = path.with_name(f".{path.name}.part")
        figure.savefig(partial, format=path.suffix[1:] or "png")
        os.replace(partial, path)
    return figure


def _records(log: RollingLog | Sequence[Record] | str | os.PathLike[str]) -> Sequence[Record]:
    if isinstance(log, RollingLog):
        return log.records
    if isinstance(log, str | os.PathLike):
        return read_csv(log) if os.fspath(log).endswith(".csv") else read_jsonl(log)
    return log


def _series(records: Sequence[Record]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> its steps, increasing, and its values there: not all values need be logged at the same steps."""
    points: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step":
                points.setdefault(name, {})[record["step"]] = value if math.isfinite(value) else math.nan
    ordered = {name: sorted(at.items()) for name, at in points.items()}
    return {name: (np.array([s for s, _ in at]), np.array([v for _, v in at], float)) for name, at in ordered.items()}


def _panels(series: Lines) -> list[tuple[str, str, Lines]]:
    """Label, kind and lines of every panel, from above."""
    rates, rate_label = _lines(series, "lr"), "learning rate"
    if not rates:
        rates, rate_label = _lines(series, "lr_scale"), "learning rate\n/ base rate"
    panels: list[tuple[str, str, Lines]] = [
        ("loss", "loss", {name: series[name] for name in ("loss", "loss_ema") if name in series}),
        (rate_label, "log", rates),
        ("momentum", "line", _lines(series, "momentum")),
    ]
    for key, of in (("w_lr", "rate"), ("w_momentum", "momentum")):
        whose: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
        for name, line in series.items():
            group, found, rule = f"/{name}".rpartition(f"/{key}/")
            if found:
                whose.setdefault(group.strip("/"), {})[rule] = line
        panels += [
            (f"weights of the\n{of} rules" + (f"\n({group})" if group else ""), "stack", lines)
            for group, lines in whose.items()
        ]
    return [*panels, ("share frozen", "share", {name: series[name] for name in ("share_frozen",) if name in series})]


def _lines(series: Lines, key: str) -> Lines:
    """The values of a key by the feedback or leaf that they are of: ``key`` alone is of the whole network."""
    found = {}
    for name, line in series.items():
        parts = name.split("/")
        if key in parts and not {"w_lr", "w_momentum"} & set(parts):
            found["/".join(part for part in parts if part != key) or "all"] = line
    return found


def _draw_loss(axes: Axes, lines: Lines) -> None:
    for name, (steps, values) in lines.items():
        faint = name == "loss" and len(lines) > 1
        label = "running mean" if name == "loss_ema" else "each step"
        axes.plot(steps, values, color=GREY if faint else BLUE, lw=0.7 if faint else 1.2, label=label)
    _log_where_wide(axes, lines, LOG_FROM)
    _legend(axes, lines)


def _draw_rates(axes: Axes, lines: Lines) -> None:
    _draw_lines(axes, lines)
    _log_where_wide(axes, lines, 1.0)


def _draw_lines(axes: Axes, lines: Lines) -> None:
    colors = itertools.cycle((BLUE, ORANGE, *OTHER_COLORS))
    styles = itertools.cycle(("-", (0, (4, 3))))  # of lines that cover each other, both are to be seen
    for (name, (steps, values)), color, style in zip(lines.items(), colors, styles, strict=False):
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=color, ls=style, lw=1.4, marker=marker, ms=3, label=name)
    _legend(axes, lines)


def _draw_stack(axes: Axes, lines: Lines) -> None:
    steps = np.unique(np.concatenate([steps for steps, _ in lines.values()]))
    steps = steps[:: math.ceil(len(steps) / MOST_POINTS)]
    values = [np.nan_to_num(np.interp(steps, *line)) for line in lines.values()]
    others = itertools.cycle(OTHER_COLORS)
    colors = [RULES.get(rule) or next(others) for rule in lines]
    axes.stackplot(steps, values, colors=colors, labels=list(lines), alpha=0.8, lw=0)
    top = max(float(np.sum(values, axis=0).max()), 1e-6)
    axes.set_ylim(0, top)
    axes.set_yticks([0, top / 2, top])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    _legend(axes, lines, reverse=True)  # the last area is on top


def _draw_share(axes: Axes, lines: Lines) -> None:
    for steps, values in lines.values():
        thin = slice(None, None, math.ceil(len(steps) / MOST_POINTS))
        axes.fill_between(steps[thin], values[thin], step="post", color=BLUE, alpha=0.25, lw=0)
        axes.plot(steps, values, color=BLUE, lw=1.2, drawstyle="steps-post")
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def _log_where_wide(axes: Axes, lines: Lines, ratio: float) -> None:
    """A logarithmic axis where all values are above 0 and the highest is at least ``ratio`` times the lowest."""
    from matplotlib.ticker import MaxNLocator

    values = np.concatenate([values[np.isfinite(values)] for _, values in lines.values()])
    if not values.size or values.min() <= 0 or values.max() < ratio * values.min():
        return
    low, high = float(values.min()) / 1.2, float(values.max()) * 1.2
    axes.set_yscale("log", subs=[])
    axes.set_ylim(low, high)
    decades = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [tick for tick in np.outer(decades, (1, 2, 5)).ravel() if low <= tick <= high]
    if len(ticks) < 3:
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    elif len(ticks) > 5:
        ticks = [tick for tick in decades if low <= tick <= high]
        ticks = ticks[:: math.ceil(len(ticks) / 5)]
    axes.set_yticks(ticks)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")


def _legend(axes: Axes, lines: Mapping[str, Any], *, reverse: bool = False) -> None:
    if len(lines) > 1:  # beside the axes, where it covers nothing
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7, reverse=reverse)
