"""Which axes of which leaves are the same unit, and the record of a change of structure.

A *unit* is one neuron, channel or head. It appears as a column of the kernel that produces it, an entry of the bias
and of the normalisation that follow, and as a row (or, behind a flatten, many rows) of every kernel that reads it.
Growth moves all of these together or breaks the network, so they are stated, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from optax_structure._tree import Params, PyTree, leaves_by_path

Role = Literal["incoming", "outgoing", "bias", "scale"]

COMPONENTS = ("scaffold", "patch", "new", "neck", "adapter", "pretrained")
"""Component codes of embedded connections: the index of the name is the code, 255 means not born in this change."""

NOT_BORN = 255


class UnitAxis(NamedTuple):
    """One axis of one leaf whose entries are the units of a group.

    Attributes:
      path: the leaf's path.
      axis: which of its axes.
      role: ``"incoming"`` (the kernel axis that produces the unit), ``"outgoing"`` (a kernel axis that reads it),
        ``"bias"`` (additive vector: neutral value 0) or ``"scale"`` (multiplicative vector: neutral value 1).
      repeats: how many times the whole group stands along the axis. A dense layer behind a flatten of an
        ``(H, W, C)`` map reads every channel ``H * W`` times: row ``r * size + unit`` for ``r < repeats``.
    """

    path: str
    axis: int
    role: Role
    repeats: int = 1


class UnitGroup(NamedTuple):
    """The units that one layer produces: the layer's name, how many there are, and where they stand."""

    layer: str
    size: int
    axes: tuple[UnitAxis, ...]


class Patch(NamedTuple):
    """A small dense side branch with leaves of its own, added to a layer's output.

    ``params[name]`` holds ``down`` (kernel ``(len(reads), hidden)`` and bias) and ``up`` (kernel
    ``(hidden, len(writes))``): ``y[..., writes] += relu(x[..., reads] @ down + bias) @ up`` before the activation of
    ``layer``, whose input is ``x`` and whose output is ``y``.

    Attributes:
      name: the key of its leaves at the root of params.
      layer: the layer to whose output it adds.
      reads: positions along the last axis of ``x`` (behind a flatten: positions of the flattened input).
      writes: units of ``layer``.
    """

    name: str
    layer: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]


