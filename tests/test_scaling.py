"""Rates as multipliers: values worked by hand, and the partition that each one equals."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PyTree, assert_close, make_grads, train

import optax_structure as oxs


def run(tx: optax.GradientTransformation, params: PyTree, grads: PyTree, **extra: Any) -> PyTree:
    """The updates of all steps, stacked."""
    return jax.jit(functools.partial(train, tx, **extra))(params, grads).updates


def factors(tx: optax.GradientTransformation, params: PyTree, steps: int = 1, **extra: Any) -> PyTree:
    """What a transformation makes of gradients of one."""
    return run(tx, params, jax.tree.map(lambda p: jnp.ones((steps, *p.shape), p.dtype), params), **extra)


PARAMS = {"a": jnp.ones(2), "b": jnp.ones((2, 2)), "c": jnp.ones(1)}


def big_net() -> dict[str, Any]:
    widths, rng = [12, 32, 24, 24, 16, 5], np.random.default_rng(0)
    return {
        f"layer_{i}": {"kernel": jnp.asarray(rng.normal(size=(m, n)), jnp.float32), "bias": jnp.zeros(n)}
        for i, (m, n) in enumerate(itertools.pairwise(widths))
    }


BIG_LABELS = oxs.label_by_path(
    [(r"layer_[01]/", "pretrained"), (r"bias", "bias"), (r"layer_4/", "new")], default="body"
)
WARMUP = optax.linear_schedule(0.0, 1.0, 4)


# By label.


def test_label_multiplies_by_the_scale_of_the_label() -> None:
    tx = oxs.scale_by_label({"x": 0.5, "y": 3.0}, {"a": "x", "b": "y", "c": "x"})
    out = factors(tx, PARAMS)
    assert [float(out[name].ravel()[0]) for name in "abc"] == [0.5, 3.0, 0.5]


def test_label_schedule_reads_the_count_of_the_leaf() -> None:
    tx = oxs.scale_by_label({"x": optax.linear_schedule(0.0, 1.0, 4), "y": 2.0}, {"a": "x", "b": "y", "c": "y"})
    out = factors(tx, PARAMS, steps=6)
    np.testing.assert_array_equal(out["a"][:, 0], [0.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    np.testing.assert_array_equal(out["b"], 2.0)


def test_label_schedule_starts_again_with_another_label() -> None:
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    first = oxs.scale_by_label({"new": schedule, "old": 0.5}, {"a": "new", "b": "new", "c": "new"})
    second = oxs.scale_by_label({"new": schedule, "old": 0.5}, {"a": "old", "b": "new", "c": "new"})
    state, ones = first.init(PARAMS), jax.tree.map(jnp.ones_like, PARAMS)
    for _ in range(3):
        _, state = first.update(ones, state)
    state = oxs.transfer_state(first, state, PARAMS, second, PARAMS)
    out, state = second.update(ones, state)
    assert (float(out["a"][0]), float(out["b"][0, 0])) == (0.5, 0.75)
    state = oxs.transfer_state(second, state, PARAMS, first, PARAMS)  # back: a second warm-up of "a" alone
    out, _ = first.update(ones, state)
    assert (float(out["a"][0]), float(out["b"][0, 0])) == (0.0, 1.0)


def test_label_rounds_once_in_the_dtype_of_the_update() -> None:
    params = {"a": jnp.ones(1, jnp.bfloat16)}
    tx = oxs.scale_by_label({"x": 0.3}, {"a": "x"})
    out, _ = tx.update({"a": jnp.array([3.0], jnp.bfloat16)}, tx.init(params))
    # 0.3 in bfloat16 is 0.30078125, and 3 * 0.30078125 rounds to 0.90234375; rounded once, 0.9 is 0.8984375.
    assert out["a"].dtype == jnp.bfloat16 and float(out["a"][0]) == 0.8984375


def test_label_scale_of_zero_stops_a_nan() -> None:
    tx = oxs.scale_by_label({"x": 0.0, "y": 1.0}, {"a": "x", "b": "y", "c": "x"})
    out, _ = tx.update(jax.tree.map(lambda p: p * jnp.nan, PARAMS), tx.init(PARAMS))
    assert not np.any(out["a"]) and not np.any(out["c"]) and np.all(np.isnan(out["b"]))


def test_label_equals_partition() -> None:
    params, inner = big_net(), optax.scale_by_adam()
    grads = make_grads(params, 6)
    scales = {"pretrained": 0.01, "bias": 2.0, "new": WARMUP, "body": optax.cosine_decay_schedule(1.0, 10)}

    def group(scale: Any) -> optax.GradientTransformation:
        return optax.chain(inner, optax.scale_by_schedule(scale) if callable(scale) else optax.scale(scale))

    expected = optax.partition({label: group(scale) for label, scale in scales.items()}, BIG_LABELS)
    assert_close(
        run(optax.chain(inner, oxs.scale_by_label(scales, BIG_LABELS)), params, grads), run(expected, params, grads)
    )


def test_label_function_works_inside_partition_and_on_a_prefix() -> None:
    label = oxs.label_by_path([("a", "x"), ("b", "y"), ("c", "y")])
    tx = oxs.scale_by_label({"x": 2.0, "y": 3.0}, label)
    inside = optax.partition({"one": tx, "two": tx}, {"a": "one", "b": "two", "c": "one"})
    assert_close(factors(inside, PARAMS), factors(tx, PARAMS))
    nested = {"net": PARAMS, "head": jnp.ones(3)}
    out = factors(oxs.scale_by_label({"x": 2.0, "y": 3.0}, {"net": "x", "head": "y"}), nested)
    assert {float(leaf.ravel()[0]) for leaf in jax.tree.leaves(out["net"])} == {2.0} and float(out["head"][0, 0]) == 3.0


def test_label_of_another_tree_is_named() -> None:
    tx = oxs.scale_by_label({"x": 1.0}, {"a": "x", "b": "x"})
    with pytest.raises(ValueError, match=r"labels does not have the structure of params"):
        tx.init(PARAMS)
    missing = oxs.scale_by_label({"x": 1.0}, lambda params: jax.tree.map(lambda _: "z", params))
    with pytest.raises(ValueError, match=r"labels \['z'\] have no scale; scales are given for \['x'\]"):
        missing.init(PARAMS)


# By depth.


@pytest.mark.parametrize(
    ("protect", "min_scale", "expected"),
    [("early", 0.0, [0.25, 0.5, 1.0]), ("late", 0.0, [1.0, 0.5, 0.25]), ("early", 0.4, [0.4, 0.5, 1.0])],
)
def test_depth_by_hand(protect: Any, min_scale: float, expected: list[float]) -> None:
    tx = oxs.scale_by_depth(0.25, {"a": 0, "b": 1, "c": 2}, protect=protect, min_scale=min_scale)
    out = factors(tx, PARAMS)
    np.testing.assert_allclose([out[name].ravel()[0] for name in "abc"], expected, rtol=1e-6)


def test_depth_of_one_layer_is_one() -> None:
    np.testing.assert_array_equal(factors(oxs.scale_by_depth(0.1, {"a": 0}), {"a": jnp.ones(2)})["a"], 1.0)
    np.testing.assert_array_equal(factors(oxs.scale_by_depth(0.0, 0, protect="late"), {"a": jnp.ones(2)})["a"], 1.0)


def test_depth_counts_the_layers_of_the_whole_tree() -> None:
    # Inside a group without the last layer, the last layer is still what depth is measured from.
    tx = oxs.scale_by_depth(0.25, {"a": 0, "b": 1, "c": 2})
    grouped = optax.partition({"body": tx, "head": optax.identity()}, {"a": "body", "b": "body", "c": "head"})
    out = factors(grouped, PARAMS)
    assert [float(out[name].ravel()[0]) for name in "abc"] == [0.25, 0.5, 1.0]


@pytest.mark.parametrize("protect", ["early", "late"])
def test_depth_equals_partition(protect: Any) -> None:
    params = big_net()
    grads, decay = make_grads(params, 4), 0.3
    power = (lambda d: (4 - d) / 4) if protect == "early" else (lambda d: d / 4)
    groups = {str(d): optax.chain(optax.trace(0.9), optax.scale(decay ** power(d))) for d in range(5)}
    expected = optax.partition(groups, jax.tree.map(str, oxs.layer_depths(params)))
    tx = optax.chain(optax.trace(0.9), oxs.scale_by_depth(decay, oxs.layer_depths, protect=protect))
    assert_close(run(tx, params, grads), run(expected, params, grads))


def test_validation_lets_tracers_through() -> None:
    @jax.jit
    def scaled(decay: jax.Array) -> PyTree:
        tx = oxs.scale_by_depth(decay, {"a": 0, "b": 1, "c": 2})
        return tx.update(PARAMS, tx.init(PARAMS))[0]

    assert float(scaled(jnp.float32(0.25))["a"][0]) == 0.25


# By age.


def test_age_in_steps() -> None:
    out = factors(oxs.scale_by_age(lambda age: 0.5**age), {"a": jnp.ones(1)}, steps=4)
    np.testing.assert_array_equal(out["a"][:, 0], [1.0, 0.5, 0.25, 0.125])


def test_age_in_events() -> None:
    tx = oxs.scale_by_age(lambda age: 0.5**age, unit="events")
    state, seen = tx.init({"a": jnp.ones(1)}), []
    update = jax.jit(lambda state, event: tx.update({"a": jnp.ones(1)}, state, event=event))
    for event in [False, True, False, False, True, True]:
        out, state = update(state, jnp.asarray(event))
        seen.append(float(out["a"][0]))
    assert seen == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25]  # an event counts from the next update on


def test_age_of_a_new_leaf_starts_at_zero() -> None:
    tx = oxs.scale_by_age(lambda age: 0.5**age)
    state = tx.init({"a": jnp.ones(1)})
    for _ in range(2):
        _, state = tx.update({"a": jnp.ones(1)}, state)
    grown = {"a": jnp.ones(1), "b": jnp.ones(2)}
    state = oxs.transfer_state(tx, state, {"a": jnp.ones(1)}, tx, grown)
    out, _ = tx.update(jax.tree.map(jnp.ones_like, grown), state)
    assert (float(out["a"][0]), float(out["b"][0])) == (0.25, 1.0)


# By density.


def test_density_of_leaf_and_of_unit() -> None:
    mask = jnp.array([[True, False, True], [True, False, False]])  # columns 1, 0, 1/2; the whole leaf 1/2
    params, masks = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}, {"a": mask, "b": jnp.asarray(True)}
    whole = factors(oxs.scale_by_density(lambda d: 1.0 + d), params, masks=masks)
    np.testing.assert_array_equal(whole["a"], 1.5)
    np.testing.assert_array_equal(whole["b"], 1.0)  # a leaf that is not sparse keeps its update
    unit = factors(oxs.scale_by_density(lambda d: 1.0 + d, per="unit"), params, masks=masks)
    np.testing.assert_array_equal(unit["a"][0], [[2.0, 1.0, 1.5]] * 2)


def test_density_of_a_convolution_is_of_its_last_axis() -> None:
    mask = jnp.zeros((2, 2, 3, 2), bool).at[0, 0, :, 0].set(True).at[..., 1].set(True)
    tx = oxs.scale_by_density(lambda d: d, per="unit")
    out = factors(tx, {"a": jnp.ones(mask.shape)}, masks={"a": mask})
    np.testing.assert_array_equal(out["a"][0, 1, 1, 2], [0.25, 1.0])  # 3 of 12, and 12 of 12


def test_density_reads_the_masks_of_sparse() -> None:
    mask = {"a": jnp.array([[True, False], [False, False]])}
    tx = oxs.sparse(oxs.scale_by_density(lambda d: jnp.where(d < 0.5, 4.0, 1.0)), mask)
    out = factors(tx, {"a": jnp.zeros((2, 2))})
    np.testing.assert_array_equal(out["a"][0], [[4.0, 0.0], [0.0, 0.0]])


# By stratum.


def strata_at(ages: list[int], labels: Any = None, **arguments: Any) -> dict[str, list[float]]:
    """The factors of the leaves at some ages."""
    tx = oxs.strata(labels, **arguments)

    def at(age: jax.Array) -> PyTree:
        state = tx.init(PARAMS)._replace(count=age)  # since 0
        return tx.update(jax.tree.map(jnp.ones_like, PARAMS), state)[0]

    out = jax.jit(jax.vmap(at))(jnp.asarray(ages, jnp.int32))
    return {name: leaf.reshape(len(ages), -1)[:, 0].tolist() for name, leaf in out.items()}


def test_strata_by_age_by_hand() -> None:
    # Older than 20 and older than 100, strictly: at 20 and at 100 a leaf has not sunk yet.
    out = strata_at([0, 20, 21, 100, 101, 5000])
    for name in "abc":
        np.testing.assert_allclose(out[name], [1.0, 1.0, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)
    # No sediment between the two.
    out = strata_at([5, 6], geological_age=5, sediment_age=5, active=2.0, geological=0.5)
    assert out["a"] == [2.0, 0.5]


def test_strata_by_label_by_hand() -> None:
    out = strata_at([0, 50, 5000], {"a": "geological", "b": "patch", "c": "scaffold"})
    np.testing.assert_allclose(out["a"], [0.01] * 3, rtol=1e-6)
    assert out["b"] == [0.5] * 3
    np.testing.assert_allclose(out["c"], [1.0, 0.1, 0.01], rtol=1e-6)  # no stratum: by age


def test_strata_sink_with_each_relabelling() -> None:
    labels = {"a": "active", "b": "patch", "c": "other"}
    ones, seen = jax.tree.map(jnp.ones_like, PARAMS), []
    tx = oxs.strata(labels, sediment_age=3)
    state = tx.init(PARAMS)
    for _ in range(3):
        updates, state = tx.update(ones, state)
        seen.append([float(updates[name].ravel()[0]) for name in "abc"])
        labels = oxs.settle(labels)
        new = oxs.strata(labels, sediment_age=3)
        tx, state = new, oxs.transfer_state(tx, state, PARAMS, new, PARAMS)
    np.testing.assert_allclose(seen, [[1.0, 0.5, 1.0], [0.1, 0.5, 1.0], [0.01, 0.5, 1.0]], rtol=1e-6)
    assert [int(state.count - since) for since in jax.tree.leaves(state.since)] == [
        3,
        3,
        3,
    ]  # relabelling leaves ages alone
    grown = PARAMS | {"d": jnp.ones(1)}
    fresh = oxs.strata(labels | {"d": "other"}, sediment_age=2)
    state = oxs.transfer_state(tx, state, PARAMS, fresh, grown)
    updates, _ = fresh.update(jax.tree.map(jnp.ones_like, grown), state)
    np.testing.assert_allclose([updates["c"][0], updates["d"][0]], [0.1, 1.0], rtol=1e-6)


def test_strata_of_another_tree_are_named() -> None:
    with pytest.raises(ValueError, match="labels does not have the structure of params"):
        oxs.strata({"z": "active"}).init(PARAMS)


# All of them in one chain.


def test_factors_multiply() -> None:
    tx = optax.chain(
        oxs.scale_by_label({"x": 3.0}, "x"),
        oxs.scale_by_depth(0.25, {"a": 0, "b": 1, "c": 2}),
        oxs.scale_by_age(lambda age: 1.0 / (age + 1.0)),
    )
    out = factors(tx, PARAMS, steps=2)
    np.testing.assert_allclose(out["b"][:, 0, 0], [1.5, 0.75], rtol=1e-6)


def test_states_are_scalars_a_leaf() -> None:
    params = big_net()
    for tx in (oxs.scale_by_label({"x": 1.0}, "x"), oxs.scale_by_age(lambda age: 1.0)):
        assert {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params))} == {()}
    for tx in (oxs.scale_by_depth(0.5, 0), oxs.scale_by_density(functools.partial(jnp.add, 1.0))):
        assert jax.tree.leaves(tx.init(params)) == []


def test_the_event_that_a_leaf_was_born_in_does_not_age_it() -> None:
    """Ten times slower per growth phase: what was there before an event, and not what the event made."""
    tx = oxs.scale_by_age(oxs.age_decay(0.1), unit="events")
    old, new = {"a": jnp.ones(1)}, {"a": jnp.ones(1), "b": jnp.ones(1)}
    state, seen = oxs.transfer_state(tx, tx.init(old), old, tx, new), []
    for event in (True, False, True, False):
        updates, state = tx.update(new, state, event=jnp.asarray(event))
        seen.append([float(updates[name][0]) for name in "ab"])
    np.testing.assert_allclose(seen, [[1.0, 1.0], [0.1, 1.0], [0.1, 1.0], [0.01, 0.1]], rtol=1e-6)
