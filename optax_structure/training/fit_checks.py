"""What ``fit`` refuses before it compiles anything: arguments that do not fit each other, each named with its fix."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from optax_structure.training.fit_step import has_classes

MONITORS = ("val_accuracy", "val_loss")


def check_data(train: Any, validation: Any) -> None:
    """Raise ``ValueError`` for what is no pair of arrays of one length, or rows of different shapes.

    Example:
      >>> import numpy as np
      >>> from optax_structure.training.fit_checks import check_data
      >>> check_data((np.ones((8, 2)), np.zeros(8)), (np.ones((5, 2)), np.zeros(4)))
      Traceback (most recent call last):
      ValueError: validation holds 5 rows of x and 4 of y: give one y for every x.
    """
    for name, pair in {"train": train, "validation": validation}.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(np.ndim(part) for part in pair):
            raise ValueError(f"{name} must be a pair of arrays (x, y), got {type(pair).__name__}.")
        if len(pair[0]) != len(pair[1]):
            raise ValueError(f"{name} holds {len(pair[0])} rows of x and {len(pair[1])} of y: give one y for every x.")
        if not len(pair[0]):
            raise ValueError(f"{name} holds no rows.")
    if np.shape(train[0])[1:] != np.shape(validation[0])[1:]:
        raise ValueError(
            f"validation has rows of shape {np.shape(validation[0])[1:]}, train of {np.shape(train[0])[1:]}: "
            "prepare both alike."
        )


def check_arguments(tx: Any, monitor: str, event: Any, compute_dtype: Any) -> None:
    """Raise ``ValueError`` for an argument that is of the wrong kind.

    Example:
      >>> import optax
      >>> from optax_structure.training.fit_checks import check_arguments
      >>> check_arguments(optax.sgd(0.1), "accuracy", None, None)
      Traceback (most recent call last):
      ValueError: monitor='accuracy' must be one of ['val_accuracy', 'val_loss'].
    """
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise ValueError(f"tx={type(tx).__name__} must be an optax transformation, such as optax.adam(1e-3).")
    if monitor not in MONITORS:
        raise ValueError(f"monitor={monitor!r} must be one of {list(MONITORS)}.")
    if event is not None and not callable(event) and not isinstance(event, Collection):
        raise ValueError(f"event={event!r} must be a function of the step, or a set of steps.")
    if compute_dtype is not None and not _is_floating(compute_dtype):
        raise ValueError(f"compute_dtype={compute_dtype!r} must be a floating dtype, such as jnp.bfloat16, or None.")


def check_counts(epochs: Any, batch_size: Any, steps_per_dispatch: Any, patience: Any, accumulate: Any) -> None:
    """Raise ``ValueError`` for a count that is no whole number of at least 1; ``patience`` may be ``None``.

    Example:
      >>> from optax_structure.training.fit_checks import check_counts
      >>> check_counts(1, 32, 50, None, 0)
      Traceback (most recent call last):
      ValueError: accumulate=0 must be a whole number of at least 1.
    """
    counts = {
        "epochs": epochs,
        "batch_size": batch_size,
        "steps_per_dispatch": steps_per_dispatch,
        "patience": 1 if patience is None else patience,
        "accumulate": accumulate,
    }
    for name, value in counts.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


def check_batches(rows: int, batch_size: int, accumulate: int, mesh: Mesh | None) -> None:
    """Raise ``ValueError`` for a batch that the data, the micro-batches or the mesh's first axis do not divide.

    Example:
      >>> from optax_structure.training.fit_checks import check_batches
      >>> check_batches(8, 9, 1, None)
      Traceback (most recent call last):
      ValueError: batch_size=9 is above the 8 rows of train: use at most 8.
    """
    if batch_size > rows:
        raise ValueError(f"batch_size={batch_size} is above the {rows} rows of train: use at most {rows}.")
    if batch_size % accumulate:
        raise ValueError(f"accumulate={accumulate} must divide batch_size={batch_size} into equal micro-batches.")
    if mesh is None:
        return
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh={mesh!r} must be a jax.sharding.Mesh, such as jax.make_mesh((2,), ('data',)).")
    name = mesh.axis_names[0]
    if (batch_size // accumulate) % mesh.shape[name]:
        raise ValueError(
            f"mesh splits every micro-batch over {mesh.shape[name]} devices along its axis {name!r}, and "
            f"batch_size / accumulate = {batch_size // accumulate} rows is no multiple of that."
        )


def check_logits(logits: Any, y: jax.Array, monitor: str) -> None:
    """Raise ``ValueError`` for outputs of another number of rows, or an accuracy that cannot be taken.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure.training.fit_checks import check_logits
      >>> check_logits(jnp.ones((5, 2)), jnp.ones((5, 2)), "val_accuracy")
      Traceback (most recent call last):
      ValueError: monitor='val_accuracy', but y is float32 (5, 2) and no classes for logits (5, 2): use 'val_loss'.
    """
    if not hasattr(logits, "shape") or logits.shape[:1] != y.shape[:1]:
        found = getattr(logits, "shape", type(logits).__name__)
        raise ValueError(f"model_or_apply returned {found} for {len(y)} rows: it must return logits (rows, ...).")
    if monitor == "val_accuracy" and not has_classes(logits, y):
        raise ValueError(
            f"monitor='val_accuracy', but y is {y.dtype} {y.shape} and no classes for logits {logits.shape}: "
            "use 'val_loss'."
        )


def check_classes(logits: Any, train: Any, validation: Any) -> None:
    """Raise ``ValueError`` for labels that are no position along the last axis of the logits.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure.training.fit_checks import check_classes
      >>> check_classes(jnp.ones((2, 3)), (jnp.ones((2, 4)), jnp.array([0, 3])), (jnp.ones((2, 4)), jnp.array([0, 1])))
      Traceback (most recent call last):
      ValueError: train has the label 3, but the logits score 3 classes, 0 to 2: widen the model, or renumber y.
    """
    classes = logits.shape[-1] if logits.ndim else 0
    for name, (_, y) in {"train": train, "validation": validation}.items():
        y = np.asarray(y)
        if not np.issubdtype(y.dtype, np.integer):
            continue
        for label in (y.min(), y.max()):
            if not 0 <= label < classes:
                raise ValueError(
                    f"{name} has the label {label}, but the logits score {classes} classes, 0 to {classes - 1}: "
                    "widen the model, or renumber y."
                )


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False
