"""Activation capture of NNX and Linen models, the growing chain, and the train state that forwards extra arguments."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
from flax import linen, nnx
from flax.training import train_state

import optax_structure as oxs
from optax_structure import nn
from optax_structure._tree import leaves_by_path
from optax_structure.structure import Patch, UnitAxis, UnitGroup, Units


class Net(nnx.Module):
    """A convolution, a shared layer called twice, a batch norm, a head: what capture has to see through."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 3, (2, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.blocks = nnx.List([nn.SparseLinear(12, 12, density=0.5, rngs=rngs)])
        self.head = nnx.Linear(12, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x))).reshape(x.shape[0], -1)
        for _ in range(2):
            x = nnx.relu(self.blocks[0](x))
        return self.head(x)


class Twin(linen.Module):
    """The same in Linen, with a dropout at the end."""

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(linen.Conv(3, (2, 2), name="conv")(x)))
        x = x.reshape(x.shape[0], -1)
        block = nn.linen.SparseDense(12, density=0.5, name="block")
        x = linen.relu(block(linen.relu(block(x))))
        return linen.Dropout(0.5, deterministic=not train)(linen.Dense(2, name="head")(x))


RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(5, 2, 2, 1)).astype(np.float32)


def test_nnx_capture_sees_every_layer_once() -> None:
    net = Net(nnx.Rngs(0))
    net.eval()
    params = nnx.state(net, nnx.Param)
    outputs, raw = nn.capture(net, activation=None)(params, IMAGES)
    np.testing.assert_array_equal(outputs, net(IMAGES))
    assert {name: value.shape for name, value in raw.items()} == {
        "conv": (5, 2, 2, 3),
        "blocks/0": (10, 12),  # two calls of five rows, joined
        "head": (5, 2),
    }
    np.testing.assert_array_equal(raw["conv"], net.conv(IMAGES))
    first = net.blocks[0](nnx.relu(net.norm(net.conv(IMAGES))).reshape(5, -1))
    np.testing.assert_array_equal(raw["blocks/0"], jnp.concatenate([first, net.blocks[0](nnx.relu(first))]))
    _, activations = nn.capture(net)(params, IMAGES)
    jax.tree.map(lambda a, y: np.testing.assert_array_equal(a, jnp.maximum(y, 0)), activations, raw)
    # The names are the kernels' paths.
    assert {f"{name}/kernel" for name in raw} <= leaves_by_path(params).keys()


def test_linen_capture_sees_every_layer_once() -> None:
    twin = Twin()
    variables = twin.init(jax.random.key(0), IMAGES, train=False)
    rest = {name: variables[name] for name in ("masks", "batch_stats")}
    outputs, raw = nn.capture(twin, rest, activation=None)(variables["params"], IMAGES, train=False)
    np.testing.assert_array_equal(outputs, twin.apply(variables, IMAGES, train=False))
    shapes = {name: value.shape for name, value in raw.items()}
    assert shapes == {"conv": (5, 2, 2, 3), "block": (10, 12), "head": (5, 2)}
    np.testing.assert_array_equal(raw["head"], outputs)
    p = variables["params"]["conv"]
    np.testing.assert_array_equal(raw["conv"], linen.Conv(3, (2, 2)).apply({"params": p}, IMAGES))


def test_a_mapping_selects_and_activates() -> None:
    model = nn.MLP([4, 6, 5, 3], rngs=nnx.Rngs(0))
    params, x = nnx.state(model, nnx.Param), jnp.ones((2, 4))
    _, raw = nn.capture(model, activation=None)(params, x)
    _, chosen = nn.capture(model, activation={"hidden_2": jnp.tanh, "head": jax.nn.softmax})(params, x)
    assert set(chosen) == {"hidden_2", "head"}
    np.testing.assert_array_equal(chosen["hidden_2"], jnp.tanh(raw["hidden_2"]))
    np.testing.assert_array_equal(chosen["head"], jax.nn.softmax(raw["head"]))
    with pytest.raises(ValueError, match=r"\['hiden_2'\]; it has \['head', 'hidden_1', 'hidden_2'\]"):
        nn.capture(model, activation={"hiden_2": jnp.tanh})(params, x)
    with pytest.raises(ValueError, match="no layer with a kernel"):
        nn.capture(nn.Flatten())(nnx.State({}), x)
    with pytest.raises(TypeError, match="Module, got function"):
        nn.capture(chain_by_hand)  # type: ignore[arg-type]


