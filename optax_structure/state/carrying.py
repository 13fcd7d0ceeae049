"""A transfer carried out: what changed, as arrays; the plan; the moving; and where the result is placed."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import Params, PyTree, align, is_traced, leaves_by_path, map_with_path
from optax_structure.state import slots
from optax_structure.state.markers import Masks
from optax_structure.state.moving import Change, CohortPlan, Move, estimated_again, move, move_in_place, move_one
from optax_structure.state.planning import Mixed, Plan
from optax_structure.state.slots import Entry
from optax_structure.structure import Growth

Shapes = dict[str, tuple[int, ...]]
Arrays = Mapping[str, jax.Array]


def shapes(params: Params) -> Shapes:
    """Path -> shape."""
    return {path: np.shape(leaf) for path, leaf in leaves_by_path(params).items()}


def arrays(tree: PyTree) -> dict[str, jax.Array]:
    """The leaves that are arrays, by path; a scalar says that nothing is to be read there."""
    return {path: leaf for path, leaf in leaves_by_path(tree).items() if np.ndim(leaf)}


def masks_in(entries: list[Entry]) -> dict[str, jax.Array]:
    """The masks that a state holds, by path."""
    return {e.path: e.value for e in entries if e.kind is Masks and e.path is not None and np.ndim(e.value)}


def moved_sources(growth: Growth, old_shapes: Shapes, leaves: Mapping[str, Any]) -> dict[str, tuple[jax.Array, ...]]:
    """The sources of leaves in which something moved; those of the others would be gathers for nothing."""
    moved = {}
    for path, sources in growth.sources.items():
        if path not in leaves:
            raise ValueError(f"growth.sources names {path!r}, which is not in new_params: {list(leaves)}.")
        sizes, shape = tuple(len(index) for index in sources), np.shape(leaves[path])
        if sizes != shape:
            raise ValueError(f"growth.sources[{path!r}] has sizes {sizes}, new_params has shape {shape} there.")
        origin = growth.rename.get(path, path)
        before = old_shapes.get(origin)
        if before is None:
            continue
        if len(before) != len(shape) or any(np.max(i, initial=-1) >= n for i, n in zip(sources, before, strict=True)):
            raise ValueError(f"growth.sources[{path!r}] points outside of {origin!r}, which had shape {before}.")
        if shape != before or any(not np.array_equal(index, np.arange(len(index))) for index in sources):
            moved[path] = tuple(jnp.asarray(index, jnp.int32) for index in sources)
    return moved


def with_grads(change: Change, grads: Params | None, params: Params) -> Change:
    """The change with the gradients of the leaves that it touches."""
    if grads is None:
        return change
    touched = change.paths()
    aligned = leaves_by_path(align(grads, params, "grads"))
    return change._replace(grads={path: grad for path, grad in aligned.items() if path in touched})


def carry(
    old: list[Entry],
    new: list[Entry],
    treedef: Any,
    *,
    old_shapes: Shapes,
    new_leaves: Mapping[str, Any],
    rename: Mapping[str, str],
    restarted: frozenset[str],
    labels: Mapping[str, str],
    mixed: Mixed,
    built: Mapping[Any, Any],
    change: Change,
) -> optax.OptState:
    """Plan the transfer of ``old`` into ``new`` and carry it out."""
    plan = Plan(
        old,
        new,
        old_shapes=old_shapes,
        new_shapes={path: np.shape(leaf) for path, leaf in new_leaves.items()},
        rename=rename,
        restarted=restarted,
        moved=change.paths(),
        shifted=change.shifted(),
        reset=frozenset(change.reset),
        labels=labels,
        mixed=mixed,
        built=built,
    )
    moves, cohorts = plan.carried_out()
    values = move(moves, cohorts, [e.value for e in old], [e.value for e in new], change)
    placed = [_like(value, new_leaves.get(entry.path or "")) for value, entry in zip(values, new, strict=True)]
    return jax.tree.unflatten(treedef, placed)


def _plan(
    tx: optax.GradientTransformation,
    state_def: Any,
    state_shapes: tuple[tuple[int, ...], ...],
    params_def: Any,
    param_shapes: tuple[tuple[int, ...], ...],
    moved: frozenset[str],
    shifted: frozenset[str],
    labels: tuple[tuple[str, str], ...],
) -> tuple[tuple[Move, ...], tuple[CohortPlan, ...], tuple[str, ...], tuple[tuple[str, int], ...]]:
    """The plan of a change that moves no leaf: it depends on no value."""
    params = jax.tree.unflatten(params_def, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in param_shapes])
    state = jax.tree.unflatten(state_def, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in state_shapes])
    entries = slots.read(tx, state, params)
    plan = Plan(
        entries,
        entries,
        old_shapes=shapes(params),
        new_shapes=shapes(params),
        rename={},
        restarted=frozenset(),
        moved=moved,
        shifted=shifted,
        reset=frozenset(),
        labels=dict(labels),
        mixed="error",
        built={},
    )
    moves, cohorts = plan.carried_out()
    masks = tuple(
        (e.path, i) for i, e in enumerate(entries) if e.kind is Masks and e.path is not None and len(e.value.shape)
    )
    return moves, cohorts, tuple(e.path or "" for e in entries), masks


_plan_in_place = functools.lru_cache(maxsize=64)(_plan)
"""Every later event finds its plan here."""


def carry_in_place(
    tx: optax.GradientTransformation, state: optax.OptState, params: Params, growth: Growth, grads: Params | None
) -> optax.OptState:
    """The transfer after a change of masks: same transformation, same leaves, same shapes."""
    leaves = leaves_by_path(params)
    values, treedef = jax.tree.flatten(state)
    change = Change(
        sources=moved_sources(growth, shapes(params), leaves), new_masks=arrays(growth.masks), born=arrays(growth.born)
    )
    moves, cohorts, paths, masks = _plan_in_place(
        tx,
        treedef,
        tuple(value.shape for value in values),
        jax.tree.structure(params),
        tuple(leaf.shape for leaf in leaves.values()),
        change.paths(),
        change.shifted(),
        tuple(leaves_by_path(growth.labels).items()),
    )
    change = with_grads(change._replace(old_masks={path: values[index] for path, index in masks}), grads, params)
    moved = move_in_place(tx, moves, cohorts, params, values, change)
    placed = [_like(value, leaves.get(path)) for value, path in zip(moved, paths, strict=True)]
    return jax.tree.unflatten(treedef, placed)


class Renewal:
    """What becomes of an optimizer's state when connections come and go inside a program, leaf by leaf.

    Connections that appeared have no past, and those that went leave nothing. Cohorts stay: their transform is told
    that the masks changed, and finds by itself who was born.
    """

    def __init__(self, tx: optax.GradientTransformation, state: optax.OptState, params: Params, paths: Collection[str]):
        self.tx, self.params = tx, params
        self.values, self.treedef = jax.tree.flatten(state)
        leaves, params_def = jax.tree.flatten(params)
        of_state, of_params = (tuple(value.shape for value in values) for values in (self.values, leaves))
        # Not from the cache: inside a program the transformation may hold tracers.
        moves, *_ = _plan(tx, self.treedef, of_state, params_def, of_params, frozenset(paths), frozenset(), ())
        kept = ("keep", "cohort", "since", "unborn")
        self.moves = {index: op for index, op in enumerate(moves) if op.kind not in kept and op.path in paths}

    def arrays(self, paths: Collection[str]) -> dict[int, jax.Array]:
        """The arrays of the state that follow the connections of some leaves."""
        return {index: self.values[index] for index, op in self.moves.items() if op.path in paths}

    def renewed(
        self, arrays: Mapping[int, jax.Array], old_masks: Arrays, new_masks: Arrays, grads: Arrays
    ) -> dict[int, jax.Array]:
        """Those arrays after a change of masks."""
        change = Change(old_masks=dict(old_masks), new_masks=dict(new_masks), grads=dict(grads))
        # What went has no weight either: some optimizers begin with a copy of the parameters.
        begun = map_with_path(
            lambda path, leaf: jnp.where(new_masks[path], leaf, jnp.zeros_like(leaf)) if path in new_masks else leaf,
            self.params,
        )
        fresh = jax.tree.leaves(self.tx.init(begun))
        # An array is its own old one: the transformation stays, so its state does not move.
        return {index: move_one(self.moves[index], {self.moves[index].old: of}, fresh, index, change)
                for index, of in arrays.items()}  # fmt: skip

    def settled(
        self, arrays: Mapping[int, jax.Array], old_masks: Arrays, new_masks: Arrays, grads: Arrays
    ) -> dict[int, jax.Array]:
        """Those arrays with second moments estimated again, by new gradients, for the connections that came.

        The gradient that chose them was large by selection: a second moment that bounds their first updates by it
        would hold them down for the length of its memory.
        """
        change = Change(old_masks=dict(old_masks), new_masks=dict(new_masks), grads=dict(grads))
        return {index: estimated_again(self.moves[index], of, change) for index, of in arrays.items()}

    def state(self, arrays: Mapping[int, jax.Array]) -> optax.OptState:
        """The whole state, with other arrays in it."""
        return jax.tree.unflatten(self.treedef, [arrays.get(i, value) for i, value in enumerate(self.values)])


def _like(value: jax.Array, param: Any) -> jax.Array:
    """``value`` sharded as the parameter of its shape is; a copy is made only where that is not so already."""
    sharding = None if is_traced(param) else getattr(param, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return value
    if value.shape != param.shape:
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.device_put(value, sharding)
