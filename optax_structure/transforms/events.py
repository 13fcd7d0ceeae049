"""What a growth event leaves behind: rates that fall by label, or by the distance from what grew."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import Params, PyTree, align, is_leaf, leaves_by_path, map_with_path
from optax_structure.labels import LabelFn, Labels
from optax_structure.structure import NOT_BORN, Growth, Units, kernel_links
from optax_structure.transforms._extra import Rule, check_number, require
from optax_structure.transforms._multiplier import Factors, Multiplier, every_leaf, multiplier


def happened(event: PyTree) -> jax.Array:
    """Whether ``event=`` says that there was one: a bool that is true, or a distance that is not -1. Bool scalar."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(event)]
    flags = [leaf if leaf.dtype == jnp.bool_ else leaf >= 0 for leaf in leaves]
    return jnp.any(jnp.stack(flags)) if flags else jnp.zeros((), bool)


def required_event(event: PyTree | None, updates: optax.Updates, transform: str) -> PyTree:
    """``event=`` for those that ask only whether there was one; an error where it is missing or cannot tell.

    A number alone is refused: 0 would be read as a distance, and so as an event.
    """
    event = require(event, "event", transform)
    if is_leaf(event) and not is_leaf(updates) and jnp.result_type(event) != jnp.bool_:
        raise ValueError(
            f"{transform} got event={event!r}, which is neither a bool nor a tree of distances: pass "
            "event=jnp.asarray(True) or False, or growth_distances(growth)."
        )
    return event


class ScaleOnEventState(NamedTuple):
    """State of ``scale_on_event``.

    Attributes:
      factor: float32 scalar a leaf, what the events so far had left of it when the last one was over; 1 at birth.
      quiet: int32 scalar, updates since the last event.
    """

    factor: PyTree
    quiet: jax.Array
    serves_all_ages = True


