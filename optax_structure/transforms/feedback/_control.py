"""The loop behind ``scale_by_feedback``, ``feedback_sgd`` and ``feedback_adam``: loss in, scale and momentum out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import PyTree, is_traced
from optax_structure.transforms.feedback import rules
from optax_structure.transforms.feedback.rules import FeedbackSignals, RuleWeights, WeightedRule, bare, check_real

DEFAULT_RATE: RuleWeights = {"trend": 0.6, "variance": 0.3, "grad_norm": 0.1}
DEFAULT_MOMENTUM: RuleWeights = {"relative": 0.7, "inverse": 0.3}

# When in training a rule counts, of the progress p: the Bernstein polynomials of degree 2. One's own counts always.
_EARLY, _MIDDLE, _LATE = (lambda p: (1 - p) ** 2), (lambda p: 2 * p * (1 - p)), (lambda p: p**2)
_TIMETABLE: Mapping[Any, Callable[[Any], Any]] = {
    rules.variance_rate: _EARLY,
    rules.grad_norm_rate: _EARLY,
    rules.trend_rate: _MIDDLE,
    rules.hypergradient_rate: _MIDDLE,
    rules.cyclical_rate: _LATE,
}
_FLOOR = 0.05
_FAST, _SLOW = 0.9, 0.99
_USUAL = 20
"""Steps before it is known what loss is usual: of fewer, a deviation is too often far too small."""


class LastUpdate(NamedTuple):
    """The update of the step before, for rules that read ``alignment``.

    Attributes:
      update: float32, of the structure of params.
      side: float32, mean cosine of update and gradient: above 0 the update is still to be turned round.
    """

    update: PyTree
    side: Any
    serves_all_ages = True


class FeedbackState(NamedTuple):
    """What the loop remembers: scalars of the whole network, which growth and relabelling leave alone.

    A number that is to be found again in another wrapping (by ``transfer_state``) needs a name of its own: so the keys
    of all dicts say the field as well, ``lr_weights/trend``. With ``per_label=True`` each field is a dict, and its keys
    end with the label: ``scale/new``, ``lr_weights/trend/new``.

    Attributes:
      count: int32, steps so far whose loss and gradient were finite.
      skipped: int32, the others.
      first, fast, slow: float32, see ``FeedbackSignals``.
      deviation_squared, spread_squared: float32, of ``deviation`` and ``spread`` there.
      mean_grad_norm: float32, slow mean of the norms, the last included; 0 before the first.
      scale: float32, the multiplier of the base rate at the last step.
      lr_memory, momentum_memory: float32, what each rule keeps.
      lr_weights, momentum_weights: float32, what each rule counted at the last step; they add up to 1.
      learning_rate, momentum: float32, those of the last step; None where there is no such thing.
      last: ``LastUpdate``; None where no rule needs one.
    """

    count: Any
    skipped: Any
    first: Any
    fast: Any
    slow: Any
    deviation_squared: Any
    spread_squared: Any
    mean_grad_norm: Any
    scale: Any
    lr_memory: dict[str, jax.Array]
    momentum_memory: dict[str, jax.Array]
    lr_weights: dict[str, jax.Array]
    momentum_weights: dict[str, jax.Array]
    learning_rate: Any = None
    momentum: Any = None
    last: LastUpdate | None = None
    serves_all_ages = True


class Numbers(NamedTuple):
    """The numbers of a loop, as the factories take them."""

    dynamic_weights: bool
    total_steps: int | None
    min_scale: float
    max_scale: float
    smooth: float
    smooth_down: float
    min_momentum: float = 0.0
    max_momentum: float = 1.0

    def check(self) -> Numbers:
        """Raise ``ValueError`` for numbers out of range or order."""
        steps = self.total_steps
        whole = isinstance(steps, int) or jnp.issubdtype(getattr(steps, "dtype", np.dtype(bool)), jnp.integer)
        if steps is not None and not is_traced(steps) and (isinstance(steps, bool) or not whole or steps < 1):
            raise ValueError(f"total_steps={steps!r} must be an int >= 1, or None for weights that do not change.")
        check_real("min_scale", self.min_scale, low=1e-30, high=1e30)
        check_real("max_scale", self.max_scale, low=1e-30 if is_traced(self.min_scale) else self.min_scale, high=1e30)
        check_real("min_momentum", self.min_momentum, high=1.0)
        low = 0.0 if is_traced(self.min_momentum) else self.min_momentum
        check_real("max_momentum", self.max_momentum, low=low, high=1.0)
        check_below_one("smooth", self.smooth)
        check_below_one("smooth_down", self.smooth_down)
        return self

    def shown(self) -> dict[str, Any]:
        """Those that a reader wants to see."""
        return {"total_steps": self.total_steps, "min_scale": self.min_scale, "max_scale": self.max_scale}


def check_below_one(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``0 <= value < 1``."""
    check_real(name, value, high=1.0)
    if not is_traced(value) and value == 1:
        raise ValueError(f"{name}={value!r} must be below 1: at 1 nothing ever changes.")


