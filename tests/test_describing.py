"""``describe`` and ``rates``: what stands in a transformation, and what it multiplies by."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    Row,
    labels,
    make_params,
    masks,
    multi_steps,
)
from rows import ROWS

import optax_structure as oxs
from optax_structure._tree import leaves_by_path


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_transformation_describes_itself(row: Row) -> None:
    params = make_params()
    tx = row.alone(params)
    text, with_bytes = oxs.describe(tx), oxs.describe(tx, params)
    # What is a name for another transformation with arguments is described as that.
    name = {"scale_by_connection_age": "scale_by_connection", "connection": "scale_by_connection"}.get(
        row.factory.__name__
    )
    public = row.name.startswith("presets.") or getattr(oxs, row.factory.__name__, None) is row.factory
    assert (name or (row.name if "." in row.name else row.factory.__name__)) in text or not public
    lines = with_bytes.splitlines()[: 1 if row.hides else None]  # members that see some leaves are said by the leaf
    costs = [line.rpartition(": ")[2].removesuffix(" B") for line in lines if line.endswith(" B")]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(tx.init(params)))
    assert sum(int(cost.replace(",", "")) for cost in costs) == held, "all lines together have the bytes of the state"


def test_describe_lists_the_rules_in_order() -> None:
    params = make_params()
    tx = oxs.sparse(
        optax.chain(
            optax.clip_by_global_norm(1.0),
            oxs.per_leaf(optax.scale_by_adam(b1=0.8)),
            oxs.scale_by_product(oxs.scale_by_label({"scaffold": 0.1, "new": 1.0}, labels), oxs.scale_by_age(jnp.cos)),
            optax.scale_by_learning_rate(1e-3),
        ),
        masks(params),
    )
    lines = oxs.describe(tx).splitlines()
    names = ["sparse", "optax.clip_by_global_norm", "per_leaf", "optax.scale_by_adam", "scale_by_product"]
    names += ["scale_by_label", "scale_by_age", "optax.scale"]
    assert [line.split("(")[0].split(":")[0].strip() for line in lines] == names
    assert [len(line) - len(line.lstrip()) for line in lines] == [0, 2, 2, 4, 2, 4, 4, 2]
    assert "b1=0.8" in lines[3] and lines[3].endswith("8 B a parameter")
    assert "scaffold=0.1, new=1.0" in lines[5] and "step_size=-0.001" in lines[7]


def test_describe_opens_the_combinators_of_optax() -> None:
    by_age = oxs.scale_by_age(lambda age: 0.5)
    tx = optax.multi_transform({"scaffold": optax.set_to_zero(), "new": optax.masked(by_age, labels)}, labels)
    text = oxs.describe(optax.chain(optax.apply_if_finite(tx, 3), optax.scale(-1.0)))
    for name in ("optax.apply_if_finite", "optax.partition", "scaffold:", "optax.set_to_zero", "new:", "scale_by_age"):
        assert name in text
    assert "optax.MultiSteps" in oxs.describe(multi_steps(by_age))  # its method hides what is inside, so it is named


WARM = optax.linear_schedule(0.25, 1.0, 3)


def wrappings(tx: optax.GradientTransformation) -> dict[str, optax.GradientTransformation]:
    adam = optax.scale_by_adam()
    return {
        "chain": optax.chain(adam, tx, optax.scale(-1e-3)),
        "before": optax.chain(tx, optax.sgd(0.1)),
        "named": optax.named_chain(("adam", adam), ("rate", tx)),
        "partition": optax.partition({"scaffold": tx, "new": optax.chain(adam, tx)}, labels),
        "masked": optax.masked(tx, lambda params: jax.tree.map(lambda _: True, params)),
        "sparse": oxs.sparse(optax.chain(adam, tx), masks),
        "multi_steps": multi_steps(optax.chain(adam, tx)),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "inject_hyperparams": optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(-rate)))(0.1),
        "observe": oxs.observe(optax.chain(adam, tx)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("wrapping", wrappings(optax.identity()))
def test_rates_are_found_in_any_wrapping(wrapping: str) -> None:
    params = make_params()
    tx = wrappings(oxs.scale_by_label({"scaffold": 0.5, "new": WARM}, labels(params)))[wrapping]
    state = tx.init(params)
    for expected in (0.25, 0.5):  # the warm-up at its own counts 0 and 1
        found = oxs.rates(tx, state, params, grads=params)
        for path, label in leaves_by_path(labels(params)).items():
            assert float(leaves_by_path(found)[path]) == (expected if label == "new" else 0.5)
        if wrapping == "multi_steps":
            break
        _, state = optax.with_extra_args_support(tx).update(params, state, params)


def test_rates_inside_per_leaf_have_the_paths_of_their_leaves() -> None:
    params = make_params()
    tx = oxs.per_leaf(optax.chain(optax.scale_by_adam(), oxs.scale_by_age(WARM)))
    assert {float(rate) for rate in jax.tree.leaves(oxs.rates(tx, tx.init(params), params))} == {0.25}


def test_rates_multiply_and_differ_by_connection() -> None:
    params = make_params()
    tx = oxs.sparse(
        optax.chain(oxs.scale_by_age(lambda age: 0.5), oxs.scale_by_connection(oxs.component_rule(scaffold=0.2))), masks
    )
    found, mask = oxs.rates(tx, tx.init(params), params), masks(params)
    np.testing.assert_allclose(found["hidden"]["kernel"], np.where(mask["hidden"]["kernel"], 0.1, 0.0), rtol=1e-6)
    assert float(found["hidden"]["bias"]) == pytest.approx(0.1)
    spread = oxs.rates_by_label(found, "all", params)["all"]
    assert [float(value) for value in spread] == pytest.approx([0.1, 0.1, 0.1])  # absent connections do not count


def test_rates_compile_once_and_agree() -> None:
    params = make_params()
    tx = optax.chain(optax.scale_by_adam(), oxs.scale_by_age(lambda age: 0.5**age), optax.scale(-1e-3))
    state, traces = tx.init(params), []

    @jax.jit
    def step(state: Any) -> Any:
        traces.append(None)
        _, after = tx.update(params, state, params)
        return oxs.rates(tx, state, params), after

    for expected in (1.0, 0.5, 0.25):
        found, state = step(state)
        assert {float(rate) for rate in jax.tree.leaves(found)} == {expected}
    assert len(traces) == 1


def test_rates_leave_no_trace() -> None:
    """Nothing is recorded outside of ``rates``, and the state is not moved."""
    params = make_params()
    tx = oxs.scale_by_age(functools.partial(jnp.power, 0.5))
    state = tx.init(params)
    oxs.rates(tx, state, params)
    assert int(state.count) == 0
