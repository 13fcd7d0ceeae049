"""What activation statistics cost in a training step of 784-512-512-10, batch 128, plain Adam.

In the step they are reduced from activations that are there anyway; the other arm runs a second forward pass for them.
How it is measured: ``interleaved.py``.

    python benchmarks/extrema.py --out benchmarks/results/extrema.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from interleaved import measure, parser, report
from step_overhead import network

import optax_structure as oxs


def forward(params: Any, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits, and the activations of the hidden layers."""
    hidden, activations = images, {}
    for i in range(len(params)):
        hidden = hidden @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        if i < len(params) - 1:
            hidden = activations[f"layer_{i}"] = jax.nn.relu(hidden)
    return hidden, activations


def training(observe: str, params: Any, batch: Any) -> Callable[[], Any]:
    """A function that trains one step; ``observe``: where the statistics come from."""
    tx = optax.adam(1e-3)

    def loss(params: Any, images: jax.Array, targets: jax.Array) -> Any:
        logits, activations = forward(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), activations

    def step(params: Any, state: Any, stats: Any, images: jax.Array, targets: jax.Array) -> Any:
        (value, activations), grads = jax.value_and_grad(loss, has_aux=True)(params, images, targets)
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(params, updates)
        if observe == "second pass":
            activations = forward(params, images)[1]
        if observe:
            stats = oxs.update_activation_stats(stats, activations)
        return params, state, stats, value

    params = jax.tree.map(jnp.copy, params)
    carry = [params, tx.init(params), oxs.init_activation_stats(forward(params, batch[0])[1])]
    compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*carry, *batch).compile()

    def run() -> jax.Array:
        *carry[:], value = compiled(*carry, *batch)
        return value

    return run


def main() -> None:
    """Measure and report."""
    args = parser(__doc__ or "", rounds=60).parse_args()
    key = jax.random.key(0)
    batch = (jax.random.normal(key, (128, 784)), jax.random.randint(key, (128,), 0, 10))
    arms = {
        "no statistics": training("", network(key), batch),
        "in the step": training("step", network(key), batch),
        "in a second forward pass": training("second pass", network(key), batch),
    }
    report("a step of 784-512-512-10 at batch 128", measure(arms, args.rounds, repeats=10), args.out)


if __name__ == "__main__":
    main()
