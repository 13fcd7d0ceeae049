"""Which leaves freeze and which thaw, by what their gradients were: the arithmetic of freezing by small gradients."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_structure._tree import is_traced
from optax_structure.sparsity.topk import top_k_mask

TINY = float(np.finfo(np.float32).tiny)


class Numbers(NamedTuple):
    """The numbers of the rule, as ``freeze_on_small_gradients`` is given them."""

    threshold: Any
    min_steps: Any
    patience: Any
    release: Any
    min_dwell: Any
    max_share: Any


class Cell(NamedTuple):
    """One leaf: its gates and readings (see ``FreezeState``, ``Readings``), and whether this update was a reading."""

    frozen: jax.Array
    streak: jax.Array
    mean: jax.Array
    weight: jax.Array
    seen: jax.Array
    waited: jax.Array
    was_read: Any = False


def root_mean_square_if(grad: jax.Array, looked: Any, mask: Any) -> jax.Array:
    """Of the living part of a leaf, float32 scalar; 0 where nobody looks, which is not computed."""

    def size() -> jax.Array:
        square = jnp.square(jnp.abs(grad).astype(jnp.float32))
        if not jnp.ndim(mask):
            return jnp.sqrt(jnp.sum(square) / max(grad.size, 1))
        return jnp.sqrt(jnp.sum(square, where=mask) / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1))

    if isinstance(looked, bool):
        return size() if looked else jnp.zeros((), jnp.float32)
    return jax.lax.cond(looked, size, lambda: jnp.zeros((), jnp.float32))


def magnitude(grad: jax.Array, looked: Any, mask: Any) -> jax.Array:
    """Of every element, float32."""
    del looked, mask
    return jnp.abs(grad).astype(jnp.float32)


def read(cell: Cell, size: jax.Array, looked: Any, sound: Any, decay: Any) -> Cell:
    """The cell after one more reading, if it was looked at and what was seen is finite.

    After a pause of ``k`` updates the reading weighs ``1 - decay**k``, as if its like had been read in each of them. An
    update that is not sound is no pause: it is as if it had not been.
    """
    sound = sound & jnp.all(jnp.isfinite(size)) | ~jnp.asarray(looked)
    was_read = sound & looked
    waited = cell.waited + 1
    kept = jnp.asarray(decay, jnp.float32) ** waited.astype(jnp.float32)
    return cell._replace(
        mean=jnp.where(was_read, kept * cell.mean + (1 - kept) * size, cell.mean),
        weight=jnp.where(was_read, kept * cell.weight + (1 - kept), cell.weight),
        seen=cell.seen + was_read.astype(jnp.int32),
        waited=jnp.where(was_read, 0, jnp.where(sound, waited, cell.waited)),
        was_read=was_read,
    )


def decide(cells: Sequence[Cell], groups: Sequence[Hashable], sizes: Sequence[int], numbers: Numbers) -> list[Cell]:
    """The gates of all leaves at once; leaves of one group share theirs and go by their greatest mean."""
    if not cells:
        return []
    ids = np.array([list(dict.fromkeys(groups)).index(group) for group in groups])
    count = int(ids.max()) + 1
    stacked = Cell(*(jnp.stack(column) for column in zip(*cells, strict=True)))
    if count < len(ids):
        # All of a group must be frozen for the group to be, and all of it read for a reading.
        least = [jax.ops.segment_min(column, ids, count) for column in (stacked.seen, stacked.streak)]
        held = jax.ops.segment_min(stacked.frozen.astype(jnp.int32), ids, count) > 0
        was_read = jax.ops.segment_min(stacked.was_read.astype(jnp.int32), ids, count) > 0
        means = jax.ops.segment_max(_unbiased(stacked), ids, count)
        group = Cell(held, least[1], means, jnp.ones_like(means), least[0], stacked.waited, was_read)
    else:
        group = stacked
    weights = np.bincount(ids, np.array(sizes, np.float64)) / max(sum(sizes), 1)
    wanted, streak = _wanted(group, numbers)
    frozen = _capped(wanted, group, weights, numbers.max_share)
    streak = jnp.where(frozen == group.frozen, streak, 0)
    return [
        cell._replace(frozen=frozen[place], streak=streak[place])
        for cell, place in zip(cells, ids.tolist(), strict=True)
    ]


def decide_by_element(cells: Sequence[Cell], numbers: Numbers) -> list[Cell]:
    """The gates of all elements, each by itself."""
    decided = []
    for cell in cells:
        wanted, streak = _wanted(cell, numbers)
        if not _is_one(numbers.max_share):
            most = jnp.asarray(numbers.max_share * wanted.size + 1e-6, jnp.int32)
            wanted = top_k_mask(jnp.where(cell.frozen, jnp.inf, -_unbiased(cell)), most, wanted)
        decided.append(cell._replace(frozen=wanted, streak=jnp.where(wanted == cell.frozen, streak, 0)))
    return decided


def _unbiased(cell: Cell) -> jax.Array:
    return cell.mean / jnp.maximum(cell.weight, TINY)


def _wanted(cell: Cell, numbers: Numbers) -> tuple[jax.Array, jax.Array]:
    """Who is to be frozen, were there no cap, and the streaks of those whose gate does not change."""
    mean = _unbiased(cell)
    below = jnp.where(cell.was_read, jnp.where(mean < numbers.threshold, cell.streak + 1, 0), cell.streak)
    freezes = (below >= numbers.patience) & (cell.seen >= numbers.min_steps)
    returned = cell.was_read & (mean > numbers.release * numbers.threshold)
    thaws = returned & (cell.streak + 1 >= numbers.min_dwell)
    wanted = (cell.frozen & ~thaws) | (~cell.frozen & freezes)
    return wanted, jnp.where(cell.frozen, cell.streak + 1, below).astype(jnp.int32)


def _capped(wanted: jax.Array, cell: Cell, weights: np.ndarray, max_share: Any) -> jax.Array:
    """Who of these freezes: first what is frozen already, then by the mean, as long as the share allows."""
    if _is_one(max_share):
        return wanted
    order = jnp.lexsort((_unbiased(cell), ~cell.frozen))

    def take(share: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
        with_it = share + jnp.asarray(weights, jnp.float32)[place]
        taken = wanted[place] & (with_it <= max_share + 1e-6)
        return jnp.where(taken, with_it, share), taken

    _, taken = jax.lax.scan(take, jnp.zeros((), jnp.float32), order)
    return jnp.zeros_like(wanted).at[order].set(taken)


def _is_one(share: Any) -> bool:
    return not is_traced(share) and float(share) >= 1
