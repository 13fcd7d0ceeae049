"""State nodes with a meaning of their own when structure changes; ``state.transfer_state`` knows them by type."""

from __future__ import annotations

from typing import NamedTuple

from optax_structure._tree import PyTree


class LabelClock(NamedTuple):
    """Counts that start again when a leaf gets another label.

    Attributes:
      count: int32 scalar a leaf, updates since it got its label.
      label: uint32 scalar a leaf, the CRC-32 of the label.
    """

    count: PyTree
    label: PyTree


class Masks(NamedTuple):
    """The masks that a transform owns: a bool array a sparse leaf, scalar True for the others."""

    masks: PyTree


class Positions(NamedTuple):
    """Where each leaf stands among the leaves: an int32 scalar a leaf, written anew for every new set of leaves."""

    place: PyTree
