"""``training.fit``: against loops written out by hand, for every kind of model, and what it hands to ``tx.update``."""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_close, assert_equal
from flax import linen, nnx
from jax.sharding import Mesh

import optax_structure as oxs
from optax_structure import nn
from optax_structure._tree import PyTree
from optax_structure.training import FitNonFiniteLoss, fit, load_data
from optax_structure.training.fit_host import chunk_lengths

ROWS, INPUTS, CLASSES, BATCH = 50, 6, 3, 16
RNG = np.random.default_rng(0)
X = RNG.normal(size=(ROWS, INPUTS)).astype(np.float32)
Y = np.argmax(X @ RNG.normal(size=(INPUTS, CLASSES)), axis=-1).astype(np.int32)
TRAIN, HELD = (X, Y), (X[:21], Y[:21])
PARAMS = {"w": jnp.asarray(RNG.normal(size=(INPUTS, CLASSES)), jnp.float32), "b": jnp.zeros(CLASSES)}


def apply(params: PyTree, x: jax.Array) -> jax.Array:
    return x @ params["w"] + params["b"]


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)


def quick(model: Any = apply, tx: Any = None, **changes: Any) -> Any:
    options = {"params": PARAMS, "epochs": 2, "batch_size": BATCH} | changes
    return fit(model, options.pop("train", TRAIN), options.pop("validation", HELD), tx or optax.adam(0.1), **options)


class Seen(optax.GradientTransformationExtraArgs):
    """Plain SGD that keeps the extra arguments of the last updates in its state."""

    def __new__(cls, names: tuple[str, ...], steps: int = 6) -> Seen:
        def init(params: PyTree) -> Any:
            return jnp.zeros((), jnp.int32), {name: jnp.full(steps, -1.0) for name in names}

        def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> Any:
            count, kept = state
            assert set(extra) == set(names)
            totals = {name: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(extra[name])) for name in names}
            kept = {name: kept[name].at[count].set(totals[name]) for name in names}
            return jax.tree.map(lambda grad: -0.1 * grad, updates), (count + 1, kept)

        return super().__new__(cls, init, update)


@functools.cache
def plain() -> Any:
    """Two epochs of Adam."""
    return quick(restore_best=False)


def order(epoch: int) -> np.ndarray:
    """The rows of an epoch's three steps, ``(3, 16)``: two of the fifty are left out."""
    return np.random.default_rng((0, epoch)).permutation(ROWS)[: 3 * BATCH].reshape(3, BATCH)


# --- against a loop by hand -------------------------------------------------------------------------------------------


def test_fit_equals_a_loop_written_out() -> None:
    tx, params = optax.adam(0.1), PARAMS
    state = tx.init(params)
    step = jax.jit(jax.value_and_grad(lambda params, x, y: cross_entropy(apply(params, x), y).mean()))
    losses = np.zeros((2, 3))
    for epoch in range(2):
        for i, rows in enumerate(order(epoch)):
            losses[epoch, i], grads = step(params, X[rows], Y[rows])
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
    result = plain()
    assert_close(result.params, params, 1e-5)
    assert_close(result.opt_state, state, 1e-4)
    assert [epoch.step for epoch in result.history] == [3, 6] and not result.stopped
    np.testing.assert_allclose([epoch.train_loss for epoch in result.history], losses.mean(axis=1), rtol=1e-5)
    # Validation by hand, in numpy: batches of 16 and a last one of 5.
    logits = HELD[0] @ np.asarray(params["w"]) + np.asarray(params["b"])
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(21), HELD[1]]
    assert result.history[-1].val_loss == pytest.approx(nll.mean(), rel=1e-5)
    assert result.history[-1].val_accuracy == pytest.approx((logits.argmax(axis=1) == HELD[1]).mean(), rel=1e-6)
    assert result.model is None and result.rest == () and result.stats is None


