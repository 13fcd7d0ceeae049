"""An optimizer's update in two steps: first its new state, then the update from that state.

Where the state of some leaves is to stay as it was, what is chosen between the old and the new has to be what the
update is computed from. Otherwise XLA keeps old and new state side by side, and copies of both: four times the cost of
Adam itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core

from optax_structure.transforms._multiplier import is_recording


class TwoSteps(NamedTuple):
    """``update`` taken apart.

    Attributes:
      new_state: ``() -> state``.
      updates: ``state -> updates``: from the new state, or from one in which parts were put back.
    """

    new_state: Callable[[], Any]
    updates: Callable[[Any], Any]


def in_two_steps(update: Callable[..., tuple[Any, Any]], *args: Any) -> TwoSteps:
    """``update(*args) -> (updates, state)`` as two functions; compilers merge what both of them compute."""
    if is_recording():  # `rates` hears of factors while the update runs, not while it is traced
        out, after = update(*args)
        return TwoSteps(lambda: after, lambda state: out)
    closed, (updates_shape, state_shape) = jax.make_jaxpr(update, return_shape=True)(*args)
    split = len(jax.tree.leaves(updates_shape))
    of_updates, of_state = closed.jaxpr.outvars[:split], closed.jaxpr.outvars[split:]
    values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(closed.jaxpr.invars, jax.tree.leaves(args), strict=True))

    def new_state() -> Any:
        return jax.tree.unflatten(jax.tree.structure(state_shape), _evaluated(closed, of_state, values))

    def updates(state: Any) -> Any:
        given = {
            variable: value
            for variable, value in zip(of_state, jax.tree.leaves(state), strict=True)
            if not isinstance(variable, core.Literal)
        }
        return jax.tree.unflatten(jax.tree.structure(updates_shape), _evaluated(closed, of_updates, values | given))

    return TwoSteps(new_state, updates)


def _evaluated(closed: core.ClosedJaxpr, wanted: list[Any], values: dict[Any, Any]) -> list[Any]:
    """The values of some variables of a program, given those of others: only what they hang on is computed."""
    needed = {variable for variable in wanted if not isinstance(variable, core.Literal)} - values.keys()
    kept = []
    for equation in reversed(closed.jaxpr.eqns):
        if not needed.isdisjoint(equation.outvars):
            kept.append(equation)
            needed |= {v for v in equation.invars if not isinstance(v, core.Literal)} - values.keys()
    part = closed.jaxpr.replace(
        constvars=[],
        invars=list(values),
        outvars=wanted,
        eqns=kept[::-1],
        debug_info=closed.jaxpr.debug_info._replace(arg_names=None, result_paths=None),
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, []))(*values.values())