class Control(NamedTuple):
    """A loop.

    Attributes:
      rate_rules, momentum_rules: none: that part stays as it is.
      numbers: their numbers.
      momentum: the base momentum; None where there is none.
      optional: rules of the rate that are left out where no norm of the gradient is passed.
    """

    rate_rules: tuple[WeightedRule, ...]
    momentum_rules: tuple[WeightedRule, ...]
    numbers: Numbers
    momentum: float | None = None
    optional: frozenset[str] = frozenset()

    def reading(self, *signals: str) -> list[str]:
        """The rules that read one of the signals and cannot be left out."""
        each = self.rate_rules + self.momentum_rules
        return [rule.name for rule in each if rule.reads & set(signals) and rule.name not in self.optional]

    def check(self) -> Control:
        """Raise ``ValueError`` for numbers out of range or order, and rules that read what is never there."""
        self.numbers.check()
        if self.numbers.total_steps is None and (blind := self.reading("progress")):
            raise ValueError(f"total_steps=None says no progress, and the rules {blind} read it: pass total_steps=....")
        return self

    def init(self) -> FeedbackState:
        """The state before the first step. An array for each: a state that is donated may not hold one twice."""

        def number(value: Any = 0.0) -> jax.Array:
            return jnp.array(value, jnp.float32)

        return FeedbackState(
            count=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            first=number(),
            fast=number(),
            slow=number(),
            deviation_squared=number(),
            spread_squared=number(),
            mean_grad_norm=number(),
            # From below: the loop has to see the loss react before the rate is where it may be too high.
            scale=number(self.numbers.min_scale if self.rate_rules else 1.0),
            lr_memory={f"lr_memory/{rule.name}": number() for rule in self.rate_rules},
            momentum_memory={f"momentum_memory/{rule.name}": number() for rule in self.momentum_rules},
            lr_weights={f"lr_weights/{rule.name}": number() for rule in self.rate_rules},
            momentum_weights={f"momentum_weights/{rule.name}": number() for rule in self.momentum_rules},
            learning_rate=None if self.momentum is None else number(),
            momentum=None if self.momentum is None else number(self.momentum),
        )

    def advance(
        self, state: FeedbackState, loss: jax.Array, grad_norm: jax.Array | None, alignment: jax.Array | None
    ) -> tuple[jax.Array, FeedbackState]:
        """One step: whether it is a step (bool: loss and norm are finite), and the state after it. All are scalars."""
        after, signals = _observe(state, loss, grad_norm, alignment, self.numbers.total_steps)
        # Finite losses too far apart have no finite mean, and one that is infinite would never come back.
        finite = jnp.isfinite(loss) & jnp.isfinite(after.fast) & jnp.isfinite(after.slow)
        finite = finite if grad_norm is None else finite & jnp.isfinite(grad_norm)
        if self.momentum_rules:
            after = self._with_momentum(after, signals)
        if self.rate_rules:
            present = [r for r in self.rate_rules if grad_norm is not None or r.name not in self.optional]
            after = self._with_scale(after, signals, present)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return finite, kept._replace(skipped=jnp.where(finite, state.skipped, _next(state.skipped)))

    def _with_momentum(self, state: FeedbackState, signals: FeedbackSignals) -> FeedbackState:
        bounds = (self.momentum, self.numbers.min_momentum, self.numbers.max_momentum)
        base, low, high = (jnp.asarray(bound, jnp.float32) for bound in bounds)
        weights = _normalised({rule.name: rule.weight for rule in self.momentum_rules})
        signals = signals._replace(base=base, low=low, high=high)
        said, memory = _blend(self.momentum_rules, weights, signals, "momentum_memory", state.momentum_memory)
        return state._replace(
            momentum=jnp.clip(said, low, high),
            momentum_memory=memory,
            momentum_weights=_keyed("momentum_weights", weights),
        )

    def _with_scale(
        self, state: FeedbackState, signals: FeedbackSignals, present: Sequence[WeightedRule]
    ) -> FeedbackState:
        low, high = (jnp.log(jnp.asarray(b, jnp.float32)) for b in (self.numbers.min_scale, self.numbers.max_scale))
        weights = self._weights(present, signals.progress)
        signals = signals._replace(base=jnp.zeros((), jnp.float32), low=low, high=high)
        said, memory = _blend(present, weights, signals, "lr_memory", state.lr_memory)
        goal, before = jnp.clip(said, low, high), jnp.log(state.scale)
        if self.momentum_rules:
            # With less momentum the same rate may no longer converge, and the loss would rise, and the momentum fall.
            goal = goal + jnp.minimum(_steadiness(state.momentum) - _steadiness(self.momentum), 0.0)
        keep = jnp.where(goal > before, self.numbers.smooth, self.numbers.smooth_down).astype(jnp.float32)
        left_out = {rule.name: jnp.zeros((), jnp.float32) for rule in self.rate_rules}
        return state._replace(
            scale=jnp.exp(before + (1 - keep) * (goal - before)),
            lr_memory=state.lr_memory | memory,
            lr_weights=_keyed("lr_weights", left_out | weights),
        )

    def _weights(self, present: Sequence[WeightedRule], progress: jax.Array) -> dict[str, jax.Array]:
        weights: dict[str, Any] = {rule.name: rule.weight for rule in present}
        if self.numbers.dynamic_weights and self.numbers.total_steps is not None:
            for rule in present:
                share = _TIMETABLE.get(bare(rule.rule), lambda p: 1 / 3)(progress)
                weights[rule.name] = weights[rule.name] * (share + _FLOOR)
        return _normalised(weights)


