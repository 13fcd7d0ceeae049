"""Gates in the backward pass: the gradients that are wanted are those of the plain function, the others exactly 0."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PyTree, assert_close, assert_equal
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import optax_structure as oxs

# Where only the result counts, a program is compiled quickly rather than well.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def layer(params: PyTree, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["kernel"] + params["bias"])


def layer_params(width: int = 3, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.normal(size=(width, width)), dtype),
        "bias": jnp.asarray(rng.normal(size=width), dtype),
    }


def inputs(dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(9).normal(size=(5, 3)), dtype)


def pull(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn``'s outputs, and the gradients of params and inputs of one scalar made of them."""

    def scalar(*args: Any) -> Any:
        outputs = fn(*args)
        floats = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return sum(jnp.sum(jnp.square(leaf).astype(jnp.float32)) for leaf in floats), outputs

    slopes, outputs = jax.grad(scalar, argnums=tuple(range(len(args))), has_aux=True, allow_int=True)(*args)
    return outputs, slopes


def assert_gated(found: Any, plain: Any, level: int) -> None:
    """Values and wanted gradients are the plain function's to the bit, the others 0."""
    (outputs, (of_params, *of_inputs)), (plain_outputs, (plain_params, *plain_inputs)) = found, plain
    assert_equal(outputs, plain_outputs)
    zeros = functools.partial(jax.tree.map, lambda leaf: np.zeros_like(leaf))
    assert_equal(of_params, plain_params if level < 1 else zeros(plain_params))
    assert_equal(of_inputs, plain_inputs if level < 2 else zeros(plain_inputs))


# One function.


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_the_open_gate_is_the_plain_function(dtype: Any) -> None:
    params, x = layer_params(dtype=dtype), inputs(dtype)
    program = jax.jit(lambda level: pull(functools.partial(oxs.gated(layer), level), params, x), compiler_options=QUICK)
    plain = jax.jit(lambda: pull(layer, params, x), compiler_options=QUICK)()
    for level in range(3):
        assert_gated(program(jnp.asarray(level)), plain, level)
    assert program._cache_size() == 1
    # Beyond the ends: as the ends.
    assert_equal(program(jnp.asarray(-1)), program(jnp.asarray(0)))
    assert_equal(program(jnp.asarray(7)), program(jnp.asarray(2)))


def test_levels_that_are_known_leave_the_work_out_of_the_program() -> None:
    params, x = layer_params(), inputs()
    gated = oxs.gated(layer)

    def products(gate: Any) -> int:
        return str(jax.make_jaxpr(lambda p, x: pull(functools.partial(gated, gate), p, x))(params, x)).count(
            "dot_general"
        )

    # Forward, and backward to the weights and to the inputs.
    assert [products(level) for level in (0, 1, 2)] == [3, 2, 1]
    assert [products(gate) for gate in (False, True, np.int32(2), {"kernel": 2, "bias": 1}, {}, None)] == [
        3,
        2,
        1,
        2,
        3,
        3,
    ]
    # The smallest level counts, and one that is known to be open decides.
    traced = {"kernel": jnp.asarray(2), "bias": 0}
    assert products(traced) == 3 and "cond" not in str(jax.make_jaxpr(lambda p: gated(traced, p, x))(params))


@pytest.mark.slow
def test_levels_that_are_known_give_the_same() -> None:
    params, x = layer_params(), inputs()
    for level in range(3):
        found = pull(functools.partial(oxs.gated(layer), level), params, x)
        assert_gated(found, pull(layer, params, x), level)


