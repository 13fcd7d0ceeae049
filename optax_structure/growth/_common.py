"""What every growth action shares: its arguments brought to the params, its result put together and placed."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from optax_structure._tree import Params, PyTree, align, is_leaf, leaves_by_path, map_with_path
from optax_structure.structure import COMPONENTS, NOT_BORN, Growth, UnitAxis, UnitGroup, Units, identity_sources

NEW = np.uint8(COMPONENTS.index("new"))

Flags = Mapping[str, Array]
"""Layer -> bool array, one entry a unit."""


def traced(value: Any) -> bool:
    """Whether ``value`` has no concrete entries yet."""
    return isinstance(value, Tracer)


def checked(params: Params, labels: PyTree, masks: PyTree) -> tuple[dict[str, Any], dict[str, str], dict[str, Any]]:
    """Leaves, labels and masks of ``params`` by path; raises where they do not fit each other."""
    leaves = leaves_by_path(params)
    label_of = leaves_by_path(align(labels, params, "labels"))
    mask_of = leaves_by_path(align(masks, params, "masks"))
    for path, leaf in leaves.items():
        if not isinstance(label_of[path], str):
            raise ValueError(f"labels hold {label_of[path]!r} at {path!r}; a label is a string.")
        if np.ndim(mask_of[path]) and np.shape(mask_of[path]) != np.shape(leaf):
            raise ValueError(
                f"masks have shape {np.shape(mask_of[path])} at {path!r} where params have {np.shape(leaf)}; "
                "pass a bool array of that shape, or True for a leaf that is not sparse."
            )
    return leaves, label_of, mask_of


def check_axis(group: UnitGroup, axis: UnitAxis, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless a leaf of that shape holds the units of the group along the axis."""
    if shape[axis.axis : axis.axis + 1] != (axis.repeats * group.size,):
        raise ValueError(
            f"units do not fit params: {axis.path!r} has shape {shape}, but its axis {axis.axis} should hold "
            f"{axis.repeats} x {group.size} units of {group.layer!r}. Use the units that the last change returned."
        )


def sparse_only(masks: Mapping[str, Any]) -> dict[str, Any]:
    """The masks that are arrays; raises where there is none to edit."""
    found = {path: mask for path, mask in masks.items() if np.ndim(mask)}
    if not found:
        raise ValueError(
            "masks are the scalar True everywhere; no leaf is sparse, so there is no connection to add or remove."
        )
    return found


def checked_count(count: Any, name: str = "count", least: int = 1) -> Any:
    """``count`` as an int32 scalar, so that no kind of number traces anew; a tracer passes unseen."""
    if traced(count):
        return count
    try:
        number = operator.index(count)
    except TypeError:
        raise ValueError(f"{name}={count!r} must be an integer of at least {least}.") from None
    if isinstance(count, bool) or number < least:
        raise ValueError(f"{name}={count!r} must be an integer of at least {least}.")
    return np.int32(number)


def component_code(component: str) -> np.uint8:
    """The code that ``born`` carries for a component."""
    if component not in COMPONENTS:
        raise ValueError(f"component={component!r} is unknown; the components are {list(COMPONENTS)}.")
    return np.uint8(COMPONENTS.index(component))


def inner_group(units: Units, layer: str, argument: str, what: str) -> UnitGroup:
    """The group of a layer that is neither the input nor the output of the network."""
    group = units.group(layer)
    for role, end in (("incoming", "input"), ("outgoing", "output")):
        if not any(axis.role == role for axis in group.axes):
            raise ValueError(
                f"{argument}={layer!r} is the {end} of the network and cannot be {what}; choose one of "
                f"{list(units.layers[:-1])}."
            )
    return group


def check_density(density: float | None) -> None:
    """Raises for a density outside (0, 1]; None is no density."""
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density={density!r} must be in (0, 1], the share of connections that exist.")


def unit_flags(flags: Flags, units: Units, name: str) -> dict[str, Array]:
    """The flags of the layers that ``units`` know; raises for another number of units, or where no layer is known."""
    known = {group.layer: flags[group.layer] for group in units.groups if group.layer in flags}
    if flags and not known:
        raise ValueError(f"{name} holds the layers {sorted(flags)}, none of which is in units: {list(units.layers)}.")
    for layer, flag in known.items():
        if np.shape(flag) != (units.group(layer).size,):
            raise ValueError(
                f"{name}[{layer!r}] has shape {np.shape(flag)}, but the layer has {units.group(layer).size} units."
            )
    return known


