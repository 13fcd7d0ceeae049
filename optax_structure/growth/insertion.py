"""Deeper networks: a new layer that begins as the identity, without a change of the function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from optax_structure._tree import Params, PyTree, map_with_path
from optax_structure.growth import _common as common
from optax_structure.structure import NOT_BORN, Growth, UnitAxis, UnitGroup, Units


def insert_layer(
    params: Params,
    labels: PyTree,
    masks: PyTree,
    units: Units,
    after: str,
    *,
    key: Array,
    name: str | None = None,
    label: str = "new",
    density: float | None = None,
    activation: Callable[[Array], Array] = jax.nn.relu,
) -> Growth:
    """Insert a layer that begins as the identity directly behind ``after`` and its activation.

    The forward pass must apply the new layer and then ``activation`` once more, so this must be idempotent:
    ``f(f(x)) = f(x)``, as for ReLU, hard clipping or none. The kernel of a dense layer is the identity matrix; that of
    a convolution has the kernel size of ``after`` and the identity at its centre (stride 1, padding ``"SAME"``). A
    sparse kernel has the diagonal, and further connections of weight 0 at random up to ``density``.
    Every leaf that read ``after`` reads the new layer, so a new unit learns where its source is alive and has readers.

    Args:
      params: the params tree; the container that holds ``after`` must be a mapping with text keys.
      labels: a label for every leaf.
      masks: masks of the params.
      units: unit groups; the new layer's group is put behind that of ``after``.
      after: the layer that the new one reads: neither the input nor the output.
      key: a JAX random key.
      name: path of the new layer, beside ``after``. None: ``after`` with ``_next`` (``_next_2``, ...) behind it.
      label: label of the new leaves.
      density: density of the new kernel, in (0, 1]; at least its diagonal is made. None: that of the kernel of
        ``after``, where this is sparse.
      activation: the activation behind ``after`` and behind the new layer; ``lambda x: x`` for none.

    Returns:
      ``Growth``; all ``sources`` of the new leaves are -1, and ``born`` marks the connections of a sparse new kernel
      as ``new``. The new layer has a bias of 0 where ``after`` has a bias.

    Raises:
      ValueError: for an unknown layer, the input or output group, an activation that is not idempotent, a name that
        exists or stands elsewhere, a density outside (0, 1], trees of another structure or shape, a kernel that is not
        ``(..., in, out)``, or a layer inside a list, tuple or module, where no name can be added.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> params = {"hidden": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}, "head": {"kernel": jnp.ones((2, 2))}}
      >>> units = oxs.dense_chain(params, ["hidden", "head"])
      >>> grown = oxs.insert_layer(params, "scaffold", True, units, "hidden", key=jax.random.key(0))
      >>> grown.units.layers, grown.params["hidden_next"]["kernel"].tolist()
      (('hidden', 'hidden_next', 'head'), [[1.0, 0.0], [0.0, 1.0]])

    References:
      Chen et al., Net2Net: accelerating learning via knowledge transfer, 2016 (Net2DeeperNet).
    """
    leaves, label_of, mask_of = common.checked(params, labels, masks)
    group = common.inner_group(units, after, "after", "followed by a new layer")
    common.check_density(density)
    _check_idempotent(activation)
    prefix = f"{after}/"
    own = {axis.path.removeprefix(prefix): axis for axis in group.axes if axis.path.startswith(prefix)}
    kernels = [name for name, axis in own.items() if axis.role == "incoming"]
    if len(kernels) != 1 or own[kernels[0]].axis != (ndim := np.ndim(leaves[prefix + kernels[0]])) - 1:
        raise ValueError(
            f"after={after!r} needs one kernel (..., in, out) of its own; units hold {list(own.values())}."
        )
    (path,) = kernels
    old, old_mask = leaves[prefix + path], np.asarray(mask_of[prefix + path])
    name = _new_name(after, name, leaves)
    new = {path: _identity_kernel(np.shape(old)[:-2], group.size).astype(old.dtype)}
    new |= {
        bias: np.zeros(group.size, leaves[prefix + bias].dtype) for bias, axis in own.items() if axis.role == "bias"
    }

    new_masks: dict[str, Any] = {f"{name}/{leaf}": True for leaf in new}
    born = {}
    if old_mask.ndim or density is not None:
        mask = _with_diagonal(common.host_rng(key), new[path] != 0, density or float(old_mask.mean()))
        new_masks[f"{name}/{path}"] = common.place(mask, mask_of[prefix + path])
        birth = np.where(mask, common.NEW, np.uint8(NOT_BORN))
        born[f"{name}/{path}"] = common.place(birth, mask_of[prefix + path])

    def build(container: Any) -> Any:
        """A container of the type of that of ``after``, with new leaves under the old names."""
        kept = type(container)({part: container[part] for part in container if part in new})
        return map_with_path(lambda leaf_path, leaf: common.place(new[leaf_path], leaf), kept)

    reads = UnitAxis(f"{name}/{path}", ndim - 2, "outgoing")
    makes = tuple(own[leaf]._replace(path=f"{name}/{leaf}") for leaf in new)
    readers = tuple(axis for axis in group.axes if axis.role == "outgoing")
    before = group._replace(axes=(*(axis for axis in group.axes if axis.role != "outgoing"), reads))
    at = units.groups.index(group)
    groups = (*units.groups[:at], before, UnitGroup(name, group.size, makes + readers), *units.groups[at + 1 :])
    return common.assemble(
        _insert_beside(params, after, name, after, build),
        units._replace(groups=groups),
        label_of | {f"{name}/{leaf}": label for leaf in new},
        mask_of | new_masks,
        born,
        {f"{name}/{leaf}": tuple(np.full(size, -1, np.int32) for size in value.shape) for leaf, value in new.items()},
    )


def _check_idempotent(activation: Callable[[Array], Array]) -> None:
    once = activation(jnp.linspace(-6.0, 6.0, 97))
    if not np.allclose(activation(once), once, atol=1e-6):
        raise ValueError(
            f"activation={getattr(activation, '__name__', activation)!s} is not idempotent: f(f(x)) differs from f(x), "
            "so an identity layer behind it changes the function. Use a residual layer instead, "
            "x + f(x @ kernel) @ up with up = 0, or an activation such as ReLU."
        )


def _identity_kernel(spatial: tuple[int, ...], size: int) -> np.ndarray:
    kernel = np.zeros((*spatial, size, size))
    kernel[tuple((length - 1) // 2 for length in spatial)] = np.eye(size)
    return kernel


def _with_diagonal(rng: np.random.Generator, diagonal: np.ndarray, density: float) -> np.ndarray:
    """The diagonal and as many further connections as the density asks for."""
    mask = diagonal.ravel().copy()
    further = max(0, round(density * mask.size) - int(mask.sum()))
    mask[rng.choice(np.flatnonzero(~mask), further, replace=False)] = True
    return mask.reshape(diagonal.shape)


def _new_name(after: str, name: str | None, leaves: Mapping[str, Any]) -> str:
    def free(wanted: str) -> bool:
        return not any(path.startswith(f"{wanted}/") for path in leaves)

    if name is None:
        stem = f"{after}_next"
        return stem if free(stem) else next(n for i in range(2, len(leaves) + 3) if free(n := f"{stem}_{i}"))
    if not free(name):
        raise ValueError(f"name={name!r} exists in params; choose another name for the new layer.")
    return name


def _insert_beside(node: Any, rest: str, name: str, after: str, build: Callable[[Any], Any]) -> Any:
    """The tree with ``build(container of after)`` under ``name`` beside it; every container keeps its type."""
    if not common.text_keyed(node):
        raise ValueError(
            f"after={after!r} stands in a {type(node).__name__}, where no layer can be inserted by name. Hold the "
            "layers in a mapping with text keys (dict, FrozenDict, nnx.State of named layers), or build the deeper "
            "model and copy this layer's arrays."
        )
    for key in node:
        if key == rest:
            beside = name.removeprefix(after.removesuffix(key))
            if not beside or not name.startswith(after.removesuffix(key)):
                raise ValueError(f"name={name!r} must stand beside after={after!r}.")
            return type(node)({**node, beside: build(node[key])})
        if rest.startswith(f"{key}/"):
            child = _insert_beside(node[key], rest.removeprefix(f"{key}/"), name, after, build)
            return type(node)({**node, key: child})
    raise ValueError(f"after={after!r} is no container in params.")
