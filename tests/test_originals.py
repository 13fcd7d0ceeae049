"""Every learning-rate strategy and scheduler of the original system: what it is here, by values worked by hand.

The original's documentation lists 12 strategies and 22 schedulers (its code has a 23rd, ``LayerAgeBasedScheduler``);
each has a row here under its own name. A row gives the call that takes its place, the values of it at three or more
points, edges included, what the original's formula (or the documented departure from it) gives there, and what differs.
All rates are multipliers on one base rate: absolute rates of the original are divided by the base that a row states.
An epoch of the original is ``EPOCH`` updates here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PyTree

import optax_structure as oxs

EPOCH = 4
ALL_STRATEGIES = (
    "cascading decay",
    "dual rates",
    "age-based",
    "component-specific",
    "pretrained + new + adapter",
    "growth-aware",
    "warm-up for new components",
    "LARS",
    "progressive freezing",
    "differential decay after events",
    "sparsity-aware",
    "sedimentary",
)
ALL_SCHEDULERS = (
    # phases
    "ExtremaPhaseScheduler",
    "GrowthPhaseScheduler",
    "ExponentialBackoffScheduler",
    "WarmupScheduler",
    "CosineAnnealingScheduler",
    "AdaptivePhaseScheduler",
    # layers
    "LayerAgeAwareLR",
    "CascadingDecayScheduler",
    "LayerwiseAdaptiveRates",
    "ProgressiveFreezingScheduler",
    "LayerAgeBasedScheduler",
    "ComponentSpecificScheduler",
    "PretrainedNewLayerScheduler",
    "LARSScheduler",
    "SedimentaryLearningScheduler",
    # connections
    "MultiScaleLearning",
    "SoftClampingScheduler",
    "SparsityAwareScheduler",
    "AgeBasedScheduler",
    "ScaleDependentRates",
    "ConnectionStrengthScheduler",
    "GradientBasedScheduler",
    "ExtremaProximityScheduler",
)


class Row(NamedTuple):
    """One original.

    Attributes:
      name: its name in the original; a second row of it has more behind a comma.
      values: what the new call gives, at the points that the row chose.
      expected: the same by hand.
      departure: how this differs from the original, and why; empty where it does not.
    """

    name: str
    values: Callable[[], Sequence[Any]]
    expected: Sequence[float]
    departure: str = ""


def leaves(*names: str) -> dict[str, jax.Array]:
    """Params with one number a leaf."""
    return {name: jnp.ones(1) for name in names}


def layers(count: int) -> dict[str, dict[str, jax.Array]]:
    """A chain of layers with one leaf each."""
    return {f"layer_{depth}": leaves("kernel") for depth in range(count)}


def once(tx: optax.GradientTransformation, params: PyTree, **extra: Any) -> list[float]:
    """The factor of each leaf at the first update."""
    updates, _ = optax.with_extra_args_support(tx).update(params, tx.init(params), params, **extra)
    return [float(update.ravel()[0]) for update in jax.tree.leaves(updates)]


def at(tx: optax.GradientTransformation, updates: Sequence[int], params: PyTree, **extra: Any) -> list[float]:
    """The factor of the first leaf at some of its updates, 0 being its first. ``extra`` has one entry an update."""

    def step(state: Any, extra: Any) -> Any:
        made, state = optax.with_extra_args_support(tx).update(params, state, params, **extra)
        return state, jax.tree.leaves(made)[0].ravel()[0]

    length = None if extra else max(updates) + 1
    _, seen = jax.jit(lambda extra: jax.lax.scan(step, tx.init(params), extra, length=length))(extra)
    return [float(seen[update]) for update in updates]


def of(schedule: Callable[[Any], Any], points: Sequence[int]) -> list[float]:
    """A schedule at some counts."""
    return [float(schedule(jnp.asarray(point, jnp.int32))) for point in points]


def by_label(**scales: Any) -> list[float]:
    """The factors of leaves named as their labels, in the order of the scales."""
    params = leaves(*scales)
    found = dict(zip(sorted(scales), once(oxs.scale_by_label(scales, {n: n for n in scales}), params), strict=True))
    return [found[name] for name in scales]


def densities(*shares: float) -> list[float]:
    """The factors of ``sparsity_aware`` for leaves of 100 connections with some share of them living."""
    masks = {f"layer_{i}": (jnp.arange(100) < round(100 * share))[:, None] for i, share in enumerate(shares)}

    def rate(density: jax.Array) -> jax.Array:
        return jnp.where(density < 0.02, 2.0, jnp.where(density > 0.1, 0.5, 1.0))

    return once(oxs.scale_by_density(rate), jax.tree.map(lambda mask: jnp.ones(mask.shape), masks), masks=masks)


def lars(*gradients: Sequence[float], **arguments: Any) -> list[float]:
    """What is made of gradients of some leaves whose weights are (3, 4), as a factor."""
    tx, weights = oxs.scale_by_masked_trust_ratio(**arguments), jnp.array([3.0, 4.0])
    updates = [tx.update(jnp.asarray(g), tx.init(weights), weights)[0] for g in gradients]
    return [float(update[0] / gradient[0]) for update, gradient in zip(updates, gradients, strict=True)]


def grown_distances() -> list[float]:
    """Two widenings of one chain: of the first layer, then of the second."""
    sizes = {"one": (3, 4), "two": (4, 4), "three": (4, 4), "four": (4, 2)}
    params = {name: {"kernel": jnp.ones(size)} for name, size in sizes.items()}
    tx, labels, masks, units = oxs.scale_on_event([0.9, 0.7, 0.5]), "scaffold", True, oxs.dense_chain(params, [*sizes])
    state, seen = tx.init(params), []
    for layer in ("one", "two"):
        growth = oxs.widen(params, labels, masks, units, layer, 1, key=jax.random.key(0))
        state = oxs.transfer_state(tx, state, params, tx, growth.params, growth=growth)
        params, labels, masks, units = growth.params, growth.labels, growth.masks, growth.units
        updates, state = tx.update(
            jax.tree.map(jnp.ones_like, params), state, params, event=oxs.growth_distances(growth)
        )
        seen += [float(updates[name]["kernel"][0, 0]) for name in sizes]
    return seen


def strata_at(ages: Sequence[int], label: str) -> list[float]:
    return at(oxs.strata(label), ages, layers(1))


def births(schedule: Callable[[Any], Any], points: Sequence[int]) -> list[float]:
    """The factors of an old leaf and of one born four updates later, read at some updates of the new one."""
    tx, old, new = oxs.scale_by_age(schedule), leaves("old"), leaves("old", "part")
    _, state = jax.lax.scan(lambda s, _: (tx.update(old, s)[1], None), tx.init(old), length=4)[::-1]
    state = oxs.transfer_state(tx, state, old, tx, new)

    def step(state: Any, _: Any) -> Any:
        updates, state = tx.update(new, state)
        return state, jnp.stack([updates["old"][0], updates["part"][0]])

    _, seen = jax.lax.scan(step, state, length=max(points) + 1)
    return seen[np.asarray(points)].ravel().tolist()


def frozen_at(epochs: Sequence[int], params: PyTree) -> list[float]:
    """The factors of all layers at the first update of some epochs of the original's freezing."""
    phases = [(0, 1.0), (10 * EPOCH, (0.01, 0.01, 0.1)), (30 * EPOCH, oxs.frozen_below(-1, 0.1))]
    tx, seen = oxs.progressive_freezing(phases, oxs.layer_depths), []
    for epoch in epochs:
        state = tx.init(params)._replace(count=jnp.asarray(epoch * EPOCH, jnp.int32))
        seen += [float(update[0]) for update in jax.tree.leaves(tx.update(params, state)[0])]
    return seen