def _steadiness(momentum: Any) -> jax.Array:
    """Log of the highest rate at which a mean of gradients converges, but for a constant: ``(1 + m) / (1 - m)``."""
    momentum = jnp.asarray(momentum, jnp.float32)
    return jnp.log1p(momentum) - jnp.log1p(-momentum)


def _next(count: jax.Array) -> jax.Array:
    return jnp.asarray(optax.safe_increment(count), jnp.int32)


def _observe(
    state: FeedbackState, loss: Any, grad_norm: Any, alignment: Any, total_steps: int | None
) -> tuple[FeedbackState, FeedbackSignals]:
    """The statistics after a step, and the signals read from them; bounds are not known here."""
    count = _next(state.count)
    steps, is_first = count.astype(jnp.float32), count == 1
    new, late = _share(_SLOW, steps), _share(_SLOW, steps - 1)  # the first loss has nothing to differ from
    fast = state.fast + _share(_FAST, steps) * (loss - state.fast)
    slow = state.slow + new * (loss - state.slow)
    # No square is infinite: an infinite mean would never come back.
    from_fast, from_slow = (
        jnp.where(is_first, 0.0, jnp.clip(loss - mean, -1e18, 1e18)) for mean in (state.fast, state.slow)
    )
    variance = state.deviation_squared + late * (from_fast**2 - state.deviation_squared)
    spread = state.spread_squared + late * (from_slow**2 - state.spread_squared)
    unknown = jnp.full((), jnp.nan, jnp.float32)
    norm, mean_norm, mean_norm_after = unknown, unknown, state.mean_grad_norm
    if grad_norm is not None:
        norm, mean_norm = grad_norm, jnp.where(state.mean_grad_norm > 0, state.mean_grad_norm, grad_norm)
        # A norm of exactly 0 says that no gradient was computed: the mean waits.
        mean_norm_after = jnp.where(norm > 0, mean_norm + new * (norm - mean_norm), state.mean_grad_norm)
    after = state._replace(
        count=count,
        first=jnp.where(is_first, loss, state.first),
        fast=fast,
        slow=slow,
        deviation_squared=variance,
        spread_squared=spread,
        mean_grad_norm=mean_norm_after,
    )
    return after, FeedbackSignals(
        loss=loss,
        fast=fast,
        slow=slow,
        first=after.first,
        deviation=jnp.sqrt(variance),
        spread=jnp.sqrt(spread),
        surprise=jnp.where(count > _USUAL, ratio(from_fast, jnp.sqrt(state.deviation_squared)), 0.0),
        trend=jnp.tanh(ratio(slow - fast, jnp.sqrt(spread))),
        noise=ratio(variance, variance + slow**2),
        grad_norm=norm,
        mean_grad_norm=mean_norm,
        alignment=unknown if alignment is None else alignment,
        progress=unknown if total_steps is None else jnp.clip(steps / total_steps, 0.0, 1.0).astype(jnp.float32),
        count=count,
        base=unknown,
        low=unknown,
        high=unknown,
    )


def _share(decay: float, steps: jax.Array) -> jax.Array:
    """What the newest counts in a debiased mean of ``steps`` values: all of it at first, ``1 - decay`` in the end."""
    return jnp.where(steps > 1, (1 - decay) / (1 - jnp.float32(decay) ** jnp.maximum(steps, 1)), 1).astype(jnp.float32)


def ratio(above: jax.Array, below: jax.Array) -> jax.Array:
    """``above / below``; 0 where there is nothing to compare with."""
    return jnp.where(below > 0, above / jnp.where(below > 0, below, 1.0), 0.0)


def _normalised(weights: Mapping[str, Any]) -> dict[str, jax.Array]:
    each = {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}
    total = sum(each.values())
    return {name: weight / total for name, weight in each.items()}


def _keyed(field: str, by_rule: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What a field of the state holds of each rule: see ``FeedbackState``."""
    return {f"{field}/{rule}": value for rule, value in by_rule.items()}


def _blend(
    present: Sequence[WeightedRule],
    weights: Mapping[str, jax.Array],
    signals: FeedbackSignals,
    field: str,
    memory: Mapping[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted mean of what the rules say, and what they keep in ``field``.

    An answer that is not finite changes nothing, and neither does what came with it: either would stay for good.
    """
    said, kept = jnp.zeros((), jnp.float32), {}
    for rule in present:
        before = memory[f"{field}/{rule.name}"]
        answer, after = (jnp.asarray(each, jnp.float32) for each in rule.rule(signals, before))
        sound = jnp.isfinite(answer) & jnp.isfinite(after)
        said = said + weights[rule.name] * jnp.where(sound, answer, signals.base)
        kept[rule.name] = jnp.where(sound, after, before)
    return said, _keyed(field, kept)
