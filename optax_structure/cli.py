"""The command ``optax-structure``: its options, its errors, what it prints and writes."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, get_args

from optax_structure.training import Config, Interrupted, NonFiniteLoss, Run, checkpoint, load_data
from optax_structure.training.config import EPOCHS, MIN_STEPS, Action, OnGrowth, Placement, Strategy
from optax_structure.training.data import DATASETS, Data
from optax_structure.training.report import write_report

_DESCRIPTION = """\
Train a sparse network and let it grow.

It starts with --density of the weights that the dense network would have. At every growth event it looks at what its
units did in the last training steps (which never fire, which fire far above their layer), adds capacity, and goes on
training with the optimizer state carried over. Between events the weakest connections are moved elsewhere (--prune).
It ends with exactly --final-density of the INITIAL network's weights, whatever was widened or inserted on the way.
"""

_EXAMPLES = """\
examples:
  optax-structure grow
      scikit-learn's digits, no network needed, about half a minute
  optax-structure grow --data-dir mnist --widths 256,128 --density 0.02 --final-density 0.05 --controls
      MNIST from IDX files, from 2 to 5 percent of the weights, beside no growth, other placements, dense
  optax-structure grow --action connections,patches,widen,insert --placement extrema --out grown
  optax-structure grow --resume --out grown
      goes on after Ctrl-C or a crash, with the very numbers that the uninterrupted run would have had

