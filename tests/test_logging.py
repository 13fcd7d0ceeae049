"""The rolling log and its files: what is fetched when, what a killed process leaves, and the picture."""

from __future__ import annotations

import json
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from optax_structure.training.control_plots import plot_control
from optax_structure.training.logging import (
    RollingLog,
    csv_sink,
    jsonl_sink,
    read_csv,
    read_jsonl,
    tensorboard_sink,
)

ROOT = Path(__file__).resolve().parents[1]


def test_the_last_records_stay_and_the_sinks_get_all() -> None:
    got: list[Any] = []
    log = RollingLog(maxlen=3, pull_every=2, sinks=[got.extend])
    for step in range(5):
        log.append(step, {"skipped": jnp.int32(step), "loss": jnp.float32(step) / 2})
    assert [record["step"] for record in got] == [0, 1, 2, 3]  # two by two
    assert log.column("step").tolist() == [2, 3, 4]
    assert log.column("loss").tolist() == [1.0, 1.5, 2.0]
    assert got[-1] == {"step": 4, "loss": 2.0, "skipped": 4}
    assert log.names == list(got[-1]) == ["step", "skipped", "loss"]


def test_what_was_not_logged_is_missing() -> None:
    log = RollingLog(maxlen=None)
    log.append(0, {"loss": 1.0})
    log.append(10, {"accuracy": 0.5})
    np.testing.assert_array_equal(log.column("accuracy"), [np.nan, 0.5])
    assert log.records == [{"step": 0, "loss": 1.0}, {"step": 10, "accuracy": 0.5}]
    with pytest.raises(ValueError, match=r"name='lr' is in no record; there are \['step', 'loss', 'accuracy'\]"):
        log.column("lr")
    assert RollingLog().column("step").tolist() == []


def test_stacked_values_are_those_of_single_steps() -> None:
    losses, shares = np.linspace(2, 1, 7, dtype=np.float32), np.linspace(0, 0.3, 7, dtype=np.float32)
    single, stacked, named = RollingLog(), RollingLog(pull_every=2), RollingLog()
    for step in range(7):
        single.append(100 + step, {"loss": jnp.asarray(losses[step]), "share": shares[step], "epoch": 3})
    for chunk in (slice(0, 4), slice(4, 7)):
        values = {"loss": jnp.asarray(losses[chunk]), "share": shares[chunk], "epoch": 3}
        stacked.append(100 + chunk.start, values)
        named.append(100 + jnp.arange(chunk.start, chunk.stop), values)
    assert single.records == stacked.records == named.records
    np.testing.assert_array_equal(single.column("loss").astype(np.float32), losses)


def test_a_scan_is_logged_as_it_comes() -> None:
    @jax.jit
    def run(value: jax.Array) -> Any:
        return jax.lax.scan(lambda v, _: (v / 2, {"loss": v, "lr": 0.1 * v}), value, length=4)

    log = RollingLog()
    _, stacked = run(jnp.float32(8.0))
    log.append(0, stacked)
    assert log.column("loss").tolist() == [8.0, 4.0, 2.0, 1.0]
    np.testing.assert_allclose(log.column("lr"), [0.8, 0.4, 0.2, 0.1], rtol=1e-6)


def test_a_fetch_is_one_for_many_records(monkeypatch: pytest.MonkeyPatch) -> None:
    fetches = []
    fetch = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: (fetches.append(tree), fetch(tree))[1])
    log = RollingLog(pull_every=4)
    values = {"a": jnp.ones(()), "b": jnp.ones(())}
    with jax.transfer_guard_device_to_host("disallow_explicit"):
        for step in range(3):
            log.append(step, values)
    assert not fetches
    for step in range(3, 11):
        log.append(step, values)
    assert len(fetches) == 2
    assert len(log.column("a")) == 11
    assert len(fetches) == 3
    log.close()
    assert len(fetches) == 3  # nothing was left


