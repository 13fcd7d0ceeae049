"""All presets against plain Adam on MNIST: dense, and at 2 % of the connections.

784-256-128-10, batch 128. Every arm's learning rate is tuned on validation (a part of the training set), with seeds
that are not among those reported, over one grid that is extended while its best is at an edge. Then five paired seeds:
the same first weights, masks and order of batches for all arms. The test set is read once, after the last step.

Hidden layers are labelled ``scaffold``, the head ``new``. Every step passes ``value=``, ``extrema=`` (of running
activation statistics) and ``event=False``; at 2 % ``sparse`` passes ``masks=``. Nothing grows here: this asks whether a
preset costs accuracy where its reason to be is absent. Most presets lower their rates with time and plain Adam does
not, so Adam under a cosine is there too.

    python benchmarks/presets_mnist.py --data-dir DIR --out benchmarks/results/presets

writes ``OUT/dense.json`` and ``OUT/sparse.json`` arm by arm, goes on where it was stopped, and prints both tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_structure as oxs
from optax_structure.structure import Units
from optax_structure.training.data import Data, load_data
from optax_structure.training.network import accuracy_of, chain, flops_per_step, init_params, loss_and_aux, params_like
from optax_structure.training.step import batch_rows, first_stats

PRESETS = (
    "basic",
    "advanced",
    "comprehensive",
    "ultimate",
    "conservative",
    "aggressive",
    "balanced",
    "extrema_focused",
    "fine_tuning",
    "structure_net",
    "transfer_learning",
    "continual_learning",
    "combined",
)
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
BATCH, FIRST_TUNING_SEED = 128, 1000
MakeTx = Callable[[Any], optax.GradientTransformation]


class Lane(NamedTuple):
    """One run: several are trained in one program, stacked along a first axis."""

    params: Any
    masks: Any
    rows: Any
    rate: Any


class Task(NamedTuple):
    """What all arms share."""

    data: Data
    units: Units
    density: float | None
    epochs: int


def arms(task: Task) -> dict[str, MakeTx]:
    """Name -> learning rate -> optimizer."""
    like, steps = params_like(task.units), len(task.data.x_train) // BATCH
    labels = {layer: dict.fromkeys(leaves, "scaffold") for layer, leaves in like.items()}
    labels["head"] = dict.fromkeys(like["head"], "new")
    depths = oxs.layer_depths(like, [f"^{layer}/" for layer in task.units.layers])

    def make(name: str) -> MakeTx:
        units = {"units": task.units} if name in ("ultimate", "extrema_focused") else {}
        preset = getattr(oxs.presets, name)
        return lambda rate: preset(rate, labels, depths=depths, steps_per_epoch=steps, **units)

    return {
        "adam": optax.adam,
        "adam, cosine": lambda rate: optax.adam(optax.cosine_decay_schedule(rate, steps * task.epochs)),
        **{name: make(name) for name in PRESETS},
    }


def program(make: MakeTx, task: Task) -> Callable[[Lane, jax.Array, jax.Array], Any]:
    """Train all lanes: ``(lanes, x, y) -> params``."""

    def train(lane: Lane, x: jax.Array, y: jax.Array) -> Any:
        inner = make(lane.rate)
        tx = optax.with_extra_args_support(inner if task.density is None else oxs.sparse(inner, lane.masks))

        def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
            params, state, stats = carry
            (value, (_, activations)), grads = jax.value_and_grad(loss_and_aux, has_aux=True)(
                params, task.units, x[rows], y[rows]
            )
            stats = oxs.update_activation_stats(stats, jax.lax.stop_gradient(activations))
            extrema = oxs.find_extrema(stats)
            updates, state = tx.update(grads, state, params, value=value, extrema=extrema, event=False)
            return (optax.apply_updates(params, updates), state, stats), None

        carry = (lane.params, tx.init(lane.params), first_stats(lane.params, task.units))
        return jax.lax.scan(step, carry, lane.rows)[0][0]

    return jax.jit(jax.vmap(train, in_axes=(0, None, None)))


def start(seed: int, task: Task) -> Lane:
    """First weights, masks and the order of batches: of the seed alone, so the same for every arm."""
    like, x = params_like(task.units), task.data.x_train
    key_masks, key_params = jax.random.split(jax.random.key(seed))
    masks: Any = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), like)  # the init draws what has a mask
    if task.density is not None:
        masks = oxs.random_masks(key_masks, like, task.density)
    params = init_params(key_params, like, masks, task.units, jnp.asarray(x[:512]))
    rows = batch_rows(seed, 0, task.epochs * (len(x) // BATCH), len(x), BATCH)
    return Lane(params, masks, rows, np.float32(0))


def stacked(lanes: Sequence[Lane]) -> Lane:
    """Lanes as one, along a first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)


