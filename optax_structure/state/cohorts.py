"""When each connection was born, in one byte a connection.

A connection holds the id of its *cohort*, the connections that were born together, as one uint8 (255: absent). What is
known of a cohort stands in two tables of 256 entries: the step of its birth and its component. Birth is stored, never
age: a constant costs nothing, a buffer that is incremented every step costs a copy of it every step.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_structure._tree import PyTree
from optax_structure.structure import COMPONENTS, NOT_BORN

ABSENT = 255
_IDS = 255  # ids 0..254; 255 is ABSENT


class Cohorts(NamedTuple):
    """Cohorts of a tree of connections.

    Attributes:
      cohort: tree of uint8, an array of the leaf's shape for kernels and a scalar for other leaves.
      birth: int32 (256,), the step at which each cohort was born.
      component: uint8 (256,), its component code (``structure.COMPONENTS``).
      used: int32 scalar, how many ids were ever given out (ids below it may be in use).
      count: int32 scalar, updates so far.
      synced: bool scalar, whether absent connections have been marked yet.
    """

    cohort: PyTree
    birth: jax.Array
    component: jax.Array
    used: jax.Array
    count: jax.Array
    synced: jax.Array


def first_cohort(params: PyTree) -> Cohorts:
    """Every connection in cohort 0, born at step 0, component ``scaffold``."""
    return Cohorts(
        cohort=jax.tree.map(lambda p: jnp.zeros(jnp.shape(p) if jnp.ndim(p) > 1 else (), jnp.uint8), params),
        birth=jnp.zeros(256, jnp.int32),
        component=jnp.zeros(256, jnp.uint8),
        used=jnp.ones((), jnp.int32),
        count=jnp.zeros((), jnp.int32),
        synced=jnp.zeros((), bool),
    )


def _living_ids(cohort: PyTree) -> jax.Array:
    members = jnp.zeros(256, bool)
    for leaf in jax.tree.leaves(cohort):
        members = members.at[leaf.ravel().astype(jnp.int32)].set(True)
    return members.at[ABSENT].set(False)


def _reclaim(cohorts: Cohorts, taken: jax.Array) -> tuple[Cohorts, jax.Array]:
    """An id for a new cohort when all were given out: one without members, else the two oldest cohorts merge.

    ``taken``: ids that were given out just now and have no members yet.
    """
    free = ~_living_ids(cohorts.cohort).at[taken].set(True)[:_IDS]

    def merge(cohorts: Cohorts) -> tuple[Cohorts, jax.Array]:
        # The oldest two of one component, so that a merge never turns a patch into scaffold while it can be helped.
        # All 255 ids live here and components are few, so two of one component always exist.
        codes = jnp.arange(len(COMPONENTS), dtype=jnp.uint8)
        same = cohorts.component[None, :_IDS] == codes[:, None]
        never = jnp.iinfo(jnp.int32).max
        births = jnp.where(same, cohorts.birth[None, :_IDS], never)
        order = jnp.argsort(births, axis=1)
        second = jnp.take_along_axis(births, order[:, 1:2], axis=1)[:, 0]
        code = jnp.argmin(second)
        older, younger = order[code, 0].astype(jnp.uint8), order[code, 1].astype(jnp.uint8)
        cohort = jax.tree.map(lambda c: jnp.where(c == younger, older, c), cohorts.cohort)
        return cohorts._replace(cohort=cohort), younger

    def reuse(cohorts: Cohorts) -> tuple[Cohorts, jax.Array]:
        return cohorts, jnp.argmax(free).astype(jnp.uint8)

    return jax.lax.cond(jnp.any(free), reuse, merge, cohorts)


def mark_absent(cohorts: Cohorts, masks: PyTree) -> Cohorts:
    """Take connections off the mask out of their cohorts."""

    def leaf(cohort: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask, cohort, jnp.uint8(ABSENT)) if jnp.ndim(mask) else cohort

    return cohorts._replace(
        cohort=jax.tree.map(leaf, cohorts.cohort, masks), synced=jax.tree.map(jnp.ones_like, cohorts.synced)
    )


def _occurring(born: PyTree) -> jax.Array:
    """Which component codes occur in ``born``: bool (len(COMPONENTS),)."""

    def occurs(code: int) -> jax.Array:
        # A maximum, not a bitwise or: over a mesh it becomes an all-reduce, and CPUs have none for the or of bytes.
        return jnp.stack([jnp.max((leaf == code).astype(jnp.uint8)) for leaf in jax.tree.leaves(born)]).max() > 0

    if not jax.tree.leaves(born):
        return jnp.zeros(len(COMPONENTS), bool)
    return jnp.stack([occurs(code) for code in range(len(COMPONENTS))])


def admit(cohorts: Cohorts, born: PyTree) -> Cohorts:
    """Enter new connections: one new cohort for each component that occurs in ``born``, born at ``cohorts.count``.

    Args:
      cohorts: the cohorts of the connections that exist.
      born: tree of uint8 like ``cohorts.cohort`` (or scalars): component codes, 255 where nothing was born.
    """
    occurs = _occurring(born)

    def next_ids(cohorts: Cohorts) -> tuple[Cohorts, jax.Array]:
        ids = cohorts.used + jnp.cumsum(occurs) - 1
        return cohorts._replace(used=cohorts.used + jnp.sum(occurs, dtype=jnp.int32)), ids.astype(jnp.uint8)

    def reclaimed_ids(cohorts: Cohorts) -> tuple[Cohorts, jax.Array]:
        def reclaim(code: jax.Array, carry: tuple[Cohorts, jax.Array]) -> tuple[Cohorts, jax.Array]:
            cohorts, ids = carry
            cohorts, new = _reclaim(cohorts, ids)
            # Written at once, so that the next merge knows of this cohort; as the youngest it is not merged itself.
            birth = cohorts.birth.at[new].set(cohorts.count)
            cohorts = cohorts._replace(birth=birth, component=cohorts.component.at[new].set(code.astype(jnp.uint8)))
            return cohorts, ids.at[code].set(new)

        def step(code: jax.Array, carry: tuple[Cohorts, jax.Array]) -> tuple[Cohorts, jax.Array]:
            return jax.lax.cond(occurs[code], reclaim, lambda code, carry: carry, code, carry)

        none_yet = jnp.full(len(COMPONENTS), ABSENT, jnp.uint8)
        return jax.lax.fori_loop(0, len(COMPONENTS), step, (cohorts, none_yet))

    fits = cohorts.used + jnp.sum(occurs) <= _IDS
    cohorts, ids = jax.lax.cond(fits, next_ids, reclaimed_ids, cohorts)
    table = jnp.full(256, ABSENT, jnp.uint8).at[: len(COMPONENTS)].set(ids)

    def enter(cohort: jax.Array, codes: jax.Array) -> jax.Array:
        return jnp.where(codes < len(COMPONENTS), table[codes.astype(jnp.int32)], cohort)

    at = jnp.where(occurs, ids.astype(jnp.int32), 256)  # 256 is out of the tables: nothing is written there
    return cohorts._replace(
        cohort=jax.tree.map(enter, cohorts.cohort, born),
        birth=cohorts.birth.at[at].set(cohorts.count, mode="drop"),
        component=cohorts.component.at[at].set(jnp.arange(len(COMPONENTS), dtype=jnp.uint8), mode="drop"),
    )


def follow(cohorts: Cohorts, masks: PyTree, component: str = "scaffold") -> Cohorts:
    """Bring cohorts to ``masks`` after a rewiring: absent connections leave, those without a cohort are born now.

    Before the first call nothing is known of absence, so the connections of ``masks`` keep the cohort they have.
    """
    code = COMPONENTS.index(component)

    def newborn(cohort: jax.Array, mask: jax.Array) -> jax.Array:
        if not jnp.ndim(mask):
            return jnp.asarray(NOT_BORN, jnp.uint8)
        return jnp.where(mask & (cohort == ABSENT), jnp.uint8(code), jnp.uint8(NOT_BORN))

    def change(cohorts: Cohorts) -> Cohorts:
        return admit(mark_absent(cohorts, masks), jax.tree.map(newborn, cohorts.cohort, masks))

    return jax.lax.cond(cohorts.synced, change, lambda c: mark_absent(c, masks), cohorts)
