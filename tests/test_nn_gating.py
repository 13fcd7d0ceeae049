"""Gates in NNX and Linen models as they are, and in the sparse layers: the plain model's numbers, less work."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
from flax import linen, nnx

import optax_structure as oxs
from optax_structure import nn
from optax_structure._tree import leaves_by_path, map_with_path

RNG = np.random.default_rng(0)
WIDTH = 6
ROWS = RNG.normal(size=(4, WIDTH)).astype(np.float32)
IMAGES = RNG.normal(size=(3, 5, 5, 2)).astype(np.float32)
TOKENS = RNG.integers(0, 7, size=(3, 4))


# The models: NNX, and Linen with the same layers in the same order


class Cnn(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv_0 = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.conv_0_norm = nnx.BatchNorm(3, rngs=rngs)
        self.conv_1 = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
        self.conv_1_norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(36, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv_0_norm(self.conv_0(x)))
        x = nnx.relu(self.conv_1_norm(self.conv_1(x)))
        return self.head(x.reshape(x.shape[0], -1))


class LinenCnn(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for place, (channels, stride) in enumerate(((3, 1), (4, 2))):
            x = linen.Conv(channels, (3, 3), strides=stride, name=f"conv_{place}")(x)
            x = linen.relu(linen.BatchNorm(use_running_average=False, name=f"conv_{place}_norm")(x))
        return linen.Dense(3, name="head")(x.reshape(x.shape[0], -1))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm_0 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, rngs=rngs, decode=False)
        self.norm_1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_0(x))
        return x + self.dropout(self.down(nnx.gelu(self.up(self.norm_1(x)))))


class Former(nnx.Module):
    """A position and a tied embedding, which no layer's call reads, around two blocks."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(7, WIDTH, rngs=rngs)
        self.position = nnx.Param(rngs.params.normal((4, WIDTH)))
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.norm = nnx.BatchNorm(WIDTH, use_bias=False, use_scale=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


class LinenBlock(linen.Module):
    """With ``setup``: its dropout has a scope before it is called."""

    def setup(self) -> None:
        self.norm_0, self.norm_1 = linen.LayerNorm(), linen.LayerNorm()
        self.attention = linen.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=False)
        self.up, self.down = linen.Dense(2 * WIDTH), linen.Dense(WIDTH)
        self.dropout = linen.Dropout(0.2, deterministic=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_0(x))
        return x + self.dropout(self.down(linen.gelu(self.up(self.norm_1(x)))))


class LinenFormer(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        embed = linen.Embed(7, WIDTH, name="embed")
        x = embed(x) + self.param("position", linen.initializers.normal(1.0), (4, WIDTH))
        for place in range(2):
            x = LinenBlock(name=f"blocks_{place}")(x)
        norm = linen.BatchNorm(use_running_average=False, use_bias=False, use_scale=False, name="norm")
        return embed.attend(norm(x))


# Every model the same way: its params, its own function, the gated one


class Case(NamedTuple):
    """A model as functions of its params; both return the outputs and the state after the call."""

    params: Any
    rest: Any
    plain: Callable[[Any, Any], Any]
    gated: Callable[[Any, Any, Any], Any]


def case(model: Any, x: Any, **options: Any) -> Case:
    options = {"return_rest": True} | options
    if isinstance(model, nnx.Module):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def plain(params: Any, x: Any) -> Any:
            merged = nnx.merge(graphdef, params, rest, copy=True)
            return merged(x), nnx.state(merged, nnx.Not(nnx.Param))

        return Case(params, rest, plain, nn.gate_model(model, **options))
    rngs = {"dropout": jax.random.key(2)}
    variables = dict(jax.jit(model.init)({"params": jax.random.key(0)} | rngs, x))
    params = variables.pop("params")

    def plain_linen(params: Any, x: Any) -> Any:
        return model.apply({"params": params, **variables}, x, rngs=rngs, mutable=[*variables])

    return Case(
        params, variables, plain_linen, functools.partial(nn.gate_model(model, variables, **options), rngs=rngs)
    )


def loss_of(fn: Callable[..., Any], x: Any) -> Callable[..., Any]:
    def loss(params: Any, *gates: Any) -> Any:
        outputs, rest = fn(params, *gates, x)
        return jnp.sum(outputs * jnp.sin(jnp.arange(outputs.size)).reshape(outputs.shape)), (outputs, rest)

    return loss


def prefix(depths: Any, closed: int, make: Callable[[bool], Any] = jnp.asarray) -> Any:
    return oxs.gates(jax.tree.map(lambda depth: make(depth < closed), depths), depths)


def check_gradients(found: Any, expected: Any, depths: Any, closed: int) -> None:
    """The plain model's of what is open, exactly 0 of the rest."""
    found, expected, depths = map(leaves_by_path, (found, expected, depths))
    size = max(float(jnp.abs(leaf).max()) for leaf in expected.values())  # some biases have none, but for rounding
    for path, leaf in found.items():
        if depths[path] < closed:
            np.testing.assert_array_equal(leaf, 0, err_msg=path)
        else:
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6 * size, err_msg=path)


