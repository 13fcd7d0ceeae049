"""Leaves whose gradient was not computed wait: their update is exactly 0, and their part of the state stays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import PyTree, align, leaves_by_path
from optax_structure.state import slots
from optax_structure.transforms._extra import Rule, takes_extra_args, transformation
from optax_structure.transforms._multiplier import record
from optax_structure.transforms._two_steps import in_two_steps


def skip_unobserved(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """``inner`` for the leaves whose gradient was computed; the others stay where they are.

    A gradient that was left out (by ``gated``, by a ``FreezePlan``) is 0 and means nothing. An optimizer that takes it
    for a gradient decays weights, drifts by momentum and forgets its moments. Here such a leaf has an update of exactly
    0, and all that ``inner`` holds of it (moments, and under ``per_leaf`` its count) waits. ``inner`` is shown zeros
    in place of what was not observed, and is told ``observed=`` itself.

    Around ``per_leaf(...)`` the update of a leaf that waits is a branch that is not taken: its cost is saved too.
    Around anything else the right values are chosen after the work is done. One step count that all leaves share
    (``optax.adam`` without ``per_leaf``) goes on for those that wait: after thousands of steps of waiting, moments of
    100 steps are read as if they were full, and updates come out 3.2 times too large. Under ``per_leaf`` all is right.

    Args:
      inner: the optimizer; all of it, since a weight decay outside would still move the leaf.

    Returns:
      A transformation with the state of ``inner``. ``update`` reads ``observed=``: a tree of bools with the structure
      of params, a prefix of it (``True`` for all), traced or not; a Python ``False`` leaves the leaf out of the
      program. Without it every leaf was observed.

    Raises:
      ValueError: in ``update``, for a state in which what belongs to which leaf cannot be told (SM3, L-BFGS).

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.skip_unobserved(optax.adamw(0.5, weight_decay=0.5))
      >>> params = {"body": jnp.ones(1), "head": jnp.ones(1)}
      >>> grads = {"body": jnp.zeros(1), "head": jnp.ones(1)}
      >>> updates, _ = tx.update(grads, tx.init(params), params, observed={"body": False, "head": True})
      >>> {name: round(float(update[0]), 2) for name, update in updates.items()}
      {'body': 0.0, 'head': -0.75}
    """
    inner = takes_extra_args(inner)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        observed: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        live = jax.tree.unflatten(jax.tree.structure(updates), observed_flags(observed, updates))
        return update_where(inner, live, updates, state, params, extra_args)

    return transformation(inner.init, update_fn, Rule("skip_unobserved", inner=(inner,)))


def observed_flags(observed: PyTree | None, updates: optax.Updates) -> list[Any]:
    """What ``observed=`` says of every leaf: a Python bool, or a traced one; True of all where it was not passed.

    Raises:
      ValueError: for another structure, and for what is no bool: levels of ``gates`` mean the opposite.
    """
    flags = jax.tree.leaves(align(True if observed is None else observed, updates, "observed"))
    for flag in flags:
        if jnp.result_type(flag) != jnp.bool_:
            raise ValueError(f"observed= holds {flag!r}, which is no bool: of gates pass oxs.observed(gates).")
    return [_plain(flag) for flag in flags]


def update_where(
    inner: optax.GradientTransformationExtraArgs,
    live: PyTree,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, optax.OptState]:
    """``inner.update`` where ``live``: a tree of bools, traced or not, a scalar a leaf or an array of its shape."""
    treedef = jax.tree.structure(updates)
    flags = [_plain(flag) for flag in treedef.flatten_up_to(live)]
    if all(flag is True for flag in flags):
        return inner.update(updates, state, params, **extra_args)
    extra_args = extra_args | {"observed": treedef.unflatten(flags)}
    record(updates, [jnp.asarray(flag, jnp.float32) for flag in flags])
    by_leaf = getattr(inner.update, "where", None)
    if by_leaf is not None and not any(jnp.ndim(flag) for flag in flags):
        return by_leaf(flags, updates, state, params, extra_args)

    def zeroed(tree: PyTree) -> PyTree:
        parts = zip(flags, treedef.flatten_up_to(tree), strict=True)
        return treedef.unflatten([_where(flag, leaf, None) for flag, leaf in parts])

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None) -> Any:
        return inner.update(updates, state, params, **extra_args)

    two = in_two_steps(update, zeroed(updates), state, params)
    kept = choose_state(inner, treedef.unflatten(flags), updates, state, two.new_state())
    return zeroed(two.updates(kept)), kept


def _plain(flag: Any) -> Any:
    return bool(flag) if isinstance(flag, bool | np.bool_) else flag


def _where(flag: Any, new: Any, old: Any) -> Any:
    """``new`` where the flag is true, elsewhere ``old`` (None: 0)."""
    if flag is True:
        return new
    old = jnp.zeros_like(new) if old is None else old
    return old if flag is False else jnp.where(flag, new, old)


def choose_state(
    inner: optax.GradientTransformation,
    where: PyTree,
    updates: optax.Updates,
    old: optax.OptState,
    new: optax.OptState,
) -> optax.OptState:
    """What ``new`` holds of the leaves (or elements) where the flags are true, what ``old`` holds of the others.

    What belongs to no leaf is new.
    """
    flags = dict(zip(leaves_by_path(updates), jax.tree.leaves(where), strict=True))
    values, treedef = jax.tree.flatten(old)
    paths = [entry.path for entry in slots.read(inner, old, updates)]

    def choose(path: str | None, before: Any, after: Any) -> Any:
        flag = True if path is None else flags[path]
        if jnp.ndim(flag) and jnp.shape(flag) != jnp.shape(after):
            flag = jnp.any(flag)  # by element, and this is a number of the whole leaf or of a row
        return _where(flag, after, before)

    return treedef.unflatten(map(choose, paths, values, treedef.flatten_up_to(new)))
