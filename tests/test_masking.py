"""Sparse training around any optimizer: by hand, and against NumPy."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PyTree, assert_close, assert_equal, full_masks, make_grads, make_params, masks, take, train

import optax_structure as oxs

MASK = jnp.array([[True, False], [False, True]])


def run(tx: optax.GradientTransformation, params: PyTree, grads: PyTree, **extra: Any) -> tuple[PyTree, Any]:
    """The parameters after all steps, and the state."""
    trained = jax.jit(functools.partial(train, tx, **extra))(params, grads)
    return trained.params, trained.state


# The two gates.


def test_mask_gradients_stops_everything_off_the_mask() -> None:
    tx, grads = oxs.mask_gradients(), {"k": jnp.array([[1.0, jnp.nan], [jnp.inf, 2.0]]), "b": jnp.array([3.0, jnp.nan])}
    out, _ = tx.update(grads, tx.init(grads), masks={"k": MASK, "b": jnp.asarray(True)})
    np.testing.assert_array_equal(out["k"], [[1.0, 0.0], [0.0, 2.0]])
    np.testing.assert_array_equal(out["b"], [3.0, np.nan])  # a leaf that is not sparse is not looked at


def test_keep_masked_passes_on_the_mask_and_ends_at_zero_off_it() -> None:
    tx, params = oxs.keep_masked(), {"k": jnp.array([[1.0, 0.3], [0.0, -2.0]])}
    out, _ = tx.update({"k": jnp.full((2, 2), 0.5)}, tx.init(params), params, masks={"k": MASK})
    np.testing.assert_array_equal(optax.apply_updates(params, out)["k"], [[1.5, 0.0], [0.0, -1.5]])


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
def test_keep_masked_does_not_read_updates_off_the_mask(poison: float) -> None:
    tx, params = oxs.keep_masked(), {"k": jnp.array([[1.0, 0.0], [0.0, -2.0]])}
    out, _ = tx.update({"k": jnp.where(MASK, 0.5, poison)}, tx.init(params), params, masks={"k": MASK})
    np.testing.assert_array_equal(out["k"], [[0.5, 0.0], [0.0, 0.5]])


def test_keep_masked_ends_at_exactly_zero_in_bfloat16() -> None:
    rng = np.random.default_rng(0)
    params = {"k": jnp.asarray(rng.normal(size=(16, 16)), jnp.bfloat16)}
    tx = oxs.keep_masked()
    out, _ = tx.update(params, tx.init(params), params, masks={"k": jnp.zeros((16, 16), bool)})
    assert not np.any(optax.apply_updates(params, out)["k"])


def test_keep_masked_reaches_zero_with_coarser_updates_than_parameters() -> None:
    # A bfloat16 update has 8 of the 24 bits of a float32 weight: three updates take them all.
    params = {"k": jnp.asarray(np.random.default_rng(0).normal(size=(16, 16)), jnp.float32)}
    tx = oxs.keep_masked()
    for _ in range(3):
        updates = jax.tree.map(lambda p: jnp.ones(p.shape, jnp.bfloat16), params)
        out, _ = tx.update(updates, tx.init(params), params, masks={"k": jnp.zeros((16, 16), bool)})
        assert out["k"].dtype == jnp.bfloat16
        params = optax.apply_updates(params, out)
    assert not np.any(params["k"])


def test_missing_params_are_asked_for() -> None:
    grads = {"k": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"keep_masked\(\) needs params: call tx\.update\(grads, state, params"):
        oxs.keep_masked().update(grads, optax.EmptyState(), masks={"k": MASK})
    tx = oxs.sparse(optax.sgd(0.1), {"k": MASK})
    with pytest.raises(ValueError, match=r"sparse\(\.\.\.\) needs params: call tx\.update\(grads, state, params\)"):
        tx.update(grads, tx.init(grads))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": MASK}, r"masks does not have the structure of params at 'the root'.*'b'"),
        ({"k": {"x": MASK}, "b": True}, r"masks has a container at 'k'"),
        ({"k": MASK[:1], "b": True}, r"masks: 'k' has shape \(1, 2\), its parameter has shape \(2, 2\)"),
        ({"k": MASK.astype(jnp.float32), "b": True}, r"masks: 'k' has dtype float32; masks are bool"),
        ({"k": MASK, "b": 1}, r"masks: 'b' has dtype int32; masks are bool"),
        ({"k": MASK, "b": False}, r"masks: 'b' is a scalar False"),
    ],
)
def test_wrong_masks_are_named(wrong: PyTree, message: str) -> None:
    params = {"k": jnp.ones((2, 2)), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=message):
        oxs.sparse(optax.sgd(0.1), wrong).init(params)
    with pytest.raises(ValueError, match=message):
        oxs.sparse(optax.sgd(0.1), lambda params: wrong).init(params)


def test_masks_of_another_structure_are_named_by_the_gates() -> None:
    params = {"k": jnp.ones((2, 2)), "b": jnp.ones(2)}
    for tx in (oxs.mask_gradients(), oxs.keep_masked(), oxs.scale_by_density(jnp.ones_like)):
        with pytest.raises(ValueError, match=r"masks does not have the structure of params"):
            tx.update(params, tx.init(params), params, masks={"k": MASK})


# sparse(inner, masks).


def test_sparse_momentum_with_weight_decay_against_numpy() -> None:
    params, decay, rate, momentum = make_params(), 0.3, 0.1, 0.9
    grads = make_grads(params, 6)
    inner = optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum=momentum))
    after, _ = run(oxs.sparse(inner, masks(params)), params, grads)

    def by_hand(param: np.ndarray, grad: np.ndarray, mask: np.ndarray) -> np.ndarray:
        trace = np.zeros_like(param)
        for step in range(6):
            trace = momentum * trace + np.where(mask, grad[step], 0) + decay * param
            param = np.where(mask, param - rate * trace, 0)
        return param

    arrays = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, grads))
    assert_close(after, jax.tree.map(by_hand, *arrays, jax.tree.map(np.asarray, masks(params))))


@pytest.mark.parametrize("inner", [optax.adamw(0.1, weight_decay=0.5), optax.lamb(0.1), optax.adafactor(0.1)])
def test_nothing_appears_off_the_mask(inner: optax.GradientTransformation) -> None:
    params = make_params()
    dense = jax.tree.map(jnp.ones_like, params)  # weights that should not be there go in the first step
    after, _ = run(oxs.sparse(inner, masks(params)), dense, make_grads(params, 20))
    for leaf, mask in zip(jax.tree.leaves(after), jax.tree.leaves(masks(params)), strict=True):
        assert not np.any(np.asarray(leaf)[~np.broadcast_to(mask, leaf.shape)])
        assert np.all(np.isfinite(leaf)) and np.any(leaf)


def test_inner_sees_living_gradients_only() -> None:
    params = {"k": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
    grads = {"k": jnp.array([[3.0, 100.0], [100.0, 4.0]])}
    tx = oxs.sparse(optax.clip_by_global_norm(1.0), {"k": MASK})
    out, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(out["k"], [[0.6, 0.0], [0.0, 0.8]], rtol=1e-6)  # the norm of (3, 4) is 5


def test_sparse_is_the_chain_of_its_three_parts() -> None:
    params, grads = make_params(), make_grads(make_params())
    chain = optax.chain(oxs.mask_gradients(), optax.adamw(0.1), oxs.keep_masked())
    expected, _ = run(chain, params, grads, masks=masks(params))
    after, _ = run(oxs.sparse(optax.adamw(0.1), masks), params, grads)
    assert_equal(after, expected)


def test_full_masks_train_as_the_inner_optimizer() -> None:
    params, grads = make_params(), make_grads(make_params(), 5)
    expected, _ = run(optax.adam(0.1), params, grads)
    after, _ = run(oxs.sparse(optax.adam(0.1), full_masks), params, grads)
    assert_close(after, expected)
    not_sparse, _ = run(oxs.sparse(optax.adam(0.1), True), params, grads)
    assert_equal(not_sparse, expected)  # scalar masks add nothing to the program


def test_masks_are_values_of_the_state() -> None:
    params, tx = {"k": jnp.eye(2)}, oxs.sparse(optax.sgd(1.0), {"k": MASK})
    traces = []

    @jax.jit
    def step(params: PyTree, state: Any) -> Any:
        traces.append(None)
        updates, state = tx.update({"k": jnp.ones((2, 2))}, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, tx.init(params))
    np.testing.assert_array_equal(params["k"], [[0.0, 0.0], [0.0, 0.0]])
    other = oxs.sparse(optax.sgd(1.0), {"k": ~MASK})
    state = oxs.transfer_state(tx, state, params, other, params)
    assert_equal(oxs.get_masks(state), {"k": ~MASK})
    params, _ = step(params, state)
    np.testing.assert_array_equal(params["k"], [[0.0, -1.0], [-1.0, 0.0]])
    assert len(traces) == 1


def test_state_owns_its_masks() -> None:
    given = {"k": jnp.array(MASK, copy=True)}
    params, tx = {"k": jnp.eye(2)}, oxs.sparse(optax.sgd(0.1), given)
    step = jax.jit(lambda state, params: tx.update(params, state, params), donate_argnums=0)
    for _ in range(2):
        step(tx.init(params), params)  # donates the state; the caller's masks live on
    np.testing.assert_array_equal(given["k"], MASK)
    from_numpy = oxs.sparse(optax.sgd(0.1), {"k": np.asarray(MASK)}).init(params)
    assert isinstance(oxs.get_masks(from_numpy)["k"], jax.Array)


def test_extra_arguments_reach_the_inner_optimizer() -> None:
    seen = {}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params, tx = {"k": jnp.eye(2)}, oxs.sparse(inner, {"k": MASK})
    tx.update(params, tx.init(params), params, value=2.0, masks={"k": ~MASK})
    assert seen["value"] == 2.0
    np.testing.assert_array_equal(seen["masks"]["k"], MASK)  # its own, not those of an enclosing sparse


def test_partition_of_sparse_groups() -> None:
    params = {"one": {"k": jnp.eye(2), "b": jnp.ones(2)}, "two": {"k": jnp.eye(2), "b": jnp.ones(2)}}
    mine = {"one": {"k": MASK, "b": jnp.asarray(True)}, "two": {"k": ~MASK, "b": jnp.asarray(True)}}
    groups = {"one": oxs.sparse(optax.sgd(0.1), mine), "two": oxs.sparse(optax.adam(0.1), mine)}
    tx = optax.partition(groups, {"one": "one", "two": "two"})
    after, state = run(tx, params, make_grads(params))
    assert_equal(oxs.get_masks(state), mine)
    for name in ("one", "two"):
        alone, _ = run(groups[name], params, make_grads(params))
        assert_close(after[name], alone[name])
        assert not np.any(np.asarray(after[name]["k"])[~np.asarray(mine[name]["k"])])


def test_sparse_around_a_partition() -> None:
    params = make_params()
    label = oxs.label_by_path([("^head/", "head")], default="body")
    inner = optax.partition({"head": optax.adam(0.1), "body": optax.set_to_zero()}, label)
    after, _ = run(oxs.sparse(inner, masks), params, make_grads(params))
    assert_equal(after["hidden"], params["hidden"])
    alone, _ = run(oxs.sparse(optax.adam(0.1), masks), params, make_grads(params))
    assert_close(after["head"], alone["head"])


def test_masks_cost_a_byte_a_weight() -> None:
    params = {"k": jnp.ones((4, 8)), "b": jnp.ones(8)}
    state = oxs.sparse(optax.sgd(0.1), full_masks).init(params)
    assert sorted(leaf.nbytes for leaf in jax.tree.leaves(state)) == [1, 32]


def test_nan_off_the_mask_reaches_no_moment() -> None:
    params = make_params()
    grads = jax.tree.map(lambda g, m: jnp.where(m, g, jnp.nan), take(make_grads(params), 0), masks(params))
    tx = oxs.sparse(optax.adam(0.1), masks)
    _, state = tx.update(grads, tx.init(params), params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
