"""Optimizer state through growth: how large first updates are, where rows go, what starts again and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax import contrib

import optax_structure as oxs
from optax_structure.growth import insert_layer, prune_connections, widen
from optax_structure.structure import Growth, Units, conv_chain

KEY = jax.random.key(0)


def by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def record(params: Any, sources: Any = None, **changed: Any) -> Growth:
    """A record of a change, written by hand: what `sources` leave out did not move."""
    unmoved = {path: tuple(np.arange(n, dtype=np.int32) for n in leaf.shape) for path, leaf in by_path(params).items()}
    growth = Growth(
        params=params,
        labels=jax.tree.map(lambda _: "scaffold", params),
        masks=jax.tree.map(lambda _: True, params),
        units=Units(()),
        rename={},
        sources=unmoved | (sources or {}),
        born=jax.tree.map(lambda _: np.uint8(255), params),
    )
    return growth._replace(**changed)


def aged(state: Any, seed: int = 0) -> Any:
    """The state with other numbers in it, every one different."""
    rng = np.random.default_rng(seed)

    def age(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return leaf + int(rng.integers(5, 1000)) if leaf.dtype == jnp.int32 else leaf

    return jax.tree.map(age, state)


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, after), before in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(after, before, err_msg=jax.tree_util.keystr(path), strict=True)


# The size of first updates ------------------------------------------------------------

OLD, NEW, STEPS = 48, 48, 20
MATURE = 3000  # updates, after which the bias corrections of decays up to 0.999 are all but 1


def gradients(kind: str, steps: int, rows: int, scale: float, seed: int) -> jax.Array:
    if kind == "constant":
        return jnp.full((steps, rows, 4), scale)
    return scale * jax.random.normal(jax.random.key(seed), (steps, rows, 4))


def updates_along(tx: Any) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """(gradients of many steps, state, params) -> (updates of many steps, state); params stay where they are."""

    @jax.jit
    def run(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        def step(state: Any, grad: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grad, state, params)
            return state, updates

        state, updates = jax.lax.scan(step, state, grads)
        return updates, state

    return run


def rms(updates: jax.Array) -> np.ndarray:
    return np.sqrt(np.mean(np.square(np.asarray(updates, np.float64)), axis=(1, 2)))


class Widened(NamedTuple):
    """A leaf of 48 mature rows that gets 48 new ones."""

    run: Any
    old_params: Any
    old_state: Any
    params: Any
    growth: Growth
    tx: Any


def widened(tx: Any, kind: str, run: Any = None) -> Widened:
    run = run or updates_along(tx)
    params = {"w": jnp.full((OLD, 4), 0.1)}
    _, state = run({"w": gradients(kind, MATURE, OLD, 1.0, 1)}, tx.init(params), params)
    grown = {"w": jnp.full((OLD + NEW, 4), 0.1)}
    rows = np.r_[np.arange(OLD), np.full(NEW, -1)].astype(np.int32)
    return Widened(run, params, state, grown, record(grown, {"w": (rows, np.arange(4, dtype=np.int32))}), tx)


def new_elements(case: Widened, kind: str, ratio: float, state: Any) -> np.ndarray:
    """RMS of the updates of the new rows, whose gradients are `ratio` times those of the old ones."""
    grads = [gradients(kind, STEPS, OLD, 1.0, 2), gradients(kind, STEPS, NEW, ratio, 3)]
    updates, _ = case.run({"w": jnp.concatenate(grads, axis=1)}, state, case.params)
    return rms(updates["w"][:, OLD:])


def first_gradients(kind: str, ratio: float) -> Any:
    grads = [gradients(kind, STEPS, OLD, 1.0, 2), gradients(kind, STEPS, NEW, ratio, 3)]
    return {"w": jnp.concatenate(grads, axis=1)[0]}


def of_fresh(tx: Any, run: Any, kind: str, ratio: float) -> np.ndarray:
    params = {"w": jnp.full((NEW, 4), 0.1)}
    return rms(run({"w": gradients(kind, STEPS, NEW, ratio, 3)}, tx.init(params), params)[0]["w"])


ELEMENTWISE: dict[str, Callable[[], Any]] = {
    "adam": lambda: optax.adam(1e-3),
    "adamw": lambda: optax.adamw(1e-3),
    "amsgrad": lambda: optax.amsgrad(1e-3),
    "nadam": lambda: optax.nadam(1e-3),
    "adamax": lambda: optax.adamax(1e-3),
    "adabelief": lambda: optax.adabelief(1e-3),
    "adan": lambda: optax.adan(1e-3),
    "yogi": lambda: optax.yogi(1e-3),
    "rmsprop": lambda: optax.rmsprop(1e-3),
    "rmsprop_corrected": lambda: optax.rmsprop(1e-3, bias_correction=True),
    "adafactor": lambda: optax.adafactor(1e-3),
    "adafactor_factored": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=4),
    "adagrad": lambda: optax.adagrad(1e-3),
    "lion": lambda: optax.lion(1e-3),
    "momentum": lambda: optax.sgd(1e-3, momentum=0.9),
    "ademamix": lambda: contrib.ademamix(1e-3),
    "per_leaf_adam": lambda: oxs.per_leaf(optax.adam(1e-3)),
}


FIRST = ("adam", "adabelief", "adafactor", "lion")


@pytest.mark.parametrize(
    "name", [name if name in FIRST else pytest.param(name, marks=pytest.mark.slow) for name in ELEMENTWISE]
)
def test_new_elements_start_no_larger_than_in_a_fresh_optimizer(name: str) -> None:
    tx = ELEMENTWISE[name]()
    run = updates_along(tx)
    for kind in ("constant", "noisy"):
        case = widened(tx, kind, run)
        for ratio in (1.0, 10.0, 30.0):
            grads = first_gradients(kind, ratio)
            state = oxs.transfer_state(
                tx, case.old_state, case.old_params, tx, case.params, growth=case.growth, grads=grads
            )
            ratios = new_elements(case, kind, ratio, state) / of_fresh(tx, run, kind, ratio)
            assert ratios.max() <= 1.05, (kind, ratio, ratios)
            if name not in ("adabelief", "adan", "adamax"):  # these start lower still
                assert ratios[-1] > 0.5, (kind, ratio, ratios)


def test_radam_starts_no_larger_than_adam() -> None:
    # RAdam's own warm-up is a factor of the one count that all elements share, so a new element of a living leaf has
    # none; what it must not do is exceed the update that the rule makes of a mature one.
    tx = optax.radam(1e-3)
    case = widened(tx, "constant")
    for ratio in (1.0, 10.0, 30.0):
        state = oxs.transfer_state(
            tx,
            case.old_state,
            case.old_params,
            tx,
            case.params,
            growth=case.growth,
            grads=first_gradients("constant", ratio),
        )
        assert new_elements(case, "constant", ratio, state).max() <= 1.05e-3


def test_the_same_measure_sees_the_shared_count_fault() -> None:
    tx = optax.adam(1e-3)
    case = widened(tx, "constant")
    fresh = of_fresh(tx, case.run, "constant", 1.0)
    good = oxs.transfer_state(tx, case.old_state, case.old_params, tx, case.params, growth=case.growth)
    assert (new_elements(case, "constant", 1.0, good) / fresh).max() <= 1.05  # at ratio 1 no gradients are needed
    # Zeros beside a mature count: 0.1 / sqrt(0.001) = 3.16 times too large at once, and worse later.
    zeros = good[0]._replace(nu={"w": good[0].nu["w"].at[OLD:].set(0.0)})
    ratios = new_elements(case, "constant", 1.0, (zeros, *good[1:])) / fresh
    assert ratios[0] > 3.0 and ratios.max() > 6.0
    # The plain mean, without gradients, where these are ten times larger: sqrt(0.001 + 0.01) is the divisor at once.
    ratios = new_elements(case, "constant", 10.0, good) / of_fresh(tx, case.run, "constant", 10.0)
    assert 4.0 < ratios.max() < 6.0


@pytest.mark.parametrize(
    "name",
    [
        "adam",
        "lion",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("amsgrad", "adabelief", "radam", "novograd")),
    ],
)
def test_a_new_leaf_under_per_leaf_runs_as_in_a_fresh_optimizer(name: str) -> None:
    tx = oxs.per_leaf(getattr(optax, name)(1e-3))
    run = updates_along(tx)
    old, new = {"w": jnp.full((6, 4), 0.1)}, {"n": jnp.full((NEW, 4), 0.1)}
    _, state = run({"w": gradients("noisy", MATURE, 6, 1.0, 1)}, tx.init(old), old)
    grown = old | new
    state = oxs.transfer_state(tx, state, old, tx, grown)
    grads = {"w": gradients("noisy", STEPS, 6, 1.0, 2), "n": gradients("noisy", STEPS, NEW, 30.0, 3)}
    updates, _ = run(grads, state, grown)
    alone, _ = run({"n": grads["n"]}, tx.init(new), new)
    np.testing.assert_allclose(rms(updates["n"]), rms(alone["n"]), rtol=1e-5)


def test_a_new_leaf_under_a_shared_count_would_start_three_times_too_large() -> None:
    tx = optax.adam(1e-3)
    run = updates_along(tx)
    old, new = {"w": jnp.full((6, 4), 0.1)}, {"n": jnp.full((NEW, 4), 0.1)}
    _, state = run({"w": gradients("constant", MATURE, 6, 1.0, 1)}, tx.init(old), old)
    state = oxs.transfer_state(tx, state, old, tx, old | new, mixed="carry")
    grads = {"w": gradients("constant", STEPS, 6, 1.0, 1), "n": gradients("constant", STEPS, NEW, 1.0, 3)}
    updates, _ = run(grads, state, old | new)
    assert rms(updates["n"])[0] > 3e-3 and rms(updates["n"]).max() > 6e-3


# Old leaves go on as if nothing had happened ------------------------------------------------------------

NET = {
    "hidden": {"kernel": jax.random.normal(KEY, (5, 6)), "bias": jnp.linspace(-0.2, 0.2, 6)},
    "head": {"kernel": jax.random.normal(jax.random.key(1), (6, 3)), "bias": jnp.zeros(3)},
}
INNER: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(1e-3),
    "lion": lambda: optax.lion(1e-3),
    "rmsprop": lambda: optax.rmsprop(1e-3, momentum=0.9),
}


def labelled(inner: Any, labels: Any) -> Any:
    return optax.chain(
        oxs.per_leaf(inner),
        oxs.scale_by_label({"scaffold": 0.1, "new": optax.linear_schedule(0.0, 1.0, 9)}, labels),
        optax.scale_by_learning_rate(1e-2),
    )


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("action", ["widen", pytest.param("insert", marks=pytest.mark.slow)])
def test_the_next_update_of_old_leaves_is_bit_identical(name: str, action: str) -> None:
    labels = jax.tree.map(lambda _: "scaffold", NET)
    units = oxs.dense_chain(NET, ["hidden", "head"])
    tx = labelled(INNER[name](), labels)
    state = tx.init(NET)
    for seed in range(3):
        grads = jax.tree.map(lambda p, seed=seed: jax.random.normal(jax.random.key(seed + p.size), p.shape), NET)
        _, state = tx.update(grads, state, NET)
    if action == "widen":
        grown = widen(NET, labels, True, units, "hidden", 3, key=KEY)
    else:
        grown = insert_layer(NET, labels, True, units, "hidden", key=KEY)
    new_tx = labelled(INNER[name](), grown.labels)
    wide = oxs.transfer_state(tx, state, NET, new_tx, grown.params, growth=grown)

    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size + 9), p.shape), NET)
    old_updates = by_path(tx.update(grads, state, NET)[0])
    shapes = {path: leaf.shape for path, leaf in by_path(NET).items()}

    def embedded(path: str, leaf: jax.Array) -> jax.Array:
        """The old gradients in the corner that old entries keep, and large ones elsewhere."""
        return 7.0 * jnp.ones_like(leaf) if path not in shapes else corner(jnp.full_like(leaf, 7.0), path)

    def corner(leaf: jax.Array, path: str) -> jax.Array:
        return leaf.at[tuple(slice(n) for n in shapes[path])].set(by_path(grads)[path])

    new_grads = jax.tree_util.tree_map_with_path(
        lambda path, leaf: embedded(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), grown.params
    )
    updates = by_path(new_tx.update(new_grads, wide, grown.params)[0])
    assert set(updates) > set(old_updates) if action == "insert" else set(updates) == set(old_updates)
    for path, update in old_updates.items():
        np.testing.assert_array_equal(updates[path][tuple(slice(n) for n in shapes[path])], update, err_msg=path)


# A convolution before a flatten ------------------------------------------------------------

CONV = {
    "conv": {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)},
    "head": {"kernel": jnp.zeros((3 * 2 * 4, 3)), "bias": jnp.zeros(3)},
}


def test_middle_channels_are_pruned_and_moved_with_the_rows_behind_the_flatten() -> None:
    channels = [2, 0, -1, 3, -1]  # channel 1 is pruned, two are new
    rows = [-1 if c < 0 else 4 * position + c for position in range(6) for c in channels]
    wide = {
        "conv": {"kernel": jnp.zeros((3, 3, 2, 5)), "bias": jnp.zeros(5)},
        "head": {"kernel": jnp.zeros((30, 3)), "bias": jnp.zeros(3)},
    }
    index = np.asarray(channels, np.int32)
    sources = {
        "conv/kernel": (*(np.arange(n, dtype=np.int32) for n in (3, 3, 2)), index),
        "conv/bias": (index,),
        "head/kernel": (np.asarray(rows, np.int32), np.arange(3, dtype=np.int32)),
    }
    tx = oxs.per_leaf(optax.scale_by_adam())
    state = aged(tx.init(CONV))
    after = oxs.transfer_state(tx, state, CONV, tx, wide, growth=record(wide, sources))
    for field in ("mu", "nu"):
        old, new = (by_path(getattr(s, field)) for s in (state, after))
        for position in np.ndindex(3, 3, 2):
            for unit, source in enumerate(channels):
                if source >= 0:
                    assert new["conv/kernel"][*position, unit] == old["conv/kernel"][*position, source]
                elif field == "mu":
                    assert new["conv/kernel"][*position, unit] == 0
        for row, source in enumerate(rows):
            if source >= 0:
                np.testing.assert_array_equal(new["head/kernel"][row], old["head/kernel"][source])
            elif field == "mu":
                np.testing.assert_array_equal(new["head/kernel"][row], 0)
    # The second moments of what is new: the mean of those that lived on, channel 1 left out.
    living = [row for row in rows if row >= 0]
    expected = np.asarray(state.nu["head"]["kernel"], np.float64)[living].mean()
    np.testing.assert_allclose(after.nu["head"]["kernel"][2], expected, rtol=1e-6)
    expected = np.asarray(state.nu["conv"]["kernel"], np.float64)[..., [0, 2, 3]].mean()
    np.testing.assert_allclose(after.nu["conv"]["kernel"][..., 4], expected, rtol=1e-6)
    assert_same(after.count, state.count)


def test_widening_a_convolution_moves_the_rows_behind_the_flatten() -> None:
    units = conv_chain(CONV, ["conv"], ["head"], positions=6)
    grown = widen(CONV, "scaffold", True, units, "conv", 2, key=KEY)
    tx = oxs.per_leaf(optax.scale_by_adam())
    state = aged(tx.init(CONV))
    after = oxs.transfer_state(tx, state, CONV, tx, grown.params, growth=grown)
    old, new = np.asarray(state.mu["head"]["kernel"]), np.asarray(after.mu["head"]["kernel"])
    # (position, channel, class): old channels first at every position, then the two new ones.
    np.testing.assert_array_equal(new.reshape(6, 6, 3)[:, :4], old.reshape(6, 4, 3))
    np.testing.assert_array_equal(new.reshape(6, 6, 3)[:, 4:], 0)
    np.testing.assert_array_equal(after.mu["conv"]["kernel"][..., :4], state.mu["conv"]["kernel"])


def test_pruning_the_last_units_moves_what_is_left() -> None:
    tx, wide, narrow = oxs.per_leaf(optax.scale_by_adam()), {"w": jnp.zeros((6, 2))}, {"w": jnp.zeros((4, 2))}
    state = aged(tx.init(wide))
    sources = {"w": (np.arange(4, dtype=np.int32), np.arange(2, dtype=np.int32))}
    after = oxs.transfer_state(tx, state, wide, tx, narrow, growth=record(narrow, sources))
    np.testing.assert_array_equal(after.mu["w"], state.mu["w"][:4])
    np.testing.assert_array_equal(after.nu["w"], state.nu["w"][:4])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"w": (np.array([0, 1, 2, 9]),)}, r"sources\['w'\] points outside of 'w', which had shape \(4,\)"),
        ({"w": (np.array([0, 1, 2]),)}, r"sources\['w'\] has sizes \(3,\), new_params has shape \(4,\)"),
        ({"v": (np.arange(4),)}, r"growth.sources names 'v', which is not in new_params"),
    ],
)
def test_sources_that_do_not_fit_raise(sources: Any, message: str) -> None:
    tx, params = oxs.per_leaf(optax.adam(1.0)), {"w": jnp.zeros(4)}
    for new_tx in (tx, oxs.per_leaf(optax.adam(1.0))):  # with the shortcut for changes of masks alone, and without
        with pytest.raises(ValueError, match=message):
            oxs.transfer_state(tx, tx.init(params), params, new_tx, params, growth=record(params, sources))


# Adafactor's factors ------------------------------------------------------------


def factored(shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    params = {"w": jnp.ones(shape)}
    return tx, params, aged(tx.init(params))


def grown_rows(shape: tuple[int, int], rows: list[int]) -> tuple[Any, Growth]:
    params = {"w": jnp.ones((len(rows), shape[1]))}
    return params, record(params, {"w": (np.asarray(rows, np.int32), np.arange(shape[1], dtype=np.int32))})


def test_adafactor_rows_move_with_their_axis() -> None:
    tx, params, state = factored((4, 6))
    wide, growth = grown_rows((4, 6), [3, -1, 0, 1, 2])  # rows are still the shorter axis
    after = oxs.transfer_state(tx, state, params, tx, wide, growth=growth)
    old, new = state[0], after[0]
    np.testing.assert_array_equal(new.v_row["w"][jnp.array([0, 2, 3, 4])], old.v_row["w"][jnp.array([3, 0, 1, 2])])
    np.testing.assert_allclose(new.v_row["w"][1], np.mean(old.v_row["w"]), rtol=1e-6)
    np.testing.assert_array_equal(new.v_col["w"], old.v_col["w"])


@pytest.mark.parametrize("shape", [(4, 6), (4, 4)])
def test_adafactor_raises_where_its_axes_swap(shape: tuple[int, int]) -> None:
    tx, params, state = factored(shape)
    wide, growth = grown_rows(shape, [0, 1, 2, 3, -1, -1, -1, -1])
    message = r"FactoredState\.v_(row|col) .*'w'.*restart=\('w',\)"
    with pytest.raises(ValueError, match=message):
        oxs.transfer_state(tx, state, params, tx, wide, growth=growth)
    assert_same(oxs.transfer_state(tx, state, params, tx, wide, growth=growth, restart=("w",))[0], tx.init(wide)[0])


def test_adafactor_restarts_one_leaf_of_several() -> None:
    tx = oxs.per_leaf(optax.adafactor(1e-3, min_dim_size_to_factor=2))
    params = {"v": jnp.ones((3, 5)), "w": jnp.ones((4, 6))}
    wide = {"v": params["v"], "w": jnp.ones((8, 6))}
    rows = np.array([0, 1, 2, 3, -1, -1, -1, -1], np.int32)
    growth = record(wide, {"w": (rows, np.arange(6, dtype=np.int32))})
    state = aged(tx.init(params))
    after = oxs.transfer_state(tx, state, params, tx, wide, growth=growth, restart=("w",))
    for field in ("count", "v_row", "v_col"):
        np.testing.assert_array_equal(getattr(after[0], field)["v"], getattr(state[0], field)["v"])
        np.testing.assert_array_equal(getattr(after[0], field)["w"], getattr(tx.init(wide)[0], field)["w"])


def test_adafactor_of_a_sparse_convolution_stays() -> None:
    params = {"k": jnp.ones((3, 3, 4, 5))}
    masks = {"k": jax.random.bernoulli(KEY, 0.5, (3, 3, 4, 5))}
    tx = oxs.sparse(optax.adafactor(1e-3, min_dim_size_to_factor=3), masks)
    state = aged(tx.init(params))
    assert_same(oxs.transfer_state(tx, state, params, tx, params), state)
    pruned = prune_connections(params, "scaffold", masks, Units(()), 3)
    after = oxs.transfer_state(tx, state, params, tx, params, growth=pruned)
    assert_same(after.inner_state[0].v_row, state.inner_state[0].v_row)
    assert_same(oxs.get_masks(after), pruned.masks)


# Names ------------------------------------------------------------


def test_a_renamed_leaf_is_followed() -> None:
    old, new = (
        {"x": jnp.ones(3), "y": jnp.ones(3), "z": jnp.ones(2)},
        {"y": jnp.ones(3), "w": jnp.ones(3), "z": jnp.ones(2)},
    )
    tx = oxs.per_leaf(optax.adamw(1e-3))
    state = aged(tx.init(old))
    after = oxs.transfer_state(tx, state, old, tx, new, growth=record(new, rename={"y": "x", "w": "y"}))
    for field in ("count", "mu", "nu"):
        before, now = getattr(state[0], field), getattr(after[0], field)
        for path, origin in {"y": "x", "w": "y", "z": "z"}.items():
            np.testing.assert_array_equal(now[path], before[origin])


def test_renaming_works_under_a_shared_counter_and_with_moved_rows() -> None:
    old, new = {"x": jnp.ones(3), "z": jnp.ones(2)}, {"w": jnp.ones(4), "z": jnp.ones(2)}
    rows = np.array([2, -1, 0, 1], np.int32)
    tx = optax.adam(1e-3)
    state = aged(tx.init(old))
    after = oxs.transfer_state(tx, state, old, tx, new, growth=record(new, {"w": (rows,)}, rename={"w": "x"}))
    assert after[0].count == state[0].count
    np.testing.assert_array_equal(after[0].mu["w"][jnp.array([0, 2, 3])], state[0].mu["x"][jnp.array([2, 0, 1])])
    assert after[0].mu["w"][1] == 0


@pytest.mark.parametrize("rename", [{"x": "nowhere"}, {"nowhere": "x"}])
def test_a_renaming_from_or_to_nowhere_raises(rename: dict[str, str]) -> None:
    tx, params = optax.adam(1e-3), {"x": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"growth\.rename.*nowhere"):
        oxs.transfer_state(tx, tx.init(params), params, tx, params, growth=record(params, rename=rename))


def test_restart_takes_paths_prefixes_and_labels() -> None:
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "ab": {"kernel": jnp.ones((2, 2))}}
    tx = oxs.per_leaf(optax.adam(1e-3))
    state = aged(tx.init(params))
    fresh = by_path(tx.init(params)[0].mu)
    before = by_path(state[0].mu)

    def restarted(names: Any, **how: Any) -> set[str]:
        now = by_path(oxs.transfer_state(tx, state, params, tx, params, restart=names, **how)[0].mu)
        for path, value in now.items():
            assert np.array_equal(value, before[path]) or np.array_equal(value, fresh[path])
        return {path for path, value in now.items() if np.array_equal(value, fresh[path])}

    assert restarted(("a/bias",)) == {"a/bias"}
    assert restarted(("a",)) == {"a/bias", "a/kernel"}  # and not "ab"
    labels = {"a": {"kernel": "old", "bias": "young"}, "ab": {"kernel": "young"}}
    assert restarted(["young"], growth=record(params, labels=labels)) == {"a/bias", "ab/kernel"}
    with pytest.raises(ValueError, match=r"restart: 'c' is neither a label nor a path; the paths are"):
        restarted(("c",))
    with pytest.raises(ValueError, match=r"restart='a' must be a collection"):
        restarted("a")


def test_restart_takes_labels_of_a_partition_and_minds_the_counter() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = optax.partition({"x": optax.adam(1e-3), "y": optax.adam(1e-3)}, {"a": "x", "b": "y"})
    state = aged(tx.init(params))
    after = oxs.transfer_state(tx, state, params, tx, params, restart=("y",))
    assert_same(after.inner_states["x"], state.inner_states["x"])
    assert_same(after.inner_states["y"], tx.init(params).inner_states["y"])  # the whole group: its counter too
    shared = optax.adam(1e-3)
    with pytest.raises(ValueError, match=r"ScaleByAdamState\.count.*'a' beside 'b'.*per_leaf"):
        oxs.transfer_state(shared, aged(shared.init(params)), params, shared, params, restart=("a",))


def test_bad_mixed_raises() -> None:
    tx, params = optax.adam(1e-3), {"a": jnp.ones(2)}
    with pytest.raises(ValueError, match="mixed='guess' must be"):
        oxs.transfer_state(tx, tx.init(params), params, tx, params, mixed="guess")  # type: ignore[arg-type]


# What equal names could stand for ------------------------------------------------------------


def test_one_of_two_equal_transforms_is_never_chosen_by_guess() -> None:
    params = {"a": jnp.ones(2)}
    two, one = optax.chain(optax.trace(0.9), optax.scale(2.0), optax.trace(0.5)), optax.chain(optax.trace(0.5))
    state = aged(two.init(params))
    with pytest.raises(ValueError, match=r"TraceState\.trace .*could continue any of .*state\[0\].*state\[2\]"):
        oxs.transfer_state(two, state, params, one, params)
    with pytest.raises(ValueError, match=r"TraceState\.trace .*could continue any of"):
        oxs.transfer_state(one, aged(one.init(params)), params, two, params)
    # Where both hold the same there is nothing to choose.
    state = two.init(params)
    assert_same(oxs.transfer_state(two, state, params, one, params), one.init(params))


def test_another_chain_takes_what_it_has_in_common() -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    old = optax.adam(1e-3)
    new = optax.chain(
        optax.clip(1.0),
        optax.MultiSteps(optax.chain(optax.scale_by_adam(), optax.trace(0.9)), 2).gradient_transformation(),
    )
    state = aged(old.init(params))
    after = oxs.transfer_state(old, state, params, new, params)
    assert_same(after[1].inner_opt_state[0], state[0])
    assert_same(after[1].inner_opt_state[1], optax.trace(0.9).init(params))
    back = oxs.transfer_state(new, after, params, old, params)
    assert_same(back, state)


class ActorCritic(NamedTuple):
    """Parameters held in a NamedTuple."""

    actor: Any
    critic: Any


def test_parameters_in_a_named_tuple_are_not_taken_for_state() -> None:
    masks = ActorCritic({"kernel": jnp.eye(3, dtype=bool)}, {"bias": jnp.asarray(True)})
    params = ActorCritic({"kernel": jnp.eye(3)}, {"bias": jnp.ones(2)})
    tx = oxs.sparse(optax.adam(1e-3), masks)
    state = aged(tx.init(params))
    assert_same(oxs.transfer_state(tx, state, params, tx, params), state)
    fuller = ActorCritic({"kernel": jnp.ones((3, 3), bool)}, masks.critic)
    after = oxs.transfer_state(tx, state, params, tx, params, growth=record(params, masks=fuller))
    assert_same(oxs.get_masks(after), fuller)
    grown = params._replace(critic={"bias": jnp.ones(2), "scale": jnp.ones(2)})
    plain = optax.adam(1e-3)
    with pytest.raises(ValueError, match=r"ScaleByAdamState\.count.*'critic/scale'"):
        oxs.transfer_state(plain, aged(plain.init(params)), params, plain, grown)


@pytest.mark.parametrize("params", [jnp.ones(3), [jnp.ones(3), (jnp.ones(2),)], {"s": jnp.ones(()), "v": jnp.ones(2)}])
def test_any_container_of_parameters(params: Any) -> None:
    for tx in (
        optax.adam(1e-3),
        oxs.per_leaf(optax.adam(1e-3)),
        optax.partition({"x": optax.lion(1e-3)}, lambda p: jax.tree.map(lambda _: "x", p)),
    ):
        state = aged(tx.init(params))
        assert_same(oxs.transfer_state(tx, state, jax.eval_shape(lambda: params), tx, params), state)


def test_a_transfer_can_be_traced() -> None:
    params = {"a": jnp.ones(3)}
    tx = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    new = optax.adam(1e-3)
    state = aged(tx.init(params))
    after = jax.jit(lambda state: oxs.transfer_state(tx, state, params, new, params))(state)
    assert_same(after, state[1])


# Hyperparameters, keys, schedules, accumulation ------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda tx: tx, oxs.per_leaf, lambda tx: optax.chain(optax.clip(1.0), tx)])
def test_an_edited_hyperparameter_survives_and_a_new_constant_wins(wrap: Any) -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    inject = optax.inject_hyperparams(optax.adamw)
    tx = wrap(inject(1e-3, weight_decay=0.1))
    edited = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 3 if "learning_rate" in jax.tree_util.keystr(path) else leaf, tx.init(params)
    )

    def rates(state: Any, name: str) -> set[float]:
        leaves = jax.tree_util.tree_leaves_with_path(state)
        return {round(float(leaf), 6) for path, leaf in leaves if f"['{name}']" in jax.tree_util.keystr(path)}

    assert rates(edited, "learning_rate") == {0.003}
    assert_same(oxs.transfer_state(tx, edited, params, tx, params), edited)
    other = wrap(inject(2e-3, weight_decay=0.1))  # built with another rate: that is what is meant
    assert rates(oxs.transfer_state(tx, edited, params, other, params), "learning_rate") == {0.002}
    decay = wrap(inject(1e-3, weight_decay=0.2))
    after = oxs.transfer_state(tx, edited, params, decay, params)
    assert rates(after, "weight_decay") == {0.2} and rates(after, "learning_rate") == {0.003}


def test_hyperparameters_of_groups_do_not_mix() -> None:
    params, adam = {"a": jnp.ones(3), "b": jnp.ones(2)}, optax.inject_hyperparams(optax.adam)

    def make(a: str, b: str) -> Any:
        return optax.partition({"x": adam(0.5), "y": adam(0.25)}, {"a": a, "b": b})

    tx, swapped = make("x", "y"), make("y", "x")
    state = tx.init(params)
    state.inner_states["x"].inner_state.hyperparams["learning_rate"] = jnp.asarray(0.125)
    after = oxs.transfer_state(tx, state, params, swapped, params)
    assert {k: float(v) for k, v in oxs.hyperparams_by_label(after).items()} == {"x": 0.125, "y": 0.25}
    with pytest.raises(ValueError, match=r"name='momentum' is not injected.*'b1'"):
        oxs.hyperparams_by_label(after, "momentum")
    assert oxs.hyperparams_by_label(adam(0.5).init(params)).keys() == {"all"}
    with pytest.raises(ValueError, match="injected are none"):
        oxs.hyperparams_by_label(optax.adam(1e-3).init(params))


def test_hyperparameters_of_nested_groups() -> None:
    params, adam = {"a": jnp.ones(3), "b": jnp.ones(2)}, optax.inject_hyperparams(optax.adam)
    inner = optax.partition({"p": adam(0.5), "q": adam(0.25)}, lambda tree: jax.tree.map(lambda leaf: "p", tree))
    tx = optax.partition({"x": optax.chain(optax.clip(1.0), inner), "y": adam(2.0)}, {"a": "x", "b": "y"})
    found = {k: float(v) for k, v in oxs.hyperparams_by_label(tx.init(params)).items()}
    assert found == {"x/p": 0.5, "x/q": 0.25, "y": 2.0}


def test_noise_keys_and_schedules_go_on() -> None:
    params = {"a": jnp.ones(3)}
    tx = optax.chain(
        oxs.per_leaf(optax.scale_by_adam()), optax.add_noise(0.1, 0.5, key=3), optax.scale_by_schedule(lambda n: 0.5**n)
    )
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update({"a": jnp.ones(3)}, state, params)
    after = oxs.transfer_state(tx, state, params, tx, params | {"b": jnp.ones(2)})
    assert after[1].count == 4 and after[2].count == 4  # the clocks of the run, not of a leaf
    np.testing.assert_array_equal(jax.random.key_data(after[1].rng_key), jax.random.key_data(state[1].rng_key))
    assert {path: int(count) for path, count in after[0].count.items()} == {"a": 4, "b": 0}


def test_growth_amid_an_accumulation_keeps_what_was_accumulated() -> None:
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    tx = optax.MultiSteps(oxs.per_leaf(optax.adam(1e-3)), 3)
    state = tx.init(params)
    for _ in range(4):  # one step taken, one gradient of the next three in
        _, state = tx.update({"a": jnp.array([1.0, 2.0, 3.0]), "b": jnp.ones(2)}, state, params)
    grown = {"a": jnp.ones(4), "b": jnp.ones(2), "c": jnp.ones(2)}
    index = np.array([2, -1, 0, 1], np.int32)
    sources = {"a": (index,), "c": (np.full(2, -1, np.int32),)}
    plain = tx.gradient_transformation()
    after = oxs.transfer_state(plain, state, params, plain, grown, growth=record(grown, sources))
    assert (int(after.mini_step), int(after.gradient_step)) == (1, 1)
    np.testing.assert_array_equal(after.acc_grads["a"], np.asarray(state.acc_grads["a"])[[2, 0, 0, 1]] * [1, 0, 1, 1])
    np.testing.assert_array_equal(after.acc_grads["c"], 0)
    assert {k: int(v) for k, v in after.inner_opt_state[0].count.items()} == {"a": 1, "b": 1, "c": 0}


# A slow second implementation ------------------------------------------------------------


class Story(NamedTuple):
    """Random leaves, and where every row of the new ones comes from."""

    old: dict[str, tuple[int, ...]]
    sources: dict[str, tuple[tuple[int, ...], ...]]
    labels: dict[str, tuple[str, str]]
    seed: int


@st.composite
def stories(draw: Any) -> Story:
    old: dict[str, tuple[int, ...]] = {}
    sources, labels = {}, {}
    for name in draw(st.sampled_from(["a", "ab", "abc"])):
        shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=3)))
        fresh = draw(st.booleans()) and bool(old)
        if not fresh:
            old[name] = shape
        sources[name] = tuple(
            tuple(draw(st.lists(st.integers(-1, -1 if fresh else n - 1), min_size=2, max_size=3))) for n in shape
        )
        labels[name] = (draw(st.sampled_from("xy")), draw(st.sampled_from("xy")))
    return Story(old, sources, labels, draw(st.integers(0, 2**16)))


def slow(old: np.ndarray, sources: tuple[tuple[int, ...], ...], fill: bool) -> np.ndarray:
    """Entry by entry; where nothing is carried 0, or with ``fill`` the mean of what was."""
    new = np.zeros([len(index) for index in sources])
    carried = np.zeros(new.shape, bool)
    for place in np.ndindex(new.shape):
        origin = tuple(index[p] for index, p in zip(sources, place, strict=True))
        if min(origin) >= 0:
            new[place], carried[place] = old[origin], True
    if fill and carried.any():
        new[~carried] = new[carried].mean()
    return new


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(stories())
def test_a_transfer_is_what_a_slow_reference_says(story: Story) -> None:
    old = {name: jnp.zeros(shape) for name, shape in story.old.items()}
    new = {name: jnp.zeros([len(index) for index in sources]) for name, sources in story.sources.items()}
    labels = [{name: pair[i] for name, pair in story.labels.items()} for i in (0, 1)]

    def make(labels: Any) -> Any:
        inner = optax.chain(optax.trace(0.9), optax.scale_by_adam())
        return optax.chain(oxs.per_leaf(inner), oxs.scale_by_label({"x": 1.0, "y": 2.0}, labels))

    tx, new_tx = make({name: labels[0][name] for name in old}), make(labels[1])
    state = aged(tx.init(old), story.seed)
    state = (state[0], state[1]._replace(label=tx.init(old)[1].label))
    sources = {name: tuple(np.asarray(i, np.int32) for i in index) for name, index in story.sources.items()}
    growth = record(new, sources, labels=labels[1])
    (trace, adam), clock = oxs.transfer_state(tx, state, old, new_tx, new, growth=growth)
    for name, index in story.sources.items():
        if name not in old:
            assert (adam.count[name], clock.count - clock.since[name]) == (0, 0)
            assert not np.any(trace.trace[name]) and not np.any(adam.mu[name]) and not np.any(adam.nu[name])
            continue
        (old_trace, old_adam), old_clock = state
        np.testing.assert_array_equal(trace.trace[name], slow(np.asarray(old_trace.trace[name]), index, False))
        np.testing.assert_array_equal(adam.mu[name], slow(np.asarray(old_adam.mu[name]), index, False))
        np.testing.assert_allclose(adam.nu[name], slow(np.asarray(old_adam.nu[name]), index, True), rtol=1e-6)
        assert adam.count[name] == old_adam.count[name]
        same = story.labels[name][0] == story.labels[name][1]
        assert clock.count - clock.since[name] == (old_clock.count - old_clock.since[name] if same else 0)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_there_and_back_through_permutations_is_the_identity(data: Any) -> None:
    shapes = {"u": (4,), "v": (3, 4), "w": (2, 3, 2)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    moved = {name: [data.draw(st.permutations(range(n))) for n in shape] for name, shape in shapes.items()}

    def sources(inverse: bool) -> dict[str, tuple[np.ndarray, ...]]:
        return {
            name: tuple(np.argsort(index) if inverse else np.asarray(index, np.int32) for index in axes)
            for name, axes in moved.items()
        }

    tx = optax.chain(optax.trace(0.9), optax.amsgrad(1e-3))
    state = aged(tx.init(params))
    there = oxs.transfer_state(tx, state, params, tx, params, growth=record(params, sources(False)))
    np.testing.assert_array_equal(there[0].trace["v"], np.asarray(state[0].trace["v"])[np.ix_(*moved["v"])])
    assert_same(oxs.transfer_state(tx, there, params, tx, params, growth=record(params, sources(True))), state)
