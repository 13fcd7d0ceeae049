"""The command ``optax-structure``: its options, its errors, what it prints and writes."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, get_args

from optax_structure.training import Config, Interrupted, NonFiniteLoss, Run, checkpoint, load_data
from optax_structure.training.config import EPOCHS, MIN_STEPS, Action, OnGrowth, Placement, Rewire, Strategy
from optax_structure.training.data import DATASETS, Data
from optax_structure.training.prune_config import By, Distribution, PruneConfig
from optax_structure.training.report import write_report

_GROW = """\
Train a sparse network and let it grow.

It starts with --density of the weights that the dense network would have. At every growth event it looks at what its
units did in the last training steps (which never fire, which fire far above their layer), adds capacity, and goes on
training with the optimizer state carried over. Between events the weakest connections are moved elsewhere (--prune).
It ends with exactly --final-density of the INITIAL network's weights, whatever was widened or inserted on the way.
"""

_GROW_EXAMPLES = """\
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

_PRUNE = """\
Train a dense network and prune it while it trains.

It starts with every weight. Between --start and --stop the weakest connections go, inside the compiled step, fast at
first (a cubic), and training goes on with what is left: exactly --final-density of the weights. --controls trains
beside it, with the same seed and steps, the dense network that is never pruned, one that loses connections drawn at
random, the connections that were left from the first step on, and as many drawn at random from the first step on.
"""

