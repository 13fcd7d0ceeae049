"""Pruning: rules under which connections go, and what is left follows a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from optax_structure.sparsity.masks import check_distribution
from optax_structure.transforms.rewiring.budgets import Towards
from optax_structure.transforms.rewiring.rules import Rewiring, rewiring
from optax_structure.transforms.rewiring.scores import Score, at_random, by_magnitude, by_saliency


def magnitude_pruning(
    density: float | Mapping[str, float],
    *,
    every: int = 100,
    start: int = 0,
    stop: int,
    initial_density: float = 1.0,
    labels: Any = None,
    distribution: Literal["erk", "uniform"] = "erk",
    power: float = 3.0,
    score: Score = by_magnitude,
    **more: Any,
) -> Rewiring:
    """Gradual pruning: the weakest connections go until ``density`` is left, fast at first.

    Of every leaf ``end + (begin - end) * (1 - progress)**power`` connections are left. ``stop = start + every`` prunes
    in one shot. What is gone does not come back (a density above ``initial_density`` grows instead, at random).

    Args:
      density: what is left in the end, in (0, 1]; or label -> density, with ``labels``.
      every, start, stop: updates ``start + every, ...`` prune, up to and with ``stop``; the last of them reaches the
        density.
      initial_density: of the masks that ``sparse`` is given: 1 for ``full_masks``.
      labels: tree of labels or function of the params; read where ``density`` is a mapping.
      distribution: how the density is shared among the leaves, see ``random_masks``.
      power: > 0. 3 is the cubic schedule of Zhu and Gupta; 1 is linear.
      score: what goes first, lowest first: ``by_magnitude``; ``by_saliency``; ``at_random``, the control.
      more: ``per``, ``pattern``, ``seed`` of ``rewiring``. ``per="tree"``: all leaves compete.

    Returns:
      A rule, to be passed as ``sparse(inner, oxs.full_masks, rewire=rule)``.

    Raises:
      ValueError: for densities outside (0, 1], an unknown distribution, a power that is not above 0, and as
        ``rewiring``; at ``init`` for labels that do not fit.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
      >>> rule = oxs.magnitude_pruning(0.25, every=1, stop=2)
      >>> tx = oxs.sparse(optax.sgd(0.0), oxs.full_masks, rewire=rule)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state, params)
      ...     print(oxs.nonzero(oxs.get_masks(state)))
      3
      2

    References:
      Zhu and Gupta, To prune, or not to prune, 2017.
    """
    for name, value in (("density", density), ("initial_density", initial_density)):
        for share in value.values() if isinstance(value, Mapping) else (value,):
            if not 0 < share <= 1:
                raise ValueError(f"{name}={value!r} must be in (0, 1], the share of connections that exist.")
    check_distribution(distribution)
    if not power > 0:
        raise ValueError(f"power={power!r} must be above 0.")
    if isinstance(density, Mapping) and labels is None:
        raise ValueError(f"density={density!r} is a mapping from labels: pass labels= too.")
    budget = Towards(density, initial_density, labels, distribution, power)
    ends = [*density.values()] if isinstance(density, Mapping) else [density]
    grow = at_random if max(ends) > initial_density else None
    return rewiring(score, grow, fraction=0.0, budget=budget, every=every, start=start, stop=stop, **more)


def random_pruning(density: float | Mapping[str, float], *, stop: int, **more: Any) -> Rewiring:
    """``magnitude_pruning`` of what is drawn at random: the control.

    Args:
      density, stop: see ``magnitude_pruning``.
      more: the others of ``magnitude_pruning``, but ``score``.

    Returns:
      A rule, to be passed as ``sparse(inner, oxs.full_masks, rewire=rule)``.

    Raises:
      ValueError: as ``magnitude_pruning``.

    Example:
      >>> import optax_structure as oxs
      >>> oxs.random_pruning(0.1, stop=1000).drop is oxs.at_random
      True
    """
    return magnitude_pruning(density, stop=stop, score=at_random, **more)


def saliency_pruning(density: float | Mapping[str, float], *, stop: int = 1, every: int = 1, **more: Any) -> Rewiring:
    """SNIP: once, in the first update, what the loss hardly depends on goes. All leaves compete.

    Args:
      density: what is left, in (0, 1].
      stop, every: the first and only update, where nothing else is said; later, and several of them, is gradual.
      more: the others of ``magnitude_pruning``, but ``score``.

    Returns:
      A rule, to be passed as ``sparse(inner, oxs.full_masks, rewire=rule)``.

    Raises:
      ValueError: as ``magnitude_pruning``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> params, grads = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}, {"kernel": jnp.array([[9.0, 0.1, 8.0, 0.1]])}
      >>> tx = oxs.sparse(optax.sgd(0.0), oxs.full_masks, rewire=oxs.saliency_pruning(0.5))
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> oxs.get_masks(state)["kernel"].tolist()
      [[True, False, True, False]]

    References:
      Lee et al., SNIP: single-shot network pruning based on connection sensitivity, 2019.
    """
    more = {"per": "tree", "distribution": "uniform"} | more
    return magnitude_pruning(density, stop=stop, every=every, score=by_saliency, **more)
