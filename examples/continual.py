"""Two tasks one after the other: what protecting the old one costs the new one, for every protective preset.

A network learns the digits 0-4, then 5-9 without seeing an old digit again. It has one head with ten outputs. Two
settings, for they end differently:

- own logits: a task's softmax runs over its own five logits, in training and in testing ("task-incremental"). What is
  forgotten is forgotten in the shared layers, which is where a rate can protect;
- one softmax: all ten logits compete ("class-incremental"). The new task pushes the old logits down, in the head.

The first task is trained with plain Adam, once a seed: all arms start from the same network. Then every arm learns the
second task, whose start is passed as ``event=True``. An arm's rate is the one with the best mean of the two validation
accuracies, plain Adam's too; the table is of the test set, its differences are paired by seed.

Does protection beat simply a smaller rate? Plain Adam at all rates makes a front in the plane of old and new accuracy:
the picture shows the front beside the arms, a second table the rates.

What is found. With its own logits a task is protected by a slow body: most presets keep nearly all of the old task,
more than plain Adam at its best rate, and give up 0 to 2 points of the new one. With one softmax no preset beats plain
Adam at a small rate, and the slower the body beside the head, the worse: there it is the head that forgets, and no rate
of the body helps. ``combined`` has no factor for ``pretrained`` and so is plain Adam with a warm-up of the head.

    python examples/continual.py --out continual.png
    python examples/continual.py --data-dir DIR        # MNIST instead of scikit-learn's digits
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_structure as oxs
from optax_structure import nn
from optax_structure.training import load_data

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--seeds", type=int, default=5)
options.add_argument("--data-dir", help="folder of MNIST's four IDX files; scikit-learn's digits without it")
options.add_argument("--out", help="write the picture to this file")
options.add_argument("--tiny", action="store_true", help="one seed, three rates, few steps")
args = options.parse_args()

SEEDS, BATCH = (1 if args.tiny else args.seeds), 32
OLD_STEPS, NEW_STEPS, EPOCH = (60, 40, 20) if args.tiny else (600, 600, 20)
RATES = (1e-3, 1e-2, 1e-1) if args.tiny else (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
PROTECTIVE = (
    "conservative",
    "balanced",
    "fine_tuning",
    "transfer_learning",
    "continual_learning",
    "structure_net",
    "combined",
)

data = load_data("digits", data_dir=args.data_dir, validation=0.3)
x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
chain = nn.linen.Chain((("hidden_1", 64), ("hidden_2", 32), ("head", 10)))
TASKS = ("old", "new")
IN_TASK = {"old": np.arange(10) < 5, "new": np.arange(10) >= 5}  # which digits
SETTINGS = {"own logits": False, "one softmax": True}  # whether the logits of the other task compete
apply = jax.jit(lambda params, x: chain.apply({"params": params}, x))


def logits_of(params, x, task, compete):
    """Ten logits, those of the other task far down unless they compete."""
    return jnp.where(IN_TASK[task] | compete, apply(params, x), -1e9)


def accuracy(params, split, task, compete):
    """Share of a task's images that are classified right."""
    images, digits = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
    mine = IN_TASK[task][digits]
    return (logits_of(params, images[mine], task, compete).argmax(-1) == digits[mine]).mean()


def batches(seed, task, steps):
    """Rows of the training set for every step, of one task."""
    rows = np.flatnonzero(IN_TASK[task][data.y_train])
    return jnp.asarray(np.random.default_rng((seed, TASKS.index(task))).choice(rows, (steps, BATCH)))


def train(tx, params, rows, task, compete):
    """The ordinary step, scanned; the first one is an event: a task begins."""

    def loss(params, rows):
        logits = logits_of(params, x[rows], task, compete)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def step(carry, inputs):
        (params, state), (rows, begins) = carry, inputs
        value, grads = jax.value_and_grad(loss)(params, rows)
        updates, state = tx.update(grads, state, params, value=value, event=begins)
        return (optax.apply_updates(params, updates), state), None

    begins = jnp.arange(len(rows)) == 0
    return jax.lax.scan(step, (params, tx.init(params)), (rows, begins))[0][0]


def first_task(key, rows, compete):
    """Plain Adam on the old digits, from a random network."""
    params = chain.init(key, x[:1])["params"]
    return train(optax.with_extra_args_support(optax.adam(3e-3)), params, rows, "old", compete)


def scores(params, compete):
    """Both tasks' accuracies, validation and test."""
    return {split: {task: accuracy(params, split, task, compete) for task in TASKS} for split in ("validation", "test")}


keys = jax.random.split(jax.random.key(0), SEEDS)
old_rows, new_rows = (
    jnp.stack([batches(seed, task, steps) for seed in range(SEEDS)])
    for task, steps in (("old", OLD_STEPS), ("new", NEW_STEPS))
)

