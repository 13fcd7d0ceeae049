"""The network of the main job: a chain of sparse ReLU layers, its initialisation and its loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure import nn
from optax_structure._tree import Params, PyTree, leaves_by_path
from optax_structure.structure import Units, dense_chain

Masks = PyTree
Apply = Callable[[Params, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def chain(sizes: Sequence[int]) -> Units:
    """Units of a chain ``sizes[0] -> ... -> sizes[-1]``: layers ``hidden_1``, ``hidden_2``, ..., ``head``.

    Example:
      >>> from optax_structure.training.network import chain
      >>> [(group.layer, group.size) for group in chain([64, 16, 10]).groups]
      [('input', 64), ('hidden_1', 16), ('head', 10)]
    """
    names = [f"hidden_{i + 1}" for i in range(len(sizes) - 2)] + ["head"]
    return dense_chain(_zeros(names, sizes), names)


def params_like(units: Units) -> Params:
    """Zero params of a chain: ``{layer: {"kernel": (in, out), "bias": (out,)}}``, float32.

    Example:
      >>> from optax_structure.training.network import chain, params_like
      >>> params_like(chain([64, 16, 10]))["head"]["kernel"].shape
      (16, 10)
    """
    return _zeros(units.layers, [group.size for group in units.groups])


def _zeros(names: Sequence[str], sizes: Sequence[int]) -> Params:
    return {
        name: {"kernel": jnp.zeros((fan_in, size), jnp.float32), "bias": jnp.zeros((size,), jnp.float32)}
        for name, fan_in, size in zip(names, sizes[:-1], sizes[1:], strict=True)
    }


@functools.lru_cache(maxsize=32)
def apply_fn(units: Units) -> Apply:
    """``(params, x) -> (logits (batch, classes), {hidden layer: activations (batch, units)})`` of these units.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure.training.network import apply_fn, chain, params_like
      >>> units = chain([4, 3, 2])
      >>> params = params_like(units)
      >>> logits, activations = apply_fn(units)(params, jnp.ones((5, 4)))
      >>> logits.shape, {layer: a.shape for layer, a in activations.items()}
      ((5, 2), {'hidden_1': (5, 3)})
    """
    return nn.capture(nn.linen.Chain.from_units(units), activation=dict.fromkeys(units.layers[:-1], jax.nn.relu))


def init_params(key: jax.Array, like: Params, masks: Masks, units: Units, x: jax.Array) -> Params:
    """Weights for sparse layers: He by each unit's living inputs, then LSUV on a batch; biases 0.

    At 2 % density this is worth more than any patch: by the rows of a kernel, not its living ones, the signal would
    start seven times too small a layer.

    Args:
      key: a JAX random key.
      like: params of the wanted shapes.
      masks: which connections exist.
      units: the layers' order.
      x: one batch of inputs.

    Returns:
      Params, 0 off the mask.

    Example:
      >>> import jax, optax_structure as oxs
      >>> from optax_structure.training.network import apply_fn, chain, init_params, params_like
      >>> units = chain([20, 30, 5])
      >>> like = params_like(units)
      >>> masks = oxs.random_masks(jax.random.key(0), like, 0.3)
      >>> x = jax.random.normal(jax.random.key(1), (64, 20))
      >>> logits, _ = apply_fn(units)(init_params(jax.random.key(2), like, masks, units, x), x)
      >>> round(float(logits.std()), 1)
      1.0

    References:
      He et al., Delving deep into rectifiers, 2015; Mishkin & Matas, All you need is a good init, 2016 (LSUV).
    """
    drawn = nn.sparse_init_tree(key, jax.tree.map(jnp.zeros_like, like), masks)
    outputs = nn.capture(nn.linen.Chain.from_units(units), activation=None)
    return nn.lsuv(lambda params: outputs(params, x)[1], drawn, units.layers)


def loss_and_aux(params: Params, units: Units, x: jax.Array, y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """Mean cross-entropy, and ``(accuracy, activations)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure.training.network import chain, loss_and_aux, params_like
      >>> units = chain([4, 3, 2])
      >>> params = params_like(units)
      >>> loss, (accuracy, _) = loss_and_aux(params, units, jnp.ones((5, 4)), jnp.zeros(5, jnp.int32))
      >>> round(float(loss), 3), float(accuracy)
      (0.693, 1.0)
    """
    logits, activations = apply_fn(units)(params, x)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, ((logits.argmax(-1) == y).mean(dtype=jnp.float32), activations)


@functools.partial(jax.jit, static_argnames="units")
def accuracy_of(params: Params, units: Units, x: jax.Array, y: jax.Array) -> jax.Array:
    """Share of rows classified right, float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure.training.network import accuracy_of, chain, params_like
      >>> units = chain([4, 3, 2])
      >>> params = params_like(units)
      >>> float(accuracy_of(params, units, jnp.ones((4, 4)), jnp.array([0, 0, 0, 1])))
      0.75
    """
    return (apply_fn(units)(params, x)[0].argmax(-1) == y).mean(dtype=jnp.float32)


@functools.partial(jax.jit, static_argnames="units")
def dense_gradients(params: Params, units: Units, x: jax.Array, y: jax.Array) -> Params:
    """Gradients of the mean loss over a batch, absent connections included.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure.training.network import chain, dense_gradients, params_like
      >>> units = chain([4, 2])
      >>> params = params_like(units)
      >>> dense_gradients(params, units, jnp.ones((4, 4)), jnp.zeros(4, jnp.int32))["head"]["bias"].tolist()
      [-0.5, 0.5]
    """
    return jax.grad(loss_and_aux, has_aux=True)(params, units, x, y)[0]


def flops_per_step(params: Params, units: Units, batch_size: int, masks: Masks | None = None) -> float:
    """Multiply-adds times two of one training step: forward, weight gradients, input gradients.

    The first layer needs no input gradient. With ``masks`` only living connections count: what the step would cost if
    sparsity were free.

    Example:
      >>> from optax_structure.training.network import chain, flops_per_step, params_like
      >>> units = chain([4, 3, 2])
      >>> params = params_like(units)
      >>> flops_per_step(params, units, 10)    # 20 * (2 * 12 + 3 * 6)
      840.0
    """
    living = {} if masks is None else leaves_by_path(masks)
    total = 0.0
    for path, leaf in leaves_by_path(params).items():
        if leaf.ndim >= 2:
            mask = living.get(path, True)
            entries = int(np.count_nonzero(mask)) if np.ndim(mask) else math.prod(leaf.shape)
            total += 2.0 * batch_size * entries * (2 if path.startswith(f"{units.layers[0]}/") else 3)
    return total
