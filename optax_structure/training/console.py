"""What a run prints: progress bars, a line a growth event, the final tables. Needs rich."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from optax_structure.training.loop import Progress, Run

_VERBS = {
    "connections": "connections added",
    "patches": "dense patches embedded",
    "widen": "a layer widened",
    "insert": "a layer inserted",
}


@contextlib.contextmanager
def progress_bars(console: Console, title: str) -> Iterator[Callable[[Progress, Run], None]]:
    """A bar with loss, accuracies and weights, and a line a growth event: a watcher for ``run_growth``.

    Example:
      >>> import io
      >>> from rich.console import Console
      >>> from optax_structure.training.console import progress_bars
      >>> with progress_bars(Console(file=io.StringIO()), "seed 0") as watch:
      ...     callable(watch)
      True
    """
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:3.0f}%"),
        TextColumn("loss [cyan]{task.fields[loss]}"),
        TextColumn("acc [cyan]{task.fields[accuracy]}"),
        TextColumn("val [green]{task.fields[validation]}"),
        TextColumn("{task.fields[nonzero]} w"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=console, expand=True) as bars:
        task = bars.add_task(title, total=1, loss="-", accuracy="-", validation="-", nonzero="-")

        def watch(progress: Progress, run: Run) -> None:
            del run
            fields: dict[str, Any] = {
                "loss": f"{progress.loss:.4f}",
                "accuracy": f"{progress.accuracy:.1%}",
                "nonzero": f"{progress.nonzero:,}",
            }
            if progress.validation_accuracy is not None:
                fields["validation"] = f"{progress.validation_accuracy:.1%}"
            bars.update(task, completed=progress.step, total=progress.total_steps, **fields)
            if progress.event is not None:
                bars.console.print(event_line(progress.event), soft_wrap=True)

        yield watch


def event_line(event: Mapping[str, Any]) -> str:
    """One growth event in a line: what was dead or saturated, what was added, weights and accuracy before and after.

    Example:
      >>> from optax_structure.training.console import event_line
      >>> line = event_line({"step": 900, "action": "patches", "placement": "random", "dead": 3, "saturated": 1,
      ...     "nonzero_before": 400, "nonzero_after": 500, "validation_accuracy_before": 0.91,
      ...     "validation_accuracy_after": 0.91})
      >>> line.split("  ")[-3:]
      ['3 dead, 1 saturated', 'weights 400 -> 500', 'validation 91.00% -> 91.00%']
    """
    return (
        f"step {event['step']:>6}  grew: {_VERBS[event['action']]} ({event['placement']})  "
        f"{event['dead']} dead, {event['saturated']} saturated  "
        f"weights {event['nonzero_before']:,} -> {event['nonzero_after']:,}  "
        f"validation {event['validation_accuracy_before']:.2%} -> {event['validation_accuracy_after']:.2%}"
    )


_FLOPS = {
    "FLOPs a row": "forward_flops",
    "if free": "forward_flops_if_sparsity_were_free",
    "to train": "train_flops",
    "to train, if free": "train_flops_if_sparsity_were_free",
}


def final_table(report: Mapping[str, Any], network: str = "grown") -> Table:
    """The network and, where they were run, its controls, best test accuracy first; FLOPs where the report has them.

    Example:
      >>> from rich.console import Console
      >>> from optax_structure.training.console import final_table
      >>> report = {"dataset": "digits", "seed": 0, "controls": {"dense": {"test_accuracy": 0.9, "nonzero": 99}},
      ...     "final": {"test_accuracy": 0.95, "nonzero": 10, "wall_s": 3.0}}
      >>> final_table(report).row_count
      2
    """
    table = Table(title=f"{report['dataset']}, seed {report['seed']}", title_justify="left")
    table.add_column("network", no_wrap=True)
    for name in ("test accuracy", "non-zero weights"):
        table.add_column(name, justify="right")
    flops = {title: key for title, key in _FLOPS.items() if "forward_flops" in report["final"]}
    if flops:
        table.caption, table.caption_justify = "if free: if what does not exist cost nothing", "left"
    for name in flops:
        table.add_column(name, justify="right")
    rows = {network: report["final"], **report["controls"]}
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["test_accuracy"]):
        style = "bold green" if name == network else None
        costs = [f"{row[key]:.3g}" if key.startswith("train") else f"{row[key]:,}" for key in flops.values()]
        table.add_row(name.replace("_", " "), f"{row['test_accuracy']:.2%}", f"{row['nonzero']:,}", *costs, style=style)
    return table
