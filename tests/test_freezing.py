"""Freezing: the schedule by hand, what static freezing saves, and the state from one phase to the next."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structure as oxs

# Where only the result counts, a program is compiled quickly rather than well.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
FOUR = {name: jnp.ones(1) for name in "abcd"}
DEPTHS = {name: depth for depth, name in enumerate("abcd")}
# The original's: 10 epochs of warm-up, refinement until epoch 30, relative to 1e-3; here an epoch is an update.
ORIGINAL = [(0, 1.0), (10, (0.01, 0.01, 0.1)), (30, oxs.frozen_below(-1, 0.1))]


def factors(tx: optax.GradientTransformation, params: Any, steps: int) -> np.ndarray:
    """``(steps, leaves)``: what becomes of gradients of one."""

    @jax.jit
    def run(params: Any) -> Any:
        def step(state: Any, _: None) -> Any:
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            return state, jnp.stack([update.ravel()[0] for update in jax.tree.leaves(updates)])

        return jax.lax.scan(step, tx.init(params), length=steps)[1]

    return np.asarray(run(params))


# In one program.


def test_progressive_freezing_of_the_original() -> None:
    out = factors(oxs.progressive_freezing(ORIGINAL, DEPTHS), FOUR, 42)
    np.testing.assert_array_equal(out[[0, 9]], 1.0)
    np.testing.assert_allclose(out[[10, 29]], [[0.01, 0.01, 0.1, 0.1]] * 2, rtol=1e-6)
    np.testing.assert_allclose(out[[30, 41]], [[0.0, 0.0, 0.0, 0.1]] * 2, rtol=1e-6)


def test_progressive_freezing_of_a_net_of_one_layer() -> None:
    # Its only layer is the first and the last.
    out = factors(oxs.progressive_freezing(ORIGINAL, 0), {"a": jnp.ones(1)}, 31)
    np.testing.assert_allclose(out[[0, 10, 30], 0], [1.0, 0.01, 0.1], rtol=1e-6)


def test_progressive_freezing_unfreezes_too() -> None:
    phases = [
        oxs.FreezePhase(0, oxs.frozen_below(-1)),
        oxs.FreezePhase(1, oxs.frozen_below(2, 0.5)),
        oxs.FreezePhase(2, lambda depth, last: (depth + 1) / (last + 1)),
    ]
    out = factors(oxs.progressive_freezing(phases, DEPTHS), FOUR, 4)
    np.testing.assert_array_equal(out, [[0, 0, 0, 1], [0, 0, 0.5, 0.5], [0.25, 0.5, 0.75, 1], [0.25, 0.5, 0.75, 1]])


def test_frozen_below_counts_from_either_end() -> None:
    assert [oxs.frozen_below(1)(depth, 2) for depth in range(3)] == [0.0, 1.0, 1.0]
    assert [oxs.frozen_below(-1, 0.5)(depth, 2) for depth in range(3)] == [0.0, 0.0, 0.5]
    assert [oxs.frozen_below(0)(0, 0), oxs.frozen_below(-5)(0, 2), oxs.frozen_below(3)(2, 2)] == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match=r"scale=-1\.0"):
        oxs.frozen_below(1, -1.0)


def test_progressive_freezing_in_a_group_knows_the_last_depth_of_the_whole() -> None:
    tx = optax.partition(
        {"x": oxs.progressive_freezing([(0, oxs.frozen_below(-1))], DEPTHS), "y": optax.identity()},
        {"a": "x", "b": "x", "c": "y", "d": "y"},
    )
    assert factors(tx, FOUR, 1).tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_progressive_freezing_checks_depths_of_a_function_at_init() -> None:
    tx = oxs.progressive_freezing([(0, lambda depth, last: depth - 2.0)], lambda params: {"a": 0, "b": 1, "c": 2})
    with pytest.raises(ValueError, match=r"scales\(0, 2\)=-2\.0"):
        tx.init({name: jnp.ones(1) for name in "abc"})


def test_a_phase_may_freeze_all_layers_when_it_says_so() -> None:
    assert factors(oxs.progressive_freezing([(0, 0.0), (1, (0.0, 1.0))], 0), FOUR, 2).tolist() == [[0.0] * 4] * 2
    with pytest.raises(ValueError, match=r"phases\[0\]\.scales freezes all layers: the last depth is 3"):
        oxs.progressive_freezing([(0, oxs.frozen_below(4))], DEPTHS)
    # A group of optax.partition may be frozen as a whole: the function sees this group alone.
    groups = {"x": oxs.progressive_freezing([(0, oxs.frozen_below(2))], lambda params: DEPTHS), "y": optax.identity()}
    tx = optax.partition(groups, {"a": "x", "b": "x", "c": "y", "d": "y"})
    assert factors(tx, FOUR, 1).tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_progressive_freezing_describes_its_phases() -> None:
    assert oxs.describe(oxs.progressive_freezing(ORIGINAL, DEPTHS)) == (
        "progressive_freezing(from_0=1.0, from_10=(0.01, 0.01, 0.1), from_30=frozen_below(depth=-1, scale=0.1)): 4 B"
    )


def test_progressive_freezing_of_a_grown_leaf_follows_the_run() -> None:
    before, phases = {"a": jnp.ones(1), "b": jnp.ones(1)}, [(0, 1.0), (2, oxs.frozen_below(-1, 0.5))]
    old_tx = oxs.progressive_freezing(phases, {"a": 0, "b": 1})
    new_tx = oxs.progressive_freezing(phases, {"a": 0, "b": 2, "between": 1})
    state = old_tx.init(before)
    for _ in range(3):
        _, state = old_tx.update(before, state)
    after = before | {"between": jnp.ones(1)}
    state = oxs.transfer_state(old_tx, state, before, new_tx, after)
    assert int(state.count) == 3
    updates, _ = new_tx.update(after, state)
    assert {name: float(update[0]) for name, update in updates.items()} == {"a": 0.0, "b": 0.5, "between": 0.0}


# Made static.


def mlp(layers: int, width: int) -> tuple[dict[str, Any], dict[str, int]]:
    rng = np.random.default_rng(0)
    params = {
        f"layer_{i}": {
            "kernel": jnp.asarray(rng.normal(size=(width, width)) / np.sqrt(width), jnp.float32),
            "bias": jnp.full(width, 0.1),
        }
        for i in range(layers)
    }
    return params, {f"layer_{i}": i for i in range(layers)}


def loss_of(params: Any, batch: jax.Array) -> jax.Array:
    for layer in params.values():
        batch = jax.nn.relu(batch @ layer["kernel"] + layer["bias"])
    return jnp.mean(batch**2)


def train_step(tx: optax.GradientTransformation, params: Any, state: Any, batch: jax.Array) -> Any:
    updates, state = tx.update(jax.grad(loss_of)(params, batch), state, params)
    return optax.apply_updates(params, updates), state


def test_static_freezing_saves_the_computation() -> None:
    params, depths = mlp(layers=6, width=128)
    phases = [(0, 1.0), (1, oxs.frozen_below(3))]
    inner = optax.adam(1e-3)

    def flops(tx: optax.GradientTransformation) -> float:
        step = jax.jit(functools.partial(train_step, tx))
        cost = step.lower(params, jax.eval_shape(tx.init, params), jnp.ones((256, 128))).compile().cost_analysis()
        return cost["flops"]

    free = flops(inner)
    frozen = flops(oxs.freeze_at_phase(inner, phases, depths, phase=1))
    traced = flops(optax.chain(inner, oxs.progressive_freezing(phases, depths)))
    # Products forward 6, backward to weights 6 and to inputs 5 (the data need none): 17. With the first three layers
    # frozen 6 + 3 + 2 = 11, and 11 / 17 = 0.65.
    assert 0.62 < frozen / free < 0.68
    assert traced >= free


def numbers(tree: Any, where: str) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if where in jax.tree_util.keystr(path)}


def test_static_phases_go_on_from_each_other() -> None:
    params, depths = mlp(layers=3, width=4)
    phases = [(0, (0.5, 1.0)), (2, oxs.frozen_below(1, 0.5)), (4, oxs.frozen_below(-1, 0.1))]
    inner, batch = optax.adam(1e-2), jax.random.normal(jax.random.key(0), (8, 4))

    def two_steps(tx: optax.GradientTransformation) -> Any:
        def steps(params: Any, state: Any) -> Any:
            return train_step(tx, *train_step(tx, params, state, batch), batch)

        return jax.jit(steps, compiler_options=QUICK)

    traced_tx = optax.chain(inner, oxs.progressive_freezing(phases, depths))
    traced_steps = two_steps(traced_tx)
    traced, traced_state = params, traced_tx.init(params)
    for _ in phases:
        traced, traced_state = traced_steps(traced, traced_state)

    tx = oxs.freeze_at_phase(inner, phases, depths, phase=0)
    state = tx.init(params)
    for phase in range(len(phases)):
        new_tx = oxs.freeze_at_phase(inner, phases, depths, phase=phase)
        after = oxs.transfer_state(tx, state, params, new_tx, params)
        # What stays live keeps its moments and the count, to the bit.
        for where, leaf in numbers(after, "live").items():
            np.testing.assert_array_equal(leaf, numbers(state, "live")[where], err_msg=where)
        tx = new_tx
        params, state = two_steps(tx)(params, after)
    assert [int(count) for count in numbers(state, ".count").values()] == [6]
    assert not numbers(state, "layer_0") and not numbers(state, "layer_1") and numbers(state, "layer_2")
    for actual, expected in zip(jax.tree.leaves(params), jax.tree.leaves(traced), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-5)


def test_freeze_at_phase_reads_depths_of_a_function_from_the_whole_tree() -> None:
    # Among the live leaves alone "c" and "d" would be the depths 0 and 1.
    phases = [(0, (0.0, 0.0, 0.5, 1.0))]

    def in_order(params: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        return jax.tree.unflatten(treedef, list(range(len(leaves))))

    tx = oxs.freeze_at_phase(optax.identity(), phases, in_order, phase=0)
    assert factors(tx, FOUR, 1).tolist() == [[0.0, 0.0, 0.5, 1.0]]


# By label.

LABELS = {"a": "old", "b": "old", "c": "neck", "d": "new"}


def test_freeze_labels_is_the_partition() -> None:
    plain = optax.partition({"old": optax.set_to_zero(), "neck": optax.set_to_zero(), "new": optax.adam(0.1)}, LABELS)
    tx = oxs.freeze_labels(optax.adam(0.1), ("old", "neck"), LABELS)
    np.testing.assert_array_equal(factors(tx, FOUR, 3), factors(plain, FOUR, 3))
    assert {name: float(rate) for name, rate in oxs.rates(tx, tx.init(FOUR), FOUR).items()} == {
        "a": 0.0,
        "b": 0.0,
        "c": 0.0,
        "d": 1.0,
    }
    sizes = [leaf.size for leaf in jax.tree.leaves(tx.init(FOUR))]
    assert sizes == [1, 1, 1]  # Adam's count, mu and nu of the one leaf that learns


def test_freeze_labels_state_follows_the_live_leaves() -> None:
    tx = oxs.freeze_labels(optax.trace(0.9), "old", lambda params: LABELS)
    state, seen = tx.init(FOUR), []

    def visit(leaf: Any, name: Any) -> Any:
        if not isinstance(leaf, optax.MaskedNode):
            seen.append(name)
        return leaf

    names = {name: name for name in FOUR}
    after = optax.tree.map_params(tx, visit, state, names, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    assert seen == ["c", "d"] and jax.tree.structure(after) == jax.tree.structure(state)


def test_freeze_labels_thaws_with_fresh_moments() -> None:
    inner = oxs.per_leaf(optax.adam(0.1))
    frozen, thawed = oxs.freeze_labels(inner, "old", LABELS), oxs.freeze_labels(inner, (), LABELS)
    state = frozen.init(FOUR)
    for _ in range(3):
        _, state = frozen.update(FOUR, state, FOUR)
    after = oxs.transfer_state(frozen, state, FOUR, thawed, FOUR)
    count = numbers(after, ".count")
    assert [int(leaf) for leaf in count.values()] == [0, 0, 3, 3]
    back = oxs.transfer_state(thawed, after, FOUR, frozen, FOUR)
    jax.tree.map(np.testing.assert_array_equal, back, state)

    shared = oxs.freeze_labels(optax.adam(0.1), "old", LABELS), oxs.freeze_labels(optax.adam(0.1), (), LABELS)
    _, state = shared[0].update(FOUR, shared[0].init(FOUR), FOUR)
    with pytest.raises(ValueError, match="one counter for leaves of different age"):
        oxs.transfer_state(shared[0], state, FOUR, shared[1], FOUR)