def test_fit_leaves_what_it_was_given_alone() -> None:
    params = jax.tree.map(jnp.copy, PARAMS)
    # lookahead's state starts as params themselves: what is donated must not be the caller's, nor donated twice.
    ema = optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, state))
    quick(tx=optax.chain(ema, optax.sgd(0.1)), params=params)
    assert_equal(params, PARAMS)


def test_a_micro_batch_mean_is_the_batch_mean() -> None:
    whole = quick(tx=Seen(("value",)))
    parts = quick(tx=Seen(("value",)), accumulate=4)
    assert_close(parts.params, whole.params, 1e-5)
    assert_close(parts.opt_state, whole.opt_state, 1e-5)  # the mean loss too, not the last micro-batch's
    assert parts.history[-1].train_accuracy == pytest.approx(whole.history[-1].train_accuracy)


def test_a_scalar_loss_is_taken_as_the_mean() -> None:
    scalar = quick(loss=lambda logits, y: cross_entropy(logits, y).mean(), restore_best=False)
    assert_close(scalar.history, plain().history, 1e-5)


def test_a_mesh_gives_what_one_device_gives() -> None:
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    one, two = plain(), quick(accumulate=2, mesh=mesh, restore_best=False)
    assert_close(two.params, one.params, 1e-5)
    assert_close([epoch[:6] for epoch in two.history], [epoch[:6] for epoch in one.history], 1e-5)
    assert all(leaf.sharding.is_fully_replicated and len(leaf.devices()) == 2 for leaf in jax.tree.leaves(two.params))


def test_steps_compile_once() -> None:
    calls: list[tuple[int, ...]] = []
    counts: list[int] = []

    def loss(logits: jax.Array, y: jax.Array) -> jax.Array:
        calls.append(y.shape)
        return cross_entropy(logits, y)

    quick(loss=loss, epochs=3, steps_per_dispatch=1, callbacks=[lambda epoch, carry: counts.append(len(calls))])
    # One training program; validation traces its full batches and its last one.
    assert calls == [(16,), (16,), (5,)] and counts == [3, 3, 3]


def test_chunk_lengths_sum_up_in_few_sizes() -> None:
    for steps in range(1, 120):
        for most in (1, 2, 7, 32, 50):
            lengths = chunk_lengths(steps, most)
            assert sum(lengths) == steps and max(lengths) <= most and len(set(lengths)) <= 2


# --- what tx.update gets ----------------------------------------------------------------------------------------------


def test_update_gets_the_loss_and_nothing_else_by_default() -> None:
    result = quick(tx=Seen(("value",)))
    values = np.asarray(result.opt_state[1]["value"]).reshape(2, 3)
    np.testing.assert_allclose(values.mean(axis=1), [epoch.train_loss for epoch in result.history], rtol=1e-6)


@pytest.mark.parametrize("event", [{1, 5}, lambda step: step in (1, 5)], ids=["set", "function"])
def test_events_come_at_their_steps(event: Any) -> None:
    result = quick(tx=Seen(("value", "event")), event=event, restore_best=False)
    assert result.opt_state[1]["event"].tolist() == [0, 1, 0, 0, 0, 1]


def test_events_reach_what_multi_steps_wraps() -> None:
    labels, options = {"w": "scaffold", "b": "new"}, {"warmup": None, "backoff": None, "event": {"scaffold": 0.5}}
    preset = oxs.presets.conservative(0.1, labels, rates={"scaffold": 0.3}, **options)
    result = quick(tx=optax.MultiSteps(preset, 2), event={2, 3}, restore_best=False)
    found = oxs.rates(preset, result.opt_state.inner_opt_state, result.params)
    # Of two micro-steps the last one's event counts, and the first one's does not: 0.3 is halved once.
    assert [float(found[name]) for name in ("w", "b")] == pytest.approx([0.15, 1.0])


def test_masks_come_with_every_update() -> None:
    masks = {"w": jnp.eye(INPUTS, CLASSES, dtype=bool), "b": True}
    result = quick(tx=Seen(("value", "masks")), masks=masks, restore_best=False)
    assert result.opt_state[1]["masks"].tolist() == [4.0] * 6  # three on the diagonal and the bias's scalar