def test_the_smallest_level_of_a_layer_counts() -> None:
    params, x = layer_params(), inputs()
    program = jax.jit(
        lambda gate: pull(functools.partial(oxs.gated(layer), gate), params, x)[1], compiler_options=QUICK
    )
    for kernel, bias, least in ((2, 2, 2), (2, 1, 1), (0, 2, 0)):
        of_params, of_x = program({"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)})
        assert np.any(of_params["kernel"]) == np.any(of_params["bias"]) == (least < 1)
        assert np.any(of_x) == (least < 2)


@pytest.mark.parametrize(
    "gate",
    ["open", 0.5, 1.0 + 0j, jnp.asarray(0.5), jnp.zeros(1, jnp.int32), {"kernel": 0, "bias": np.ones(2, int)}],
    ids=str,
)
def test_a_wrong_gate_is_named(gate: Any) -> None:
    with pytest.raises(ValueError, match=r"gate=.* must be an integer scalar"):
        oxs.gated(layer)(gate, layer_params(), inputs())


@pytest.mark.slow
def test_any_kinds_of_arguments_and_outputs() -> None:
    def fn(params: Any, x: Any, index: Any, *, key: Any, old_key: Any, train: bool, mode: str, none: Any = None) -> Any:
        assert train is True and mode == "sum" and none is None, "what is no array is seen as it is"
        kept = jax.random.bernoulli(key, 0.5, x["a"].shape) | jax.random.bernoulli(old_key, 0.1, x["a"].shape)
        y = layer(params, jnp.where(kept, x["a"], 0.0))[index] * params["count"] + offset
        return {"y": y, "none": None, "best": jnp.argmax(y, axis=-1), "positive": y > 0, "pair": (x["a"], x["b"] + 1)}

    offset = jnp.arange(3.0)
    params = layer_params() | {"count": jnp.asarray(3), "none": None}
    x = {"a": inputs(), "b": jnp.arange(2)}
    index = np.array([4, 0, 1])
    more = {"key": jax.random.key(1), "old_key": jax.random.PRNGKey(2), "train": True, "mode": "sum", "none": None}

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(level: jax.Array) -> Any:
        def found(fn: Any, *gate: Any) -> Any:
            outputs, slopes = pull(lambda params, x: fn(*gate, params, x, index, **more), params, x)
            # Integers have no gradient: float0, whatever the gate.
            assert slopes[0].pop("count").dtype == slopes[1].pop("b").dtype == jax.dtypes.float0
            return outputs, slopes

        return found(oxs.gated(fn), level), found(fn)

    for level in range(3):
        found, plain = both(jnp.asarray(level))
        # The inputs are handed on beside the product: that gradient ends at the gate as well.
        assert_gated(found, plain, level)
    static = pull(lambda params, x: oxs.gated(fn)(1, params, x, index, **more), params, x)
    assert not np.any(static[1][0]["kernel"]) and np.any(static[1][1]["a"])


@pytest.mark.slow
def test_inside_the_transformations_of_jax() -> None:
    params, x, gated = layer_params(), inputs(), oxs.gated(layer)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[layer_params(seed=seed) for seed in range(4)])
    levels = jnp.array([2, 1, 0, 1])

    def slopes(fn: Any, *args: Any) -> Any:
        return pull(fn, *args)[1]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(level: jax.Array, levels: jax.Array) -> dict[str, Any]:
        def in_scan(gates: Any) -> Any:
            def body(x: Any, now: Any) -> Any:
                params, gate = now
                return (layer(params, x) if gates is None else gated(gate, params, x)), None

            return lambda params, x: jax.lax.scan(body, x, (params, levels))[0]

        outer = oxs.gated(lambda both, x, inner: gated(inner, both["in"], x) @ both["out"]["kernel"])
        both = {"in": params, "out": layer_params(seed=1)}
        return {
            "plain": slopes(layer, params, x),
            "remat": slopes(lambda p, x: jax.checkpoint(gated)(level, p, x), params, x),
            "gated remat": slopes(lambda p, x: oxs.gated(jax.checkpoint(layer))(level, p, x), params, x),
            "in jit": slopes(lambda p, x: jax.jit(gated)(level, p, x), params, x),
            "plain scan": slopes(in_scan(None), stacked, x),
            "scan": slopes(in_scan(levels), stacked, x),
            "vmap of gates": jax.vmap(lambda gate: slopes(lambda p, x: gated(gate, p, x), params, x))(jnp.arange(3)),
            "vmap of params": jax.vmap(lambda p: slopes(lambda p, x: gated(level, p, x), p, x))(stacked),
            "plain vmap": jax.vmap(lambda p: slopes(layer, p, x))(stacked),
            "vmap of both": jax.vmap(lambda gate, p: slopes(lambda p, x: gated(gate, p, x), p, x))(levels, stacked),
            "vmap of what it closes over": jax.vmap(
                lambda scale: slopes(lambda p, x: oxs.gated(lambda p, x: layer(p, x) * scale)(level, p, x), params, x)
            )(jnp.arange(1.0, 3.0)),
            "nested": [slopes(lambda b, x, i=i: outer(level, b, x, jnp.asarray(i)), both, x) for i in range(3)],
            "twice": jax.grad(
                lambda p: sum(
                    jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(lambda p: jnp.sum(gated(level, p, x) ** 2))(p))
                )
            )(params),
            "plain twice": jax.grad(
                lambda p: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(lambda p: jnp.sum(layer(p, x) ** 2))(p)))
            )(params),
        }

    for level in range(3):
        found = run(jnp.asarray(level), levels)
        wanted = tuple(
            tree if level < 1 + place else jax.tree.map(jnp.zeros_like, tree)
            for place, tree in enumerate(found["plain"])
        )
        for name in ("remat", "gated remat", "in jit"):
            assert_close(found[name], wanted)
        for place in range(3):
            assert_close(
                jax.tree.map(lambda leaf, at=place: leaf[at], found["vmap of gates"]),
                tuple(
                    tree if place < 1 + at else jax.tree.map(jnp.zeros_like, tree)
                    for at, tree in enumerate(found["plain"])
                ),
            )
        of_params, of_x = found["vmap of params"]
        assert_close(of_params, found["plain vmap"][0] if level < 1 else jax.tree.map(jnp.zeros_like, of_params))
        assert_close(of_x, found["plain vmap"][1] if level < 2 else jnp.zeros_like(of_x))
        assert np.any(found["vmap of what it closes over"][0]["kernel"]) == (level < 1)
        for inner, (of_both, of_x) in enumerate(found["nested"]):
            assert np.any(of_both["out"]["kernel"]) == (level < 1)
            assert np.any(of_both["in"]["kernel"]) == (level < 1 and inner < 1)
            assert np.any(of_x) == (level < 2 and inner < 2)
        assert_close(found["twice"], found["plain twice"] if level == 0 else jax.tree.map(jnp.zeros_like, params))
    # A level by layer: only the third learns, and what is before the first has no gradient.
    of_params, of_x = found["scan"]
    assert [bool(np.any(kernel)) for kernel in of_params["kernel"]] == [False, False, True, False]
    assert_close(of_params["kernel"][2], found["plain scan"][0]["kernel"][2])
    assert not np.any(of_x) and np.any(found["plain scan"][1])
    assert [bool(np.any(kernel)) for kernel in found["vmap of both"][0]["kernel"]] == [False, False, True, False]


