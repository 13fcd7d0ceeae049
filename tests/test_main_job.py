"""The growing run: budgets, retraces, what growth preserves, what it slows, and how it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_structure as oxs
from optax_structure._tree import leaves_by_path
from optax_structure.growth import insert_layer
from optax_structure.sparsity.masks import nonzero, random_masks
from optax_structure.state import transfer_state
from optax_structure.training import CheckpointError, Config, Data, NonFiniteLoss, Result, Run, load_data, run_growth
from optax_structure.training.controls import control_configs
from optax_structure.training.data import Raw, prepare
from optax_structure.training.loop import Interrupted, Progress
from optax_structure.training.network import chain, loss_and_aux, params_like
from optax_structure.training.report import make_report, write_metrics
from optax_structure.training.run_state import lengths, start
from optax_structure.training.step import after_growth_rule, batch_rows, make_tx, rewiring_rule

ALL = ("connections", "patches", "widen", "insert")
CONFIG = Config(
    widths=(20, 12), density=0.15, final_density=0.35, events=4, actions=ALL, epochs=8, batch_size=20,
    rewire_every=20, warmup=16, placement="gradient", learning_rate=5e-3,
)  # fmt: skip
REWIRING = CONFIG.replace(rewire_until=0.8)
KERNELS = 16 * 20 + 20 * 12 + 12 * 4


def toy(rows: int = 400, noise: float = 0.5) -> Data:
    """Four classes in 16 dimensions, each around a corner of its own."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 16))
    y = np.arange(rows + 100) % 4
    x = (centres[y] + noise * rng.normal(size=(rows + 100, 16))).astype(np.float32)
    return prepare(Raw(x[:rows], y[:rows], x[rows:], y[rows:]), "toy")


@pytest.fixture(scope="module")
def data() -> Data:
    return toy()


@pytest.fixture(scope="module")
def grown(data: Data) -> tuple[Result, list[Progress]]:
    heard: list[Progress] = []
    return run_growth(CONFIG, data, watch=lambda progress, run: heard.append(progress)), heard


