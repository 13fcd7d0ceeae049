"""Train dense, prune gradually inside the step, compare: the main job run the other way, with the same loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from optax_structure.accounting import count
from optax_structure.sparsity.masks import full_masks, random_masks
from optax_structure.training import checkpoint
from optax_structure.training.data import Data
from optax_structure.training.loop import Progress, Result, Run, run_growth
from optax_structure.training.network import apply_fn, chain, params_like
from optax_structure.training.prune_config import PruneConfig
from optax_structure.training.report import make_report
from optax_structure.training.run_state import Structure, refuse_other_options
from optax_structure.transforms.rewiring.rules import Rewiring


def run_pruning(
    config: PruneConfig,
    data: Data,
    *,
    folder: Path | None = None,
    resuming: bool = False,
    note: Mapping[str, Any] | None = None,
    watch: Callable[[Progress, Run], None] = lambda progress, run: None,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Train a dense network, prune it while it trains to exactly ``config.final_density``, and test it once.

    Args:
      config: what to do.
      data: with what.
      folder, resuming, note, watch, stop: as for ``run_growth``.

    Returns:
      ``Result``.

    Raises:
      ValueError: where the training is too short for the schedule; and what ``run_growth`` raises.

    Example:
      >>> from optax_structure.training import load_data
      >>> from optax_structure.training.prune import PruneConfig, prune_report, run_pruning
      >>> config = PruneConfig(widths=(8,), final_density=0.25, epochs=1)
      >>> result = run_pruning(config, load_data("digits"))
      >>> result.final["nonzero"] == round(0.25 * (64 * 8 + 8 * 10)), result.final["retraces"]
      (True, 0)
      >>> final = prune_report(config, result)["final"]
      >>> final["forward_flops"], final["forward_flops_if_sparsity_were_free"]    # 2 * 592, 2 * 148
      (1184, 296)

    References:
      Zhu and Gupta, To prune, or not to prune, 2017.
    """
    if resuming and folder is not None and checkpoint.exists(folder):
        refuse_other_options(folder, checkpoint.load(folder)[1]["note"].get("config", {}), config.to_json())
    return run_growth(
        config.dense(), data, folder=folder, resuming=resuming, given=_full(config, data),
        rule=config.rule(len(data.x_train)), note={**(note or {}), "config": config.to_json()}, watch=watch, stop=stop,
    )  # fmt: skip


def _full(config: PruneConfig, data: Data) -> Structure:
    units = chain([data.x_train.shape[1], *config.widths, data.classes])
    return Structure(units, full_masks(params_like(units)), {})


def run_prune_controls(
    config: PruneConfig,
    result: Result,
    *,
    only: Collection[str] | None = None,
    watching: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(lambda progress, run: None),
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Result]:
    """What a pruned network is to be measured against: same seed, data and steps.

    - ``dense``: never pruned.
    - ``random_pruning``: the same schedule, what goes is drawn; left out where the run itself draws.
    - ``final_masks``: the connections that were left, from the first step on. They start with the random numbers that
      they had in the dense network, scaled to the number of inputs that each unit has now (but for that scale, a
      lottery ticket).
    - ``random_masks``: as many connections, drawn, from the first step on, divided among the kernels as asked (ERK for
      ``global``).

    Args:
      config: of the pruned network.
      result: the pruned network.
      only: names of the controls to run; all without it.
      watching: name -> context manager that yields a watcher for ``run_growth``.
      stop: as for ``run_growth``.

    Returns:
      name -> result; ``prune_report(config, result, controls)`` is what they are compared in.

    References:
      Frankle and Carbin, The lottery ticket hypothesis, 2019.
    """
    data, full = result.run.data, _full(config, result.run.data)
    drawn = dataclasses.replace(config, by="random")
    arms: dict[str, tuple[Structure, Rewiring | None]] = {
        "dense": (full, None),
        "random_pruning": (full, drawn.rule(len(data.x_train))),
        "final_masks": (full._replace(masks=result.masks), None),
        "random_masks": (full._replace(masks=_random(config, result)), None),
    }
    controls = {}
    for name, (given, rule) in arms.items():
        if (only is not None and name not in only) or (name == "random_pruning" and drawn == config):
            continue
        with watching(name.replace("_", " ")) as watch:
            controls[name] = run_growth(config.dense(), data, given=given, rule=rule, watch=watch, stop=stop)
    return controls


def _random(config: PruneConfig, result: Result) -> Any:
    units = sum(group.size for group in result.units.groups[1:])
    return random_masks(
        jax.random.fold_in(jax.random.key(config.seed), 3),
        result.params,
        config.final_density,
        distribution="erk" if config.distribution == "global" else config.distribution,
        min_fan_in=int(result.final["nonzero"] >= units),
    )


def prune_report(config: PruneConfig, result: Result, controls: Mapping[str, Result] | None = None) -> dict[str, Any]:
    """The report of a pruning run and its controls, as ``report.json`` holds it.

    As ``make_report``, with ``"events": [{"step", "nonzero_before", "nonzero_after"}]``, one a pruning, and beside the
    FLOPs of the training those of one row, ``"forward_flops"`` and ``"forward_flops_if_sparsity_were_free"``, in
    ``"final"`` and in every control.

    Args:
      config: of the run.
      result: the pruned network.
      controls: name -> result.

    Returns:
      A dict that JSON can hold.

    Example: in ``run_pruning``.
    """
    kept = [*result.run.history.nonzero.tolist(), result.final["nonzero"]]
    told = ("test_accuracy", "nonzero", "train_flops", "train_flops_if_sparsity_were_free")
    return {
        **make_report(result),
        "config": config.to_json(),
        "events": [
            {"step": int(step), "nonzero_before": kept[step - 1], "nonzero_after": kept[step]}
            for step in np.flatnonzero(np.diff(kept)) + 1
        ],
        "final": result.final | _forward(result),
        "controls": {
            name: {key: control.final[key] for key in told} | _forward(control)
            for name, control in (controls or {}).items()
        },
    }


def _forward(result: Result) -> dict[str, int]:
    total = count(apply_fn(result.units), result.params, result.masks, result.run.data.x_test[:1]).total
    return {"forward_flops": total.forward_flops, "forward_flops_if_sparsity_were_free": total.free_forward_flops}
