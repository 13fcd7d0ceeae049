"""What a rule inside a chain cannot see by itself: the raw gradient, and the optimizer's second moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from optax_structure._tree import PyTree, is_leaf, is_masked
from optax_structure.state.markers import RewiringClock
from optax_structure.transforms._extra import Rule, takes_extra_args, transformation
from optax_structure.transforms._multiplier import unrecorded


class ObserveState(NamedTuple):
    """State of ``observe``.

    Attributes:
      weight: float32 scalar a leaf: what the running mean of the leaf's squared gradients would be, had they all been
        1. It rises from 0 to 1.
      inner_state: the state of the optimizer inside.
    """

    weight: PyTree
    inner_state: optax.OptState


def _second_moments(state: optax.OptState, updates: optax.Updates) -> list[int | None]:
    """For every leaf of ``updates``, which leaf of ``state`` is its second moment: the first ``nu`` of its shape."""
    leaves, treedef = jax.tree.flatten(state)
    numbered = jax.tree.unflatten(treedef, range(len(leaves)))
    seen = jax.tree.leaves(updates)
    found: list[int | None] = [None] * len(seen)

    def walk(node: Any) -> None:
        if isinstance(node, tuple) and "nu" in getattr(node, "_fields", ()):
            moments = _leaf_by_leaf(node.nu, updates)  # pyright: ignore[reportAttributeAccessIssue]
            for place, (moment, update) in enumerate(zip(moments, seen, strict=True)):
                if moment is not None and found[place] is None and jnp.shape(leaves[moment]) == jnp.shape(update):
                    found[place] = moment
        for child in jax.tree.leaves(node, is_leaf=lambda child: child is not node):
            if child is not node:
                walk(child)

    walk(numbered)
    return found


def _leaf_by_leaf(moments: PyTree, updates: optax.Updates) -> list[int | None]:
    """For every leaf of ``updates`` its part of ``moments``; None where these have none.

    A group of ``optax.partition`` has ``MaskedNode`` in place of the leaves of the other groups, and, where a label is
    the prefix of a whole branch, in place of the branch.
    """
    nodes, treedef = jax.tree.flatten(moments, is_leaf=is_masked)
    try:
        parts = treedef.flatten_up_to(updates)
    except ValueError:  # moments of something else
        return [None] * len(jax.tree.leaves(updates))
    found: list[int | None] = []
    for node, part in zip(nodes, parts, strict=True):
        mine = is_leaf(part) and not is_masked(node)
        found += [node if mine else None] * len(jax.tree.leaves(part))
    return found


def observe(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Hand the raw gradient and the optimizer's second moments to the rules inside: ``grads=``, ``second_moment=``.

    A member of a chain sees neither what came in at the front nor the state of its siblings. This stands around all of
    it, outermost or first inside ``sparse`` (around one that rewires it raises), and passes on with every other extra
    argument

    - ``grads=``: the updates that it gets itself. An enclosed ``sparse`` masks them as it masks its gradients.
    - ``second_moment=``: tree with the structure of params, the running mean of every squared gradient that reached the
      optimizer, this step's included, divided by its weight (the bias correction of Adam); 0 for what never had a
      gradient. It is found as the field ``nu`` of a state: ``adam``, ``adamw``, ``lamb``, ``nadam``, ``radam``,
      ``amsgrad``, ``rmsprop``, alone or in ``chain``, ``partition``, ``per_leaf``, ``sparse``, ``MultiSteps`` and the
      like. A leaf whose optimizer keeps none has a scalar 0; where no leaf has one (``sgd``, ``lion``), nothing is
      passed on.

    To know the moments before the rules run, the inner update is traced twice, the first time for the moments alone.
    Compilers merge the two: nothing is computed twice and no temporary is added. (Last step's moments would be there
    already, but to read a buffer beside its overwriting costs a copy of it.) The weight is exact for every decay, one
    that changes or is injected included, and needs no step count: it is advanced by the decay that the optimizer really
    applied, which is the derivative of the new ``nu`` by the old one. Moments narrower than float32 do not resolve the
    usual decays: the optimizer's own, and so this weight, stand still.

    Args:
      inner: the whole optimizer.

    Returns:
      A transformation with the same updates; its state adds four bytes a leaf.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.observe(optax.chain(optax.scale_by_adam(), oxs.scale_by_connection(oxs.gradient_rule())))
      >>> params, grads = jnp.ones((1, 2)), jnp.array([[4.0, 0.001]])
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates.round(2).tolist()
      [[0.5, 2.0]]
    """
    inner = takes_extra_args(inner)

    def init_fn(params: optax.Params) -> ObserveState:
        state = inner.init(params)
        nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, RewiringClock))
        if any(isinstance(node, RewiringClock) for node in nodes):
            raise ValueError(
                "observe(sparse(..., rewire=...)) cannot tell a second moment that moved from one that was renewed: "
                "put observe first inside, as sparse(observe(inner), masks, rewire=...)."
            )
        return ObserveState(jax.tree.map(lambda _: jnp.zeros((), jnp.float32), params), state)

    def update_fn(
        updates: optax.Updates, state: ObserveState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, ObserveState]:
        extra_args["grads"] = updates
        moments, weight = second_moments(inner, updates, state, params, extra_args)
        given = {} if moments is None else {"second_moment": moments}
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args | given)
        return updates, ObserveState(weight, inner_state)

    return transformation(init_fn, update_fn, Rule("observe", {}, "4 B a leaf", (inner,)))


