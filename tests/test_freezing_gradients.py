"""Freezing by small gradients: the rule by hand and by a second implementation, what waits, probes, and clipping."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PyTree, assert_equal, inner_optimizers

import optax_structure as oxs
from optax_structure._tree import leaves_by_path
from optax_structure.state import slots
from optax_structure.transforms.freezing.gradients import FreezeState, states_of

# Where only the result counts, a program is compiled quickly rather than well.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SMALL, LARGE = 1e-6, 1.0
BODY_AND_HEAD = {"body": jnp.ones((2, 3)), "head": jnp.ones(3)}
RULE = {
    "threshold": 1e-3,
    "decay": 0.5,
    "min_steps": 0,
    "patience": 1,
    "release": 2.0,
    "min_dwell": 0,
    "max_share": 1.0,
}


def freezing(inner: Any, **numbers: Any) -> optax.GradientTransformationExtraArgs:
    return oxs.freeze_on_small_gradients(inner, **(RULE | numbers))


def of_sizes(params: PyTree, sizes: Sequence[Any]) -> PyTree:
    """Gradients with these root mean squares: constant leaves of alternating sign."""
    leaves, treedef = jax.tree.flatten(params)
    signs = [jnp.where(jnp.arange(p.size).reshape(p.shape) % 2, -1.0, 1.0) for p in leaves]
    pairs = zip(leaves, signs, sizes, strict=True)
    return treedef.unflatten([(sign * size).astype(leaf.dtype) for leaf, sign, size in pairs])


def gates_of(state: Any) -> list[bool]:
    return [bool(gate) for gate in jax.tree.leaves(oxs.frozen(state))]


def stacked(*trees: PyTree) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


# The rule.


def test_the_rule_by_hand() -> None:
    tx = oxs.freeze_on_small_gradients(
        optax.sgd(1.0), 1.0, decay=0.5, min_steps=4, patience=2, release=2.0, min_dwell=2, alarm=None
    )
    params = {"w": jnp.zeros(4)}
    # (root mean square, mean, weight, frozen from the next update on); the mean without bias is mean / weight.
    course = [
        (4.0, 2.0, 0.5, False),
        (0.0, 1.0, 0.75, False),  # 1.33: not below 1
        (0.0, 0.5, 0.875, False),  # 0.57: once
        (0.0, 0.25, 0.9375, True),  # twice, and 4 readings: frozen
        (8.0, 4.125, 0.96875, True),  # 4.26 is above 2, but this is its first frozen update
        (3.0, 3.5625, 0.984375, False),  # 3.62: thaws
        (0.0, 1.78125, 0.9921875, False),
        (0.0, 0.890625, 0.99609375, False),  # 0.89: once; the two times before count no more
        (0.0, 0.4453125, 0.998046875, True),
        (1.5, 0.97265625, 0.9990234375, True),  # 0.97 is not above 2
    ]
    state, update = tx.init(params), jax.jit(tx.update, compiler_options=QUICK)
    was_frozen = False
    for index, (size, mean, weight, gate) in enumerate(course):
        updates, state = update({"w": jnp.array([1.0, -1.0, 1.0, -1.0]) * size}, state, params)
        assert (float(state.readings.mean["w"]), float(state.readings.weight["w"])) == (mean, weight), index
        assert bool(oxs.frozen(state)["w"]) == gate, index
        # The backward pass has gone by the gates that were, and so does the update.
        np.testing.assert_array_equal(updates["w"], 0.0 if was_frozen else np.array([-1.0, 1.0, -1.0, 1.0]) * size)
        was_frozen = gate
    assert int(state.readings.seen["w"]) == 10


def test_a_reading_after_a_pause_weighs_as_many_updates() -> None:
    tx, params = freezing(optax.sgd(1.0)), {"w": jnp.zeros(2)}
    update, state = jax.jit(tx.update, compiler_options=QUICK), tx.init(params)
    for size, looked in ((1.0, True), (9.0, False), (math.nan, False), (9.0, False), (2.0, True)):
        _, state = update({"w": jnp.full(2, size)}, state, params, observed=jnp.asarray(looked))
        if not looked:
            assert float(state.readings.mean["w"]) == 0.5, "the mean waits"
    # Four updates since the last reading: it weighs 1 - 0.5**4.
    assert float(state.readings.mean["w"]) == 0.5 / 16 + 2.0 * 15 / 16
    assert float(state.readings.weight["w"]) == 0.5 / 16 + 15 / 16
    assert (int(state.readings.seen["w"]), int(state.readings.waited["w"])) == (2, 0)


def second_implementation(readings: np.ndarray, looked: np.ndarray, sizes: Any, groups: Any, **rule: Any) -> Any:
    """The rule in plain Python: ``(steps, leaves)`` of readings -> gates of every step."""
    mean, weight, seen, waited = ([0.0] * len(sizes) for _ in range(4))
    read_now = [False] * len(sizes)
    names = list(dict.fromkeys(groups))
    members = {name: [leaf for leaf, group in enumerate(groups) if group == name] for name in names}
    gate, streak = dict.fromkeys(names, False), dict.fromkeys(names, 0)
    course = []
    for values, flags in zip(readings, looked, strict=True):
        for leaf, (value, flag) in enumerate(zip(values, flags, strict=True)):
            read_now[leaf] = flag and np.isfinite(value)
            waited[leaf] += not flag or read_now[leaf]  # what is not finite is as if it had not been
            if read_now[leaf]:
                kept = rule["decay"] ** waited[leaf]
                mean[leaf] = kept * mean[leaf] + (1 - kept) * value
                weight[leaf] = kept * weight[leaf] + 1 - kept
                seen[leaf], waited[leaf] = seen[leaf] + 1, 0
        e, wanted, before = {}, {}, dict(gate)
        for name, leaves in members.items():
            e[name] = max(mean[leaf] / weight[leaf] if weight[leaf] else 0.0 for leaf in leaves)
            read = all(read_now[leaf] for leaf in leaves)
            if gate[name]:
                back = read and e[name] > rule["release"] * rule["threshold"]
                wanted[name] = not (back and streak[name] + 1 >= rule["min_dwell"])
                streak[name] += 1
            else:
                if read:
                    streak[name] = streak[name] + 1 if e[name] < rule["threshold"] else 0
                enough = min(seen[leaf] for leaf in leaves) >= rule["min_steps"]
                wanted[name] = streak[name] >= rule["patience"] and enough
        share = 0.0
        for name in sorted(names, key=lambda name: (not before[name], e[name])):
            own = sum(sizes[leaf] for leaf in members[name]) / sum(sizes)
            gate[name] = wanted[name] and share + own <= rule["max_share"] + 1e-6
            share += own * gate[name]
            if gate[name] != before[name]:
                streak[name] = 0
        course.append([gate[group] for group in groups])
    return np.array(course)


def readings_about(threshold: float, steps: int, leaves: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes that wander across the threshold, some of them not finite, and which of them are looked at."""
    rng = np.random.default_rng(seed)
    walk = np.zeros((steps, leaves))
    for step in range(1, steps):
        walk[step] = 0.95 * walk[step - 1] + rng.normal(0, 0.4, leaves)
    values = threshold * np.exp(walk)
    values[rng.random(values.shape) < 0.03] = np.nan
    values[rng.random(values.shape) < 0.02] = np.inf
    return values.astype(np.float32), rng.random(values.shape) < 0.8


