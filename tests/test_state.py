"""Optimizer state through every change of structure, for a table of optax transforms and chains.

States are filled with numbers that are all different, so that an array that lands in a wrong place is seen, and read by
their key paths, which for one transformation are the same before and after a change: no code is shared with the
library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import optax_structure as oxs
from optax_structure.structure import Growth, Units

PARAMS = {
    "a": {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "bias": jnp.linspace(0.1, 0.4, 4)},
    "b": {"kernel": jnp.linspace(-0.5, 0.7, 8).reshape(4, 2), "bias": jnp.array([0.3, -0.3])},
}
C = {"kernel": jnp.linspace(0.2, 0.9, 4).reshape(2, 2), "bias": jnp.array([0.6, -0.6])}
D = {"kernel": jnp.linspace(-0.2, 0.3, 4).reshape(2, 2), "bias": jnp.array([0.8, -0.8])}
WARMUP = optax.linear_schedule(0.0, 1.0, 5)


def first_part(path: Any, leaf: Any) -> str:
    del leaf
    return path[0].key


def by_part(labels: Mapping[str, str]) -> Callable[[Any], Any]:
    """A label function: the label of a leaf is that of the part of the network it stands in."""
    return lambda params: jax.tree_util.tree_map_with_path(lambda path, leaf: labels[first_part(path, leaf)], params)


def checkered(params: Any) -> Any:
    """Kernels have every other connection, other leaves are not sparse."""

    def mask(leaf: Any) -> jax.Array:
        if leaf.ndim < 2:
            return jnp.asarray(True)
        return (jnp.arange(leaf.shape[0])[:, None] + jnp.arange(leaf.shape[1])) % 2 == 0

    return jax.tree.map(mask, params)


class Case(NamedTuple):
    """A transformation, and the class of the state whose counter (or estimate) its leaves share, if there is one."""

    make: Callable[[], Any]
    shared: str = ""
    per_leaf: bool = True  # whether it can be run leaf by leaf
    masked: bool = False  # whether kernels are sparse, with the masks of `checkered`
    wrappable: bool = True  # whether its state has a name of its own for every array, in whatever chain it stands


TRANSFORMS: dict[str, Case] = {
    "adam": Case(lambda: optax.adam(1e-3), "ScaleByAdamState"),
    "adamw": Case(lambda: optax.adamw(1e-3), "ScaleByAdamState"),
    "adam_schedule": Case(lambda: optax.adam(WARMUP), "ScaleByAdamState"),
    "amsgrad": Case(lambda: optax.amsgrad(1e-3), "ScaleByAmsgradState"),
    "adamax": Case(lambda: optax.adamax(1e-3), "ScaleByAdamState"),
    "adamaxw": Case(lambda: optax.adamaxw(1e-3), "ScaleByAdamState"),
    "nadam": Case(lambda: optax.nadam(1e-3), "ScaleByAdamState"),
    "adabelief": Case(lambda: optax.adabelief(1e-3), "ScaleByBeliefState"),
    "adan": Case(lambda: optax.adan(1e-3), "ScaleByAdanState"),
    "yogi": Case(lambda: optax.yogi(1e-3), "ScaleByAdamState"),
    "radam": Case(lambda: optax.radam(1e-3), "ScaleByAdamState"),
    "lamb": Case(lambda: optax.lamb(1e-3), "ScaleByAdamState"),
    "lars": Case(lambda: optax.lars(1e-3)),
    "lion": Case(lambda: optax.lion(1e-3), "ScaleByLionState"),
    "sgd": Case(lambda: optax.sgd(1e-3)),
    "sgd_schedule": Case(lambda: optax.sgd(WARMUP)),
    "momentum": Case(lambda: optax.sgd(1e-3, momentum=0.9)),
    "nesterov": Case(lambda: optax.sgd(1e-3, momentum=0.9, nesterov=True)),
    "sign_sgd": Case(lambda: optax.sign_sgd(1e-3)),
    "rmsprop": Case(lambda: optax.rmsprop(1e-3)),
    "rmsprop_corrected": Case(lambda: optax.rmsprop(1e-3, bias_correction=True), "ScaleByRmsWithCountState"),
    "rmsprop_centered": Case(lambda: optax.rmsprop(1e-3, centered=True, momentum=0.9)),
    "adagrad": Case(lambda: optax.adagrad(1e-3)),
    "adadelta": Case(lambda: optax.adadelta(1e-3)),
    "novograd": Case(lambda: optax.novograd(1e-3), "ScaleByNovogradState"),
    "adafactor": Case(lambda: optax.adafactor(1e-3), "FactoredState"),
    "adafactor_factored": Case(lambda: optax.adafactor(1e-3, min_dim_size_to_factor=2), "FactoredState"),
    "rprop": Case(lambda: optax.rprop(1e-3)),
    "fromage": Case(lambda: optax.fromage(1e-3)),
    "noisy_sgd": Case(lambda: optax.noisy_sgd(1e-3, key=7)),
    "optimistic": Case(lambda: optax.optimistic_gradient_descent(1e-3)),
    "ema": Case(lambda: optax.chain(optax.ema(0.9), optax.scale(-1e-3)), "EmaState"),
    "add_noise": Case(lambda: optax.chain(optax.add_noise(0.1, 0.5, key=3), optax.scale(-1e-3))),
    "apply_every": Case(lambda: optax.chain(optax.apply_every(3), optax.scale(-1e-3)), "ApplyEvery"),
    "muon": Case(lambda: contrib.muon(1e-3), "(ScaleByAdamState|MuonState)", per_leaf=False),
    "ademamix": Case(lambda: contrib.ademamix(1e-3), "ScaleByAdemamixState"),
    "simplified_ademamix": Case(lambda: contrib.simplified_ademamix(1e-3), "ScaleBySimplifiedAdEMAMixState"),
    "adopt": Case(lambda: contrib.adopt(1e-3), "ScaleByAdamState"),
    "acprop": Case(lambda: contrib.acprop(1e-3), "ScaleByBeliefState"),
    "madgrad": Case(lambda: contrib.madgrad(1e-3), "MadgradState"),
    "prodigy": Case(lambda: contrib.prodigy(), "ProdigyState"),
    "dadapt_adamw": Case(lambda: contrib.dadapt_adamw(), "DAdaptAdamWState"),
    "dog": Case(lambda: contrib.dog(), "DoGState"),
    "dowg": Case(lambda: contrib.dowg(), "DoWGState"),
    "cocob": Case(lambda: contrib.cocob()),
    "momo": Case(lambda: contrib.momo(1e-3), "MomoState"),
    "momo_adam": Case(lambda: contrib.momo_adam(1e-3), "MomoAdamState"),
    "schedule_free_sgd": Case(lambda: contrib.schedule_free_sgd(1e-3), "ScheduleFreeState"),
}

CHAINS: dict[str, Case] = {
    "clip_adam": Case(lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), "ScaleByAdamState"),
    "multi_steps": Case(lambda: optax.MultiSteps(optax.adam(1e-3), 3).gradient_transformation(), "ScaleByAdamState"),
    "inject": Case(lambda: optax.inject_hyperparams(optax.adamw)(1e-3), "ScaleByAdamState"),
    "inject_schedule": Case(lambda: optax.inject_hyperparams(optax.adam)(WARMUP), "ScaleByAdamState"),
    "apply_if_finite": Case(lambda: optax.apply_if_finite(optax.adam(1e-3), 3), "ScaleByAdamState"),
    "named_chain": Case(
        lambda: optax.named_chain(("kernel", optax.trace(0.9)), ("a", optax.adam(1e-3))), "ScaleByAdamState"
    ),
    "plateau": Case(lambda: optax.chain(optax.adam(1e-3), contrib.reduce_on_plateau()), "ScaleByAdamState"),
    "schedule_free_adamw": Case(lambda: contrib.schedule_free_adamw(1e-3), "ScheduleFreeState"),
    "mechanize": Case(lambda: contrib.mechanize(optax.adam(1e-3)), "(ScaleByAdamState|MechanicState)"),
    "conditionally_mask": Case(
        lambda: optax.conditionally_mask(optax.adam(1e-3), lambda step: step % 2 == 0), "ScaleByAdamState"
    ),
    "conditionally_transform": Case(
        lambda: optax.conditionally_transform(optax.adam(1e-3), lambda step: step % 2 == 0), "ScaleByAdamState"
    ),
    "two_traces": Case(lambda: optax.chain(optax.trace(0.9), optax.scale(0.5), optax.trace(0.5))),
    "masked_decay": Case(
        lambda: optax.chain(
            optax.masked(optax.trace(0.5), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), optax.lion(1.0)
        ),
        "ScaleByLionState",
        per_leaf=False,
    ),
    "partition": Case(
        lambda: optax.partition(
            {"even": optax.adam(1e-3), "odd": optax.sgd(WARMUP, momentum=0.9)},
            by_part({"a": "even", "b": "odd", "c": "even"}),
        ),
        "ScaleByAdamState",
        per_leaf=False,
    ),
    "partition_muon": Case(
        lambda: optax.partition(
            {"even": contrib.muon(1e-3), "odd": optax.adam(1e-3)}, by_part({"a": "even", "b": "odd", "c": "even"})
        ),
        "(ScaleByAdamState|MuonState)",
        per_leaf=False,
    ),
    "two_partitions": Case(
        lambda: optax.chain(
            optax.partition({"x": optax.trace(0.9), "y": optax.trace(0.8)}, by_part({"a": "x", "b": "y", "c": "x"})),
            optax.partition({"p": optax.trace(0.7), "q": optax.trace(0.6)}, by_part({"a": "p", "b": "q", "c": "q"})),
        ),
        per_leaf=False,
    ),
    "per_leaf_chain": Case(
        lambda: oxs.per_leaf(optax.chain(optax.scale_by_adam(), optax.trace(0.5), optax.scale_by_schedule(WARMUP))),
        wrappable=False,
    ),
    "sparse": Case(lambda: oxs.sparse(oxs.per_leaf(optax.adamw(1e-3)), checkered), per_leaf=False, masked=True),
    "sparse_in_partition": Case(
        lambda: optax.partition(
            {"even": oxs.sparse(optax.adam(1e-3), checkered), "odd": oxs.sparse(optax.lion(1e-3), checkered)},
            by_part({"a": "even", "b": "odd", "c": "even"}),
        ),
        "ScaleByAdamState",
        per_leaf=False,
        masked=True,
    ),
    "partition_in_sparse": Case(
        lambda: oxs.sparse(
            optax.partition(
                {"even": optax.adam(1e-3), "odd": optax.lion(1e-3)}, by_part({"a": "even", "b": "odd", "c": "even"})
            ),
            checkered,
        ),
        "ScaleByAdamState",
        per_leaf=False,
        masked=True,
    ),
    "multipliers": Case(
        lambda: optax.chain(
            oxs.per_leaf(optax.scale_by_adam()),
            oxs.scale_by_label({"new": WARMUP, "old": 0.1}, by_part({"a": "old", "b": "new", "c": "new"})),
            oxs.scale_by_age(WARMUP),
            optax.scale_by_learning_rate(1e-3),
        ),
        per_leaf=False,
    ),
}
CASES = TRANSFORMS | CHAINS

CANNOT: dict[str, tuple[Callable[[], Any], str]] = {
    "sm3": (lambda: optax.sm3(1e-3), "ScaleBySM3State"),
    "lbfgs": (lambda: optax.lbfgs(), "ScaleByLBFGSState"),
    "line_search": (
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
        "ScaleByBacktrackingLinesearchState",
    ),
    "monitor": (lambda: optax.chain(optax.monitor({"norm": optax.tree.norm}), optax.adam(1e-3)), "MonitorState"),
    "flatten": (lambda: optax.flatten(optax.adam(1e-3)), "ScaleByAdamState"),
}

# Their states are of the kinds of others: the same fields, under another rule or another name.
SLOW = {
    "adamw", "adam_schedule", "adamax", "adamaxw", "nadam", "adan", "yogi", "radam", "lamb", "lars", "nesterov",
    "sign_sgd", "rmsprop", "rmsprop_corrected", "adagrad", "adafactor", "rprop", "fromage", "optimistic", "add_noise",
    "simplified_ademamix", "adopt", "acprop", "dadapt_adamw", "dowg", "momo", "momo_adam", "clip_adam",
    "inject_schedule", "conditionally_transform", "sparse_in_partition",
}  # fmt: skip


def named(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]
    )


all_cases = named(CASES)
shared_cases = named(name for name, case in CASES.items() if case.shared)
leaf_cases = named(name for name, case in CASES.items() if case.per_leaf)
optimizers = named(TRANSFORMS)


def bits(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def by_key(state: Any) -> dict[str, np.ndarray]:
    """Every array of a state by its key path."""
    return {jax.tree_util.keystr(path): bits(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def aged(state: Any, seed: int = 0, *, alike: bool = False) -> Any:
    """The state with other numbers in it, every one different; ``alike``: one number for all scalars."""
    rng = np.random.default_rng(seed)

    def age(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.fold_in(leaf, 5)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            drawn = 0.625 if alike and not leaf.ndim else rng.uniform(0.5, 1.5, leaf.shape)
            return jnp.asarray(drawn, leaf.dtype)
        return leaf + (7 if alike else int(rng.integers(5, 1000))) if leaf.dtype == jnp.int32 else leaf

    return jax.tree.map(age, state)


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    after, before = by_key(actual), by_key(expected)
    assert list(after) == list(before)
    for key, value in before.items():
        assert after[key].dtype == value.dtype, key
        np.testing.assert_array_equal(after[key], value, err_msg=key, strict=True)


def assert_runs_on(tx: Any, state: Any, params: Any) -> None:
    """The state is one that ``tx`` can go on from, and its structure is that of a fresh one."""
    fresh = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)


def unmoved(params: Any) -> dict[str, tuple[np.ndarray, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(np.arange(n, dtype=np.int32) for n in leaf.shape)
        for path, leaf in leaves
    }


def growth_of(params: Any, labels: Any = None, masks: Any = None, sources: Any = None, rename: Any = None) -> Growth:
    """A record of a change, written by hand."""
    return Growth(
        params=params,
        labels=labels if labels is not None else jax.tree.map(lambda _: "scaffold", params),
        masks=masks if masks is not None else jax.tree.map(lambda _: True, params),
        units=Units(()),
        rename=rename or {},
        sources=unmoved(params) | (sources or {}),
        born=jax.tree.map(lambda _: np.uint8(255), params),
    )


def of_part(key: str, *parts: str) -> bool:
    return any(f"['{part}']['kernel']" in key or f"['{part}']['bias']" in key for part in parts)


# Identity ------------------------------------------------------------


def test_the_table_is_as_long_as_promised() -> None:
    assert len(TRANSFORMS) >= 26 and len(CHAINS) >= 8


@all_cases
def test_identity_keeps_every_bit(name: str) -> None:
    tx = CASES[name].make()
    state = aged(tx.init(PARAMS))
    assert_same(oxs.transfer_state(tx, state, PARAMS, tx, PARAMS), state)
    # The same transformation built anew, as after a restart.
    assert_same(oxs.transfer_state(tx, state, PARAMS, CASES[name].make(), PARAMS), state)


@all_cases
def test_a_record_of_no_change_keeps_every_bit(name: str) -> None:
    case = CASES[name]
    tx = case.make()
    state = aged(tx.init(PARAMS))
    growth = growth_of(PARAMS, masks=oxs.get_masks(state) if case.masked else None)
    assert_same(oxs.transfer_state(tx, state, PARAMS, tx, PARAMS, growth=growth), state)


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_carried_raises_and_names_the_state(name: str) -> None:
    make, state_name = CANNOT[name]
    tx = make()
    state = tx.init(PARAMS)
    if name == "monitor":  # its state gets another structure with the first update
        _, state = tx.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match=rf"cannot be carried.*{state_name}"):
        oxs.transfer_state(tx, state, PARAMS, tx, PARAMS)


def test_what_has_no_rows_to_move_raises_and_names_the_state() -> None:
    tx = contrib.galore(1e-3, rank=2)
    state = aged(tx.init(PARAMS))
    assert_same(oxs.transfer_state(tx, state, PARAMS, tx, PARAMS), state)
    with pytest.raises(ValueError, match=r"(GaLore|ScaleByAdam)State\.\w+ .*'a/kernel'.*its rows cannot be moved"):
        oxs.transfer_state(tx, state, PARAMS, tx, WIDE, growth=growth_of(WIDE, sources=WIDE_SOURCES))


# A fresh leaf ------------------------------------------------------------


@shared_cases
def test_a_shared_counter_raises_and_names_itself_the_leaves_and_per_leaf(name: str) -> None:
    tx = CASES[name].make()
    state = aged(tx.init(PARAMS))
    with pytest.raises(ValueError, match=rf"{CASES[name].shared}\.\w+ \(state.*'c/bias'.*'a/bias'.*per_leaf"):
        oxs.transfer_state(tx, state, PARAMS, tx, PARAMS | {"c": C})


@all_cases
def test_a_fresh_leaf_is_fresh_and_the_others_are_not_touched(name: str) -> None:
    tx, grown = CASES[name].make(), PARAMS | {"c": C}
    state = aged(tx.init(PARAMS))
    after = oxs.transfer_state(tx, state, PARAMS, tx, grown, mixed="carry")
    assert_runs_on(tx, after, grown)
    before, now, fresh = by_key(state), by_key(after), by_key(tx.init(grown))
    for key, value in now.items():
        assert (key in before) != of_part(key, "c"), key
        born = key.partition(".since")
        expected = now[born[0] + ".count"] if born[1] and of_part(key, "c") else fresh[key]  # on a clock: born now
        np.testing.assert_array_equal(value, before.get(key, expected), err_msg=key)
    if not CASES[name].shared:
        assert_same(oxs.transfer_state(tx, state, PARAMS, tx, grown), after)


@shared_cases
def test_mixed_fresh_starts_only_the_shared_values_again(name: str) -> None:
    tx, grown = CASES[name].make(), PARAMS | {"c": C}
    state = aged(tx.init(PARAMS))
    carried = by_key(oxs.transfer_state(tx, state, PARAMS, tx, grown, mixed="carry"))
    now = by_key(oxs.transfer_state(tx, state, PARAMS, tx, grown, mixed="fresh"))
    fresh = by_key(tx.init(grown))
    # Booleans (dog's first step) are what they are in every state here.
    restarted = [key for key, value in now.items() if not np.array_equal(value, carried[key])]
    assert restarted or carried.keys() == {key for key in now if now[key].dtype == bool or of_part(key, "a", "b", "c")}
    for key in restarted:
        assert not of_part(key, "a", "b", "c")
        np.testing.assert_array_equal(now[key], fresh[key], err_msg=key)


@leaf_cases
def test_under_per_leaf_growth_never_raises(name: str) -> None:
    tx, grown = oxs.per_leaf(CASES[name].make()), PARAMS | {"c": C}
    state = aged(tx.init(PARAMS))
    after = oxs.transfer_state(tx, state, PARAMS, tx, grown)
    assert_runs_on(tx, after, grown)
    before, fresh = by_key(state), by_key(tx.init(grown))
    for key, value in by_key(after).items():
        assert of_part(key, "a", "b", "c"), key
        np.testing.assert_array_equal(value, fresh[key] if of_part(key, "c") else before[key], err_msg=key)


def test_per_leaf_refuses_what_depends_on_the_leaf() -> None:
    with pytest.raises(ValueError, match="muon"):
        oxs.per_leaf(contrib.muon(1e-3)).init(PARAMS)


# A widened leaf ------------------------------------------------------------

UNITS = np.array([2, 0, -1, 3, -1, -1], np.int32)  # unit 1 is gone, units 0, 2, 3 moved, three are new
WIDE_SOURCES = {
    "a/kernel": (np.arange(3, dtype=np.int32), UNITS),
    "a/bias": (UNITS,),
    "b/kernel": (UNITS, np.arange(2, dtype=np.int32)),
}
WIDE = {
    "a": {"kernel": jnp.linspace(-1.0, 1.0, 18).reshape(3, 6), "bias": jnp.linspace(0.1, 0.6, 6)},
    "b": {"kernel": jnp.linspace(-0.5, 0.7, 12).reshape(6, 2), "bias": PARAMS["b"]["bias"]},
}
SQUARES = ("nu", "nu_max", "exp_avg_sq", "n", "v_row", "v_col")


def gathered(value: np.ndarray, axes: tuple[int, ...], new: Any) -> np.ndarray:
    """``value`` with the units of ``UNITS`` along ``axes``, and ``new`` (an array or a number) where they are -1."""
    where = np.ones([1] * value.ndim, bool)
    for axis in axes:
        value = np.take(value, np.maximum(UNITS, 0), axis)
        where = where & (UNITS >= 0).reshape([-1 if d == axis else 1 for d in range(value.ndim)])
    return np.where(where, value, new).astype(value.dtype)


def wide_masks(masks: Any) -> Any:
    """Masks of the widened net: connections of new units all exist."""
    return {
        "a": {"kernel": jnp.asarray(gathered(np.asarray(masks["a"]["kernel"]), (1,), True)), "bias": jnp.asarray(True)},
        "b": {"kernel": jnp.asarray(gathered(np.asarray(masks["b"]["kernel"]), (0,), True)), "bias": jnp.asarray(True)},
    }


@all_cases
def test_a_widened_leaf_moves_its_rows(name: str) -> None:
    case = CASES[name]
    tx = case.make()
    state = aged(tx.init(PARAMS))
    masks = wide_masks(checkered(PARAMS)) if case.masked else None
    after = oxs.transfer_state(tx, state, PARAMS, tx, WIDE, growth=growth_of(WIDE, masks=masks, sources=WIDE_SOURCES))
    assert_runs_on(tx, after, WIDE)
    before, fresh = by_key(state), by_key(tx.init(WIDE))
    for key, value in by_key(after).items():
        old = before[key]
        leaf = re.search(r"\['([ab])'\]\['(kernel|bias)'\]$", key)
        path = "/".join(leaf.groups()) if leaf else ""
        field = re.sub(r".*[.\]](\w+)\['[ab]'\]\['\w+'\]$", r"\1", key) if leaf else ""
        if ".masks" in key:
            assert masks is not None and leaf is not None
            np.testing.assert_array_equal(value, masks[leaf[1]][leaf[2]])
            continue
        if path not in WIDE_SOURCES or value.shape == old.shape:  # a scalar a leaf, a factor along the other axis
            np.testing.assert_array_equal(value, old, err_msg=key)
            continue
        axes = tuple(axis for axis, (then, now) in enumerate(zip(old.shape, value.shape, strict=True)) if then != now)
        living = np.isin(np.arange(4), UNITS)
        living = living.reshape([-1 if d == axes[0] else 1 for d in range(old.ndim)]) & np.ones(old.shape, bool)
        if case.masked and old.ndim == 2:
            living = living & np.asarray(checkered(PARAMS)[leaf[1]][leaf[2]])
        adafactor = "adafactor" in name and field == "v"
        expected = gathered(old, axes, old[living].mean() if field in SQUARES or adafactor else fresh[key])
        carried = gathered(np.ones(old.shape), axes, 0.0) == 1.0
        np.testing.assert_array_equal(value[carried], expected[carried], err_msg=key)
        np.testing.assert_allclose(value[~carried], expected[~carried], rtol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["adam", "lion", "momentum", "sparse", "multi_steps"])
def test_a_widened_leaf_without_a_record_raises(name: str) -> None:
    tx = CASES[name].make()
    with pytest.raises(ValueError, match=r"'a/bias' has shape \(6,\) and had \(4,\).*growth=.*restart=\('a/bias',\)"):
        oxs.transfer_state(tx, tx.init(PARAMS), PARAMS, tx, WIDE)


# A second growth under the same label ------------------------------------------------------------


def with_warmup(name: str, labels: Mapping[str, str]) -> Any:
    return optax.chain(CASES[name].make(), oxs.scale_by_label({"scaffold": 0.5, "new": WARMUP}, by_part(labels)))


@optimizers
def test_a_second_growth_starts_its_warmup_again_as_a_multiplier(name: str) -> None:
    old = {"a": "scaffold", "b": "scaffold"}
    first, once = with_warmup(name, old | {"c": "new"}), PARAMS | {"c": C}
    state = aged(first.init(once))
    state = (state[0], state[1]._replace(label=first.init(once)[1].label))  # labels' codes are no numbers to change
    twice = once | {"d": D}

    for c_label in ("scaffold", "new"):  # c has warmed up and is relabelled, or it is still at it
        second = with_warmup(name, old | {"c": c_label, "d": "new"})
        after = oxs.transfer_state(first, state, once, second, twice, mixed="carry")
        assert_runs_on(second, after, twice)
        before, fresh, now = by_key(state), by_key(second.init(twice)), by_key(after)
        for key, value in now.items():
            if key.startswith("[1].label"):
                expected = fresh[key]
            elif key.startswith("[1].since"):  # a leaf's age is the count less this
                stays = of_part(key, "a", "b") or (c_label == "new" and of_part(key, "c"))
                expected = before[key] if stays else before["[1].count"]
            else:
                expected = before.get(key, fresh[key])
            np.testing.assert_array_equal(value, expected, err_msg=key)


@optimizers
def test_a_second_growth_starts_its_warmup_again_as_a_partition(name: str) -> None:
    def make(labels: Mapping[str, str]) -> Any:
        inner = CASES[name].make
        groups = {"scaffold": optax.chain(inner()), "new": optax.chain(inner(), optax.scale_by_schedule(WARMUP))}
        return optax.partition(groups, by_part({"a": "scaffold", "b": "scaffold"} | labels))

    first, second, once = make({"c": "new"}), make({"c": "scaffold", "d": "new"}), PARAMS | {"c": C}
    state, twice = aged(first.init(once)), once | {"d": D}
    labels = by_part({"a": "scaffold", "b": "scaffold", "c": "scaffold", "d": "new"})(twice)
    growth = growth_of(twice, labels=labels)
    if CASES[name].shared:
        with pytest.raises(ValueError, match=rf"{CASES[name].shared}.*per_leaf"):
            oxs.transfer_state(first, state, once, second, twice, growth=growth)
    after = oxs.transfer_state(first, state, once, second, twice, growth=growth, mixed="carry")
    assert_runs_on(second, after, twice)
    before, fresh = by_key(state), by_key(second.init(twice))
    for key, value in by_key(after).items():
        if "['new']" in key:  # its one leaf is fresh, so everything of the group is
            expected = fresh[key]
        elif of_part(key, "c"):
            expected = before[key.replace("['scaffold']", "['new']", 1)]
        else:
            expected = before[key]
        np.testing.assert_array_equal(value, expected, err_msg=key)


# Relabelling there and back ------------------------------------------------------------


def two_groups(make: Callable[[], Any], a: str, b: str) -> Any:
    return optax.partition({"x": make(), "y": make()}, by_part({"a": a, "b": b}))


CLOCKS = ("sgd_schedule", "noisy_sgd", "add_noise")  # no array of theirs follows the parameters


@named(name for name in TRANSFORMS if name not in CLOCKS)
def test_a_whole_group_goes_to_another_and_back(name: str) -> None:
    x, y = (two_groups(CASES[name].make, label, label) for label in "xy")
    state = aged(x.init(PARAMS))
    there = oxs.transfer_state(x, state, PARAMS, y, PARAMS)
    before = by_key(state)
    for key, value in by_key(there).items():
        if "['y']" in key:
            np.testing.assert_array_equal(value, before[key.replace("['y']", "['x']", 1)], err_msg=key)
    back = oxs.transfer_state(y, there, PARAMS, x, PARAMS)
    # What was in group y before no leaf had used; all of x is as it was.
    assert [
        key for key, value in by_key(back).items() if "['x']" in key and not np.array_equal(value, before[key])
    ] == []


@pytest.mark.parametrize("name", CLOCKS)
def test_a_clock_that_no_leaf_shows_the_use_of_stays_with_its_group(name: str) -> None:
    x, y = (two_groups(CASES[name].make, label, label) for label in "xy")
    state = aged(x.init(PARAMS))
    assert_same(oxs.transfer_state(x, state, PARAMS, y, PARAMS), state)


@optimizers
def test_leaves_swap_groups_and_back(name: str) -> None:
    one, other = two_groups(CASES[name].make, "x", "y"), two_groups(CASES[name].make, "y", "x")
    state = aged(one.init(PARAMS), alike=True)
    there = oxs.transfer_state(one, state, PARAMS, other, PARAMS)
    assert_runs_on(other, there, PARAMS)
    swap = str.maketrans("xy", "yx")
    before = by_key(state)
    for key, value in by_key(there).items():
        if of_part(key, "a", "b"):
            head, label, rest = re.match(r"(.*?inner_states\[')(\w)('\].*)", key).groups()
            np.testing.assert_array_equal(value, before[head + label.translate(swap) + rest], err_msg=key)
    assert_same(oxs.transfer_state(other, there, PARAMS, one, PARAMS), state)


@named(name for name, case in TRANSFORMS.items() if case.per_leaf)
def test_leaves_of_any_age_swap_groups_under_per_leaf(name: str) -> None:
    def make() -> Any:
        return oxs.per_leaf(CASES[name].make())

    one, other = two_groups(make, "x", "y"), two_groups(make, "y", "x")
    state = aged(one.init(PARAMS))
    there = oxs.transfer_state(one, state, PARAMS, other, PARAMS)
    assert_same(oxs.transfer_state(other, there, PARAMS, one, PARAMS), state)


@named(name for name, case in CASES.items() if case.wrappable)
def test_wrapping_and_unwrapping_keeps_every_bit(name: str) -> None:
    tx = CASES[name].make()
    state = aged(tx.init(PARAMS))
    for wrapped in (
        optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(0.5)),
        optax.partition({"all": tx}, lambda params: jax.tree.map(lambda _: "all", params)),
        optax.masked(tx, lambda params: jax.tree.map(lambda _: True, params)),
    ):
        there = oxs.transfer_state(tx, state, PARAMS, wrapped, PARAMS)
        assert_same(oxs.transfer_state(wrapped, there, PARAMS, tx, PARAMS), state)


# Freezing ------------------------------------------------------------


def frozen(make: Callable[[], Any], *parts: str) -> Any:
    labels = {part: "frozen" if part in parts else "train" for part in "ab"}
    return optax.partition({"train": make(), "frozen": optax.set_to_zero()}, by_part(labels))


@optimizers
def test_freezing_and_thawing(name: str) -> None:
    case = CASES[name]
    thawed, half = frozen(case.make), frozen(case.make, "b")
    state = aged(thawed.init(PARAMS))
    froze = oxs.transfer_state(thawed, state, PARAMS, half, PARAMS)
    assert_runs_on(half, froze, PARAMS)
    before = by_key(state)
    for key, value in by_key(froze).items():  # a frozen leaf has no state; nothing else changes, counters included
        assert not of_part(key, "b")
        np.testing.assert_array_equal(value, before[key], err_msg=key)

    froze = aged(froze, seed=1)
    if case.shared:
        with pytest.raises(ValueError, match=rf"{case.shared}.*'b/bias'.*per_leaf"):
            oxs.transfer_state(half, froze, PARAMS, thawed, PARAMS)
    after = oxs.transfer_state(half, froze, PARAMS, thawed, PARAMS, mixed="carry")
    before, fresh = by_key(froze), by_key(thawed.init(PARAMS))
    for key, value in by_key(after).items():
        np.testing.assert_array_equal(value, fresh[key] if of_part(key, "b") else before[key], err_msg=key)


@named(name for name, case in TRANSFORMS.items() if case.per_leaf)
def test_under_per_leaf_thawing_never_raises(name: str) -> None:
    def make() -> Any:
        return oxs.per_leaf(CASES[name].make())

    thawed, half = frozen(make), frozen(make, "b")
    state = aged(half.init(PARAMS))
    after = oxs.transfer_state(half, state, PARAMS, thawed, PARAMS)
    before, fresh = by_key(state), by_key(thawed.init(PARAMS))
    for key, value in by_key(after).items():
        np.testing.assert_array_equal(value, fresh[key] if of_part(key, "b") else before[key], err_msg=key)


@pytest.mark.parametrize("name", ["adam", "sgd_schedule", "lion", "prodigy", "noisy_sgd", "muon"])
def test_a_group_that_empties_keeps_its_counters(name: str) -> None:
    thawed, all_frozen = frozen(CASES[name].make), frozen(CASES[name].make, "a", "b")
    state = aged(thawed.init(PARAMS))
    froze = oxs.transfer_state(thawed, state, PARAMS, all_frozen, PARAMS)
    before = by_key(state)
    kept = by_key(froze)
    assert {key for key in before if not of_part(key, "a", "b")} == set(kept)
    for key, value in kept.items():
        np.testing.assert_array_equal(value, before[key], err_msg=key)
