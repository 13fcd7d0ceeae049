"""Loss-aware rate and momentum: against optax where the rules are none, by second implementations where they are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structure as oxs
from optax_structure.transforms.feedback._control import FeedbackState
from optax_structure.transforms.feedback.accumulating import accumulate_gradients
from optax_structure.transforms.feedback.optimizers import feedback_adam, feedback_sgd
from optax_structure.transforms.feedback.rate import scale_by_feedback
from optax_structure.transforms.feedback.rules import FeedbackSignals, trend_rate

PARAMS = {"a": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(2)}
LABELS = {"a": "scaffold", "b": "new"}
BARE: dict[str, Any] = {"lr_rules": {}, "momentum_rules": {}}


def gradients(steps: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(steps, *p.shape)), jnp.float32), PARAMS)


def run(tx: optax.GradientTransformation, grads: Any, **extra: Any) -> tuple[Any, Any]:
    """The updates of all steps and the last state; ``extra`` is stacked along the steps, as ``grads`` is."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def steps(grads: Any, extra: Any) -> Any:
        def step(carry: Any, given: Any) -> Any:
            params, state = carry
            updates, state = tx.update(given[0], state, params, **given[1])
            return (optax.apply_updates(params, updates), state), updates

        (_, state), updates = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), (grads, extra))
        return updates, state

    return steps(grads, extra)


def first_step(tx: optax.GradientTransformation, **extra: Any) -> tuple[Any, Any]:
    """The update and the state after one step, in one program: op by op each would be compiled by itself."""
    tx = optax.with_extra_args_support(tx)
    return jax.jit(lambda: tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra))()


def numbers(tree: dict[str, jax.Array]) -> dict[str, float]:
    """By rule, without the name of the field."""
    return {name.partition("/")[2]: round(float(leaf), 4) for name, leaf in tree.items()}


def losses(steps: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(2 * np.exp(-np.arange(steps) / 20) + 0.1 * rng.random(steps), jnp.float32)


def assert_trees(compare: Callable[..., None], actual: Any, expected: Any, **tolerances: float) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        compare(np.asarray(one), np.asarray(other), **tolerances)


same = functools.partial(assert_trees, np.testing.assert_array_equal)
close = functools.partial(assert_trees, np.testing.assert_allclose)


def half(signals: FeedbackSignals, memory: jax.Array) -> tuple[Any, Any]:
    """A rule of one's own: half of the base rate, whatever the loss."""
    del signals
    return math.log(0.5), memory


# Without rules.


@pytest.mark.parametrize("nesterov", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sgd_without_rules_is_optax_sgd_bit_for_bit(nesterov: bool) -> None:
    schedule = optax.linear_schedule(0.3, 0.1, 4)
    grads = gradients(5)
    expected, _ = run(optax.sgd(schedule, momentum=0.9, nesterov=nesterov), grads)
    updates, state = run(feedback_sgd(schedule, nesterov=nesterov, **BARE), grads, value=losses(5))
    same(updates, expected)
    assert (float(state.control.scale), float(state.control.learning_rate)) == (1.0, pytest.approx(0.1))


@pytest.mark.slow
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_without_rules_is_optax_adam(weight_decay: float) -> None:
    grads = gradients(30)
    expected, _ = run(optax.adamw(0.01, weight_decay=weight_decay), grads)
    updates, _ = run(feedback_adam(0.01, weight_decay=weight_decay, **BARE), grads, value=losses(30))
    close(updates, expected, rtol=2e-5, atol=1e-8)


def test_no_rules_and_weights_of_others_leave_any_optimizer_as_it_is() -> None:
    grads = gradients(5)
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), scale_by_feedback(lr_rules={}))
    same(run(tx, grads, value=losses(5))[0], run(optax.sgd(0.1, momentum=0.9), grads)[0])


# The momentum.


@pytest.mark.slow
def test_a_changed_momentum_changes_the_memory_and_not_the_step() -> None:
    def falling(signals: FeedbackSignals, memory: jax.Array) -> tuple[Any, Any]:
        return jnp.where(signals.count <= 200, 0.95, 0.6), memory

    tx = feedback_sgd(0.1, lr_rules={}, momentum_rules={falling: 1.0})
    constant = jax.tree.map(lambda g: jnp.broadcast_to(g[:1], (220, *g.shape[1:])), gradients(1))
    updates, state = run(tx, constant, value=jnp.ones(220))
    for steady in (199, 205, 219):  # -rate * g / (1 - .9), whatever the momentum
        close(
            jax.tree.map(lambda u, at=steady: u[at], updates),
            jax.tree.map(lambda g: -0.1 * g[0] / (1 - 0.9), constant),
            rtol=1e-4,
        )
    assert float(state.control.momentum) == pytest.approx(0.6)