def slopes_of(loss: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def slopes_later(loss: Callable[..., Any]) -> Callable[..., Any]:
    return jax.value_and_grad(jax.jit(loss), has_aux=True)


def check(of: Case, x: Any, layers: Sequence[str], *, slopes_of: Callable[..., Any] = slopes_of) -> list[Any]:
    """All prefixes with one trace, against the plain model. Returns the state after each."""
    depths = oxs.layer_depths(of.params, layers)
    (_, (outputs, after)), grads = slopes_of(loss_of(of.plain, x))(of.params)
    traces = []

    def loss(params: Any, gates: Any) -> Any:
        traces.append(1)
        return loss_of(of.gated, x)(params, gates)

    step = slopes_of(loss)
    rests = []
    for closed in range(len(layers) + 1):
        (_, (found, rest)), slopes = step(of.params, prefix(depths, closed))
        np.testing.assert_allclose(found, outputs, rtol=1e-5, atol=1e-6)
        check_gradients(slopes, grads, depths, closed)
        assert jax.tree.structure(rest) == jax.tree.structure(after)
        rests.append(rest)
    assert len(traces) == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *map(numbers, (rests[0], after)))
    return rests


def numbers(state: Any) -> list[Any]:
    """The arrays of a state, keys as the integers that they are."""
    keys = jax.dtypes.prng_key
    return [jax.random.key_data(x) if jnp.issubdtype(x.dtype, keys) else x for x in jax.tree.leaves(state)]


MLP_LAYERS = ["hidden_1", "hidden_2", "head"]
CNN_LAYERS = ["conv_0", "conv_1", "head"]
FORMER_LAYERS = ["embed|position", "blocks.0", "blocks.1"]


def mlp(kind: str) -> Any:
    if kind == "nnx":
        return nn.MLP([WIDTH, 5, 4, 3], density=0.5, activation=jnp.tanh, rngs=nnx.Rngs(0))
    return nn.linen.MLP((WIDTH, 5, 4, 3), density=0.5, activation=jnp.tanh)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_gates_of_an_mlp_move_in_one_program(kind: str) -> None:
    check(case(mlp(kind), ROWS), ROWS, MLP_LAYERS)


@pytest.mark.slow
@pytest.mark.parametrize("model", [Cnn(nnx.Rngs(0)), LinenCnn()], ids=["nnx", "linen"])
def test_a_frozen_batch_norm_keeps_its_statistics(model: Any) -> None:
    of = case(model, IMAGES)
    old = leaves_by_path(of.rest)
    for closed, rest in enumerate(check(of, IMAGES, CNN_LAYERS)):
        for path, leaf in leaves_by_path(rest).items():
            frozen = closed > int(path.split("conv_")[1][0])
            assert np.array_equal(leaf, old[path]) == frozen, (closed, path)
    moving = case(model, IMAGES, freeze_statistics=False)
    _, rest = jax.jit(moving.gated)(of.params, 2, IMAGES)
    assert not any(map(np.array_equal, jax.tree.leaves(rest), jax.tree.leaves(of.rest)))


