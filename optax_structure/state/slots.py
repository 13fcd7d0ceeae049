"""An optimizer state, read as slots: what each array in it is, and which parameter it belongs to.

No optimizer is known by name here. ``optax.tree.map_params`` says which leaves of a state follow the parameters, and
the way from the root to a leaf (the NamedTuples and fields passed) says what it is. Positions in a chain and labels of
a partition are left out of that way, so that a leaf's moments are found again after a relabelling or in another chain.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from optax_structure._tree import Params, is_masked, map_with_path

Trail = tuple[tuple[type | None, str], ...]


class Entry(NamedTuple):
    """One array of an optimizer state.

    Attributes:
      trail: (NamedTuple class, field) from the root to the array, or ``(None, key)`` for a dict.
      group: labels of the enclosing ``optax.partition`` states, outermost first.
      index: which of the arrays with this trail (and path) in this group it is, in order.
      path: the parameter's path, or None for an array that belongs to no parameter (a count, a key).
      value: the array.
      where: the place in the state, for messages.
      instance: the place of the NamedTuple that holds it.
      moments: whether that NamedTuple holds arrays that follow the parameters as well.
    """

    trail: Trail
    group: tuple[str, ...]
    index: int
    path: str | None
    value: Any
    where: str
    instance: str
    moments: bool

    @property
    def kind(self) -> type | None:
        """The innermost NamedTuple class."""
        return next((cls for cls, _ in reversed(self.trail) if cls is not None), None)

    @property
    def field(self) -> str:
        """The innermost field or key."""
        return self.trail[-1][1] if self.trail else ""

    def describe(self) -> str:
        """``ScaleByAdamState.count (state[0].count)``."""
        kind = self.kind
        name = f"{kind.__name__}." if kind is not None else ""
        return f"{name}{self.field} (state{self.where})"


class _Tagged:
    """A leaf that follows a parameter. Not a pytree node, so it is a leaf itself."""

    def __init__(self, path: str, value: Any):
        self.path = path
        self.value = value


def _tag(tx: optax.GradientTransformation, state: optax.OptState, params: Params) -> Any:
    paths = map_with_path(lambda path, _: path, params)

    def tag(leaf: Any, path: Any) -> Any:
        return leaf if is_masked(leaf) else _Tagged(path, leaf)

    try:
        return optax.tree.map_params(tx, tag, state, paths, is_leaf=is_masked)
    except Exception as error:
        kinds = sorted({type(node).__name__ for node in _named_tuples(state)})
        raise ValueError(
            f"this optimizer state cannot be carried: parts of it ({', '.join(kinds)}) do not follow the structure of "
            f"the parameters ({type(error).__name__}: {error}). Start it fresh with new_tx.init(new_params)."
        ) from error


def _named_tuples(tree: Any) -> list[Any]:
    found = [tree] if isinstance(tree, tuple) and hasattr(tree, "_fields") else []
    children = jax.tree.leaves(tree, is_leaf=lambda node: node is not tree)
    return found + [node for child in children if child is not tree for node in _named_tuples(child)]


def read(tx: optax.GradientTransformation, state: optax.OptState, params: Params) -> list[Entry]:
    """Every array of ``state``, in the order of ``jax.tree.leaves(state)``.

    Raises:
      ValueError: naming the state, when part of it follows no structure that optax can map (SM3, L-BFGS, GaLore).
    """
    entries: list[Entry] = []
    seen: dict[tuple[Any, ...], int] = {}
    partitions: dict[tuple[Any, ...], int] = {}
    # NamedTuples of the parameters themselves (an actor beside a critic) say nothing of what an array is.
    containers = tuple({type(node) for node in _named_tuples(params)})

    def walk(node: Any, trail: Trail, group: tuple[str, ...], where: str, instance: str, moments: bool) -> None:
        if isinstance(node, _Tagged) or jax.tree_util.all_leaves([node]):
            path, value = (node.path, node.value) if isinstance(node, _Tagged) else (None, node)
            for leaf in jax.tree.leaves(value):
                identity = (trail, group, path)
                index = seen[identity] = seen.get(identity, -1) + 1
                entries.append(Entry(trail, group, index, path, leaf, where, instance, moments))
            return
        if isinstance(node, optax.transforms.PartitionState):
            # Two partitions in one chain are told apart by their order; one alone needs no mark.
            order = partitions[trail, group] = partitions.get((trail, group), -1) + 1
            trail = (*trail, (optax.transforms.PartitionState, str(order))) if order else trail
            inner = node.inner_states
            for (key,), _ in jax.tree_util.tree_leaves_with_path({label: 0 for label in inner}):
                label = key.key
                below = f"{where}.inner_states[{label!r}]"
                walk(inner[label], trail, (*group, str(label)), below, below, moments)
            return
        fields = getattr(node, "_fields", None) if _is_state(node, containers) else None
        if fields is not None:
            has_moments = any(_holds_moments(child, containers) for child in node)
            for name, child in zip(fields, node, strict=True):
                # A MaskedState only hides leaves: what is inside is the same with and without it.
                step = () if isinstance(node, optax.MaskedState) else ((type(node), name),)
                walk(child, trail + step, group, f"{where}.{name}", where, has_moments)
            return
        for key, child in jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)[0]:
            name = jax.tree_util.keystr(key, simple=True)
            keyed = isinstance(node, dict) and jax.tree_util.all_leaves([child]) and not isinstance(child, _Tagged)
            keyed = keyed or (bool(trail) and trail[-1][1] in ("hyperparams", "hyperparams_states"))
            below = (*trail, (None, name)) if keyed else trail
            walk(child, below, group, where + jax.tree_util.keystr(key), instance, moments)

    walk(_tag(tx, state, params), (), (), "", "", False)
    return entries


def _is_state(node: Any, containers: tuple[type, ...]) -> bool:
    """Whether a node is a NamedTuple of the optimizer, and not one that the parameters are held in."""
    return isinstance(node, tuple) and hasattr(node, "_fields") and not isinstance(node, containers)


def _holds_moments(child: Any, containers: tuple[type, ...]) -> bool:
    """Whether a field is itself a params-shaped tree (and not a nested state that holds one)."""
    if isinstance(child, _Tagged):
        return True
    if jax.tree_util.all_leaves([child]) or _is_state(child, containers):
        return False
    grandchildren = jax.tree.leaves(child, is_leaf=lambda node: node is not child)
    return any(_holds_moments(node, containers) for node in grandchildren if node is not child)
