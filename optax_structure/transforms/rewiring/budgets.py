"""How many connections there are to be after a rewiring, leaf by leaf."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array

from optax_structure._tree import Params
from optax_structure.sparsity.masks import leaf_counts

Shapes = Mapping[str, tuple[int, ...]]
Targets = Callable[[Mapping[str, Array], Array], dict[str, Array]]
"""``(cells that exist, progress in [0, 1]) -> cells that are to exist``, int32 scalars by path."""


class Budget(Protocol):
    """How many cells (see ``sparsity.patterns``) each sparse leaf is to have."""

    def targets(self, params: Params, shapes: Shapes, cells: Mapping[str, int]) -> Targets:
        """What this budget asks for, given the shapes of the sparse leaves and how many cells each of them has."""
        ...


class Kept(NamedTuple):
    """As many as there are."""

    def targets(self, params: Params, shapes: Shapes, cells: Mapping[str, int]) -> Targets:
        del params, shapes, cells
        return lambda counts, progress: dict(counts)


class Towards(NamedTuple):
    """From one density to another, as ``end + (begin - end) * (1 - progress)**power``."""

    density: float | Mapping[str, float]
    initial: float
    labels: Any
    distribution: str
    power: float

    def targets(self, params: Params, shapes: Shapes, cells: Mapping[str, int]) -> Targets:
        begin = _cells_at(leaf_counts(params, self.initial, None, self.distribution, shapes=shapes), shapes, cells)
        end = _cells_at(leaf_counts(params, self.density, self.labels, self.distribution, shapes=shapes), shapes, cells)

        def targets(counts: Mapping[str, Array], progress: Array) -> dict[str, Array]:
            left = (1 - progress) ** self.power
            return {path: jnp.round(end[path] + (begin[path] - end[path]) * left).astype(jnp.int32) for path in counts}

        return targets


class InProportion(NamedTuple):
    """``rate`` more for each that there is, up to a density."""

    rate: float
    density: float

    def targets(self, params: Params, shapes: Shapes, cells: Mapping[str, int]) -> Targets:
        del params, shapes
        most = {path: math.floor(self.density * number) for path, number in cells.items()}

        def targets(counts: Mapping[str, Array], progress: Array) -> dict[str, Array]:
            del progress
            return {
                path: jnp.maximum(count, jnp.minimum(jnp.ceil((1 + self.rate) * count).astype(jnp.int32), most[path]))
                for path, count in counts.items()
            }

        return targets


def _cells_at(counts: Mapping[str, int], shapes: Shapes, cells: Mapping[str, int]) -> dict[str, int]:
    return {path: max(1, round(counts[path] / math.prod(shape) * cells[path])) for path, shape in shapes.items()}
