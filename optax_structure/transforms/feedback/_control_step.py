"""What ``scale_by_feedback``, ``feedback_sgd`` and ``feedback_adam`` read of a step, and what the latter make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import align
from optax_structure.transforms._multiplier import record, scaled
from optax_structure.transforms.feedback._control import Control, FeedbackState, ratio

Rate = float | jax.Array | optax.Schedule


def flags_of(observed: Any, like: optax.Updates) -> list[Any]:
    """For every leaf, whether its gradient was computed: True where nothing is said."""
    return jax.tree.leaves(align(True if observed is None else observed, like, "observed"))


def chosen(flag: Any, yes: Any, no: Any) -> Any:
    """``jnp.where`` that leaves no trace where the flag is known."""
    return (yes if flag else no) if isinstance(flag, bool) else jnp.where(flag, yes, no)


def dot(one: Sequence[Any], other: Sequence[Any], flags: Sequence[Any]) -> jax.Array:
    """The inner product over the leaves that are flagged, float32."""
    total = jnp.zeros((), jnp.float32)
    for a, b, flag in zip(one, other, flags, strict=True):
        wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
        product = jnp.sum(jnp.real(a.astype(wide) * jnp.conj(b.astype(wide)))).astype(jnp.float32)
        total = total + chosen(flag, product, jnp.zeros((), jnp.float32))
    return total


def cosine(one: Sequence[Any], other: Sequence[Any], flags: Sequence[Any]) -> jax.Array:
    """Between -1 and 1; 0 where one of the two is 0."""
    lengths = jnp.sqrt(dot(one, one, flags)) * jnp.sqrt(dot(other, other, flags))
    return ratio(dot(one, other, flags), lengths)


def number(value: Any, name: str, of: str | None) -> jax.Array:
    """The scalar that an extra argument holds: where it is a mapping, the entry ``of``."""
    if isinstance(value, Mapping):
        if of is None:
            raise ValueError(f"{name}= is a mapping of {sorted(value)}: say with loss=... whose entry is to be read.")
        if of not in value:
            raise ValueError(f"{name}= has no entry {of!r}; it has {sorted(value)}.")
        value, name = value[of], f"{name}[{of!r}]"
    try:
        scalar = jnp.asarray(value, jnp.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r} must be a scalar: pass a number.") from error
    if scalar.shape != ():
        raise ValueError(f"{name}= must be a scalar, got shape {scalar.shape}: pass its mean.")
    return scalar


class Step(NamedTuple):
    """What the loop says of one step.

    Attributes:
      control: its new state.
      flags: whether each leaf's gradient was computed.
      moved: whether its state goes on: not where the step is skipped either.
      scale: the multiplier of the base rate, 0 where the step is skipped.
      rate: the rate, 0 where the step is skipped.
    """

    control: FeedbackState
    flags: list[Any]
    moved: list[Any]
    scale: jax.Array
    rate: jax.Array

    def applied(self, updates: optax.Updates, directions: Sequence[jax.Array]) -> optax.Updates:
        """``-rate * direction`` in the dtype of the gradient; exactly 0 where nothing moves."""
        nothing = jnp.zeros((), jnp.float32)
        record(updates, [chosen(flag, self.scale, nothing) for flag in self.flags])
        leaves, treedef = jax.tree.flatten(updates)
        rates = [chosen(flag, -self.rate, nothing) for flag in self.flags]
        each = zip(leaves, directions, rates, strict=True)
        return treedef.unflatten([scaled(direction, rate).astype(leaf.dtype) for leaf, direction, rate in each])


def stepped(
    loop: Control,
    state: FeedbackState,
    learning_rate: Rate,
    loss: jax.Array,
    updates: optax.Updates,
    last: Callable[[], Sequence[jax.Array]],
    observed: Any,
) -> Step:
    """Advance the loop by one step. ``last`` computes the last step's direction, for rules that read it."""
    grads, flags = jax.tree.leaves(updates), flags_of(observed, updates)
    alignment = cosine(grads, last(), flags) if loop.reading("alignment") else None
    finite, after = loop.advance(state, loss, jnp.sqrt(dot(grads, grads, flags)), alignment)
    base = learning_rate(state.count) if callable(learning_rate) else learning_rate
    rate = jnp.asarray(base, jnp.float32) * after.scale
    after = after._replace(learning_rate=jnp.where(finite, rate, state.learning_rate))
    scale, rate = (jnp.where(finite, number, 0.0) for number in (after.scale, rate))
    return Step(after, flags, [chosen(flag, finite, False) for flag in flags], scale, rate)