def test_extrema_come_from_the_running_statistics() -> None:
    def capture(params: PyTree, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        hidden = jnp.stack([x[:, 0] ** 2, jnp.zeros(len(x)), jnp.zeros(len(x))], axis=1)  # one alive, two dead
        return apply(params, x), {"hidden": hidden}

    result = quick(tx=Seen(("value", "extrema")), capture=capture, accumulate=2, restore_best=False)
    assert result.opt_state[1]["extrema"].tolist() == [2.0] * 6
    assert int(result.stats.count) == 12
    assert result.history[-1].train_loss == pytest.approx(quick(tx=optax.sgd(0.1)).history[-1].train_loss, rel=1e-5)


def test_learning_rates_are_recorded_where_they_are_injected() -> None:
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    result = quick(tx=optax.inject_hyperparams(optax.sgd)(learning_rate=schedule))
    # The rate of the last update of each epoch, number 2 and 5.
    assert [epoch.learning_rates["all"] for epoch in result.history] == pytest.approx([0.8, 0.5])
    assert plain().history[0].learning_rates == {}


# --- stopping, and the best epoch -------------------------------------------------------------------------------------


def test_patience_stops_and_the_best_epoch_comes_back_whole() -> None:
    kept: list[Any] = []
    wrong = (X[:21], (Y[:21] + 1) % CLASSES)  # the better the fit, the worse
    options: dict[str, Any] = {"validation": wrong, "monitor": "val_loss", "patience": 2, "epochs": 9}
    result = quick(callbacks=[lambda epoch, carry: kept.append(jax.tree.map(np.array, carry))], **options)
    assert [epoch.epoch for epoch in result.history] == [1, 2, 3] and result.best_epoch == 1 and result.stopped
    assert_equal(result.params, jax.tree.map(jnp.asarray, kept[0].params))
    assert_equal(result.opt_state, jax.tree.map(jnp.asarray, kept[0].opt_state))
    last = quick(restore_best=False, **options)
    assert_equal(last.params, jax.tree.map(jnp.asarray, kept[2].params))
    assert last.best_epoch == 1


def test_a_callback_that_returns_true_stops() -> None:
    result = quick(epochs=5, callbacks=[lambda epoch, carry: epoch.epoch == 2])
    assert len(result.history) == 2 and result.stopped


@pytest.mark.parametrize(
    ("answer", "epochs"), [(np.bool_(True), 1), (jnp.array(True), 1), (np.bool_(False), 2), (1, 2), ([0], 2)]
)
def test_a_callback_may_answer_with_any_bool(answer: Any, epochs: int) -> None:
    assert len(quick(callbacks=[lambda epoch, carry: answer]).history) == epochs


@pytest.mark.parametrize("monitor", ["val_accuracy", "val_loss"])
def test_a_monitor_that_is_not_finite_is_named_and_keeps_the_best(monitor: Any) -> None:
    def blind(params: PyTree, x: jax.Array) -> jax.Array:  # NaN for the rows marked by 9, once the bias has moved
        bad = (x[:, :1] == 9.0) & (jnp.abs(params["b"]).sum() > 0)
        return jnp.where(bad, jnp.nan, apply(params, x))

    marked = HELD[0].copy()
    marked[-1, 0] = 9.0  # in the last, smaller batch
    late = optax.masked(
        optax.scale_by_schedule(lambda step: jnp.where(jnp.asarray(step) < 3, 0.0, 1.0)), {"w": False, "b": True}
    )
    words = rf"monitor='{monitor}' is nan after epoch 2 \(step 6\)\. .*epoch 1, the best"
    with pytest.raises(FitNonFiniteLoss, match=words) as caught:
        quick(blind, optax.chain(optax.sgd(0.1), late), validation=(marked, HELD[1]), monitor=monitor, epochs=4)
    error = caught.value
    assert error.step == 6 and error.result.best_epoch == 1 and len(error.result.history) == 2
    assert not np.asarray(error.result.params["b"]).any()


def test_a_monitor_that_never_was_finite_does_not_pass_for_a_training() -> None:
    with pytest.raises(FitNonFiniteLoss, match=r"monitor='val_loss' is nan after epoch 1.*kept of the start"):
        quick(validation=(np.full_like(HELD[0], np.nan), HELD[1]), monitor="val_loss")


@pytest.mark.parametrize("bad_step", [2, 6])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(bad_step: int) -> None:
    def poison(step: jax.Array, updates: PyTree) -> PyTree:
        return jax.tree.map(lambda u: jnp.where(step == bad_step - 2, jnp.nan, u), updates)

    spoil = optax.GradientTransformation(
        lambda params: jnp.zeros((), jnp.int32), lambda updates, step, params=None: (poison(step, updates), step + 1)
    )
    tx = optax.chain(optax.sgd(0.1), spoil)
    # The update of step bad_step - 1 is NaN, so the next loss is.
    with pytest.raises(FitNonFiniteLoss, match=rf"loss is nan at step {bad_step}\..*learning rate") as caught:
        quick(tx=tx, steps_per_dispatch=1, epochs=4)
    error = caught.value
    assert error.step == bad_step and error.result.best_epoch == bad_step // 4
    assert_equal(error.result.params, quick(tx=optax.sgd(0.1), epochs=1).params if bad_step == 6 else PARAMS)


# --- models -----------------------------------------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rate: float, rngs: nnx.Rngs):
        self.body, self.norm = nnx.Linear(INPUTS, 8, rngs=rngs), nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.drop, self.head = nnx.Dropout(rate, rngs=rngs), nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.drop(nnx.relu(self.norm(self.body(x)))))


