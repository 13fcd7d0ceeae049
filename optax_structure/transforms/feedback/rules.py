"""Rules of ``scale_by_feedback``, ``feedback_sgd`` and ``feedback_adam``: rate and momentum as the loss has them.

A rule is a pure function ``(signals, memory) -> (answer, memory)`` of scalars. A rule of the rate answers with the
logarithm of a multiplier on the base rate, a rule of the momentum with a momentum. The memory is one float32 number
that begins at 0 and is the rule's own. An answer or a memory that is not finite counts as ``base``, and the memory
stays as it was. For other numbers than the defaults: ``functools.partial(trend_rate, up=0.01)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_structure._tree import is_traced
from optax_structure.transforms._extra import check_number


class FeedbackSignals(NamedTuple):
    """What a rule reads: scalars, float32 unless said otherwise.

    All means are exponential and debiased, as Adam's moments are: fast ones decay by 0.9 a step, slow ones by 0.99.
    What was not passed is NaN.

    Attributes:
      loss: the loss of this step.
      fast: fast mean of the loss, this step included.
      slow: slow mean of the loss, this step included.
      first: the first loss.
      deviation: root of the slow mean of (loss - fast mean before it)^2: noise is in it, a slow fall is not.
      spread: root of the slow mean of (loss - slow mean before it)^2: noise, falls and jumps are in it.
      surprise: (loss - fast mean before it) / deviation before it: 4 is four deviations above what was expected. 0 at
        the first 20 steps, which do not say yet what is usual.
      trend: tanh((slow - fast) / spread), in (-1, 1): above 0 the loss falls. Free of the loss's scale and sign, and
        back at 0 when a fall is over. (By the deviation it would stay near 1 for hundreds of steps after a jump.)
      noise: deviation^2 / (deviation^2 + slow^2), in [0, 1]: the share of noise in the loss.
      grad_norm: norm of this step's raw gradient, over the leaves whose gradient was computed.
      mean_grad_norm: slow mean of the norms before it; at the first step the norm itself.
      alignment: cosine between this step's way down and the one that the last step went, in [-1, 1]: below 0 the last
        step was too long.
      progress: steps so far / ``total_steps``, in [0, 1]; NaN without ``total_steps``.
      count: int32, steps so far, this one included.
      base: the answer that changes nothing: 0 of a rate, the base momentum of a momentum.
      low: lower bound of the blended answers: ``log(min_scale)``, or the lowest momentum.
      high: upper bound.
    """

    loss: jax.Array
    fast: jax.Array
    slow: jax.Array
    first: jax.Array
    deviation: jax.Array
    spread: jax.Array
    surprise: jax.Array
    trend: jax.Array
    noise: jax.Array
    grad_norm: jax.Array
    mean_grad_norm: jax.Array
    alignment: jax.Array
    progress: jax.Array
    count: jax.Array
    base: jax.Array
    low: jax.Array
    high: jax.Array


FeedbackRule = Callable[[FeedbackSignals, jax.Array], tuple[Any, Any]]
"""``(signals, memory) -> (log multiplier or momentum, memory)``, all scalars."""


def _beyond(trend: jax.Array, dead_band: float) -> jax.Array:
    """The part of the trend outside of the dead band, in (-1, 1)."""
    return jnp.sign(trend) * jnp.maximum(jnp.abs(trend) - dead_band, 0.0) / (1.0 - dead_band)


def trend_rate(
    signals: FeedbackSignals,
    memory: jax.Array,
    *,
    up: float = 0.02,
    down: float = 0.02,
    dead_band: float = 0.5,
    jump: float = 1.0,
    threshold: float = 4.0,
) -> tuple[jax.Array, jax.Array]:
    """Raise the rate while the loss falls, lower it while it rises: the rule ``"trend"``.

    The memory is the log multiplier. A step adds ``up * z`` while the loss falls and takes ``down * |z|`` while it
    rises, ``z`` being what the trend has beyond ``dead_band``: within it is the noise of a flat loss, which so moves
    nothing. A loss more than ``threshold`` deviations above its fast mean takes off up to ``jump`` at once, for a step
    that was too long shows in the loss of the next one; only a loss that falls brings it back. The memory stays within
    the bounds of the scale.

    Args:
      signals: what was observed.
      memory: the log multiplier so far.
      up: log units a step, >= 0.
      down: the same downwards. Above ``up`` the rate falls wherever the loss is flat and noisy, as on a plateau.
      dead_band: in [0, 1).
      jump: log units, >= 0; 0 for none.
      threshold: deviations.

    Returns:
      The log multiplier, twice.

    Example:
      >>> import functools, optax_structure as oxs
      >>> eager = functools.partial(oxs.trend_rate, up=0.05)
      >>> tx = oxs.scale_by_feedback(lr_rules={eager: 0.7, "variance": 0.3})
    """
    z = _beyond(signals.trend, dead_band)
    memory = memory + jnp.where(z > 0, up, down) * z - jump * jnp.clip(signals.surprise - threshold, 0.0, 1.0)
    memory = jnp.clip(memory, signals.low, signals.high)
    return memory, memory


def variance_rate(signals: FeedbackSignals, memory: jax.Array, *, strength: float = 5.0) -> tuple[jax.Array, jax.Array]:
    """Lower the rate where the loss is noisy: the rule ``"variance"``, ``-log(1 + strength * noise)``.

    Nothing accumulates: the rate is back when the noise is gone. A standard deviation of 50 % halves it. The original
    divides by the variance relative to the squared mean, which has no bound as a loss nears 0; here the divisor is at
    most ``1 + strength``.

    Args:
      signals: what was observed.
      memory: not used.
      strength: >= 0.

    Returns:
      The log multiplier, and the memory as it was.

    Example:
      >>> import functools, optax_structure as oxs
      >>> tx = oxs.scale_by_feedback(lr_rules={functools.partial(oxs.variance_rate, strength=2.0): 1.0})
    """
    return -jnp.log1p(strength * signals.noise), memory


def grad_norm_rate(signals: FeedbackSignals, memory: jax.Array, *, limit: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Lower the rate where the gradient is longer than usual: the rule ``"grad_norm"``, ``-log(norm / mean norm)``.

    Args:
      signals: what was observed.
      memory: not used.
      limit: the answer lies in [-limit, limit].

    Returns:
      The log multiplier, and the memory as it was; 0 where no gradient was computed.

    Example:
      >>> import functools, optax_structure as oxs
      >>> tx = oxs.feedback_sgd(0.1, lr_rules={functools.partial(oxs.grad_norm_rate, limit=0.5): 1.0})
    """
    known = (signals.grad_norm > 0) & (signals.mean_grad_norm > 0)
    ratio = jnp.where(known, signals.grad_norm, 1.0) / jnp.where(known, signals.mean_grad_norm, 1.0)
    return -jnp.clip(jnp.log(ratio), -limit, limit), memory


