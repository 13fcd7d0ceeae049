"""One idea each, in a few numbers: how cautious to be, or what to look at."""

from __future__ import annotations

from collections.abc import Mapping

import optax

from optax_structure._tree import PyTree
from optax_structure.labels import LabelFn, Labels
from optax_structure.presets._recipe import (
    ADAM,
    Bounds,
    Parts,
    Schedule,
    backoff_part,
    bands_part,
    by_label,
    check_epoch,
    connections_age_part,
    event_part,
    extreme_units_part,
    if_given,
    in_steps,
    part,
    profile_part,
    recipe,
)
from optax_structure.structure import Units
from optax_structure.transforms._multiplier import Multiplier
from optax_structure.transforms.freezing.phases import frozen_below, progressive_freezing
from optax_structure.transforms.phases import scale_by_extrema_phase

Rates = Mapping[str, float] | None
Pair = tuple[float, float] | None
Triple = tuple[float, float, float] | None


def conservative(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation = ADAM,
    bounds: Bounds = (0.01, 1.0),
    rates: Rates = {"scaffold": 0.3, "patch": 0.5, "pretrained": 0.02},  # noqa: B006  (never written to)
    warmup: float | None = 1.0,
    backoff: Pair = (0.98, 0.1),
    bands: Triple = (0.5, 0.75, 1.0),
    event: Rates = {"scaffold": 0.5, "pretrained": 0.5},  # noqa: B006
    recovery: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Slow and stable: the scaffold at three tenths, what an event damps stays so, no rate above the base.

    Args:
      learning_rate: base rate >= 0, or a schedule.
      labels: tree of labels, a prefix of it, or a function of params.
      depths: tree of ints (``layer_depths``); without it ``bands`` are off.
      steps_per_epoch: updates an epoch, >= 1.
      inner: the optimizer without a learning rate.
      bounds: of the product.
      rates: label -> factor; labels not listed at 1.
      warmup: epochs in which young parts reach their rate.
      backoff: factor an epoch, and its floor.
      bands: factors of the early, middle and late third of the depths.
      event: label -> factor at every ``event=True``.
      recovery: epochs in which its effect falls to 1/e; None: it stays.

    Returns:
      A transformation.

    Raises:
      ValueError: for a number out of range; for an ``inner`` that already applies a rate.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params, labels = {"body": jnp.ones(2), "head": jnp.ones(2)}, {"body": "scaffold", "head": "new"}
      >>> tx = oxs.presets.conservative(1e-3, labels, steps_per_epoch=2)
      >>> {path: round(float(rate), 3) for path, rate in oxs.rates(tx, tx.init(params), params).items()}
      {'body': 0.3, 'head': 0.5}
    """
    check_epoch(steps_per_epoch)
    parts = Parts(
        (
            by_label(rates, labels, warmup=warmup, steps_per_epoch=steps_per_epoch),
            backoff_part(backoff, steps_per_epoch),
            bands_part(bands, depths),
            event_part(event, labels, recovery=recovery, steps_per_epoch=steps_per_epoch),
        )
    )
    return recipe("conservative", learning_rate, parts, bounds=bounds, inner=inner)


def aggressive(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation = ADAM,
    bounds: Bounds = (0.05, 10.0),
    rates: Rates = {"new": 2.0, "patch": 2.0, "neck": 2.0},  # noqa: B006  (never written to)
    backoff: Pair = (0.9, 0.05),
    profile: Pair = (1.0, 1.5),
) -> optax.GradientTransformationExtraArgs:
    """Fast at first and quickly down: the scaffold at the full rate, young parts at twice that, no warm-up.

    Args:
      learning_rate: base rate >= 0, or a schedule.
      labels: tree of labels, a prefix of it, or a function of params.
      depths: tree of ints (``layer_depths``); without it ``profile`` is off.
      steps_per_epoch: updates an epoch, >= 1.
      inner: the optimizer without a learning rate.
      bounds: of the product.
      rates: label -> factor; labels not listed at 1.
      backoff: factor an epoch, and its floor.
      profile: factors at the first and last depth, linear between.

    Returns:
      A transformation.

    Raises:
      ValueError: for a number out of range; for an ``inner`` that already applies a rate.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params, labels = {"body": jnp.ones(2), "head": jnp.ones(2)}, {"body": "scaffold", "head": "new"}
      >>> tx = oxs.presets.aggressive(1e-3, labels, steps_per_epoch=100)
      >>> {path: round(float(rate), 3) for path, rate in oxs.rates(tx, tx.init(params), params).items()}
      {'body': 1.0, 'head': 2.0}
    """
    check_epoch(steps_per_epoch)
    parts = Parts(
        (
            by_label(rates, labels, warmup=None, steps_per_epoch=steps_per_epoch),
            backoff_part(backoff, steps_per_epoch),
            profile_part(profile, depths),
        )
    )
    return recipe("aggressive", learning_rate, parts, bounds=bounds, inner=inner)


def balanced(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation = ADAM,
    bounds: Bounds = (0.02, 2.0),
    rates: Rates = {"scaffold": 0.6, "patch": 0.8, "pretrained": 0.1},  # noqa: B006  (never written to)
    warmup: float | None = 1.0,
    backoff: Pair = (0.95, 0.1),
    bands: Triple = (0.8, 0.9, 1.0),
    event: Rates = {"scaffold": 0.7, "pretrained": 0.7},  # noqa: B006
    recovery: float | None = 2.0,
) -> optax.GradientTransformationExtraArgs:
    """The middle: the scaffold at six tenths, a short warm-up, and a damping after events that passes.

    Args:
      learning_rate: base rate >= 0, or a schedule.
      labels: tree of labels, a prefix of it, or a function of params.
      depths: tree of ints (``layer_depths``); without it ``bands`` are off.
      steps_per_epoch: updates an epoch, >= 1.
      inner: the optimizer without a learning rate.
      bounds: of the product.
      rates: label -> factor; labels not listed at 1.
      warmup: epochs in which young parts reach their rate.
      backoff: factor an epoch, and its floor.
      bands: factors of the early, middle and late third of the depths.
      event: label -> factor at every ``event=True``.
      recovery: epochs in which its effect falls to 1/e.

    Returns:
      A transformation.

    Raises:
      ValueError: for a number out of range; for an ``inner`` that already applies a rate.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params, labels = {"body": jnp.ones(2), "head": jnp.ones(2)}, {"body": "scaffold", "head": "new"}
      >>> tx = oxs.presets.balanced(1e-3, labels, steps_per_epoch=2)
      >>> {path: round(float(rate), 3) for path, rate in oxs.rates(tx, tx.init(params), params).items()}
      {'body': 0.6, 'head': 0.5}
    """
    check_epoch(steps_per_epoch)
    parts = Parts(
        (
            by_label(rates, labels, warmup=warmup, steps_per_epoch=steps_per_epoch),
            backoff_part(backoff, steps_per_epoch),
            bands_part(bands, depths),
            event_part(event, labels, recovery=recovery, steps_per_epoch=steps_per_epoch),
        )
    )
    return recipe("balanced", learning_rate, parts, bounds=bounds, inner=inner)


def extrema_focused(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation = ADAM,
    bounds: Bounds = (0.02, 4.0),
    rates: Rates = {"scaffold": 0.7, "pretrained": 0.1},  # noqa: B006  (never written to)
    extrema_phase: Triple = (2.0, 1.0, 0.5),
    thresholds: Pair = (0.15, 0.05),
    units: Units | None = None,
    boost: float | None = 2.0,
    profile: Pair = (0.5, 1.5),
    connection_age: Pair = (60.0, 0.2),
) -> optax.GradientTransformationExtraArgs:
    """Rates that follow the dead and saturated units: faster while there are many, and faster at each of them.

    Args:
      learning_rate: base rate >= 0, or a schedule.
      labels: tree of labels, a prefix of it, or a function of params.
      depths: tree of ints (``layer_depths``); without it ``profile`` is off.
      steps_per_epoch: updates an epoch, >= 1.
      inner: the optimizer without a learning rate.
      bounds: of the product.
      rates: label -> factor; labels not listed at 1.
      extrema_phase: factors of the explosive, steady and refinement phase (with ``extrema=``).
      thresholds: shares of extreme units above which the phase is explosive and steady.
      units: unit groups; without them ``boost`` is off.
      boost: factor of connections at an extreme unit (with ``extrema=``).
      profile: factors at the first and last depth.
      connection_age: epochs in which a connection's rate falls to 1/e, and the floor.

    Returns:
      A transformation.

    Raises:
      ValueError: for a number out of range; for an ``inner`` that already applies a rate.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params, labels = {"body": jnp.ones(2), "head": jnp.ones(2)}, {"body": "scaffold", "head": "new"}
      >>> tx = oxs.presets.extrema_focused(1e-3, labels, steps_per_epoch=100)
      >>> many = oxs.Extrema(dead={"body": jnp.array([True, False])}, saturated={"body": jnp.array([False, False])})
      >>> state = tx.init(params)
      >>> [round(float(oxs.rates(tx, state, params, **extra)["body"]), 2) for extra in ({}, {"extrema": many})]
      [0.7, 1.4]
    """
    check_epoch(steps_per_epoch)
    explosive, steady = thresholds or (0.1, 0.01)

    def phased(scales: tuple[float, float, float]) -> Multiplier:
        return if_given("extrema", scale_by_extrema_phase(explosive=explosive, steady=steady, scales=scales))

    parts = Parts(
        (
            by_label(rates, labels, warmup=None, steps_per_epoch=steps_per_epoch),
            part("extrema_phase", extrema_phase, phased),
            profile_part(profile, depths),
        ),
        (connections_age_part(connection_age, steps_per_epoch), extreme_units_part("boost", boost, units)),
    )
    return recipe("extrema_focused", learning_rate, parts, bounds=bounds, inner=inner)


def fine_tuning(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation = ADAM,
    bounds: Bounds = None,
    rates: Rates = {"scaffold": 0.4, "pretrained": 0.01, "patch": 0.5, "adapter": 0.5},  # noqa: B006
    warmup: float | None = None,
    freezing: Pair = (5.0, 20.0),
) -> optax.GradientTransformationExtraArgs:
    """For a trained network: component rates, and layers that freeze from the input on as training goes on.

    With ``depths``: until the first epoch of ``freezing`` every layer learns; until the second the first two depths
    learn at 1 %, the others at 10 %; from then on the last alone, at 10 %.

    Args:
      learning_rate: base rate >= 0, or a schedule.
      labels: tree of labels, a prefix of it, or a function of params.
      depths: tree of ints (``layer_depths``); without it ``freezing`` is off.
      steps_per_epoch: updates an epoch, >= 1.
      inner: the optimizer without a learning rate.
      bounds: of the product.
      rates: label -> factor; labels not listed at 1.
      warmup: epochs in which young parts reach their rate.
      freezing: epochs at which the second and the third phase begin.

    Returns:
      A transformation.

    Raises:
      ValueError: for a number out of range; for an ``inner`` that already applies a rate.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params, labels = {"body": jnp.ones(2), "head": jnp.ones(2)}, {"body": "pretrained", "head": "new"}
      >>> tx = oxs.presets.fine_tuning(1e-3, labels, steps_per_epoch=100)
      >>> {path: round(float(rate), 3) for path, rate in oxs.rates(tx, tx.init(params), params).items()}
      {'body': 0.01, 'head': 1.0}
    """
    check_epoch(steps_per_epoch)

    def frozen(given: tuple[float, float]) -> Multiplier:
        second, third = (in_steps("an epoch", epoch, steps_per_epoch) for epoch in given)
        phases = [(0, 1.0), (second, (0.01, 0.01, 0.1)), (third, frozen_below(-1, 0.1))]
        return progressive_freezing(phases, depths)

    phased = part("freezing", freezing if depths is not None else None, frozen)
    parts = Parts((by_label(rates, labels, warmup=warmup, steps_per_epoch=steps_per_epoch), phased))
    return recipe("fine_tuning", learning_rate, parts, bounds=bounds, inner=inner)