def by_loss(signals: FeedbackSignals, memory: jax.Array) -> tuple[Any, Any]:
    """A momentum that is the loss."""
    return signals.loss, memory


def test_sgd_with_a_momentum_that_changes_by_a_second_implementation() -> None:
    momenta, grads = np.float32([0.9, 0.5, 0.98, 0.7, 0.2]), gradients(5)
    for nesterov in (False, True):
        tx = feedback_sgd(0.25, nesterov=nesterov, lr_rules={}, momentum_rules={by_loss: 1.0})
        updates, _ = run(tx, grads, value=momenta)
        trace, expected = np.zeros(2), []
        for m, g in zip(np.clip(momenta, 0.5, 0.98), np.asarray(grads["b"], float), strict=True):
            trace = m * trace + (1 - m) / 0.1 * g
            expected.append(-0.25 * (m * trace + (1 - m) / 0.1 * g if nesterov else trace))
        np.testing.assert_allclose(updates["b"], expected, rtol=1e-4)


@pytest.mark.slow
def test_adam_with_a_b1_that_changes_by_a_second_implementation() -> None:
    b1s, grads = np.float32([0.9, 0.5, 0.98, 0.7, 0.6]), gradients(5)
    tx = feedback_adam(0.1, b2=0.99, weight_decay=0.5, lr_rules={}, momentum_rules={by_loss: 1.0})
    updates, _ = run(tx, grads, value=b1s)
    mu, nu, left1, left2, param, expected = 0.0, 0.0, 1.0, 1.0, np.ones(2), []
    for b1, g in zip(np.clip(b1s, 0.5, 0.98), np.asarray(grads["b"], float), strict=True):
        mu, nu = b1 * mu + (1 - b1) * g, 0.99 * nu + 0.01 * g**2
        left1, left2 = left1 * b1, left2 * 0.99  # what the zeros at the start still weigh
        way = mu / (1 - left1) / (np.sqrt(nu / (1 - left2)) + 1e-8)
        expected.append(-0.1 * (way + 0.5 * param))
        param = param + expected[-1]
    np.testing.assert_allclose(updates["b"], expected, rtol=1e-4)


# The rate.


def test_weights_follow_the_timetable() -> None:
    tx = scale_by_feedback(lr_rules={"trend": 2.0, "variance": 1.0, "cyclical": 4.0, half: 3.0}, total_steps=4)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for step in (1, 2, 3, 4, 5):
        _, state = update(PARAMS, state, value=1.0)
        p = min(step / 4, 1.0)
        each = np.array([2 * (2 * p * (1 - p) + 0.05), (1 - p) ** 2 + 0.05, 4 * (p**2 + 0.05), 3 * (1 / 3 + 0.05)])
        weights = [float(state.lr_weights[f"lr_weights/{name}"]) for name in ("trend", "variance", "cyclical", "half")]
        np.testing.assert_allclose(weights, each / each.sum(), rtol=1e-5)


@pytest.mark.parametrize("timetable", [{}, {"dynamic_weights": False, "total_steps": 4}])
def test_weights_stay_without_a_timetable(timetable: dict[str, Any]) -> None:
    tx = scale_by_feedback(lr_rules={"trend": 2.0, half: 3.0}, **timetable)
    _, state = first_step(tx, value=1.0)
    assert numbers(state.lr_weights) == {"trend": 0.4, "half": 0.6}


def test_default_rules_do_without_a_gradient_and_say_so_in_the_weights() -> None:
    tx = scale_by_feedback()
    seen = [numbers(first_step(tx, value=1.0, **e)[1].lr_weights) for e in ({}, {"grads": PARAMS}, {"grad_norm": 1.0})]
    all_three = {"trend": 0.6, "variance": 0.3, "grad_norm": 0.1}
    assert seen == [{"trend": 0.6667, "variance": 0.3333, "grad_norm": 0.0}, all_three, all_three]


def test_a_rule_that_counts_nothing_asks_for_nothing() -> None:
    tx = scale_by_feedback(lr_rules={"trend": 1.0, "hypergradient": 0.0, "grad_norm": 0.0})
    updates, state = first_step(tx, value=1.0)  # no grads=
    assert state.last is None and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
    assert numbers(state.lr_weights) == {"trend": 1.0, "hypergradient": 0.0, "grad_norm": 0.0}


def test_observe_hands_over_the_raw_gradient() -> None:
    tx = oxs.observe(optax.chain(optax.adam(0.1), scale_by_feedback(lr_rules={"grad_norm": 1.0})))
    _, state = first_step(tx, value=1.0)
    expected = math.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in PARAMS.values()))
    assert float(state.inner_state[1].mean_grad_norm) == pytest.approx(expected)


