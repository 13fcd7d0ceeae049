"""Gates in the backward pass: what is frozen has its gradient skipped at run time, by a flag that is data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import PyTree, align, is_traced
from optax_structure.transforms.depth import checked_depths
from optax_structure.transforms.freezing.gradients import skippable, states_of

OPEN, WEIGHTS, ALL = 0, 1, 2
"""Levels of a gate: the backward pass is whole; without the weights' gradient; without the inputs' gradient as well."""


def gates(state: optax.OptState | PyTree, depths: PyTree | None = None) -> PyTree:
    """How much of the coming backward pass each leaf can do without.

    0: all of it is needed. 1: the leaf is frozen, so the gradient of its layer's weights is not. 2: all leaves up to
    its depth are frozen, so that nothing learns from the gradient of its layer's inputs either: the backward pass ends
    there. A layer goes by the smallest number among its leaves (``gated`` sees to that).

    The order of the depths is trusted: name the layers (``layer_depths(params, [...])``) where their paths do not sort
    as they are called. What is trained beside these leaves, such as a prompt with an optimizer of its own, is not known
    here, and has no gradient behind a 2: leave out ``depths`` for it. So it is with derivatives by the inputs.

    Args:
      state: an optimizer state with ``freeze_on_small_gradients`` in it (in a step that probes all gates are open), or
        which leaves are frozen: a tree of bools with the structure of params, a scalar a leaf or an array of its shape
        (frozen where all entries are); Python bools for what is known before the program runs.
      depths: tree of ints with the structure of params, in forward order (``layer_depths``), a prefix, or a function
        that goes by paths alone: it is shown a tree of flags, for params are not here. Without it no gate is 2, which
        is always right. Skip connections and branches do no harm as long as a layer reads only what is not deeper than
        itself.

    Returns:
      Tree of the structure of params: int32 scalars, or Python ints where all bools that count are Python's.

    Raises:
      ValueError: for depths of another structure, or that are no ints >= 0.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> frozen = {"first": True, "second": True, "third": False, "fourth": True}
      >>> depths = {"first": 0, "second": 1, "third": 2, "fourth": 3}
      >>> oxs.gates(frozen, depths)
      {'first': 2, 'fourth': 1, 'second': 2, 'third': 0}
      >>> oxs.gates({"first": jnp.array(True)})["first"]
      Array(1, dtype=int32)
    """
    closed = jax.tree.map(_closed, skippable(state) if states_of(state) else state)
    if odd := [flag for flag in jax.tree.leaves(closed) if jnp.result_type(flag) != jnp.bool_]:
        raise ValueError(
            f"nothing freezes in this state, and it is no tree of bools (it holds {odd[0]!r}): pass a state with "
            "freeze_on_small_gradients(inner) in it, or which leaves are frozen."
        )
    if depths is None:
        return jax.tree.map(lambda flag: _level(flag, False), closed)
    here = checked_depths(align(depths, closed, "depths"))
    flags, places = jax.tree.leaves(closed), jax.tree.leaves(here)
    below: Any = True
    ended = {}
    for depth in sorted(set(places)):
        below = functools.reduce(_and, [flag for flag, at in zip(flags, places, strict=True) if at == depth], below)
        ended[depth] = below
    return jax.tree.map(lambda flag, depth: _level(flag, ended[depth]), closed, here)


def _closed(flag: Any) -> Any:
    """One flag of a leaf: a Python bool where it is known before the program runs."""
    if isinstance(flag, bool | np.bool_):
        return bool(flag)
    return jnp.all(flag) if jnp.result_type(flag) == jnp.bool_ else flag


def _and(one: Any, other: Any) -> Any:
    if one is False or other is False:
        return False
    return other if one is True else one if other is True else one & other


def _level(frozen: Any, ended: Any) -> Any:
    if isinstance(frozen, bool) and isinstance(ended, bool):
        return int(frozen) + int(frozen and ended)
    return jnp.asarray(frozen, jnp.int32) + jnp.asarray(_and(frozen, ended), jnp.int32)


def observed(gates: PyTree) -> PyTree:
    """Whose gradients are computed under these gates: what ``update`` is told as ``observed=``.

    Args:
      gates: tree of levels, as ``gates`` returns.

    Returns:
      Tree of bools, Python bools where the levels are Python ints.

    Example:
      >>> import optax_structure as oxs
      >>> oxs.observed({"first": 2, "second": 1, "third": 0})
      {'first': False, 'second': False, 'third': True}
    """
    return jax.tree.map(lambda level: level == OPEN, gates)


def gated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` with a gate: its backward pass leaves out, at run time, what nobody needs.

    ``fn(params, *inputs) -> outputs`` becomes ``gated(fn)(gate, params, *inputs)``, of the same value. The gate is
    data, so a frontier that moves compiles nothing. Behind a closed gate the matrix products of the weights' gradient
    (level 1), and those of the inputs' gradient too (level 2), are branches that are not taken; these gradients are
    exactly 0.

    With levels that are Python ints (of a ``FreezePlan``) the choice is made when the program is traced.

    The forward pass does not know which branch will be taken and keeps what the whole one needs. Around a block of
    several operations ``gated(jax.checkpoint(block))`` keeps the inputs alone and computes the rest again where the
    gate is open: for a transformer's blocks that is less memory, and less time too (``benchmarks/freezing.py``).

    Write ``fn`` as one layer or one block: what stands outside has its backward pass whole, though behind a level 2 it
    works on zeros. Tell the optimizer with ``observed=observed(gates)`` which gradients are real. Under ``jax.vmap``
    over the gates both branches run and the right one is chosen: right, and nothing is saved. ``jax.jit``,
    ``jax.checkpoint``, ``lax.scan`` and meshes are fine; forward-mode derivatives (``jax.jvp``) are not to be had.

    Args:
      fn: a pure function of params and inputs. Arrays that it closes over must not be differentiated.

    Returns:
      ``(gate, params, *inputs, **more) -> outputs``; ``gate`` is one level, or the layer's part of the tree of
      ``gates`` (the smallest level counts). Only floating arrays of params and inputs have gradients.

    Raises:
      ValueError: for a gate that is neither an integer nor a bool, or has an axis.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> layer = oxs.gated(lambda params, x: jnp.tanh(x @ params["kernel"]))
      >>> def loss(params, x, gate):
      ...     return layer(gate, params, x).sum()
      >>> params, x = {"kernel": jnp.ones((2, 1))}, jnp.ones((1, 2))
      >>> step = jax.jit(jax.grad(loss, argnums=(0, 1)))
      >>> for level in range(3):  # one program
      ...     of_params, of_x = step(params, x, jnp.array(level))
      ...     print(of_params["kernel"].any(), of_x.any())
      True True
      False True
      False False
    """

    @functools.wraps(fn)
    def with_gate(gate: Any, params: Any, *inputs: Any, **more: Any) -> Any:
        level = _least(gate)
        leaves, treedef = jax.tree.flatten((params, inputs, more))
        arrays = [place for place, leaf in enumerate(leaves) if _is_array(leaf)]
        floats = [place for place in arrays if jnp.issubdtype(leaves[place].dtype, jnp.inexact)]
        own = len(jax.tree.leaves(params))
        weights, slopes = [p for p in floats if p < own], [p for p in floats if p >= own]
        others = [place for place in arrays if place not in floats]

        def call(*values: list[Any]) -> Any:
            filled = list(leaves)  # what is no array stays: a flag or a number that fn may branch on
            for places, group in zip((weights, slopes, others), values, strict=True):
                for place, value in zip(places, group, strict=True):
                    filled[place] = value
            params, inputs, more = jax.tree.unflatten(treedef, filled)
            return fn(params, *inputs, **more)

        groups = [[leaves[place] for place in places] for places in (weights, slopes, others)]
        if not isinstance(level, int):
            return _gated_call(call, level, *groups)
        shut = (level >= WEIGHTS, level >= ALL, False)
        return call(*(jax.lax.stop_gradient(of) if closed else of for of, closed in zip(groups, shut, strict=True)))

    return with_gate


