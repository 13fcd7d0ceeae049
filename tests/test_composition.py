"""Rates compose: any two multiply, in either order, in a chain and in one product, inside a partition and outside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PyTree, assert_close, depths, labels, make_grads, make_params, masks, train

import optax_structure as oxs

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
EXTREMA = oxs.Extrema(dead={"hidden": np.array([True] * 2 + [False] * 4)}, saturated={"hidden": np.zeros(6, bool)})
EXTRA: dict[str, Any] = {
    "value": jnp.asarray(1.5),
    "event": jnp.asarray(True),
    "extrema": jax.tree.map(jnp.asarray, EXTREMA),
}

# Every pure multiplier: its factors read nothing of the update.
PURE: dict[str, Callable[[PyTree], optax.GradientTransformationExtraArgs]] = {
    "label": lambda p: oxs.scale_by_label({"scaffold": 0.5, "new": optax.linear_schedule(0.25, 1.0, 2)}, labels(p)),
    "depth": lambda p: oxs.scale_by_depth(0.25, depths(p)),
    "profile": lambda p: oxs.scale_by_depth_profile(lambda x: 0.1 + 0.9 * x, depths(p)),
    "bands": lambda p: oxs.scale_by_depth_bands(2.0, 1.0, 0.5, depths(p)),
    "age": lambda p: oxs.scale_by_age(oxs.age_decay(0.5)),
    "density": lambda p: oxs.scale_by_density(lambda density: 1.0 / density),
    "density of units": lambda p: oxs.scale_by_density(lambda density: 1.0 + density, per="unit"),
    "event": lambda p: oxs.scale_on_event({"scaffold": 0.5, "new": 0.9}, labels(p)),
    "strata": lambda p: oxs.strata(geological_age=1, sediment_age=0),
    "connection": lambda p: oxs.scale_by_connection(oxs.component_rule(scaffold=0.3)),
    "loss phase": lambda p: oxs.scale_by_loss_phase((0.7, 0.5, 0.1, 0.05), every=1),
    "extrema phase": lambda p: oxs.scale_by_extrema_phase(scales=(0.8, 0.1, 0.01)),
    "freezing": lambda p: oxs.progressive_freezing([(0, 1.0), (1, (0.0, 0.1))], depths(p)),
}


@functools.cache
def alone() -> dict[str, PyTree]:
    """What each makes of ones, three steps long: its factors."""
    params = make_params()
    ones = jax.tree.map(lambda p: jnp.ones((3, *p.shape)), params)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: PyTree) -> dict[str, PyTree]:
        return {
            name: train(make(params), params, ones, masks=masks(params), **EXTRA).updates for name, make in PURE.items()
        }

    return run(params)


# Each row has all the others: two reach every multiplier, from a scalar a leaf and from a factor an element.
FEW = ("label", "connection")


@pytest.mark.parametrize(
    "first", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in PURE]
)
def test_any_two_multipliers_give_the_product(first: str) -> None:
    params, grads = make_params(), make_grads(make_params())
    others = [name for name in PURE if name != first]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: PyTree) -> dict[str, list[PyTree]]:
        def updates(*members: Any) -> PyTree:
            return train(optax.chain(*members), params, grads, masks=masks(params), **EXTRA).updates

        made = {}
        for name in others:
            one, two = PURE[first](params), PURE[name](params)
            made[name] = [updates(one, two), updates(oxs.scale_by_product(two, one))]
        return made

    for name, results in run(params).items():
        expected = jax.tree.map(lambda g, a, b: g * a * b, grads, alone()[first], alone()[name])
        for result in results:
            assert_close(result, expected)


def test_each_factor_differs_from_one() -> None:
    for name, factors in alone().items():
        assert any(np.any(np.asarray(leaf) != 1) for leaf in jax.tree.leaves(factors)), name


def test_product_is_clipped_and_zero_stays_zero() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2), "d": jnp.ones(2)}
    small, large = {"a": 0.1, "b": 4.0, "c": 0.0, "d": 1.0}, {"a": 0.1, "b": 5.0, "c": 7.0, "d": 0.5}
    of = {name: name for name in params}
    tx = oxs.scale_by_product(
        oxs.scale_by_label(small, of), oxs.scale_by_label(large, of), min_scale=0.2, max_scale=8.0
    )
    updates, _ = tx.update(params, tx.init(params))
    # 0.01 -> 0.2; 20 -> 8; 0 stays; 0.5 passes.
    assert {name: float(update[0]) for name, update in updates.items()} == pytest.approx(
        {"a": 0.2, "b": 8.0, "c": 0.0, "d": 0.5}
    )


def test_product_of_elements_is_clipped_by_the_element() -> None:
    params = jnp.ones((4, 2))
    mask = jnp.array([[True, False]] * 2 + [[True, True]] * 2)  # densities of the units: 1 and 0.5
    by_unit = oxs.scale_by_density(lambda density: density, per="unit")
    tx = oxs.scale_by_product(by_unit, oxs.scale_by_age(lambda age: 0.9), max_scale=0.6)
    updates, _ = tx.update(params, tx.init(params), masks=mask)
    np.testing.assert_allclose(updates, np.array([[0.6, 0.45]] * 4), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_scale": -1.0}, r"min_scale=-1\.0"),
        ({"min_scale": 2.0, "max_scale": 1.0}, r"max_scale=1\.0 must lie in \[2\.0, inf\]"),
    ],
)
def test_product_names_bad_bounds(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oxs.scale_by_product(oxs.scale_by_age(lambda age: 1.0), **arguments)


def test_product_takes_multipliers_only() -> None:
    with pytest.raises(ValueError, match=r"takes multipliers such as scale_by_label.*optax\.chain"):
        oxs.scale_by_product(optax.scale_by_adam())  # pyright: ignore[reportArgumentType]


def test_positions_are_written_anew_for_other_leaves() -> None:
    """A leaf added in front shifts the places of all others; carried places would hand each its neighbour's factor."""
    old, new = {"b": jnp.ones(2), "c": jnp.ones(2)}, {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    scales = {"a": 0.1, "b": 0.2, "c": 0.3}

    def make(params: PyTree) -> optax.GradientTransformationExtraArgs:
        return oxs.scale_by_product(oxs.scale_by_label(scales, {name: name for name in params}))

    state = oxs.transfer_state(make(old), make(old).init(old), old, make(new), new)
    updates, _ = make(new).update(new, state, new)
    assert {name: float(update[0]) for name, update in updates.items()} == pytest.approx(scales)


def test_label_rates_equal_their_partition() -> None:
    """``chain(inner, scale_by_label)`` against one optimizer a label, over optimizers that work leaf by leaf."""
    params, grads = make_params(), make_grads(make_params())
    inners = {
        "adam": optax.scale_by_adam(),
        "momentum": optax.trace(0.9),
        "rms": optax.scale_by_rms(),
        "lion": optax.scale_by_lion(),
        "novograd": optax.scale_by_novograd(),
    }
    rates = {"scaffold": 0.1, "new": 2.0}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: PyTree) -> dict[str, tuple[PyTree, PyTree]]:
        made = {}
        for name, inner in inners.items():
            one = optax.chain(inner, oxs.scale_by_label(rates, labels))
            two = optax.partition({key: optax.chain(inner, optax.scale(rate)) for key, rate in rates.items()}, labels)
            made[name] = (train(one, params, grads).updates, train(two, params, grads).updates)
        return made

    for one, two in run(params).values():
        assert_close(one, two)


def test_multipliers_work_inside_a_partition_by_label() -> None:
    """Inside ``multi_transform`` a multiplier sees a part of the tree, and says of it what it says of the whole."""
    params, grads = make_params(), make_grads(make_params())

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: PyTree) -> dict[str, PyTree]:
        extra = {"masks": masks(params), **EXTRA}
        made = {}
        for name, make in PURE.items():
            tx = make(params)
            made[name] = train(
                optax.multi_transform({"scaffold": tx, "new": tx}, labels), params, grads, **extra
            ).updates
        return made

    for name, updates in run(params).items():
        assert_close(updates, jax.tree.map(lambda g, f: g * f, grads, alone()[name]))
