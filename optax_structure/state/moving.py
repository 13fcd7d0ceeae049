"""The array work of a state transfer: one jitted function, compiled once for each plan and set of shapes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import Params
from optax_structure.state.cohorts import ABSENT, Cohorts, admit
from optax_structure.state.markers import UNBORN
from optax_structure.structure import NOT_BORN


class Move(NamedTuple):
    """What becomes of one array of the new state. Static.

    Attributes:
      kind: ``fresh`` as initialised; ``keep`` the old array as it is; ``elements`` the old entries at their new places
        and fresh ones elsewhere; ``rows`` the same along one axis of a factored moment; ``since`` when a
        leaf's age began; ``unborn`` that it has not; ``masks`` the new masks; ``cohort`` cohort ids at their new
        places.
      old: index of the old array.
      path: the parameter's path.
      axis: for ``rows``, the parameter's axis that the array runs along.
      second_moment: ``"mean"`` when fresh elements must not start at zero beside a mature count, ``"belief"`` for the
        variance of the gradient around its mean, which is small where the gradient is steady.
      old_count, new_count: for ``since``, indices of the clocks' counts in the old and new state.
      old_label, new_label: for ``since``, indices of the labels' codes in the old and new state, -1 without labels.
    """

    kind: Literal["fresh", "keep", "elements", "rows", "since", "unborn", "masks", "cohort"]
    old: int = -1
    path: str = ""
    axis: int = -1
    second_moment: Literal["", "mean", "belief"] = ""
    old_count: int = -1
    new_count: int = -1
    old_label: int = -1
    new_label: int = -1


class CohortPlan(NamedTuple):
    """Where the parts of one ``Cohorts`` node stand in the new state. Static. ``codes``: component of a fresh leaf."""

    paths: tuple[str, ...]
    leaves: tuple[int, ...]
    codes: tuple[int, ...]
    tables: tuple[int, int, int, int, int]  # birth, component, used, count, synced


class Change(NamedTuple):
    """The change of structure, as arrays by path; a path that is not listed did not change in that respect."""

    sources: dict[str, tuple[jax.Array, ...]] = {}  # noqa: RUF012  (never written to)
    old_masks: dict[str, jax.Array] = {}  # noqa: RUF012
    new_masks: dict[str, jax.Array] = {}  # noqa: RUF012
    born: dict[str, jax.Array] = {}  # noqa: RUF012
    grads: dict[str, jax.Array] = {}  # noqa: RUF012
    reset: dict[str, jax.Array] = {}  # noqa: RUF012

    def paths(self) -> frozenset[str]:
        """The leaves in which anything may have changed."""
        return frozenset({*self.sources, *self.old_masks, *self.new_masks, *self.born, *self.reset})

    def shifted(self) -> frozenset[str]:
        """The leaves in which rows move or start again, not connections alone."""
        return frozenset({*self.sources, *self.reset})


def _along(index: jax.Array, axis: int, ndim: int) -> jax.Array:
    return index.reshape([-1 if d == axis else 1 for d in range(ndim)])


def _gather(value: jax.Array, sources: tuple[jax.Array, ...]) -> jax.Array:
    for axis, index in enumerate(sources):
        value = jnp.take(value, jnp.maximum(index, 0), axis=axis)
    return value


def _carried(path: str, change: Change, ndim: int) -> jax.Array:
    """True where an entry of the new leaf is an old entry whose history goes on. Broadcasts to the leaf's shape."""
    carried = jnp.ones((1,) * ndim, bool)
    for axis, index in enumerate(change.sources.get(path, ())):
        carried = carried & _along(index >= 0, axis, ndim)
    if path in change.new_masks or path in change.old_masks:
        # A connection that appeared has no history, one that disappeared loses it. One that is absent before and
        # after keeps what it has, so that a transfer in which nothing changes is the identity.
        everywhere = jnp.ones((1,) * ndim, bool)
        old = change.old_masks.get(path)
        before = everywhere if old is None else _gather(old, change.sources.get(path, ()))
        carried = carried & (change.new_masks.get(path, everywhere) == before)
    if path in change.born:
        carried = carried & (change.born[path] == NOT_BORN)
    if path in change.reset:
        carried = carried & ~change.reset[path]
    return carried