def tune(
    run: Callable[[Lane], Any], score: Callable[[Any], np.ndarray], starts: Sequence[Lane], grid: Sequence[float]
) -> dict[float, float]:
    """Rate -> validation accuracy, the mean over the tuning seeds; at most three rates beyond the grid."""
    found: dict[float, float] = {}
    wanted = list(grid)
    while wanted:
        lanes = stacked([lane._replace(rate=np.float32(rate)) for rate in wanted for lane in starts])
        scores = score(run(lanes)).reshape(len(wanted), -1).mean(-1)
        found |= dict(zip(wanted, scores.tolist(), strict=True))
        rates = sorted(found)
        best = max(rates, key=lambda rate: found[rate])
        beyond = {rates[0]: rates[0] / 3, rates[-1]: rates[-1] * 3}
        wanted = [beyond[best]] if best in beyond and len(found) < len(grid) + 3 and len(grid) > 2 else []
    return found


def measure_arm(make: MakeTx, task: Task, grid: Sequence[float], tuning: int, seeds: int) -> dict[str, Any]:
    """Tune, then train the paired seeds and read the test set."""
    began = time.perf_counter()
    data, compiled = task.data, program(make, task)
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)

    def run(lanes: Lane) -> Any:
        return compiled(lanes, x, y)

    def accuracies(params: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(len(params["head"]["bias"]))]
        return np.array([accuracy_of(one, task.units, x, y) for one in each])

    found = tune(
        run,
        lambda params: accuracies(params, data.x_validation, data.y_validation),
        [start(FIRST_TUNING_SEED + i, task) for i in range(tuning)],
        grid,
    )
    rate = max(found, key=lambda rate: found[rate])
    lanes = [start(seed, task)._replace(rate=np.float32(rate)) for seed in range(seeds)]
    params = run(stacked(lanes))
    flops = flops_per_step(lanes[0].params, task.units, BATCH, None if task.density is None else lanes[0].masks)
    kernels = [leaf for leaf in jax.tree.leaves(jax.tree.map(lambda leaf: leaf[0], params)) if leaf.ndim > 1]
    return {
        "rate": rate,
        "tuning": {f"{rate:g}": score for rate, score in sorted(found.items())},
        "validation": accuracies(params, data.x_validation, data.y_validation).tolist(),
        "test": accuracies(params, data.x_test, data.y_test).tolist(),
        "nonzero": int(sum(np.count_nonzero(kernel) for kernel in kernels)),
        "train_flops": flops * task.epochs * (len(data.x_train) // BATCH),
        "seconds": round(time.perf_counter() - began, 1),
    }


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and sample standard deviation, in percent."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):{sign}.2f} ± {100 * deviation:.2f}"


def table(records: dict[str, Any]) -> str:
    """The markdown table, best mean first."""
    lines = [
        "| arm | test accuracy, % | minus plain Adam | tuned rate | non-zero weights | training FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    base = records["adam"]["test"]
    for name, record in sorted(records.items(), key=lambda item: -statistics.mean(item[1]["test"])):
        paired = [mine - theirs for mine, theirs in zip(record["test"], base, strict=True)]
        difference = "" if name == "adam" else spread(paired, "+")
        counts = f"{record['nonzero']:,} | {record['train_flops']:.2e}"
        lines.append(f"| {name} | {spread(record['test'])} | {difference} | {record['rate']:g} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the arms that are missing, write them and print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data-dir", type=Path, help="folder of the four IDX files (default: OpenML's MNIST)")
    options.add_argument("--out", type=Path, help="folder for dense.json and sparse.json")
    options.add_argument("--seeds", type=int, default=5, help="paired seeds (default: %(default)s)")
    options.add_argument("--tuning-seeds", type=int, default=2, help="seeds of the tuning (default: %(default)s)")
    options.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    options.add_argument("--only", choices=("dense", "sparse"), nargs="*", default=("dense", "sparse"))
    options.add_argument(
        "--tiny", action="store_true", help="scikit-learn's digits, one epoch, two rates: a smoke test"
    )
    args = options.parse_args()
    data = load_data("digits") if args.tiny else load_data("mnist", data_dir=args.data_dir)
    sizes, density, epochs = ((64, 32, 16, 10), 0.2, 1) if args.tiny else ((784, 256, 128, 10), 0.02, args.epochs)
    grid = GRID[1:3] if args.tiny else GRID
    for only in args.only:
        task = Task(data, chain(sizes), density if only == "sparse" else None, epochs)
        config = {"seeds": args.seeds, "epochs": epochs, "tuning_seeds": args.tuning_seeds, "density": task.density}
        out = None if args.out is None else args.out / f"{only}.json"
        records: dict[str, Any] = {}
        if out is not None and out.exists():
            stored = json.loads(out.read_text())
            if stored["config"] != config:
                raise SystemExit(f"{out} holds a run with {stored['config']}, not {config}: choose another --out.")
            records = stored["arms"]
        for name, make in arms(task).items():
            if name in records:
                continue
            records[name] = measure_arm(make, task, grid, args.tuning_seeds, args.seeds)
            print(f"{only}: {name}: {spread(records[name]['test'])} {records[name]}", flush=True)
            if out is not None:
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps({"config": config, "arms": records}, indent=2) + "\n")
        weights = "all weights" if task.density is None else f"{100 * task.density:g} % of the weights"
        print(f"\n{'-'.join(map(str, sizes))}, {weights}, {epochs} epochs, {args.seeds} seeds:\n\n{table(records)}\n")


if __name__ == "__main__":
    main()
