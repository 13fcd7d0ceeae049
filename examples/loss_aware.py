"""A rate that is steered by the loss, against the usual ones: on digits, at rates that fit and at one that does not.

A small network (64-256-256-128-10, SGD with momentum 0.9 unless said otherwise) learns scikit-learn's digits for 960
steps. The arms: a constant rate, a cosine, ``optax.contrib.reduce_on_plateau``, MoMo and schedule-free SGD from
``optax.contrib``, and ``oxs.feedback_sgd``: with static weights of its rules, with weights that follow the progress of
training, and with the rule of hypergradients. Three questions:

1. **At its best rate**: each arm's rate is the one that validates best (the mean over the seeds).
2. **At a rate three times too large**, at which plain SGD diverges.
3. **With a phase of noise**: in the middle third 60 % of the labels are random. A schedule that cuts the rate when the
   loss stops falling cuts it then, and never takes it back.

All seeds of an arm run in one ``jax.vmap``, at all rates: one compilation an arm. The test set is looked at once.

    python examples/loss_aware.py --out loss_aware.png
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_structure as oxs
from optax_structure.training.logging import RollingLog

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--seeds", type=int, default=5)
options.add_argument("--log", help="write what the loop did in the noise (seed 0) to this file, as JSON lines")
options.add_argument("--out", help="write the picture to this file")
options.add_argument("--tiny", action="store_true", help="one seed, 120 steps, three arms")
args = options.parse_args()

SEEDS, STEPS, BATCH, SIZES = (1 if args.tiny else args.seeds), (120 if args.tiny else 960), 64, (64, 256, 256, 128, 10)
RATES = (0.01, 0.03, 0.1, 0.3)
TOO_LARGE = 0.3
NOISE = (STEPS // 3, 2 * STEPS // 3)

# Every seed has a split, a start, an order of the rows and random labels of its own.
images, digits = load_digits(return_X_y=True)
images = ((images - images.mean()) / images.std()).astype(np.float32)


def of_seed(seed):
    """Rows of training, validation and test set; those of every step; and which of their labels noise replaces."""
    rng = np.random.default_rng(seed)
    train, validation, test = np.split(rng.permutation(len(images)), (1077, 1347))
    epochs = [rng.permutation(train)[: len(train) // BATCH * BATCH] for _ in range(STEPS // (len(train) // BATCH) + 1)]
    rows = np.concatenate(epochs)[: STEPS * BATCH].reshape(STEPS, BATCH)
    wrong = np.where(rng.random(rows.shape) < 0.6, rng.integers(0, 10, rows.shape), digits[rows])
    return validation, test, rows, wrong


VALIDATION, TEST, ROWS, WRONG = (jnp.asarray(np.stack(part)) for part in zip(*map(of_seed, range(SEEDS)), strict=True))
STEPS_PER_EPOCH = 1077 // BATCH
images, digits = jnp.asarray(images), jnp.asarray(digits)


def start(seed):
    """He-normal weights."""
    keys = jax.random.split(jax.random.key(seed), len(SIZES) - 1)
    return [
        {"kernel": jax.random.normal(key, (a, b)) * (2 / a) ** 0.5, "bias": jnp.zeros(b)}
        for key, a, b in zip(keys, SIZES, SIZES[1:], strict=False)
    ]


def apply(params, x):
    """The logits."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def loss_fn(params, x, y):
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


def accuracy(params, rows):
    """In percent."""
    return 100 * jnp.mean(apply(params, images[rows]).argmax(-1) == digits[rows])


def train(make, noise, seed, rate, validation, test, rows, wrong):
    """One run: validation and test accuracy, the loss and what steered it at every step."""
    tx = optax.with_extra_args_support(make(rate))
    params = start(seed)
    noisy = (jnp.arange(STEPS) >= NOISE[0]) & (jnp.arange(STEPS) < NOISE[1]) & noise
    labels = jnp.where(noisy[:, None], wrong, digits[rows])

    def step(carry, batch):
        params, state = carry
        rows, y = batch
        loss, grads = jax.value_and_grad(loss_fn)(params, images[rows], y)
        updates, state = tx.update(grads, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), {"loss": loss, **report(state)}

    (params, state), record = jax.lax.scan(step, (params, tx.init(params)), (rows, labels))
    if make is schedule_free:  # what it trains is not what it is to be judged by
        params = optax.contrib.schedule_free_eval_params(state, params)
    return accuracy(params, validation), accuracy(params, test), record


def report(state):
    """What steers, where something does."""
    try:
        return oxs.snapshot(state)
    except ValueError:
        return {}