def test_a_single_layer_is_a_model_too() -> None:
    layer = nn.SparseLinear(4, 3, density=0.5, rngs=nnx.Rngs(0))
    apply, x = nn.capture(layer, activation=None), IMAGES.reshape(5, 4)
    y, seen = apply(nnx.state(layer, nnx.Param), x)
    np.testing.assert_array_equal(seen[""], y)
    params = nn.lsuv(lambda params: apply(params, x)[1], nnx.state(layer, nnx.Param), [""])
    assert abs(float(jnp.var(apply(params, x)[0])) - 1) < 0.01


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_statistics_inside_a_jitted_step(kind: str) -> None:
    """The main use: one forward pass gives the loss, its gradient and the activation statistics."""
    model: Any
    if kind == "nnx":
        model = nn.MLP([4, 6, 5, 3], density=0.5, rngs=nnx.Rngs(0))
        _, params, rest = nnx.split(model, nnx.Param, ...)
    else:
        model = nn.linen.MLP((4, 6, 5, 3), density=0.5)
        variables = model.init(jax.random.key(0), jnp.ones((1, 4)))
        params, rest = variables["params"], {"masks": variables["masks"]}
    apply = nn.capture(model, activation={"hidden_1": nnx.relu, "hidden_2": nnx.relu})
    tx = optax.adam(1e-2)
    traces = []

    def loss(params: Any, rest: Any, x: jax.Array) -> Any:
        logits, activations = apply(params, x, rest=rest)
        return jnp.mean(logits**2), activations

    @jax.jit
    def step(carry: Any, rest: Any, x: jax.Array) -> Any:
        traces.append(1)
        params, state, stats = carry
        (value, activations), grads = jax.value_and_grad(loss, has_aux=True)(params, rest, x)
        updates, state = tx.update(grads, state, params)
        stats = oxs.update_activation_stats(stats, activations)
        return (optax.apply_updates(params, updates), state, stats), value

    x = RNG.normal(size=(8, 4)).astype(np.float32)
    value, activations = jax.jit(loss)(params, rest, x)
    stats = oxs.init_activation_stats(activations)
    carry, first = step((params, tx.init(params), stats), rest, x)
    np.testing.assert_allclose(first, value, rtol=1e-6)
    assert set(oxs.find_extrema(carry[2]).dead) == {"hidden_1", "hidden_2"}
    # New masks come in as values: nothing retraces, and they are read.
    none = jax.tree.map(jnp.zeros_like, rest)
    _, silent = step(carry, none, x)
    _, again = step(carry, rest, x)
    assert len(traces) == 1
    assert float(silent) < 1e-3 < float(again)  # biases alone after one step of 0.01


def test_nnx_state_stays_with_the_caller() -> None:
    net = Net(nnx.Rngs(0))
    params = nnx.state(net, nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.state(net))
    apply = jax.jit(nn.capture(net, return_rest=True))
    _, _, rest = apply(params, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net), before)
    y = net.conv(IMAGES)
    expected = 0.99 * 0.0 + 0.01 * jnp.mean(y, axis=(0, 1, 2))
    np.testing.assert_allclose(rest["norm"]["mean"].get_value(), expected, rtol=1e-4, atol=1e-6)
    _, _, rest = apply(params, IMAGES, rest=rest)
    np.testing.assert_allclose(rest["norm"]["mean"].get_value(), 1.99 * expected, rtol=1e-4, atol=1e-6)
    net(IMAGES)  # the module itself goes on as it was, without captured values in it
    assert jax.tree.structure(nnx.state(net)) == jax.tree.structure(before)


def test_linen_collections_are_returned_or_refused() -> None:
    twin = Twin()
    variables = twin.init(jax.random.key(0), IMAGES, train=False)
    rest = {name: variables[name] for name in ("masks", "batch_stats")}
    dropout = {"dropout": jax.random.key(1)}
    _, _, after = nn.capture(twin, rest, return_rest=True)(variables["params"], IMAGES, rngs=dropout)
    assert set(after) == {"masks", "batch_stats"}
    old, new = jax.tree.leaves(rest["batch_stats"]), jax.tree.leaves(after["batch_stats"])
    assert any(not np.array_equal(a, b) for a, b in zip(old, new, strict=True))
    with pytest.raises(Exception, match="Cannot update variable"):
        nn.capture(twin, rest)(variables["params"], IMAGES, rngs=dropout)


# The growing chain


