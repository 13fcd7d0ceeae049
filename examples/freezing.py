"""Freezing that saves time, and comes back: layers stop computing gradients that they do not need, and start again.

A layer whose gradients have become small is frozen: its weights stand still, and the products of its backward pass are
not computed. Nothing is compiled again when that changes. What it takes is in ``make_step``, four lines of it:

1. layers written as ``oxs.gated(layer)``, which take a gate beside their parameters;
2. ``oxs.gates(state, depths)`` before the backward pass: what is frozen, and how far from the input on;
3. ``observed=oxs.observed(gates)`` for the optimizer, so that a gradient that was left out is not taken for a zero;
4. an optimizer in ``oxs.freeze_on_small_gradients``. The learning-rate schedule stands outside of it: inside
   ``oxs.per_leaf`` every leaf counts its own updates, and a layer that was frozen for a while would come back with the
   rate of the day on which it froze.

The same step runs under a ``FreezePlan``: what is frozen is then left out of the program, of which there are a few.
Plans save a little more, gates may move in every step. On CPU take plans for convolutions: XLA runs a convolution
inside a branch without its fast kernels, many times slower.

Three experiments:

- savings: what is lost and what is saved, against FreezeOut at equal FLOPs, against layers drawn at random at the same
  frozen share, against a prefix frozen from the start, and against simply training for fewer steps;
- shift: the labels are permuted halfway, when everything is frozen. The loss jumps, the next backward pass is a probe,
  and the network thaws; one that freezes for good stays wrong for good;
- few: does freezing regularise? Training on few images with and without it, by leaf and by element.

    python examples/freezing.py                                     # scikit-learn's digits, small, minutes
    python examples/freezing.py --data-dir DIR --out freezing.json --picture freezing.png    # MNIST, the full size
    python examples/freezing.py --data-dir DIR --tune               # other seeds, and validation accuracy for test
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.progress import track

import optax_structure as oxs
from optax_structure.training import load_data

PARTS = ("savings", "shift", "few")
NEVER, AGAIN, GATES, PLANS = "never frozen", "never frozen, again", "small gradients, gates", "small gradients, plans"
FREEZEOUT, STATIC, RANDOM, FEWER = "FreezeOut, plans", "prefix from the start", "random layers", "never, fewer steps"
ARMS = (NEVER, GATES, PLANS, FREEZEOUT, STATIC, RANDOM, FEWER, AGAIN)
options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--data-dir", help="folder of MNIST's four IDX files; scikit-learn's digits without it")
options.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="which experiments")
options.add_argument("--networks", choices=("mlp", "cnn"), nargs="+", help="of the savings")
options.add_argument("--arms", choices=ARMS, nargs="+", help="of the savings, and those that they are compared with")
options.add_argument("--seeds", type=int, help="of savings and shift; few takes twice as many (5 on MNIST, else 2)")
options.add_argument("--tune", action="store_true", help="seeds and images with which the numbers were chosen")
options.add_argument("--out", type=Path, help="JSON file for all figures; what it holds of other experiments stays")
options.add_argument("--picture", type=Path, help="write the picture to this file")
options.add_argument("--tiny", action="store_true", help="one seed, few steps")
args = options.parse_args()
# Never frozen is what all are compared with; random layers are as many as the gates', fewer steps cost as the plans do.
NEEDED = {RANDOM: GATES, FEWER: PLANS}
CHOSEN = {NEVER, *(args.arms or ARMS), *(needed for arm, needed in NEEDED.items() if arm in (args.arms or ARMS))}


# --- Data, and the numbers that were chosen on validation images ------------------------------------------------------


class Numbers(NamedTuple):
    """Of one training."""

    steps: int
    rate: float
    threshold: float  # root mean square of a gradient
    body: int  # how many layers, from the input on, freeze together
    saved: float  # FLOPs of ours as a share of never frozen: what FreezeOut is set to


MNIST = args.data_dir is not None
NUMBERS = {
    True: {"mlp": Numbers(4000, 1e-3, 1e-3, 7, 0.69), "cnn": Numbers(1000, 2e-3, 5.5e-3, 4, 0.72)},
    False: {"mlp": Numbers(600, 1e-3, 1.8e-3, 3, 0.7), "cnn": Numbers(300, 2e-3, 2.2e-2, 3, 0.7)},
}[MNIST]
if args.tiny:
    NUMBERS = {"mlp": NUMBERS["mlp"]._replace(steps=60, body=1)}
SEEDS = 1 if args.tiny else args.seeds or (5 if MNIST else 2)
BATCH = 256 if MNIST else 64
FIRST_SEED, SPLIT = (100, "validation") if args.tune else (0, "test")

data = load_data("digits", data_dir=args.data_dir, validation=1 / 6)
x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
x_held, y_held = (jnp.asarray(getattr(data, f"{part}_{SPLIT}")) for part in "xy")


def batches(seed: int, steps: int, images: int = len(x)) -> np.ndarray:
    """Rows of every step: epochs, each in an order of its own."""
    rng, batch = np.random.default_rng(seed), min(BATCH, images)
    epochs = [rng.permutation(images)[: images // batch * batch] for _ in range(-(-steps * batch // images) + 1)]
    return np.concatenate(epochs).reshape(-1, batch)[:steps]


# --- Networks: named layers, each a function of its own parameters and its input --------------------------------------


def dense(params: Any, h: jax.Array) -> jax.Array:
    return h.reshape(len(h), -1) @ params["kernel"] + params["bias"]


def hidden(params: Any, h: jax.Array) -> jax.Array:
    return jax.nn.relu(dense(params, h))


def conv(stride: int) -> Callable[[Any, jax.Array], jax.Array]:
    def apply(params: Any, h: jax.Array) -> jax.Array:
        if h.ndim == 2:
            h = h.reshape(-1, *data.image_shape, 1)
        layout = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(h, params["kernel"], (stride, stride), "SAME", dimension_numbers=layout)
        return jax.nn.relu(h + params["bias"])

    return apply


class Network(NamedTuple):
    """Layers in forward order, the shapes of their kernels, and their multiplications an image."""

    layers: dict[str, Callable[[Any, jax.Array], jax.Array]]
    shapes: dict[str, tuple[int, ...]]
    products: np.ndarray
    gates: bool = True  # whether gates that are data are used, beside plans

    def init(self, key: jax.Array) -> Any:
        draw, keys = jax.nn.initializers.he_normal(), jax.random.split(key, len(self.layers))
        return {
            name: {"kernel": draw(key, shape), "bias": jnp.zeros(shape[-1])}
            for (name, shape), key in zip(self.shapes.items(), keys, strict=True)
        }

    def apply(self, params: Any, gates: Any, h: jax.Array) -> jax.Array:
        for name, layer in self.layers.items():
            h = oxs.gated(layer)(gates[name], params[name], h)
        return h

    def loss(self, params: Any, gates: Any, images: jax.Array, targets: jax.Array) -> jax.Array:
        logits = self.apply(params, gates, images)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def tree(self, values: Any) -> Any:
        """One value a layer, as a tree with the structure of params."""
        return {name: {"kernel": of, "bias": of} for name, of in zip(self.layers, values, strict=True)}

    @property
    def depths(self) -> Any:
        return self.tree(range(len(self.layers)))


def mlp(width: int, depth: int) -> Network:
    names = [*(f"hidden_{i + 1}" for i in range(depth)), "head"]
    sizes = [x.shape[1], *[width] * depth, data.classes]
    shapes = dict(zip(names, itertools.pairwise(sizes), strict=True))
    return Network({name: hidden for name in names[:-1]} | {"head": dense}, shapes, _sizes(shapes, [1] * len(names)))


def cnn(channels: list[int], strides: list[int]) -> Network:
    names = [*(f"conv_{i + 1}" for i in range(len(channels))), "head"]
    sides = data.image_shape[0] // np.cumprod(strides)
    ins = [1, *channels]
    shapes = {name: (3, 3, a, b) for name, a, b in zip(names[:-1], ins, channels, strict=False)}
    shapes["head"] = (int(sides[-1]) ** 2 * channels[-1], data.classes)
    layers = {name: conv(stride) for name, stride in zip(names[:-1], strides, strict=True)}
    return Network(layers | {"head": dense}, shapes, _sizes(shapes, [*(sides**2), 1]), gates=False)


def _sizes(shapes: dict[str, tuple[int, ...]], places: Any) -> np.ndarray:
    """Multiplications a layer and image: the kernel's size times the places where it is applied."""
    return np.array([np.prod(shape) * at for shape, at in zip(shapes.values(), places, strict=True)], float)


