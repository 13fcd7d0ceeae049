"""Rates by depth: within a label, by a profile, in three bands. (``scale_by_depth`` itself: test_scaling.py.)"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PyTree, train

import optax_structure as oxs


def net(layers: int) -> dict[str, jax.Array]:
    return {f"layer_{depth}": jnp.ones(1) for depth in range(layers)}


def depths(params: PyTree) -> dict[str, int]:
    return {name: int(name.removeprefix("layer_")) for name in params}


def factors(tx: optax.GradientTransformation, params: PyTree, steps: int = 1) -> PyTree:
    """What is made of gradients of one: leaf -> one factor a step."""
    ones = jax.tree.map(lambda p: jnp.ones((steps, *p.shape), p.dtype), params)
    updates = jax.jit(functools.partial(train, tx))(params, ones).updates
    return jax.tree.map(lambda update: update[:, 0].tolist(), updates)


def first(tx: optax.GradientTransformation, layers: int) -> list[float]:
    """The factors of the layers of a chain at the first update, by depth."""
    params = net(layers)
    updates, _ = tx.update(params, tx.init(params), params)
    return [float(update[0]) for update in updates.values()]


# Depth within a label.

WITHIN = {"layer_0": "body", "layer_1": "patch", "layer_2": "body", "layer_3": "body", "layer_4": "patch"} | {
    "layer_5": "body",
    "layer_6": "neck",
}
# The four depths of the body are ranks 0 .. 3: 0.125 ** (1, 2/3, 1/3, 0). Patches: ranks 0 and 1. One neck: 1.
EARLY = [0.125, 0.125, 0.25, 0.5, 1.0, 1.0, 1.0]
LATE = [1.0, 1.0, 0.5, 0.25, 0.125, 0.125, 1.0]


@pytest.mark.parametrize(("protect", "expected"), [("early", EARLY), ("late", LATE)])
def test_depth_within_a_label_by_hand(protect: Any, expected: list[float]) -> None:
    tx = oxs.scale_by_depth(0.125, depths, protect=protect, within=WITHIN)
    np.testing.assert_allclose(first(tx, 7), expected, rtol=1e-6)


def test_depth_within_a_label_counts_the_whole_tree_inside_partition() -> None:
    # The group "b" holds one leaf of the body and one patch: both are still placed among all of their label.
    tx = oxs.scale_by_depth(0.125, depths(net(7)), within=WITHIN)
    groups = {f"layer_{depth}": "b" if depth in (3, 4) else "a" for depth in range(7)}
    np.testing.assert_allclose(first(optax.partition({"a": tx, "b": tx}, groups), 7), EARLY, rtol=1e-6)


def test_depth_within_a_label_takes_prefixes_and_functions() -> None:
    params = {"in": {"w": jnp.ones(1), "b": jnp.ones(1)}, "out": {"w": jnp.ones(1), "b": jnp.ones(1)}, "top": net(1)}
    labels = {"in": {"w": "kernel", "b": "bias"}, "out": {"w": "kernel", "b": "bias"}, "top": "kernel"}
    expected = {"in": {"b": [0.25], "w": [0.25]}, "out": {"b": [1.0], "w": [0.5]}, "top": {"layer_0": [1.0]}}
    for within in (labels, lambda tree: labels):
        tx = oxs.scale_by_depth(0.25, {"in": 0, "out": 1, "top": {"layer_0": 2}}, within=within)
        assert factors(tx, params) == expected


def test_trees_of_another_structure_are_named_at_init() -> None:
    for tx in (
        oxs.scale_by_depth(0.5, 0, within={"other": "x"}),
        oxs.scale_by_depth_profile(lambda x: x, 0, within={"other": "x"}),
    ):
        with pytest.raises(ValueError, match="within does not have the structure of params"):
            tx.init(net(2))
    with pytest.raises(ValueError, match="depths does not have the structure of params"):
        oxs.scale_by_depth_bands(lambda count: 1.0, 1.0, 1.0, depths(net(3))).init(net(2))


def test_depths_are_known_before_the_program_runs() -> None:
    concrete = jax.tree.map(jnp.asarray, depths(net(3)))
    assert first(oxs.scale_by_depth(0.25, concrete), 3) == [0.25, 0.5, 1.0]
    assert first(oxs.scale_by_depth_bands(2.0, 1.0, 0.5, concrete), 3) == [2.0, 1.0, 0.5]
    makers = (
        lambda of: oxs.scale_by_depth(0.5, of),
        lambda of: oxs.scale_by_depth_profile(lambda x: x, of),
        lambda of: oxs.progressive_freezing([(0, 1.0)], of),
        lambda of: oxs.scale_by_connection(oxs.scale_rule(of)),
    )
    for make in makers:
        for bad in (0.5, "1", np.arange(2)):
            with pytest.raises(ValueError, match="depths must be ints that are known before the program runs, got "):
                make({"layer_0": bad})
        with pytest.raises(ValueError, match="depths must be ints that are known before the program runs, got "):
            jax.jit(lambda of, make=make: make(of) and 0)(concrete)


# By a profile.


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(1, [1.0]), (2, [0.1, 1.0]), (3, [0.1, 0.55, 1.0]), (4, [0.1, 0.4, 0.7, 1.0])],  # 0.1 + 0.9 d / (D-1)
)
def test_profile_by_hand(layers: int, expected: list[float]) -> None:
    tx = oxs.scale_by_depth_profile(lambda x: 0.1 + 0.9 * x, depths)
    np.testing.assert_allclose(first(tx, layers), expected, rtol=1e-6)


def test_profile_within_a_label() -> None:
    tx = oxs.scale_by_depth_profile(lambda x: 3.0 * x, depths, within=WITHIN)
    np.testing.assert_allclose(first(tx, 7), [0.0, 0.0, 1.0, 2.0, 3.0, 3.0, 3.0], rtol=1e-6)


def test_profile_may_be_any_python_or_jax_function() -> None:
    def stairs(x: float) -> float:
        return 0.5 if x < 0.5 else 2.0

    for tx in (
        oxs.scale_by_depth_profile(stairs, depths),
        oxs.scale_by_depth_profile(lambda x: jnp.where(x < 0.5, 0.5, 2.0), depths),
        oxs.scale_by_product(oxs.scale_by_depth_profile(stairs, depths)),
    ):
        assert first(tx, 3) == [0.5, 2.0, 2.0]


def test_profile_equals_geometric_decay() -> None:
    geometric = oxs.scale_by_depth(0.3, depths)
    profile = oxs.scale_by_depth_profile(lambda x: 0.3 ** (1.0 - x), depths)
    np.testing.assert_allclose(first(profile, 5), first(geometric, 5), rtol=1e-6)


# In bands.


@pytest.mark.parametrize("bands", ["m", "el", "eml", "emml", "eemll", "eemmll", "eemmmll"])
def test_bands_by_hand(bands: str) -> None:
    # With D layers: early where 3 d < D-1, late where 3 d > 2 (D-1).
    rate = {"e": 2.0, "m": 1.0, "l": 0.5}
    tx = oxs.scale_by_depth_bands(2.0, 1.0, 0.5, depths)
    assert first(tx, len(bands)) == [rate[band] for band in bands]


def test_bands_take_schedules() -> None:
    warmup = optax.linear_schedule(0.0, 1.0, 4)
    tx = oxs.scale_by_depth_bands(warmup, 3.0, lambda count: 1.0 / (count + 1.0), depths)
    assert factors(tx, net(3), steps=4) == {
        "layer_0": [0.0, 0.25, 0.5, 0.75],
        "layer_1": [3.0, 3.0, 3.0, 3.0],
        "layer_2": [1.0, 0.5, pytest.approx(1 / 3), 0.25],
    }
    # A new leaf counts from its own first update: the last but one of four layers is in the middle, the last late.
    state = tx.init(net(3))
    for _ in range(2):
        _, state = tx.update(net(3), state)
    state = oxs.transfer_state(tx, state, net(3), tx, net(4))
    updates, _ = tx.update(net(4), state)
    assert [float(update[0]) for update in updates.values()] == [0.5, 3.0, 3.0, 1.0]


def test_bands_of_numbers_have_no_state() -> None:
    assert jax.tree.leaves(oxs.scale_by_depth_bands(2.0, 1.0, 0.5, depths).init(net(3))) == []
    scheduled = oxs.scale_by_depth_bands(2.0, 1.0, lambda count: 1.0, depths).init(net(3))
    assert [leaf.shape for leaf in jax.tree.leaves(scheduled)] == [()] * 4  # a clock, and since when for each leaf


def test_bands_equal_partition() -> None:
    scales = {"early": 0.25, "middle": 0.5, "late": 2.0}
    groups = dict(zip(net(5), ["early", "early", "middle", "late", "late"], strict=True))
    expected = optax.partition({name: optax.scale(scale) for name, scale in scales.items()}, groups)
    assert first(oxs.scale_by_depth_bands(**scales, depths=depths), 5) == first(expected, 5)
