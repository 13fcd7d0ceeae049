"""What the fast sparse forms cost: one layer, and one network, against their dense twins.

    python benchmarks/fast_forms.py --out benchmarks/results/fast_forms.json

One layer, batch 128: output, gradients of the weights and of the inputs, and a step of SGD. Dense, in tiles of 16, 32
and 64 at 1, 2, 5 and 10 %, and with a constant fan-in at 1, 2 and 5 %, for 784 x 512 and 4096 x 4096. The tiles lie at
random, so columns of tiles have different numbers of them. A rewiring of a tenth of the layer stands beside it.

A network, 784-1024-1024-1024-10 with ReLU and biases, batch 128, cross-entropy, Adam: dense, masked dense
(``oxs.sparse``), and with its three large layers at 5 % in tiles of 32 and 64, or at constant fan-in. The head is dense
in all of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from interleaved import measure, parser, report

import optax_structure as oxs
from optax_structure import nn
from optax_structure.nn.fast import BlockLinear, FanInLinear
from optax_structure.sparsity.blocks import block_matmul, random_blocks, rewire_blocks
from optax_structure.sparsity.fan_in import fan_in_matmul, random_fan_in, rewire_fan_in, transpose_fan_in

BATCH = 128
LAYERS = {"784x512": (784, 512), "4096x4096": (4096, 4096)}
TILES = (16, 32, 64)
BLOCK_DENSITIES = (0.01, 0.02, 0.05, 0.10)
FAN_IN_DENSITIES = (0.01, 0.02, 0.05)
WIDTHS = (784, 1024, 1024, 1024, 10)
Arms = dict[str, Callable[[], Any]]


def layer_arm(product: Callable[..., jax.Array], weights: jax.Array, places: Any, x: jax.Array) -> Callable[[], Any]:
    """Output, gradients and the step of one layer; the weights are donated."""

    def step(weights: jax.Array, places: Any, x: jax.Array, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, pull = jax.vjp(lambda weights, x: product(x, weights, places), weights, x)
        of_weights, of_x = pull(y * slope)
        return weights - 1e-6 * of_weights, of_x

    carry, slope = [jnp.copy(weights)], jnp.float32(1e-3)
    compiled = jax.jit(step, donate_argnums=0).lower(carry[0], places, x, slope).compile()

    def run() -> jax.Array:
        carry[0], of_x = compiled(carry[0], places, x, slope)
        return of_x

    return run


def layer_arms(shape: tuple[int, int], tiles: tuple[int, ...], blocks: Any, fan_ins: Any) -> tuple[Arms, Arms]:
    """The arms of one layer, dense first, and the rewirings at 5 % behind the same dense one."""
    key = jax.random.key(0)
    x = jax.random.normal(key, (BATCH, shape[0]))
    kernel = jax.random.normal(key, shape) * shape[0] ** -0.5
    arms: Arms = {"dense": layer_arm(lambda x, kernel, _: x @ kernel, kernel, (), x)}
    events: Arms = dict(arms)
    for tile in tiles:
        for density in blocks:
            index = random_blocks(key, shape, tile, density, min_fan_in=0)
            values = jax.random.normal(key, (len(index), tile, tile)) * (2 / (density * shape[0])) ** 0.5
            product = functools.partial(_block_product, features=shape[1])
            arms[f"blocks {tile} {density:.0%}"] = layer_arm(product, values, index, x)
            if density == 0.05:
                count = jnp.int32(max(1, len(index) // 10))
                events[f"rewire blocks {tile}"] = functools.partial(rewire_blocks, key, values, index, shape, count)
    for density in fan_ins:
        index = random_fan_in(key, shape, density)
        weights = jax.random.normal(key, index.shape) * (2 / len(index)) ** 0.5
        places = (index, transpose_fan_in(index, shape[0]))
        arms[f"fan-in {density:.0%}"] = layer_arm(_fan_in_product, weights, places, x)
        if density == 0.05:
            count = jnp.int32(max(1, len(index) // 10))
            events["rewire fan-in"] = functools.partial(_rewired_fan_in, key, weights, index, shape[0], count)
    return arms, events


def _block_product(x: jax.Array, values: jax.Array, index: jax.Array, features: int) -> jax.Array:
    return block_matmul(x, values, index, features)


def _fan_in_product(x: jax.Array, weights: jax.Array, places: Any) -> jax.Array:
    return fan_in_matmul(x, weights, *places)


def _rewired_fan_in(key: jax.Array, weights: jax.Array, index: jax.Array, inputs: int, count: jax.Array) -> Any:
    rewired = rewire_fan_in(key, weights, index, inputs, count)
    return rewired, transpose_fan_in(rewired.index, inputs)


def network_arms(density: float, tiles: tuple[int, ...]) -> tuple[Arms, dict[str, int]]:
    """One donated step of Adam an arm, and the number of parameters of each."""
    makers: dict[str, Any] = {
        "dense": nnx.Linear,
        "masked": functools.partial(nn.SparseLinear, density=density, masked_by="update"),
    }
    makers |= {f"blocks {tile}": functools.partial(_block_layer, tile=tile, density=density) for tile in tiles}
    makers["fan-in"] = functools.partial(FanInLinear, density=density)
    x = jax.random.normal(jax.random.key(1), (BATCH, WIDTHS[0]))
    y = jax.random.randint(jax.random.key(2), (BATCH,), 0, WIDTHS[-1])
    arms, sizes = {}, {}
    for name, make in makers.items():
        rngs = nnx.Rngs(0)
        *hidden, head = itertools.pairwise(WIDTHS)
        model = nnx.List([*(make(*pair, rngs=rngs) for pair in hidden), nnx.Linear(*head, rngs=rngs)])
        masks = nn.masks_of(model) if name == "masked" else None
        arms[name] = network_arm(model, masks, x, y)
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return arms, sizes


def _block_layer(inputs: int, units: int, *, tile: int, density: float, rngs: nnx.Rngs) -> BlockLinear:
    # At 5 % a column of large tiles may be left without any, which the layer's own density= refuses.
    index = random_blocks(rngs.params(), (inputs, units), tile, density, min_fan_in=0)
    return BlockLinear(inputs, units, tile=tile, index=index, rngs=rngs)


def network_arm(model: Any, masks: Any, x: jax.Array, y: jax.Array) -> Callable[[], Any]:
    """A step of Adam on a stack of layers; parameters and state are donated."""
    tx = optax.adam(1e-4) if masks is None else oxs.sparse(optax.adam(1e-4), masks)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: Any, rest: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        *hidden, head = nnx.merge(graph, params, rest)
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return optax.softmax_cross_entropy_with_integer_labels(head(x), y).mean()

    def step(params: Any, state: Any, rest: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(loss)(params, rest, x, y), state, params)
        return optax.apply_updates(params, updates), state

    carry = [jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params)]
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, rest, x, y).compile()

    def run() -> Any:
        carry[0], carry[1] = compiled(*carry, rest, x, y)
        return jax.tree.leaves(carry[0])[-1]

    return run


def main() -> None:
    """Measure and report."""
    options = parser(__doc__ or "", rounds=40)
    options.add_argument("--only", choices=(*LAYERS, "mlp"), nargs="*", default=(*LAYERS, "mlp"))
    options.add_argument("--tiles", type=int, nargs="*", default=TILES)
    options.add_argument("--densities", type=float, nargs="*", help="for all forms, in place of those above")
    args = options.parse_args()

    def out(name: str) -> Any:
        return None if args.out is None else args.out.with_name(f"{args.out.stem}_{name}.json")

    for name in args.only:
        if name == "mlp":
            arms, sizes = network_arms(0.05, tuple(tile for tile in args.tiles if tile > 16))
            report("the step of a network at 5 %", measure(arms, args.rounds), out(name), parameters=sizes)
            continue
        blocks, fan_ins = args.densities or BLOCK_DENSITIES, args.densities or FAN_IN_DENSITIES
        arms, events = layer_arms(LAYERS[name], tuple(args.tiles), blocks, fan_ins)
        report(f"a layer of {name}", measure(arms, args.rounds), out(name))
        if len(events) > 1:
            rewiring = measure(events, max(3, args.rounds // 4))
            report(f"rewiring a tenth of {name} at 5 %", rewiring, out(f"{name}_rewiring"))


if __name__ == "__main__":
    main()