def chain_by_hand(params: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A chain 4 -> 6 -> 3 with two patches on its hidden layer, in NumPy."""
    p = jax.tree.map(np.asarray, params)
    pre = x @ p["hidden_1"]["kernel"] + p["hidden_1"]["bias"]
    pre[:, [1, 5]] += (
        np.maximum(x[:, [0, 2]] @ p["patch_a"]["down"]["kernel"] + p["patch_a"]["down"]["bias"], 0)
        @ (p["patch_a"]["up"]["kernel"])
    )
    pre[:, [5]] += (
        np.maximum(x[:, [3]] @ p["patch_b"]["down"]["kernel"] + p["patch_b"]["down"]["bias"], 0)
        @ (p["patch_b"]["up"]["kernel"])
    )
    hidden = np.maximum(pre, 0)
    return hidden @ p["head"]["kernel"] + p["head"]["bias"], hidden


def patched() -> tuple[Units, Any]:
    def draw(*shape: int) -> np.ndarray:
        return RNG.normal(size=shape).astype(np.float32)

    params = {
        "hidden_1": {"kernel": draw(4, 6), "bias": draw(6)},
        "head": {"kernel": draw(6, 3), "bias": draw(3)},
        "patch_a": {"down": {"kernel": draw(2, 7), "bias": draw(7)}, "up": {"kernel": draw(7, 2)}},
        "patch_b": {"down": {"kernel": draw(1, 3), "bias": draw(3)}, "up": {"kernel": draw(3, 1)}},
    }
    groups = (
        UnitGroup("input", 4, (UnitAxis("hidden_1/kernel", 0, "outgoing"),)),
        UnitGroup("hidden_1", 6, (UnitAxis("hidden_1/kernel", 1, "incoming"), UnitAxis("head/kernel", 0, "outgoing"))),
        UnitGroup("head", 3, (UnitAxis("head/kernel", 1, "incoming"),)),
    )
    patches = (Patch("patch_a", "hidden_1", (0, 2), (1, 5)), Patch("patch_b", "hidden_1", (3,), (5,)))
    return Units(groups, patches), params


def test_chain_applies_its_patches_before_the_activation() -> None:
    units, params = patched()
    model = nn.linen.Chain.from_units(units)
    x = RNG.normal(size=(9, 4)).astype(np.float32)
    logits, hidden = chain_by_hand(params, x)
    outputs, seen = jax.jit(nn.capture(model, activation={"hidden_1": jax.nn.relu}))(params, x)
    np.testing.assert_allclose(outputs, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(seen["hidden_1"], hidden, rtol=1e-5, atol=1e-5)
    grads = jax.jit(jax.grad(lambda params: jnp.sum(model.apply({"params": params}, x) ** 2)))(params)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads))


def test_chain_is_a_static_argument_by_value() -> None:
    units, params = patched()
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def logits(model: nn.linen.Chain, params: Any, x: jax.Array) -> jax.Array:
        traces.append(1)
        return model.apply({"params": params}, x)

    for _ in range(2):
        logits(nn.linen.Chain.from_units(units), params, jnp.ones((2, 4)))
    assert len(traces) == 1
    logits(nn.linen.Chain.from_units(units._replace(patches=())), params, jnp.ones((2, 4)))
    assert len(traces) == 2


def test_chain_starts_as_plain_dense_layers() -> None:
    model = nn.linen.Chain((("hidden_1", 6), ("head", 3)), dtype=jnp.bfloat16)
    params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "hidden_1": {"kernel": (4, 6), "bias": (6,)},
        "head": {"kernel": (6, 3), "bias": (3,)},
    }
    assert model.apply({"params": params}, jnp.ones((2, 4))).dtype == jnp.bfloat16
    units, _ = patched()
    with pytest.raises(ValueError, match="cannot be initialised"):
        nn.linen.Chain.from_units(units).init(jax.random.key(0), jnp.ones((1, 4)))
    inside = Units((units.groups[0], UnitGroup("net/hidden_1", 6, ())))
    with pytest.raises(ValueError, match=r"\['net/hidden_1'\] lie inside a container"):
        nn.linen.Chain.from_units(inside)


# The train state


class WithStats(nn.TrainState):
    """As a user extends it."""

    batch_stats: Any = None


def test_train_state_forwards_the_loss_to_reduce_on_plateau() -> None:
    tx = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=2, rtol=1e-6))
    params, grads = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}
    state = WithStats.create(apply_fn=lambda *a: None, params=params, tx=tx)
    step = jax.jit(lambda state, loss: state.apply_gradients(grads=grads, value=loss, batch_stats=loss))
    for _ in range(6):
        state = step(state, jnp.asarray(1.0))
    # A loss that never falls: the first value is the best so far, steps 2 and 3 exhaust the patience and step 3 is
    # halved; 4 and 5 exhaust it again. Updates: 1 + 1 + 0.5 + 0.5 + 0.25 + 0.25.
    np.testing.assert_allclose(state.params["w"], -3.5)
    assert int(state.step) == 6 and state.tx is tx
    np.testing.assert_array_equal(state.batch_stats, 1.0)


def test_train_state_without_extra_arguments_is_that_of_flax() -> None:
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.arange(3.0)}
    tx = optax.adamw(1e-2)  # takes no extra argument: one that nobody reads is dropped, as in optax.chain
    ours = nn.TrainState.create(apply_fn=None, params=params, tx=tx)
    theirs = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    for _ in range(3):
        ours = ours.apply_gradients(grads=grads, value=jnp.asarray(1.0))
        theirs = theirs.apply_gradients(grads=grads)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs))
    assert jax.tree.structure(ours.opt_state) == jax.tree.structure(theirs.opt_state)