def flops(network: Network, levels: np.ndarray, plan: bool) -> float:
    """Products of forward and backward passes (steps, layers), as a share of those of open gates.

    A layer costs its products once forward, once for the gradient of its weights unless its gate is closed, and once
    for that of its inputs: under a plan where something before it learns, under gates unless its own gate is at 2.
    The images themselves need no gradient.
    """
    inner = np.arange(len(network.products)) > 0
    of_inputs = np.cumsum(levels == 0, axis=1) - (levels == 0) > 0 if plan else (levels < 2) & inner
    full = network.products @ (2.0 + inner)
    return float(((1 + (levels == 0) + of_inputs) @ network.products).mean() / full)


NETWORKS = (
    {"mlp": mlp(256, 8), "cnn": cnn([16, 32, 32, 32, 32], [2, 2, 1, 1, 1])}
    if MNIST
    else {"mlp": mlp(128, 2 if args.tiny else 4), "cnn": cnn([8, 16, 16, 16], [2, 1, 1, 1])}
)


# --- One step for all -------------------------------------------------------------------------------------------------


def make_step(network: Network, tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    """``(params, state, rows, targets) -> (params, state, (loss, level of every layer))``.

    Frozen is what the optimizer's state says, or what ``frozen`` says (a tree of traced bools), or ``plan``.
    """

    def step(
        params: Any, state: Any, rows: jax.Array, targets: jax.Array, frozen: Any = None, *, plan: Any = None
    ) -> Any:
        if plan is not None:
            frozen = plan.frozen(params)  # Python bools: what is frozen is not in the program
        gates = oxs.gates(state if frozen is None else frozen, network.depths)
        loss, grads = jax.value_and_grad(network.loss)(params, gates, x[rows], targets)
        updates, state = tx.update(grads, state, params, value=loss, observed=oxs.observed(gates))
        levels = jnp.stack([jnp.asarray(gates[name]["kernel"], jnp.int8) for name in network.layers])
        return optax.apply_updates(params, updates), state, (loss, levels)

    return step


def plain(schedule: Any) -> optax.GradientTransformationExtraArgs:
    """Adam, one count a leaf, whose work on leaves that a plan or ``frozen`` leaves out is left out too."""
    adam = oxs.skip_unobserved(oxs.per_leaf(optax.scale_by_adam()))
    return optax.chain(adam, optax.scale_by_learning_rate(schedule))


def small_gradients(threshold: float, **numbers: Any) -> optax.GradientTransformationExtraArgs:
    """The same that freezes on small gradients; without a rate."""
    return oxs.freeze_on_small_gradients(oxs.per_leaf(optax.scale_by_adam()), threshold, **numbers)


def freezing(schedule: Any, threshold: float, **numbers: Any) -> optax.GradientTransformationExtraArgs:
    """The same with its rate, which goes on falling while a layer stands still."""
    return optax.chain(small_gradients(threshold, **numbers), optax.scale_by_learning_rate(schedule))


class Settling(NamedTuple):
    """State of ``settle``: running mean of the parameters, and the state of the optimizer."""

    average: Any
    inner_state: Any


def settle(inner: Any, keep: float = 0.99) -> optax.GradientTransformationExtraArgs:
    """What freezes is put where it was on average over the last hundred updates.

    While the rate is high a layer jumps about a good place. The cosine would bring it there in time, but a layer that
    freezes early stops in mid-jump; the mean of its jumps is where it was bound for.
    """

    def init(params: Any) -> Settling:
        return Settling(jax.tree.map(jnp.copy, params), inner.init(params))

    def update(updates: Any, state: Settling, params: Any, *, observed: Any, **extra: Any) -> tuple[Any, Settling]:
        moves, inner_state = inner.update(updates, state.inner_state, params, observed=observed, **extra)
        closing = jax.tree.map(lambda then, now: now & ~then, oxs.frozen(state), oxs.frozen(inner_state))

        def mixed(seen: Any, mean: jax.Array, now: jax.Array) -> jax.Array:
            return mean if seen is False else keep * mean + (1 - keep) * now  # False: a plan's, it stands still

        def landing(seen: Any, closes: jax.Array, mean: jax.Array, now: jax.Array, move: jax.Array) -> jax.Array:
            return move if seen is False else jnp.where(closes, mean - now, move)

        average = jax.tree.map(mixed, observed, state.average, params)
        return jax.tree.map(landing, observed, closing, average, params, moves), Settling(average, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def held_accuracy(network: Network, params: Any, meant: jax.Array = y_held) -> float:
    apply = jax.jit(lambda params, h: network.apply(params, dict.fromkeys(network.layers, 0), h).argmax(-1))
    guesses = [apply(params, x_held[at : at + 1000]) for at in range(0, len(x_held), 1000)]
    return 100 * float((jnp.concatenate(guesses) == meant).mean())


# --- Savings ----------------------------------------------------------------------------------------------------------

CHUNK = 50
ALWAYS = ((0, oxs.FreezePlan()),)  # nothing is frozen


class Arm(NamedTuple):
    """An optimizer's ``init``; ``call(step number, params, state, rows, targets)``; and one call of every program."""

    init: Callable[[Any], Any]
    call: Callable[..., Any]
    programs: tuple[Callable[..., Any], ...]


def by_table(network: Network, tx: Any, table: Any) -> Arm:
    """The plan of the hour."""
    step = jax.jit(make_step(network, tx), static_argnames="plan", donate_argnums=(0, 1))
    plans = dict.fromkeys(plan for _, plan in table)
    programs = tuple(lambda *given, plan=plan: step(*given, plan=plan) for plan in plans)
    return Arm(tx.init, lambda at, *given: step(*given, plan=oxs.plan_at(table, at)), programs)


def prefix_flops(network: Network, counts: Any) -> float:
    """With the first so many layers frozen, a number a step."""
    return flops(network, 2 * (np.arange(len(network.layers)) < np.atleast_1d(counts)[:, None]), plan=True)


def arms_of(network: Network, numbers: Numbers) -> dict[str, Arm]:
    steps, rate, threshold, body, share = numbers
    depths, layers = network.depths, len(network.layers)
    cosine = optax.cosine_decay_schedule(rate, steps)

    # The body freezes as one (groups=0): a prefix, so that the gradient of inputs is saved as well. Left to themselves
    # its late layers freeze first, whose gradients are the smallest. The last layers always learn.
    labels = jax.tree.map(lambda depth: "body" if depth < body else "rest", depths)
    rules = {"body": small_gradients(threshold, groups=0, decay=0.99), "rest": oxs.per_leaf(optax.scale_by_adam())}
    ours = settle(optax.chain(optax.partition(rules, labels), optax.scale_by_learning_rate(cosine)))
    gates = jax.jit(make_step(network, ours), donate_argnums=(0, 1))
    tiers = oxs.freeze_plans(depths, (0.0, body / layers))
    plans = oxs.plan_step(make_step(network, ours), tiers, donate_argnums=(0, 1), replan_every=20, look_every=10)

    # FreezeOut has a schedule of its own, the cosine for the last layer, and starts so that its FLOPs come out as ours.
    def cost(first: float) -> float:
        table = oxs.freezeout_plans(steps, depths, first=first)
        return prefix_flops(network, [len(oxs.plan_at(table, at).paths) // 2 for at in range(0, steps, 10)])

    first = min(np.linspace(0.02, 0.98, 49).tolist(), key=lambda first: abs(cost(first) - share))
    late = optax.chain(plain(rate), oxs.scale_by_freezeout(steps, depths, first=first))
    prefix = min(range(1, layers), key=lambda count: abs(prefix_flops(network, count) - share))
    static = oxs.freeze_plans(depths, (0.0, prefix / layers))[1]
    drawn = jax.jit(make_step(network, plain(cosine)), donate_argnums=(0, 1))
    arms = {
        NEVER: by_table(network, plain(cosine), ALWAYS),
        GATES: Arm(ours.init, lambda at, *given: gates(*given), (gates,)),
        PLANS: Arm(ours.init, lambda at, *given: plans(*given), tuple(partial(plans, plan=plan) for plan in tiers)),
        FREEZEOUT: by_table(network, late, oxs.freezeout_plans(steps, depths, first=first)),
        STATIC: by_table(network, plain(cosine), ((0, static),)),
        RANDOM: Arm(plain(cosine).init, lambda at, *given: drawn(*given), (drawn,)),
    }
    arms[AGAIN] = arms[NEVER]
    return {
        name: arm for name, arm in arms.items() if name in CHOSEN and (network.gates or name not in (GATES, RANDOM))
    }


def whole(seconds: list[float]) -> float:
    """Of all turns: ten by ten their median, so that a turn in which the machine was taken away does not count."""
    tens = [seconds[at : at + 10] for at in range(0, len(seconds), 10)]
    return sum(float(np.median(ten)) * len(ten) for ten in tens)


def race(network: Network, numbers: Numbers, seed: int) -> dict[str, dict[str, Any]]:
    """All arms over the same batches, in turns of a chunk each: a machine that is busy is busy for all."""
    arms, key, layers = arms_of(network, numbers), jax.random.key(seed), len(network.layers)
    rows = batches(seed, numbers.steps)
    targets, draw = data.y_train[rows], np.random.default_rng((seed, 1))
    carry = {name: (network.init(key), arm.init(network.init(key))) for name, arm in arms.items()}
    nothing = network.tree(np.zeros(layers, bool))
    for name, arm in arms.items():  # compile, on copies: the state is donated
        for program in arm.programs:
            extra = (nothing,) if name == RANDOM else ()
            program(network.init(key), arm.init(network.init(key)), rows[0], targets[0], *extra)
    seconds, logs = {name: [] for name in arms}, {name: [] for name in arms}
    names = list(arms)
    for turn, start in enumerate(range(0, numbers.steps, CHUNK)):
        lately = [(levels > 0).sum() for _, levels in jax.device_get(logs.get(GATES, [])[-2:])]  # one may be a probe
        rank = draw.permutation(layers)  # as many layers as ours has frozen now, others for every chunk
        extra = {RANDOM: (network.tree(rank < max(lately, default=0)),)}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begun, (params, state) = time.perf_counter(), carry[name]
            for at in range(start, min(start + CHUNK, numbers.steps)):
                params, state, log = arms[name].call(at, params, state, rows[at], targets[at], *extra.get(name, ()))
                logs[name].append(log)
            carry[name] = jax.block_until_ready((params, state))
            seconds[name].append(time.perf_counter() - begun)
    levels = {name: np.stack([of for _, of in jax.device_get(log)]) for name, log in logs.items()}
    return {
        name: {
            "accuracy": held_accuracy(network, carry[name][0]),
            "time": whole(seconds[name]) / whole(seconds[NEVER]),
            "flops": flops(network, levels[name], plan=name not in (GATES, RANDOM)),
            "frozen": float((levels[name] > 0).mean()),
            "levels": levels[name][:: max(1, numbers.steps // 500)].tolist(),
        }
        for name in arms
    }


def fewer_steps(network: Network, numbers: Numbers, seed: int, share: float) -> dict[str, Any]:
    """Never frozen, trained as long as ours has FLOPs: its whole schedule in fewer steps."""
    steps = round(share * numbers.steps)
    arm = by_table(network, plain(optax.cosine_decay_schedule(numbers.rate, steps)), ALWAYS)
    params = network.init(jax.random.key(seed))
    state = arm.init(params)
    for at, of in enumerate(batches(seed, steps)):
        params, state, _ = arm.call(at, params, state, of, data.y_train[of])
    return {"accuracy": held_accuracy(network, params), "time": share, "flops": share, "frozen": 0.0}


def look(network: Network, schedule: Any, steps: int) -> None:
    """How the gradients fall, layer by layer, when nothing freezes: what a threshold is chosen from."""
    tx = freezing(schedule, 0.0, groups=network.depths, decay=0.99)
    step = jax.jit(partial(make_step(network, tx), plan=oxs.FreezePlan()), donate_argnums=(0, 1))
    params = network.init(jax.random.key(FIRST_SEED))
    state = tx.init(params)
    print("\nroot mean square of the gradient, the leaf of every layer with the greatest, running mean, in 1e-5:")
    for at, rows in enumerate(batches(FIRST_SEED, steps), 1):
        params, state, _ = step(params, state, rows, data.y_train[rows])
        if at % (steps // 10) == 0:
            means = jax.tree.map(lambda mean, weight: float(1e5 * mean / weight), *state[0].readings[:2])
            print(f"  step {at:5}: {' '.join(f'{max(of.values()):7.1f}' for of in map(means.get, network.layers))}")


def spread(values: Any, sign: str = "", digits: int = 2) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{np.mean(values):{sign}.{digits}f} ± {np.std(values, ddof=len(values) > 1):.{digits}f}"


def savings(name: str) -> dict[str, Any]:
    network, numbers = NETWORKS[name], NUMBERS[name]
    if args.tune:
        look(network, optax.cosine_decay_schedule(numbers.rate, numbers.steps), numbers.steps)
    seeds = range(FIRST_SEED, FIRST_SEED + SEEDS)
    results = []
    for seed in track(seeds, f"savings, {name}"):
        of = race(network, numbers, seed)
        if FEWER in CHOSEN:
            of[FEWER] = fewer_steps(network, numbers, seed, of[PLANS]["flops"])
        results.append(of)
    print(f"\n## savings, {name}: {numbers.steps} steps, {SEEDS} seeds, {SPLIT} accuracy in percent\n")
    print("Time and FLOPs are shares of never frozen; frozen is the share of layers, over all steps.\n")
    print("| arm | accuracy | minus never frozen | time | FLOPs | frozen |\n|---|---|---|---|---|---|")
    for arm in results[0]:
        of = {
            key: np.array([result[arm][key] for result in results]) for key in ("accuracy", "time", "flops", "frozen")
        }
        lost = of["accuracy"] - [result[NEVER]["accuracy"] for result in results]
        cells = (spread(of["accuracy"]), spread(lost, "+"), spread(of["time"], digits=3))
        print(f"| {arm} | {' | '.join(cells)} | {of['flops'].mean():.3f} | {of['frozen'].mean():.2f} |")
    return {"numbers": numbers._asdict(), "seeds": [*seeds], "split": SPLIT, "arms": results}


# --- Shift ------------------------------------------------------------------------------------------------------------

SHIFT_STEPS, SHIFT_RATE, SHIFT_THRESHOLD = (
    (4000, 5e-4, 4e-3) if MNIST else (300, 1e-3, 3.5e-2) if args.tiny else (800, 1e-3, 1.5e-2)
)
SMALL = mlp(256, 3) if MNIST else mlp(64, 2)


def train_shifted(network: Network, numbers: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train; from the middle on every label means another digit."""
    tx = freezing(optax.constant_schedule(SHIFT_RATE), **numbers)
    step, shift = jax.jit(make_step(network, tx), donate_argnums=(0, 1)), SHIFT_STEPS // 2
    order = np.random.default_rng((seed, 2)).permutation(data.classes)
    meant = np.empty_like(order)
    meant[order] = np.roll(order, 1)  # no digit keeps its label
    params = network.init(jax.random.key(seed))
    state, log = tx.init(params), []
    for at, rows in enumerate(batches(seed, SHIFT_STEPS)):
        targets = data.y_train[rows]
        params, state, (loss, levels) = step(params, state, rows, targets if at < shift else meant[targets])
        shut = oxs.frozen(state)["head"]["kernel"]
        log.append((loss, levels, jnp.copy(shut), jnp.copy(state[0].watch.probe)))  # the last two of the next step
    losses, levels, shut, probe = (np.stack(column) for column in zip(*jax.device_get(log), strict=True))
    thawed = np.flatnonzero(shut[shift - 1 : -1] & ~shut[shift:])
    called = np.flatnonzero(probe[shift:])
    return {
        "accuracy": held_accuracy(network, params, jnp.asarray(meant)[y_held]),
        "frozen at the shift": bool(shut[shift - 1]),
        "shift": shift,
        "alarm": int(shift + called[0]) if len(called) else None,  # the step whose loss called for the probe
        "thaw": int(shift + thawed[0]) if len(thawed) else None,  # the step whose gradients thawed something
        "probes": float(probe.mean()),
        "frozen": float((levels > 0).mean()),
        "losses": losses.tolist(),
        "levels": levels[::8].tolist(),
    }


def shifted() -> dict[str, Any]:
    rule = {"threshold": SHIFT_THRESHOLD, "groups": 0, "decay": 0.98}  # all layers freeze together
    if args.tune:
        look(SMALL, optax.constant_schedule(SHIFT_RATE), SHIFT_STEPS // 2)
    body = jax.tree.map(lambda depth: depth < len(SMALL.layers) - 1, SMALL.depths)
    ways = {
        "never frozen": {"threshold": 0.0},
        "frozen, thaws": rule,
        "frozen for good": rule | {"release": np.inf},
        "frozen for good, the head never": rule | {"release": np.inf, "groups": body, "max_share": 0.99},
    }
    seeds = range(FIRST_SEED, FIRST_SEED + SEEDS)
    runs = {name: [] for name in ways}
    for seed in track(seeds, "shift"):
        for name, numbers in ways.items():
            runs[name].append(train_shifted(SMALL, numbers, seed))
    print(f"\n## shift: labels permuted at step {SHIFT_STEPS // 2} of {SHIFT_STEPS}, {SEEDS} seeds, {SPLIT} accuracy\n")
    print("| arm | accuracy at the end | minus never frozen | seeds frozen at the shift | layers frozen | probes, % |")
    print("|---|---|---|---|---|---|")
    for name, of in runs.items():
        accuracy, frozen_then, frozen, probes = (
            np.array([run[key] for run in of]) for key in ("accuracy", "frozen at the shift", "frozen", "probes")
        )
        lost = accuracy - [run["accuracy"] for run in runs["never frozen"]]
        shares = f"{frozen_then.mean():.2f} | {frozen.mean():.2f} | {100 * probes.mean():.2f}"
        print(f"| {name} | {spread(accuracy)} | {spread(lost, '+')} | {shares} |")
    for seed, run in zip(seeds, runs["frozen, thaws"], strict=True):
        print(f"seed {seed}: shift at step {run['shift']}, alarm in step {run['alarm']}, thaw in step {run['thaw']}")
    return {"seeds": [*seeds], "split": SPLIT, "arms": runs}


# --- Few images -------------------------------------------------------------------------------------------------------

FEW, FEW_STEPS = (1000, 600) if MNIST else (200, 20 if args.tiny else 300)
FEW_THRESHOLDS = (1e-3,) if args.tiny else (1e-4, 1e-3, 3e-3)


def few(seeds: range) -> dict[str, Any]:
    """Few images for many epochs, all seeds at once: nothing is saved here, so no gates are needed."""
    rules = {"never frozen": {"threshold": 0.0}} | {
        f"by {per}, {threshold:g}": {"threshold": threshold, "per": per}
        for per in ("leaf", "element")
        for threshold in FEW_THRESHOLDS
    }
    rows = jnp.stack([jnp.asarray(batches(seed, FEW_STEPS, FEW)) for seed in seeds])
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])

    def program(tx: optax.GradientTransformationExtraArgs) -> Any:
        def step(carry: Any, rows: jax.Array) -> Any:
            params, state = carry
            loss, grads = jax.value_and_grad(SMALL.loss)(params, dict.fromkeys(SMALL.layers, 0), x[rows], y[rows])
            updates, state = tx.update(grads, state, params, value=loss)
            shut = sum(jnp.sum(jnp.broadcast_to(of, p.shape)) for of, p in _pairs(oxs.frozen(state), params))
            return (optax.apply_updates(params, updates), state), shut / sum(p.size for p in jax.tree.leaves(params))

        def train(key: jax.Array, rows: jax.Array) -> Any:
            params = SMALL.init(key)
            (params, _), shut = jax.lax.scan(step, (params, tx.init(params)), rows)
            guesses = SMALL.apply(params, dict.fromkeys(SMALL.layers, 0), x_held).argmax(-1)
            return 100 * (guesses == y_held).mean(), shut.mean()

        return jax.jit(jax.vmap(train))

    result = {}
    for name, numbers in track(rules.items(), "few"):
        tx = freezing(optax.constant_schedule(1e-3), **numbers)
        result[name] = [np.asarray(of, float).tolist() for of in program(tx)(keys, rows)]
    print(f"\n## few: {FEW} training images, {FEW_STEPS} steps, {len(seeds)} seeds, {SPLIT} accuracy in percent\n")
    print("| frozen | accuracy | minus never frozen, with its standard error | share of weights frozen |")
    print("|---|---|---|---|")
    for name, (accuracy, shut) in result.items():
        lost = np.subtract(accuracy, result["never frozen"][0])
        error = lost.std(ddof=len(lost) > 1) / len(lost) ** 0.5
        print(f"| {name} | {spread(accuracy)} | {lost.mean():+.2f} ± {error:.2f} | {np.mean(shut):.2f} |")
    return {"seeds": [*seeds], "split": SPLIT, "arms": result}


def _pairs(one: Any, other: Any) -> Any:
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


# --- Picture ----------------------------------------------------------------------------------------------------------


def heat(axes: Any, levels: Any, steps: int) -> None:
    """When every layer was frozen, the first layer at the bottom."""
    image = np.array(levels).T > 0
    axes.imshow(image, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1, interpolation="nearest",
                extent=(0, steps, 0.5, len(image) + 0.5))  # fmt: skip
    axes.set(xlabel="step", ylabel="layer", yticks=range(1, len(image) + 1))


def picture(results: dict[str, Any]) -> Any:
    """Savings: accuracy against FLOPs, and what was frozen when. Shift: the loss, and what was frozen when."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    if "savings mlp" in results:
        of, axes = results["savings mlp"], panels[0, 0]
        for place, name in enumerate(of["arms"][0]):
            if name != AGAIN:
                cost, right = (np.array([run[name][key] for run in of["arms"]]) for key in ("flops", "accuracy"))
                look = {"fmt": "osD^v<>X"[place], "color": f"C{place}", "label": name}
                axes.errorbar(cost.mean(), right.mean(), right.std(), **look)
        axes.set(xlabel="FLOPs, never frozen = 1", ylabel=f"{of['split']} accuracy, %", title="savings: deep MLP")
        axes.legend(fontsize=7)
        heat(panels[0, 1], of["arms"][0][GATES]["levels"], of["numbers"]["steps"])
        panels[0, 1].set_title(f"{GATES}: which layers are frozen")
    if "shift" in results:
        of, axes = results["shift"], panels[1, 0]
        thawing = of["arms"]["frozen, thaws"]
        before = [np.mean(np.array(run["levels"])[SHIFT_STEPS // 16 - 25 : SHIFT_STEPS // 16] > 0) for run in thawing]
        seed = int(np.argmax(before))  # the one that was frozen for the longest time just before
        for name, runs in of["arms"].items():
            smooth = np.convolve(runs[seed]["losses"], np.ones(20) / 20, "valid")
            axes.plot(np.arange(len(smooth)) + 19, smooth, lw=1, label=name)
        axes.set(xlabel="step", ylabel="loss, mean of 20 steps", yscale="log", title="shift: labels permuted halfway")
        axes.legend(fontsize=7)
        run = thawing[seed]
        heat(panels[1, 1], run["levels"], SHIFT_STEPS)
        panels[1, 1].axvline(run["shift"], color="C3", lw=1)
        panels[1, 1].set_title(f"frozen, thaws: shift in step {run['shift']}, thaw in step {run['thaw']}")
    return figure


# --- All of it --------------------------------------------------------------------------------------------------------

results: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
experiments = {f"savings {name}": partial(savings, name) for name in args.networks or NUMBERS}
experiments |= {"shift": shifted, "few": partial(few, range(FIRST_SEED, FIRST_SEED + 2 * SEEDS))}
for name, experiment in experiments.items():
    if name.split()[0] in args.only:
        results[name] = experiment()
        if args.out:
            args.out.write_text(json.dumps(results))
if args.picture:
    picture(results).savefig(args.picture, dpi=150)