def test_an_nnx_model_with_batch_statistics_equals_its_loop() -> None:
    model, tx = Block(0.0, nnx.Rngs(0)), optax.sgd(0.1)
    result = fit(model, TRAIN, HELD, tx, epochs=1, batch_size=BATCH)

    mine = Block(0.0, nnx.Rngs(0))
    optimizer = nnx.Optimizer(mine, tx, wrt=nnx.Param)

    @nnx.jit
    def step(mine: Block, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
        optimizer.update(mine, nnx.grad(lambda mine: cross_entropy(mine(x), y).mean())(mine))

    for rows in order(0):
        step(mine, optimizer, X[rows], Y[rows])
    assert_close(nnx.state(result.model, nnx.Param), nnx.state(mine, nnx.Param), 1e-4)
    assert_close(nnx.state(result.model, nnx.BatchStat), nnx.state(mine, nnx.BatchStat), 1e-4)
    # The one that was given is only read, and in training mode as before; so is the new one.
    untouched = Block(0.0, nnx.Rngs(0))
    for kind in (nnx.Param, nnx.BatchStat):
        assert_equal(nnx.state(model, kind), nnx.state(untouched, kind))
    assert result.model.norm.use_running_average is False
    mine.eval()
    assert result.history[0].val_loss == pytest.approx(float(cross_entropy(mine(HELD[0]), HELD[1]).mean()), rel=1e-4)


@pytest.mark.slow
def test_nnx_dropout_draws_anew_every_step_and_not_in_validation() -> None:
    result = fit(Block(0.5, nnx.Rngs(0)), TRAIN, HELD, optax.sgd(0.0), epochs=2, batch_size=BATCH, restore_best=False)
    assert int(result.rest["drop"]["rngs"]["count"].get_value()) == 6
    losses = [epoch.train_loss for epoch in result.history]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.slow
def test_masks_of_a_sparse_nnx_model_stay() -> None:
    model = nn.MLP([INPUTS, 8, CLASSES], density=0.5, masked_by="update", rngs=nnx.Rngs(0))
    masks = nn.masks_of(model)
    tx = oxs.sparse(optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05)), masks)
    capture = nn.capture(model, activation={"hidden_1": nnx.relu}, return_rest=True)
    result = fit(model, TRAIN, HELD, tx, epochs=2, batch_size=BATCH, capture=capture)
    assert oxs.nonzero(oxs.get_masks(result.opt_state)) == oxs.nonzero(masks)
    kernel, mask = result.model.hidden_1.kernel[...], result.model.hidden_1.kernel_mask[...]
    assert not np.asarray(kernel)[~np.asarray(mask)].any() and int(result.stats.count) > 0


