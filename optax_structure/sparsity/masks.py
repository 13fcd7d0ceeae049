"""Masks: which connections of a network exist. Their number, their distribution over the leaves, their use.

A masks tree has the structure of the params: a bool array of the leaf's shape where the leaf is sparse, and a scalar
``True`` where it is not. Kernels are ``(..., in, out)``; the last axis holds the units that the kernel produces.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_structure._tree import Params, PyTree, align, leaves_by_path, map_with_path
from optax_structure.sparsity.draws import random_scores
from optax_structure.sparsity.patterns import Pattern
from optax_structure.sparsity.topk import top_k_mask

Masks = PyTree


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether a leaf holds connections: it has two axes or more and is not an embedding table.

    Args:
      path: the leaf's path, as ``"encoder/hidden_1/kernel"``.
      leaf: an array or anything with ``ndim``.

    Returns:
      True for kernels of dense and convolutional layers; False for biases, scales and leaves named ``embedding``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> oxs.is_kernel("hidden/kernel", jnp.ones((4, 3))), oxs.is_kernel("hidden/bias", jnp.ones(3))
      (True, False)
    """
    return getattr(leaf, "ndim", 0) >= 2 and path.rsplit("/", 1)[-1] != "embedding"


def check_distribution(distribution: str) -> None:
    """Raise ``ValueError`` for an unknown one."""
    if distribution not in ("erk", "uniform"):
        raise ValueError(f"distribution={distribution!r} is unknown; choose 'erk' or 'uniform'.")


def random_masks(
    key: Array,
    params: Params,
    density: float | Mapping[str, float],
    labels: PyTree | Callable[[Params], PyTree] | None = None,
    *,
    distribution: Literal["erk", "uniform"] = "erk",
    select: Callable[[str, Any], bool] = is_kernel,
    min_fan_in: int = 1,
    pattern: Pattern | None = None,
) -> Masks:
    """Random masks with an exact number of connections, and no unit left without inputs.

    Over the sparse leaves (one group, or one group a label) exactly ``round(density * entries)`` connections exist.
    Leaf i of the group gets a share proportional to its weight, never below ``min_fan_in`` a unit and never above
    its size; what a bound takes or frees is shared out among the other leaves in proportion, and whole numbers are
    made by largest remainder. The weight is the leaf's size for ``"uniform"`` (one density for all), and the sum of
    its axes, as ``in + out + kh + kw``, for ``"erk"``: that makes its density proportional to
    ``(in + out + kh + kw) / (in * out * kh * kw)``, so small leaves stay denser than large ones.
    Within a leaf each unit first draws ``min_fan_in`` inputs; the rest falls uniformly on what is left.

    Args:
      key: a JAX random key.
      params: arrays or ``jax.ShapeDtypeStruct``; only shapes are read.
      density: share of connections kept, in (0, 1]; or label -> share, each label's leaves being one group.
      labels: tree of labels or function of the params; read where ``density`` is a mapping.
      distribution: ``"erk"`` or ``"uniform"``.
      select: ``select(path, leaf)`` says which leaves are sparse.
      min_fan_in: least number of incoming connections of every unit (last axis); a kernel's fan-in is the product
        of its other axes, so ``kh * kw * in`` for a convolution.
      pattern: which connections exist together: ``tiles(...)``, ``constant_fan_in()``, ``groups_of(m)``. Every leaf
        then has the whole number of tiles (inputs a unit, members a group) that is nearest to its share, at least one;
        ``min_fan_in`` is not looked at.

    Returns:
      Tree of the structure of ``params``: bool arrays for selected leaves, a scalar ``True`` for the others.

    Raises:
      ValueError: for a density outside (0, 1], or one that cannot pay for ``min_fan_in`` (the message names the
        smallest that can); a label without a density or a density without a label; a ``min_fan_in`` above a leaf's
        fan-in; an unknown distribution; no selected leaf; a leaf that the pattern does not fit.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> hidden, head = {"kernel": jnp.ones((784, 256)), "bias": jnp.ones(256)}, {"kernel": jnp.ones((256, 10))}
      >>> params = {"hidden": hidden, "head": head}
      >>> masks = oxs.random_masks(jax.random.key(0), params, 0.02)
      >>> oxs.nonzero(masks) == round(0.02 * (784 * 256 + 256 * 10))
      True
      >>> oxs.nonzero(masks["hidden"]), oxs.nonzero(masks["head"]), masks["hidden"]["bias"].shape
      (3237, 828, ())

    References:
      Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity, 2018 (ER);
      Evci et al., Rigging the lottery, 2020 (ERK).
    """
    check_distribution(distribution)
    if isinstance(min_fan_in, bool) or not isinstance(min_fan_in, (int, np.integer)) or min_fan_in < 0:
        raise ValueError(f"min_fan_in={min_fan_in!r} must be an integer of at least 0.")
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves_by_path(params).items() if select(path, leaf)}
    if not shapes:
        raise ValueError("select chooses no leaf of params, so there is nothing to mask; pass another select.")
    for path, shape in shapes.items():
        if pattern is not None:
            pattern.check(path, shape)
        elif math.prod(shape[:-1]) < min_fan_in:
            raise ValueError(f"min_fan_in={min_fan_in} exceeds the fan-in {math.prod(shape[:-1])} of {path!r}.")

    counts = leaf_counts(
        params, density, labels, distribution, shapes=shapes, min_fan_in=0 if pattern is not None else int(min_fan_in)
    )
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))

    def mask_of(path: str, leaf: Any) -> Array:
        del leaf
        if path not in shapes:
            return jnp.asarray(True)
        shape = shapes[path]
        if pattern is not None:
            number = max(1, round(counts[path] / math.prod(shape) * pattern.cells(shape)))
            one, two = jax.random.split(keys[path])
            return pattern.top(random_scores(one, shape), jnp.int32(number), jnp.ones(shape, bool), two)
        return _random_mask(keys[path], shape, counts[path], int(min_fan_in))

    return map_with_path(mask_of, params)


