"""Sparse layers for Flax Linen, with masks in a ``masks`` collection.

The params tree of these layers is that of ``flax.linen.Dense`` and ``Conv``: ``kernel`` and ``bias``. The mask of
``params/<path>/kernel`` is ``masks/<path>/kernel``, a collection that optax never sees.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen
from jax import Array

from optax_structure._tree import PyTree, leaves_by_path, map_with_path
from optax_structure.nn.chain import Chain
from optax_structure.nn.fast_linen import BlockDense, FanInDense, to_blocks, to_fan_in, to_masked
from optax_structure.nn.functional import MaskedBy, Padding, check_layer, masked_conv, masked_dense
from optax_structure.nn.initialisers import Initializer, kernel_mask, masked_kernel
from optax_structure.nn.models import layer_names
from optax_structure.sparsity.masks import random_masks
from optax_structure.transforms.freezing.gates import gated

__all__ = [
    "SparseDense",
    "SparseConv",
    "BlockDense",
    "FanInDense",
    "to_blocks",
    "to_fan_in",
    "to_masked",
    "MLP",
    "Chain",
    "masks_of",
]


class _SparseLayer(linen.Module):
    """The kernel, its mask and the bias. Subclasses have the fields that are read here."""

    def __post_init__(self) -> None:
        check_layer(getattr(self, "density", 1.0), getattr(self, "masked_by", "forward"))
        super().__post_init__()

    def _arrays(self: Any, shape: tuple[int, ...]) -> tuple[Array, Array | None, Array | None]:
        mask = None
        # With masked_by="update" the masks are made at init, for masks_of, and not needed by apply.
        if self.masked_by == "forward" or self.is_initializing():
            mask = self.variable("masks", "kernel", self._first_mask, shape).value
            mask = jnp.broadcast_to(mask, shape)  # a scalar True says that the leaf is not sparse

        def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return masked_kernel(key, jnp.ones(shape, bool) if mask is None else mask, dtype, self.kernel_init)

        kernel = self.param("kernel", init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[-1:], self.param_dtype) if self.use_bias else None
        return kernel, bias, mask if self.masked_by == "forward" else None

    def _first_mask(self: Any, shape: tuple[int, ...]) -> Array:
        if self.mask is None:
            return kernel_mask(self.make_rng("params"), shape, self.density)
        mask = jnp.asarray(self.mask(self.make_rng("params"), shape), bool)
        if mask.shape != shape:
            raise ValueError(f"mask gave the shape {mask.shape} for a kernel of shape {shape}.")
        return mask


def _gated(
    gate: Any, x: Array, kernel: Array, bias: Array | None, mask: Array | None, product: Callable[..., Array]
) -> Array:
    return gated(lambda params, x, mask: product(x, *params, mask))(gate, (kernel, bias), x, mask)


class SparseDense(_SparseLayer):
    """The Linen twin of ``nn.SparseLinear``: a dense layer of which only the connections in its mask exist.

    Args:
      features: number of units.
      density: kept share of the kernel, in (0, 1]: exactly ``round(density * size)`` random connections, at least
        one a unit.
      mask: a function ``(key, shape) -> mask`` in place of ``density``.
      masked_by: ``"forward"`` (the layer multiplies by its mask: sparse under any optimizer) or ``"update"`` (a plain
        product, for use under ``optax_structure.sparse``; ``apply`` then needs no ``masks`` collection).
      use_bias: whether to add a bias.
      dtype: of the computation (default: promoted from input and parameters).
      param_dtype: of the parameters.
      precision: see ``jax.lax.Precision``.
      kernel_init: initialiser, masked afterwards; ``None`` is ``sparse_init`` (He-normal by the living fan-in).
      bias_init: initialiser of the bias.

    Raises:
      ValueError: for a density outside (0, 1] or, at ``init``, too low for one connection a unit; an unknown
        ``masked_by``; a mask of another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_structure import nn
      >>> layer = nn.linen.SparseDense(20, density=0.1)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((3, 50)))
      >>> layer.apply(variables, jnp.ones((3, 50))).shape, int(variables["masks"]["kernel"].sum())
      ((3, 20), 100)
    """

    features: int
    density: float = 1.0
    mask: Callable[[Array, tuple[int, ...]], Array] | None = None
    masked_by: MaskedBy = "forward"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer | None = None
    bias_init: Initializer = jax.nn.initializers.zeros

    @linen.compact
    def __call__(self, x: Array, gate: Any = None) -> Array:
        """``(..., in)`` -> ``(..., features)``; ``gate``: see ``optax_structure.gated``."""
        kernel, bias, mask = self._arrays((x.shape[-1], self.features))
        product = functools.partial(masked_dense, dtype=self.dtype, precision=self.precision)
        return _gated(gate, x, kernel, bias, mask, product)


class SparseConv(_SparseLayer):
    """The Linen twin of ``nn.SparseConv``: a convolution of which only the connections in its mask exist.

    See ``SparseDense`` for ``density``, ``mask``, ``masked_by`` and what follows them, ``masked_conv`` for the rest.

    Args:
      features: number of output channels.
      kernel_size: of the window; an integer is a window over one axis.
      strides: an integer, or one a spatial axis.
      padding: see ``masked_conv``.
      input_dilation: an integer, or one a spatial axis.
      kernel_dilation: an integer, or one a spatial axis.
      feature_group_count: number of groups of input channels.
      density: see ``SparseDense``, as are the fields that follow.
      mask: see ``SparseDense``.
      masked_by: see ``SparseDense``.
      use_bias: see ``SparseDense``.
      dtype: see ``SparseDense``.
      param_dtype: see ``SparseDense``.
      precision: see ``SparseDense``.
      kernel_init: see ``SparseDense``.
      bias_init: see ``SparseDense``.

    Raises:
      ValueError: as ``SparseDense``, and for channels that do not fall into the groups.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_structure import nn
      >>> layer = nn.linen.SparseConv(8, (3, 3), strides=2, density=0.25)
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 28, 28, 4)))
      >>> y.shape, int(variables["masks"]["kernel"].sum())
      ((2, 14, 14, 8), 72)
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    input_dilation: int | Sequence[int] = 1
    kernel_dilation: int | Sequence[int] = 1
    feature_group_count: int = 1
    density: float = 1.0
    mask: Callable[[Array, tuple[int, ...]], Array] | None = None
    masked_by: MaskedBy = "forward"
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer | None = None
    bias_init: Initializer = jax.nn.initializers.zeros

    @linen.compact
    def __call__(self, x: Array, gate: Any = None) -> Array:
        """``(..., *spatial, in)`` -> ``(..., *spatial, features)``; ``gate``: see ``optax_structure.gated``."""
        window = (self.kernel_size,) if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        channels, groups = x.shape[-1], self.feature_group_count
        if channels % groups:
            raise ValueError(f"the input's {channels} channels are no multiple of feature_group_count={groups}.")
        kernel, bias, mask = self._arrays((*window, channels // groups, self.features))
        product = functools.partial(
            masked_conv,
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=groups,
            dtype=self.dtype,
            precision=self.precision,
        )
        return _gated(gate, x, kernel, bias, mask, product)


class MLP(linen.Module):
    """The Linen twin of ``nn.MLP``: a chain of ``SparseDense`` layers ``hidden_1``, ..., ``head``.

    Args:
      widths: sizes from the input to the output, at least two.
      density: kept share of all kernels together, in (0, 1].
      distribution: ``"erk"`` gives small layers (the head) more than large ones, ``"uniform"`` all the same.
      masked_by: see ``SparseDense``.
      activation: between the layers.
      dtype: see ``SparseDense``.
      param_dtype: see ``SparseDense``.

    Raises:
      ValueError: for fewer than two widths, and as ``SparseDense``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_structure import nn
      >>> model = nn.linen.MLP((64, 32, 10), density=0.1)
      >>> variables = model.init(jax.random.key(0), jnp.ones((5, 64)))
      >>> model.layer_names, model.apply(variables, jnp.ones((5, 64))).shape
      (('hidden_1', 'head'), (5, 10))
    """

    widths: Sequence[int]
    density: float = 1.0
    distribution: Literal["erk", "uniform"] = "erk"
    masked_by: MaskedBy = "forward"
    activation: Callable[[Array], Array] = jax.nn.relu
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        check_layer(self.density, self.masked_by)
        layer_names(self.widths)
        super().__post_init__()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers' names in forward order, for ``dense_chain`` and ``lsuv``."""
        return layer_names(self.widths)

    @linen.compact
    def __call__(self, x: Array) -> Array:
        """``(..., widths[0])`` -> logits ``(..., widths[-1])``."""
        masks: Mapping[str, Array] = {}
        if self.density < 1.0 and self.is_initializing():
            shapes = zip(self.layer_names, itertools.pairwise(self.widths), strict=True)
            kernels = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes}
            masks = random_masks(self.make_rng("params"), kernels, self.density, distribution=self.distribution)
        for name, units in zip(self.layer_names, self.widths[1:], strict=True):
            layer = SparseDense(
                units,
                mask=(lambda key, shape, mask=masks[name]: mask) if name in masks else None,
                masked_by=self.masked_by,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )
            x = layer(x)
            if name != self.layer_names[-1]:
                x = self.activation(x)
        return x


def masks_of(variables: Mapping[str, Any]) -> PyTree:
    """The masks of a Linen model, as ``optax_structure.sparse`` takes them.

    Args:
      variables: what ``Module.init`` returned: ``params`` and, where there are sparse layers, ``masks``.

    Returns:
      A tree of the structure of ``variables["params"]``: the masks where there are any, a scalar ``True`` elsewhere.
      It may stand as the collection itself: ``model.apply({"params": params, "masks": get_masks(state)}, x)``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_structure import nn
      >>> variables = nn.linen.SparseDense(2, density=0.5).init(jax.random.key(0), jnp.ones((1, 4)))
      >>> jax.tree.map(jnp.shape, nn.linen.masks_of(variables), is_leaf=lambda leaf: hasattr(leaf, "shape"))
      {'bias': (), 'kernel': (4, 2)}
    """
    masks = leaves_by_path(variables.get("masks", {}))
    return map_with_path(lambda path, leaf: masks.get(path, jnp.asarray(True)), variables["params"])
