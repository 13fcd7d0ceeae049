"""SGD and Adam whose rate and momentum follow the loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import PyTree, is_traced
from optax_structure.transforms._extra import Described, Rule, require, transformation
from optax_structure.transforms.feedback._control import (
    DEFAULT_MOMENTUM,
    DEFAULT_RATE,
    Control,
    FeedbackState,
    Numbers,
    check_below_one,
)
from optax_structure.transforms.feedback._control_step import Rate, number, stepped
from optax_structure.transforms.feedback.rules import (
    MOMENTUM_RULES,
    RATE_RULES,
    RuleWeights,
    check_real,
    weighted_rules,
)


class FeedbackSgdState(NamedTuple):
    """State of ``feedback_sgd``.

    Attributes:
      control: the loop's, with ``learning_rate``, ``momentum``, ``scale``, ``lr_weights``, ``momentum_weights``,
        ``skipped``.
      trace: of the structure, shapes and dtypes of params: the gradients summed.
    """

    control: FeedbackState
    trace: PyTree


class FeedbackAdamState(NamedTuple):
    """State of ``feedback_adam``.

    Attributes:
      control: the loop's, as in ``FeedbackSgdState``.
      mu: of the structure, shapes and dtypes of params: the first moment.
      nu: of the structure and shapes of params, real, float32 at least: the second moment. In bfloat16 it would stand
        still where a step changes it by less than 1/256, long before it is what its weight says.
      mu_weight, nu_weight: float32 scalar a leaf: what the moment would be, had all gradients been 1.
    """

    control: FeedbackState
    mu: PyTree
    nu: PyTree
    mu_weight: PyTree
    nu_weight: PyTree


def _loop(
    lr_rules: RuleWeights | None,
    momentum_rules: RuleWeights | None,
    numbers: Numbers,
    learning_rate: Rate,
    name: str,
    momentum: float,
) -> Control:
    """The loop of an optimizer that has a momentum, called ``name``; everything checked."""
    if not callable(learning_rate):
        check_real("learning_rate", learning_rate)
    check_below_one(name, momentum)
    rates = weighted_rules("lr_rules", DEFAULT_RATE if lr_rules is None else lr_rules, RATE_RULES)
    given = DEFAULT_MOMENTUM if momentum_rules is None else momentum_rules
    momenta = weighted_rules("momentum_rules", given, MOMENTUM_RULES)
    loop = Control(rates, momenta, numbers, momentum).check()
    if momenta:
        check_below_one("max_momentum", numbers.max_momentum)
        low, high = numbers.min_momentum, numbers.max_momentum
        if not any(map(is_traced, (low, momentum, high))) and not low <= momentum <= high:
            raise ValueError(
                f"{name}={momentum!r} must lie in [{low}, {high}], from min_momentum to max_momentum, between which "
                "momentum_rules move it: pass other bounds too, or momentum_rules={}."
            )
    return loop


def _rule(name: str, shown: dict[str, Any], loop: Control, moments: str) -> Rule:
    weights = {"lr_rules": loop.rate_rules, "momentum_rules": loop.momentum_rules}
    rules = {argument: {rule.name: rule.weight for rule in of} for argument, of in weights.items()}
    size = 44 + 8 * (len(loop.rate_rules) + len(loop.momentum_rules))
    return Rule(name, {**shown, **rules, **loop.numbers.shown()}, f"{size} B, {moments}")


def feedback_sgd(
    learning_rate: Rate,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    lr_rules: RuleWeights | None = None,
    momentum_rules: RuleWeights | None = None,
    dynamic_weights: bool = True,
    total_steps: int | None = None,
    min_scale: float = 0.1,
    max_scale: float = 3.0,
    smooth: float = 0.98,
    smooth_down: float = 0.5,
    min_momentum: float = 0.5,
    max_momentum: float = 0.98,
    loss: str | None = None,
) -> Described:
    """SGD whose rate and momentum follow the loss.

    The rate is that of ``scale_by_feedback``, whose docstring lists its rules; here ``grad_norm`` always has its
    gradient. The rules of ``momentum_rules`` each say a momentum; the weighted mean, clipped to ``[min_momentum,
    max_momentum]``, is the momentum ``m`` of the step:

    - ``relative``: up while the loss falls, down while it rises (``relative_momentum``).
    - ``inverse``: grows as the loss falls (``inverse_momentum``).
    - ``normalized``: the base momentum plus the relative improvement (``normalized_momentum``).

    The trace is ``v <- m v + (1 - m) / (1 - m0) g`` with the base momentum ``m0``, and the update ``-rate * v``: so a
    changed momentum changes how long the trace remembers, not how far a step goes (in ``v <- m v + g`` a momentum of
    0.98 would go 25 times as far as one of 0.5). Without rules this is ``optax.sgd``.

    The highest rate at which such a trace converges grows with the momentum, as ``(1 + m) / (1 - m)``. So where rules
    control the rate, a momentum below ``m0`` takes the rate down in that proportion: else a loss that rises would lower
    the momentum, and the lower momentum raise the loss.

    A step whose loss or gradient is not finite updates nothing: the update is 0, trace and statistics stay, ``skipped``
    counts it, and a schedule does not go on.

    Args:
      learning_rate: the base rate, >= 0, or a schedule of the steps so far.
      momentum: the base momentum, in [0, 1), within the bounds below where there are rules.
      nesterov: whether the update looks one step ahead.
      lr_rules: see ``scale_by_feedback``; ``{}``: the base rate.
      momentum_rules: rule -> weight >= 0. None: ``{"relative": 0.7, "inverse": 0.3}``; ``{}``: the base momentum.
      dynamic_weights: of the rate's rules, see ``scale_by_feedback``.
      total_steps: see ``scale_by_feedback``.
      min_scale: see ``scale_by_feedback``, as the following.
      max_scale: upper bound of the rate / base rate.
      smooth: of the rate, upwards.
      smooth_down: of the rate, downwards.
      min_momentum: in [0, 1).
      max_momentum: in [0, 1).
      loss: which entry is read where ``value=`` is a mapping.

    Returns:
      An optimizer that reads ``value=`` (the loss), and ``observed=`` where it is passed: which leaves' gradients were
      computed. The others' update is exactly 0, and their trace waits.

    Raises:
      ValueError: for unknown rules, rules that read ``progress`` without ``total_steps``, and numbers out of range; in
        ``update`` for a missing ``value=`` or one that is no scalar.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.feedback_sgd(0.1, total_steps=100)
      >>> params = jnp.array([3.0, -2.0])
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     value, grads = jax.value_and_grad(lambda p: jnp.sum(p**2))(params)
      ...     updates, state = tx.update(grads, state, params, value=value)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(value < 1e-2)
      True
    """
    bounds = (min_scale, max_scale, smooth, smooth_down, min_momentum, max_momentum)
    numbers = Numbers(dynamic_weights, total_steps, *bounds)
    loop = _loop(lr_rules, momentum_rules, numbers, learning_rate, "momentum", momentum)

    def init_fn(params: optax.Params) -> FeedbackSgdState:
        return FeedbackSgdState(loop.init(), jax.tree.map(jnp.zeros_like, params))

    def update_fn(
        updates: optax.Updates,
        state: FeedbackSgdState,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        observed: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FeedbackSgdState]:
        del params, extra_args
        treedef = jax.tree.structure(updates)
        traces = treedef.flatten_up_to(state.trace)
        read = number(require(value, "value", "feedback_sgd"), "value", loss)
        step = stepped(loop, state.control, learning_rate, read, updates, lambda: traces, observed)

        def followed(grad: jax.Array, trace: jax.Array) -> jax.Array:
            if not loop.momentum_rules:
                return grad + momentum * trace
            m = jnp.asarray(step.control.momentum)
            return (1 - m) / (1 - jnp.asarray(momentum, jnp.float32)) * grad + m * trace

        grads = jax.tree.leaves(updates)
        # Chosen first and used from there: of what is overwritten and still read, XLA would make a copy.
        new = [
            jnp.where(move, followed(grad, trace), trace)
            for move, grad, trace in zip(step.moved, grads, traces, strict=True)
        ]
        ways = [followed(grad, trace) for grad, trace in zip(grads, new, strict=True)] if nesterov else new
        kept = [after.astype(before.dtype) for after, before in zip(new, traces, strict=True)]
        return step.applied(updates, ways), FeedbackSgdState(step.control, treedef.unflatten(kept))

    shown = {"learning_rate": learning_rate, "momentum": momentum, "nesterov": nesterov}
    return transformation(init_fn, update_fn, _rule("feedback_sgd", shown, loop, "4 B a parameter"))


def feedback_adam(
    learning_rate: Rate,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    lr_rules: RuleWeights | None = None,
    momentum_rules: RuleWeights | None = None,
    dynamic_weights: bool = True,
    total_steps: int | None = None,
    min_scale: float = 0.1,
    max_scale: float = 3.0,
    smooth: float = 0.98,
    smooth_down: float = 0.5,
    min_momentum: float = 0.5,
    max_momentum: float = 0.98,
    loss: str | None = None,
) -> Described:
    """Adam, or AdamW, whose rate and ``b1`` follow the loss.

    The loop is that of ``feedback_sgd``, with ``b1`` as its momentum ``m``: ``mu <- m mu + (1 - m) g``. The bias
    correction of a decay that changes is no power of it: each leaf keeps ``w <- m w + (1 - m)``, the moment of a
    gradient of 1, by which ``mu`` is divided; so it does for ``b2``. A leaf that is born later, or whose gradient is
    not always computed, is thereby right without a count. ``nu`` is float32 where the params are bfloat16. Without
    rules this is ``optax.adam`` (``optax.adamw``), to rounding.

    A step whose loss or gradient is not finite updates nothing, as in ``feedback_sgd``.

    Args:
      learning_rate: the base rate, >= 0, or a schedule of the steps so far.
      b1: decay of the first moment, in [0, 1), within the bounds of the momentum where there are rules.
      b2: decay of the second moment, in [0, 1).
      eps: >= 0, added to the root of the second moment.
      weight_decay: >= 0, decoupled: the update has ``-rate * weight_decay * params`` in it.
      lr_rules: as in ``feedback_sgd``, as all that follow.
      momentum_rules: for ``b1``.
      dynamic_weights: of the rate's rules.
      total_steps: updates of the whole run.
      min_scale: lower bound of the rate / base rate.
      max_scale: upper bound.
      smooth: of the rate, upwards.
      smooth_down: of the rate, downwards.
      min_momentum: lower bound of ``b1``.
      max_momentum: upper bound.
      loss: which entry is read where ``value=`` is a mapping.

    Returns:
      An optimizer that reads ``value=`` (the loss), and ``observed=`` where it is passed.

    Raises:
      ValueError: as ``feedback_sgd``; in ``update`` for missing params with ``weight_decay``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> tx = oxs.feedback_adam(1e-2, total_steps=1000)
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> updates, state = tx.update(params, tx.init(params), params, value=jnp.asarray(0.7))
      >>> round(float(state.control.scale), 2), round(float(updates["kernel"][0, 0] / state.control.learning_rate), 2)
      (0.1, -1.0)

    References:
      Kingma & Ba, Adam, 2015; Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019.
    """
    check_below_one("b2", b2)
    check_real("eps", eps)
    check_real("weight_decay", weight_decay)
    bounds = (min_scale, max_scale, smooth, smooth_down, min_momentum, max_momentum)
    numbers = Numbers(dynamic_weights, total_steps, *bounds)
    loop = _loop(lr_rules, momentum_rules, numbers, learning_rate, "b1", b1)
    decays = is_traced(weight_decay) or weight_decay > 0

    def init_fn(params: optax.Params) -> FeedbackAdamState:
        def squares(p: jax.Array) -> jax.Array:
            return jnp.zeros(p.shape, jnp.finfo(jnp.promote_types(p.dtype, jnp.float32)).dtype)

        def weights() -> PyTree:
            return jax.tree.map(lambda _: jnp.zeros((), jnp.float32), params)

        mu, nu = (jax.tree.map(zeros, params) for zeros in (jnp.zeros_like, squares))
        return FeedbackAdamState(loop.init(), mu, nu, weights(), weights())

    def direction(mu: jax.Array, nu: jax.Array, mu_weight: jax.Array, nu_weight: jax.Array) -> jax.Array:
        # A weight is 0 where there was no gradient yet, and the moment with it.
        first, second = (jnp.maximum(weight, jnp.finfo(jnp.float32).tiny) for weight in (mu_weight, nu_weight))
        return mu / first / (jnp.sqrt(nu / second) + eps)

    def update_fn(
        updates: optax.Updates,
        state: FeedbackAdamState,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        observed: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FeedbackAdamState]:
        del extra_args
        if decays and params is None:
            raise ValueError(
                f"feedback_adam needs params for {weight_decay=}: call tx.update(grads, state, params, ...)."
            )
        treedef = jax.tree.structure(updates)
        held = list(zip(*(treedef.flatten_up_to(part) for part in state[1:]), strict=True))
        read = number(require(value, "value", "feedback_adam"), "value", loss)
        step = stepped(
            loop, state.control, learning_rate, read, updates, lambda: [direction(*of) for of in held], observed
        )
        m1, m2 = jnp.asarray(step.control.momentum, jnp.float32), jnp.asarray(b2, jnp.float32)

        def followed(grad: jax.Array, moments: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            mu, nu, mu_weight, nu_weight = moments
            square = jnp.square(jnp.abs(grad.astype(jnp.promote_types(grad.dtype, jnp.float32))))
            return (
                m1 * mu + (1 - m1) * grad,
                m2 * nu + (1 - m2) * square,
                m1 * mu_weight + (1 - m1),
                m2 * nu_weight + (1 - m2),
            )

        # As in feedback_sgd: chosen first.
        new = [
            [jnp.where(move, after, before) for after, before in zip(followed(grad, moments), moments, strict=True)]
            for move, grad, moments in zip(step.moved, jax.tree.leaves(updates), held, strict=True)
        ]
        ways = [direction(*of) for of in new]
        if decays:
            ways = [way + weight_decay * p for way, p in zip(ways, treedef.flatten_up_to(params), strict=True)]
        kept = [
            [after.astype(before.dtype) for after, before in zip(*of, strict=True)]
            for of in zip(new, held, strict=True)
        ]
        parts = [treedef.unflatten([of[part] for of in kept]) for part in range(4)]
        return step.applied(updates, ways), FeedbackAdamState(step.control, *parts)

    shown = {"learning_rate": learning_rate, "b1": b1, "b2": b2, "weight_decay": weight_decay}
    return transformation(init_fn, update_fn, _rule("feedback_adam", shown, loop, "8 B a parameter, 8 B a leaf"))