FOUR = {"a": jnp.ones((2, 2)), "b": jnp.ones(2), "c": jnp.ones((3, 2)), "d": jnp.ones(())}
SIZES = [4, 2, 6, 1]
COURSES = [
    {},
    {"patience": 4, "min_steps": 20, "release": 1.5},
    {"patience": 2, "min_dwell": 7, "release": 1.0},
    {"patience": 3, "max_share": 0.6, "decay": 0.9},
    {"max_share": 0.4, "decay": 0.0},
    {"max_share": 0.0},
    {"threshold": 0.0},
    {"threshold": 1e9},
]


def courses(tx_of: Any, params: PyTree, grads: PyTree, looked: Any, numbers: Any) -> Any:
    """Gates of every step for every row of numbers, in one program."""

    def course(numbers: Any) -> Any:
        tx = tx_of(numbers)

        def step(state: Any, now: Any) -> Any:
            before = oxs.frozen(state)
            updates, state = tx.update(now[0], state, params, observed=now[1])
            held = jax.tree.map(lambda update, gate: jnp.all((update == 0) | ~gate), updates, before)
            return state, (oxs.frozen(state), held)

        return jax.lax.scan(step, tx.init(params), (grads, looked))[1]

    return jax.jit(jax.vmap(course), compiler_options=QUICK)(numbers)


def rows_of(courses: Sequence[dict[str, Any]]) -> dict[str, jax.Array]:
    return {name: jnp.asarray([float((RULE | row)[name]) for row in courses]) for name in RULE}


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, {"a": 0, "b": 1, "c": 1, "d": 0}], ids=["leaf", "group"])
def test_a_second_implementation_agrees(groups: Any) -> None:
    values, looked = readings_about(1e-3, 400, 4, seed=3)
    gates, held = courses(
        lambda numbers: oxs.freeze_on_small_gradients(optax.sgd(1.0), groups=groups, alarm=None, **numbers),
        FOUR,
        jax.vmap(lambda row: of_sizes(FOUR, list(row)))(jnp.asarray(values)),
        dict(zip("abcd", jnp.asarray(looked).T, strict=True)),
        rows_of(COURSES),
    )
    assert all(np.all(leaf) for leaf in jax.tree.leaves(held)), "what is frozen does not move"
    names = list(groups.values()) if groups else list(range(4))
    for index, row in enumerate(COURSES):
        found = np.stack([np.asarray(gate[index]) for gate in jax.tree.leaves(gates)], axis=1)
        by_hand = second_implementation(values, looked, SIZES, names, **(RULE | row))
        np.testing.assert_array_equal(found, by_hand, err_msg=str(row))
        if row in ({"max_share": 0.0}, {"threshold": 0.0}):
            assert not found.any()
        elif row == {"threshold": 1e9}:
            assert found[50:].all()
        else:
            assert np.sum(found[1:] != found[:-1]) >= 8, "a course that tells nothing"
        shares = found @ np.array(SIZES) / sum(SIZES)
        assert shares.max() <= row.get("max_share", 1.0) + 1e-6