def test_partials_of_one_rule_have_names_of_their_own() -> None:
    slow, fast = (functools.partial(trend_rate, up=up) for up in (0.01, 0.1))
    state = scale_by_feedback(lr_rules={slow: 1.0, fast: 1.0, "trend": 1.0}).init(PARAMS)
    assert list(numbers(state.lr_weights)) == ["trend_rate", "trend_rate_2", "trend"]


@pytest.mark.parametrize("ascending", [pytest.param(True, marks=pytest.mark.slow), False])
def test_hypergradient_compares_with_the_last_step_on_whichever_side_the_update_is(ascending: bool) -> None:
    before = optax.identity() if ascending else optax.scale(-1.0)
    tx = oxs.observe(optax.chain(before, scale_by_feedback(lr_rules={"hypergradient": 1.0})))
    state, seen, update = tx.init(PARAMS), [], jax.jit(tx.update)
    turned = jax.tree.map(jnp.negative, PARAMS)
    for grads in (PARAMS, PARAMS, turned, turned):
        _, state = update(grads, state, PARAMS, value=1.0)
        seen.append(float(state.inner_state[1].lr_memory["lr_memory/hypergradient"]))
    np.testing.assert_allclose(seen, [0.0, 0.02, 0.0, 0.02], atol=1e-6)
    assert scale_by_feedback().init(PARAMS).last is None  # a copy of the update only where it is read


@pytest.mark.slow
@pytest.mark.parametrize("factory", [feedback_sgd, feedback_adam])
def test_hypergradient_of_the_optimizers_keeps_no_copy(factory: Callable[..., Any]) -> None:
    twice = jax.tree.map(lambda p: jnp.stack([p, p]), PARAMS)
    _, state = run(factory(0.1, lr_rules={"hypergradient": 1.0}, momentum_rules={}), twice, value=jnp.ones(2))
    assert state.control.last is None
    g = np.concatenate([np.ravel(leaf) for leaf in PARAMS.values()])
    way = {feedback_sgd: g, feedback_adam: np.sign(g)}[factory]
    cosine = g @ way / np.linalg.norm(g) / np.linalg.norm(way)
    np.testing.assert_allclose(state.control.lr_memory["lr_memory/hypergradient"], 0.02 * cosine, rtol=1e-4)


# Steps that are none.


def with_one_more(tree: Any, at: int, value: float) -> Any:
    """One more step before ``at``, in which every number is ``value``."""
    return jax.tree.map(lambda leaf: jnp.insert(leaf, at, value, axis=0), tree)


FACTORIES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: feedback_sgd(optax.linear_schedule(0.1, 0.0, 50), total_steps=20),
    "adam": lambda: feedback_adam(0.1, weight_decay=0.1, total_steps=20),
    "scale_by": lambda: oxs.observe(scale_by_feedback(lr_rules={"trend": 1.0, "hypergradient": 1.0})),
}


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("name", FACTORIES)
def test_a_step_that_is_not_finite_loses_nothing(name: str, what: str, bad: float) -> None:
    grads, value = gradients(12), losses(12)
    expected, clean = run(FACTORIES[name](), grads, value=value)
    grads, value = with_one_more(grads, 5, bad if what == "gradient" else 1.0), with_one_more(value, 5, 1.0)
    value = value.at[5].set(bad) if what == "loss" else value
    updates, state = run(FACTORIES[name](), grads, value=value)
    assert not any(np.any(np.asarray(leaf[5])) for leaf in jax.tree.leaves(updates))
    close(jax.tree.map(lambda leaf: np.delete(leaf, 5, axis=0), updates), expected, rtol=1e-6)
    skipped = [field for field in jax.tree_util.tree_leaves_with_path(state) if "skipped" in str(field[0])]
    assert [int(count) for _, count in skipped] == [1]
    without = jax.tree_util.tree_map_with_path(lambda p, leaf: leaf * 0 if "skipped" in str(p) else leaf, state)
    close(without, clean, rtol=1e-6)


