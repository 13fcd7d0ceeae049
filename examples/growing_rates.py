"""The rates of a run that grows: ``presets.structure_net`` on digits, logged from the run and drawn under its loss.

A sparse network gets connections, then patches, then a layer; each time the optimizer's state is carried over, and the
preset hears of it by ``event=True``: the scaffold is slowed for a while, what is new warms up. At last the new layer is
made part of the scaffold. (The patches' rate rises as the layer comes: they are further from the input then.)

    python examples/growing_rates.py --out growing_rates.png
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import optax_structure as oxs
from optax_structure import nn
from optax_structure.training import RateTrace, load_data, plot_rates, rate_record

BATCH, EPOCHS, CHUNK = 16, 30, 10
GROWTH = {600: "connections", 1100: "patches", 1600: "layer", 2100: "relabel"}

data = load_data("digits")
x, y = jnp.asarray(data.x_train), jnp.asarray(data.y_train)
STEPS_PER_EPOCH = len(x) // BATCH
STEPS = EPOCHS * STEPS_PER_EPOCH // CHUNK * CHUNK


def make_tx(labels, masks, units):
    """The preset; a warm-up and a recovery of an epoch or two, to be seen in the picture."""

    def depths(params):
        of_patches = {patch.name: units.layers.index(patch.layer) - 1 for patch in units.patches}
        of_layers = {layer: depth for depth, layer in enumerate(units.layers)}
        return {name: jax.tree.map(lambda _, n=name: (of_patches | of_layers)[n], params[name]) for name in params}

    preset = oxs.presets.structure_net(
        3e-3, labels, depths=depths, steps_per_epoch=STEPS_PER_EPOCH, warmup=1.0, recovery=2.0
    )
    return oxs.sparse(preset, masks)


def make_run(tx, units):
    """A jitted scan over some steps; ``event`` is true in the first of them after growth."""
    chain = nn.linen.Chain.from_units(units)

    def loss(params, rows):
        logits: Any = chain.apply({"params": params}, x[rows])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    def step(carry, now):
        (params, state), (rows, event) = carry, now
        value, grads = jax.value_and_grad(loss)(params, rows)
        updates, state = tx.update(grads, state, params, event=event)
        return (optax.apply_updates(params, updates), state), value

    return jax.jit(lambda carry, rows, events: jax.lax.scan(step, carry, (rows, events)))


def grow(action, params, labels, masks, units, key):
    if action == "connections":
        return oxs.add_connections(params, labels, masks, units, 200, key=key)
    if action == "patches":
        return oxs.add_patches(params, labels, masks, units, "hidden_2", 3, key=key)
    return oxs.insert_layer(params, labels, masks, units, "hidden_1", key=key, density=0.05)


def train():
    """The records of the rates, the losses, and the events of a run."""
    chain = nn.linen.Chain((("hidden_1", 64), ("hidden_2", 32), ("head", 10)))
    params = chain.init(jax.random.key(0), x[:1])["params"]
    units = oxs.dense_chain(params, ["hidden_1", "hidden_2", "head"])
    labels = jax.tree.map(lambda _: "scaffold", params)
    masks = oxs.random_masks(jax.random.key(1), params, 0.05)
    params = nn.sparse_init_tree(jax.random.key(2), params, masks)
    tx = make_tx(labels, masks, units)
    run, state, records, losses, rng = make_run(tx, units), tx.init(params), [], [], np.random.default_rng(0)
    for step in range(0, STEPS, CHUNK):
        action, masks = GROWTH.get(step), oxs.get_masks(state)
        if action == "relabel":  # what was new has learned by now
            labels = oxs.relabel(labels, {"new": "scaffold"})
            new_tx = make_tx(labels, masks, units)
            state = oxs.transfer_state(tx, state, params, new_tx, params)
        elif action:
            growth = grow(action, params, labels, masks, units, jax.random.fold_in(jax.random.key(3), step))
            new_tx = make_tx(growth.labels, growth.masks, growth.units)
            state = oxs.transfer_state(tx, state, params, new_tx, growth.params, growth=growth)
            params, labels, _, units = growth[:4]
        if action:
            tx, run = new_tx, make_run(new_tx, units)
        events = np.arange(CHUNK) == (0 if action and action != "relabel" else -1)
        records.append(rate_record(step, tx, state, params, labels, event=events[0]))
        (params, state), values = run((params, state), rng.integers(0, len(x), (CHUNK, BATCH)), events)
        losses.append(values)
    return RateTrace.of(records), np.concatenate(losses), oxs.nonzero(oxs.get_masks(state))


def draw(trace, losses, out):
    figure = Figure(figsize=(6, 4.4), dpi=300, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    names = {"connections": "+ connections", "patches": "+ patches", "layer": "+ layer", "relabel": "new → scaffold"}
    plot_rates(trace, ax=bottom)
    smooth = np.convolve(losses, np.ones(50) / 50, "valid")
    top.plot(np.arange(49, len(losses)), smooth, color="#22303c", lw=1.2)
    for step, action in GROWTH.items():
        for axes in (top, bottom):
            axes.axvline(step, color="#a9b4bd", lw=0.7, zorder=0)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        top.annotate(names[action], (step, 1), (2, 3), fontsize=8, color="#22303c", **place)
    top.set_yscale("log", subs=[])
    top.set_yticks([0.3, 1, 3], ["0.3", "1", "3"])
    top.set_ylabel("training loss\n(mean of 50 steps)", fontsize=9, color="#22303c")
    top.tick_params(labelsize=8)
    note = "line: mean of the label\nband: lowest to highest"
    box = {"bbox": {"fc": "white", "ec": "none", "pad": 1}}
    bottom.text(0.985, 0.05, note, transform=bottom.transAxes, ha="right", fontsize=7, color="#22303c", **box)
    top.spines[["top", "right"]].set_visible(False)
    figure.savefig(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="growing_rates.png", help="the picture to write")
    out = parser.parse_args().out
    trace, losses, connections = train()
    draw(trace, losses, out)
    print(f"loss {losses[-100:].mean():.4f} over the last 100 of {STEPS} steps, {connections:,} connections: {out}")
