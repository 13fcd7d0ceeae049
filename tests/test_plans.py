"""Plans of frozen layers: what they cover, what their programs leave out, and when which one is picked."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optax_structure as oxs

FOUR = {name: {"kernel": jnp.eye(3)} for name in "abcd"}
DEPTHS = {name: {"kernel": depth} for depth, name in enumerate("abcd")}


def paths(*names: str) -> frozenset[str]:
    return frozenset(f"{name}/kernel" for name in names)


def test_plans_freeze_prefixes() -> None:
    plans = oxs.freeze_plans(DEPTHS)
    assert [plan.paths for plan in plans] == [frozenset(), paths("a"), paths("a", "b"), paths("a", "b", "c")]
    assert oxs.freeze_plans(DEPTHS, (0.0, 0.1, 0.2, 0.5)) == (plans[0], plans[2])  # equal plans are one


@given(st.integers(2, 40), st.lists(st.floats(0.01, 0.99), max_size=6, unique=True))
def test_a_plan_always_leaves_a_layer(layers: int, shares: list[float]) -> None:
    depths = {f"layer_{i}": i for i in range(layers)}
    plans = oxs.freeze_plans(depths, (0.0, *sorted(shares)))
    assert not plans[0].paths and len(set(plans)) == len(plans)
    for one, other in itertools.pairwise(plans):
        assert one.paths < other.paths
    assert all({depths[p] for p in plan.paths} == set(range(len(plan.paths))) for plan in plans)
    assert len(plans[-1].paths) < layers


def test_what_a_plan_says_of_params() -> None:
    plan = oxs.FreezePlan(paths("a", "c"))
    assert plan.frozen(FOUR) == {name: {"kernel": name in "ac"} for name in "abcd"}
    assert plan.observed(FOUR) == {name: {"kernel": name not in "ac"} for name in "abcd"}
    assert hash(plan) == hash(oxs.FreezePlan(paths("c", "a"))) and plan == oxs.FreezePlan(paths("c", "a"))
    assert oxs.gates(plan.frozen(FOUR), DEPTHS) == {
        "a": {"kernel": 2},
        "b": {"kernel": 0},
        "c": {"kernel": 1},
        "d": {"kernel": 0},
    }


def test_bad_plans_are_named() -> None:
    with pytest.raises(ValueError, match="this plan freezes everything"):
        oxs.FreezePlan(paths(*"abcd")).observed(FOUR)
    with pytest.raises(ValueError, match=r"paths=\['e/kernel'\] are no leaves of params"):
        oxs.FreezePlan(paths("e")).frozen(FOUR)
    with pytest.raises(ValueError, match="paths='a/kernel' must be a set"):
        oxs.FreezePlan("a/kernel")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shares\[1\]=1\.0 freezes everything"):
        oxs.freeze_plans(DEPTHS, (0.0, 1.0))
    with pytest.raises(ValueError, match=r"shares=\(0\.5,\) must rise from 0"):
        oxs.freeze_plans(DEPTHS, (0.5,))
    with pytest.raises(ValueError, match=r"shares=\(0\.0, 0\.5, 0\.25\) must rise"):
        oxs.freeze_plans(DEPTHS, (0.0, 0.5, 0.25))
    with pytest.raises(ValueError, match="depths must be a tree"):
        oxs.freeze_plans(oxs.layer_depths)
    with pytest.raises(ValueError, match="the phase that starts at 5 freezes everything"):
        oxs.progressive_plans([(0, 1.0), (5, 0.0)], DEPTHS)
    with pytest.raises(ValueError, match="must begin with one that freezes nothing"):
        oxs.plan_step(lambda plan: None, [oxs.FreezePlan(paths("a"))])
    with pytest.raises(ValueError, match="replan_every=0"):
        oxs.plan_step(lambda plan: None, [oxs.FreezePlan()], replan_every=0)
    with pytest.raises(ValueError, match="no argument holds a state of freeze_on_small_gradients"):
        oxs.plan_step(lambda x, plan: x, [oxs.FreezePlan()])(jnp.ones(2))


def test_plans_of_phases_are_where_the_factors_are_0() -> None:
    phases = [(0, 1.0), (10, (0.0, 0.1)), (30, oxs.frozen_below(-1, 0.1))]
    table = oxs.progressive_plans(phases, DEPTHS)
    assert table == ((0, oxs.FreezePlan()), (10, oxs.FreezePlan(paths("a"))), (30, oxs.FreezePlan(paths(*"abc"))))
    tx = oxs.progressive_freezing(phases, DEPTHS)
    state = tx.init(FOUR)
    for update in range(32):
        out, state = tx.update(FOUR, state)
        still = {f"{name}/kernel" for name, leaf in out.items() if not leaf["kernel"].any()}
        assert still == oxs.plan_at(table, update).paths, update


def test_freezeout_by_hand() -> None:
    # Ends at ((1/2)^(1/3) + (1 - (1/2)^(1/3)) d / 3)^3 of 100 updates, and a rate of (1 + cos(pi t / end)) / 2 / end.
    root = 0.5 ** (1 / 3)
    ends = [(root + (1 - root) * depth / 3) ** 3 for depth in range(4)]
    assert ends[0] == pytest.approx(0.5) and ends[3] == 1.0
    tx = oxs.scale_by_freezeout(100, DEPTHS)
    _, factors = jax.jit(
        lambda: jax.lax.scan(
            lambda state, _: tx.update(FOUR, state)[::-1],
            tx.init(FOUR),
            length=101,
        )
    )()
    for depth, name in enumerate("abcd"):
        for update in (0, 7, 49, 50, 65, 66, 99, 100):
            share = update / 100 / ends[depth]
            want = (1 + math.cos(math.pi * share)) / 2 / ends[depth] if share < 1 else 0.0
            assert float(factors[name]["kernel"][update, 0, 0]) == pytest.approx(want, abs=2e-6), (name, update)
    table = oxs.freezeout_plans(100, DEPTHS)
    assert [start for start, _ in table] == [0, 50, math.ceil(100 * ends[1]), math.ceil(100 * ends[2])]
    for update in range(100):
        still = {f"{name}/kernel" for name in "abcd" if not np.any(factors[name]["kernel"][update])}
        assert still == oxs.plan_at(table, update).paths, update


def test_one_layer_has_the_whole_training() -> None:
    assert oxs.freezeout_plans(10, {"a": 0}) == ((0, oxs.FreezePlan()),)


def small_step(tx: Any, traces: list[Any] | None = None) -> Any:
    """Linear regression by two layers; ``scale`` times the loss is what is differentiated."""

    def step(params: Any, state: Any, scale: Any, *, plan: oxs.FreezePlan) -> Any:
        if traces is not None:
            traces.append(plan)

        def loss(params: Any) -> jax.Array:
            held = plan.stop_gradient(params)
            return scale["a"] * jnp.sum(held["a"]) + scale["b"] * jnp.sum(held["b"])

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value, observed=plan.observed(params))
        return optax.apply_updates(params, updates), state

    return step


TWO = {"a": jnp.ones(3), "b": jnp.ones(3)}


def run_plans(sizes: list[float], **numbers: Any) -> tuple[list[int], list[bool], Any]:
    """How many leaves each call's plan froze, and whether ``a`` was frozen after it, for gradients of these sizes."""
    tx = oxs.freeze_on_small_gradients(
        oxs.per_leaf(optax.adam(1e-3)), 1e-2, decay=0.0, min_steps=0, patience=1, alarm=None, **numbers
    )
    run = oxs.plan_step(small_step(tx), oxs.freeze_plans({"a": 0, "b": 1}, (0, 0.5)), replan_every=2)
    params, state, plans, gates = TWO, tx.init(TWO), [], []
    for size in sizes:
        params, state = run(params, state, {"a": jnp.float32(size), "b": jnp.float32(1.0)})
        plans.append(len(run.plan.paths))
        gates.append(bool(oxs.frozen(state)["a"]))
    return plans, gates, state