def _sum(value: jax.Array) -> jax.Array:
    # An axis at a time: XLA's CPU backend vectorises the sum over a leading axis, not the one over everything.
    value = jnp.sum(value, axis=0, dtype=jnp.float32) if value.ndim else value
    return jnp.sum(value, dtype=jnp.float32)


def _mean(value: jax.Array, where: jax.Array) -> jax.Array:
    where = jnp.broadcast_to(where, value.shape)
    return _sum(jnp.where(where, value, 0)) / jnp.maximum(_sum(where), 1.0)


def _second_moment(
    op: Move, moved: jax.Array, fresh: jax.Array, carried: jax.Array, change: Change, grad: jax.Array | None
) -> jax.Array:
    """Second moments for fresh elements: the living mean, raised by how much larger their gradient is.

    A zero here, beside a mature count, makes the first updates of the element 3.2 times too large; the plain mean
    makes them too large by the ratio of its gradient to the living one's.
    """
    living = carried & change.new_masks.get(op.path, jnp.ones((), bool))
    born = ~carried & change.new_masks.get(op.path, jnp.ones((), bool))
    mean = _mean(moved, living)
    if grad is None:
        fill = jnp.broadcast_to(mean, moved.shape)
    else:
        squared = jnp.square(grad.astype(jnp.float32))
        scale = jnp.maximum(_mean(squared, living), jnp.finfo(jnp.float32).tiny)
        # One gradient is a noisy witness: an element whose gradient happens to be small now gets its cohort's mean.
        squared = jnp.maximum(squared, _mean(squared, born))
        fill = mean * jnp.maximum(1.0, squared / scale)
        if op.second_moment == "belief":
            fill = jnp.maximum(fill, squared)
    some = _sum(jnp.broadcast_to(living, moved.shape)) > 0
    return jnp.where(born & some, fill, fresh).astype(fresh.dtype)


def move_one(
    op: Move, old: Sequence[jax.Array] | Mapping[int, jax.Array], fresh: Sequence[jax.Array], index: int, change: Change
) -> jax.Array:
    """One array of the new state."""
    new = fresh[index]
    if op.kind in ("fresh", "since"):
        return new
    if op.kind == "unborn":
        return jnp.full_like(new, UNBORN)
    if op.kind == "masks":
        return change.new_masks.get(op.path, new)
    value = old[op.old]
    if op.kind == "keep":
        return value.astype(new.dtype) if jnp.issubdtype(new.dtype, jnp.number) else value
    sources = change.sources.get(op.path, ())
    if op.kind == "cohort":
        if not value.ndim:
            return value  # a leaf that is no kernel is one cohort, however long it grows
        value = _gather(value, sources)
        for axis, index_along in enumerate(sources):
            value = jnp.where(_along(index_along >= 0, axis, value.ndim), value, jnp.uint8(ABSENT))
        return value
    grad = change.grads.get(op.path)
    if op.kind == "rows":
        others = tuple(axis for axis in range(2) if axis != op.axis)
        carried, moved = jnp.ones(new.shape, bool), value.astype(new.dtype)
        if sources:
            carried = sources[op.axis] >= 0
            moved = jnp.take(moved, jnp.maximum(sources[op.axis], 0), axis=0)
        if op.path in change.reset:
            # A row is shared by its elements: it starts again when all of them do.
            carried = carried & ~jnp.all(change.reset[op.path], axis=others)
        if grad is not None:
            grad = jnp.sqrt(jnp.mean(jnp.square(grad.astype(jnp.float32)), axis=others))
        change = change._replace(new_masks={})
        return jnp.where(carried, moved, _second_moment(op, moved, new, carried, change, grad))
    carried = _carried(op.path, change, new.ndim)
    moved = _gather(value, sources).astype(new.dtype)
    other: jax.Array = new
    if op.second_moment:
        other = _second_moment(op, moved, new, carried, change, grad)
    return jnp.where(carried, moved, other)


