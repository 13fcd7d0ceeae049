"""Constant fan-in products: every unit has the same number of inputs, gathered one rank after the other.

A kernel ``(in, out)`` with ``k`` connections a unit is ``weights (k, out)`` and ``index (k, out)``: from which input
each of them comes, int32. The index is data of static shape, so inputs move without a new compilation. An input that
stands twice in a column counts twice. The backward pass reads the connections by input: ``transpose_fan_in`` lists them
so, and has to be called again whenever the index changes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from optax_structure.sparsity._forms import (
    Rewired,
    accumulated,
    check_count,
    check_kernel,
    check_range,
    exchange_weakest,
)
from optax_structure.sparsity.draws import random_order
from optax_structure.sparsity.masks import checked_density
from optax_structure.sparsity.topk import top_k_mask

Shape = tuple[int, int]

# Connections a pass: the sums are read and written once for so many. More of them compile longer and gain nothing.
_RANKS = 4


class Transpose(NamedTuple):
    """The connections of a constant fan-in layer, listed by input.

    Attributes:
      order: int32 ``(k * out,)``: the flat places of the connections in ``index``, those of input 0 first.
      starts: int32 ``(in + 1,)``: input ``i`` has ``order[starts[i]:starts[i + 1]]``.
    """

    order: Array
    starts: Array


@functools.partial(jax.jit, static_argnames="in_features")
def transpose_fan_in(index: Array, in_features: int) -> Transpose:
    """List the connections by input, for the backward pass of ``fan_in_matmul``.

    Args:
      index: int32 ``(k, out)``.
      in_features: number of inputs.

    Returns:
      Two int32 arrays, of a shape that ``index`` and ``in_features`` fix.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_structure as oxs
      >>> table = oxs.transpose_fan_in(jnp.array([[2, 0, 2]]), 3)
      >>> table.order.tolist(), table.starts.tolist()
      ([1, 0, 2], [0, 1, 1, 3])
    """
    inputs = index.ravel()
    order = jnp.argsort(inputs, stable=True).astype(jnp.int32)
    counts = jnp.zeros(in_features, jnp.int32).at[inputs].add(1)
    return Transpose(order, jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)]))


def fan_in_matmul(x: Array, weights: Array, index: Array, transpose: Transpose | None = None) -> Array:
    """``y[..., u] = sum_j weights[j, u] * x[..., index[j, u]]``.

    Forward and the weights' gradient take ``k`` passes over ``(out, batch)``, the gradient of ``x`` as many over
    ``(in, batch)`` as the most used input has connections. So it pays at densities of a few percent: above about 6 % a
    dense product is faster, and blocks are faster at any. Both gradients have a rule of their own (``jax.custom_vjp``:
    forward-mode derivatives are not to be had); the index has none.

    Args:
      x: ``(..., in)``.
      weights: ``(k, out)``.
      index: int32 ``(k, out)``; out of range is an error where it can be seen.
      transpose: ``transpose_fan_in(index, in)``, of this very index: another one gives wrong gradients of ``x``.
        ``None`` makes it here, which sorts the connections at every call.

    Returns:
      ``(..., out)``, of the promoted dtype; sums are made in float32 at least.

    Raises:
      ValueError: for weights, an index or a table of another shape, an index out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_structure as oxs
      >>> weights, index = jnp.array([[2.0, 1.0], [1.0, 1.0]]), jnp.array([[0, 1], [2, 1]])
      >>> oxs.fan_in_matmul(jnp.array([[1.0, 10.0, 100.0]]), weights, index).tolist()
      [[102.0, 20.0]]

    References:
      Lasby et al., Dynamic sparse training with structured sparsity, 2024 (condensed constant fan-in).
    """
    x, weights, index = jnp.asarray(x), jnp.asarray(weights), jnp.asarray(index)
    _check_fan_in(weights, index, x.shape[-1])
    order, starts = transpose_fan_in(index, x.shape[-1]) if transpose is None else transpose
    if order.shape != (index.size,) or starts.shape != (x.shape[-1] + 1,):
        raise ValueError(
            f"transpose has shapes {order.shape} and {starts.shape}, index and x ask for {(index.size,)} and "
            f"{(x.shape[-1] + 1,)}: make it with transpose_fan_in(index, {x.shape[-1]})."
        )
    dtype = jnp.promote_types(x.dtype, weights.dtype)
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)
    return _product(flat, weights.astype(dtype), index, order, starts).reshape(*x.shape[:-1], index.shape[1])


# Inside, the batch stands last: a connection then reads and writes whole rows.


@jax.custom_vjp
def _product(x: Array, weights: Array, index: Array, order: Array, starts: Array) -> Array:
    del order, starts
    columns, sums = x.T, accumulated(x.dtype)

    def add(total: Array, connection: tuple[Array, Array]) -> tuple[Array, None]:
        weight, inputs = connection
        return total + weight.astype(sums)[:, None] * columns[inputs], None

    first = jnp.zeros((weights.shape[1], x.shape[0]), sums)
    return lax.scan(add, first, (weights, index), unroll=_RANKS)[0].T.astype(x.dtype)


def _forward(
    x: Array, weights: Array, index: Array, order: Array, starts: Array
) -> tuple[Array, tuple[Array, Array, Array, Array, Array]]:
    return _product(x, weights, index, order, starts), (x, weights, index, order, starts)


def _backward(kept: tuple[Array, Array, Array, Array, Array], slope: Array) -> tuple[Array, Array, None, None, None]:
    x, weights, index, order, starts = kept
    columns, slopes = x.T, slope.T
    # A product with ones, not a sum: CPUs add up rows twice as fast that way.
    ones = jnp.ones(x.shape[0], accumulated(x.dtype))
    of_weights = lax.map(lambda inputs: (columns[inputs].astype(ones.dtype) * slopes) @ ones, index)
    of_x = _of_inputs(slopes, weights, order, starts)
    return of_x.T.astype(x.dtype), of_weights.astype(weights.dtype), None, None, None


_product.defvjp(_forward, _backward)


def _of_inputs(slopes: Array, weights: Array, order: Array, starts: Array) -> Array:
    """``(out, batch)`` -> ``(in, batch)``: the first connection of every input, then the second, up to the last.

    The number of passes is read from the table when the program runs, so that any fan-out fits one program.
    """
    sums, units = accumulated(slopes.dtype), weights.shape[1]
    flat, fan_out = weights.ravel().astype(sums), jnp.diff(starts)

    def add(step: Array, total: Array) -> Array:
        for offset in range(_RANKS):
            rank = step * _RANKS + offset
            place = order[jnp.minimum(starts[:-1] + rank, order.size - 1)]
            weight = jnp.where(rank < fan_out, flat[place], 0.0)
            total = total + weight[:, None] * slopes[place % units]
        return total

    first = jnp.zeros((fan_out.size, slopes.shape[1]), sums)
    return lax.fori_loop(0, -(-jnp.max(fan_out) // _RANKS), add, first)


def random_fan_in(key: Array, shape: Shape, density: float) -> Array:
    """The index of random connections: every unit has ``round(density * in)`` different inputs.

    Args:
      key: a JAX random key.
      shape: ``(in, out)`` of the layer.
      density: share of the connections that exist, in (0, 1].

    Returns:
      int32 ``(k, out)``, each column in order.

    Raises:
      ValueError: for a density outside (0, 1], or too low for one input a unit.

    Example:
      >>> import jax
      >>> import optax_structure as oxs
      >>> oxs.random_fan_in(jax.random.key(0), (784, 512), 0.02).shape
      (16, 512)
    """
    checked_density(density)
    number = round(density * shape[0])
    if number < 1:
        raise ValueError(
            f"density={density!r} of {shape[0]} inputs gives no connection a unit: take at least {1 / shape[0]!r}."
        )
    return _drawn(key, (shape[1], shape[0]), number)


# What is chosen a unit is chosen with units as rows: CPUs count along them three times as fast.


@functools.partial(jax.jit, static_argnames=("shape", "number"))
def _drawn(key: Array, shape: Shape, number: int) -> Array:
    return _places(jax.vmap(top_k_mask, in_axes=(0, None))(random_order(key, shape), jnp.int32(number)), number)


def _places(mask: Array, number: int) -> Array:
    """Where each row of a mask is True: ``(out, in)`` -> ``(number, out)``."""
    return jax.vmap(lambda unit: jnp.flatnonzero(unit, size=number))(mask).T.astype(jnp.int32)


def fan_in_from_kernel(kernel: Array, mask: Array) -> tuple[Array, Array]:
    """The constant fan-in form of a masked kernel.

    Args:
      kernel: ``(in, out)``; what stands off the mask is left behind.
      mask: bool ``(in, out)``, with the same number of inputs in every column; concrete.

    Returns:
      ``(weights, index)``, the inputs of each unit in order.

    Raises:
      ValueError: for a mask whose units differ in their number of inputs, or have none.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_structure as oxs
      >>> kernel = jnp.arange(6.0).reshape(3, 2)
      >>> weights, index = oxs.fan_in_from_kernel(kernel, jnp.array([[True, False], [False, False], [False, True]]))
      >>> weights.tolist(), index.tolist()
      ([[0.0, 5.0]], [[0, 2]])
    """
    check_kernel(kernel, mask)
    fan_in = np.asarray(mask, bool).sum(axis=0)
    low, high = int(fan_in.min()), int(fan_in.max())
    if low != high:
        raise ValueError(
            f"mask is not constant fan-in: its units have from {low} to {high} inputs. Draw it with "
            "pattern=constant_fan_in()."
        )
    if not high:
        raise ValueError("mask is False everywhere: a constant fan-in layer has at least one input a unit.")
    index = _places(jnp.asarray(mask, bool).T, high)
    return jnp.take_along_axis(jnp.asarray(kernel), index, axis=0), index


def kernel_from_fan_in(weights: Array, index: Array, in_features: int) -> tuple[Array, Array]:
    """The masked dense form of constant fan-in weights.

    Args:
      weights: ``(k, out)``.
      index: int32 ``(k, out)``.
      in_features: number of inputs.

    Returns:
      ``(kernel, mask)``, both ``(in, out)``; an input that stands twice in a column has the sum of its weights.

    Raises:
      ValueError: as ``fan_in_matmul``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax_structure as oxs
      >>> kernel, mask = oxs.kernel_from_fan_in(jnp.array([[5.0, 7.0]]), jnp.array([[1, 0]]), 2)
      >>> kernel.tolist(), mask.tolist()
      ([[0.0, 7.0], [5.0, 0.0]], [[False, True], [True, False]])
    """
    _check_fan_in(weights, index, in_features)
    shape, units = (in_features, index.shape[1]), jnp.arange(index.shape[1])
    kernel = jnp.zeros(shape, weights.dtype).at[index, units].add(weights)
    return kernel, jnp.zeros(shape, bool).at[index, units].set(True)


def rewire_fan_in(
    key: Array, weights: Array, index: Array, in_features: int, count: int | Array, *, scores: Array | None = None
) -> Rewired:
    """Drop the weakest inputs of every unit and put as many elsewhere. A new ``count`` does not compile anew.

    The weakest have the smallest ``|w|``. New connections come from inputs that the unit did not have before the call,
    weigh 0, and take the slots of the dropped ones, so all others and their optimizer state stay in place. Make the
    table of the backward pass anew: ``transpose_fan_in(rewired.index, in_features)``.

    Args:
      key: a JAX random key, read where there are no scores.
      weights: ``(k, out)``.
      index: int32 ``(k, out)``, no input twice in a column.
      in_features: number of inputs.
      count: how many inputs of each unit move, at least 0; may be traced. What exceeds the inputs that a unit has, or
        does not have, is left out.
      scores: real numbers ``(in, out)``: the highest absent ones are taken. ``None``: uniformly at random.

    Returns:
      ``(values, index, new)``; ``new`` is bool ``(k, out)``, for ``reset_state``.

    Raises:
      ValueError: as ``fan_in_matmul``; for a negative count, or scores of another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import optax_structure as oxs
      >>> weights, index = jnp.array([[3.0, 1.0], [2.0, 4.0]]), jnp.array([[0, 1], [1, 2]])
      >>> rewired = oxs.rewire_fan_in(jax.random.key(0), weights, index, 3, 1)
      >>> rewired.index.tolist(), rewired.values.tolist(), rewired.new.tolist()
      ([[0, 0], [2, 2]], [[3.0, 0.0], [0.0, 4.0]], [[False, True], [True, False]])

    References:
      Lasby et al., Dynamic sparse training with structured sparsity, 2024 (SRigL).
    """
    _check_fan_in(weights, index, in_features)
    shape = (in_features, index.shape[1])
    if scores is not None and jnp.shape(scores) != shape:
        raise ValueError(f"scores have shape {jnp.shape(scores)}; they need one a connection, {shape}.")
    return _rewired(key, weights, index, check_count(count), scores, shape)


@functools.partial(jax.jit, static_argnames="shape")
def _rewired(key: Array, weights: Array, index: Array, count: Array, scores: Array | None, shape: Shape) -> Rewired:
    by_unit = random_order(key, shape[::-1]) if scores is None else scores.T
    at, new = jax.vmap(exchange_weakest, in_axes=(0, 0, 0, None))(index.T, jnp.abs(weights).T, by_unit, count)
    return Rewired(jnp.where(new.T, jnp.zeros((), weights.dtype), weights), at.T.astype(index.dtype), new.T)


def _check_fan_in(weights: Any, index: Any, in_features: int) -> None:
    if jnp.ndim(weights) != 2:
        raise ValueError(f"weights have shape {jnp.shape(weights)}; it must be (inputs a unit, units).")
    check_fan_in_index(index, (in_features, weights.shape[1]), len(weights))


def check_fan_in_index(index: Any, shape: Any, number: int | None = None) -> None:
    """Refuse what is no index of (``number``) inputs for each unit of a layer."""
    wrong = jnp.ndim(index) != 2 or index.shape[1] != shape[1] or number not in (None, len(index)) or not len(index)
    if wrong or not jnp.issubdtype(index.dtype, jnp.integer):
        expected = "k" if number is None else number
        raise ValueError(
            f"index has shape {jnp.shape(index)} and dtype {index.dtype}; it must be int ({expected}, {shape[1]})."
        )
    check_range(index, (shape[0],))
