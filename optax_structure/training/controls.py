"""What the grown network is measured against: the same seed, budget and steps, one thing changed at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

from optax_structure.training.config import Config, Placement
from optax_structure.training.data import Data
from optax_structure.training.loop import Result, run_growth
from optax_structure.training.run_state import Structure


def control_configs(config: Config) -> dict[str, Config]:
    """The controls' configurations by name.

    - ``no_growth``: the final number of connections from the first step on, rewired as the grown one.
    - ``starting_density``: the connections of the start, never more.
    - ``no_rewiring``: the same growth, nothing rewired.
    - ``random_placement`` and every other placement but the run's own: the same counts put elsewhere.
    - ``final_structure``: the grown network's final structure, initialised afresh and trained without any change.
    - ``dense``: every connection exists.

    Example:
      >>> from optax_structure.training import Config
      >>> from optax_structure.training.controls import control_configs
      >>> list(control_configs(Config(placement="extrema")))  # doctest: +NORMALIZE_WHITESPACE
      ['no_growth', 'starting_density', 'no_rewiring', 'random_placement', 'gradient_placement', 'final_structure',
       'dense']
    """
    still = config.replace(events=0, density=config.final_density)
    others = [placement for placement in get_args(Placement) if placement != config.placement]
    return {
        "no_growth": still,
        "starting_density": config.replace(events=0, final_density=config.density),
        "no_rewiring": config.replace(prune=0.0),
        **{f"{placement}_placement": config.replace(placement=placement) for placement in others},
        "final_structure": still.replace(prune=0.0),
        "dense": config.replace(events=0, density=1.0, final_density=1.0, prune=0.0),
    }


def run_controls(
    result: Result,
    data: Data,
    *,
    only: Collection[str] | None = None,
    watching: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(lambda progress, run: None),
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Result]:
    """Run every control of a finished run. Where that placed at random already, it is its own random control.

    Args:
      result: the grown network.
      data: what it was trained on.
      only: names of the controls to run; all without it.
      watching: name -> context manager that yields a watcher for ``run_growth``.
      stop: as for ``run_growth``.

    Returns:
      name -> result.

    Example:
      >>> from optax_structure.training import Config, load_data, run_growth
      >>> from optax_structure.training.controls import run_controls
      >>> data = load_data("digits")
      >>> config = Config(widths=(8,), epochs=1, events=0, density=0.3, final_density=0.3, prune=0.0)
      >>> run_controls(run_growth(config, data), data, only=["dense"])["dense"].final["nonzero"]
      592
    """
    config = result.run.config
    controls = {}
    for name, control in control_configs(config).items():
        if only is not None and name not in only:
            continue
        given = Structure(result.units, result.masks, {}) if name == "final_structure" else None
        with watching(name.replace("_", " ")) as watch:
            controls[name] = run_growth(control, data, given=given, watch=watch, stop=stop)
    if config.placement == "random" and (only is None or "random_placement" in only):
        controls["random_placement"] = result
    return controls
