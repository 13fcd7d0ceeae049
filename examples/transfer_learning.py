"""Transfer: a network trained on the digits 0-4 goes on to something else; discriminative rates against one rate.

Two targets, each learned from a few examples a class:

- the digits 5-9, which the network has never seen;
- the digits 0-4 again, but by a camera of whose pixels 40 % are dead.

What is done to the pretrained network, step by step:

1. its head is replaced by a new one (label ``new``);
2. a layer that begins as the identity is inserted below the head (label ``adapter``): ``insert_layer``;
3. everything else is ``pretrained``, and every label gets a rate of its own: by the preset ``transfer_learning``, with
   its ratio of 0.01 for the old layers and with a larger one; by plain ``optax.multi_transform``; or the old layers are
   frozen (``freeze_labels``), which costs no gradient.

Against them: one rate for the whole network, and the same network from scratch. Each arm's base rate is tuned on
validation for each number of examples; all arms of a seed share the pretrained network, the new head, the examples and
the batches. The validation set is larger than the few training examples: it serves the choice of the rate alone.

How far the old layers may move should depend on what they are worth, and the two targets are the two ends of that. What
was learned from five digits is worth little for the other five: protecting it costs 2 to 17 points, and a network from
scratch does as well. For the same digits by another camera it is worth much: with up to 10 examples a class, protecting
it gains 2 to 14 points over one rate for all. With 50 a class there is hardly a difference.

    python examples/transfer_learning.py
    python examples/transfer_learning.py --data-dir DIR        # MNIST instead of scikit-learn's digits
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_structure as oxs
from optax_structure import nn
from optax_structure.training import load_data

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--seeds", type=int, default=5)
options.add_argument("--data-dir", help="folder of MNIST's four IDX files; scikit-learn's digits without it")
options.add_argument("--tiny", action="store_true", help="one seed, two rates, few steps")
args = options.parse_args()

SEEDS, BATCH, EPOCH = (1 if args.tiny else args.seeds), 32, 20
PRETRAINING, STEPS = (60, 40) if args.tiny else (600, 300)
RATES = (1e-3, 1e-2) if args.tiny else (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SHOTS = (3, 10) if args.tiny else (1, 3, 10, 50)  # training examples of each of the five new digits

data = load_data("digits", data_dir=args.data_dir, validation=0.3)
x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train % 5)  # a task's five classes, whichever digits they are
keys = jax.random.split(jax.random.key(0), SEEDS)


def train(apply, tx, params, rows, pixels=1.0):
    """The ordinary step, scanned."""

    def loss(params, rows):
        return optax.losses.softmax_cross_entropy_with_integer_labels(apply(params, pixels * x[rows]), y[rows]).mean()

    def step(carry, rows):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, rows)
        updates, state = tx.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), rows)[0][0]


def accuracy(apply, params, split, pixels, first):
    """On the five digits from ``first`` on."""
    images, digits = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
    mine = (digits >= first) & (digits < first + 5)
    return jnp.mean(apply(params, pixels * images).argmax(-1) == digits % 5, where=mine)


# --- The pretrained networks, one a seed ------------------------------------------------------------------------------

chain = nn.linen.Chain((("hidden_1", 64), ("hidden_2", 32), ("head", 5)))


@jax.jit
@jax.vmap
def pretrain(key, rows):
    """Plain Adam on the digits 0-4."""
    adam = optax.with_extra_args_support(optax.adam(3e-3))
    return train(lambda params, x: chain.apply({"params": params}, x), adam, chain.init(key, x[:1])["params"], rows)


old = np.flatnonzero(data.y_train < 5)
pretrained = pretrain(keys, jnp.asarray(np.random.default_rng(0).choice(old, (SEEDS, PRETRAINING, BATCH))))


# --- A new head and an adapter ----------------------------------------------------------------------------------------


def transplant(params, key):
    """The pretrained network with a head of random weights and, below it, a layer that changes nothing yet."""
    labels = oxs.label_by_path([(r"^head/", "new")], default="pretrained")(params)
    params = params | {"head": chain.init(key, x[:1])["params"]["head"]}
    units = oxs.dense_chain(params, ["hidden_1", "hidden_2", "head"])
    masks = jax.tree.map(lambda _: True, params)
    return oxs.insert_layer(params, labels, masks, units, "hidden_2", name="adapter", label="adapter", key=key)


grown = [
    transplant(jax.tree.map(lambda leaf, i=i: leaf[i], pretrained), jax.random.fold_in(key, 1))
    for i, key in enumerate(keys)
]
labels, layers = grown[0].labels, grown[0].units.layers  # ("hidden_1", "hidden_2", "adapter", "head")
model = nn.linen.Chain.from_units(grown[0].units)
warm = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[growth.params for growth in grown])
cold = jax.vmap(lambda key: model.init(key, x[:1])["params"])(keys)  # the same network, with nothing learned


def apply(params, x):
    """Logits of the network with the adapter."""
    return model.apply({"params": params}, x)


# --- The arms ---------------------------------------------------------------------------------------------------------

depths = oxs.layer_depths(grown[0].params, layers)


def by_preset(rate):
    """Pretrained 0.01, adapter 0.5, new 1; halved towards the input; the young parts warm up for an epoch."""
    return oxs.presets.transfer_learning(rate, labels, depths=depths, steps_per_epoch=EPOCH)


def gentler(rate):
    """The preset with a larger ratio for the old layers."""
    rates = {"pretrained": 0.3, "adapter": 0.5}
    return oxs.presets.transfer_learning(rate, labels, depths=depths, steps_per_epoch=EPOCH, rates=rates)


def by_partition(rate):
    """The label rates alone, as optax says them."""
    return optax.multi_transform(
        {"pretrained": optax.adam(0.01 * rate), "adapter": optax.adam(0.5 * rate), "new": optax.adam(rate)}, labels
    )


def frozen(rate):
    """The pretrained layers do not move, and no gradient of theirs is used."""
    return oxs.freeze_labels(optax.adam(rate), "pretrained", labels)


ONE_RATE = "one rate for all"
ARMS = {
    "from scratch": (optax.adam, cold),
    ONE_RATE: (optax.adam, warm),
    "frozen, new parts alone": (frozen, warm),
    "multi_transform 0.01 / 0.5 / 1": (by_partition, warm),
    "presets.transfer_learning": (by_preset, warm),
    "the same, pretrained at 0.3": (gentler, warm),
}

tx, params = by_preset(1e-2), grown[0].params
print(f"presets.transfer_learning is\n\n{oxs.describe(tx)}\n\nand its rates, lowest and highest of a label:\n")
state, no_gradient, update = tx.init(params), jax.tree.map(jnp.zeros_like, params), jax.jit(tx.update)
for step in range(EPOCH + 1):
    if step in (0, EPOCH):
        spreads = oxs.rates_by_label(oxs.rates(tx, state, params), labels, params)
        texts = [f"{label} {float(at.low):.4f} to {float(at.high):.4f}" for label, at in spreads.items()]
        print(f"  step {step:2}: {'; '.join(texts)}")
    _, state = update(no_gradient, state, params)


# --- All rates, numbers of examples and seeds of an arm are one program -----------------------------------------------


dead = np.random.default_rng(1).permutation(x.shape[1])[: int(0.4 * x.shape[1])]
TARGETS = {  # the first of the five digits, and what is left of every pixel
    "the digits 5-9": (5, jnp.ones(x.shape[1])),
    "the digits 0-4 by a broken camera": (0, jnp.ones(x.shape[1]).at[dead].set(0.0)),
}


def few(seed, shots, first):
    """Rows of every step: batches drawn from ``shots`` examples of each of the five digits."""
    rng = np.random.default_rng((1, seed))  # the seed's first examples are the same for every number of them
    digits = range(first, first + 5)
    chosen = np.concatenate([rng.permutation(np.flatnonzero(data.y_train == digit))[:shots] for digit in digits])
    return rng.choice(chosen, (STEPS, BATCH))


def program(make):
    """Validation and test accuracy: (rates, numbers of examples, seeds)."""

    def one(rate, rows, params, pixels, first):
        params = train(apply, optax.with_extra_args_support(make(rate)), params, rows, pixels)
        return {split: accuracy(apply, params, split, pixels, first) for split in ("validation", "test")}

    over_seeds = jax.vmap(one, in_axes=(None, 0, 0, None, None))
    over_shots = jax.vmap(over_seeds, in_axes=(None, 0, None, None, None))
    return jax.jit(jax.vmap(over_shots, in_axes=(0, None, None, None, None)))


test, tuned = {}, {}
for name, (make, params) in ARMS.items():
    run = program(make)
    for target, (first, pixels) in TARGETS.items():
        rows = jnp.asarray([[few(seed, shots, first) for seed in range(SEEDS)] for shots in SHOTS])
        result = jax.tree.map(np.asarray, run(jnp.asarray(RATES), rows, params, pixels, first))
        best = result["validation"].mean(-1).argmax(0)  # a rate for each number of examples
        tuned[target, name] = [RATES[i] for i in best]
        test[target, name] = np.stack([result["test"][i, j] for j, i in enumerate(best)])


def spread(values, sign=""):
    """Mean and standard deviation over the seeds, in percent."""
    return f"{100 * values.mean():{sign}.1f} ± {100 * values.std(ddof=SEEDS > 1):.1f}"


def table(title, cell):
    """One row an arm, one column a number of examples."""
    print(f"\n{title}\n\n| arm | {' | '.join(f'{shots} a class' for shots in SHOTS)} |\n|---{'|---' * len(SHOTS)}|")
    for name in ARMS:
        print(f"| {name} | {' | '.join(cell(name, j) for j in range(len(SHOTS)))} |")


for target in TARGETS:
    print(f"\n## {target}: test accuracy in percent, {SEEDS} seeds")
    table(
        "With the tuned base rate:", lambda name, j, of=target: f"{spread(test[of, name][j])} ({tuned[of, name][j]:g})"
    )
    table(
        "Minus one rate for all, paired by seed:",
        lambda name, j, of=target: "" if name == ONE_RATE else spread(test[of, name][j] - test[of, ONE_RATE][j], "+"),
    )