def extreme(*counts: int, units: int) -> oxs.Extrema:
    """Some units dead of one layer, at every update other ones."""
    dead = jnp.arange(units) < jnp.array(counts)[:, None]
    return oxs.Extrema({"hidden": dead}, {"hidden": jnp.zeros_like(dead)})


def after_losses(*windows: Sequence[float]) -> list[float]:
    """The factor after each of some windows of five observed losses."""
    tx = oxs.scale_by_loss_phase(every=1)
    return [factor for window in windows for factor in at(tx, [4], layers(1), value=jnp.array(window))]


def connections(rule: oxs.ElementRule, *weights: Sequence[float], **extra: Any) -> list[float]:
    """The factors of the connections of kernels with one row each, in forward order."""
    params = {f"layer_{depth}": {"kernel": jnp.asarray([row])} for depth, row in enumerate(weights)}
    tx = oxs.scale_by_connection(rule)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params, **extra)
    return np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(updates)]).tolist()


def of_cohorts(rule: oxs.CohortRule, *points: tuple[int, int]) -> list[float]:
    """The factors of cohorts of some (birth, age), in epochs."""
    birth, age = EPOCH * jnp.asarray(points, jnp.int32).T
    return rule.factors(oxs.CohortTable(age, birth, jnp.zeros(len(points), jnp.uint8))).tolist()