@pytest.mark.slow
def test_a_second_implementation_agrees_by_element() -> None:
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    values, looked = readings_about(1e-3, 400, 6, seed=4)
    looked = looked[:, [0, 0, 0, 0, 4, 4]]  # a leaf is looked at, or it is not
    for leaf in (slice(0, 4), slice(4, 6)):  # and one entry that is not finite makes it unread
        values[~np.isfinite(values[:, leaf]).all(axis=1), leaf] = np.nan
    rows = [row for row in COURSES if row.get("max_share", 1.0) > 0.0]
    gates, held = courses(
        lambda numbers: oxs.freeze_on_small_gradients(optax.sgd(1.0), per="element", alarm=None, **numbers),
        params,
        {"a": jnp.asarray(values[:, :4]).reshape(-1, 2, 2), "b": -jnp.asarray(values[:, 4:])},
        {"a": jnp.asarray(looked[:, 0]), "b": jnp.asarray(looked[:, 4])},
        rows_of(rows),
    )
    assert all(np.all(leaf) for leaf in jax.tree.leaves(held)), "what is frozen does not move"
    for index, row in enumerate(rows):
        for name, leaf in (("a", slice(0, 4)), ("b", slice(4, 6))):
            # The share is of every leaf; entries of one leaf have one size.
            size = [1] * (leaf.stop - leaf.start)
            by_hand = second_implementation(values[:, leaf], looked[:, leaf], size, range(len(size)), **(RULE | row))
            found = np.asarray(gates[name][index]).reshape(by_hand.shape)
            np.testing.assert_array_equal(found, by_hand, err_msg=f"{row} {name}")


@pytest.mark.slow
def test_the_smallest_means_freeze_first_and_keep_their_place() -> None:
    params = {name: jnp.ones(4) for name in "abcd"}
    tx = freezing(optax.sgd(1.0), threshold=1e-7, max_share=0.5)
    update, state = jax.jit(tx.update, compiler_options=QUICK), tx.init(params)
    courses = [
        ((4e-9, 3e-9, 2e-9, 1e-9), "cd"),
        ((0.0, 0.0, 9e-8, 9e-8), "cd"),  # now larger, and frozen already
        ((0.0, 3e-9, 9e-8, 1.0), "ac"),  # "d" thaws, and "a" with the smallest mean has its place
    ]
    for sizes, expected in courses:
        _, state = update(of_sizes(params, sizes), state, params)
        assert "".join(name for name in "abcd" if oxs.frozen(state)[name]) == expected
    # By element: numbers that differ by less than float32 has between 0 and 1.
    tx = freezing(optax.sgd(1.0), threshold=1e-7, max_share=0.5, per="element")
    _, state = tx.update({"w": jnp.array([4e-9, 3e-9, 2e-9, 1e-9])}, tx.init({"w": jnp.ones(4)}))
    assert oxs.frozen(state)["w"].tolist() == [False, False, True, True]


# What is no reading.


@pytest.mark.parametrize("bad", ["loss", "gradient", "one gradient"])
def test_a_step_that_is_not_finite_loses_nothing(bad: str) -> None:
    params = {"body": jnp.ones(4), "head": jnp.ones(3)}
    tx = freezing(oxs.per_leaf(optax.adamw(0.1, weight_decay=0.1)), patience=3)
    step, sized = jax.jit(tx.update, compiler_options=QUICK), jax.jit(lambda *sizes: of_sizes(params, sizes))
    # The body freezes and thaws in between.
    sizes = [(LARGE, LARGE)] * 3 + [(SMALL, 0.5)] * 16 + [(LARGE, 0.7)] * 5

    def run(poisoned: int | None) -> Any:
        state, live, updates, gates = tx.init(params), params, [], []
        for index, (body, head) in enumerate(sizes):
            if index == poisoned:
                grads = sized(body, head)
                grads |= {"body": grads["body"].at[1].set(jnp.nan)} if bad != "loss" else {}
                grads |= {"head": grads["head"].at[0].set(-jnp.inf)} if bad == "gradient" else {}
                before = state
                nothing, state = step(grads, state, live, value=jnp.asarray(jnp.nan if bad == "loss" else 1.0))
                assert not np.any(nothing["body"]) and np.any(nothing["head"]) == (bad == "one gradient")
                assert gates_of(state)[0] == gates_of(before)[0]
                assert_equal(state.readings.mean["body"], before.readings.mean["body"])
                assert_equal(state.streak["body"], before.streak["body"] + before.frozen["body"])
                assert float(state.watch.loss) == float(before.watch.loss) or bad != "loss"
                if bad == "one gradient":
                    continue
            update, state = step(sized(body, head), state, live, value=jnp.asarray(1.0))
            live = optax.apply_updates(live, update)
            updates.append(update)
            gates.append(gates_of(state)[0])
        return stacked(*updates), gates, state.inner_state

    clean, gates, inner = run(None)
    assert gates == [False] * 14 + [True] * 5 + [False] * 5
    for poisoned in (2, 10, 16, 19, 21):
        found, found_gates, found_inner = run(poisoned)
        if bad == "one gradient":
            # The step counts for the head. The body has missed a reading that it would have had.
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found, found_inner)))
            continue
        assert found_gates == gates
        assert_equal(found, clean)
        assert_equal(found_inner, inner)