def test_a_tier_needs_two_proposals_and_a_thaw_is_answered_at_once() -> None:
    # Calls 0, 2, 4 ... propose. Frozen after call 0; proposed at 2 and 4, so call 4 runs it. Six updates after the last
    # reading (call 3) a probe is due: call 10 runs the first plan, reads 1.0, and call 11 sees the thaw.
    plans, gates, state = run_plans([1e-4] * 6 + [1.0] * 8, probe_every=7)
    assert plans == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert gates == [True] * 10 + [False] * 4
    assert int(state.readings.seen["a"]) == 4 + 4


def test_compiled_ahead_no_plan_is_traced_again() -> None:
    traces: list[Any] = []
    tx = oxs.freeze_on_small_gradients(optax.sgd(0.1), 1e-2, decay=0.0, min_steps=0, patience=1)
    plans = oxs.freeze_plans({"a": 0, "b": 1}, (0, 0.5))
    run = oxs.plan_step(small_step(tx, traces), plans, donate_argnums=(0, 1), replan_every=1)
    params = jax.tree.map(jnp.copy, TWO)
    state, scale = tx.init(params), {"a": jnp.float32(0.0), "b": jnp.float32(1.0)}
    run.compile(params, state, scale)
    assert traces == list(plans)
    for _ in range(5):
        params, state = run(params, state, scale)
    assert run.plan == plans[1] and traces == list(plans)
    np.testing.assert_allclose(params["b"], 1.0 - 5 * 0.1, rtol=1e-6)
    # A plan of one's own choice: under the first, the zero gradient of `a` is a reading again.
    waited = int(state.readings.waited["a"])
    params, state = run(params, state, scale, plan=plans[0])
    assert waited > 0 and int(state.readings.waited["a"]) == 0


