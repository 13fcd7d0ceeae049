"""What the fast sparse forms share: the checks of their arguments, and the exchange of the weakest for absent ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_structure._tree import is_traced
from optax_structure.sparsity.topk import top_k_mask


class Rewired(NamedTuple):
    """What a rewiring returns.

    Attributes:
      values: the weights, 0 where they are new.
      index: where they stand, int32, of unchanged shape. What was kept stays in its place.
      new: bool, True at new weights; it broadcasts to ``values``, as ``optax_structure.reset_state`` takes it.
    """

    values: Array
    index: Array
    new: Array


def exchange_weakest(ids: Array, strength: Array, scores: Array, count: Array) -> tuple[Array, Array]:
    """Give the ``count`` weakest of ``ids`` the numbers of the absent cells with the highest scores.

    ``ids``: ``(n,)`` int32, the cells that exist; ``strength``: ``(n,)``; ``scores``: ``(cells,)``. Returns the new
    ids and a bool array of those that changed. A cell that is dropped does not come back in the same call.
    """
    absent = jnp.ones(scores.size, bool).at[ids].set(False)
    count = jnp.minimum(jnp.minimum(count, ids.size), jnp.sum(absent, dtype=jnp.int32))
    dropped = top_k_mask(-strength.astype(jnp.float32), count)
    grown = jnp.flatnonzero(top_k_mask(scores, count, absent), size=ids.size, fill_value=0).astype(jnp.int32)
    return jnp.where(dropped, grown[jnp.cumsum(dropped) - 1], ids), dropped


def accumulated(dtype: Any) -> Any:
    """The dtype to add up in: float32 at least, so that sums of half-precision products do not lose theirs."""
    return jnp.promote_types(dtype, jnp.float32)


def check_count(count: Any) -> Array:
    """A count as an int32 scalar, so that no new value compiles anew."""
    if not isinstance(count, jax.Array) and (
        isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 0
    ):
        raise ValueError(f"count={count!r} must be an integer of at least 0.")
    return jnp.asarray(count, jnp.int32)


def check_range(index: Any, bounds: tuple[int, ...]) -> None:
    """Refuse an index that leaves ``[0, bound)``, one bound for each entry of its last axis; tracers pass."""
    if is_traced(index):
        return
    given = np.asarray(index).reshape(-1, len(bounds))
    bad = given[((given < 0) | (given >= np.array(bounds))).any(axis=1)]
    if len(bad):
        raise ValueError(f"index holds {bad[0].tolist()}, out of range: at least 0 and below {list(bounds)}.")


def check_kernel(kernel: Any, mask: Any) -> None:
    """Refuse a kernel that is no matrix, or a mask of another shape."""
    if jnp.ndim(kernel) != 2:
        raise ValueError(f"kernel has shape {jnp.shape(kernel)}; it must be that of a dense layer, (in, out).")
    if jnp.shape(mask) != jnp.shape(kernel):
        raise ValueError(f"mask has shape {jnp.shape(mask)}, its kernel {jnp.shape(kernel)}.")
    if is_traced(mask):
        raise ValueError("mask must not be traced: how many entries exist is a shape. Convert outside of jax.jit.")