def test_losses_whose_squares_or_means_are_infinite_do_not_stay() -> None:
    tx = feedback_sgd(0.1)
    _, state = run(tx, gradients(8), value=losses(8).at[4].set(3e38))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    # From the first of these to the second there is no finite way.
    _, state = run(tx, gradients(8), value=losses(8).at[:4].set(jnp.array([3e38, -3e38, 3e38, 1.0])))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert int(state.control.skipped) == 1 and float(state.control.learning_rate) > 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_rule_that_answers_no_number_changes_nothing_at_that_step(poison: float) -> None:
    def now_and_then(signals: FeedbackSignals, memory: jax.Array) -> tuple[Any, Any]:
        bad = signals.count == 2
        return jnp.where(bad, poison, math.log(0.5)), jnp.where(bad, poison, memory + 1.0)

    def by_memory(signals: FeedbackSignals, memory: jax.Array) -> tuple[Any, Any]:
        """A finite answer beside a memory that is none."""
        return 0.7, jnp.where(signals.count == 2, poison, memory + 1.0)

    tx = feedback_sgd(
        0.1,
        smooth=0.0,
        smooth_down=0.0,
        lr_rules={now_and_then: 1.0},
        momentum_rules={now_and_then: 1.0, by_memory: 1.0},
    )
    state, update, scales, momenta = tx.init(PARAMS), jax.jit(tx.update), [], []
    for _ in range(3):
        updates, state = update(PARAMS, state, value=1.0)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
        scales.append(float(state.control.scale))
        momenta.append(float(state.control.momentum))
    guard = (1.5 / 0.5) / (1.9 / 0.1)  # the lower momentum takes the rate down
    np.testing.assert_allclose(momenta, [0.5, 0.9, 0.5], rtol=1e-5)
    np.testing.assert_allclose(scales, [0.5 * guard, 1.0, 0.5 * guard], rtol=1e-5)
    assert numbers(state.control.lr_memory) == {"now_and_then": 2.0}
    assert numbers(state.control.momentum_memory) == {"now_and_then": 2.0, "by_memory": 2.0}


# Which gradients were computed.


@pytest.mark.slow
def test_unobserved_leaves_wait() -> None:
    grads = gradients(6)
    unseen = grads | {"b": grads["b"].at[:3].set(jnp.nan)}  # whatever is there is not read
    observed = {"a": jnp.ones(6, bool), "b": jnp.arange(6) >= 3}
    for factory in (feedback_sgd, feedback_adam):
        updates, state = run(factory(0.1, **BARE), unseen, value=losses(6), observed=observed)
        late, _ = run(factory(0.1, **BARE), jax.tree.map(lambda g: g[3:], grads), value=losses(3))
        always, _ = run(factory(0.1, **BARE), grads, value=losses(6))
        assert not np.any(updates["b"][:3])
        same(updates["a"], always["a"])
        close(updates["b"][3:], late["b"], rtol=1e-6)  # it began at its first gradient
        assert int(state.control.skipped) == 0


def test_observed_may_be_a_prefix_or_one_bool_and_norms_leave_the_others_out() -> None:
    tx = scale_by_feedback(lr_rules={"grad_norm": 1.0})

    def norm(**extra: Any) -> float:
        return float(first_step(tx, value=1.0, grads=PARAMS, **extra)[1].mean_grad_norm)

    of = {name: float(jnp.sum(leaf**2)) for name, leaf in PARAMS.items()}
    assert norm() == norm(observed=True) == pytest.approx(math.sqrt(of["a"] + of["b"]))
    assert norm(observed={"a": False, "b": True}) == pytest.approx(math.sqrt(of["b"]))
    assert norm(observed={"a": jnp.asarray(True), "b": jnp.asarray(False)}) == pytest.approx(math.sqrt(of["a"]))
    assert norm(observed=False) == 0.0  # nothing was computed: the mean waits
    updates, state = first_step(feedback_sgd(0.1), value=1.0, observed=False)
    assert not any(np.any(leaf) for leaf in updates.values()) and float(state.control.mean_grad_norm) == 0.0


# Losses of one's own.


@pytest.mark.slow
def test_every_label_has_a_loop_of_its_own() -> None:
    steps, grads = 12, gradients(12)
    value = {"scaffold": losses(steps), "new": 1.0 + losses(steps, 1)[::-1]}
    for rules in (None, {"trend": 0.5, "hypergradient": 0.5}):
        tx = oxs.observe(scale_by_feedback(lr_rules=rules, per_label=True, labels=LABELS))
        updates, _ = run(tx, grads, value=value)
        groups = {label: scale_by_feedback(lr_rules=rules, loss=label) for label in ("scaffold", "new")}
        expected, _ = run(oxs.observe(optax.partition(groups, LABELS)), grads, value=value)
        close(updates, expected, rtol=1e-5)


def test_one_label_skips_alone() -> None:
    tx = scale_by_feedback(per_label=True, labels=LABELS)
    updates, state = first_step(tx, value={"scaffold": math.nan, "new": 1.0})
    assert not np.any(updates["a"]) and np.all(updates["b"])
    assert numbers(state.skipped) == {"scaffold": 1, "new": 0}
    _, state = jax.jit(tx.update)(PARAMS, state, value=2.0)  # one loss for all
    assert numbers(state.first) == {"scaffold": 2.0, "new": 1.0}


