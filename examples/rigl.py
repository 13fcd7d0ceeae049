"""Sparse training of Flax models as they are: an MLP, a CNN with BatchNorm, a transformer. Two lines each.

    masks = oxs.random_masks(key, params, 0.1)
    tx = oxs.sparse(optax.adam(1e-3), masks, rewire=oxs.rigl_rewiring(stop=1000))

The models know nothing of masks. Kernels have a tenth of their connections from the first step; every hundred updates
the weakest third of them go, and those with the largest gradients come. Biases, norms, embeddings are dense.

Each network is trained three ways on scikit-learn's digits (or MNIST): dense; with masks that stay; with RigL.

    python examples/rigl.py
    python examples/rigl.py --data-dir DIR --density 0.05        # MNIST
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import track

import optax_structure as oxs
from optax_structure.training import load_data

options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--data-dir", help="folder of MNIST's four IDX files; scikit-learn's digits without it")
options.add_argument("--density", type=float, default=0.1, help="share of the connections (default: %(default)s)")
options.add_argument("--seeds", type=int, default=5)
options.add_argument("--tiny", action="store_true", help="one seed, few steps, RigL alone")
args = options.parse_args()
SEEDS, STEPS, BATCH = (1, 40, 32) if args.tiny else (args.seeds, 1500, 64)
EVERY = 10 if args.tiny else 100
ARMS = ("RigL",) if args.tiny else ("dense", "static masks", "RigL")

data = load_data("digits", data_dir=args.data_dir, validation=1 / 6)
SIDE = data.image_shape[0]
x, y = (jnp.asarray(of) for of in (data.x_train, data.y_train))
images = x.reshape(-1, SIDE, SIDE, 1)
held = jnp.asarray(data.x_test).reshape(-1, SIDE, SIDE, 1), jnp.asarray(data.y_test)


# --- Three models, written as anybody would ---------------------------------------------------------------------------


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden_1 = nnx.Linear(SIDE * SIDE, 256, rngs=rngs)
        self.hidden_2 = nnx.Linear(256, 256, rngs=rngs)
        self.head = nnx.Linear(256, data.classes, rngs=rngs)

    def __call__(self, images):
        x = images.reshape(len(images), -1)
        return self.head(nnx.relu(self.hidden_2(nnx.relu(self.hidden_1(x)))))


class Cnn(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv_1 = nnx.Conv(1, 32, (3, 3), strides=2, rngs=rngs)
        self.norm_1 = nnx.BatchNorm(32, rngs=rngs)
        self.conv_2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
        self.norm_2 = nnx.BatchNorm(64, rngs=rngs)
        self.head = nnx.Linear(64, data.classes, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm_1(self.conv_1(images)))
        x = nnx.relu(self.norm_2(self.conv_2(x)))
        return self.head(x.mean((1, 2)))


class Transformer(nnx.Module):
    """Rows of the image are the tokens."""

    def __init__(self, rngs: nnx.Rngs):
        width = 64
        self.embed = nnx.Linear(SIDE, width, rngs=rngs)
        self.place = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, SIDE, width)))
        self.norm_1, self.norm_2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)
        self.head = nnx.Linear(width, data.classes, rngs=rngs)

    def __call__(self, images):
        x = self.embed(images[..., 0]) + self.place[...]
        x = x + self.attention(self.norm_1(x))
        x = x + self.down(nnx.relu(self.up(self.norm_2(x))))
        return self.head(x.mean(1))


MODELS = {"MLP": Mlp, "CNN with BatchNorm": Cnn, "transformer": Transformer}


# --- Training, the ordinary way ---------------------------------------------------------------------------------------


def connections(path, leaf):
    """What is sparse: kernels. (The transformer's table of places has axes enough, and is none.)"""
    return oxs.is_kernel(path, leaf) and path.endswith("kernel")


def optimizers(params, key):
    """Dense, and the two lines."""
    masks = oxs.random_masks(key, params, args.density, select=connections)
    rule = oxs.rigl_rewiring(every=EVERY, stop=3 * STEPS // 4, accumulate=EVERY)
    return {
        "dense": optax.adam(1e-3),
        "static masks": oxs.sparse(optax.adam(1e-3), masks),
        "RigL": oxs.sparse(optax.adam(1e-3), masks, rewire=rule),
    }


def train(kind, arm, seed):
    """Accuracy in percent, and what the network costs."""
    model = kind(nnx.Rngs(seed))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optimizers(params, jax.random.key(seed))[arm]
    state = tx.init(params)
    if arm != "dense":
        params = oxs.apply_masks(params, oxs.get_masks(state))

    @jax.jit
    def run(params, state, rest, rows):
        def step(carry, rows):
            params, state, rest = carry

            def loss_fn(params):
                model = nnx.merge(graphdef, params, rest, copy=True)
                logits = model(images[rows])
                loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()
                return loss, nnx.state(model, nnx.Not(nnx.Param))

            grads, rest = jax.grad(loss_fn, has_aux=True)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state, rest), None

        return jax.lax.scan(step, (params, state, rest), rows)[0]

    rows = np.random.default_rng(seed).integers(0, len(x), (STEPS, BATCH))
    params, state, rest = run(params, state, rest, rows)
    model = nnx.merge(graphdef, params, rest)
    model.eval()
    right = [
        model(held[0][at : at + 1000]).argmax(-1) == held[1][at : at + 1000] for at in range(0, len(held[0]), 1000)
    ]
    masks = True if arm == "dense" else oxs.get_masks(state)

    def apply(params, images):
        return nnx.merge(graphdef, params, rest, copy=True)(images)

    return 100 * float(jnp.concatenate(right).mean()), oxs.count(apply, params, masks, images[:1]).total


print(f"{len(x)} training images, {STEPS} steps, {SEEDS} seeds, density {args.density:g}\n")
print("| model | arm | test accuracy, % | parameters that are not 0 | training FLOPs an image, were sparsity free |")
print("|---|---|---|---|---|")
runs = [(name, arm) for name in MODELS for arm in ARMS]
for name, arm in track(runs, "training", transient=True):
    found = [train(MODELS[name], arm, seed) for seed in range(SEEDS)]
    accuracy, cost = np.array([of[0] for of in found]), found[0][1]
    spread = f"{accuracy.mean():.2f} ± {accuracy.std(ddof=SEEDS > 1):.2f}"
    print(f"| {name} | {arm} | {spread} | {cost.nonzero:,} | {cost.free_training_flops / 1e6:.2f} M |")