@pytest.mark.parametrize(
    ("step", "values", "message"),
    [
        (0, {"step": 1}, "'step' is the name of the step"),
        (0, {"a": jnp.ones(2), "b": jnp.ones(3)}, r"\{'a': 2, 'b': 3\}"),
        (np.arange(2), {"a": jnp.ones(3)}, r"\{'step': 2, 'a': 3\}"),
        (0, {"a": jnp.ones((2, 2))}, r"'a' has shape \(2, 2\) .*must be a real number, or an \(n,\)"),
        (0, {"a": "lr"}, r"'a' has shape \(\) and dtype <U2; it must be a real number"),
        (0, {"a": None}, "'a' has .* dtype object; it must be a real number"),
        (0, {"a": 1j}, "'a' has .* dtype complex128; it must be a real number"),
        (0.5, {"a": 1.0}, "'step' has .* dtype float64; it must be an int"),
    ],
)
def test_values_that_are_no_scalars_are_refused(step: Any, values: dict[str, Any], message: str) -> None:
    log = RollingLog()
    with pytest.raises(ValueError, match=message):
        log.append(step, values)
    assert log.records == []


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="maxlen=0 must be an int >= 1"):
        RollingLog(0)
    with pytest.raises(ValueError, match="pull_every=0 must be an int >= 1"):
        RollingLog(pull_every=0)


def test_appending_inside_jit_says_where_to_append() -> None:
    log = RollingLog()
    with pytest.raises(ValueError, match="'loss' is traced: return it from the jitted function"):
        jax.jit(lambda loss: log.append(0, {"loss": loss}))(1.0)


def test_numbers_read_back_as_the_same_float32(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=50).astype(np.float32) * 10.0 ** np.arange(-25, 25, dtype=np.float32)
    with RollingLog(sinks=[jsonl_sink(tmp_path / "log.jsonl"), csv_sink(tmp_path / "log.csv")]) as log:
        log.append(0, {"v": jnp.asarray(values), "narrow": jnp.asarray(0.1, jnp.bfloat16)})
    for records in (read_jsonl(tmp_path / "log.jsonl"), read_csv(tmp_path / "log.csv")):
        np.testing.assert_array_equal(np.array([record["v"] for record in records]).astype(np.float32), values)
        assert records[0]["narrow"] == float(jnp.asarray(0.1, jnp.bfloat16))
    log = RollingLog(sinks=[jsonl_sink(tmp_path / "short.jsonl")])
    log.append(1, {"lr": jnp.float32(0.1)})
    log.close()
    assert (tmp_path / "short.jsonl").read_text() == '{"step": 1, "lr": 0.1}\n'


@pytest.mark.parametrize(("sink", "read"), [(jsonl_sink, read_jsonl), (csv_sink, read_csv)])
def test_a_run_that_goes_on_appends(tmp_path: Path, sink: Any, read: Any) -> None:
    path = tmp_path / "log"
    for start in (0, 3):
        with RollingLog(sinks=[sink(path)]) as log:
            log.append(start, {"loss": jnp.arange(3.0) + start})
    assert read(path) == [{"step": step, "loss": float(step)} for step in range(6)]


def test_json_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with RollingLog(sinks=[jsonl_sink(path), csv_sink(tmp_path / "log.csv")]) as log:
        log.append(0, {"loss": jnp.array([1.0, jnp.nan, jnp.inf, -jnp.inf])})

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    parsed = [json.loads(line, parse_constant=no_constant)["loss"] for line in path.read_text().splitlines()]
    assert parsed == [1.0, None, None, None]
    np.testing.assert_array_equal([record["loss"] for record in read_jsonl(path)], [1.0, np.nan, np.nan, np.nan])
    in_csv = [record["loss"] for record in read_csv(tmp_path / "log.csv")]
    np.testing.assert_array_equal(in_csv, [1.0, np.nan, np.inf, -np.inf])


@pytest.mark.parametrize(
    ("sink", "read", "torn"),
    [
        (jsonl_sink, read_jsonl, '{"step": 2, "los'),
        (jsonl_sink, read_jsonl, '{"st'),
        (csv_sink, read_csv, "2,0.12"),
        (jsonl_sink, read_jsonl, '{"step": 2, "x": ' + "1" * 200_000),  # longer than what is read at once
    ],
)
def test_a_torn_last_line_is_left_out_and_replaced(tmp_path: Path, sink: Any, read: Any, torn: str) -> None:
    path = tmp_path / "log"
    write: Callable[..., Any] = sink(path)
    write([{"step": 1, "loss": 0.5}])
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode())
    assert read(path) == [{"step": 1, "loss": 0.5}]
    write([{"step": 2, "loss": 0.125}])
    assert read(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.125}]
    assert path.read_bytes().startswith(whole)


