"""``snapshot``: every number by hand, wherever the states stand, and what donation leaves of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structure as oxs
from optax_structure.transforms.feedback._control import FeedbackState
from optax_structure.transforms.freezing.gradients import FreezeState
from optax_structure.transforms.monitoring import snapshot

PARAMS = {"body": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}, "head": jnp.ones(15)}  # 20 + 5 + 15


def feedback(**fields: Any) -> FeedbackState:
    """A state with these fields; its other numbers are 0."""
    fields = jax.tree.map(lambda v: jnp.asarray(v, jnp.int32 if isinstance(v, int) else jnp.float32), fields)
    empty = {name: {} for name in FeedbackState._fields if name.endswith(("_memory", "_weights"))}
    every = {name: jnp.zeros(()) for name in FeedbackState._fields} | empty
    every |= {"learning_rate": None, "momentum": None, "last": None}
    return FeedbackState(**every | fields)


def freezing(frozen: Any, inner_state: Any = ()) -> FreezeState:
    """A state with these gates."""
    every: dict[str, Any] = dict.fromkeys(FreezeState._fields, ())
    return FreezeState(**every | {"frozen": jax.tree.map(jnp.asarray, frozen), "inner_state": inner_state})


SGD = feedback(
    scale=0.5,
    learning_rate=0.05,
    momentum=0.9,
    fast=1.25,
    skipped=3,
    lr_weights={"lr_weights/trend": 0.75, "lr_weights/variance": 0.25},
    momentum_weights={"momentum_weights/inverse": 1.0},
)
OF_SGD = {
    "lr": 0.05, "lr_scale": 0.5, "momentum": 0.9, "loss_ema": 1.25, "skipped": 3,
    "w_lr/trend": 0.75, "w_lr/variance": 0.25, "w_momentum/inverse": 1.0,
}  # fmt: skip


def check(report: dict[str, jax.Array], expected: dict[str, float]) -> None:
    assert report.keys() == expected.keys()
    for name, value in report.items():
        assert (value.shape, value.dtype, value.weak_type) == ((), jnp.float32, False), name
        assert float(value) == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: (optax.EmptyState(), {"named": state}),
        lambda state: optax.MaskedState(state),
        lambda state: optax.transforms.PartitionState({"all": optax.MaskedState((state,))}),
        lambda state: optax.MultiSteps(optax.sgd(0.1), 2).init(PARAMS)._replace(inner_opt_state=state),
    ],
)
def test_one_feedback_needs_no_prefix(wrap: Any) -> None:
    check(snapshot(wrap(SGD)), OF_SGD)
    check(jax.jit(snapshot)(wrap(SGD)), OF_SGD)


def test_a_scale_knows_no_rate() -> None:
    check(snapshot(feedback(scale=2.0)), {"lr_scale": 2.0, "loss_ema": 0, "skipped": 0})


def test_several_feedbacks_are_told_apart() -> None:
    one, two = feedback(scale=1.0), feedback(scale=2.0)
    scales = {name: float(v) for name, v in snapshot((one, two)).items() if name.endswith("lr_scale")}
    assert scales == {"0/lr_scale": 1.0, "1/lr_scale": 2.0}
    groups = optax.transforms.PartitionState({"head": (two, SGD), "body": one})
    nested = optax.transforms.PartitionState({"outer": groups})
    report = snapshot((SGD, nested))
    lines = {name: float(v) for name, v in report.items() if name.endswith("lr_scale")}
    assert lines == {
        "lr_scale": 0.5,
        "outer/head/0/lr_scale": 2,
        "outer/head/1/lr_scale": 0.5,
        "outer/body/lr_scale": 1,
    }
    assert float(report["outer/head/1/w_lr/trend"]) == 0.75
    assert len(report) == 2 * len(OF_SGD) + 2 * 3


def test_names_that_meet_are_refused() -> None:
    # A label that is called like the number of another.
    clash = (feedback(), feedback(), optax.transforms.PartitionState({"0": feedback()}))
    with pytest.raises(ValueError, match="two values would be called '0/lr_scale': give the label '0/' another name"):
        snapshot(clash)


def test_values_by_label_begin_with_it() -> None:
    state = feedback(
        scale={"scale/body": 1.0, "scale/head": 2.0},
        fast={"fast/body": 3.0, "fast/head": 4.0},
        skipped={"skipped/body": 0, "skipped/head": 1},
        lr_weights={"lr_weights/trend/body": 0.5, "lr_weights/trend/head": 0.25},
    )
    expected = {f"{label}/{name}": value for label, (scale, fast, skipped, weight) in
                {"body": (1.0, 3.0, 0, 0.5), "head": (2.0, 4.0, 1, 0.25)}.items()
                for name, value in (("lr_scale", scale), ("loss_ema", fast), ("skipped", skipped),
                                    ("w_lr/trend", weight))}  # fmt: skip
    check(snapshot(state), expected)


def frozen_leaves(kernel: bool, bias: bool, head: bool) -> Any:
    return {"body": {"kernel": kernel, "bias": bias}, "head": head}


@pytest.mark.parametrize(
    ("flags", "by_parameter", "by_leaf"),
    [
        ((False, False, False), 0.0, 0.0),
        ((True, False, False), 20 / 40, 1 / 3),
        ((False, True, True), 20 / 40, 2 / 3),
        ((True, True, True), 1.0, 1.0),
    ],
)
def test_the_share_is_of_parameters(flags: tuple[bool, bool, bool], by_parameter: float, by_leaf: float) -> None:
    state = (freezing(frozen_leaves(*flags)), optax.EmptyState())
    check(snapshot(state, PARAMS), {"share_frozen": by_parameter, "pct_frozen": 100 * by_parameter})
    check(
        snapshot(state, jax.eval_shape(lambda: PARAMS)),
        {"share_frozen": by_parameter, "pct_frozen": 100 * by_parameter},
    )
    check(snapshot(state), {"share_frozen": by_leaf, "pct_frozen": 100 * by_leaf})


def test_the_share_of_elements_needs_no_params() -> None:
    flags = {"body": {"kernel": np.arange(20).reshape(4, 5) < 7, "bias": np.ones(5, bool)}, "head": np.zeros(15, bool)}
    for params in (None, PARAMS):
        assert float(snapshot(freezing(flags), params)["share_frozen"]) == pytest.approx(12 / 40)


def test_groups_add_up_and_what_is_frozen_twice_counts_once() -> None:
    hidden = optax.MaskedNode()
    body = freezing({"body": {"kernel": True, "bias": False}, "head": hidden})
    head = freezing({"body": hidden, "head": np.arange(15) < 5})  # a label for the whole branch
    groups = optax.transforms.PartitionState({"body": optax.MaskedState(body), "head": optax.MaskedState(head)})
    assert float(snapshot(groups, PARAMS)["share_frozen"]) == pytest.approx(25 / 40)
    again = freezing(frozen_leaves(True, True, False))
    assert float(snapshot((groups, again), PARAMS)["share_frozen"]) == pytest.approx(30 / 40)
    # What no freezing is applied to counts as not frozen, where it is known.
    assert float(snapshot(head, PARAMS)["share_frozen"]) == pytest.approx(5 / 40)
    assert float(snapshot(head)["share_frozen"]) == pytest.approx(5 / 15)


def test_the_share_of_a_large_network_stays_within_0_and_1() -> None:
    sizes = {"a": 2**31 + 1, "b": 3, "c": 2**26 + 1}
    params = {name: jax.ShapeDtypeStruct((size,), jnp.float32) for name, size in sizes.items()}
    assert float(snapshot(freezing(dict.fromkeys("abc", True)), params)["share_frozen"]) == 1.0
    share = snapshot(freezing({"a": True, "b": False, "c": False}), params)["share_frozen"]
    assert float(share) == pytest.approx((2**31 + 1) / sum(sizes.values()), rel=1e-6)


def test_nothing_to_share() -> None:
    check(snapshot(freezing({}), {}), {"share_frozen": 0.0, "pct_frozen": 0.0})
    empty = {"a": jnp.zeros((0, 3)), "b": jnp.zeros(2)}
    check(snapshot(freezing({"a": True, "b": False}), empty), {"share_frozen": 0.0, "pct_frozen": 0.0})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"body": PARAMS["body"]}, "they have no 'head'"),
        ({**PARAMS, "head": {"kernel": jnp.ones(15)}}, "they have no 'head'"),
        ({**PARAMS, "head": jnp.ones(14)}, r"they have 'head' of shape \(14,\), where a gate has \(15,\)"),
    ],
)
def test_params_of_another_structure_are_refused(params: Any, message: str) -> None:
    flags = {"body": {"kernel": True, "bias": True}, "head": np.ones(15, bool)}
    with pytest.raises(ValueError, match=f"params are not those of the state: {message}"):
        snapshot(freezing(flags), params)


class Part(NamedTuple):
    """Parameters whose fields are called as those of states are."""

    frozen: Any
    scale: Any
    lr_weights: Any


@pytest.mark.parametrize("state", [(), optax.adam(0.1).init(Part(jnp.ones(1), jnp.ones(1), jnp.ones(1)))])
def test_a_state_without_control_names_what_is_looked_for(state: Any) -> None:
    with pytest.raises(ValueError, match="feedback_sgd, feedback_adam, scale_by_feedback or freeze_on_small"):
        snapshot(state)


def test_it_outlives_the_state() -> None:
    state = jax.tree.map(jnp.copy, (SGD, freezing(frozen_leaves(True, False, False))))
    report = snapshot(state)
    step = jax.jit(lambda state: (state, snapshot(state, PARAMS)), donate_argnums=0)
    state, inside = step(state)
    step(state)
    assert state[0].scale.is_deleted()
    check({name: report[name] for name in OF_SGD}, OF_SGD)
    check({name: inside[name] for name in OF_SGD}, OF_SGD)


# Of the transformations themselves.


def run(tx: Any, scales: Any, params: Any = PARAMS) -> tuple[Any, dict[str, jax.Array]]:
    """The last state and the snapshots of a scan whose gradients are the parameters times these numbers."""

    def step(state: Any, scale: Any) -> Any:
        _, state = tx.update(jax.tree.map(lambda p: scale * p, params), state, params, value=scale)
        return state, snapshot(state, params)

    return jax.jit(lambda state: jax.lax.scan(step, state, jnp.asarray(scales)))(tx.init(params))


def test_freezing_is_followed_through_a_scan() -> None:
    frozen_body = oxs.freeze_on_small_gradients(optax.sgd(0.1), 1e-2, decay=0.0, min_steps=0, patience=2, alarm=None)
    tx = optax.partition({"body": frozen_body, "head": optax.adam(0.1)}, {"body": "body", "head": "head"})
    state, report = run(tx, [1.0, 1e-3, 1e-3, 1e-3, 1.0])
    # Frozen with the second small gradient, thawed by the large one.
    np.testing.assert_allclose(report["share_frozen"], [0, 0, 25 / 40, 25 / 40, 0], rtol=1e-6)
    np.testing.assert_allclose(report["pct_frozen"], 100 * report["share_frozen"], rtol=1e-6)
    check(snapshot(state, PARAMS), {"share_frozen": 0.0, "pct_frozen": 0.0})


@pytest.mark.skipif(not hasattr(oxs, "feedback_sgd"), reason="needs feedback_sgd")
def test_feedback_is_followed_through_a_scan() -> None:
    tx = oxs.freeze_on_small_gradients(oxs.feedback_sgd(0.1, momentum=0.9))
    state, report = run(tx, np.linspace(2.0, 1.0, 6, dtype=np.float32))
    np.testing.assert_allclose(report["lr"], 0.1 * report["lr_scale"], rtol=1e-6)
    np.testing.assert_allclose(
        sum(report[f"w_lr/{rule}"] for rule in ("trend", "variance", "grad_norm")), 1.0, rtol=1e-6
    )
    np.testing.assert_array_equal(report["share_frozen"], 0.0)
    assert report["momentum"].shape == (6,)
    assert {name: float(values[-1]) for name, values in report.items()} == jax.device_get(snapshot(state, PARAMS))


def test_the_state_of_an_nnx_optimizer_is_read_with_its_params() -> None:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    gates = optax.GradientTransformation(
        lambda params: (SGD, freezing(jax.tree.map(lambda leaf: leaf.ndim > 1, params))),
        lambda updates, state, params=None: (updates, state),
    )
    optimizer = nnx.Optimizer(model, gates, wrt=nnx.Param)
    expected = {**OF_SGD, "share_frozen": 6 / 8, "pct_frozen": 75.0}
    check(snapshot(optimizer.opt_state, nnx.state(model, nnx.Param)), expected)