_PRUNE_EXAMPLES = """\
examples:
  optax-structure prune
      scikit-learn's digits, no network needed
  optax-structure prune --data-dir mnist --widths 256,128 --final-density 0.02 --controls
      MNIST from IDX files, down to 2 percent of the weights, beside its controls
  optax-structure prune --by saliency --distribution global --out pruned
  optax-structure prune --resume --out pruned
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


_SHOWN = {"epochs": f"{EPOCHS}, and at least {MIN_STEPS:,} steps", "rewire": "between dispatches, put by --placement"}
_DATA_DIR = "IDX files in the MNIST naming, gzipped or not, or a .npz file with x_train, y_train, x_test, y_test"
# Group, flag, field of the configuration, type, shape in the help, text.
_Option = tuple[str, str, str, Callable[[str], Any], str, str]
_WIDTHS: _Option = ("network", "--widths", "widths", _numbers, "N,N,...", "units of the hidden layers")
_EPOCHS: _Option = ("training", "--epochs", "epochs", int, "N", "passes over the training data")
_TRAINING: tuple[_Option, ...] = (
    ("training", "--batch-size", "batch_size", int, "N", "rows a step"),
    ("training", "--learning-rate", "learning_rate", float, "RATE", "peak of the cosine"),
    ("training", "--weight-decay", "weight_decay", float, "RATE", "decoupled weight decay, times the learning rate"),
    ("training", "--seed", "seed", int, "N", "of everything but the validation split"),
)  # fmt: skip
_GROW_OPTIONS: tuple[_Option, ...] = (
    _WIDTHS,
    ("network", "--density", "density", float, "SHARE", "share of the weights that exist at the start, in (0, 1]"),
    ("network", "--final-density", "final_density", float, "SHARE", "share that exists at the end: a hard budget"),
    ("growth", "--events", "events", int, "N", "growth events, spread over the first 30 %% of the training"),
    ("growth", "--action", "actions", _words, "A,A,...", f"what they add, in turn; any of {_listed(Action)}"),
    ("growth", "--placement", "placement", str, "NAME", f"where: {_listed(Placement)}"),
    ("growth", "--prune", "prune", float, "SHARE", "share of the connections, the weakest, that each rewiring moves"),
    ("growth", "--rewire", "rewire", str, "NAME", f"rule that moves them inside the step: {_listed(Rewire)}; the share "
     "then falls to 0"),
    ("growth", "--strategy", "strategy", str, "NAME", f"rates: {_listed(Strategy)}; dual: the scaffold slower"),
    ("growth", "--on-growth", "on_growth", str, "NAME", f"the scaffold just after an event: {_listed(OnGrowth)}"),
    _EPOCHS,
    ("training", "--patience", "patience", int, "N", "epochs without a better validation that end the run; 0: never"),
    *_TRAINING,
)  # fmt: skip
_PRUNE_OPTIONS: tuple[_Option, ...] = (
    _WIDTHS,
    ("network", "--final-density", "final_density", float, "SHARE", "share of the weights that is left, in (0, 1)"),
    ("pruning", "--by", "by", str, "NAME", f"what goes, the least first: {_listed(By)}"),
    ("pruning", "--distribution", "distribution", str, "NAME", f"among kernels: {_listed(Distribution)} (all compete)"),
    ("pruning", "--start", "start", float, "SHARE", "share of the training before pruning begins"),
    ("pruning", "--stop", "stop", float, "SHARE", "share of the training after which nothing goes any more"),
    ("pruning", "--events", "events", int, "N", "prunings at most, evenly spread from --start to --stop"),
    _EPOCHS,
    *_TRAINING,
)  # fmt: skip
_SWITCHES = {
    "--resume": "go on from the checkpoint in --out; options that are not given are the stored ones",
    "--controls": "also run what the result is to be measured against, with the same seed and budget",
    "--debug": "show the whole traceback of an error",
}


class _Command(NamedTuple):
    config: type[Config] | type[PruneConfig]
    out: str
    summary: str
    description: str
    examples: str
    options: tuple[_Option, ...]


_COMMANDS = {
    "grow": _Command(
        Config, "grown", "train a sparse network and let it grow", _GROW, _GROW_EXAMPLES, _GROW_OPTIONS
    ),
    "prune": _Command(
        PruneConfig, "pruned", "train a dense network and prune it", _PRUNE, _PRUNE_EXAMPLES, _PRUNE_OPTIONS
    ),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``optax-structure``. Options that were not given are absent from what it returns.

    Example:
      >>> from optax_structure.cli import build_parser
      >>> vars(build_parser().parse_args(["grow", "--widths", "64,32"]))["widths"]
      (64, 32)
    """
    parser = argparse.ArgumentParser(
        prog="optax-structure", description="Networks that grow or are pruned while they train."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        _add_options(
            commands.add_parser(
                name,
                usage=f"optax-structure {name} [options]",
                help=command.summary,
                description=command.description,
                epilog=command.examples,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                argument_default=argparse.SUPPRESS,
            ),
            command,
        )
    return parser


def _add_options(parser: argparse.ArgumentParser, command: _Command) -> None:
    titles = dict.fromkeys(["data", *(group for group, *_ in command.options), "output"])
    groups = {title: parser.add_argument_group(title) for title in titles}
    defaults = command.config()
    for group, flag, field, kind, shape, text in command.options:
        shown = getattr(defaults, field)
        shown = ",".join(map(str, shown)) if isinstance(shown, tuple) else _SHOWN.get(field, shown)
        groups[group].add_argument(flag, dest=field, type=kind, metavar=shape, help=f"{text} (default: {shown})")
    data, output = groups["data"], groups["output"]
    data.add_argument("--dataset", metavar="NAME", help=f"one of {', '.join(DATASETS)} (default: digits)")
    data.add_argument("--data-dir", metavar="DIR", help=_DATA_DIR)
    data.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept (default: ~/.cache/optax_structure)")
    output.add_argument("--out", metavar="DIR", help=f"folder for everything that is written (default: {command.out})")
    for flag, text in _SWITCHES.items():
        output.add_argument(flag, action="store_true", help=text)


def _require(command: str, needs_sklearn: bool) -> None:
    wanted = ["rich", "matplotlib"] + ["sklearn"] * needs_sklearn
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'optax-structure {command} needs {", ".join(missing)}: pip install "optax-structure[train]"'
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
    name = options["command"]
    out = Path(options.get("out", _COMMANDS[name].out))
    try:
        return _start(name, out, options)
    except Interrupted as error:
        print(f"\n{error} Go on with: optax-structure {name} --resume --out {out}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError, NonFiniteLoss) as error:
        if options.get("debug"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _start(name: str, out: Path, options: dict[str, Any]) -> int:
    kind, folder, asked = _COMMANDS[name].config, out / "checkpoint", out / "run.json"
    resuming = "resume" in options and checkpoint.exists(folder)
    fields = {field: value for field, value in options.items() if field in kind.__dataclass_fields__}
    source = {field: options[field] for field in ("dataset", "data_dir") if field in options}
    if len(source) > 1:
        raise ValueError(f"--dataset {source['dataset']} and --data-dir {source['data_dir']}: give one of them.")
    if "resume" in options and (resuming or asked.exists()):
        # Killed before its first checkpoint, a run starts again: as it was asked for, not with the defaults.
        stored = checkpoint.load(folder)[1] if resuming else json.loads(asked.read_text())
        made_by = stored["note"].get("command", "grow")
        if made_by != name:
            raise ValueError(f"{out} holds a run of optax-structure {made_by}: resume it so, or give another --out.")
        # What is given again must agree; ``resume`` compares and names what does not.
        fields = {**stored["note"].get("config", stored["config"]), **fields}
        source = source or stored["note"]["source"]
    config = kind.from_json({field: list(v) if isinstance(v, tuple) else v for field, v in fields.items()})
    _require(name, needs_sklearn="data_dir" not in source)
    data = load_data(**source, cache_dir=options.get("cache_dir"))
    out.mkdir(parents=True, exist_ok=True)
    if "resume" in options and not resuming:
        print(f"{folder} holds no checkpoint: the run starts from the beginning.", file=sys.stderr)
    absolute = {"data_dir": str(Path(source["data_dir"]).resolve())} if "data_dir" in source else source
    note = {"source": absolute, "command": name}
    write_report(asked, {"config": config.to_json(), "note": note})
    return _run(config, data, out, note, resuming, "controls" in options)


def _run(
    config: Config | PruneConfig, data: Data, out: Path, note: dict[str, Any], resuming: bool, with_controls: bool
) -> int:
    from rich.console import Console

    from optax_structure.training import plots
    from optax_structure.training.console import final_table, progress_bars
    from optax_structure.training.controls import run_controls
    from optax_structure.training.loop import Progress, run_growth
    from optax_structure.training.prune import prune_report, run_prune_controls, run_pruning
    from optax_structure.training.report import make_report, write_metrics

    if isinstance(config, PruneConfig):
        network, train = "pruned", partial(run_pruning, config, data)
        report_of, train_controls = partial(prune_report, config), partial(run_prune_controls, config)
    else:
        network, train = "grown", partial(run_growth, config, data)
        report_of, train_controls = make_report, partial(run_controls, data=data)
    console = Console()
    latest: list[Run] = []
    with _stop_on_interrupt() as stop:
        try:
            with progress_bars(console, f"{note['command']} {config.seed}") as watch:

                def keep(progress: Progress, run: Run) -> None:
                    latest[:] = [run]
                    watch(progress, run)

                result = train(folder=out / "checkpoint", resuming=resuming, note=note, watch=keep, stop=stop)
        finally:
            if latest:
                write_metrics(out / "metrics.csv", latest[0])
        write_metrics(out / "metrics.csv", result.run)
        write_report(out / "report.json", report_of(result))
        plots.curves(result, out / "curves.png")
        plots.structure(result, out / "structure.png")
        controls = {}
        if with_controls:
            controls = train_controls(result, watching=lambda name: progress_bars(console, name), stop=stop)
    report = report_of(result, controls)
    write_report(out / "report.json", report)
    console.print(final_table(report, network))
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
