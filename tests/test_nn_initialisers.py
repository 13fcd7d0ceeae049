"""Initialisation that counts living connections, against variances worked out by hand."""

from __future__ import annotations

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import nnx

from optax_structure import nn


def test_weights_have_the_variance_of_the_living_fan_in() -> None:
    # Unit u of 8 has u + 1 living connections among 50 rows, so the variance of its weights is 2 / (u + 1).
    mask = jnp.arange(50)[:, None] <= jnp.arange(8)[None, :]
    draws = jax.vmap(lambda key: nn.sparse_init(key, mask))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_array_equal(jnp.where(mask, 0.0, draws), 0.0)
    for unit in range(8):
        weights = draws[:, : unit + 1, unit]
        # The variance of n normal draws has the relative standard error sqrt(2 / n); five of them.
        assert abs(float(jnp.mean(weights**2)) * (unit + 1) / 2 - 1) < 5 * np.sqrt(2 / weights.size)
        assert abs(float(jnp.mean(weights))) < 5 * np.sqrt(2 / (unit + 1) / weights.size)


def test_gain_dtype_and_units_without_connections() -> None:
    mask = jnp.ones((400, 50), bool).at[:, 0].set(False)
    kernel = nn.sparse_init(jax.random.key(0), mask, jnp.bfloat16, gain=1.0)
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel[:, 0], 0.0)
    assert abs(float(jnp.var(kernel[:, 1:].astype(jnp.float32))) * 400 - 1) < 0.05


def test_a_convolution_counts_its_whole_window() -> None:
    # 3 x 3 x 2 inputs of which every unit keeps the middle row: 6 connections.
    mask = jnp.zeros((3, 3, 2, 500), bool).at[1].set(True)
    kernel = nn.sparse_init(jax.random.key(0), mask)
    assert abs(float(jnp.mean(kernel[1] ** 2)) * 6 / 2 - 1) < 5 * np.sqrt(2 / (6 * 500))


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_signal_survives_two_percent_density(kind: str) -> None:
    # Unit-variance inputs give pre-activations of variance 2. He's dense rule would give 2 * 0.02 = 0.04.
    x = inputs(256, 784)
    if kind == "nnx":
        y = nn.SparseLinear(784, 256, density=0.02, rngs=nnx.Rngs(0))(x)
        he = jax.nn.initializers.he_normal()
        dense_rule = nn.SparseLinear(784, 256, density=0.02, kernel_init=he, rngs=nnx.Rngs(0))(x)
    else:
        y, _ = nn.linen.SparseDense(256, density=0.02).init_with_output(jax.random.key(0), x)
        dense = nn.linen.SparseDense(256, density=0.02, kernel_init=jax.nn.initializers.he_normal())
        dense_rule, _ = dense.init_with_output(jax.random.key(0), x)
    assert abs(float(jnp.var(y)) / 2.0 - 1) < 0.1
    assert abs(float(jnp.var(dense_rule)) / 0.04 - 1) < 0.15


def test_tree_redraws_sparse_leaves_only() -> None:
    params = {
        "a": {"kernel": jnp.full((30, 20), 7.0), "bias": jnp.full(20, 7.0)},
        "b": {"kernel": jnp.full((30, 20), 7.0, jnp.bfloat16)},
        "c": {"kernel": jnp.full((30, 20), 7.0)},
    }
    mask = jax.random.bernoulli(jax.random.key(1), 0.3, (30, 20))
    masks = {"a": {"kernel": mask, "bias": True}, "b": {"kernel": mask}, "c": {"kernel": True}}
    fresh = nn.sparse_init_tree(jax.random.key(0), params, masks)
    np.testing.assert_array_equal(fresh["a"]["kernel"] != 0, mask)
    assert fresh["b"]["kernel"].dtype == jnp.bfloat16
    assert not np.array_equal(fresh["a"]["kernel"], fresh["b"]["kernel"].astype(jnp.float32)), "two leaves, one draw"
    np.testing.assert_array_equal(fresh["a"]["bias"], 7.0)
    np.testing.assert_array_equal(fresh["c"]["kernel"], 7.0)
    with pytest.raises(ValueError, match=r"masks: 'a/kernel' has shape \(20, 30\), its parameter \(30, 20\)"):
        nn.sparse_init_tree(jax.random.key(0), params, {**masks, "a": {"kernel": mask.T, "bias": True}})
    with pytest.raises(ValueError, match="masks"):
        nn.sparse_init_tree(jax.random.key(0), params, {"a": masks["a"]})


def chain(params: Any, x: jax.Array) -> dict[str, jax.Array]:
    """Pre-activations of a chain of three layers, in plain functions."""
    seen = {}
    for layer in ("one", "two", "three"):
        seen[layer] = x @ params[layer]["w"] + params[layer]["b"]
        x = jnp.tanh(seen[layer])
    return seen


