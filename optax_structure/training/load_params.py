"""Parameters from elsewhere: an Orbax checkpoint or a ``.safetensors`` file, by name, into a tree that exists.

Nothing is unpickled. What a file means is read from its names, never guessed from shapes: PyTorch calls a kernel
``weight`` and stores it ``(out, in, ...)``, Flax calls it ``kernel`` and stores it ``(..., in, out)``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_structure._tree import Params, leaves_by_path, map_with_path

Rename = Mapping[str, str] | Callable[[str], str | None]

_OF_TORCH = {"weight": ("kernel", "scale", "embedding"), "running_mean": ("mean",), "running_var": ("var",)}
"""PyTorch's name of a tensor -> what Flax may call it."""


class Loaded(NamedTuple):
    """What ``load_params`` found.

    Attributes:
      params: of the structure, shapes and dtypes that were given; what was not found is as it was given.
      matched: paths of the parameters that were loaded.
      missing: paths of the parameters that the file does not hold.
      unexpected: names in the file, as they stand there, that are no parameter's.
    """

    params: Params
    matched: list[str]
    missing: list[str]
    unexpected: list[str]


def load_params(path: str | Path, params: Params, *, rename: Rename | None = None) -> Loaded:
    """Load parameters by their names into the structure of ``params``.

    A name in the file becomes a path: ``.`` becomes ``/``, then ``rename`` is applied, then the last part of a PyTorch
    name is replaced by Flax's: ``weight`` by whichever of ``kernel``, ``scale`` and ``embedding`` params have there,
    ``running_mean`` by ``mean`` and ``running_var`` by ``var``. A ``weight`` that becomes a ``kernel`` is turned from
    PyTorch's layout to Flax's: Linear ``(out, in) -> (in, out)``, convolutions ``(out, in, *window) ->
    (*window, in, out)``. A ``kernel`` in the file, and everything from Orbax, is taken as it is.

    Two PyTorch layers store ``weight`` otherwise, and are not told apart by name: transposed convolutions, and the
    ``Conv1D`` of GPT-2, which is ``(in, out)`` already. Turn those yourself.

    Turn a Linear behind a flattened convolution as well: its shape fits and its outputs are wrong. Its inputs come in
    the order ``(channel, row, column)`` from PyTorch and ``(row, column, channel)`` in Flax, which no name says. With
    ``C``, ``H`` and ``W`` of the convolution's output, the loaded kernel ``(C * H * W, out)`` is put right by::

        kernel = kernel.reshape(C, H, W, -1).transpose(1, 2, 0, 3)
        kernel = kernel.reshape(H * W * C, -1)

    Args:
      path: an Orbax checkpoint's folder (one item's, such as ``default`` in a step's folder of a
        ``CheckpointManager``), or a ``.safetensors`` file.
      params: what to fill: a dict, an ``nnx.State``, Linen params; ``jax.ShapeDtypeStruct`` leaves will do.
      rename: regexes and their replacements, applied in order with ``re.sub`` to ``/``-joined names, such as
        ``{r"^params/": "", r"^encoder/(\\d+)/": r"hidden_\\1/"}``; or a function name -> path, or
        ``None`` for no parameter; or nothing.

    Returns:
      ``Loaded``. Arrays have the dtype of the leaf that they replace.

    Raises:
      FileNotFoundError: where nothing is at ``path``.
      ValueError: for a file of another kind (pickles of PyTorch are refused), a folder that is no checkpoint, a shape
        that does not fit, two names for one parameter, a bad regex, or when no name matches at all.
      ImportError: where safetensors (or Orbax) is not installed, with the command that installs it.

    Example:
      >>> import tempfile, jax.numpy as jnp, orbax.checkpoint as ocp
      >>> from optax_structure.training import load_params
      >>> path = tempfile.mkdtemp() + "/backbone"
      >>> with ocp.StandardCheckpointer() as checkpointer:
      ...     checkpointer.save(path, {"params": {"body": {"kernel": jnp.ones((4, 3))}, "old": {"bias": jnp.ones(2)}}})
      >>> params = {"body": {"kernel": jnp.zeros((4, 3))}, "head": {"kernel": jnp.zeros((3, 2))}}
      >>> loaded = load_params(path, params, rename={"^params/": ""})
      >>> loaded.matched, loaded.missing, loaded.unexpected
      (['body/kernel'], ['head/kernel'], ['params/old/bias'])
      >>> float(loaded.params["body"]["kernel"].sum())
      12.0
    """
    path = Path(path).resolve()
    if not path.exists():
        raise FileNotFoundError(f"path={str(path)!r} does not exist.")
    if path.is_dir():
        stored = _orbax(path)
    elif path.suffix == ".safetensors":
        stored = _safetensors(path)
    else:
        raise ValueError(
            f"path={str(path)!r} is neither an Orbax folder nor a .safetensors file. A PyTorch .pt, .pth or .bin is a "
            "pickle, which can run any code and is not read here: write it with safetensors.torch.save_file first."
        )
    wanted = leaves_by_path(params)
    found: dict[str, tuple[str, np.ndarray]] = {}
    unexpected: list[str] = []
    for name, array in stored.items():
        target = _target(name, rename, wanted)
        if target is None:
            unexpected.append(name)
            continue
        if target in found:
            raise ValueError(f"rename brings both {found[target][0]!r} and {name!r} to {target!r}: keep one of them.")
        found[target] = name, _layout(name, target, array)
    if not found:
        raise ValueError(
            f"path={str(path)!r} matches no parameter: it holds {sorted(stored)[:5]}, params hold "
            f"{sorted(wanted)[:5]}. Bring the names together with rename=."
        )
    for target, (name, array) in found.items():
        if array.shape != tuple(wanted[target].shape):
            raise ValueError(
                f"{name!r} has shape {array.shape} in Flax's layout, the parameter {target!r} {wanted[target].shape}: "
                "build the model with the widths of the file, or rename= it to no parameter."
            )

    def fill(target: str, leaf: Any) -> Any:
        if target not in found:
            return leaf
        return jax.device_put(jnp.asarray(found[target][1], leaf.dtype), getattr(leaf, "sharding", None))

    missing = [target for target in wanted if target not in found]
    return Loaded(map_with_path(fill, params), [target for target in wanted if target in found], missing, unexpected)