def full_masks(params: Params, select: Callable[[str, Any], bool] = is_kernel) -> Masks:
    """Masks of a network that is dense as yet: what pruning starts from.

    Args:
      params: arrays or ``jax.ShapeDtypeStruct``; only shapes are read.
      select: ``select(path, leaf)`` says which leaves may become sparse.

    Returns:
      Tree of the structure of ``params``: all True for selected leaves, a scalar ``True`` for the others.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> oxs.full_masks({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})["kernel"].tolist()
      [[True, True], [True, True]]
    """
    return map_with_path(lambda path, leaf: jnp.ones(leaf.shape if select(path, leaf) else (), bool), params)


def leaf_counts(
    params: Params,
    density: float | Mapping[str, float],
    labels: PyTree | Callable[[Params], PyTree] | None,
    distribution: str,
    *,
    shapes: Mapping[str, tuple[int, ...]],
    min_fan_in: int = 0,
) -> dict[str, int]:
    """How many connections each sparse leaf has at a density; ``shapes`` are those of the sparse leaves."""
    counts: dict[str, int] = {}
    for name, share, paths in _groups(density, labels, params, shapes):
        counts |= _leaf_counts({path: shapes[path] for path in paths}, share, distribution, min_fan_in, name)
    return counts


def _groups(
    density: float | Mapping[str, float], labels: Any, params: Params, shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, float, list[str]]]:
    """Name for messages, density and paths of each group that has a budget of its own."""
    if not isinstance(density, Mapping):
        return [(f"density={density!r}", checked_density(density, "density"), list(shapes))]
    if labels is None:
        raise ValueError("density is a mapping from labels, so labels are needed; pass labels= or a single density.")
    label_of = leaves_by_path(align(labels, params, "labels"))
    if unknown := sorted(set(density) - set(label_of.values())):
        raise ValueError(
            f"density names {unknown}, which no leaf is labelled; labels: {sorted(set(label_of.values()))}."
        )
    groups: dict[str, list[str]] = {}
    for path in shapes:
        if label_of[path] not in density:
            raise ValueError(
                f"density has no entry for the label {label_of[path]!r} of {path!r}; it has {sorted(density)}."
            )
        groups.setdefault(label_of[path], []).append(path)
    return [
        (f"density[{label!r}]={density[label]!r}", checked_density(density[label], f"density[{label!r}]"), paths)
        for label, paths in groups.items()
    ]


def checked_density(density: Any, name: str = "density") -> float:
    """A share of connections in (0, 1], or ``ValueError``."""
    if isinstance(density, bool) or not isinstance(density, (int, float, np.number)) or not 0 < density <= 1:
        raise ValueError(f"{name}={density!r} must be a number in (0, 1], the share of connections that is kept.")
    return float(density)


