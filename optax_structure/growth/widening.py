"""Wider layers: new units beside the old ones, without a change of the function.

Every axis comes from the unit groups. The work is done on the host in NumPy, since nothing is worth compiling for a
shape that is met once; no old weight is rescaled, and the record says where every row came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax import Array

from optax_structure._tree import Params, PyTree
from optax_structure.growth import _common as common
from optax_structure.structure import NOT_BORN, Growth, UnitAxis, UnitGroup, Units, identity_sources, kernel_links


def widen(
    params: Params,
    labels: PyTree,
    masks: PyTree,
    units: Units,
    layer: str,
    count: int,
    *,
    key: Array,
    density: float | None = None,
    label: str | None = None,
) -> Growth:
    """Add ``count`` units to a layer; the network computes what it did.

    New units stand behind the old ones (behind a flatten: at every position). Their incoming weights are normal with
    variance ``2 / living incoming connections``; where those of a unit sum to less than 0, all change sign, because
    behind a ReLU such a unit of few connections is born dead or nearly so. Biases are 0, scales 1, and outgoing weights
    exactly 0: these learn from the first step, and the incoming ones from the second. In sparse leaves the new units
    get an even share of connections at the leaf's density, at least one in and one out each: from a unit that the input
    reaches and to one that reaches the output, where the masks leave such a unit.

    Args:
      params: any params pytree; a widened leaf keeps its dtype and its sharding, where this still divides it.
      labels: a label for every leaf.
      masks: masks of the params; leaves with the scalar ``True`` stay dense.
      units: unit groups; the axes of the layer's group grow, and nothing else.
      layer: the layer to widen: neither the input nor the output.
      count: how many units, at least 1.
      key: a JAX random key.
      density: density of the new connections in sparse leaves, in (0, 1]. None: that of each leaf.
      label: label for the leaves that grew. None: they keep theirs.

    Returns:
      ``Growth``; ``born`` marks the new connections of sparse leaves as ``new``.

    Raises:
      ValueError: for an unknown layer, the input or output group, a count below 1, a density outside (0, 1], trees of
        another structure or shape, or units that do not fit the params.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> params = {"hidden": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "head": {"kernel": jnp.ones((3, 2))}}
      >>> units = oxs.dense_chain(params, ["hidden", "head"])
      >>> grown = oxs.widen(params, "scaffold", True, units, "hidden", 2, key=jax.random.key(0))
      >>> grown.params["head"]["kernel"][:, 0].tolist()
      [1.0, 1.0, 1.0, 0.0, 0.0]
      >>> [index.tolist() for index in grown.sources["head/kernel"]]
      [[0, 1, 2, -1, -1], [0, 1]]

    References:
      Chen et al., Net2Net: accelerating learning via knowledge transfer, 2016 (function-preserving growth);
      He et al., Delving deep into rectifiers, 2015 (the variance).
    """
    leaves, label_of, mask_of = common.checked(params, labels, masks)
    group = common.inner_group(units, layer, "layer", "widened")
    count = int(common.checked_count(count))
    common.check_density(density)
    rng = common.host_rng(key)
    partners = _partners(units, layer, mask_of)

    new: dict[str, np.ndarray] = {}
    new_masks: dict[str, np.ndarray] = {}
    born: dict[str, np.ndarray] = {}
    sources = identity_sources(params)
    for axis in group.axes:
        path = axis.path
        leaf, mask = new.get(path, np.asarray(leaves[path])), np.asarray(new_masks.get(path, mask_of[path]))
        common.check_axis(group, axis, leaf.shape)
        shape = (*leaf.shape[: axis.axis], axis.repeats * count, *leaf.shape[axis.axis + 1 :])
        living = np.ones(shape, bool)
        if mask.ndim:
            if (path, axis.role) in partners:
                living = _connections(rng, axis, shape, partners[path, axis.role], density or float(mask.mean()))
            birth = born.get(path, np.full(mask.shape, NOT_BORN, np.uint8))
            born[path] = _extend(birth, np.where(living, common.NEW, NOT_BORN), axis.axis, axis.repeats)
            new_masks[path] = _extend(mask, living, axis.axis, axis.repeats)
        new[path] = _extend(leaf, _initial(rng, axis, living), axis.axis, axis.repeats)
        moved = list(sources[path])
        moved[axis.axis] = _extend(moved[axis.axis], np.full(axis.repeats * count, -1), 0, axis.repeats)
        sources[path] = tuple(moved)

    placed = {path: common.place(leaf, leaves[path]) for path, leaf in new.items()}
    return common.assemble(
        common.replace(params, placed),
        _widened(units, group, count),
        label_of if label is None else label_of | dict.fromkeys(new, label),
        mask_of | {path: common.place(mask, mask_of[path]) for path, mask in new_masks.items()},
        {path: common.place(births, mask_of[path]) for path, births in born.items()},
        sources,
    )


def _partners(units: Units, layer: str, masks: Mapping[str, Any]) -> dict[tuple[str, str], tuple[int, np.ndarray]]:
    """For each kernel of a layer and role: the axis of the units at the other end, and which of these are connected.

    In front of the layer these are the units that the input reaches, behind it those that reach the output.
    """
    fed = {group.layer: np.zeros(group.size, bool) for group in units.groups}
    heard = {group.layer: np.zeros(group.size, bool) for group in units.groups}
    for group in units.groups:
        roles = {axis.role for axis in group.axes}
        fed[group.layer] |= "incoming" not in roles
        heard[group.layer] |= "outgoing" not in roles
    links = kernel_links(units)
    exists = {}
    for link in links:
        mask = np.asarray(masks[link.path])
        size = (units.group(link.source).size * link.repeats, units.group(link.target).size)
        ends = np.moveaxis(mask, (link.in_axis, link.out_axis), (-2, -1)) if mask.ndim else mask
        exists[link] = ends.reshape(-1, *size).any(0) if mask.ndim else np.ones(size, bool)
    for link in links:
        fed[link.target] |= exists[link][np.tile(fed[link.source], link.repeats)].any(0)
    for link in reversed(links):
        hears = exists[link][:, heard[link.target]].any(1)
        heard[link.source] |= hears.reshape(link.repeats, -1).any(0)
    partners = {}
    for link in links:
        if link.target == layer:
            partners[link.path, "incoming"] = (link.in_axis, np.tile(fed[link.source], link.repeats))
        if link.source == layer:
            partners[link.path, "outgoing"] = (link.out_axis, heard[link.target])
    return partners


def _by_unit(block: np.ndarray, axis: UnitAxis) -> np.ndarray:
    """A block of new positions as (units, everything else)."""
    lines = np.moveaxis(block, axis.axis, 0)
    return lines.reshape(axis.repeats, -1, lines[0].size).swapaxes(0, 1).reshape(len(lines) // axis.repeats, -1)


def _from_units(rows: np.ndarray, axis: UnitAxis, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of ``_by_unit`` for a block of the given shape."""
    rest = shape[: axis.axis] + shape[axis.axis + 1 :]
    lines = rows.reshape(len(rows), axis.repeats, -1).swapaxes(0, 1)
    return np.moveaxis(lines.reshape(-1, *rest), 0, axis.axis)


