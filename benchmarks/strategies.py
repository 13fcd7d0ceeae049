"""What the presets cost beyond plain ``optax.adam``: a training step, the optimizer alone, and compilation.

Four questions, each with its arms interleaved in one process and an A/A control (how: ``interleaved.py``):

- ``mlp``: a training step of 784-512-512-10 at batch 128;
- ``transformer``: a training step of a transformer of 5M parameters, 128 sequences of 16 tokens;
- ``optimizer``: the optimizer alone on 50M parameters (12 matrices of 2048 x 2048);
- ``leaves``: time to trace, to compile and to run the optimizer alone on 10, 100 and 300 leaves of 64 x 64.

``advanced`` and above are given ``extrema=``, ``comprehensive`` and above ``event=``, ``ultimate`` ``value=`` and unit
groups: everything that they have is on. ``temporaries_bytes`` is what XLA sets aside for one step
(``memory_analysis``), ``state_bytes`` the optimizer's state: what it has beyond Adam's is the presets'.

    python benchmarks/strategies.py --out benchmarks/results/strategies.json
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from interleaved import measure, parser, report
from step_overhead import loss as mlp_loss
from step_overhead import network

import optax_structure as oxs

Extra = dict[str, Any]
LEVELS = ("basic", "advanced", "comprehensive", "ultimate")


def arms_of(params: Any, depths: Any, units: Any = None) -> dict[str, tuple[optax.GradientTransformation, Extra]]:
    """Plain Adam, Adam with a count a leaf, the four levels and what they read, the last also without norms."""
    labels = jax.tree.map(lambda depth: "new" if depth == max(jax.tree.leaves(depths)) else "scaffold", depths)
    extrema = oxs.Extrema(
        dead={name: jnp.zeros(16, bool) for name in ("site",)}, saturated={"site": jnp.zeros(16, bool)}
    )
    if units is not None:
        none = {group.layer: jnp.zeros(group.size, bool) for group in units.groups[1:]}
        extrema = oxs.Extrema(dead=none, saturated=none)
    extra: Extra = {}
    arms: dict[str, tuple[optax.GradientTransformation, Extra]] = {
        "adam": (optax.adam(1e-3), {}),
        "per_leaf(adam)": (oxs.per_leaf(optax.adam(1e-3)), {}),
    }
    for level in LEVELS:
        extra = dict(extra)
        numbers: Extra = {"depths": depths, "steps_per_epoch": 400}
        if level == "advanced":
            extra["extrema"] = extrema
        if level == "comprehensive":
            extra["event"] = jnp.asarray(False)
        if level == "ultimate":
            extra["value"] = jnp.ones(())
            numbers["units"] = units
        arms[level] = (getattr(oxs.presets, level)(1e-3, labels, **numbers), extra)
    arms["ultimate, trust=None"] = (oxs.presets.ultimate(1e-3, labels, trust=None, **numbers), extra)
    return arms


def compiled_step(
    tx: optax.GradientTransformation, params: Any, extra: Extra, grad: Callable[..., Any], *batch: Any
) -> tuple[Callable[[], Any], dict[str, float]]:
    """A function that carries out one donated step, and what its compilation took and set aside."""
    tx = optax.with_extra_args_support(tx)

    def step(params: Any, state: Any, extra: Extra, *batch: Any) -> Any:
        updates, state = tx.update(grad(params, *batch), state, params, **extra)
        return optax.apply_updates(params, updates), state

    carry = [jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)]
    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, extra, *batch)
    traced = time.perf_counter()
    compiled = lowered.compile()
    facts = {
        "trace_s": round(traced - start, 3),
        "compile_s": round(time.perf_counter() - traced, 3),
        "temporaries_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(carry[1])),
    }

    def run() -> Any:
        carry[0], carry[1] = compiled(carry[0], carry[1], extra, *batch)
        return jax.tree.leaves(carry[0])[-1]

    return run, facts


def question(
    name: str, out: Path | None, rounds: int, repeats: int, arms: Any, params: Any, grad: Any, *batch: Any
) -> dict[str, Any]:
    """Measure one table and write it beside the others."""
    runs, facts = {}, {}
    for arm, (tx, extra) in arms.items():
        runs[arm], facts[arm] = compiled_step(tx, params, extra, grad, *batch)
    times = measure(runs, rounds, repeats=repeats)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    where = None if out is None else out.with_name(f"{out.stem}_{name.split()[0]}.json")
    return report(name, times, where, parameters=parameters, leaves=len(jax.tree.leaves(params)), programs=facts)


def transformer(key: jax.Array, blocks: int = 6, width: int = 256, vocabulary: int = 512) -> Any:
    """Parameters of a small pre-norm transformer."""

    def matrix(*shape: int) -> jax.Array:
        nonlocal key
        key, sub = jax.random.split(key)
        return jax.random.normal(sub, shape) * shape[0] ** -0.5

    def block() -> Any:
        attention = {name: {"kernel": matrix(width, width)} for name in ("query", "key", "value", "out")}
        dense = {"up": {"kernel": matrix(width, 4 * width)}, "down": {"kernel": matrix(4 * width, width)}}
        return {**attention, **dense, "norm_1": {"scale": jnp.ones(width)}, "norm_2": {"scale": jnp.ones(width)}}

    made = {f"block_{i}": block() for i in range(blocks)}
    return {"embed": {"kernel": matrix(vocabulary, width)}, **made, "head": {"kernel": matrix(width, vocabulary)}}


def transformer_loss(params: Any, tokens: jax.Array) -> jax.Array:
    """Cross-entropy of the next token."""

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return scale * (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)

    def attend(p: Any, x: jax.Array) -> jax.Array:
        q, k, v = (jnp.reshape(x @ p[name]["kernel"], (*x.shape[:2], 8, -1)) for name in ("query", "key", "value"))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ p["out"]["kernel"]

    x = params["embed"]["kernel"][tokens[:, :-1]]
    for name in sorted(name for name in params if name.startswith("block")):
        p = params[name]
        x = x + attend(p, norm(x, p["norm_1"]["scale"]))
        x = x + jax.nn.relu(norm(x, p["norm_2"]["scale"]) @ p["up"]["kernel"]) @ p["down"]["kernel"]
    logits = x @ params["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def compile_table(out: Path | None, rounds: int, counts: tuple[int, ...] = (10, 100, 300)) -> dict[str, Any]:
    """Seconds to trace and to compile, and the run time against Adam, by the number of leaves."""
    table: dict[str, Any] = {}
    for count in counts:
        params = {f"layer_{i:03d}": {"kernel": jnp.ones((64, 64))} for i in range(count)}
        arms = arms_of(params, oxs.layer_depths(params))
        runs, facts = {}, {}
        for arm, (tx, extra) in arms.items():
            runs[arm], facts[arm] = compiled_step(tx, params, extra, lambda p: jax.tree.map(lambda x: 0.1 * x, p))
        times = measure(runs, rounds, repeats=3)
        whole = {arm: fact["trace_s"] + fact["compile_s"] for arm, fact in facts.items()}
        for arm, fact in facts.items():
            fact["compile_ratio"] = round(fact["compile_s"] / facts["adam"]["compile_s"], 2)
            fact["trace_and_compile_ratio"] = round(whole[arm] / whole["adam"], 2)
            fact["run_ratio"] = round(float(np.median(times[arm] / times["adam"])), 3)
        table[str(count)] = facts
        print(json.dumps({count: facts}, indent=2), flush=True)
    if out is not None:
        where = out.with_name(f"{out.stem}_leaves.json")
        where.write_text(json.dumps(table, indent=2) + "\n")
    return table


def main() -> None:
    """Measure and report."""
    options = parser(__doc__ or "", rounds=40)
    names = ("mlp", "transformer", "optimizer", "leaves")
    options.add_argument("--only", choices=names, nargs="*", default=names, help="questions (default: all)")
    args = options.parse_args()
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    key = jax.random.key(0)
    if "mlp" in args.only:
        params = network(key)
        units = oxs.dense_chain(params, ["layer_0", "layer_1", "layer_2"])
        batch = (jax.random.normal(key, (128, 784)), jax.random.randint(key, (128,), 0, 10))
        arms = arms_of(params, oxs.layer_depths(params), units)
        question("mlp 784-512-512-10, batch 128", args.out, args.rounds, 20, arms, params, jax.grad(mlp_loss), *batch)
    if "transformer" in args.only:
        params = transformer(key)
        layers = ["embed", *(f"block_{i}" for i in range(6)), "head"]
        tokens = jax.random.randint(key, (128, 17), 0, 512)
        arms = arms_of(params, oxs.layer_depths(params, layers))
        name = "transformer, 128 sequences of 16 tokens"
        question(name, args.out, max(args.rounds // 4, 5), 1, arms, params, jax.grad(transformer_loss), tokens)
    if "optimizer" in args.only:
        params = {f"layer_{i:02d}": {"kernel": jnp.ones((2048, 2048))} for i in range(12)}
        grad = jax.tree.map(lambda p: 0.1 * p, params)
        arms = arms_of(params, oxs.layer_depths(params))
        given = functools.partial(lambda params, grad: grad)
        question("optimizer alone", args.out, max(args.rounds // 2, 5), 1, arms, params, given, grad)
    if "leaves" in args.only:
        compile_table(args.out, max(args.rounds // 4, 5))


if __name__ == "__main__":
    main()