def test_forward_mode_is_refused() -> None:
    params, x = layer_params(), inputs()
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(lambda p: oxs.gated(layer)(jnp.asarray(0), p, x), (params,), (params,))


@pytest.mark.slow
def test_where_64_bits_are_on() -> None:
    with jax.enable_x64(True):
        params, x = layer_params(dtype=jnp.float64), inputs(jnp.float64)
        program = jax.jit(lambda level: pull(functools.partial(oxs.gated(layer), level), params, x))
        plain = jax.jit(lambda: pull(layer, params, x))()
        for level in range(3):
            assert_gated(program(jnp.asarray(level)), plain, level)
        levels = oxs.gates({"a": jnp.asarray(True), "b": jnp.asarray(False)}, {"a": 0, "b": 1})
        assert {leaf.dtype for leaf in jax.tree.leaves(levels)} == {jnp.dtype("int32")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["auto", "explicit", "shard_map"])
def test_on_a_mesh(kind: str) -> None:
    if jax.device_count() < 2:
        pytest.skip("one device")
    axis = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(axis,))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    params, x = layer_params(), inputs()[:4]

    def slopes(level: jax.Array, params: PyTree, x: jax.Array) -> Any:
        return pull(functools.partial(oxs.gated(layer), level), params, x)[1]

    fn = slopes
    if kind == "shard_map":
        fn = jax.shard_map(slopes, mesh=mesh, in_specs=(everywhere, everywhere, rows), out_specs=(everywhere, rows))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, everywhere)), jax.device_put(x, NamedSharding(mesh, rows))
        found = [jax.jit(fn, compiler_options=QUICK)(jnp.asarray(level), *placed) for level in range(3)]
    for level, (of_params, of_x) in enumerate(found):
        plain_params, plain_x = pull(layer, params, x)[1]
        assert_close(of_params, plain_params if level < 1 else jax.tree.map(jnp.zeros_like, params))
        assert_close(of_x, plain_x if level < 2 else jnp.zeros_like(x))


