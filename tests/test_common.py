"""The properties that every public transformation has: each test runs on every row of ``tests/rows.py``.

Most of the time goes into compiling, so a test puts what it compares into one program where it can.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import inspect
import numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    PyTree,
    Row,
    Trained,
    assert_close,
    assert_equal,
    base_optimizer,
    inner_optimizers,
    labelled,
    labels,
    make_grads,
    make_params,
    multi_steps,
    take,
    train,
)
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rows import BY_NAME, ROWS

import optax_structure as oxs


def rows(having: Callable[[Row], Any], scope: Any = "function") -> pytest.MarkDecorator:
    chosen = [row for row in ROWS if having(row)]
    marked = [pytest.param(row, marks=pytest.mark.slow) if row.slow else row for row in chosen]
    return pytest.mark.parametrize("row", marked, ids=lambda row: row.name, scope=scope)


# Of this scope, pytest takes the tests of one row together: what they compile once, one process compiles.
every_row = rows(lambda row: True, scope="module")

# Where only the result counts, a program is compiled quickly rather than well.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def run(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)`` in one program."""
    return jax.jit(fn, compiler_options=QUICK)(*args)


@functools.cache
def base_run(name: str) -> Trained:
    """Three steps of a row with momentum."""
    params = make_params()
    row = BY_NAME[name]
    tx = row.around(base_optimizer(), params)
    return run(lambda p, g: train(tx, p, g, **row.extra(p)), params, make_grads(params))


def assert_finite(tree: PyTree) -> None:
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree))


@every_row
def test_takes_unknown_extra_arguments(row: Row) -> None:
    params = make_params()
    tx, extra, unknown = row.alone(params), row.extra(params), jnp.ones(3)
    state = tx.init(params)
    known = jax.make_jaxpr(lambda grads: tx.update(grads, state, params, **extra))(params)
    more = jax.make_jaxpr(lambda grads: tx.update(grads, state, params, unheard_of=unknown, **extra))(params)
    assert str(known) == str(more)


@every_row
def test_asks_for_the_extra_arguments_that_it_needs(row: Row) -> None:
    params = make_params()
    tx, extra = row.alone(params), row.extra(params)
    state = tx.init(params)
    for name in row.needs:
        given = {key: value for key, value in extra.items() if key != name}
        with pytest.raises(ValueError, match=rf"{name}=.*tx\.update\(grads, state, params, .*{name}=\.\.\.\)"):
            tx.update(params, state, params, **given)
    # What it does not need may be absent.
    jax.eval_shape(lambda: tx.update(params, state, params, **{name: extra[name] for name in row.needs}))


@rows(lambda row: row.bad)
def test_names_bad_arguments(row: Row) -> None:
    params = make_params()
    for bad, message in row.bad:
        with pytest.raises(ValueError, match=message):
            row.around(optax.sgd(0.1), params, lambda p, bad=bad: row.arguments(p) | dict(bad)).init(params)


@every_row
def test_second_update_does_not_retrace_and_the_state_may_be_donated(row: Row) -> None:
    params = make_params()
    tx = row.around(base_optimizer(), params)
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=QUICK)
    def step(params: PyTree, state: Any, grads: PyTree, extra: dict[str, Any]) -> Any:
        traces.append(None)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state, extra, grads = tx.init(params), row.extra(make_params()), make_params()
    for _ in range(3):
        params, state = step(params, state, grads, extra)
    assert len(traces) == 1


@every_row
def test_state_keeps_structure_shapes_and_dtypes(row: Row) -> None:
    params = make_params()
    for tx in (row.alone(params), row.around(base_optimizer(), params)):
        state = tx.init(params)
        _, after = jax.eval_shape(lambda s, tx=tx: tx.update(params, s, params, **row.extra(params)), state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        for before, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
            assert (jnp.shape(before), before.dtype) == (leaf.shape, leaf.dtype)
            assert jax.typeof(before).weak_type == leaf.weak_type


@every_row
def test_state_keeps_its_dtypes_where_64_bits_are_on(row: Row) -> None:
    params = make_params()
    with jax.enable_x64(True):
        tx = row.alone(params)
        state = tx.init(params)
        _, after = jax.eval_shape(lambda state: tx.update(params, state, params, **row.extra(params)), state)
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, state)
        assert jax.tree.map(lambda leaf: leaf.dtype, after) == dtypes
        assert not {jnp.dtype("float64"), jnp.dtype("int64")} & set(jax.tree.leaves(dtypes))


