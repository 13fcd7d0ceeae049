"""Ablation: units that lost every connection on one side lose the others too, which frees what they cost.

Sparse training leaves units that read nothing, whose output is a constant, and units that nobody reads, whose incoming
weights get no gradient. What they hold of the budget works for nobody.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_structure._tree import Params, PyTree
from optax_structure.growth import _common as common
from optax_structure.growth.connections import _edited
from optax_structure.sparsity.draws import number
from optax_structure.structure import Growth, Role, UnitAxis, UnitGroup, Units, kernel_links

_SIDES = ("incoming", "outgoing")


class _Reader(NamedTuple):
    """A sparse kernel that reads hidden units, and how the constant of a unit without inputs goes into a bias."""

    layer: str
    axis: UnitAxis
    out_axis: int
    own_bias: str | None
    target_bias: str | None
    known: bool  # whether the constant is: else any is taken for one that matters
    obstacle: str  # why it cannot go into a bias, empty where it can


def ablate_units(
    params: Params,
    labels: PyTree,
    masks: PyTree,
    units: Units,
    *,
    activation: Callable[[Array], Array] | None = None,
) -> Growth:
    """Remove the connections of every hidden unit that has no incoming or no outgoing ones, until none is left.

    A unit counts as connected where any of the kernels that write (read) it holds a connection; a kernel without mask
    array and a patch always do. Its other connections become False in the masks and 0 in the params, which may leave
    the next unit without an input, or the one before without a reader, and so on. A unit left without any connection
    gets the bias 0; what momentum makes of it later, nobody reads. ``nonzero(masks)`` before and after says how many
    connections became free for ``add_connections``; a rule that rewires goes on with those that are left.

    Without readers a unit goes and the function stays, unless a normalisation averages over units (LayerNorm). A unit
    without inputs is the constant ``c = activation(bias)``. With ``activation``, ``c * weight`` is added to the bias of
    what it fed, and the network computes what it did. That needs the activation directly on the one kernel and bias
    that make the unit, then at most pooling that keeps a constant, and a dense (or 1x1) kernel with a bias. With None
    the constants are dropped: they are 0 where biases are 0 and the activation is 0 there, as ReLU.

    Args:
      params: the params tree.
      labels: a label for every leaf; unchanged.
      masks: masks of the params; leaves with the scalar ``True`` keep all their connections.
      units: unit groups; the first is the input, groups that nothing reads are outputs: neither loses a unit.
      activation: the elementwise function behind every hidden layer, as ``jax.nn.relu``; or None. The same function
        object (no new lambda a call) runs the same compiled program.

    Returns:
      ``Growth`` with the new params and masks; nothing is born.

    Raises:
      ValueError: where a constant other than 0 reaches no bias (the layer, the reason and the way out are named;
        inside ``jit`` values are not seen, and it is dropped), for an activation that is no function, units that do
        not fit the params, trees of another structure or shape, or where no leaf is sparse.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> kernel = jnp.array([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]])  # unit 1 has no input, unit 2 no reader
      >>> params = {"hidden": {"kernel": kernel, "bias": jnp.array([0.0, 0.5, 0.0])}}
      >>> params["head"] = {"kernel": jnp.array([[1.0], [4.0], [0.0]]), "bias": jnp.zeros(1)}
      >>> masks = jax.tree.map(lambda leaf: leaf != 0 if leaf.ndim > 1 else True, params)
      >>> units = oxs.dense_chain(params, ["hidden", "head"])
      >>> ablated = oxs.ablate_units(params, "scaffold", masks, units, activation=jax.nn.relu)
      >>> oxs.nonzero(masks), oxs.nonzero(ablated.masks), ablated.params["head"]["bias"].tolist()
      (5, 3, [2.0])

    References:
      Han et al., Learning both weights and connections for efficient neural networks, 2015 (neurons without input or
      output connections); Lasby et al., Dynamic sparse training with structured sparsity, 2023 (neuron ablation).
    """
    leaves, label_of, mask_of = common.checked(params, labels, masks)
    common.sparse_only(mask_of)
    if activation is not None and not callable(activation):
        raise ValueError(f"activation={activation!r} must be a function of an array, as jax.nn.relu, or None.")
    for group in units.groups:
        for axis in group.axes:
            common.check_axis(group, axis, np.shape(leaves.get(axis.path, ())))
    ends = [axis for group in _hidden(units) for axis in group.axes if axis.role in _SIDES]
    sparse = {axis.path: mask_of[axis.path] for axis in ends if np.ndim(mask_of[axis.path])}
    biases = [axis.path for group in units.groups for axis in group.axes if axis.role == "bias"]
    vectors = {path for path in biases if np.ndim(leaves[path]) == 1 and not np.ndim(mask_of[path])}
    readers = () if activation is None else _readers(units, sparse, vectors)
    parts = ({path: leaves[path] for path in paths} for paths in (sparse, biases))
    edited, kept, lost = _ablate(*parts, sparse, units=units, readers=readers, activation=activation)
    if readers and not common.traced(lost) and np.any(lost):
        reader = readers[np.argmax(lost)]
        raise ValueError(
            f"units of {reader.layer!r} without an input still feed {reader.axis.path!r}, and what they feed it "
            f"cannot go into a bias: {reader.obstacle}. Pass activation=None to drop it."
        )
    return _edited(params, units, label_of, mask_of, edited, kept, {})


def _hidden(units: Units) -> tuple[UnitGroup, ...]:
    """The groups that are made and read: the first is the input, even where a residual branch writes to it."""
    roles = [{axis.role for axis in group.axes} for group in units.groups]
    return tuple(g for g, role in zip(units.groups[1:], roles[1:], strict=True) if role >= set(_SIDES))


def _readers(units: Units, masks: Mapping[str, Any], vectors: Collection[str]) -> tuple[_Reader, ...]:
    """Every sparse kernel that reads hidden units; constants may come from and go to the biases in ``vectors``."""
    made = {axis.path: (group, axis) for group in units.groups for axis in group.axes if axis.role == "incoming"}
    found = []
    for group in _hidden(units):
        writers = [axis.path for axis in group.axes if axis.role == "incoming"]
        own, *others = [_bias_beside(group, path) for path in writers]
        between = [axis.path for axis in group.axes if axis.role in ("bias", "scale")]
        between = [path for path in between if path not in (own, *others)]
        known = len(writers) == 1 and not between and (own is None or own in vectors)
        for axis in (axis for axis in group.axes if axis.role == "outgoing" and axis.path in masks):
            target, out = made.get(axis.path, (None, axis))
            bias = target and _bias_beside(target, axis.path)
            shape = np.shape(masks[axis.path])
            if not known:
                obstacle = f"the constant is not known behind {writers + between}"
            elif math.prod(shape) != shape[axis.axis] * shape[out.axis]:
                obstacle = "a convolution pads with 0 and not with that constant"
            else:
                obstacle = "" if bias in vectors else "units hold no bias beside it, a vector without mask"
            found.append(_Reader(group.layer, axis, out.axis, own, bias, known, obstacle))
    return tuple(found)


def _bias_beside(group: UnitGroup, kernel: str) -> str | None:
    parent = kernel.rpartition("/")[0]
    return next((a.path for a in group.axes if a.role == "bias" and a.path.rpartition("/")[0] == parent), None)


def _others(axis: UnitAxis, leaf: Array) -> tuple[int, ...]:
    return tuple(other for other in range(leaf.ndim) if other != axis.axis)


def _along(values: Array, axis: UnitAxis, leaf: Array) -> Array:
    """One value a unit, laid along an axis of a leaf so that it broadcasts over the others."""
    return jnp.expand_dims(jnp.tile(values, axis.repeats), _others(axis, leaf))


def _connected(units: Units, masks: Mapping[str, Array], role: Role) -> dict[str, Array]:
    """Hidden layer -> which of its units have a connection in a role: in a mask, a leaf without mask, or a patch."""
    source = {link.target: link.source for link in reversed(kernel_links(units))}  # a patch reads the first
    found = {}
    for group in _hidden(units):
        ends = [axis for axis in group.axes if axis.role == role]
        flags = np.full(group.size, any(axis.path not in masks for axis in ends))
        for patch in units.patches:
            if role == "incoming" and patch.layer == group.layer:
                flags[list(patch.writes)] = True
            if role == "outgoing" and source.get(patch.layer) == group.layer:
                flags[[read % group.size for read in patch.reads]] = True
        found[group.layer] = jnp.asarray(flags)
        for axis in (axis for axis in ends if axis.path in masks):
            lines = jnp.any(masks[axis.path], _others(axis, masks[axis.path]))
            found[group.layer] |= jnp.any(lines.reshape(axis.repeats, group.size), 0)
    return found


@functools.partial(jax.jit, static_argnames=("units", "readers", "activation"))
def _ablate(
    kernels: Mapping[str, Array],
    biases: Mapping[str, Array],
    masks: Mapping[str, Array],
    *,
    units: Units,
    readers: tuple[_Reader, ...],
    activation: Callable[[Array], Array] | None,
) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """Edited leaves, masks, and which readers lost a constant.

    Units without readers go first, so no constant is asked for that nobody reads. Those without inputs leave no unit
    without readers when they go, so each kind goes to its end once.
    """

    def without(role: Role, masks: dict[str, Array]) -> dict[str, Array]:
        connected, kept = _connected(units, masks, role), dict(masks)
        for group in _hidden(units):
            for axis in (axis for axis in group.axes if axis.role in _SIDES and axis.path in kept):
                kept[axis.path] &= _along(connected[group.layer], axis, kept[axis.path])
        return kept

    def drop_unread(state: tuple[Any, ...]) -> tuple[Any, ...]:
        kept = without("outgoing", state[0])
        return kept, number(kept) < number(state[0])

    def drop_unfed(state: tuple[Any, ...]) -> tuple[Any, ...]:
        before, old, lost, _ = state
        fed, biases, losses = _connected(units, before, "incoming"), dict(old), []
        for reader in readers:
            axis, kernel = reader.axis, kernels[reader.axis.path]
            wide = jnp.promote_types(kernel.dtype, jnp.float32)
            constant = jnp.ones_like(fed[reader.layer], wide)  # any that matters, where it is not known
            if activation is not None and reader.known:
                constant = activation(constant * 0 if reader.own_bias is None else old[reader.own_bias].astype(wide))
            gone = before[axis.path] & ~_along(fed[reader.layer], axis, kernel)
            flow = jnp.where(gone, _along(constant, axis, kernel) * kernel, 0)
            losses.append(jnp.any(flow != 0) & bool(reader.obstacle))
            if not reader.obstacle:
                bias = biases[reader.target_bias]
                flow = jnp.sum(flow, tuple(other for other in range(flow.ndim) if other != reader.out_axis))
                biases[reader.target_bias] = (bias + flow).astype(bias.dtype)
        kept = without("incoming", before)
        return kept, biases, lost | jnp.array(losses, bool), number(kept) < number(before)

    kept, _ = jax.lax.while_loop(lambda state: state[-1], drop_unread, (dict(masks), jnp.bool_(True)))
    first = (kept, dict(biases), jnp.zeros(len(readers), bool), jnp.bool_(True))
    kept, after, lost, _ = jax.lax.while_loop(lambda state: state[-1], drop_unfed, first)
    edited = {path: jnp.where(masks[path] & ~kept[path], 0, leaf) for path, leaf in kernels.items()} | after
    fed, read = (_connected(units, kept, role) for role in _SIDES)
    for group in _hidden(units):
        for axis in (axis for axis in group.axes if axis.role == "bias"):
            some = _along(fed[group.layer] | read[group.layer], axis, edited[axis.path])
            edited[axis.path] = jnp.where(some, edited[axis.path], 0)
    return edited, kept, lost