def near(*sites: float | bool) -> list[float]:
    """The factors of the connections that make the units of one layer, by what extrema say of the units."""
    params = {"layer": {"kernel": jnp.ones((1, len(sites)))}}
    tx = oxs.scale_by_connection(oxs.extrema_rule(oxs.dense_chain(params, ["layer"])))
    updates, _ = tx.update(params, tx.init(params), extrema=oxs.Extrema({"layer": jnp.asarray(sites)}, {}))
    return updates["layer"]["kernel"].ravel().tolist()


EVENTS = jnp.array([False, True, False, True, True, False])
STRATEGIES = (
    Row(
        name="cascading decay",
        # Five layers: 0.1 ** (d / 4), and the other way round.
        values=lambda: (
            once(oxs.scale_by_depth(0.1, oxs.layer_depths, protect="late"), layers(5))
            + once(oxs.scale_by_depth(0.1, oxs.layer_depths), layers(3))
        ),
        expected=[1.0, 0.56234133, 0.31622777, 0.17782794, 0.1, *[0.1, 0.31622777, 1.0]],
        departure="The exponent i / n becomes d / (D-1), so that the last layer has the whole decay. The purpose that "
        "it states, to preserve early layers, is protect='early', the default; its formula slows the late ones.",
    ),
    Row(
        name="cascading decay, within the scaffold",
        # The scaffold's depths 0, 1, 3 are its ranks 0, 1, 2; the patch at depth 2 is alone.
        values=lambda: once(
            oxs.scale_by_depth(
                0.25,
                oxs.layer_depths,
                protect="late",
                within={"layer_0": "scaffold", "layer_1": "scaffold", "layer_2": "patch", "layer_3": "scaffold"},
            ),
            layers(4),
        ),
        expected=[1.0, 0.5, 1.0, 0.25],
    ),
    Row(
        name="dual rates",
        values=lambda: by_label(scaffold=0.1, patch=0.5),
        expected=[0.1, 0.5],  # 1e-4 and 5e-4 on a base of 1e-3
    ),
    Row(
        name="age-based",
        # An event counts from the update behind it: ages 0, 0, 1, 1, 2, 3.
        values=lambda: at(oxs.scale_by_age(oxs.age_decay(0.1), unit="events"), range(6), layers(1), event=EVENTS),
        expected=[1.0, 1.0, 0.1, 0.1, 0.01, 0.001],
        departure="Age is counted in growth phases, as its comment says, and not in epochs, as its formula does.",
    ),
    Row(
        name="component-specific",
        values=lambda: by_label(scaffold=0.1, patch=0.5, neck=1.0, new=1.0),
        expected=[0.1, 0.5, 1.0, 1.0],  # 1e-4, 5e-4, 1e-3, 1e-3 on a base of 1e-3
    ),
    Row(
        name="pretrained + new + adapter",
        values=lambda: by_label(pretrained=0.01, new=1.0, adapter=0.5),
        expected=[0.01, 1.0, 0.5],  # 1e-5, 1e-3, 5e-4 on a base of 1e-3
    ),
    Row(
        name="growth-aware",
        # Halved at each event; what is labelled new is not, and a part born now starts at 1.
        values=lambda: (
            at(oxs.scale_on_event({"scaffold": 0.5}, "scaffold"), range(6), layers(1), event=EVENTS)
            + at(oxs.scale_on_event({"scaffold": 0.5}, "new"), [0, 1, 5], layers(1), event=EVENTS)
            + at(oxs.scale_on_event({"scaffold": 0.5}, "scaffold", min_scale=0.2), [3, 4], layers(1), event=EVENTS)
        ),
        expected=[1.0, 0.5, 0.5, 0.25, 0.125, 0.125, *[1.0, 1.0, 1.0], *[0.25, 0.2]],
        departure="A floor (0.01) and an optional recovery; fresh parts have factor 1 by themselves. A leaf that is "
        "relabelled 'new' keeps what events left of it unless transfer_state(restart=...) names it.",
    ),
    Row(
        name="warm-up for new components",
        # Pairs (old, new) at the new part's updates 0, 2, 5, 9; the old one is four updates older: 4/5, then done.
        values=lambda: births(optax.linear_schedule(0.0, 1.0, 5), [0, 2, 5, 9]),
        expected=[*[0.8, 0.0], *[1.0, 0.4], *[1.0, 1.0], *[1.0, 1.0]],
        departure="From each part's own birth; the original reads the global epoch.",
    ),
    Row(
        name="LARS",
        # |w| = 5: 5 / 1, 5 / 10, 5 / 100 on the base rate, without the trust coefficient of the scheduler.
        values=lambda: lars([0.6, 0.8], [6.0, 8.0], [60.0, 80.0], trust_coefficient=1.0),
        expected=[5.0, 0.5, 0.05],
        departure="Norms over living connections; 1 where either is 0.",
    ),
    Row(
        name="progressive freezing",
        # Four layers in epochs 0, 9, 10, 29, 30 and 99: 1e-3, then 1e-5 and 1e-4, then 0 and 1e-4, on a base of 1e-3.
        values=lambda: frozen_at([0, 9, 10, 29, 30, 99], layers(4)),
        expected=[*[1.0] * 8, *[0.01, 0.01, 0.1, 0.1] * 2, *[0.0, 0.0, 0.0, 0.1] * 2],
        departure="A factor of 0 is an update of exactly 0, and freeze_at_phase saves the backward pass.",
    ),
    Row(
        name="differential decay after events",
        # Layers one .. four; first the first one grows, then the second: .9 .7 .5 .5, times .7 .9 .7 .5.
        values=grown_distances,
        expected=[0.9, 0.7, 0.5, 0.5, *[0.63, 0.63, 0.35, 0.25]],
        departure="Distances come from the unit groups, not from a parameter group named 'adjacent_layer'; floored.",
    ),
    Row(
        name="sparsity-aware",
        values=lambda: densities(0.01, 0.02, 0.05, 0.1, 0.11, 1.0),
        expected=[2.0, 1.0, 1.0, 1.0, 0.5, 0.5],
    ),
    Row(
        name="sedimentary",
        # Strictly older than 20 and than 100 updates.
        values=lambda: strata_at([0, 20, 21, 100, 101], "scaffold") + strata_at([0, 200], "patch"),
        expected=[1.0, 1.0, 0.1, 0.1, 0.01, *[0.5, 0.5]],
        departure="Ages advance by themselves, in updates; strata may also be labels that settle() moves down.",
    ),
)
SCHEDULERS = (
    Row(
        name="ExtremaPhaseScheduler",
        # Share > 0.1: 1; > 0.01: 0.1; else 0.01. Of 100 units, the thresholds themselves among them.
        values=lambda: at(
            oxs.scale_by_extrema_phase(hysteresis=0.0),
            range(6),
            layers(1),
            extrema=extreme(0, 1, 2, 10, 11, 10, units=100),
        ),
        expected=[0.01, 0.01, 0.1, 0.1, 1.0, 0.1],
        departure="It runs (the original fails wherever it is given a network), and counts units dead on data or "
        "saturated, where the original judges the mean activation of a unit.",
    ),
    Row(
        name="ExtremaPhaseScheduler, with hysteresis",
        # A phase is left downwards at 0.8 of its threshold: of 1000 units at 80 and at 8.
        values=lambda: at(
            oxs.scale_by_extrema_phase(), range(6), layers(1), extrema=extreme(110, 90, 79, 90, 9, 7, units=1000)
        ),
        expected=[1.0, 1.0, 0.1, 0.1, 0.1, 0.01],
        departure="By itself it has hysteresis, so that a wavering share does not switch the rate at every update.",
    ),
    Row(
        name="AdaptivePhaseScheduler",
        # (mean of the first 2 - mean of the last 3) / mean of the first 2 = 0.02, 0.008, 0.004, 0 and -0.1.
        values=lambda: after_losses(
            [1.0, 1.0, 0.98, 0.98, 0.98],
            [2.0, 2.0, 1.99, 1.984, 1.978],
            [1.01, 0.99, 0.996, 0.996, 0.996],
            [0.7, 0.7, 0.7, 0.7, 0.7],
            [1.0, 1.0, 1.0, 1.1, 1.2],
        ),
        expected=[1.0, 0.5, 0.1, 0.05, 0.05],
        departure="Monotone: the original takes 0.004 for a plateau (0.05) and a flat loss for refinement (0.1). It "
        "reads the state without changing it, holds for losses of 0 and below, and heeds gradient noise and extrema.",
    ),
    Row(
        name="GrowthPhaseScheduler",
        # 0.1, 0.01 and 0.001 on a base of 0.1, from epochs 20 and 50 on.
        values=lambda: of(
            optax.piecewise_constant_schedule(1.0, {20 * EPOCH: 0.1, 50 * EPOCH: 0.1}),
            [0, 20 * EPOCH - 1, 20 * EPOCH, 50 * EPOCH - 1, 50 * EPOCH, 1000],
        ),
        expected=[1.0, 1.0, 0.1, 0.1, 0.01, 0.01],
        departure="Optax's own. It multiplies a base rate, which the original ignores. Its phases are fixed times.",
    ),
    Row(
        name="ExponentialBackoffScheduler",
        # 0.95 ** e down to 1e-6, which is passed at e = 270; continuous within an epoch.
        values=lambda: of(
            optax.exponential_decay(1.0, EPOCH, 0.95, end_value=1e-6),
            [0, EPOCH, 2 * EPOCH, 10 * EPOCH, 300 * EPOCH],
        ),
        expected=[1.0, 0.95, 0.9025, 0.59873694, 1e-6],
        departure="Optax's own; a multiplier, where the original's initial rate of 1.0 is a rate.",
    ),
    Row(
        name="WarmupScheduler",
        # From 1e-6 to 1e-3 over five epochs, on a base of 1e-3: 0.001 + 0.999 e / 5.
        values=lambda: at(
            oxs.scale_by_age(optax.linear_schedule(1e-3, 1.0, 5 * EPOCH)),
            [0, 2 * EPOCH, 5 * EPOCH, 9 * EPOCH],
            layers(1),
        ),
        expected=[0.001, 0.4006, 1.0, 1.0],
        departure="From each leaf's own birth, so that it serves the new components that it is named for.",
    ),
    Row(
        name="CosineAnnealingScheduler",
        # 0.001 + 0.999 (1 + cos(pi e / 100)) / 2 on a base of 1e-3.
        values=lambda: of(
            optax.cosine_decay_schedule(1.0, 100 * EPOCH, alpha=1e-3), [0, 25 * EPOCH, 50 * EPOCH, 400, 600]
        ),
        expected=[1.0, 0.85370185, 0.5005, 0.001, 0.001],
        departure="Optax's own; it stays at its floor behind the last epoch, where the original rises again.",
    ),
    Row(
        name="CosineAnnealingScheduler, with restarts",
        # Every 50 epochs from the top; just before a restart it is at its floor.
        values=lambda: of(
            optax.sgdr_schedule(
                [
                    {
                        "init_value": 1.0,
                        "peak_value": 1.0,
                        "warmup_steps": 0,
                        "decay_steps": 50 * EPOCH,
                        "end_value": 1e-3,
                    }
                ]
                * 3
            ),
            [0, 25 * EPOCH, 50 * EPOCH, 75 * EPOCH, 100 * EPOCH],
        ),
        expected=[1.0, 0.5005, 1.0, 0.5005, 1.0],
    ),
    Row(
        name="LayerAgeAwareLR",
        # 0.1 + 0.9 l / (n-1); 1 for a single layer.
        values=lambda: (
            once(oxs.scale_by_depth_profile(lambda x: 0.1 + 0.9 * x, oxs.layer_depths), layers(4))
            + once(oxs.scale_by_depth_profile(lambda x: 0.1 + 0.9 * x, oxs.layer_depths), layers(1))
        ),
        expected=[0.1, 0.4, 0.7, 1.0, *[1.0]],
        departure="A multiplier; the original's wrapper writes it as the rate itself.",
    ),
    Row(
        name="CascadingDecayScheduler",
        values=lambda: once(oxs.scale_by_depth(0.1, oxs.layer_depths, protect="late"), layers(3)),
        expected=[1.0, 0.31622777, 0.1],
        departure="As the strategy: 0.1 ** (l / n), here 1, 0.46, 0.22, never reaches 0.1.",
    ),
    Row(
        name="LayerwiseAdaptiveRates",
        # 0.02, 0.01 and 0.005 on a base of 0.01, for three, six, two layers and one.
        values=lambda: [
            factor
            for count in (3, 6, 2, 1)
            for factor in once(oxs.scale_by_depth_bands(2.0, 1.0, 0.5, oxs.layer_depths), layers(count))
        ],
        expected=[*[2.0, 1.0, 0.5], *[2.0, 2.0, 1.0, 1.0, 0.5, 0.5], *[2.0, 0.5], *[1.0]],
        departure="3 d against D-1 and 2 (D-1): three layers have a late one (the original: l < n // 3, l > 2 n // 3, "
        "by which they have none, and six have one late layer). Rates follow the base rate.",
    ),
    Row(
        name="ProgressiveFreezingScheduler",
        # Three layers, of which depths 0 and 1 are early ones; and a single layer, which is the first and the last.
        values=lambda: frozen_at([0, 9, 10, 29, 30], layers(3)) + frozen_at([0, 10, 30], layers(1)),
        expected=[*[1.0] * 6, *[0.01, 0.01, 0.1] * 2, *[0.0, 0.0, 0.1], *[1.0, 0.01, 0.1]],
        departure="Any phases; which layers are early is written in them. Ends of phases are updates, not lengths.",
    ),
    Row(
        name="LayerAgeBasedScheduler",
        # 0.1 ** (e - birth), with half an epoch between.
        values=lambda: at(
            oxs.scale_by_age(oxs.age_decay(0.1, every=EPOCH)), [0, EPOCH // 2, EPOCH, 3 * EPOCH], layers(1)
        ),
        expected=[1.0, 0.31622777, 0.1, 0.001],
        departure="Every leaf knows its birth; in the original one that was not registered is of age 0 for ever.",
    ),
    Row(
        name="ComponentSpecificScheduler",
        values=lambda: by_label(scaffold=0.1, patch=0.5, neck=1.0, new=1.0),
        expected=[0.1, 0.5, 1.0, 1.0],
        departure="A label without a rate is an error; the original takes it for a new layer.",
    ),
    Row(
        name="PretrainedNewLayerScheduler",
        values=lambda: by_label(pretrained=0.01, new=1.0, adapter=0.5),
        expected=[0.01, 1.0, 0.5],
        departure="A label without a rate is an error; the original takes it for a new layer.",
    ),
    Row(
        name="LARSScheduler",
        # min(1e-3 * 5 / |g|, base) / base on a base of 1e-3, for |g| = 1, 10, 100 and the cap's own edge, 5.
        values=lambda: lars([0.6, 0.8], [6.0, 8.0], [60.0, 80.0], [3.0, 4.0], trust_coefficient=1.0, max_ratio=1.0),
        expected=[1.0, 0.5, 0.05, 1.0],
        departure="Really applied, on any leaf; 1 where the weights are all 0, where the original stops them.",
    ),
    Row(
        name="SedimentaryLearningScheduler",
        values=lambda: [
            factor for label in ("geological", "sediment", "active", "patch") for factor in strata_at([150], label)
        ],
        expected=[0.01, 0.1, 1.0, 0.5],  # 1e-5, 1e-4, 1e-3, 5e-4 on a base of 1e-3
        departure="Multipliers. A label fixes the stratum; leaves without one sink with their age.",
    ),
    Row(
        name="SparsityAwareScheduler",
        values=lambda: densities(0.0, 0.01, 0.02, 0.1, 0.11),
        expected=[2.0, 2.0, 1.0, 1.0, 0.5],
        departure="The density is read from the masks, per leaf or per unit; the original parses an id, and fails to.",
    ),
    Row(
        name="LayerAgeAwareLR, age of connections",
        # The first of four layers, 0.1, times exp(-age / 50) at ages of 0, 25 and 50 epochs.
        values=lambda: at(
            optax.chain(
                oxs.scale_by_depth_profile(lambda x: 0.1 + 0.9 * x, oxs.layer_depths),
                oxs.scale_by_connection_age(oxs.age_decay(math.exp(-1), 50 * EPOCH)),
            ),
            [0, 25 * EPOCH, 50 * EPOCH],
            layers(4),
        ),
        expected=[0.1, 0.060653066, 0.036787944],
        departure="Connections age by themselves; in the original nothing ever calls what ages them.",
    ),
    Row(
        name="MultiScaleLearning",
        # 0.1 for births before epoch 20, 0.5 before 50, then 1; times exp(-0.01 age).
        values=lambda: of_cohorts(
            oxs.birth_rule(((20 * EPOCH, 0.1), (50 * EPOCH, 0.5)), temporal_decay=0.01 / EPOCH),
            *[(0, 0), (19, 0), (20, 10), (49, 0), (50, 0), (50, 100)],
        ),
        expected=[0.1, 0.1, 0.45241871, 0.5, 1.0, 0.36787944],
        departure="Its third threshold is read nowhere and left out; every connection knows its birth.",
    ),
    Row(
        name="SoftClampingScheduler",
        # max(1 - age / 100, 0.1)
        values=lambda: at(
            oxs.scale_by_connection_age(oxs.soft_clamp(100 * EPOCH)),
            [0, 50 * EPOCH, 90 * EPOCH, 120 * EPOCH],
            layers(1),
        ),
        expected=[1.0, 0.5, 0.1, 0.1],
        departure="Connections age by themselves. It scales the update: scaling the gradient is lost in Adam.",
    ),
    Row(
        name="AgeBasedScheduler",
        # 0.1 ** (min(age, 50) / 50)
        values=lambda: at(
            oxs.scale_by_connection_age(oxs.age_decay(0.1, 50 * EPOCH, 50 * EPOCH)),
            [0, 25 * EPOCH, 50 * EPOCH, 80 * EPOCH],
            layers(1),
        ),
        expected=[1.0, 0.31622777, 0.1, 0.1],
    ),
    Row(
        name="ScaleDependentRates",
        # 0.001, 0.01 and 0.1 on a base of 0.01, for strengths 0.6, 0.3 and 0.05 at depths 0, 1/3, 2/3 and 1.
        values=lambda: connections(oxs.scale_rule(oxs.layer_depths), *[[0.6, 0.3, -0.05]] * 4),
        expected=[*[0.1, 1.0, 10.0], *[1.0, 1.0, 10.0], *[1.0, 1.0, 10.0], *[10.0, 10.0, 10.0]],
        departure="Thirds as in scale_by_depth_bands; the strength is read anew at every step, not kept for ever; a "
        "ratio to the medium rate.",
    ),
    Row(
        name="ConnectionStrengthScheduler",
        values=lambda: connections(oxs.strength_rule(), [0.6, -0.6, 0.5, 0.25, 0.1, 0.05, 0.0]),
        expected=[0.5, 0.5, 1.0, 1.0, 1.0, 2.0, 2.0],
        departure="The magnitude is taken here; relative_to='fan_in' makes the thresholds mean something in nets whose "
        "weights are all below 0.1.",
    ),
    Row(
        name="GradientBasedScheduler",
        # g = 2, 1, 0.1, 0.001, and one that was never observed.
        values=lambda: connections(
            oxs.gradient_rule(), [1.0] * 5, second_moment={"layer_0": {"kernel": jnp.array([[4, 1, 0.01, 1e-6, 0]])}}
        ),
        expected=[0.5, 1.0, 1.0, 2.0, 1.0],
        departure="The root of the mean square that the optimizer keeps, bias-corrected, for a mean of |g| of its own.",
    ),
    Row(
        name="ExtremaProximityScheduler",
        # In the set or not; then proximities 0, 0.05, 0.1 and 1 as nearness 1 - p / 0.1.
        values=lambda: near(True, False) + near(1.0, 0.5, 0.0, 0.0),
        expected=[2.0, 1.0, *[2.0, 1.5, 1.0, 1.0]],
        departure="Of a connection's two units, from extrema=; in the original nothing computes a proximity.",
    ),
)


def names(rows: Sequence[Row]) -> set[str]:
    return {row.name.split(",")[0] for row in rows}


def test_every_original_has_its_row() -> None:
    assert (len(ALL_STRATEGIES), len(ALL_SCHEDULERS)) == (12, 23)
    assert names(STRATEGIES) == set(ALL_STRATEGIES)
    assert names(SCHEDULERS) == set(ALL_SCHEDULERS)


@pytest.mark.parametrize("row", STRATEGIES, ids=lambda row: row.name)
def test_strategy(row: Row) -> None:
    np.testing.assert_allclose(row.values(), row.expected, rtol=1e-5, atol=2e-8)


@pytest.mark.parametrize("row", SCHEDULERS, ids=lambda row: row.name)
def test_scheduler(row: Row) -> None:
    np.testing.assert_allclose(row.values(), row.expected, rtol=1e-5, atol=2e-8)
