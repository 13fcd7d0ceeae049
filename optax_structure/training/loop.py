"""The growing run: train, read the extrema, grow, carry the optimizer on, train on.

The host decides between dispatches only, from what ``Run`` holds; all of that is in every checkpoint, so a run that was
killed goes on with the same numbers, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_structure._tree import Params, PyTree
from optax_structure.extrema import find_extrema
from optax_structure.labels import relabel
from optax_structure.sparsity.masks import nonzero
from optax_structure.state import transfer_state
from optax_structure.structure import Growth, Units
from optax_structure.training import checkpoint
from optax_structure.training.config import Config
from optax_structure.training.data import Data
from optax_structure.training.events import Evidence, Net, grow, rewire
from optax_structure.training.network import accuracy_of, dense_gradients
from optax_structure.training.run_state import History, Run, Structure, cost_of, fresh_folder, resume, save, start
from optax_structure.training.step import batch_rows, first_stats, make_program, make_tx, whole_chunks
from optax_structure.transforms.rewiring.rules import Rewiring

_find_extrema = jax.jit(find_extrema)

EVIDENCE_ROWS = 1024
"""Training rows whose dense gradients place connections and start their second moments."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class Interrupted(RuntimeError):
    """The run was asked to stop; its checkpoint is what it goes on from."""


class Progress(NamedTuple):
    """What a watcher hears after every dispatch; ``event`` is the record of a growth event that just happened."""

    step: int
    total_steps: int
    loss: float
    accuracy: float
    validation_accuracy: float | None
    nonzero: int
    event: dict[str, Any] | None = None


class Result(NamedTuple):
    """A finished run.

    Attributes:
      final: the ``"final"`` part of ``report.json``.
      events: its ``"events"`` part.
      params, masks, units: the network that was tested.
      run: everything else: history, statistics, the structure before growth.
    """

    final: dict[str, Any]
    events: list[dict[str, Any]]
    params: Params
    masks: PyTree
    units: Units
    run: Run


class Arrays(NamedTuple):
    """Training and validation part, where the step reads them."""

    x: jax.Array
    y: jax.Array
    x_validation: jax.Array
    y_validation: jax.Array


