"""Rewiring inside the step: who goes and who comes, against NumPy; counts; what becomes of the optimizer's state."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PyTree, inner_optimizers
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_structure as oxs
from optax_structure._tree import leaves_by_path
from optax_structure.state.carrying import Renewal

OPTIMIZERS = inner_optimizers()
EVERY = 3


def net(seed: int = 0, dtype: Any = jnp.float32) -> tuple[PyTree, PyTree]:
    """Two dense layers, at different densities, and their masks."""
    rng = np.random.default_rng(seed)
    shapes = {"hidden": {"kernel": (8, 12), "bias": (12,)}, "head": {"kernel": (12, 4), "bias": (4,)}}
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype), shapes, is_leaf=lambda node: isinstance(node, tuple)
    )
    masks = oxs.random_masks(jax.random.key(seed), params, 0.4)
    return oxs.apply_masks(params, masks), masks


def gradients(params: PyTree, step: int) -> PyTree:
    return jax.tree.map(
        lambda p: jnp.asarray(np.random.default_rng((step, p.size)).normal(size=p.shape), p.dtype), params
    )


def rules() -> dict[str, oxs.Rewiring]:
    """Every rule, rewiring in updates 3, 6 and 9; those that prune begin at 40 %."""
    times: dict[str, Any] = {"every": EVERY, "stop": 9}
    return {
        "set": oxs.set_rewiring(**times),
        "rigl": oxs.rigl_rewiring(**times),
        "rigl, accumulated": oxs.rigl_rewiring(accumulate=2, **times),
        "rigl, tree": oxs.rigl_rewiring(per="tree", **times),
        "random": oxs.random_rewiring(**times),
        "magnitude": oxs.magnitude_pruning(0.1, initial_density=0.4, **times),
        "random pruning": oxs.random_pruning(0.1, initial_density=0.4, **times),
        "saliency": oxs.saliency_pruning(0.1, initial_density=0.4, **times),
        "proportional": oxs.proportional_growth(0.2, density=0.5, **times),
        "up": oxs.magnitude_pruning(0.6, initial_density=0.4, **times),
    }


def counts_of(masks: PyTree) -> dict[str, int]:
    return {path: int(np.sum(mask)) for path, mask in leaves_by_path(masks).items() if np.ndim(mask)}


def run(tx: optax.GradientTransformation, params: PyTree, steps: int, **extra: Any) -> list[tuple[PyTree, Any]]:
    """Params and state after every update, the first ones included."""
    tx = optax.with_extra_args_support(tx)
    update, history = jax.jit(functools.partial(tx.update, **extra)), [(params, jax.jit(tx.init)(params))]
    for step in range(1, steps + 1):
        params, state = history[-1]
        updates, state = update(gradients(params, step), state, params)
        history.append((optax.apply_updates(params, updates), state))
    return history


# Who goes and who comes.


def expected(rule: str, weight: np.ndarray, grad: np.ndarray, mask: np.ndarray, number: int) -> np.ndarray:
    """RigL's and SET's choice by sorting; of SET only what stays is known."""
    living, absent = np.flatnonzero(mask), np.flatnonzero(~mask)
    gone = living[np.argsort(np.abs(weight.ravel()[living]), kind="stable")[:number]]
    after = mask.copy().ravel()
    after[gone] = False
    if rule == "rigl":
        after[absent[np.argsort(-np.abs(grad.ravel()[absent]), kind="stable")[:number]]] = True
    return after.reshape(mask.shape)


@functools.cache
def rewired_once(name: str) -> Callable[..., tuple[PyTree, PyTree]]:
    """``mask, weight, grad, fraction -> masks and params`` after an update of SGD at rate 0.1 that rewires."""
    made = {"rigl": oxs.rigl_rewiring, "set": oxs.set_rewiring}[name]

    @jax.jit
    def once(mask: jax.Array, weight: jax.Array, grad: jax.Array, fraction: jax.Array) -> tuple[PyTree, PyTree]:
        tx = oxs.sparse(optax.sgd(0.1), {"k": mask}, rewire=made(fraction=lambda count: fraction, every=1))
        params = {"k": weight}
        updates, state = tx.update({"k": grad}, tx.init(params), params)
        return oxs.get_masks(state)["k"], optax.apply_updates(params, updates)["k"]

    return once


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), fraction=st.floats(0.05, 1.0))
def test_rigl_and_set_choose_as_sorting_does(seed: int, fraction: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((6, 7)) < 0.5
    mask[0, 0], mask[0, 1] = True, False
    weight, grad = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32), rng.normal(size=mask.shape)
    living = int(mask.sum())
    # The first rewiring (number 1) rounds down after the golden ratio has been added.
    number = min(
        int(np.floor(np.float32(fraction) * np.float32(living) + (5**0.5 - 1) / 2)), mask.size - living, living
    )
    for name in ("rigl", "set"):
        after, moved = map(np.asarray, rewired_once(name)(mask, weight, grad.astype(np.float32), np.float32(fraction)))
        wanted = expected(name, weight, grad, mask, number)
        assert after.sum() == living
        np.testing.assert_array_equal(after & mask, wanted & mask)
        if name == "rigl":
            np.testing.assert_array_equal(after, wanted)
        # What went is exactly 0, what came has moved by its own gradient, from 0.
        np.testing.assert_array_equal(moved[~after], 0.0)
        np.testing.assert_allclose(moved[after & ~mask], -0.1 * grad[after & ~mask], rtol=1e-5)


def test_the_share_falls_along_a_cosine_to_the_stop_and_nothing_changes_after_it() -> None:
    params = {"k": jnp.ones((100, 100))}
    masks = oxs.random_masks(jax.random.key(0), params, 0.2)
    tx = oxs.sparse(optax.sgd(0.0), masks, rewire=oxs.random_rewiring(fraction=0.5, every=2, stop=8))
    history = run(tx, oxs.apply_masks(params, masks), 12)
    kept = [np.asarray(oxs.get_masks(state)["k"]) for _, state in history]
    changed = [int((after & ~before).sum()) for before, after in itertools.pairwise(kept)]
    shares = [0.5 * 0.5 * (1 + np.cos(np.pi * step / 8)) for step in (2, 4, 6)]
    assert [changed[step - 1] for step in (2, 4, 6)] == pytest.approx([2000 * share for share in shares], abs=1)
    assert changed[0] == changed[2] == changed[4] == changed[6] == changed[7] == 0 and not any(changed[8:])


def test_a_leaf_of_a_few_connections_has_its_turn() -> None:
    params, mask = {"k": jnp.arange(1.0, 9.0).reshape(2, 4)}, jnp.arange(8).reshape(2, 4) < 2
    tx = oxs.sparse(optax.sgd(0.0), {"k": mask}, rewire=oxs.random_rewiring(fraction=0.2, every=1))
    kept = [np.asarray(oxs.get_masks(state)["k"]) for _, state in run(tx, params, 50)]
    changes = sum(int((after & ~before).sum()) for before, after in itertools.pairwise(kept))
    assert 50 * 0.2 * 2 - 2 <= changes <= 50 * 0.2 * 2 + 2
    assert all(mask.sum() == 2 for mask in kept)


def test_pruning_follows_the_cubic_schedule_and_ends_at_the_density() -> None:
    params = {"a": jnp.ones((20, 30)), "b": jnp.ones((30, 10))}
    rule = oxs.magnitude_pruning(0.1, every=10, start=20, stop=100, distribution="uniform")
    tx = oxs.sparse(optax.sgd(0.0), oxs.full_masks, rewire=rule)
    history = run(tx, params, 110)
    for step, (_, state) in enumerate(history):
        passed = np.clip((step // 10 * 10 - 20) / 80, 0, 1)
        share = 0.1 + 0.9 * (1 - passed) ** 3
        assert counts_of(oxs.get_masks(state)) == {"a": round(600 * share), "b": round(300 * share)}


def test_pruning_the_tree_takes_the_weakest_wherever_they_are() -> None:
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32),
        "b": jnp.asarray(3 * rng.normal(size=(8, 4)), jnp.float32),
    }
    tx = oxs.sparse(optax.sgd(0.0), oxs.full_masks, rewire=oxs.magnitude_pruning(0.3, every=1, stop=1, per="tree"))
    masks = oxs.get_masks(run(tx, params, 1)[-1][1])
    sizes = np.concatenate([np.abs(params[name]).ravel() for name in "ab"])
    kept = np.concatenate([np.asarray(masks[name]).ravel() for name in "ab"])
    assert kept.sum() == round(0.3 * 80) and sizes[kept].min() > sizes[~kept].max()


@pytest.mark.slow
def test_a_density_by_label() -> None:
    params, _ = net()
    rule = oxs.magnitude_pruning(
        {"scaffold": 0.1, "patch": 0.5},
        every=1,
        stop=2,
        labels=oxs.label_by_path([("head", "patch")], default="scaffold"),
    )
    state = run(oxs.sparse(optax.sgd(0.0), oxs.full_masks, rewire=rule), params, 2)[-1][1]
    assert counts_of(oxs.get_masks(state)) == {"hidden/kernel": round(9.6), "head/kernel": 24}


@pytest.mark.parametrize(("accumulate", "place", "then"), [(3, 1, 3), (2, 2, 1), (1, 3, 1)])
def test_gradients_are_accumulated_over_the_last_updates(accumulate: int, place: int, then: int) -> None:
    params, mask = {"k": jnp.zeros((1, 4))}, jnp.array([[True, False, False, False]])
    # Sums of the last three: 9, 6, 5; of the last two: 1, 5, 4; the last one: 1, 2, 4 ... in places 1, 2, 3.
    steps = jnp.array([[[0.0, 8.0, 1.0, 1.0]], [[0.0, 0.0, 3.0, 0.0]], [[0.0, 1.0, 2.0, 4.0]]])
    tx = oxs.sparse(optax.sgd(0.0), {"k": mask}, rewire=oxs.rewiring(fraction=1.0, every=3, accumulate=accumulate))
    state = tx.init(params)
    for grad in steps:
        _, state = tx.update({"k": grad}, state, params)
    assert np.flatnonzero(oxs.get_masks(state)["k"]).tolist() == [place]
    # The next window begins anew: with what the last one holds, another place would win.
    for grad in (jnp.zeros((1, 4)), jnp.zeros((1, 4)), jnp.zeros((1, 4)).at[0, then].set(0.5)):
        _, state = tx.update({"k": grad}, state, params)
    assert np.flatnonzero(oxs.get_masks(state)["k"]).tolist() == [then]


@pytest.mark.slow
def test_where_nothing_has_a_gradient_growth_is_random_and_not_from_the_left() -> None:
    params = {"k": jnp.zeros((40, 40))}
    masks = oxs.random_masks(jax.random.key(0), params, 0.1)
    tx = oxs.sparse(optax.sgd(0.1), masks, rewire=oxs.rigl_rewiring(fraction=1.0, every=1))
    _, state = tx.update({"k": jnp.zeros((40, 40))}, tx.init(params), params)
    born = np.asarray(oxs.get_masks(state)["k"] & ~masks["k"])
    assert born.sum() == 160 and 15 < np.nonzero(born)[0].mean() < 24 and 15 < np.nonzero(born)[1].mean() < 24


# Counts, with every rule around every optimizer, alone and in a group of a partition.


PAIRS = [(rule, optimizer) for rule in rules() for optimizer in OPTIMIZERS]


@pytest.mark.slow
@pytest.mark.parametrize("rule", rules())
def test_every_rule_is_built_around_every_optimizer(rule: str) -> None:
    params, masks = net()
    for optimizer in OPTIMIZERS.values():
        tx = oxs.sparse(optimizer, masks, rewire=rules()[rule])
        shape = jax.eval_shape(lambda params, tx=tx: tx.update(params, tx.init(params), params, value=1.0), params)
        assert jax.tree.structure(shape[0]) == jax.tree.structure(params)


# All pairs are traced above; every ninth runs, so that each rule and each optimizer does.
@pytest.mark.slow
@pytest.mark.parametrize(("rule", "optimizer"), PAIRS[::9])
def test_counts_are_exact_and_no_weight_is_off_its_mask(rule: str, optimizer: str) -> None:
    check_run(rules()[rule], OPTIMIZERS[optimizer], nested=False)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "plateau"])
@pytest.mark.parametrize("rule", ["set", "rigl, accumulated", "magnitude", "proportional"])
def test_counts_are_exact_inside_a_partition(rule: str, optimizer: str) -> None:
    check_run(rules()[rule], OPTIMIZERS[optimizer], nested=True)


def check_run(rule: oxs.Rewiring, inner: optax.GradientTransformation, *, nested: bool) -> None:
    params, masks = net()
    tx = oxs.sparse(inner, masks, rewire=rule)
    if nested:
        where = oxs.label_by_path([("head", "sparse")], default="dense")
        tx = optax.partition({"sparse": tx, "dense": optax.adam(1e-2)}, where)
    history = run(tx, params, 10, value=jnp.asarray(1.0))
    before = counts_of(oxs.get_masks(history[0][1]))
    for step, (params, state) in enumerate(history[1:], 1):
        masks = oxs.get_masks(state)
        after = counts_of(masks)
        if isinstance(rule.budget, type(oxs.set_rewiring().budget)):
            assert sum(after.values()) == sum(before.values()) and (rule.per == "tree" or after == before)
        elif step % EVERY:
            assert after == before
        before = after
        for path, mask in leaves_by_path(masks).items():
            if np.ndim(mask):
                weight = np.asarray(leaves_by_path(params)[path])
                assert not weight[~np.asarray(mask)].any() and np.isfinite(weight).all()
    assert step == 10


# The optimizer's state.


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_stays_keeps_its_state_bit_for_bit_and_what_comes_starts_fresh(optimizer: str) -> None:
    params, masks = net()
    tx = optax.with_extra_args_support(OPTIMIZERS[optimizer])
    state = run(tx, params, 5, value=jnp.asarray(1.0))[-1][1]
    old = {path: mask for path, mask in leaves_by_path(masks).items() if np.ndim(mask)}
    new = {path: jnp.asarray(np.random.default_rng(3).random(mask.shape) < 0.5) for path, mask in old.items()}
    grads = {path: of for path, of in leaves_by_path(gradients(params, 6)).items() if path in old}

    @jax.jit
    def renew(state: Any, new: Any) -> Any:
        renewal = Renewal(tx, state, params, old)
        return renewal.state(renewal.renewed(renewal.arrays(old), old, new, grads))

    after = renew(state, new)
    fresh = tx.init(params)
    shapes = {of.shape: path for path, of in old.items()}
    moved = 0
    for (where, value), then, first in zip(
        jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True
    ):
        name = jax.tree_util.keystr(where)
        if value.shape not in shapes:
            np.testing.assert_array_equal(value, then, err_msg=name)
            continue
        path, moved = shapes[value.shape], moved + 1
        stays = np.asarray(old[path] == new[path])
        np.testing.assert_array_equal(np.asarray(value)[stays], np.asarray(then)[stays], err_msg=name)
        gone = np.asarray(old[path] & ~new[path])
        np.testing.assert_array_equal(np.asarray(value)[gone], np.asarray(first)[gone], err_msg=name)
    assert moved or optimizer in ("sgd", "adafactor")


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [True, False], ids=["per_leaf", "shared"])
@pytest.mark.parametrize("ratio", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("optimizer", ["adam", "rmsprop", "adagrad"])
def test_the_first_updates_of_a_new_connection_are_bounded(optimizer: str, ratio: float, wrapped: bool) -> None:
    """No larger than 1.05 times those of an optimizer that starts with it, under a gradient that many times larger."""
    made: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adam": lambda: optax.scale_by_adam(),
        "rmsprop": lambda: optax.scale_by_rms(bias_correction=True),
        "adagrad": lambda: optax.scale_by_rss(initial_accumulator_value=0.0),
    }
    inner = made[optimizer]()
    inner = oxs.per_leaf(inner) if wrapped else inner
    mask, params = jnp.arange(64).reshape(8, 8) % 2 == 0, {"k": jnp.ones((8, 8))}
    rule = oxs.rigl_rewiring(fraction=0.25, every=300)
    tx = oxs.sparse(inner, {"k": mask}, rewire=rule)
    params = oxs.apply_masks(params, {"k": mask})
    rng = np.random.default_rng(0)
    noise = jnp.asarray(rng.normal(size=(320, 8, 8)), jnp.float32)
    grads = jnp.where(mask, noise, ratio * noise)

    def step(state: Any, grad: jax.Array) -> Any:
        updates, state = tx.update({"k": grad}, state, params)
        return state, (updates["k"], state.masks.masks["k"])

    _, (updates, masks) = jax.jit(lambda grads: jax.lax.scan(step, tx.init(params), grads))(grads)
    born = np.asarray(masks[299] & ~mask)
    assert born.sum() == 8
    alone = made[optimizer]()
    _, fresh = jax.lax.scan(
        lambda state, grad: alone.update(grad, state)[::-1], alone.init(jnp.zeros((8, 8))), grads[299:]
    )
    size, bound = np.abs(updates[299:])[:, born], np.abs(fresh)[:, born].max(axis=(0, 1))
    assert (size > 0).any() and size.max() <= 1.05 * bound


# Programs.


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_program_runs_through_all_rewirings_and_copies_no_array_between_them(accumulate: int) -> None:
    params = {"k": jnp.zeros((256, 256)), "bias": jnp.zeros(256)}
    masks = oxs.random_masks(jax.random.key(0), params, 0.1)
    tx = oxs.sparse(optax.adam(1e-3), masks, rewire=oxs.rigl_rewiring(every=3, accumulate=accumulate))
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: PyTree, state: Any, grads: PyTree) -> Any:
        traces.append(None)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, grads = tx.init(params), jax.tree.map(jnp.ones_like, params)
    # What XLA does in every step stands in the entry computation; the branches that are rarely taken are others.
    program = step.lower(params, state, grads).compile().as_text()
    entry = program[program.index("\nENTRY") :]
    assert "conditional(" in entry
    assert not [line for line in entry.splitlines() if " copy(" in line and "[256,256]" in line]
    for _ in range(7):
        params, state = step(params, state, grads)
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vmap", "scan", "bf16"])
def test_it_runs_under_transformations_and_in_bfloat16(kind: str) -> None:
    params, masks = net(dtype=jnp.bfloat16 if kind == "bf16" else jnp.float32)
    grads = jax.tree.map(lambda *of: jnp.stack(of), *[gradients(params, step) for step in range(6)])

    def train(seed: Any) -> Any:
        tx = oxs.sparse(optax.adam(1e-2), masks, rewire=oxs.set_rewiring(every=2, seed=seed))

        def step(carry: Any, grad: PyTree) -> Any:
            params, state = carry
            updates, state = tx.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        (after, state), _ = jax.lax.scan(step, (params, tx.init(params)), grads)
        return after, oxs.get_masks(state)

    if kind == "vmap":
        keys = jax.random.split(jax.random.key(0), 3)
        together = jax.jit(jax.vmap(train))(keys)
        for index, key in enumerate(keys):
            alone = jax.jit(train)(key)
            for one, two in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
                np.testing.assert_allclose(one[index], two, rtol=1e-6)
        first, second, _ = np.asarray(together[1]["hidden"]["kernel"])
        assert (first != second).any()
        return
    after, kept = jax.jit(train)(0)
    assert counts_of(kept) == counts_of(masks)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {params["head"]["bias"].dtype}


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_rejected_whole() -> None:
    params, masks = net()
    tx = optax.apply_if_finite(oxs.sparse(optax.adam(1e-2), masks, rewire=oxs.rigl_rewiring(every=1)), 5)
    state = tx.init(params)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    _, after = tx.update(bad, state, params)
    assert counts_of(oxs.get_masks(after)) == counts_of(masks)
    for one, two in zip(jax.tree.leaves(oxs.get_masks(after)), jax.tree.leaves(masks), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_the_clock_goes_through_a_transfer() -> None:
    params, masks = net()
    tx = oxs.sparse(oxs.per_leaf(optax.scale_by_adam()), masks, rewire=oxs.rigl_rewiring(every=4, accumulate=4))
    params, state = run(tx, params, 6)[-1]
    after = oxs.transfer_state(tx, state, params, tx, params)
    for (where, one), two in zip(jax.tree_util.tree_leaves_with_path(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, two, err_msg=jax.tree_util.keystr(where))
    assert int(after.rewiring.count) == 6


# Bad input.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: oxs.set_rewiring(fraction=1.5), r"fraction=1.5 must lie in"),
        (lambda: oxs.set_rewiring(every=0), r"every=0 must be an integer of at least 1"),
        (lambda: oxs.set_rewiring(start=-1), r"start=-1 must be"),
        (lambda: oxs.set_rewiring(start=500, stop=400), r"stop=400 comes before the first rewiring.* 600"),
        (lambda: oxs.magnitude_pruning(0.0, stop=100), r"density=0.0 must be in \(0, 1\]"),
        (lambda: oxs.magnitude_pruning(1.5, stop=100), r"density=1.5 must be in \(0, 1\]"),
        (lambda: oxs.magnitude_pruning({"a": 0.1}, stop=100), r"pass labels="),
        (lambda: oxs.magnitude_pruning(0.1, stop=100, power=0), r"power=0 must be above 0"),
        (lambda: oxs.proportional_growth(0.0), r"rate=0.0 must be above 0"),
        (lambda: oxs.proportional_growth(0.1, density=2.0), r"density=2.0 must be in"),
        (lambda: oxs.rewiring("magnitude"), r"drop='magnitude' must be a function"),
        (lambda: oxs.rewiring(None, None), r"changes nothing"),
        (lambda: oxs.rewiring(None), r"fraction=0.3 is replaced, so it needs drop="),
        (lambda: oxs.rewiring(per="all"), r"per='all' must be"),
        (lambda: oxs.rewiring(None, fraction=lambda step: 0.3), r"is replaced, so it needs drop="),
        (lambda: oxs.rewiring(seed=1.5), r"seed=1.5 must be an int or a JAX random key"),
        (lambda: oxs.proportional_growth(0.1, per="tree"), r"per='tree': every leaf grows by its own"),
        (lambda: oxs.magnitude_pruning(0.5, stop=9, distribution="ER"), r"distribution='ER' is unknown"),
        (lambda: oxs.rewiring(accumulate=0), r"accumulate=0 must be an integer from 1 to every=100"),
        (lambda: oxs.rewiring(every=5, accumulate=6), r"accumulate=6 must be"),
        (lambda: oxs.rewiring(per="tree", pattern=oxs.tiles(4)), r"per='tree' lets all"),
        (lambda: oxs.sparse(optax.sgd(0.1), oxs.full_masks, rewire=oxs.set_rewiring), r"must be a rule.*call it"),
    ],
)
def test_bad_rules_are_named_when_they_are_built(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("masks", "rule", "message"),
    [
        ({"k": True}, oxs.set_rewiring(), "nothing to rewire"),
        ({"k": jnp.eye(8, 6, dtype=bool)}, oxs.set_rewiring(pattern=oxs.tiles(4)), "'k' does not have the pattern"),
        ({"k": jnp.eye(8, 6, dtype=bool)}, oxs.set_rewiring(pattern=oxs.tiles(16)), "16 x 16 are larger than 'k'"),
        ({"k": jnp.eye(8, 6, dtype=bool)}, oxs.set_rewiring(pattern=oxs.groups_of(3)), "groups of 3 do not divide"),
        ({"k": jnp.tri(8, 6, dtype=bool)}, oxs.set_rewiring(pattern=oxs.constant_fan_in()), "does not have the"),
    ],
)
def test_rules_that_do_not_fit_the_masks_are_named_at_init(masks: PyTree, rule: oxs.Rewiring, message: str) -> None:
    params = {"k": jnp.ones((8, 6))}
    with pytest.raises(ValueError, match=message):
        oxs.sparse(optax.sgd(0.1), masks, rewire=rule).init(params)


# Patterns.


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [oxs.tiles(2), oxs.tiles(3, 2), oxs.constant_fan_in(), oxs.groups_of(4)], ids=str)
@pytest.mark.parametrize("made", [oxs.set_rewiring, oxs.rigl_rewiring])
def test_a_pattern_stays_through_rewirings(made: Callable[..., oxs.Rewiring], pattern: Any) -> None:
    params = {"k": jax.random.normal(jax.random.key(1), (16, 10))}
    masks = oxs.random_masks(jax.random.key(0), params, 0.5, pattern=pattern)
    tx = oxs.sparse(optax.adam(1e-2), masks, rewire=made(every=1, pattern=pattern))
    history = run(tx, oxs.apply_masks(params, masks), 6)
    kept = [np.asarray(oxs.get_masks(state)["k"]) for _, state in history]
    for mask in kept:
        if isinstance(pattern, type(oxs.tiles(2))):
            rows, columns = pattern
            corners = mask[::rows, ::columns]
            np.testing.assert_array_equal(mask, np.kron(corners, np.ones((rows, columns), bool))[:16, :10])
            assert corners.sum() == kept[0][::rows, ::columns].sum()
        else:
            size = pattern.size or 16
            assert (mask.reshape(-1, size, 10).sum(1) == size // 2).all()
    assert sum((one != two).any() for one, two in itertools.pairwise(kept)) >= 4


def test_two_of_four_is_pruned_to_exactly() -> None:
    params = {"k": jax.random.normal(jax.random.key(1), (16, 10))}
    rule = oxs.magnitude_pruning(0.5, every=1, stop=2, pattern=oxs.groups_of(4))
    _, state = run(oxs.sparse(optax.sgd(0.0), oxs.full_masks, rewire=rule), params, 2)[-1]
    kept, size = np.asarray(oxs.get_masks(state)["k"]).reshape(4, 4, 10), np.abs(params["k"]).reshape(4, 4, 10)
    np.testing.assert_array_equal(kept, size >= np.sort(size, axis=1)[:, 2:3])


# What a fresh reading found.


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        oxs.rigl_rewiring(every=10, stop=35),
        oxs.rigl_rewiring(every=10, stop=30, fraction=lambda step: 0.3),
        oxs.proportional_growth(0.2, every=10, stop=30),
    ],
    ids=["odd stop", "schedule", "growth"],
)
def test_after_the_last_rewiring_has_settled_nothing_is_touched(rule: oxs.Rewiring) -> None:
    params = {"k": jax.random.normal(jax.random.key(0), (16, 16))}
    masks = oxs.random_masks(jax.random.key(1), params, 0.3)
    tx = oxs.sparse(optax.scale_by_adam(), masks, rewire=rule)
    update, state = jax.jit(tx.update), tx.init(params)
    for step in range(1, 60):
        grads, before = gradients(params, step), state
        _, state = update(grads, state, params)
        if step > 36:
            kept = np.asarray(oxs.get_masks(state)["k"])
            wanted = 0.999 * before.inner_state.nu["k"] + 0.001 * np.square(grads["k"])
            np.testing.assert_allclose(state.inner_state.nu["k"][kept], wanted[kept], rtol=1e-5)


def test_a_tile_counts_by_its_sum_though_entries_are_zero() -> None:
    mask = jnp.zeros((4, 6), bool).at[:2, :2].set(True)
    grads = jnp.zeros((4, 6)).at[0, 2].set(1.0).at[:2, 4:].set(1e-6)  # one entry of a tile, all of another
    rule = oxs.rigl_rewiring(fraction=1.0, every=1, pattern=oxs.tiles(2))
    tx = oxs.sparse(optax.sgd(0.0), {"k": mask}, rewire=rule)
    _, state = tx.update({"k": grads}, tx.init({"k": mask * 1.0}), {"k": mask * 1.0})
    np.testing.assert_array_equal(oxs.get_masks(state)["k"], jnp.zeros((4, 6), bool).at[:2, 2:4].set(True))


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6], ids=["rewires", "settles"])
def test_an_inner_optimizer_may_reject_the_step_that_rewires(step: int) -> None:
    params, masks = net()
    tx = oxs.sparse(optax.apply_if_finite(optax.adam(1e-2), 5), masks, rewire=oxs.rigl_rewiring(every=4))
    update, state = jax.jit(tx.update), tx.init(params)
    for turn in range(1, 13):
        grads = gradients(params, turn)
        grads = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), grads) if turn == step else grads
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert counts_of(oxs.get_masks(state)) == counts_of(masks)


@pytest.mark.slow
def test_what_an_optimizer_keeps_of_a_dropped_weight_is_zero() -> None:
    params, masks = net()
    tx = oxs.sparse(optax.contrib.schedule_free_sgd(1e-2), masks, rewire=oxs.set_rewiring(every=3))
    params, state = run(tx, params, 7)[-1]
    kept = oxs.get_masks(state)["hidden"]["kernel"]
    averaged = optax.contrib.schedule_free_eval_params(state.inner_state, params)["hidden"]["kernel"]
    assert not np.asarray(averaged)[~np.asarray(kept)].any()


def test_groups_of_a_partition_draw_different_places() -> None:
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    tx = oxs.sparse(optax.sgd(0.0), oxs.full_masks, rewire=oxs.random_pruning(0.3, every=1, stop=1))
    both = optax.partition({"one": tx, "two": tx}, {"a": "one", "b": "two"})
    masks = oxs.get_masks(run(both, params, 1)[-1][1])
    assert (np.asarray(masks["a"]) != np.asarray(masks["b"])).any()


def test_a_pattern_is_checked_under_jit_too() -> None:
    tx = oxs.sparse(optax.sgd(0.1), {"k": jnp.eye(8, 6, dtype=bool)}, rewire=oxs.set_rewiring(pattern=oxs.tiles(4)))
    with pytest.raises(ValueError, match="'k' does not have the pattern"):
        jax.jit(tx.init)({"k": jnp.ones((8, 6))})


def test_observe_stands_inside() -> None:
    params, masks = net()
    with pytest.raises(ValueError, match="put observe first inside"):
        oxs.observe(oxs.sparse(optax.adam(1e-3), masks, rewire=oxs.set_rewiring())).init(params)


def test_a_score_of_another_shape_is_named() -> None:
    params, masks = net()
    tx = oxs.sparse(optax.sgd(0.1), masks, rewire=oxs.rewiring(lambda leaf: leaf.weight.sum(0), every=1))
    with pytest.raises(ValueError, match=r"has shape \(4,\) for 'head/kernel', whose shape is \(12, 4\)"):
        tx.update(params, tx.init(params), params)


def test_the_share_may_be_traced() -> None:
    params, masks = net()

    @jax.jit
    def changed(fraction: Any) -> Any:
        tx = oxs.sparse(optax.sgd(0.1), masks, rewire=oxs.set_rewiring(fraction=fraction, every=1))
        _, state = tx.update(params, tx.init(params), params)
        return oxs.get_masks(state)["hidden"]["kernel"] != masks["hidden"]["kernel"]

    assert not changed(0.0).any() and changed(0.5).any()