@pytest.mark.slow
def test_a_norm_without_parameters_goes_by_what_is_around_it() -> None:
    bare = nnx.BatchNorm(WIDTH, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))
    part = nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), bare)
    model = nnx.Sequential(part, nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(1)))
    of = case(model, ROWS)
    depths = oxs.layer_depths(of.params)
    means = [numbers(of.gated(of.params, prefix(depths, closed, bool), ROWS)[1])[0] for closed in (0, 1)]
    assert [bool(np.any(mean)) for mean in means] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("at", [None, [r"blocks.\d$"], ["attention", "blocks.0$"]], ids=str)
@pytest.mark.parametrize("model", [Former(nnx.Rngs(0)), LinenFormer()], ids=["nnx", "linen"])
def test_gates_of_a_transformer(model: Any, at: list[str] | None) -> None:
    of = case(model, TOKENS, at=at)
    rests = check(of, TOKENS, FORMER_LAYERS)
    # The last norm has no parameters of its own: the whole model decides.
    norms = [leaves_by_path(rest) for rest in (of.rest, *rests)]
    means = [leaf for norm in norms for path, leaf in norm.items() if path.endswith("norm/mean")]
    assert [np.array_equal(mean, means[0]) for mean in means[1:]] == [False, False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("model", [Former(nnx.Rngs(0)), LinenFormer()], ids=["nnx", "linen"])
def test_gradients_that_jax_asks_for_later(model: Any) -> None:
    """``grad`` of a jitted loss: JAX traces the layers a second time, after the call, and wants the same keys."""
    for at in (None, [r"blocks.\d$"]):
        of = case(model, TOKENS, at=at)
        check(of, TOKENS, FORMER_LAYERS, slopes_of=slopes_later)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_right_under_vmap_over_the_gates(kind: str) -> None:
    of = case(mlp(kind), ROWS)
    depths = oxs.layer_depths(of.params, MLP_LAYERS)
    gates = jax.tree.map(lambda *levels: jnp.stack(levels), *(prefix(depths, closed) for closed in range(4)))
    grads = jax.jit(jax.grad(lambda params: loss_of(of.plain, ROWS)(params)[0]))(of.params)
    step = jax.grad(lambda params, gates: loss_of(of.gated, ROWS)(params, gates)[0])
    found = jax.jit(jax.vmap(step, in_axes=(None, 0)))(of.params, gates)
    for closed in range(4):
        check_gradients(jax.tree.map(lambda leaf, at=closed: leaf[at], found), grads, depths, closed)


@pytest.mark.parametrize("kind", ["nnx", pytest.param("linen", marks=pytest.mark.slow)])
def test_traced_gates_are_branches_and_known_ones_are_gone(kind: str) -> None:
    of = case(mlp(kind), ROWS)
    depths = oxs.layer_depths(of.params, MLP_LAYERS)

    def step(gates: Any) -> Any:
        return jax.grad(lambda params: loss_of(of.gated, ROWS)(params, gates)[0])(of.params)

    assert jax.jit(step).lower(prefix(depths, 1)).as_text().count("stablehlo.case") == 3
    texts = [jax.jit(lambda closed=c: step(prefix(depths, closed, bool))).lower() for c in range(4)]
    assert all("stablehlo.case" not in lowered.as_text() for lowered in texts)
    # Forward two products (nobody asks for the loss itself); backward one a layer for its weights, and one for the
    # inputs of all but the first.
    products = [lowered.as_text().count("stablehlo.dot_general") for lowered in texts]
    assert products == [2 + 5, 2 + 3, 2 + 1, 0]
    flops = [cast(Any, lowered.cost_analysis()).get("flops", 0) for lowered in texts]
    assert flops == sorted(flops, reverse=True) and len(set(flops)) == 4


@pytest.mark.slow
def test_a_block_gated_whole_has_one_branch() -> None:
    for model in (Former(nnx.Rngs(0)), LinenFormer()):
        counts = []
        for at in (None, [r"blocks.\d$"], ["."]):
            of = case(model, TOKENS, at=at)
            step = jax.grad(lambda params, gates, of=of: loss_of(of.gated, TOKENS)(params, gates)[0])
            lowered = jax.jit(step).lower(of.params, jnp.array(0))
            counts.append(lowered.as_text().count("stablehlo.case"))
        # Embedding; of every block two norms, four products of attention, two products. "." is all that has a name.
        assert counts == [1 + 2 * 8, 1 + 2, 1 + 2]


# Weights that are read twice, and parts of a model inside transformations


class Twice(nnx.Module):
    """``a`` is called before and after ``b``, and its kernel once more by ``c``."""

    def __init__(self, rngs: nnx.Rngs):
        self.a, self.b, self.c = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(3))
        self.c.kernel = self.a.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c(jnp.tanh(self.a(jnp.tanh(self.b(jnp.tanh(self.a(x)))))))


