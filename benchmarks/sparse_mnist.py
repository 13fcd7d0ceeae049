"""Sparse training on MNIST: 784-512-512-10, five epochs, at a few densities, every rule under the same conditions.

    python benchmarks/sparse_mnist.py --data-dir DIR --out sparse_mnist.json         # the table: 60,000 images, test
    python benchmarks/sparse_mnist.py --data-dir DIR --tune --arms recipe --seeds 2  # 50,000 images, validation

Arms: ``static`` masks; ``set``; ``rigl``; ``random`` (both ends at random: the control); ``pruned``, which starts dense
and ends at the density; ``recipe``, which is the library's own, and what is left of it without one of its parts: with
random regrowth, with the gradient of one batch, without any rewiring. All train with Adam, batch 128, masks by ERK,
30 % rewired every 100 updates until three quarters of the training, falling along a cosine; all but the recipes at a
constant rate of 1e-3. Kernels are drawn dense and masked: He-normal, which on the validation split gains static masks
and SET 0.15 points, does nothing for RigL and costs the recipes 0.15 and pruning 0.3, so that those have Flax's own,
LeCun-normal.

``--ladder`` goes down to 0.1 % instead (669 weights for 1,034 units: no unit is promised an input). ``--picture FILE``
draws all that ``--out`` holds by then.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

import optax_structure as oxs
from optax_structure.training import load_data
from optax_structure.transforms.rewiring.scores import Score

SIZES = (784, 512, 512, 10)
EPOCHS, BATCH = 5, 128
DENSITIES, LADDER = (0.02, 0.05, 0.1), (0.001, 0.002, 0.005, 0.01)


class Arm(NamedTuple):
    """How one network is trained.

    Attributes:
      rule: ``updates in all -> rewire=``, and the density that it begins with; ``None``: nothing is rewired.
      rate: highest learning rate.
      cosine: whether it falls to 0.
      dense: whether all connections exist at first.
      kernels: how they are drawn.
    """

    rule: Callable[[int, float], Any] | None
    rate: float = 1e-3
    cosine: bool = False
    dense: bool = False
    kernels: Any = jax.nn.initializers.he_normal()


def until(steps: int, share: float = 0.75) -> dict[str, Any]:
    return {"every": 100, "stop": int(share * steps)}


def recipe(grow: Score = oxs.by_gradient) -> Arm:
    """The library's: a high rate that falls, and gradients gathered from one rewiring to the next."""
    return Arm(
        lambda steps, density: oxs.rewiring(
            grow=grow, accumulate=100 if grow is oxs.by_gradient else 1, **until(steps)
        ),
        rate=1e-2,
        cosine=True,
        kernels=jax.nn.initializers.lecun_normal(),
    )


ARMS = {
    "static": Arm(None),
    "set": Arm(lambda steps, density: oxs.set_rewiring(**until(steps))),
    "rigl": Arm(lambda steps, density: oxs.rigl_rewiring(**until(steps))),
    "rigl, accumulated": Arm(lambda steps, density: oxs.rigl_rewiring(accumulate=100, **until(steps))),
    "random": Arm(lambda steps, density: oxs.random_rewiring(**until(steps))),
    "pruned": Arm(
        lambda steps, density: oxs.magnitude_pruning(density, every=100, stop=int(0.6 * steps)),
        dense=True,
        kernels=jax.nn.initializers.lecun_normal(),
    ),
    "recipe": recipe(),
    "recipe, random growth": recipe(oxs.at_random),
    "recipe, one gradient": recipe()._replace(rule=lambda steps, density: oxs.rigl_rewiring(**until(steps))),
    "recipe, static": recipe()._replace(rule=None),
}


def init(key: jax.Array, kernels: Any, masks: Any) -> Any:
    """Kernels drawn dense, and masked."""
    params = {}
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(SIZES)):
        name, key = f"layer_{index}", jax.random.fold_in(key, index)
        params[name] = {"kernel": kernels(key, (fan_in, fan_out)), "bias": jnp.zeros(fan_out)}
    return oxs.apply_masks(params, masks)


def shapes() -> Any:
    """The shapes of the params."""
    return {
        f"layer_{index}": {
            "kernel": jax.ShapeDtypeStruct((fan_in, fan_out), jnp.float32),
            "bias": jax.ShapeDtypeStruct((fan_out,), jnp.float32),
        }
        for index, (fan_in, fan_out) in enumerate(itertools.pairwise(SIZES))
    }


def apply(params: Any, x: jax.Array) -> jax.Array:
    """Logits."""
    *hidden, head = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ head["kernel"] + head["bias"]