def checked_level(level: Any) -> Any:
    """A level, as an int where it is known; ``ValueError`` for what is none."""
    if not _is_level(level):
        raise ValueError(
            f"gate={level!r} must be an integer scalar (0 open, 1 no gradient of the weights, 2 none of the inputs "
            "either), a bool, or a tree of such: see oxs.gates."
        )
    if not isinstance(level, int | np.integer | np.bool_):
        return level
    if int(level) not in (OPEN, WEIGHTS, ALL):
        raise ValueError(f"gate={level} must be 0 (open), 1 (no gradient of the weights) or 2 (none of the inputs).")
    return int(level)


def _least(gate: Any) -> Any:
    """The smallest level of a gate; an int where it is known."""
    levels = [checked_level(level) for level in jax.tree.leaves(gate)]
    known = [level for level in levels if isinstance(level, int)]
    if len(known) == len(levels) or OPEN in known:
        return min(known, default=OPEN)
    traced = [jnp.asarray(level, jnp.int32) for level in levels]
    return functools.reduce(jnp.minimum, traced)


def _is_level(level: Any) -> bool:
    if isinstance(level, int):
        return True
    kinds = (jnp.integer, jnp.bool_)
    return _is_array(level) and not level.ndim and any(jnp.issubdtype(level.dtype, kind) for kind in kinds)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic) or is_traced(leaf)


def _gated_call(
    call: Callable[..., Any], level: jax.Array, weights: list[Any], floats: list[Any], others: list[Any]
) -> Any:
    @jax.custom_vjp
    def run(level: jax.Array, weights: list[Any], floats: list[Any], others: list[Any]) -> Any:
        return call(weights, floats, others)

    def forward(level: jax.Array, weights: list[Any], floats: list[Any], others: list[Any]) -> Any:
        outputs, pull = jax.vjp(lambda weights, floats: call(weights, floats, others), weights, floats)
        return outputs, (level, pull)

    def backward(kept: Any, slopes: Any) -> Any:
        level, pull = kept
        # Slopes of integer outputs are no arrays (float0), which no branch can be handed.
        given, treedef = jax.tree.flatten(slopes)
        real = [slope for slope in given if slope.dtype != jax.dtypes.float0]

        def pulled(real: list[Any]) -> Any:
            rest = iter(real)
            filled = [slope if slope.dtype == jax.dtypes.float0 else next(rest) for slope in given]
            return pull(jax.tree.unflatten(treedef, filled))

        # Zeros laid out over the devices as the gradients are: branches must agree in that too.
        of_weights, of_floats = jax.tree.map(jnp.zeros_like, jax.eval_shape(pulled, real))
        branches = [pulled, lambda real: (of_weights, pulled(real)[1]), lambda real: (of_weights, of_floats)]
        of_weights, of_floats = jax.lax.switch(level, branches, real)
        return None, of_weights, of_floats, None

    run.defvjp(forward, backward)
    return run(level, weights, floats, others)
