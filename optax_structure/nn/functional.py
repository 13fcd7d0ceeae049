"""The functional core that the sparse layers of NNX and Linen share: their options and their masked products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array, lax

MaskedBy = Literal["forward", "update"]
Padding = str | int | Sequence[int | tuple[int, int]]


def check_layer(density: float, masked_by: str) -> None:
    """Refuse what no sparse layer can be built from: a density outside (0, 1], an unknown ``masked_by``."""
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density={density!r} must be in (0, 1]: the share of the kernel's connections to keep.")
    if masked_by not in get_args(MaskedBy):
        raise ValueError(
            f"masked_by={masked_by!r} must be 'forward' (the layer multiplies by its mask: sparse under any optimizer) "
            "or 'update' (a plain product: sparse under optax_structure.sparse or keep_masked only)."
        )


def _masked(x: Array, kernel: Array, bias: Array | None, mask: Array | None, dtype: Any) -> tuple[Any, Any, Any]:
    # where, not a product: a NaN or infinity off the mask times 0 is NaN.
    if mask is not None:
        kernel = jnp.where(mask, kernel, jnp.zeros((), kernel.dtype))
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=dtype)
    return x, kernel, bias


def masked_dense(
    x: Array, kernel: Array, bias: Array | None = None, mask: Array | None = None, *, dtype: Any = None, precision=None
) -> Array:
    """``x @ where(mask, kernel, 0) + bias`` over the last axis of ``x``.

    Args:
      x: ``(..., in)``.
      kernel: ``(in, out)``.
      bias: ``(out,)``, or ``None``.
      mask: bool ``(in, out)``; ``None`` is the plain product.
      dtype: of the computation; ``None`` promotes as Flax does (the common type of the arrays, at least a float).
      precision: see ``jax.lax.Precision``.

    Returns:
      ``(..., out)``. What stands off the mask adds nothing to it or to the gradients, be it NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure import nn
      >>> kernel = jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0]])
      >>> nn.masked_dense(jnp.ones((1, 2)), kernel, mask=jnp.eye(2, dtype=bool)).tolist()
      [[1.0, 2.0]]
    """
    x, kernel, bias = _masked(x, kernel, bias, mask, dtype)
    y = lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=precision)
    return y if bias is None else y + bias


def _each(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else tuple(value)


def _pad(x: Array, size: tuple[int, ...], padding: Padding) -> tuple[Array, str | list[tuple[int, int]]]:
    # lax knows SAME, VALID and pairs; Flax's other names pad the input first. `size`: the dilated kernel's.
    if isinstance(padding, str):
        modes = {"CIRCULAR": "wrap", "REFLECT": "reflect", "CAUSAL": "constant"}
        if padding not in modes:
            return x, padding
        if padding == "CAUSAL" and len(size) != 1:
            raise ValueError(f"padding='CAUSAL' is for convolutions over one axis, kernel_size has {len(size)}.")
        sides = [(k - 1, 0) if padding == "CAUSAL" else ((k - 1) // 2, k // 2) for k in size]
        return jnp.pad(x, [(0, 0), *sides, (0, 0)], mode=modes[padding]), "VALID"
    sides = [padding] * len(size) if isinstance(padding, int) else list(padding)
    return x, [(side, side) if isinstance(side, int) else side for side in sides]


def masked_conv(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    input_dilation: int | Sequence[int] = 1,
    kernel_dilation: int | Sequence[int] = 1,
    feature_group_count: int = 1,
    dtype: Any = None,
    precision=None,
) -> Array:
    """A convolution with ``where(mask, kernel, 0)``, channels last, any number of spatial axes.

    Args:
      x: ``(..., *spatial, in)``; any number of batch axes, none included.
      kernel: ``(*window, in / feature_group_count, out)``.
      bias: ``(out,)``, or ``None``.
      mask: bool of the kernel's shape; ``None`` is the plain convolution.
      strides, input_dilation, kernel_dilation: an integer, or one a spatial axis.
      padding: ``"SAME"``, ``"VALID"``, ``"CIRCULAR"``, ``"REFLECT"``, ``"CAUSAL"`` (one spatial axis), an integer, or
        an integer or ``(low, high)`` pair a spatial axis: as ``flax.nnx.Conv``.
      feature_group_count: number of groups into which the input channels fall.
      dtype, precision: see ``masked_dense``.

    Returns:
      ``(..., *spatial, out)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure import nn
      >>> mask = jnp.zeros((3, 1, 1), bool).at[1].set(True)      # the window's middle alone
      >>> nn.masked_conv(jnp.arange(4.0)[None, :, None], jnp.full((3, 1, 1), 2.0), mask=mask)[0, :, 0].tolist()
      [0.0, 2.0, 4.0, 6.0]
    """
    x, kernel, bias = _masked(x, kernel, bias, mask, dtype)
    rank = kernel.ndim - 2
    batch = x.shape[: x.ndim - rank - 1]
    x = x.reshape(math.prod(batch), *x.shape[len(batch) :])
    dilation = _each(kernel_dilation, rank)
    size = tuple((k - 1) * d + 1 for k, d in zip(kernel.shape[:rank], dilation, strict=True))
    x, pads = _pad(x, size, padding)
    spatial = tuple(range(1, rank + 1))
    layout = (0, rank + 1, *spatial)
    y = lax.conv_general_dilated(
        x,
        kernel,
        _each(strides, rank),
        pads,
        lhs_dilation=_each(input_dilation, rank),
        rhs_dilation=dilation,
        dimension_numbers=lax.ConvDimensionNumbers(layout, (rank + 1, rank, *range(rank)), layout),
        feature_group_count=feature_group_count,
        precision=precision,
    )
    y = y.reshape(*batch, *y.shape[1:])
    return y if bias is None else y + bias
