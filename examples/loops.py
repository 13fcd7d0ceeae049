"""One training step, four frameworks: Flax NNX, Flax Linen, Equinox and Keras on JAX.

A transformation of this library sees a pytree of parameters and a pytree of gradients, so one chain and one step serve
every framework that can say two things: what the parameters are, and a pure function ``apply(params, x) -> logits``.
Each part below says those two things and nothing else. At the end ``training.fit`` writes the loop for you.

    python examples/loops.py

Equinox and Keras are left out where they are not installed.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # read by Keras at its import

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

import optax_structure as oxs
from optax_structure.training import fit, load_data

EPOCHS, BATCH, SIZES = 12, 64, (64, 48, 10)
data = load_data("digits")
x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
STEPS = EPOCHS * len(x) // BATCH
ROWS = jnp.asarray(np.random.default_rng(0).integers(0, len(x), (STEPS, BATCH)))

# The chain. A label is found by a leaf's path, which reads alike everywhere: "hidden/kernel", "sequential/head/bias".
# The head learns at the full rate after a warm-up of its own, the layer below it at a third.
labels = oxs.label_by_path([(r"(^|/)head/", "new")], default="scaffold")
warmup = optax.linear_schedule(0.0, 1.0, 25)
tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    oxs.per_leaf(optax.scale_by_adam()),
    oxs.scale_by_label({"scaffold": 0.3, "new": warmup}, labels),
    optax.scale_by_learning_rate(1e-2),
)


def train(apply, params):
    """The step, the same for all: many of them in one compiled scan."""

    def loss(params, rows):
        return optax.losses.softmax_cross_entropy_with_integer_labels(apply(params, x[rows]), y[rows]).mean()

    def step(carry, rows):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, rows)
        updates, state = tx.update(grads, state, params, value=value)  # value= is there for rules that read the loss
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), ROWS))
    (params, _), losses = run(params)
    return params, losses


def report(name, apply, params):
    trained, losses = train(apply, params)
    right = jnp.argmax(apply(trained, data.x_test), axis=-1) == data.y_test
    counts = oxs.label_counts(labels, params)
    print(f"{name:<14} loss {losses[0]:.3f} -> {losses[-1]:.3f}  test accuracy {right.mean():.2%}  weights {counts}")


# --- Flax NNX: split the module once, and merge it inside the step ----------------------------------------------------
class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(SIZES[0], SIZES[1], rngs=rngs)
        self.head = nnx.Linear(SIZES[1], SIZES[2], rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x)))


graphdef, nnx_params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
report("Flax NNX", lambda params, x: nnx.merge(graphdef, params, rest)(x), nnx_params)


# --- Flax Linen: functional already -----------------------------------------------------------------------------------
class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(SIZES[2], name="head")(linen.relu(linen.Dense(SIZES[1], name="hidden")(x)))


linen_net = LinenNet()
variables = linen_net.init(jax.random.key(0), x[:1])
report("Flax Linen", lambda params, x: linen_net.apply({"params": params}, x), variables["params"])

# --- Equinox: the module is the pytree; its arrays are the parameters -------------------------------------------------
if importlib.util.find_spec("equinox"):
    import equinox as eqx

    class EquinoxNet(eqx.Module):
        hidden: eqx.nn.Linear
        head: eqx.nn.Linear

        def __init__(self, key):
            below, above = jax.random.split(key)
            self.hidden = eqx.nn.Linear(SIZES[0], SIZES[1], key=below)
            self.head = eqx.nn.Linear(SIZES[1], SIZES[2], key=above)

        def __call__(self, x):
            return self.head(jax.nn.relu(self.hidden(x)))

    arrays, static = eqx.partition(EquinoxNet(jax.random.key(0)), eqx.is_inexact_array)
    report("Equinox", lambda params, x: jax.vmap(eqx.combine(params, static))(x), arrays)
else:
    print("Equinox        left out: pip install equinox")

# --- Keras on JAX: its variables by their paths, and stateless_call ---------------------------------------------------
if importlib.util.find_spec("keras"):
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    keras_net = keras.Sequential(
        [
            keras.Input(SIZES[:1]),
            layers.Dense(SIZES[1], activation="relu", name="hidden"),
            layers.Dense(SIZES[2], name="head"),
        ]
    )
    order = [variable.path for variable in keras_net.trainable_variables]
    fixed = [variable.value for variable in keras_net.non_trainable_variables]
    by_path = {variable.path: jnp.asarray(variable.value) for variable in keras_net.trainable_variables}
    report(
        "Keras on JAX",
        lambda params, x: keras_net.stateless_call([params[path] for path in order], fixed, x)[0],
        by_path,
    )
else:
    print("Keras on JAX   left out: pip install keras")

# --- And without writing the loop: fit takes an NNX module, a Linen module or such an apply --------------------------
result = fit(
    Net(nnx.Rngs(0)), (x, y), (data.x_validation, data.y_validation), tx, epochs=EPOCHS, batch_size=BATCH, patience=5
)
best = result.history[result.best_epoch - 1]
accuracy = (result.model(data.x_test).argmax(-1) == data.y_test).mean()
print(f"training.fit   best epoch {best.epoch}, validation {best.val_accuracy:.2%}, test accuracy {accuracy:.2%}")