class LinenTwice(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a, b, c = (linen.Dense(WIDTH, name=name) for name in "abc")
        return c(jnp.tanh(a(jnp.tanh(b(jnp.tanh(a(x)))))))


class Tied(nnx.Module):
    """The kernel of ``a`` is read without a call, and called as that of ``c``."""

    def __init__(self, rngs: nnx.Rngs):
        self.a, self.c = (nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in range(2))
        self.b = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.c.kernel = self.a.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c(jnp.tanh(self.b(x @ self.a.kernel[...])))


class Loop(nnx.Module):
    """``b`` comes before ``a`` in all rounds but the first."""

    def __init__(self, rngs: nnx.Rngs):
        self.a, self.b = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.tanh(self.b(jnp.tanh(self.a(x)))), None), x, length=3)[0]


@pytest.mark.parametrize("model", [Tied(nnx.Rngs(0)), Loop(nnx.Rngs(0))], ids=["tied", "loop"])
def test_a_frozen_layer_hands_gradients_down_where_its_inputs_are_not_the_first(model: nnx.Module) -> None:
    check(case(model, ROWS), ROWS, ["^a", "^b"])


@pytest.mark.parametrize("model", [Twice(nnx.Rngs(0)), LinenTwice()], ids=["nnx", "linen"])
def test_the_second_call_of_a_frozen_layer_hands_gradients_down(model: Any) -> None:
    """``a`` alone is frozen, at level 2; ``b`` learns through the second call of ``a``."""
    check(case(model, ROWS), ROWS, ["^a", "^b", "^c"])


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.dropout(self.norm(jnp.tanh(self.linear(x))))


class Saved(Layer):
    @nnx.remat
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.dropout(self.norm(jnp.tanh(self.linear(x))))


@nnx.jit
def jitted(layer: nnx.Module, x: jax.Array) -> jax.Array:
    return layer(x)  # type: ignore[operator]


class Wrapped(nnx.Module):
    """``remat`` around the body and around the call, ``scan`` over stacked layers, ``jit`` of a part."""

    def __init__(self, rngs: nnx.Rngs):
        self.part_0, self.part_1, self.part_3 = Saved(rngs), Layer(rngs), Layer(rngs)
        self.part_2 = nnx.split_rngs(splits=3)(nnx.vmap(Layer))(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.remat(lambda layer, x: layer(x))(self.part_1, self.part_0(x))
        x = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.part_2, x)
        return jitted(self.part_3, x)


class LinenLayer(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, _: Any = None) -> Any:
        y = x + linen.Dropout(0.2, deterministic=False)(jnp.tanh(linen.Dense(WIDTH, name="dense")(x)))
        return y, None


class LinenWrapped(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x, _ = linen.remat(LinenLayer)(name="part_0")(x)
        x, _ = linen.jit(LinenLayer)(name="part_1")(x)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True, "dropout": True}}
        x, _ = linen.scan(LinenLayer, length=3, **axes)(name="part_2")(x, None)
        return LinenLayer(name="part_3")(x)[0]


@pytest.mark.slow
@pytest.mark.parametrize("at", [None, [r"part_\d$"]], ids=str)
@pytest.mark.parametrize("model", [Wrapped(nnx.Rngs(0)), LinenWrapped()], ids=["nnx", "linen"])
def test_parts_inside_transformations(model: Any, at: list[str] | None) -> None:
    of, parts = case(model, ROWS, at=at), [f"part_{place}" for place in range(4)]
    check(of, ROWS, parts)
    check(of, ROWS, parts, slopes_of=slopes_later)