class Units(NamedTuple):
    """All unit groups of a network in forward order, and its patches. Hashable: a static argument of ``jax.jit``.

    The first group is the network's input (only ``outgoing`` axes) and the last its output (no ``outgoing``): neither
    can be widened.

    Attributes:
      groups: the unit groups in forward order, the network's input first.
      patches: the side branches that ``add_patches`` made.
    """

    groups: tuple[UnitGroup, ...]
    patches: tuple[Patch, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers in forward order, the network's input left out."""
        return tuple(group.layer for group in self.groups[1:])

    def group(self, layer: str) -> UnitGroup:
        """The group that ``layer`` produces; raises ``ValueError`` listing the layers that exist."""
        for group in self.groups:
            if group.layer == layer:
                return group
        raise ValueError(f"layer={layer!r} is not in units; the layers are {list(self.layers)}.")


class Growth(NamedTuple):
    """What a growth action made, and where every row of it came from.

    Attributes:
      params, labels, masks: the new trees, of one structure.
      units: the new unit groups.
      rename: new path -> old path, for leaves that kept their meaning under another name.
      sources: for every new path, one int32 index array an axis: the old index of each position, -1 where it is new.
      born: tree of the structure of ``params``: uint8 arrays with the component code (see ``COMPONENTS``) where a
        connection was born in this change and 255 elsewhere; a scalar 255 for a leaf in which none was born.
    """

    params: Params
    labels: PyTree
    masks: PyTree
    units: Units
    rename: Mapping[str, str]
    sources: Mapping[str, tuple[np.ndarray, ...]]
    born: PyTree


def identity_sources(params: Params) -> dict[str, tuple[np.ndarray, ...]]:
    """Sources of a change that moves nothing: every position comes from itself."""
    return {
        path: tuple(np.arange(size, dtype=np.int32) for size in np.shape(leaf))
        for path, leaf in leaves_by_path(params).items()
    }


INPUT = "input"
"""The name of the group of the network's inputs."""

_KERNELS = ("kernel", "w", "weight")
_BIASES = ("bias", "b")
_NORM_LEAVES: dict[str, Role] = {"scale": "scale", "bias": "bias", "offset": "bias", "mean": "bias", "var": "scale"}


class Link(NamedTuple):
    """A kernel between two groups: reads ``source`` units along ``in_axis``, makes ``target`` ones on ``out_axis``."""

    path: str
    source: str
    target: str
    in_axis: int
    out_axis: int
    repeats: int


def kernel_links(units: Units) -> tuple[Link, ...]:
    """Every kernel that reads one group and produces another, in forward order of the groups that they produce.

    Args:
      units: unit groups.

    Returns:
      One ``Link`` for each pair of an ``outgoing`` and an ``incoming`` axis of one leaf.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> from optax_structure.structure import kernel_links
      >>> params = {"hidden": {"kernel": jnp.ones((4, 3))}, "head": {"kernel": jnp.ones((3, 2))}}
      >>> [(link.source, link.target) for link in kernel_links(oxs.dense_chain(params, ["hidden", "head"]))]
      [('input', 'hidden'), ('hidden', 'head')]
    """
    readers = [(group.layer, axis) for group in units.groups for axis in group.axes if axis.role == "outgoing"]
    return tuple(
        Link(made.path, source, group.layer, read.axis, made.axis, read.repeats)
        for group in units.groups
        for made in group.axes
        if made.role == "incoming"
        for source, read in readers
        if read.path == made.path
    )


def dense_chain(params: Params, layers: Sequence[str], *, norms: Mapping[str, str] | None = None) -> Units:
    """Unit groups of a chain of layers, each reading the one before: dense, convolutional, or both.

    The kernel of a dense layer is ``(in, out)``, that of a convolution ``(..., in, out)`` over NHWC maps. Every layer
    reads exactly the units of the layer before it, but for a dense layer behind a convolution: where its input is a
    whole multiple of the channels, the map was flattened, and row ``r * channels + unit`` reads ``unit`` at position
    ``r``. ``conv_chain`` states that multiple instead of inferring it.

    Args:
      params: the params tree. A layer is the path of a container with a ``kernel`` (or ``w`` / ``weight``) of shape
        ``(..., in, out)`` and maybe a ``bias`` (or ``b``). Kernels stored as ``(out, in)`` (Equinox, PyTorch) need
        ``Units`` written by hand.
      layers: the layers' paths in forward order.
      norms: layer -> path of the normalisation applied to its output: leaves ``scale``, ``bias`` or ``offset``, and
        ``mean``, ``var`` where they stand in the same tree. It must work per unit (BatchNorm, InstanceNorm): one that
        averages over units (LayerNorm, GroupNorm) changes its output when units are added, so widening such a
        layer preserves no function.

    Returns:
      ``Units`` with one group a layer, and the group ``"input"`` before them.

    Raises:
      ValueError: for an unknown layer, a layer named twice, two layers whose sizes do not fit (both are named), or a
        bias or normalisation of another size than its layer.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"hidden": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "head": {"kernel": jnp.ones((3, 2))}}
      >>> units = oxs.dense_chain(params, ["hidden", "head"])
      >>> units.group("hidden").size
      3
      >>> [(axis.path, axis.axis, axis.role) for axis in units.group("hidden").axes]
      [('hidden/kernel', 1, 'incoming'), ('hidden/bias', 0, 'bias'), ('head/kernel', 0, 'outgoing')]
    """
    shapes = {path: tuple(np.shape(leaf)) for path, leaf in leaves_by_path(params).items()}
    names = [layers] if isinstance(layers, str) else list(layers)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"layers={names} must name at least one layer, and each once, in forward order.")
    if unknown := sorted(set(norms or {}) - set(names)):
        raise ValueError(f"norms names the layers {unknown}, which layers={names} does not hold.")
    kernels = {name: _kernel_path(shapes, name) for name in names}

    made: list[tuple[UnitAxis, ...]] = [()]
    read: list[tuple[UnitAxis, ...]] = []
    sizes = [shapes[kernels[names[0]]][-2]]
    before = None
    for name in names:
        path, shape = kernels[name], shapes[kernels[name]]
        flattened = before is not None and len(shapes[kernels[before]]) > 2 and len(shape) == 2
        repeats = shape[-2] // sizes[-1] if flattened and shape[-2] >= sizes[-1] else 1
        if shape[-2] != repeats * sizes[-1]:
            raise ValueError(
                f"layers: {before!r} puts out {sizes[-1]} units, but the kernel of {name!r} has shape {shape} and "
                f"reads {shape[-2]}. List the layers in forward order; kernels are (..., in, out)."
            )
        read.append((UnitAxis(path, len(shape) - 2, "outgoing", repeats),))
        norm = _norm_axes(shapes, (norms or {}).get(name), name, shape[-1])
        made.append((UnitAxis(path, len(shape) - 1, "incoming"), *_bias_axes(shapes, name, shape[-1]), *norm))
        sizes.append(shape[-1])
        before = name
    groups = zip([INPUT, *names], sizes, made, [*read, ()], strict=True)
    return Units(tuple(UnitGroup(name, size, above + below) for name, size, above, below in groups))