def _target(name: str, rename: Rename | None, wanted: Mapping[str, Any]) -> str | None:
    """The path in params that a name in the file is, if any."""
    target = name.replace(".", "/")
    if callable(rename):
        renamed = rename(target)
        if renamed is None:
            return None
        target = renamed
    for pattern, replacement in rename.items() if isinstance(rename, Mapping) else ():
        try:
            target = re.sub(pattern, replacement, target)
        except re.error as error:
            raise ValueError(f"rename: {pattern!r} -> {replacement!r} is no valid regex ({error}).") from error
    parent, _, last = target.rpartition("/")
    choices = [f"{parent}/{flax}".lstrip("/") for flax in _OF_TORCH.get(last, ())]
    # Orbax stores an NNX variable as a container with a value in it.
    return next((choice for choice in (target, target.removesuffix("/value"), *choices) if choice in wanted), None)


def _layout(name: str, target: str, array: np.ndarray) -> np.ndarray:
    is_kernel = name.replace(".", "/").rpartition("/")[2] == "weight" and target.rpartition("/")[2] == "kernel"
    # (out, in, *window) -> (*window, in, out)
    return np.transpose(array, (*range(2, array.ndim), 1, 0)) if is_kernel and array.ndim > 1 else array


def _require(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"path: reading this kind of file needs {package}: pip install {package}") from error


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    return _require("safetensors.numpy", "safetensors").load_file(path)


def _orbax(path: Path) -> dict[str, np.ndarray]:
    ocp = _require("orbax.checkpoint", "orbax-checkpoint")
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata
        tree = getattr(stored, "tree", stored)
        if not jax.tree.leaves(tree):
            inside = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
            raise ValueError(
                f"path={str(path)!r} is no Orbax checkpoint of a tree, but holds {inside}: name one of them."
            )
        # As NumPy: the devices that it was saved from need not be here.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(path, restore_args=as_numpy)
    return {name: np.asarray(leaf) for name, leaf in leaves_by_path(restored).items()}
