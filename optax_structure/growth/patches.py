"""Patches: small dense parts in a sparse network, as leaves of their own or embedded in the kernels.

``add_patches`` makes side branches with leaves of their own, labelled ``patch``, which ``apply_patches`` adds to a
layer's output. ``embed_patches`` makes all connections of small blocks inside sparse kernels: these are elements of
leaves that stay, told apart by the component code in ``Growth.born``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_structure._tree import Params, PyTree, leaves_by_path
from optax_structure.extrema import Extrema
from optax_structure.growth import _common as common
from optax_structure.growth.connections import _edited
from optax_structure.sparsity.draws import random_orders
from optax_structure.sparsity.topk import top_k_mask_tree
from optax_structure.structure import Growth, Link, Patch, Units, kernel_links

Places = tuple[np.ndarray, np.ndarray]
"""Inputs and outputs of blocks on one kernel: two integer arrays with a row a block."""


def add_patches(
    params: Params,
    labels: PyTree,
    masks: PyTree,
    units: Units,
    layer: str,
    count: int,
    *,
    key: Array,
    size: int = 8,
    hidden: int = 8,
    extrema: Extrema | None = None,
) -> Growth:
    """Add ``count`` small dense side branches to the output of ``layer``, each with leaves of its own.

    A patch computes ``y[..., writes] += relu(x[..., reads] @ down + bias) @ up`` before the activation of ``layer``
    (see ``apply_patches``). ``up`` is born as 0, so the network computes what it did; ``down`` is normal with variance
    ``2 / reads``. With extrema a patch writes to dead units and reads saturated ones, each in one patch first, then
    others at random, dead inputs last. A dead ReLU unit passes no gradient to what writes to it: only units
    that fire now and then can be helped.

    Args:
      params: the params tree; its root must be a mapping with text keys (dict, FrozenDict, ``nnx.State``).
      labels: a label for every leaf; the new leaves get ``patch``.
      masks: masks of the params; the new leaves get the scalar ``True``.
      units: unit groups; the new patches are recorded in ``units.patches``.
      layer: the layer that is added to: dense, or a convolution that keeps height and width.
      count: how many patches, at least 1.
      key: a JAX random key.
      size: inputs and outputs of each patch; at most those that the layer has are taken.
      hidden: hidden units of each patch.
      extrema: from ``find_extrema``. None: reads and writes at random.

    Returns:
      ``Growth`` whose params hold ``patch_0``, ``patch_1``, ... (the first free numbers) at the root.

    Raises:
      ValueError: for an unknown layer or the input, a count, size or hidden below 1, or a root without text keys.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> params = {"hidden": {"kernel": jnp.ones((4, 3))}, "head": {"kernel": jnp.ones((3, 2))}}
      >>> units = oxs.dense_chain(params, ["hidden", "head"])
      >>> grown = oxs.add_patches(params, "scaffold", True, units, "head", 1, key=jax.random.key(0), size=2, hidden=5)
      >>> jax.tree.map(jnp.shape, grown.params["patch_0"])
      {'down': {'bias': (5,), 'kernel': (2, 5)}, 'up': {'kernel': (5, 2)}}
      >>> grown.labels["patch_0"]["up"]["kernel"]
      'patch'
    """
    leaves, label_of, mask_of = common.checked(params, labels, masks)
    units.group(layer)
    link = next((link for link in kernel_links(units) if link.target == layer), None)
    if link is None:
        raise ValueError(
            f"layer={layer!r} reads nothing in units, so no patch fits; choose one of {list(units.layers)}."
        )
    count, size, hidden = (
        int(common.checked_count(value, name)) for value, name in ((count, "count"), (size, "size"), (hidden, "hidden"))
    )
    if not common.text_keyed(params):
        raise ValueError(
            f"params are a {type(params).__name__} at the root, where patches need a mapping with text keys to stand "
            "in; hold the params in a dict."
        )
    rng, kernel = common.host_rng(key), leaves[link.path]
    reads, writes = _places(rng, link, np.shape(kernel), size, count, *_flags(extrema, units))
    taken = {str(name) for name in params}
    names = [name for name in (f"patch_{i}" for i in range(count + len(taken))) if name not in taken][:count]
    pairs = zip(names, reads.tolist(), writes.tolist(), strict=True)
    patches = tuple(Patch(name, layer, tuple(read), tuple(write)) for name, read, write in pairs)
    new = {patch.name: _branch(rng, len(patch.reads), hidden, len(patch.writes), kernel) for patch in patches}
    shapes = {path: np.shape(leaf) for path, leaf in leaves_by_path(new).items()}
    return common.assemble(
        type(params)({**params, **new}),
        units._replace(patches=units.patches + patches),
        label_of | dict.fromkeys(shapes, "patch"),
        mask_of | dict.fromkeys(shapes, True),
        {},
        {path: tuple(np.full(length, -1, np.int32) for length in shape) for path, shape in shapes.items()},
    )


def apply_patches(params: Params, units: Units, layer: str, x: Array, y: Array) -> Array:
    """Add what the patches of ``layer`` compute to its output, before the activation.

    ``y[..., writes] += relu(x[..., reads] @ down + bias) @ up`` for each patch of the layer; patches of equal shapes
    run as one batched product. Pure, for use inside the jitted forward pass; ``y`` itself where the layer has none.

    Args:
      params: the params tree with the patches' leaves at the root.
      units: unit groups that record the patches (static).
      layer: the layer whose output ``y`` is.
      x: the layer's input, ``(..., inputs)``.
      y: the layer's output before its activation, ``(..., units)``.

    Returns:
      An array of the shape and dtype of ``y``.

    Raises:
      ValueError: for an unknown layer.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> params = {"head": {"kernel": jnp.ones((4, 2))}}
      >>> units = oxs.dense_chain(params, ["head"])
      >>> grown = oxs.add_patches(params, "scaffold", True, units, "head", 3, key=jax.random.key(0), size=2)
      >>> x = jnp.ones((5, 4))
      >>> oxs.apply_patches(grown.params, grown.units, "head", x, x @ params["head"]["kernel"])[0].tolist()
      [4.0, 4.0]
    """
    units.group(layer)
    alike: dict[tuple[int, ...], list[Patch]] = {}
    for patch in units.patches:
        if patch.layer == layer:
            shape = (len(patch.reads), *np.shape(params[patch.name]["up"]["kernel"]))
            alike.setdefault(shape, []).append(patch)
    for patches in alike.values():
        leaves = [params[patch.name] for patch in patches]
        down, up = (jnp.stack([leaf[part]["kernel"] for leaf in leaves]) for part in ("down", "up"))
        bias = jnp.stack([leaf["down"]["bias"] for leaf in leaves])
        read = x[..., np.array([patch.reads for patch in patches])]
        active = jax.nn.relu(jnp.einsum("...pr,prh->...ph", read, down) + bias)
        out = jnp.einsum("...ph,phw->...pw", active, up).astype(y.dtype)
        y = y.at[..., np.array([patch.writes for patch in patches])].add(out)
    return y


def embed_patches(
    params: Params,
    labels: PyTree,
    masks: PyTree,
    units: Units,
    count: int,
    *,
    key: Array,
    size: int = 8,
    tile: int | None = None,
    extrema: Extrema | None = None,
    component: str = "patch",
    init: Literal["zeros", "fan_in"] = "zeros",
    max_new: int | Array | None = None,
) -> Growth:
    """Embed ``count`` small dense blocks in the sparse kernels between layers.

    A block connects ``size`` units to each of ``size`` units of the next layer (through every tap of a convolution's
    kernel); they need not be neighbours. With extrema a kernel is drawn in proportion to the dead units that it makes
    and the saturated ones that it reads, and a block leads from saturated to dead units, each in one block first,
    filled up at random with dead sources last. Without extrema kernels are drawn by their size, and units at random.
    Connections that exist keep their weights; how many are new depends on the overlap, unless ``max_new`` bounds it.

    With ``tile=`` every block is a tile of the grid that ``tiles(tile)`` lays over the dense kernels, so that masks
    made of tiles stay so and the network stays as fast as it is small (``nn.BlockLinear``). Tiles that are not whole
    yet are drawn in proportion to the saturated units that they read and the dead ones that they write, those without
    any last. Convolutions and kernels smaller than a tile are passed over.

    Args:
      params: the params tree.
      labels: a label for every leaf; unchanged, since the new connections are elements of leaves that stay.
      masks: masks of the params.
      units: unit groups.
      count: how many blocks, at least 1. Up to 8, or up to the next power of two, share one compiled program.
      key: a JAX random key.
      size: units on each side of a block; at most those that a layer has are taken.
      tile: units on each side of a tile, instead of ``size``. None: blocks that fit no grid.
      extrema: from ``find_extrema``; layers that ``units`` do not know are passed over.
      component: the component of the new connections in ``born``.
      init: ``"zeros"`` (the network computes what it did), or ``"fan_in"`` for normal weights with variance
        ``2 / living incoming connections``: a ReLU unit that never fires needs these to come back.
      max_new: at most so many of the blocks' new connections are made, drawn at random; may be traced. None: all.

    Returns:
      ``Growth`` with the new params and masks; in ``born`` every sparse kernel has a uint8 array.

    Raises:
      ValueError: for a count, size or tile below 1, a negative ``max_new``, one beside ``tile``, trees of another
        structure or shape, an unknown component or init, where no kernel between layers is sparse, or fewer tiles than
        ``count`` are left.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> params = {"hidden": {"kernel": jnp.zeros((9, 6))}, "head": {"kernel": jnp.ones((6, 2))}}
      >>> masks = {"hidden": {"kernel": jnp.zeros((9, 6), bool)}, "head": {"kernel": True}}
      >>> units = oxs.dense_chain(params, ["hidden", "head"])
      >>> grown = oxs.embed_patches(params, "scaffold", masks, units, 1, key=jax.random.key(0), size=3)
      >>> mask = grown.masks["hidden"]["kernel"]
      >>> int(mask.sum()), int(mask.any(axis=1).sum()), int(mask.any(axis=0).sum())
      (9, 3, 3)
    """
    leaves, label_of, mask_of = common.checked(params, labels, masks)
    links = tuple(link for link in kernel_links(units) if np.ndim(mask_of[link.path]))
    if not links:
        raise ValueError("masks are sparse in no kernel between layers of units, so no block can be embedded in one.")
    count, size = int(common.checked_count(count)), int(common.checked_count(size, "size"))
    limit = None if max_new is None else common.checked_count(max_new, "max_new", least=0)
    sparse = {link.path: mask_of[link.path] for link in links}
    code, axes = common.component_code(component), common.fan_in_axes(units, sparse, init)

    if tile is not None and limit is not None:
        raise ValueError(f"max_new={max_new} would leave tiles that are not whole; leave it out, or tile={tile}.")
    side = size if tile is None else int(common.checked_count(tile, "tile"))

    rng = common.host_rng(key)
    dead, saturated = _flags(extrema, units)
    choose = _anywhere if tile is None else _tiles
    room = max(8, 1 << (count - 1).bit_length())
    blocks = []
    for link, (reads, writes) in zip(links, choose(rng, links, sparse, side, count, dead, saturated), strict=True):
        # Rows beyond the last block point outside the kernel and are dropped, so the arrays' sizes do not change.
        empty = np.full((room - len(reads), reads.shape[1]), np.shape(sparse[link.path])[link.in_axis], np.int32)
        unused = np.zeros((room - len(reads), writes.shape[1]), np.int32)
        blocks.append((np.concatenate([reads, empty]), np.concatenate([writes, unused])))
    weights = {path: leaves[path] for path in sparse}
    edit = _embed(key, weights, sparse, blocks, limit, code, links=links, fan_in=axes)
    return _edited(params, units, label_of, mask_of, *edit)


def _branch(rng: np.random.Generator, reads: int, hidden: int, writes: int, kernel: Any) -> dict[str, dict[str, Any]]:
    """The leaves of one patch, on the devices and in the dtype of the kernel that it stands beside."""
    down = rng.standard_normal((reads, hidden)) * np.sqrt(2.0 / reads)
    leaves = {"down": {"kernel": down, "bias": np.zeros(hidden)}, "up": {"kernel": np.zeros((hidden, writes))}}
    return jax.tree.map(lambda leaf: common.place_whole(leaf.astype(kernel.dtype), kernel), leaves)


def _flags(extrema: Extrema | None, units: Units) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Dead and saturated units of every layer on the host; none where nothing is known."""
    nothing = {group.layer: np.zeros(group.size, bool) for group in units.groups}
    if extrema is None:
        return nothing, nothing
    dead = common.unit_flags(extrema.dead, units, "extrema.dead")
    saturated = common.unit_flags(extrema.saturated, units, "extrema.saturated")
    dead, saturated = jax.device_get((dead, saturated))
    return {**nothing, **dead}, {**nothing, **saturated}


