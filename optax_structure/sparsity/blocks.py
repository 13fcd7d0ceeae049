"""Block-sparse products: a dense kernel of which only some tiles exist, gathered into one batched matrix product.

A kernel ``(in, out)`` is laid out in tiles of ``t x t`` from its first row and column; those at an edge may be cut off
by it. What exists of it is ``values (n, t, t)`` and ``index (n, 2)``: row and column of each tile in the grid of tiles,
int32. The index is data of static shape, so tiles move without a new compilation. Any set of tiles is allowed, in any
order, and a tile that stands twice counts twice. What a cut-off tile holds beyond the edge touches nothing.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_structure.sparsity._forms import (
    Rewired,
    accumulated,
    check_count,
    check_kernel,
    check_range,
    exchange_weakest,
)
from optax_structure.sparsity.draws import random_order
from optax_structure.sparsity.masks import checked_density, random_masks

Shape = tuple[int, int]


def block_matmul(x: Array, values: Array, index: Array, features: int) -> Array:
    """``x @ kernel`` over the tiles that exist.

    Work and memory are those of the ``n`` tiles, forward and backward: about ``density`` of the dense product's. Tiles
    of 32 or 64 keep matrix units busy; with 16 the gathering shows. Gradients of the values and of ``x`` have a rule of
    their own (``jax.custom_vjp``: forward-mode derivatives are not to be had); the index has none.

    Args:
      x: ``(..., in)``.
      values: ``(n, t, t)``.
      index: int32 ``(n, 2)``: row and column of each tile in the grid; out of range is an error where it can be seen.
      features: ``out``.

    Returns:
      ``(..., out)``, of the promoted dtype; sums are made in float32 at least.

    Raises:
      ValueError: for values or an index of another shape, a tile larger than the layer, an index out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_structure as oxs
      >>> values, index = jnp.ones((1, 2, 2)), jnp.array([[1, 0]])   # rows 2 and 3, columns 0 and 1
      >>> oxs.block_matmul(jnp.array([[1.0, 2.0, 3.0, 4.0]]), values, index, 4).tolist()
      [[7.0, 7.0, 0.0, 0.0]]

    References:
      Gray et al., GPU kernels for block-sparse weights, 2017.
    """
    x, values, index = jnp.asarray(x), jnp.asarray(values), jnp.asarray(index)
    shape = (x.shape[-1], features)
    _check_blocks(values, index, shape)
    dtype = jnp.promote_types(x.dtype, values.dtype)
    flat = x.reshape(-1, shape[0]).astype(dtype)
    return _product(flat, values.astype(dtype), index, features).reshape(*x.shape[:-1], features)


def _matmul(x: Array, values: Array, index: Array, features: int) -> Array:
    rows, columns = index[:, 0], index[:, 1]
    products = _batched("nbi,nio->nbo", _split(x, values.shape[-1])[rows], values)
    return _add_up(products, columns, features).astype(x.dtype)


_product = jax.custom_vjp(_matmul, nondiff_argnums=(3,))


def _forward(x: Array, values: Array, index: Array, features: int) -> tuple[Array, tuple[Array, Array, Array]]:
    # The gathered inputs are not kept: to gather them again costs next to nothing, and they are larger than x.
    return _product(x, values, index, features), (x, values, index)


def _backward(features: int, kept: tuple[Array, Array, Array], slope: Array) -> tuple[Array, Array, None]:
    x, values, index = kept
    rows, columns = index[:, 0], index[:, 1]
    slopes = _split(slope, values.shape[-1])[columns]
    of_values = _batched("nbi,nbo->nio", _split(x, values.shape[-1])[rows], slopes)
    of_x = _add_up(_batched("nbo,nio->nbi", slopes, values), rows, x.shape[1])
    return of_x.astype(x.dtype), of_values.astype(values.dtype), None


_product.defvjp(_forward, _backward)


def _batched(equation: str, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, preferred_element_type=accumulated(left.dtype))


def _split(x: Array, tile: int) -> Array:
    """``(batch, size)`` -> ``(tiles, batch, tile)``, the last tile filled up with 0. Batch-major is fastest on CPU."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile)))
    return x.reshape(x.shape[0], -1, tile).swapaxes(0, 1)