@pytest.mark.slow
def test_losses_that_are_not_finite_or_huge_poison_no_watch() -> None:
    tx = freezing(optax.sgd(0.1), probe_every=1000)
    step, params = jax.jit(tx.update, compiler_options=QUICK), BODY_AND_HEAD
    grads, state = of_sizes(params, (SMALL, LARGE)), tx.init(params)
    for index in range(60):
        loss = {30: math.inf, 31: math.nan, 32: -math.inf}.get(index, 1.0 + 0.01 * (-1) ** index)
        seen = {"body": jnp.asarray(index == 0), "head": jnp.asarray(True)}
        _, state = step(grads, state, params, value=jnp.asarray(loss), observed=seen)
        assert not bool(state.watch.probe), "no alarm"
    assert int(state.watch.losses) == 57
    # One that is finite and whose square is not: an alarm, but no variance for ever.
    _, after = step(grads, state, params, value=jnp.asarray(1e30), observed=seen)
    assert bool(after.watch.probe) and np.isfinite(after.watch.variance)


def test_a_loss_that_is_no_scalar_is_named() -> None:
    tx = freezing(optax.sgd(0.1))
    state = tx.init(BODY_AND_HEAD)
    with pytest.raises(ValueError, match=r"value= has shape \(3,\).*scalar"):
        tx.update(BODY_AND_HEAD, state, value=jnp.ones(3))
    with pytest.raises(ValueError, match=r"value=\{\} holds no loss"):
        tx.update(BODY_AND_HEAD, state, value={})
    with pytest.raises(ValueError, match=r"observed does not have the structure of params"):
        tx.update(BODY_AND_HEAD, state, observed={"body": True})
    # The mean of the losses of several parts.
    _, state = jax.jit(tx.update)(BODY_AND_HEAD, state, value={"x": jnp.asarray(1.0), "y": jnp.asarray(3.0)})
    assert float(state.watch.loss) == pytest.approx(0.01 * 2.0)


# What waits.


def heavy(inner: Any) -> optax.GradientTransformationExtraArgs:
    """With a weight decay before and momentum after it."""
    return optax.chain(optax.add_decayed_weights(0.1), inner, optax.trace(0.5))


BOTH_DTYPES = {
    "body": jnp.full((2, 3), 0.5),
    "body16": jnp.full((2, 3), 0.5, jnp.bfloat16),
    "head": jnp.full((3, 2), 0.5),
    "head16": jnp.full(3, 0.5, jnp.bfloat16),
}
VALUE = {"value": jnp.asarray(1.0)}


def own_state(tx: Any, state: Any, params: PyTree, path: str) -> list[Any]:
    return [entry.value for entry in slots.read(tx, state, params) if entry.path == path]


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda inner: inner, oxs.per_leaf], ids=["shared", "per_leaf"])
@pytest.mark.parametrize("name", inner_optimizers())
def test_what_is_frozen_stays_for_a_thousand_steps(name: str, wrap: Any) -> None:
    inner = wrap(heavy(inner_optimizers()[name]))
    tx, params = freezing(inner), BOTH_DTYPES
    if name == "inject_hyperparams":  # it holds b2 = 0.999 in the dtype of the params, and in bfloat16 that is 1
        params = {path: p for path, p in params.items() if p.dtype == jnp.float32}
    bodies = [path for path in params if path.startswith("body")]
    gates = [path in bodies for path in params]
    rng = np.random.default_rng(0)
    noise = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(1000, *p.shape)), p.dtype), params)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params: PyTree, state: Any, body: jax.Array) -> Any:
        def step(carry: Any, now: Any) -> Any:
            grads, size = now
            grads |= {path: grads[path] * size.astype(grads[path].dtype) for path in bodies}
            updates, state = tx.update(grads, carry[1], carry[0], **VALUE)
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, state), (noise, body))[0]

    # 20 steps that build up moments, then gradients so small that the body freezes.
    first, state = run(params, tx.init(params), jnp.where(jnp.arange(1000) < 20, 1.0, SMALL))
    assert gates_of(state) == gates
    assert all(np.any(first[path] != params[path]) for path in params)
    last, after = run(first, state, jnp.full(1000, SMALL))
    assert gates_of(after) == gates
    for path in bodies:
        assert_equal(last[path], first[path])
        mine = own_state(inner, state.inner_state, params, path)
        assert_equal(own_state(inner, after.inner_state, params, path), mine)
        assert any(np.any(leaf) for leaf in mine), "there is something to lose"


