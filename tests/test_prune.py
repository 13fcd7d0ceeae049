"""Pruning as a main job: the schedule, exact counts, what is written, the controls, resuming, bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from optax_structure._tree import leaves_by_path
from optax_structure.cli import build_parser, main
from optax_structure.sparsity.masks import nonzero
from optax_structure.training import CheckpointError, Data, Result, Run
from optax_structure.training.data import Raw, prepare
from optax_structure.training.loop import Interrupted, Progress
from optax_structure.training.prune import prune_report, run_prune_controls, run_pruning
from optax_structure.training.prune_config import PruneConfig
from optax_structure.training.run_state import Structure, start

CONFIG = PruneConfig(widths=(20, 12), final_density=0.2, start=0.2, stop=0.7, events=6, epochs=8, batch_size=20)
Pruned = tuple[Result, list[tuple[Progress, dict[str, np.ndarray]]]]
KERNELS = (16 * 20, 20 * 12, 12 * 4)


@pytest.fixture(scope="module")
def data() -> Data:
    """Four classes in 16 dimensions, each around a corner of its own; 360 training rows."""
    rng = np.random.default_rng(0)
    y = np.arange(500) % 4
    x = (rng.normal(size=(4, 16))[y] + 0.5 * rng.normal(size=(500, 16))).astype(np.float32)
    return prepare(Raw(x[:400], y[:400], x[400:], y[400:]), "toy")


def numbers(masks: Any) -> list[int]:
    return [int(mask.sum()) for mask in jax.tree.leaves(masks) if np.ndim(mask)]


@pytest.fixture(scope="module")
def pruned(data: Data) -> Pruned:
    heard: list[tuple[Progress, dict[str, np.ndarray]]] = []

    def watch(progress: Progress, run: Run) -> None:
        heard.append((progress, {path: np.array(mask) for path, mask in leaves_by_path(run.masks).items()}))

    return run_pruning(CONFIG, data, watch=watch), heard


@pytest.mark.parametrize(
    ("changes", "rows", "times"),
    [
        # 144 steps in dispatches of 3: from dispatch 9 to 33, 24 dispatches, a sixth of them each.
        ({}, 360, (27, 12, 99)),
        # 25 dispatches by 6: a pruning every 5, rounded up, so 5 of them.
        ({"stop": 0.72}, 360, (27, 15, 102)),
        ({"start": 0.0, "stop": 1.0, "events": 1}, 360, (0, 144, 144)),
        # More prunings than dispatches: one a dispatch.
        ({"events": 500}, 360, (27, 3, 99)),
        # 8 epochs of 5 steps: dispatches of one step.
        ({}, 100, (8, 4, 28)),
    ],
)
def test_prunings_fall_on_last_steps_of_dispatches(changes: Any, rows: int, times: tuple[int, int, int]) -> None:
    rule = dataclasses.replace(CONFIG, **changes).rule(rows)
    assert (rule.start, rule.every, rule.stop) == times


@pytest.mark.slow
def test_the_number_of_connections_follows_the_cubic_and_ends_exactly(
    pruned: Pruned,
) -> None:
    result, heard = pruned
    first, last = sum(KERNELS), round(0.2 * sum(KERNELS))
    assert nonzero(result.masks) == result.final["nonzero"] == last and result.final["retraces"] == 0
    events = prune_report(CONFIG, result)["events"]
    assert [event["step"] for event in events] == [27 + 12 * i for i in range(1, 7)]
    assert events[0]["nonzero_before"] == first and events[-1]["nonzero_after"] == last
    for i, event in enumerate(events, start=1):
        # Every kernel rounds on its own.
        assert abs(event["nonzero_after"] - (last + (first - last) * (1 - i / 6) ** 3)) <= 0.5 * len(KERNELS)
    before = None
    for progress, masks in heard:
        kernels = [mask for mask in masks.values() if mask.ndim]
        assert progress.nonzero == sum(mask.sum() for mask in kernels)
        if before is not None:
            assert not any(np.any(mask & ~old) for mask, old in zip(kernels, before, strict=True)), progress.step
        before = kernels
    # During a step the connections exist that were there before it.
    counted = {progress.step: progress.nonzero for progress, _ in heard}
    history = result.run.history.nonzero
    assert all(history[step] == number for step, number in counted.items() if step < len(history))
    for path, mask in leaves_by_path(result.masks).items():
        leaf = np.asarray(leaves_by_path(result.params)[path])
        assert not np.ndim(mask) or not np.any(leaf[~np.asarray(mask)]), path


@pytest.mark.slow
def test_the_weakest_go(data: Data) -> None:
    """One shot, in the last step of a dispatch: what is left are the largest of what was there before that step."""
    config = dataclasses.replace(CONFIG, events=1, distribution="uniform")
    seen: dict[int, Any] = {}
    rule = config.rule(len(data.x_train))
    assert rule.stop is not None
    # At a rate of next to nothing the weights of the step are those of the start.
    slow = dataclasses.replace(config, learning_rate=1e-9, weight_decay=0.0)
    watch = lambda progress, run: seen.setdefault(progress.step, jax.device_get(run.masks))  # noqa: E731
    run_pruning(slow, data, watch=watch)
    full = Structure(start(slow.dense(), data).units, jax.tree.map(np.ones_like, seen[rule.start]), {})
    weights = leaves_by_path(start(slow.dense(), data, full).carry.params)
    for path, mask in leaves_by_path(seen[rule.stop]).items():
        if np.ndim(mask):
            size = np.abs(np.asarray(weights[path]))
            assert mask.sum() == round(0.2 * size.size)
            assert size[mask].min() > size[~mask].max(), path


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"by": "saliency"}, {"by": "random"}, {"distribution": "global"}, {"distribution": "uniform"}, {"stop": 1.0}],
)
def test_every_way_of_pruning_meets_the_budget(data: Data, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, epochs=2, **changes)
    result = run_pruning(config, data)
    assert result.final["nonzero"] == round(0.2 * sum(KERNELS))
    if changes.get("distribution") == "uniform":
        assert sorted(numbers(result.masks)) == sorted(round(0.2 * size) for size in KERNELS)


@pytest.mark.slow
def test_controls_have_the_same_budget_and_change_one_thing(data: Data, pruned: Pruned) -> None:
    result, _ = pruned
    controls = run_prune_controls(CONFIG, result)
    first, last = sum(KERNELS), round(0.2 * sum(KERNELS))
    assert {name: control.final["nonzero"] for name, control in controls.items()} == {
        "dense": first, "random_pruning": last, "final_masks": last, "random_masks": last,
    }  # fmt: skip
    for one, two in zip(jax.tree.leaves(controls["final_masks"].masks), jax.tree.leaves(result.masks), strict=True):
        np.testing.assert_array_equal(one, two)
    # Until the first pruning the dense control is the pruned network itself.
    until = CONFIG.rule(len(data.x_train)).start
    np.testing.assert_array_equal(controls["dense"].run.history.loss[:until], result.run.history.loss[:until])
    np.testing.assert_array_equal(controls["random_pruning"].run.history.nonzero, result.run.history.nonzero)
    # Randomly drawn masks give no unit up, and are divided among the kernels as the pruned ones are.
    assert numbers(controls["random_masks"].masks) == numbers(result.masks)
    report = prune_report(CONFIG, result, controls)
    steps, dense = 144, 2 * 20 * (2 * KERNELS[0] + 3 * (KERNELS[1] + KERNELS[2]))
    for name, row in report["controls"].items():
        assert row["train_flops"] == steps * dense and row["forward_flops"] == 2 * first, name
        assert row["forward_flops_if_sparsity_were_free"] == 2 * row["nonzero"], name
    passes = {"hidden_1/kernel": 2, "hidden_2/kernel": 3, "head/kernel": 3}
    static = sum(passes[path] * int(mask.sum()) for path, mask in leaves_by_path(result.masks).items() if np.ndim(mask))
    free = {name: row["train_flops_if_sparsity_were_free"] for name, row in report["controls"].items()}
    assert free["dense"] == steps * dense and free["final_masks"] == steps * 2 * 20 * static
    assert free["random_pruning"] == report["final"]["train_flops_if_sparsity_were_free"]
    assert free["final_masks"] < free["random_pruning"] < free["dense"]


@pytest.mark.slow
def test_final_masks_start_from_the_numbers_of_the_dense_network(data: Data, pruned: Pruned) -> None:
    result, _ = pruned
    full = jax.tree.map(np.ones_like, result.masks)
    dense = leaves_by_path(start(CONFIG.dense(), data, Structure(result.units, full, {})).carry.params)
    sparse = leaves_by_path(start(CONFIG.dense(), data, Structure(result.units, result.masks, {})).carry.params)
    for path, mask in leaves_by_path(result.masks).items():
        if np.ndim(mask):
            ratio = np.where(mask, np.asarray(sparse[path]) / np.asarray(dense[path]), np.nan)
            for unit in ratio.T:
                living = unit[~np.isnan(unit)]
                np.testing.assert_allclose(living, living[:1].repeat(len(living)), rtol=1e-4, err_msg=path)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(data: Data, tmp_path: Path, pruned: Pruned) -> None:
    whole, _ = pruned
    asked: list[bool] = []

    def watch(progress: Progress, run: Run) -> None:
        if progress.step >= 60:
            asked.append(True)

    with pytest.raises(Interrupted, match="stopped after step 60 of 144"):
        run_pruning(CONFIG, data, folder=tmp_path, watch=watch, stop=lambda: bool(asked))
    with pytest.raises(CheckpointError, match=r"by='magnitude' \(now 'saliency'\).*--out"):
        run_pruning(dataclasses.replace(CONFIG, by="saliency"), data, folder=tmp_path, resuming=True)
    resumed = run_pruning(CONFIG, data, folder=tmp_path, resuming=True)
    assert resumed.run.history.loss.tobytes() == whole.run.history.loss.tobytes()
    assert resumed.run.history.nonzero.tobytes() == whole.run.history.nonzero.tobytes()
    assert {**resumed.final, "wall_s": 0} == {**whole.final, "wall_s": 0}


@pytest.mark.slow
def test_the_command_on_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for needed in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(needed)
    out = tmp_path / "out"
    options = ["prune", "--widths", "16", "--final-density", "0.15", "--epochs", "8", "--seed", "3", "--out", str(out)]
    assert main([*options, "--controls"]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"report.json", "metrics.csv", "curves.png", "structure.png", "run.json", "checkpoint"}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("curves.png", "structure.png"))
    report = json.loads((out / "report.json").read_text())
    assert list(report) == ["dataset", "seed", "config", "events", "final", "controls"]
    assert report["dataset"] == "digits" and report["seed"] == 3
    assert PruneConfig.from_json(report["config"]).widths == (16,)
    dense = 64 * 16 + 16 * 10
    budget = round(0.15 * dense)
    assert report["final"]["nonzero"] == budget == report["events"][-1]["nonzero_after"]
    assert list(report["final"]) == [
        "test_accuracy", "validation_accuracy", "nonzero", "biases", "density", "train_flops",
        "train_flops_if_sparsity_were_free", "wall_s", "retraces", "forward_flops",
        "forward_flops_if_sparsity_were_free",
    ]  # fmt: skip
    assert {name: row["nonzero"] for name, row in report["controls"].items()} == {
        "dense": dense, "random_pruning": budget, "final_masks": budget, "random_masks": budget,
    }  # fmt: skip
    rows = (out / "metrics.csv").read_text().splitlines()
    assert rows[0] == "step,loss,accuracy,nonzero,validation_accuracy" and len(rows) == 1 + 8 * (1294 // 128)
    assert int(rows[1].split(",")[3]) == dense and int(rows[-1].split(",")[3]) == budget
    printed = capsys.readouterr().out
    assert "pruned" in printed and "random masks" in printed and "if free" in printed
    # What is finished is shown again; other options are refused; the other command is pointed to.
    assert main(["prune", "--resume", "--out", str(out)]) == 0
    assert json.loads((out / "report.json").read_text())["final"]["test_accuracy"] == report["final"]["test_accuracy"]
    assert main(["prune", "--resume", "--out", str(out), "--stop", "0.9"]) == 1
    assert "stop=0.6 (now 0.9)" in capsys.readouterr().err
    assert main(["grow", "--resume", "--out", str(out)]) == 1
    assert "holds a run of optax-structure prune" in capsys.readouterr().err


def test_resuming_what_the_other_command_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # As written before there was a second command.
    (tmp_path / "run.json").write_text(json.dumps({"config": {}, "note": {"source": {"dataset": "digits"}}}))
    assert main(["prune", "--resume", "--out", str(tmp_path)]) == 1
    assert "holds a run of optax-structure grow: resume it so, or give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--final-density", "0"], "final_density=0.0 must lie in (0, 1)"),
        (["--final-density", "1"], "final_density=1.0 must lie in (0, 1)"),
        (["--by", "size"], "by='size' is unknown; choose from magnitude, saliency, random"),
        (["--distribution", "even"], "distribution='even' is unknown; choose from erk, uniform, global"),
        (["--start", "0.6", "--stop", "0.6"], "start=0.6 and stop=0.6 must satisfy 0 <= start < stop <= 1"),
        (["--stop", "1.5"], "stop=1.5 must satisfy"),
        (["--start", "-0.1"], "start=-0.1 and stop=0.6 must satisfy"),
        (["--events", "0"], "events=0 must be at least 1"),
        (["--widths", "8,0"], "each of 1 unit or more"),
        (["--learning-rate", "0"], "learning_rate=0.0 must be a positive number"),
        (["--data-dir", "no/such/folder"], "data_dir='no/such/folder' is not a folder"),
        (["--dataset", "digits", "--data-dir", "x"], "give one of them"),
    ],
)
def test_errors_name_argument_value_and_fix(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for needed in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(needed)
    assert main(["prune", "--out", str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_a_training_too_short_for_its_schedule() -> None:
    config = PruneConfig(start=0.5, stop=0.505, epochs=8, batch_size=20)
    with pytest.raises(ValueError, match=r"start=0\.5 and stop=0\.505 leave less than .* 3 steps.* 144 steps"):
        config.rule(360)


def test_help_shows_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["prune", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in ("final_density", "by", "distribution", "start", "stop", "events", "seed", "batch_size"):
        assert f"(default: {getattr(PruneConfig(), field)})" in text, field
    for heading in ("data:", "network:", "pruning:", "training:", "output:", "examples:"):
        assert heading in text
