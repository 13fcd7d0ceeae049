"""Places drawn at random, so cheaply that an event inside the training step can afford it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array


def random_order(key: Array, shape: tuple[int, ...]) -> Array:
    """Random uint32 scores, no two equal.

    The position, put through two keyed rounds of MurmurHash3's finaliser, each a bijection: a fifth of the time of
    ``jax.random.bits``, which would take as long as everything else that an event does, and more than good enough to
    draw places from.
    """
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    for salt in jax.random.bits(key, (2,)):
        bits = (bits ^ salt ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        bits = bits ^ (bits >> 16)
    return bits


def random_scores(key: Array, shape: tuple[int, ...]) -> Array:
    """Random float32 scores in [0, 1), of 24 bits: as many as a float32 there tells apart."""
    return (random_order(key, shape) >> 8).astype(jnp.float32) * 2.0**-24