@pytest.mark.parametrize(("sink", "torn"), [(jsonl_sink, '{"step": 1'), (csv_sink, "step,lo"), (csv_sink, "ste")])
def test_a_torn_first_line_is_replaced(tmp_path: Path, sink: Any, torn: str) -> None:
    (tmp_path / "log").write_text(torn)
    (tmp_path / "whole").write_text("")
    for name in ("log", "whole"):
        sink(tmp_path / name)([{"step": 1, "loss": 0.5}])
    assert (tmp_path / "log").read_bytes() == (tmp_path / "whole").read_bytes() != b""


@pytest.mark.parametrize("sink", [jsonl_sink, csv_sink])
@pytest.mark.parametrize("content", ["a picture", "name,score\nme,1\nyou,2"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, sink: Any, content: str) -> None:
    path = tmp_path / "log"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"path=.* is no log"):
        sink(path)([{"step": 1, "loss": 0.5}])
    assert path.read_text() == content


def test_csv_takes_new_columns_on_the_right(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    sink = csv_sink(path)
    sink([{"step": 0, "loss": 0.5}, {"step": 1, "loss": float("nan"), "a,b": 1}])
    sink([{"step": 2}])
    sink([{"step": 3, "lr": 0.1}])
    assert path.read_text().splitlines() == ['step,loss,"a,b",lr', "0,0.5,,", "1,nan,1.0,", "2,,,", "3,,,0.1"]
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]
    assert read_csv(path)[2:] == [{"step": 2}, {"step": 3, "lr": 0.1}]


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read_jsonl, '{"step": 1}\n{"step": 2,}\n'),
        (read_jsonl, '{"step": 1}\n[2]\n'),
        (read_jsonl, '{"step": 1}\n{"loss": 2}\n'),
        (read_csv, "step,loss\n1\n"),
        (read_csv, "step,loss\n1,2,3\n"),
        (read_csv, "step,loss\n1,high\n"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, read: Any, text: str) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"line 2: .* is no record of a log"):
        read(path)


def test_an_exception_in_training_loses_no_record(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with pytest.raises(KeyError, match="bug"), RollingLog(sinks=[jsonl_sink(path)]) as log:
        log.append(0, {"loss": jnp.ones(())})
        raise KeyError("bug")
    assert read_jsonl(path) == [{"step": 0, "loss": 1.0}]


KILLED = """
import sys, jax.numpy as jnp
from optax_structure.training.logging import RollingLog, csv_sink, jsonl_sink
log = RollingLog(maxlen=10, pull_every=3, sinks=[jsonl_sink(sys.argv[1]), csv_sink(sys.argv[2])])
for step in range(10**9):
    log.append(step, {"loss": jnp.float32(1 / (step + 1)), "lr": jnp.float32(0.1)})
    print(step + 1, flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_had_flushed(tmp_path: Path) -> None:
    paths = [tmp_path / "log.jsonl", tmp_path / "log.csv"]
    command = [sys.executable, "-c", KILLED, *map(str, paths)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        said = 0
        while said < 200:
            said = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        said = max([said, *(int(line) for line in process.stdout.read().split("\n")[:-1])])
    assert process.returncode == -signal.SIGKILL
    for path, read in zip(paths, (read_jsonl, read_csv), strict=True):
        records = read(path)
        assert [record["step"] for record in records] == list(range(len(records)))
        assert len(records) >= said - said % 3  # all that was flushed when it said so
        assert records[99] == {"step": 99, "loss": float(str(np.float32(0.01))), "lr": 0.1}


def events(folder: Path) -> list[Any]:
    """The scalars of the event files of TensorBoard in a folder, read record by record: length, CRC, data, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_tensorboard_reads_every_scalar(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with RollingLog(pull_every=1, sinks=[tensorboard_sink(tmp_path)]) as log:
        for step, weight in ((5, 0.5), (6, 0.25)):
            log.append(step, {"w_lr/trend": jnp.float32(weight), "loss": jnp.nan})
    found = events(tmp_path)
    assert [(tag, step) for tag, step, _ in found] == [(t, s) for s in (5, 6) for t in ("w_lr/trend", "loss")]
    np.testing.assert_array_equal([value for *_, value in found], [0.5, np.nan, 0.25, np.nan])


def test_a_writer_of_ones_own_is_used_and_stays_open() -> None:
    class Writer:
        def __init__(self) -> None:
            self.got: list[Any] = []

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.got.append((name, value, step))

        def close(self) -> None:
            raise AssertionError("it was not ours to close")

    writer = Writer()
    with RollingLog(sinks=[tensorboard_sink(writer)]) as log:
        log.append(1, {"lr": 0.5})
    assert writer.got == [("lr", 0.5, 1)]


def test_without_tensorboardx_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r'pip install "optax-structure\[tensorboard\]"'):
        tensorboard_sink(tmp_path)


# The picture.


def plausible(steps: int) -> RollingLog:
    log = RollingLog(maxlen=None)
    at = np.arange(steps)
    share = (at / steps).astype(np.float32)
    values = {"loss": 2.0 / (1 + at), "loss_ema": 2.1 / (1 + at), "lr": 0.1 * 0.99**at, "momentum": 0.9 - 0.1 * share}
    weights = {"w_lr/trend": share, "w_lr/variance": 1 - share, "w_momentum/inverse": 0.3, "w_momentum/relative": 0.7}
    log.append(0, {**values, **weights, "share_frozen": share, "pct_frozen": 100 * share, "lr_scale": 0.99**at})
    return log


def test_the_picture_has_a_panel_for_all_that_was_logged() -> None:
    pytest.importorskip("matplotlib")
    figure = plot_control(plausible(60))
    rates, momenta = "weights of the\nrate rules", "weights of the\nmomentum rules"
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "loss", "learning rate", "momentum", rates, momenta, "share frozen",
    ]  # fmt: skip
    loss, rate, momentum, weights, *_, frozen = figure.axes
    assert loss.get_yscale() == rate.get_yscale() == "log"
    np.testing.assert_allclose(rate.lines[0].get_ydata(), 0.1 * 0.99 ** np.arange(60), rtol=1e-6)
    np.testing.assert_allclose(momentum.lines[0].get_ydata()[[0, -1]], [0.9, 0.9 - 0.1 * 59 / 60], rtol=1e-6)
    assert [line.get_label() for line in loss.lines] == ["each step", "running mean"]
    bottom, top = (area.get_paths()[0].vertices for area in weights.collections)  # trend below variance
    assert bottom[:, 1].max() == pytest.approx(59 / 60) and top[:, 1].max() == pytest.approx(1.0)
    assert frozen.get_ylim()[0] == 0 and frozen.lines[0].get_ydata()[30] == pytest.approx(0.5)
    assert {axes.get_xlim() for axes in figure.axes} == {(0, 59)}


