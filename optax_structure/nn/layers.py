"""Sparse layers for Flax NNX: linear and convolutional."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from optax_structure.nn.functional import MaskedBy, Padding, check_layer, masked_conv, masked_dense
from optax_structure.nn.initialisers import Initializer, kernel_mask, masked_kernel
from optax_structure.nn.masks import Mask
from optax_structure.transforms.freezing.gates import gated


class _SparseLayer(nnx.Module):
    """A kernel with its mask, and a bias."""

    def __init__(
        self,
        kernel_shape: tuple[int, ...],
        *,
        density: float,
        mask: Array | None,
        masked_by: MaskedBy,
        use_bias: bool,
        dtype: Any,
        param_dtype: Any,
        precision: Any,
        kernel_init: Initializer | None,
        bias_init: Initializer,
        rngs: nnx.Rngs,
    ):
        check_layer(density, masked_by)
        if mask is not None and (density != 1.0 or jnp.shape(mask) != kernel_shape):
            raise ValueError(
                f"mask has shape {jnp.shape(mask)}, the kernel {kernel_shape}, and density={density!r}: give a mask of "
                "the kernel's shape, or a density, not both."
            )
        kernel_key = rngs.params()
        bias_key = rngs.params() if use_bias else None
        mask = kernel_mask(rngs.params(), kernel_shape, density) if mask is None else jnp.asarray(mask, bool)
        self.kernel = nnx.Param(masked_kernel(kernel_key, mask, param_dtype, kernel_init))
        self.kernel_mask = Mask(mask)
        bias = None if bias_key is None else nnx.Param(bias_init(bias_key, kernel_shape[-1:], param_dtype))
        self.bias = nnx.data(bias)
        self.masked_by = masked_by
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision

    def _gated(self, gate: Any, x: Array, product: Callable[..., Array]) -> Array:
        mask = self.kernel_mask[...] if self.masked_by == "forward" else None
        params = self.kernel[...], None if self.bias is None else self.bias[...]
        return gated(lambda params, x, mask: product(x, *params, mask))(gate, params, x, mask)


class SparseLinear(_SparseLayer):
    """A linear layer of which only the connections in its mask exist: ``y = x @ (mask * kernel) + bias``.

    ``masked_by="forward"`` masks the kernel in the product (with ``where``, so that not even a NaN off the mask is
    seen): the layer computes a sparse function under any optimizer, bare ``optax.adam`` and ``optax.adamw`` included.
    ``masked_by="update"`` is the plain product, without the cost of masking in every step, for a model trained under
    ``optax_structure.sparse``, which keeps every weight off the mask at exactly 0.

    Args:
      in_features: size of the last axis of the input.
      out_features: number of units.
      density: kept share of the kernel, in (0, 1]: exactly ``round(density * size)`` random connections, at least
        one a unit.
      mask: a mask of the kernel's shape of your own, in place of ``density``.
      masked_by: ``"forward"`` or ``"update"``.
      use_bias: whether to add a bias.
      dtype: of the computation (default: promoted from input and parameters).
      param_dtype: of the parameters.
      precision: see ``jax.lax.Precision``.
      kernel_init: initialiser, masked afterwards; ``None`` is ``sparse_init`` (He-normal by the living fan-in).
      bias_init: initialiser of the bias.
      rngs: source of keys (stream ``params``).

    Raises:
      ValueError: for a density outside (0, 1] or too low for one connection a unit, an unknown ``masked_by``, a mask
        of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> layer = nn.SparseLinear(50, 20, density=0.1, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((3, 50))).shape, int(jnp.count_nonzero(layer.kernel[...]))
      ((3, 20), 100)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        density: float = 1.0,
        mask: Array | None = None,
        masked_by: MaskedBy = "forward",
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = jax.nn.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            (in_features, out_features),
            density=density,
            mask=mask,
            masked_by=masked_by,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.in_features = in_features
        self.out_features = out_features

    def __call__(self, x: Array, gate: Any = None) -> Array:
        """``(..., in_features)`` -> ``(..., out_features)``; ``gate``: see ``optax_structure.gated``."""
        product = functools.partial(masked_dense, dtype=self.dtype, precision=self.precision)
        return self._gated(gate, x, product)


class SparseConv(_SparseLayer):
    """A convolution of which only the connections in its mask exist, channels last.

    A connection is one entry of the kernel ``(*kernel_size, in_features / feature_group_count, out_features)``, shared
    by all positions. See ``SparseLinear`` for ``density``, ``mask``, ``masked_by`` and the initialisers, and
    ``flax.nnx.Conv`` for the rest.

    Args:
      in_features: number of input channels, a multiple of ``feature_group_count``.
      out_features: number of output channels.
      kernel_size: of the window; an integer is a window over one axis.
      strides: an integer, or one a spatial axis.
      padding: see ``masked_conv``.
      input_dilation: an integer, or one a spatial axis.
      kernel_dilation: an integer, or one a spatial axis.
      feature_group_count: number of groups of input channels.
      density: see ``SparseLinear``, as are the arguments that follow.
      mask: see ``SparseLinear``.
      masked_by: see ``SparseLinear``.
      use_bias: see ``SparseLinear``.
      dtype: see ``SparseLinear``.
      param_dtype: see ``SparseLinear``.
      precision: see ``SparseLinear``.
      kernel_init: see ``SparseLinear``.
      bias_init: see ``SparseLinear``.
      rngs: see ``SparseLinear``.

    Raises:
      ValueError: as ``SparseLinear``, and for channels that do not fall into the groups.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> layer = nn.SparseConv(4, 8, (3, 3), strides=2, density=0.25, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 28, 28, 4))).shape, int(jnp.count_nonzero(layer.kernel[...]))
      ((2, 14, 14, 8), 72)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: int | Sequence[int] = 1,
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        density: float = 1.0,
        mask: Array | None = None,
        masked_by: MaskedBy = "forward",
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = jax.nn.initializers.zeros,
        rngs: nnx.Rngs,
    ):
        if in_features % feature_group_count:
            raise ValueError(f"in_features={in_features} is no multiple of feature_group_count={feature_group_count}.")
        window = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        super().__init__(
            (*window, in_features // feature_group_count, out_features),
            density=density,
            mask=mask,
            masked_by=masked_by,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        # Tuples, not lists: NNX would take a list attribute for data.
        self.strides = strides if isinstance(strides, int) else tuple(strides)
        self.padding = padding if isinstance(padding, str | int) else tuple(padding)
        self.input_dilation = input_dilation if isinstance(input_dilation, int) else tuple(input_dilation)
        self.kernel_dilation = kernel_dilation if isinstance(kernel_dilation, int) else tuple(kernel_dilation)
        self.feature_group_count = feature_group_count

    def __call__(self, x: Array, gate: Any = None) -> Array:
        """``(..., *spatial, in_features)`` -> ``(..., *spatial, out_features)``; ``gate``: see ``SparseLinear``."""
        product = functools.partial(
            masked_conv,
            strides=self.strides,
            padding=self.padding,
            input_dilation=self.input_dilation,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
            dtype=self.dtype,
            precision=self.precision,
        )
        return self._gated(gate, x, product)
