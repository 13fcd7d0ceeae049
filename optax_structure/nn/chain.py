"""The growing chain of dense layers as a Linen module: ``nn.linen.Chain``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from jax import Array

from optax_structure.growth import apply_patches
from optax_structure.nn.functional import masked_dense
from optax_structure.structure import Patch, UnitGroup, Units


class _PatchedDense(linen.Module):
    """A dense layer whose output, patches included, is what ``capture`` sees under the layer's name."""

    features: int
    patches: tuple[Patch, ...]
    dtype: Any
    param_dtype: Any

    @linen.compact
    def __call__(self, x: Array, sides: Mapping[str, Any]) -> Array:
        init = jax.nn.initializers.he_normal()
        kernel = self.param("kernel", init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", jax.nn.initializers.zeros, (self.features,), self.param_dtype)
        y = masked_dense(x, kernel, bias, dtype=self.dtype)
        layer = self.name or ""
        return apply_patches(sides, Units((UnitGroup(layer, self.features, ()),), self.patches), layer, x, y)


class Chain(linen.Module):
    """A chain of plain dense layers with ReLU between and patches beside: the network that growth actions change.

    Its params are ``{layer: {"kernel", "bias"}}`` and, for each patch, ``{patch.name: {"down": {"kernel", "bias"},
    "up": {"kernel"}}}``. Sparsity is the optimizer's: train it under ``optax_structure.sparse`` from params made by
    ``random_masks`` and ``sparse_init_tree``. After a growth action build it anew from ``growth.units``; only the
    architecture is in it, so an equal one is the same static argument of ``jax.jit``.

    Args:
      layers: pairs (name, units) in forward order; the last one gives the logits.
      patches: see ``optax_structure.structure.Patch``.
      activation: between the layers.
      dtype: of the computation (default: promoted from input and parameters).
      param_dtype: of the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> from optax_structure import nn
      >>> chain = nn.linen.Chain((("hidden_1", 16), ("head", 10)))
      >>> params = chain.init(jax.random.key(0), jnp.ones((1, 64)))["params"]
      >>> chain == nn.linen.Chain.from_units(oxs.dense_chain(params, ["hidden_1", "head"]))
      True
      >>> logits, activations = nn.capture(chain)(params, jnp.ones((3, 64)))
      >>> logits.shape, activations["hidden_1"].shape
      ((3, 10), (3, 16))
    """

    layers: tuple[tuple[str, int], ...]
    patches: tuple[Patch, ...] = ()
    activation: Callable[[Array], Array] = jax.nn.relu
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @classmethod
    def from_units(cls, units: Units, **kwargs: Any) -> Chain:
        """The chain whose params ``units`` describes.

        Args:
          units: of a ``dense_chain`` at the root of the params tree.
          **kwargs: the other fields.

        Raises:
          ValueError: for a layer inside another container, which a chain does not have.
        """
        nested = [layer for layer in units.layers if "/" in layer]
        if nested:
            raise ValueError(f"units: the layers {nested} lie inside a container; a Chain has them at its root.")
        return cls(tuple((group.layer, group.size) for group in units.groups[1:]), units.patches, **kwargs)

    @linen.compact
    def __call__(self, x: Array) -> Array:
        """``(..., inputs)`` -> logits ``(..., classes)``."""
        if self.patches and self.is_initializing():
            raise ValueError(
                "a Chain with patches cannot be initialised: the sizes of patches are in their params. Initialise it "
                "without and grow them with add_patches, or draw old params anew with sparse_init_tree."
            )
        sides = {patch.name: self.get_variable("params", patch.name) for patch in self.patches}
        for name, size in self.layers:
            x = _PatchedDense(size, self.patches, self.dtype, self.param_dtype, name=name)(x, sides)
            if name != self.layers[-1][0]:
                x = self.activation(x)
        return x
