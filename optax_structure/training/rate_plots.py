"""The rates that every label has had over a run, or would have over a dry run without a model; and their picture.

A record is made of ``oxs.rates`` and ``oxs.rates_by_label``; a trace is many records as arrays. ``plot_rates`` needs
matplotlib, everything else does not.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import Params, PyTree, is_function
from optax_structure.labels import LabelFn, Labels
from optax_structure.transforms._extra import takes_extra_args
from optax_structure.transforms.describing import Spread, rates, rates_by_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Schedule = Callable[[Any], Any]

INK, GREY = "#22303c", "#a9b4bd"
# Okabe & Ito's palette, which colour-blind readers can tell apart; the usual labels look alike in all pictures.
COLORS = {
    "scaffold": "#0072b2",
    "patch": "#e69f00",
    "new": "#009e73",
    "pretrained": "#56b4e9",
    "adapter": "#cc79a7",
    "neck": "#d55e00",
}
OTHER_COLORS = ("#000000", "#7f7f7f", "#d55e00", "#cc79a7", "#56b4e9", "#e69f00", "#009e73", "#0072b2")
LOG_FROM = 30.0


class RateRecord(NamedTuple):
    """The rates in force at one step: label -> ``Spread`` over its parameters."""

    step: int
    spreads: Mapping[str, Spread]


class RateTrace(NamedTuple):
    """Rates over steps: arrays of one length, NaN where a label had no parameters.

    Attributes:
      steps: int (n,), increasing.
      mean: label -> float32 (n,), over the label's parameters; ``low`` and ``high`` likewise.
    """

    steps: np.ndarray
    mean: dict[str, np.ndarray]
    low: dict[str, np.ndarray]
    high: dict[str, np.ndarray]

    @staticmethod
    def of(records: Iterable[RateRecord]) -> RateTrace:
        """The trace of records in the order of their steps; a label may come and go with growth.

        Raises:
          ValueError: when there is no record.
        """
        ordered = sorted(jax.device_get(list(records)), key=lambda record: record.step)
        if not ordered:
            raise ValueError("records is empty: append rate_record(...) to a list as training goes on.")
        labels = dict.fromkeys(label for record in ordered for label in record.spreads)
        nothing = (np.nan, np.nan, np.nan)
        found = {label: np.array([record.spreads.get(label, nothing) for record in ordered]).T for label in labels}
        return _trace(np.array([int(record.step) for record in ordered]), found)


def _trace(steps: np.ndarray, spreads: Mapping[str, Any]) -> RateTrace:
    """The trace of label -> mean, low and high over steps."""
    parts: list[dict[str, np.ndarray]] = [{}, {}, {}]
    for label, (mean, low, high) in spreads.items():
        known = np.isfinite(low)  # rates_by_label says infinity for a label whose connections are all absent
        for part, values in zip(parts, (mean, low, high), strict=True):
            part[label] = np.where(known, values, np.nan).astype(np.float32)
    return RateTrace(steps, *parts)


def rate_record(
    step: int,
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: Params,
    labels: Labels | LabelFn,
    *,
    grads: optax.Updates | None = None,
    **extra_args: Any,
) -> RateRecord:
    """What ``RateTrace.of`` takes: the rates of every label at the next update of a run.

    It is compiled once for a ``tx`` and labels; its numbers stay on the device until the trace is made, so that a
    record does not wait for the step before it. After a growth event pass the new ``tx`` and labels.

    Args:
      step: number of finished updates.
      tx: the transformation. One that hides a multiplier in a branch (``optax.MultiSteps``,
        ``optax.apply_if_finite``) cannot be compiled: pass what it wraps, with its state.
      state: its state.
      params: the parameters.
      labels: tree of labels, or a function of params.
      grads: the gradients, for multipliers that read them.
      **extra_args: what ``tx.update`` needs: ``value=``, ``masks=``, ``extrema=``, ``event=``.

    Returns:
      ``RateRecord``.

    Raises:
      ValueError: for a ``tx`` that hides a multiplier in a branch.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> from optax_structure.training import RateTrace, rate_record
      >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx, records = oxs.scale_by_age(lambda age: 1 / (1.0 + age)), []
      >>> state = tx.init({"body": params["body"]})
      >>> records.append(rate_record(0, tx, state, {"body": params["body"]}, {"body": "scaffold"}))
      >>> state = tx.init(params)
      >>> records.append(rate_record(10, tx, state, params, {"body": "scaffold", "head": "new"}))
      >>> RateTrace.of(records).mean["new"].tolist()
      [nan, 1.0]
    """
    flat: Any = (labels,) if is_function(labels) else jax.tree.flatten(labels)
    key: tuple[Hashable, ...] = flat if is_function(labels) else (tuple(flat[0]), flat[1])
    with _named_branches():
        return RateRecord(step, _compiled(tx, key)(state, params, grads, extra_args))


@contextlib.contextmanager
def _named_branches() -> Iterator[None]:
    """Say of a multiplier that ran inside a compiled ``lax.cond``, whose rate cannot leave it, how to do without."""
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            "tx hides a multiplier in a branch, as optax.MultiSteps and optax.apply_if_finite do, and its rates cannot "
            "be compiled: pass the transformation that it wraps, and state.inner_opt_state (MultiSteps) or "
            "state.inner_state (apply_if_finite); or call oxs.rates without jit."
        ) from error


@functools.lru_cache(maxsize=8)
def _compiled(tx: optax.GradientTransformation, key: tuple[Any, ...]) -> Callable[..., dict[str, Spread]]:
    """The jitted rates of a transformation by label; ``key`` holds a label function, or leaves and their treedef."""
    labels = key[0] if len(key) == 1 else jax.tree.unflatten(key[1], key[0])

    def spreads(state: optax.OptState, params: Params, grads: Any, extra_args: dict[str, Any]) -> dict[str, Spread]:
        return rates_by_label(rates(tx, state, params, grads=grads, **extra_args), labels, params)

    return jax.jit(spreads)


def trace_rates(
    tx: optax.GradientTransformation,
    params: Params,
    labels: Labels | LabelFn,
    steps: int,
    *,
    extra: Mapping[str, Any] | Callable[[jax.Array], Mapping[str, Any]] | None = None,
    grads: Callable[[jax.Array], optax.Updates] | None = None,
    every: int = 1,
    state: optax.OptState | None = None,
) -> RateTrace:
    """A dry run without a model: the rates that ``tx`` would have over so many steps.

    The parameters stand still and the gradients are noise, so this shows what depends on time, labels, events and the
    extra arguments. What depends on weights and gradients is shown as it is at these: log a real run with
    ``rate_record`` for that. One compiled ``lax.scan``.

    Args:
      tx: the transformation; of ``optax.MultiSteps`` or ``optax.apply_if_finite`` what it wraps, as in
        ``rate_record``.
      params: parameters.
      labels: tree of labels, a prefix of it, or a function of params.
      steps: how many updates, >= 1.
      extra: extra arguments of every update, or a function ``step (traced int32, from 0) -> extra arguments``:
        ``lambda step: {"event": step == 500}``.
      grads: ``step -> gradients``; None: standard normal noise from a fixed seed.
      every: record at steps 0, ``every``, 2 ``every`` ..., >= 1.
      state: the state to go on from; None: ``tx.init(params)``.

    Returns:
      ``RateTrace``; a step's rates are those of the update that follows it.

    Raises:
      ValueError: for ``steps`` or ``every`` below 1, or a ``tx`` that hides a multiplier in a branch.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> from optax_structure.training import trace_rates
      >>> params, labels = {"body": jnp.ones(2), "head": jnp.ones(2)}, {"body": "scaffold", "head": "new"}
      >>> warmup = optax.linear_schedule(0.0, 1.0, 4)
      >>> trace = trace_rates(oxs.scale_by_label({"scaffold": 0.5, "new": warmup}, labels), params, labels, 7, every=2)
      >>> trace.steps.tolist(), trace.mean["new"].tolist(), trace.mean["scaffold"].tolist()
      ([0, 2, 4, 6], [0.0, 0.5, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5])
    """
    for name, number in (("steps", steps), ("every", every)):
        if number < 1:
            raise ValueError(f"{name}={number!r} must be an int >= 1.")
    given = extra if callable(extra) else lambda step: extra or {}
    gradient = grads or functools.partial(_noise, params)
    made = takes_extra_args(tx)

    def run(params: Params, state: optax.OptState) -> dict[str, Spread]:
        def update(state: optax.OptState, step: jax.Array) -> tuple[optax.OptState, None]:
            return made.update(gradient(step), state, params, **given(step))[1], None

        def record(state: optax.OptState, step: jax.Array) -> tuple[optax.OptState, dict[str, Spread]]:
            now = rates(made, state, params, grads=gradient(step), **given(step))
            after, _ = jax.lax.scan(update, state, step + jnp.arange(every))
            return after, rates_by_label(now, labels, params)

        return jax.lax.scan(record, state, jnp.arange(0, steps, every))[1]

    with _named_branches():
        spreads = jax.device_get(jax.jit(run)(params, made.init(params) if state is None else state))
    return _trace(np.arange(0, steps, every), spreads)


def _noise(params: Params, step: jax.Array) -> PyTree:
    key = jax.random.fold_in(jax.random.key(0), step)
    return optax.tree.random_like(key, params, sampler=jax.random.normal)


def plot_rates(
    trace: RateTrace,
    path: str | os.PathLike[str] | None = None,
    *,
    ax: Axes | None = None,
    base: float | Schedule | None = None,
    events: Sequence[tuple[float, str]] = (),
    title: str | None = None,
) -> Axes:
    """Draw a trace: a line a label, and a band from the lowest to the highest rate where its parameters differ.

    The axis is logarithmic where rates span more than a factor of 30; with rates of 0 among them it is so down to the
    smallest other one and linear below. Labels stand beside their lines.

    Args:
      trace: what ``trace_rates`` or ``RateTrace.of`` returned.
      path: a picture to write, whole or not at all; its ending says the format (``.png`` has 300 dpi).
      ax: axes to draw on; None: a figure of a single paper column (5 x 3 inches).
      base: the learning rate, or its schedule, by which the multipliers are multiplied; None: multipliers.
      events: (step, name), each a thin vertical line with its name above.
      title: of the axes.

    Returns:
      The axes; ``.figure`` is the figure.

    Raises:
      ImportError: when matplotlib is not installed.

    Example:
      >>> import tempfile, jax.numpy as jnp, optax_structure as oxs
      >>> from optax_structure.training import plot_rates, trace_rates
      >>> params = {"body": jnp.ones(2)}
      >>> trace = trace_rates(oxs.scale_by_age(oxs.soft_clamp(10)), params, {"body": "scaffold"}, 20)
      >>> path = tempfile.mkdtemp() + "/rates.png"
      >>> plot_rates(trace, path, base=1e-3, events=[(5, "grown")]).get_ylabel()
      'learning rate'
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_rates needs matplotlib: pip install matplotlib") from error
    ax = Figure(figsize=(5, 3), dpi=300, layout="constrained").subplots() if ax is None else ax
    factor = 1.0 if base is None else np.asarray([base(s) for s in trace.steps] if callable(base) else base)
    means, lows, highs = ({k: v * factor for k, v in part.items()} for part in (trace.mean, trace.low, trace.high))
    _set_scale(ax, np.concatenate([*lows.values(), *highs.values()]))
    others = itertools.cycle(OTHER_COLORS)
    colors = {label: COLORS.get(label) or next(others) for label in means}
    for label, mean in means.items():
        low, high, color = lows[label], highs[label], colors[label]
        if np.any(high - low > 1e-6 * np.abs(high)):
            ax.fill_between(trace.steps, low, high, color=color, alpha=0.18, lw=0, zorder=1)
        alone = np.isfinite(mean).sum() == 1
        ax.plot(trace.steps, mean, color=color, lw=1.6, marker="o" if alone else None, ms=3, zorder=3)
    span = max(float(trace.steps[-1] - trace.steps[0]), 1.0)
    ax.set_xlim(float(trace.steps[0]), float(trace.steps[0]) + span)
    ax.set_xlabel("training step", color=INK, fontsize=9)
    ax.set_ylabel("multiplier of the base rate" if base is None else "learning rate", color=INK, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    rows = _name_events(ax, events)
    if title:
        ax.set_title(title, loc="left", color=INK, fontsize=10, pad=6 + 9 * rows)
    _name_lines(ax, trace.steps, means, colors)
    if path is not None:
        path = Path(path)
        partial = path.with_name(f".{path.name}.part")
        ax.get_figure(root=True).savefig(partial, format=path.suffix[1:] or "png")  # pyright: ignore
        os.replace(partial, path)
    return ax


def _set_scale(ax: Axes, values: np.ndarray) -> None:
    """Logarithmic where the values ask for it, with air above and below."""
    values = values[np.isfinite(values)]
    positive = values[values > 0]
    low, high = (float(positive.min()), float(positive.max())) if positive.size else (1.0, 1.0)
    if high > LOG_FROM * low:
        if (values <= 0).any():
            ax.set_yscale("symlog", linthresh=low, linscale=0.5)
            ax.set_ylim(-0.15 * low, 1.5 * high)
            ax.set_yticks([0, *10.0 ** np.arange(np.ceil(np.log10(low) - 1e-6), np.log10(1.5 * high))])
            ax.minorticks_off()
        else:
            ax.set_yscale("log", subs=[])
            ax.set_ylim(low / 1.5, 1.5 * high)
            decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high) + 1)
            shown = [tick for tick in np.outer(decades, (1, 3)).ravel() if low / 1.5 <= tick <= 1.5 * high]
            ax.set_yticks(shown if len(shown) < 9 else decades[(decades >= low / 1.5) & (decades <= 1.5 * high)])
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    elif ax.get_yscale() == "linear":  # axes that share theirs with a logarithmic one keep it
        ax.set_ylim(0, 1.08 * high)


