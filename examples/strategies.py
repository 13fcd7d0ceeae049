"""All learning-rate strategies and schedulers of the original system, drawn by what takes their place here: one sheet.

    python examples/strategies.py --out strategies.png

Every curve is read from the transformation itself (``oxs.rates``, ``training.trace_rates``), none from a formula of
this script; dashed grey is the original's own formula, where what it does differs.
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import optax_structure as oxs
from optax_structure._tree import leaves_by_path, map_with_path
from optax_structure.training import trace_rates

BLUE, ORANGE, GREEN, SKY, INK, GREY = "#0072b2", "#e69f00", "#009e73", "#56b4e9", "#22303c", "#8a949c"
COLORS = {"scaffold": BLUE, "patch": ORANGE, "new": GREEN, "pretrained": SKY, "adapter": "#cc79a7", "neck": "#d55e00"}
DEPTHS = np.arange(8)


def chain(layers):
    """Params of a chain of layers with one connection each."""
    return {f"layer_{depth}": {"kernel": jnp.ones((1, 1))} for depth in range(layers)}


def over(tx, params, steps, extra=None):
    """The rate of every leaf, by its path, over some updates."""
    trace = trace_rates(tx, params, map_with_path(lambda path, _: path, params), steps, extra=extra)
    return trace.steps, {path.removesuffix("/kernel"): rate for path, rate in trace.mean.items()}


def now(tx, params, **extra):
    """The rate of every leaf at the first update, in the order of the leaves."""
    return np.concatenate([np.ravel(rate) for rate in jax.tree.leaves(oxs.rates(tx, tx.init(params), params, **extra))])


# What each panel draws: x, y, color, a word for the legend. The original's own is dashed.


def line(ax, x, y, color=BLUE, name=None, **style):
    ax.plot(x, y, color=color, lw=1.3, label=name, **style)


def original(ax, x, y):
    ax.plot(x, y, color=GREY, lw=1.0, ls=(0, (3, 2)), zorder=1)


def events(ax, steps):
    for step in steps:
        ax.axvline(step, color=GREY, lw=0.6, zorder=0)


def extrema_phase(ax):
    units, hidden = 1000, jnp.arange(1000)

    def share(step):
        return 0.3 * jnp.exp(-step / 15) * (1 + 0.25 * jnp.sin(1.3 * step)) + 0.003

    def extra(step):
        return {"extrema": oxs.Extrema({"layer_0": hidden < share(step) * units}, {})}

    steps, rate = over(oxs.scale_by_extrema_phase(), chain(1), 80, extra)
    ax.plot(steps, share(steps), color=GREY, lw=0.8, label="share of extreme units")
    line(ax, steps, rate["layer_0"], name="multiplier", drawstyle="steps-post")
    ax.set(yscale="log", ylim=(2e-3, 2))


def growth_phase(ax):
    steps = np.arange(75)
    line(ax, steps, optax.piecewise_constant_schedule(1.0, {20: 0.1, 50: 0.1})(steps), drawstyle="steps-post")
    ax.set(yscale="log", ylim=(5e-3, 2))


def backoff(ax):
    steps = np.arange(300)
    line(ax, steps, optax.exponential_decay(1.0, 1, 0.95, end_value=1e-6)(steps))
    ax.set(yscale="log", ylim=(3e-7, 3))


def warm_up(ax):
    tx, old, both = oxs.scale_by_age(optax.linear_schedule(0.0, 1.0, 5)), chain(1), chain(2)
    before = over(tx, old, 10)[1]
    state = jax.lax.scan(lambda state, _: (tx.update(old, state)[1], None), tx.init(old), length=10)[0]
    state = oxs.transfer_state(tx, state, old, tx, both)  # layer_1 is born
    after = trace_rates(tx, both, {name: name for name in both}, 11, state=state).mean
    line(ax, np.arange(21), np.concatenate([before["layer_0"], after["layer_0"]]), name="there from the start")
    line(ax, np.arange(10, 21), after["layer_1"], GREEN, "born at 10")
    ax.set(ylim=(0, 1.4))


def cosine(ax):
    steps = np.arange(160)
    line(ax, steps, optax.cosine_decay_schedule(1.0, 100, alpha=1e-3)(steps), name="100 epochs")
    period = {"init_value": 1.0, "peak_value": 1.0, "warmup_steps": 0, "decay_steps": 40, "end_value": 1e-3}
    line(ax, steps, optax.sgdr_schedule([period] * 4)(steps), SKY, "restarts", zorder=1)
    original(ax, steps[100:], 1e-3 + (1 - 1e-3) * (1 + np.cos(np.pi * steps[100:] / 100)) / 2)
    ax.set(ylim=(0, 1.4))


def loss_phase(ax):
    improvement = jnp.linspace(-0.006, 0.015, 400)
    unknown = jnp.full(400, jnp.nan)
    signals = oxs.PhaseSignals(improvement, unknown, unknown, jnp.full(400, 9))
    phase = jax.vmap(oxs.loss_phase)(signals, jnp.zeros(400, jnp.int32))
    line(ax, improvement, jnp.array([1.0, 0.5, 0.1, 0.05])[phase])
    c = np.asarray(improvement)
    original(ax, c, np.where(c > 0.01, 1, np.where(c > 0.005, 0.5, np.where(abs(c) < 0.0025, 0.1, 0.05))))
    ax.set(yscale="log", ylim=(0.03, 2), xticks=[-0.005, 0, 0.005, 0.01, 0.015])
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")


def grown_by_label(ax):
    labels = {"layer_0": "scaffold", "layer_1": "new"}
    at = jnp.array([15, 30, 45])

    def extra(step):
        return {"event": jnp.any(step == at)}

    for recovery, style in ((None, "-"), (8, ":")):
        tx = oxs.scale_on_event({"scaffold": 0.5}, labels, recovery=recovery)
        steps, rate = over(tx, chain(2), 60, extra)
        name = "scaffold" if recovery is None else "with recovery=8"
        line(ax, steps, rate["layer_0"], BLUE, name, ls=style)
    line(ax, steps, rate["layer_1"], GREEN, "new")
    events(ax, at)
    ax.set(ylim=(0, 1.5))


def grown_by_distance(ax):
    params = chain(4)
    units = oxs.dense_chain(params, [*params])
    near = {name: jnp.asarray(d["kernel"]) for name, d in oxs.layer_distances(params, units, ["layer_3"]).items()}
    at = jnp.array([15, 30, 45])

    def extra(step):
        return {"event": jax.tree.map(lambda distance: jnp.where(jnp.any(step == at), distance, -1), near)}

    steps, rate = over(oxs.scale_on_event([0.9, 0.7, 0.5]), params, 60, extra)
    for layer, color, name in (("layer_3", GREEN, "grown"), ("layer_2", ORANGE, "adjacent"), ("layer_0", BLUE, "far")):
        line(ax, steps, rate[layer], color, name)
    events(ax, at)
    ax.set(ylim=(0, 1.5))


def by_depth(ax):
    early, late = (oxs.scale_by_depth(0.1, oxs.layer_depths, protect=protect) for protect in ("early", "late"))
    line(ax, DEPTHS, now(early, chain(8)), BLUE, 'protect="early"', marker="o", ms=2.5)
    line(ax, DEPTHS, now(late, chain(8)), ORANGE, 'protect="late"', marker="o", ms=2.5)
    original(ax, DEPTHS, 0.1 ** (DEPTHS / 8))
    ax.set(yscale="log", ylim=(0.07, 6), yticks=[0.1, 1])


def depth_and_age(ax):
    profile = oxs.scale_by_depth_profile(lambda x: 0.1 + 0.9 * x, oxs.layer_depths)
    tx = oxs.scale_by_product(profile, oxs.scale_by_connection_age(oxs.age_decay(math.exp(-1), 50)))
    steps, rate = over(tx, chain(3), 150)
    for layer, color, name in (("layer_2", BLUE, "last"), ("layer_1", SKY, "middle"), ("layer_0", INK, "first")):
        line(ax, steps, rate[layer], color, name)
    ax.set(ylim=(0, 1.15))


def bands(ax):
    tx = oxs.scale_by_depth_bands(2.0, 1.0, 0.5, oxs.layer_depths)
    line(ax, DEPTHS, now(tx, chain(8)), marker="o", ms=2.5)
    original(ax, DEPTHS, np.where(DEPTHS < 8 // 3, 2.0, np.where(DEPTHS > 16 // 3, 0.5, 1.0)))
    ax.set(ylim=(0, 2.4))


def by_events(ax):
    at = jnp.array([10, 20, 30])
    tx = oxs.scale_by_age(oxs.age_decay(0.1), unit="events")
    steps, rate = over(tx, chain(1), 40, lambda step: {"event": jnp.any(step == at)})
    line(ax, steps, rate["layer_0"], drawstyle="steps-post")
    original(ax, steps, 0.1 ** steps.astype(float))
    events(ax, at)
    ax.set(yscale="log", ylim=(3e-4, 3))


def sinking(ax):
    steps, rate = over(oxs.strata({"layer_0": "scaffold", "layer_1": "patch"}), chain(2), 140)
    line(ax, steps, rate["layer_0"], name="active, sediment, geological", drawstyle="steps-post")
    line(ax, steps, rate["layer_1"], ORANGE, "patch")
    ax.set(yscale="log", ylim=(5e-3, 8))


def freezing(ax):
    phases = [(0, 1.0), (10, (0.01, 0.01, 0.1)), (30, oxs.frozen_below(-1, 0.1))]
    steps, rate = over(oxs.progressive_freezing(phases, oxs.layer_depths), chain(4), 45)
    for layer, color, name in (("layer_3", BLUE, "last"), ("layer_2", SKY, "third"), ("layer_0", INK, "first, second")):
        line(ax, steps, rate[layer], color, name, drawstyle="steps-post", zorder=2 + (layer != "layer_3"))
    ax.set_yscale("symlog", linthresh=0.01, linscale=0.6)
    ax.set(ylim=(-1e-3, 3), yticks=[0, 0.01, 0.1, 1], yticklabels=["0", "0.01", "0.1", "1"])


def labels(**scales: float) -> Callable[[Axes], None]:
    def draw(ax):
        params = {name: jnp.ones(1) for name in scales}
        tree = {name: name for name in scales}
        found = dict(zip(sorted(scales), now(oxs.scale_by_label(scales, tree), params), strict=True))
        for place, name in enumerate(scales):
            ax.plot([place, place], [1e-3, found[name]], color=COLORS[name], lw=1.3)
            ax.plot(place, found[name], "o", color=COLORS[name], ms=4)
            ax.annotate(f"{found[name]:g}", (place, found[name]), (5, 0), textcoords="offset points", fontsize=6.5)
        ax.set(yscale="log", ylim=(4e-3, 3), xlim=(-0.5, len(scales) - 0.3), xticks=range(len(scales)))
        ax.set_xticklabels(scales)

    return draw


def trust_ratio(ax):
    ratios, weights = np.logspace(-2, 3, 60), {f"w{i:02}": jnp.array([3.0, 4.0]) for i in range(60)}
    grads = {name: w * ratio for (name, w), ratio in zip(weights.items(), ratios, strict=True)}
    for cap, color, name in ((None, SKY, "the strategy"), (1.0, BLUE, "max_ratio=1: LARSScheduler")):
        tx = oxs.scale_by_masked_trust_ratio(trust_coefficient=1.0, max_ratio=cap)
        line(ax, ratios, now(tx, weights, grads=grads), color, name)
    ax.set(xscale="log", yscale="log", ylim=(3e-4, 3e3))


def combination(ax):
    params = {"first": jnp.ones(1), "last": jnp.ones(1), "patch": jnp.ones(1), "new": jnp.ones(1)}
    tree = {"first": "scaffold", "last": "scaffold", "patch": "patch", "new": "new"}
    tx = oxs.presets.combined(1.0, tree, depths={"first": 0, "last": 1, "patch": 1, "new": 1})
    steps, rate = over(tx, params, 60)
    shown = (("new", GREEN, "new"), ("patch", ORANGE, "patch"), ("last", BLUE, "scaffold, last"))
    for name, color, word in (*shown, ("first", INK, "scaffold, first")):
        line(ax, steps, rate[name], color, word)
    ax.set(yscale="log", ylim=(6e-4, 60), yticks=[1e-3, 1e-2, 1e-1, 1])


def everything(ax):
    tree = {"layer_0": "scaffold", "layer_1": "scaffold", "layer_2": "patch", "layer_3": "new"}
    tx = oxs.presets.ultimate(1.0, tree, depths=oxs.layer_depths, trust=None, gradient=None)

    def extra(step):
        return {"value": 0.3 + 2.0 * jnp.exp(-step / 12), "event": step == 10}

    trace = trace_rates(tx, chain(4), tree, 60, extra=extra)
    for label in ("new", "patch", "scaffold"):
        ax.fill_between(trace.steps, trace.low[label], trace.high[label], color=COLORS[label], alpha=0.2, lw=0)
        line(ax, trace.steps, trace.mean[label], COLORS[label], label)
    events(ax, [10])
    ax.set(yscale="log", ylim=(6e-3, 6))


def by_birth(ax):
    for born, color in ((0, INK), (30, BLUE), (60, SKY)):
        age = jnp.arange(150 - born)
        table = oxs.CohortTable(age, jnp.full_like(age, born), jnp.zeros_like(age, jnp.uint8))
        line(ax, age + born, oxs.birth_rule().factors(table), color, f"born at {born}")
    ax.set(ylim=(0, 1.15))


def soft(ax):
    ages = jnp.arange(150)
    line(ax, ages, oxs.soft_clamp(100, 0.1)(ages))
    ax.set(ylim=(0, 1.15))


def ageing(ax):
    steps, rate = over(oxs.scale_by_connection_age(oxs.age_decay(0.1, 50, 50)), chain(1), 150)
    line(ax, steps, rate["layer_0"])
    ax.set(ylim=(0, 1.15))


def by_density(ax):
    densities = np.unique(np.logspace(-2.3, 0, 80).round(3))
    masks = {f"w{i:02}": jnp.arange(1000)[:, None] < 1000 * d for i, d in enumerate(densities)}
    tx = oxs.scale_by_density(lambda d: jnp.where(d < 0.02, 2.0, jnp.where(d > 0.1, 0.5, 1.0)))
    params = {name: jnp.ones((1000, 1)) for name in masks}
    rates = oxs.rates(tx, tx.init(params), params, masks=masks)
    line(ax, densities, [float(rate) for rate in rates.values()])
    ax.set(xscale="log", ylim=(0, 2.4), xticks=[0.01, 0.1, 1], xticklabels=["1 %", "10 %", "100 %"])


def connection(rule, weights, **extra):
    """What a rule of single connections says of weights (n, 1)."""
    tx = oxs.scale_by_connection(rule)
    return now(tx, {"kernel": jnp.asarray(weights, jnp.float32)[:, None]}, **extra)


SIZES = np.linspace(0.001, 0.8, 400)


def by_scale(ax):
    params = {name: {"kernel": jnp.asarray(SIZES, jnp.float32)[:, None]} for name in ("early", "middle", "late")}
    tx = oxs.scale_by_connection(oxs.scale_rule({"early": 0, "middle": 1, "late": 2}))
    rates = leaves_by_path(oxs.rates(tx, tx.init(params), params))
    for name, color, width in (("late", SKY, 1.3), ("middle", BLUE, 3.2), ("early", INK, 1.3)):
        ax.plot(
            SIZES, rates[f"{name}/kernel"][:, 0], color=color, lw=width, label=f"{name} third", solid_capstyle="butt"
        )
    ax.set(yscale="log", ylim=(0.04, 3000), yticks=[0.1, 1, 10])


def by_strength(ax):
    line(ax, SIZES, connection(oxs.strength_rule(), SIZES))
    ax.set(ylim=(0, 2.4))


def by_gradient(ax):
    sizes = np.logspace(-3.5, 1.5, 400)
    moments = {"kernel": jnp.asarray(sizes**2, jnp.float32)[:, None]}
    line(ax, sizes, connection(oxs.gradient_rule(), np.ones(400), second_moment=moments))
    ax.set(xscale="log", ylim=(0, 2.4), xticks=[1e-3, 1e-2, 1e-1, 1, 10])


def near_extrema(ax):
    far = np.linspace(0, 0.2, 200)
    params = {"kernel": jnp.ones((3, 200))}
    tx = oxs.scale_by_connection(oxs.extrema_rule(oxs.dense_chain({"head": params}, ["head"])))
    near = oxs.Extrema({"head": jnp.maximum(1 - far / 0.1, 0)}, {})
    rates = oxs.rates(tx, tx.init({"head": params}), {"head": params}, extrema=near)
    line(ax, far, rates["head"]["kernel"][0])
    ax.set(ylim=(0, 2.4))


class Panel(NamedTuple):
    name: str  # in the original
    call: str  # here
    x: str
    draw: Callable[[Axes], None]
    strategy: str = ""
    legend: str = "best"
    in_row: int = 1


# fmt: off
GROUPS = {
    "Over time: phases and growth events": (
        Panel("ExtremaPhaseScheduler", "scale_by_extrema_phase()", "epoch", extrema_phase, legend="upper right"),
        Panel("GrowthPhaseScheduler", "optax.piecewise_constant_schedule(\n  1.0, {20: 0.1, 50: 0.1})", "epoch",
              growth_phase),
        Panel("ExponentialBackoffScheduler", "optax.exponential_decay(\n  1.0, 1, 0.95, end_value=1e-6)", "epoch",
              backoff),
        Panel("CosineAnnealingScheduler", "optax.cosine_decay_schedule(\n  1.0, 100, alpha=1e-3)", "epoch", cosine,
              legend="upper right", in_row=2),
        Panel("AdaptivePhaseScheduler", "scale_by_loss_phase()", "improvement of the loss", loss_phase),
        Panel("WarmupScheduler", "scale_by_age(\n  optax.linear_schedule(0.0, 1.0, 5))", "epoch", warm_up, "7",
              "upper left", 2),
        Panel("growth-aware", 'scale_on_event({"scaffold": 0.5},\n  labels)', "epoch (lines: growth)", grown_by_label,
              "6", "upper right", 3),
        Panel("differential decay", "scale_on_event([0.9, 0.7, 0.5])", "epoch (lines: growth)", grown_by_distance, "10",
              "upper right", 3),
    ),
    "Per layer: depth, age, label, norm; and combinations": (
        Panel("CascadingDecayScheduler", "scale_by_depth(0.1, depths)", "depth", by_depth, "1", "upper right"),
        Panel("LayerwiseAdaptiveRates", "scale_by_depth_bands(\n  2.0, 1.0, 0.5, depths)", "depth", bands),
        Panel("LayerAgeAwareLR", "scale_by_depth_profile(...) x\n  scale_by_connection_age(...)", "age", depth_and_age,
              legend="upper right"),
        Panel("ProgressiveFreezingScheduler",
              "progressive_freezing([(0, 1.0), (10, ...),\n  (30, frozen_below(-1, 0.1))])", "epoch", freezing, "9",
              "upper right"),
        Panel("LayerAgeBasedScheduler", 'scale_by_age(age_decay(0.1),\n  unit="events")', "epoch (lines: growth)",
              by_events, "3"),
        Panel("SedimentaryLearningScheduler", "strata(labels)", "age", sinking, "12", "upper right"),
        Panel("LARSScheduler", "scale_by_masked_trust_ratio(\n  trust_coefficient=1.0)",
              "norm of gradient / of weights", trust_ratio, "8", "upper right"),
        Panel("dual rates", 'scale_by_label({"scaffold": 0.1,\n  "patch": 0.5}, labels)', "",
              labels(scaffold=0.1, patch=0.5), "2"),
        Panel("ComponentSpecificScheduler", "scale_by_label({...}, labels)", "",
              labels(scaffold=0.1, patch=0.5, neck=1.0, new=1.0), "4"),
        Panel("PretrainedNewLayerScheduler", "scale_by_label({...}, labels)", "",
              labels(pretrained=0.01, adapter=0.5, new=1.0), "5"),
        Panel("create_optimal_lr_schedule", "presets.combined(1e-3, labels,\n  depths=depths)", "epoch", combination,
              "", "upper right", 2),
        Panel("UnifiedAdaptiveLearning", "presets.ultimate(1e-3, labels,\n  depths=depths)", "epoch (line: growth)",
              everything, "", "upper right", 3),
    ),
    "Per connection": (
        Panel("MultiScaleLearning", "scale_by_connection(birth_rule())", "epoch", by_birth, legend="upper left"),
        Panel("SoftClampingScheduler", "scale_by_connection(\n  age_rule(soft_clamp(100, 0.1)))", "age", soft),
        Panel("AgeBasedScheduler", "scale_by_connection_age(\n  age_decay(0.1, 50, 50))", "age", ageing),
        Panel("SparsityAwareScheduler", "scale_by_density(fn)", "density", by_density, "11"),
        Panel("ScaleDependentRates", "scale_by_connection(scale_rule(depths))", "strength |w|", by_scale,
              legend="upper right"),
        Panel("ConnectionStrengthScheduler", "scale_by_connection(strength_rule())", "strength |w|", by_strength),
        Panel("GradientBasedScheduler", "scale_by_connection(gradient_rule())", "size of the gradient", by_gradient),
        Panel("ExtremaProximityScheduler", "scale_by_connection(extrema_rule(units))", "distance from an extreme unit",
              near_extrema),
    ),
}
# fmt: on


def sheet() -> Figure:
    """All panels on one page: placed by hand, in inches, so that they line up over all groups."""
    width, columns, left, gap, tall = 10.0, 4, 0.55, 0.45, 0.84
    above, below, header, top = 0.48, 0.35, 0.26, 0.6
    rows = sum(-(-len(panels) // columns) for panels in GROUPS.values())
    height = top + rows * (above + tall + below) + len(GROUPS) * header
    figure, wide = Figure(figsize=(width, height), dpi=220), (width - left - 0.12 - (columns - 1) * gap) / columns
    say = lambda x, y, text, **style: figure.text(x / width, 1 - y / height, text, va="baseline", **style)  # noqa: E731
    say(0.12, 0.28, "Learning rates as multipliers", fontsize=13, weight="bold", color=INK)
    note = "Titles: the original's names, with the number of the strategy; below: the call here. 1 epoch = 1 update."
    say(0.12, 0.47, note, fontsize=7.5, color=INK)
    say(width - 0.12, 0.47, "dashed: the original's formula, where it differs", fontsize=7.5, color=GREY, ha="right")
    y = top
    for group, panels in GROUPS.items():
        say(0.12, y + 0.16, group, fontsize=9.5, weight="bold", color=BLUE)
        y += header
        for number, panel in enumerate(panels):
            x = left + number % columns * (wide + gap)
            at = y + number // columns * (above + tall + below) + above
            ax = figure.add_axes((x / width, 1 - (at + tall) / height, wide / width, tall / height))
            say(x - 0.1, at - 0.33, panel.name, fontsize=7.5, weight="bold", color=INK)
            for row, text in enumerate(panel.call.split("\n")):
                say(x - 0.1, at - 0.21 + 0.1 * row, text, fontsize=6, family="monospace", color=INK)
            if panel.strategy:
                badge = {"boxstyle": "circle,pad=0.25", "fc": BLUE, "ec": "none"}
                say(
                    x - 0.24,
                    at - 0.325,
                    panel.strategy,
                    fontsize=6,
                    color="white",
                    ha="center",
                    weight="bold",
                    bbox=badge,
                )
            if number % columns == 0:
                ax.set_ylabel("multiplier", fontsize=6.5, labelpad=2, color=INK)
            panel.draw(ax)
            style(ax, panel)
        y += -(-len(panels) // columns) * (above + tall + below)
    return figure


def style(ax, panel):
    ax.set_xlabel(panel.x, fontsize=6.5, labelpad=1, color=INK)
    ax.tick_params(labelsize=6, length=2, pad=1.5, width=0.5)
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_linewidth(0.5)
    if ax.get_yscale() == "linear":
        ax.set_yticks([0, 0.5, 1] if ax.get_ylim()[1] < 2 else [0, 1, 2])
    if ax.get_legend_handles_labels()[0]:
        ax.legend(
            loc=panel.legend, ncols=panel.in_row, fontsize=5.8, facecolor="white", edgecolor="none", framealpha=0.9,
            handlelength=1.2, handletextpad=0.5, labelspacing=0.15, columnspacing=0.8, borderpad=0.1, borderaxespad=0.1,
        )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="strategies.png", help="the picture to write")
    out = parser.parse_args().out
    sheet().savefig(out)
    print(f"{sum(map(len, GROUPS.values()))} strategies and schedulers in {out}")
