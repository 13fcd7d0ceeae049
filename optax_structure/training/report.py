"""What a finished run leaves: ``report.json`` and ``metrics.csv``."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optax_structure.training.loop import Result, Run


def make_report(result: Result, controls: Mapping[str, Result] | None = None) -> dict[str, Any]:
    """The report of a run and its controls, as ``report.json`` holds it.

    ``{"dataset", "seed", "config", "events": [{"step", "action", "placement", "dead", "saturated", "nonzero_before",
    "nonzero_after", "validation_accuracy_before", "validation_accuracy_after"}], "final": {"test_accuracy",
    "validation_accuracy", "nonzero", "biases", "density", "train_flops", "train_flops_if_sparsity_were_free",
    "wall_s", "retraces"}, "controls": {name: {"test_accuracy", "nonzero"}}}``. Accuracies are in 0..1; ``nonzero``
    counts connections (kernel entries in the mask); ``density`` is of the final shape.

    Args:
      result: of the grown network.
      controls: name -> result.

    Returns:
      A dict that JSON can hold.

    Example:
      >>> from optax_structure.training import Config, load_data, run_growth
      >>> from optax_structure.training.report import make_report
      >>> config = Config(widths=(8,), epochs=1, events=0, density=0.3, final_density=0.3, prune=0.0)
      >>> sorted(make_report(run_growth(config, load_data("digits"))))
      ['config', 'controls', 'dataset', 'events', 'final', 'seed']
    """
    return {
        "dataset": result.run.data.name,
        "seed": result.run.config.seed,
        "config": result.run.config.to_json(),
        "events": result.events,
        "final": result.final,
        "controls": {
            name: {key: control.final[key] for key in ("test_accuracy", "nonzero")}
            for name, control in (controls or {}).items()
        },
    }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report as JSON, whole or not at all.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from optax_structure.training.report import write_report
      >>> path = Path(tempfile.mkdtemp()) / "report.json"
      >>> write_report(path, {"seed": 0}); path.read_text().split()
      ['{', '"seed":', '0', '}']
    """
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(partial, path)


def write_metrics(path: Path, run: Run) -> None:
    """Write ``metrics.csv``: a row a step, with every digit of the float32 values.

    Columns ``step, loss, accuracy, nonzero, validation_accuracy``; the last is empty but after validations.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> from optax_structure.training import Config, load_data, run_growth
      >>> from optax_structure.training.report import write_metrics
      >>> config = Config(widths=(8,), epochs=1, events=0, density=0.3, final_density=0.3, prune=0.0)
      >>> path = Path(tempfile.mkdtemp()) / "metrics.csv"
      >>> write_metrics(path, run_growth(config, load_data("digits")).run)
      >>> len(path.read_text().splitlines()), path.read_text().split()[0]
      (11, 'step,loss,accuracy,nonzero,validation_accuracy')
    """
    validations = {int(step): accuracy for step, accuracy in run.host.validations}
    partial = path.with_suffix(".partial")
    with open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "loss", "accuracy", "nonzero", "validation_accuracy"))
        for step, row in enumerate(zip(*run.history, strict=True), start=1):
            # str() of a float32 is the shortest text that reads back as the same float32.
            writer.writerow((step, *map(str, row), validations.get(step, "")))
    os.replace(partial, path)
