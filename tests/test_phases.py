"""Phases: values worked by hand, a second implementation of the loss phases, and what growth does to the statistics."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structure as oxs

ONE = jnp.ones(())


def run(tx: optax.GradientTransformation, **extra: Any) -> tuple[np.ndarray, Any]:
    """The factor at every step of the stacked extra arguments, and the last state: one program."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def steps(extra: Any) -> Any:
        def step(state: Any, extra: Any) -> Any:
            update, state = tx.update(ONE, state, **extra)
            return state, update

        return jax.lax.scan(step, tx.init(ONE), extra)

    state, factors = steps(extra)
    return np.asarray(factors), state


# By the share of extreme units.


def with_extreme(counts: list[int], units: int) -> oxs.Extrema:
    """Two layers, ``counts[step]`` of whose units are extreme: the first of them dead, the others saturated."""
    first = np.arange(units // 2) < np.minimum(counts, units // 2)[:, None]
    second = np.arange(units - units // 2) < np.maximum(np.array(counts) - units // 2, 0)[:, None]
    dead = {"hidden": jnp.asarray(first), "head": jnp.zeros(second.shape, bool)}
    return oxs.Extrema(dead, {"hidden": jnp.zeros(first.shape, bool), "head": jnp.asarray(second)})


def test_extrema_phase_leaves_a_phase_downwards_later_than_upwards() -> None:
    tx = oxs.scale_by_extrema_phase(explosive=0.5, steady=0.25, scales=(4.0, 2.0, 1.0), hysteresis=0.5)
    # Of 16 units: up above 8 and above 4; down at 4 (half of 8) and at 2 (half of 4).
    counts = [8, 9, 8, 5, 4, 3, 2, 3, 4, 5, 9, 1, 16]
    factors, state = run(tx, extrema=with_extreme(counts, 16))
    assert factors.tolist() == [2, 4, 4, 4, 2, 2, 1, 1, 1, 2, 4, 1, 4]
    assert (int(state.phase), bool(state.seen), float(state.share)) == (0, True, 1.0)


def test_extrema_phase_without_hysteresis_is_the_rule_of_the_original() -> None:
    # Of 100 units, share > .1: 1; > .01: .1; else .01. The thresholds themselves belong to the phase below.
    factors, _ = run(oxs.scale_by_extrema_phase(hysteresis=0.0), extrema=with_extreme([0, 1, 2, 10, 11, 10, 1], 100))
    np.testing.assert_allclose(factors, [0.01, 0.01, 0.1, 0.1, 1.0, 0.1, 0.01], rtol=1e-6)


def test_extrema_phase_judges_the_first_reading_without_hysteresis() -> None:
    # 9 of 100 is above .1 * .8 and 1 of 100 above .01 * .8: neither phase has been reached yet.
    for count, expected in ((9, 0.1), (1, 0.01), (11, 1.0)):
        factors, _ = run(oxs.scale_by_extrema_phase(), extrema=with_extreme([count], 100))
        np.testing.assert_allclose(factors, expected, rtol=1e-6)


def test_extrema_phase_counts_a_unit_once_whatever_is_wrong_with_it() -> None:
    tx = oxs.scale_by_extrema_phase()
    both = {"hidden": jnp.arange(20) < 3}
    _, state = tx.update(ONE, tx.init(ONE), extrema=oxs.Extrema(both, both))
    np.testing.assert_allclose(state.share, 3 / 20, rtol=1e-6)
    # Layers may be named on one side only, and hold a nearness: here 2 of 20 and 1 of 4 units are extreme.
    nearness = {"hidden": jnp.linspace(0.0, 1.0, 20).at[0].set(1.0)}
    _, state = tx.update(ONE, state, extrema=oxs.Extrema(nearness, {"head": jnp.arange(4) == 2}))
    np.testing.assert_allclose(state.share, 3 / 24, rtol=1e-6)


def test_extrema_phase_begins_steady_and_stays_so_while_nothing_is_read() -> None:
    tx = oxs.scale_by_extrema_phase()
    state = tx.init(ONE)
    update, after = tx.update(ONE, state, extrema=oxs.Extrema({}, {}))
    np.testing.assert_allclose(update, 0.1, rtol=1e-6)
    assert jax.tree.map(lambda leaf: leaf.item(), after) == (1, False, 0.0)


# The rule of the loss phases.


def signals(improvement: float, noise: float = np.nan, share: float = np.nan) -> oxs.PhaseSignals:
    return oxs.PhaseSignals(jnp.float32(improvement), jnp.float32(noise), jnp.float32(share), jnp.int32(9))


@pytest.mark.parametrize(
    ("improvement", "phase"),
    [(0.02, 0), (0.01, 1), (0.008, 1), (0.005, 2), (0.004, 2), (0.0025, 3), (0.001, 3), (0.0, 3), (-0.5, 3)],
)
def test_loss_phase_is_monotone_in_the_improvement(improvement: float, phase: int) -> None:
    # The original: .004 (its dead band) was a plateau, .001 and 0 were refinement.
    assert int(oxs.loss_phase(signals(improvement), jnp.int32(0))) == phase


def test_loss_phase_is_held_at_exploitation_by_noise_and_by_extrema() -> None:
    cases = [
        (0.0, 1.5, np.nan, 1),  # a flat loss under noise
        (0.0, 1.0, np.nan, 3),  # the threshold itself is calm
        (0.0, np.nan, 0.2, 1),  # many extreme units
        (0.0, 0.1, 0.1, 3),
        (0.004, 0.1, 0.5, 1),
        (0.02, 9.0, 0.9, 0),  # held back, never pushed on
    ]
    for improvement, noise, share, phase in cases:
        assert int(oxs.loss_phase(signals(improvement, noise, share), jnp.int32(0))) == phase


def test_loss_phase_takes_its_thresholds_as_arguments() -> None:
    rule = functools.partial(oxs.loss_phase, thresholds=(0.5, 0.1), noisy=4.0, extreme=0.9)
    said = [int(rule(signals(x, 3.0, 0.8), jnp.int32(0))) for x in (0.6, 0.3, 0.05)]
    assert said == [0, 1, 2]


# By the loss.


def test_loss_phase_scales_by_hand() -> None:
    # Mean of the first 2 against mean of the last 3 of a window of 5, an observation a step.
    windows = {
        0.02: [1.0, 1.0, 0.98, 0.98, 0.98],
        0.008: [2.0, 2.0, 1.99, 1.984, 1.978],
        0.004: [1.01, 0.99, 0.996, 0.996, 0.996],
        0.0: [0.7, 0.7, 0.7, 0.7, 0.7],
        -0.1: [1.0, 1.0, 1.0, 1.1, 1.2],
    }
    tx = oxs.scale_by_loss_phase(every=1)
    factors = [run(tx, value=jnp.array(window))[0] for window in windows.values()]
    np.testing.assert_array_equal(np.array(factors)[:, :4], 1.0)  # exploration, until the window is full
    np.testing.assert_allclose(np.array(factors)[:, 4], [1.0, 0.5, 0.1, 0.05, 0.05], rtol=1e-6)


def test_loss_phase_of_losses_that_are_negative_or_zero() -> None:
    tx = oxs.scale_by_loss_phase(every=1, window=2)
    # From -1 to -1.02 is an improvement of 2 %, to -1.008 one of .8 %, to -0.9 none.
    assert run(tx, value=jnp.array([-1.0, -1.02]))[0][-1] == 1.0
    assert run(tx, value=jnp.array([-1.0, -1.008]))[0][-1] == 0.5
    np.testing.assert_allclose(run(tx, value=jnp.array([-1.0, -0.9]))[0][-1], 0.05, rtol=1e-6)
    factors, state = run(tx, value=jnp.zeros(4))
    np.testing.assert_allclose(factors[1:], 0.05, rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def reference_phases(losses: np.ndarray, every: int, window: int) -> list[int]:
    """Phases by the documented rule, in plain Python."""
    phase, running, observations, phases = 0, [], [], []
    for loss in losses:
        running.append(float(loss))
        if len(running) == every:
            observations, running = [*observations, sum(running) / every], []
            if len(observations) >= window:
                recent = observations[-window:]
                first, last = np.mean(recent[: window // 2]), np.mean(recent[window // 2 :])
                improvement = (first - last) / abs(first)
                phase = 0 if improvement > 0.01 else 1 if improvement > 0.005 else 2 if improvement > 0.0025 else 3
        phases.append(phase)
    return phases


@pytest.mark.parametrize(("every", "window"), [(1, 5), (3, 4), (7, 2)])
def test_loss_phase_agrees_with_a_second_implementation(every: int, window: int) -> None:
    rng = np.random.default_rng(every)
    losses = 2.0 * np.exp(-np.arange(150) / 15) + 1.0 + 0.0005 * rng.normal(size=150)
    scales = (1.0, 0.5, 0.25, 0.125)
    factors, _ = run(oxs.scale_by_loss_phase(scales, every=every, window=window), value=jnp.asarray(losses))
    expected = reference_phases(losses, every, window)
    assert factors.tolist() == [scales[phase] for phase in expected]
    assert set(expected) == {0, 1, 2, 3}


def test_loss_phase_signals_of_the_gradient_and_of_the_extrema() -> None:
    def rule(signals: oxs.PhaseSignals, phase: jax.Array) -> jax.Array:
        # Norms 1 and 3: mean 2, variance 1, relative to the squared mean 1/4. Of 8 units 2 are extreme, then 4.
        noise = jnp.abs(signals.gradient_noise - 0.25) < 1e-6
        share = jnp.abs(signals.extrema_share - 0.5) < 1e-6
        return jnp.where(noise & share & (signals.observations == 2), 1, 2)

    tx = oxs.scale_by_loss_phase((1.0, 2.0, 3.0), rule=rule, every=1, window=2)
    grads = {"a": jnp.array([[0.6, 0.0], [0.0, 3.0]]), "b": jnp.array([0.8, 0.0])}
    factors, _ = run(tx, value=jnp.ones(2), grads=grads, extrema=with_extreme([2, 4], 8))
    assert factors.tolist() == [1.0, 2.0]


def test_loss_phase_signals_that_are_not_passed_are_nan() -> None:
    def rule(signals: oxs.PhaseSignals, phase: jax.Array) -> jax.Array:
        return jnp.where(jnp.isnan(signals.gradient_noise) & jnp.isnan(signals.extrema_share), 1, 0)

    factors, state = run(oxs.scale_by_loss_phase((1.0, 2.0), rule=rule, every=1, window=2), value=jnp.ones(2))
    assert factors.tolist() == [1.0, 2.0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))  # the state itself holds no NaN


def test_loss_phase_of_own_rules_sees_the_phase_and_stays_among_the_scales() -> None:
    def onwards(signals: oxs.PhaseSignals, phase: jax.Array) -> jax.Array:
        return phase + 1

    factors, _ = run(oxs.scale_by_loss_phase((1.0, 0.5, 0.25), rule=onwards, every=2, window=2), value=jnp.ones(10))
    # Asked with the 2nd, 3rd, 4th and 5th observation, at updates 4, 6, 8 and 10, and at no other.
    assert factors.tolist() == [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_loss_phase_statistics_do_not_see_what_is_not_finite(bad: float) -> None:
    tx = oxs.scale_by_loss_phase(every=2, window=2)
    none, some = (jax.tree.map(lambda leaf: leaf[0], with_extreme([count], 8)) for count in (0, 4))
    good = {"value": jnp.float32(1.0), "grads": jnp.array([1.0, 1.0]), "extrema": none}
    update = jax.jit(tx.update)
    _, state = update(ONE, tx.init(ONE), **good)
    for poisoned in (good | {"value": jnp.float32(bad)}, good | {"grads": jnp.array([1.0, bad])}):
        _, after = update(ONE, state, **poisoned | {"extrema": some})
        jax.tree.map(np.testing.assert_array_equal, after, state)


def test_loss_phase_keeps_float32_statistics_of_bfloat16_losses() -> None:
    tx = oxs.scale_by_loss_phase(every=256, window=2)
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    losses = jnp.where(jnp.arange(255) < 128, 1.0, 1.0078125).astype(jnp.bfloat16)
    _, state = run(tx, value=losses)
    assert {leaf.dtype for leaf in jax.tree.leaves(tx.init(params))} == {jnp.dtype("float32"), jnp.dtype("int32")}
    np.testing.assert_allclose(state.means[0], 1 + 0.0078125 * 127 / 255, rtol=1e-6)  # bfloat16 would stay at 1


def test_loss_phase_keeps_its_state_where_64_bits_are_on() -> None:
    with jax.enable_x64(True):
        tx = oxs.scale_by_loss_phase(every=2, window=2)
        factors, state = run(tx, value=np.array([1.0, 1.0, 0.5, 0.5]))  # lax.scan demands one form of state
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert factors.tolist() == [1.0] * 4


# Both, where structure changes and in groups.


def test_phase_statistics_are_carried_through_growth_and_relabelling() -> None:
    tx = optax.chain(oxs.scale_by_loss_phase(every=2, window=2), oxs.scale_by_extrema_phase())
    params = {name: {"kernel": jnp.full((4, 4), 0.5)} for name in ("in", "mid", "out")}
    labels = jax.tree.map(lambda _: "scaffold", params)
    masks = jax.tree.map(lambda _: jnp.asarray(True), params)
    units = oxs.dense_chain(params, ["in", "mid", "out"])
    _, state = run(tx, value=jnp.array([1.0, 0.9, 0.8]), extrema=with_extreme([5, 6, 7], 40))

    key = jax.random.key(0)
    changes = [
        oxs.widen(params, labels, masks, units, "in", 6, key=key),
        oxs.insert_layer(params, labels, masks, units, after="mid", key=key),
    ]
    for grown in changes:
        after = oxs.transfer_state(tx, state, params, tx, grown.params, growth=grown)
        jax.tree.map(np.testing.assert_array_equal, after, state)

    # Behind a rule by label, whose own counts start again.
    def labelled(labels: Any) -> optax.GradientTransformation:
        return optax.chain(oxs.scale_by_label({"scaffold": 1.0, "new": 0.5}, labels), tx)

    first, second = labelled(labels), labelled(oxs.relabel(labels, {"scaffold": "new"}))
    after = oxs.transfer_state(first, (first.init(params)[0], state), params, second, params)
    jax.tree.map(np.testing.assert_array_equal, after[1], state)


def test_phases_in_groups_have_statistics_of_their_own() -> None:
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    groups = {"fast": oxs.scale_by_loss_phase(every=1, window=2), "slow": oxs.scale_by_loss_phase(every=2, window=2)}
    tx = optax.partition(groups, {"a": "fast", "b": "slow"})
    state, factors = tx.init(params), []
    for _ in range(4):
        updates, state = tx.update(params, state, params, value=1.0)
        factors.append([round(float(updates[name][0]), 3) for name in "ab"])
    assert factors == [[1.0, 1.0], [0.05, 1.0], [0.05, 1.0], [0.05, 0.05]]


def test_phases_multiply_in_one_product() -> None:
    members = [
        oxs.scale_by_loss_phase((1.0, 0.5), rule=lambda signals, phase: jnp.int32(1), every=1, window=2),
        oxs.scale_by_extrema_phase(scales=(4.0, 2.0, 1.0)),
    ]
    extra = {"value": jnp.ones(3), "extrema": with_extreme([20, 20, 5], 100)}
    expected = [4.0, 2.0, 1.0]
    for tx in (oxs.scale_by_product(*members), optax.chain(*members)):
        assert run(tx, **extra)[0].tolist() == expected