def network(layers: int = 12, width: int = 64) -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(0), layers)
    params = {
        f"layer_{i:02d}": jax.random.normal(key, (width, width)) * (2 / width) ** 0.5 for i, key in enumerate(keys)
    }
    return params, oxs.layer_depths(params, list(params))


def planned_flops(frozen: int, clip: bool = False) -> float:
    params, depths = network()
    plan = oxs.FreezePlan(frozenset(name for name, depth in depths.items() if depth < frozen))
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)) if clip else oxs.per_leaf(optax.adam(1e-3))
    tx = oxs.freeze_on_small_gradients(inner)

    @functools.partial(jax.jit, static_argnames="plan")
    def step(params: Any, state: Any, x: jax.Array, plan: oxs.FreezePlan) -> Any:
        def loss(params: Any) -> jax.Array:
            y = x
            for leaf in plan.stop_gradient(params).values():
                y = jax.nn.relu(y @ leaf)
            return jnp.sum(y**2)

        updates, state = tx.update(jax.grad(loss)(params), state, params, observed=plan.observed(params))
        return optax.apply_updates(params, updates), state

    compiled = step.lower(params, jax.eval_shape(tx.init, params), jnp.ones((256, 64)), plan).compile()
    return compiled.cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("clip", [False, True], ids=["per_leaf", "clipped"])
def test_a_plan_leaves_the_backward_pass_of_its_prefix_out(clip: bool) -> None:
    # Of 3 products a layer: 12 forward, 12 - k for the weights, and 11 - k for the activations above the frontier (the
    # gradient of the first layer's input is never needed).
    whole = planned_flops(0, clip)
    for frozen in (6, 11):
        products = 12 + (12 - frozen) + (11 - frozen)
        assert planned_flops(frozen, clip) / whole == pytest.approx(products / 35, abs=0.03)
