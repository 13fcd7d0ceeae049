"""Which leaf is what: labels and depths for a params tree.

A label is a string a leaf: ``scaffold``, ``patch``, ``new``, ``pretrained``, or the user's own. Labels are values,
never code paths, and they are static: strings cannot enter ``jax.jit``, so they are closed over, as
``optax.partition`` does. Every function here works on any pytree and keeps its container types.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from optax_structure._tree import Params, PyTree, align, leaves_by_path, map_with_path

Labels = PyTree
LabelFn = Callable[[Params], Labels]


def label_by_path(rules: Sequence[tuple[str, str]], *, default: str | None = None) -> LabelFn:
    """Label every leaf by the first rule whose regular expression is found in its path.

    Args:
      rules: pairs ``(regex, label)``, tried in order with ``re.search`` on paths such as ``"encoder/hidden_1/kernel"``.
      default: the label of a leaf that no rule covers; ``None`` makes such a leaf an error.

    Returns:
      A function ``params -> labels`` to be handed to any transformation here, or to ``optax.partition``.

    Raises:
      ValueError: for a rule that is no pair, a regular expression that does not compile, and, when called, for a
        leaf without a label, naming its path.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"backbone": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 1))}}
      >>> oxs.label_by_path([(r"^head/", "new")], default="pretrained")(params)
      {'backbone': {'kernel': 'pretrained'}, 'head': {'kernel': 'new'}}
    """
    compiled: list[tuple[re.Pattern[str], str]] = []
    for rule in rules:
        if isinstance(rule, str) or len(rule) != 2:
            raise ValueError(f"rules must be pairs (regex, label), got {rule!r}.")
        pattern, label = rule
        try:
            compiled.append((re.compile(pattern), label))
        except re.error as error:
            raise ValueError(f"rules: {pattern!r} is not a regular expression ({error}).") from error

    def label_of(path: str, leaf: object) -> str:
        del leaf
        for pattern, label in compiled:
            if pattern.search(path):
                return label
        if default is None:
            patterns = [pattern.pattern for pattern, _ in compiled]
            raise ValueError(f"no rule covers the leaf {path!r}; the rules are {patterns}. Add one, or pass default=.")
        return default

    return lambda params: map_with_path(label_of, params)


def relabel(labels: Labels, rules: Mapping[str, str] | Callable[[str, str], str]) -> Labels:
    """New labels from old ones, as a new tree.

    Args:
      labels: tree of labels.
      rules: old label -> new label (labels that it does not list stay), or a function of ``(path, label)``.

    Returns:
      The tree of new labels.

    Example:
      >>> import optax_structure as oxs
      >>> oxs.relabel({"hidden": "new", "head": "scaffold"}, {"new": "scaffold"})
      {'head': 'scaffold', 'hidden': 'scaffold'}
    """
    if isinstance(rules, Mapping):
        mapping = rules
        return jax.tree.map(lambda label: mapping.get(label, label), labels)
    return map_with_path(rules, labels)


def label_counts(labels: Labels | LabelFn, params: Params) -> dict[str, int]:
    """How many parameters carry each label.

    Args:
      labels: tree of labels, a prefix of it, or a function of params.
      params: tree of arrays.

    Returns:
      Label -> number of parameters, in the order of the leaves.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"hidden": jnp.ones((3, 2)), "head": jnp.ones(2)}
      >>> oxs.label_counts({"hidden": "scaffold", "head": "new"}, params)
      {'new': 2, 'scaffold': 6}
    """
    counts: dict[str, int] = {}
    aligned = align(labels, params, "labels")
    for label, leaf in zip(jax.tree.leaves(aligned), jax.tree.leaves(params), strict=True):
        counts[label] = counts.get(label, 0) + int(np.size(leaf))
    return counts


def _natural(path: str) -> list[tuple[int, int, str]]:
    # Digits compare as numbers, so that layer_10 follows layer_9.
    parts = re.split(r"(\d+)", path)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts if part]


def layer_depths(params: Params, layers: Sequence[str] | None = None) -> PyTree:
    """The depth of the layer that each leaf belongs to, counted from 0 at the input.

    Args:
      params: tree of arrays.
      layers: regular expressions in forward order, the first one found in a path wins. Without them a layer is the
        container of a leaf, and layers are ordered by the natural order of their paths (``layer_9`` before
        ``layer_10``). Names such as ``embed``, ``block_1``, ``head`` have no natural forward order: pass ``layers``.

    Returns:
      Tree of the structure of ``params`` with a Python int a leaf.

    Raises:
      ValueError: for a leaf that no expression covers, and an expression that covers no leaf.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"head": {"bias": jnp.ones(1)}, "hidden_1": {"bias": jnp.ones(1)}, "hidden_2": {"bias": jnp.ones(1)}}
      >>> oxs.layer_depths(params, ["hidden_1", "hidden_2", "head"])
      {'head': {'bias': 2}, 'hidden_1': {'bias': 0}, 'hidden_2': {'bias': 1}}
    """
    paths = list(leaves_by_path(params))
    if layers is None:
        containers = sorted({path.rpartition("/")[0] for path in paths}, key=_natural)
        order = {container: depth for depth, container in enumerate(containers)}
        return map_with_path(lambda path, _: order[path.rpartition("/")[0]], params)
    patterns = [re.compile(layer) for layer in layers]
    depths: dict[str, int] = {}
    for path in paths:
        found = next((depth for depth, pattern in enumerate(patterns) if pattern.search(path)), None)
        if found is None:
            raise ValueError(f"layers: none of {list(layers)} covers the leaf {path!r}.")
        depths[path] = found
    unused = [layers[depth] for depth in range(len(layers)) if depth not in depths.values()]
    if unused:
        raise ValueError(f"layers: {unused} cover no leaf; the leaves are {paths}.")
    return map_with_path(lambda path, _: depths[path], params)
