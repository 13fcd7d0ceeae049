"""The fast sparse forms: tiles and constant fan-in, as products and as layers. What they compute, and how they move."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

pytest.importorskip("flax")
from flax import nnx

import optax_structure as oxs
from optax_structure import nn
from optax_structure.nn import fast, fast_linen
from optax_structure.nn.fast import BlockLinear, FanInLinear
from optax_structure.sparsity import blocks, fan_in

Shape = tuple[int, int]


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


class Form(NamedTuple):
    """A product of weights that stand at places, and the dense kernel that it should be the product of."""

    weights: np.ndarray
    index: np.ndarray
    shape: Shape
    product: Callable[[Any, Any, Any], jax.Array]

    def dense(self, weights: Any) -> np.ndarray:
        """Placed one by one: the second implementation."""
        kernel = np.zeros(self.shape, np.float64)
        if weights.ndim == 3:
            side = weights.shape[-1]
            padded = np.zeros([-(-size // side) * side for size in self.shape])
            for tile, (row, column) in zip(np.asarray(weights), self.index, strict=True):
                padded[row * side : (row + 1) * side, column * side : (column + 1) * side] += tile
            return padded[: self.shape[0], : self.shape[1]]
        for (_, unit), weight, place in zip(
            np.ndindex(weights.shape), np.asarray(weights).ravel(), self.index.ravel(), strict=True
        ):
            kernel[place, unit] += weight
        return kernel


def block_form(shape: Shape, tile: int, index: Any, dtype: Any = np.float32) -> Form:
    values = normal(len(index), tile, tile, seed=1, dtype=dtype)

    def product(x: Any, weights: Any, index: Any) -> jax.Array:
        return blocks.block_matmul(x, weights, index, shape[1])

    return Form(values, np.array(index, np.int32), shape, product)


def fan_in_form(shape: Shape, index: Any, dtype: Any = np.float32) -> Form:
    index = np.array(index, np.int32)

    def product(x: Any, weights: Any, index: Any) -> jax.Array:
        return fan_in.fan_in_matmul(x, weights, index, fan_in.transpose_fan_in(index, shape[0]))

    return Form(normal(*index.shape, seed=1, dtype=dtype), index, shape, product)


# Tiles cut off on one edge and on both, an empty row and an empty column of tiles, a tile that stands twice, the last
# tile, a single one, tiles of one weight. Inputs that stand twice and four times, the first and the last one, more
# connections from one input than a pass takes, inputs that nobody reads.
FORMS: dict[str, Callable[..., Form]] = {
    "tiles": functools.partial(block_form, (12, 8), 4, [[2, 1], [0, 0], [2, 0]]),
    "tiles cut off": functools.partial(block_form, (13, 10), 4, [[3, 2], [0, 2], [3, 0], [1, 1]]),
    "tiles twice": functools.partial(block_form, (10, 8), 4, [[2, 1], [0, 0], [2, 1]]),
    "one tile": functools.partial(block_form, (6, 5), 5, [[1, 0]]),
    "tiles of one": functools.partial(block_form, (3, 4), 1, [[0, 0], [2, 3], [1, 3]]),
    "inputs": functools.partial(fan_in_form, (7, 3), [[0, 6, 2], [5, 0, 4]]),
    "inputs twice": functools.partial(fan_in_form, (4, 3), [[3, 0, 2], [3, 0, 2], [1, 2, 2], [0, 3, 2]]),
    "one input": functools.partial(fan_in_form, (9, 11), [[8] * 11]),
}


@pytest.mark.parametrize("name", FORMS)
def test_products_and_gradients_are_those_of_the_dense_kernel(name: str) -> None:
    form = FORMS[name]()
    x, slope = normal(6, form.shape[0], seed=2), normal(6, form.shape[1], seed=3)
    kernel = form.dense(form.weights)

    @jax.jit
    def pulled(x: Any, weights: Any, index: Any, slope: Any) -> Any:
        y, pull = jax.vjp(lambda x, weights: form.product(x, weights, index), x, weights)
        return y, *pull(slope)

    y, of_x, of_weights = pulled(x, form.weights, form.index, slope)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_x, slope @ kernel.T, rtol=1e-5, atol=1e-5)
    # The dense gradient, read where each weight stands: the pull-back of placing them.
    units = np.zeros(form.weights.shape)
    for place in np.ndindex(form.weights.shape):
        unit = np.zeros(form.weights.shape)
        unit[place] = 1.0
        units[place] = np.sum(form.dense(unit) * (x.T @ slope))
    np.testing.assert_allclose(of_weights, units, rtol=1e-5, atol=1e-5)


# The checks of two of them are quick enough for every run.
CHECKED = [
    name if name in ("tiles cut off", "inputs twice") else pytest.param(name, marks=pytest.mark.slow) for name in FORMS
]


@pytest.mark.parametrize("name", CHECKED)
def test_gradients_are_numerically_right_in_float64(name: str) -> None:
    with jax.enable_x64(True):
        form = FORMS[name](dtype=np.float64)
        x = normal(3, form.shape[0], seed=2, dtype=np.float64)
        product = jax.jit(form.product)
        assert product(x, form.weights, form.index).dtype == jnp.float64
        np.testing.assert_allclose(product(x, form.weights, form.index), x @ form.dense(form.weights), rtol=1e-12)

        given = functools.partial(product, index=form.index)
        check_grads(given, (x, form.weights), order=1, modes=["rev"], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", ["tiles cut off", "inputs"])
def test_any_leading_axes(name: str) -> None:
    form = FORMS[name]()
    x = normal(2, 3, form.shape[0])
    y, one = jax.jit(lambda x, *form_of: (form.product(x, *form_of), form.product(x[1, 2], *form_of)))(
        x, form.weights, form.index
    )
    assert y.shape == (2, 3, form.shape[1])
    np.testing.assert_allclose(y, x @ form.dense(form.weights), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one, y[1, 2], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_half_precision_is_added_up_in_float32() -> None:
    # 300 ones: a sum in bfloat16 stops at 256.
    x = jnp.ones((1, 300), jnp.bfloat16)
    each = jnp.stack([jnp.arange(300), jnp.zeros(300, jnp.int32)], axis=1)
    by_tiles = blocks.block_matmul(x, jnp.ones((300, 1, 1), jnp.bfloat16), each, 1)
    by_fan_in = fan_in.fan_in_matmul(x, jnp.ones((300, 1), jnp.bfloat16), jnp.arange(300)[:, None])
    assert by_tiles.dtype == by_fan_in.dtype == jnp.bfloat16
    assert by_tiles.item() == by_fan_in.item() == 300
    # The same for the gradients: 300 examples, and 300 units that read one input.
    ones, tall = jnp.ones((1, 300), jnp.bfloat16), jnp.ones((300, 1), jnp.bfloat16)
    for product in (
        lambda x, w: blocks.block_matmul(x, w.reshape(-1, 1, 1), each[:1], 1),
        lambda x, w: fan_in.fan_in_matmul(x, w, jnp.zeros((1, 1), jnp.int32)),
    ):
        of_weights = jax.grad(lambda w, product=product: product(tall, w).astype(jnp.float32).sum())(ones[:, :1])
        assert of_weights.dtype == jnp.bfloat16 and of_weights.item() == 300
    for product in (
        lambda x: blocks.block_matmul(x, jnp.ones((300, 1, 1), jnp.bfloat16), each[:, ::-1], 300),
        lambda x: fan_in.fan_in_matmul(x, ones, jnp.zeros((1, 300), jnp.int32)),
    ):
        assert jax.grad(lambda x, product=product: product(x).astype(jnp.float32).sum())(tall[:1]).item() == 300


@pytest.mark.parametrize("name", ["tiles cut off", "inputs"])
def test_nothing_of_the_size_of_the_dense_kernel_is_made(name: str) -> None:
    shape = (512, 512)
    if name == "inputs":
        form = fan_in_form(shape, normal(4, 512).argsort(axis=1))
    else:
        form = block_form(shape, 16, [[i, (5 * i) % 32] for i in range(32)])

    def step(x: Any, weights: Any, index: Any) -> Any:
        y, pull = jax.vjp(lambda x, weights: form.product(x, weights, index), x, weights)
        return pull(y)

    memory = jax.jit(step).lower(normal(8, 512), form.weights, form.index).compile().memory_analysis()
    dense = 512 * 512 * 4
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < dense / 2


@pytest.mark.parametrize("name", ["tiles cut off", pytest.param("tiles of one", marks=pytest.mark.slow), "inputs"])
def test_kernels_come_back_from_every_form(name: str) -> None:
    form = FORMS[name]()
    kernel, mask = form.dense(form.weights).astype(np.float32), form.dense(np.ones_like(form.weights)) > 0
    dirty = np.where(mask, kernel, np.nan)  # what stands off the mask is not looked at
    if name == "inputs":
        weights, index = fan_in.fan_in_from_kernel(dirty, mask)
        back, where = fan_in.kernel_from_fan_in(weights, index, form.shape[0])
    else:
        weights, index = blocks.blocks_from_kernel(dirty, mask, form.weights.shape[-1])
        back, where = blocks.kernel_from_blocks(weights, index, form.shape)
    assert weights.shape == form.weights.shape and index.shape == form.index.shape and index.dtype == jnp.int32
    np.testing.assert_array_equal(back, kernel)
    np.testing.assert_array_equal(where, mask)


def places(form: str, index: Any) -> set[tuple[int, ...]]:
    """Which tiles (connections) exist."""
    if form == "blocks":
        return {tuple(row) for row in np.asarray(index).tolist()}
    return {(int(place), unit) for column in np.asarray(index) for unit, place in enumerate(column)}


def first_rewiring(form: str) -> tuple[Shape, Any, Any, Callable[..., Any], tuple[int, int], int]:
    """Shape, weights and index; the rewiring; what its scores are as; how many are at most to be moved a group."""
    shape = (20, 14)
    if form == "blocks":
        index = blocks.random_blocks(jax.random.key(0), shape, 4, 0.5)
        values = jnp.asarray(normal(len(index), 4, 4))

        def rewire(*args: Any, **kwargs: Any) -> Any:
            return blocks.rewire_blocks(*args[:3], shape, *args[3:], **kwargs)

        return shape, values, index, rewire, (5, 4), 10
    index = fan_in.random_fan_in(jax.random.key(0), shape, 0.35)

    def rewire_inputs(*args: Any, **kwargs: Any) -> Any:
        return fan_in.rewire_fan_in(*args[:3], shape[0], *args[3:], **kwargs)

    return shape, jnp.asarray(normal(*index.shape)), index, rewire_inputs, shape, 7


@pytest.mark.parametrize("by", [pytest.param("random", marks=pytest.mark.slow), "scores"])
@pytest.mark.parametrize("form", ["blocks", "fan_in"])
def test_rewiring_moves_exactly_the_weakest(form: str, by: str) -> None:
    shape, weights, index, rewire, grid, most = first_rewiring(form)
    groups = 1 if form == "blocks" else shape[1]
    old = places(form, index)
    assert len(old) == most * groups
    strength = np.abs(weights).sum(axis=(1, 2)) if form == "blocks" else np.abs(weights)
    scores = jnp.asarray(normal(*grid, seed=5)) if by == "scores" else None
    for count in (0, 1, 3, most, 10**6):
        rewired = rewire(jax.random.key(3), weights, index, count, scores=scores)
        moved = min(count, most)  # the grid of tiles has as many free places; a unit has more
        new = np.asarray(rewired.new).reshape(strength.shape)
        assert rewired.new.dtype == bool and rewired.index.dtype == jnp.int32
        assert rewired.index.shape == index.shape and rewired.values.shape == weights.shape
        np.testing.assert_array_equal(new.sum(axis=0), moved)
        now = places(form, rewired.index)
        assert len(now) == len(old), "something stands twice"
        assert len(now - old) == moved * groups, "what was dropped came back, or too few moved"
        # Kept weights stay where they are, new ones are 0.
        np.testing.assert_array_equal(rewired.values, jnp.where(rewired.new, 0.0, weights))
        kept = ~new[:, None] if form == "blocks" else ~new
        np.testing.assert_array_equal(np.where(kept, rewired.index, -1), np.where(kept, index, -1))
        weakest = np.argsort(np.argsort(strength, axis=0), axis=0) < moved
        np.testing.assert_array_equal(new, weakest)
        if scores is not None:
            free = np.ones(grid, bool)
            free[tuple(np.array(sorted(old)).T)] = False
            ranked = np.where(free, scores, -np.inf).reshape(-1, groups)
            best = np.argsort(-ranked, axis=0, kind="stable")[:moved]
            expected = {divmod(int(cell) * groups + unit, grid[1]) for row in best for unit, cell in enumerate(row)}
            assert now - old == expected


@pytest.mark.slow
@pytest.mark.parametrize("form", ["blocks", "fan_in"])
def test_random_places_are_drawn_evenly(form: str) -> None:
    _, weights, index, rewire, grid, _ = first_rewiring(form)
    keys = jax.random.split(jax.random.key(0), 400)
    moved = jax.jit(jax.vmap(lambda key: rewire(key, weights, index, 2).index))(keys)
    old = places(form, index)
    drawn = np.zeros(grid)
    for one in np.asarray(moved):
        for place in places(form, one) - old:
            drawn[place] += 1
    free = np.ones(grid, bool)
    free[tuple(np.array(sorted(old)).T)] = False
    expected = 400 * 2 * (1 if form == "blocks" else grid[1]) / free.sum()
    assert drawn[~free].sum() == 0
    # Binomial: five standard deviations, for each of up to 182 places.
    assert np.abs(drawn[free] - expected).max() < 5 * np.sqrt(expected) + 1


@pytest.mark.slow
@pytest.mark.parametrize("form", ["blocks", "fan_in"])
def test_rewiring_in_the_step_compiles_nothing_anew(form: str) -> None:
    _, weights, index, rewire, _, _ = first_rewiring(form)
    traces, sizes = [], set()

    @jax.jit
    def event(key: Any, weights: Any, index: Any, count: Any) -> Any:
        traces.append(None)
        return rewire(key, weights, index, count)

    for count in (1, 4, 2):
        eager = rewire(jax.random.key(count), weights, index, count)
        traced = event(jax.random.key(count), weights, index, jnp.int32(count))
        jax.tree.map(np.testing.assert_array_equal, eager, traced)
        weights, index, _ = traced
        sizes.add((blocks if form == "blocks" else fan_in)._rewired._cache_size())
    assert len(traces) == len(sizes) == 1


# Layers


def sparse_layer(form: str, **options: Any) -> nn.SparseLinear:
    """A masked layer that the form can hold, its bias not 0."""
    pattern = oxs.tiles(4) if form == "blocks" else oxs.constant_fan_in()
    like = {"kernel": jax.ShapeDtypeStruct((18, 10), jnp.float32)}
    mask = oxs.random_masks(jax.random.key(4), like, 0.3, pattern=pattern)["kernel"]
    bias = jax.nn.initializers.normal()
    return nn.SparseLinear(18, 10, mask=mask, bias_init=bias, rngs=nnx.Rngs(0), **options)


def converted(form: str, layer: nn.SparseLinear) -> BlockLinear | FanInLinear:
    return fast.to_blocks(layer, 4) if form == "blocks" else fast.to_fan_in(layer)


def outputs_and_gradients(layer: nnx.Module, x: Any) -> tuple[Any, Any, Any]:
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params: Any, x: Any) -> Any:
        y = nnx.merge(graph, params, rest)(x)
        return jnp.sum(y**2), y

    (of_params, of_x), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return y, of_params, of_x


@pytest.mark.slow
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("masked_by", ["forward", "update"])
@pytest.mark.parametrize("form", ["blocks", "fan_in"])
def test_conversions_keep_the_function(form: str, masked_by: Any, use_bias: bool) -> None:
    layer = sparse_layer(form, masked_by=masked_by, use_bias=use_bias)
    made = converted(form, layer)
    back = fast.to_masked(made, masked_by)
    x = normal(5, 18)
    y, of_params, of_x = outputs_and_gradients(layer, x)
    other_y, other_params, other_x = outputs_and_gradients(made, x)
    np.testing.assert_allclose(other_y, y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(other_x, of_x, rtol=1e-5, atol=1e-5)
    # The gradient at the weights that exist, brought back to the dense form.
    made_gradient = nnx.clone(made)
    made_gradient.kernel[...] = other_params["kernel"][...]
    dense = fast.to_masked(made_gradient).kernel[...]
    masked = jnp.where(layer.kernel_mask[...], of_params["kernel"][...], 0.0)
    np.testing.assert_allclose(dense, masked, rtol=1e-5, atol=1e-5)
    if use_bias:
        np.testing.assert_allclose(other_params["bias"][...], of_params["bias"][...], rtol=1e-5, atol=1e-5)
    # and back, bit for bit
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(layer))
    assert back.masked_by == masked_by and (made.bias is None) == (not use_bias)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(nnx.state(m, nnx.Param))) for m in (made, layer)]
    assert sizes[0] < 0.6 * sizes[1]  # tiles hold what an edge cuts off too


@pytest.mark.slow
@pytest.mark.parametrize("form", ["blocks", "fan_in"])
def test_linen_layers_convert_and_compute_the_same(form: str) -> None:
    layer = sparse_layer(form)
    made = converted(form, layer)
    masked = {
        "params": {"kernel": layer.kernel[...], "bias": layer.bias[...]},
        "masks": {"kernel": layer.kernel_mask[...]},
    }
    variables = fast_linen.to_blocks(masked, 4) if form == "blocks" else fast_linen.to_fan_in(masked)
    twin = fast_linen.BlockDense(10, tile=4) if form == "blocks" else fast_linen.FanInDense(10)
    x = normal(5, 18)
    np.testing.assert_array_equal(twin.apply(variables, x), made(x))
    np.testing.assert_array_equal(variables["params"]["kernel"], made.kernel[...])
    back = fast_linen.to_masked(variables, (18, 10))
    jax.tree.map(np.testing.assert_array_equal, back, masked)
    y = nn.linen.SparseDense(10).apply(back, x)
    np.testing.assert_allclose(twin.apply(variables, x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_first_weights_are_he_normal_by_the_living_fan_in() -> None:
    layer = BlockLinear(200, 96, tile=32, density=0.4, rngs=nnx.Rngs(0))  # the last row of tiles has 8 rows of weights
    assert layer.kernel.shape == (round(0.4 * 7 * 3), 32, 32) and layer.bias.shape == (96,)
    masked = fast.to_masked(layer)
    kernel, mask = np.asarray(masked.kernel[...]), np.asarray(masked.kernel_mask[...])
    assert (kernel != 0).sum() == mask.sum()
    expected = np.sqrt(2.0 / mask.sum(axis=0))
    for column in range(0, 96, 32):
        part = slice(column, column + 32)
        found = kernel[:, part][mask[:, part]]
        assert abs(found.std() / expected[column] - 1) < 5 / np.sqrt(2 * found.size)
    # What stands beyond the edge is 0, so that it is no strength when tiles are compared.
    edge = np.asarray(layer.kernel[...])[np.asarray(layer.kernel_index[...])[:, 0] == 6]
    assert len(edge) and not edge[:, 8:].any()
    inputs = FanInLinear(200, 96, density=0.1, rngs=nnx.Rngs(0))
    assert inputs.kernel.shape == (20, 96)
    assert abs(float(jnp.std(inputs.kernel[...])) / np.sqrt(2 / 20) - 1) < 5 / np.sqrt(2 * 20 * 96)


@pytest.mark.slow
def test_layers_have_the_exact_number_of_weights_and_no_unit_without() -> None:
    for seed in range(3):
        tiles = BlockLinear(40, 30, tile=8, density=0.25, rngs=nnx.Rngs(seed)).kernel_index[...]
        assert len({tuple(row) for row in tiles.tolist()}) == len(tiles) == 5
        assert set(tiles[:, 1].tolist()) == {0, 1, 2, 3}
        inputs = np.sort(FanInLinear(40, 30, density=0.25, rngs=nnx.Rngs(seed)).kernel_index[...], axis=0)
        assert inputs.shape == (10, 30) and (np.diff(inputs, axis=0) > 0).all()
    assert BlockLinear(10, 7, tile=4, rngs=nnx.Rngs(0)).kernel.shape == (6, 4, 4)  # dense


@pytest.mark.slow
def test_an_initialiser_is_asked_for_the_dense_shape() -> None:
    def init(key: Any, shape: Any, dtype: Any) -> Any:
        del key
        return jnp.arange(shape[0] * shape[1], dtype=dtype).reshape(shape)

    for layer in (
        BlockLinear(6, 5, tile=2, density=0.5, kernel_init=init, rngs=nnx.Rngs(0)),
        FanInLinear(6, 5, density=0.5, kernel_init=init, rngs=nnx.Rngs(0)),
    ):
        masked = fast.to_masked(layer)
        expected = np.where(masked.kernel_mask[...], np.arange(30.0).reshape(6, 5), 0.0)
        np.testing.assert_array_equal(masked.kernel[...], expected)
    for twin in (
        fast_linen.BlockDense(5, tile=2, density=0.5, kernel_init=init),
        fast_linen.FanInDense(5, density=0.5, kernel_init=init),
    ):
        variables = twin.init(jax.random.key(0), jnp.ones((1, 6)))
        masked = fast_linen.to_masked(variables, (6, 5))
        expected = np.where(masked["masks"]["kernel"], np.arange(30.0).reshape(6, 5), 0.0)
        np.testing.assert_array_equal(masked["params"]["kernel"], expected)


MAKERS: dict[str, Callable[..., Any]] = {
    "blocks": functools.partial(BlockLinear, 18, 10, tile=4, density=0.5),
    "fan_in": functools.partial(FanInLinear, 18, 10, density=0.25),
}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "param_dtype"), [(None, jnp.bfloat16), (jnp.bfloat16, jnp.float32)])
@pytest.mark.parametrize("form", MAKERS)
def test_dtypes_follow_flax(form: str, dtype: Any, param_dtype: Any) -> None:
    layer = MAKERS[form](dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    twin: Any = fast_linen.BlockDense(10, tile=4, density=0.5, dtype=dtype, param_dtype=param_dtype)
    if form == "fan_in":
        twin = fast_linen.FanInDense(10, density=0.25, dtype=dtype, param_dtype=param_dtype)
    plain = nnx.Linear(18, 10, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    for x in (jnp.ones((2, 18), jnp.bfloat16), jnp.ones((2, 18), jnp.int32)):
        y, variables = twin.init_with_output(jax.random.key(0), x)
        assert layer(x).dtype == y.dtype == plain(x).dtype
        assert layer.kernel[...].dtype == layer.bias[...].dtype == variables["params"]["kernel"].dtype == param_dtype
    x = jnp.asarray(normal(4, 18), jnp.bfloat16)
    y, of_params, of_x = outputs_and_gradients(layer, x)
    assert of_x.dtype == jnp.bfloat16 and of_params["kernel"][...].dtype == param_dtype
    exact = np.asarray(x, np.float32) @ np.asarray(fast.to_masked(layer).kernel[...], np.float32)
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("form", MAKERS)
def test_a_rewired_layer_learns_and_its_new_weights_start_afresh(form: str) -> None:
    """Rewiring, ``reset_state`` and ``transfer_state`` in a training that is compiled once."""
    layer = MAKERS[form](rngs=nnx.Rngs(0))
    x, target = normal(32, 18), normal(32, 10, seed=1)
    graph = nnx.split(layer, nnx.Param, ...)[0]
    tx = optax.adam(1e-2)
    traces = []

    @jax.jit
    def step(params: Any, state: Any, rest: Any) -> Any:
        traces.append(None)
        grads = jax.grad(lambda params: jnp.mean((nnx.merge(graph, params, rest)(x) - target) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    _, params, rest = nnx.split(layer, nnx.Param, ...)
    state = jax.jit(tx.init)(params)
    for event in range(3):
        for _ in range(4):
            params, state, _ = step(params, state, rest)
        jax.tree.map(np.testing.assert_array_equal, oxs.transfer_state(tx, state, params, tx, params), state)
        nnx.update(layer, params)
        new = layer.rewire(jax.random.key(event), 2)
        assert int(new.sum()) == (2 if form == "blocks" else 2 * 10)
        _, params, rest = nnx.split(layer, nnx.Param, ...)
        where = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), params)
        where["kernel"] = where["kernel"].replace(new)
        before, state = state, oxs.reset_state(tx, state, params, where)
        for moment in ("mu", "nu"):
            old, now = (getattr(s[0], moment)["kernel"][...] for s in (before, state))
            np.testing.assert_array_equal(jnp.where(new, 0.0, now), jnp.where(new, 0.0, old))
            if moment == "mu":
                np.testing.assert_array_equal(jnp.where(new, now, 0.0), 0.0)
        # The table of the backward pass went along.
        np.testing.assert_allclose(
            outputs_and_gradients(layer, x)[2], outputs_and_gradients(fast.to_masked(layer), x)[2], rtol=1e-5, atol=1e-5
        )
        # New weights are 0 and have a gradient. (A tile holds zeros beyond the edge, which have none.)
        _, _, grads = step(params, state, rest)
        assert float(jnp.mean(jnp.where(new, grads["kernel"][...], 1.0) != 0)) > 0.8
    assert len(traces) == 1


@pytest.mark.slow
@pytest.mark.parametrize("form", MAKERS)
def test_index_is_out_of_sight_of_gradients_and_optimizers(form: str) -> None:
    layer = MAKERS[form](rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(layer, fast.Index))
    optimizer = nnx.Optimizer(layer, optax.adamw(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(layer: Any, optimizer: Any, x: Any) -> None:
        optimizer.update(layer, nnx.grad(lambda layer: jnp.mean(layer(x) ** 2))(layer))

    step(layer, optimizer, jnp.ones((2, 18)))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer, fast.Index), before)
    assert all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(before))
    # and a rewiring may stand in nnx.jit
    new = nnx.jit(lambda layer, key, count: layer.rewire(key, count))(layer, jax.random.key(0), jnp.int32(1))
    assert int(new.sum()) == (1 if form == "blocks" else 10)


@pytest.mark.slow
@pytest.mark.parametrize("form", MAKERS)
def test_gates_close_a_layer(form: str) -> None:
    layer = MAKERS[form](rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    x = normal(3, 18)

    @jax.jit
    def gradients(params: Any, x: Any, gate: Any) -> Any:
        return jax.grad(lambda params, x: nnx.merge(graph, params, rest)(x, gate).sum(), argnums=(0, 1))(params, x)

    for level in range(3):
        closed_params, closed_x = gradients(params, x, jnp.int32(level))
        assert bool(closed_params["kernel"][...].any()) == (level < 1)
        assert bool(closed_x.any()) == (level < 2)


@pytest.mark.slow
@pytest.mark.parametrize("form", MAKERS)
def test_vmap_over_seeds(form: str) -> None:
    x = normal(4, 18)

    def of_seed(key: Any) -> Any:
        layer = MAKERS[form](rngs=nnx.Rngs(key))
        new = layer.rewire(key, 1)
        layer.kernel[...] = jnp.where(new, 0.5, layer.kernel[...])
        y, of_params, of_x = outputs_and_gradients(layer, x)
        return y, of_params["kernel"][...], of_x, layer.kernel_index[...]

    keys = jax.random.split(jax.random.key(0), 3)
    batched = jax.vmap(of_seed)(keys)
    alone = [of_seed(key) for key in keys]
    for place, leaf in enumerate(batched):
        np.testing.assert_allclose(leaf, jnp.stack([one[place] for one in alone]), rtol=1e-5, atol=1e-5)
    assert (batched[3][0] != batched[3][1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("form", MAKERS)
def test_a_batch_over_two_devices(form: str) -> None:
    if jax.device_count() < 2:
        pytest.skip("one device")
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    layer = MAKERS[form](rngs=nnx.Rngs(0))
    x = normal(8, 18)
    alone = outputs_and_gradients(layer, x)
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    nnx.update(layer, jax.device_put(nnx.state(layer), NamedSharding(mesh, PartitionSpec())))
    over = outputs_and_gradients(layer, spread)
    assert len(over[0].sharding.device_set) == 2
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), over, alone)


@pytest.mark.parametrize("form", MAKERS)
def test_training_and_rewiring_lower_for_cpu_cuda_and_tpu(form: str) -> None:
    graph, params, rest = nnx.split(MAKERS[form](rngs=nnx.Rngs(0)), nnx.Param, ...)

    @jax.jit
    def step(params: Any, rest: Any, x: Any, key: Any) -> Any:
        layer = nnx.merge(graph, params, rest)
        grads = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
        layer.rewire(key, 1)
        return grads, nnx.state(layer)

    arguments = (params, rest, normal(4, 18), jax.random.PRNGKey(0))
    exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(*arguments)
    assert exported.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.slow
def test_checkpoint_goes_on_with_the_same_losses(tmp_path: Any) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    x, target = normal(16, 18), normal(16, 10, seed=1)
    tx = optax.adam(1e-2)
    graphs, saved = {}, {}
    for form, make in MAKERS.items():
        graphs[form], params, rest = nnx.split(make(rngs=nnx.Rngs(0)), nnx.Param, ...)
        saved[form] = {"params": params, "rest": rest, "state": jax.jit(tx.init)(params)}

    def train(form: str, params: Any, rest: Any, state: Any) -> tuple[Any, list[float]]:
        @jax.jit
        def step(params: Any, state: Any, rest: Any) -> Any:
            def loss(params: Any) -> Any:
                return jnp.mean((nnx.merge(graphs[form], params, rest)(x) - target) ** 2)

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        losses = []
        for _ in range(10):
            params, state, value = step(params, state, rest)
            losses.append(float(value))
        return {"params": params, "rest": rest, "state": state}, losses

    for form, at in saved.items():
        layer = nnx.merge(graphs[form], at["params"], at["rest"])
        layer.rewire(jax.random.key(1), 2)  # so that the index differs from the one of a fresh layer
        _, params, rest = nnx.split(layer, nnx.Param, ...)
        saved[form], _ = train(form, params, rest, at["state"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "forms", saved)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "forms", jax.tree.map(jnp.zeros_like, saved))
    jax.tree.map(np.testing.assert_array_equal, back, saved)
    for form in MAKERS:
        assert train(form, **back[form])[1] == train(form, **saved[form])[1]


KERNEL = jnp.ones((8, 6))
TILES, TILE_INDEX = jnp.ones((2, 2, 2)), jnp.array([[0, 0], [3, 2]])
BELOW, BESIDE = TILE_INDEX.at[0, 0].set(4), TILE_INDEX.at[0, 1].set(-1)
INPUTS, INPUT_INDEX = jnp.ones((2, 6)), jnp.zeros((2, 6), jnp.int32)
KEY = jax.random.key(0)
BAD: list[tuple[str, Callable[[], Any]]] = [
    *(
        (r"density=.* must be a number in \(0, 1\]", functools.partial(make, density=density))
        for density in (0.0, 1.5, -0.1, float("nan"))
        for make in (
            functools.partial(BlockLinear, 8, 6, tile=2, rngs=nnx.Rngs(0)),
            functools.partial(FanInLinear, 8, 6, rngs=nnx.Rngs(0)),
            functools.partial(fast_linen.BlockDense, 6),
            functools.partial(fast_linen.FanInDense, 6),
        )
    ),
    ("density=0.1 gives 1 tiles of 2 x 2, too few for 1", lambda: blocks.random_blocks(KEY, (8, 6), 2, 0.1)),
    ("density=0.01 of 8 inputs gives no connection", lambda: fan_in.random_fan_in(KEY, (8, 6), 0.01)),
    ("tile=7 is larger than the layer, .* is \\(8, 6\\)", lambda: blocks.random_blocks(KEY, (8, 6), 7, 0.5)),
    ("tile=7 is larger", lambda: BlockLinear(8, 6, tile=7, density=0.5, rngs=nnx.Rngs(0))),
    ("tile=7 is larger", lambda: fast_linen.BlockDense(6, tile=7).init(KEY, jnp.ones((1, 8)))),
    ("tile=7 is larger", lambda: blocks.blocks_from_kernel(KERNEL, KERNEL > 0, 7)),
    ("tile=7 is larger", lambda: blocks.block_matmul(KERNEL.T, jnp.ones((1, 7, 7)), jnp.zeros((1, 2), int), 6)),
    ("tile=0 must be an integer", lambda: BlockLinear(8, 6, tile=0, rngs=nnx.Rngs(0))),
    (
        "row 2, column 1 of the grid",
        lambda: blocks.blocks_from_kernel(KERNEL, jnp.zeros((8, 6), bool).at[5, 3].set(True), 2),
    ),
    ("mask is False everywhere", lambda: blocks.blocks_from_kernel(KERNEL, KERNEL < 0, 2)),
    ("mask is False everywhere", lambda: fan_in.fan_in_from_kernel(KERNEL, KERNEL < 0)),
    (
        "have from 0 to 1 inputs",
        lambda: fan_in.fan_in_from_kernel(KERNEL, jnp.eye(8, 6, dtype=bool).at[0, 0].set(False)),
    ),
    ("mask has shape \\(6, 8\\), its kernel \\(8, 6\\)", lambda: fan_in.fan_in_from_kernel(KERNEL, KERNEL.T > 0)),
    ("kernel has shape \\(8,\\)", lambda: blocks.blocks_from_kernel(jnp.ones(8), jnp.ones(8, bool), 2)),
    ("mask must not be traced", lambda: jax.jit(lambda m: fan_in.fan_in_from_kernel(KERNEL, m))(KERNEL > 0)),
    (
        "index holds \\[4, 0\\], out of range",
        lambda: blocks.block_matmul(KERNEL.T, TILES, TILE_INDEX.at[0, 0].set(4), 6),
    ),
    (
        "index holds \\[0, -1\\], out of range",
        lambda: BlockLinear(8, 6, tile=2, index=-TILE_INDEX.at[0, 1].set(1), rngs=nnx.Rngs(0)),
    ),
    ("index holds \\[8\\], out of range", lambda: fan_in.fan_in_matmul(KERNEL.T, INPUTS, INPUT_INDEX + 8)),
    ("index holds \\[-1\\], out of range", lambda: FanInLinear(8, 6, index=INPUT_INDEX - 1, rngs=nnx.Rngs(0))),
    ("density=0.5 and an index", lambda: FanInLinear(8, 6, index=INPUT_INDEX, density=0.5, rngs=nnx.Rngs(0))),
    ("density=0.5 and an index", lambda: BlockLinear(8, 6, tile=2, index=TILE_INDEX, density=0.5, rngs=nnx.Rngs(0))),
    ("index has shape \\(1, 2\\) .* int \\(2, 2\\)", lambda: blocks.block_matmul(KERNEL.T, TILES, TILE_INDEX[:1], 6)),
    ("index has .* dtype float32", lambda: blocks.block_matmul(KERNEL.T, TILES, TILE_INDEX * 1.0, 6)),
    ("values have shape \\(2, 2\\)", lambda: blocks.block_matmul(KERNEL.T, TILES[0], TILE_INDEX, 6)),
    ("index has shape \\(2, 5\\)", lambda: fan_in.fan_in_matmul(KERNEL.T, INPUTS, INPUT_INDEX[:, :5])),
    ("weights have shape \\(6,\\)", lambda: fan_in.fan_in_matmul(KERNEL.T, INPUTS[0], INPUT_INDEX)),
    (
        "transpose has shapes \\(12,\\) and \\(8,\\)",
        lambda: fan_in.fan_in_matmul(KERNEL.T, INPUTS, INPUT_INDEX, fan_in.transpose_fan_in(INPUT_INDEX, 7)),
    ),
    ("count=-1", lambda: blocks.rewire_blocks(KEY, TILES, TILE_INDEX, (8, 6), -1)),
    ("count=1.5", lambda: fan_in.rewire_fan_in(KEY, INPUTS, INPUT_INDEX, 8, 1.5)),  # pyright: ignore[reportArgumentType]
    ("the grid of tiles is \\(4, 3\\)", lambda: blocks.rewire_blocks(KEY, TILES, TILE_INDEX, (8, 6), 1, scores=KERNEL)),
    ("scores have shape \\(6, 8\\)", lambda: fan_in.rewire_fan_in(KEY, INPUTS, INPUT_INDEX, 8, 1, scores=KERNEL.T)),
]


@pytest.mark.parametrize(("message", "call"), BAD, ids=[f"{i}: {m[:30]}" for i, (m, _) in enumerate(BAD)])
def test_bad_input_is_named(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_weights_off_the_mask_that_count_are_not_dropped_silently() -> None:
    layer = sparse_layer("blocks", masked_by="update")
    layer.kernel[...] = jnp.ones((18, 10))
    with pytest.raises(ValueError, match="weights off its mask"):
        fast.to_blocks(layer, 4)
