"""State nodes with a meaning of their own when structure changes; ``state.transfer_state`` knows them by type.

A NamedTuple that says ``serves_all_ages = True`` holds beside what it has of every leaf numbers that are right for
leaves of any age (a clock, the phase of training): they are carried through every change, as a shared count of Adam's
must not be.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_structure._tree import PyTree


class AgeClock(NamedTuple):
    """The age of every leaf. Since when it counts is stored, never how long: so a step touches one number, not all.

    Attributes:
      count: int32 scalar, what was counted so far (updates, events).
      since: int32 scalar a leaf, ``count`` when the leaf was born.
    """

    count: jax.Array
    since: PyTree
    serves_all_ages = True


class EventClock(NamedTuple):
    """Ages in growth events. A leaf is born *in* an event, which does not age it; its older neighbours it does.

    Attributes:
      count: int32 scalar, events so far.
      since: int32 scalar a leaf, ``count`` at its birth; ``UNBORN`` until its first update, which may be of the event
        that it was born in.
    """

    count: jax.Array
    since: PyTree
    serves_all_ages = True


UNBORN = jnp.iinfo(jnp.int32).min


class RunClock(NamedTuple):
    """The clock of the whole run: int32 scalar, updates so far."""

    count: jax.Array
    serves_all_ages = True


class LabelClock(NamedTuple):
    """Ages that start again when a leaf gets another label.

    Attributes:
      count: int32 scalar, updates so far.
      since: int32 scalar a leaf, ``count`` when it got its label.
      label: uint32 scalar a leaf, the CRC-32 of the label.
    """

    count: jax.Array
    since: PyTree
    label: PyTree
    serves_all_ages = True


def first_clock(params: PyTree) -> AgeClock:
    """Every leaf is born now."""
    return AgeClock(jnp.zeros((), jnp.int32), jax.tree.map(lambda _: jnp.zeros((), jnp.int32), params))


class Masks(NamedTuple):
    """The masks that a transform owns: a bool array a sparse leaf, scalar True for the others."""

    masks: PyTree


class RewiringClock(NamedTuple):
    """When, and from what, masks change by themselves.

    Attributes:
      count: int32 scalar, updates so far.
      before: bool, the masks before the last rewiring: an array a sparse leaf, a scalar True for the others.
      grads: float32, sum of the last dense gradients: an array a sparse leaf, a scalar 0 for the
        others; ``()`` unless they are accumulated.
    """

    count: jax.Array
    before: PyTree
    grads: PyTree
    serves_all_ages = True


class Positions(NamedTuple):
    """Where each leaf stands among the leaves: a uint32 scalar a leaf, written anew for every new set of leaves."""

    place: PyTree
