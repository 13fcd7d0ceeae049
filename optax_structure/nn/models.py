"""NNX models that experiments with sparse networks start from: a multilayer perceptron, and a flattening in front."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from optax_structure.nn.functional import MaskedBy, check_layer
from optax_structure.nn.layers import SparseLinear
from optax_structure.sparsity.masks import random_masks


class Flatten(nnx.Module):
    """Flatten all axes but the first, then apply a model: ``Flatten(MLP(...))`` takes images.

    Args:
      model: what to apply to the flattened batch; ``None`` only flattens (as a member of ``nnx.Sequential``).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> model = nn.Flatten(nn.MLP([64, 32, 10], density=0.1, rngs=nnx.Rngs(0)))
      >>> model(jnp.ones((2, 8, 8, 1))).shape
      (2, 10)
    """

    def __init__(self, model: Callable[..., Any] | None = None):
        self.model = model

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        """``(batch, ...)`` -> ``model((batch, features))``."""
        x = x.reshape(x.shape[0], -1)
        return x if self.model is None else self.model(x, *args, **kwargs)


class MLP(nnx.Module):
    """A chain of ``SparseLinear`` layers ``hidden_1``, ``hidden_2``, ..., ``head`` with activations between.

    Args:
      widths: sizes from the input to the output, at least two.
      density: kept share of all kernels together, in (0, 1].
      distribution: ``"erk"`` gives small layers (the head) more than large ones, ``"uniform"`` all the same.
      masked_by: see ``SparseLinear``.
      activation: between the layers.
      dtype: see ``SparseLinear``.
      param_dtype: see ``SparseLinear``.
      rngs: source of keys (stream ``params``).

    Attributes:
      layer_names: the layers' names in forward order, for ``dense_chain`` and ``lsuv``.

    Raises:
      ValueError: for fewer than two widths, and as ``SparseLinear``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> model = nn.MLP([64, 32, 10], density=0.1, rngs=nnx.Rngs(0))
      >>> model.layer_names, model(jnp.ones((5, 64))).shape
      (('hidden_1', 'head'), (5, 10))
    """

    def __init__(
        self,
        widths: Sequence[int],
        *,
        density: float = 1.0,
        distribution: Literal["erk", "uniform"] = "erk",
        masked_by: MaskedBy = "forward",
        activation: Callable[[Array], Array] = jax.nn.relu,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_layer(density, masked_by)
        self.layer_names = layer_names(widths)
        shapes = dict(zip(self.layer_names, itertools.pairwise(widths), strict=True))
        masks = {name: jnp.ones(shape, bool) for name, shape in shapes.items()}
        if density < 1.0:
            kernels = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
            masks = random_masks(rngs.params(), kernels, density, distribution=distribution)
        for name, (size, units) in shapes.items():
            layer = SparseLinear(
                size, units, mask=masks[name], masked_by=masked_by, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )
            setattr(self, name, layer)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        """``(..., widths[0])`` -> logits ``(..., widths[-1])``."""
        *hidden, head = self.layer_names
        for name in hidden:
            x = self.activation(getattr(self, name)(x))
        return getattr(self, head)(x)


def layer_names(widths: Sequence[int]) -> tuple[str, ...]:
    """``hidden_1``, ``hidden_2``, ..., ``head``: one name for each layer between two widths."""
    if len(widths) < 2 or any(width < 1 for width in widths):
        raise ValueError(f"widths={list(widths)!r} must be at least two positive sizes, from the input to the output.")
    return (*(f"hidden_{i}" for i in range(1, len(widths) - 1)), "head")