def test_labels_find_their_loops_again_after_a_relabelling() -> None:
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}

    def made(labels: dict[str, str]) -> Any:
        return optax.chain(optax.scale(-0.1), scale_by_feedback(per_label=True, labels=labels))

    old = made({"a": "neck", "b": "scaffold", "c": "scaffold"})
    _, state = jax.jit(old.update)(params, old.init(params), params, value={"neck": 1.0, "scaffold": 2.0})
    new = made({"a": "adapter", "b": "neck", "c": "scaffold"})
    after = oxs.transfer_state(old, state, params, new, params)[1]
    assert numbers(after.first) == {"adapter": 0.0, "neck": 1.0, "scaffold": 2.0}
    weights = numbers(after.lr_weights)
    assert weights["trend/neck"] > 0 and weights["trend/adapter"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adam", "scale_by"])
def test_growth_keeps_the_loop_and_moves_the_moments(name: str) -> None:
    params = {"in": {"kernel": jnp.ones((3, 4))}, "out": {"kernel": jnp.ones((4, 2))}}
    labels, masks = (jax.tree.map(lambda _, x=x: x, params) for x in ("scaffold", jnp.asarray(True)))
    tx = FACTORIES[name]()
    state, update = tx.init(params), jax.jit(tx.update)
    for value in (1.0, 0.5):
        _, state = update(params, state, params, value=value)
    units = oxs.dense_chain(params, ["in", "out"])
    grown = oxs.widen(params, labels, masks, units, "in", 6, key=jax.random.key(0))
    after = oxs.transfer_state(tx, state, params, tx, grown.params, growth=grown)
    jax.eval_shape(tx.update, grown.params, after, grown.params, value=0.4)
    scalars, kept = ([leaf for leaf in jax.tree.leaves(tree) if jnp.ndim(leaf) == 0] for tree in (state, after))
    np.testing.assert_array_equal(kept, scalars)


def test_value_may_be_a_mapping_inside_a_partition() -> None:
    groups = {label: feedback_sgd(0.1, loss=label) for label in ("scaffold", "new")}
    tx = optax.partition(groups, LABELS)
    _, state = first_step(tx, value={"scaffold": 3.0, "new": 5.0})
    firsts = {label: float(of.inner_state.control.first) for label, of in state.inner_states.items()}
    assert firsts == {"scaffold": 3.0, "new": 5.0}


# Accumulated gradients.


@pytest.mark.slow
def test_accumulation_feeds_the_mean_loss_of_the_window() -> None:
    grads = gradients(6)
    value = jnp.array([1.0, 3.0, 5.0, 7.0, 0.0, 2.0])
    updates, state = run(accumulate_gradients(feedback_sgd(0.1), 2), grads, value=value)
    means = jax.tree.map(lambda g: g.reshape(3, 2, *g.shape[1:]).mean(1), grads)
    expected, plain = run(feedback_sgd(0.1), means, value=jnp.array([2.0, 6.0, 1.0]))
    close(jax.tree.map(lambda u: u[1::2], updates), expected, rtol=1e-5)
    assert not any(np.any(leaf[::2]) for leaf in jax.tree.leaves(updates))
    close(state.multi_steps.inner_opt_state.control, plain.control, rtol=1e-5)


def test_accumulation_of_bf16_averages_in_float32() -> None:
    # What optax.contrib.reduce_on_plateau gets wrong: 500 losses of 2 and 500 of 1 in bfloat16.
    tx = accumulate_gradients(optax.identity(), 1000)

    def step(state: Any, value: jax.Array) -> Any:
        return tx.update(jnp.ones((), jnp.bfloat16), state, value=value)[1], None

    value = jnp.repeat(jnp.array([2.0, 1.0], jnp.bfloat16), 500)
    state = jax.jit(lambda v: jax.lax.scan(step, tx.init(jnp.ones((), jnp.bfloat16)), v)[0])(value)
    assert float(state.value) == pytest.approx(1.5, abs=1e-4)


@pytest.mark.slow
def test_accumulation_without_a_loss_is_multi_steps_and_several_losses_have_names() -> None:
    grads = gradients(4)
    plain = optax.MultiSteps(optax.adam(0.1), 2)
    expected, _ = run(optax.GradientTransformationExtraArgs(plain.init, plain.update), grads)
    updates, _ = run(accumulate_gradients(optax.adam(0.1), 2), grads)
    same(updates, expected)

    labelled = scale_by_feedback(per_label=True, labels=LABELS)
    tx = accumulate_gradients(labelled, lambda step: 2, losses=("scaffold", "new"))
    value = {"scaffold": jnp.array([1.0, 2.0]), "new": jnp.array([math.nan, 4.0])}
    _, state = run(tx, gradients(2), value=value)
    assert float(state.value["scaffold"]) == 1.5
    assert numbers(state.multi_steps.inner_opt_state.skipped) == {"scaffold": 0, "new": 1}
    # The next window forgets it.
    _, state = jax.jit(tx.update)(PARAMS, state, value={"scaffold": 1.0, "new": 8.0})
    assert float(state.value["new"]) == 8.0


# What is refused.

BAD = (
    ({"lr_rules": {"trends": 1.0}}, r"'trends'; the rules are \['cyclical', 'grad_norm'"),
    ({"lr_rules": ("trend",)}, r"lr_rules=\('trend',\) must be a mapping"),
    ({"lr_rules": {3: 1.0}}, "lr_rules holds 3"),
    ({"lr_rules": {"trend": -1.0}}, r"lr_rules\['trend'\]=-1\.0"),
    ({"lr_rules": {"trend": math.nan}}, r"lr_rules\['trend'\]=nan"),
    ({"lr_rules": {"trend": 0.0}}, "at least one rule a weight above 0"),
    ({"lr_rules": {lambda signals, memory: signals.loss: 1.0}}, "must return two scalars"),
    ({"lr_rules": {lambda signals, memory: (jnp.ones(2), memory): 1.0}}, "must return two scalars"),
    ({"lr_rules": {"trend": "x"}}, r"lr_rules\['trend'\]='x' must be a number"),
    (
        {"lr_rules": {lambda signals, memory: (-signals.progress, memory): 1.0}},
        r"total_steps=None .*'<lambda>'.* read it",
    ),
    ({"total_steps": 0}, "total_steps=0"),
    ({"total_steps": 10.5}, r"total_steps=10\.5"),
    ({"total_steps": True}, "total_steps=True"),
    ({"min_scale": 0.0}, r"min_scale=0\.0"),
    ({"min_scale": 2.0, "max_scale": 1.0}, r"max_scale=1\.0 must lie in \[2\.0"),
    ({"max_scale": math.nan}, "max_scale=nan"),
    ({"smooth": 1.0}, r"smooth=1\.0"),
    ({"smooth_down": -0.1}, r"smooth_down=-0\.1"),
)


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_numbers_and_rules_that_are_refused(bad: dict[str, Any], message: str) -> None:
    for factory in (scale_by_feedback, functools.partial(feedback_sgd, 0.1), functools.partial(feedback_adam, 0.1)):
        with pytest.raises(ValueError, match=message):
            factory(**bad)


OWN_BAD: tuple[tuple[Callable[[], Any], str], ...] = (
    (lambda: feedback_sgd(-0.1), r"learning_rate=-0\.1"),
    (lambda: feedback_sgd(math.nan), "learning_rate=nan"),
    (lambda: feedback_sgd(cast(Any, "x")), "learning_rate='x' must be a number"),
    (lambda: feedback_sgd(0.1, momentum=0.99), r"momentum=0\.99 .* from min_momentum to max_momentum"),
    (lambda: feedback_sgd(0.1, momentum=1.0), r"momentum=1\.0 must be below 1"),
    (lambda: feedback_sgd(0.1, momentum=0.3), r"momentum=0\.3 must lie in \[0\.5, 0\.98\]"),
    (lambda: feedback_sgd(0.1, max_momentum=1.0), r"max_momentum=1\.0 must be below 1"),
    (lambda: feedback_sgd(0.1, min_momentum=0.9, max_momentum=0.5), r"max_momentum=0\.5 must lie in \[0\.9"),
    (lambda: feedback_sgd(0.1, momentum_rules={"trend": 1.0}), "'trend'; the rules are .*'inverse'"),
    (lambda: feedback_adam(0.1, b1=0.99), r"b1=0\.99 must lie in"),
    (lambda: feedback_adam(0.1, b2=1.0), r"b2=1\.0"),
    (lambda: feedback_adam(0.1, eps=-1.0), r"eps=-1\.0"),
    (lambda: feedback_adam(0.1, weight_decay=-1.0), r"weight_decay=-1\.0"),
    (lambda: scale_by_feedback(per_label=True), "per_label=True with labels=None"),
    (lambda: scale_by_feedback(labels=LABELS), "per_label=False with labels=given"),
    (lambda: scale_by_feedback(per_label=True, labels=lambda params: LABELS), "labels=label_fn"),
    (lambda: accumulate_gradients(optax.identity(), 0), "every=0"),
    (lambda: accumulate_gradients(optax.identity(), 1.5), r"every=1\.5"),
)


@pytest.mark.parametrize(("make", "message"), OWN_BAD)
def test_what_one_factory_refuses(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_losses_and_gradients_that_are_refused() -> None:
    plain, labelled = scale_by_feedback(), scale_by_feedback(per_label=True, labels=LABELS)
    reading = scale_by_feedback(lr_rules={"grad_norm": 1.0})
    turning = scale_by_feedback(lr_rules={"hypergradient": 1.0})
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (plain, {}, r"needs value=: call tx\.update"),
        (plain, {"value": jnp.ones(3)}, r"value= must be a scalar, got shape \(3,\)"),
        (plain, {"value": "x"}, "value='x' must be a scalar"),
        (labelled, {"value": {"scaffold": "x", "new": 1.0}}, r"value\['scaffold'\]='x' must be a scalar"),
        (plain, {"value": {"experts": 1.0}}, r"value= is a mapping of \['experts'\]"),
        (labelled, {"value": {"scaffold": 1.0}}, r"value= has no entry 'new'; it has \['scaffold'\]"),
        (labelled, {"value": {"scaffold": 1.0, "new": jnp.ones(1)}}, r"value\['new'\]= must be a scalar"),
        (scale_by_feedback(loss="experts"), {"value": {"head": 1.0}}, "no entry 'experts'"),
        (reading, {"value": 1.0}, r"needs grads= for the rules \['grad_norm'\].*observe"),
        (turning, {"value": 1.0, "grad_norm": 1.0}, r"needs grads= for the rules \['hypergradient'\]"),
        (reading, {"value": 1.0, "grad_norm": jnp.ones(2)}, r"grad_norm= must be a scalar"),
        (feedback_sgd(0.1), {}, "feedback_sgd needs value="),
        (feedback_adam(0.1), {}, "feedback_adam needs value="),
        (feedback_adam(0.1, weight_decay=0.1), {"value": 1.0}, r"needs params for weight_decay=0\.1"),
        (accumulate_gradients(plain, 2), {"value": {"a": 1.0}}, r"with \['a'\], and losses=None"),
        (accumulate_gradients(plain, 2, losses=("a",)), {"value": 1.0}, "a single loss, and losses="),
        (accumulate_gradients(plain, 2), {"value": jnp.ones(2)}, r"scalar, got shape \(2,\)"),
    ]
    for tx, extra, message in cases:
        with pytest.raises(ValueError, match=message):
            tx.update(PARAMS, tx.init(PARAMS), **extra)


# With the rest of the library.


@pytest.mark.slow
def test_rates_read_the_scale_in_force() -> None:
    tx = oxs.observe(optax.chain(optax.adam(0.1), scale_by_feedback()))
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for value in (1.0, 0.9, 0.8):
        _, state = update(PARAMS, state, PARAMS, value=value)
    rates = jax.jit(functools.partial(oxs.rates, tx))
    seen = rates(state, PARAMS, grads=PARAMS, value=0.7)
    _, after = update(PARAMS, state, PARAMS, value=0.7)
    np.testing.assert_allclose(list(seen.values()), float(after.inner_state[1].scale), rtol=1e-6)
    for factory in (feedback_sgd, feedback_adam):
        tx = factory(0.1)
        rates = jax.jit(functools.partial(oxs.rates, tx))
        np.testing.assert_allclose(list(rates(tx.init(PARAMS), PARAMS, value=1.0).values()), 0.1, rtol=0.05)


def test_describe_names_the_rules() -> None:
    assert "scale_by_feedback(lr_rules={'trend': 0.6, 'variance': 0.3, 'grad_norm': 0.1}" in oxs.describe(
        scale_by_feedback(), PARAMS
    )
    for tx in (feedback_sgd(0.1), feedback_adam(0.1)):
        assert "momentum_rules={'relative': 0.7, 'inverse': 0.3}" in oxs.describe(tx)
    # The sizes that are said are those that there are.
    for tx in (scale_by_feedback(), feedback_sgd(0.1)):
        control = getattr(tx.init(PARAMS), "control", tx.init(PARAMS))
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(control))
        assert f": {size} B" in oxs.describe(tx)


