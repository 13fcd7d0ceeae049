"""What every transformation here does alike with its arguments: checks them once, scales, and asks for extra args."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import is_traced


def transformation(init: Callable[..., Any], update: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """``optax.GradientTransformationExtraArgs`` of functions that name the type of their state."""
    return optax.GradientTransformationExtraArgs(init, update)


def check_number(name: str, value: Any, *, low: float = 0.0, high: float = math.inf) -> None:
    """Raise ``ValueError`` unless ``low <= value <= high``; tracers and arrays of ``inject_hyperparams`` pass."""
    if is_traced(value):
        return
    if not (low <= float(value) <= high):
        raise ValueError(f"{name}={value!r} must lie in [{low}, {high}].")


def require(value: Any, name: str, transform: str) -> Any:
    """The extra argument, or a ``ValueError`` that shows the call which passes it."""
    if value is None:
        raise ValueError(f"{transform} needs {name}=: call tx.update(grads, state, params, {name}=...).")
    return value


def scaled(update: jax.Array, factor: jax.Array | float) -> jax.Array:
    """``update * factor`` in float32, in the update's dtype; a factor of 0 gives exactly 0, even of NaN."""
    factor = jnp.asarray(factor, jnp.float32)
    product = (update.astype(jnp.promote_types(update.dtype, jnp.float32)) * factor).astype(update.dtype)
    return jnp.where(factor == 0, jnp.zeros_like(update), product)