def thawed(inner: Any, name: str) -> None:
    """Freeze and thaw the body: the head and, where each leaf has its own state, the body lose nothing by it."""
    rng = np.random.default_rng(1)
    sizes = np.concatenate([np.full(5, LARGE), np.full(25, SMALL), np.full(20, LARGE)])
    normal = {path: rng.normal(size=(50, *p.shape)).astype(np.float32) for path, p in BODY_AND_HEAD.items()}
    grads = {"body": normal["body"] * sizes[:, None, None].astype(np.float32), "head": normal["head"]}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(threshold: jax.Array, grads: PyTree) -> Any:
        tx = freezing(inner, threshold=threshold, patience=3)

        def step(carry: Any, grads: PyTree) -> Any:
            updates, state = tx.update(grads, carry[1], carry[0], **VALUE)
            params = optax.apply_updates(carry[0], updates)
            return (params, state), (params, updates, oxs.frozen(carry[1])["body"])

        return jax.lax.scan(step, (BODY_AND_HEAD, tx.init(BODY_AND_HEAD)), grads)[1]

    params, updates, gates = run(jnp.asarray(1e-3), grads)
    live = np.flatnonzero(~np.asarray(gates))
    assert 10 < len(live) < 45 and not gates[-1], "it freezes and it thaws"
    never, never_updates, open_gates = run(jnp.asarray(0.0), grads)
    assert not np.any(open_gates)
    if name != "clip":  # whose norm has the body in it
        assert_equal(params["head"], never["head"])
        assert_equal(updates["head"], never_updates["head"])
    if name == "per_leaf":
        # The run in which the frozen steps have not been.
        rest = np.setdiff1d(np.arange(50), live)
        without = {"body": grads["body"][np.concatenate([live, rest])], "head": grads["head"]}
        _, expected, _ = run(jnp.asarray(0.0), without)
        assert_equal(updates["body"][live], expected["body"][: len(live)])


def test_freeze_thaw_and_go_on() -> None:
    thawed(oxs.per_leaf(optax.adamw(0.1, weight_decay=0.1)), "per_leaf")


@pytest.mark.slow
@pytest.mark.parametrize("name", inner_optimizers())
def test_freeze_thaw_and_go_on_with_any_optimizer(name: str) -> None:
    thawed(heavy(inner_optimizers()[name]), name)
    thawed(oxs.per_leaf(heavy(inner_optimizers()[name])), "per_leaf")


@pytest.mark.slow
def test_reset_moments_are_those_of_a_fresh_optimizer() -> None:
    params = BODY_AND_HEAD
    rng = np.random.default_rng(2)
    sizes = jnp.asarray([LARGE] * 5 + [SMALL] * 20 + [LARGE] * 10)
    grads = {path: jnp.asarray(rng.normal(size=(35, *p.shape)), jnp.float32) for path, p in params.items()}
    grads["body"] = grads["body"] * sizes[:, None, None]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(threshold: jax.Array, grads: PyTree) -> Any:
        tx = freezing(oxs.per_leaf(optax.adam(0.1)), threshold=threshold, moments="reset")

        def step(state: Any, grads: PyTree) -> Any:
            frozen = oxs.frozen(state)["body"]
            updates, state = tx.update(grads, state, params)
            return state, (updates, frozen)

        return jax.lax.scan(step, tx.init(params), grads)

    state, (updates, gates) = run(jnp.asarray(1e-3), grads)
    thaw = int(np.flatnonzero(np.asarray(gates))[-1]) + 1
    assert thaw == 26, "after the first large gradient"
    _, (fresh, _) = run(jnp.asarray(0.0), jax.tree.map(lambda g: jnp.roll(g, -thaw, axis=0), grads))
    assert_equal(updates["body"][thaw:], fresh["body"][: 35 - thaw])
    assert [int(count) for count in jax.tree.leaves(state.inner_state[0].count)] == [9, 35]


def test_reset_moments_need_counts_of_their_own() -> None:
    freezing(optax.sgd(0.1, momentum=0.9), moments="reset").init(BODY_AND_HEAD)
    freezing(optax.sgd(0.1, momentum=0.9), moments="reset", per="element").init(BODY_AND_HEAD)
    for inner in (optax.adam(0.1), optax.chain(optax.clip(1.0), optax.adamw(optax.linear_schedule(1.0, 0.0, 3)))):
        tx = freezing(inner, moments="reset")
        with pytest.raises(ValueError, match=r"a step count a leaf, and ScaleByAdamState\.count .*per_leaf"):
            tx.init(BODY_AND_HEAD)
    tx = freezing(oxs.per_leaf(optax.adam(0.1)), moments="reset", per="element")
    with pytest.raises(ValueError, match=r"a step count an element, and ScaleByAdamState\.count .*'keep'"):
        tx.init(BODY_AND_HEAD)


def test_groups_of_another_tree_are_named_at_init() -> None:
    with pytest.raises(ValueError, match="groups does not have the structure of params"):
        freezing(optax.sgd(0.1), groups={"body": 0}).init(BODY_AND_HEAD)