class Tower(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = linen.BatchNorm(use_running_average=not train, momentum=0.5)(linen.Dense(8)(x))
        return linen.Dense(CLASSES)(linen.Dropout(0.5, deterministic=not train)(linen.relu(x)))


@pytest.mark.parametrize("captured", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_linen_model_carries_its_collections(captured: bool) -> None:
    model = Tower()
    variables = jax.jit(lambda key: model.init(key, X[:2], train=False))(jax.random.key(0))
    capture = nn.capture(model, return_rest=True) if captured else None
    result = fit(model, TRAIN, HELD, optax.adam(0.05), params=variables, epochs=2, batch_size=BATCH, capture=capture)
    assert set(result.rest) == {"batch_stats"}
    mean = result.rest["batch_stats"]["BatchNorm_0"]["mean"]
    assert float(jnp.abs(mean).sum()) > 0
    trained: Any = {"params": result.params, **result.rest}
    logits: Any = model.apply(trained, HELD[0], train=False)
    best = result.history[result.best_epoch - 1]
    assert best.val_loss == pytest.approx(float(cross_entropy(logits, HELD[1]).mean()), rel=1e-5)


def test_a_linen_model_without_state_takes_its_params_alone() -> None:
    model = linen.Dense(CLASSES)
    params = {"kernel": PARAMS["w"], "bias": PARAMS["b"]}
    result = quick(model, params=params, restore_best=False)
    assert_close(result.params["kernel"], plain().params["w"], 1e-6)


@pytest.mark.parametrize("name", ["train", "training", "is_training"])
def test_a_linen_model_is_told_that_it_is_trained(name: str) -> None:
    seen: list[bool] = []
    namespace: dict[str, Any] = {"linen": linen, "seen": seen, "CLASSES": CLASSES}
    exec(
        "class Told(linen.Module):\n"
        "    @linen.compact\n"
        f"    def __call__(self, x, {name}):\n"
        f"        seen.append({name})\n"
        "        return linen.Dense(CLASSES, name='head')(x)\n",
        namespace,
    )
    quick(namespace["Told"](), params={"head": {"kernel": PARAMS["w"], "bias": PARAMS["b"]}}, epochs=1)
    assert set(seen) == {True, False}


def test_bfloat16_is_in_the_pass_alone() -> None:
    seen: set[Any] = set()

    def noted(params: PyTree, x: jax.Array) -> jax.Array:
        seen.update((params["w"].dtype.name, x.dtype.name))
        return apply(params, x)

    result = quick(noted, compute_dtype=jnp.bfloat16, restore_best=False)
    assert seen == {"bfloat16"}
    assert_close(result.params, plain().params, 0.05)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((result.params, result.opt_state))}
    assert dtypes == {"float32", "int32"}


@pytest.mark.slow
def test_batch_statistics_stay_float32_under_bfloat16() -> None:
    options: dict[str, Any] = {"epochs": 1, "batch_size": BATCH, "compute_dtype": "bfloat16"}
    model = fit(Block(0.0, nnx.Rngs(0)), TRAIN, HELD, optax.sgd(0.1), **options).model
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model, nnx.BatchStat))} == {"float32"}


def test_targets_that_are_no_classes() -> None:
    y = X[:, :CLASSES] * 2.0
    data = {"train": (X, y), "validation": (X[:21], y[:21])}
    result = quick(loss=lambda out, y: (out - y) ** 2, monitor="val_loss", epochs=20, **data)
    assert result.history[-1].val_loss < 0.3 * result.history[0].val_loss
    assert np.isnan(result.history[-1].val_accuracy) and np.isnan(result.history[-1].train_accuracy)
    with pytest.raises(ValueError, match=r"monitor='val_accuracy', but y is float32.*use 'val_loss'"):
        quick(**data)


