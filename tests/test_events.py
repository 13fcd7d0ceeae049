"""Rates after growth events: by label, by distance from what grew, and through growth itself."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PyTree

import optax_structure as oxs
from optax_structure._tree import leaves_by_path

PARAMS = {"a": jnp.ones(1), "b": jnp.ones(1), "c": jnp.ones(1)}
LABELS = {"a": "scaffold", "b": "patch", "c": "new"}
KEY = jax.random.key(0)


def history(tx: optax.GradientTransformation, events: PyTree, params: PyTree = PARAMS) -> dict[str, list[float]]:
    """The factors at every step, each with its event: leaf -> list. ``lax.scan`` demands one form of state."""

    def step(state: Any, event: PyTree) -> Any:
        updates, state = optax.with_extra_args_support(tx).update(params, state, params, event=event)
        return state, updates

    _, updates = jax.jit(lambda events: jax.lax.scan(step, tx.init(params), events))(events)
    return {name: update[:, 0].tolist() for name, update in updates.items()}


def flags(text: str) -> jax.Array:
    """``"..x."``: an event at the third of four steps."""
    return jnp.asarray([letter == "x" for letter in text])


def distances(**by_leaf: list[int]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(values, jnp.int32) for name, values in by_leaf.items()}


# By label.


def test_by_label_by_hand() -> None:
    # The event acts on the update of its own step, and stays; 0.5 ** 4 = 0.0625 is below the floor.
    tx = oxs.scale_on_event({"scaffold": 0.5, "patch": 0.8}, LABELS, min_scale=0.1)
    out = history(tx, flags(".x..xxx."))
    assert out["a"] == [1.0, 0.5, 0.5, 0.5, 0.25, 0.125, pytest.approx(0.1), pytest.approx(0.1)]
    np.testing.assert_allclose(out["b"], [1.0, 0.8, 0.8, 0.8, 0.64, 0.512, 0.4096, 0.4096], rtol=1e-6)
    assert out["c"] == [1.0] * 8  # a label without a factor


def test_factors_of_zero() -> None:
    out = history(oxs.scale_on_event({"scaffold": 1.0, "patch": 0.0}, LABELS), flags("xx"))
    assert out["a"] == [1.0, 1.0] and out["b"] == [pytest.approx(0.01)] * 2
    assert history(oxs.scale_on_event({"patch": 0.0}, LABELS, min_scale=0.0), flags(".x"))["b"] == [1.0, 0.0]


def test_recovery_by_hand() -> None:
    keep = math.exp(-1 / 2)  # what is left of the distance to 1 after each update
    out = history(oxs.scale_on_event({"scaffold": 0.5}, LABELS, recovery=2.0), flags("x..x."))
    second = 0.5 * (1 - 0.5 * keep**3)
    expected = [0.5, 1 - 0.5 * keep, 1 - 0.5 * keep**2, second, 1 - (1 - second) * keep]
    np.testing.assert_allclose(out["a"], expected, rtol=1e-6)


@pytest.mark.parametrize("event", [0, 1, -1, 1.0, jnp.int32(0)])
def test_a_number_is_no_bool(event: Any) -> None:
    # 0 for "no event" would be read as the distance 0, which is one.
    tx = oxs.scale_on_event({"scaffold": 0.5}, LABELS)
    with pytest.raises(ValueError, match=r"scale_on_event got event=.*neither a bool nor a tree of distances"):
        tx.update(PARAMS, tx.init(PARAMS), event=event)


def test_a_leaf_alone_has_a_distance_alone() -> None:
    # per_leaf hands on the distance of each leaf, which is a number.
    tx = oxs.per_leaf(oxs.scale_on_event({"scaffold": 0.5}, "scaffold"))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), event={"a": jnp.int32(0), "b": jnp.int32(-1), "c": jnp.int32(2)})
    assert [float(update[0]) for update in updates.values()] == [0.5, 1.0, 0.5]


# By distance.


def test_by_distance_by_hand() -> None:
    events = distances(a=[-1, 0, -1, 2], b=[-1, 1, -1, 1], c=[-1, 7, -1, -1])
    out = history(oxs.scale_on_event([0.9, 0.7, 0.5]), events)
    np.testing.assert_allclose(out["a"], [1.0, 0.9, 0.9, 0.45], rtol=1e-6)
    np.testing.assert_allclose(out["b"], [1.0, 0.7, 0.7, 0.49], rtol=1e-6)
    np.testing.assert_allclose(out["c"], [1.0, 0.5, 0.5, 0.5], rtol=1e-6)  # farther than the list is long: the last


def test_distances_may_be_a_prefix() -> None:
    tx = oxs.scale_on_event([0.5, 0.25])
    params = {"body": PARAMS, "head": jnp.ones(1)}
    updates, _ = tx.update(params, tx.init(params), event={"body": jnp.int32(1), "head": jnp.int32(-1)})
    assert [float(leaf[0]) for leaf in jax.tree.leaves(updates)] == [0.25, 0.25, 0.25, 1.0]


def test_a_bool_is_no_distance() -> None:
    tx = oxs.scale_on_event([0.5])
    with pytest.raises(ValueError, match=r"needs event= as a tree of int32 distances, got a bool.*growth_distances"):
        tx.update(PARAMS, tx.init(PARAMS), event=True)


def test_distances_are_an_event_for_those_that_ask_for_a_bool() -> None:
    # One chain of both kinds, and one that counts events: they share the one event= that is passed.
    events = distances(a=[-1, 0, -1], b=[-1, -1, -1], c=[-1, -1, -1])
    out = history(
        optax.chain(
            oxs.scale_on_event([0.5]),
            oxs.scale_on_event({"patch": 0.25}, LABELS),
            oxs.scale_by_age(lambda age: 10.0**age, unit="events"),
        ),
        events,
    )
    assert out == {"a": [1.0, 0.5, 5.0], "b": [1.0, 0.25, 2.5], "c": [1.0, 1.0, 10.0]}


def test_vmap_over_events() -> None:
    tx = oxs.scale_on_event([0.5, 0.25])
    state = tx.init(PARAMS)
    events = distances(a=[-1, 0], b=[0, 1], c=[1, -1])
    updates, _ = jax.jit(jax.vmap(lambda event: tx.update(PARAMS, state, event=event)))(events)
    assert {name: update[:, 0].tolist() for name, update in updates.items()} == {
        "a": [1.0, 0.5],
        "b": [0.5, 0.25],
        "c": [0.25, 1.0],
    }


# Distances from what grew.


def network() -> tuple[PyTree, PyTree, PyTree, oxs.Units]:
    """Four dense layers; the kernels of the inner two are sparse."""
    sizes = {"one": (5, 6), "two": (6, 6), "three": (6, 4), "four": (4, 3)}
    params = {name: {"bias": jnp.zeros(n), "kernel": jnp.ones((m, n))} for name, (m, n) in sizes.items()}
    params["free"] = {"temperature": jnp.ones(1)}
    masks = jax.tree.map(lambda _: True, params)
    for name in ("two", "three"):
        rows, columns = sizes[name]
        masks[name]["kernel"] = (jnp.arange(rows)[:, None] + jnp.arange(columns)) % 3 == 0
    labels = jax.tree.map(lambda _: "scaffold", params)
    return oxs.apply_masks(params, masks), labels, masks, oxs.dense_chain(params, ["one", "two", "three", "four"])


GROWTHS = {
    # New units are new in "two"; the rows of "three" that read them make it a neighbour.
    "widen": (lambda *args: oxs.widen(*args, "two", 2, key=KEY), {"one": 1, "two": 0, "three": 1, "four": 2}),
    "insert": (
        lambda *args: oxs.insert_layer(*args, "two", key=KEY),
        {"one": 2, "two": 1, "two_next": 0, "three": 1, "four": 2},
    ),
    # A patch adds to the layer that it writes to.
    "patches": (
        lambda *args: oxs.add_patches(*args, "three", 1, key=KEY, size=2, hidden=2),
        {"one": 2, "two": 1, "three": 0, "patch_0": 0, "four": 1},
    ),
    # No leaf of the two sparse kernels is new, but connections in them are.
    "connections": (
        lambda *args: oxs.add_connections(*args, 16, key=KEY),
        {"one": 1, "two": 0, "three": 0, "four": 1},
    ),
    "prune": (
        lambda *args: oxs.prune_connections(*args, 2),
        {"one": -1, "two": -1, "three": -1, "four": -1},
    ),
}


@pytest.mark.parametrize("name", GROWTHS)
def test_growth_distances_by_hand(name: str) -> None:
    grow, expected = GROWTHS[name]
    growth = grow(*network())
    found = oxs.growth_distances(growth)
    assert jax.tree.structure(found) == jax.tree.structure(growth.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.int32)}
    for path, distance in leaves_by_path(found).items():
        assert distance == (expected | {"free": -1})[path.split("/")[0]], path


def test_layer_distances_by_hand() -> None:
    params, _, _, units = network()
    by_layer = {"one": 3, "two": 2, "three": 1, "four": 0, "free": -1}
    found = leaves_by_path(oxs.layer_distances(params, units, ["four"]))
    assert {path: int(distance) for path, distance in found.items()} == {p: by_layer[p.split("/")[0]] for p in found}
    both = oxs.layer_distances(params, units, ["one", "four"])
    assert [int(both[name]["kernel"]) for name in ("one", "two", "three", "four")] == [0, 1, 1, 0]
    assert {int(leaf) for leaf in jax.tree.leaves(oxs.layer_distances(params, units, []))} == {-1}
    with pytest.raises(ValueError, match=r"'five' is not in units; the layers are \['one', 'two', 'three', 'four'\]"):
        oxs.layer_distances(params, units, ["five"])


def test_two_readers_of_the_input_are_not_near() -> None:
    params = {"left": {"kernel": jnp.ones((3, 2))}, "right": {"kernel": jnp.ones((3, 2))}}
    axis = oxs.UnitAxis
    units = oxs.Units(
        (
            oxs.UnitGroup("input", 3, (axis("left/kernel", 0, "outgoing"), axis("right/kernel", 0, "outgoing"))),
            oxs.UnitGroup("left", 2, (axis("left/kernel", 1, "incoming"),)),
            oxs.UnitGroup("right", 2, (axis("right/kernel", 1, "incoming"),)),
        )
    )
    found = oxs.layer_distances(params, units, ["left"])
    assert (int(found["left"]["kernel"]), int(found["right"]["kernel"])) == (0, -1)


# Through growth.


@pytest.mark.parametrize("name", ["widen", "insert", "patches"])
def test_factors_carry_over_growth_and_start_at_one(name: str) -> None:
    params, labels, masks, units = network()
    tx = oxs.scale_on_event([0.9, 0.7, 0.5])
    ones = functools.partial(jax.tree.map, jnp.ones_like)
    _, state = tx.update(ones(params), tx.init(params), event=oxs.layer_distances(params, units, ["one"]))
    before = {"one": 0.9, "two": 0.7, "three": 0.5, "four": 0.5, "free": 1.0}
    grow, expected = GROWTHS[name]
    growth = grow(params, labels, masks, units)
    state = oxs.transfer_state(tx, state, params, tx, growth.params, growth=growth)
    carried = leaves_by_path(state.factor)
    updates, _ = tx.update(ones(growth.params), state, event=oxs.growth_distances(growth))
    step = {0: 0.9, 1: 0.7, 2: 0.5, -1: 1.0}
    for path, update in leaves_by_path(updates).items():
        layer = path.split("/")[0]
        old = before.get(layer, 1.0)  # what is new starts at 1, and the event acts on it at its distance 0
        np.testing.assert_allclose(carried[path], old, rtol=1e-6, err_msg=path)
        np.testing.assert_allclose(update, old * step[(expected | {"free": -1})[layer]], rtol=1e-6, err_msg=path)


def test_relabelling_keeps_the_factor_and_restart_resets_it() -> None:
    tx = oxs.scale_on_event({"scaffold": 0.5}, LABELS)
    _, state = tx.update(PARAMS, tx.init(PARAMS), event=True)
    swapped = oxs.scale_on_event({"scaffold": 0.5}, {"a": "new", "b": "patch", "c": "scaffold"})
    kept = oxs.transfer_state(tx, state, PARAMS, swapped, PARAMS)
    updates, kept = swapped.update(PARAMS, kept, event=False)
    assert [float(update[0]) for update in updates.values()] == [0.5, 1.0, 1.0]
    updates, _ = swapped.update(PARAMS, kept, event=True)  # now "c" is the scaffold
    assert [float(update[0]) for update in updates.values()] == [0.5, 1.0, 0.5]
    again = oxs.transfer_state(tx, state, PARAMS, tx, PARAMS, restart=("a",))
    assert float(again.factor["a"]) == 1.0


def test_events_do_not_retrace() -> None:
    params, labels, masks, units = network()
    tx = optax.chain(oxs.scale_on_event([0.9, 0.7, 0.5]), oxs.scale_on_event({"scaffold": 0.5}, labels))
    traces = []

    @jax.jit
    def step(state: Any, event: PyTree) -> Any:
        traces.append(None)
        return tx.update(params, state, event=event)[1]

    none = jax.tree.map(lambda _: jnp.int32(-1), params)
    state = step(tx.init(params), none)
    for layers in (["one"], ["four", "two"], []):
        state = step(state, oxs.layer_distances(params, units, layers))
    grown = oxs.add_connections(params, labels, masks, units, 4, key=KEY)
    step(state, oxs.growth_distances(grown))
    assert len(traces) == 1
