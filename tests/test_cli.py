"""The command line: what it prints, what it writes, and that every error names what is wrong and what to do."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from common import child_environment

from optax_structure.cli import build_parser, main
from optax_structure.training.config import Config

TINY = ["--widths", "12,8", "--density", "0.2", "--final-density", "0.4", "--events", "2", "--batch-size", "32"]


@pytest.fixture(scope="module")
def toy_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "toy.npz"
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = rng.normal(size=(3, 25))[y] + 0.5 * rng.normal(size=(300, 25))
    np.savez(path, x_train=x[:240], y_train=y[:240], x_test=x[240:], y_test=y[240:])
    return path


@pytest.fixture(scope="module")
def finished(toy_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("run") / "out"
    options = ["grow", "--data-dir", str(toy_npz), "--out", str(out), "--epochs", "6", "--seed", "4", *TINY]
    assert main(options) == 0
    return out, options


def test_what_is_written(finished: tuple[Path, list[str]]) -> None:
    out, _ = finished
    names = {path.name for path in out.iterdir()}
    assert names == {"report.json", "metrics.csv", "curves.png", "structure.png", "run.json", "checkpoint"}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("curves.png", "structure.png"))
    report = json.loads((out / "report.json").read_text())
    assert report["dataset"] == "toy" and report["seed"] == 4 and report["controls"] == {}
    assert report["final"]["nonzero"] == round(0.4 * (25 * 12 + 12 * 8 + 8 * 3))
    assert [event["action"] for event in report["events"]] == ["connections", "patches"]
    assert Config.from_json(report["config"]).widths == (12, 8)
    rows = (out / "metrics.csv").read_text().splitlines()
    assert rows[0] == "step,loss,accuracy,nonzero,validation_accuracy" and len(rows) == 1 + 6 * (216 // 32)


def test_resume_of_a_finished_run_needs_no_options(
    finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = finished
    before = json.loads((out / "report.json").read_text())
    assert main(["grow", "--resume", "--out", str(out)]) == 0
    after = json.loads((out / "report.json").read_text())
    assert before["final"].pop("wall_s") and after["final"].pop("wall_s")
    assert before == after
    assert "grown" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--widths", "12,9"], "widths=[12, 8] (now [12, 9])"),
        (["--learning-rate", "0.5"], "learning_rate="),
        (["--dataset", "digits"], "other data: its fingerprint"),
    ],
)
def test_resume_with_something_else_is_refused(
    finished: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    out, _ = finished
    assert main(["grow", "--resume", "--out", str(out), *extra]) == 1
    assert message in capsys.readouterr().err


def truncated(folder: Path) -> Path:
    (folder / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 9]))
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--density", "0"], "density=0.0 must lie in (0, 1]"),
        (["--density", "2"], "density=2.0 must lie in (0, 1]"),
        (["--density", "0.4", "--final-density", "0.2"], "final_density=0.2 is below density=0.4"),
        (["--density", "0.001", "--final-density", "0.002"], "smallest density that can pay"),
        (["--action", "connections,clone"], "'clone' is unknown; choose from connections, patches, widen, insert"),
        (["--placement", "best"], "placement='best' is unknown; choose from extrema, random, gradient"),
        (["--strategy", "ultimate"], "strategy='ultimate' is unknown; choose from none, dual"),
        (["--on-growth", "stop"], "on_growth='stop' is unknown"),
        (["--rewire", "snip"], "rewire='snip' is unknown; choose from none, set, rigl, random"),
        (["--dataset", "cifar10"], "dataset='cifar10' is unknown"),
        (["--data-dir", "no/such/folder"], "data_dir='no/such/folder' is not a folder"),
        (["--prune", "1"], "prune=1.0 must lie in [0, 1)"),
        (["--batch-size", "5000"], "batch_size=5000 is above the 1294 training rows"),
    ],
)
def test_errors_name_argument_value_and_fix(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for needed in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(needed)
    assert main(["grow", "--out", str(tmp_path / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_truncated_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    assert main(["grow", "--out", str(tmp_path / "out"), "--data-dir", str(truncated(tmp_path))]) == 1
    error = capsys.readouterr().err
    assert "train-images-idx3-ubyte is truncated" in error and "download it again" in error
    with pytest.raises(ValueError, match="truncated"):
        main(["grow", "--out", str(tmp_path / "out"), "--data-dir", str(tmp_path), "--debug"])


@pytest.mark.parametrize("options", [["--wdths", "3"], ["--widths", "a,b"], ["--seed"], []])
def test_usage_errors(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["grow", *options] if options else [])
    assert caught.value.code == 2
    assert (options[0] if options else "COMMAND") in capsys.readouterr().err


def test_nan_loss_is_a_named_error(toy_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    options = ["--data-dir", str(toy_npz), "--out", str(tmp_path), "--epochs", "6", *TINY, "--learning-rate", "1e30"]
    assert main(["grow", *options]) == 1
    error = capsys.readouterr().err
    assert "step" in error and "Try a smaller learning rate than 1e+30" in error
    assert "no checkpoint had been written" in error
    assert (tmp_path / "metrics.csv").exists() and not (tmp_path / "report.json").exists()
    # Without a checkpoint it starts again, with what was asked for: the same rate, the same error.
    assert main(["grow", "--resume", "--out", str(tmp_path)]) == 1
    assert "Try a smaller learning rate than 1e+30" in capsys.readouterr().err


def test_two_sources_of_data(toy_npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["grow", "--dataset", "digits", "--data-dir", str(toy_npz)]) == 1
    assert "give one of them" in capsys.readouterr().err


def test_missing_extras(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = importlib.util.find_spec

    def find(name: str, *args: Any) -> Any:
        return None if name == "rich" else real(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert main(["grow"]) == 1
    assert 'pip install "optax-structure[train]"' in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["grow", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in ("density", "final_density", "events", "placement", "prune", "seed", "batch_size", "learning_rate"):
        assert f"(default: {getattr(Config(), field)})" in text, field
    for heading in ("data:", "network:", "growth:", "training:", "output:", "examples:"):
        assert heading in text


def test_every_promised_option_exists() -> None:
    given = (
        "--density .1 --final-density .2 --events 2 --epochs 3 --patience 1 --widths 8 --seed 1 --batch-size 8 "
        "--learning-rate .1 --strategy none --on-growth slow --out o --resume --controls --prune 0 --action widen "
        "--placement random --rewire rigl --dataset digits --data-dir d"
    )
    assert len(vars(build_parser().parse_args(["grow", *given.split()]))) == 21


@pytest.mark.slow
def test_ctrl_c_leaves_a_resumable_run_and_controls_fill_the_table(toy_npz: Path, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    command = [sys.executable, "-u", "-m", "optax_structure", "grow"]
    env = child_environment()
    out = ["--out", str(tmp_path / "out")]
    options = ["--data-dir", str(toy_npz), "--epochs", "300", *TINY]
    process = subprocess.Popen(
        [*command, *options, *out], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "grew" in line:
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert f"optax-structure grow --resume --out {tmp_path / 'out'}" in error
    done = subprocess.run(
        [*command, "--resume", "--controls", *out], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"no_growth", "random_placement", "final_structure", "dense"} <= set(report["controls"])
    budget = round(0.4 * (25 * 12 + 12 * 8 + 8 * 3))
    assert report["controls"]["final_structure"]["nonzero"] == report["final"]["nonzero"] == budget
    assert report["controls"]["dense"]["nonzero"] == 25 * 12 + 12 * 8 + 8 * 3
    assert "no growth" in done.stdout
