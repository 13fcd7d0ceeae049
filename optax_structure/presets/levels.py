"""Four levels of one idea, each with all parts of the one before and more: basic to ultimate."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
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
    kernels,
    only,
    over_time,
    part,
    profile_part,
    recipe,
    shows,
    watched,
)
from optax_structure.schedules import soft_clamp
from optax_structure.structure import Units
from optax_structure.transforms._connection import CohortRule, ElementRule, optional_rule
from optax_structure.transforms._extra import check_number
from optax_structure.transforms._multiplier import Multiplier
from optax_structure.transforms.connection_rules import (
    birth_rule,
    gradient_rule,
    strength_rule,
)
from optax_structure.transforms.phases import scale_by_extrema_phase, scale_by_loss_phase
from optax_structure.transforms.scaling import scale_by_age, scale_by_density
from optax_structure.transforms.trust_ratio import scale_by_masked_trust_ratio


def basic_parts(
    labels: Labels | LabelFn,
    depths: PyTree | None,
    steps_per_epoch: int,
    *,
    rates: Mapping[str, float] | None = {"scaffold": 0.5, "pretrained": 0.1},
    warmup: float | None = None,
    backoff: tuple[float, float] | None = (0.95, 0.2),
    stages: Mapping[float, float] | None = {20: 0.7, 50: 0.7},
    bands: tuple[float, float, float] | None = (0.6, 0.8, 1.0),
    clamp: tuple[float, float] | None = (100.0, 0.5),
    births: tuple[tuple[float, float], ...] | None = ((20.0, 0.5), (50.0, 0.75)),
) -> Parts:
    """What ``basic`` multiplies."""
    check_epoch(steps_per_epoch)
    epochs = functools.partial(in_steps, steps_per_epoch=steps_per_epoch)

    def staged(given: Mapping[float, float]) -> Multiplier:
        further = {epochs("an epoch", epoch): factor for epoch, factor in given.items()}
        named = {f"from_{step}": factor for step, factor in further.items()}
        return over_time("stages", optax.piecewise_constant_schedule(1.0, further), **named)

    def by_birth(given: tuple[tuple[float, float], ...]) -> CohortRule:
        return birth_rule([(epochs("an epoch", epoch), factor) for epoch, factor in given], temporal_decay=0.0)

    return Parts(
        (
            by_label(rates, labels, warmup=warmup, steps_per_epoch=steps_per_epoch),
            backoff_part(backoff, steps_per_epoch),
            part("stages", stages, staged),
            bands_part(bands, depths),
            part("clamp", clamp, lambda c: scale_by_age(soft_clamp(epochs("the epochs", c[0]), c[1]))),
        ),
        (part("births", births, by_birth),),
    )


def advanced_parts(
    labels: Labels | LabelFn,
    depths: PyTree | None,
    steps_per_epoch: int,
    *,
    extrema_phase: tuple[float, float, float] | None = (1.0, 0.7, 0.5),
    profile: tuple[float, float] | None = (0.5, 1.0),
    connection_age: tuple[float, float] | None = (200.0, 0.5),
    **of_basic: Any,
) -> Parts:
    """What ``advanced`` multiplies."""
    parts = basic_parts(labels, depths, steps_per_epoch, **of_basic)
    return parts.and_(
        part("extrema_phase", extrema_phase, lambda f: if_given("extrema", scale_by_extrema_phase(scales=f))),
        profile_part(profile, depths),
        rules=(connections_age_part(connection_age, steps_per_epoch),),
    )


def comprehensive_parts(
    labels: Labels | LabelFn,
    depths: PyTree | None,
    steps_per_epoch: int,
    *,
    event: Mapping[str, float] | None = {"scaffold": 0.5, "pretrained": 0.5},
    recovery: float | None = 5.0,
    by_density: tuple[float, float] | None = (1.5, 0.75),
    strength: tuple[float, float] | None = (0.7, 1.3),
    warmup: float | None = 1.0,
    **of_advanced: Any,
) -> Parts:
    """What ``comprehensive`` multiplies."""
    parts = advanced_parts(labels, depths, steps_per_epoch, warmup=warmup, **of_advanced)
    after = event_part(event, labels, recovery=recovery, steps_per_epoch=steps_per_epoch)
    density = part("by_density", by_density, lambda factors: if_given("masks", scale_by_density(stepped(*factors))))

    def strong(given: tuple[float, float]) -> ElementRule:
        above, below = given
        return strength_rule(3.0, 0.1, strong_factor=above, weak_factor=below, relative_to="fan_in")

    return parts.and_(after, density, rules=(part("strength", strength, strong),))


def stepped(sparse: float, dense: float) -> Schedule:
    """``sparse`` below a density of 2 %, ``dense`` above 10 %, 1 between."""
    check_number("the factor of sparse leaves", sparse)
    check_number("the factor of dense leaves", dense)
    return lambda density: jnp.where(density < 0.02, sparse, jnp.where(density > 0.1, dense, 1.0))


def ultimate_parts(
    labels: Labels | LabelFn,
    depths: PyTree | None,
    steps_per_epoch: int,
    *,
    loss_phase: tuple[float, float, float, float] | None = (1.0, 0.8, 0.6, 0.5),
    gradient: tuple[float, float] | None = (0.7, 1.3),
    extrema_boost: float | None = 1.5,
    units: Units | None = None,
    trust: tuple[float, float] | None = (10.0, 2.0),
    **of_comprehensive: Any,
) -> Parts:
    """What ``ultimate`` multiplies."""
    parts = comprehensive_parts(labels, depths, steps_per_epoch, **of_comprehensive)

    def trusted(given: tuple[float, float]) -> Multiplier:
        coefficient, cap = given
        return only(scale_by_masked_trust_ratio(trust_coefficient=coefficient, max_ratio=cap), kernels)

    def steep(given: tuple[float, float]) -> ElementRule:
        large, small = given
        return optional_rule(gradient_rule(1e-2, 1e-5, high_factor=large, low_factor=small))

    return parts.and_(
        part("loss_phase", loss_phase, lambda f: if_given("value", scale_by_loss_phase(f, every=steps_per_epoch))),
        part("trust", trust, trusted),
        rules=(part("gradient", gradient, steep), extreme_units_part("extrema_boost", extrema_boost, units)),
    )


@shows(basic_parts)
def basic(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation = ADAM,
    bounds: Bounds = (0.003, 10.0),
    **numbers: Any,
) -> optax.GradientTransformationExtraArgs:
    """Rates by label, exponential backoff, stages of training, depth bands, soft clamping, rates by birth.

    The original's strategy "basic", whose parts there overwrite each other; here they multiply. Every part takes
    ``None``, which switches it off. Epochs are ``steps_per_epoch`` updates.

    Args:
      learning_rate: base rate >= 0, or a schedule of updates; everything else is a factor on it.
      labels: tree of labels, a prefix of it, or a function of params.
      depths: tree of ints (``layer_depths``); without it the parts that read depth are off.
      steps_per_epoch: updates an epoch, >= 1. At 1 the numbers below are updates.
      inner: the optimizer without a learning rate; Adam with one count a leaf.
      bounds: the product of all factors is clipped to these; one that is exactly 0 stays 0. None: no bounds.
      **numbers: rates: label -> factor, labels not listed at 1. warmup: epochs in which ``new``, ``patch``, ``neck``
        and ``adapter`` leaves reach their rate. backoff: (factor an epoch, its floor). stages: epoch -> further factor
        from then on. bands: factors of the early, middle and late third of the depths. clamp: (epochs, floor), a leaf's
        rate falls linearly with its age. births: (epoch, factor) pairs: connections born before that epoch.

    Returns:
      A transformation; ``oxs.describe`` prints its rules.

    Raises:
      ValueError: for a number out of range, naming it; for an ``inner`` that already applies a rate.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
      >>> labels = {"body": "scaffold", "head": "new"}
      >>> tx = oxs.presets.basic(1e-3, labels, steps_per_epoch=100)
      >>> {path: round(float(rate), 3) for path, rate in oxs.rates(tx, tx.init(params), params).items()}
      {'body': 0.25, 'head': 0.5}
    """
    return recipe(
        "basic",
        learning_rate,
        basic_parts(labels, depths, steps_per_epoch, **numbers),
        bounds=bounds,
        inner=inner,
    )


@shows(advanced_parts, basic_parts)
def advanced(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation = ADAM,
    bounds: Bounds = (0.003, 10.0),
    **numbers: Any,
) -> optax.GradientTransformationExtraArgs:
    """``basic``, and phases read from extrema, a linear depth profile, and rates that fall with a connection's age.

    Args:
      learning_rate: base rate >= 0, or a schedule.
      labels: tree of labels, a prefix of it, or a function of params.
      depths: tree of ints (``layer_depths``); without it the parts that read depth are off.
      steps_per_epoch: updates an epoch, >= 1.
      inner: the optimizer without a learning rate.
      bounds: of the product.
      **numbers: extrema_phase: factors of the explosive, steady and refinement phase (with ``extrema=``). profile:
        factors at the first and last depth. connection_age: (epochs to 1/e, floor). And those of ``basic``.

    Returns:
      A transformation.

    Raises:
      ValueError: as ``basic``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params, labels = {"body": jnp.ones(2), "head": jnp.ones(2)}, {"body": "scaffold", "head": "new"}
      >>> tx = oxs.presets.advanced(1e-3, labels, depths={"body": 0, "head": 1}, steps_per_epoch=100)
      >>> {path: round(float(rate), 3) for path, rate in oxs.rates(tx, tx.init(params), params).items()}
      {'body': 0.075, 'head': 0.5}
    """
    parts = advanced_parts(labels, depths, steps_per_epoch, **numbers)
    return recipe("advanced", learning_rate, parts, bounds=bounds, inner=inner)


@shows(comprehensive_parts, advanced_parts, basic_parts)
def comprehensive(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation = ADAM,
    bounds: Bounds = (0.003, 10.0),
    **numbers: Any,
) -> optax.GradientTransformationExtraArgs:
    """``advanced``, and decay after growth events, a warm-up of young parts, rates by density and by strength.

    Args:
      learning_rate: base rate >= 0, or a schedule.
      labels: tree of labels, a prefix of it, or a function of params.
      depths: tree of ints (``layer_depths``); without it the parts that read depth are off.
      steps_per_epoch: updates an epoch, >= 1.
      inner: the optimizer without a learning rate.
      bounds: of the product.
      **numbers: event: label -> factor at every ``event=True``, and recovery: epochs in which its effect falls to 1/e.
        by_density: factors below 2 % and above 10 % density (with ``masks=``). strength: factors of connections above 3
        and below 0.1 times ``fan_in ** -0.5``. warmup: epochs, 1. And those of ``advanced`` and ``basic``.

    Returns:
      A transformation.

    Raises:
      ValueError: as ``basic``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params, labels = {"body": jnp.ones(2), "head": jnp.ones(2)}, {"body": "scaffold", "head": "new"}
      >>> tx = oxs.presets.comprehensive(1e-3, labels, steps_per_epoch=100)
      >>> state = tx.init(params)
      >>> _, state = tx.update(params, state, params, event=True)
      >>> round(float(oxs.rates(tx, state, params)["body"]), 2)  # 0.25, halved by the event
      0.13
    """
    parts = comprehensive_parts(labels, depths, steps_per_epoch, **numbers)
    return recipe("comprehensive", learning_rate, parts, bounds=bounds, inner=inner)


@shows(ultimate_parts, comprehensive_parts, advanced_parts, basic_parts)
def ultimate(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation = ADAM,
    bounds: Bounds = (0.003, 10.0),
    **numbers: Any,
) -> optax.GradientTransformationExtraArgs:
    """``comprehensive``, and phases of the loss, gradient size, nearness to extrema, and a trust ratio: everything.

    Args:
      learning_rate: base rate >= 0, or a schedule.
      labels: tree of labels, a prefix of it, or a function of params.
      depths: tree of ints (``layer_depths``); without it the parts that read depth are off.
      steps_per_epoch: updates an epoch, >= 1.
      inner: the optimizer without a learning rate. The gradient's size is read from its second moment.
      bounds: of the product.
      **numbers: loss_phase: factors of exploration, exploitation, refinement and plateau (with ``value=``;
        the noise of the gradient counts where ``grads=`` is passed). gradient:
        factors of connections with a large and with a small gradient. extrema_boost: factor at extreme units (with
        ``extrema=`` and units). units: unit groups. trust: (coefficient, cap) of the trust ratio of kernels. And those
        of ``comprehensive``, ``advanced`` and ``basic``.

    Returns:
      A transformation.

    Raises:
      ValueError: as ``basic``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params, labels = {"body": jnp.ones((2, 2)), "head": jnp.ones(2)}, {"body": "scaffold", "head": "new"}
      >>> tx = oxs.presets.ultimate(1e-3, labels, steps_per_epoch=100)
      >>> updates, _ = tx.update(params, tx.init(params), params, value=2.3)
      >>> bool((updates["body"] < 0).all())
      True
    """
    parts = ultimate_parts(labels, depths, steps_per_epoch, **numbers)
    return recipe("ultimate", learning_rate, parts, bounds=bounds, inner=inner, join=watched)
