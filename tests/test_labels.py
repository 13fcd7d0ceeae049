"""Labels and depths: by hand, and against a direct reading of the rules on random trees."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structure as oxs
from optax_structure._tree import PyTree, align, leaves_by_path

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

quick = settings(max_examples=60, deadline=None)
NAMES = ["encoder", "hidden_1", "hidden_10", "hidden_2", "head", "kernel", "bias", "k.e(y"]


def nested(paths: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in paths.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Nested dicts of arrays; no path is the beginning of another."""
    paths = draw(st.sets(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map(tuple), min_size=1, max_size=8))
    kept = [p for p in paths if not any(q != p and q[: len(p)] == p for q in paths)]
    return nested({p: np.zeros(draw(st.lists(st.integers(0, 3), max_size=2))) for p in kept})


patterns = st.sampled_from(["kernel", "^head", "hidden_1", r"hidden_\d+/", "bias$", "/", "never", ".", r"k\.e\("])
rules = st.lists(st.tuples(patterns, st.sampled_from(["scaffold", "new", "patch"])), max_size=4)


@quick
@given(trees(), rules, st.sampled_from([None, "rest"]))
def test_label_by_path_takes_the_first_rule_found(
    tree: PyTree, rules: list[tuple[str, str]], default: str | None
) -> None:
    def expected(path: str) -> str | None:
        return next((label for pattern, label in rules if re.search(pattern, path)), default)

    wanted = {path: expected(path) for path in leaves_by_path(tree)}
    label = oxs.label_by_path(rules, default=default)
    uncovered = [path for path, name in wanted.items() if name is None]
    if uncovered:
        with pytest.raises(ValueError, match=re.escape(f"no rule covers the leaf {uncovered[0]!r}")):
            label(tree)
    else:
        labels = label(tree)
        assert leaves_by_path(labels) == wanted
        assert jax.tree.structure(labels) == jax.tree.structure(tree)


@quick
@given(trees(), rules)
def test_relabel_there_and_back(tree: PyTree, rules: list[tuple[str, str]]) -> None:
    labels = oxs.label_by_path(rules, default="rest")(tree)
    there = {"new": "scaffold_2", "patch": "patch_2"}
    changed = oxs.relabel(labels, there)
    assert oxs.relabel(changed, {after: before for before, after in there.items()}) == labels
    assert oxs.relabel(labels, {}) == labels
    for path, name in leaves_by_path(changed).items():
        assert name == there.get(leaves_by_path(labels)[path], leaves_by_path(labels)[path])


@quick
@given(trees(), rules)
def test_relabel_hands_path_and_label_to_a_function(tree: PyTree, rules: list[tuple[str, str]]) -> None:
    labels = oxs.label_by_path(rules, default="rest")(tree)
    joined = oxs.relabel(labels, lambda path, label: f"{path}:{label}")
    assert leaves_by_path(joined) == {path: f"{path}:{label}" for path, label in leaves_by_path(labels).items()}


@quick
@given(trees(), rules)
def test_label_counts_count_every_parameter_once(tree: PyTree, rules: list[tuple[str, str]]) -> None:
    label = oxs.label_by_path(rules, default="rest")
    expected: dict[str, int] = {}
    for path, leaf in leaves_by_path(tree).items():
        name = leaves_by_path(label(tree))[path]
        expected[name] = expected.get(name, 0) + leaf.size
    assert oxs.label_counts(label, tree) == oxs.label_counts(label(tree), tree) == expected


@quick
@given(st.sets(st.integers(0, 30), min_size=1, max_size=6), st.permutations(["kernel", "bias", "scale"]))
def test_layer_depths_without_layers_follow_the_numbers(numbers: set[int], leaves: list[str]) -> None:
    tree = {f"layer_{number}": {leaf: np.zeros(1) for leaf in leaves} for number in numbers}
    depths = oxs.layer_depths(tree)
    for depth, number in enumerate(sorted(numbers)):
        assert set(depths[f"layer_{number}"].values()) == {depth}


@quick
@given(trees(), st.lists(patterns, min_size=1, max_size=4, unique=True))
def test_layer_depths_with_layers_take_the_first_found(tree: PyTree, layers: list[str]) -> None:
    found = {
        path: next((depth for depth, layer in enumerate(layers) if re.search(layer, path)), None)
        for path in leaves_by_path(tree)
    }
    if None in found.values() or set(found.values()) != set(range(len(layers))):
        with pytest.raises(ValueError, match="layers: "):
            oxs.layer_depths(tree, layers)
    else:
        assert leaves_by_path(oxs.layer_depths(tree, layers)) == found