# The levels of a tree.


def test_levels_by_depth() -> None:
    flags = {"a": True, "b": True, "c": False, "d": True}
    depths = {"a": 0, "b": 1, "c": 2, "d": 3}
    assert oxs.gates(flags) == {"a": 1, "b": 1, "c": 0, "d": 1}
    assert oxs.gates(flags, depths) == {"a": 2, "b": 2, "c": 0, "d": 1}
    assert oxs.gates(flags, lambda params: depths) == oxs.gates(flags, depths)
    assert oxs.gates(dict.fromkeys("abcd", True), depths) == dict.fromkeys("abcd", 2)
    # Two leaves of one depth: both must be frozen. The order is that of the depths, and gaps are none.
    assert oxs.gates(flags, {"a": 0, "b": 9, "c": 9, "d": 3}) == {"a": 2, "b": 1, "c": 0, "d": 2}
    # A prefix, and flags by element.
    nested = {"x": {"kernel": np.bool_(True), "bias": True}, "y": {"kernel": jnp.array([True, False]), "bias": True}}
    found = oxs.gates(nested, {"x": 0, "y": 1})
    assert found["x"] == {"kernel": 2, "bias": 2}
    assert (int(found["y"]["kernel"]), int(found["y"]["bias"])) == (0, 1)
    assert oxs.gates({}, {}) == {}
    for bad, message in (
        ({"a": 0, "b": 1}, "depths does not have the structure"),
        ({"a": 0, "b": 1, "c": 2, "d": -1}, "depths must be >= 0"),
        ({"a": 0, "b": 1, "c": 2, "d": 0.5}, "depths must be ints"),
    ):
        with pytest.raises(ValueError, match=message):
            oxs.gates(flags, bad)


def test_levels_of_flags_that_are_data() -> None:
    depths = {"a": 0, "b": 1, "c": 2}

    @jax.jit
    def levels(first: jax.Array, last: jax.Array) -> PyTree:
        # "b" is known: what is below it and beside it may not be.
        found = [oxs.gates({"a": first, "b": known, "c": last}, depths) for known in (True, False)]
        assert isinstance(found[1]["b"], int) and found[1]["c"].dtype == jnp.int32
        return found

    for first in (False, True):
        for last in (False, True):
            found = jax.tree.map(int, levels(jnp.asarray(first), jnp.asarray(last)))
            for known, tree in zip((True, False), found, strict=True):
                assert tree == oxs.gates({"a": first, "b": known, "c": last}, depths)
    assert oxs.observed({"a": 2, "b": np.int32(1), "c": 0}) == {"a": False, "b": False, "c": True}
    assert oxs.observed({"a": jnp.asarray(1)})["a"].dtype == jnp.bool_


@pytest.mark.slow
def test_levels_of_a_state() -> None:
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(model, nnx.Param)
    tx = oxs.freeze_on_small_gradients(optax.sgd(0.1), 1e-3, min_steps=0, patience=1, probe_every=2)
    depths = oxs.layer_depths(params)
    sizes = jax.tree.map(lambda depth: 0.0 if depth == 0 else 1.0, depths)
    grads = jax.tree.map(lambda size, p: jnp.full_like(p, size), sizes, params)
    update = jax.jit(lambda state, observed: tx.update(grads, state, params, observed=observed)[1])
    state = update(tx.init(params), jax.tree.map(lambda _: jnp.asarray(True), sizes))
    found = oxs.gates(state, depths)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert [int(level) for level in jax.tree.leaves(found)] == [2, 2, 0, 0]
    assert [int(level) for level in jax.tree.leaves(oxs.gates(state))] == [1, 1, 0, 0]
    assert [bool(flag) for flag in jax.tree.leaves(oxs.observed(found))] == [False, False, True, True]
    # A layer reads its part of the tree.
    x = jnp.ones((1, 2))
    part, kernels = found["layers"][0], params["layers"][0]
    run = oxs.gated(lambda params, x: x @ params["kernel"] + params["bias"])
    slopes = jax.grad(lambda p: run(part, p, x).sum())(kernels)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(slopes))
    # A step without a look, and the next one probes: all gates are open, while the leaves are frozen.
    state = update(state, oxs.observed(found))
    assert not any(int(level) for level in jax.tree.leaves(oxs.gates(state, depths)))
    assert [bool(gate) for gate in jax.tree.leaves(oxs.frozen(state))] == [True, True, False, False]
    del graph