@pytest.mark.parametrize("factory", [feedback_sgd, feedback_adam])
def test_bf16_parameters_have_float32_control(factory: Callable[..., Any]) -> None:
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = factory(0.1, total_steps=10)
    state = tx.init(params)
    shapes = jax.eval_shape(lambda s: tx.update(params, s, params, value=jnp.ones((), jnp.bfloat16)), state)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes[0])} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.control)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes[1]) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )


@pytest.mark.slow
def test_the_second_moment_of_bf16_parameters_does_not_stand_still() -> None:
    ones = jnp.ones(2, jnp.bfloat16)
    tx = feedback_adam(0.5, **BARE)

    def step(state: Any, _: None) -> Any:
        updates, state = tx.update(ones, state, ones, value=1.0)
        return state, updates

    state, updates = jax.jit(lambda: jax.lax.scan(step, tx.init(ones), length=3000))()
    assert (state.mu.dtype, state.nu.dtype, updates.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    # Of gradients of 1 every update is -rate, but for the 2 % in which mu itself stands still.
    np.testing.assert_allclose(updates.astype(jnp.float32), -0.5, rtol=0.03)
    wide = tx.init({"c": jnp.ones(2, jnp.complex64), "i": jnp.ones(2, jnp.float16)})
    assert {leaf.dtype for leaf in wide.nu.values()} == {jnp.dtype(jnp.float32)}


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "freezing": oxs.freeze_on_small_gradients,
    "accumulated": lambda tx: accumulate_gradients(tx, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("name", ["sgd", "adam", "scale_by", "per_label"])
def test_another_wrapping_goes_on_with_the_same_loop(name: str, wrap: str) -> None:
    def scale(signals: FeedbackSignals, memory: jax.Array) -> tuple[Any, Any]:
        """A rule that is called like a field of the state."""
        return signals.trend, memory + 1.0

    factories: dict[str, Callable[[], Any]] = {
        "sgd": lambda: feedback_sgd(0.1, lr_rules={"variance": 1.0, scale: 1.0}, momentum_rules={scale: 1.0}),
        "adam": lambda: feedback_adam(0.1),
        "scale_by": lambda: optax.chain(optax.adam(0.1), scale_by_feedback(lr_rules={"variance": 1.0, scale: 1.0})),
        "per_label": lambda: optax.chain(optax.adam(0.1), scale_by_feedback(per_label=True, labels=LABELS)),
    }
    plain, wrapped = factories[name](), WRAPPED[wrap](factories[name]())
    for old, new in ((plain, wrapped), (wrapped, plain)):
        state, update = old.init(PARAMS), jax.jit(old.update)
        for value in (1.0, 0.5, 0.7, math.nan):
            _, state = update(PARAMS, state, PARAMS, value=value)
        after = oxs.transfer_state(old, state, PARAMS, new, PARAMS)
        before, now = (next(n for n in jax.tree.leaves(s, is_leaf=is_loop) if is_loop(n)) for s in (state, after))
        same(now, before)


def is_loop(node: Any) -> bool:
    return isinstance(node, FeedbackState)


@pytest.mark.slow
def test_sgd_and_adam_go_on_with_each_others_loop_and_moments_of_their_own() -> None:
    old, new = feedback_sgd(0.1), feedback_adam(0.1)
    state, update = old.init(PARAMS), jax.jit(old.update)
    for value in (1.0, 0.5, 0.7):
        _, state = update(PARAMS, state, PARAMS, value=value)
    after = oxs.transfer_state(old, state, PARAMS, new, PARAMS)
    same(after.control, state.control)
    same(after._replace(control=None), new.init(PARAMS)._replace(control=None))


STEEP = jnp.array([1.0, 40.0])
HIGHEST = 2 * 1.9 / 40
"""2 (1 + m) / curvature: above this rate momentum does not converge."""


def descend(tx: optax.GradientTransformationExtraArgs) -> np.ndarray:
    """The losses of 400 steps down a valley whose walls are 40 times as steep as its floor."""

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(lambda p: jnp.sum(STEEP * p**2) / 2)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), value

    params = jnp.ones(2)
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=400)[1])())


