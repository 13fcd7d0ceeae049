"""Checkpoints of a growing run: arrays in ``.npz``, everything else in JSON, no pickle, written atomically.

A checkpoint is a folder ``step-00001234`` with ``arrays.npz`` and ``state.json``. It is written under another name,
flushed to the disk and renamed: a process killed at any moment leaves the previous one whole. The JSON holds the
architecture, so that the OLD structure is rebuilt first and then filled; a tree of another structure is refused, never
filled by guess.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_structure._tree import PyTree, leaves_by_path
from optax_structure.structure import Patch, UnitAxis, UnitGroup, Units

_NAME = re.compile(r"step-(\d{8})")
KEEP = 2


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: unreadable, or of another architecture, configuration or data set."""


def save(
    folder: str | os.PathLike[str], step: int, arrays: PyTree, state: Mapping[str, Any], *, keep: int = KEEP
) -> Path:
    """Write one checkpoint atomically and remove all but the last ``keep``.

    Args:
      folder: holds the checkpoints of one run; created where missing.
      step: number of finished training steps; names the checkpoint.
      arrays: pytree of arrays, any dtype that NumPy or ``ml_dtypes`` knows.
      state: what JSON can hold; its keys ``"step"`` and ``"sha256"`` are set here.
      keep: how many checkpoints stay.

    Returns:
      The checkpoint's path.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from optax_structure.training import checkpoint
      >>> folder = tempfile.mkdtemp()
      >>> _ = checkpoint.save(folder, 7, {"w": jnp.ones(3)}, {"note": "hello"})
      >>> arrays, state = checkpoint.load(folder)
      >>> checkpoint.fill({"w": jnp.zeros(3)}, arrays)["w"].tolist(), state["step"], state["note"]
      ([1.0, 1.0, 1.0], 7, 'hello')
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    if target.exists() and _usable(target):
        return target
    partial = folder / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    buffer = io.BytesIO()
    leaves = {path: np.asarray(leaf) for path, leaf in leaves_by_path(arrays).items()}
    # Raw bytes of each leaf, with dtype and shape in the JSON: .npz itself does not know bfloat16.
    blobs: dict[str, Any] = {f"{i:05d}": _bytes(leaf) for i, leaf in enumerate(leaves.values())}
    np.savez(buffer, **blobs)
    content = buffer.getvalue()
    layout = [[path, str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves.items()]
    record = {**state, "step": step, "layout": layout, "sha256": hashlib.sha256(content).hexdigest()}
    _write(partial / "arrays.npz", content)
    _write(partial / "state.json", json.dumps(record).encode())
    _sync(partial)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    _sync(folder)
    for old in _found(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    return target


def load(folder: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The newest usable checkpoint of a run: its arrays by path, and its JSON.

    Args:
      folder: as given to ``save``.

    Returns:
      ``(arrays, state)``; pass the arrays to ``fill``.

    Raises:
      FileNotFoundError: where the folder holds no checkpoint.
      CheckpointError: where none of them can be read.

    Example:
      >>> from optax_structure.training import checkpoint
      >>> checkpoint.load("nowhere")
      Traceback (most recent call last):
      FileNotFoundError: nowhere holds no checkpoint; start the run without --resume.
    """
    found = _found(Path(folder))
    if not found:
        raise FileNotFoundError(f"{folder} holds no checkpoint; start the run without --resume.")
    problems = []
    for path in reversed(found):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{path.name}: {error}")
    raise CheckpointError(
        f"{folder} holds no usable checkpoint ({'; '.join(problems)}); start the run without --resume."
    )


def exists(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` holds a finished checkpoint (readable or not).

    Example:
      >>> from optax_structure.training import checkpoint
      >>> checkpoint.exists("nowhere")
      False
    """
    return bool(_found(Path(folder)))


def fill(like: PyTree, arrays: Mapping[str, np.ndarray]) -> PyTree:
    """A tree of the structure of ``like`` with the stored arrays as leaves.

    Args:
      like: tree of arrays (or ``ShapeDtypeStruct``) whose paths, shapes and dtypes the stored ones must have.
      arrays: as returned by ``load``.

    Returns:
      A tree of ``jax.Array``.

    Raises:
      CheckpointError: naming the first leaf that is missing, left over, or of another shape or dtype.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from optax_structure.training import checkpoint
      >>> checkpoint.fill({"w": jnp.zeros(3)}, {"w": np.ones(3, np.float32)})["w"].tolist()
      [1.0, 1.0, 1.0]
    """
    wanted = leaves_by_path(like)
    for path in (*wanted, *arrays):
        if path not in arrays or path not in wanted:
            place = "lacks" if path not in arrays else "holds"
            other = "which the run needs" if path not in arrays else "which the run does not have"
            raise CheckpointError(f"the checkpoint {place} {path}, {other}: it is from another architecture.")
    for path, leaf in wanted.items():
        have, need = _form(arrays[path]), _form(leaf)
        if have != need:
            raise CheckpointError(
                f"the checkpoint holds {path} as {have}, the run needs {need}: it is from another architecture."
            )
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[path]) for path in wanted])


def units_to_json(units: Units) -> dict[str, Any]:
    """``Units`` as JSON holds it; ``units_from_json`` is the inverse.

    Example:
      >>> from optax_structure.structure import UnitAxis, UnitGroup, Units
      >>> from optax_structure.training.checkpoint import units_from_json, units_to_json
      >>> units = Units((UnitGroup("head", 3, (UnitAxis("head/kernel", 1, "incoming"),)),))
      >>> units_from_json(units_to_json(units)) == units
      True
    """
    return {
        "groups": [{"layer": g.layer, "size": g.size, "axes": [list(axis) for axis in g.axes]} for g in units.groups],
        "patches": [{**p._asdict(), "reads": list(p.reads), "writes": list(p.writes)} for p in units.patches],
    }


def units_from_json(record: Mapping[str, Any]) -> Units:
    """The inverse of ``units_to_json``.

    Example:
      >>> from optax_structure.training.checkpoint import units_from_json
      >>> units_from_json({"groups": [], "patches": []})
      Units(groups=(), patches=())
    """
    return Units(
        tuple(UnitGroup(g["layer"], g["size"], tuple(UnitAxis(*axis) for axis in g["axes"])) for g in record["groups"]),
        tuple(Patch(p["name"], p["layer"], tuple(p["reads"]), tuple(p["writes"])) for p in record["patches"]),
    )


def _bytes(leaf: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)


def _form(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{tuple(leaf.shape)}"


def _found(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def _usable(path: Path) -> bool:
    try:
        _read(path)
    except (OSError, ValueError, KeyError):
        return False
    return True


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    state = json.loads((path / "state.json").read_bytes())
    content = (path / "arrays.npz").read_bytes()
    if hashlib.sha256(content).hexdigest() != state["sha256"]:
        raise ValueError("arrays.npz does not have the recorded sha256")
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        arrays = {
            name: stored[f"{i:05d}"].view(jnp.dtype(dtype)).reshape(shape)
            for i, (name, dtype, shape) in enumerate(state.pop("layout"))
        }
    return arrays, state


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