@pytest.mark.slow
def test_skip_unobserved_waits() -> None:
    params, grads = BODY_AND_HEAD, of_sizes(BODY_AND_HEAD, (0.3, 0.7))
    hostile = {"body": jnp.full((2, 3), jnp.nan), "head": grads["head"]}
    for inner in (heavy(optax.adam(0.1)), oxs.per_leaf(heavy(optax.adam(0.1)))):
        tx = oxs.skip_unobserved(inner)
        update = jax.jit(tx.update, compiler_options=QUICK)
        _, state = update(grads, tx.init(params), params, observed=jnp.asarray(True))
        updates, after = update(
            hostile, state, params, observed={"body": jnp.asarray(False), "head": jnp.asarray(True)}
        )
        assert not np.any(updates["body"]) and np.all(updates["head"])
        assert_equal(own_state(inner, after, params, "body"), own_state(inner, state, params, "body"))
        # Known before the program runs: the same, to the bit.
        known = jax.jit(lambda g, s: tx.update(g, s, params, observed={"body": False, "head": True}))  # noqa: B023
        assert_equal(known(hostile, state), (updates, after))
    with pytest.raises(ValueError, match="observed does not have the structure"):
        tx.update(grads, state, params, observed={"body": True})
    with pytest.raises(ValueError, match="ScaleBySM3State"):
        tx = oxs.skip_unobserved(optax.sm3(0.1))
        tx.update(grads, tx.init(params), params, observed={"body": False, "head": True})


def test_what_is_known_to_wait_is_left_out_of_the_program() -> None:
    tx, params = oxs.skip_unobserved(oxs.per_leaf(optax.adam(0.1))), BODY_AND_HEAD
    state = tx.init(params)

    def program(observed: Any) -> str:
        return str(jax.make_jaxpr(lambda g: tx.update(g, state, params, observed=observed))(params))

    assert program(True).count(" sqrt ") == 2 * program({"body": False, "head": True}).count(" sqrt ") == 2
    assert " sqrt " not in program(False)
    # Not known: a branch a leaf, with the work inside of it.
    assert program(jnp.asarray(True)).count("= cond[") == 2


# Probes.


def watched_run(loss: Any, body: Any, **numbers: Any) -> dict[str, np.ndarray]:
    """A run that skips what it may: per step whether the body was computed, whether it is frozen, the watch."""
    tx = freezing(optax.sgd(0.0), **numbers)

    def step(state: Any, now: Any) -> Any:
        loss, body = now
        observed = oxs.observed(oxs.gates(state))
        grads = {"body": jnp.where(observed["body"], body, 0.0) * jnp.ones(2), "head": jnp.ones(1)}
        _, state = tx.update(grads, state, grads, value=loss, observed=observed)
        return state, {"whole": observed["body"], "frozen": oxs.frozen(state)["body"]}

    params = {"body": jnp.ones(2), "head": jnp.ones(1)}
    run = jax.jit(lambda *now: jax.lax.scan(step, tx.init(params), now)[1], compiler_options=QUICK)
    body = jnp.broadcast_to(jnp.asarray(body, jnp.float32), np.shape(loss))
    return jax.tree.map(np.asarray, run(jnp.asarray(loss, jnp.float32), body))


def noise(steps: int, seed: int = 0) -> np.ndarray:
    return 1.0 + 0.1 * np.random.default_rng(seed).normal(size=steps)


def test_probes_are_regular_and_a_jump_of_the_loss_asks_at_once() -> None:
    loss = 1.0 + 0.1 * (-1.0) ** np.arange(400)  # standard deviation 0.1
    loss[[150, 152, 190, 260, 320]] = [1.35, 3.0, 3.0, 3.0, 1.9]
    run = watched_run(loss, SMALL, probe_every=60)
    assert run["frozen"].all()
    # Frozen with the first update, and 60 updates after every look. Step 150 is 3.5 standard deviations off: none.
    # 152 asks for 153, where the clock starts again: 213. The jump of 190 is too near to it. 260 asks for 261. By then
    # the deviation has grown to some 0.3, and 1.9 is no jump.
    assert np.flatnonzero(run["whole"]).tolist() == [0, 60, 120, 153, 213, 261, 321, 381]


def test_a_jump_thaws_within_a_step() -> None:
    loss, body = noise(300), np.full(300, SMALL)
    loss[157:], body[157:] = 3.0, 1.0
    run = watched_run(loss, body)
    assert np.flatnonzero(run["whole"])[:3].tolist() == [0, 100, 158]
    assert run["frozen"][:158].all() and not run["frozen"][158:].any()


def test_a_false_alarm_does_not_hide_a_true_one() -> None:
    loss, body = noise(300), np.full(300, SMALL)
    loss[150], loss[170:], body[170:] = 2.0, 20.0, 1.0
    run = watched_run(loss, body)
    assert np.flatnonzero(run["whole"])[:4].tolist() == [0, 100, 151, 171]
    assert run["frozen"][:171].all() and not run["frozen"][171:].any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "student", "cauchy", "steps", "falling", "constant"])
