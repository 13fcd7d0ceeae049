"""Freezing in hands that did not read all of it: what is an error, and what is forgiven."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structure as oxs

PARAMS = {"a": jnp.ones(3), "b": jnp.ones(2)}
DEPTHS = {"a": 0, "b": 1}


def freezing(inner: Any = None, **numbers: Any) -> Any:
    given = {"decay": 0.0, "min_steps": 0, "patience": 1} | numbers
    return oxs.freeze_on_small_gradients(inner or optax.sgd(0.1), 1e-2, **given)


@pytest.mark.parametrize("tx", [freezing(), oxs.skip_unobserved(optax.sgd(0.1)), oxs.clip_by_global_norm(1.0)])
def test_levels_are_no_flags(tx: Any) -> None:
    # A level of 0 means open, and as a flag would mean that the gradient was not computed.
    levels = oxs.gates(freezing().init(PARAMS), DEPTHS)
    with pytest.raises(ValueError, match=r"observed= holds .* pass oxs\.observed\(gates\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, observed=levels)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, observed=oxs.observed(levels))
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, observed=None)


def test_gates_of_what_does_not_freeze() -> None:
    for nothing in (optax.adam(0.1).init(PARAMS), PARAMS):
        with pytest.raises(ValueError, match="nothing freezes in this state, and it is no tree of bools"):
            oxs.gates(nothing)
    with pytest.raises(ValueError, match="gate=3 must be 0"):
        oxs.gated(lambda p, x: x)(3, {}, jnp.ones(2))


def course(tx: Any, sizes: list[float], looks: Any) -> list[bool]:
    """Whether ``a`` is frozen after every step; its gradient is left out where the gates say so."""

    def step(carry: Any, size: jax.Array) -> Any:
        params, state = carry
        level = oxs.gates(state, DEPTHS)
        grads = {"a": jnp.where(level["a"] == 0, size, 0.0) * jnp.ones(3), "b": jnp.ones(2)}
        updates, state = tx.update(grads, state, params, **looks(level))
        return (optax.apply_updates(params, updates), state), oxs.frozen(state)["a"]

    return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), jnp.asarray(sizes))[1].tolist()


def test_who_forgets_to_say_what_was_observed_thaws_all_the_same() -> None:
    sizes = [1e-3] * 4 + [1.0] * 20
    said = course(freezing(probe_every=5), sizes, lambda level: {"observed": oxs.observed(level)})
    forgot = course(freezing(probe_every=5), sizes, lambda level: {})
    assert forgot == said and said[3] and not said[-1]


def test_inside_sparse_only_living_connections_count() -> None:
    mask = jnp.zeros((10, 10), bool).at[0, :4].set(True)
    params = {"w": jnp.ones((10, 10)) * mask}
    tx = oxs.sparse(freezing(), {"w": mask})
    _, state = tx.update({"w": jnp.full((10, 10), 0.5)}, tx.init(params), params)
    assert float(state.inner_state.readings.mean["w"]) == 0.5


def loop(tx: Any, plans: Any, sizes: list[float], **numbers: Any) -> tuple[list[int], list[bool]]:
    """Leaves that each call's plan froze, and whether ``a`` was frozen after it; the loss is the gradient's size."""

    def step(state: Any, size: Any, *, plan: oxs.FreezePlan) -> Any:
        def loss(params: Any) -> jax.Array:
            held = plan.stop_gradient(params)
            return size * jnp.sum(held["a"]) + jnp.sum(held["b"])

        grads = jax.grad(loss)(PARAMS)
        return tx.update(grads, state, PARAMS, value=size, observed=plan.observed(PARAMS))[1]

    run = oxs.plan_step(step, plans, **numbers)
    state, used, gates = tx.init(PARAMS), [], []
    for size in sizes:
        state = run(state, jnp.float32(size))
        used.append(len(run.plan.paths))
        gates.append(bool(oxs.frozen(state)["a"]))
    return used, gates


@pytest.mark.slow
def test_an_alarm_waits_until_somebody_looks() -> None:
    # Loss and gradient jump with call 61; the gates are looked at before every fourth call.
    sizes = [1e-3 + 1e-5 * (call % 2) for call in range(61)] + [5.0] * 11
    plans = oxs.freeze_plans(DEPTHS, (0, 0.5))
    used, gates = loop(freezing(probe_every=1000), plans, sizes, replan_every=4, look_every=4)
    assert used[60] == 1 and gates[60]
    assert used[64] == 0 and not any(gates[64:])


def test_a_batch_of_another_size_is_no_error_after_compiling_ahead() -> None:
    tx, plans = freezing(), oxs.freeze_plans(DEPTHS, (0, 0.5))

    def step(x: jax.Array, *, plan: oxs.FreezePlan) -> jax.Array:
        return x.sum() + len(plan.paths)

    run = oxs.plan_step(step, plans)
    run.compile(jnp.ones(4))
    assert [float(run(jnp.ones(n), plan=plan)) for n in (4, 3) for plan in plans] == [4.0, 5.0, 3.0, 4.0]
    with pytest.raises(ValueError, match=r"plans name \['c'\], which are no leaves of the state's: \['a', 'b'\]"):
        oxs.plan_step(step, [oxs.FreezePlan(), oxs.FreezePlan(frozenset({"c"}))])(tx.init(PARAMS))
    with pytest.raises(ValueError, match="update=-1"):
        oxs.plan_at(((0, plans[0]),), -1)


def test_a_leaf_that_learns_in_one_of_two_states_is_in_no_plan() -> None:
    tx = freezing()
    run = oxs.plan_step(lambda states, plan: jnp.ones(()), oxs.freeze_plans(DEPTHS, (0, 0.5)), replan_every=1)
    live = tx.init(PARAMS)
    held = live._replace(frozen={"a": jnp.asarray(True), "b": jnp.asarray(False)})
    used = []
    for states in ([held, live],) * 3 + ([held, held],) * 3:
        run(states)
        used.append(len(run.plan.paths))
    assert used == [0, 0, 0, 0, 1, 1]


def test_a_gradient_that_is_never_finite_is_not_probed_for_ever() -> None:
    tx = freezing(probe_every=10)

    def step(state: Any, size: jax.Array) -> Any:
        level = oxs.gates(state, DEPTHS)
        grads = {"a": jnp.where(level["a"] == 0, size, 0.0) * jnp.ones(3), "b": jnp.ones(2)}
        _, after = tx.update(grads, state, PARAMS, observed=oxs.observed(level))
        return after, oxs.frozen(state)["a"] & (level["a"] == 0)

    _, probes = jax.lax.scan(step, tx.init(PARAMS), jnp.asarray([1e-3] * 3 + [np.nan] * 60))
    assert int(probes.sum()) == 6