written to --out: report.json, metrics.csv, curves.png, structure.png, run.json, checkpoint/
"""


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers with commas between, as 256,128") from None


def _listed(kind: Any) -> str:
    return ", ".join(get_args(kind))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


_DEFAULTS = Config()
_SHOWN = {"epochs": f"{EPOCHS}, and at least {MIN_STEPS:,} steps"}
_DATA_DIR = "IDX files in the MNIST naming, gzipped or not, or a .npz file with x_train, y_train, x_test, y_test"
# Group, flag, field of Config, type, shape in the help, text.
_OPTIONS: tuple[tuple[str, str, str, Callable[[str], Any], str, str], ...] = (
    ("network", "--widths", "widths", _numbers, "N,N,...", "units of the hidden layers"),
    ("network", "--density", "density", float, "SHARE", "share of the weights that exist at the start, in (0, 1]"),
    ("network", "--final-density", "final_density", float, "SHARE", "share that exists at the end: a hard budget"),
    ("growth", "--events", "events", int, "N", "growth events, spread over the first 30 %% of the training"),
    ("growth", "--action", "actions", _words, "A,A,...", f"what they add, in turn; any of {_listed(Action)}"),
    ("growth", "--placement", "placement", str, "NAME", f"where: {_listed(Placement)}"),
    ("growth", "--prune", "prune", float, "SHARE", "share of the connections, the weakest, that each rewiring moves"),
    ("growth", "--strategy", "strategy", str, "NAME", f"rates: {_listed(Strategy)}; dual: the scaffold slower"),
    ("growth", "--on-growth", "on_growth", str, "NAME", f"the scaffold just after an event: {_listed(OnGrowth)}"),
    ("training", "--epochs", "epochs", int, "N", "passes over the training data"),
    ("training", "--patience", "patience", int, "N", "epochs without a better validation that end the run; 0: never"),
    ("training", "--batch-size", "batch_size", int, "N", "rows a step"),
    ("training", "--learning-rate", "learning_rate", float, "RATE", "peak of the cosine"),
    ("training", "--weight-decay", "weight_decay", float, "RATE", "decoupled weight decay, times the learning rate"),
    ("training", "--seed", "seed", int, "N", "of everything but the validation split"),
)  # fmt: skip
_SWITCHES = {
    "--resume": "go on from the checkpoint in --out; options that are not given are the stored ones",
    "--controls": "also run what the result is to be measured against, with the same seed and budget",
    "--debug": "show the whole traceback of an error",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``optax-structure``. Options that were not given are absent from what it returns.

    Example:
      >>> from optax_structure.cli import build_parser
      >>> vars(build_parser().parse_args(["grow", "--widths", "64,32"]))["widths"]
      (64, 32)
    """
    parser = argparse.ArgumentParser(prog="optax-structure", description="Networks that grow while they train.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    grow = commands.add_parser(
        "grow",
        usage="optax-structure grow [options]",
        help="train a sparse network and let it grow",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    groups = {name: grow.add_argument_group(name) for name in ("data", "network", "growth", "training", "output")}
    for group, flag, field, kind, shape, text in _OPTIONS:
        shown = getattr(_DEFAULTS, field)
        shown = ",".join(map(str, shown)) if isinstance(shown, tuple) else _SHOWN.get(field, shown)
        groups[group].add_argument(flag, dest=field, type=kind, metavar=shape, help=f"{text} (default: {shown})")
    data, output = groups["data"], groups["output"]
    data.add_argument("--dataset", metavar="NAME", help=f"one of {', '.join(DATASETS)} (default: digits)")
    data.add_argument("--data-dir", metavar="DIR", help=_DATA_DIR)
    data.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept (default: ~/.cache/optax_structure)")
    output.add_argument("--out", metavar="DIR", help="folder for everything that is written (default: grown)")
    for flag, text in _SWITCHES.items():
        output.add_argument(flag, action="store_true", help=text)
    return parser


def _require(needs_sklearn: bool) -> None:
    wanted = ["rich", "matplotlib"] + ["sklearn"] * needs_sklearn
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'optax-structure grow needs {", ".join(missing)}: pip install "optax-structure[train]"'
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (an error, named), 2 (usage), 130 (stopped by Ctrl-C).

    Args:
      argv: the arguments, without the program's name; those of the process by default.

    Example:
      >>> from optax_structure.cli import main
      >>> main(["grow", "--density", "1.5"])    # prints the error, which names the argument, to stderr
      1
    """
    options = vars(build_parser().parse_args(argv))
    try:
        return _grow(options)
    except Interrupted as error:
        print(
            f"\n{error} Go on with: optax-structure grow --resume --out {options.get('out', 'grown')}", file=sys.stderr
        )
        return 130
    except (ValueError, OSError, ModuleNotFoundError, NonFiniteLoss) as error:
        if options.get("debug"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _grow(options: dict[str, Any]) -> int:
    out = Path(options.get("out", "grown"))
    folder = out / "checkpoint"
    resuming = "resume" in options and checkpoint.exists(folder)
    fields = {name: value for name, value in options.items() if name in Config.__dataclass_fields__}
    source = {name: options[name] for name in ("dataset", "data_dir") if name in options}
    if len(source) > 1:
        raise ValueError(f"--dataset {source['dataset']} and --data-dir {source['data_dir']}: give one of them.")
    asked = out / "run.json"
    if "resume" in options and (resuming or asked.exists()):
        # Killed before its first checkpoint, a run starts again: as it was asked for, not with the defaults.
        stored = checkpoint.load(folder)[1] if resuming else json.loads(asked.read_text())
        # What is given again must agree; ``resume`` compares and names what does not.
        fields = {**stored["config"], **fields}
        source = source or stored["note"]["source"]
    config = Config.from_json({name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()})
    _require(needs_sklearn="data_dir" not in source)
    data = load_data(**source, cache_dir=options.get("cache_dir"))
    out.mkdir(parents=True, exist_ok=True)
    if "resume" in options and not resuming:
        print(f"{folder} holds no checkpoint: the run starts from the beginning.", file=sys.stderr)
    absolute = {"data_dir": str(Path(source["data_dir"]).resolve())} if "data_dir" in source else source
    write_report(asked, {"config": config.to_json(), "note": {"source": absolute}})
    return _run(config, data, out, absolute, resuming, "controls" in options)


def _run(config: Config, data: Data, out: Path, source: dict[str, str], resuming: bool, with_controls: bool) -> int:
    from rich.console import Console

    from optax_structure.training import plots
    from optax_structure.training.console import final_table, progress_bars
    from optax_structure.training.controls import run_controls
    from optax_structure.training.loop import Progress, run_growth
    from optax_structure.training.report import make_report, write_metrics

    console = Console()
    latest: list[Run] = []
    with _stop_on_interrupt() as stop:
        try:
            with progress_bars(console, f"grow {config.seed}") as watch:

                def keep(progress: Progress, run: Run) -> None:
                    latest[:] = [run]
                    watch(progress, run)

                folder, note = out / "checkpoint", {"source": source}
                result = run_growth(config, data, folder=folder, resuming=resuming, note=note, watch=keep, stop=stop)
        finally:
            if latest:
                write_metrics(out / "metrics.csv", latest[0])
        write_metrics(out / "metrics.csv", result.run)
        write_report(out / "report.json", make_report(result))
        plots.curves(result, out / "curves.png")
        plots.structure(result, out / "structure.png")
        controls = {}
        if with_controls:
            controls = run_controls(result, data, watching=lambda name: progress_bars(console, name), stop=stop)
    report = make_report(result, controls)
    write_report(out / "report.json", report)
    console.print(final_table(report))
    final = report["final"]
    console.print(
        f"{final['nonzero']:,} weights ({final['density']:.2%} of the final shape) and {final['biases']:,} biases, "
        f"{final['wall_s']:.1f} s, {final['retraces']} retraces. Pictures and report: {out.resolve()}"
    )
    return 0


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C once: stop after this dispatch, with a checkpoint. Twice: at once."""
    asked: list[bool] = []

    def handler(number: int, frame: FrameType | None) -> None:
        del number, frame
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        print("\nstopping after these steps; Ctrl-C again stops at once", file=sys.stderr)

    old = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, old)