@quick
@given(trees(), rules)
def test_align_brings_a_prefix_and_a_part_to_the_params(tree: PyTree, rules: list[tuple[str, str]]) -> None:
    assert align("all", tree) == jax.tree.map(lambda _: "all", tree)
    labels = oxs.label_by_path(rules, default="rest")(tree)
    assert align(labels, tree) == labels
    # What optax.partition and optax.masked leave of the tree: every other leaf.
    leaves, treedef = jax.tree.flatten(tree)
    part = jax.tree.unflatten(treedef, [optax.MaskedNode() if index % 2 else leaf for index, leaf in enumerate(leaves)])
    assert jax.tree.leaves(align(labels, part)) == jax.tree.leaves(labels)[::2]
    assert jax.tree.structure(align(labels, part)) == jax.tree.structure(part)


def test_align_names_the_argument_and_the_place() -> None:
    params = {"hidden": {"kernel": np.zeros((2, 2)), "bias": np.zeros(2)}}
    with pytest.raises(ValueError, match=r"masks does not have the structure of params at 'hidden'"):
        align({"hidden": {"kernel": True}}, params, "masks")
    with pytest.raises(ValueError, match=r"masks has a container at 'hidden/bias'"):
        align({"hidden": {"kernel": True, "bias": {"x": True}}}, params, "masks")
    with pytest.raises(ValueError, match=r"masks does not have the structure of params at 'the root'"):
        align({"head": {"kernel": True, "bias": True}}, params, "masks")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: oxs.label_by_path([("(", "new")]), r"rules: '\(' is not a regular expression"),
        (lambda: oxs.label_by_path([("a", "b", "c")]), r"rules must be pairs \(regex, label\), got \('a', 'b', 'c'\)"),
        (lambda: oxs.label_by_path(["ab"]), r"rules must be pairs \(regex, label\), got 'ab'"),
        (lambda: oxs.label_by_path([("^head", "new")])({"body": np.zeros(1)}), r"no rule covers the leaf 'body'"),
        (lambda: oxs.layer_depths({"a": np.zeros(1)}, ["a", "b"]), r"layers: \['b'\] cover no leaf"),
        (lambda: oxs.layer_depths({"a": np.zeros(1), "c": np.zeros(1)}, ["a"]), r"layers: .*'c'"),
        (lambda: oxs.label_counts({"b": "x"}, {"a": np.zeros(1)}), r"labels does not have the structure of params"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_nnx_paths_have_no_value_at_their_end() -> None:
    nnx = pytest.importorskip("flax.nnx")
    state = nnx.state(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(0))), nnx.Param)
    paths = list(leaves_by_path(state))
    assert paths == ["layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel"]
    labels = oxs.label_by_path([(r"kernel$", "kernel")], default="bias")(state)
    assert jax.tree.structure(labels) == jax.tree.structure(state)
    assert jax.tree.leaves(labels) == ["bias", "kernel"] * 2
    assert jax.tree.leaves(oxs.layer_depths(state)) == [0, 0, 1, 1]


def test_label_functions_serve_partition_and_map_params() -> None:
    params = {"backbone": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 1))}}
    label = oxs.label_by_path([(r"^head/", "new")], default="old")
    tx = optax.partition({"new": optax.adam(0.1), "old": optax.set_to_zero()}, label)
    state = tx.init(params)
    updates, _ = tx.update(params, state, params)
    assert not np.any(updates["backbone"]["kernel"]) and np.all(updates["head"]["kernel"] < 0)
    seen = []
    optax.tree.map_params(tx, lambda leaf: seen.append(leaf) or leaf, state)
    assert len([leaf for leaf in seen if not isinstance(leaf, optax.MaskedNode)]) == 2  # mu and nu of the head


class Pair(NamedTuple):
    w: Any
    b: Any


@pytest.mark.parametrize(
    "params",
    [OrderedDict([("w", jnp.ones(1)), ("b", jnp.ones(2))]), Pair(jnp.ones(1), jnp.ones(2))],
    ids=["odict", "tuple"],
)
def test_a_tree_of_another_container_is_matched_by_name(params: PyTree) -> None:
    """A dict is sorted, these are not: by position the labels would be swapped."""
    tx = oxs.scale_by_label({"fast": 1.0, "slow": 0.0}, {"w": "fast", "b": "slow"})
    updates, _ = tx.update(params, tx.init(params))
    assert {path: float(leaf[0]) for path, leaf in leaves_by_path(updates).items()} == {"w": 1.0, "b": 0.0}
    with pytest.raises(ValueError, match="labels does not have the structure of params at 'the root'"):
        oxs.scale_by_label({"fast": 1.0}, {"w": "fast", "c": "fast"}).init(params)


def test_labels_are_strings() -> None:
    with pytest.raises(ValueError, match="labels hold 3; a label is a string"):
        oxs.scale_by_label({"x": 1.0}, {"w": 3})