@every_row
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_keeps_the_dtype_of_updates(row: Row, dtype: Any) -> None:
    params = make_params(dtype)
    tx = row.alone(params)
    updates, state = jax.eval_shape(lambda: tx.update(params, tx.init(params), params, **row.extra(params)))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    if not row.wraps:  # a wrapper holds moments, and the inner optimizer chooses their dtype
        assert jnp.bfloat16 not in {leaf.dtype for leaf in jax.tree.leaves(state)}, "statistics are float32"


@rows(lambda row: not row.hides)
def test_map_params(row: Row) -> None:
    params = make_params()
    for tx in (row.alone(params), row.around(base_optimizer(), params)):
        state = tx.init(params)
        seen: collections.Counter[Any] = collections.Counter()

        def visit(leaf: Any, param: jax.Array, seen: collections.Counter[Any] = seen) -> Any:
            assert leaf.shape in (param.shape, ()), f"{leaf.shape} follows a parameter of shape {param.shape}"
            seen[param.shape] += 1
            return leaf

        assert_equal(optax.tree.map_params(tx, visit, state, params), state)
        # Whatever follows the parameters follows all of them.
        assert not seen or (len(seen) == len(jax.tree.leaves(params)) and len(set(seen.values())) == 1)


def program(tx: optax.GradientTransformation, params: PyTree, grads: PyTree, extra: dict[str, Any]) -> str:
    """The program of three steps as a function of the gradients' leaves."""
    leaves, treedef = jax.tree.flatten(grads)

    def updates(leaves: list[jax.Array]) -> list[jax.Array]:
        return jax.tree.leaves(train(tx, params, jax.tree.unflatten(treedef, leaves), **extra).updates)

    return str(jax.make_jaxpr(updates)(leaves))


@every_row
def test_inside_chains(row: Row) -> None:
    params, extra, grads = make_params(), row.extra(make_params()), make_grads(make_params())
    tx = row.around(base_optimizer(), params)
    expected = program(tx, params, grads, extra)
    assert program(optax.chain(optax.identity(), optax.chain(tx)), params, grads, extra) == expected
    assert program(optax.named_chain(("none", optax.identity()), ("row", tx)), params, grads, extra) == expected


@functools.cache
def wrapped_runs(name: str) -> dict[str, Trained]:
    """The row alone, and inside the wrappers of optax that hand it other trees or skip steps: one program."""
    row, params = BY_NAME[name], make_params()
    tx, extra, grads = row.alone(params), row.extra(params), make_grads(params)
    twice = jax.tree.map(lambda g: jnp.repeat(g, 2, axis=0), grads)
    # A NaN and an infinite gradient between the first and the second.
    poisoned = jax.tree.map(lambda g: g[jnp.array([0, 0, 0, 1, 2])].at[1].set(jnp.nan).at[2].set(jnp.inf), grads)
    wrapped = {
        "alone": (tx, grads),
        "partition": (optax.partition({"scaffold": tx, "new": tx, "unused": tx}, labels), grads),
        "masked": (optax.masked(tx, NEW(params)), grads),
        "multi_steps": (multi_steps(tx), twice),
        "apply_if_finite": (optax.apply_if_finite(tx, 3), poisoned),
    }
    return run(lambda p: {name: train(t, p, g, **extra) for name, (t, g) in wrapped.items()}, params)


NEW = labelled("new")


@every_row
def test_inside_partition_masked_and_multi_steps(row: Row) -> None:
    runs = {name: trained.updates for name, trained in wrapped_runs(row.name).items()}
    assert_finite(runs)
    assert_close(take(runs["multi_steps"], slice(1, None, 2)), runs["alone"])
    assert not any(np.any(leaf[::2]) for leaf in jax.tree.leaves(runs["multi_steps"]))
    if not row.across_leaves:
        assert_close(runs["partition"], runs["alone"])
        grads = make_grads(make_params())
        inside = jax.tree.map(lambda new, mine, grad: mine if new else grad, NEW(grads), runs["alone"], grads)
        assert_close(runs["masked"], inside)


@every_row
def test_apply_if_finite_keeps_the_state_clean(row: Row) -> None:
    runs = wrapped_runs(row.name)
    updates, state, _ = runs["apply_if_finite"]
    assert int(state.total_notfinite) == 2
    assert_close(state.inner_state, runs["alone"].state)
    assert_close(take(updates, np.array([0, 3, 4])), runs["alone"].updates)
    assert not any(np.any(leaf[1:3]) for leaf in jax.tree.leaves(updates))