# The whole loop.

LAYERS, WIDTH = 6, 8


def net() -> tuple[PyTree, PyTree]:
    params = {f"layer_{index}": layer_params(WIDTH, seed=index) for index in range(LAYERS)}
    params = jax.tree.map(lambda p: p / np.sqrt(WIDTH), params)
    return params, {name: index for index, name in enumerate(params)}


def loss_of(params: PyTree, gates: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    for name, of_layer in params.items():
        x = oxs.gated(layer)(gates[name], of_layer, x)
    return jnp.mean((x - y) ** 2)


def batch(step: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(step)
    x = rng.normal(size=(16, WIDTH))
    return jnp.asarray(x, jnp.float32), jnp.asarray(np.tanh(x[:, ::-1]), jnp.float32)


@pytest.mark.slow
def test_a_frontier_that_moves_traces_nothing_again() -> None:
    params, depths = net()
    tx = oxs.freeze_on_small_gradients(oxs.per_leaf(optax.adamw(1e-2)), groups=depths, alarm=None)
    traces = []

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params: PyTree, state: Any, x: jax.Array, y: jax.Array) -> Any:
        traces.append(None)
        gates = oxs.gates(state, depths)
        grads = jax.grad(loss_of)(params, gates, x, y)
        updates, state = tx.update(grads, state, params, observed=oxs.observed(gates))
        return optax.apply_updates(params, updates), state, grads

    state = tx.init(params)
    for index in range(20):
        frontier = index % (LAYERS + 1)
        below = {name: depth < frontier for name, depth in depths.items()}
        frozen = {name: jax.tree.map(lambda _, flag=below[name]: jnp.asarray(flag), params[name]) for name in params}
        old, (params, state, grads) = params, step(params, state._replace(frozen=frozen), *batch(0))
        for name, depth in depths.items():
            moved = [
                np.any(new != before) for new, before in zip(params[name].values(), old[name].values(), strict=True)
            ]
            assert all(np.any(grad) == (depth >= frontier) for grad in grads[name].values())
            assert all(flag == (depth >= frontier) for flag in moved)
    assert len(traces) == 1


@pytest.mark.slow
def test_the_loop_that_skips_is_the_loop_that_computes_everything() -> None:
    params, depths = net()
    tx = oxs.freeze_on_small_gradients(
        oxs.per_leaf(optax.adamw(3e-3)), 0.012, groups=depths, min_steps=20, patience=3, probe_every=25
    )

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params: PyTree, state: Any, gates: PyTree, x: jax.Array, y: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(params, gates, x, y)
        updates, state = tx.update(grads, state, params, value=loss, observed=oxs.observed(gates))
        return optax.apply_updates(params, updates), state, grads

    skipping = everything = params
    state, other = tx.init(params), tx.init(params)
    frozen_steps = skipped = 0
    for index in range(150):
        x, y = batch(index)
        gates = oxs.gates(state, depths)
        before = [bool(gate) for gate in jax.tree.leaves(oxs.frozen(state))]
        skipping, state, grads = step(skipping, state, gates, x, y)
        for grad, level in zip(jax.tree.leaves(grads), jax.tree.leaves(gates), strict=True):
            assert np.any(grad) == (int(level) == 0), "skipped is exactly 0, and the rest is there"
        skipped += sum(int(level) > 0 for level in jax.tree.leaves(gates))
        everything, other, _ = step(everything, other, jax.tree.map(jnp.zeros_like, gates), x, y)
        gates_now = [[bool(gate) for gate in jax.tree.leaves(oxs.frozen(of))] for of in (state, other)]
        if any(was and not now for now in gates_now for was, now in zip(before, now, strict=True)):
            break  # the first thaw
        if gates_now[0] != gates_now[1]:
            break  # who sees more freezes something earlier or later
        frozen_steps += any(gates_now[0])
        assert_equal(skipping, everything)
    assert frozen_steps > 20 and skipped > 100, "a run that tells nothing"
