"""Rates by depth, as multipliers on one base rate: geometric, any profile, or three bands.

A depth is an int a leaf, counted from 0 at the input (see ``layer_depths``). All of these go after the moment-holding
transform, as their relatives in ``scaling`` do.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import PyTree, align, children, is_function, is_leaf
from optax_structure.labels import LabelFn, Labels
from optax_structure.state.markers import AgeClock, first_clock
from optax_structure.transforms._extra import Rule, check_number
from optax_structure.transforms._multiplier import Factors, LeafGroup, Multiplier, aged, every_leaf, multiplier

Schedule = Callable[[Any], Any]


class Place(NamedTuple):
    """Where a leaf stands: at ``depth`` of ``0 .. last``."""

    depth: int
    last: int


def checked_depths(depths: PyTree) -> PyTree:
    """The depths as Python ints; ``ValueError`` for one that is none, is only known at run time, or is below 0."""
    checked = jax.tree.map(_int, depths)
    if any(depth < 0 for depth in jax.tree.leaves(checked)):
        raise ValueError(f"depths must be >= 0, got {sorted(set(jax.tree.leaves(checked)))}.")
    return checked


def _int(depth: Any) -> int:
    try:
        return operator.index(depth)
    except TypeError as error:
        raise ValueError(
            f"depths must be ints that are known before the program runs, got {depth!r}: make them outside of jax.jit, "
            "as layer_depths does."
        ) from error


def third(depth: int, last: int) -> int:
    """In which third of the depths ``0 .. last`` a layer is: 0, 1 or 2. The only layer is in the middle.

    In whole numbers, so that 1/3 and 2/3 are where they are, which is in the middle too.
    """
    return 0 if 3 * depth < last else 2 if 3 * depth > 2 * last else 1


def _pairs(depths: PyTree, labels: PyTree) -> set[tuple[str, int]]:
    """Which depths occur under which label; either tree may be a prefix of the other, here or there."""
    if is_leaf(depths):
        return {(label, depths) for label in jax.tree.leaves(labels)}
    if is_leaf(labels):
        return {(labels, depth) for depth in jax.tree.leaves(depths)}
    inside, others = children(depths)[0], children(labels)[0]
    return {pair for name in inside.keys() & others.keys() for pair in _pairs(inside[name], others[name])}


def _placed(depths: PyTree, within: Labels | LabelFn | None) -> Callable[[optax.Updates], list[Place]]:
    """A function that says the place of every leaf of a tree, in flattening order.

    What is deepest is read from the whole tree where it is given as one: ``updates`` may be a part of it.
    """
    whole = None if is_function(depths) else checked_depths(depths)

    def places(updates: optax.Updates) -> list[Place]:
        here = checked_depths(align(depths, updates, "depths"))
        leaves = jax.tree.leaves(here)
        if within is None:
            last = max(jax.tree.leaves(here if whole is None else whole), default=0)
            return [Place(depth, last) for depth in leaves]
        labels = align(within, updates, "within")
        pairs = _pairs(here, labels) if whole is None or is_function(within) else _pairs(whole, within)
        ranked = {label: sorted({depth for other, depth in pairs if other == label}) for label, _ in pairs}
        mine = [ranked[label] for label in jax.tree.leaves(labels)]
        return [Place(ranks.index(depth), len(ranks) - 1) for depth, ranks in zip(leaves, mine, strict=True)]

    return places


def _first(places: Callable[[optax.Updates], list[Place]]) -> Callable[[optax.Params], optax.EmptyState]:
    """The ``init`` of what has no state."""

    def init_fn(params: optax.Params) -> optax.EmptyState:
        places(params)  # depths of another tree are named now
        return optax.EmptyState()

    return init_fn


def scale_by_depth(
    decay: float,
    depths: PyTree,
    *,
    protect: Literal["early", "late"] = "early",
    min_scale: float = 0.0,
    within: Labels | LabelFn | None = None,
) -> Multiplier:
    """Layer-wise learning-rate decay (LLRD): the factor falls geometrically with the distance from one end.

    With depths ``d = 0 .. D-1``: ``decay ** ((D-1-d) / (D-1))`` protects the early layers (the last has factor 1, the
    first ``decay``), ``decay ** (d / (D-1))`` the late ones; 1 when ``D = 1``; never below ``min_scale``.

    The original's cascading decay has ``decay ** (d / D)``: it names early layers as what it protects and slows the
    late ones, and no layer of it has the factor ``decay``. Here the direction is an argument and both ends are met.

    Args:
      decay: factor of the most protected layer, in [0, 1].
      depths: tree of ints with the structure of params (see ``layer_depths``), a prefix, or a function of params. ``D``
        is one more than the greatest depth of the whole tree: inside ``optax.partition`` pass a tree.
      protect: which end learns slowly.
      min_scale: floor of the factor, in [0, 1].
      within: labels (tree, prefix, or function of params) within which depth is counted: ``d`` is then the rank of a
        leaf's depth among the depths of its label, and ``D`` how many there are. Inside ``optax.partition`` pass a
        tree, as for ``depths``.

    Returns:
      A stateless transformation.

    Raises:
      ValueError: for numbers out of range, an unknown ``protect``, a negative depth.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)}
      >>> tx = oxs.scale_by_depth(0.25, {"a": 0, "b": 1, "c": 2})
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> [float(u[0]) for u in updates.values()]
      [0.25, 0.5, 1.0]

    References:
      Clark et al., ELECTRA, 2020 (layer-wise decay); Howard & Ruder, 2018.
    """
    check_number("decay", decay, high=1.0)
    check_number("min_scale", min_scale, high=1.0)
    if protect not in ("early", "late"):
        raise ValueError(f"protect={protect!r} must be 'early' or 'late'.")
    places = _placed(depths, within)

    def of(distance: Any) -> jax.Array:
        return jnp.maximum(jnp.asarray(decay, jnp.float32) ** distance, min_scale)

    def factors_fn(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[Factors, optax.EmptyState]:
        del params, extra_args
        distances = [(last - depth if protect == "early" else depth) / max(last, 1) for depth, last in places(updates)]
        return every_leaf(updates, distances, of=of), state

    numbers = {"decay": decay, "protect": protect, "min_scale": min_scale}
    return multiplier(_first(places), factors_fn, Rule("scale_by_depth", numbers))


def scale_by_depth_profile(
    profile: Callable[[float], Any], depths: PyTree, *, within: Labels | LabelFn | None = None
) -> Multiplier:
    """Multiply the update of every leaf by any function of its relative depth.

    With depths ``d = 0 .. D-1`` the factor is ``profile(d / (D-1))``, and ``profile(1)`` when ``D = 1``.
    ``lambda x: 0.1 + 0.9 * x`` is the profile of the original's layer-age-aware scheduler.

    Args:
      profile: relative depth (a float: 0 at the input, 1 at the output) -> factor >= 0. Called once for each depth.
      depths: tree of ints with the structure of params, a prefix, or a function of params: as in ``scale_by_depth``.
      within: labels within which depth is counted: as in ``scale_by_depth``.

    Returns:
      A stateless transformation.

    Raises:
      ValueError: for a profile that cannot be called or is negative at 0, 1/2 or 1, and for a negative depth.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)}
      >>> tx = oxs.scale_by_depth_profile(lambda x: 0.1 + 0.9 * x, {"a": 0, "b": 1, "c": 2})
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> [round(float(u[0]), 2) for u in updates.values()]
      [0.1, 0.55, 1.0]

    References:
      Howard & Ruder, Universal language model fine-tuning for text classification, 2018 (discriminative rates).
    """
    if not callable(profile):
        raise ValueError(f"profile={profile!r} must be a function of relative depth, such as lambda x: 0.1 + 0.9 * x.")
    for x in (0.0, 0.5, 1.0):
        check_number(f"profile({x})", profile(x))
    places = _placed(depths, within)

    def factors_fn(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[Factors, optax.EmptyState]:
        del params, extra_args
        relative = [depth / last if last else 1.0 for depth, last in places(updates)]
        values = {x: profile(x) for x in dict.fromkeys(relative)}
        return every_leaf(updates, [values[x] for x in relative]), state

    rule = Rule("scale_by_depth_profile", {"profile": profile})
    return multiplier(_first(places), factors_fn, rule)


def scale_by_depth_bands(
    early: float | Schedule, middle: float | Schedule, late: float | Schedule, depths: PyTree
) -> Multiplier:
    """Multiply the update of every leaf by the scale of its third of the network.

    With depths ``d = 0 .. D-1``: ``early`` where ``3 d < D-1``, ``late`` where ``3 d > 2 (D-1)``, else ``middle``. So
    one layer alone is in the middle, of two the first is early and the second late, and from three on there are all
    bands. The original compares ``d < D // 3`` and ``d > 2 D // 3``, by which three layers have no late one.

    Args:
      early, middle, late: factor >= 0, or a schedule of the leaf's own count of updates, 0 at its first.
      depths: tree of ints with the structure of params, a prefix, or a function of params: as in ``scale_by_depth``.

    Returns:
      A transformation without state, or, where a scale is a schedule, with one int32 scalar a leaf.

    Raises:
      ValueError: for a negative scale or depth.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)}
      >>> tx = oxs.scale_by_depth_bands(2.0, 1.0, 0.5, {"a": 0, "b": 1, "c": 2})
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> [float(u[0]) for u in updates.values()]
      [2.0, 1.0, 0.5]
    """
    bands = {"early": early, "middle": middle, "late": late}
    for name, scale in bands.items():
        if not callable(scale):
            check_number(name, scale)
    scheduled = any(callable(scale) for scale in bands.values())
    places = _placed(depths, None)

    def init_fn(params: optax.Params) -> AgeClock | optax.EmptyState:
        places(params)  # as in _first
        return first_clock(params) if scheduled else optax.EmptyState()

    def factors_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[Factors, Any]:
        del params, extra_args
        mine = [third(*place) for place in places(updates)]
        groups = []
        for band, scale in enumerate(bands.values()):
            leaves = tuple(index for index, of in enumerate(mine) if of == band)
            if callable(scale):
                since = jax.tree.leaves(state.since)
                groups.append(LeafGroup(leaves, ([since[index] for index in leaves],), aged(scale, state.count)))
            else:
                groups.append(LeafGroup(leaves, ([scale] * len(leaves),)))
        after = state._replace(count=optax.safe_increment(state.count)) if scheduled else state
        return Factors(tuple(groups)), after

    return multiplier(init_fn, factors_fn, Rule("scale_by_depth_bands", bands, "4 B a leaf" if scheduled else ""))
