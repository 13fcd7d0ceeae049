"""The two pictures of a run: ``curves.png`` and ``structure.png``. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from optax_structure._tree import leaves_by_path
from optax_structure.state.cohorts import Cohorts
from optax_structure.structure import COMPONENTS, Units
from optax_structure.training.loop import Result, Run

matplotlib.use("Agg", force=False)

INK, GREY, BLUE, ORANGE, GREEN, RED = "#22303c", "#a9b4bd", "#2f6db3", "#e8710a", "#3d9a50", "#c8312b"
MARKS = {"connections": "o", "patches": "s", "widen": "D", "insert": "^"}
KINDS = {"there from the start": GREY, "rewired": GREEN, "grown": BLUE, "patch": ORANGE}


def curves(result: Result, path: Path) -> None:
    """Accuracy and non-zero weights against steps, with the growth events marked.

    Args:
      result: a finished run.
      path: the ``.png`` to write.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from optax_structure.training import Config, load_data, run_growth
      >>> from optax_structure.training.plots import curves
      >>> path = Path(tempfile.mkdtemp()) / "curves.png"
      >>> config = Config(widths=(8,), epochs=1, events=0, density=0.3, final_density=0.3, prune=0.0)
      >>> curves(run_growth(config, load_data("digits")), path)
      >>> path.stat().st_size > 10_000
      True
    """
    run = result.run
    figure = Figure(figsize=(9, 5.4), dpi=130, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = np.arange(1, len(run.history.loss) + 1)
    window = max(1, len(steps) // 100)
    smooth = np.convolve(run.history.accuracy, np.ones(window) / window, "valid")
    top.plot(steps[window - 1 :], smooth, color=GREY, lw=1.2, label="training batches")
    validations = np.array(run.host.validations).reshape(-1, 2)
    top.plot(*validations.T, color=BLUE, lw=1.8, label="validation")
    top.axhline(result.final["test_accuracy"], color=ORANGE, lw=1, ls="--")
    top.annotate(
        f"test {result.final['test_accuracy']:.2%}", (steps[-1], result.final["test_accuracy"]), (-4, 4),
        textcoords="offset points", color=ORANGE, ha="right", weight="bold",
    )  # fmt: skip
    seen = np.concatenate([smooth[len(smooth) // 20 :], validations[len(validations) // 20 :, 1]])
    low = max(0.0, float(seen.min()))
    top.set_ylim(low - 0.05 * (1 - low), 1 + 0.03 * (1 - low))
    top.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if 1 - low > 0.1 else f"{value:.1%}")
    top.set_ylabel("accuracy")
    bottom.step(steps, run.history.nonzero, where="post", color=INK, lw=1.8)
    bottom.set_ylim(0, 1.25 * run.history.nonzero.max())
    bottom.set_ylabel("non-zero weights")
    bottom.set_xlabel("training step")
    bottom.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if not run.config.events:
        dense = sum(mask.size for mask in jax.tree.leaves(result.masks) if np.ndim(mask))
        shares = bottom.secondary_yaxis("right", functions=(lambda number: number / dense, lambda share: share * dense))
        shares.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        shares.set_ylabel("density")
    for event in result.events:
        for axes in (top, bottom):
            axes.axvline(event["step"], color=ORANGE, lw=0.8, alpha=0.5, zorder=0)
        bottom.plot(event["step"], event["nonzero_after"], MARKS[event["action"]], color=ORANGE, ms=6)
        bottom.annotate(
            f"+{event['nonzero_after'] - event['nonzero_before']:,}", (event["step"], event["nonzero_after"]), (-6, 6),
            textcoords="offset points", color=ORANGE, fontsize=8, ha="right",
        )  # fmt: skip
    low_end = run.history.nonzero[-1] < 0.2 * run.history.nonzero.max()
    bottom.annotate(
        f"{result.final['nonzero']:,} weights: {result.final['density']:.1%} of the dense network",
        (steps[-1], run.history.nonzero[-1]), (-4, 6 if low_end else -14), textcoords="offset points", ha="right",
        color=INK,
    )  # fmt: skip
    until = run.config.rewire_until * run.total_steps
    if run.config.prune and run.config.rewire != "none":
        top.axvspan(1, until, color=GREEN, alpha=0.06, lw=0)
        bottom.axvspan(1, until, color=GREEN, alpha=0.06, lw=0)
        bottom.text(
            until, 0.04 * bottom.get_ylim()[1], "weakest rewired until here ", color=GREEN, ha="right", fontsize=8
        )
    shown = dict.fromkeys(event["action"] for event in result.events)
    handles = [Line2D([], [], color=ORANGE, marker=MARKS[action], ls="", label=f"growth: {action}") for action in shown]
    top.legend(handles=[*top.get_legend_handles_labels()[0], *handles], loc="lower right", frameon=False, ncols=2)
    top.set_title(_title(result), loc="left", color=INK)
    _plain(top, bottom)
    figure.savefig(path)


def structure(result: Result, path: Path) -> None:
    """The masks before the first event and at the end, patches visible, and each unit's activity beside them.

    A row a moment. First, where the inputs are images, how many connections read each pixel; then a panel a kernel,
    with a dot for every connection (inputs downwards, units across) and above it the share of samples on which each
    unit is active. Units that are dead are marked.

    Args:
      result: a finished run.
      path: the ``.png`` to write.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from optax_structure.training import Config, load_data, run_growth
      >>> from optax_structure.training.plots import structure
      >>> path = Path(tempfile.mkdtemp()) / "structure.png"
      >>> config = Config(widths=(8,), epochs=1, events=0, density=0.3, final_density=0.3, prune=0.0)
      >>> structure(run_growth(config, load_data("digits")), path)
      >>> path.stat().st_size > 10_000
      True
    """
    run = result.run
    kinds = connection_kinds(run)
    weight = max(float(run.carry.stats.weight), 1e-6)
    after = {layer: np.asarray(share) / weight for layer, share in run.carry.stats.active.items()}
    before_masks = leaves_by_path(run.before.masks)
    before = {path: np.where(mask, 0, -1) for path, mask in before_masks.items() if np.ndim(mask)}
    first = "before growth" if run.config.events else "at the start"
    moments = (
        (first, run.before.units, before, {k: np.asarray(v) for k, v in run.before.active.items()}),
        ("at the end", result.units, kinds, after),
    )
    layers = max(len(run.before.units.layers), len(result.units.layers))
    images = bool(run.data.image_shape)
    ratios = [1.0] * images + [1.5] + [1.0] * (layers - 1)
    figure = Figure(figsize=(2.7 * sum(ratios) + 0.6, 9.6), dpi=130, layout="constrained")
    figure.suptitle(_title(result), x=0.01, ha="left", color=INK)
    figure.get_layout_engine().set(w_pad=0.08)  # type: ignore[union-attr]
    rows: Any = figure.subfigures(2, 1, hspace=0.04)
    reads = [codes[f"{units.layers[0]}/kernel"] >= 0 for _, units, codes, _ in moments]
    most = max(int(read.sum(1).max()) for read in reads)
    for row, read, (name, units, codes, active) in zip(rows, reads, moments, strict=True):
        count = sum(int((code >= 0).sum()) for code in codes.values())
        row.suptitle(f"{name}: {count:,} connections", x=0.01, ha="left", fontsize=11, weight="bold", color=INK)
        grid = row.add_gridspec(2, len(ratios), height_ratios=(1, 5), width_ratios=ratios)
        if images:
            axes = row.add_subplot(grid[1, 0])
            picture = axes.imshow(read.sum(1).reshape(run.data.image_shape), cmap="magma", vmin=0, vmax=most)
            axes.set_title("connections that read each pixel", fontsize=8, color=INK)
            axes.set(xticks=[], yticks=[])
            row.colorbar(picture, ax=axes, location="bottom", shrink=0.8, aspect=30).ax.tick_params(labelsize=7)
        for column, layer in enumerate(units.layers, start=int(images)):
            _kernel(row.add_subplot(grid[1, column]), units, column - images, codes[f"{layer}/kernel"])
            if layer in active:
                _activity(row.add_subplot(grid[0, column]), active[layer])
    handles = [Line2D([], [], color=color, marker="s", ls="", label=kind) for kind, color in KINDS.items()]
    handles.append(Line2D([], [], color=RED, marker="x", ls="", label="dead unit"))
    figure.legend(handles=handles, loc="upper right", ncols=len(handles), frameon=False, fontsize=9)
    figure.savefig(path)


def connection_kinds(run: Run) -> dict[str, np.ndarray]:
    """Kernel path -> int array: -1 no connection, else the index in ``KINDS`` of how it came to be.

    Read from the optimizer: cohort 0 was there from the start, later cohorts say what they were born as.

    Example:
      >>> from optax_structure.training import Config, load_data, run_growth
      >>> from optax_structure.training.plots import connection_kinds
      >>> config = Config(widths=(8,), epochs=1, events=0, density=0.3, final_density=0.3, prune=0.0)
      >>> kinds = connection_kinds(run_growth(config, load_data("digits")).run)
      >>> sorted({int(kind) for kernel in kinds.values() for kind in kernel.ravel()})
      [-1, 0]
    """
    is_cohorts = lambda node: isinstance(node, Cohorts)  # noqa: E731
    cohorts = next(leaf for leaf in jax.tree.leaves(run.carry.opt_state, is_leaf=is_cohorts) if is_cohorts(leaf))
    birth, component = np.asarray(cohorts.birth), np.asarray(cohorts.component)
    kind = np.where(birth == 0, 0, 1)
    kind[np.isin(component, [COMPONENTS.index("new")])] = 2
    kind[component == COMPONENTS.index("patch")] = 3
    masks, ids = leaves_by_path(run.masks), leaves_by_path(cohorts.cohort)
    return {path: np.where(mask, kind[np.asarray(ids[path])], -1) for path, mask in masks.items() if np.ndim(mask)}


def _kernel(axes: Axes, units: Units, number: int, codes: np.ndarray) -> None:
    """One kernel as dots, those of patches above the others; a dot fills its cell where cells are large."""
    inputs, outputs = codes.shape
    longest = max(inputs, outputs)
    size = np.clip(min(150 / np.sqrt(inputs * outputs), 375 / longest), 1.1, 6.0)
    for kind, (name, color) in enumerate(KINDS.items()):
        rows, columns = np.nonzero(codes == kind)
        grown = 1.5 if name in ("grown", "patch") and size < 3 else 1.0
        axes.plot(columns, rows, "s", ms=grown * size, mew=0, color=color, zorder=2 + kind)
    axes.set_xlim(-0.5, outputs - 0.5)
    axes.set_ylim(inputs - 0.5, -0.5)
    axes.set_ylabel(f"{units.groups[number].layer} ({inputs})", fontsize=8)
    axes.set_xlabel(
        f"{units.groups[number + 1].layer} ({outputs})  {int((codes >= 0).sum()):,} connections", fontsize=8
    )
    axes.tick_params(labelsize=7)


def _activity(axes: Axes, active: np.ndarray) -> None:
    places = np.arange(len(active))
    axes.bar(places, active, width=1.0, color=BLUE)
    dead = active < 0.01
    axes.plot(places[dead], np.full(dead.sum(), 0.06), "x", color=RED, ms=4, mew=1.2)
    axes.set_xlim(-0.5, len(active) - 0.5)
    axes.set_ylim(0, 1)
    axes.set(xticks=[], yticks=[0, 1])
    axes.tick_params(labelsize=7)
    axes.set_title("share of samples on which each unit fires", fontsize=8, color=INK)
    _plain(axes)


def _title(result: Result) -> str:
    final, run = result.final, result.run
    sizes = " - ".join(str(group.size) for group in result.units.groups)
    return f"{run.data.name}: {sizes}, {final['nonzero']:,} weights, test accuracy {final['test_accuracy']:.2%}"


def _plain(*axes: Any) -> None:
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