class Handed(nnx.Module):
    """Layers that are handed the source of their keys."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = (Drop(rngs) for _ in range(2))
        self.rngs = rngs

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.first(x, rngs=self.rngs), rngs=self.rngs)


class Drop(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear, self.dropout = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs) -> jax.Array:
        return self.dropout(self.linear(x), rngs=rngs)


@pytest.mark.slow
def test_keys_that_a_block_is_handed_go_on() -> None:
    check(case(Handed(nnx.Rngs(0)), ROWS, at=["first", "second"]), ROWS, ["first", "second"])


# Training


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_a_net_freezes_probes_and_thaws(kind: str) -> None:
    """The hidden layers have small gradients at first; then the task needs them, and a probe sees it."""
    of = case(mlp(kind), ROWS)
    depths = oxs.layer_depths(of.params, MLP_LAYERS)
    tx = oxs.freeze_on_small_gradients(
        oxs.per_leaf(optax.adamw(1e-3)),
        threshold=0.1,
        decay=0.0,
        min_steps=0,
        patience=2,
        groups=depths,
        probe_every=5,
        alarm=None,
    )
    traces = []

    def loss_fn(params: Any, gates: Any, strength: Any) -> Any:
        outputs, _ = of.gated(params, gates, ROWS)
        return strength * jnp.mean(jnp.sum(outputs, -1)) + jnp.sum(params["head"]["bias"][...])  # keeps the head open

    @jax.jit
    def step(params: Any, state: Any, strength: Any) -> Any:
        traces.append(1)
        gates = oxs.gates(state, depths)
        loss, grads = jax.value_and_grad(loss_fn)(params, gates, strength)
        updates, state = tx.update(grads, state, params, value=loss, observed=oxs.observed(gates))
        return optax.apply_updates(params, updates), state, gates, grads

    params, state, seen = of.params, tx.init(of.params), []
    for count in range(24):
        before = leaves_by_path(params)
        params, state, gates, grads = step(params, state, 1e-3 if count < 12 else 100.0)
        levels, slopes, after = map(leaves_by_path, (gates, grads, params))
        for path, level in levels.items():
            assert bool(level) != np.any(slopes[path]), (count, path)
            if level:
                np.testing.assert_array_equal(after[path], before[path])
        seen.append([int(levels[f"{layer}/kernel"]) for layer in MLP_LAYERS])
    assert len(traces) == 1
    hidden = [levels[0] for levels in seen]
    assert all(levels == [level, level, 0] for level, levels in zip(hidden, seen, strict=True))
    assert hidden[:3] == [0, 0, 2]  # two small readings, and the two hidden layers are closed
    assert hidden[3:12].count(0) in (1, 2)  # probes, and closed again after them
    thawed = hidden.index(0, 12)
    assert thawed < 12 + 6 and hidden[thawed:] == [0] * (24 - thawed)  # the next probe opens them for good


# What it leaves alone, and what it refuses


def test_the_model_stays_as_it_was() -> None:
    model = Layer(nnx.Rngs(0))
    before, kinds = jax.tree.map(jnp.copy, nnx.state(model)), [type(module) for _, module in nnx.iter_modules(model)]
    jax.eval_shape(nn.gate_model(model), nnx.state(model, nnx.Param), 1, ROWS)
    assert [type(module) for _, module in nnx.iter_modules(model)] == kinds
    assert nnx.graphdef(model) == nnx.graphdef(Layer(nnx.Rngs(0)))
    for found, expected in zip(numbers(nnx.state(model)), numbers(before), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_outputs_alone_and_state_that_comes_with_the_call() -> None:
    model = mlp("nnx")
    params, masks = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))
    apply = nn.gate_model(model)
    np.testing.assert_array_equal(apply(params, 0, ROWS), model(ROWS))
    biases = apply(params, 0, ROWS, rest=jax.tree.map(jnp.zeros_like, masks))
    np.testing.assert_array_equal(biases, 0)
    twin = mlp("linen")
    variables = twin.init(jax.random.key(0), ROWS)
    apply = nn.gate_model(twin, {"masks": variables["masks"]})
    np.testing.assert_array_equal(apply(variables["params"], 0, ROWS), twin.apply(variables, ROWS))


def test_errors_name_what_is_wrong() -> None:
    model, twin = mlp("nnx"), mlp("linen")
    params = nnx.state(model, nnx.Param)
    with pytest.raises(ValueError, match=r"'hiden' matches no module with parameters; there are \['', 'head', 'hidden"):
        nn.gate_model(model, at=["head", "hiden"])
    variables = jax.eval_shape(twin.init, jax.random.key(0), ROWS)
    apply = nn.gate_model(twin, {"masks": variables["masks"]}, at=["hiden"])
    with pytest.raises(ValueError, match="'hiden' matches no module"):
        jax.eval_shape(apply, variables["params"], 0, ROWS)
    with pytest.raises(TypeError, match=r"at='head' must be a list .* such as \['head'\]"):
        nn.gate_model(model, at="head")
    with pytest.raises(TypeError, match="Module, got function"):
        nn.gate_model(mlp)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gates does not have the structure of params"):
        nn.gate_model(model)(params, {"head": 0}, ROWS)
    with pytest.raises(ValueError, match=r"gate=0\.5 must be an integer"):
        nn.gate_model(model)(params, 0.5, ROWS)


# The gate of our own layers


def layers() -> list[Any]:
    return [
        nn.SparseLinear(WIDTH, 3, density=0.5, rngs=nnx.Rngs(0)),
        nn.SparseConv(2, 3, (3, 3), density=0.5, masked_by="update", use_bias=False, rngs=nnx.Rngs(0)),
        nn.linen.SparseDense(3, density=0.5),
        nn.linen.SparseConv(3, (3, 3), density=0.5, masked_by="update"),
    ]


@pytest.mark.parametrize("layer", layers(), ids=lambda layer: f"{type(layer).__module__[19:]}-{type(layer).__name__}")
def test_sparse_layers_take_a_gate(layer: Any) -> None:
    x = IMAGES if "Conv" in type(layer).__name__ else ROWS
    if isinstance(layer, nnx.Module):
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
        apply = lambda params, x, *gate: nnx.merge(graphdef, params, rest)(x, *gate)  # noqa: E731
    else:
        variables = dict(layer.init(jax.random.key(0), x))
        params = variables.pop("params")
        apply = lambda params, x, *gate: layer.apply({"params": params, **variables}, x, *gate)  # noqa: E731

    def slopes(params: Any, x: Any, *gate: Any) -> Any:
        return jax.grad(lambda params, x: jnp.sum(jnp.sin(apply(params, x, *gate))), argnums=(0, 1))(params, x)

    plain, gated = jax.jit(slopes)(params, x), jax.jit(slopes)
    for level in range(3):
        of_params, of_x = gated(params, x, jnp.array(level))
        for found, expected in zip(jax.tree.leaves(of_params), jax.tree.leaves(plain[0]), strict=True):
            np.testing.assert_allclose(found, expected * (level < 1), rtol=1e-5, atol=1e-5 * (level < 1))
        np.testing.assert_allclose(of_x, plain[1] * (level < 2), rtol=1e-5, atol=1e-5 * (level < 2))
    assert "case" not in jax.jit(slopes).lower(params, x).as_text()


# What a layer has in place of a parameter of its own.


class Shifted(nnx.Module):
    """A linear layer whose kernel is the sum of its own and of an open delta: LoRA by hand."""

    def __init__(self, rngs: nnx.Rngs):
        self.base = nnx.Linear(3, 2, rngs=rngs)
        self.delta = nnx.Param(jnp.full((3, 2), 0.1))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.base.kernel[...] = self.base.kernel[...] + self.delta[...]
        return self.base(x)


class Normed(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.WeightNorm(linen.Dense(2))(x)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", ["nnx", "linen"])
@pytest.mark.parametrize("level", [1, 2])
def test_what_a_frozen_layers_weights_are_computed_from_learns(kind: str, traced: bool, level: int) -> None:
    x = jax.random.normal(jax.random.key(0), (4, 3))
    if kind == "nnx":
        model, frozen = Shifted(nnx.Rngs(0)), "base"
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def plain(params: Any) -> jax.Array:
            return nnx.merge(graphdef, params, rest, copy=True)(x)
    else:
        model, frozen = Normed(), "Dense_0"
        params = model.init(jax.random.key(0), x)["params"]

        def plain(params: Any) -> jax.Array:
            return model.apply({"params": params}, x)

    apply = nn.gate_model(model)
    shut = jnp.int32(level) if traced else level
    gates = map_with_path(lambda path, _: shut if path.startswith(frozen) else 0, params)
    got = leaves_by_path(jax.grad(lambda params: jnp.sum(apply(params, gates, x) ** 2))(params))
    want = leaves_by_path(jax.grad(lambda params: jnp.sum(plain(params) ** 2))(params))
    for path, gradient in got.items():
        closed = path.startswith(frozen)
        np.testing.assert_allclose(gradient, np.zeros_like(gradient) if closed else want[path], rtol=1e-6)
        assert np.any(want[path])


def test_all_of_linens_variables_may_be_passed_as_rest() -> None:
    model, x = linen.Sequential([linen.Dense(4), linen.BatchNorm(use_running_average=True)]), jnp.ones((2, 3))
    variables = model.init(jax.random.key(0), x)
    apply = nn.gate_model(model, variables)
    grads = jax.grad(lambda params: jnp.sum(apply(params, 0, x) ** 2))(variables["params"])
    assert all(np.any(grad) for grad in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="return_rest"):
        apply(variables["params"], 0, x, mutable=["batch_stats"])


def test_nnx_layers_of_odd_kinds_are_gated_or_left_alone() -> None:
    class Registered:
        def __init_subclass__(cls, *, tag: str = "") -> None:
            super().__init_subclass__()

    class Layer(Registered, nnx.Module):
        def __init__(self) -> None:
            self.pair = nnx.Param({"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)})

        def __call__(self, x: jax.Array) -> jax.Array:
            pair = self.pair.get_value()
            return x @ pair["kernel"] + pair["bias"]

    x = jnp.ones((2, 3))
    bridged = nnx.bridge.ToNNX(linen.Dense(2), rngs=nnx.Rngs(0)).lazy_init(x)
    model = nnx.Sequential(Layer(), bridged)
    params = nnx.state(model, nnx.Param)
    apply = nn.gate_model(model)
    np.testing.assert_array_equal(apply(params, 0, x), model(x))
    gates = map_with_path(lambda path, _: jnp.int32("pair" in path), params)
    grads = leaves_by_path(jax.grad(lambda params: jnp.sum(apply(params, gates, x) ** 2))(params))
    assert {path: bool(np.any(grad)) for path, grad in grads.items()} == {path: "pair" not in path for path in grads}


def test_a_state_that_changes_after_the_model_was_read_is_not_seen() -> None:
    model = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    apply, params = nn.gate_model(model), nnx.state(model, nnx.Param)
    before = apply(params, 0, jnp.ones((2, 3)))
    model.mean[...] = jnp.full(3, 5.0)
    np.testing.assert_array_equal(apply(params, 0, jnp.ones((2, 3))), before)
    with pytest.raises(ValueError, match="rest= holds parameters"):
        apply(params, 0, jnp.ones((2, 3)), rest=nnx.state(model))


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_a_module_of_at_that_is_never_called_is_named(kind: str) -> None:
    class Encoder(nnx.Module):
        def __init__(self) -> None:
            self.layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def encode(self, x: jax.Array) -> jax.Array:
            return self.layer(x)

        __call__ = encode

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.encoder = Encoder()

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.encoder.encode(x)

    class LinenEncoder(linen.Module):
        @linen.compact
        def encode(self, x: jax.Array) -> jax.Array:
            return linen.Dense(3)(x)

    class LinenModel(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return LinenEncoder(name="encoder").encode(x)

    x = jnp.ones((2, 3))
    model = Model() if kind == "nnx" else LinenModel()
    params = nnx.state(model, nnx.Param) if kind == "nnx" else model.init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match="never calls 'encoder'"):
        nn.gate_model(model, at=["encoder$"])(params, 0, x)


@pytest.mark.parametrize("level", [5, -1, 0.5, "x", jnp.zeros(2, int)])
def test_gates_that_are_no_levels_are_named_wherever_the_parameter_is_read(level: Any) -> None:
    class Positions(nnx.Module):
        def __init__(self) -> None:
            self.table = nnx.Param(jnp.ones(3))

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + self.table[...]

    model = nnx.Sequential(Positions(), nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    gates = map_with_path(lambda path, _: level if "table" in path else 0, params)
    with pytest.raises(ValueError, match="gate="):
        nn.gate_model(model)(params, gates, jnp.ones((2, 3)))
