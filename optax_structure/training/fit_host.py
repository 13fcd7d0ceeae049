"""The host's side of ``fit``: how an epoch is cut into dispatches, and what happens between two of them."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np

from optax_structure._tree import Params
from optax_structure.training.fit_step import Carry
from optax_structure.training.loop import Progress

Event = Callable[[int], bool] | Collection[int]
Watch = Callable[[int, np.ndarray, np.ndarray], None]


def chunk_lengths(steps: int, most: int) -> list[int]:
    """How many steps each dispatch of an epoch does: all alike where a number from ``most / 4`` to ``most`` divides it.

    Args:
      steps: of an epoch, at least 1.
      most: of a dispatch, at least 1.

    Returns:
      Lengths that sum to ``steps``, at most two different ones: each compiles once.

    Example:
      >>> from optax_structure.training.fit_host import chunk_lengths
      >>> chunk_lengths(60, 50), chunk_lengths(101, 50), chunk_lengths(7, 50)
      ([30, 30], [50, 50, 1], [7])
    """
    alike = [length for length in range(min(steps, most), max(1, most // 4) - 1, -1) if steps % length == 0]
    length = alike[0] if alike else min(steps, most)
    return [length] * (steps // length) + ([steps % length] if steps % length else [])


def happens(event: Event | None, step: int, steps: int) -> np.ndarray | None:
    """Whether an event falls on each of ``steps`` updates from number ``step`` on, bool ``(steps,)``.

    Example:
      >>> from optax_structure.training.fit_host import happens
      >>> happens({3, 7}, 2, 3).tolist(), happens(lambda step: step % 2 == 0, 2, 3).tolist(), happens(None, 2, 3)
      ([False, True, False], [True, False, True], None)
    """
    if event is None:
        return None
    at = event if callable(event) else event.__contains__
    return np.array([bool(at(now)) for now in range(step, step + steps)])


def run_epoch(
    dispatch: Callable[[Carry, int, int], tuple[Carry, Any]],
    carry: Carry,
    step: int,
    lengths: Sequence[int],
    watch: Watch,
) -> tuple[Carry, np.ndarray, np.ndarray]:
    """The dispatches of an epoch, and losses and accuracies of their steps; ends early where a loss is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_structure.training.fit_host import run_epoch
      >>> def dispatch(carry, step, steps):
      ...     return carry, (jnp.arange(step, step + steps), jnp.ones(steps))
      >>> seen = []
      >>> _, losses, _ = run_epoch(dispatch, None, 4, [2, 1], lambda step, losses, accuracies: seen.append(step))
      >>> losses.tolist(), seen
      ([4, 5, 6], [6, 7])
    """
    running: Any = None
    done: list[tuple[np.ndarray, np.ndarray]] = []
    for steps in lengths:
        carry, out = dispatch(carry, step, steps)
        if running is not None:
            # Read while the next dispatch runs, so that the device never waits for the host.
            done.append(jax.device_get(running))
            watch(step, *done[-1])
            if not np.isfinite(done[-1][0]).all():
                break
        running, step = out, step + steps
    else:
        done.append(jax.device_get(running))
        watch(step, *done[-1])
    losses, accuracies = map(np.concatenate, zip(*done, strict=True))
    return carry, losses, accuracies


def is_true(answer: Any) -> bool:
    """Whether a callback's answer is a bool, of Python, NumPy or JAX, and true; what is no bool asks for nothing.

    Example:
      >>> import numpy as np
      >>> from optax_structure.training.fit_host import is_true
      >>> [is_true(answer) for answer in (True, np.float32(0.9) > 0.8, None, 1)]
      [True, True, False, False]
    """
    return (isinstance(answer, bool) or getattr(answer, "dtype", None) == np.bool_) and bool(answer)


@contextlib.contextmanager
def progress_bar(wanted: bool, total: int, params: Params) -> Iterator[Callable[..., None]]:
    """A bar as that of the main job, moved by ``show(validation accuracy, step, losses, accuracies)``.

    Without rich, or where it is not wanted, ``show`` does nothing.

    Example:
      >>> from optax_structure.training.fit_host import progress_bar
      >>> with progress_bar(False, 10, {}) as show:
      ...     show(None, 1, [], [])
    """
    if not wanted or importlib.util.find_spec("rich") is None:
        yield lambda validated, step, losses, accuracies: None
        return
    from rich.console import Console

    from optax_structure.training.console import progress_bars

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    with progress_bars(Console(), "fit") as watch:

        def show(validated: float | None, step: int, losses: np.ndarray, accuracies: np.ndarray) -> None:
            now = Progress(step, total, float(losses.mean()), float(accuracies.mean()), validated, count)
            watch(now, cast(Any, None))  # there is no Run here, and the bar reads none

        yield show