def _leaf_counts(
    shapes: Mapping[str, tuple[int, ...]], density: float, distribution: str, min_fan_in: int, name: str
) -> dict[str, int]:
    """Connections of each leaf: water-filling between the bounds, then largest remainder."""
    high = np.array([math.prod(shape) for shape in shapes.values()], np.int64)
    low = np.array([min_fan_in * shape[-1] for shape in shapes.values()], np.int64)
    weight = np.array([sum(shape) for shape in shapes.values()], np.float64) if distribution == "erk" else high * 1.0
    budget = round(density * int(high.sum()))
    if budget < low.sum():
        raise ValueError(
            f"{name} gives {budget} connections, fewer than the {low.sum()} that min_fan_in={min_fan_in} needs; the "
            f"smallest density that can pay is {float(low.sum() / high.sum())!r}. Raise it or lower min_fan_in."
        )
    # The sum below grows with the factor, so halving the interval finds the one that meets the budget.
    below, above = 0.0, float(np.max(high / weight))
    for _ in range(100):
        factor = (below + above) / 2
        reached = np.clip(factor * weight, low, high).sum()
        below, above = (factor, above) if reached < budget else (below, factor)
    exact = np.clip(above * weight, low, high)
    counts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    open_leaves = by_remainder[counts[by_remainder] < high[by_remainder]]
    counts[open_leaves[: budget - counts.sum()]] += 1
    return dict(zip(shapes, counts.tolist(), strict=True))


@functools.partial(jax.jit, static_argnums=(1, 3))
def _random_mask(key: Array, shape: tuple[int, ...], count: Array | int, min_fan_in: int) -> Array:
    flat = (math.prod(shape[:-1]), shape[-1])
    first, rest = jax.random.split(key)
    # Random integers, not floats: they use all 32 bits, so ties (which favour low positions) are next to none.
    draws = jax.random.bits(first, flat) | np.uint32(1)

    def place_one(_: Any, placed: Array) -> Array:
        best = jnp.argmax(jnp.where(placed, jnp.uint32(0), draws), axis=0)
        return placed | (jnp.arange(flat[0])[:, None] == best)

    placed = jax.lax.fori_loop(0, min_fan_in, place_one, jnp.zeros(flat, bool))
    mask = placed | top_k_mask(jax.random.bits(rest, flat), count - min_fan_in * shape[-1], where=~placed)
    return mask.reshape(shape)


def apply_masks(params: Params, masks: Masks) -> Params:
    """Weights off the mask become exactly 0 (NaN and infinity too); dtypes and other leaves stay.

    Args:
      params: tree of arrays.
      masks: tree of masks of the same structure.

    Returns:
      The masked params.

    Raises:
      ValueError: where ``masks`` have another structure, or a mask another shape than its leaf, naming it.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([5.0, 6.0])}
      >>> masked = oxs.apply_masks(params, {"kernel": jnp.array([[True, False]]), "bias": jnp.asarray(True)})
      >>> masked["kernel"].tolist(), masked["bias"].tolist()
      ([[1.0, 0.0]], [5.0, 6.0])
    """

    def masked(path: str, leaf: Any, mask: Any) -> Any:
        if not jnp.ndim(mask):
            return leaf
        if jnp.shape(mask) != jnp.shape(leaf):
            raise ValueError(f"masks have shape {jnp.shape(mask)} at {path!r} where params have {jnp.shape(leaf)}.")
        return jnp.where(mask, leaf, jnp.zeros((), jnp.asarray(leaf).dtype))

    return map_with_path(masked, params, align(masks, params, "masks"))


def _sparse_leaves(masks: Masks) -> list[Any]:
    return [mask for mask in jax.tree.leaves(masks) if jnp.ndim(mask)]


def nonzero(masks: Masks) -> int:
    """How many connections exist, over the sparse leaves (those whose mask is not a scalar).

    Args:
      masks: tree of masks, concrete.

    Returns:
      A Python int.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> oxs.nonzero({"kernel": jnp.array([[True, False, True]]), "bias": jnp.asarray(True)})
      2
    """
    return sum(int(count) for count in [jnp.count_nonzero(mask) for mask in _sparse_leaves(masks)])


def density(masks: Masks) -> float:
    """The share of connections that exist, over the sparse leaves (those whose mask is not a scalar).

    Args:
      masks: tree of masks, concrete.

    Returns:
      A float in [0, 1]; 1.0 where no leaf is sparse.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> oxs.density({"kernel": jnp.array([[True, False, True, False]]), "bias": jnp.asarray(True)})
      0.5
    """
    size = sum(mask.size for mask in _sparse_leaves(masks))
    return nonzero(masks) / size if size else 1.0