def _connections(
    rng: np.random.Generator, axis: UnitAxis, shape: tuple[int, ...], partners: tuple[int, np.ndarray], density: float
) -> np.ndarray:
    """Which new connections exist: an even share for each unit, the first of them with a connected partner."""
    other, connected = partners
    if len(connected) != shape[other]:  # a kernel that reads the layer that it makes, and has grown already
        connected = np.ones(shape[other], bool)
    preferred = np.broadcast_to(connected.reshape([-1 if at == other else 1 for at in range(len(shape))]), shape)
    rank = _by_unit(rng.random(shape), axis)
    units, each = rank.shape
    first = np.argmax(rank + _by_unit(preferred, axis), axis=1)
    rank[np.arange(units), first] = 2.0
    number = max(units, round(density * units * each))
    share = number // units + (np.arange(units) < number % units)
    taken = np.argsort(np.argsort(-rank, axis=1), axis=1) < share[:, None]
    return _from_units(taken, axis, shape)


def _initial(rng: np.random.Generator, axis: UnitAxis, living: np.ndarray) -> np.ndarray:
    """Values of new positions: random for incoming weights, neutral for everything else."""
    if axis.role != "incoming":
        return np.full(living.shape, 1.0 if axis.role == "scale" else 0.0)
    exists = _by_unit(living, axis)
    weights = rng.standard_normal(exists.shape) * np.sqrt(2.0 / exists.sum(1, keepdims=True)) * exists
    # Behind a ReLU inputs are not negative, so a unit whose weights sum to less than 0 would hardly ever fire.
    return _from_units(np.where(weights.sum(1, keepdims=True) < 0, -weights, weights), axis, living.shape)


def _extend(leaf: np.ndarray, block: np.ndarray, axis: int, repeats: int) -> np.ndarray:
    """``leaf`` with new positions behind each repeat of its units, in its own dtype."""
    parts = [np.split(array, repeats, axis) for array in (leaf, block.astype(leaf.dtype))]
    return np.concatenate([part for pair in zip(*parts, strict=True) for part in pair], axis)


def _widened(units: Units, group: UnitGroup, count: int) -> Units:
    """Units after the widening: a larger group, and patches that read its flattened map at the new positions."""
    repeats = {link.target: link.repeats for link in kernel_links(units) if link.source == group.layer}
    groups = tuple(g._replace(size=g.size + count) if g is group else g for g in units.groups)
    patches = tuple(
        patch._replace(reads=tuple(at + at // group.size * count for at in patch.reads))
        if repeats.get(patch.layer, 1) > 1
        else patch
        for patch in units.patches
    )
    return Units(groups, patches)