def test_the_budget_is_met_exactly_with_every_action(grown: tuple[Result, list[Progress]]) -> None:
    result, _ = grown
    budget, first = round(0.35 * KERNELS), round(0.15 * KERNELS)
    assert nonzero(result.masks) == result.final["nonzero"] == budget
    assert [event["action"] for event in result.events] == list(ALL)
    targets = [first + (budget - first) * i // 4 for i in (1, 2, 3, 4)]
    assert [event["nonzero_after"] for event in result.events] == targets
    assert [event["nonzero_before"] for event in result.events] == [first, *targets[:-1]]
    for path, mask in leaves_by_path(result.masks).items():
        leaf = leaves_by_path(result.params)[path]
        assert not np.ndim(mask) or not np.any(np.asarray(leaf)[~np.asarray(mask)]), path


def test_the_step_retraces_for_shapes_alone(grown: tuple[Result, list[Progress]]) -> None:
    result, _ = grown
    # widen: one shape change; insert: another. The relabelling when its warm-up is over changes values alone.
    assert result.final["retraces"] == 2
    assert set(jax.tree.leaves(result.run.labels)) == {"scaffold"}
    assert [group.size for group in result.units.groups] == [16, *result_sizes(result), 4]


class Rewired(NamedTuple):
    """A run that rewires or not: the masks after the dispatches without an event, and the steps of the events."""

    result: Result
    seen: dict[int, dict[str, np.ndarray]]
    events: list[int]


def rewired(data: Data, rewire: Any) -> Rewired:
    seen: dict[int, dict[str, np.ndarray]] = {}
    events: list[int] = []

    def watch(progress: Progress, run: Run) -> None:
        if progress.event:
            events.append(progress.step)
        else:
            masks = leaves_by_path(run.masks)
            seen[progress.step] = {path: np.array(mask) for path, mask in masks.items() if np.ndim(mask)}

    return Rewired(run_growth(REWIRING.replace(rewire=rewire), data, watch=watch), seen, events)


@pytest.fixture(scope="module")
def with_rigl(data: Data) -> Rewired:
    return rewired(data, "rigl")


@pytest.mark.slow
@pytest.mark.parametrize("rewire", ["rigl", "none"])
def test_rewiring_inside_the_step_keeps_every_count(data: Data, rewire: Any, request: pytest.FixtureRequest) -> None:
    """Between growth events, in the last steps of dispatches, masks change and no kernel's number does."""
    result, seen, events = request.getfixturevalue("with_rigl") if rewire == "rigl" else rewired(data, rewire)
    assert result.final["nonzero"] == nonzero(result.masks) == round(0.35 * KERNELS)
    assert result.final["retraces"] == 2  # widen and insert, as without rewiring
    moved = []
    for step, masks in seen.items():
        before = seen.get(step - result.run.chunk)
        if before is None or step - result.run.chunk in events:
            continue  # events come after the watcher has seen the step
        assert {path: mask.sum() for path, mask in masks.items()} == {path: m.sum() for path, m in before.items()}
        if any(np.any(mask != before[path]) for path, mask in masks.items()):
            moved.append(step)
    every = round(20 / result.run.chunk) * result.run.chunk
    due = [step for step in range(every, int(0.8 * 144) + 1, every) if step - result.run.chunk not in events]
    # The last one, of 213 connections times 0.4 %, moves none.
    assert due[-1] == 105 and moved == ([] if rewire == "none" else due[:-1])


@pytest.mark.slow
def test_a_run_that_rewires_inside_the_step_goes_on_with_the_same_numbers(
    data: Data, with_rigl: Rewired, tmp_path: Path
) -> None:
    config = REWIRING.replace(rewire="rigl")
    asked: list[bool] = []

    def watch(progress: Progress, run: Run) -> None:
        if progress.step >= 90:
            asked.append(True)

    with pytest.raises(Interrupted, match="stopped after step"):
        run_growth(config, data, folder=tmp_path, watch=watch, stop=lambda: bool(asked))
    resumed, whole = run_growth(config, data, folder=tmp_path, resuming=True), with_rigl.result
    assert resumed.run.history.loss.tobytes() == whole.run.history.loss.tobytes()
    assert {**resumed.final, "wall_s": 0} == {**whole.final, "wall_s": 0}
    with pytest.raises(CheckpointError, match=r"rewire='rigl' \(now None\)"):
        run_growth(REWIRING, data, folder=tmp_path, resuming=True)


def test_where_nothing_is_rewired_inside_the_step() -> None:
    config = Config(rewire="rigl", rewire_every=100, rewire_until=0.5)
    rule = rewiring_rule(config, 1000, 50)
    assert rule is not None and (rule.every, rule.stop) == (100, 500)
    assert float(rule.fraction_at(jnp.int32(250))) == pytest.approx(0.1)  # half of 0.2, half way along the cosine
    for name, (drop, grow) in {"set": (oxs.by_magnitude, oxs.at_random), "random": (oxs.at_random,) * 2}.items():
        rule = rewiring_rule(config.replace(rewire=name), 1000, 50)
        assert rule is not None and (rule.drop, rule.grow) == (drop, grow)
    for changes in ({"rewire": None}, {"rewire": "none"}, {"prune": 0.0}, {"rewire_until": 0.09}):
        assert rewiring_rule(config.replace(**changes), 1000, 50) is None


def result_sizes(result: Result) -> list[int]:
    """One hidden layer an eighth wider; one inserted behind a hidden layer, of its size."""
    sizes = [group.size for group in result.units.groups[1:-1]]
    assert len(sizes) == 3 and sorted(set(sizes)) in ([12, 22], [13, 20])
    return sizes


def test_the_optimizer_adds_no_temporary_of_parameter_size() -> None:
    """What XLA sets aside for a step of 784-512-512-10: the main job's chain against plain Adam."""
    units = chain([784, 512, 512, 10])
    params = params_like(units)
    masks = random_masks(jax.random.key(0), params, 0.05)

    def temporaries(tx: optax.GradientTransformation) -> int:
        def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
            grads = jax.grad(loss_and_aux, has_aux=True)(params, units, x, y)[0]
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        arguments = (params, tx.init(params), jnp.ones((128, 784)), jnp.zeros(128, jnp.int32))
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain, ours = temporaries(optax.adam(1e-3)), temporaries(make_tx(Config(on_growth="slow"), 1000, masks))
    smallest_kernel = 4 * 512 * 10
    assert ours - plain < smallest_kernel


def test_growth_leaves_the_accuracy_where_it_was(grown: tuple[Result, list[Progress]]) -> None:
    for event in grown[0].events:
        if event["nonzero_after"] > event["nonzero_before"]:
            # Additions start at 0; only what a hard budget prunes after a shape change may move the accuracy.
            assert abs(event["validation_accuracy_after"] - event["validation_accuracy_before"]) <= 0.1
    for event in grown[0].events[:2]:
        assert event["validation_accuracy_after"] == event["validation_accuracy_before"]


def test_watchers_hear_every_dispatch_and_event(grown: tuple[Result, list[Progress]]) -> None:
    result, heard = grown
    total, chunk = lengths(CONFIG, 360)
    assert (total, chunk) == (144, 3)
    assert len(heard) == total // chunk + 4
    assert [progress.event for progress in heard if progress.event] == result.events
    assert heard[-1].step == total and heard[-1].validation_accuracy == result.final["validation_accuracy"]


def test_it_learns(grown: tuple[Result, list[Progress]]) -> None:
    result, _ = grown
    assert result.final["test_accuracy"] > 0.8
    history = result.run.history
    assert history.loss[-20:].mean() < 0.5 * history.loss[:20].mean()


def test_flops_by_hand(data: Data) -> None:
    config = CONFIG.replace(events=0, final_density=0.15, prune=0.0, epochs=1)
    result = run_growth(config, data)
    masks = {path: int(np.sum(mask)) for path, mask in leaves_by_path(result.masks).items() if np.ndim(mask)}
    # Forward and weight gradients everywhere, input gradients but for the first layer; 2 FLOPs, 20 rows, 18 steps.
    dense = 2 * (16 * 20) + 3 * (20 * 12) + 3 * (12 * 4)
    living = 2 * masks["hidden_1/kernel"] + 3 * masks["hidden_2/kernel"] + 3 * masks["head/kernel"]
    assert result.final["train_flops"] == 2 * 20 * 18 * dense
    assert result.final["train_flops_if_sparsity_were_free"] == 2 * 20 * 18 * living
    assert result.final["biases"] == 20 + 12 + 4 and result.final["retraces"] == 0


def test_mask_only_events_retrace_nothing_and_compile_once(data: Data) -> None:
    config = CONFIG.replace(actions=("connections", "patches"), events=4)
    compiled: list[int] = []

    def watch(progress: Progress, run: Run) -> None:
        if progress.event:
            compiled.append(len(run.program.traces))

    result = run_growth(config, data, watch=watch)
    assert compiled == [1, 1, 1, 1] and result.final["retraces"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["extrema", "random"])
def test_other_placements_spend_the_same(data: Data, placement: Any) -> None:
    config = CONFIG.replace(placement=placement, epochs=4, events=2, actions=("patches", "widen"))
    result = run_growth(config, data)
    assert result.final["nonzero"] == round(0.35 * KERNELS)
    assert {event["placement"] for event in result.events} == {placement}


def test_same_seed_same_run_other_seed_another(data: Data) -> None:
    config = CONFIG.replace(actions=("connections",), epochs=3)
    one, two, other = (run_growth(config.replace(seed=seed), data).run.history.loss for seed in (1, 1, 2))
    assert one.tobytes() == two.tobytes() != other.tobytes()


@pytest.mark.parametrize(("on_growth", "moves"), [("freeze", False), ("slow", True), ("none", True)])
def test_on_growth_freezes_or_slows_the_old(data: Data, on_growth: Any, moves: bool) -> None:
    config = CONFIG.replace(on_growth=on_growth, actions=("connections",), events=1, prune=0.0, warmup=12)
    seen: dict[int, tuple[Any, Any]] = {}

    def watch(progress: Progress, run: Run) -> None:
        seen[progress.step] = jax.device_get((run.carry.params, run.masks))

    result = run_growth(config, data, watch=watch)
    event = result.events[0]["step"]
    (before, masks), (after, _) = seen[event], seen[event + 9]
    old = leaves_by_path(masks)
    change = {path: np.abs(leaf - leaves_by_path(before)[path]) for path, leaf in leaves_by_path(after).items()}
    # `masks` at the event are those after it: a weight that was 0 then is new.
    was = {path: (leaves_by_path(before)[path] != 0) & old[path] for path in change if np.ndim(old[path])}
    moved = [float(change[path][was[path]].max()) for path in was]
    new = [float(change[path][old[path] & ~was[path]].max(initial=0.0)) for path in was]
    assert max(new) > 0
    assert (max(moved) > 0) == moves
    later = leaves_by_path(seen[result.run.total_steps][0])
    assert any(np.any(later[path][was[path]] != leaves_by_path(after)[path][was[path]]) for path in was)


def test_after_growth_rule_reads_the_latest_growth_alone() -> None:
    components = jnp.array([0, 2, 1, 0], jnp.uint8)  # scaffold, new, patch, rewired scaffold
    rule = after_growth_rule(0.1, 50)

    def factors(ages: list[int], components: jax.Array) -> jax.Array:
        age = jnp.array(ages)
        return rule.factors(oxs.CohortTable(age, 400 - age, components))

    np.testing.assert_allclose(factors([400, 300, 20, 5], components), [0.1, 0.1, 1.0, 1.0])
    np.testing.assert_allclose(factors([400, 300, 50, 5], components), 1.0)
    np.testing.assert_allclose(factors([400, 300], jnp.zeros(2, jnp.uint8)), 1.0)


def test_patience_stops_and_tests_the_best(data: Data) -> None:
    config = CONFIG.replace(actions=("connections",), patience=2, epochs=40, learning_rate=2e-2)
    result = run_growth(config, data)
    host = result.run.host
    assert host.step < result.run.total_steps and host.stale == 2
    after = [accuracy for step, accuracy in host.validations if step > result.events[-1]["step"]]
    assert result.final["validation_accuracy"] == max(after) == host.best
    assert nonzero(result.masks) == round(0.35 * KERNELS)


def test_nan_loss_stops_with_the_checkpoint_kept(data: Data, tmp_path: Path) -> None:
    config = CONFIG.replace(actions=("connections",), prune=0.0)

    def poison(progress: Progress, run: Run) -> None:
        if progress.step == 60:
            run.carry.params["head"]["bias"] = run.carry.params["head"]["bias"] * jnp.nan

    with pytest.raises(
        NonFiniteLoss, match=r"parameters are not finite after step 60; the last good checkpoint is kept in .*smaller"
    ):
        run_growth(config, data, folder=tmp_path, checkpoint_every=30, watch=poison)
    resumed = run_growth(config, data, folder=tmp_path, resuming=True, checkpoint_every=30)
    assert np.isfinite(resumed.run.history.loss).all()
    # The poison came just before the checkpoint of step 60, which was not written.
    whole = run_growth(config, data)
    assert whole.run.history.loss.tobytes() == resumed.run.history.loss.tobytes()


@pytest.mark.slow
def test_interrupt_leaves_a_resumable_run(data: Data, tmp_path: Path) -> None:
    config = CONFIG.replace(epochs=4)
    asked: list[bool] = []

    def watch(progress: Progress, run: Run) -> None:
        if progress.step >= 30:
            asked.append(True)

    with pytest.raises(Interrupted, match="stopped after step"):
        run_growth(config, data, folder=tmp_path, watch=watch, stop=lambda: bool(asked))
    resumed = run_growth(config, data, folder=tmp_path, resuming=True)
    whole = run_growth(config, data)
    assert resumed.run.history.loss.tobytes() == whole.run.history.loss.tobytes()
    assert resumed.final["test_accuracy"] == whole.final["test_accuracy"]
    assert {**resumed.final, "wall_s": 0} == {**whole.final, "wall_s": 0}

    other = toy(noise=0.6)
    with pytest.raises(CheckpointError, match=r"made with other data: its fingerprint"):
        run_growth(config, other, folder=tmp_path, resuming=True)
    with pytest.raises(CheckpointError, match=r"widths=\[20, 12\] \(now \[20, 13\]\).*--out"):
        run_growth(config.replace(widths=(20, 13)), data, folder=tmp_path, resuming=True)


def test_a_new_run_forgets_the_old_checkpoints(data: Data, tmp_path: Path) -> None:
    config = CONFIG.replace(events=0, final_density=0.15, prune=0.0, epochs=2)
    run_growth(config, data, folder=tmp_path)
    longer = config.replace(epochs=1)
    run_growth(longer, data, folder=tmp_path)
    assert run_growth(longer, data, folder=tmp_path, resuming=True).run.host.step == 18


def test_budget_below_the_current_count(data: Data) -> None:
    with pytest.raises(ValueError, match=r"final_density=0\.1 is below density=0\.2"):
        Config(density=0.2, final_density=0.1)
    with pytest.raises(ValueError, match="batch_size=500 is above the 360 training rows"):
        start(CONFIG.replace(batch_size=500), data)
    with pytest.raises(ValueError, match="smallest density that can pay"):
        start(CONFIG.replace(density=0.01, final_density=0.02), data)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("density", 0.0, r"density=0\.0 must lie in \(0, 1\]"),
        ("density", 1.5, r"density=1\.5 must lie in \(0, 1\]"),
        ("final_density", -0.1, r"final_density=-0\.1 must lie in \(0, 1\]"),
        ("actions", ("clone",), "actions='clone' is unknown; choose from connections, patches, widen, insert"),
        ("actions", (), "actions='' is unknown"),
        ("placement", "magic", "placement='magic' is unknown; choose from extrema, random, gradient"),
        ("strategy", "triple", "strategy='triple' is unknown; choose from none, dual"),
        ("on_growth", "stop", "on_growth='stop' is unknown; choose from none, slow, freeze"),
        ("rewire", "snip", "rewire='snip' is unknown; choose from none, set, rigl, random"),
        ("widths", (), "at least one hidden layer"),
        ("widths", (8, 0), "each of 1 unit or more"),
        ("events", -1, "events=-1 must be at least 0"),
        ("events", 0, "events=0 cannot take density"),
        ("prune", 1.0, r"prune=1\.0 must lie in \[0, 1\)"),
        ("epochs", 0, "epochs=0 must be at least 1"),
        ("learning_rate", 0.0, r"learning_rate=0\.0 must be a positive number"),
        ("weight_decay", -1.0, r"weight_decay=-1\.0 must be a number of at least 0"),
        ("batch_size", 0, "batch_size=0 must be at least 1"),
        ("grow_until", 1.0, r"grow_until=1\.0 must lie in \(0, 1\)"),
    ],
)
def test_bad_options_name_the_argument_and_the_fix(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config(**{field: value})


def test_batches_are_a_function_of_seed_and_step() -> None:
    whole = batch_rows(5, 0, 12, 100, 16)
    np.testing.assert_array_equal(np.concatenate([batch_rows(5, 0, 7, 100, 16), batch_rows(5, 7, 5, 100, 16)]), whole)
    epochs = whole[:6].ravel(), whole[6:].ravel()
    assert all(len(set(epoch.tolist())) == 96 for epoch in epochs) and set(epochs[0].tolist()) != set(
        epochs[1].tolist()
    )


def test_the_step_lowers_for_every_platform(data: Data) -> None:
    run = start(CONFIG, data)
    index = batch_rows(0, 0, run.chunk, len(data.x_train), CONFIG.batch_size)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), run.carry)
    exported = jax.export.export(run.program.run, platforms=["cpu", "cuda", "tpu"])(
        shapes, data.x_train, data.y_train, index
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")


@pytest.mark.slow
def test_dual_slows_the_scaffold(data: Data) -> None:
    """One step from the same state: updates of ``dual`` are those of ``none``, the scaffold's times its rate."""
    updates = []
    for strategy in ("none", "dual"):
        run = start(CONFIG.replace(strategy=strategy), data)
        grads = jax.tree.map(jnp.ones_like, run.carry.params)
        updates.append(run.program.tx.update(grads, run.carry.opt_state, run.carry.params)[0])
    ratios = jax.tree.map(lambda one, two: two / jnp.where(one == 0, 1, one), *updates)
    found = {
        round(float(value), 3) for value in np.unique(np.concatenate([np.ravel(r) for r in jax.tree.leaves(ratios)]))
    }
    assert found <= {0.0, 0.7} and 0.7 in found
    assert isinstance(updates[0], dict) and optax.tree.norm(updates[0]) > 0


@pytest.mark.slow
def test_dual_rates_of_what_was_inserted() -> None:
    """An inserted leaf runs at the rate of ``new``, its bias too, and at the scaffold's once its warm-up is over."""
    units = chain([6, 8, 4])
    params = params_like(units)
    masks = random_masks(jax.random.key(0), params, 0.5)
    config = Config(strategy="dual", warmup=2, weight_decay=0.0, learning_rate=1.0)
    tx = make_tx(config, 10**9, masks)
    grads = jax.tree.map(jnp.ones_like, params)
    labels = jax.tree.map(lambda _: "scaffold", params)
    _, state = tx.update(grads, tx.init(params), params)
    growth = insert_layer(params, labels, masks, units, "hidden_1", key=jax.random.key(1))
    new_tx = make_tx(config, 10**9, growth.masks)
    state = transfer_state(tx, state, params, new_tx, growth.params, growth=growth)
    zeros = jax.tree.map(jnp.zeros_like, growth.params)
    found = []
    for _ in range(4):
        updates, state = new_tx.update(jax.tree.map(jnp.ones_like, zeros), state, zeros)
        found.append({path: float(jnp.max(jnp.abs(leaf))) for path, leaf in leaves_by_path(updates).items()})
    # Adam's first updates under a constant gradient are 1; the warm-up of 2 steps gives 1/2, 3/4, then 1 (and 0.7).
    for leaf in ("kernel", "bias"):
        rates = [updates[f"hidden_1_next/{leaf}"] for updates in found]
        np.testing.assert_allclose(rates, [0.5, 0.75, 0.7, 0.7], rtol=1e-3)


def test_report_has_exactly_the_promised_keys(grown: tuple[Result, list[Progress]]) -> None:
    result, _ = grown
    report = make_report(result, {"dense": result})
    assert list(report) == ["dataset", "seed", "config", "events", "final", "controls"]
    assert list(report["events"][0]) == [
        "step", "action", "placement", "dead", "saturated", "nonzero_before", "nonzero_after",
        "validation_accuracy_before", "validation_accuracy_after",
    ]  # fmt: skip
    assert list(report["final"]) == [
        "test_accuracy", "validation_accuracy", "nonzero", "biases", "density", "train_flops",
        "train_flops_if_sparsity_were_free", "wall_s", "retraces",
    ]  # fmt: skip
    assert list(report["controls"]["dense"]) == ["test_accuracy", "nonzero"]


def test_metrics_read_back_exactly(grown: tuple[Result, list[Progress]], tmp_path: Path) -> None:
    result, _ = grown
    write_metrics(tmp_path / "metrics.csv", result.run)
    rows = np.genfromtxt(tmp_path / "metrics.csv", delimiter=",", names=True)
    assert rows["loss"].astype(np.float32).tobytes() == result.run.history.loss.tobytes()
    assert np.count_nonzero(~np.isnan(rows["validation_accuracy"])) == len(result.run.host.validations)


def test_controls_change_one_thing_at_a_time() -> None:
    controls = control_configs(Config(placement="gradient", density=0.1, final_density=0.2))
    assert controls["no_growth"] == Config(density=0.2, final_density=0.2, events=0, placement="gradient")
    assert controls["no_rewiring"] == Config(density=0.1, final_density=0.2, prune=0.0, placement="gradient")
    assert controls["random_placement"].placement == "random" and controls["dense"].density == 1.0
    assert {control.seed for control in controls.values()} == {0}


@pytest.mark.slow
def test_a_small_real_mnist(mnist_dir: Path) -> None:
    whole = load_data(data_dir=mnist_dir)
    few = whole._replace(x_train=whole.x_train[:1500], y_train=whole.y_train[:1500])
    config = Config(widths=(32,), density=0.03, final_density=0.08, epochs=12, actions=("connections",), events=2)
    result = run_growth(config, few)
    assert result.final["nonzero"] == round(0.08 * (784 * 32 + 32 * 10)) and result.final["test_accuracy"] > 0.6