@pytest.mark.slow
@every_row
def test_members_and_wrappers_of_inject_hyperparams(row: Row) -> None:
    params, extra, grads = make_params(), row.extra(make_params()), make_grads(make_params())
    given = row.arguments(params)
    numeric = {name for name, value in given.items() if isinstance(value, numbers.Number)}
    static = set(inspect.signature(row.factory).parameters) - numeric
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(row.factory).parameters.values()):
        made = optax.inject_hyperparams(lambda: row.factory(**given))()
    elif row.wraps:
        made = optax.inject_hyperparams(row.factory, static_args=static)(base_optimizer(), **given)
    else:
        made = optax.inject_hyperparams(row.factory, static_args=static)(**given)
    assert set(made.init(params).hyperparams) >= numeric
    around = made if row.wraps else optax.chain(*((made, base_optimizer()) if row.first else (base_optimizer(), made)))
    outer = optax.inject_hyperparams(lambda learning_rate: row.around(base_optimizer(learning_rate), params))(0.1)
    wrapped = {"factory": around, "outer": outer}
    results = run(lambda p: {name: train(tx, p, grads, **extra).updates for name, tx in wrapped.items()}, params)
    for result in results.values():
        assert_close(result, base_run(row.name).updates)


def around_inner(row: Row, inner: str, params: PyTree, grads: PyTree) -> Trained:
    tx = row.around(inner_optimizers()[inner], params)
    return train(tx, params, grads, **{"value": jnp.asarray(1.0)} | row.extra(params))


@every_row
@pytest.mark.parametrize("inner", inner_optimizers())
def test_fits_around_inner_optimizers(row: Row, inner: str) -> None:
    params = make_params()
    trained = jax.eval_shape(functools.partial(around_inner, row, inner), params, make_grads(params))
    assert jax.tree.structure(trained.updates) == jax.tree.structure(params)


# The product is traced above; every eighth pair runs, so that each row and each optimizer does.
EVERY_EIGHTH = [
    pytest.param(row, inner, id=f"{row.name}-{inner}")
    for i, row in enumerate(ROWS)
    for j, inner in enumerate(inner_optimizers())
    if (i + j) % 8 == 0
]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "inner"), EVERY_EIGHTH)
def test_runs_around_inner_optimizers(row: Row, inner: str) -> None:
    params = make_params()
    assert_finite(run(functools.partial(around_inner, row, inner), params, make_grads(params)))


@every_row
def test_empty_group(row: Row) -> None:
    tx = row.alone({})
    updates, _ = tx.update({}, tx.init({}), {}, **row.extra({}))
    assert updates == {}
    # The transformation was made for all leaves, and the group that it stands in has none of them.
    params = make_params()
    for empty in ({}, jax.tree.map(lambda _: optax.MaskedNode(), params)):
        tx = row.around(base_optimizer(), params)
        updates, _ = tx.update(empty, tx.init(empty), empty, **row.extra(params))
        assert updates == empty


@functools.cache
def without_the_row(wraps: bool) -> PyTree:
    params = make_params()
    return jax.jit(functools.partial(train, plain_optimizer(wraps)))(params, make_grads(params)).updates


def plain_optimizer(wraps: bool) -> optax.GradientTransformation:
    # A wrapper changes what XLA fuses into Adam's bias correction, which costs the last bit (see test_per_leaf.py).
    return base_optimizer() if wraps else optax.adam(0.1)


@rows(lambda row: row.neutral)
def test_neutral_arguments_change_nothing(row: Row) -> None:
    params = make_params()
    tx = row.around(plain_optimizer(row.wraps), params, row.neutral)
    extra = (row.neutral_extra or row.extra)(params)
    trained = jax.jit(functools.partial(train, tx, **extra))(params, make_grads(params))
    assert_equal(trained.updates, without_the_row(row.wraps))


@rows(lambda row: row.frozen)
def test_frozen_entries_do_not_move(row: Row) -> None:
    params, extra = make_params(), row.extra(make_params())
    where = jax.tree.map(lambda flag, p: jnp.broadcast_to(flag, p.shape), row.frozen_where(params), params)
    # A frozen entry may have any gradient, NaN included; frozen or not, it has weight decay and momentum.
    hostile = jax.tree.map(
        lambda g, flag: g.at[1].set(jnp.where(flag, jnp.nan, g[1])) if not row.across_leaves else g,
        make_grads(params),
        where,
    )
    inners = {
        "adamw": optax.adamw(0.1, weight_decay=0.5),
        "momentum": optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1, momentum=0.9)),
    }
    made = {name: row.around(inner, params, row.frozen) for name, inner in inners.items()}
    results = run(lambda p: {name: train(tx, p, hostile, **extra).updates for name, tx in made.items()}, params)
    for updates in results.values():
        for update, flag in zip(jax.tree.leaves(updates), jax.tree.leaves(where), strict=True):
            assert not np.any(np.asarray(update)[:, flag]), "a frozen entry moved"
    assert any(np.any(flag) for flag in jax.tree.leaves(where))


