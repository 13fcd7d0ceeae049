"""What connections are ranked by when some go and others come."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from optax_structure.sparsity.draws import random_scores


class ScoredLeaf(NamedTuple):
    """What a score is computed from: one sparse leaf, at the step in which it is rewired.

    Attributes:
      weight: the parameters; exactly 0 where there is no connection.
      grad: the dense gradient of this step, or the mean of the last ones (``accumulate=``).
      mask: bool, the connections that exist.
      key: a JAX random key of this leaf and step.
    """

    weight: Array
    grad: Array
    mask: Array
    key: Array


Score = Callable[[ScoredLeaf], Array]
"""``leaf -> float32`` scores of the leaf's shape. The lowest go, the highest come."""


def by_magnitude(leaf: ScoredLeaf) -> Array:
    """Absolute weight. Of those that are equal, as many are exactly 0 at first, it is drawn which go.

    Args:
      leaf: see ``ScoredLeaf``.

    Returns:
      float32 scores of the leaf's shape.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> weight = jnp.array([[-3.0, 1.0]])
      >>> oxs.by_magnitude(oxs.ScoredLeaf(weight, weight, weight != 0, jax.random.key(0))).tolist()
      [[3.0, 1.0]]

    References:
      Han et al., Learning both weights and connections for efficient neural networks, 2015.
    """
    return jnp.abs(leaf.weight).astype(jnp.float32)


def by_gradient(leaf: ScoredLeaf) -> Array:
    """Absolute gradient. Of those that are equal, as many are exactly 0 at dead inputs, it is drawn which come.

    Where a layer multiplies by its mask (``masked_by="forward"``), what is absent has no gradient, and all is drawn:
    build such layers with ``masked_by="update"``.

    Args:
      leaf: see ``ScoredLeaf``.

    Returns:
      float32 scores of the leaf's shape.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> weight, grad = jnp.zeros((1, 2)), jnp.array([[0.5, -2.0]])
      >>> oxs.by_gradient(oxs.ScoredLeaf(weight, grad, weight != 0, jax.random.key(0))).tolist()
      [[0.5, 2.0]]

    References:
      Evci et al., Rigging the lottery: making all tickets winners, 2020.
    """
    return jnp.abs(leaf.grad).astype(jnp.float32)


def by_saliency(leaf: ScoredLeaf) -> Array:
    """Absolute product of weight and gradient: what the loss would change by, to first order.

    Args:
      leaf: see ``ScoredLeaf``.

    Returns:
      float32 scores of the leaf's shape.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> weight, grad = jnp.array([[2.0, 1.0]]), jnp.array([[0.5, -2.0]])
      >>> oxs.by_saliency(oxs.ScoredLeaf(weight, grad, weight != 0, jax.random.key(0))).tolist()
      [[1.0, 2.0]]

    References:
      Lee et al., SNIP: single-shot network pruning based on connection sensitivity, 2019.
    """
    return jnp.abs(leaf.weight.astype(jnp.float32) * leaf.grad.astype(jnp.float32))


def at_random(leaf: ScoredLeaf) -> Array:
    """Uniform in [0, 1).

    Args:
      leaf: see ``ScoredLeaf``.

    Returns:
      float32 scores of the leaf's shape.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> weight = jnp.zeros((2, 3))
      >>> oxs.at_random(oxs.ScoredLeaf(weight, weight, weight != 0, jax.random.key(0))).shape
      (2, 3)

    References:
      Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity, 2018.
    """
    return random_scores(leaf.key, leaf.weight.shape)
