"""Freezing as a matter of the program: a few plans, one executable each, for a frontier that moves rarely."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from optax_structure._tree import Params, PyTree, is_function, leaves_by_path, map_with_path
from optax_structure.transforms._extra import check_number
from optax_structure.transforms.depth import checked_depths
from optax_structure.transforms.freezing.gradients import states_of
from optax_structure.transforms.freezing.phases import DepthScales, FreezePhase, factors_by_phase


@dataclasses.dataclass(frozen=True)
class FreezePlan:
    """Which leaves stand still in one program. Hashable: pass it to ``jax.jit`` as a static argument.

    Taken with ``stop_gradient`` the frozen leaves have no backward pass at all, and with ``observed`` an optimizer in
    ``skip_unobserved`` or ``freeze_on_small_gradients`` has no work on them; the state keeps its layout, so that one
    plan's program goes on from another's state::

        @functools.partial(jax.jit, static_argnames="plan")
        def step(params, state, batch, plan):
            loss, grads = jax.value_and_grad(lambda p: loss_fn(plan.stop_gradient(p), batch))(params)
            updates, state = tx.update(grads, state, params, value=loss, observed=plan.observed(params))
            return optax.apply_updates(params, updates), state, loss

    Attributes:
      paths: of the frozen leaves (``"hidden_1/kernel"``).

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> plan = oxs.FreezePlan(frozenset({"body/kernel"}))
      >>> plan.observed({"body": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}})
      {'body': {'kernel': False}, 'head': {'kernel': True}}
    """

    paths: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if isinstance(self.paths, str):
            raise ValueError(f"paths={self.paths!r} must be a set of paths: frozenset({{{self.paths!r}}}).")
        object.__setattr__(self, "paths", frozenset(self.paths))

    def frozen(self, params: Params) -> PyTree:
        """Tree of Python bools with the structure of params: what ``gates`` takes as well.

        Raises:
          ValueError: for a path that is none of params, and for a plan in which nothing learns.
        """
        leaves = leaves_by_path(params)
        if unknown := sorted(self.paths - leaves.keys()):
            raise ValueError(f"paths={unknown} are no leaves of params; these are {list(leaves)}.")
        if leaves and len(self.paths) == len(leaves):
            raise ValueError("this plan freezes everything: leave out the paths of what shall learn.")
        return map_with_path(lambda path, _: path in self.paths, params)

    def observed(self, params: Params) -> PyTree:
        """Tree of Python bools: whose gradients there are."""
        return jax.tree.map(lambda flag: not flag, self.frozen(params))

    def stop_gradient(self, params: Params) -> Params:
        """The parameters, of which the frozen ones are constants to differentiation."""
        return jax.tree.map(
            lambda flag, leaf: jax.lax.stop_gradient(leaf) if flag else leaf, self.frozen(params), params
        )


def freeze_plans(depths: PyTree, shares: Sequence[float] = (0.0, 0.25, 0.5, 0.75)) -> tuple[FreezePlan, ...]:
    """Plans that freeze a prefix of the layers: nothing, a quarter, a half, three quarters.

    Only a prefix, all that stands between the input and the first layer that learns, saves the gradient of activations
    too; and few plans are few compilations.

    Args:
      depths: tree of ints with the structure of params, in forward order (``layer_depths``).
      shares: of the layers, in [0, 1), rising, the first 0. ``share * layers`` is rounded down; equal plans are one.

    Returns:
      The plans, the one that freezes least first.

    Raises:
      ValueError: for depths that are no tree of ints, and for shares out of range or order.

    Example:
      >>> import optax_structure as oxs
      >>> [sorted(plan.paths) for plan in oxs.freeze_plans({"a": 0, "b": 1, "c": 2, "d": 3}, (0, 0.5, 0.9))]
      [[], ['a', 'b'], ['a', 'b', 'c']]
    """
    if is_function(depths):
        raise ValueError("depths must be a tree here: call the function on params.")
    for place, share in enumerate(shares):
        check_number(f"shares[{place}]", share, high=1.0)
        if share >= 1:
            raise ValueError(f"shares[{place}]={share!r} freezes everything: it must be below 1.")
    if not len(shares) or shares[0] != 0 or any(a >= b for a, b in itertools.pairwise(shares)):
        raise ValueError(f"shares={tuple(shares)!r} must rise from 0.")
    places = leaves_by_path(checked_depths(depths))
    order = sorted(set(places.values()))
    counts = [int(share * len(order) + 1e-9) for share in shares]
    return tuple(dict.fromkeys(_prefix(places, order[:count]) for count in counts))


def _prefix(places: dict[str, int], depths: Sequence[int]) -> FreezePlan:
    return FreezePlan(frozenset(path for path, depth in places.items() if depth in depths))


Timetable = tuple[tuple[int, FreezePlan], ...]
"""Pairs (update from which on, plan), in order, the first at 0."""


def progressive_plans(phases: Sequence[FreezePhase | tuple[int, DepthScales]], depths: PyTree) -> Timetable:
    """The plans of ``progressive_freezing``: in every phase, what its factors of 0 freeze.

    Args:
      phases, depths: as for ``progressive_freezing``; depths a tree.

    Returns:
      Pairs (start, plan) for ``plan_at``.

    Raises:
      ValueError: as ``progressive_freezing``; for a phase in which nothing learns.

    Example:
      >>> import optax_structure as oxs
      >>> table = oxs.progressive_plans([(0, 1.0), (100, oxs.frozen_below(-1))], {"a": 0, "b": 1})
      >>> [(start, sorted(plan.paths)) for start, plan in table]
      [(0, []), (100, ['a'])]
    """
    rows = factors_by_phase(phases, depths)
    places = leaves_by_path(checked_depths(depths))
    table = []
    for start, row in rows:
        still = [depth for depth in set(places.values()) if row[depth] == 0]
        if len(still) == len(set(places.values())):
            raise ValueError(
                f"the phase that starts at {start} freezes everything: a plan needs something that learns."
            )
        table.append((start, _prefix(places, still)))
    return tuple(table)


def plan_at(timetable: Timetable, update: int) -> FreezePlan:
    """The plan in force at an update.

    Args:
      timetable: what ``progressive_plans`` or ``freezeout_plans`` returns.
      update: counted from 0.

    Returns:
      The last plan that has begun.

    Raises:
      ValueError: for an update below 0.

    Example:
      >>> import optax_structure as oxs
      >>> table = ((0, oxs.FreezePlan()), (100, oxs.FreezePlan(frozenset({"a"}))))
      >>> [sorted(oxs.plan_at(table, update).paths) for update in (0, 99, 100)]
      [[], [], ['a']]
    """
    check_number("update", update)
    return [plan for start, plan in timetable if start <= update][-1]


def plan_step(
    step: Callable[..., Any],
    plans: Sequence[FreezePlan],
    *,
    donate_argnums: Sequence[int] = (),
    replan_every: int = 100,
    look_every: int = 1,
) -> PlanStep:
    """A step that runs the program of the plan which fits the gates of its optimizer state.

    ``step(*args, plan=plan)``, with the optimizer state (of ``freeze_on_small_gradients``) somewhere in ``args``. The
    host reads the gates between two calls and takes the plan that freezes most of what is frozen and nothing else:

    - a leaf of the plan that has thawed, or a probe that is due, is answered at once (the probe runs the first plan);
    - more is frozen at every ``replan_every``-th call only, when two such proposals in a row agree.

    Reading waits for the call before. Where a step takes less than a millisecond look less often: what thaws then waits
    up to ``look_every`` calls.

    Args:
      step: function of any arguments and ``plan=``.
      plans: the first must freeze nothing (``freeze_plans``).
      donate_argnums: as for ``jax.jit``.
      replan_every: calls between two proposals, >= 1.
      look_every: calls between two readings, >= 1.

    Returns:
      ``PlanStep``: call it like ``step``, without ``plan=``, or with one to choose yourself. ``compile(*args)``
      compiles all plans ahead; ``plan`` is the last one used.

    Raises:
      ValueError: for plans of which the first freezes something; in a call without ``plan=``, for arguments without a
        state that freezes.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.freeze_on_small_gradients(optax.sgd(0.1), min_steps=0, patience=1)
      >>> def step(params, state, *, plan):
      ...     grads = jax.grad(lambda p: p["b"] + 0 * p["a"])(plan.stop_gradient(params))
      ...     updates, state = tx.update(grads, state, params, observed=plan.observed(params))
      ...     return optax.apply_updates(params, updates), state
      >>> run = oxs.plan_step(step, oxs.freeze_plans({"a": 0, "b": 1}, (0, 0.5)), replan_every=1)
      >>> params = {"a": jnp.ones(()), "b": jnp.ones(())}
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     params, state = run(params, state)
      ...     print(sorted(run.plan.paths))
      []
      []
      ['a']
    """
    return PlanStep(step, plans, donate_argnums, replan_every, look_every)


class PlanStep:
    """What ``plan_step`` returns: one executable a plan, and the choice among them."""

    def __init__(
        self,
        step: Callable[..., Any],
        plans: Sequence[FreezePlan],
        donate_argnums: Sequence[int] = (),
        replan_every: int = 100,
        look_every: int = 1,
    ):
        check_number("replan_every", replan_every, low=1)
        check_number("look_every", look_every, low=1)
        if not plans or plans[0].paths:
            raise ValueError(f"plans={tuple(plans)!r} must begin with one that freezes nothing: FreezePlan().")
        self.plans = tuple(plans)
        self.plan = self.plans[0]
        self._step = jax.jit(step, static_argnames="plan", donate_argnums=tuple(donate_argnums))
        self._compiled: dict[FreezePlan, Callable[..., Any]] = {}
        self._every = replan_every, look_every
        self._calls = 0
        self._settled = self._proposed = self.plans[0]

    def compile(self, *args: Any) -> None:
        """Compile the program of every plan for arguments like these, which are neither run nor donated."""
        for plan in self.plans:
            self._compiled[plan] = self._step.lower(*args, plan=plan).compile()

    def __call__(self, *args: Any, plan: FreezePlan | None = None) -> Any:
        """One step under ``plan``, or under the one that fits."""
        self.plan = self._fitting(args) if plan is None else plan
        if self.plan in self._compiled:
            with contextlib.suppress(TypeError):  # other shapes than those it was compiled for, such as a last batch's
                return self._compiled[self.plan](*args)
        return self._step(*args, plan=self.plan)

    def _fitting(self, args: tuple[Any, ...]) -> FreezePlan:
        replan_every, look_every = self._every
        calls, self._calls = self._calls, self._calls + 1
        if calls % look_every and calls % replan_every:
            return self._settled
        states = states_of(args)
        if not states:
            raise ValueError("no argument holds a state of freeze_on_small_gradients: pass plan= yourself.")
        trees, probes = jax.device_get(
            ([leaves_by_path(of.frozen) for of in states], [of.watch.probe for of in states])
        )
        live = {path for gates in trees for path, gate in gates.items() if not np.all(gate)}
        still = {path for gates in trees for path in gates} - live
        if unknown := sorted(frozenset().union(*(plan.paths for plan in self.plans)) - still - live):
            raise ValueError(f"plans name {unknown}, which are no leaves of the state's: {sorted(still | live)}.")
        fitting = max((p for p in self.plans if p.paths <= still), key=lambda p: len(p.paths))
        if not self._settled.paths <= still:
            self._settled = self._proposed = fitting
        elif calls % replan_every == 0:
            if fitting == self._proposed:
                self._settled = fitting
            self._proposed = fitting
        return self.plans[0] if np.any(probes) else self._settled