def _name_events(ax: Axes, events: Sequence[tuple[float, str]]) -> int:
    """Lines with their names above the axes, in as many rows as they need so as not to overlap; how many these are."""
    (left, right), size = ax.get_xlim(), 7
    width = ax.get_window_extent().width * 72 / ax.get_figure(root=True).dpi  # pyright: ignore
    ends: list[float] = []  # where each row is free again, in points
    for step, name in sorted(events):
        at = (step - left) / (right - left) * width
        row = next((row for row, end in enumerate(ends) if end <= at), len(ends))
        ends[row : row + 1] = [at + 0.62 * size * (len(name) + 1)]
        ax.axvline(step, color=GREY, lw=0.7, zorder=0)
        ax.annotate(
            name, (step, 1), (0, 3 + 9 * row), xycoords=("data", "axes fraction"), textcoords="offset points",
            fontsize=size, color=INK, ha="left", va="bottom",
        )  # fmt: skip
    return len(ends)


def _name_lines(ax: Axes, steps: np.ndarray, means: Mapping[str, np.ndarray], colors: Mapping[str, str]) -> None:
    """Each label beside the end of its line: those that reach the end moved apart, where they would overlap."""
    size = 8
    height = ax.get_window_extent().height * 72 / ax.get_figure(root=True).dpi  # pyright: ignore
    gap = 1.25 * size / height
    at_end: list[tuple[float, str]] = []
    for label, mean in means.items():
        known = np.flatnonzero(np.isfinite(mean))
        if not known.size:
            continue
        if known[-1] == len(steps) - 1:
            _, y = ax.transAxes.inverted().transform(ax.transData.transform((steps[-1], mean[-1])))
            at_end.append((float(y), label))
        else:
            ax.annotate(
                label, (steps[known[-1]], mean[known[-1]]), (3, 0), textcoords="offset points", va="center",
                fontsize=size, color=colors[label], bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.5},
            )  # fmt: skip
    places: list[float] = []
    for y, _ in sorted(at_end):
        places.append(max(y, places[-1] + gap) if places else y)
    too_high = max(0.0, places[-1] - 1.0) if places else 0.0
    for place, (y, label) in zip(places, sorted(at_end), strict=True):
        # Tied to the line and not to a place, so that it follows when the caller sets other limits.
        ax.annotate(
            label, (1, means[label][-1]), (4, (place - too_high - y) * height), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", fontsize=size, color=colors[label], annotation_clip=False,
        )  # fmt: skip
