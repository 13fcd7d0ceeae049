"""``presets.loss_aware``: steps that are none, what it shows, what it refuses, what carries over."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structure as oxs

PARAMS = {"a": jnp.linspace(0.5, 1.0, 3), "b": jnp.ones(2), "c": jnp.ones(())}
LABELS = {"a": "new", "b": "scaffold", "c": "scaffold"}
STEPS = 16
FORMS: dict[str, dict[str, Any]] = {
    "sgd, freezing": {"freeze_threshold": 1e-2},
    "sgd": {"freeze_threshold": None},
    "inner, freezing": {"inner": optax.scale_by_adam(), "freeze_threshold": 1e-2},
    "inner": {"inner": optax.scale_by_adam(), "freeze_threshold": None},
}


def made(form: str) -> Any:
    """With clocks that a step which is none may not move: a schedule, a warm-up, and Adam's count of all leaves."""
    rate = optax.linear_schedule(0.1, 0.0, 40)
    return oxs.presets.loss_aware(rate, LABELS, warmup=8.0, min_steps_before_freeze=3, total_steps=40, **FORMS[form])


def steps() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Gradients and losses; those of ``b`` are so small that it freezes at the tenth step."""
    rng = np.random.default_rng(0)
    size = {"a": 1.0, "b": 1e-4, "c": 1.0}
    grads = {name: size[name] * rng.normal(size=(STEPS, *p.shape)).astype(np.float32) for name, p in PARAMS.items()}
    return grads, (2.0 - 0.05 * np.arange(STEPS) + 0.1 * rng.normal(size=STEPS)).astype(np.float32)


@functools.cache
def runner(form: str) -> Any:
    tx = made(form)

    @jax.jit
    def run(grads: Any, losses: jax.Array, observed: Any) -> Any:
        def step(carry: Any, given: Any) -> Any:
            params, state = carry
            updates, state = tx.update(given[0], state, params, value=given[1], observed=given[2])
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), (grads, losses, observed))

    return run


def no_skips(state: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda p, leaf: leaf * 0 if "skipped" in str(p) else leaf, state)


BAD = {"loss": ("loss", math.nan), "a": ("a", math.nan), "b": ("b", math.inf), "c": ("c", -math.inf)}


@pytest.mark.slow
@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("form", FORMS)
def test_a_run_with_steps_that_are_not_finite_is_the_run_without_them(form: str, what: str) -> None:
    grads, losses = steps()
    seen = {name: np.ones(STEPS, bool) for name in PARAMS}
    (params, state), updates = runner(form)(grads, losses, seen)
    places = [4, 13]  # before anything is frozen, and after
    where, bad = BAD[what]
    more, mean = jax.tree.map(lambda leaf: np.insert(leaf, places, 1.0, axis=0), (grads, losses))
    flags = jax.tree.map(lambda leaf: np.insert(leaf, places, True), seen)
    added = [place + order for order, place in enumerate(places)]
    (mean if where == "loss" else more[where])[added] = bad
    (after, end), moved = runner(form)(more, mean, flags)
    for name, leaf in moved.items():
        assert not np.any(leaf[np.array(added)]), name
        np.testing.assert_allclose(np.delete(leaf, added, axis=0), updates[name], rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(after[name], params[name], rtol=1e-6)
    assert int(oxs.snapshot(end)["skipped"]) == 2 and int(oxs.snapshot(state)["skipped"]) == 0
    for one, other in zip(jax.tree.leaves(no_skips(end)), jax.tree.leaves(no_skips(state)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8)
    if "freezing" in form:
        assert jax.tree.map(bool, oxs.frozen(end)) == {"a": False, "b": True, "c": False}


@pytest.mark.slow
def test_what_was_not_observed_may_be_anything() -> None:
    grads, losses = steps()
    seen = {name: np.ones(STEPS, bool) for name in PARAMS} | {"b": np.arange(STEPS) % 2 == 0}
    grads["b"][1::2] = math.nan
    (_, state), updates = runner("sgd, freezing")(grads, losses, seen)
    assert int(oxs.snapshot(state)["skipped"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in updates.values()) and np.all(updates["a"][:, 0] != 0)


def test_an_inner_shows_the_rate_that_was_applied() -> None:
    tx = oxs.presets.loss_aware(
        lambda count: 0.5 / (1.0 + count), inner=optax.identity(), lr_rules={}, freeze_threshold=None
    )
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    for value, rate in ((1.0, 0.5), (math.nan, 0.5), (0.9, 0.25)):
        updates, state = update(PARAMS, state, PARAMS, value=value)
        assert float(oxs.snapshot(state)["lr"]) == pytest.approx(rate)
        moved = 0.0 if math.isnan(value) else -rate
        np.testing.assert_allclose(updates["b"], moved, rtol=1e-6)


REFUSED = (
    ({"freeze_threshold": -1.0}, r"freeze_threshold=-1\.0"),
    ({"freeze_threshold": "x"}, "freeze_threshold='x' must be a number"),
    ({"freeze_ema_beta": 1.0}, r"freeze_ema_beta=1\.0"),
    ({"min_steps_before_freeze": -1}, "min_steps_before_freeze=-1"),
    ({"max_share": 1.5}, r"max_share=1\.5"),
    ({"momentum": 7.0}, r"momentum=7\.0"),
    ({"momentum_rules": {"trend": 1.0}}, "'trend'; the rules are"),
    ({"learning_rate": -1.0}, r"learning_rate=-1\.0"),
)


@pytest.mark.parametrize(("bad", "message"), REFUSED)
def test_arguments_are_named_as_the_preset_has_them(bad: dict[str, Any], message: str) -> None:
    for inner in (None, optax.identity()):
        with pytest.raises(ValueError, match=rf"^{message}|^momentum_rules names the rule {message}"):
            oxs.presets.loss_aware(**{"learning_rate": 0.1} | bad, inner=inner)


def test_depths_and_losses_are_named_too() -> None:
    with pytest.raises(ValueError, match=r"^depths does not have the structure of params"):
        oxs.presets.loss_aware(0.1, depths={"a": 0}).init(PARAMS)
    tx = oxs.presets.loss_aware(0.1)
    with pytest.raises(ValueError, match=r"^presets\.loss_aware needs value="):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"value= must be a scalar, got shape \(2,\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=jnp.ones(2))


@pytest.mark.slow
@pytest.mark.parametrize("inner", [None, optax.scale_by_adam()])
@pytest.mark.parametrize("thresholds", [(1e-4, None), (None, 1e-4)])
def test_the_loop_goes_on_when_freezing_is_put_on_or_taken_off(thresholds: tuple[Any, Any], inner: Any) -> None:
    old, new = (oxs.presets.loss_aware(0.1, inner=inner, freeze_threshold=threshold) for threshold in thresholds)
    state, update = old.init(PARAMS), jax.jit(old.update)
    for value in (1.0, 0.5, 0.7, math.nan):
        _, state = update(PARAMS, state, PARAMS, value=value)
    after = oxs.transfer_state(old, state, PARAMS, new, PARAMS)
    before, now = oxs.snapshot(state), oxs.snapshot(after)
    both = before.keys() & now.keys()
    assert {"lr", "lr_scale", "loss_ema", "skipped", "w_lr/trend"} <= both
    assert {key: float(now[key]) for key in both} == {key: float(before[key]) for key in both}
    # The next step is that of a run in which nothing was put on or taken off, but for freezing, which is not due.
    expected, _ = update(PARAMS, state, PARAMS, value=0.6)
    updates, _ = jax.jit(new.update)(PARAMS, after, PARAMS, value=0.6)
    for one, other in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