def _places(
    rng: np.random.Generator,
    link: Link,
    shape: tuple[int, ...],
    size: int,
    count: int,
    dead: Mapping[str, np.ndarray],
    saturated: Mapping[str, np.ndarray],
) -> Places:
    """``count`` blocks on one kernel."""
    asleep, busy = (np.tile(flags[link.source], link.repeats) for flags in (dead, saturated))
    reads = common.draw(rng, busy, asleep, min(size, shape[link.in_axis]), count)
    target = dead[link.target]
    return reads, common.draw(rng, target, np.zeros_like(target), min(size, shape[link.out_axis]), count)


def _anywhere(
    rng: np.random.Generator,
    links: tuple[Link, ...],
    masks: Mapping[str, Any],
    size: int,
    count: int,
    dead: Mapping[str, np.ndarray],
    saturated: Mapping[str, np.ndarray],
) -> list[Places]:
    """``count`` blocks on all kernels."""
    shapes = [np.shape(masks[link.path]) for link in links]
    weight = np.array([dead[link.target].sum() + saturated[link.source].sum() for link in links], np.float64)
    if not weight.any():
        weight = np.array([math.prod(shape) for shape in shapes], np.float64)
    share = rng.multinomial(count, weight / weight.sum()).tolist()
    return [
        _places(rng, link, shape, size, number, dead, saturated)
        for link, shape, number in zip(links, shapes, share, strict=True)
    ]


