"""Masks in NNX models: a kind of variable of their own, and the way between a model and ``optax_structure.sparse``.

A ``Mask`` stands under the name ``<param>_mask`` beside the parameter that it masks. It stays out of ``nnx.grad`` and
of every optimizer with ``wrt=nnx.Param``.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import Array

from optax_structure._tree import PyTree, align, leaves_by_path, map_with_path

_SUFFIX = "_mask"


class Mask(nnx.Variable):
    """Which connections of a parameter exist: a bool array of its shape, ``True`` where one does.

    Give it the name ``<param>_mask`` in your own module and ``masks_of`` and ``set_masks`` find it.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> layer.kernel_mask = nn.Mask(jnp.eye(2, dtype=bool))
      >>> nn.masks_of(layer)["kernel"].get_value().tolist()
      [[True, False], [False, True]]
    """


def masks_of(model: nnx.Module) -> nnx.State:
    """The masks of a model, as ``optax_structure.sparse`` takes them.

    Args:
      model: any NNX module; a ``Mask`` under ``<param>_mask`` masks the parameter of that name beside it.

    Returns:
      An ``nnx.State`` with the structure of ``nnx.state(model, nnx.Param)``: a bool array for every parameter that
      has a mask, a scalar ``True`` for the others.

    Example:
      >>> import jax, optax, optax_structure as oxs
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> model = nn.MLP([64, 32, 10], density=0.1, masked_by="update", rngs=nnx.Rngs(0))
      >>> tx = oxs.sparse(optax.adam(1e-3), nn.masks_of(model))
      >>> state = tx.init(nnx.state(model, nnx.Param))
    """
    masks = {path.removesuffix(_SUFFIX): mask for path, mask in leaves_by_path(nnx.state(model, Mask)).items()}
    return map_with_path(lambda path, leaf: masks.get(path, jnp.asarray(True)), nnx.state(model, nnx.Param))


def set_masks(model: nnx.Module, masks: PyTree) -> None:
    """Write masks into a model, and 0 into the weights off them: the way back from ``get_masks(state)``.

    Args:
      model: an NNX module, changed in place.
      masks: tree of the structure of ``nnx.state(model, nnx.Param)``; a scalar ``True`` for a parameter that has a
        mask fills it.

    Raises:
      ValueError: for another structure, a mask of another shape than its parameter's, or one for a parameter that has
        no ``Mask``, naming its path.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> model = nn.SparseLinear(4, 4, density=0.5, rngs=nnx.Rngs(0))
      >>> nn.set_masks(model, jax.tree.map(lambda leaf: True, nnx.state(model, nnx.Param)))
      >>> bool(model.kernel_mask[...].all())
      True
    """
    params = nnx.state(model, nnx.Param)
    given = leaves_by_path(align(masks, params, "masks"))
    held = {path.removesuffix(_SUFFIX) for path in leaves_by_path(nnx.state(model, Mask))}
    for path, leaf in leaves_by_path(params).items():
        shape = jnp.shape(given[path])
        if shape and path not in held:
            raise ValueError(f"masks: {path!r} has a mask, the model none for it: build it from a sparse layer.")
        if shape and shape != leaf.shape:
            raise ValueError(f"masks: {path!r} has shape {shape}, its parameter {leaf.shape}.")

    def full(path: str, old: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(given[path.removesuffix(_SUFFIX)], bool), old.shape)

    def zeroed(path: str, leaf: Array) -> Array:
        return jnp.where(given[path], leaf, jnp.zeros((), leaf.dtype)) if jnp.ndim(given[path]) else leaf

    nnx.update(model, map_with_path(full, nnx.state(model, Mask)))
    nnx.update(model, map_with_path(zeroed, params))
