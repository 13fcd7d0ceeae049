"""Paths into a params tree, and arguments brought to the tree that a wrapper left of it.

A leaf's path is its keys joined by ``/``: ``"encoder/hidden_1/kernel"``. The trailing ``value`` that Flax NNX
appends to every leaf is dropped, so that one rule fits NNX, Linen, Haiku, Equinox and plain dicts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.core import Tracer
from jax.tree_util import GetAttrKey, KeyPath

PyTree = Any
Params = Any


def path_str(path: KeyPath) -> str:
    """The ``/``-joined form of a JAX key path, without NNX's trailing ``value``."""
    if path and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Every leaf by its path, in flattening order."""
    return {path_str(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)}


def map_with_path(fn: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """``jax.tree.map`` whose function gets the leaf's path string first.

    Label functions and per-leaf rules are built on this: it keeps ``optax.MaskedNode`` and the placeholder of
    ``optax.tree.map_params`` as they are, which a dict comprehension does not.
    """
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(path_str(path), *leaves), tree, *rest)


def children(tree: PyTree) -> tuple[dict[str, Any], Any]:
    """The children of one node by name, and its one-level structure."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    return {path_str(path): child for path, child in pairs}, treedef


def is_traced(value: Any) -> bool:
    """Whether a value is a tracer, whose contents no check on the host can read."""
    return isinstance(value, Tracer)


def is_leaf(tree: PyTree) -> bool:
    """Whether ``tree`` is itself a leaf (an array, a string, a number) and no container."""
    return jax.tree_util.all_leaves([tree])


def is_function(tree: PyTree) -> bool:
    """Whether ``tree`` is a function of params and no tree: modules of Equinox and NNX are callable trees."""
    return is_leaf(tree) and callable(tree)


def align(tree: PyTree, like: Params, name: str = "tree") -> PyTree:
    """Bring a params-shaped argument (or a prefix of it, or a function of it) to the structure of ``like``.

    ``optax.partition`` and ``optax.masked`` hand their inner transform a tree with ``MaskedNode`` in place of
    leaves, ``optax.tree.map_params`` a placeholder, ``per_leaf`` a single leaf. A tree of labels, masks or depths
    was made for the whole; this returns the part of it that ``like`` still has.

    Raises:
      ValueError: where ``tree`` has another structure, naming the argument and the path.
    """
    if not jax.tree.leaves(like):
        return like
    if is_function(tree):
        tree = tree(like)
    return _align(tree, like, name, "")


def _align(tree: PyTree, like: Params, name: str, path: str) -> PyTree:
    if not jax.tree.leaves(like):
        return like
    if is_leaf(like):
        if is_leaf(tree):
            return tree
        raise ValueError(f"{name} has a container at {path or 'its root'!r} where params have a leaf.")
    parts, treedef = children(like)
    if is_leaf(tree):
        return jax.tree.unflatten(treedef, [_align(tree, part, name, path) for part in parts.values()])
    # By name, not by position: a dict is sorted, an OrderedDict, a NamedTuple and a module are not.
    others, _ = children(tree)
    if others.keys() != parts.keys():
        raise ValueError(
            f"{name} does not have the structure of params at {path or 'the root'!r}: "
            f"params hold {list(parts)}, {name} holds {list(others)}."
        )
    mine = [_align(others[key], part, name, f"{path}/{key}".strip("/")) for key, part in parts.items()]
    return jax.tree.unflatten(treedef, mine)


def is_masked(node: Any) -> bool:
    """Whether a node stands for leaves that a group of ``optax.partition`` does not see."""
    return isinstance(node, optax.MaskedNode)


def put_together(parts: Sequence[PyTree], missing: Any) -> PyTree:
    """One tree of the parts that the groups of a partition hold; ``missing`` where no group has a leaf or a branch."""

    def joined(one: PyTree, other: PyTree) -> PyTree:
        if is_masked(one) or is_masked(other) or is_leaf(one):
            return other if is_masked(one) else one
        return jax.tree.map(joined, one, other, is_leaf=lambda node: node is not one)

    together = functools.reduce(joined, parts)
    return jax.tree.map(lambda node: missing if is_masked(node) else node, together, is_leaf=is_masked)
