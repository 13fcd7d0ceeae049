"""The main job on MNIST over several seeds, with every control and placement: the table of the README.

Each seed is one process, ``optax-structure grow --controls``, into ``OUT/seed-N``; a seed whose report is there already
is not run again. The table gives mean and standard deviation of the test accuracy over the seeds, and of the paired
difference to the grown network: positive where the grown network is better.

    python benchmarks/grow_mnist.py --data-dir DIR --out benchmarks/results/mnist --jobs 2
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NETWORK = ("--widths", "256,128", "--density", "0.02", "--final-density", "0.05")


def run(seed: int, data_dir: Path, out: Path) -> dict[str, Any]:
    """The report of one seed."""
    folder = out / f"seed-{seed}"
    report = folder / "report.json"
    if not (report.exists() and json.loads(report.read_text())["controls"]):
        command = ["grow", "--data-dir", str(data_dir), *NETWORK, "--seed", str(seed), "--controls"]
        subprocess.run(
            [sys.executable, "-m", "optax_structure", *command, "--out", str(folder)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return json.loads(report.read_text())


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation, in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * deviation:.2f}"


def table(reports: Sequence[dict[str, Any]]) -> str:
    """The markdown table, best mean first."""
    grown = [report["final"] for report in reports]
    rows = {f"grown ({reports[0]['config']['placement']} placement)": grown}
    for name in reports[0]["controls"]:
        rows[name.replace("_", " ")] = [report["controls"][name] for report in reports]
    lines = ["| network | test accuracy, % | grown minus this | non-zero weights |", "|---|---|---|---|"]
    for name, finals in sorted(rows.items(), key=lambda row: -statistics.mean(f["test_accuracy"] for f in row[1])):
        accuracies = [final["test_accuracy"] for final in finals]
        paired = [mine["test_accuracy"] - theirs for mine, theirs in zip(grown, accuracies, strict=True)]
        difference = "" if finals is grown else spread(paired)
        lines.append(f"| {name} | {spread(accuracies)} | {difference} | {finals[0]['nonzero']:,} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the table and write everything as JSON."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data-dir", type=Path, required=True, help="folder of the four IDX files")
    options.add_argument("--out", type=Path, required=True, help="folder for the runs and the table")
    options.add_argument("--seeds", type=int, default=5, help="seeds 0..N-1 (default: %(default)s)")
    options.add_argument("--jobs", type=int, default=1, help="seeds at a time (default: %(default)s)")
    args = options.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        reports = list(pool.map(lambda seed: run(seed, args.data_dir, args.out), range(args.seeds)))
    text = table(reports)
    print(text)
    (args.out / "table.md").write_text(text + "\n")
    (args.out / "reports.json").write_text(json.dumps(reports, indent=2) + "\n")


if __name__ == "__main__":
    main()
