"""Dead and saturated units, read from the activations of the training step itself.

A unit's *fraction of samples on which it is active* decides whether it is dead, not its mean activation: a unit that
fires strongly on 2 % of the data is a specialist, and the mean over a batch would call it dead. What is done every
step is two reductions over the batch; medians are taken only where extrema are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Activations = Mapping[str, Any]

_SIGMA_PER_MAD = 1.4826
_SIGMA_PER_MEAN_DEVIATION = 1.2533
_ROUNDING = 1e-6


class ActivationStats(NamedTuple):
    """Running means of a network's activations; a pytree of arrays, carried through ``jit`` and ``scan``.

    The means are not yet divided by ``weight``, which is what the same running mean makes of the constant 1: the
    quotient is unbiased from the first update on, whatever the decays were.

    Attributes:
      count: int32 (), updates taken in.
      weight: float32 (), 0 before the first update, then rising to 1.
      active: layer -> float32 (units,), share of samples (and positions) on which the unit is active.
      magnitude: layer -> float32 (units,), mean of ``|activation|``.
      bounded: layer -> bool (), whether the activation keeps ``|a| <= 1``.
    """

    count: Array
    weight: Array
    active: dict[str, Array]
    magnitude: dict[str, Array]
    bounded: dict[str, Array]


class Extrema(NamedTuple):
    """Units at the two ends of their layer's activity.

    Attributes:
      dead: layer -> bool (units,), (almost) never active on data.
      saturated: layer -> bool (units,), pinned near the activation's bound, or far above its layer without one.
    """

    dead: dict[str, Array]
    saturated: dict[str, Array]


def _check_active_above(value: float | Array) -> None:
    if not isinstance(value, jax.Array) and not value >= 0:
        raise ValueError(f"active_above={value!r} must be at least 0.")


def _check_thresholds(dead_below: float | Array, saturated_above: float | Array) -> None:
    if not isinstance(dead_below, jax.Array) and not 0 <= dead_below <= 1:
        raise ValueError(f"dead_below={dead_below!r} must be a share in [0, 1].")
    if not isinstance(saturated_above, jax.Array) and not 0 < saturated_above < 1:
        raise ValueError(f"saturated_above={saturated_above!r} must be in (0, 1).")


def init_activation_stats(
    activations: Activations, *, bounded: bool | Mapping[str, bool] | None = None
) -> ActivationStats:
    """Empty statistics for the layers of a network.

    Args:
      activations: layer -> array or ``jax.ShapeDtypeStruct`` of shape ``(batch, ..., units)``; only shapes are read.
      bounded: layer -> True where ``|a| <= 1`` (sigmoid, tanh); layers left out, or None, are unbounded. One bool
        speaks for all layers.

    Returns:
      ``ActivationStats`` with nothing counted.

    Raises:
      ValueError: for no activations, one without a batch and a unit axis, or an unknown layer in ``bounded``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> stats = oxs.init_activation_stats({"hidden": jnp.ones((32, 4))})
      >>> int(stats.count), stats.active["hidden"].shape
      (0, (4,))
    """
    if not activations:
        raise ValueError("activations hold no layer; give layer -> array of shape (batch, ..., units).")
    for layer, activation in activations.items():
        if len(activation.shape) < 2:
            raise ValueError(f"activations[{layer!r}] has shape {activation.shape}; give (batch, ..., units).")
    if not isinstance(bounded, Mapping):
        bounded = dict.fromkeys(activations, bool(bounded))
    if unknown := sorted(set(bounded) - set(activations)):
        raise ValueError(f"bounded names the layers {unknown}, but activations hold {list(activations)}.")
    return ActivationStats(
        count=jnp.zeros((), jnp.int32),
        weight=jnp.zeros((), jnp.float32),
        active={layer: jnp.zeros(a.shape[-1], jnp.float32) for layer, a in activations.items()},
        magnitude={layer: jnp.zeros(a.shape[-1], jnp.float32) for layer, a in activations.items()},
        bounded={layer: jnp.asarray(bool(bounded.get(layer, False))) for layer in activations},
    )


def _mean_over_samples(values: Array) -> Array:
    # A product with ones: CPUs sum columns faster by it than by a reduction. Full precision, or a GPU takes TF32.
    rows = values.reshape(-1, values.shape[-1])
    return jnp.matmul(jnp.ones(rows.shape[0], jnp.float32), rows, precision=jax.lax.Precision.HIGHEST) / rows.shape[0]


def update_activation_stats(
    stats: ActivationStats, activations: Activations, *, decay: float | Array = 0.99, active_above: float | Array = 0.0
) -> ActivationStats:
    """Take one batch of activations into the running means. Call it inside the jitted training step.

    ``m <- decay * m + (1 - decay) * mean over batch and positions``, in float32 whatever the activations' dtype. A
    batch with a non-finite mean in any layer, or without samples, changes nothing.

    Args:
      stats: from ``init_activation_stats`` or the last update.
      activations: layer -> ``(batch, ..., units)``, after the nonlinearity, of the layers that ``stats`` hold.
      decay: in [0, 1); may be traced.
      active_above: a unit is active on a sample where ``|a|`` is above this, at least 0. 0 fits ReLU; smooth
        activations such as GELU and SiLU are never exactly 0 and need about 0.05.

    Returns:
      ``ActivationStats`` of the same structure, shapes and dtypes.

    Raises:
      ValueError: for a decay outside [0, 1), a negative ``active_above``, other layers, or another number of units.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> activations = {"hidden": jnp.array([[0.0, 2.0], [0.0, 0.0]])}
      >>> stats = oxs.update_activation_stats(oxs.init_activation_stats(activations), activations, decay=0.5)
      >>> (stats.active["hidden"] / stats.weight).tolist(), (stats.magnitude["hidden"] / stats.weight).tolist()
      ([0.0, 0.5], [0.0, 1.0])
    """
    if not isinstance(decay, jax.Array) and not 0 <= decay < 1:
        raise ValueError(f"decay={decay!r} must be in [0, 1).")
    _check_active_above(active_above)
    if set(activations) != set(stats.active):
        raise ValueError(f"activations hold the layers {sorted(activations)}, the statistics {sorted(stats.active)}.")

    active: dict[str, Array] = {}
    magnitude: dict[str, Array] = {}
    for layer, mean in stats.magnitude.items():
        size = jnp.abs(jnp.asarray(activations[layer]).astype(jnp.float32))
        if size.ndim < 2 or size.shape[-1:] != mean.shape:
            raise ValueError(
                f"activations[{layer!r}] has shape {size.shape}, the statistics hold {mean.shape[0]} units; give "
                "(batch, ..., units), and make new statistics with init_activation_stats after a change of shape."
            )
        active[layer] = _mean_over_samples((size > active_above).astype(jnp.float32))
        magnitude[layer] = _mean_over_samples(size)

    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(mean)) for mean in magnitude.values()]))

    def moved(old: Array, new: Array | float) -> Array:
        return jnp.where(finite, decay * old + (1 - decay) * new, old).astype(jnp.float32)

    return ActivationStats(
        count=stats.count + finite.astype(jnp.int32),
        weight=moved(stats.weight, 1.0),
        active=jax.tree.map(moved, stats.active, active),
        magnitude=jax.tree.map(moved, stats.magnitude, magnitude),
        bounded=stats.bounded,
    )


def _median(values: Array, where: Array) -> Array:
    ordered = jnp.sort(jnp.where(where, values, jnp.inf))
    number = jnp.sum(where)
    return (ordered[jnp.maximum(number - 1, 0) // 2] + ordered[number // 2]) / 2


def _robust_score(magnitude: Array, living: Array) -> Array:
    """How many standard deviations above the middle of the living units; 0 where they do not differ."""
    middle = _median(magnitude, living)
    deviation = jnp.abs(magnitude - middle)
    mad = _SIGMA_PER_MAD * _median(deviation, living)
    mean_deviation = _SIGMA_PER_MEAN_DEVIATION * jnp.mean(deviation, where=living)
    # The MAD is 0 where more than half of the units agree; equal units differ by rounding and must not count.
    sigma = jnp.where(mad > _ROUNDING * middle, mad, mean_deviation)
    return jnp.where(living & (sigma > _ROUNDING * middle), (magnitude - middle) / sigma, 0.0)


def find_extrema(
    stats: ActivationStats, *, dead_below: float | Array = 0.01, saturated_above: float | Array = 0.99
) -> Extrema:
    """The dead and the saturated units of every layer; jittable.

    Unbounded layers: a unit is *dead* where it is active on less than ``dead_below`` of the samples. It is
    *saturated* where its mean magnitude m is far above those of its layer's living units, by the robust score
    ``z = (m - median) / sigma``, ``sigma = 1.4826 * MAD``, both over living units: where z exceeds the
    ``saturated_above`` quantile of the standard normal (2.33 at 0.99). So ``saturated_above`` is the share of a
    normally distributed layer that lies below the limit. Where the MAD is 0, ``sigma`` is 1.2533 times the mean
    absolute deviation; where that is 0 too, no unit is saturated.

    Bounded layers: dead where the mean of ``|a|`` is below ``dead_below``, saturated where above ``saturated_above``.

    Before any update nothing is reported. A dead unit is never saturated.

    Args:
      stats: activation statistics.
      dead_below: share of samples, or of the bound, in [0, 1].
      saturated_above: share of the bound, or quantile, in (0, 1).

    Returns:
      ``Extrema``: two dicts layer -> bool (units,).

    Raises:
      ValueError: for a threshold outside its range.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> activations = {"hidden": jnp.array([[0.0, 1.0, 1.1, 0.9, 1.2, 50.0]])}
      >>> stats = oxs.update_activation_stats(oxs.init_activation_stats(activations), activations)
      >>> extrema = oxs.find_extrema(stats)
      >>> jnp.flatnonzero(extrema.dead["hidden"]).tolist(), jnp.flatnonzero(extrema.saturated["hidden"]).tolist()
      ([0], [5])

    References:
      Iglewicz and Hoaglin, How to detect and handle outliers, 1993 (the score and its fallback).
    """
    _check_thresholds(dead_below, saturated_above)
    seen = stats.weight > 0
    weight = jnp.where(seen, stats.weight, 1.0)
    limit = jax.scipy.special.ndtri(jnp.asarray(saturated_above, jnp.float32))
    dead: dict[str, Array] = {}
    saturated: dict[str, Array] = {}
    for layer, bounded in stats.bounded.items():
        magnitude = stats.magnitude[layer] / weight
        lifeless = jnp.where(bounded, magnitude, stats.active[layer] / weight) < dead_below
        pinned = jnp.where(bounded, magnitude > saturated_above, _robust_score(magnitude, ~lifeless) > limit)
        dead[layer] = seen & lifeless
        saturated[layer] = seen & pinned & ~lifeless
    return Extrema(dead, saturated)


def extrema_counts(extrema: Extrema) -> dict[str, dict[str, int]]:
    """How many units of each layer are dead, and how many saturated.

    Args:
      extrema: concrete, from ``find_extrema``.

    Returns:
      layer -> ``{"dead": int, "saturated": int}``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> oxs.extrema_counts(oxs.Extrema({"hidden": jnp.array([True, True])}, {"hidden": jnp.array([False, False])}))
      {'hidden': {'dead': 2, 'saturated': 0}}
    """
    counts = jax.device_get(jax.tree.map(jnp.sum, extrema))
    return {
        layer: {"dead": int(counts.dead[layer]), "saturated": int(counts.saturated[layer])} for layer in counts.dead
    }


_update = jax.jit(update_activation_stats)


def extrema_over(
    activations_of: Callable[[Any], Activations],
    loader: Iterable[Any],
    *,
    bounded: bool | Mapping[str, bool] | None = None,
    dead_below: float = 0.01,
    saturated_above: float = 0.99,
    active_above: float = 0.0,
) -> Extrema:
    """Extrema over a whole data set, off-line: plain means over all samples instead of running ones.

    Args:
      activations_of: batch -> activations by layer, ``(batch, ..., units)``; jit it for speed.
      loader: the batches; each weighs as much as it has samples, so a short last one does no harm.
      bounded: as in ``init_activation_stats``.
      dead_below: as in ``find_extrema``.
      saturated_above: as in ``find_extrema``.
      active_above: as in ``update_activation_stats``.

    Returns:
      ``Extrema``.

    Raises:
      ValueError: where the loader is empty, and as the three functions named above.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> batches = [jnp.array([[1.0, -1.0], [2.0, -3.0]]), jnp.array([[4.0, -2.0]])]
      >>> extrema = oxs.extrema_over(lambda batch: {"hidden": jax.nn.relu(batch)}, batches)
      >>> extrema.dead["hidden"].tolist()
      [False, True]
    """
    _check_active_above(active_above)
    _check_thresholds(dead_below, saturated_above)
    stats = None
    samples = 0
    for batch in loader:
        activations = dict(activations_of(batch))
        if stats is None:
            stats = init_activation_stats(activations, bounded=bounded)
        new = next(iter(activations.values())).shape[0]
        samples += new
        # With this decay the running mean is the mean over all samples so far.
        decay = jnp.float32((samples - new) / max(samples, 1))
        stats = _update(stats, activations, decay=decay, active_above=jnp.float32(active_above))
    if stats is None:
        raise ValueError("loader gave no batch, so there are no activations to judge; pass one that can be iterated.")
    return find_extrema(stats, dead_below=dead_below, saturated_above=saturated_above)