def estimated_again(op: Move, value: jax.Array, change: Change) -> jax.Array:
    """An array whose second moments, where connections came, are filled in once more; all else stays.

    By the mean of all that came: there is one gradient a connection, and the smaller half of those would be too small.
    """
    if not op.second_moment or op.kind != "elements":
        return value
    mask = change.new_masks[op.path]
    born = mask & ~change.old_masks[op.path]
    living, squared = mask & ~born, jnp.square(change.grads[op.path].astype(jnp.float32))
    scale = jnp.maximum(_mean(squared, living), jnp.finfo(jnp.float32).tiny)
    fill = _mean(value, living) * jnp.maximum(1.0, _mean(squared, born) / scale)
    return jnp.where(born & jnp.any(living), fill, value).astype(value.dtype)


def _since(op: Move, values: list[jax.Array], old: list[jax.Array]) -> jax.Array:
    """Since when a leaf counts on the clock that it has now: now, or so that its age stays."""
    now = values[op.new_count]
    if op.old < 0:
        return now
    carried = jnp.where(old[op.old] == UNBORN, UNBORN, now - (old[op.old_count] - old[op.old]))
    if op.old_label < 0:
        return carried
    return jnp.where(old[op.old_label] == values[op.new_label], carried, now)


def _admit(plan: CohortPlan, values: list[jax.Array], moves: tuple[Move, ...], change: Change) -> None:
    """Enter what is new into the cohorts, in place in ``values``."""
    cohort: dict[str, jax.Array] = {}
    born: dict[str, jax.Array] = {}
    component = values[plan.tables[1]]
    for path, index, code in zip(plan.paths, plan.leaves, plan.codes, strict=True):
        value = values[index] if moves[index].kind != "fresh" else jnp.full_like(values[index], ABSENT)
        codes = jnp.uint8(code)
        if path in change.reset:
            # An entry whose history starts again keeps its component; one that was absent gets its leaf's.
            codes = jnp.where(value == ABSENT, codes, component[value.astype(jnp.int32)])
        present = jnp.ones((), bool)
        if value.ndim:
            if path in change.born:
                codes = jnp.where(change.born[path] == NOT_BORN, codes, change.born[path])
            if moves[index].kind != "fresh":
                if path not in change.new_masks:
                    # Masks passed to update= by hand are not known here: the cohorts say which connections are absent.
                    present = (value != ABSENT) | ~_carried(path, change._replace(reset={}), value.ndim)
                value = jnp.where(_carried(path, change, value.ndim), value, jnp.uint8(ABSENT))
            present = change.new_masks.get(path, present)
            value = jnp.where(present, value, jnp.uint8(ABSENT))
        elif path in change.reset:
            value = jnp.where(jnp.all(change.reset[path]), jnp.uint8(ABSENT), value)
        cohort[path] = value
        born[path] = jnp.where(present & (value == ABSENT), codes, jnp.uint8(NOT_BORN))
    birth, component, used, count, synced = (values[table] for table in plan.tables)
    synced = jnp.ones_like(synced) if change.new_masks else synced
    entered = admit(Cohorts(cohort, birth, component, used, count, synced), born)
    for path, index in zip(plan.paths, plan.leaves, strict=True):
        values[index] = entered.cohort[path]
    for table, value in zip(plan.tables, entered[1:], strict=True):
        values[table] = value


def _move_all(
    moves: tuple[Move, ...],
    cohorts: tuple[CohortPlan, ...],
    old: list[jax.Array],
    fresh: list[jax.Array],
    change: Change,
) -> list[jax.Array]:
    values = [move_one(op, old, fresh, index, change) for index, op in enumerate(moves)]
    for index, op in enumerate(moves):
        if op.kind == "since":  # reads its clock's count, which has been moved by now
            values[index] = _since(op, values, old)
    for plan in cohorts:
        _admit(plan, values, moves, change)
    return values


move = jax.jit(_move_all, static_argnames=("moves", "cohorts"))
"""The arrays of the new state, in its order. Compiled once for each plan and set of shapes."""


@functools.partial(jax.jit, static_argnames=("tx", "moves", "cohorts"))
def move_in_place(
    tx: optax.GradientTransformation,
    moves: tuple[Move, ...],
    cohorts: tuple[CohortPlan, ...],
    params: Params,
    old: list[jax.Array],
    change: Change,
) -> list[jax.Array]:
    """``move`` when the transformation stays: its fresh state is made here, and only what is read of it."""
    return _move_all(moves, cohorts, old, jax.tree.leaves(tx.init(params)), change)
