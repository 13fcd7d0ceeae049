"""What a growth event costs, in training steps of 784-512-512-10, batch 128, 5 % dense, with the main job's optimizer.

A mask-only event is an action (connections, patches, or a rewiring: prune and add) and ``transfer_state``; the next
step runs in the program that was there. ``compiled_after_the_first`` counts what XLA compiled in all later events and
the steps after them: 0 is the claim. A change of shape (widen) is timed once, compilation included, and put in steps.
How it is measured: ``interleaved.py``.

    python benchmarks/growth_event.py --out benchmarks/results/growth_event.json
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from interleaved import measure, parser, report

import optax_structure as oxs
from optax_structure.training.config import Config
from optax_structure.training.network import chain, dense_gradients, init_params, params_like
from optax_structure.training.step import Carry, first_stats, make_program, make_tx

CONFIG = Config(widths=(512, 512), density=0.05, final_density=0.06)
COUNT = 1000


class Compilations(logging.Handler):
    """Counts what XLA compiles, from JAX's own log."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Called by ``logging`` for every message."""
        self.count += record.getMessage().startswith("Finished XLA compilation")


def listen() -> Compilations:
    """A counter of compilations from now on."""
    jax.config.update("jax_log_compiles", True)
    counter = Compilations()
    logger = logging.getLogger("jax")
    logger.addHandler(counter)
    logger.propagate = False
    return counter


def main() -> None:
    """Measure and report."""
    args = parser(__doc__ or "", rounds=40).parse_args()
    key = jax.random.key(0)
    x, y = jax.random.normal(key, (1024, 784)), jax.random.randint(key, (1024,), 0, 10)
    units = chain([784, 512, 512, 10])
    masks = oxs.random_masks(key, params_like(units), CONFIG.density)
    params = init_params(key, params_like(units), masks, units, x)
    labels = jax.tree.map(lambda _: "scaffold", params)
    tx = make_tx(CONFIG, 10_000, masks)
    program = make_program(tx, units)
    index = np.arange(128, dtype=np.int32)[None]
    carry = [program.run(Carry(params, tx.init(params), first_stats(params, units)), x, y, index)[0]]
    grads = dense_gradients(carry[0].params, units, x, y)

    def step() -> Any:
        carry[0], out = program.run(carry[0], x, y, index)
        return out

    def event(action: Callable[..., oxs.Growth], **kwargs: Any) -> Callable[[], Any]:
        def run() -> Any:
            params, state, _ = carry[0]
            growth = action(params, labels, oxs.get_masks(state), units, COUNT, key=key, **kwargs)
            return growth.params, oxs.transfer_state(tx, state, params, tx, growth.params, growth=growth, grads=grads)

        return run

    def rewiring() -> Any:
        params, state, _ = carry[0]
        pruned = oxs.prune_connections(params, labels, oxs.get_masks(state), units, COUNT, key=key)
        growth = oxs.add_connections(*pruned[:4], COUNT, key=key, scores=jax.tree.map(jnp.abs, grads))
        return growth.params, oxs.transfer_state(tx, state, params, tx, growth.params, growth=growth, grads=grads)

    def patches(params: Any, labels: Any, masks: Any, units: oxs.Units, count: int, *, key: jax.Array) -> oxs.Growth:
        return oxs.embed_patches(params, labels, masks, units, count // 64, key=key, max_new=count)

    arms: dict[str, Callable[[], Any]] = {
        "training step": step,
        "connections + transfer_state": event(oxs.add_connections, component="new"),
        "patches + transfer_state": event(patches),
        "prune and add + transfer_state": rewiring,
    }
    events = [arm for arm in arms.values() if arm is not step]

    def go_on() -> None:
        """Each event once, and a step from what it made, in the program that was there."""
        for grow in events:
            params, state = grow()
            carry = jax.tree.map(jnp.copy, Carry(params, state, first_stats(params, units)))
            jax.block_until_ready(program.run(carry, x, y, index))

    step()
    go_on()
    counter = listen()
    times = measure(arms, args.rounds)
    go_on()
    compiled = counter.count

    params, state, _ = carry[0]
    began = time.perf_counter()
    growth = oxs.widen(params, labels, oxs.get_masks(state), units, "hidden_2", 64, key=key)
    new_tx = make_tx(CONFIG, 10_000, growth.masks)
    state = oxs.transfer_state(tx, state, params, new_tx, growth.params, growth=growth)
    wider = make_program(new_tx, growth.units)
    jax.block_until_ready(wider.run(Carry(growth.params, state, first_stats(growth.params, growth.units)), x, y, index))
    widened = time.perf_counter() - began
    report(
        "what does a growth event cost in training steps?",
        times,
        args.out,
        compiled_after_the_first=compiled,
        widen_with_compilation_in_steps=round(widened / float(np.median(times["training step"])), 1),
    )


if __name__ == "__main__":
    main()