def test_at_most_a_fiftieth_of_the_steps_are_probes(kind: str) -> None:
    rng, steps = np.random.default_rng(5), np.arange(5000)
    loss = {
        "normal": 1 + 0.1 * rng.normal(size=5000),
        "student": 1 + 0.1 * rng.standard_t(2, size=5000),
        "cauchy": 1 + 0.01 * rng.standard_cauchy(size=5000),
        "steps": 1.0 + 10.0 * (steps // 700) + 0.01 * rng.normal(size=5000),
        "falling": 2 * np.exp(-steps / 500) * (1 + 0.2 * rng.normal(size=5000)),
        "constant": np.full(5000, 0.3),
    }[kind]
    run = watched_run(loss, SMALL)
    share = run["whole"][1:].mean()
    assert run["frozen"].all() and 0.009 < share <= 0.02
    if kind == "constant":
        assert share < 0.0101, "rounding is no alarm"


@pytest.mark.slow
def test_a_slow_drift_is_found_by_the_regular_probe() -> None:
    body = 1e-5 * 1.01 ** np.arange(1200)  # passes 2e-3 at step 533
    run = watched_run(noise(1200), body, alarm=None, probe_every=50)
    crossing = int(np.flatnonzero(body > 2e-3)[0])
    assert run["frozen"][:crossing].all() and not run["frozen"][crossing + 55 :].any()


def test_who_computes_everything_is_asked_for_no_probe() -> None:
    tx, params = freezing(optax.sgd(0.1), probe_every=2), BODY_AND_HEAD

    def step(state: Any, loss: jax.Array) -> Any:
        _, state = tx.update(of_sizes(params, (SMALL, LARGE)), state, params, value=loss)
        return state, (state.watch.probe, oxs.frozen(state)["body"])

    loss = jnp.where(jnp.arange(60) == 40, 100.0, 1.0)
    probes, gates = jax.jit(lambda loss: jax.lax.scan(step, tx.init(params), loss)[1])(loss)
    assert not np.any(probes) and np.all(gates)


# The state.


@pytest.mark.slow
def test_states_of_groups_are_read_together_and_follow_a_relabelling() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}

    def made(labels: Any) -> Any:
        groups = {"x": freezing(optax.sgd(0.1)), "y": freezing(oxs.per_leaf(optax.adam(0.1))), "z": optax.sgd(0.1)}
        return optax.multi_transform(groups, labels)

    old, new = made({"a": "x", "b": "y", "c": "z"}), made({"a": "y", "b": "x", "c": "z"})
    grads, state = of_sizes(params, (SMALL, LARGE, SMALL)), old.init(params)
    for _ in range(2):
        _, state = old.update(grads, state, params, value=jnp.asarray(1.0))
    assert gates_of(state) == [True, False, False]
    after = oxs.transfer_state(old, state, params, new, params)
    assert gates_of(after) == [True, False, False]
    for before, now in ((0, 1), (1, 0)):  # in the order of the labels
        one, other = states_of(state)[before], states_of(after)[now]
        assert jax.tree.leaves(one.readings) == jax.tree.leaves(other.readings)
        assert int(other.watch.losses) == 2
    with pytest.raises(ValueError, match="nothing freezes in this state"):
        oxs.frozen(optax.adam(0.1).init(params))
    # One state a leaf: the leaves' own watches.
    tx = oxs.per_leaf(freezing(optax.sgd(0.1)))
    _, state = tx.update(grads, tx.init(params), params)
    assert gates_of(state) == [True, False, True]
    assert [int(level) for level in jax.tree.leaves(oxs.gates(state))] == [1, 0, 1]


@pytest.mark.slow
def test_a_grown_leaf_is_live_and_unread_while_the_others_go_on() -> None:
    tx, before = freezing(oxs.per_leaf(optax.adam(0.1)), min_steps=2), BODY_AND_HEAD
    state = tx.init(before)
    for _ in range(3):
        _, state = tx.update(of_sizes(before, (SMALL, LARGE)), state, before, value=jnp.asarray(2.0))
    after = before | {"between": jnp.ones(4)}
    moved = oxs.transfer_state(tx, state, before, tx, after)
    assert isinstance(moved, FreezeState)
    assert leaves_by_path(oxs.frozen(moved)) == {"between": False, "body": True, "head": False}
    assert [int(seen) for seen in moved.readings.seen.values()] == [0, 3, 3]
    assert float(moved.readings.weight["between"]) == 0.0
    for name in before:
        assert_equal(moved.readings.mean[name], state.readings.mean[name])
        assert_equal(moved.streak[name], state.streak[name])
    assert_equal(moved.watch, state.watch)
    # It freezes by its own readings.
    for expected in (False, True):
        _, moved = tx.update(of_sizes(after, (SMALL, SMALL, LARGE)), moved, after, value=jnp.asarray(2.0))
        assert bool(oxs.frozen(moved)["between"]) == expected


