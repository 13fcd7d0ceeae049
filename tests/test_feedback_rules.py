"""Rules and signals of the loss-aware loop: a second implementation, values worked by hand, whole runs of losses."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_structure.transforms.feedback import rules
from optax_structure.transforms.feedback.optimizers import feedback_sgd
from optax_structure.transforms.feedback.rate import scale_by_feedback
from optax_structure.transforms.feedback.rules import FeedbackSignals

ONE = jnp.ones(())


def signals(**given: float) -> FeedbackSignals:
    """Those that a test is about; all others are NaN, and would show in the answer of a rule that read them."""
    unknown = {field: math.nan for field in FeedbackSignals._fields} | {"count": 1}
    bounds = {"base": 0.0, "low": math.log(0.1), "high": math.log(3.0)}
    numbers = unknown | bounds | given
    return FeedbackSignals(
        **{f: jnp.asarray(v, jnp.int32 if f == "count" else jnp.float32) for f, v in numbers.items()}
    )


def said(rule: Callable[..., Any], memory: float = 0.0, **given: float) -> tuple[float, float]:
    answer, kept = rule(signals(**given), jnp.float32(memory))
    return float(answer), float(kept)


# Every rule alone, by hand.


def test_trend_rate_integrates_what_is_beyond_the_dead_band() -> None:
    rule = functools.partial(rules.trend_rate, up=0.1, down=0.4, dead_band=0.5)
    for trend, expected in ((0.75, 0.05), (0.5, 0.0), (-0.3, 0.0), (-0.9, -0.32), (1.0, 0.1)):
        np.testing.assert_allclose(said(rule, trend=trend, surprise=0.0), expected, atol=1e-6)
        np.testing.assert_allclose(said(rule, -1.0, trend=trend, surprise=0.0), expected - 1.0, atol=1e-6)


def test_trend_rate_falls_at_once_where_the_loss_jumps() -> None:
    rule = functools.partial(rules.trend_rate, jump=0.8, threshold=4.0)
    for surprise, fall in ((4.0, 0.0), (4.5, 0.4), (5.0, 0.8), (50.0, 0.8), (-50.0, 0.0)):
        np.testing.assert_allclose(said(rule, trend=0.0, surprise=surprise), -fall, atol=1e-6)
    assert said(functools.partial(rule, jump=0.0), trend=0.0, surprise=50.0) == (0.0, 0.0)


def test_integrators_stay_within_the_bounds() -> None:
    for rule in (rules.trend_rate, rules.hypergradient_rate):
        for sign, bound in ((1.0, 3.0), (-1.0, 0.1)):
            given = {"trend": sign, "surprise": 0.0, "alignment": sign}
            near = math.log(bound) - 0.001 * sign
            np.testing.assert_allclose(said(rule, near, **given), math.log(bound), rtol=1e-6)
    bounds = {"base": 0.9, "low": 0.5, "high": 0.98}
    np.testing.assert_allclose(said(rules.relative_momentum, 0.079, trend=1.0, **bounds), (0.98, 0.08), atol=1e-6)
    np.testing.assert_allclose(said(rules.relative_momentum, -0.399, trend=-1.0, **bounds), (0.5, -0.4), atol=1e-6)


def test_variance_rate_by_hand() -> None:
    # A standard deviation of half the mean: noise .25 / 1.25 = .2, divisor 1 + 5 * .2.
    np.testing.assert_allclose(said(rules.variance_rate, noise=0.2), (math.log(0.5), 0.0), atol=1e-6)
    np.testing.assert_allclose(said(rules.variance_rate, 7.0, noise=1.0), (math.log(1 / 6), 7.0), atol=1e-6)
    np.testing.assert_allclose(said(functools.partial(rules.variance_rate, strength=0.0), noise=0.5), 0.0)


def test_grad_norm_rate_by_hand() -> None:
    def factor(norm: float, mean: float) -> float:
        return math.exp(said(rules.grad_norm_rate, grad_norm=norm, mean_grad_norm=mean)[0])

    cases = (2.0, 1.0, 0.5), (1.0, 2.0, 2.0), (50.0, 1.0, 1 / math.e), (1.0, 50.0, math.e), (0.0, 1.0, 1.0)
    for norm, mean, expected in (*cases, (1.0, 0.0, 1.0)):
        np.testing.assert_allclose(factor(norm, mean), expected, rtol=1e-6)


def sgdr(steps: int, period: int, growth: int, floor: float, decay: float) -> list[float]:
    """Cycle after cycle, step after step."""
    factors, height, length = [], 1.0, period
    while len(factors) < steps:
        cosines = [math.cos(math.pi * step / length) for step in range(length)]
        factors += [height * (floor + (1 - floor) * (1 + cosine) / 2) for cosine in cosines]
        height, length = height * decay, length * growth
    return factors[:steps]


def by_count(rule: Callable[..., Any], counts: np.ndarray) -> np.ndarray:
    """The answers at these counts, in one program."""
    of_count = jax.vmap(lambda count: rule(signals()._replace(count=count), jnp.float32(0))[0])
    return np.asarray(jax.jit(of_count)(np.asarray(counts, np.int32)))


@pytest.mark.parametrize(("period", "growth", "decay"), [(7, 1, 1.0), (3, 2, 0.5), (10, 3, 0.9)])
def test_cyclical_rate_is_a_cosine_with_restarts(period: int, growth: int, decay: float) -> None:
    numbers = {"period": period, "growth": growth, "floor": 0.2, "decay": decay}
    rule = functools.partial(rules.cyclical_rate, **numbers)
    factors = np.exp(by_count(rule, np.arange(1, 201)))
    np.testing.assert_allclose(factors, sgdr(200, period, growth, 0.2, decay), rtol=2e-4)


def test_cyclical_rate_begins_every_cycle_at_its_first_step() -> None:
    # Where rounding could fall to either side of a restart: cycles of 200, 400, 800 ... steps.
    starts = np.array([200 * (2**cycle - 1) + 1 for cycle in range(14)])
    np.testing.assert_allclose(by_count(rules.cyclical_rate, starts), 0.0, atol=1e-4)


def test_hypergradient_rate_moves_along_the_cosine() -> None:
    rule = functools.partial(rules.hypergradient_rate, step=0.5)
    np.testing.assert_allclose(said(rule, 0.1, alignment=0.4), 0.3, rtol=1e-6)
    np.testing.assert_allclose(said(rule, 0.1, alignment=-0.4), -0.1, rtol=1e-6)


def test_relative_momentum_moves_from_the_base() -> None:
    rule = functools.partial(rules.relative_momentum, step=0.01, dead_band=0.0)
    answer, kept = said(rule, -0.1, trend=0.5, base=0.9, low=0.5, high=0.98)
    np.testing.assert_allclose((answer, kept), (0.805, -0.095), rtol=1e-5)
    assert said(rules.relative_momentum, 0.0, trend=0.4, base=0.9, low=0.5, high=0.98)[1] == pytest.approx(0, abs=1e-6)


def test_inverse_momentum_grows_as_the_loss_falls() -> None:
    bounds = {"low": 0.5, "base": 0.9, "high": 0.98}

    def momentum(first: float, fast: float, deviation: float = 0.0, **other: float) -> float:
        given = {"first": first, "fast": fast, "deviation": deviation, **bounds, **other}
        return said(rules.inverse_momentum, **given)[0]

    # x = (1 - r) / (1 + r) of r = 3, 1, 1/2, 0: -1/2, 0, 1/3, 1.
    momenta = [momentum(2.0, fast) for fast in (6.0, 2.0, 1.0, 0.0, -1.0, 1e30)]
    np.testing.assert_allclose(momenta, [0.7, 0.9, 0.9 + 0.08 / 3, 0.98, 0.98, 0.5], rtol=1e-6)
    for first in (0.0, -2.0):  # there is no share of it left
        np.testing.assert_allclose(momentum(first, -3.0), 0.9, rtol=1e-6)
    # Three deviations are noise: from 2 to 5 is 1 beyond them, r = 3/2; so is from 2 to 0, r = 1 - 1/2.
    np.testing.assert_allclose(momentum(2.0, 5.0, 2 / 3), 0.9 - 0.4 / 5, rtol=1e-6)
    np.testing.assert_allclose(momentum(2.0, 0.0, 1 / 3), 0.9 + 0.08 / 3, rtol=1e-6)
    np.testing.assert_allclose([momentum(2.0, 3.9, 0.64), momentum(2.0, 0.1, 0.64)], 0.9, rtol=1e-6)
    for base in (0.5, 0.98):  # on a bound there is nowhere to go on that side
        np.testing.assert_allclose([momentum(2.0, 2.0, base=base)], base, rtol=1e-6)
        np.testing.assert_allclose([momentum(2.0, 0.0, base=base), momentum(2.0, 1e30, base=base)], [0.98, 0.5])


def test_normalized_momentum_by_hand() -> None:
    rule = functools.partial(rules.normalized_momentum, gain=0.5)
    for slow, fast, deviation, expected in ((2.0, 1.8, 0.1, 0.95), (-2.0, -1.8, 0.1, 0.85), (0.0, 0.2, 0.4, 0.65)):
        given = {"slow": slow, "fast": fast, "deviation": deviation, "base": 0.9}
        np.testing.assert_allclose(said(rule, **given)[0], expected, rtol=1e-6)
    assert said(rule, slow=0.0, fast=0.0, deviation=0.0, base=0.9)[0] == pytest.approx(0.9)


# The signals.


def spy(field: str) -> Callable[..., Any]:
    """A rule that remembers a signal and says nothing."""

    def rule(signals: FeedbackSignals, memory: jax.Array) -> tuple[Any, Any]:
        del memory
        return 0.0, getattr(signals, field).astype(jnp.float32)

    rule.__name__ = field
    return rule


def expected_signals(losses: np.ndarray, norms: np.ndarray, total: int) -> dict[str, list[float]]:
    """Float64, with Adam's own form: the sum and its weight apart."""
    sums = dict.fromkeys(("fast", "slow", "variance", "spread", "norm"), 0.0)
    counts = dict.fromkeys(sums, 0)

    def mean(name: str) -> float:
        decay = 0.9 if name == "fast" else 0.99
        return sums[name] / (1 - decay ** counts[name]) if counts[name] else 0.0

    def add(name: str, value: float) -> None:
        decay = 0.9 if name == "fast" else 0.99
        sums[name], counts[name] = decay * sums[name] + (1 - decay) * value, counts[name] + 1

    rows: dict[str, list[float]] = {}
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        away, usual, mean_norm = loss - mean("fast"), math.sqrt(mean("variance")), mean("norm") if step else norm
        if step:
            add("variance", away**2)
            add("spread", (loss - mean("slow")) ** 2)
        for name, value in (("fast", loss), ("slow", loss), ("norm", norm)):
            add(name, value)
        spread, variance, slow, fast = (mean(name) for name in ("spread", "variance", "slow", "fast"))
        row = {
            "loss": loss,
            "fast": fast,
            "slow": slow,
            "first": losses[0],
            "deviation": math.sqrt(variance),
            "spread": math.sqrt(spread),
            "surprise": away / usual if step >= 20 else 0.0,
            "trend": math.tanh((slow - fast) / math.sqrt(spread)) if spread else 0.0,
            "noise": variance / (variance + slow**2),
            "grad_norm": norm,
            "mean_grad_norm": mean_norm,
            "progress": min((step + 1) / total, 1.0),
            "count": step + 1,
            "low": math.log(0.1),
            "high": math.log(3.0),
            "base": 0.0,
        }
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
    return rows


