"""When to look at frozen leaves again: at regular intervals, and at once when the loss jumps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_structure.transforms.freezing._deciding import Cell

LOSS_DECAY = 0.99
SETTLED = 20
"""Losses before their spread means anything."""
URGENT = 4.0
"""A jump so many times as far as an alarm asks for rings however lately the last one did."""


class Watch(NamedTuple):
    """When to look at the frozen leaves again: scalars of the whole run.

    Attributes:
      loss: float32, slow running mean of the loss, biased towards 0 at first.
      variance: float32, of the losses about it.
      losses: int32, how many there were.
      since_probe: int32, updates since the frozen leaves were last observed.
      since_alarm: int32, updates since the loss last asked for a probe.
      probe: bool, whether the next backward pass is to be whole.
    """

    loss: jax.Array
    variance: jax.Array
    losses: jax.Array
    since_probe: jax.Array
    since_alarm: jax.Array
    probe: jax.Array
    serves_all_ages = True


def first_watch(probe_every: Any) -> Watch:
    """Nothing seen; the first alarm may ring at once."""
    return Watch(
        jnp.zeros((), jnp.float32),
        jnp.zeros((), jnp.float32),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.asarray(probe_every, jnp.int32),
        jnp.zeros((), bool),
    )


def mean_loss(value: Any) -> jax.Array:
    """The loss as float32 scalar; the mean over the entries of a mapping.

    Raises:
      ValueError: for a loss that is no scalar, naming its shape, and a mapping without losses.
    """
    losses = [jnp.asarray(loss, jnp.float32) for loss in jax.tree.leaves(value)]
    if not losses:
        raise ValueError(f"value={value!r} holds no loss: pass the loss, a scalar, or leave it out.")
    for loss in losses:
        if loss.ndim:
            raise ValueError(f"value= has shape {loss.shape}; it is the loss, a scalar: pass its mean.")
    return jnp.mean(jnp.stack(losses))


def watched(
    watch: Watch,
    loss: jax.Array | None,
    before: Sequence[Cell],
    after: Sequence[Cell],
    looked: Sequence[Any],
    every: Any,
    alarm: Any,
) -> Watch:
    """The watch after an update: a probe is due when the frozen leaves have waited, or the loss has jumped."""
    held = _any([jnp.any(cell.frozen) for cell in after])
    # All that were frozen were looked at: a probe, or somebody who always computes everything.
    probed = ~_any([jnp.any(cell.frozen) & ~jnp.asarray(flag) for cell, flag in zip(before, looked, strict=True)])
    since_probe = jnp.where(held & ~probed, watch.since_probe + 1, 0).astype(jnp.int32)
    due = since_probe >= jnp.asarray(every, jnp.int32) - 1
    watch = watch._replace(since_probe=since_probe)
    if loss is None:
        return watch._replace(probe=held & (due | (watch.probe & ~probed)))
    ring = jnp.zeros((), bool)
    if alarm is not None:
        # A jump in a step whose frozen leaves were read says nothing that their gradients have not said.
        # Noisy losses have peace after an alarm, but a false one must not hide a true one.
        rested = watch.since_alarm >= every
        ring = held & ~probed & _jumps(watch, loss, jnp.where(rested, alarm, URGENT * alarm))
    since_alarm = jnp.where(ring, 0, jnp.minimum(watch.since_alarm + 1, jnp.asarray(every, jnp.int32)))
    # An alarm that nobody has answered yet goes on: who compiles plans does not look in every step.
    probe = held & (due | ring | (watch.probe & ~probed))
    return _with_loss(watch, loss)._replace(since_alarm=since_alarm.astype(jnp.int32), probe=probe)


def _jumps(watch: Watch, loss: jax.Array, alarm: Any) -> jax.Array:
    weight = 1 - LOSS_DECAY ** jnp.maximum(watch.losses, 1).astype(jnp.float32)
    far = loss - watch.loss / weight > alarm * jnp.sqrt(watch.variance / weight)
    return far & (watch.losses >= SETTLED) & jnp.isfinite(loss)


def _with_loss(watch: Watch, loss: jax.Array) -> Watch:
    weight = 1 - LOSS_DECAY ** jnp.maximum(watch.losses, 1).astype(jnp.float32)
    surprise = jnp.where(watch.losses > 0, jnp.square(loss - watch.loss / weight), 0.0)
    finite = jnp.isfinite(loss) & jnp.isfinite(surprise)  # an infinite variance would never come down again
    return watch._replace(
        loss=jnp.where(finite, LOSS_DECAY * watch.loss + (1 - LOSS_DECAY) * loss, watch.loss),
        variance=jnp.where(finite, LOSS_DECAY * watch.variance + (1 - LOSS_DECAY) * surprise, watch.variance),
        losses=watch.losses + finite.astype(jnp.int32),
    )


def _any(flags: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_or, flags, jnp.zeros((), bool))
