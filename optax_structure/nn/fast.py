"""Linear layers for Flax NNX that store and compute only what exists: block-sparse, and of constant fan-in.

They compute the function of a ``SparseLinear``, convert to and from it, and cost what their density says: parameters,
optimizer state, gradients and products. Their ``kernel`` is not of shape ``(in, out)``: a mask, ``dense_chain`` or an
optimizer that reads a kernel's rows and columns (Adafactor's factors, Muon) sees tiles, or slots.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen.dtypes import promote_dtype
from jax import Array

from optax_structure.nn.functional import MaskedBy
from optax_structure.nn.initialisers import Initializer, sparse_init
from optax_structure.nn.layers import SparseLinear
from optax_structure.sparsity.blocks import (
    block_matmul,
    blocks_from_kernel,
    check_block_index,
    kernel_from_blocks,
    random_blocks,
    rewire_blocks,
    tiles_of_kernel,
)
from optax_structure.sparsity.fan_in import (
    Transpose,
    check_fan_in_index,
    fan_in_from_kernel,
    fan_in_matmul,
    kernel_from_fan_in,
    random_fan_in,
    rewire_fan_in,
    transpose_fan_in,
)
from optax_structure.transforms.freezing.gates import gated


class Index(nnx.Variable):
    """Where the weights of a fast sparse layer stand: integers, out of sight of ``nnx.grad`` and of optimizers."""


def block_values(
    key: Array, index: Array, shape: tuple[int, int], tile: int, dtype: Any, kernel_init: Initializer | None
) -> Array:
    """The first weights of tiles: ``kernel_init``'s at their places, or He-normal by the living fan-in for ``None``."""
    if kernel_init is not None:
        return tiles_of_kernel(kernel_init(key, shape, dtype), index, tile)
    # Not by way of a dense kernel: it may be what the memory has no room for.
    inside = index[:, :, None] * tile + jnp.arange(tile) < jnp.array(shape)[:, None]
    rows, columns = inside[:, 0], inside[:, 1]
    fan_in = jnp.zeros(-(-shape[1] // tile), jnp.float32).at[index[:, 1]].add(jnp.sum(rows, axis=1, dtype=jnp.float32))
    scale = jnp.sqrt(2.0 / fan_in[index[:, 1]])[:, None, None]
    normal = jax.random.normal(key, (len(index), tile, tile), jnp.float32)
    return jnp.where(rows[:, :, None] & columns[:, None, :], normal * scale, 0.0).astype(dtype)


def fan_in_weights(
    key: Array, index: Array, shape: tuple[int, int], dtype: Any, kernel_init: Initializer | None
) -> Array:
    """The first weights of constant fan-in: ``kernel_init``'s at their places, or He-normal by it for ``None``."""
    if kernel_init is not None:
        return jnp.take_along_axis(kernel_init(key, shape, dtype), index, axis=0)
    return sparse_init(key, jnp.ones(index.shape, bool), dtype)


class _FastLinear(nnx.Module):
    """The weights that exist, where they stand, and a bias."""

    def __init__(
        self,
        shape: tuple[int, int],
        kernel: Array,
        index: Array,
        *,
        use_bias: bool,
        dtype: Any,
        param_dtype: Any,
        bias_init: Initializer,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel)
        self.kernel_index = Index(index)
        bias = nnx.Param(bias_init(rngs.params(), shape[1:], param_dtype)) if use_bias else None
        self.bias = nnx.data(bias)
        self.in_features, self.out_features = shape
        self.dtype = dtype
        self.param_dtype = param_dtype

    def _product(self, x: Array, kernel: Array, *index: Array) -> Array:
        raise NotImplementedError

    def _indices(self) -> tuple[Array, ...]:
        return (self.kernel_index[...],)

    def __call__(self, x: Array, gate: Any = None) -> Array:
        """``(..., in_features)`` -> ``(..., out_features)``; ``gate``: see ``optax_structure.gated``."""

        def apply(params: tuple[Array, Array | None], x: Array, *index: Array) -> Array:
            x, kernel, bias = promote_dtype(x, *params, dtype=self.dtype)
            y = self._product(x, kernel, *index)
            return y if bias is None else y + bias

        params = self.kernel[...], None if self.bias is None else self.bias[...]
        return gated(apply)(gate, params, x, *self._indices())


class BlockLinear(_FastLinear):
    """A linear layer of which only some tiles of the kernel exist: ``kernel`` is ``(tiles, tile, tile)``.

    The fast form for any hardware: the product is one batched matrix product over the tiles (``block_matmul``). Tiles
    move without a new compilation (``rewire``). The parameters are small already: leave the layer out of
    ``random_masks`` by ``select=``.

    Args:
      in_features: size of the last axis of the input.
      out_features: number of units.
      tile: side of a tile; 32 or 64 is fastest. The layer need not be a multiple of it.
      density: kept share of the tiles, in (0, 1]: exactly ``round(density * tiles)`` random ones, at least one in
        every column of tiles.
      index: which tiles exist, int ``(n, 2)`` (row and column in the grid of tiles), in place of ``density``.
      use_bias: whether to add a bias.
      dtype: of the computation (default: promoted from input and parameters).
      param_dtype: of the parameters.
      kernel_init: initialiser, called with the dense shape, of which the tiles are taken; ``None``: He-normal by the
        living fan-in, as ``sparse_init``.
      bias_init: initialiser of the bias.
      rngs: source of keys (stream ``params``).

    Raises:
      ValueError: for a density outside (0, 1] or too low for a tile in every column, a tile larger than the layer, an
        index of another shape or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> layer = nn.BlockLinear(784, 512, tile=32, density=0.1, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((3, 784))).shape, layer.kernel.shape
      ((3, 512), (40, 32, 32))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tile: int = 32,
        density: float = 1.0,
        index: Array | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = jax.nn.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        shape = (in_features, out_features)
        if index is None:
            index = random_blocks(rngs.params(), shape, tile, density)
        else:
            _check_given(density)
            check_block_index(index, shape, tile)
        kernel = block_values(rngs.params(), index, shape, tile, param_dtype, kernel_init)
        super().__init__(
            shape,
            kernel,
            index,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.tile = tile

    def _product(self, x: Array, kernel: Array, *index: Array) -> Array:
        return block_matmul(x, kernel, index[0], self.out_features)

    def rewire(self, key: Array, count: int | Array, scores: Array | None = None) -> Array:
        """Move the ``count`` weakest tiles, in place; what is new is returned, bool ``(tiles, 1, 1)``.

        See ``rewire_blocks``, also for ``scores``. Hand the result to ``reset_state`` as the kernel's ``where``.
        """
        shape = (self.in_features, self.out_features)
        rewired = rewire_blocks(key, self.kernel[...], self.kernel_index[...], shape, count, scores=scores)
        self.kernel[...], self.kernel_index[...] = rewired.values, rewired.index
        return rewired.new


class FanInLinear(_FastLinear):
    """A linear layer whose units have the same number of inputs each: ``kernel`` is ``(inputs a unit, units)``.

    For single connections at densities up to a few percent (see ``fan_in_matmul``); ``BlockLinear`` is faster.
    Connections move without a new compilation (``rewire``). As of ``BlockLinear``, its parameters take no masks.

    Args:
      in_features: size of the last axis of the input.
      out_features: number of units.
      density: kept share of the connections, in (0, 1]: ``round(density * in_features)`` different inputs a unit.
      index: which inputs, int ``(k, out_features)``, in place of ``density``.
      use_bias: see ``BlockLinear``, as are the arguments that follow.
      dtype: see ``BlockLinear``.
      param_dtype: see ``BlockLinear``.
      kernel_init: see ``BlockLinear``.
      bias_init: see ``BlockLinear``.
      rngs: see ``BlockLinear``.

    Raises:
      ValueError: for a density outside (0, 1] or too low for one input a unit, an index of another shape or out of
        range.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> layer = nn.FanInLinear(784, 512, density=0.02, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((3, 784))).shape, layer.kernel.shape
      ((3, 512), (16, 512))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        density: float = 1.0,
        index: Array | None = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = jax.nn.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        shape = (in_features, out_features)
        if index is None:
            index = random_fan_in(rngs.params(), shape, density)
        else:
            _check_given(density)
            check_fan_in_index(index, shape)
        kernel = fan_in_weights(rngs.params(), index, shape, param_dtype, kernel_init)
        super().__init__(
            shape,
            kernel,
            index,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            bias_init=bias_init,
            rngs=rngs,
        )
        order, starts = transpose_fan_in(index, in_features)
        self.kernel_order, self.kernel_starts = Index(order), Index(starts)

    def _indices(self) -> tuple[Array, ...]:
        return self.kernel_index[...], self.kernel_order[...], self.kernel_starts[...]

    def _product(self, x: Array, kernel: Array, *index: Array) -> Array:
        places, order, starts = index
        return fan_in_matmul(x, kernel, places, Transpose(order, starts))

    def rewire(self, key: Array, count: int | Array, scores: Array | None = None) -> Array:
        """Move the ``count`` weakest inputs of every unit, in place; what is new is returned, bool.

        See ``rewire_fan_in``, also for ``scores``. Hand the result to ``reset_state`` as the kernel's ``where``.
        """
        rewired = rewire_fan_in(key, self.kernel[...], self.kernel_index[...], self.in_features, count, scores=scores)
        self.kernel[...], self.kernel_index[...] = rewired.values, rewired.index
        self.kernel_order[...], self.kernel_starts[...] = transpose_fan_in(rewired.index, self.in_features)
        return rewired.new


def _check_given(density: float) -> None:
    if density != 1.0:
        raise ValueError(f"density={density!r} and an index: give one of them.")


def to_blocks(layer: SparseLinear, tile: int = 32) -> BlockLinear:
    """The block-sparse layer that computes the function of a sparse one.

    Args:
      layer: its mask is made of whole tiles: ``random_masks(..., pattern=tiles(tile))``.
      tile: side of a tile.

    Returns:
      A layer with arrays of its own. ``to_masked`` is the way back; ``precision`` and ``masked_by`` are not kept.

    Raises:
      ValueError: for a mask that is not made of whole tiles; weights off the mask where ``masked_by`` is ``"update"``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> layer = nn.SparseLinear(4, 2, mask=jnp.arange(4)[:, None] < jnp.array([2, 2]), rngs=nnx.Rngs(0))
      >>> nn.to_blocks(layer, 2).kernel_index[...].tolist()
      [[0, 0]]
    """
    values, index = blocks_from_kernel(*_masked(layer), tile)
    made = BlockLinear(layer.in_features, layer.out_features, tile=tile, index=index, **_options(layer))
    return _with(made, values, layer)


def to_fan_in(layer: SparseLinear) -> FanInLinear:
    """The constant fan-in layer that computes the function of a sparse one.

    Args:
      layer: its units have the same number of inputs each: ``random_masks(..., pattern=constant_fan_in())``.

    Returns:
      A layer with arrays of its own. ``to_masked`` is the way back; ``precision`` and ``masked_by`` are not kept.

    Raises:
      ValueError: for units with different numbers of inputs; weights off the mask where ``masked_by`` is ``"update"``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> layer = nn.SparseLinear(4, 2, mask=jnp.arange(4)[:, None] < jnp.array([2, 2]), rngs=nnx.Rngs(0))
      >>> nn.to_fan_in(layer).kernel_index[...].tolist()
      [[0, 0], [1, 1]]
    """
    weights, index = fan_in_from_kernel(*_masked(layer))
    return _with(FanInLinear(layer.in_features, layer.out_features, index=index, **_options(layer)), weights, layer)


def to_masked(layer: BlockLinear | FanInLinear, masked_by: MaskedBy = "forward") -> SparseLinear:
    """The masked dense layer that computes the function of a fast one.

    Args:
      layer: a fast layer.
      masked_by: see ``SparseLinear``.

    Returns:
      A layer with arrays of its own. What stands twice in the index is one connection, of the summed weight.

    Example:
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> layer = nn.BlockLinear(8, 8, tile=4, density=0.5, rngs=nnx.Rngs(0))
      >>> int(nn.to_masked(layer).kernel_mask[...].sum())
      32
    """
    shape = (layer.in_features, layer.out_features)
    if isinstance(layer, BlockLinear):
        kernel, mask = kernel_from_blocks(layer.kernel[...], layer.kernel_index[...], shape)
    else:
        kernel, mask = kernel_from_fan_in(layer.kernel[...], layer.kernel_index[...], layer.in_features)
    return _with(SparseLinear(*shape, mask=mask, masked_by=masked_by, **_options(layer)), kernel, layer)


def _masked(layer: SparseLinear) -> tuple[Array, Array]:
    kernel, mask = layer.kernel[...], layer.kernel_mask[...]
    if layer.masked_by == "update" and bool(jnp.any(jnp.where(mask, 0, kernel))):
        raise ValueError("layer has weights off its mask that count (masked_by='update'): mask them first.")
    return kernel, mask


def _options(layer: Any) -> dict[str, Any]:
    # Every weight is written over afterwards, so what the keys are does not matter.
    options = {"use_bias": layer.bias is not None, "dtype": layer.dtype, "param_dtype": layer.param_dtype}
    return options | {"kernel_init": jax.nn.initializers.zeros, "rngs": nnx.Rngs(0)}


def _with(made: Any, kernel: Array, layer: Any) -> Any:
    made.kernel[...] = kernel
    if layer.bias is not None:
        made.bias[...] = jnp.copy(layer.bias[...])
    return made