@pytest.mark.slow
def test_elements_of_a_leaf_that_grew_keep_their_gates() -> None:
    params = {"first": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "second": {"kernel": jnp.ones((3, 2))}}
    tx = freezing(optax.sgd(0.1, momentum=0.9), per="element")
    column = jnp.array([SMALL, LARGE, SMALL])
    grads = {"first": {"kernel": jnp.ones((2, 3)) * column, "bias": column}, "second": {"kernel": jnp.ones((3, 2))}}
    _, state = tx.update(grads, tx.init(params), params)
    units = oxs.dense_chain(params, ["first", "second"])
    grown = oxs.widen(params, "scaffold", True, units, "first", 2, key=jax.random.key(0))
    moved = oxs.transfer_state(tx, state, params, tx, grown.params, growth=grown)
    gates = oxs.frozen(moved)
    assert gates["first"]["bias"].tolist() == [True, False, True, False, False]
    assert gates["first"]["kernel"].tolist() == [[True, False, True, False, False]] * 2
    assert not np.any(gates["second"]["kernel"])
    np.testing.assert_array_equal(moved.readings.mean["first"]["bias"][:3], state.readings.mean["first"]["bias"])
    grads = jax.tree.map(jnp.ones_like, grown.params)
    updates, _ = tx.update(grads | {"first": jax.tree.map(lambda g: g * SMALL, grads["first"])}, moved, grown.params)
    assert np.all(updates["second"]["kernel"])


# Clipping by what learns.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_clipping_reads_and_scales_what_learns(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    grads = {name: jnp.asarray(rng.normal(size=(3, 4)), dtype) for name in "abc"}
    grads["c"] = grads["c"].at[0, 0].set(jnp.nan)
    labels = {"a": "new", "b": "old", "c": "old"}
    live = {"by label": "a", "known": "ab", "traced": "ab", "both": "a"}
    seen = {"a": True, "b": True, "c": False}
    found = {
        "by label": oxs.clip_by_global_norm(0.5, frozen="old", labels=labels).update(grads, optax.EmptyState()),
        "known": oxs.clip_by_global_norm(0.5).update(grads, optax.EmptyState(), observed=seen),
        "traced": jax.jit(lambda seen: oxs.clip_by_global_norm(0.5).update(grads, optax.EmptyState(), observed=seen))(
            seen
        ),
        "both": oxs.clip_by_global_norm(0.5, frozen={"old"}, labels=lambda params: labels).update(
            grads, optax.EmptyState(), observed=seen
        ),
    }
    for way, (clipped, _) in found.items():
        norm = math.sqrt(sum(np.sum(np.asarray(grads[name], np.float64) ** 2) for name in live[way]))
        for name in "abc":
            assert clipped[name].dtype == dtype
            factor = 0.5 / norm if name in live[way] else 1.0
            expected = np.asarray(grads[name], np.float64) * factor
            rtol = 0 if factor == 1 else 1e-6 if dtype == jnp.float32 else 2**-8
            np.testing.assert_allclose(np.asarray(clipped[name], np.float64), expected, rtol=rtol, err_msg=way)


def test_clipping_leaves_what_is_short_as_it_is() -> None:
    grads = {"a": jnp.array([0.3, -0.4])}
    for most in (0.500001, 1e30, math.inf):
        assert_equal(oxs.clip_by_global_norm(most).update(grads, optax.EmptyState())[0], grads)
    zero = {"a": jnp.zeros(2)}
    assert_equal(oxs.clip_by_global_norm(1.0).update(zero, optax.EmptyState())[0], zero)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm"):
            oxs.clip_by_global_norm(bad)


@pytest.mark.slow
def test_clipping_keeps_the_saving_of_static_freezing() -> None:
    rng = np.random.default_rng(0)
    params = {f"layer_{i:02}": jnp.asarray(rng.normal(size=(32, 32)) / 6, jnp.float32) for i in range(12)}
    labels = {name: "old" if index < 6 else "new" for index, name in enumerate(params)}
    inner = optax.adam(1e-3)

    def loss_of(params: PyTree, batch: jax.Array) -> jax.Array:
        for kernel in params.values():
            batch = jax.nn.relu(batch @ kernel)
        return jnp.mean(batch**2)

    def flops(tx: optax.GradientTransformation) -> float:
        def step(params: PyTree, state: Any, batch: jax.Array) -> Any:
            updates, state = tx.update(jax.grad(loss_of)(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        arguments = params, jax.eval_shape(tx.init, params), jnp.ones((256, 32))
        return jax.jit(step).lower(*arguments).compile().cost_analysis()["flops"]

    frozen = oxs.freeze_labels(inner, "old", labels)
    alone, free = flops(frozen), flops(inner)
    clipped = flops(optax.chain(oxs.clip_by_global_norm(1.0, frozen="old", labels=labels), frozen))
    theirs = flops(optax.chain(optax.clip_by_global_norm(1.0), frozen))
    # Products forward 12, backward 12 and 11; with six layers frozen 12 + 6 + 5: 23 / 35 = 0.66.
    assert 0.62 < alone / free < 0.70
    assert clipped / alone < 1.03
    assert theirs / free > 0.95