def test_what_is_logged_seldom_is_a_line_and_a_step_written_twice_counts_once() -> None:
    pytest.importorskip("matplotlib")
    records = [{"step": step, "loss": 1.0} for step in range(5)]
    records += [{"step": 4, "lr_scale": 0.5}, {"step": 0, "lr_scale": 1.0}, {"step": 3, "loss": float("inf")}]
    loss, scale = plot_control(records).axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [1, 1, 1, np.nan, 1])
    assert scale.get_ylabel() == "learning rate\n/ base rate"
    assert scale.lines[0].get_xydata().tolist() == [[0, 1.0], [4, 0.5]]


def test_several_feedbacks_are_several_lines() -> None:
    pytest.importorskip("matplotlib")
    record = {"head/lr": 0.1, "experts/0/lr": 0.2, "lr/body": 0.3, "head/w_lr/trend": 1.0, "w_lr/momentum": 1.0}
    figure = plot_control([{"step": 1, **record}, {"step": 2, **record}])
    assert [line.get_label() for line in figure.axes[0].lines] == ["head", "experts/0", "body"]
    assert [axes.get_ylabel().partition("\n")[2] for axes in figure.axes[1:]] == ["rate rules\n(head)", "rate rules"]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_file_is_drawn_as_its_log(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    log = plausible(20)
    path = tmp_path / f"log.{ending}"
    {"csv": csv_sink, "jsonl": jsonl_sink}[ending](path)(log.records)
    figure, expected = plot_control(path), plot_control(log)
    for ours, theirs in zip(figure.axes, expected.axes, strict=True):
        assert ours.get_ylabel() == theirs.get_ylabel()
        for one, other in zip(ours.lines, theirs.lines, strict=True):
            np.testing.assert_array_equal(one.get_xydata(), other.get_xydata())


def test_the_picture_is_written_whole(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = RollingLog()
    log.append(3, {"lr": 0.1})  # one point, for which log axes have no natural limits
    plot_control(log, tmp_path / "control.svg")
    assert [path.name for path in tmp_path.iterdir()] == ["control.svg"]
    assert "</svg>" in (tmp_path / "control.svg").read_text()


def test_a_log_without_control_is_refused() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"nothing of the control to draw; it has \['accuracy'\]"):
        plot_control([{"step": 0, "accuracy": 0.5}])


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_control([{"step": 0, "lr": 0.5}])