def test_signals_are_those_of_a_second_implementation() -> None:
    rng = np.random.default_rng(0)
    losses = np.float32(2.0 - 0.01 * np.arange(60) + 0.3 * rng.normal(size=60))
    norms = np.float32(rng.uniform(1.0, 2.0, 60))
    expected = expected_signals(losses.astype(float), norms.astype(float), 50)
    tx = scale_by_feedback(lr_rules={spy(field): 1.0 for field in expected}, total_steps=50)

    @jax.jit
    def run(losses: jax.Array, norms: jax.Array) -> dict[str, jax.Array]:
        def step(state: Any, given: Any) -> Any:
            _, state = tx.update(ONE, state, value=given[0], grad_norm=given[1])
            return state, {name.removeprefix("lr_memory/"): kept for name, kept in state.lr_memory.items()}

        return jax.lax.scan(step, tx.init(ONE), (losses, norms))[1]

    seen = run(jnp.asarray(losses), jnp.asarray(norms))
    for field, values in expected.items():
        np.testing.assert_allclose(seen[field], values, rtol=2e-4, atol=2e-5, err_msg=field)


# Whole runs: where a loss of some shape takes the rate and the momentum.

STEPS, SEEDS = 400, 6


def losses(seed: int) -> dict[str, np.ndarray]:
    steps, noise = np.arange(STEPS), np.random.default_rng(seed).normal(size=STEPS)
    return {
        "improving": 2 * np.exp(-steps / 100) * (1 + 0.02 * noise),
        "slightly noisy": 1 + 0.02 * noise,
        "very noisy": 1 + 0.5 * noise,
        "worsening": np.exp(steps / 200) * (1 + 0.02 * noise),
        "calm, then noisy": np.where(steps < 200, 1 + 0.02 * noise, 1 + 0.5 * noise),
        "about 0": 0.1 * noise,
        "negative": -2 + 0.02 * noise,
        "zero": np.zeros(STEPS),
    }


