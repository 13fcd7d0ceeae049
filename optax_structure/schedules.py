"""Schedules that optax lacks: functions of an age, for ``scale_by_age`` and ``age_rule``.

A schedule is any function of an int32 scalar that returns a factor, so optax's own are used wherever they exist:

============================================  =================================================================
wanted                                        optax
============================================  =================================================================
exponential backoff down to a floor           ``optax.exponential_decay(init, 1, rate, end_value=floor)``
the same in stairs                            ``optax.exponential_decay(..., staircase=True)``
cosine annealing                              ``optax.cosine_decay_schedule(1.0, steps, alpha=floor)``
the same with warm restarts                   ``optax.sgdr_schedule`` (or ``optax.join_schedules`` of cosines)
fixed phases                                  ``optax.piecewise_constant_schedule(1.0, {20: 0.1, 50: 0.1})``
warm-up                                       ``optax.linear_schedule(0.0, 1.0, steps)``
============================================  =================================================================

All count what their caller counts: ``scale_by_age`` updates or growth events. A number of epochs is turned into updates
by the user, once: ``epochs * steps_per_epoch``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_structure._tree import is_traced

Schedule = Callable[[Any], Any]


def age_decay(decay: float = 0.1, every: float = 1.0, max_age: float | None = None) -> Schedule:
    """``decay ** (min(age, max_age) / every)``: what is older learns slower, by ``decay`` for every ``every``.

    With ``scale_by_age(age_decay(0.1), unit="events")`` a part slows down ten times with every growth event that it
    lives through. ``age_decay(0.1, 50, 50)`` falls to a tenth within 50 updates and stays there;
    ``age_decay(math.exp(-1), 50)`` is ``exp(-age / 50)``. The decay is continuous: for stairs see
    ``optax.exponential_decay``.

    Args:
      decay: factor per ``every``, in [0, 1].
      every: the age within which the factor falls by ``decay``, > 0, in what the caller counts.
      max_age: the age at which it stops falling, >= 0; None: never.

    Returns:
      A function ``age -> factor`` (float32).

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> import optax_structure as oxs
      >>> [round(float(oxs.age_decay(0.1, 50, 50)(age)), 3) for age in (0, 25, 50, 1000)]
      [1.0, 0.316, 0.1, 0.1]
    """
    _check("decay", decay, lambda number: 0 <= number <= 1, "in [0, 1]")
    _check("every", every, lambda number: number > 0, "greater than 0")
    if max_age is not None:
        _check("max_age", max_age, lambda number: number >= 0, "at least 0")

    def schedule(age: Any) -> jax.Array:
        age = jnp.asarray(age, jnp.float32)
        return jnp.asarray(decay, jnp.float32) ** ((age if max_age is None else jnp.minimum(age, max_age)) / every)

    return schedule


def soft_clamp(max_age: float = 100.0, min_scale: float = 0.1, rate: float = 1.0) -> Schedule:
    """``max(1 - rate * age / max_age, min_scale)``: what is older is held ever tighter, but never quite.

    Args:
      max_age: the age at which a ``rate`` of 1 would reach 0, > 0.
      min_scale: floor of the factor, in [0, 1].
      rate: how fast it falls, >= 0.

    Returns:
      A function ``age -> factor`` (float32).

    Raises:
      ValueError: for numbers out of range.

    Example:
      >>> import optax_structure as oxs
      >>> [round(float(oxs.soft_clamp(max_age=100)(age)), 2) for age in (0, 50, 90, 200)]
      [1.0, 0.5, 0.1, 0.1]
    """
    _check("max_age", max_age, lambda number: number > 0, "greater than 0")
    _check("min_scale", min_scale, lambda number: 0 <= number <= 1, "in [0, 1]")
    _check("rate", rate, lambda number: number >= 0, "at least 0")
    return lambda age: jnp.maximum(1.0 - jnp.asarray(age, jnp.float32) * (rate / max_age), min_scale)


def _check(name: str, value: Any, fits: Callable[[float], bool], wanted: str) -> None:
    # The check of the transforms stands above this module, which they import.
    if not is_traced(value) and not fits(float(value)):
        raise ValueError(f"{name}={value!r} must be {wanted}.")
