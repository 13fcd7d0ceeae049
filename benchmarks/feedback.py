"""What steering by the loss costs: the step of a 784-512-512-10 network, batch 128, against plain momentum and Adam.

python benchmarks/feedback.py --out benchmarks/results/feedback.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from interleaved import measure, parser, report

import optax_structure as oxs

RULES = {"trend": 0.6, "variance": 0.4}


def network(key: jax.Array) -> Any:
    """Parameters of 784-512-512-10."""
    sizes = (784, 512, 512, 10)
    keys = jax.random.split(key, 3)
    return {
        f"layer_{i}": {
            "kernel": jax.random.normal(keys[i], (sizes[i], sizes[i + 1])) * (2 / sizes[i]) ** 0.5,
            "bias": jnp.zeros(sizes[i + 1]),
        }
        for i in range(3)
    }


def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    for name in ("layer_0", "layer_1"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    logits = x @ params["layer_2"]["kernel"] + params["layer_2"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def stepper(tx: optax.GradientTransformation, params: Any, *batch: Any) -> Callable[[], Any]:
    """One donated step that computes the loss and passes it on."""
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any, *batch: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    carry = [jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, *batch).compile()

    def run() -> Any:
        carry[0], carry[1], loss = compiled(*carry, *batch)
        return carry[0]["layer_2"]["bias"], loss

    return run


def norm_alone(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner``, and the norm of the gradients in the state: what any rule that reads it has to pay."""

    def init_fn(params: Any) -> Any:
        return jnp.zeros(()), inner.init(params)

    def update_fn(grads: Any, state: Any, params: Any = None) -> Any:
        updates, inner_state = inner.update(grads, state[1], params)
        return updates, (optax.tree.norm(grads), inner_state)

    return optax.GradientTransformation(init_fn, update_fn)


def main() -> None:
    """Measure and report."""
    options = parser(__doc__ or "", rounds=60)
    args = options.parse_args()
    key = jax.random.key(0)
    params = network(key)
    batch = (jax.random.normal(key, (128, 784)), jax.random.randint(key, (128,), 0, 10))
    momentum, adam = optax.sgd(1e-4, momentum=0.9), optax.adam(1e-4)
    questions = {
        "momentum": {
            "sgd with momentum": momentum,
            "scale_by_feedback, loss only": optax.chain(momentum, oxs.scale_by_feedback(lr_rules=RULES)),
            "norm alone": norm_alone(momentum),
            "scale_by_feedback, grad_norm": oxs.observe(optax.chain(momentum, oxs.scale_by_feedback())),
            "feedback_sgd": oxs.feedback_sgd(1e-4),
        },
        "adam": {
            "adam": adam,
            "scale_by_feedback, loss only": optax.chain(adam, oxs.scale_by_feedback(lr_rules=RULES)),
            "norm alone": norm_alone(adam),
            "scale_by_feedback, grad_norm": oxs.observe(optax.chain(adam, oxs.scale_by_feedback())),
            "feedback_adam": oxs.feedback_adam(1e-4),
        },
    }
    for name, arms in questions.items():
        runs = {arm: stepper(tx, params, *batch) for arm, tx in arms.items()}
        out = None if args.out is None else args.out.with_name(f"{args.out.stem}_{name}.json")
        report(f"{name}, 784-512-512-10, batch 128", measure(runs, args.rounds, repeats=20), out)


if __name__ == "__main__":
    main()