SHAPES = tuple(losses(0))


@functools.cache
def followed(tx: optax.GradientTransformationExtraArgs) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scale and momentum at every step, for every shape of loss and every seed."""

    def of_one(losses: jax.Array) -> Any:
        def step(state: Any, loss: jax.Array) -> Any:
            _, state = tx.update(ONE, state, value=loss)
            control = getattr(state, "control", state)
            return state, (control.scale, control.scale if control.momentum is None else control.momentum)

        return jax.lax.scan(step, tx.init(ONE), losses)[1]

    given = np.array([[losses(seed)[shape] for seed in range(SEEDS)] for shape in SHAPES], np.float32)
    both = jax.jit(jax.vmap(jax.vmap(of_one)))(given)
    scales, momenta = (dict(zip(SHAPES, np.asarray(each), strict=True)) for each in both)
    return scales, momenta


def late(runs: Mapping[str, np.ndarray], shape: str) -> np.ndarray:
    """The mean of the last 100 steps, of every seed."""
    return runs[shape][:, -100:].mean(axis=1)


RATE_RULES = {"trend": {"trend": 1.0}, "variance": {"variance": 1.0}, "default": None}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RATE_RULES)
def test_rates_stay_finite_and_within_their_bounds(rule: str) -> None:
    scales, _ = followed(scale_by_feedback(lr_rules=RATE_RULES[rule]))
    for shape, each in scales.items():
        assert np.isfinite(each).all() and (each > 0.0999).all() and (each < 3.001).all(), shape


@pytest.mark.slow
def test_trend_takes_the_rate_to_its_bounds_and_lets_a_flat_one_be() -> None:
    scales, _ = followed(scale_by_feedback(lr_rules={"trend": 1.0}))
    np.testing.assert_allclose(late(scales, "improving"), 3.0, rtol=0.03)
    np.testing.assert_allclose(late(scales, "worsening"), 0.1, rtol=0.03)
    for flat in ("slightly noisy", "very noisy", "about 0", "negative", "zero"):
        assert (np.abs(np.log(scales[flat][:, -1])) < 0.1).all(), flat
    assert (late(scales, "calm, then noisy") < 0.5).all()


@pytest.mark.slow
def test_a_flat_loss_leaves_rate_and_momentum_of_the_optimizer_where_they_are() -> None:
    for given in ({"lr_rules": {"trend": 1.0}}, {}):
        scales, momenta = followed(feedback_sgd(0.1, **given))
        # Of noise of 50 % the variance rule says a half, and counts 3 of 10: log 2 * 0.3 = 0.21.
        noisy = {} if given else {"very noisy": -0.21, "about 0": -0.54, "negative": 0.0}
        for flat in ("slightly noisy", "very noisy", "about 0", "negative", "zero"):
            expected = noisy.get(flat, 0.0)
            assert (np.abs(np.log(scales[flat][:, -1]) - expected) < 0.1).all(), (given, flat)
            np.testing.assert_allclose(momenta[flat][:, -1], 0.9, atol=0.01, err_msg=flat)


@pytest.mark.slow
def test_trend_with_unequal_speeds_takes_the_rate_down_on_a_plateau() -> None:
    rule = functools.partial(rules.trend_rate, down=0.2, dead_band=0.0, jump=0.0)
    scales, _ = followed(scale_by_feedback(lr_rules={rule: 1.0}))
    assert (late(scales, "very noisy") < 0.3).all()


@pytest.mark.slow
def test_variance_halves_the_rate_where_the_noise_is_half_of_the_loss() -> None:
    scales, _ = followed(scale_by_feedback(lr_rules={"variance": 1.0}))
    np.testing.assert_allclose(late(scales, "very noisy"), 0.5, atol=0.08)
    np.testing.assert_allclose(late(scales, "calm, then noisy"), 0.55, atol=0.08)
    np.testing.assert_allclose(late(scales, "slightly noisy"), 1.0, atol=0.02)
    assert (late(scales, "improving") > 0.85).all() and (late(scales, "worsening") > 0.85).all()
    # Nothing but noise: the lowest that the rule says.
    np.testing.assert_allclose(late(scales, "about 0"), 1 / 6, rtol=0.03)


@pytest.mark.slow
def test_default_rates() -> None:
    scales, _ = followed(scale_by_feedback())
    assert (late(scales, "improving") > 1.7).all() and (late(scales, "worsening") < 0.35).all()
    np.testing.assert_allclose(late(scales, "slightly noisy"), 1.0, atol=0.02)
    assert ((late(scales, "very noisy") > 0.7) & (late(scales, "very noisy") < 0.9)).all()


MOMENTA = {
    "relative": {"improving": 0.98, "worsening": 0.5, "slightly noisy": 0.9, "very noisy": 0.9, "zero": 0.9},
    "inverse": {"improving": 0.96, "slightly noisy": 0.9, "very noisy": 0.9, "negative": 0.9, "zero": 0.9},
    "normalized": {"improving": 0.98, "slightly noisy": 0.9, "very noisy": 0.9, "negative": 0.9, "zero": 0.9},
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", MOMENTA)
def test_momenta_follow_the_loss_within_their_bounds(rule: str) -> None:
    _, momenta = followed(feedback_sgd(0.1, lr_rules={}, momentum_rules={rule: 1.0}))
    for shape, each in momenta.items():
        assert np.isfinite(each).all() and (each > 0.4999).all() and (each < 0.9801).all(), shape
    for shape, expected in MOMENTA[rule].items():
        np.testing.assert_allclose(late(momenta, shape), expected, atol=0.04, err_msg=shape)
    assert (late(momenta, "worsening") < late(momenta, "slightly noisy")).all()


def test_grad_norm_answers_a_spike_within_five_steps() -> None:
    tx = scale_by_feedback(lr_rules={"grad_norm": 1.0})

    @jax.jit
    def run(norms: jax.Array) -> jax.Array:
        def step(state: Any, norm: jax.Array) -> Any:
            _, state = tx.update(ONE, state, value=1.0, grad_norm=norm)
            return state, state.scale

        return jax.lax.scan(step, tx.init(ONE), norms)[1]

    scales = run(jnp.ones(320).at[300:305].set(5.0))
    np.testing.assert_allclose(scales[299], 1.0, atol=0.01)
    assert scales[301] < scales[300] < 0.8 and scales[304] < 0.5
    assert scales[319] > scales[305]  # and forgets it


def test_the_rate_rises_from_its_lower_bound_and_falls_faster_than_it_rises() -> None:
    def rule(signals: FeedbackSignals, memory: jax.Array) -> Any:
        return jnp.log(signals.loss), memory

    tx = scale_by_feedback(lr_rules={rule: 1.0}, min_scale=0.25, max_scale=4.0, smooth=0.75, smooth_down=0.5)

    @jax.jit
    def run(goals: jax.Array) -> jax.Array:
        def step(state: Any, goal: jax.Array) -> Any:
            _, state = tx.update(ONE, state, value=goal)
            return state, jnp.log2(state.scale)

        return jax.lax.scan(step, tx.init(ONE), goals)[1]

    # In powers of 2: from -2 a quarter of the way up, half of the way down; goals beyond the bounds are the bounds.
    scales = run(np.array([4.0, 4.0, 2.0**-9, 2.0**9], np.float32))
    np.testing.assert_allclose(scales, [-1.0, -0.25, -1.125, -0.34375], atol=1e-5)
