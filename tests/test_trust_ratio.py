"""The trust ratio: norms over living connections, against values by hand, NumPy and Optax."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PyTree, assert_close, make_grads, make_params, masks, train

import optax_structure as oxs


def ratio(weights: Any, update: Any, mask: Any = None, **arguments: Any) -> float:
    """What the update is multiplied by, read at its last entry."""
    tx, params = oxs.scale_by_masked_trust_ratio(**arguments), jnp.asarray(weights, jnp.float32)
    extra = {} if mask is None else {"masks": jnp.asarray(mask)}
    update = jnp.asarray(update, jnp.float32)
    scaled, _ = tx.update(update, tx.init(params), params, **extra)
    return float(scaled[-1] / update[-1])


@pytest.mark.parametrize(
    ("weights", "update", "arguments", "expected"),
    [
        # |w| = 5 and |u| = 10: 1e-3 * 5 / (10 + 1e-8), whatever the direction.
        ([3.0, 4.0], [6.0, 8.0], {}, 0.0005),
        ([3.0, 4.0], [8.0, -6.0], {"trust_coefficient": 1.0, "eps": 0.0}, 0.5),
        # eps counts beside the norm of the update: 5 / (10 + 2.5).
        ([3.0, 4.0], [6.0, 8.0], {"trust_coefficient": 1.0, "eps": 2.5}, 0.4),
        # 5 / 0.1 = 50, and its cap; below the cap nothing changes.
        ([3.0, 4.0], [0.06, 0.08], {"trust_coefficient": 1.0, "eps": 0.0}, 50.0),
        ([3.0, 4.0], [0.06, 0.08], {"trust_coefficient": 1.0, "eps": 0.0, "max_ratio": 10.0}, 10.0),
        ([3.0, 4.0], [6.0, 8.0], {"trust_coefficient": 1.0, "eps": 0.0, "max_ratio": 10.0}, 0.5),
        # Weights of 0: 1, so that they move; and still under the cap.
        ([0.0, 0.0], [6.0, 8.0], {}, 1.0),
        ([0.0, 0.0], [6.0, 8.0], {"max_ratio": 0.25}, 0.25),
    ],
)
def test_ratio_by_hand(weights: Any, update: Any, arguments: dict[str, Any], expected: float) -> None:
    np.testing.assert_allclose(ratio(weights, update, **arguments), expected, rtol=1e-6)


def test_an_update_of_zero_stays_zero() -> None:
    tx = oxs.scale_by_masked_trust_ratio(eps=0.0)
    updates, _ = tx.update(jnp.zeros(2), tx.init(jnp.ones(2)), jnp.ones(2))
    assert updates.tolist() == [0.0, 0.0]


def test_what_is_not_finite() -> None:
    tx = oxs.scale_by_masked_trust_ratio()
    infinite, poisoned = (
        tx.update(jnp.array([1.0, bad]), tx.init(jnp.ones(2)), jnp.ones(2))[0].tolist() for bad in (np.inf, np.nan)
    )
    assert infinite == [0.0, 0.0]
    assert poisoned[0] == 1.0 and np.isnan(poisoned[1])


def test_norms_are_over_living_connections() -> None:
    # Living: w = (3, 4), u = (6, 8). The dead entries would make |w| = 13 and |u| = 26.
    weights, update, mask = [12.0, 3.0, 4.0], [24.0, 6.0, 8.0], [False, True, True]
    arguments = {"trust_coefficient": 1.0, "eps": 0.0}
    np.testing.assert_allclose(ratio(weights, [24.0, 3.0, 4.0], mask, **arguments), 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio(weights, update, mask, **arguments), 0.5, rtol=1e-6)
    np.testing.assert_allclose(ratio([0.0, 3.0, 4.0], update, None, **arguments), 5 / 26, rtol=1e-6)
    # All weights that exist are 0, or no connection exists.
    np.testing.assert_allclose(ratio([12.0, 0.0, 0.0], update, mask, **arguments), 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio(weights, update, [False] * 3, **arguments), 1.0, rtol=1e-6)
    # A leaf that is not sparse.
    np.testing.assert_allclose(ratio(weights, update, True, **arguments), 0.5, rtol=1e-6)


def test_lars_of_the_raw_gradient_against_numpy() -> None:
    params, grads = make_params(), make_grads(make_params(), steps=3)
    lars = optax.chain(oxs.scale_by_masked_trust_ratio(), optax.sgd(0.5, momentum=0.9))
    tx = oxs.sparse(lars, masks(params))
    updates = jax.jit(functools.partial(train, tx))(params, grads).updates

    def by_numpy(weights: Any, gradients: Any, mask: Any) -> np.ndarray:
        weights, trace, made = np.array(weights, np.float64), 0.0, []
        for gradient in np.asarray(gradients, np.float64) * np.asarray(mask):
            trace = 0.9 * trace + gradient * (1e-3 * np.linalg.norm(weights) / (np.linalg.norm(gradient) + 1e-8))
            made.append(-0.5 * trace)
            weights = weights + made[-1]
        return np.stack(made)

    assert_close(updates, jax.tree.map(by_numpy, params, grads, masks(params)), rtol=1e-5)


def test_after_adam_it_is_lamb() -> None:
    params, grads = make_params(), make_grads(make_params(), steps=3)
    ours = oxs.scale_by_masked_trust_ratio(trust_coefficient=1.0, eps=0.0)

    def lamb(ratio: optax.GradientTransformation) -> PyTree:
        decayed = optax.chain(optax.scale_by_adam(eps=1e-6), optax.add_decayed_weights(0.1))
        return train(optax.chain(decayed, ratio, optax.scale(-0.1)), params, grads).updates

    mine, expected = jax.jit(lambda: (lamb(ours), lamb(optax.scale_by_trust_ratio())))()
    assert_close(mine, expected)


def test_norms_are_float32() -> None:
    # In bfloat16 a sum of 4096 ones stops at 256; the norms are 64 and 32.
    params, update = jnp.ones(4096, jnp.bfloat16), jnp.full(4096, 0.5, jnp.bfloat16)
    tx = oxs.scale_by_masked_trust_ratio(trust_coefficient=1.0, eps=0.0)
    scaled, _ = tx.update(update, tx.init(params), params)
    assert scaled.dtype == jnp.bfloat16 and float(scaled[0]) == 1.0


def test_leaves_that_start_at_zero_are_kept_out_by_masked() -> None:
    params = {"kernel": jnp.full((1, 1), 2.0), "bias": jnp.zeros(1)}
    kernels = optax.masked(
        oxs.scale_by_masked_trust_ratio(trust_coefficient=1.0, eps=0.0),
        lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
    updates, _ = kernels.update(jax.tree.map(lambda p: p + 4.0, params), kernels.init(params), params)
    assert float(updates["kernel"][0, 0]) == 2.0 and float(updates["bias"][0]) == 4.0


def test_params_are_asked_for() -> None:
    tx = oxs.scale_by_masked_trust_ratio()
    with pytest.raises(ValueError, match=r"needs params: call tx\.update\(grads, state, params\)"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_in_a_product_it_reads_the_update_as_it_comes_in() -> None:
    halved = oxs.scale_by_depth_profile(lambda x: 0.5, 0)
    tx = oxs.scale_by_product(halved, oxs.scale_by_masked_trust_ratio(trust_coefficient=1.0, eps=0.0))
    params = jnp.array([3.0, 4.0])
    updates, _ = tx.update(jnp.array([6.0, 8.0]), tx.init(params), params)
    np.testing.assert_allclose(updates, [1.5, 2.0], rtol=1e-6)  # 0.5 (profile) * 0.5 (ratio)
