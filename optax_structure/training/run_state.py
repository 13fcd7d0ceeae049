"""One run's state: what it holds, how it begins, how it is saved, how it is taken up again."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_structure._tree import Params, PyTree, leaves_by_path, map_with_path
from optax_structure.sparsity.masks import is_kernel, nonzero, random_masks
from optax_structure.state import get_masks
from optax_structure.structure import Units
from optax_structure.training import checkpoint
from optax_structure.training.checkpoint import CheckpointError
from optax_structure.training.config import Config
from optax_structure.training.data import Data
from optax_structure.training.network import chain, flops_per_step, init_params, params_like
from optax_structure.training.step import (
    CHUNK,
    Carry,
    Program,
    batch_rows,
    first_stats,
    make_program,
    make_tx,
    rewiring_rule,
)
from optax_structure.transforms.rewiring.rules import Rewiring

INIT_ROWS = 512


class Structure(NamedTuple):
    """A structure without weights: its units and masks, and the share of samples on which each unit is active."""

    units: Units
    masks: PyTree
    active: dict[str, Any]


class History(NamedTuple):
    """Of every step so far: float32 loss and batch accuracy, int32 connections."""

    loss: np.ndarray
    accuracy: np.ndarray
    nonzero: np.ndarray


class Cost(NamedTuple):
    """Connections that exist, and the FLOPs of one step: as executed, and of the living connections alone."""

    connections: int
    flops: float
    flops_sparse: float


@dataclasses.dataclass
class Host:
    """What the host knows of a run; all of it is JSON.

    Attributes:
      step: finished training steps.
      events: records of growth events, as in ``report.json``.
      validations: pairs of step and accuracy.
      best: best validation accuracy since the last event; ``stale``: validations since then.
      relabel_at: step at which ``new`` leaves become ``scaffold``.
      retraces: traces of the step beyond the first; ``rebuilt``: the program is new and has not run yet.
      flops: of the steps as executed; ``flops_sparse``: of the living connections alone.
      wall: seconds spent.
      finished: whether training is over.
    """

    step: int = 0
    events: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    validations: list[list[float]] = dataclasses.field(default_factory=list)
    best: float = -1.0
    stale: int = 0
    relabel_at: int | None = None
    retraces: int = 0
    rebuilt: bool = False
    flops: float = 0.0
    flops_sparse: float = 0.0
    wall: float = 0.0
    finished: bool = False


@dataclasses.dataclass
class Run:
    """A run in progress: plain data, changed by the functions of ``loop``.

    Attributes:
      config, data: what was asked for.
      total_steps, chunk: length of the run and of one dispatch.
      start_count, final_count: connections at the beginning and at the end.
      units, labels: the structure now; the masks are in the carry's optimizer state.
      program, carry: the compiled chunk, and what it changes.
      host, history: the rest of the state.
      before: the structure just before the first event.
      cost: of a step of the structure now.
      rule: by which masks change inside the step.
      best: params and masks of the best validation, where ``config.patience`` asks for it.
    """

    config: Config
    data: Data
    total_steps: int
    chunk: int
    start_count: int
    final_count: int
    units: Units
    labels: PyTree
    program: Program
    carry: Carry
    host: Host
    history: History
    before: Structure
    cost: Cost
    rule: Rewiring | None = None
    best: dict[str, PyTree] | None = None

    @property
    def masks(self) -> PyTree:
        """Which connections exist now."""
        return get_masks(self.carry.opt_state)


def lengths(config: Config, rows: int) -> tuple[int, int]:
    """Steps of the run and of one dispatch: whole dispatches, at least forty of them where there are steps enough.

    Example:
      >>> from optax_structure.training.config import Config
      >>> from optax_structure.training.run_state import lengths
      >>> lengths(Config(epochs=3, batch_size=100), 1000), lengths(Config(epochs=30), 54000)
      ((30, 1), (12650, 50))
    """
    asked = config.total_steps(rows)
    chunk = max(1, min(CHUNK, asked // 40))
    return -(-asked // chunk) * chunk, chunk


def start(config: Config, data: Data, given: Structure | None = None, rule: Rewiring | None = None) -> Run:
    """A run at step 0: a random sparse chain with ``config.density``, or the structure given, freshly initialised.

    Masks change inside the step by ``rule``, or by the rule that ``config.rewire`` names.

    Raises:
      ValueError: where the budget is below the connections that the density (or the structure given) begins with.
    """
    rows = len(data.x_train)
    if config.batch_size > rows:
        raise ValueError(f"batch_size={config.batch_size} is above the {rows} training rows; choose a smaller one.")
    total, chunk = lengths(config, rows)
    x = data.x_train[batch_rows(config.seed, 0, 1, rows, min(INIT_ROWS, rows))[0]]
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    units = given.units if given else chain([data.x_train.shape[1], *config.widths, data.classes])
    like = params_like(units)
    masks = given.masks if given else _first_masks(key, units, config.density)
    size = sum(leaf.size for path, leaf in leaves_by_path(like).items() if is_kernel(path, leaf))
    first, last = nonzero(masks), nonzero(masks) if given else round(config.final_density * size)
    if last < first:
        raise ValueError(
            f"final_density={config.final_density} is a budget of {last} connections, below the {first} that exist."
        )
    params = _first_params(jax.random.fold_in(key, 1), masks, units, x)
    labels = jax.tree.map(lambda _: "scaffold", params)
    rule = rule or rewiring_rule(config, total, chunk)
    tx = make_tx(config, total, masks, rule)
    carry = Carry(params, jax.jit(tx.init)(params), first_stats(params, units))
    nothing = History(np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    before = Structure(units, masks, {layer: jnp.zeros(units.group(layer).size) for layer in units.layers[:-1]})
    program = make_program(tx, units)
    cost = cost_of(params, units, masks, config.batch_size)
    return Run(
        config, data, total, chunk, first, last, units, labels, program, carry, Host(), nothing, before, cost, rule
    )


# Jitted as a whole: op by op, every shape would be compiled many times.
@functools.partial(jax.jit, static_argnames=("units", "density"))
def _first_masks(key: jax.Array, units: Units, density: float) -> PyTree:
    return random_masks(key, params_like(units), density)


@functools.partial(jax.jit, static_argnames="units")
def _first_params(key: jax.Array, masks: PyTree, units: Units, x: jax.Array) -> Params:
    return init_params(key, params_like(units), masks, units, x)


def cost_of(params: Params, units: Units, masks: PyTree, batch_size: int) -> Cost:
    """Connections and FLOPs of one step of a structure."""
    return Cost(
        nonzero(masks), flops_per_step(params, units, batch_size), flops_per_step(params, units, batch_size, masks)
    )


def save(run: Run, folder: Path, note: Mapping[str, Any]) -> None:
    """Write a checkpoint of the whole run, with ``note`` beside it."""
    checkpoint.save(folder, run.host.step, _arrays(run), {
        "config": run.config.to_json(),
        "data": _data_record(run.data),
        "units": checkpoint.units_to_json(run.units),
        "labels": leaves_by_path(run.labels),
        "before_units": checkpoint.units_to_json(run.before.units),
        "counts": [run.start_count, run.final_count],
        "has_best": run.best is not None,
        "host": dataclasses.asdict(run.host),
        "note": dict(note),
    })  # fmt: skip


def resume(config: Config, data: Data, folder: Path, rule: Rewiring | None = None) -> Run:
    """Take a run up from its newest usable checkpoint: the old structure is built from JSON, then filled.

    ``rule`` is the one that it was started with.

    Raises:
      CheckpointError: for other data, another configuration or another architecture, naming what differs.
    """
    arrays, state = checkpoint.load(folder)
    refuse_other_options(folder, state["config"], config.to_json())
    record = _data_record(data)
    for name, value in record.items():
        if state["data"].get(name) != value:
            raise CheckpointError(
                f"{folder} was made with other data: its {name} is {state['data'].get(name)!r}, that of "
                f"{data.name!r} is {value!r}. Resume with the data it was started with."
            )
    total, chunk = lengths(config, len(data.x_train))
    units = checkpoint.units_from_json(state["units"])
    if (units.groups[0].size, units.groups[-1].size) != (data.x_train.shape[1], data.classes):
        raise CheckpointError(
            f"{folder} is from another architecture: {units.groups[0].size} inputs, {units.groups[-1].size} classes."
        )
    params = params_like(units)
    if list(state["labels"]) != list(leaves_by_path(params)):
        raise CheckpointError(f"{folder} is from another architecture: its leaves are {list(state['labels'])}.")
    labels = map_with_path(lambda path, _: state["labels"][path], params)
    masks = _masks_like(params)
    rule = rule or rewiring_rule(config, total, chunk)
    tx = make_tx(config, total, masks, rule)
    before_units = checkpoint.units_from_json(state["before_units"])
    before = Structure(
        before_units,
        _masks_like(params_like(before_units)),
        {layer: jnp.zeros(before_units.group(layer).size) for layer in before_units.layers[:-1]},
    )
    host = Host(**state["host"])
    steps = np.zeros(host.step)
    first, last = state["counts"]
    nothing = History(steps.astype(np.float32), steps.astype(np.float32), steps.astype(np.int32))
    carry = Carry(params, jax.eval_shape(tx.init, params), first_stats(params, units))
    best = {"params": params, "masks": masks} if state["has_best"] else None
    program = make_program(tx, units)
    run = Run(
        config, data, total, chunk, first, last, units, labels, program, carry, host, nothing, before,
        Cost(0, 0.0, 0.0), rule, best,
    )  # fmt: skip
    filled = checkpoint.fill(_arrays(run), arrays)
    run.carry, run.best = filled["carry"], filled["best"]
    run.before = before._replace(**filled["before"])
    run.history = History(*map(np.asarray, filled["history"]))
    run.cost = cost_of(run.carry.params, units, run.masks, config.batch_size)
    return run


def refuse_other_options(folder: Path, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError``, naming them, where options differ from those that a checkpoint was made with."""
    differing = [
        f"{name}={stored.get(name)!r} (now {asked[name]!r})" for name in asked if stored.get(name) != asked[name]
    ]
    if differing:
        raise CheckpointError(
            f"{folder} was made with {', '.join(differing)}. Resume with the options it was started with, or start "
            "another run with another --out."
        )


def fresh_folder(folder: Path) -> None:
    """Remove the checkpoints of an earlier run, so that a later resume cannot take them for this one's."""
    shutil.rmtree(folder, ignore_errors=True)


def _arrays(run: Run) -> dict[str, PyTree]:
    return {
        "carry": run.carry,
        "history": run.history,
        "before": {"masks": run.before.masks, "active": run.before.active},
        "best": run.best,
    }


def _masks_like(params: Params) -> PyTree:
    return map_with_path(
        lambda path, leaf: jnp.zeros(leaf.shape, bool) if is_kernel(path, leaf) else jnp.asarray(True), params
    )


def _data_record(data: Data) -> dict[str, Any]:
    return {"fingerprint": data.fingerprint, "preprocessing": data.preprocessing, "classes": data.classes}
