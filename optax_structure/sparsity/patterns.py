"""Patterns: which sets of connections may exist together. Single ones, tiles, the same number a unit, N of every M.

A pattern sees a leaf as *cells*, each of which exists or does not: a connection; a tile; one connection of every unit
(or of every group of M). So a budget in cells is always met exactly, whatever the pattern.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from optax_structure.sparsity.draws import top_k_at_random

Shape = tuple[int, ...]


class Pattern(Protocol):
    """Which connections of a leaf come and go together."""

    def check(self, path: str, shape: Shape) -> None:
        """Raise ``ValueError``, naming the leaf, where the pattern does not fit the shape."""
        ...

    def holds(self, mask: Array) -> Array:
        """Whether a mask is made of whole cells: bool scalar."""
        ...

    def cells(self, shape: Shape) -> int:
        """How many cells a leaf has."""
        ...

    def count(self, mask: Array) -> Array:
        """How many of them exist: int32 scalar."""
        ...

    def top(self, scores: Array, k: Array, where: Array, key: Array) -> Array:
        """A mask of the ``k`` cells with the highest scores among those of ``where``; ties are drawn."""
        ...


class Single(NamedTuple):
    """Every connection by itself."""

    def check(self, path: str, shape: Shape) -> None:
        del path, shape

    def holds(self, mask: Array) -> Array:
        del mask
        return jnp.ones((), bool)

    def cells(self, shape: Shape) -> int:
        return math.prod(shape)

    def count(self, mask: Array) -> Array:
        return jnp.sum(mask, dtype=jnp.int32)

    def top(self, scores: Array, k: Array, where: Array, key: Array) -> Array:
        return _top(scores, k, where, key)


class Tiles(NamedTuple):
    """Blocks of ``rows x columns`` connections of a dense kernel; those at an edge may be cut off by it.

    A tile's score is the sum of its connections'.
    """

    rows: int
    columns: int

    def check(self, path: str, shape: Shape) -> None:
        if len(shape) != 2:
            raise ValueError(f"tiles are of dense kernels (in, out); {path!r} has shape {shape}: leave it unmasked.")
        if self.rows > shape[0] or self.columns > shape[1]:
            raise ValueError(f"tiles of {self.rows} x {self.columns} are larger than {path!r}, of shape {shape}.")

    def holds(self, mask: Array) -> Array:
        return jnp.all(self._whole(self._corners(mask), mask.shape) == mask)

    def cells(self, shape: Shape) -> int:
        return math.prod(self._grid(shape))

    def count(self, mask: Array) -> Array:
        return jnp.sum(self._corners(mask), dtype=jnp.int32)

    def top(self, scores: Array, k: Array, where: Array, key: Array) -> Array:
        rows, columns = self._grid(scores.shape)
        pads = ((0, rows * self.rows - scores.shape[0]), (0, columns * self.columns - scores.shape[1]))
        tiles = jnp.pad(scores, pads).reshape(rows, self.rows, columns, self.columns)
        chosen = _top(jnp.sum(tiles, axis=(1, 3)), k, self._corners(where), key)
        return self._whole(chosen, scores.shape)

    def _grid(self, shape: Shape) -> tuple[int, int]:
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)

    def _whole(self, chosen: Array, shape: Shape) -> Array:
        return jnp.repeat(jnp.repeat(chosen, self.rows, axis=0), self.columns, axis=1)[: shape[0], : shape[1]]

    def _corners(self, mask: Array) -> Array:
        return mask[:: self.rows, :: self.columns]


class Grouped(NamedTuple):
    """The same number of connections in every group of ``size`` inputs of a unit; ``None``: all inputs of the unit.

    The inputs of a unit are all axes of its kernel but the last, flattened.
    """

    size: int | None = None

    def check(self, path: str, shape: Shape) -> None:
        if self.size is not None and math.prod(shape[:-1]) % self.size:
            raise ValueError(
                f"groups of {self.size} do not divide the {math.prod(shape[:-1])} inputs of {path!r}, of shape {shape}."
            )

    def holds(self, mask: Array) -> Array:
        return jnp.all(jnp.sum(self._grouped(mask), axis=1, dtype=jnp.int32) == self.count(mask))

    def cells(self, shape: Shape) -> int:
        return self.size or math.prod(shape[:-1])

    def count(self, mask: Array) -> Array:
        return jnp.sum(self._grouped(mask)[0], dtype=jnp.int32)

    def top(self, scores: Array, k: Array, where: Array, key: Array) -> Array:
        groups = self._grouped(scores)
        keys = jax.random.split(key, len(groups))
        chosen = jax.vmap(_top, in_axes=(0, None, 0, 0))(groups, k, self._grouped(where), keys)
        units = scores.shape[-1]
        return jnp.moveaxis(chosen.reshape(-1, units, self.cells(scores.shape)), 1, 2).reshape(scores.shape)

    def _grouped(self, values: Array) -> Array:
        """(groups, members)."""
        size, units = self.cells(values.shape), values.shape[-1]
        return jnp.moveaxis(values.reshape(-1, size, units), 1, 2).reshape(-1, size)


def _top(scores: Array, k: Array, where: Array, key: Array) -> Array:
    return top_k_at_random({"": scores}, k, {"": where}, key)[""]


def tiles(rows: int, columns: int | None = None) -> Tiles:
    """Connections that exist in blocks: tiles of a dense kernel, laid out from its first row and column.

    Args:
      rows: inputs of a tile, at least 1.
      columns: units of a tile; ``rows`` where nothing is said.

    Returns:
      The pattern, for ``random_masks(..., pattern=)`` and ``rewiring(..., pattern=)``.

    Raises:
      ValueError: for sizes below 1; when used, for a tile larger than a leaf, or a leaf that is no matrix.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> masks = oxs.random_masks(jax.random.key(0), {"kernel": jnp.ones((4, 4))}, 0.5, pattern=oxs.tiles(2))
      >>> int(masks["kernel"][:2, :2].sum()) in (0, 4), oxs.nonzero(masks)
      (True, 8)

    References:
      Gray et al., GPU kernels for block-sparse weights, 2017.
    """
    return Tiles(_positive("rows", rows), _positive("columns", rows if columns is None else columns))


def constant_fan_in() -> Grouped:
    """The same number of inputs for every unit: what fast kernels and a fair start ask for.

    Returns:
      The pattern, for ``random_masks(..., pattern=)`` and ``rewiring(..., pattern=)``.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> pattern = oxs.constant_fan_in()
      >>> masks = oxs.random_masks(jax.random.key(0), {"kernel": jnp.ones((8, 3))}, 0.25, pattern=pattern)
      >>> masks["kernel"].sum(0).tolist()
      [2, 2, 2]

    References:
      Lasby et al., Dynamic sparse training with structured sparsity (SRigL), 2024.
    """
    return Grouped()


def groups_of(m: int) -> Grouped:
    """N of every M (N:M): the same number of connections in each group of ``m`` consecutive inputs of a unit.

    N follows from the density of each leaf: 0.5 with ``groups_of(4)`` is 2:4, which GPUs multiply faster. Where there
    are several leaves, that takes ``distribution="uniform"``: by default small ones get more.

    Args:
      m: size of the groups, at least 2; it must divide the inputs of every sparse leaf.

    Returns:
      The pattern, for ``random_masks(..., pattern=)`` and ``rewiring(..., pattern=)``.

    Raises:
      ValueError: for ``m`` below 2; when used, where it does not divide a leaf's inputs, naming it.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> masks = oxs.random_masks(jax.random.key(0), {"kernel": jnp.ones((8, 2))}, 0.5, pattern=oxs.groups_of(4))
      >>> masks["kernel"].reshape(2, 4, 2).sum(1).tolist()
      [[2, 2], [2, 2]]

    References:
      Mishra et al., Accelerating sparse deep neural networks, 2021.
    """
    return Grouped(_positive("m", m, least=2))


def _positive(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or int(value) != value or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
    return int(value)