@pytest.mark.slow
@pytest.mark.parametrize("total_steps", [None, 400])
def test_a_rate_three_times_too_large_is_brought_down(total_steps: int | None) -> None:
    assert not descend(optax.with_extra_args_support(optax.sgd(3 * HIGHEST, momentum=0.9)))[-1] < 1e6
    assert descend(feedback_sgd(3 * HIGHEST, total_steps=total_steps))[-1] < 1e-6


@pytest.mark.slow
def test_a_momentum_below_the_base_takes_the_rate_down() -> None:
    def low(signals: FeedbackSignals, memory: jax.Array) -> tuple[Any, Any]:
        del signals
        return 0.5, memory

    def as_it_is(signals: FeedbackSignals, memory: jax.Array) -> tuple[Any, Any]:
        del signals
        return 0.0, memory

    rate, rules = 0.5 * HIGHEST, {"momentum_rules": {low: 1.0}, "smooth": 0.0}
    tx = feedback_sgd(rate, lr_rules={as_it_is: 1.0}, **rules)
    _, state = first_step(tx, value=1.0)
    assert float(state.control.scale) == pytest.approx(3 / 19, rel=1e-5)  # (1 + m) / (1 - m) of .5 and of .9
    assert descend(tx)[-1] < 1e-6
    # Without a rule of the rate the rate stays, and at half of what is too much for .9 the shorter memory diverges.
    assert not descend(feedback_sgd(rate, lr_rules={}, **rules))[-1] < 1e6
