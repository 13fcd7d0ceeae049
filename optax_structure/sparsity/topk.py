"""Exact selection of the k largest entries, without a sort.

Each number becomes an unsigned integer of the same order, and the k-th largest is found by passes that compare and
count, each one fused reduction: bit by bit from the top, at most 32; in a large array, between two bounds that a
sample of it gives, mostly about ten and at most forty-odd. Nothing is sorted, gathered or scattered, so the cost is
that of reading the array a dozen times or two, on any accelerator, at any k.

References:
  Floyd and Rivest, Expected time bounds for selection, 1975: bounds from a sample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_structure._tree import PyTree, align

_SIGN = np.uint32(0x80000000)
_INFINITY = np.uint32(0x7F800000)
_SAMPLE = 4096


def _kind(dtype: Any) -> str:
    """Arrays of one kind have comparable keys."""
    kinds = {"float": jnp.floating, "signed": jnp.signedinteger, "unsigned": jnp.unsignedinteger}
    return next((name for name, kind in kinds.items() if jnp.issubdtype(dtype, kind)), str(dtype))


def _order_keys(values: Array) -> Array:
    """uint32 keys in the order of ``values``; both zeros share a key, NaN has the lowest."""
    if jnp.issubdtype(values.dtype, jnp.floating):
        bits = lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
        size = bits & ~_SIGN
        keys = jnp.where(bits >= _SIGN, ~bits, bits | _SIGN)
        # Integer tests, because a float comparison with 0 is true of denormals where the hardware flushes them.
        keys = jnp.where(size == 0, _SIGN, keys)
        return jnp.where(size > _INFINITY, jnp.uint32(0), keys)
    if jnp.issubdtype(values.dtype, jnp.signedinteger):
        return lax.bitcast_convert_type(values.astype(jnp.int32), jnp.uint32) ^ _SIGN
    if values.dtype == jnp.bool_ or jnp.issubdtype(values.dtype, jnp.unsignedinteger):
        return values.astype(jnp.uint32)
    raise ValueError(f"scores have dtype {values.dtype}, which has no order; pass real numbers.")


def _threshold(count: Callable[[Array], Array], k: Array, reached: Array) -> tuple[Array, Array]:
    """The largest threshold t with ``count(t) >= k``, or the first one found with ``count(t) == k``, and its count."""

    def unfinished(carry: tuple[Array, Array, Array]) -> Array:
        bit, _, reached = carry
        return (bit >= 0) & (reached != k)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bit, threshold, reached = carry
        trial = threshold | (jnp.uint32(1) << bit.astype(jnp.uint32))
        number = count(trial)
        enough = number >= k
        return bit - 1, jnp.where(enough, trial, threshold), jnp.where(enough, number, reached)

    _, threshold, reached = lax.while_loop(unfinished, step, (jnp.int32(31), jnp.uint32(0), reached))
    return threshold, reached


def _total(parts: list[Array]) -> Array:
    """How many entries are True. Counted in float32, which CPUs add twice as fast, where it is exact."""
    dtypes = [jnp.float32 if part.size <= 2**24 else jnp.int32 for part in parts]
    return sum(
        (jnp.sum(part, dtype=dtype).astype(jnp.int32) for part, dtype in zip(parts, dtypes, strict=True)), jnp.int32(0)
    )


class _Bracket(NamedTuple):
    """What is known of the threshold: at least ``low``, which ``reached`` keys reach; at most ``last``, above which are
    ``above``, fewer than k."""

    low: Array
    last: Array
    reached: Array
    above: Array

    def narrowed(self, trial: Array, number: Array, k: Array) -> _Bracket:
        """With what is known of one more threshold; one outside of the bracket says nothing."""
        inside = (trial > self.low) & (trial <= self.last)
        up, down = inside & (number >= k), inside & (number < k)
        low, reached = jnp.where(up, trial, self.low), jnp.where(up, number, self.reached)
        return _Bracket(low, jnp.where(down, trial - 1, self.last), reached, jnp.where(down, number, self.above))

    def trial(self, passes: Array, k: Array) -> Array:
        """A threshold on the far side of the wanted one, as close as chance lets it be were the keys spread evenly.

        Both sides close in this way. Keys that are not spread evenly are halved now and then, and at last always.
        """
        width = self.last - self.low
        keys, excess = (of.astype(jnp.float32) for of in (self.reached - self.above, self.reached - k))
        deviation = jnp.where(keys > 16, jnp.sqrt(excess * jnp.maximum(1 - excess / keys, 0)), 0)
        aim = excess + jnp.where(excess * 2 > keys, -deviation, deviation)
        share = jnp.clip((aim + 0.5) / (keys + 1), 0, 1 - 2.0**-20)
        offset = jnp.minimum((share * width.astype(jnp.float32)).astype(jnp.uint32), width - 1)
        return self.low + 1 + jnp.where((passes % 4 == 3) | (passes > 8), (width - 1) // 2, offset)


def _sample(key: Array, share: float) -> Array:
    """About that share of the entries, from all over the array. By axes: to flatten a sharded array would gather it."""
    strides = []
    for axis in sorted(range(key.ndim), key=lambda axis: key.shape[axis]):
        stride = min(round(share ** (-1 / (key.ndim - len(strides)))), max(key.shape[axis] // 8, 1))
        strides.append((axis, stride))
        share *= stride
    return key[tuple(slice(None, None, stride) for _, stride in sorted(strides))].ravel()


def _axes_are_explicit(key: Array) -> bool:
    """Whether a mesh of explicit axes shards it: a slice of such an axis has to be divisible among the devices."""
    return any(axes is not None for axes in jax.typeof(key).sharding.spec)


def _kth_key(keys: list[Array], k: Array, candidates: Array) -> tuple[Array, Array]:
    """The largest threshold that at least k keys reach, or one that k do, and how many reach it."""

    def count(threshold: Array) -> Array:
        return _total([key >= threshold for key in keys])

    total = sum(key.size for key in keys)
    if total < 16 * _SAMPLE or any(map(_axes_are_explicit, keys)):
        return _threshold(count, k, candidates)
    sample = jnp.concatenate([_sample(key, _SAMPLE / total) for key in keys])
    rank = k.astype(jnp.float32) * (sample.size / total)
    margin = 2.5 * jnp.sqrt(rank) + 1
    ranks = jnp.stack([jnp.ceil(rank + margin), jnp.floor(rank - margin)]).astype(jnp.int32)
    size = jnp.int32(sample.size)
    (low, high), _ = jax.vmap(lambda rank: _threshold(lambda of: _total([sample >= of]), rank, size))(ranks)
    # Above the upper bound, so that two passes are all where most entries are equal and both bounds are that number.
    first = jnp.stack([low, high + 1])

    def unfinished(carry: tuple[Array, _Bracket]) -> Array:
        return (carry[1].low < carry[1].last) & (carry[1].reached != k)

    def step(carry: tuple[Array, _Bracket]) -> tuple[Array, _Bracket]:
        passes, bracket = carry
        trial = jnp.where(passes < 2, first[jnp.minimum(passes, 1)], bracket.trial(passes, k))
        return passes + 1, bracket.narrowed(trial, count(trial), k)

    highest = functools.reduce(jnp.maximum, [jnp.max(key, initial=np.uint32(0)) for key in keys])
    everything = _Bracket(jnp.uint32(0), highest, candidates, jnp.int32(0))
    _, bracket = lax.while_loop(unfinished, step, (jnp.int32(0), everything))
    return bracket.low, bracket.reached


def _by_position(scores: list[Array]) -> list[Array]:
    """An order in which the first position of the first array is the highest."""
    ends = np.cumsum([s.size for s in scores])
    total = int(ends[-1])
    starts = (np.uint32(total - 1 - end + s.size) for s, end in zip(scores, ends, strict=True))
    return [start - lax.iota(jnp.uint32, s.size).reshape(s.shape) for s, start in zip(scores, starts, strict=True)]


@functools.partial(jax.jit, static_argnames="order")
def select(
    scores: list[Array], where: list[Array], k: Array, *rest: Any, order: Callable[..., list[Array]] = _by_position
) -> list[Array]:
    """Masks of the ``k`` highest; of equal ones those highest in ``order(scores, *rest)``, uint32, no two equal."""
    where = [jnp.broadcast_to(w, s.shape) for w, s in zip(where, scores, strict=True)]
    # A position that is no candidate gets key 0. So may a candidate (NaN); the test of ``where`` below parts them.
    keys = [jnp.where(w, _order_keys(s), jnp.uint32(0)) for w, s in zip(where, scores, strict=True)]
    candidates = _total(where)
    k = jnp.clip(k, 0, candidates)
    lowest, reached = _kth_key(keys, k, candidates)

    def all_that_reach() -> list[Array]:
        return [w & (key >= lowest) for w, key in zip(where, keys, strict=True)]

    def parted() -> list[Array]:
        tied = [w & (key == lowest) for w, key in zip(where, keys, strict=True)]
        number = _total(tied)
        ranks = [jnp.where(of, rank, jnp.uint32(0)) for of, rank in zip(tied, order(scores, *rest), strict=True)]
        last, _ = _kth_key(ranks, k - (reached - number), number)
        each = zip(all_that_reach(), tied, ranks, strict=True)
        return [mask & (~of | (rank >= last)) for mask, of, rank in each]

    masks = lax.cond(reached == k, all_that_reach, parted)
    return [mask & (k > 0) for mask in masks]


def _checked_count(k: Any, least: int = 0) -> Array:
    """``k`` as an int32 scalar, so that no new value or kind of number compiles anew."""
    if not isinstance(k, jax.Array):
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < least:
            raise ValueError(f"k={k!r} must be an integer of at least {least}.")
        k = min(int(k), np.iinfo(np.int32).max)
    elif jnp.ndim(k) or not jnp.issubdtype(k.dtype, jnp.integer):
        raise ValueError(f"k must be an integer scalar, got shape {k.shape} and dtype {k.dtype}.")
    return jnp.asarray(k, jnp.int32)


def top_k_mask(scores: Array, k: int | Array, where: Array | None = None) -> Array:
    """True at exactly the ``k`` highest scores.

    Equal scores are taken in the order of their flat index, lowest first, so the result equals that of a stable
    descending argsort. ``-0.0`` equals ``0.0``; NaN ranks below everything else, ``-inf`` included, and is taken last.
    Scores are compared as float32 (exact for float32, float16 and bfloat16) or as 32-bit integers.
    Callable inside ``jit``, ``scan`` and ``vmap``; ``k`` may be traced and a new value does not compile again.

    Args:
      scores: real numbers of any shape.
      k: how many to take, at least 0. A count above the number of candidates takes all of them.
      where: bool, broadcastable to ``scores``: the candidates. None: every entry.

    Returns:
      A bool array of the shape of ``scores`` with exactly ``min(k, number of candidates)`` entries True.

    Raises:
      ValueError: where ``k`` is negative or not an integer, or ``scores`` are complex.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> oxs.top_k_mask(jnp.array([3.0, 1.0, 3.0, 2.0, 3.0]), 2).tolist()
      [True, False, True, False, False]
      >>> oxs.top_k_mask(jnp.array([3.0, 1.0, 2.0]), 1, where=jnp.array([False, True, True])).tolist()
      [False, False, True]
    """
    return top_k_mask_tree([scores], k, None if where is None else [where])[0]


def top_k_mask_tree(scores: PyTree, k: int | Array, where: PyTree | None = None) -> PyTree:
    """True at exactly the ``k`` highest scores over all leaves of a tree together.

    One threshold is found for the whole tree from counts summed over the leaves, which are never concatenated.
    Ties go to the earlier leaf in flattening order, then to the lower flat index. Otherwise as ``top_k_mask``.

    Args:
      scores: tree of real arrays.
      k: how many to take over the whole tree, at least 0.
      where: tree of the structure of ``scores`` (or a prefix of it): bool arrays, or a scalar for a whole leaf;
        a leaf to skip has a scalar False. None: every entry of every leaf.

    Returns:
      Tree of the structure of ``scores`` of bool arrays with ``min(k, number of candidates)`` entries True in all.

    Raises:
      ValueError: as ``top_k_mask``; where ``where`` has another structure; where leaves mix kinds of numbers (float,
        signed, unsigned, bool); at 2**31 entries or more.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> scores = {"a": jnp.array([5.0, 1.0]), "b": jnp.array([4.0, 9.0]), "c": jnp.array([99.0])}
      >>> masks = oxs.top_k_mask_tree(scores, 2, where={"a": True, "b": True, "c": False})
      >>> {name: mask.tolist() for name, mask in masks.items()}
      {'a': [True, False], 'b': [False, True], 'c': [False]}
    """
    count = _checked_count(k)
    leaves, treedef = jax.tree.flatten(scores)
    if not leaves:
        return scores
    arrays = [jnp.asarray(leaf) for leaf in leaves]
    if len({_kind(array.dtype) for array in arrays}) > 1:
        raise ValueError(
            f"scores mix kinds of numbers ({sorted({str(a.dtype) for a in arrays})}); cast them to one kind."
        )
    if sum(array.size for array in arrays) >= 2**31:
        raise ValueError("scores hold 2**31 entries or more; select within parts of the tree.")
    candidates = jax.tree.leaves(align(True if where is None else where, scores, "where"))
    return jax.tree.unflatten(treedef, select(arrays, [jnp.asarray(w, bool) for w in candidates], count))


def kth_largest(values: Array, k: int | Array) -> Array:
    """The exact k-th largest entry of an array, counting equal entries as often as they stand.

    Order and dtypes are those of ``top_k_mask``; NaN is the smallest. ``k`` may be traced.

    Args:
      values: real numbers of any shape, at least one.
      k: 1 is the maximum, ``values.size`` the minimum. A traced ``k`` is clipped to that range.

    Returns:
      A scalar of the dtype of ``values``.

    Raises:
      ValueError: where a ``k`` that is not traced lies outside 1 to ``values.size``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> float(oxs.kth_largest(jnp.array([[4.0, 7.0], [7.0, 1.0]]), 3))
      4.0
    """
    values = jnp.asarray(values)
    count = _checked_count(k, least=1)
    if not isinstance(k, jax.Array) and k > values.size:
        raise ValueError(f"k={k} exceeds the {values.size} entries of values.")
    # Taken from the array by position: a minimum of floats would flush denormals on some hardware.
    mask, keys = top_k_mask(values, jnp.maximum(count, 1)), _order_keys(values)
    lowest = jnp.min(keys, where=mask, initial=np.uint32(0xFFFFFFFF))
    return values.ravel()[jnp.argmax(mask & (keys == lowest))]
