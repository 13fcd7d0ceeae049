"""For what a network is in the middle of: growing, a transfer, a second task; and the combination of the original."""

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
    by_label,
    check_epoch,
    decay_part,
    event_part,
    in_steps,
    labelled,
    listed,
    only,
    part,
    recipe,
    rising,
)
from optax_structure.transforms._extra import check_number
from optax_structure.transforms._multiplier import Multiplier
from optax_structure.transforms.connection_rules import age_rule
from optax_structure.transforms.depth import scale_by_depth
from optax_structure.transforms.scaling import scale_by_label
from optax_structure.transforms.strata import strata

Rates = Mapping[str, float] | None


def structure_net(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation = ADAM,
    bounds: Bounds = (0.01, 2.0),
    rates: Rates = {"scaffold": 0.35, "patch": 0.7, "pretrained": 0.1},  # noqa: B006  (never written to)
    warmup: float | None = 0.5,
    depth_decay: float | None = 0.5,
    event: Rates = {"scaffold": 0.7, "pretrained": 0.7},  # noqa: B006
    recovery: float | None = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """For a sparse network that grows: whatever was added is faster, warms up, and damps the rest for a while.

    The warm-up is that of connections from their birth, so it is had by new leaves, by new connections inside old ones,
    and by the whole network at its start.

    Args:
      learning_rate: base rate >= 0, or a schedule.
      labels: tree of labels, a prefix of it, or a function of params.
      depths: tree of ints (``layer_depths``); without it ``depth_decay`` is off.
      steps_per_epoch: updates an epoch, >= 1.
      inner: the optimizer without a learning rate.
      bounds: of the product.
      rates: label -> factor; labels not listed at 1.
      warmup: epochs in which a connection reaches its rate.
      depth_decay: factor of the first layer against the last.
      event: label -> factor at every ``event=True``.
      recovery: epochs in which its effect falls to 1/e.

    Returns:
      A transformation.

    Raises:
      ValueError: for a number out of range; for an ``inner`` that already applies a rate.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params, labels = {"body": jnp.ones(2), "head": jnp.ones(2)}, {"body": "scaffold", "head": "new"}
      >>> tx = oxs.presets.structure_net(1e-3, labels, steps_per_epoch=8)
      >>> {path: round(float(rate), 4) for path, rate in oxs.rates(tx, tx.init(params), params).items()}
      {'body': 0.0875, 'head': 0.25}
    """
    check_epoch(steps_per_epoch)
    parts = Parts(
        (
            by_label(rates, labels, warmup=None, steps_per_epoch=steps_per_epoch),
            decay_part(depth_decay, depths),
            event_part(event, labels, recovery=recovery, steps_per_epoch=steps_per_epoch),
        ),
        (part("warmup", warmup, lambda w: age_rule(rising(1.0, in_steps("the epochs", w, steps_per_epoch)))),),
    )
    return recipe("structure_net", learning_rate, parts, bounds=bounds, inner=inner)


def transfer_learning(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation = ADAM,
    bounds: Bounds = None,
    rates: Rates = {"pretrained": 0.01, "scaffold": 0.25, "adapter": 0.5},  # noqa: B006  (never written to)
    warmup: float | None = 1.0,
    depth_decay: float | None = 0.7,
) -> optax.GradientTransformationExtraArgs:
    """For a pretrained network with new parts: discriminative rates over labels and depths.

    The original's ratios: pretrained 1e-5, adapter 5e-4, new 1e-3 are 0.01, 0.5 and 1.

    Args:
      learning_rate: base rate >= 0, or a schedule.
      labels: tree of labels, a prefix of it, or a function of params.
      depths: tree of ints (``layer_depths``); without it ``depth_decay`` is off.
      steps_per_epoch: updates an epoch, >= 1.
      inner: the optimizer without a learning rate.
      bounds: of the product.
      rates: label -> factor; labels not listed at 1.
      warmup: epochs in which young parts reach their rate.
      depth_decay: factor of the first layer against the last.

    Returns:
      A transformation.

    Raises:
      ValueError: for a number out of range; for an ``inner`` that already applies a rate.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params, labels = {"body": jnp.ones(2), "head": jnp.ones(2)}, {"body": "pretrained", "head": "new"}
      >>> tx = oxs.presets.transfer_learning(1e-3, labels, depths={"body": 0, "head": 1}, steps_per_epoch=10)
      >>> {path: round(float(rate), 4) for path, rate in oxs.rates(tx, tx.init(params), params).items()}
      {'body': 0.007, 'head': 0.1}

    References:
      Howard & Ruder, Universal language model fine-tuning for text classification, 2018 (discriminative rates).
    """
    check_epoch(steps_per_epoch)
    parts = Parts(
        (
            by_label(rates, labels, warmup=warmup, steps_per_epoch=steps_per_epoch),
            decay_part(depth_decay, depths),
        )
    )
    return recipe("transfer_learning", learning_rate, parts, bounds=bounds, inner=inner)


def continual_learning(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation = ADAM,
    bounds: Bounds = None,
    rates: Rates = {"pretrained": 0.02, "scaffold": 0.2},  # noqa: B006  (never written to)
    strata_rates: tuple[float, float, float] | None = (0.1, 0.3, 1.0),
    strata_ages: tuple[float, float] = (100.0, 20.0),
    depth_decay: float | None = 0.7,
    event: Rates = {"scaffold": 0.5, "pretrained": 0.5},  # noqa: B006
) -> optax.GradientTransformationExtraArgs:
    """For tasks that come one after the other: what learned the old ones moves slowly, and ever more so.

    Leaves sink through the strata (active, sediment, geological) with their age; every ``event=True``, the start of a
    task, halves the old parts' rate for good.

    Args:
      learning_rate: base rate >= 0, or a schedule.
      labels: tree of labels, a prefix of it, or a function of params.
      depths: tree of ints (``layer_depths``); without it ``depth_decay`` is off.
      steps_per_epoch: updates an epoch, >= 1.
      inner: the optimizer without a learning rate.
      bounds: of the product.
      rates: label -> factor; labels not listed at 1.
      strata_rates: factors of the geological, sediment and active stratum.
      strata_ages: epochs above which a leaf is geological, and sediment.
      depth_decay: factor of the first layer against the last.
      event: label -> factor at every ``event=True``.

    Returns:
      A transformation.

    Raises:
      ValueError: for a number out of range; for an ``inner`` that already applies a rate.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params, labels = {"body": jnp.ones(2), "head": jnp.ones(2)}, {"body": "scaffold", "head": "new"}
      >>> tx = oxs.presets.continual_learning(1e-3, labels, steps_per_epoch=10)
      >>> _, state = tx.update(params, tx.init(params), params, event=True)
      >>> {path: round(float(rate), 4) for path, rate in oxs.rates(tx, state, params).items()}
      {'body': 0.1, 'head': 1.0}
    """
    check_epoch(steps_per_epoch)

    def sinking(given: tuple[float, float, float]) -> Multiplier:
        geological, sediment, active = given
        old, middle = (in_steps("strata_ages", epoch, steps_per_epoch) for epoch in strata_ages)
        return strata(geological=geological, sediment=sediment, active=active, geological_age=old, sediment_age=middle)

    parts = Parts(
        (
            by_label(rates, labels, warmup=None, steps_per_epoch=steps_per_epoch),
            part("strata_rates", strata_rates, sinking),
            decay_part(depth_decay, depths),
            event_part(event, labels, recovery=None, steps_per_epoch=steps_per_epoch),
        )
    )
    return recipe("continual_learning", learning_rate, parts, bounds=bounds, inner=inner)


def combined(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation = ADAM,
    bounds: Bounds = (0.001, 1.0),
    age_decay: tuple[float, float] | None = (0.1, 20.0),
    depth_decay: float | None = 0.3,
    patches: float = 0.5,
    warmup: float | None = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """The combination that the original recommends: a scaffold by depth and age, patches at half, new parts warmed up.

    Scaffold: ``0.1 ** (epoch // 20)`` times ``0.3`` to the relative depth, counted within the scaffold. New parts warm
    up in one epoch. The original's numbers are 0.1 and five epochs, which cost half a point on sparse MNIST. Its
    formula slows the *late* layers, its text means the early ones: here the early ones are slow. Its branches for
    patches and for new components are computed there and never used.

    Args:
      learning_rate: base rate >= 0, or a schedule.
      labels: tree of labels, a prefix of it, or a function of params.
      depths: tree of ints (``layer_depths``); without it ``depth_decay`` is off.
      steps_per_epoch: updates an epoch, >= 1.
      inner: the optimizer without a learning rate.
      bounds: of the product.
      age_decay: the scaffold's factor every so many epochs.
      depth_decay: factor of the scaffold's first layer against its last.
      patches: factor of patches.
      warmup: epochs in which ``new``, ``neck`` and ``adapter`` leaves reach the base rate.

    Returns:
      A transformation.

    Raises:
      ValueError: for a number out of range; for an ``inner`` that already applies a rate.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"first": jnp.ones(2), "second": jnp.ones(2), "patch": jnp.ones(2), "head": jnp.ones(2)}
      >>> labels = {"first": "scaffold", "second": "scaffold", "patch": "patch", "head": "new"}
      >>> depths = {"first": 0, "second": 1, "patch": 1, "head": 2}
      >>> tx = oxs.presets.combined(1e-3, labels, depths=depths, steps_per_epoch=5)
      >>> {path: round(float(rate), 3) for path, rate in oxs.rates(tx, tx.init(params), params).items()}
      {'first': 0.3, 'head': 0.2, 'patch': 0.5, 'second': 1.0}
    """
    check_epoch(steps_per_epoch)
    check_number("patches", patches)

    def ageing(given: tuple[float, float]) -> Schedule:
        decay, epochs = given
        check_number("the factor", decay, high=1.0)
        steps = max(in_steps("the epochs", epochs, steps_per_epoch), 1)
        return optax.exponential_decay(1.0, steps, decay, staircase=True)

    rise = part("warmup", warmup, lambda w: rising(1.0, in_steps("the epochs", w, steps_per_epoch))) or 1.0
    scales: dict[str, float | Schedule] = {"patch": patches, "scaffold": part("age_decay", age_decay, ageing) or 1.0}
    scales |= {label: rise for label in ("new", "neck", "adapter")}
    by_depth = part(
        "depth_decay",
        depth_decay if depths is not None else None,
        lambda decay: only(scale_by_depth(decay, depths, within=labels), labelled("scaffold", labels)),
    )
    parts = Parts((scale_by_label(*listed(scales, labels)), by_depth))
    return recipe("combined", learning_rate, parts, bounds=bounds, inner=inner)