def cyclical_rate(
    signals: FeedbackSignals,
    memory: jax.Array,
    *,
    period: float = 200.0,
    growth: float = 2.0,
    floor: float = 0.1,
    decay: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Let the rate fall along half a cosine, again and again: the rule ``"cyclical"``. It does not read the loss.

    Within a cycle of ``T`` steps the multiplier is ``floor + (1 - floor) (1 + cos(pi t / T)) / 2``. The first cycle has
    ``period`` steps, each later one ``growth`` times as many, and begins ``decay`` times as high.

    Args:
      signals: what was observed.
      memory: not used.
      period: steps of the first cycle, >= 1.
      growth: >= 1.
      floor: in (0, 1].
      decay: in (0, 1].

    Returns:
      The log multiplier, and the memory as it was.

    References:
      Loshchilov & Hutter, SGDR, 2017.

    Example:
      >>> import functools, optax_structure as oxs
      >>> tx = oxs.scale_by_feedback(lr_rules={functools.partial(oxs.cyclical_rate, period=500.0, growth=1.0): 1.0})
    """
    periods = (signals.count - 1).astype(jnp.float32) / period
    if growth == 1:
        cycle = jnp.floor(periods)
        within = periods - cycle
    else:
        # From periods = (growth^cycle - 1) / (growth - 1); the margin covers the rounding of a cycle's first step.
        cycle = jnp.floor(jnp.log1p(periods * (growth - 1)) / jnp.log(jnp.float32(growth)) + 1e-5)
        length = jnp.float32(growth) ** cycle
        within = jnp.clip((periods - (length - 1) / (growth - 1)) / length, 0.0, 1.0)
    height = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * within))
    return jnp.log(height) + cycle * jnp.log(jnp.float32(decay)), memory


def hypergradient_rate(
    signals: FeedbackSignals, memory: jax.Array, *, step: float = 0.02
) -> tuple[jax.Array, jax.Array]:
    """Raise the rate while successive steps agree, lower it while they turn back: the rule ``"hypergradient"``.

    The derivative of the loss by the rate is minus the product of this gradient and the last step. The memory, the log
    multiplier, moves along it: by ``step`` times the cosine of the two, which makes it free of their lengths.

    Args:
      signals: what was observed.
      memory: the log multiplier so far.
      step: log units, >= 0.

    Returns:
      The log multiplier, twice.

    References:
      Baydin et al., Online Learning Rate Adaptation with Hypergradient Descent, 2018.

    Example:
      >>> import functools, optax_structure as oxs
      >>> tx = oxs.feedback_sgd(0.1, lr_rules={functools.partial(oxs.hypergradient_rate, step=0.01): 1.0})
    """
    memory = jnp.clip(memory + step * signals.alignment, signals.low, signals.high)
    return memory, memory


def relative_momentum(
    signals: FeedbackSignals, memory: jax.Array, *, step: float = 0.005, dead_band: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    """Raise the momentum while the loss falls, lower it while it rises: the rule ``"relative"``.

    The memory is the distance from the base momentum. A step adds ``step`` times what the trend has beyond
    ``dead_band``.

    Args:
      signals: what was observed.
      memory: momentum so far - base momentum.
      step: >= 0.
      dead_band: in [0, 1).

    Returns:
      The momentum, and its distance from the base.

    Example:
      >>> import functools, optax_structure as oxs
      >>> tx = oxs.feedback_sgd(0.1, momentum_rules={functools.partial(oxs.relative_momentum, step=0.01): 1.0})
    """
    momentum = signals.base + memory + step * _beyond(signals.trend, dead_band)
    momentum = jnp.clip(momentum, signals.low, signals.high)
    return momentum, momentum - signals.base


def inverse_momentum(
    signals: FeedbackSignals, memory: jax.Array, *, tolerance: float = 3.0
) -> tuple[jax.Array, jax.Array]:
    """Let the momentum grow as the loss falls: the rule ``"inverse"``.

    With the share ``r`` that is left of the first loss, ``x = 2 / (1 + r) - 1`` goes from 1 at a loss of 0 through 0
    at the first loss to -1. The momentum goes with it: from the upper bound through the base momentum to the lower
    bound. ``r = fast / first``, with ``fast`` taken to be nearer to ``first`` by ``tolerance`` deviations of the loss,
    for the first loss is one noisy number. Where it is not above 0 its share means nothing: there the base momentum
    stays. The original says that the momentum grows as the loss falls, and its formula ``1 - 1 / (1 + loss)`` does the
    opposite; this does what it says.

    Args:
      signals: what was observed.
      memory: not used.
      tolerance: deviations, >= 0.

    Returns:
      The momentum, and the memory as it was.

    Example:
      >>> import functools, optax_structure as oxs
      >>> tx = oxs.feedback_sgd(0.1, momentum_rules={functools.partial(oxs.inverse_momentum, tolerance=1.0): 1.0})
    """
    positive = signals.first > 0
    change = jnp.maximum(signals.fast, 0.0) - signals.first
    change = jnp.sign(change) * jnp.maximum(jnp.abs(change) - tolerance * signals.deviation, 0.0)
    left = 1.0 + jnp.where(positive, change / jnp.where(positive, signals.first, 1.0), 0.0)
    x = 2.0 / (1.0 + left) - 1.0
    return signals.base + x * jnp.where(x > 0, signals.high - signals.base, signals.base - signals.low), memory


def normalized_momentum(signals: FeedbackSignals, memory: jax.Array, *, gain: float = 0.5) -> tuple[Any, jax.Array]:
    """The base momentum plus the relative improvement: the rule ``"normalized"``, ``base + gain (slow - fast)/|slow|``.

    A loss about 0 is measured by its deviation where that is larger.

    Args:
      signals: what was observed.
      memory: not used.
      gain: >= 0.

    Returns:
      The momentum, and the memory as it was.

    Example:
      >>> import functools, optax_structure as oxs
      >>> tx = oxs.feedback_sgd(0.1, momentum_rules={functools.partial(oxs.normalized_momentum, gain=1.0): 1.0})
    """
    size = jnp.maximum(jnp.abs(signals.slow), signals.deviation)
    return signals.base + gain * (signals.slow - signals.fast) / jnp.maximum(size, 1e-30), memory


RuleWeights = Mapping[str | FeedbackRule, float]
"""Rule (its name, or a function) -> weight."""

RATE_RULES: Mapping[str, FeedbackRule] = {
    "trend": trend_rate,
    "variance": variance_rate,
    "grad_norm": grad_norm_rate,
    "cyclical": cyclical_rate,
    "hypergradient": hypergradient_rate,
}
MOMENTUM_RULES: Mapping[str, FeedbackRule] = {
    "relative": relative_momentum,
    "inverse": inverse_momentum,
    "normalized": normalized_momentum,
}


class WeightedRule(NamedTuple):
    """A rule with its name in the state, its weight, and the signals that it reads."""

    name: str
    rule: FeedbackRule
    weight: float
    reads: frozenset[str]


def check_real(name: str, value: Any, *, low: float = 0.0, high: float = math.inf) -> None:
    """``check_number`` that names what is no number at all as well."""
    if not is_traced(value):
        try:
            float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}={value!r} must be a number.") from error
    check_number(name, value, low=low, high=high)


def bare(rule: Any) -> Any:
    """The function within ``functools.partial``."""
    while hasattr(rule, "func"):
        rule = rule.func
    return rule


def _reads(rule: FeedbackRule, name: str) -> frozenset[str]:
    """The signals that a rule reads, found by tracing it; raises where it does not answer as a rule must."""
    number: Any = jax.ShapeDtypeStruct((), jnp.float32)
    integer: Any = jax.ShapeDtypeStruct((), jnp.int32)
    signals: Any = FeedbackSignals(*[integer if field == "count" else number for field in FeedbackSignals._fields])
    traced, said = jax.make_jaxpr(rule, return_shape=True)(signals, number)
    if not (isinstance(said, tuple) and len(said) == 2 and all(getattr(part, "shape", None) == () for part in said)):
        raise ValueError(f"{name} must return two scalars, its answer and its memory; it returns {said}.")
    used = {id(variable) for equation in traced.jaxpr.eqns for variable in equation.invars}
    used |= {id(variable) for variable in traced.jaxpr.outvars}
    named = zip(FeedbackSignals._fields, traced.jaxpr.invars[:-1], strict=True)
    return frozenset(field for field, variable in named if id(variable) in used)


def weighted_rules(argument: str, given: RuleWeights, known: Mapping[str, FeedbackRule]) -> tuple[WeightedRule, ...]:
    """The rules of a mapping, checked."""
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{argument}={given!r} must be a mapping of rules to weights, such as {{{min(known)!r}: 1.0}}."
        )
    found: dict[str, WeightedRule] = {}
    for key, weight in given.items():
        if isinstance(key, str) and key not in known:
            raise ValueError(
                f"{argument} names the rule {key!r}; the rules are {sorted(known)}, and any function "
                "(signals, memory) -> (answer, memory)."
            )
        rule = known[key] if isinstance(key, str) else key
        if not callable(rule):
            raise ValueError(f"{argument} holds {key!r}, which is neither the name of a rule nor a function.")
        check_real(f"{argument}[{key!r}]", weight, high=1e6)
        name = base = key if isinstance(key, str) else getattr(bare(rule), "__name__", type(rule).__name__)
        while name in found:  # another partial of the same function
            name = f"{base}_{len(found) + 1}"
        reads = _reads(rule, f"{argument}[{key!r}]")
        # A rule that counts nothing asks for nothing: what it says of signals that are not there is left out.
        counts = is_traced(weight) or weight > 0
        found[name] = WeightedRule(name, rule, weight, reads if counts else frozenset())
    weights = [rule.weight for rule in found.values()]
    if weights and not any(is_traced(weight) or weight > 0 for weight in weights):
        raise ValueError(f"{argument}={dict(given)!r} must give at least one rule a weight above 0.")
    return tuple(found.values())
