"""The trust ratio of LARS and LAMB, over the connections that exist."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import PyTree, align
from optax_structure.transforms._extra import Rule, check_number
from optax_structure.transforms._multiplier import Factors, Multiplier, every_leaf, multiplier


def scale_by_masked_trust_ratio(
    *, trust_coefficient: float = 1e-3, eps: float = 1e-8, max_ratio: float | None = None
) -> Multiplier:
    """Multiply the update of every leaf by the ratio of the norms of its weights and of its update.

    ``u <- min(trust_coefficient * |w| / (|u| + eps), max_ratio) * u``, and the ratio is 1 where either norm is 0.
    Both are Euclidean, float32, and over the connections of ``masks=``: entries that do not exist count neither as
    weights nor as updates (at 10 % density the raw ratio of dense updates is 3.2 times too small).

    First in the chain it reads the raw gradient: LARS. Behind ``optax.scale_by_adam`` it reads the update: the form of
    LAMB, with ``trust_coefficient=1``. There it asks for a norm of the update, which costs a buffer of the leaf's size.

    A leaf that starts at 0, as a bias does, has the ratio 1 at its first update and one near 0 from its second on: it
    would hardly learn. Keep such leaves out, as LARS and LAMB do:
    ``optax.masked(scale_by_masked_trust_ratio(), lambda params: jax.tree.map(lambda p: p.ndim > 1, params))``.

    An update with an infinite entry (or one above 1.8e19, whose square is) has an infinite norm and so the ratio 0: the
    leaf does not move in that step. One with a NaN has the ratio 1 and stays NaN: ``optax.apply_if_finite`` skips it.

    The original's ratio is ``min(trust_coefficient * |w| / (|g| + eps), base_rate)``, a rate and no multiplier: pass
    ``trust_coefficient / base_rate`` and ``max_ratio=1``. It stops a leaf whose weights are all 0; this one does not.

    Args:
      trust_coefficient: >= 0.
      eps: >= 0, added to the norm of the update.
      max_ratio: cap of the factor, >= 0; None: no cap.

    Returns:
      A stateless transformation whose ``update`` needs ``params``, and reads ``masks=`` where they are passed
      (``sparse`` passes them); without them, and for a leaf that is not sparse, every entry counts.

    Raises:
      ValueError: for numbers out of range; in ``update`` for missing ``params``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> tx, params = oxs.scale_by_masked_trust_ratio(trust_coefficient=1.0, eps=0.0), jnp.array([3.0, 4.0])
      >>> updates, _ = tx.update(jnp.array([0.0, 2.0]), tx.init(params), params)
      >>> updates.tolist()
      [0.0, 5.0]

    References:
      You, Gitman & Ginsburg, Large batch training of convolutional networks, 2017 (LARS);
      You et al., Large batch optimization for deep learning: training BERT in 76 minutes, 2020 (LAMB).
    """
    check_number("trust_coefficient", trust_coefficient)
    check_number("eps", eps)
    if max_ratio is not None:
        check_number("max_ratio", max_ratio)

    def ratio(weights: jax.Array, updates: jax.Array) -> jax.Array:
        weights, updates = jnp.sqrt(weights), jnp.sqrt(updates)
        known = (weights > 0) & (updates > 0)
        trusted = trust_coefficient * weights / (jnp.where(known, updates, 1.0) + eps)
        factor = jnp.where(known, trusted, 1.0)
        return factor if max_ratio is None else jnp.minimum(factor, max_ratio)

    def factors_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        masks: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[Factors, optax.EmptyState]:
        del extra_args
        if params is None:
            raise ValueError("scale_by_masked_trust_ratio needs params: call tx.update(grads, state, params).")
        aligned = align(True if masks is None else masks, updates, "masks")
        norms = (jax.tree.map(_squares, tree, aligned) for tree in (params, updates))
        return every_leaf(updates, *norms, of=ratio), state

    numbers = {"trust_coefficient": trust_coefficient, "eps": eps, "max_ratio": max_ratio}
    return multiplier(lambda params: optax.EmptyState(), factors_fn, Rule("scale_by_masked_trust_ratio", numbers))


def _squares(values: jax.Array, mask: Any) -> jax.Array:
    """The squared Euclidean norm over the connections that exist: float32 scalar."""
    values = values.astype(jnp.float32)
    return jnp.sum(jnp.square(jnp.where(mask, values, 0.0) if jnp.ndim(mask) else values))
