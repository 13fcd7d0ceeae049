"""The compiled side of ``fit``: many training steps in one dispatch, and the validation pass.

Everything that a step changes is in one pytree, ``Carry``, which is donated. What depends on the model is in ``Model``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import Params, PyTree
from optax_structure.extrema import ActivationStats, find_extrema, update_activation_stats
from optax_structure.training.fit_model import Model

Loss = Callable[[jax.Array, jax.Array], jax.Array]


class Carry(NamedTuple):
    """What a step changes.

    Attributes:
      step: int32 (), finished updates.
      params: what is trained.
      rest: the model's other state: batch statistics, key counters, masks.
      opt_state: of ``tx``.
      stats: activation statistics, ``None`` without ``capture``.
    """

    step: jax.Array
    params: Params
    rest: PyTree
    opt_state: optax.OptState
    stats: ActivationStats | None


class Settings(NamedTuple):
    """What the programs are compiled for.

    Attributes:
      loss: ``(logits, y)`` -> a value an example, or their mean.
      accumulate: micro-batches a step.
      compute_dtype: of the forward pass, ``None`` for the params' own.
      seed: of the keys that Linen modules drop units by.
      batch: sharding of a micro-batch's rows, ``None`` on one device.
      replicated: sharding of the carry, ``None`` on one device.
    """

    loss: Loss
    accumulate: int = 1
    compute_dtype: Any = None
    seed: int = 0
    batch: jax.sharding.Sharding | None = None
    replicated: jax.sharding.Sharding | None = None


def make_chunk(model: Model, tx: optax.GradientTransformationExtraArgs, settings: Settings) -> jax.stages.Wrapped:
    """The jitted, donated ``lax.scan`` over a chunk of steps.

    ``run(carry, x, y, index, extra, events) -> (carry, (losses, accuracies))`` with ``index`` int32
    ``(steps, accumulate, rows)``, ``extra`` what every update gets, ``events`` bool ``(steps,)`` or ``None``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_structure.training.fit_model import as_model
      >>> from optax_structure.training.fit_step import Carry, Settings, make_chunk
      >>> model = as_model(lambda params, x: x @ params["w"], {"w": jnp.zeros((3, 2))})
      >>> tx = optax.with_extra_args_support(optax.sgd(0.1))
      >>> run = make_chunk(model, tx, Settings(optax.losses.softmax_cross_entropy_with_integer_labels))
      >>> carry = Carry(jnp.zeros((), jnp.int32), model.params, (), tx.init(model.params), None)
      >>> x, y, index = jnp.ones((4, 3)), jnp.zeros(4, jnp.int32), jnp.zeros((2, 1, 4), jnp.int32)
      >>> carry, (losses, accuracies) = run(carry, x, y, index, {}, None)
      >>> int(carry.step), losses.shape, round(float(losses[0]), 3)
      (2, (2,), 0.693)
    """

    def micro_batch(
        params: Params, rest: PyTree, stats: ActivationStats | None, x: jax.Array, y: jax.Array, key: jax.Array
    ) -> tuple[Params, jax.Array, jax.Array, PyTree, ActivationStats | None]:
        def objective(params: Params) -> tuple[jax.Array, tuple[jax.Array, Any, PyTree]]:
            logits, activations, after = model.train(
                cast_floats(params, settings.compute_dtype), rest, cast_floats(x, settings.compute_dtype), key
            )
            value, hits = _measure(logits, y, settings)
            return value, (hits, activations, jax.tree.map(_as_before, after, rest))

        (value, (hits, activations, rest)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        if stats is not None:
            stats = update_activation_stats(stats, activations)
        return grads, value, hits, rest, stats

    def chunk(
        carry: Carry, x: jax.Array, y: jax.Array, index: jax.Array, extra: dict[str, Any], events: jax.Array | None
    ) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
        def step(carry: Carry, now: tuple[jax.Array, jax.Array | None]) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
            params, (rows, event) = carry.params, now
            keys = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), carry.step), settings.accumulate)

            def add(total: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
                sums, rest, stats = total
                rows, key = part
                *new, rest, stats = micro_batch(params, rest, stats, *_rows(x, y, rows, settings), key)
                return (jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, tuple(new)), rest, stats), None

            if settings.accumulate == 1:
                grads, value, hits, rest, stats = micro_batch(
                    params, carry.rest, carry.stats, *_rows(x, y, rows[0], settings), keys[0]
                )
            else:
                # Sums in float32 at least: in bfloat16 the last micro-batches would be rounded away.
                wide = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
                zeros = (wide, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
                (sums, rest, stats), _ = jax.lax.scan(add, (zeros, carry.rest, carry.stats), (rows, keys))
                wide, value, hits = jax.tree.map(lambda total: total / settings.accumulate, sums)
                grads = jax.tree.map(_as_before, wide, params)
            given = {**extra, "value": value}
            if stats is not None:
                given["extrema"] = find_extrema(stats)
            if event is not None:
                given["event"] = event
            updates, opt_state = tx.update(grads, carry.opt_state, params, **given)
            params = optax.apply_updates(params, updates)
            return Carry(carry.step + 1, params, rest, opt_state, stats), (value, hits)

        carry, out = jax.lax.scan(step, carry, (index, events))
        return _constrain(carry, settings.replicated), out

    return jax.jit(chunk, donate_argnums=0)


def make_evaluate(model: Model, settings: Settings, batch_size: int) -> jax.stages.Wrapped:
    """The jitted validation pass ``run(params, rest, x, y) -> (loss, accuracy)``: means over all rows, in batches.

    The accuracy is NaN where a logit is.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_structure.training.fit_model import as_model
      >>> from optax_structure.training.fit_step import Settings, make_evaluate
      >>> model = as_model(lambda params, x: x * params["w"], {"w": jnp.ones(2)})
      >>> run = make_evaluate(model, Settings(optax.losses.softmax_cross_entropy_with_integer_labels), 2)
      >>> x, y = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), jnp.array([0, 1, 1])
      >>> [round(float(value), 4) for value in run(model.params, (), x, y)]    # two of three, in two batches
      [0.6466, 0.6667]
    """

    def evaluate(params: Params, rest: PyTree, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        def part(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = model.evaluate(
                cast_floats(params, settings.compute_dtype), rest, cast_floats(x, settings.compute_dtype)
            )
            loss, accuracy = _measure(logits, y, settings)
            # argmax takes NaN for the highest score: an accuracy of such logits would look like one.
            return loss, jnp.where(jnp.isnan(logits).any(), jnp.nan, accuracy)

        whole = len(y) // batch_size
        means, weights = [], []
        if whole:
            index = jnp.arange(whole * batch_size).reshape(whole, batch_size)
            means.append(jax.lax.map(lambda rows: part(*_rows(x, y, rows, settings)), index))
            weights.append(jnp.full(whole, batch_size / len(y), jnp.float32))
        if rest_of := len(y) - whole * batch_size:
            # The last rows in a program of their own size: padding would count rows that are not there.
            means.append(jax.tree.map(lambda mean: mean[None], part(x[-rest_of:], y[-rest_of:])))
            weights.append(jnp.full(1, rest_of / len(y), jnp.float32))
        share = jnp.concatenate(weights)
        loss, accuracy = (jnp.sum(jnp.concatenate(parts) * share) for parts in zip(*means, strict=True))
        return loss, accuracy

    return jax.jit(evaluate)


def _rows(x: jax.Array, y: jax.Array, rows: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array]:
    return _constrain((x[rows], y[rows]), settings.batch)


def _constrain(tree: PyTree, sharding: jax.sharding.Sharding | None) -> PyTree:
    return tree if sharding is None else jax.lax.with_sharding_constraint(tree, sharding)


def cast_floats(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its floating leaves in ``dtype``; as it is for ``None``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure.training.fit_step import cast_floats
      >>> [leaf.dtype.name for leaf in cast_floats([jnp.ones(2), jnp.arange(2)], jnp.bfloat16)]
      ['bfloat16', 'int32']
    """

    def cast(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return tree if dtype is None else jax.tree.map(cast, tree)


def _as_before(new: jax.Array, old: jax.Array) -> jax.Array:
    return new if new.dtype == old.dtype else new.astype(old.dtype)


def _measure(logits: jax.Array, y: jax.Array, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """Mean loss and accuracy in float32; accuracy is NaN where ``y`` holds no classes."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    value = jnp.mean(settings.loss(logits, y).astype(jnp.float32))
    if not has_classes(logits, y):
        return value, jnp.asarray(jnp.nan, jnp.float32)
    return value, jnp.mean(logits.argmax(-1) == y, dtype=jnp.float32)


def has_classes(logits: Any, y: Any) -> bool:
    """Whether ``y`` holds the classes that ``logits`` score along their last axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure.training.fit_step import has_classes
      >>> has_classes(jnp.ones((5, 10)), jnp.zeros(5, jnp.int32)), has_classes(jnp.ones((5, 10)), jnp.ones((5, 10)))
      (True, False)
    """
    return jnp.issubdtype(y.dtype, jnp.integer) and y.shape == logits.shape[:-1]