def cosine(rate):
    """Down to 0 at the end. The rate is traced, which optax.cosine_decay_schedule does not take."""
    return optax.sgd(lambda count: rate * 0.5 * (1 + jnp.cos(jnp.pi * count / STEPS)), momentum=0.9)


def plateau(rate):
    """Halved after three epochs without a better mean loss."""
    halve = optax.contrib.reduce_on_plateau(factor=0.5, patience=3, accumulation_size=STEPS_PER_EPOCH)
    return optax.chain(optax.sgd(rate, momentum=0.9), halve)


def schedule_free(rate):
    """Ten times the rate, as its authors advise."""
    return optax.contrib.schedule_free_sgd(10 * rate, b1=0.9)


ARMS = {
    "SGD, constant": lambda rate: optax.sgd(rate, momentum=0.9),
    "SGD, cosine": cosine,
    "SGD, reduce_on_plateau": plateau,
    "MoMo (10 x rate)": lambda rate: optax.contrib.momo(10 * rate, beta=0.9),
    "schedule-free SGD (10 x rate)": schedule_free,
    "feedback_sgd": oxs.feedback_sgd,
    "feedback_sgd, weights follow progress": functools.partial(oxs.feedback_sgd, total_steps=STEPS),
    "feedback_sgd, with a cosine at the end": functools.partial(
        oxs.feedback_sgd, total_steps=STEPS, lr_rules={"trend": 0.6, "variance": 0.3, "grad_norm": 0.1, "cyclical": 1.0}
    ),
    "feedback_sgd, hypergradient": functools.partial(oxs.feedback_sgd, lr_rules={"hypergradient": 1.0}),
}
OURS, PLAIN, CUTS = "feedback_sgd", "SGD, constant", "SGD, reduce_on_plateau"
if args.tiny:
    ARMS = {name: ARMS[name] for name in (PLAIN, CUTS, OURS)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def runs(make, noise, rates):
    """All seeds at all rates."""
    of_seeds = jax.vmap(functools.partial(train, make, noise), (0, None, 0, 0, 0, 0))
    return jax.vmap(of_seeds, (None, 0, None, None, None, None))(
        jnp.arange(SEEDS), rates, VALIDATION, TEST, ROWS, WRONG
    )


def shown(values):
    """Mean and standard deviation; 10 % is chance."""
    return f"{np.mean(values):6.2f} ± {np.std(values):5.2f}"


print(
    f"{'test accuracy, %':40} {'best rate':>9} {'at its best rate':>16} {f'at {TOO_LARGE}':>16} {'after the noise':>16}"
)
records, best = {}, {}
for name, make in ARMS.items():
    validation, test, _ = runs(make, False, jnp.asarray(RATES))
    best[name] = int(np.argmax(np.nanmean(validation, axis=1)))
    too_large = test[RATES.index(TOO_LARGE)]
    _, noisy, record = runs(make, True, jnp.asarray([0.1]))
    records[name] = {key: np.asarray(value[0]) for key, value in record.items()}
    print(f"{name:40} {RATES[best[name]]:9} {shown(test[best[name]]):>16} {shown(too_large):>16} {shown(noisy[0]):>16}")

if args.log:
    from optax_structure.training.logging import jsonl_sink

    with RollingLog(maxlen=None, sinks=[jsonl_sink(args.log)]) as log:
        log.append(0, {key: value[0] for key, value in records[OURS].items()})

if args.out:
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(8, 7), sharex=True, constrained_layout=True)
    smooth = np.ones(10) / 10
    for name, color in ((PLAIN, "#8a949c"), (CUTS, "#e69f00"), (OURS, "#0072b2")):
        mean = np.mean([np.convolve(loss, smooth, "valid") for loss in records[name]["loss"]], axis=0)
        top.plot(np.arange(len(mean)) + 9, mean, color=color, label=name)
    top.set_yscale("log")
    top.set_ylabel("loss, mean of ten steps")
    top.legend(frameon=False)
    for line in records[OURS]["lr"]:
        middle.plot(line, color="#0072b2", alpha=0.5)
    middle.axhline(0.1, color="#8a949c", linestyle=":")
    middle.set_yscale("log")
    middle.set_ylabel(f"learning rate of {OURS}")
    for line in records[OURS]["momentum"]:
        bottom.plot(line, color="#0072b2", alpha=0.5)
    bottom.set_ylabel("its momentum")
    bottom.set_xlabel("step")
    for axis in (top, middle, bottom):
        axis.axvspan(*NOISE, color="#f3e9d2", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    top.set_title("Sixty percent of the labels are random in the shaded third", loc="left")
    figure.savefig(args.out, dpi=120)
