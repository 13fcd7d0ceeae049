"""A multiplier: a transformation that says a factor for every leaf, and does nothing else.

All rates here are multipliers. Each says its factors through ``Multiplier.factors``, apart from the multiplication, so
that one alone multiplies the update by them, ``scale_by_product`` multiplies several together and applies them once,
and ``rates`` reads what is in force without an update.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import leaves_by_path
from optax_structure.transforms._extra import Described, Rule


class LeafGroup(NamedTuple):
    """One scalar factor for each of some leaves, from one function of numbers that each leaf has.

    Written so, and not as a list of factors, it can be evaluated for all leaves at once: at 300 leaves XLA compiles
    one small program instead of 300.

    Attributes:
      leaves: positions in the order of ``jax.tree.leaves``.
      columns: each a list with one number (or scalar array) a leaf.
      of: ``(*numbers of one leaf) -> factor``, or None when the only column holds the factors.
    """

    leaves: tuple[int, ...]
    columns: tuple[list[Any], ...]
    of: Callable[..., Any] | None = None


class Factors(NamedTuple):
    """The factors of a tree: the product of all that is said of a leaf; 1 where nothing is.

    Attributes:
      groups: scalar factors.
      elements: position of a leaf -> factors that broadcast to it, float32.
    """

    groups: tuple[LeafGroup, ...] = ()
    elements: Mapping[int, jax.Array] = {}


FactorsFn = Callable[..., tuple[Factors, Any]]
"""``(updates, state, params, **extra_args) -> (factors, new state)``."""


class Multiplier(Described):
    """A ``GradientTransformationExtraArgs`` whose factors can be had apart from an update."""

    @property
    def factors(self) -> FactorsFn:
        """What it says of every leaf."""
        return cast(Any, self.update).factors


def every_leaf(tree: Any, *columns: Any, of: Callable[..., Any] | None = None) -> Factors:
    """One factor a leaf: ``columns`` are trees of the structure of ``tree``."""
    lists = tuple(jax.tree.leaves(column) for column in columns)
    return Factors((LeafGroup(tuple(range(len(jax.tree.leaves(tree)))), lists, of),))


def aged(schedule: Callable[[Any], Any], count: jax.Array) -> Callable[[Any], Any]:
    """``schedule`` of the age, as a function of when the age began."""
    return lambda since: schedule(count - since)


def select(where: jax.Array, yes: jax.Array | float, no: jax.Array | float) -> jax.Array:
    """``jnp.where`` of float32 as one operation: that one is a function call, and XLA inlines those of every leaf."""
    yes, no = (jnp.broadcast_to(jnp.asarray(value, jnp.float32), where.shape) for value in (yes, no))
    return jax.lax.select(where, yes, no)


@functools.partial(jax.jit, inline=True)
def scaled(update: jax.Array, factor: jax.Array | float) -> jax.Array:
    """``update * factor`` in float32, in the update's dtype; a factor of 0 gives exactly 0, even of NaN."""
    factor = jnp.broadcast_to(jnp.asarray(factor, jnp.float32), update.shape)
    product = (update.astype(jnp.promote_types(update.dtype, jnp.float32)) * factor).astype(update.dtype)
    return jax.lax.select(factor == 0, jnp.zeros_like(update), product)


def one_by_one(factors: Factors, leaves: int) -> list[Any]:
    """The factor of every leaf, None where nothing is said: each in its own scalar computation."""
    said: list[Any] = [None] * leaves
    for group in factors.groups:
        for position, *numbers in zip(group.leaves, *group.columns, strict=True):
            factor = group.of(*numbers) if group.of else numbers[0]
            said[position] = factor if said[position] is None else said[position] * factor
    for position, factor in factors.elements.items():
        said[position] = factor if said[position] is None else said[position] * factor
    return said


def at_once(factors: Factors, leaves: int) -> jax.Array:
    """The scalar factors of all leaves as one float32 vector ``(leaves,)``, in one computation a group."""
    constant, vector = np.ones(leaves, np.float32), jnp.ones(leaves, jnp.float32)
    for group in factors.groups:
        if not group.leaves:
            continue
        columns = [_stacked(column) for column in group.columns]
        values = jax.vmap(group.of)(*columns) if group.of else columns[0]
        if isinstance(values, np.ndarray):
            constant[list(group.leaves)] *= values
        elif group.leaves == tuple(range(leaves)):
            vector = vector * jnp.asarray(values, jnp.float32)
        else:
            vector = vector.at[np.array(group.leaves)].multiply(values.astype(jnp.float32), unique_indices=True)
    return vector * constant


def _stacked(column: list[Any]) -> Any:
    if all(isinstance(value, int) for value in column):
        return np.array(column, np.int32)
    if all(isinstance(value, int | float) for value in column):
        return np.array(column, np.float32)  # a constant of the program, which costs no computation
    return jnp.stack(column)


def multiplier(init: Callable[..., Any], factors: FactorsFn, rule: Rule) -> Multiplier:
    """The transformation that multiplies every update by its factor."""

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        said, state = factors(updates, state, params, **extra_args)
        leaves, treedef = jax.tree.flatten(updates)
        singly = one_by_one(said, len(leaves))
        record(updates, singly)
        scaled_leaves = [u if f is None else scaled(u, f) for u, f in zip(leaves, singly, strict=True)]
        return jax.tree.unflatten(treedef, scaled_leaves), state

    cast(Any, update).rule = rule
    cast(Any, update).factors = factors
    return Multiplier(init, update)


# What a multiplier applied, for `rates`: path -> product. A context and no argument, because the way to a multiplier
# leads through combinators of optax, which hand on what their inner update returns and nothing else.
_recording: ContextVar[dict[str, Any] | None] = ContextVar("recording", default=None)
_inside: ContextVar[str] = ContextVar("inside", default="")


@contextlib.contextmanager
def recording() -> Iterator[dict[str, Any]]:
    """Collect, by path, the product of the factors of all multipliers that run inside."""
    product: dict[str, Any] = {}
    token = _recording.set(product)
    try:
        yield product
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """Whether ``rates`` is listening."""
    return _recording.get() is not None


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """What runs inside is a computation aside, whose factors are not applied: ``rates`` must not hear of it."""
    token = _recording.set(None)
    try:
        yield
    finally:
        _recording.reset(token)


@contextlib.contextmanager
def inside(path: str) -> Iterator[None]:
    """What runs inside sees the leaf at ``path`` as a tree of its own."""
    token = _inside.set(path)
    try:
        yield
    finally:
        _inside.reset(token)


def whole_path(path: str) -> str:
    """The path in params of a leaf at ``path`` of the tree that is seen here, which ``per_leaf`` makes of one leaf."""
    return "/".join(part for part in (_inside.get(), path) if part)


def record(updates: optax.Updates, factors: list[Any]) -> None:
    """Note the factors of the leaves of ``updates`` where ``rates`` is listening."""
    product = _recording.get()
    if product is None:
        return
    for path, factor in zip(leaves_by_path(updates), factors, strict=True):
        where = whole_path(path)
        if factor is not None:
            product[where] = product.get(where, 1.0) * jnp.asarray(factor, jnp.float32)