def host_rng(key: Array) -> np.random.Generator:
    """A NumPy generator seeded by a JAX key: new shapes are filled on the host, where nothing compiles."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())


def draw(rng: np.random.Generator, first: np.ndarray, last: np.ndarray, size: int, count: int) -> np.ndarray:
    """``count`` rows of ``size`` different positions each: those of ``first``, each once, then others at random.

    Positions of ``last`` fill a row only when no others are left.
    """
    queue = rng.permutation(np.flatnonzero(first))
    rows = []
    for start in range(0, count * size, size):
        rank = rng.random(len(first)) + last
        rank[queue[start : start + size]] = -1.0
        rows.append(np.argsort(rank, kind="stable")[:size])
    return np.asarray(rows, np.int32).reshape(count, size)


def connect(
    key: Array,
    params: Mapping[str, Array],
    masks: Mapping[str, Array],
    new: Mapping[str, Array],
    code: Any,
    fan_in: Any,
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Params, masks and births once the connections ``new`` exist. Called inside the jitted cores.

    ``fan_in`` is None for weights of 0, or holds pairs (path, axis of the units that the leaf produces): then weights
    are normal with variance 2 / living incoming connections (He et al., 2015).
    """
    weights, grown, born = {}, {}, {}
    for number, path in enumerate(sorted(new)):
        grown[path] = masks[path] | new[path]
        initial = jnp.zeros((), params[path].dtype)
        if fan_in is not None:
            others = tuple(axis for axis in range(grown[path].ndim) if axis != dict(fan_in)[path])
            living = jnp.maximum(jnp.sum(grown[path], axis=others, keepdims=True), 1)
            noise = jax.random.normal(jax.random.fold_in(key, number), grown[path].shape)
            initial = (noise * jnp.sqrt(2.0 / living)).astype(params[path].dtype)
        weights[path] = jnp.where(new[path], initial, params[path])
        born[path] = jnp.where(new[path], jnp.asarray(code, jnp.uint8), jnp.uint8(NOT_BORN))
    return weights, grown, born


def fan_in_axes(units: Units, masks: Mapping[str, Any], init: str) -> tuple[tuple[str, int], ...] | None:
    """What ``connect`` takes as ``fan_in``; the last axis for a leaf that ``units`` do not hold."""
    if init not in ("zeros", "fan_in"):
        raise ValueError(f"init={init!r} is unknown; choose 'zeros' or 'fan_in'.")
    if init == "zeros":
        return None
    known = {axis.path: axis.axis for group in units.groups for axis in group.axes if axis.role == "incoming"}
    return tuple((path, known.get(path, np.ndim(mask) - 1)) for path, mask in sorted(masks.items()))


def place(new: Any, old: Any) -> Any:
    """``new`` laid out as ``old``: its sharding where the shape still divides, else whole on every device of its mesh.

    An array that JAX was free to place stays so: committing it would compile the next step anew.
    """
    if traced(new) or traced(old) or not getattr(old, "committed", False):
        return jnp.asarray(new)
    sharding = old.sharding
    if isinstance(new, jax.Array) and new.sharding == sharding:
        return new
    try:
        sharding.shard_shape(np.shape(new))
    except ValueError:
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(new, sharding)


def place_whole(new: np.ndarray, near: Any) -> Any:
    """A new array, whole on every device that ``near`` lies on."""
    if not getattr(near, "committed", False):
        return jnp.asarray(new)
    sharding = near.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(new, sharding)


def replace(params: Params, changed: Mapping[str, Any]) -> Params:
    """``params`` with the leaves of some paths exchanged; the others are the same objects."""
    return map_with_path(lambda path, leaf: changed.get(path, leaf), params)


def text_keyed(node: Any) -> bool:
    """Whether entries can be added to ``node`` by name."""
    return not is_leaf(node) and isinstance(node, Mapping) and all(isinstance(name, str) for name in node)


def assemble(
    params: Params,
    units: Units,
    labels: Mapping[str, str],
    masks: Mapping[str, Any],
    born: Mapping[str, Any],
    sources: Mapping[str, tuple[np.ndarray, ...]],
) -> Growth:
    """The record of a change, its trees built by path over the new params; what ``sources`` leave out did not move."""

    def tree(by_path: Mapping[str, Any]) -> PyTree:
        return map_with_path(lambda path, _: by_path[path], params)

    births = {path: born.get(path, np.uint8(NOT_BORN)) for path in leaves_by_path(params)}
    moved = {**identity_sources(params), **sources}
    return Growth(params, tree(labels), tree(masks), units, {}, moved, tree(births))