def scale_on_event(
    factors: Mapping[str, float] | Sequence[float],
    labels: Labels | LabelFn | None = None,
    *,
    min_scale: float = 0.01,
    recovery: float | None = None,
) -> Multiplier:
    """Multiply the update of every leaf by a factor that falls with each growth event.

    Each leaf keeps a factor, 1 at its birth. An event multiplies it, down to ``min_scale``, and acts on the update of
    its own step. With ``recovery`` it goes back to 1 afterwards, each update by ``f <- 1 - (1 - f) exp(-1/recovery)``.

    - Factors by label: ``event=`` is a bool (or the distances below, of which any that is not -1 is an event). A leaf
      whose label is not listed keeps its factor.
    - Factors by distance: ``event=`` is a tree of int32 distances from what grew, as ``growth_distances`` returns it
      (or a prefix). Distance ``d`` multiplies by ``factors[d]``, every greater one by the last, -1 by 1. So
      ``[0.9, 0.7, 0.5]`` are the original's factors for what grew, for its neighbours, and for all else.

    ``event=`` holds traced values: pass one form at every step, ``jnp.asarray(False)`` or a tree of -1 where nothing
    happened, and nothing is traced again. The event belongs to the first update of the grown network.

    ``optax.MultiSteps`` updates what it holds with what is passed at the last of its small steps: inside it, an event
    that is passed at another one is lost. So keep this outside, ``optax.chain(optax.MultiSteps(inner, n), rates)``, or
    accumulate in the loop: ``fit(accumulate=n)``.

    ``transfer_state`` carries the factors of leaves that exist and starts new leaves at 1, so a fresh part is slowed
    only where its own distance (0) or label is concerned, as that of a leaf which grew. Relabelling changes which
    factor the next event has, not what earlier ones left; ``transfer_state(restart=...)`` sets leaves back to 1.

    In the original the grown and the adjacent layer are found by their names, and nothing is remembered or floored.

    Args:
      factors: label -> factor, or the factors of distance 0, 1, ...; all in [0, 1]: above 1 a rate would grow with
        every event, without a bound.
      labels: for factors by label only: tree of labels with the structure of params, a prefix, or a function of params.
      min_scale: floor of what the events leave, in [0, 1].
      recovery: time constant in updates, > 0; None: no recovery.

    Returns:
      A transformation that reads ``event=`` and whose state holds one float32 scalar a leaf.

    Raises:
      ValueError: for numbers out of range, no factors, labels missing or given in vain; in ``update`` for a missing
        ``event=``, for a bool where distances are needed, and for a number where a bool is.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"hidden": jnp.ones(1), "head": jnp.ones(1)}
      >>> tx = oxs.scale_on_event({"scaffold": 0.5}, {"hidden": "scaffold", "head": "new"})
      >>> state = tx.init(params)
      >>> for event in (True, False, True):
      ...     updates, state = tx.update(params, state, event=jnp.asarray(event))
      >>> float(updates["hidden"][0]), float(updates["head"][0])
      (0.25, 1.0)
    """
    by_label = dict(factors) if isinstance(factors, Mapping) else {}
    by_distance = () if isinstance(factors, Mapping) else tuple(factors)
    if not (by_label or by_distance):
        raise ValueError(f"factors={factors!r} must hold at least one factor.")
    if by_distance and labels is not None:
        raise ValueError("labels are given, but factors are by distance: pass factors as a mapping label -> factor.")
    if by_label and labels is None:
        raise ValueError("labels are missing: factors by label need scale_on_event(factors, labels).")
    for name, factor in [*by_label.items(), *enumerate(by_distance)]:
        check_number(f"factors[{name!r}]", factor, high=1.0)
    check_number("min_scale", min_scale, high=1.0)
    if recovery is not None:
        check_number("recovery", recovery, low=math.ulp(0.0))

    def of_labels(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda label: by_label.get(label, 1.0), align(labels, tree, "labels"))

    def of_distance(distance: Any) -> jax.Array:
        if jnp.result_type(distance) == jnp.bool_:
            raise ValueError(
                "scale_on_event with factors by distance needs event= as a tree of int32 distances, got a bool: pass "
                "growth_distances(growth), or factors by label."
            )
        mine = jnp.asarray(by_distance, jnp.float32)[jnp.clip(distance, 0, len(by_distance) - 1)]
        return jnp.where(distance >= 0, mine, 1.0)

    def remembered(quiet: jax.Array) -> jax.Array:
        """The share of an event's effect that is left."""
        return jnp.exp(-quiet / jnp.asarray(recovery, jnp.float32)) if recovery is not None else jnp.ones(())

    def recovered(factor: jax.Array, share: jax.Array) -> jax.Array:
        return factor if recovery is None else 1.0 - (1.0 - factor) * share

    def init_fn(params: optax.Params) -> ScaleOnEventState:
        if by_label:
            of_labels(params)  # labels of another tree are named now
        ones = jax.tree.map(lambda _: jnp.ones((), jnp.float32), params)
        return ScaleOnEventState(factor=ones, quiet=jnp.zeros((), jnp.int32))

    def factors_fn(
        updates: optax.Updates,
        state: ScaleOnEventState,
        params: optax.Params | None = None,
        *,
        event: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[Factors, ScaleOnEventState]:
        del params, extra_args
        if by_label:
            event = required_event(event, updates, "scale_on_event")
            scales = of_labels(updates)
        else:
            event = require(event, "event", "scale_on_event")
            scales = jax.tree.map(of_distance, align(event, updates, "event"))
        flag = happened(event)

        def after_event(state: ScaleOnEventState) -> ScaleOnEventState:
            share, floor = remembered(state.quiet), jnp.asarray(min_scale, jnp.float32)

            def left(factor: jax.Array, scale: Any) -> jax.Array:
                return jax.lax.max(recovered(factor, share) * scale, floor)

            return ScaleOnEventState(jax.tree.map(left, state.factor, scales), jnp.zeros((), jnp.int32))

        # Between events, which are rare, nothing is computed a leaf.
        state = jax.lax.cond(flag, after_event, lambda state: state, state)
        share = remembered(state.quiet)
        factors = every_leaf(updates, state.factor, of=lambda factor: recovered(factor, share))
        return factors, state._replace(quiet=optax.safe_increment(state.quiet))

    numbers = {"factors": by_label or by_distance, "min_scale": min_scale, "recovery": recovery}
    return multiplier(init_fn, factors_fn, Rule("scale_on_event", numbers, "4 B a leaf"))


def growth_distances(growth: Growth) -> PyTree:
    """How many layers every leaf is away from what a growth action changed: the ``event=`` of ``scale_on_event``.

    A layer grew when it got units, connections or patches that it did not have, or is itself new. A kernel that only
    got rows, because the layer that it reads has new units, did not grow: it is a neighbour, at distance 1.

    It is read from the record and not from names, so it needs no list of layers and holds for every action. Without a
    record see ``layer_distances``.

    Args:
      growth: what a growth action returned.

    Returns:
      Tree of the structure of ``growth.params`` with an int32 scalar a leaf; see ``layer_distances``. All -1 where
      nothing grew. Runs on the host.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> params = {"hidden": {"kernel": jnp.ones((4, 3))}, "head": {"kernel": jnp.ones((3, 2))}}
      >>> units = oxs.dense_chain(params, ["hidden", "head"])
      >>> grown = oxs.widen(params, "scaffold", True, units, "hidden", 2, key=jax.random.key(0))
      >>> jax.tree.map(int, oxs.growth_distances(grown))
      {'head': {'kernel': 1}, 'hidden': {'kernel': 0}}
    """
    leaves, births = leaves_by_path(growth.params), leaves_by_path(growth.born)
    reads = {(axis.path, axis.axis) for group in growth.units.groups for axis in group.axes if axis.role == "outgoing"}
    owners = _owners(growth.params, growth.units)

    def grew(path: str) -> bool:
        fresh = [np.asarray(source) < 0 for source in growth.sources[path]]
        if any(new.any() for axis, new in enumerate(fresh) if (path, axis) not in reads):
            return True
        born = np.asarray(births[path]) != NOT_BORN
        for axis, new in enumerate(fresh if born.ndim else ()):
            born = np.compress(~new, born, axis) if (path, axis) in reads else born
        return bool(born.any())

    return layer_distances(
        growth.params, growth.units, {layer for path in leaves if grew(path) for layer in owners[path]}
    )


def layer_distances(params: Params, units: Units, layers: Collection[str]) -> PyTree:
    """How many layers every leaf is away from the named ones.

    0 for the leaves that make a named layer's units (kernel, bias, normalisation) and for its patches, 1 for those of
    the layers that it reads or that read it, and so on. The network's input is no layer: nothing is near through it.

    Args:
      params: tree of arrays.
      units: unit groups.
      layers: names of layers, as ``units.layers`` lists them.

    Returns:
      Tree of the structure of ``params`` with an int32 scalar a leaf; -1 for a leaf that the units do not hold, or
      that no path leads to. Runs on the host.

    Raises:
      ValueError: for an unknown layer.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> params = {"a": {"w": jnp.ones((4, 3))}, "b": {"w": jnp.ones((3, 3))}, "c": {"w": jnp.ones((3, 2))}}
      >>> units = oxs.dense_chain(params, ["a", "b", "c"])
      >>> jax.tree.map(int, oxs.layer_distances(params, units, ["c"]))
      {'a': {'w': 2}, 'b': {'w': 1}, 'c': {'w': 0}}
    """
    links = [(link.source, link.target) for link in kernel_links(units) if link.source in units.layers]
    distances = {units.group(layer).layer: 0 for layer in layers}
    reached = set(distances)
    while reached:
        beside = {b for a, b in links if a in reached} | {a for a, b in links if b in reached}
        farther = max(distances.values()) + 1
        reached = beside - distances.keys()
        distances |= dict.fromkeys(reached, farther)
    owners = _owners(params, units)

    def distance(path: str, leaf: Any) -> np.int32:
        del leaf
        return np.int32(min((distances[layer] for layer in owners[path] if layer in distances), default=-1))

    return cast(PyTree, map_with_path(distance, params))


def _owners(params: Params, units: Units) -> dict[str, set[str]]:
    """The layers whose units each leaf makes, or to whose output it adds as a patch."""
    owners: dict[str, set[str]] = {path: set() for path in leaves_by_path(params)}
    for group in units.groups:
        for axis in group.axes:
            if axis.role != "outgoing":
                owners.setdefault(axis.path, set()).add(group.layer)
    patched = {patch.name: patch.layer for patch in units.patches}
    for path, layers in owners.items():
        if (name := path.partition("/")[0]) in patched:
            layers.add(patched[name])
    return owners
