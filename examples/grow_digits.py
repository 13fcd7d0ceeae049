"""Grow a sparse network on scikit-learn's digits, written out in library calls: what `optax-structure grow` does.

Run it: python examples/grow_digits.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_structure as oxs
from optax_structure import nn

STEPS, CHUNK, BATCH, BUDGET = 1600, 100, 128, 1600
GROWTH = {100: "connections", 200: "patches", 300: "widen", 400: "insert"}  # what is added after which step

images, digits = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(digits))
x, y = jnp.asarray((images[order] - images.mean()) / images.std(), jnp.float32), jnp.asarray(digits[order])
x, x_held, y, y_held = x[:1437], x[1437:], y[:1437], y[1437:]

# `units` states which axes of which leaves are the same unit; masks say which connections exist. The first weights are
# drawn by each unit's living inputs, then set to unit variance on a batch.
chain = nn.linen.Chain((("hidden_1", 64), ("hidden_2", 32), ("head", 10)))
params = chain.init(jax.random.key(0), x[:1])["params"]
units = oxs.dense_chain(params, ["hidden_1", "hidden_2", "head"])
labels = jax.tree.map(lambda _: "scaffold", params)
masks = oxs.random_masks(jax.random.key(1), params, 0.1)
pre_activations = nn.capture(chain, activation=None)
params = nn.sparse_init_tree(jax.random.key(2), params, masks)
params = nn.lsuv(lambda params: pre_activations(params, x[:512])[1], params, units.layers)


def make_tx(masks):
    """Sparse AdamW: one count a leaf; young connections warm up, the scaffold is slower than what was grown."""
    warmup = oxs.age_rule(optax.linear_schedule(0.04, 1.0, 25))
    inner = optax.chain(
        oxs.per_leaf(optax.scale_by_adam()),
        optax.add_decayed_weights(0.05),
        oxs.scale_by_connection(oxs.component_rule(scaffold=0.7), warmup),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(1e-2, STEPS)),
    )
    return oxs.sparse(inner, masks)


def make_run(units, tx):
    """Loss and a jitted scan over many steps; each step's activations go into the statistics."""
    apply = nn.capture(nn.linen.Chain.from_units(units), activation=dict.fromkeys(units.layers[:-1], jax.nn.relu))

    def loss(params, x, y):
        logits, activations = apply(params, x)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (logits, activations)

    def step(carry, rows):
        params, state, stats = carry
        (value, (_, activations)), grads = jax.value_and_grad(loss, has_aux=True)(params, x[rows], y[rows])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, oxs.update_activation_stats(stats, activations)), value

    stats = oxs.init_activation_stats(jax.eval_shape(apply, params, x)[1])
    return loss, stats, jax.jit(lambda carry, rows: jax.lax.scan(step, carry, rows), donate_argnums=0)


tx = make_tx(masks)
loss, stats, run = make_run(units, tx)
carry, rng = (params, tx.init(params), stats), np.random.default_rng(0)
for step in range(CHUNK, STEPS + 1, CHUNK):
    carry, losses = run(carry, jnp.asarray(rng.integers(0, len(x), (CHUNK, BATCH))))
    params, state, stats = carry
    net = (params, labels, oxs.get_masks(state), units)
    key, action, growths = jax.random.fold_in(jax.random.key(3), step), GROWTH.get(step), []
    if action is None and step <= 0.75 * STEPS:  # the weakest fifth goes elsewhere
        pruned = oxs.prune_connections(*net, count := oxs.nonzero(net[2]) // 5, key=key)
        growths = [pruned, oxs.add_connections(*pruned[:4], count, key=key)]
    elif action is not None:
        extrema, room = oxs.find_extrema(stats), (BUDGET - oxs.nonzero(net[2])) // 3
        if action == "connections":
            scores = oxs.extrema_scores(params, net[2], units, extrema, key=key)
            growths = [oxs.add_connections(*net, room, key=key, scores=scores, component="new")]
        elif action == "patches":
            growths = [oxs.embed_patches(*net, room // 64 + 1, key=key, extrema=extrema, max_new=room)]
        elif action == "widen":
            growths = [oxs.widen(*net, "hidden_1", 8, key=key)]
        else:
            inserted = oxs.insert_layer(*net, "hidden_1", key=key, density=0.02)
            room = BUDGET - oxs.nonzero(inserted.masks)  # the budget is met exactly, the inserted layer included
            growths = [inserted, oxs.add_connections(*inserted[:4], room, key=key, component="new")]
    for growth in growths:
        reshaped = growth.units != units  # masks alone: go on with the old compiled step
        new_tx = make_tx(growth.masks) if reshaped else tx
        state = oxs.transfer_state(tx, state, params, new_tx, growth.params, growth=growth)
        params, labels, units, tx = growth.params, growth.labels, growth.units, new_tx
        if reshaped:
            loss, stats, run = make_run(units, tx)
        carry = (params, state, stats)
    accuracy = (loss(params, x_held, y_held)[1][0].argmax(-1) == y_held).mean()
    count = oxs.nonzero(oxs.get_masks(state))
    print(f"step {step:5}  loss {losses.mean():.4f}  {count} weights  held out {accuracy:.2%}  {action or ''}")
