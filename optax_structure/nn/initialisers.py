"""Initialisation that counts living connections: by fan-in (``sparse_init``), or from data (``lsuv``).

A dense initialiser scales by the number of rows of a kernel. At 2 % density a unit has a fiftieth of them, so its
output starts seven times too small, a layer, and the signal is gone after three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from optax_structure._tree import Params, PyTree, align, leaves_by_path, map_with_path
from optax_structure.sparsity.masks import random_masks

Initializer = Callable[[Array, tuple[int, ...], Any], Array]


def kernel_mask(key: Array, shape: tuple[int, ...], density: float) -> Array:
    """A random mask for one kernel: exactly ``round(density * size)`` connections, at least one a unit."""
    if density == 1.0:
        return jnp.ones(shape, bool)
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    return random_masks(key, {"kernel": kernel}, density, distribution="uniform")["kernel"]


def masked_kernel(key: Array, mask: Array, dtype: Any, kernel_init: Initializer | None) -> Array:
    """The first weights of a sparse kernel, 0 off the mask: ``kernel_init``'s, or ``sparse_init``'s for ``None``."""
    if kernel_init is None:
        return sparse_init(key, mask, dtype)
    kernel = kernel_init(key, mask.shape, dtype)
    return jnp.where(mask, kernel, jnp.zeros((), kernel.dtype))


def sparse_init(key: Array, mask: Array, dtype: Any = jnp.float32, *, gain: float = 2.0) -> Array:
    """He-normal weights whose fan-in is the number of living incoming connections of each unit.

    Weight ``(..., u)`` is drawn from a normal of variance ``gain / n_u``, where ``n_u`` is the number of ``True`` in
    ``mask[..., u]``. With unit-variance inputs every unit's pre-activation then has the variance ``gain``, however
    many connections it has; a unit with none gets zeros.

    Args:
      key: a PRNG key.
      mask: bool array of the kernel's shape, the units last: ``(in, out)``, ``(height, width, in, out)``.
      dtype: of the weights.
      gain: 2 before a ReLU, 1 before a linear or tanh unit.

    Returns:
      The weights, exactly 0 off the mask.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_structure import nn
      >>> mask = jnp.array([[True, False], [True, False], [False, True]])
      >>> kernel = nn.sparse_init(jax.random.key(0), mask)
      >>> bool(jnp.all((kernel != 0) == mask))
      True

    References:
      He et al., Delving Deep into Rectifiers, 2015; with the living fan-in: Evci et al., Gradient Flow in Sparse
      Neural Networks and How Lottery Tickets Win, 2022.
    """
    return _he_normal(key, mask, gain).astype(dtype)


@jax.jit
def _he_normal(key: Array, mask: Array, gain: float) -> Array:
    fan_in = jnp.sum(mask, axis=tuple(range(mask.ndim - 1)), dtype=jnp.float32)
    scale = jnp.sqrt(gain / jnp.maximum(fan_in, 1.0))
    return jnp.where(mask, jax.random.normal(key, mask.shape, jnp.float32) * scale, 0.0)


def sparse_init_tree(key: Array, params: Params, masks: PyTree, *, gain: float = 2.0) -> Params:
    """Draw every sparse leaf of a params tree anew with ``sparse_init``; other leaves stay.

    Args:
      key: a PRNG key.
      params: tree of arrays.
      masks: tree of the structure of ``params``: bool arrays, or a scalar ``True`` for a leaf that is not sparse.
      gain: see ``sparse_init``.

    Returns:
      The new params, of the same dtypes.

    Raises:
      ValueError: for masks of another structure, or a mask whose shape is not its leaf's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_structure import nn
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
      >>> masks = {"kernel": jnp.eye(3, 2, dtype=bool), "bias": True}
      >>> fresh = nn.sparse_init_tree(jax.random.key(0), params, masks)
      >>> int(jnp.count_nonzero(fresh["kernel"])), fresh["bias"].tolist()
      (2, [1.0, 1.0])
    """
    index = {path: i for i, path in enumerate(leaves_by_path(params))}

    def draw(path: str, leaf: Array, mask: Any) -> Array:
        if jnp.ndim(mask) == 0:
            return leaf
        if jnp.shape(mask) != jnp.shape(leaf):
            raise ValueError(f"masks: {path!r} has shape {jnp.shape(mask)}, its parameter {jnp.shape(leaf)}.")
        return sparse_init(jax.random.fold_in(key, index[path]), mask, leaf.dtype, gain=gain)

    return map_with_path(draw, params, align(masks, params, "masks"))


def lsuv(
    activations_of: Callable[[Params], Mapping[str, Array]],
    params: Params,
    layers: Sequence[str],
    *,
    iterations: int = 10,
    tol: float = 0.01,
    kernel: str = "kernel",
) -> Params:
    """Layer-sequential unit variance: rescale the layers' kernels, first to last, by what they do to a batch of data.

    For each layer in turn its kernel is divided by the standard deviation of the layer's pre-activations (over the
    batch, the units and all other axes together) until their variance is 1 within ``tol``. Masks, signs and relative
    weights stay; biases are not touched.

    The whole of it is one traced loop: it compiles once and may stand inside ``jax.jit`` or ``jax.vmap``.

    Args:
      activations_of: ``params -> {layer: pre-activations}`` on a fixed batch; ``nn.capture(model, activation=None)``
        makes one for any Flax model.
      params: tree of arrays (a dict, an ``nnx.State``...).
      layers: the layers' paths in forward order; ``params`` holds ``"<layer>/<kernel>"``.
      iterations: the most rescalings of one layer, >= 1. One is enough where biases are zero.
      tol: how far from 1 the variance may end.
      kernel: the name of the leaf to rescale.

    Returns:
      The params with rescaled kernels, of the same dtypes. A layer whose variance is 0 or not finite is left as it is.

    Raises:
      ValueError: for a layer without a kernel or without activations, listing those there are.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> model = nn.MLP([64, 32, 10], density=0.1, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(1), (256, 64))
      >>> apply = nn.capture(model, activation=None)
      >>> params = nn.lsuv(lambda p: apply(p, x)[1], nnx.state(model, nnx.Param), model.layer_names)
      >>> [round(float(jnp.var(y)), 1) for y in apply(params, x)[1].values()]
      [1.0, 1.0]
      >>> nnx.update(model, params)

    References:
      Mishkin and Matas, All you need is a good init, 2016.
    """
    if iterations < 1 or tol <= 0.0:
        raise ValueError(f"iterations={iterations!r} must be >= 1 and tol={tol!r} > 0.")
    index = {f"{layer}/{kernel}".lstrip("/"): i for i, layer in enumerate(layers)}
    missing = index.keys() - leaves_by_path(params).keys()
    if missing:
        raise ValueError(f"layers: params have no {sorted(missing)}; they have {list(leaves_by_path(params))}.")

    def variance(params: Params, which: Array) -> Array:
        activations = activations_of(params)
        unknown = [layer for layer in layers if layer not in activations]
        if unknown:
            raise ValueError(f"layers: activations_of gives nothing for {unknown}; it gives {list(activations)}.")
        return jnp.stack([jnp.var(activations[layer].astype(jnp.float32)) for layer in layers])[which]

    def step(carry: tuple[Params, Array, Array]) -> tuple[Params, Array, Array]:
        params, which, tries = carry
        now = variance(params, which)
        done = (jnp.abs(now - 1.0) < tol) | (tries == iterations) | ~((now > 0.0) & jnp.isfinite(now))
        factor = jnp.where(done, 1.0, lax.rsqrt(jnp.where(done, 1.0, now)))

        def rescale(path: str, leaf: Array) -> Array:
            if path not in index:
                return leaf
            scaled = leaf.astype(jnp.float32) * jnp.where(which == index[path], factor, 1.0)
            return scaled.astype(leaf.dtype)

        return map_with_path(rescale, params), which + done, jnp.where(done, 0, tries + 1)

    zero = jnp.zeros((), jnp.int32)
    return lax.while_loop(lambda carry: carry[1] < len(layers), step, (params, zero, zero))[0]
