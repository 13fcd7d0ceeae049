"""What ``observe`` hands to the rules inside, against a running mean of the squared gradients in NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    PyTree,
    assert_close,
    labels,
    make_grads,
    make_params,
    masks,
    multi_steps,
    take,
    train,
)
from flax import nnx

import optax_structure as oxs
from optax_structure._tree import align, leaves_by_path

PARAMS = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
STEPS = 4


def reveal(name: str) -> optax.GradientTransformationExtraArgs:
    """The update is the extra argument of that name, or -1 where it is not passed."""

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del params
        if extra_args.get(name) is None:
            return jax.tree.map(lambda u: jnp.full_like(u, -1.0), updates), state
        values = align(extra_args[name], updates, name)
        return jax.tree.map(lambda u, value: jnp.broadcast_to(value, u.shape), updates, values), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def revealed(name: str, *members: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(optax.chain(*members, reveal(name)))


def seen(tx: optax.GradientTransformation, params: PyTree, grads: PyTree) -> PyTree:
    return jax.jit(lambda p, g: train(tx, p, g).updates)(params, grads)


def running_mean(grads: Any, decays: list[float]) -> np.ndarray:
    """The weighted mean of the squared gradients so far, after every step."""
    total, weight, means = 0.0, 0.0, []
    for grad, decay in zip(np.asarray(grads, np.float64), decays, strict=True):
        total = decay * total + (1 - decay) * grad**2
        weight = decay * weight + (1 - decay)
        means.append(total / weight)
    return np.stack(means)


def test_three_steps_by_hand() -> None:
    # b2 = 3/4: 1/4 of each square. nu = 1, then 3/4 + 1, then 21/16; weights 1/4, 7/16, 37/64.
    tx = oxs.observe(revealed("second_moment", optax.scale_by_adam(b2=0.75)))
    updates = seen(tx, jnp.zeros((1, 1)), jnp.array([2.0, 2.0, 0.0]).reshape(3, 1, 1))
    np.testing.assert_allclose(updates.ravel(), [4.0, 4.0, (21 / 16) / (37 / 64)], rtol=1e-6)


KEEPERS = {
    "adam": lambda after: optax.chain(optax.scale_by_adam(), after),
    "amsgrad": lambda after: optax.chain(optax.scale_by_amsgrad(), after),
    "rmsprop": lambda after: optax.chain(optax.scale_by_rms(decay=0.999), after),
    "named_chain": lambda after: optax.named_chain(("moments", optax.scale_by_adam()), ("after", after)),
    "per_leaf": lambda after: optax.chain(oxs.per_leaf(optax.scale_by_adam()), after),
    "inside_per_leaf": lambda after: oxs.per_leaf(optax.chain(optax.scale_by_adam(), after)),
    "injected": lambda after: optax.chain(optax.inject_hyperparams(optax.adam)(0.1, b2=0.999), after),
    "partition": lambda after: optax.chain(
        optax.partition({"new": optax.adam(0.1), "scaffold": optax.rmsprop(0.1, decay=0.999)}, labels), after
    ),
    "inside_partition": lambda after: optax.partition(
        {"new": optax.chain(optax.adam(0.1), after), "scaffold": optax.chain(optax.adam(0.1), after)}, labels
    ),
    "finite": lambda after: optax.apply_if_finite(optax.chain(optax.scale_by_adam(), after), 3),
    "freeze_labels": lambda after: optax.chain(oxs.freeze_labels(optax.adam(0.1), (), labels), after),
}


@pytest.mark.parametrize("name", KEEPERS)
def test_second_moments_of_any_optimizer_that_keeps_them(name: str) -> None:
    grads = make_grads(PARAMS, STEPS)
    tx = oxs.observe(KEEPERS[name](reveal("second_moment")))
    expected = jax.tree.map(lambda g: running_mean(g, [0.999] * STEPS), grads)
    assert_close(seen(tx, PARAMS, grads), expected, rtol=1e-4)  # 1 - 0.999 in float32


def test_a_decay_that_changes() -> None:
    decays = [0.5, 0.25, 0.75, 0.9]
    schedule = lambda count: jnp.asarray(decays)[count]  # noqa: E731
    tx = oxs.observe(revealed("second_moment", optax.inject_hyperparams(optax.scale_by_adam)(b2=schedule)))
    grads = make_grads(PARAMS, STEPS)
    expected = jax.tree.map(lambda g: running_mean(g, decays), grads)
    assert_close(seen(tx, PARAMS, grads), expected, rtol=1e-5)


def test_steps_that_move_no_moment_move_no_weight() -> None:
    grads = make_grads(PARAMS, 6)
    pairs = jax.tree.map(lambda g: g.reshape(3, 2, *g.shape[1:]).mean(1), grads)
    state = jax.jit(lambda g: train(oxs.observe(multi_steps(optax.adam(0.1, b2=0.5))), PARAMS, g).state)(grads)
    np.testing.assert_allclose(state.weight["kernel"], 1 - 0.5**3, rtol=1e-6)
    found = jax.tree.map(lambda nu, w: nu / w, state.inner_state.inner_opt_state[0].nu, state.weight)
    assert_close(found, jax.tree.map(lambda g: running_mean(g, [0.5] * 3)[-1], pairs), rtol=1e-5)

    poisoned = jax.tree.map(lambda g: g.at[1].set(jnp.nan), take(grads, slice(0, 3)))
    tx = oxs.observe(optax.apply_if_finite(optax.adam(0.1, b2=0.5), 3))
    weight = jax.jit(lambda g: train(tx, PARAMS, g).state.weight)(poisoned)
    np.testing.assert_allclose(weight["bias"], 0.75)


def test_where_there_are_no_moments() -> None:
    grads = make_grads(PARAMS, STEPS)
    for inner in (optax.sgd(0.1), optax.lion(0.1), optax.adagrad(0.1), optax.novograd(0.1)):
        updates = seen(oxs.observe(revealed("second_moment", inner)), PARAMS, take(grads, slice(0, 1)))
        assert all((leaf == -1.0).all() for leaf in jax.tree.leaves(updates))
    mixed = optax.partition({"new": optax.adam(0.1), "scaffold": optax.sgd(0.1)}, labels)  # bias, kernel
    updates = seen(oxs.observe(revealed("second_moment", mixed)), PARAMS, grads)
    assert_close(updates["bias"], running_mean(grads["bias"], [0.999] * STEPS), rtol=1e-4)
    np.testing.assert_array_equal(updates["kernel"], 0.0)


def test_a_rule_that_reads_moments_names_optimizers_that_have_them() -> None:
    tx = oxs.observe(optax.chain(optax.sgd(0.1), oxs.scale_by_connection(oxs.gradient_rule())))
    with pytest.raises(ValueError, match=r"gradient_rule.*adam, adamw, lamb, rmsprop.*second_moment=\.\.\."):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_raw_gradients_before_any_clipping() -> None:
    grads = jax.tree.map(lambda p: jnp.full((1, *p.shape), 100.0), PARAMS)
    updates = seen(oxs.observe(revealed("grads", optax.clip_by_global_norm(1.0), optax.adam(0.1))), PARAMS, grads)
    np.testing.assert_array_equal(updates["kernel"], 100.0)


@pytest.mark.parametrize("name", ["grads", "second_moment"])
def test_sparse_masks_what_it_is_handed(name: str) -> None:
    params = make_params()
    grads = make_grads(params, 2)
    members = (optax.scale_by_adam(), oxs.scale_by_connection(), reveal(name))
    outside = oxs.observe(oxs.sparse(optax.chain(*members), masks))
    inside = oxs.sparse(oxs.observe(optax.chain(*members)), masks)
    shown, same = jax.jit(lambda p, g: tuple(train(tx, p, g).updates for tx in (outside, inside)))(params, grads)
    assert_close(shown, same)
    kernel, mask = shown["hidden"]["kernel"][-1], masks(params)["hidden"]["kernel"]
    np.testing.assert_array_equal(kernel != 0, mask)
    if name == "grads":
        np.testing.assert_array_equal(kernel, np.where(mask, grads["hidden"]["kernel"][-1], 0.0))


def _forms() -> dict[str, PyTree]:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    return {
        "list": [jnp.ones((2, 3)), [jnp.ones(3)]],
        "nnx": nnx.state(model, nnx.Param),
        "leaf": jnp.ones((2, 3)),
    }


@pytest.mark.parametrize("form", ["list", "nnx", "leaf"])
def test_forms_of_params(form: str) -> None:
    params = _forms()[form]
    grads = jax.tree.map(lambda p: jnp.full((2, *p.shape), 3.0), params)
    tx = oxs.observe(revealed("second_moment", oxs.per_leaf(optax.scale_by_adam())))
    for leaf in jax.tree.leaves(seen(tx, params, grads)):
        np.testing.assert_allclose(leaf, 9.0, rtol=1e-4)


def test_labels_may_be_a_prefix() -> None:
    params = {"body": PARAMS, "top": {"head": jnp.ones((3, 2))}}
    prefix = {"body": "first", "top": "second"}
    full = {"body": {"kernel": "first", "bias": "first"}, "top": {"head": "second"}}
    other = {"body": "first", "top": {"head": "second"}}
    inner = {"first": optax.adam(0.1), "second": optax.rmsprop(0.1, decay=0.999)}
    made = {
        "outside": [optax.chain(optax.partition(inner, of), reveal("second_moment")) for of in (prefix, full, other)],
        "inside": [
            optax.partition(
                {name: oxs.observe(optax.chain(tx, reveal("second_moment"))) for name, tx in inner.items()}, of
            )
            for of in (prefix, full)
        ],
        "frozen": [optax.chain(oxs.freeze_labels(inner["first"], (), prefix), reveal("second_moment"))],
    }
    grads = make_grads(params, STEPS)
    expected = jax.tree.map(lambda g: running_mean(g, [0.999] * STEPS), grads)
    txs = [*map(oxs.observe, made["outside"]), *made["inside"], *map(oxs.observe, made["frozen"])]
    for updates in jax.jit(lambda p, g: [train(tx, p, g).updates for tx in txs])(params, grads):
        assert_close(updates, expected, rtol=1e-4)
    only = oxs.observe(optax.chain(oxs.freeze_labels(inner["first"], "second", prefix), reveal("second_moment")))
    updates = seen(only, params, grads)
    assert_close(updates["body"], expected["body"], rtol=1e-4)
    np.testing.assert_array_equal(updates["top"]["head"], 0.0)


def test_a_part_of_params_is_observed() -> None:
    adam = optax.chain(optax.scale_by_adam(), reveal("second_moment"))
    tx = optax.partition({"new": oxs.observe(adam), "scaffold": optax.set_to_zero()}, labels)
    grads = make_grads(PARAMS, STEPS)
    updates = seen(tx, PARAMS, grads)
    assert_close(updates["bias"], running_mean(grads["bias"], [0.999] * STEPS), rtol=1e-4)


def test_a_leaf_that_is_added_starts_with_weight_zero() -> None:
    tx = oxs.observe(oxs.per_leaf(optax.scale_by_adam(b2=0.5)))
    state = train(tx, PARAMS, make_grads(PARAMS, 2)).state
    state = oxs.transfer_state(tx, state, PARAMS, tx, PARAMS | {"head": jnp.ones(2)})
    assert jax.tree.map(float, state.weight) == {"bias": 0.75, "head": 0.0, "kernel": 0.75}


def test_rates_hears_of_a_rule_once() -> None:
    tx = oxs.observe(optax.chain(optax.scale_by_adam(), oxs.scale_by_label({"a": 0.5}, lambda p: "a"), optax.scale(-1)))
    rates = oxs.rates(tx, tx.init(PARAMS), PARAMS)
    assert {path: float(rate) for path, rate in leaves_by_path(rates).items()} == {"bias": 0.5, "kernel": 0.5}


@pytest.mark.parametrize("wrapper", ["multi_steps", "apply_if_finite"])
def test_branches_with_multipliers_may_be_observed(wrapper: str) -> None:
    # Behind a branch, tracing for the moments alone would note factors of a program that is over.
    by_label = oxs.scale_by_label({"a": 0.5}, lambda p: "a")
    inner = optax.chain(optax.scale_by_adam(), by_label, oxs.scale_by_label({"a": 0.25}, lambda p: "a"))
    tx = oxs.observe(multi_steps(inner) if wrapper == "multi_steps" else optax.apply_if_finite(inner, 3))
    updates = seen(tx, PARAMS, jax.tree.map(lambda p: jnp.ones((2, *p.shape)), PARAMS))
    np.testing.assert_allclose(updates["kernel"][-1], 0.125, rtol=1e-4)  # Adam makes 1 of a gradient of ones
    if wrapper == "apply_if_finite":
        rates = oxs.rates(tx, tx.init(PARAMS), PARAMS)
        assert {path: float(rate) for path, rate in leaves_by_path(rates).items()} == {"bias": 0.125, "kernel": 0.125}


def test_nothing_of_the_size_of_the_parameters_is_added() -> None:
    params = {"kernel": jax.ShapeDtypeStruct((512, 512), jnp.float32)}

    def temporary(tx: optax.GradientTransformationExtraArgs) -> int:
        def step(params: PyTree, state: Any, grads: PyTree) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        jitted = jax.jit(step, donate_argnums=(0, 1))
        analysis = jitted.lower(params, jax.eval_shape(tx.init, params), params).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    rules = (oxs.age_rule(lambda age: 1.0 / (1.0 + age)), oxs.strength_rule(), oxs.gradient_rule())
    inner = optax.chain(optax.scale_by_adam(), oxs.scale_by_connection(*rules), optax.scale(-1e-3))
    assert temporary(oxs.observe(inner)) < 4096