def run_growth(
    config: Config,
    data: Data,
    *,
    folder: Path | None = None,
    resuming: bool = False,
    given: Structure | None = None,
    rule: Rewiring | None = None,
    checkpoint_every: int = 500,
    note: Mapping[str, Any] | None = None,
    watch: Callable[[Progress, Run], None] = lambda progress, run: None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train and grow a sparse network to the end, and test it once.

    The network that is tested is the last one, or with ``config.patience`` the one that validated best; both hold the
    budget exactly.

    Args:
      config: what to do.
      data: with what.
      folder: where checkpoints go; none are written without it. Those of an earlier run are removed.
      resuming: go on from the newest usable checkpoint; a folder without one starts the run again.
      given: a structure to start with in place of a random one.
      rule: by which masks change inside the step, in place of the one that ``config.rewire`` names. Connections are
        counted once a dispatch, so it should change them in a last step of one (``run_state.lengths``).
      checkpoint_every: steps between two checkpoints.
      note: kept in the checkpoints' JSON under ``"note"``.
      watch: called after every dispatch and every growth event.
      stop: asked after every dispatch; true saves a checkpoint and raises ``Interrupted``.

    Returns:
      ``Result``.

    Raises:
      ValueError: for a budget below what exists, or a batch above the training rows.
      CheckpointError: when what is resumed does not fit ``config`` or ``data``.
      NonFiniteLoss: when the loss is NaN or infinite.
      Interrupted: when ``stop`` said so.

    Example:
      >>> from optax_structure.training import Config, load_data, run_growth
      >>> config = Config(widths=(8,), epochs=1, events=0, density=0.3, final_density=0.3, prune=0.0)
      >>> result = run_growth(config, load_data("digits"))
      >>> result.final["nonzero"] == round(0.3 * (64 * 8 + 8 * 10)), result.final["retraces"]
      (True, 0)
    """
    began = time.perf_counter()
    if resuming and folder is not None and checkpoint.exists(folder):
        run = resume(config, data, folder, rule)
    else:
        if folder is not None:
            fresh_folder(folder)
        run = start(config, data, given, rule)
    spent = run.host.wall
    arrays = Arrays(*map(jnp.asarray, (data.x_train, data.y_train, data.x_validation, data.y_validation)))
    due = _event_boundaries(run)
    first_trace = not run.host.rebuilt
    while not run.host.finished:
        loss, accuracy, traced = _dispatch(run, arrays)
        run.host.retraces += max(0, traced - first_trace)
        first_trace, run.host.rebuilt = first_trace and not traced, False
        step = run.host.step
        if not np.isfinite(run.history.loss[-run.chunk :]).all():
            bad = step - run.chunk + int(np.argmin(np.isfinite(run.history.loss[-run.chunk :]))) + 1
            raise NonFiniteLoss(_not_finite(f"loss is {run.history.loss[bad - 1]} at", bad, folder, config))
        validation = _validate(run, arrays) if _epoch_ended(run) or step >= run.total_steps else None
        watch(Progress(step, run.total_steps, loss, accuracy, validation, run.cost.connections), run)
        # A kill between two of these is a kill before the checkpoint: all of them happen again.
        grew = False
        while len(run.host.events) < len(due) and step >= due[len(run.host.events)]:
            record = _event(run, arrays)
            watch(Progress(step, run.total_steps, loss, accuracy, validation, record["nonzero_after"], record), run)
            grew = True
        if not grew and _rewires(run):
            _rewire(run, arrays)
        if run.host.relabel_at is not None and step >= run.host.relabel_at:
            # Their cohorts have the scaffold's rate by now; no rate hangs on a label here, so nothing traces anew.
            run.labels, run.host.relabel_at = relabel(run.labels, {"new": "scaffold"}), None
        grown = len(run.host.events) == len(due)
        run.host.finished = step >= run.total_steps or (grown and 0 < config.patience <= run.host.stale)
        asked = stop()
        saving = grew or asked or run.host.finished or step % checkpoint_every < run.chunk
        if folder is not None and saving:
            if not _all_finite(run.carry.params):
                raise NonFiniteLoss(_not_finite("parameters are not finite after", step, folder, config))
            run.host.wall = spent + time.perf_counter() - began
            save(run, folder, note or {})
        if asked and not run.host.finished:
            raise Interrupted(f"stopped after step {step} of {run.total_steps}.")
    run.host.wall = spent + time.perf_counter() - began
    return _result(run)


def _not_finite(what: str, step: int, folder: Path | None, config: Config) -> str:
    kept = "no checkpoint had been written"
    if folder is not None and checkpoint.exists(folder):
        kept = f"the last good checkpoint is kept in {folder}"
    return f"the {what} step {step}; {kept}. Try a smaller learning rate than {config.learning_rate}."


@jax.jit
def _all_finite(params: Params) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def _event_boundaries(run: Run) -> tuple[int, ...]:
    asked = run.config.event_steps(len(run.data.x_train))
    return tuple(max(1, round(step / run.chunk)) * run.chunk for step in asked)


def _dispatch(run: Run, arrays: Arrays) -> tuple[float, float, int]:
    """One chunk of steps; loss and accuracy of its mean step, and how often it was traced."""
    host, rows = run.host, len(arrays.y)
    traces = len(run.program.traces)
    host.flops += run.chunk * run.cost.flops
    host.flops_sparse += run.chunk * run.cost.flops_sparse
    index = batch_rows(run.config.seed, host.step, run.chunk, rows, run.config.batch_size)
    run.carry, out = run.program.run(run.carry, arrays.x, arrays.y, index)
    loss, accuracy = jax.device_get(out)
    run.history = History(
        np.concatenate([run.history.loss, loss]),
        np.concatenate([run.history.accuracy, accuracy]),
        np.concatenate([run.history.nonzero, np.full(run.chunk, run.cost.connections, np.int32)]),
    )
    host.step += run.chunk
    if run.rule is not None:
        run.cost = cost_of(run.carry.params, run.units, run.masks, run.config.batch_size)
        if not host.events and host.step == run.rule.start + run.rule.every:
            # It was with the structure of the start that units were as active as this: no step had another.
            run.before = run.before._replace(active=_activity(run))
    return float(loss.mean()), float(accuracy.mean()), len(run.program.traces) - traces


def _epoch_ended(run: Run) -> bool:
    per_epoch = len(run.data.x_train) // run.config.batch_size
    return run.host.step // per_epoch > (run.host.step - run.chunk) // per_epoch


def _validation_accuracy(run: Run, arrays: Arrays) -> float:
    return float(accuracy_of(run.carry.params, run.units, arrays.x_validation, arrays.y_validation))


def _validate(run: Run, arrays: Arrays) -> float:
    accuracy = _validation_accuracy(run, arrays)
    host = run.host
    host.validations.append([host.step, accuracy])
    grown = len(host.events) == run.config.events
    better = grown and accuracy > host.best
    host.best, host.stale = (accuracy, 0) if better else (host.best, host.stale + grown)
    if better and run.config.patience:
        run.best = jax.tree.map(jnp.copy, {"params": run.carry.params, "masks": run.masks})
    return accuracy


def _activity(run: Run) -> dict[str, jax.Array]:
    """Layer -> share of samples on which each unit is active, of late."""
    weight = jnp.maximum(run.carry.stats.weight, 1e-6)
    return {layer: share / weight for layer, share in run.carry.stats.active.items()}


def _evidence(run: Run, arrays: Arrays) -> Evidence:
    rows = len(arrays.y)
    chosen = np.random.default_rng((run.config.seed, run.host.step)).integers(0, rows, min(EVIDENCE_ROWS, rows))
    x, y = arrays.x[chosen], arrays.y[chosen]
    return Evidence(_find_extrema(run.carry.stats), lambda params, units: dense_gradients(params, units, x, y))


def _key(run: Run, purpose: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(run.config.seed), purpose), run.host.step)


def _apply(run: Run, growth: Growth, evidence: Evidence) -> None:
    """Go on with a changed structure: the old program where only masks changed, a new one where shapes did."""
    params, opt_state, stats = run.carry
    grads = evidence.gradients(growth.params, growth.units)
    reshaped = growth.units != run.units
    tx = make_tx(run.config, run.total_steps, growth.masks, run.rule) if reshaped else run.program.tx
    opt_state = transfer_state(run.program.tx, opt_state, params, tx, growth.params, growth=growth, grads=grads)
    run.units, run.labels = growth.units, growth.labels
    if reshaped:
        stats = first_stats(growth.params, growth.units)
        run.program, run.host.rebuilt = make_program(tx, growth.units), True
    run.carry = run.carry._replace(params=growth.params, opt_state=opt_state, stats=stats)
    run.cost = cost_of(run.carry.params, run.units, run.masks, run.config.batch_size)


def _event(run: Run, arrays: Arrays) -> dict[str, Any]:
    """One growth event: its action, then exactly as many connections as the budget gives by now."""
    host, config = run.host, run.config
    number = len(host.events) + 1
    if number == 1:
        run.before = Structure(run.units, jax.tree.map(jnp.copy, run.masks), _activity(run))
    evidence = _evidence(run, arrays)
    dead, saturated = jax.device_get(evidence.extrema)
    action = config.actions[(number - 1) % len(config.actions)]
    before, count = _validation_accuracy(run, arrays), run.cost.connections
    target = run.start_count + (run.final_count - run.start_count) * number // config.events
    net = Net(run.carry.params, run.labels, run.masks, run.units)
    for growth in grow(config, net, action, target, evidence, _key(run, 1)):
        if growth.units.layers != run.units.layers:
            host.relabel_at = host.step + -(-config.warmup // run.chunk) * run.chunk
        _apply(run, growth, evidence)
    record = {
        "step": host.step,
        "action": action,
        "placement": config.placement,
        "dead": int(sum(flags.sum() for flags in dead.values())),
        "saturated": int(sum(flags.sum() for flags in saturated.values())),
        "nonzero_before": count,
        "nonzero_after": run.cost.connections,
        "validation_accuracy_before": before,
        "validation_accuracy_after": _validation_accuracy(run, arrays),
    }
    host.events.append(record)
    host.best, host.stale, run.best = -1.0, 0, None
    return record


def _rewires(run: Run) -> bool:
    config, step = run.config, run.host.step
    if config.rewire is not None or not config.prune:
        return False
    return step % whole_chunks(config.rewire_every, run.chunk) == 0 and step <= config.rewire_until * run.total_steps


def _rewire(run: Run, arrays: Arrays) -> None:
    evidence = _evidence(run, arrays)
    net = Net(run.carry.params, run.labels, run.masks, run.units)
    growth = rewire(run.config, net, evidence, run.config.prune, _key(run, 2))
    if growth is not None:
        _apply(run, growth, evidence)


def _result(run: Run) -> Result:
    chosen = run.best or {"params": run.carry.params, "masks": run.masks}
    params, masks, data = chosen["params"], chosen["masks"], run.data
    kernels = [mask for mask in jax.tree.leaves(masks) if jnp.ndim(mask)]
    biases = sum(leaf.size for leaf in jax.tree.leaves(params)) - sum(mask.size for mask in kernels)
    final = {
        "test_accuracy": float(accuracy_of(params, run.units, jnp.asarray(data.x_test), jnp.asarray(data.y_test))),
        "validation_accuracy": float(
            accuracy_of(params, run.units, jnp.asarray(data.x_validation), jnp.asarray(data.y_validation))
        ),
        "nonzero": nonzero(masks),
        "biases": biases,
        "density": nonzero(masks) / sum(mask.size for mask in kernels),
        "train_flops": run.host.flops,
        "train_flops_if_sparsity_were_free": run.host.flops_sparse,
        "wall_s": run.host.wall,
        "retraces": run.host.retraces,
    }
    return Result(final, [dict(record) for record in run.host.events], params, masks, run.units, run)


__all__ = ["Interrupted", "NonFiniteLoss", "Progress", "Result", "run_growth"]