def _add_up(products: Array, at: Array, size: int) -> Array:
    """``(n, batch, tile)`` -> ``(batch, size)``: products of one place are added, what is beyond the edge falls off."""
    _, batch, tile = products.shape
    sums = jnp.zeros((-(-size // tile), batch, tile), products.dtype).at[at].add(products)
    return sums.swapaxes(0, 1).reshape(batch, -1)[:, :size]


def random_blocks(key: Array, shape: Shape, tile: int, density: float, *, min_fan_in: int = 1) -> Array:
    """The index of random tiles: exactly ``round(density * tiles of the grid)`` of them, at least one, none twice.

    Args:
      key: a JAX random key.
      shape: ``(in, out)`` of the layer.
      tile: side of a tile, from 1 to the smaller side of the layer.
      density: share of the tiles that exist, in (0, 1].
      min_fan_in: least number of tiles in every column of the grid. At 0, units may be left without inputs.

    Returns:
      int32 ``(n, 2)``, in order.

    Raises:
      ValueError: for a density outside (0, 1] or one that cannot pay for ``min_fan_in``; a tile larger than the layer.

    Example:
      >>> import jax
      >>> import optax_structure as oxs
      >>> oxs.random_blocks(jax.random.key(0), (784, 512), 32, 0.1).shape     # of 25 x 16
      (40, 2)
    """
    checked_density(density)
    grid = _grid(shape, tile)
    number = max(1, round(density * grid[0] * grid[1]))
    if number < min_fan_in * grid[1]:
        raise ValueError(
            f"density={density!r} gives {number} tiles of {tile} x {tile}, too few for {min_fan_in} in each of the "
            f"{grid[1]} columns of tiles of a layer {tuple(shape)}: take smaller tiles or a density of at least "
            f"{min_fan_in / grid[0]!r}."
        )
    exact = number / (grid[0] * grid[1])
    kernel = {"kernel": jax.ShapeDtypeStruct(grid, jnp.float32)}
    mask = random_masks(key, kernel, exact, distribution="uniform", min_fan_in=min_fan_in)["kernel"]
    return _ordered(mask, number)


def blocks_from_kernel(kernel: Array, mask: Array, tile: int) -> tuple[Array, Array]:
    """The block-sparse form of a masked kernel.

    Args:
      kernel: ``(in, out)``; what stands off the mask is left behind.
      mask: bool ``(in, out)``, made of whole tiles; concrete.
      tile: side of a tile.

    Returns:
      ``(values, index)`` of the tiles that exist, in the order of the columns.

    Raises:
      ValueError: for a mask that is not made of whole tiles, naming the first tile that is in part only, or that is
        empty; a tile larger than the layer.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_structure as oxs
      >>> mask = jnp.array([[True, True, False], [True, True, False]])
      >>> values, index = oxs.blocks_from_kernel(jnp.ones((2, 3)), mask, 2)
      >>> values.shape, index.tolist()
      ((1, 2, 2), [[0, 0]])
    """
    check_kernel(kernel, mask)
    grid = _grid(kernel.shape, tile)
    given = np.asarray(mask, bool)
    whole = given[::tile, ::tile]
    wrong = given != np.repeat(np.repeat(whole, tile, axis=0), tile, axis=1)[: given.shape[0], : given.shape[1]]
    if wrong.any():
        row, column = (int(place) // tile for place in np.argwhere(wrong)[0])
        raise ValueError(
            f"mask is not made of whole tiles of {tile} x {tile}: the one at row {row}, column {column} of the grid "
            f"{grid} exists in part. Draw it with pattern=tiles({tile})."
        )
    if not whole.any():
        raise ValueError("mask is False everywhere: a block-sparse layer has at least one tile.")
    index = _ordered(jnp.asarray(whole), int(whole.sum()))
    return tiles_of_kernel(kernel, index, tile), index


def tiles_of_kernel(kernel: Array, index: Array, tile: int) -> Array:
    """``(in, out)`` -> ``(n, t, t)``: the tiles of a dense kernel at ``index``, 0 beyond its edge."""
    rows, columns = _grid(kernel.shape, tile)
    padded = jnp.pad(kernel, [(0, -size % tile) for size in kernel.shape])
    return padded.reshape(rows, tile, columns, tile).swapaxes(1, 2)[index[:, 0], index[:, 1]]


def kernel_from_blocks(values: Array, index: Array, shape: Shape) -> tuple[Array, Array]:
    """The masked dense form of block-sparse weights.

    Args:
      values: ``(n, t, t)``.
      index: int32 ``(n, 2)``.
      shape: ``(in, out)`` of the kernel.

    Returns:
      ``(kernel, mask)``, both ``(in, out)``; tiles that stand twice are added.

    Raises:
      ValueError: as ``block_matmul``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_structure as oxs
      >>> kernel, mask = oxs.kernel_from_blocks(jnp.full((1, 2, 2), 7.0), jnp.array([[0, 1]]), (2, 3))
      >>> kernel.tolist(), mask.tolist()
      ([[0.0, 0.0, 7.0], [0.0, 0.0, 7.0]], [[False, False, True], [False, False, True]])
    """
    _check_blocks(values, index, shape)

    def whole(tiles: Array, add: bool) -> Array:
        rows, columns = _grid(shape, tiles.shape[-1])
        at = jnp.zeros((rows, columns, *tiles.shape[1:]), tiles.dtype).at[index[:, 0], index[:, 1]]
        filled = at.add(tiles) if add else at.set(tiles)
        side = tiles.shape[-1]
        return filled.swapaxes(1, 2).reshape(rows * side, columns * side)[: shape[0], : shape[1]]

    return whole(values, True), whole(jnp.ones(values.shape, bool), False)


def rewire_blocks(
    key: Array, values: Array, index: Array, shape: Shape, count: int | Array, *, scores: Array | None = None
) -> Rewired:
    """Drop the weakest tiles and put as many elsewhere. Shapes stay; a new ``count`` does not compile anew.

    The weakest are those with the smallest sum of ``|w|``. New tiles stand where none stood before the call, hold
    zeros, and take the slots of the dropped ones, so all other weights and their optimizer state stay in place.

    Args:
      key: a JAX random key, read where there are no scores.
      values: ``(n, t, t)``.
      index: int32 ``(n, 2)``, no tile twice.
      shape: ``(in, out)`` of the layer.
      count: how many tiles move, at least 0; may be traced. What exceeds the tiles there are, or the free places, is
        left out.
      scores: real numbers, one a tile of the grid ``(ceil(in / t), ceil(out / t))``: the highest free places are taken.
        ``None``: uniformly at random.

    Returns:
      ``(values, index, new)``; ``new`` is bool ``(n, 1, 1)``, for ``reset_state``.

    Raises:
      ValueError: as ``block_matmul``; for a negative count, or scores of another shape than the grid's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_structure as oxs
      >>> values, index = jnp.array([[[3.0]], [[1.0]]]), jnp.array([[0, 0], [1, 1]])
      >>> grid = jnp.array([[0.0, 5.0], [9.0, 9.0]])
      >>> rewired = oxs.rewire_blocks(jax.random.key(0), values, index, (2, 2), 1, scores=grid)
      >>> rewired.index.tolist(), rewired.values.ravel().tolist(), rewired.new.ravel().tolist()
      ([[0, 0], [1, 0]], [3.0, 0.0], [False, True])

    References:
      Mocanu et al., 2018 (SET); Evci et al., Rigging the lottery, 2020 (RigL).
    """
    _check_blocks(values, index, shape)
    grid = _grid(shape, values.shape[-1])
    if scores is not None and jnp.shape(scores) != grid:
        raise ValueError(f"scores have shape {jnp.shape(scores)}; the grid of tiles is {grid}.")
    return _rewired(key, values, index, check_count(count), scores, grid)


@functools.partial(jax.jit, static_argnames="grid")
def _rewired(key: Array, values: Array, index: Array, count: Array, scores: Array | None, grid: Shape) -> Rewired:
    scores = random_order(key, grid) if scores is None else scores
    strength = jnp.sum(jnp.abs(values), axis=(1, 2), dtype=jnp.float32)
    cells, new = exchange_weakest(index[:, 0] * grid[1] + index[:, 1], strength, scores.ravel(), count)
    at = jnp.stack([cells // grid[1], cells % grid[1]], axis=1).astype(index.dtype)
    new = new[:, None, None]
    return Rewired(jnp.where(new, jnp.zeros((), values.dtype), values), at, new)


def _ordered(mask: Array, number: int) -> Array:
    """The index of the ``number`` tiles that a mask of the grid holds, column after column."""
    columns, rows = jnp.nonzero(mask.T, size=number)
    return jnp.stack([rows, columns], axis=1).astype(jnp.int32)


def _grid(shape: Any, tile: int) -> Shape:
    """Rows and columns of tiles."""
    if isinstance(tile, bool) or not isinstance(tile, (int, np.integer)) or tile < 1:
        raise ValueError(f"tile={tile!r} must be an integer of at least 1.")
    if len(shape) != 2 or tile > min(shape):
        raise ValueError(f"tile={tile} is larger than the layer, whose shape (in, out) is {tuple(shape)}.")
    return -(-shape[0] // tile), -(-shape[1] // tile)


def _check_blocks(values: Any, index: Any, shape: Any) -> None:
    if jnp.ndim(values) != 3 or values.shape[1] != values.shape[2]:
        raise ValueError(f"values have shape {jnp.shape(values)}; it must be (tiles, side, side).")
    check_block_index(index, shape, values.shape[-1], len(values))


def check_block_index(index: Any, shape: Any, tile: int, number: int | None = None) -> None:
    """Refuse what is no index of (``number``) tiles of a layer."""
    wrong = jnp.ndim(index) != 2 or index.shape[1] != 2 or number not in (None, len(index)) or not len(index)
    if wrong or not jnp.issubdtype(index.dtype, jnp.integer):
        expected = "n" if number is None else number
        raise ValueError(f"index has shape {jnp.shape(index)} and dtype {index.dtype}; it must be int ({expected}, 2).")
    check_range(index, _grid(shape, tile))
