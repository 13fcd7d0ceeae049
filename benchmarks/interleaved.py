"""How every benchmark here measures: all arms in one process, in turn, the first one twice.

A round runs every arm once, in an order that rotates, and blocks on the result. What is reported is the median over
the rounds of the ratio to the first arm *of the same round*, so that a machine whose speed drifts drifts for all. The
first arm stands a second time as the A/A control: its ratio to itself says what the noise is worth.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

CONTROL = "A/A control"


def parser(doc: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=rounds, help="rounds over all arms (default: %(default)s)")
    options.add_argument("--out", type=Path, help="write the result as JSON to this file")
    return options


def measure(arms: dict[str, Callable[[], Any]], rounds: int, repeats: int = 1) -> dict[str, np.ndarray]:
    """Seconds a call of every arm in every round; ``repeats`` calls are timed as one and divided."""
    first = next(iter(arms))
    arms = {**arms, CONTROL: arms[first]}
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        jax.block_until_ready(arms[name]())
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for _ in range(repeats):
                result = arms[name]()
            jax.block_until_ready(result)
            times[name].append((time.perf_counter() - start) / repeats)
    return {name: np.array(seconds) for name, seconds in times.items()}


def report(question: str, times: dict[str, np.ndarray], out: Path | None, **more: Any) -> dict[str, Any]:
    """Print the figures and write them to ``out``."""
    base = next(iter(times.values()))
    result = {
        "question": question,
        "platform": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "jax": jax.__version__,
        "rounds": len(base),
        "median_ms": {name: round(float(np.median(seconds) * 1e3), 4) for name, seconds in times.items()},
        "min_ms": {name: round(float(np.min(seconds) * 1e3), 4) for name, seconds in times.items()},
        "median_ratio": {name: round(float(np.median(seconds / base)), 4) for name, seconds in times.items()},
        **more,
    }
    print(json.dumps(result, indent=2))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    return result
