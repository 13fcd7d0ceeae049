"""Gradient accumulation that tells the optimizer the loss of the whole window."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import is_traced
from optax_structure.transforms._extra import Described, Rule, takes_extra_args, transformation


class AccumulateState(NamedTuple):
    """State of ``accumulate_gradients``.

    Attributes:
      value: float32 scalar, mean of the losses of the window so far; a dict of such where there are several losses.
      multi_steps: state of ``optax.MultiSteps``: the mean gradient so far, and ``inner_opt_state``.
    """

    value: Any
    multi_steps: optax.MultiStepsState
    serves_all_ages = True


def accumulate_gradients(
    inner: optax.GradientTransformation,
    every: int | Callable[[Any], Any],
    *,
    losses: Collection[str] | None = None,
) -> Described:
    """``optax.MultiSteps`` whose ``inner`` is told the mean ``value=`` of the window, not that of its last micro-batch.

    ``inner`` gets the mean gradient of ``every`` micro-batches and, where ``value=`` is passed, the mean of their
    losses, averaged in float32. Between, the update is 0. Other extra arguments reach ``inner`` as they are passed at
    the last micro-batch. Without ``value=`` this is ``optax.MultiSteps``.

    A loss that is not finite makes the mean of its window so, and a loss-aware ``inner`` skips that update.

    Args:
      inner: the optimizer; what reads raw gradients (``observe``) goes inside, to read the mean.
      every: micro-batches an update, >= 1, or a function of the updates so far.
      losses: the names of the losses where ``value=`` is a mapping of several.

    Returns:
      A transformation with the state of ``optax.MultiSteps`` and one float32 scalar a loss.

    Raises:
      ValueError: for ``every`` below 1; in ``update`` for a ``value=`` that has other names than ``losses``, or is no
        scalar.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> tx = oxs.accumulate_gradients(oxs.feedback_sgd(0.1), 2)
      >>> params = jnp.ones(3)
      >>> state = tx.init(params)
      >>> for value in (1.0, 4.0):
      ...     updates, state = tx.update(params, state, params, value=value)
      >>> float(state.multi_steps.inner_opt_state.control.first)
      2.5
    """
    if not callable(every) and (is_traced(every) or int(every) != every or every < 1):
        raise ValueError(f"every={every!r} must be an int >= 1, or a function of the updates so far.")
    steps = optax.MultiSteps(takes_extra_args(inner), every if callable(every) else int(every))
    names = None if losses is None else tuple(losses)

    def init_fn(params: optax.Params) -> AccumulateState:
        zeros = [jnp.zeros((), jnp.float32) for _ in names or ("",)]
        return AccumulateState(zeros[0] if names is None else dict(zip(names, zeros, strict=True)), steps.init(params))

    def update_fn(
        updates: optax.Updates,
        state: AccumulateState,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AccumulateState]:
        mean, place = state.value, jnp.asarray(state.multi_steps.mini_step)
        if value is not None:
            _check_value(value, names)

            def averaged(new: Any, so_far: jax.Array) -> jax.Array:
                new = jnp.asarray(new, jnp.float32)
                # Not by adding to what a window before left: it may not be finite.
                return jnp.where(place == 0, new, so_far + (new - so_far) / (place + 1).astype(jnp.float32))

            mean = (
                averaged(value, mean) if names is None else {name: averaged(value[name], mean[name]) for name in names}
            )
            extra_args["value"] = mean
        updates, multi_steps = steps.update(updates, state.multi_steps, params, **extra_args)
        return updates, AccumulateState(mean, multi_steps)

    return transformation(
        init_fn, update_fn, Rule("accumulate_gradients", {"every": every}, "4 B a parameter", (inner,))
    )


def _check_value(value: Any, names: tuple[str, ...] | None) -> None:
    given = set(value) if isinstance(value, Mapping) else None
    if given != (None if names is None else set(names)):
        raise ValueError(
            f"accumulate_gradients got value= {'a single loss' if given is None else f'with {sorted(given)}'}, and "
            f"losses={names!r}: name all losses that value= holds in losses=(...), or pass one scalar."
        )
    for loss in value.values() if isinstance(value, Mapping) else (value,):
        if jnp.shape(loss) != ():
            raise ValueError(f"value= must be a scalar, got shape {jnp.shape(loss)}: pass its mean.")
