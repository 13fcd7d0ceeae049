"""What freezing saves: the step with some layers frozen against the plain step of Adam with none.

    python benchmarks/freezing.py --out benchmarks/results/freezing.json

Two networks: a 12 x 1024 MLP with ReLU (batch 128), and a transformer of 12 blocks (width 128, 1,024 tokens). Arms,
each with the first 0, 6 or 11 of 12 layers frozen:

- ``gates``: ``freeze_on_small_gradients(per_leaf(adam))`` and ``gated`` layers (whole blocks in the transformer), with
  the depths known, so that the backward pass ends at the frontier (level 2);
- ``gates, checkpoint``: the same with ``gated(jax.checkpoint(layer))``, which keeps a layer's inputs alone for its
  backward pass; and ``plain, checkpoint``, so that the gates are not credited with what the memory saves;
- ``gates, no depths``: the same without depths: the gradient of every layer's inputs is computed (level 1);
- ``plan``: the same transformation under a static ``FreezePlan``;
- ``labels``: ``freeze_labels(adam)``, static too, without any state of what is frozen.

The gates' frontier is moved 20 times in one compiled program, whose traces are counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from interleaved import measure, parser, report

import optax_structure as oxs

FROZEN = (0, 6, 11)
LAYERS = 12
Apply = Callable[[Any, Any, Any], jax.Array]


def mlp(key: jax.Array, width: int = 1024, batch: int = 128) -> tuple[Any, Callable[..., jax.Array], tuple[Any, ...]]:
    """Parameters; ``loss(params, gates, x, y)`` with plain layers where gates are None; and a batch."""
    keys = jax.random.split(key, LAYERS + 2)
    params = {
        f"layer_{i:02d}": {
            "kernel": jax.random.normal(keys[i], (width, width)) * (2 / width) ** 0.5,
            "bias": jnp.zeros(width),
        }
        for i in range(LAYERS)
    }

    def layer(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ p["kernel"] + p["bias"])

    shape = (batch, width)
    return params, _loss_through(layer), (jax.random.normal(keys[-2], shape), jax.random.normal(keys[-1], shape))


def transformer(
    key: jax.Array, width: int = 128, sequences: int = 16, length: int = 64
) -> tuple[Any, Callable[..., jax.Array], tuple[Any, ...]]:
    """The same for 12 pre-norm blocks over embedded tokens.

    Tokens are rows of one matrix, ``(sequences * length, width)``. Over two axes, outside of a branch, XLA on CPU
    sums the gradient of a weight twice as slowly, and the plain program would lose by it.
    """
    keys = jax.random.split(key, 6 * LAYERS + 2)

    def matrix(index: int, *shape: int) -> jax.Array:
        return jax.random.normal(keys[index], shape) * shape[0] ** -0.5

    params = {
        f"block_{i:02d}": {
            **{name: matrix(6 * i + j, width, width) for j, name in enumerate(("query", "key", "value", "out"))},
            "up": matrix(6 * i + 4, width, 4 * width),
            "down": matrix(6 * i + 5, 4 * width, width),
            "norm_1": jnp.ones(width),
            "norm_2": jnp.ones(width),
        }
        for i in range(LAYERS)
    }

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)

    def block(p: Any, x: jax.Array) -> jax.Array:
        h = norm(x, p["norm_1"])
        q, k, v = (jnp.reshape(h @ p[name], (sequences, length, 4, -1)) for name in ("query", "key", "value"))
        x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["out"]
        return x + jax.nn.relu(norm(x, p["norm_2"]) @ p["up"]) @ p["down"]

    shape = (sequences * length, width)
    return params, _loss_through(block), (jax.random.normal(keys[-2], shape), jax.random.normal(keys[-1], shape))


def _loss_through(layer: Callable[[Any, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """Mean squared error of one such layer after the other."""

    def loss(params: Any, gates: Any, x: jax.Array, y: jax.Array, *, checkpoint: bool = False) -> jax.Array:
        call = jax.checkpoint(layer) if checkpoint else layer
        for name in params:
            x = call(params[name], x) if gates is None else oxs.gated(call)(gates[name], params[name], x)
        return jnp.mean(jnp.square(x - y))

    return loss


def freezing() -> optax.GradientTransformationExtraArgs:
    """Gates that stay where the benchmark puts them: no gradient is small enough, no probe is due."""
    return oxs.freeze_on_small_gradients(
        oxs.per_leaf(optax.adam(1e-5)), 0.0, min_dwell=10**9, probe_every=10**9, alarm=None
    )


def with_frontier(state: Any, depths: Any, layers: int) -> Any:
    """The state with the first layers frozen."""
    return state._replace(frozen=jax.tree.map(lambda depth: jnp.asarray(depth < layers), depths))


def arms_of(params: Any, loss: Callable[..., Any], batch: Any, layers: int) -> dict[str, Callable[[], Any]]:
    """One donated step an arm, with the first ``layers`` frozen."""
    depths = oxs.layer_depths(params)
    plan = oxs.FreezePlan(frozenset(path for path, at in _paths(depths).items() if at < layers))

    def gated(params: Any, state: Any, *batch: Any, known: bool = True, **how: Any) -> Any:
        gates = oxs.gates(state, depths if known else None)
        value, grads = jax.value_and_grad(loss)(params, gates, *batch, **how)
        updates, state = tx.update(grads, state, params, value=value, observed=oxs.observed(gates))
        return optax.apply_updates(params, updates), state

    def planned(params: Any, state: Any, *batch: Any) -> Any:
        value, grads = jax.value_and_grad(lambda p: loss(plan.stop_gradient(p), None, *batch))(params)
        updates, state = tx.update(grads, state, params, value=value, observed=plan.observed(params))
        return optax.apply_updates(params, updates), state

    def plain(params: Any, state: Any, *batch: Any, of: Any, **how: Any) -> Any:
        updates, state = of.update(jax.grad(loss)(params, None, *batch, **how), state, params)
        return optax.apply_updates(params, updates), state

    tx = freezing()
    labels = jax.tree.map(lambda depth: "frozen" if depth < layers else "live", depths)
    labelled = oxs.freeze_labels(optax.adam(1e-5), "frozen" if layers else (), labels)
    steps = {
        f"gates {layers}": (gated, tx),
        f"gates, checkpoint {layers}": (functools.partial(gated, checkpoint=True), tx),
        f"gates, no depths {layers}": (functools.partial(gated, known=False), tx),
        f"plan {layers}": (planned, tx),
        f"labels {layers}": (functools.partial(plain, of=labelled), labelled),
    }
    if not layers:
        adam = optax.adam(1e-5)
        steps = {
            "plain": (functools.partial(plain, of=adam), adam),
            "plain, checkpoint": (functools.partial(plain, of=adam, checkpoint=True), adam),
            **steps,
        }
    runs = {}
    for name, (step, of) in steps.items():
        state = jax.jit(of.init)(params)
        state = with_frontier(state, depths, layers) if of is tx else state
        runs[name] = _runner(step, params, state, batch)
    return runs


def _runner(step: Callable[..., Any], params: Any, state: Any, batch: Any) -> Callable[[], Any]:
    carry = [jax.tree.map(jnp.copy, params), state]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, *batch).compile()

    def run() -> Any:
        carry[0], carry[1] = compiled(*carry, *batch)
        return jax.tree.leaves(carry[0])[-1]

    return run


def _paths(depths: Any) -> dict[str, int]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): depth
        for path, depth in jax.tree_util.tree_leaves_with_path(depths)
    }


def traces_while_the_frontier_moves(params: Any, loss: Any, batch: Any, moves: int = 20) -> int:
    """How often the step of the gates was traced while its frontier moved."""
    depths, tx, traces = oxs.layer_depths(params), freezing(), []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, *batch: Any) -> Any:
        traces.append(None)
        gates = oxs.gates(state, depths)
        value, grads = jax.value_and_grad(loss)(params, gates, *batch)
        updates, state = tx.update(grads, state, params, value=value, observed=oxs.observed(gates))
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state = jax.jit(tx.init)(params)
    for move in range(moves):
        params, state = step(params, with_frontier(state, depths, move % LAYERS), *batch)
    return len(traces)


def main() -> None:
    """Measure and report."""
    options = parser(__doc__ or "", rounds=30)
    options.add_argument("--only", choices=("mlp", "transformer"), nargs="*", default=("mlp", "transformer"))
    args = options.parse_args()
    for name in args.only:
        params, loss, batch = {"mlp": mlp, "transformer": transformer}[name](jax.random.key(0))
        runs = {arm: run for layers in FROZEN for arm, run in arms_of(params, loss, batch, layers).items()}
        traces = traces_while_the_frontier_moves(params, loss, batch)
        out = None if args.out is None else args.out.with_name(f"{args.out.stem}_{name}.json")
        parameters = int(np.sum([leaf.size for leaf in jax.tree.leaves(params)]))
        report(name, measure(runs, args.rounds), out, parameters=parameters, traces_in_20_moves=traces)


if __name__ == "__main__":
    main()
