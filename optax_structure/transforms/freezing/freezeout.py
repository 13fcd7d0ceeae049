"""FreezeOut: every layer has its own cosine schedule, which ends the earlier the nearer the layer is to the input."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import PyTree, align, is_function, is_traced, leaves_by_path
from optax_structure.state.markers import RunClock
from optax_structure.transforms._extra import Rule, check_number
from optax_structure.transforms._multiplier import Factors, Multiplier, every_leaf, multiplier
from optax_structure.transforms.depth import checked_depths
from optax_structure.transforms.freezing.plans import FreezePlan, Timetable


def _checked(total_steps: Any, first: Any, power: Any) -> None:
    check_number("total_steps", total_steps, low=1)
    check_number("first", first, high=1.0)
    check_number("power", power, low=1)
    if not is_traced(first) and float(first) == 0:
        raise ValueError(f"first={first!r} must be above 0: at 0 the first layer never learns.")


def _end(depth: Any, last: int, first: Any, power: Any) -> Any:
    """When a layer ends, as a share of the training: ``first`` at the input, 1 at the last layer."""
    root = first ** (1 / power)
    return (root + (1 - root) * depth / max(last, 1)) ** power if last else 1.0


def scale_by_freezeout(
    total_steps: int, depths: PyTree, *, first: float = 0.5, power: float = 3.0, same_distance: bool = True
) -> Multiplier:
    """Multiply every update by a cosine that falls to 0 at a time of the leaf's own, the earlier the less deep it is.

    With ``t`` the share of training that is done and ``t_d`` when the layer of depth ``d`` of ``0 .. D`` ends,
    ``factor = (1 + cos(pi t / t_d)) / 2 / t_d`` until then and exactly 0 afterwards; ``t_d = (r + (1 - r) d / D) **
    power`` with ``r = first ** (1 / power)``, so that the first layer ends at ``first`` and the last at 1.

    A factor of 0 alone saves nothing: train with the plans of ``freezeout_plans`` as well.

    Args:
      total_steps: updates of the whole training, >= 1.
      depths: tree of ints with the structure of params (``layer_depths``), a prefix, or a function of params.
      first: share of training after which the first layer ends, in (0, 1].
      power: 1 spaces the ends evenly, 3 (the paper's cubic) gives late layers more time.
      same_distance: whether layers that end early have higher rates (the ``1 / t_d``), so that all travel as far.

    Returns:
      A transformation whose state is one int32 scalar.

    Raises:
      ValueError: for numbers out of range and for depths that are no ints >= 0.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> tx = oxs.scale_by_freezeout(4, {"a": 0, "b": 1}, first=0.5)
      >>> params = {"a": jnp.ones(()), "b": jnp.ones(())}
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(params, state)
      ...     print([round(float(update), 3) for update in updates.values()])
      [2.0, 1.0]
      [1.0, 0.854]
      [0.0, 0.5]

    References:
      Brock et al., FreezeOut, 2017.
    """
    _checked(total_steps, first, power)
    whole = None if is_function(depths) else checked_depths(depths)

    def init_fn(params: optax.Params) -> RunClock:
        checked_depths(align(depths, params, "depths"))
        return RunClock(jnp.zeros((), jnp.int32))

    def factors_fn(
        updates: optax.Updates, state: RunClock, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[Factors, RunClock]:
        del params, extra_args
        here = checked_depths(align(depths, updates, "depths"))
        last = max(jax.tree.leaves(here if whole is None else whole), default=0)
        done = state.count.astype(jnp.float32) / total_steps

        def factor(depth: Any) -> Any:
            end = jnp.asarray(_end(depth, last, first, power), jnp.float32)
            falling = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(done / end, 1.0)))
            return jnp.where(done < end, falling / end if same_distance else falling, 0.0)

        return every_leaf(updates, here, of=factor), RunClock(jnp.asarray(optax.safe_increment(state.count)))

    numbers = {"total_steps": total_steps, "first": first, "power": power, "same_distance": same_distance}
    return multiplier(init_fn, factors_fn, Rule("scale_by_freezeout", numbers, "4 B"))


def freezeout_plans(total_steps: int, depths: PyTree, *, first: float = 0.5, power: float = 3.0) -> Timetable:
    """The plans of ``scale_by_freezeout``: each layer is left out of the program once its factor is 0.

    Args:
      total_steps, depths, first, power: as for ``scale_by_freezeout``; depths a tree.

    Returns:
      Pairs (update, plan) for ``plan_at``, one a layer but the last. For fewer compilations take every other one.

    Raises:
      ValueError: as ``scale_by_freezeout``.

    Example:
      >>> import optax_structure as oxs
      >>> table = oxs.freezeout_plans(100, {"a": 0, "b": 1, "c": 2}, first=0.5, power=1.0)
      >>> [(start, sorted(plan.paths)) for start, plan in table]
      [(0, []), (50, ['a']), (75, ['a', 'b'])]
    """
    _checked(total_steps, first, power)
    if is_function(depths):
        raise ValueError("depths must be a tree here: call the function on params.")
    places = leaves_by_path(checked_depths(depths))
    last = max(places.values(), default=0)
    table = {0: FreezePlan()}
    for depth in sorted(set(places.values()) - {last}):
        start = math.ceil(total_steps * _end(depth, last, first, power) - 1e-6)
        if start < total_steps:
            table[start] = FreezePlan(frozenset(path for path, at in places.items() if at <= depth))
    return tuple(table.items())