def conv_chain(
    params: Params,
    convs: Sequence[str],
    layers: Sequence[str],
    *,
    positions: int,
    norms: Mapping[str, str] | None = None,
) -> Units:
    """Unit groups of convolutions followed by dense layers, with the flatten between them stated.

    As ``dense_chain(params, [*convs, *layers])``, but the number of positions that the first dense layer reads of
    each channel is given and checked, not inferred from the shapes.

    Args:
      params: the params tree.
      convs: paths of the convolutions, in forward order.
      layers: paths of the dense layers behind them.
      positions: height times width of the last feature map as it is flattened (NHWC order); 1 behind a global pool.
      norms: as in ``dense_chain``.

    Returns:
      ``Units`` with one group a layer, and the group ``"input"`` before them.

    Raises:
      ValueError: as ``dense_chain``; where a layer is of the other kind, or the first dense layer does not read
        ``positions`` times the channels of the last convolution.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 1, 8))}, "head": {"kernel": jnp.ones((7 * 7 * 8, 10))}}
      >>> oxs.structure.conv_chain(params, ["conv"], ["head"], positions=49).group("conv").axes[-1].repeats
      49
    """
    units = dense_chain(params, [*convs, *layers], norms=norms)
    shapes = {path: np.shape(leaf) for path, leaf in leaves_by_path(params).items()}
    for name in (*convs, *layers):
        ndim = len(shapes[_kernel_path(shapes, name)])
        if (ndim > 2) != (name in convs):
            raise ValueError(f"{name!r} has a kernel of {ndim} axes: convs take 3 or more, layers take 2.")
    if convs and layers:
        (reader,) = (axis for axis in units.group(convs[-1]).axes if axis.role == "outgoing")
        if reader.repeats != positions:
            raise ValueError(
                f"positions={positions}, but {layers[0]!r} reads {math.prod(shapes[reader.path][:1])} inputs, which is "
                f"{reader.repeats} times the {units.group(convs[-1]).size} channels of {convs[-1]!r}."
            )
    return units


def _kernel_path(shapes: Mapping[str, tuple[int, ...]], layer: str) -> str:
    for name in _KERNELS:
        if len(shapes.get(f"{layer}/{name}", ())) >= 2:
            return f"{layer}/{name}"
    known = sorted({path.rsplit("/", 1)[0] for path in shapes if path.rsplit("/", 1)[-1] in _KERNELS})
    raise ValueError(f"layers names {layer!r}, which has no kernel in params; layers with a kernel: {known}.")


def _bias_axes(shapes: Mapping[str, tuple[int, ...]], layer: str, size: int) -> tuple[UnitAxis, ...]:
    for name in _BIASES:
        if (shape := shapes.get(f"{layer}/{name}")) is not None:
            if shape != (size,):
                raise ValueError(f"layers: {layer}/{name} has shape {shape}, but {layer!r} puts out {size} units.")
            return (UnitAxis(f"{layer}/{name}", 0, "bias"),)
    return ()


def _norm_axes(shapes: Mapping[str, tuple[int, ...]], norm: str | None, layer: str, size: int) -> tuple[UnitAxis, ...]:
    if norm is None:
        return ()
    found: dict[str, Role] = {
        f"{norm}/{name}": role for name, role in _NORM_LEAVES.items() if f"{norm}/{name}" in shapes
    }
    if not found:
        raise ValueError(f"norms[{layer!r}]={norm!r} holds none of {list(_NORM_LEAVES)} in params.")
    for path in found:
        if shapes[path][-1:] != (size,):
            raise ValueError(f"norms: {path!r} has shape {shapes[path]}, but {layer!r} puts out {size} units.")
    return tuple(UnitAxis(path, len(shapes[path]) - 1, role) for path, role in found.items())