def random_chain(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return {
        name: {
            "w": (3.0 * rng.normal(size=shape) * (rng.random(shape) < 0.2)).astype(np.float32),
            "b": (0.3 * rng.normal(size=shape[1])).astype(np.float32),
        }
        for name, shape in {"one": (20, 30), "two": (30, 25), "three": (25, 5)}.items()
    }


def inputs(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_lsuv_equals_a_loop_in_numpy() -> None:
    params, x = random_chain(0), inputs(200, 20)
    got = nn.lsuv(lambda params: chain(params, x), params, ["one", "two", "three"], kernel="w", tol=1e-4)
    signal = np.asarray(x, np.float64)
    for layer in ("one", "two", "three"):
        weights, bias = np.asarray(params[layer]["w"], np.float64), np.asarray(params[layer]["b"], np.float64)
        for _ in range(10):
            spread = np.var(signal @ weights + bias)
            if abs(spread - 1) < 1e-4:
                break
            weights = weights / np.sqrt(spread)
        np.testing.assert_allclose(got[layer]["w"], weights, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(got[layer]["b"], params[layer]["b"])
        np.testing.assert_array_equal(got[layer]["w"] == 0, params[layer]["w"] == 0)
        signal = np.tanh(signal @ weights + bias)
    for value in chain(got, x).values():
        assert abs(float(jnp.var(value)) - 1) < 1e-3


def test_lsuv_inside_jit_and_vmap() -> None:
    x = inputs(64, 20)

    def run(params: Any) -> Any:
        return nn.lsuv(lambda params: chain(params, x), params, ["one", "two", "three"], kernel="w")

    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *map(random_chain, range(3)))
    together = jax.jit(jax.vmap(run))(batch)
    single = jax.jit(run)
    for i in range(3):
        alone = single(jax.tree.map(operator.itemgetter(i), batch))
        for got, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(got[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["nnx", pytest.param("linen", marks=pytest.mark.slow), pytest.param("chain", marks=pytest.mark.slow)]
)
def test_lsuv_on_flax_models(kind: str) -> None:
    # Inputs of the wrong scale, so that the fan-in alone does not do it; a convolution first.
    x = 0.1 * inputs(64, 8, 8, 3)
    model: Any
    if kind == "nnx":
        conv = nn.SparseConv(3, 12, (3, 3), strides=2, density=0.1, rngs=nnx.Rngs(0))
        model = nnx.Sequential(conv, nnx.relu, nn.Flatten(nn.MLP([192, 64, 10], density=0.05, rngs=nnx.Rngs(1))))
        params, rest = nnx.state(model, nnx.Param), None
        layers = ["layers/0", "layers/2/model/hidden_1", "layers/2/model/head"]
    else:
        x = x.reshape(64, -1)
        if kind == "linen":
            model = nn.linen.MLP((192, 64, 10), density=0.05, dtype=jnp.bfloat16)
        else:
            model = nn.linen.Chain((("hidden_1", 64), ("head", 10)))
        variables = model.init(jax.random.key(0), x)
        params, rest = variables["params"], {"masks": variables.get("masks", {})}
        layers = ["hidden_1", "head"]
    apply = jax.jit(nn.capture(model, rest, activation=None))
    before = apply(params, x)[1]
    params = nn.lsuv(lambda params: apply(params, x)[1], params, layers)
    after = apply(params, x)[1]
    assert abs(float(jnp.var(before[layers[0]])) - 1) > 0.5
    for layer in layers:
        assert abs(float(jnp.var(after[layer].astype(jnp.float32))) - 1) < 0.015


def test_lsuv_leaves_a_silent_layer_alone() -> None:
    params, x = random_chain(0), inputs(32, 20)
    params["two"] = {"w": jnp.zeros((30, 25)), "b": jnp.zeros(25)}
    got = nn.lsuv(lambda params: chain(params, x), params, ["one", "two"], kernel="w")
    np.testing.assert_array_equal(got["two"]["w"], 0.0)
    np.testing.assert_array_equal(got["three"]["w"], params["three"]["w"])
    broken = {**params, "one": {"w": np.full((20, 30), np.nan, np.float32), "b": params["one"]["b"]}}
    got = nn.lsuv(lambda params: chain(params, x), broken, ["one"], kernel="w")
    np.testing.assert_array_equal(got["one"]["w"], broken["one"]["w"])


def test_lsuv_keeps_dtypes_and_refuses_what_does_not_fit() -> None:
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), random_chain(0))
    x = jnp.asarray(inputs(32, 20), jnp.bfloat16)

    def see(params: Any) -> Any:
        return chain(params, x)

    assert nn.lsuv(see, params, ["one"], kernel="w")["one"]["w"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"params have no \['four/w'\]; they have \['one/b', 'one/w'"):
        nn.lsuv(see, params, ["four"], kernel="w")
    with pytest.raises(ValueError, match=r"gives nothing for \['one'\]; it gives \['two'\]"):
        nn.lsuv(lambda params: {"two": see(params)["two"]}, params, ["one"], kernel="w")
    with pytest.raises(ValueError, match="iterations=0"):
        nn.lsuv(see, params, ["one"], kernel="w", iterations=0)
    with pytest.raises(ValueError, match="tol=0"):
        nn.lsuv(see, params, ["one"], kernel="w", tol=0)
