"""For a run that is steered by its own loss: rate, momentum and freezing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import PyTree, align
from optax_structure.labels import LabelFn, Labels
from optax_structure.presets._recipe import Bounds, Schedule, by_label, check_direction, check_epoch
from optax_structure.state import slots
from optax_structure.transforms._extra import Described, Rule, require, transformation
from optax_structure.transforms.feedback._control import FeedbackState, check_below_one
from optax_structure.transforms.feedback._control_step import dot, flags_of, number
from optax_structure.transforms.feedback.optimizers import feedback_sgd
from optax_structure.transforms.feedback.rate import scale_by_feedback
from optax_structure.transforms.feedback.rules import RuleWeights, check_real
from optax_structure.transforms.freezing.gradients import freeze_on_small_gradients
from optax_structure.transforms.observe import observe
from optax_structure.transforms.product import scale_by_product


def loss_aware(
    learning_rate: float | Schedule,
    labels: Labels | LabelFn | None = None,
    *,
    depths: PyTree | None = None,
    steps_per_epoch: int = 1,
    inner: optax.GradientTransformation | None = None,
    bounds: Bounds = None,
    rates: Mapping[str, float] | None = None,
    warmup: float | None = None,
    momentum: float = 0.9,
    lr_rules: RuleWeights = {"trend": 0.6, "variance": 0.3, "grad_norm": 0.1},  # noqa: B006  (never written to)
    momentum_rules: RuleWeights = {"relative": 0.7, "inverse": 0.3},  # noqa: B006
    dynamic_weights: bool = True,
    total_steps: int | None = None,
    freeze_threshold: float | None = 1e-4,
    freeze_ema_beta: float = 0.9,
    min_steps_before_freeze: int = 100,
    max_share: float = 1.0,
) -> Described:
    """Learning rate, momentum and freezing that follow the loss: the original's ``AdaptiveScheduler``, in one call.

    ``feedback_sgd`` (or ``inner`` and ``scale_by_feedback``) inside ``freeze_on_small_gradients``; their docstrings say
    what each rule does and where it departs from the original. The names and numbers of the arguments are those of the
    original's usage, of which nothing else was published. With ``depths`` a layer freezes as a whole.

    A step whose loss is not finite, or any gradient that was computed (or its square), changes nothing but ``skipped``,
    which counts it: no parameter, no moment, no reading, no clock.

    By itself this saves no work: a frozen leaf does not move, and the backward pass computes its gradient all the same.
    What saves it are gates in the network: ``gated`` layers that are given ``gates(state, depths)``, and
    ``observed=observed(gates)`` in ``update`` (see ``freeze_on_small_gradients``).

    Args:
      learning_rate: base rate >= 0, or a schedule.
      labels: tree of labels, a prefix of it, or a function of params; needed with ``rates`` or ``warmup`` only.
      depths: tree of ints (``layer_depths``): leaves of one depth freeze together. Without it every leaf by itself.
      steps_per_epoch: updates an epoch, >= 1, for ``warmup``.
      inner: an optimizer without a learning rate in place of SGD with momentum, such as ``per_leaf(scale_by_adam())``.
        It has a momentum of its own: ``momentum`` and ``momentum_rules`` are checked and not used.
      bounds: of the product of ``rates`` and ``warmup``.
      rates: label -> factor; labels not listed at 1.
      warmup: epochs in which young parts (``patch``, ``new``, ``neck``, ``adapter``) reach their rate.
      momentum: the base momentum, in [0, 1).
      lr_rules, momentum_rules, dynamic_weights, total_steps: as for ``feedback_sgd``.
      freeze_threshold: root mean square of a gradient; ``None`` freezes nothing.
      freeze_ema_beta: decay of its running mean.
      min_steps_before_freeze: readings before a leaf may freeze.
      max_share: of the parameters that may be frozen at a time.

    Returns:
      A transformation. ``update`` needs ``value=`` (the loss, a scalar), and reads ``observed=`` where it is passed
      (see ``skip_unobserved``); ``frozen`` and ``snapshot`` read its state.

    Raises:
      ValueError: for numbers out of range and unknown rules; for ``rates`` without ``labels``; for an ``inner`` that
        already applies a rate; in ``update`` for a missing ``value=``.

    Example:
      The usage of the original, on a small regression:

      >>> import jax, jax.numpy as jnp, optax, optax_structure as oxs
      >>> x = jax.random.normal(jax.random.key(0), (64, 3))
      >>> y = x @ jnp.array([1.0, -2.0, 0.5])
      >>> tx = oxs.presets.loss_aware(
      ...     1e-2,
      ...     lr_rules={"trend": 0.6, "variance": 0.3, "grad_norm": 0.1},
      ...     momentum_rules={"relative": 0.7, "inverse": 0.3},
      ...     dynamic_weights=True,
      ...     freeze_threshold=1e-4,
      ...     freeze_ema_beta=0.9,
      ...     min_steps_before_freeze=100,
      ... )
      >>> @jax.jit
      ... def train_step(params, state):
      ...     loss, grads = jax.value_and_grad(lambda p: jnp.mean((x @ p["w"] - y) ** 2))(params)
      ...     updates, state = tx.update(grads, state, params, value=loss)  # rate, momentum and freezing
      ...     return optax.apply_updates(params, updates), state, oxs.snapshot(state, params)
      >>> params = {"w": jnp.zeros(3)}
      >>> state = tx.init(params)
      >>> for step in range(1, 601):
      ...     params, state, snap = train_step(params, state)
      >>> line = f"[{step}] lr={snap['lr']:.6e} mu={snap['momentum']:.3f} frozen={snap['pct_frozen']}"
      >>> line.endswith("frozen=100.0"), params["w"].round(2).tolist()
      (True, [1.0, -2.0, 0.5])
    """
    check_epoch(steps_per_epoch)
    if (rates is not None or warmup is not None) and labels is None:
        raise ValueError(f"rates={rates!r} and warmup={warmup!r} are by label: pass labels.")
    low, high = bounds or (0.0, float("inf"))
    by_rates = None if labels is None else by_label(rates, labels, warmup=warmup, steps_per_epoch=steps_per_epoch)
    bounded = scale_by_product(*([] if by_rates is None else [by_rates]), min_scale=low, max_scale=high)
    members = [] if by_rates is None else [bounded]
    numbers: dict[str, Any] = {
        "lr_rules": lr_rules,
        "dynamic_weights": dynamic_weights,
        "total_steps": total_steps,
    }
    # Made beside an `inner` too: what it is given is checked whether it is used or not, and so is what follows.
    controlled = feedback_sgd(learning_rate, momentum=momentum, momentum_rules=momentum_rules, **numbers)
    if freeze_threshold is not None:
        check_real("freeze_threshold", freeze_threshold)
    check_below_one("freeze_ema_beta", freeze_ema_beta)
    check_real("min_steps_before_freeze", min_steps_before_freeze)
    check_real("max_share", max_share, high=1.0)
    whole: Any
    if inner is None:
        whole = optax.chain(controlled, *members)
    else:
        check_direction(inner)
        scale = _shows_rate(scale_by_feedback(**numbers), learning_rate)
        whole = observe(optax.chain(inner, scale, *members, optax.scale_by_learning_rate(learning_rate)))
    if freeze_threshold is not None:
        whole = freeze_on_small_gradients(
            whole,
            freeze_threshold,
            decay=freeze_ema_beta,
            min_steps=min_steps_before_freeze,
            max_share=max_share,
            groups=depths,
        )
    waits = inner is None or freeze_threshold is not None

    def init_fn(params: optax.Params) -> Any:
        if depths is not None:
            align(depths, params, "depths")
        return whole.init(params)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        observed: PyTree = True,
        **extra_args: Any,
    ) -> Any:
        loss = number(require(value, "value", "presets.loss_aware"), "value", None)
        grads = jax.tree.leaves(updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(dot(grads, grads, flags_of(observed, updates)))
        # Freezing sees the gradient of a leaf by itself, and would hide one that is not finite from what is inside.
        # From a loss that is not, all of them learn that this is no step.
        loss = jnp.where(finite, loss, jnp.nan)
        moved, after = whole.update(updates, state, params, value=loss, observed=observed, **extra_args)
        moved = jax.tree.map(lambda update: jnp.where(finite, update, jnp.zeros_like(update)), moved)
        return moved, _kept_unless(finite, whole, state, after, updates, waits)

    return transformation(init_fn, update_fn, Rule("presets.loss_aware", inner=(whole,)))


def _shows_rate(scale: Any, learning_rate: float | Schedule) -> Described:
    """``scale_by_feedback`` whose state has the rate as well: that of its steps so far, times the factor."""

    def init_fn(params: optax.Params) -> FeedbackState:
        return scale.init(params)._replace(learning_rate=jnp.zeros((), jnp.float32))

    def update_fn(
        updates: optax.Updates, state: FeedbackState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[Any, FeedbackState]:
        updates, after = scale.update(updates, state, params, **extra_args)
        base = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = jnp.asarray(base, jnp.float32) * after.scale
        shown = jnp.where(after.skipped == state.skipped, rate, state.learning_rate)
        return updates, after._replace(learning_rate=shown)

    return transformation(init_fn, update_fn, scale.rule)


def _kept_unless(
    finite: jax.Array, tx: Any, state: PyTree, after: PyTree, updates: optax.Updates, waits: bool
) -> PyTree:
    """``after`` where the step is finite, else ``state``. The feedback keeps its own, and counts the step.

    Where ``tx`` lets the arrays of a leaf wait by itself (``waits``) they are not chosen again: of a large leaf that is
    frozen this would be a copy in every step.
    """
    if not waits:
        return jax.tree.map(
            lambda new, old: new if isinstance(new, FeedbackState) else jnp.where(finite, new, old),
            after,
            state,
            is_leaf=lambda node: isinstance(node, FeedbackState),
        )
    values, treedef = jax.tree.flatten(state)

    def kept(entry: slots.Entry, new: Any, old: Any) -> Any:
        by_itself = entry.path is not None and jnp.ndim(old) > 0
        counted = any(kind is FeedbackState for kind, _ in entry.trail)
        return new if by_itself or counted else jnp.where(finite, new, old)

    return treedef.unflatten(map(kept, slots.read(tx, state, updates), treedef.flatten_up_to(after), values))
