"""One optimizer a leaf: what changes is the counts, and nothing else."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PyTree, assert_close, assert_equal, make_grads, make_params, masks, take, train

import optax_structure as oxs

LEAF_WISE = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "momentum": optax.sgd(optax.linear_schedule(0.1, 0.0, 10), momentum=0.9),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1, centered=True),
    "adagrad": optax.adagrad(0.1),
    "lamb": optax.lamb(0.1),
    "novograd": optax.novograd(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
}


def test_updates_are_those_of_the_inner_optimizer() -> None:
    params = make_params()
    # Adafactor divides by the root mean square of a leaf: none of them may be all zero.
    params = jax.tree.map(lambda p: p + 0.5, params)

    @jax.jit
    def both(grads: PyTree) -> dict[str, Any]:
        return {
            name: [train(tx, params, grads).updates for tx in (inner, oxs.per_leaf(inner))]
            for name, inner in LEAF_WISE.items()
        }

    for name, (plain, leaf_wise) in both(make_grads(params, 4)).items():
        # The last bits differ: XLA computes the bias correction of every leaf inside that leaf's own program.
        assert_close(leaf_wise, plain, rtol=2e-6 if name != "adafactor" else 1e-5)


def test_state_is_the_inner_state_with_a_tree_at_every_place() -> None:
    params = make_params()
    state = oxs.per_leaf(optax.scale_by_adam()).init(params)
    assert isinstance(state, optax.ScaleByAdamState)
    for field in state:
        assert jax.tree.structure(field) == jax.tree.structure(params)
    assert {leaf.shape for leaf in jax.tree.leaves(state.count)} == {()}
    assert jax.tree.map(jnp.shape, state.mu) == jax.tree.map(jnp.shape, params)


def test_every_value_follows_its_parameter() -> None:
    params, tx = make_params(), oxs.per_leaf(optax.adam(0.1))
    seen: list[int] = []
    optax.tree.map_params(tx, lambda leaf, p: seen.append(leaf.ndim) or leaf, tx.init(params), params)
    assert len(seen) == 3 * len(jax.tree.leaves(params))


def test_a_new_leaf_starts_its_own_bias_correction() -> None:
    old, new = {"a": jnp.ones(3)}, {"a": jnp.ones(3), "b": jnp.ones(4)}
    tx = oxs.per_leaf(optax.adam(0.1))
    grads = make_grads(new, 30)
    update = jax.jit(tx.update)
    state = tx.init(old)
    for step in range(10):
        _, state = update({"a": grads["a"][step]}, state, old)
    alone, state = state, oxs.transfer_state(tx, state, old, tx, new)
    fresh = tx.init({"b": new["b"]})
    for step in range(10, 30):
        updates, state = update(take(grads, step), state, new)
        ungrown, alone = update({"a": grads["a"][step]}, alone, old)
        begun, fresh = update({"b": grads["b"][step]}, fresh, {"b": new["b"]})
        assert_equal(updates["a"], ungrown["a"])  # the old leaf knows nothing of the new one
        assert_equal(updates["b"], begun["b"])  # the new one is as in a run of its own
    # What per_leaf is for: under the one count of adam, the first update of a new leaf is 3.16 times too large.
    shared = optax.adam(0.1)
    _, late = shared.update(old, shared.init(old), old)
    mature = late[0]._replace(count=jnp.asarray(10_000), mu=jnp.zeros(4), nu=jnp.zeros(4))
    update_b, _ = shared.update(jnp.ones(4), (mature, late[1]), jnp.ones(4))
    np.testing.assert_allclose(update_b / -0.1, 0.1 / np.sqrt(0.001), rtol=1e-3)


def test_state_that_depends_on_the_leaf_is_refused() -> None:
    params = {"kernel": jnp.ones((4, 4)), "scale": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"per_leaf: the state of inner has another structure for the leaf 'scale'"):
        oxs.per_leaf(optax.contrib.muon(0.1)).init(params)


def test_extra_arguments_reach_the_leaf_that_they_are_for() -> None:
    seen: list[tuple[tuple[int, ...], Any, Any, Any]] = []

    def update(updates: Any, state: Any, params: Any = None, *, masks: Any, value: Any, extrema: Any, **_: Any) -> Any:
        seen.append((updates.shape, masks.shape, value, extrema))
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params, tx = make_params(), oxs.per_leaf(inner)
    extrema = {"hidden": jnp.zeros(6, bool)}
    tx.update(params, tx.init(params), params, masks=masks(params), value=2.0, extrema=extrema)
    assert [(shape, mask) for shape, mask, _, _ in seen] == [
        ((2,), ()), ((6, 2), (6, 2)), ((6,), ()), ((4, 6), (4, 6)),
    ]  # fmt: skip
    assert all(value == 2.0 and whole is extrema for _, _, value, whole in seen)


def test_transforms_that_read_masks_work_inside() -> None:
    params = make_params()
    tx = oxs.scale_by_density(lambda density: 1.0 + density)
    expected, _ = tx.update(params, tx.init(params), params, masks=masks(params))
    inside = oxs.per_leaf(tx)
    updates, _ = inside.update(params, inside.init(params), params, masks=masks(params))
    assert_equal(updates, expected)
    # A group of a partition gets the masks of the whole tree.
    grouped = optax.partition({"one": inside, "two": inside}, {"hidden": "one", "head": "two"})
    updates, _ = grouped.update(params, grouped.init(params), params, masks=masks(params))
    assert_equal(updates, expected)


def test_inside_partition_every_leaf_keeps_its_count() -> None:
    params = make_params()
    tx = optax.partition(
        {"one": oxs.per_leaf(optax.adam(0.1)), "two": optax.set_to_zero()}, {"hidden": "one", "head": "two"}
    )
    updates, state, _ = train(tx, params, make_grads(params))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates["head"]))
    expected = train(optax.adam(0.1), params["hidden"], make_grads(params)["hidden"]).updates
    assert_close(updates["hidden"], expected)
    counts = state.inner_states["one"].inner_state[0].count
    assert [int(count) for count in jax.tree.leaves(counts)] == [3, 3]
