"""Training of any Flax model, or of a plain function, with any transformation: ``fit``.

The host speaks between dispatches only: it draws the rows, checks the losses of the dispatch before, validates after
every epoch and keeps the best epoch.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from optax_structure._tree import Params, PyTree, align
from optax_structure.extrema import ActivationStats, init_activation_stats
from optax_structure.state import hyperparams_by_label
from optax_structure.training.fit_checks import (
    check_arguments,
    check_batches,
    check_classes,
    check_counts,
    check_data,
    check_logits,
)
from optax_structure.training.fit_host import Event, chunk_lengths, happens, is_true, progress_bar, run_epoch
from optax_structure.training.fit_model import Capture, Model, as_model
from optax_structure.training.fit_step import Carry, Loss, Settings, cast_floats, make_chunk, make_evaluate
from optax_structure.training.loop import NonFiniteLoss
from optax_structure.training.step import CHUNK, batch_rows
from optax_structure.transforms._extra import takes_extra_args

CROSS_ENTROPY = optax.losses.softmax_cross_entropy_with_integer_labels


class Epoch(NamedTuple):
    """What one epoch came to.

    Attributes:
      epoch: its number, from 1.
      step: finished updates at its end.
      train_loss: mean over its steps, of the parameters as they moved; ``train_accuracy`` likewise.
      val_loss: over all validation rows at its end; ``val_accuracy`` likewise. Accuracies are NaN where ``y`` holds no
        classes.
      learning_rates: label -> rate at its end, where ``optax.inject_hyperparams`` holds it (``hyperparams_by_label``);
        else empty.
    """

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rates: dict[str, float]


class FitResult(NamedTuple):
    """A finished training.

    Attributes:
      params: of the best epoch, or of the last one with ``restore_best=False``; all that follows is of the same epoch.
      opt_state: the optimizer's state (``get_masks`` reads the masks of ``sparse`` from it).
      rest: the model's state beside its params; ``()`` where there is none.
      stats: activation statistics, ``None`` without ``capture``.
      model: an NNX module with these values, in the mode of the one that was given; ``None`` for other models.
      history: one ``Epoch`` an epoch, those after the best one included.
      best_epoch: the epoch that validated best, 0 where none was finished.
      stopped: whether patience or a callback ended the training before the last epoch.
    """

    params: Params
    opt_state: optax.OptState
    rest: PyTree
    stats: ActivationStats | None
    model: Any
    history: list[Epoch]
    best_epoch: int
    stopped: bool


class FitNonFiniteLoss(NonFiniteLoss):
    """The loss, or what is monitored, became NaN or infinite.

    Attributes:
      step: the update whose loss it was, from 1; of a monitor, the last update before the validation.
      result: ``FitResult`` of the best epoch until then (of the start, where none was finished).
    """

    def __init__(self, message: str, step: int, result: FitResult):
        super().__init__(message)
        self.step = step
        self.result = result


def fit(
    model_or_apply: Any,
    train: tuple[Any, Any],
    validation: tuple[Any, Any],
    tx: optax.GradientTransformation,
    *,
    params: Params | None = None,
    loss: Loss = CROSS_ENTROPY,
    epochs: int = 10,
    batch_size: int = 128,
    seed: int = 0,
    steps_per_dispatch: int = CHUNK,
    monitor: Literal["val_accuracy", "val_loss"] = "val_accuracy",
    patience: int | None = None,
    restore_best: bool = True,
    masks: PyTree | None = None,
    capture: Capture | None = None,
    bounded: Any = None,
    event: Event | None = None,
    compute_dtype: Any = None,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    progress: bool = False,
    callbacks: Sequence[Callable[[Epoch, Carry], object]] = (),
) -> FitResult:
    """Train a model with any optax transformation, validate after every epoch, and give the best epoch back.

    Every epoch is a permutation of the training rows of its own (a function of ``seed``), cut into whole batches; the
    ``len(x) % batch_size`` rows that are over are left out of this epoch, other ones of the next. Several steps run in
    one dispatch as a ``lax.scan`` over a donated carry. A model compiles one training program (a second one where no
    number of steps a dispatch divides the epoch) and one validation program. All data are held on the device.

    ``tx.update`` gets ``value=`` (the loss, float32) always, ``masks=`` and ``event=`` where the arguments of these
    names are given, and ``extrema=`` where ``capture`` is: rules that do not read them are not disturbed.

    It takes the place of the original's ``create_adaptive_training_loop`` and departs from it: the strategy is ``tx``
    itself and no name of one, the best epoch comes back and not the last, and losses are read once a dispatch, where
    there every step waited for two numbers.

    Args:
      model_or_apply: an ``nnx.Module`` (its ``nnx.Param`` are trained; batch statistics, dropout keys and masks are
        carried along; called in training mode for steps and in evaluation mode for validation; itself only read), a
        ``linen.Module`` (the collections of ``params`` are carried along; the arguments ``train``, ``training``,
        ``is_training``, ``deterministic`` and ``use_running_average`` of its ``__call__`` are set where it has them;
        steps have a ``"dropout"`` key), or a function ``apply(params, x) -> logits`` (without state; validation calls
        the same).
      train: ``(x, y)``, arrays of one length.
      validation: ``(x, y)`` likewise.
      tx: the transformation.
      params: Linen: what ``init`` returned, or its ``"params"``. Functions: any pytree. NNX: none.
      loss: ``(logits, y)`` -> a value an example (then averaged) or their mean; logits arrive in float32. With the one
        that stands here every label must be a class of the logits; another may take -1 for a row to ignore.
      epochs: at least 1.
      batch_size: rows a step, all micro-batches together.
      seed: of the order of rows, and of Linen's dropout.
      steps_per_dispatch: at most so many steps in one dispatch.
      monitor: what is best and what patience watches; ``"val_loss"`` where ``y`` holds no classes.
      patience: stop after so many epochs without a better one; ``None`` never stops.
      restore_best: return the best epoch (parameters, optimizer state and the rest alike), not the last.
      masks: given to every update as ``masks=``: a tree of the structure of params, a prefix, or a function of
        params. ``sparse`` holds its own and needs none.
      capture: ``(params, x) -> (logits, activations by layer)``, such as ``nn.capture(model, activation=...)``: called
        for the training steps in place of the model. The activations' running statistics give ``extrema=``. A model
        with state beside its params needs ``nn.capture(model, return_rest=True)``, which leaves the mode of an NNX
        module as it is: call ``model.train()`` before.
      bounded: layers whose activation is bounded, as in ``init_activation_stats``.
      event: ``event(step) -> bool``, or the steps at which ``event=True`` is given. Steps count from 0, as in
        schedules. ``optax.MultiSteps`` hands on those of the last micro-step of each of its steps, and drops others.
      compute_dtype: floating dtype of the forward and backward pass, such as ``jnp.bfloat16``: params and ``x`` are
        cast to it; params, loss, gradients' sums, model state and optimizer state keep theirs.
      accumulate: micro-batches a step: their mean gradient and mean loss make one update. Batch statistics are those of
        a micro-batch.
      mesh: data-parallel training: the batch is split over the mesh's first axis; params and data are on every device.
      progress: a progress bar, where rich is installed.
      callbacks: each is called as ``callback(epoch, carry)`` after every epoch; one that returns ``True`` (a Python,
        NumPy or JAX bool) stops. The arrays of ``carry`` live until it returns: copy what is kept.

    Returns:
      ``FitResult``.

    Raises:
      ValueError: for arguments that do not fit each other, naming them.
      FitNonFiniteLoss: when a step's loss, or what ``monitor`` names, is NaN or infinite (validation accuracy is
        NaN where a logit is); holds the best epoch until then.

    Example:
      >>> import numpy as np, optax
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> from optax_structure.training import fit
      >>> x = np.random.default_rng(0).normal(size=(80, 4)).astype(np.float32)
      >>> y = (x[:, 0] > 0).astype(np.int32)
      >>> model = nn.MLP([4, 8, 2], rngs=nnx.Rngs(0))
      >>> result = fit(model, (x[:64], y[:64]), (x[64:], y[64:]), optax.adam(0.05), epochs=5, batch_size=16)
      >>> len(result.history), result.history[-1].step, result.history[-1].val_accuracy > 0.8
      (5, 20, True)
      >>> result.model(x[:1]).shape
      (1, 2)
    """
    check_data(train, validation)
    check_arguments(tx, monitor, event, compute_dtype)
    check_counts(epochs, batch_size, steps_per_dispatch, patience, accumulate)
    check_batches(len(train[1]), batch_size, accumulate, mesh)
    model = as_model(model_or_apply, params, capture)
    settings = _settings(loss, accumulate, compute_dtype, seed, mesh)
    place = functools.partial(_place, sharding=settings.replicated)
    data, held = place(tuple(map(jnp.asarray, train))), place(tuple(map(jnp.asarray, validation)))
    logits = _shape_of(model.evaluate, model, held[0], settings)
    check_logits(logits, held[1], monitor)
    if loss is CROSS_ENTROPY:  # to another loss, -1 may say to ignore the row
        check_classes(logits, train, validation)
    extra = {} if masks is None else {"masks": place(align(masks, model.params, "masks"))}
    tx = takes_extra_args(tx)
    stats = None
    if capture is not None:
        activations = _shape_of(model.train, model, data[0][:1], settings, jax.random.key(0))[1]
        stats = init_activation_stats(activations, bounded=bounded)
    carry = place(_start(model, tx, stats))
    run, evaluate = make_chunk(model, tx, settings), make_evaluate(model, settings, batch_size // accumulate)

    def dispatch(carry: Carry, step: int, steps: int) -> tuple[Carry, tuple[jax.Array, jax.Array]]:
        index = batch_rows(seed, step, steps, len(data[1]), batch_size).reshape(steps, accumulate, -1)
        return run(carry, *data, index, extra, happens(event, step, steps))

    per_epoch = len(data[1]) // batch_size
    lengths = chunk_lengths(per_epoch, steps_per_dispatch)
    history: list[Epoch] = []
    best, best_epoch, best_score, stopped = _copy(carry), 0, -math.inf, False

    def failed(what: str, step: int) -> FitNonFiniteLoss:
        result = _result(model, best, history, best_epoch, True)
        return FitNonFiniteLoss(_not_finite(what, best_epoch), step, result)

    with progress_bar(progress, epochs * per_epoch, model.params) as show:
        for epoch in range(1, epochs + 1):
            begun = (epoch - 1) * per_epoch
            validated = history[-1].val_accuracy if history else None
            carry, losses, accuracies = run_epoch(dispatch, carry, begun, lengths, functools.partial(show, validated))
            if not np.isfinite(losses).all():
                bad = int(np.argmin(np.isfinite(losses)))
                raise failed(f"the loss is {losses[bad]} at step {begun + bad + 1}", begun + bad + 1)
            loss_now, accuracy_now = jax.device_get(evaluate(carry.params, carry.rest, *held))
            record = Epoch(
                epoch,
                begun + per_epoch,
                float(losses.mean()),
                float(accuracies.mean()),
                float(loss_now),
                float(accuracy_now),
                _learning_rates(carry.opt_state),
            )
            history.append(record)
            score = record.val_accuracy if monitor == "val_accuracy" else -record.val_loss
            if not math.isfinite(score):
                # Nothing is better or worse than this: patience and the best epoch would mean nothing.
                what = f"monitor={monitor!r} is {abs(score)} after epoch {epoch} (step {record.step})"
                raise failed(what, record.step)
            if score > best_score:
                best, best_epoch, best_score = _copy(carry), epoch, score
            asked = [callback(record, carry) for callback in callbacks]
            stale = patience is not None and epoch - best_epoch >= patience
            stopped = epoch < epochs and (stale or any(map(is_true, asked)))
            if stopped:
                break
    return _result(model, best if restore_best else carry, history, best_epoch, stopped)


def _settings(loss: Loss, accumulate: int, compute_dtype: Any, seed: int, mesh: Mesh | None) -> Settings:
    if mesh is None:
        return Settings(loss, accumulate, compute_dtype, seed)
    # Its devices and names only: the axes of make_mesh are explicit, and shardings would become a matter of the model.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    batch, replicated = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])), NamedSharding(mesh, PartitionSpec())
    return Settings(loss, accumulate, compute_dtype, seed, batch, replicated)


def _place(tree: PyTree, sharding: jax.sharding.Sharding | None) -> PyTree:
    return tree if sharding is None else jax.device_put(tree, sharding)


@jax.jit
def _copy(tree: PyTree) -> PyTree:
    # The carry is donated: what is kept of it needs buffers of its own.
    return jax.tree.map(jnp.copy, tree)


def _shape_of(call: Callable[..., Any], model: Model, x: jax.Array, settings: Settings, *args: Any) -> Any:
    def shaped(params: Params, rest: PyTree, x: jax.Array) -> Any:
        params, x = cast_floats((params, x), settings.compute_dtype)
        return call(params, rest, x, *args)

    return jax.eval_shape(shaped, model.params, model.rest, x)


def _start(model: Model, tx: optax.GradientTransformationExtraArgs, stats: ActivationStats | None) -> Carry:
    def start(params: Params, rest: PyTree, stats: ActivationStats | None) -> Carry:
        carry = Carry(jnp.zeros((), jnp.int32), params, rest, tx.init(params), stats)
        # What is donated is neither the caller's nor in two places: some states start as params themselves.
        return jax.tree.map(jnp.copy, carry)

    return jax.jit(start)(model.params, model.rest, stats)


def _learning_rates(opt_state: optax.OptState) -> dict[str, float]:
    # Most optimizers hold no rate: that is no error here.
    with contextlib.suppress(ValueError):
        return {label: float(rate) for label, rate in hyperparams_by_label(opt_state).items()}
    return {}


def _not_finite(what: str, best_epoch: int) -> str:
    kept = f"epoch {best_epoch}, the best until then," if best_epoch else "the start"
    return (
        f"{what}. What is kept of {kept} is in the exception's .result. Try a smaller learning rate, "
        "optax.clip_by_global_norm, or look for values in the data that are not finite."
    )


def _result(model: Model, carry: Carry, history: list[Epoch], best_epoch: int, stopped: bool) -> FitResult:
    rebuilt = model.rebuild(carry.params, carry.rest)
    return FitResult(carry.params, carry.opt_state, carry.rest, carry.stats, rebuilt, history, best_epoch, stopped)
