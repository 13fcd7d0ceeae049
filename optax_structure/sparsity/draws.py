"""Places drawn at random, so cheaply that an event inside the training step can afford it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from optax_structure.sparsity.topk import select


def random_order(key: Array, shape: tuple[int, ...], start: int = 0) -> Array:
    """Random uint32 scores, no two equal; nor any to those of the positions before ``start``.

    The position, put through two keyed rounds of MurmurHash3's finaliser, each a bijection: a fifth of the time of
    ``jax.random.bits``, which would take as long as everything else that an event does, and more than good enough to
    draw places from.
    """
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) + jnp.uint32(start)
    for salt in jax.random.bits(key, (2,), jnp.uint32):
        bits = (bits ^ salt ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        bits = bits ^ (bits >> 16)
    return bits


def random_orders(key: Array, masks: Mapping[str, Array]) -> dict[str, Array]:
    """``random_order`` for every leaf of a set, no two equal in all."""
    paths = sorted(masks)
    return dict(zip(paths, _one_order([masks[path] for path in paths], key), strict=True))


def _one_order(leaves: list[Array], key: Array) -> list[Array]:
    starts = itertools.accumulate((leaf.size for leaf in leaves), initial=0)
    return [random_order(key, leaf.shape, start) for leaf, start in zip(leaves, starts, strict=False)]


def random_scores(key: Array, shape: tuple[int, ...]) -> Array:
    """Random float32 scores in [0, 1), of 24 bits: as many as a float32 there tells apart."""
    return as_scores(random_order(key, shape))


def as_scores(order: Array) -> Array:
    """The upper 24 of 32 random bits as float32 in [0, 1)."""
    return (order >> 8).astype(jnp.float32) * 2.0**-24


def top_k_at_random(scores: Mapping[str, Array], k: Array, where: Mapping[str, Array], key: Array) -> dict[str, Array]:
    """``top_k_mask_tree`` of float32 scores that draws among those that tie for the last places.

    Where many are exactly 0, as weights just born or gradients of dead inputs are, the lowest index would win.
    """
    paths = sorted(scores)
    chosen = select([scores[path] for path in paths], [where[path] for path in paths], k, key, order=_one_order)
    return dict(zip(paths, chosen, strict=True))


def number(masks: Mapping[str, Array]) -> Array:
    """How many entries of all leaves are True: int32 scalar."""
    return sum((jnp.sum(mask, dtype=jnp.int32) for mask in masks.values()), jnp.int32(0))
