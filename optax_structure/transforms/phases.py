"""One rate for all leaves, by the phase that training is in: read from the loss, or from the share of extreme units."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import PyTree, is_traced
from optax_structure.extrema import Extrema
from optax_structure.transforms._extra import Rule, check_number, check_schedule, require
from optax_structure.transforms._multiplier import Factors, Multiplier, every_leaf, multiplier


def _everywhere(updates: optax.Updates, factor: jax.Array) -> Factors:
    """One factor for every leaf."""
    return every_leaf(updates, jax.tree.map(lambda _: 0, updates), of=lambda _: factor)


def _check_scales(scales: Sequence[float], phases: int | None = None) -> None:
    if not isinstance(scales, Sequence) or len(scales) != (phases or len(scales)) or not len(scales):
        raise ValueError(f"scales={scales!r} must be {phases or 'one or more'} numbers, one a phase.")
    for phase, scale in enumerate(scales):
        check_number(f"scales[{phase}]", scale)


def _extreme_share(extrema: Extrema) -> jax.Array | None:
    """The share of all units that are dead or saturated, float32; None where there is no unit."""
    extreme, units = jnp.zeros((), jnp.float32), 0
    for layer in {**extrema.dead, **extrema.saturated}:
        # extrema_rule takes a nearness in [0, 1] in place of a bool: a unit that is merely near is not extreme.
        sites = [of[layer] >= 1 for of in (extrema.dead, extrema.saturated) if layer in of]
        extreme, units = extreme + jnp.sum(functools.reduce(jnp.logical_or, sites)), units + sites[0].size
    return extreme / units if units else None


class ExtremaPhaseState(NamedTuple):
    """State of ``scale_by_extrema_phase``: scalars of the whole network, which growth and relabelling leave alone.

    Attributes:
      phase: int32, 0 explosive, 1 steady, 2 refinement.
      seen: bool, whether there was a reading.
      share: float32, the extreme units among all units at the last reading.
    """

    phase: jax.Array
    seen: jax.Array
    share: jax.Array
    serves_all_ages = True


def scale_by_extrema_phase(
    *,
    explosive: float = 0.1,
    steady: float = 0.01,
    scales: Sequence[float] = (1.0, 0.1, 0.01),
    hysteresis: float = 0.2,
) -> Multiplier:
    """Multiply every update by the scale of a phase that the share of extreme units decides.

    With ``r`` = units that are dead or saturated / all units, over all layers of ``extrema=``: explosive where
    ``r > explosive``, steady where ``r > steady``, refinement below. Upwards a phase is left at these thresholds,
    downwards later: a phase is kept while ``r > threshold * (1 - hysteresis)``, so that a share that wavers about a
    threshold does not switch the rate at every update. The first reading is judged without hysteresis.

    The phase acts on the update of its own step. ``extrema=`` has to be passed at every update: pass the last one
    again between two measurements. A network without extreme units is in refinement from its first step on: choose the
    base rate, or ``scales``, with that in mind. An ``Extrema`` without a layer changes nothing.

    The original keeps no hysteresis (``hysteresis=0`` is its rule exactly), and begins at ``steady`` until it is given
    a network; here too the state begins there, but the first update already has its reading.

    Args:
      explosive: share above which many units are extreme, in [0, 1].
      steady: share above which some are, in [0, ``explosive``].
      scales: factors >= 0 of explosive, steady and refinement.
      hysteresis: in [0, 1), how far below a threshold, relative to it, the share must fall.

    Returns:
      A transformation whose state is three scalars. It reads ``extrema=`` (an ``Extrema``).

    Raises:
      ValueError: for numbers out of range or order; in ``update`` for missing ``extrema=``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> tx = oxs.scale_by_extrema_phase()
      >>> state, factors = tx.init(jnp.ones(())), []
      >>> for dead in (0, 20, 9, 8, 1):
      ...     extrema = oxs.Extrema({"hidden": jnp.arange(100) < dead}, {"hidden": jnp.zeros(100, bool)})
      ...     update, state = tx.update(jnp.ones(()), state, extrema=extrema)
      ...     factors.append(round(float(update), 3))
      >>> factors
      [0.01, 1.0, 1.0, 0.1, 0.1]
    """
    check_number("explosive", explosive, high=1.0)
    check_number("steady", steady, high=1.0 if is_traced(explosive) else float(explosive))
    check_number("hysteresis", hysteresis, high=1.0)
    if not is_traced(hysteresis) and hysteresis == 1:
        raise ValueError(f"hysteresis={hysteresis!r} must be below 1: at 1 no phase is left downwards.")
    _check_scales(scales, 3)

    def init_fn(params: optax.Params) -> ExtremaPhaseState:
        del params
        return ExtremaPhaseState(jnp.ones((), jnp.int32), jnp.zeros((), bool), jnp.zeros((), jnp.float32))

    def factors_fn(
        updates: optax.Updates,
        state: ExtremaPhaseState,
        params: optax.Params | None = None,
        *,
        extrema: Extrema | None = None,
        **extra_args: Any,
    ) -> tuple[Factors, ExtremaPhaseState]:
        del params, extra_args
        share = _extreme_share(require(extrema, "extrema", "scale_by_extrema_phase"))
        if share is not None:
            before = jnp.where(state.seen, state.phase, 2)  # from the lowest phase, no threshold is lowered
            is_explosive = share > explosive * jnp.where(before == 0, 1 - hysteresis, 1.0)
            is_steady = share > steady * jnp.where(before <= 1, 1 - hysteresis, 1.0)
            phase = jnp.where(is_explosive, 0, jnp.where(is_steady, 1, 2)).astype(jnp.int32)
            state = ExtremaPhaseState(phase, jnp.ones((), bool), share)
        return _everywhere(updates, jnp.asarray(scales, jnp.float32)[state.phase]), state

    numbers = {"explosive": explosive, "steady": steady, "scales": tuple(scales), "hysteresis": hysteresis}
    return multiplier(init_fn, factors_fn, Rule("scale_by_extrema_phase", numbers, "9 B"))


class PhaseSignals(NamedTuple):
    """What a phase rule of ``scale_by_loss_phase`` reads: scalars of the whole network.

    A signal that was not passed is NaN, of which every comparison is false.

    Attributes:
      improvement: float32, how much the loss fell within the window, relative to where it was: with a window of 5
        observations, (mean of the first 2 - mean of the last 3) / abs(mean of the first 2). Negative where it rose.
      gradient_noise: float32, variance of the gradient's norm within the window / its squared mean; of ``grads=``.
      extrema_share: float32, units that are dead or saturated / all units; of ``extrema=``, as last passed.
      observations: int32, how many there were, those before the window included.
    """

    improvement: jax.Array
    gradient_noise: jax.Array
    extrema_share: jax.Array
    observations: jax.Array


PhaseRule = Callable[[PhaseSignals, jax.Array], Any]
"""``(signals, phase so far) -> phase``, both int32 scalars: an index into the scales."""


def loss_phase(
    signals: PhaseSignals,
    phase: jax.Array,
    *,
    thresholds: Sequence[float] = (0.01, 0.005, 0.0025),
    noisy: float = 1.0,
    extreme: float = 0.1,
) -> jax.Array:
    """The phase rule that ``scale_by_loss_phase`` uses by itself; a pattern for one's own.

    By the loss: 0 exploration where ``improvement > 0.01``, 1 exploitation where ``> 0.005``, 2 refinement where
    ``> 0.0025``, else 3 plateau. The other signals only hold it back: while the norm of the gradient is noisy
    (``gradient_noise > noisy``: its standard deviation is above its mean) or many units are extreme
    (``extrema_share > extreme``), a loss that does not fall is no sign of convergence, and the phase goes no further
    than exploitation. Signals that are not passed hold nothing back.

    The original sorts otherwise below 0.005: it takes an improvement of 0.0025 to 0.005 for a plateau and a flat loss
    for refinement, so that the rate rises as the loss flattens. Here the phase is monotone in the improvement.

    Args:
      signals: what was observed.
      phase: the phase so far, int32 scalar; not read here.
      thresholds: falling; ``k`` of them make ``k + 1`` phases.
      noisy: relative variance of the gradient's norm, >= 0.
      extreme: share of units, in [0, 1].

    Returns:
      The phase, int32 scalar.

    Raises:
      ValueError: for thresholds that do not fall and for numbers out of range.

    Example:
      >>> import functools, jax.numpy as jnp, optax_structure as oxs
      >>> slow = oxs.PhaseSignals(jnp.float32(0.003), jnp.float32(jnp.nan), jnp.float32(jnp.nan), jnp.int32(9))
      >>> int(oxs.loss_phase(slow, jnp.int32(0))), int(oxs.loss_phase(slow._replace(extrema_share=0.2), jnp.int32(0)))
      (2, 1)
      >>> patient = functools.partial(oxs.loss_phase, thresholds=(0.001, 0.0005, 0.00025))  # pass it as rule=
      >>> int(patient(slow, jnp.int32(0)))
      0
    """
    del phase
    if not any(map(is_traced, thresholds)) and any(a <= b for a, b in itertools.pairwise(thresholds)):
        raise ValueError(f"thresholds={thresholds!r} must fall from the first to the last.")
    check_number("noisy", noisy)
    check_number("extreme", extreme, high=1.0)
    passed = signals.improvement <= jnp.asarray(thresholds, jnp.float32)
    by_loss = jnp.sum(passed, dtype=jnp.int32)
    unsettled = (signals.gradient_noise > noisy) | (signals.extrema_share > extreme)
    return jnp.where(unsettled, jnp.minimum(by_loss, 1), by_loss)


class LossPhaseState(NamedTuple):
    """State of ``scale_by_loss_phase``: of the whole network, so that growth and relabelling leave it alone.

    Attributes:
      phase: int32 scalar, index into the scales.
      updates: int32 scalar, updates in the observation under way.
      observations: int32 scalar, observations so far.
      means: float32 (3,), means over the observation under way: loss, norm of the gradient, its square.
      history: float32 (window, 3), such means of the last observations, the oldest first.
      extrema_share: float32 scalar, as last passed; -1 before.
    """

    phase: jax.Array
    updates: jax.Array
    observations: jax.Array
    means: jax.Array
    history: jax.Array
    extrema_share: jax.Array
    serves_all_ages = True


def _signals(state: LossPhaseState) -> PhaseSignals:
    loss, norm, square = state.history.T
    split = loss.size // 2
    first, last = jnp.mean(loss[:split]), jnp.mean(loss[split:])
    improvement = (first - last) / jnp.maximum(jnp.abs(first), 1e-30)  # a loss of exactly 0 is no division by 0
    mean = jnp.mean(norm)
    variance = jnp.maximum(jnp.mean(square) - mean**2, 0.0)
    noise = jnp.where(mean > 0, variance / jnp.maximum(mean**2, 1e-30), jnp.nan)
    share = jnp.where(state.extrema_share < 0, jnp.nan, state.extrema_share)
    return PhaseSignals(improvement, noise, share, state.observations)


def _norm(grads: PyTree) -> jax.Array:
    squares = [jnp.sum(jnp.square(jnp.abs(grad).astype(jnp.float32))) for grad in jax.tree.leaves(grads)]
    return jnp.sqrt(jnp.asarray(sum(squares), jnp.float32))


def scale_by_loss_phase(
    scales: Sequence[float] = (1.0, 0.5, 0.1, 0.05),
    *,
    rule: PhaseRule = loss_phase,
    every: int = 100,
    window: int = 5,
) -> Multiplier:
    """Multiply every update by the scale of a phase that a rule reads from the loss and other signals.

    The loss is averaged over ``every`` updates, which makes one observation (the original's epoch). With every
    observation the rule is asked for the phase, from the last ``window`` of them; until there are so many, the phase
    is the first. The phases of ``loss_phase``, the rule unless another is given, are exploration, exploitation,
    refinement and plateau. A phase acts on the update that completes the observation.

    Of the other signals those count that are passed: the norm of ``grads=`` (at every update or never; of all that is
    passed, whichever leaves this transformation stands over) and the share of extreme units of ``extrema=``. All
    statistics are float32. An update whose loss, or gradient norm, is not finite leaves them as they were.

    A rule of one's own is one function ``(signals, phase) -> phase`` of traced scalars (see ``PhaseSignals``), with as
    many phases as there are scales; a phase beyond the last is the last.

    Args:
      scales: factors >= 0, one a phase.
      rule: ``(PhaseSignals, phase) -> phase``; tried once on abstract values when the transformation is made.
      every: updates an observation, >= 1.
      window: observations that the rule reads, >= 2; the first half (rounded down) is compared with the rest.

    Returns:
      A transformation whose state is six small arrays. It reads ``value=`` (the loss, a scalar), and ``grads=`` and
      ``extrema=`` where they are passed. Keep it outside ``optax.partition`` if leaves are to be added or moved between
      the groups: there each group has statistics of its own, and ``transfer_state`` asks which ones a new leaf shares.

    Raises:
      ValueError: for numbers out of range and for a rule that returns no integer scalar; in ``update`` for a missing
        ``value=``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> tx = oxs.scale_by_loss_phase(every=1, window=2)
      >>> state, factors = tx.init(jnp.ones(())), []
      >>> for loss in (1.0, 0.9, 0.893, 0.890, 0.890):
      ...     update, state = tx.update(jnp.ones(()), state, value=loss)
      ...     factors.append(round(float(update), 3))
      >>> factors
      [1.0, 1.0, 0.5, 0.1, 0.05]
      >>> def two_phases(signals, phase):
      ...     return jnp.where(signals.improvement > 0.01, 0, 1)
      >>> tx = oxs.scale_by_loss_phase((1.0, 0.1), rule=two_phases)
    """
    _check_scales(scales)
    check_schedule("rule", rule, of="(signals, phase)")
    check_number("every", every, low=1)
    if not isinstance(window, int) or window < 2:
        raise ValueError(f"window={window!r} must be an integer of at least 2.")
    number, integer = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    said = jax.eval_shape(rule, PhaseSignals(number, number, number, integer), integer)  # type: ignore[arg-type]
    if getattr(said, "shape", None) != () or not jnp.issubdtype(said.dtype, jnp.integer):
        raise ValueError(f"rule={rule!r} must return the phase, an integer scalar; it returns {said}.")

    def init_fn(params: optax.Params) -> LossPhaseState:
        del params
        # An array for each: a step that donates the state may not be given one buffer twice.
        return LossPhaseState(
            phase=jnp.zeros((), jnp.int32),
            updates=jnp.zeros((), jnp.int32),
            observations=jnp.zeros((), jnp.int32),
            means=jnp.zeros(3, jnp.float32),
            history=jnp.zeros((window, 3), jnp.float32),
            extrema_share=jnp.asarray(-1.0, jnp.float32),
        )

    def factors_fn(
        updates: optax.Updates,
        state: LossPhaseState,
        params: optax.Params | None = None,
        *,
        value: jax.Array | float | None = None,
        grads: PyTree | None = None,
        extrema: Extrema | None = None,
        **extra_args: Any,
    ) -> tuple[Factors, LossPhaseState]:
        del params, extra_args
        loss = jnp.reshape(jnp.asarray(require(value, "value", "scale_by_loss_phase"), jnp.float32), ())
        norm = jnp.zeros((), jnp.float32) if grads is None else _norm(grads)
        reading = jnp.stack([loss, norm, norm**2])
        finite = jnp.all(jnp.isfinite(reading))
        count = state.updates + finite
        means = jnp.where(finite, state.means + (reading - state.means) / jnp.maximum(count, 1), state.means)
        complete = finite & (count >= every)
        share = None if extrema is None else _extreme_share(extrema)
        state = LossPhaseState(
            phase=state.phase,
            updates=jnp.where(complete, 0, count),
            observations=jnp.where(complete, optax.safe_increment(state.observations), state.observations),
            means=jnp.where(complete, 0.0, means),
            history=jnp.where(complete, jnp.concatenate([state.history[1:], means[None]]), state.history),
            extrema_share=state.extrema_share if share is None else jnp.where(finite, share, state.extrema_share),
        )
        chosen = jnp.clip(jnp.asarray(rule(_signals(state), state.phase), jnp.int32), 0, len(scales) - 1)
        state = state._replace(phase=jnp.where(complete & (state.observations >= window), chosen, state.phase))
        return _everywhere(updates, jnp.asarray(scales, jnp.float32)[state.phase]), state

    numbers = {"scales": tuple(scales), "rule": rule, "every": every, "window": window}
    return multiplier(init_fn, factors_fn, Rule("scale_by_loss_phase", numbers, f"{28 + 12 * window} B"))
