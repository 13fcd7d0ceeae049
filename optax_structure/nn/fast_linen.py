"""The Linen twins of the fast sparse layers: their index lies in an ``index`` collection, which optax never sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.linen.dtypes import promote_dtype
from jax import Array

from optax_structure.nn.fast import block_values, fan_in_weights
from optax_structure.nn.initialisers import Initializer
from optax_structure.sparsity.blocks import block_matmul, blocks_from_kernel, kernel_from_blocks, random_blocks
from optax_structure.sparsity.fan_in import (
    Transpose,
    fan_in_from_kernel,
    fan_in_matmul,
    kernel_from_fan_in,
    random_fan_in,
    transpose_fan_in,
)
from optax_structure.sparsity.masks import checked_density
from optax_structure.transforms.freezing.gates import gated

Variables = Mapping[str, Mapping[str, Any]]


class BlockDense(linen.Module):
    """The Linen twin of ``nn.BlockLinear``: a dense layer of which only some tiles of the kernel exist.

    ``params/kernel`` is ``(tiles, tile, tile)`` and ``index/kernel`` int32 ``(tiles, 2)``. To move tiles, put what
    ``rewire_blocks`` returns in their place. The number of tiles is read from the variables, once there are any.

    Args:
      features: number of units.
      tile: side of a tile; 32 or 64 is fastest. The layer need not be a multiple of it.
      density: kept share of the tiles, in (0, 1]: exactly ``round(density * tiles)`` random ones, at least one in
        every column of tiles.
      use_bias: whether to add a bias.
      dtype: of the computation (default: promoted from input and parameters).
      param_dtype: of the parameters.
      kernel_init: initialiser, called with the dense shape, of which the tiles are taken; ``None``: He-normal by the
        living fan-in, as ``sparse_init``.
      bias_init: initialiser of the bias.

    Raises:
      ValueError: for a density outside (0, 1] or, at ``init``, too low for a tile in every column; for a tile larger
        than the layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_structure import nn
      >>> layer = nn.linen.BlockDense(512, tile=32, density=0.1)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((3, 784)))
      >>> layer.apply(variables, jnp.ones((3, 784))).shape, variables["params"]["kernel"].shape
      ((3, 512), (40, 32, 32))
    """

    features: int
    tile: int = 32
    density: float = 1.0
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer | None = None
    bias_init: Initializer = jax.nn.initializers.zeros

    def __post_init__(self) -> None:
        checked_density(self.density)
        super().__post_init__()

    @linen.compact
    def __call__(self, x: Array, gate: Any = None) -> Array:
        """``(..., in)`` -> ``(..., features)``; ``gate``: see ``optax_structure.gated``."""
        shape = (x.shape[-1], self.features)

        def first_index() -> Array:
            return random_blocks(self.make_rng("params"), shape, self.tile, self.density)

        def first_kernel(key: Array) -> Array:
            return block_values(key, index, shape, self.tile, self.param_dtype, self.kernel_init)

        index = self.variable("index", "kernel", first_index).value
        kernel = self.param("kernel", first_kernel)
        bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype) if self.use_bias else None

        def apply(params: tuple[Array, Array | None], x: Array, index: Array) -> Array:
            x, kernel, bias = promote_dtype(x, *params, dtype=self.dtype)
            y = block_matmul(x, kernel, index, self.features)
            return y if bias is None else y + bias

        return gated(apply)(gate, (kernel, bias), x, index)


class FanInDense(linen.Module):
    """The Linen twin of ``nn.FanInLinear``: a dense layer whose units have the same number of inputs each.

    ``params/kernel`` and ``index/kernel`` are ``(inputs a unit, units)``; ``index/order`` and ``index/starts`` are the
    ``transpose_fan_in`` of the latter, to be made anew whenever it changes. The number of inputs is read from the
    variables, once there are any.

    Args:
      features: number of units.
      density: kept share of the connections, in (0, 1]: ``round(density * in)`` different inputs a unit.
      use_bias: see ``BlockDense``, as are the arguments that follow.
      dtype: see ``BlockDense``.
      param_dtype: see ``BlockDense``.
      kernel_init: see ``BlockDense``.
      bias_init: see ``BlockDense``.

    Raises:
      ValueError: for a density outside (0, 1] or, at ``init``, too low for one input a unit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_structure import nn
      >>> layer = nn.linen.FanInDense(512, density=0.02)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((3, 784)))
      >>> layer.apply(variables, jnp.ones((3, 784))).shape, variables["params"]["kernel"].shape
      ((3, 512), (16, 512))
    """

    features: int
    density: float = 1.0
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer | None = None
    bias_init: Initializer = jax.nn.initializers.zeros

    def __post_init__(self) -> None:
        checked_density(self.density)
        super().__post_init__()

    @linen.compact
    def __call__(self, x: Array, gate: Any = None) -> Array:
        """``(..., in)`` -> ``(..., features)``; ``gate``: see ``optax_structure.gated``."""
        shape = (x.shape[-1], self.features)

        def first_index() -> Array:
            return random_fan_in(self.make_rng("params"), shape, self.density)

        def first_kernel(key: Array) -> Array:
            return fan_in_weights(key, index, shape, self.param_dtype, self.kernel_init)

        index = self.variable("index", "kernel", first_index).value
        order = self.variable("index", "order", lambda: transpose_fan_in(index, shape[0]).order).value
        starts = self.variable("index", "starts", lambda: transpose_fan_in(index, shape[0]).starts).value
        kernel = self.param("kernel", first_kernel)
        bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype) if self.use_bias else None

        def apply(params: tuple[Array, Array | None], x: Array, index: Array, transpose: Transpose) -> Array:
            x, kernel, bias = promote_dtype(x, *params, dtype=self.dtype)
            y = fan_in_matmul(x, kernel, index, transpose)
            return y if bias is None else y + bias

        return gated(apply)(gate, (kernel, bias), x, index, Transpose(order, starts))


def to_blocks(variables: Variables, tile: int = 32) -> dict[str, dict[str, Any]]:
    """The variables of a ``BlockDense`` that computes the function of a ``SparseDense``.

    Args:
      variables: of one ``SparseDense``: ``params`` and ``masks``. What stands off the mask is left behind.
      tile: side of a tile; the mask is made of whole ones.

    Returns:
      ``{"params": ..., "index": ...}``.

    Raises:
      ValueError: as ``blocks_from_kernel``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure import nn
      >>> variables = {"params": {"kernel": jnp.ones((2, 4))}, "masks": {"kernel": jnp.ones((2, 4), bool)}}
      >>> nn.linen.to_blocks(variables, 2)["index"]["kernel"].tolist()
      [[0, 0], [0, 1]]
    """
    kernel, index = blocks_from_kernel(variables["params"]["kernel"], variables["masks"]["kernel"], tile)
    return {"params": {**variables["params"], "kernel": kernel}, "index": {"kernel": index}}


def to_fan_in(variables: Variables) -> dict[str, dict[str, Any]]:
    """The variables of a ``FanInDense`` that computes the function of a ``SparseDense``.

    Args:
      variables: of one ``SparseDense``, whose mask gives all units the same number of inputs. What stands off the mask
        is left behind.

    Returns:
      ``{"params": ..., "index": ...}``.

    Raises:
      ValueError: as ``fan_in_from_kernel``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure import nn
      >>> variables = {"params": {"kernel": jnp.ones((2, 2))}, "masks": {"kernel": jnp.eye(2, dtype=bool)}}
      >>> nn.linen.to_fan_in(variables)["index"]["kernel"].tolist()
      [[0, 1]]
    """
    kernel, index = fan_in_from_kernel(variables["params"]["kernel"], variables["masks"]["kernel"])
    order, starts = transpose_fan_in(index, variables["params"]["kernel"].shape[0])
    indices = {"kernel": index, "order": order, "starts": starts}
    return {"params": {**variables["params"], "kernel": kernel}, "index": indices}


def to_masked(variables: Variables, shape: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """The variables of a ``SparseDense`` that computes the function of a ``BlockDense`` or a ``FanInDense``.

    Args:
      variables: of one fast layer.
      shape: ``(in, features)`` of the layer.

    Returns:
      ``{"params": ..., "masks": ...}``, as ``SparseDense(masked_by="forward")`` takes them.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure import nn
      >>> variables = {"params": {"kernel": jnp.ones((1, 2, 2))}, "index": {"kernel": jnp.array([[0, 1]])}}
      >>> nn.linen.to_masked(variables, (2, 4))["masks"]["kernel"].sum(0).tolist()
      [0, 0, 2, 2]
    """
    values, index = variables["params"]["kernel"], variables["index"]["kernel"]
    if "order" in variables["index"]:
        kernel, mask = kernel_from_fan_in(values, index, shape[0])
    else:
        kernel, mask = kernel_from_blocks(values, index, shape)
    return {"params": {**variables["params"], "kernel": kernel}, "masks": {"kernel": mask}}