# The head has to learn something new; everything below it holds what the first task taught.
like = jax.eval_shape(chain.init, keys[0], x[:1])["params"]
labels = oxs.label_by_path([(r"^head/", "new")], default="pretrained")(like)
depths = oxs.layer_depths(like, ["hidden_1", "hidden_2", "head"])


def of_preset(name):
    """Rate -> the preset."""
    preset = getattr(oxs.presets, name)
    return lambda rate: preset(rate, labels, depths=depths, steps_per_epoch=EPOCH)


arms = {"adam": optax.adam, "adam, head alone": lambda rate: oxs.freeze_labels(optax.adam(rate), "pretrained", labels)}
arms |= {name: of_preset(name) for name in PROTECTIVE}


def program(make):
    """All rates and seeds of an arm at once: vmap over both, with a traced rate."""

    def second_task(rate, params, rows, compete):
        trained = train(optax.with_extra_args_support(make(rate)), params, rows, "new", compete)
        return scores(trained, compete)

    over_seeds = jax.vmap(second_task, in_axes=(None, 0, 0, None))
    return jax.jit(jax.vmap(over_seeds, in_axes=(0, None, None, None)))


def spread(values, sign=""):
    """Mean and standard deviation, in percent."""
    return f"{100 * np.mean(values):{sign}.1f} ± {100 * np.std(values, ddof=SEEDS > 1):.1f}"


def tuned(result):
    """The index of an arm's rate: the best mean of both validation accuracies."""
    return int(np.argmax((result["validation"]["old"] + result["validation"]["new"]).mean(-1)))


def at(result, index):
    """Old, new and mean test accuracy of every seed, at one rate."""
    old, new = (result["test"][task][index] for task in TASKS)
    return old, new, (old + new) / 2


def front(result):
    """New and old accuracy at those rates that no other rate beats in both, by rising new accuracy."""
    means = [[values.mean() for values in at(result, index)[1::-1]] for index in range(len(RATES))]
    best = [p for p in means if not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in means)]
    return np.array(sorted(best)).T


def table(results):
    """The arms at their rates, best mean first, and plain Adam at all of them."""
    print("| second task with | rate | old | new | mean | minus Adam |")
    print("|---|---|---|---|---|---|")
    adam = at(results["adam"], tuned(results["adam"]))[2]
    for name, result in sorted(results.items(), key=lambda item: -at(item[1], tuned(item[1]))[2].mean()):
        index = tuned(result)
        old, new, mean = at(result, index)
        paired = "" if name == "adam" else spread(mean - adam, "+")
        edge = " (edge)" if index in (0, len(RATES) - 1) else ""
        print(f"| {name} | {RATES[index]:g}{edge} | {spread(old)} | {spread(new)} | {spread(mean)} | {paired} |")
    print("\nplain Adam at every rate:\n\n| rate | old | new | mean |\n|---|---|---|---|")
    for index, rate in enumerate(RATES):
        print(f"| {rate:g} | {' | '.join(spread(values) for values in at(results['adam'], index))} |")


begun, before = {}, {}
for setting, compete in SETTINGS.items():
    begun[setting] = jax.jit(jax.vmap(first_task, in_axes=(0, 0, None)))(keys, old_rows, compete)
    before[setting] = jax.vmap(scores, in_axes=(0, None))(begun[setting], compete)["test"]
results = {setting: {} for setting in SETTINGS}
for name, make in arms.items():
    run = program(make)
    for setting, compete in SETTINGS.items():
        results[setting][name] = jax.tree.map(np.asarray, run(jnp.asarray(RATES), begun[setting], new_rows, compete))

for setting in SETTINGS:
    print(f"\n## {setting}: test accuracy in percent, {SEEDS} seeds\n")
    print(f"after the first task: old {spread(before[setting]['old'])}, new {spread(before[setting]['new'])}\n")
    table(results[setting])

if args.out:
    colors = ["black", "0.5", *(f"C{i}" for i in range(len(PROTECTIVE)))]
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axes, (setting, of_arm) in zip(panels, results.items(), strict=True):
        axes.plot(*(100 * front(of_arm["adam"])), "o-", color="0.7", ms=3, lw=1, label="adam, other rates (its front)")
        for (name, result), marker, color in zip(of_arm.items(), "*Xosd^v<>", colors, strict=True):
            old, new, _ = at(result, tuned(result))
            bars = {"xerr": 100 * new.std(), "yerr": 100 * old.std(), "elinewidth": 0.5}
            axes.errorbar(100 * new.mean(), 100 * old.mean(), fmt=marker, color=color, label=name, **bars)
        axes.set(title=setting, xlabel="new task, test accuracy, %", ylabel="old task, test accuracy, %")
    panels[0].set(xlim=(88, 99), ylim=(88, 101))
    panels[1].legend(fontsize=7)
    figure.savefig(args.out, dpi=150)
    print(f"\nwrote {args.out}")
