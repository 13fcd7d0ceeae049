"""What a training step of 784-512-512-10, batch 128, costs beyond plain ``optax.adam``, transform by transform.

The last arm is the optimizer of ``optax-structure grow``: sparse AdamW, one count a leaf, a rate a connection, a cosine
schedule; weight decay is part of it and not of the first arm. ``temporaries_bytes`` is what XLA sets aside for one step
(``memory_analysis``): a transform that adds a parameter-sized temporary (2.7 MB here) shows there. How it is measured:
``interleaved.py``.

    python benchmarks/step_overhead.py --out benchmarks/results/step_overhead.json
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from interleaved import measure, parser, report

import optax_structure as oxs
from optax_structure.training.config import Config
from optax_structure.training.step import make_tx

WIDTHS = (784, 512, 512, 10)


def network(key: jax.Array) -> Any:
    """Parameters of a ReLU network."""
    sizes = itertools.pairwise(WIDTHS)
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(jax.random.fold_in(key, i), (fan_in, fan_out)) / jnp.sqrt(fan_in),
            "bias": jnp.zeros(fan_out),
        }
        for i, (fan_in, fan_out) in enumerate(sizes)
    }


def loss(params: Any, images: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of the network."""
    hidden = images
    for i in range(len(params)):
        hidden = hidden @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"]
        hidden = jax.nn.relu(hidden) if i < len(params) - 1 else hidden
    return optax.softmax_cross_entropy_with_integer_labels(hidden, targets).mean()


def training(tx: optax.GradientTransformation, params: Any, batch: Any) -> tuple[Callable[[], Any], int]:
    """A function that trains one step, and the bytes of temporaries of the compiled step."""
    transformation = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any, images: jax.Array, targets: jax.Array) -> Any:
        value, grads = jax.value_and_grad(loss)(params, images, targets)
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = jax.tree.map(jnp.copy, params)
    carry = [params, transformation.init(params)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, *batch).compile()

    def run() -> jax.Array:
        carry[0], carry[1], value = compiled(*carry, *batch)
        return value

    return run, compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Measure and report."""
    args = parser(__doc__ or "", rounds=60).parse_args()
    key = jax.random.key(0)
    params = network(key)
    batch = (jax.random.normal(key, (128, 784)), jax.random.randint(key, (128,), 0, 10))
    masks = oxs.random_masks(key, params, 0.05)
    labels = jax.tree.map(lambda _: "scaffold", params)
    depths = oxs.layer_depths(params)
    warmup = optax.linear_schedule(0.1, 1.0, 100)
    rules = (oxs.component_rule(scaffold=0.5, patch=1.0), oxs.age_rule(warmup))
    scales = {"scaffold": 0.5, "patch": 1.0, "new": warmup}

    def after_adam(*transforms: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(optax.scale_by_adam(), *transforms, optax.scale_by_learning_rate(1e-3))

    chains = {
        "adam": optax.adam(1e-3),
        "per_leaf(adam)": oxs.per_leaf(optax.adam(1e-3)),
        "scale_by_label": after_adam(oxs.scale_by_label(scales, labels)),
        "scale_by_depth": after_adam(oxs.scale_by_depth(0.5, depths)),
        "scale_by_age": after_adam(oxs.scale_by_age(warmup)),
        "scale_by_connection": after_adam(oxs.scale_by_connection(*rules)),
        "sparse(adam)": oxs.sparse(optax.adam(1e-3), masks),
        "the main job's chain": make_tx(Config(), 10_000, masks),
    }
    arms, temporaries = {}, {}
    for name, tx in chains.items():
        arms[name], temporaries[name] = training(tx, params, batch)
    times = measure(arms, args.rounds, repeats=10)
    report("a step of 784-512-512-10 at batch 128", times, args.out, temporaries_bytes=temporaries)


if __name__ == "__main__":
    main()