@pytest.mark.slow
@every_row
def test_jit_agrees_with_eager(row: Row) -> None:
    params, extra, grads = make_params(), row.extra(make_params()), make_grads(make_params())
    tx = row.alone(params)
    state = tx.init(params)
    for step in range(2):
        updates, state = tx.update(take(grads, step), state, params, **extra)
        params = optax.apply_updates(params, updates)
        assert_close(updates, take(wrapped_runs(row.name)["alone"].updates, step))


@pytest.mark.slow
@every_row
def test_vmap_agrees_with_one_run(row: Row) -> None:
    params, extra = make_params(), row.extra(make_params())
    members = [make_grads(params), make_grads(params, seed=7)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    together = run(jax.vmap(lambda g: train(row.alone(params), params, g, **extra).updates), stacked)
    assert_close(take(together, 0), wrapped_runs(row.name)["alone"].updates)
    assert_finite(together)


@pytest.mark.slow
@every_row
def test_mesh_agrees_with_one_device(row: Row) -> None:
    if jax.device_count() < 2:
        pytest.skip("one device")
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    spread = NamedSharding(mesh, PartitionSpec("model"))
    params, extra = make_params(), row.extra(make_params())
    tx = row.alone(params)
    grads = [jax.device_put(take(make_grads(params), step), spread) for step in range(2)]
    params = jax.device_put(params, spread)
    state = jax.jit(tx.init)(params)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(params: PyTree, state: Any, grads: PyTree) -> Any:
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state, updates

    for index, grad in enumerate(grads):
        params, state, updates = step(params, state, grad)
        assert_close(updates, take(wrapped_runs(row.name)["alone"].updates, index))


@pytest.mark.slow
def test_checkpoint_round_trip(tmp_path: Path) -> None:
    """The states of all rows, written by Orbax and read back, in one checkpoint: it takes long."""
    ocp = pytest.importorskip("orbax.checkpoint")
    written = {row.name: base_run(row.name).state for row in ROWS}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", written)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "states", jax.tree.map(jnp.zeros_like, written))
    for name, state in written.items():
        assert_equal(restored[name], state)


@every_row
def test_transfer_without_a_change_is_the_identity(row: Row) -> None:
    params = make_params()
    tx = row.around(base_optimizer(), params)
    state = base_run(row.name).state
    assert_equal(oxs.transfer_state(tx, state, params, tx, params), state)


@every_row
def test_lowers_for_cpu_cuda_and_tpu(row: Row) -> None:
    params, extra = make_params(), row.extra(make_params())
    tx = row.around(base_optimizer(), params)
    state = tx.init(params)
    step = jax.jit(lambda grads, state, params: tx.update(grads, state, params, **extra))
    exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(params, state, params)
    assert exported.platforms == ("cpu", "cuda", "tpu")


class Network(nnx.Module):
    def __init__(self) -> None:
        self.hidden = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(6, 2, rngs=nnx.Rngs(0))


try:
    import equinox

    class Layer(equinox.Module):
        bias: Any
        kernel: Any
        name: str = equinox.field(static=True)

except ImportError:  # the bare environment: a dataclass that is a pytree, which a module of Equinox is

    @functools.partial(jax.tree_util.register_dataclass, data_fields=["bias", "kernel"], meta_fields=["name"])
    @dataclasses.dataclass
    class Layer:
        bias: Any
        kernel: Any
        name: str


def other_forms(tree: PyTree) -> dict[str, PyTree]:
    """The tree of ``make_params`` as other libraries hold it, the leaves in the same order."""
    leaves, _ = jax.tree.flatten(tree)
    layers = [tree["head"], tree["hidden"]]
    state = nnx.state(Network(), nnx.Param)
    return {
        "nnx": jax.tree.unflatten(jax.tree.structure(state), leaves),
        "linen": {"params": tree},
        "list": [[layer["bias"], layer["kernel"]] for layer in layers],
        "tuple": tuple(leaves),
        "equinox": {"layers": [Layer(layer["bias"], layer["kernel"], "dense") for layer in layers]},
    }


@every_row
def test_any_form_of_params(row: Row) -> None:
    def program_on(params: PyTree, grads: PyTree) -> str:
        return program(row.around(base_optimizer(), params), params, grads, row.extra(params))

    params, grads = make_params(), make_grads(make_params())
    expected, forms = program_on(params, grads), other_forms(grads)
    for form, other in other_forms(params).items():
        assert program_on(other, forms[form]) == expected, f"params as {form} make another program"
