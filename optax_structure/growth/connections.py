"""Actions that add or remove single connections inside sparse leaves: no shape changes, nothing compiles twice.

Each has a jitted core whose count is traced, so the second event runs the first one's program. Weights are stored as
exactly 0 where there is no connection; a new connection of weight 0 leaves the network's function as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_structure._tree import Params, PyTree, align, leaves_by_path, map_with_path
from optax_structure.extrema import Extrema
from optax_structure.growth import _common as common
from optax_structure.sparsity.draws import as_scores, number, random_orders, top_k_at_random
from optax_structure.sparsity.topk import top_k_mask_tree
from optax_structure.structure import Growth, Units


def add_connections(
    params: Params,
    labels: PyTree,
    masks: PyTree,
    units: Units,
    count: int | Array,
    *,
    key: Array,
    scores: PyTree | None = None,
    component: str = "scaffold",
    init: Literal["zeros", "fan_in"] = "zeros",
) -> Growth:
    """Add exactly ``count`` connections: the absent ones with the highest scores over all sparse leaves.

    With weights of 0 the network computes what it did. A connection of weight 0 into a ReLU unit that never fires has
    no gradient either, so growth at dead units wants ``init="fan_in"``.

    Args:
      params: the params tree.
      labels: a label for every leaf.
      masks: masks of the params; leaves with the scalar ``True`` are not touched.
      units: unit groups; they name the axis over which a fan-in is counted (the last, for leaves they do not hold).
      count: how many connections, at least 1; may be traced.
      key: a JAX random key.
      scores: tree of the params' structure: arrays of the leaves' shapes, or scalars; read at sparse leaves only, for
        absent connections only. None: uniform random. See ``extrema_scores``; ``jax.tree.map(jnp.abs, grads)`` makes
        it RigL.
      component: the component of the new connections in ``born``.
      init: ``"zeros"``, or ``"fan_in"`` for normal weights with variance ``2 / living incoming connections``.

    Returns:
      ``Growth`` with the new params and masks; in ``born`` every sparse leaf has a uint8 array.

    Raises:
      ValueError: for a count below 1 or above the number of absent connections, trees of another structure or shape,
        an unknown component or init, or where no leaf is sparse.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> params = {"hidden": {"kernel": jnp.zeros((4, 3))}, "head": {"kernel": jnp.ones((3, 2))}}
      >>> masks = {"hidden": {"kernel": jnp.zeros((4, 3), bool)}, "head": {"kernel": True}}
      >>> units = oxs.dense_chain(params, ["hidden", "head"])
      >>> grown = oxs.add_connections(params, "scaffold", masks, units, 5, key=jax.random.key(0), init="fan_in")
      >>> int(grown.masks["hidden"]["kernel"].sum()), int(jnp.count_nonzero(grown.params["hidden"]["kernel"]))
      (5, 5)

    References:
      Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity, 2018 (random);
      Evci et al., Rigging the lottery, 2020 (by gradient).
    """
    leaves, label_of, mask_of = common.checked(params, labels, masks)
    sparse = common.sparse_only(mask_of)
    count = common.checked_count(count)
    code, axes = common.component_code(component), common.fan_in_axes(units, sparse, init)
    chosen = None if scores is None else _scores_of(scores, params, sparse)
    weights = {path: leaves[path] for path in sparse}
    absent, *edit = _add(key, weights, sparse, chosen, count, code, fan_in=axes)
    if not (common.traced(count) or common.traced(absent)) and count > absent:
        raise ValueError(f"count={count} connections cannot be added: the sparse leaves lack only {absent}.")
    return _edited(params, units, label_of, mask_of, *edit)


def prune_connections(
    params: Params,
    labels: PyTree,
    masks: PyTree,
    units: Units,
    count: int | Array,
    *,
    key: Array | None = None,
    scores: PyTree | None = None,
) -> Growth:
    """Remove exactly ``count`` connections: the weakest over all sparse leaves, their weights set to 0.

    Args:
      params: the params tree.
      labels: a label for every leaf.
      masks: masks of the params; leaves with the scalar ``True`` are not touched.
      units: unit groups, handed on.
      count: how many connections, at least 1; may be traced.
      key: breaks ties at random, as among weights that were born as 0. Without it the first leaf and index go first.
      scores: tree of the params' structure whose lowest entries go; arrays of the leaves' shapes, or scalars. None:
        the weights' magnitudes.

    Returns:
      ``Growth`` with the new params and masks; nothing is born.

    Raises:
      ValueError: for a count below 1 or above the number of connections, trees of another structure or shape, or
        where no leaf is sparse.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"hidden": {"kernel": jnp.array([[0.1, -3.0], [2.0, 0.0]])}}
      >>> masks = {"hidden": {"kernel": jnp.array([[True, True], [True, False]])}}
      >>> units = oxs.dense_chain(params, ["hidden"])
      >>> oxs.prune_connections(params, "scaffold", masks, units, 1).params["hidden"]["kernel"].tolist()
      [[0.0, -3.0], [2.0, 0.0]]

    References:
      Han et al., Learning both weights and connections for efficient neural networks, 2015.
    """
    leaves, label_of, mask_of = common.checked(params, labels, masks)
    sparse = common.sparse_only(mask_of)
    count = common.checked_count(count)
    chosen = None if scores is None else _scores_of(scores, params, sparse)
    present, weights, kept = _prune(key, {path: leaves[path] for path in sparse}, sparse, chosen, count)
    if not (common.traced(count) or common.traced(present)) and count > present:
        raise ValueError(f"count={count} connections cannot be pruned: only {present} exist in the sparse leaves.")
    return _edited(params, units, label_of, mask_of, weights, kept, {})


def extrema_scores(params: Params, masks: PyTree, units: Units, extrema: Extrema, *, key: Array) -> PyTree:
    """Scores for ``add_connections`` that favour the inputs of dead units and the outputs of saturated ones.

    A connection scores a uniform number in [0, 1), plus 1 where it leads into a dead unit, plus 1 where it comes from
    a saturated one: all connections of both kinds come first, then those of one kind, then the rest at random.

    Args:
      params: the params tree.
      masks: masks of the params.
      units: unit groups; connections of leaves that they do not hold get the random part alone.
      extrema: from ``find_extrema``; layers that ``units`` do not know are passed over.
      key: a JAX random key.

    Returns:
      Tree of the params' structure: float32 arrays at sparse leaves, a scalar 0 elsewhere.

    Raises:
      ValueError: where ``extrema`` share no layer with ``units``, or count other units than these.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> params = {"hidden": {"kernel": jnp.zeros((4, 3))}, "head": {"kernel": jnp.zeros((3, 2))}}
      >>> masks = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), params)
      >>> units = oxs.dense_chain(params, ["hidden", "head"])
      >>> dead, saturated = jnp.array([True, False, False]), jnp.array([False, False, True])
      >>> extrema = oxs.Extrema(dead={"hidden": dead}, saturated={"hidden": saturated})
      >>> scores = oxs.extrema_scores(params, masks, units, extrema, key=jax.random.key(0))
      >>> (scores["hidden"]["kernel"] >= 1)[0].tolist(), (scores["head"]["kernel"] >= 1)[:, 0].tolist()
      ([True, False, False], [False, False, True])
    """
    sparse = {path: mask for path, mask in leaves_by_path(align(masks, params, "masks")).items() if np.ndim(mask)}
    dead = common.unit_flags(extrema.dead, units, "extrema.dead")
    saturated = common.unit_flags(extrema.saturated, units, "extrema.saturated")
    scores = _score(key, sparse, dead, saturated, units=units)
    return map_with_path(lambda path, _: scores.get(path, np.float32(0)), params)


def _scores_of(scores: PyTree, params: Params, sparse: Mapping[str, Any]) -> dict[str, Any]:
    found = leaves_by_path(align(scores, params, "scores"))
    for path, mask in sparse.items():
        if np.ndim(found[path]) and np.shape(found[path]) != np.shape(mask):
            raise ValueError(f"scores have shape {np.shape(found[path])} at {path!r}; params have {np.shape(mask)}.")
    return {path: found[path] for path in sparse}


def _edited(
    params: Params,
    units: Units,
    labels: Mapping[str, str],
    masks: Mapping[str, Any],
    new_params: Mapping[str, Array],
    new_masks: Mapping[str, Array],
    born: Mapping[str, Array],
) -> Growth:
    """The record of an edit of masks: the new arrays lie where the old ones did."""
    old = leaves_by_path(params)
    changed = common.replace(params, {path: common.place(leaf, old[path]) for path, leaf in new_params.items()})
    placed = {path: common.place(mask, masks[path]) for path, mask in new_masks.items()}
    return common.assemble(changed, units, labels, {**masks, **placed}, born, {})


def _broadcast(scores: Mapping[str, Any], masks: Mapping[str, Array]) -> dict[str, Array]:
    return {
        path: jnp.broadcast_to(jnp.asarray(score, jnp.float32), masks[path].shape) for path, score in scores.items()
    }


@functools.partial(jax.jit, static_argnames=("fan_in",))
def _add(
    key: Array,
    params: Mapping[str, Array],
    masks: Mapping[str, Array],
    scores: Mapping[str, Any] | None,
    count: Array,
    code: Array,
    *,
    fan_in: tuple[tuple[str, int], ...] | None,
) -> tuple[Array, dict[str, Array], dict[str, Array], dict[str, Array]]:
    score_key, weight_key = jax.random.split(key)
    ranked = random_orders(score_key, masks) if scores is None else _broadcast(scores, masks)
    absent = {path: ~mask for path, mask in masks.items()}
    new = top_k_mask_tree(ranked, count, absent)
    return number(absent), *common.connect(weight_key, params, masks, new, code, fan_in)


@jax.jit
def _prune(
    key: Array | None,
    params: Mapping[str, Array],
    masks: Mapping[str, Array],
    scores: Mapping[str, Any] | None,
    count: Array,
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    strength = {path: jnp.abs(leaf) for path, leaf in params.items()} if scores is None else scores
    ranked = {path: -score for path, score in _broadcast(strength, masks).items()}
    gone = top_k_mask_tree(ranked, count, masks) if key is None else top_k_at_random(ranked, count, masks, key)
    weights = {path: jnp.where(gone[path], jnp.zeros((), leaf.dtype), leaf) for path, leaf in params.items()}
    return number(masks), weights, {path: mask & ~gone[path] for path, mask in masks.items()}


@functools.partial(jax.jit, static_argnames=("units",))
def _score(
    key: Array, masks: Mapping[str, Array], dead: common.Flags, saturated: common.Flags, *, units: Units
) -> dict[str, Array]:
    scores = {path: as_scores(bits) for path, bits in random_orders(key, masks).items()}
    for group in units.groups:
        for axis in group.axes:
            flags = {"incoming": dead, "outgoing": saturated}.get(axis.role, {})
            if axis.path in scores and group.layer in flags:
                others = tuple(other for other in range(scores[axis.path].ndim) if other != axis.axis)
                scores[axis.path] += jnp.expand_dims(jnp.tile(flags[group.layer], axis.repeats), others)
    return scores