def test_progress_is_shown_where_rich_is_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    quick(progress=True)
    assert "100%" in capsys.readouterr().out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    quick(progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_digits_are_learned() -> None:
    pytest.importorskip("sklearn")
    data = load_data("digits")
    model = nn.MLP([64, 64, 10], rngs=nnx.Rngs(0))
    depths = oxs.layer_depths(nnx.state(model, nnx.Param))
    tx = optax.chain(oxs.per_leaf(optax.scale_by_adam()), oxs.scale_by_depth(0.5, depths), optax.scale(-3e-3))
    result = fit(
        model, (data.x_train, data.y_train), (data.x_validation, data.y_validation), tx, epochs=15, batch_size=64
    )
    assert result.model is not None
    logits = jax.jit(lambda x: result.model(x))(data.x_test)
    assert float((logits.argmax(-1) == data.y_test).mean()) > 0.94


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": (X, Y[:9])}, r"train holds 50 rows of x and 9 of y"),
        ({"train": X}, r"train must be a pair of arrays \(x, y\), got ndarray"),
        ({"validation": (X[:0], Y[:0])}, r"validation holds no rows"),
        ({"train": (X, Y + 1)}, r"train has the label 3, but the logits score 3 classes, 0 to 2"),
        ({"validation": (X[:21], Y[:21] - 1)}, r"validation has the label -1, but the logits score 3 classes"),
        ({"validation": (X[:, :2], Y)}, r"validation has rows of shape \(2,\), train of \(6,\)"),
        ({"batch_size": 51}, r"batch_size=51 is above the 50 rows of train"),
        ({"batch_size": 0}, r"batch_size=0 must be a whole number"),
        ({"epochs": 0}, r"epochs=0"),
        ({"patience": 0}, r"patience=0"),
        ({"steps_per_dispatch": 1.5}, r"steps_per_dispatch=1\.5"),
        ({"accumulate": 3}, r"accumulate=3 must divide batch_size=16"),
        ({"monitor": "loss"}, r"monitor='loss' must be one of"),
        ({"compute_dtype": "float17"}, r"compute_dtype='float17'"),
        ({"compute_dtype": jnp.int8}, r"compute_dtype=.*int8.*floating"),
        ({"event": 3}, r"event=3"),
        ({"mesh": 2}, r"mesh=2"),
        ({"params": None}, r"params=None.*pass params="),
        ({"model": "mlp"}, r"model_or_apply=str"),
        ({"model": nn.MLP([6, 3], rngs=nnx.Rngs(0))}, r"params were given beside an nnx\.Module"),
        ({"model": lambda params, x: x[:3]}, r"model_or_apply returned \(3, 6\) for 21 rows"),
        ({"masks": {"w": True}}, r"masks does not have the structure of params"),
        ({"tx": 0.1}, r"tx=float"),
        ({"capture": apply}, r"capture returned .*must return \(logits, activations\)"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quick(**changes)


def test_another_loss_may_use_labels_that_are_no_classes() -> None:
    def ignoring(logits: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(y < 0, 0.0, cross_entropy(logits, jnp.maximum(y, 0)))

    assert len(quick(loss=ignoring, train=(X, np.where(Y == 2, -1, Y)), epochs=1).history) == 1


def test_a_mesh_that_does_not_divide_the_batch_is_named() -> None:
    with pytest.raises(ValueError, match=r"mesh splits every micro-batch over 2 devices .*= 5 rows"):
        quick(batch_size=5, mesh=Mesh(np.array(jax.devices()[:2]), ("data",)))


def test_a_capture_that_drops_the_model_state_is_refused() -> None:
    model = Block(0.0, nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"capture returned 2 values.*return_rest=True"):
        fit(model, TRAIN, HELD, optax.sgd(0.1), batch_size=BATCH, capture=nn.capture(model))


def test_importing_fit_needs_no_rich() -> None:
    assert "rich" not in vars(sys.modules["optax_structure.training.fit_host"])