def accuracy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Percent."""
    return 100 * jnp.mean(jnp.argmax(apply(params, x), -1) == y)


@functools.partial(jax.jit, static_argnames=("tx",), donate_argnums=(1, 2))
def epoch(tx: optax.GradientTransformation, params: Any, state: Any, x: jax.Array, y: jax.Array, rows: Any) -> Any:
    """All batches of ``rows (steps, batch)``."""

    def step(carry: Any, row: jax.Array) -> Any:
        params, state = carry

        def loss_fn(params: Any) -> jax.Array:
            return optax.losses.softmax_cross_entropy_with_integer_labels(apply(params, x[row]), y[row]).mean()

        grads = jax.grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), rows)[0]


def train(arm: Arm, density: float, seed: int, x: Any, y: Any, ladder: bool) -> Any:
    """Trained params and masks."""
    keys = jax.random.split(jax.random.key(seed), 3)
    masks = oxs.random_masks(keys[0], shapes(), density, min_fan_in=0 if ladder else 1)
    masks = oxs.full_masks(shapes()) if arm.dense else masks
    params = init(keys[1], arm.kernels, masks)
    per_epoch = len(x) // BATCH
    steps = EPOCHS * per_epoch
    rate: Any = arm.rate
    if arm.cosine:
        rate = optax.cosine_decay_schedule(arm.rate, steps)
    inner = oxs.per_leaf(optax.adam(rate))
    tx = oxs.sparse(inner, masks, rewire=None if arm.rule is None else arm.rule(steps, density))
    state = tx.init(params)
    rng = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        rows = rng.permutation(len(x))[: per_epoch * BATCH].reshape(-1, BATCH)
        params, state = epoch(tx, params, state, x, y, jnp.asarray(rows))
    return params, oxs.get_masks(state)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Test error against connections, a line an arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = {
        "static": ("static masks", "#a9b4bd"),
        "set": ("SET", "#3d9a50"),
        "rigl": ("RigL", "#e8710a"),
        "rigl, accumulated": ("RigL, mean of 100 gradients", "#c8312b"),
        "recipe": ("the recipe", "#2f6db3"),
        "pruned": ("pruned from dense", "#22303c"),
    }
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for arm, (name, colour) in shown.items():
        points: dict[int, list[float]] = {}
        for key, of in figures.items():
            if key.split("/")[0] == arm:
                points.setdefault(of["connections"], []).append(100 - of["accuracy"])
        places = sorted(points)
        means, spread = (np.array([take(points[at]) for at in places]) for take in (np.mean, np.std))
        axes.errorbar(places, means, spread, label=name, color=colour, marker="o", ms=4, lw=1.6, capsize=2)
    axes.set(xscale="log", yscale="log", xlabel="connections", ylabel="test error, %")
    axes.set_title("784-512-512-10 on MNIST, five epochs, mean and deviation of five seeds", loc="left", fontsize=10)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_yticks([2, 3, 5, 10, 20, 50, 90])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print the table, write the figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data-dir", required=True, help="folder of MNIST's four IDX files")
    options.add_argument("--arms", choices=ARMS, nargs="+", default=[*ARMS])
    options.add_argument("--densities", type=float, nargs="+")
    options.add_argument("--ladder", action="store_true", help="down to 0.1 percent")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--tune", action="store_true", help="50,000 images, other seeds, validation accuracy")
    options.add_argument("--out", type=Path, help="JSON file for all figures; what it holds already is not run again")
    options.add_argument("--picture", type=Path, help="PNG file for test error against connections")
    args = options.parse_args()
    data = load_data("mnist", data_dir=args.data_dir, validation=1 / 6)
    x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
    held = jnp.asarray(data.x_validation), jnp.asarray(data.y_validation)
    if not args.tune:  # nothing is chosen any more: all training images, and the test set, once
        x, y = (jnp.concatenate(both) for both in zip((x, y), held, strict=True))
        held = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
    densities = args.densities or (LADDER if args.ladder else DENSITIES)
    figures: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    runs = [(arm, share, seed) for arm in args.arms for share in densities for seed in range(args.seeds)]
    for arm, share, seed in track(runs, "training"):
        name = f"{arm}/{share:g}/{seed + 1000 * args.tune}"
        if name not in figures:
            jax.clear_caches()  # a hundred training programs have more memory maps than Linux gives a process
            params, masks = train(ARMS[arm], share, seed + 1000 * args.tune, x, y, args.ladder)
            figures[name] = {"accuracy": float(accuracy(params, *held)), "connections": oxs.nonzero(masks)}
            if args.out:
                args.out.write_text(json.dumps(figures))
    split = "validation" if args.tune else "test"
    print(f"\n{split} accuracy, %, {args.seeds} seeds, in brackets the connections\n")
    print(f"| | {' | '.join(f'{100 * share:g} %' for share in densities)} |")
    print("|---" * (len(densities) + 1) + "|")
    for arm in args.arms:
        cells = []
        for share in densities:
            found = [figures[f"{arm}/{share:g}/{seed + 1000 * args.tune}"] for seed in range(args.seeds)]
            values = [of["accuracy"] for of in found]
            deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
            cells.append(f"{np.mean(values):.2f} ± {deviation:.2f} ({found[0]['connections']:,})")
        print(f"| {arm} | {' | '.join(cells)} |")
    for share in densities:
        masks = oxs.random_masks(jax.random.key(0), shapes(), share, min_fan_in=0 if args.ladder else 1)
        costs = oxs.count(apply, init(jax.random.key(0), jax.nn.initializers.zeros, masks), masks, x[:1]).total
        images = EPOCHS * (len(x) // BATCH) * BATCH
        executed, free = (flops * images for flops in (costs.training_flops, costs.free_training_flops))
        print(f"training FLOPs at {100 * share:g} %: {executed:.1e} executed, {free:.1e} were sparsity free")
    if args.picture:
        draw(figures, args.picture)


if __name__ == "__main__":
    main()