def _tiles(
    rng: np.random.Generator,
    links: tuple[Link, ...],
    masks: Mapping[str, Any],
    tile: int,
    count: int,
    dead: Mapping[str, np.ndarray],
    saturated: Mapping[str, np.ndarray],
) -> list[Places]:
    """``count`` tiles on all kernels, of those that are not whole; their units beyond an edge are dropped later."""
    ranks = []
    for link in links:
        mask = np.asarray(masks[link.path])
        if mask.ndim != 2 or min(mask.shape) < tile:  # of a convolution, or a head that no layer of tiles could hold
            ranks.append(np.full((1, 1), -np.inf))
            continue
        mask = mask if link.in_axis == 0 else mask.T
        rows, columns = (np.arange(0, units, tile) for units in mask.shape)
        reads = np.add.reduceat(np.tile(saturated[link.source], link.repeats), rows, dtype=np.float64)
        writes = np.add.reduceat(dead[link.target], columns, dtype=np.float64)
        whole = np.logical_and.reduceat(np.logical_and.reduceat(mask, rows, axis=0), columns, axis=1)
        # The highest of log(weight) + Gumbel noise are a draw without replacement in proportion to the weights.
        rank = np.log(reads[:, None] + writes + 1e-9) + rng.gumbel(size=whole.shape)
        ranks.append(np.where(whole, -np.inf, rank))
    left = sum(int(np.isfinite(rank).sum()) for rank in ranks)
    if left < count:
        raise ValueError(
            f"count={count} tiles of {tile}: the dense kernels as large have only {left} that are not whole."
        )
    lowest = np.sort(np.concatenate([rank.ravel() for rank in ranks]))[-count]
    inside = np.arange(tile)
    chosen = [np.nonzero(rank >= lowest) for rank in ranks]
    return [(tile * rows[:, None] + inside, tile * columns[:, None] + inside) for rows, columns in chosen]


@functools.partial(jax.jit, static_argnames=("links", "fan_in"))
def _embed(
    key: Array,
    params: Mapping[str, Array],
    masks: Mapping[str, Array],
    blocks: list[tuple[Array, Array]],
    max_new: Array | None,
    code: Array,
    *,
    links: tuple[Link, ...],
    fan_in: tuple[tuple[str, int], ...] | None,
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    weight_key, trim_key = jax.random.split(key)
    new = {}
    for link, (rows, columns) in zip(links, blocks, strict=True):
        shape = masks[link.path].shape
        hit = jnp.zeros((shape[link.in_axis], shape[link.out_axis]), bool)
        hit = hit.at[rows[:, :, None], columns[:, None, :]].set(True, mode="drop")  # a tile may pass the edge
        hit = hit if link.in_axis < link.out_axis else hit.T
        others = tuple(axis for axis in range(len(shape)) if axis not in (link.in_axis, link.out_axis))
        new[link.path] = jnp.expand_dims(hit, others) & ~masks[link.path]
    if max_new is not None:
        new = top_k_mask_tree(random_orders(trim_key, new), max_new, new)
    return common.connect(weight_key, params, masks, new, code, fan_in)
