"""Schedules by age: values worked by hand, and float32 whatever they are handed."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_structure as oxs


@pytest.mark.parametrize(
    ("schedule", "ages", "expected"),
    [
        # The original's AgeBasedScheduler: 0.1 ** (min(age, 50) / 50).
        (oxs.age_decay(0.1, 50, 50), [0, 10, 25, 50, 51, 9999], [1.0, 10**-0.2, 10**-0.5, 0.1, 0.1, 0.1]),
        # Its LayerAgeBasedScheduler, ten times slower with every event.
        (oxs.age_decay(), [0, 1, 2, 3], [1.0, 0.1, 0.01, 0.001]),
        # The age factor of its LayerAgeAwareLR: exp(-age / 50).
        (oxs.age_decay(math.exp(-1), 50), [0, 50, 100], [1.0, 0.36787944, 0.13533528]),
        (oxs.age_decay(0.0), [0, 1, 2], [1.0, 0.0, 0.0]),
        (oxs.age_decay(0.5, 1, 0), [0, 7], [1.0, 1.0]),
        # Its SoftClampingScheduler: max(1 - age / 100, 0.1), met at 90.
        (oxs.soft_clamp(), [0, 30, 90, 91, 5000], [1.0, 0.7, 0.1, 0.1, 0.1]),
        (oxs.soft_clamp(max_age=200, min_scale=0.05, rate=2.0), [0, 50, 95, 100, 200], [1.0, 0.5, 0.05, 0.05, 0.05]),
        (oxs.soft_clamp(rate=0.0), [0, 1000], [1.0, 1.0]),
    ],
)
def test_values_by_hand(schedule: Any, ages: list[int], expected: list[float]) -> None:
    values = jax.jit(jax.vmap(schedule))(jnp.asarray(ages, jnp.int32))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    # One age at a time, a Python int or an array of any type, and the whole run of a long one.
    for age in (ages[1], np.int64(ages[1]), jnp.asarray(ages[1], jnp.bfloat16)):
        assert schedule(age).dtype == jnp.float32
    np.testing.assert_allclose(schedule(ages[-1]), expected[-1], rtol=1e-6)


def test_an_old_age_stays_finite() -> None:
    ages = jnp.asarray([2**31 - 1], jnp.int32)
    for schedule, oldest in ((oxs.age_decay(0.1), 0.0), (oxs.age_decay(0.1, 50, 50), 0.1), (oxs.soft_clamp(), 0.1)):
        np.testing.assert_allclose(schedule(ages), oldest, rtol=1e-6)


@pytest.mark.parametrize(
    ("factory", "bad", "message"),
    [
        (oxs.age_decay, {"decay": 1.5}, r"decay=1\.5 must be in \[0, 1\]"),
        (oxs.age_decay, {"decay": float("nan")}, "decay=nan"),
        (oxs.age_decay, {"every": 0}, "every=0 must be greater than 0"),
        (oxs.age_decay, {"max_age": -1}, "max_age=-1 must be at least 0"),
        (oxs.soft_clamp, {"max_age": 0}, "max_age=0 must be greater than 0"),
        (oxs.soft_clamp, {"min_scale": 2.0}, r"min_scale=2\.0"),
        (oxs.soft_clamp, {"rate": -1.0}, r"rate=-1\.0"),
    ],
)
def test_bad_numbers_are_named(factory: Any, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factory(**bad)


def test_numbers_may_be_traced() -> None:
    value = jax.jit(lambda decay, floor: oxs.age_decay(decay, 2)(4) + oxs.soft_clamp(10, floor)(20))(0.5, 0.25)
    assert float(value) == 0.5  # 0.5 ** 2 + 0.25