def second_moments(
    inner: optax.GradientTransformationExtraArgs,
    updates: optax.Updates,
    state: ObserveState,
    params: optax.Params | None,
    extra_args: dict[str, Any],
) -> tuple[PyTree | None, PyTree]:
    """The second moments that ``inner`` will hold after this update, bias-corrected, and the new weights.

    None where it holds none: rules that need them say so.
    """
    places = _second_moments(state.inner_state, updates)
    held = [place for place in places if place is not None]
    if not held:
        return (None if places else state.weight), state.weight  # no leaves: an empty group of optax.partition
    weights, treedef = jax.tree.flatten(state.weight)
    unknown = jax.tree.map(jnp.zeros_like, state.weight)

    def moments_after(before: list[jax.Array]) -> list[jax.Array]:
        old = _replaced(state.inner_state, dict(zip(held, before, strict=True)))
        _, new = inner.update(updates, old, params, **extra_args | {"second_moment": unknown})
        after = jax.tree.leaves(new)
        return [after[place] for place in held]

    values = jax.tree.leaves(state.inner_state)
    before = [values[place] for place in held]
    with unrecorded():
        stated = _needed(jax.make_jaxpr(moments_after)(before))
    after, slopes = jax.jvp(stated, tuple(before), tuple(jnp.ones_like(moment) for moment in before))
    learnt = dict(zip(held, zip(after, map(_first, slopes), strict=True), strict=True))
    means = []
    for index, place in enumerate(places):
        if place is None:
            means.append(jnp.zeros((), jnp.float32))
            continue
        total, decay = learnt[place]
        weights[index] += (1.0 - decay) * (1.0 - weights[index])
        means.append(_mean(total, weights[index]))
    return jax.tree.unflatten(treedef, means), jax.tree.unflatten(treedef, weights)


def _replaced(state: optax.OptState, values: dict[int, jax.Array]) -> optax.OptState:
    """``state`` with other values at some of its leaves."""
    leaves, treedef = jax.tree.flatten(state)
    return jax.tree.unflatten(treedef, [values.get(place, leaf) for place, leaf in enumerate(leaves)])


def _needed(closed: core.ClosedJaxpr) -> Callable[..., list[jax.Array]]:
    """The function of a jaxpr without the equations that its results do not depend on: here, all but the moments."""
    jaxpr, kept = closed.jaxpr, []
    needed = {id(variable) for variable in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(variable) in needed for variable in equation.outvars):
            kept.append(equation)
            needed.update(id(variable) for variable in equation.invars)
    return core.jaxpr_as_fun(closed.replace(jaxpr=jaxpr.replace(eqns=kept[::-1])))


def _mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """The mean of which ``total`` is the sum; where nothing has weight yet, the sum is 0 and so is this."""
    return total.astype(jnp.float32) * (1.0 / jax.lax.max(weight, jnp.full((), jnp.finfo(jnp.float32).tiny)))


def _first(slopes: jax.Array) -> jax.Array:
    """One number of a leaf in which all are the same; 1, which changes nothing, for a leaf without any."""
    if not slopes.size:
        return jnp.ones((), jnp.float32)
    return jax.lax.slice(slopes, (0,) * slopes.ndim, (1,) * slopes.ndim).reshape(()).astype(jnp.float32)
