"""What masks and their rewiring cost: the step of 784-512-512-10, batch 128, density 5 %, against plain Adam.

    python benchmarks/sparsity.py --out benchmarks/results/sparsity.json

- ``static``: ``sparse(adam, masks)``; ``forward``: the same masks multiplied in the forward pass as well;
- ``set``, ``rigl``: rewired every 100 updates; every timing is of 100 updates, one of which does;
- ``rigl, accumulated``: by the mean of the last 100 gradients, or of the last 20;
- ``never``: the program of ``rigl`` that is never due: what the branch costs that is not taken.

``mask_update_ms`` is what one update of all masks costs, state included: the difference between a program that rewires
in every step and one that never does. ``temporary_bytes`` are XLA's, of the whole step; those of a branch that is not
taken are set aside and not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from feedback import loss_fn, network
from interleaved import measure, parser, report

import optax_structure as oxs

EVERY = 100


def stepper(
    tx: optax.GradientTransformation, params: Any, batch: Any, masks: Any = None
) -> tuple[Callable[[], Any], int]:
    """One donated step, and its temporaries in bytes; ``masks``: of the forward pass."""
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any, *batch: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return loss_fn(params if masks is None else oxs.apply_masks(params, masks), *batch)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    carry = [jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, *batch).compile()

    def run() -> Any:
        carry[0], carry[1], value = compiled(*carry, *batch)
        return value

    return run, int(compiled.memory_analysis().temp_size_in_bytes)


def main() -> None:
    """Measure and report."""
    options = parser(__doc__ or "", rounds=20)
    options.add_argument("--density", type=float, default=0.05)
    args = options.parse_args()
    key = jax.random.key(0)
    params = network(key)
    masks = oxs.random_masks(jax.random.key(1), params, args.density)
    params = oxs.apply_masks(params, masks)
    batch = (jax.random.normal(key, (128, 784)), jax.random.randint(key, (128,), 0, 10))
    adam = optax.adam(1e-4)

    def rewired(rule: oxs.Rewiring) -> tuple[Callable[[], Any], int]:
        return stepper(oxs.sparse(adam, masks, rewire=rule), params, batch)

    arms = {
        "adam": stepper(adam, params, batch),
        "static": stepper(oxs.sparse(adam, masks), params, batch),
        "forward": stepper(oxs.sparse(adam, masks), params, batch, masks),
        "set": rewired(oxs.set_rewiring(every=EVERY)),
        "rigl": rewired(oxs.rigl_rewiring(every=EVERY)),
        "rigl, accumulated": rewired(oxs.rigl_rewiring(every=EVERY, accumulate=EVERY)),
        "rigl, accumulated 20": rewired(oxs.rigl_rewiring(every=EVERY, accumulate=20)),
        "never": rewired(oxs.rigl_rewiring(every=10**8)),
    }
    times = measure({name: run for name, (run, _) in arms.items()}, args.rounds, repeats=EVERY)
    each = {name: rewired(made(every=1))[0] for name, made in (("set", oxs.set_rewiring), ("rigl", oxs.rigl_rewiring))}
    events = measure({"never": arms["never"][0], **each}, args.rounds, repeats=10)
    report(
        f"784-512-512-10, batch 128, density {args.density:g}",
        times,
        args.out,
        mask_update_ms={name: round(1e3 * float(np.median(events[name] - events["never"])), 2) for name in each},
        temporary_bytes={name: size for name, (_, size) in arms.items()},
    )


if __name__ == "__main__":
    main()
