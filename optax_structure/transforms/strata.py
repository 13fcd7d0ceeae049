"""Sedimentary learning: what is old lies deep and hardly moves, what is new is active."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import PyTree, align, is_traced
from optax_structure.labels import LabelFn, Labels, relabel
from optax_structure.state.markers import AgeClock, first_clock
from optax_structure.transforms._extra import Rule, check_number
from optax_structure.transforms._multiplier import Factors, LeafGroup, Multiplier, aged, multiplier


def strata(
    labels: Labels | LabelFn | None = None,
    *,
    geological: float = 0.01,
    sediment: float = 0.1,
    active: float = 1.0,
    patches: float = 0.5,
    geological_age: float = 100,
    sediment_age: float = 20,
) -> Multiplier:
    """Multiply the update of every leaf by the rate of the stratum in which it lies.

    A leaf labelled ``geological``, ``sediment``, ``active`` or ``patch`` lies where its label says. Any other leaf, and
    every leaf without labels, sinks with its own age in updates, 0 at its first: older than ``geological_age`` it is
    geological, older than ``sediment_age`` sediment, else active. Labels are moved down a stratum by ``settle``.

    In the original ages are epochs, registered by hand and never advanced, and its rates are absolute: 1e-5, 1e-4,
    1e-3 and 5e-4 for patches, which are the defaults here at a base rate of 1e-3. Pass ``100 * steps_per_epoch``.

    Args:
      labels: tree of labels with the structure of params, a prefix of it, or a function of params; None: all by age.
      geological, sediment, active, patches: factor of each stratum, >= 0.
      geological_age, sediment_age: ages in updates, ``0 <= sediment_age <= geological_age``.

    Returns:
      A transformation whose state holds one int32 scalar a leaf. ``transfer_state`` carries ages over and starts new
      leaves at 0; relabelling alone does not touch them.

    Raises:
      ValueError: for negative numbers, and ages out of order.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"old": jnp.ones(1), "any": jnp.ones(1), "patch_0": jnp.ones(1)}
      >>> tx = oxs.strata({"old": "geological", "any": "scaffold", "patch_0": "patch"}, sediment_age=0)
      >>> state, seen = tx.init(params), []
      >>> for _ in range(2):
      ...     updates, state = tx.update(params, state)
      ...     seen.append({name: round(float(update[0]), 2) for name, update in updates.items()})
      >>> seen
      [{'any': 1.0, 'old': 0.01, 'patch_0': 0.5}, {'any': 0.1, 'old': 0.01, 'patch_0': 0.5}]
    """
    by_label = {"geological": geological, "sediment": sediment, "active": active, "patch": patches}
    for name, rate in (("geological", geological), ("sediment", sediment), ("active", active), ("patches", patches)):
        check_number(name, rate)
    check_number("sediment_age", sediment_age)
    check_number("geological_age", geological_age, low=0.0 if is_traced(sediment_age) else sediment_age)

    def named(tree: PyTree) -> list[str]:
        return jax.tree.leaves(align("" if labels is None else labels, tree, "labels"))

    def by_age(age: jax.Array) -> jax.Array:
        return jnp.where(age > geological_age, geological, jnp.where(age > sediment_age, sediment, active))

    def init_fn(params: optax.Params) -> AgeClock:
        named(params)
        return first_clock(params)

    def factors_fn(
        updates: optax.Updates, state: AgeClock, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[Factors, AgeClock]:
        del params, extra_args
        since, names = jax.tree.leaves(state.since), named(updates)
        fixed = tuple(place for place, name in enumerate(names) if name in by_label)
        others = tuple(place for place, name in enumerate(names) if name not in by_label)
        groups = (
            LeafGroup(fixed, ([by_label[names[place]] for place in fixed],)),
            LeafGroup(others, ([since[place] for place in others],), aged(by_age, state.count)),
        )
        return Factors(groups), state._replace(count=optax.safe_increment(state.count))

    numbers = by_label | {"geological_age": geological_age, "sediment_age": sediment_age}
    return multiplier(init_fn, factors_fn, Rule("strata", numbers, "4 B a leaf"))


def settle(labels: Labels) -> Labels:
    """Labels one stratum further down: ``active`` becomes ``sediment``, and ``sediment`` becomes ``geological``.

    Build ``strata`` on the new labels and carry the state over with ``transfer_state``: labels are static, so this
    compiles once more, as every relabelling does.

    Args:
      labels: tree of labels. Labels that are no stratum, ``patch`` among them, stay.

    Returns:
      The tree of new labels.

    Example:
      >>> import optax_structure as oxs
      >>> oxs.settle({"a": "active", "b": "sediment", "c": "geological", "d": "patch"})
      {'a': 'sediment', 'b': 'geological', 'c': 'geological', 'd': 'patch'}
    """
    return relabel(labels, {"active": "sediment", "sediment": "geological"})
