"""Checkpoints: written whole or not at all, refused where they do not fit, and resumed from bit for bit.

The last part kills real processes with SIGKILL: between steps, in the middle of writing a checkpoint, before the first.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from common import child_environment

from optax_structure.structure import Patch, UnitAxis, UnitGroup, Units
from optax_structure.training import checkpoint
from optax_structure.training.checkpoint import CheckpointError, fill, load, save

TREE = {
    "w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3) / 7,
    "deep": {"half": jnp.ones((2,), jnp.bfloat16) / 3, "count": jnp.int32(5), "none": jnp.zeros((0, 4))},
    "mask": jnp.array([True, False]),
    "id": jnp.array([0, 255], jnp.uint8),
}


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 3, TREE, {"note": [1, "two"]})
    arrays, state = load(tmp_path)
    back = fill(TREE, arrays)
    assert path.name == "step-00000003" and state["step"] == 3 and state["note"] == [1, "two"]
    for old, new in ((TREE["w"], back["w"]), (TREE["mask"], back["mask"]), (TREE["id"], back["id"])):
        assert old.dtype == new.dtype and np.asarray(old).tobytes() == np.asarray(new).tobytes()
    for name in ("half", "count", "none"):
        old, new = TREE["deep"][name], back["deep"][name]
        assert old.dtype == new.dtype and old.shape == new.shape
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()


def test_no_pickle_is_written(tmp_path: Path) -> None:
    path = save(tmp_path, 0, TREE, {})
    assert sorted(file.name for file in path.iterdir()) == ["arrays.npz", "state.json"]
    with np.load(path / "arrays.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype == np.uint8 for name in arrays)
    json.loads((path / "state.json").read_text())


def test_the_last_two_stay(tmp_path: Path) -> None:
    for step in range(5):
        save(tmp_path, step, TREE, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


class Crash(BaseException):
    """Stands for the death of the process: nothing in the code catches it."""


def crash_after(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, calls: int) -> None:
    real, left = getattr(module, name), [calls]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not left[0]:
            raise Crash
        left[0] -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)


@pytest.mark.parametrize(("name", "calls"), [("fsync", 0), ("fsync", 1), ("fsync", 2), ("rename", 0), ("fsync", 3)])
def test_a_crash_anywhere_in_save_leaves_a_usable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int
) -> None:
    save(tmp_path, 1, {"w": jnp.full(3, 1.0)}, {})
    with monkeypatch.context() as patch:
        crash_after(patch, os, name, calls)
        with pytest.raises(Crash):
            save(tmp_path, 2, {"w": jnp.full(3, 2.0)}, {})
    arrays, state = load(tmp_path)
    assert arrays["w"].tolist() == [state["step"]] * 3
    assert state["step"] == (2 if (name, calls) == ("fsync", 3) else 1)
    save(tmp_path, 3, {"w": jnp.full(3, 3.0)}, {})
    assert not list(tmp_path.glob(".*"))
    assert load(tmp_path)[1]["step"] == 3


@pytest.mark.parametrize("damage", ["truncate", "flip", "json", "missing"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1, {"w": jnp.full(3, 1.0)}, {})
    newest = save(tmp_path, 2, {"w": jnp.full(3, 2.0)}, {})
    content = (newest / "arrays.npz").read_bytes()
    if damage == "truncate":
        (newest / "arrays.npz").write_bytes(content[:50])
    elif damage == "flip":
        (newest / "arrays.npz").write_bytes(content[:60] + bytes([content[60] ^ 1]) + content[61:])
    elif damage == "json":
        (newest / "state.json").write_text("{")
    else:
        (newest / "arrays.npz").unlink()
    assert load(tmp_path)[1]["step"] == 1
    save(tmp_path, 2, {"w": jnp.full(3, 2.0)}, {})
    assert load(tmp_path)[1]["step"] == 2
    (tmp_path / "step-00000001" / "state.json").unlink()
    (tmp_path / "step-00000002" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        load(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load(tmp_path)
    assert not checkpoint.exists(tmp_path)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.zeros((2, 4))}, r"holds w as float32\(2, 3\), the run needs float32\(2, 4\)"),
        ({"w": jnp.zeros((2, 3), jnp.bfloat16)}, r"holds w as float32\(2, 3\), the run needs bfloat16\(2, 3\)"),
        ({"w": jnp.zeros((2, 3)), "v": jnp.zeros(2)}, "lacks v"),
        ({}, "holds w, which the run does not have"),
    ],
)
def test_another_architecture_is_refused(like: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"{message}.*another architecture"):
        fill(like, {"w": np.zeros((2, 3), np.float32)})


def test_units_round_trip() -> None:
    units = Units(
        (
            UnitGroup("input", 4, (UnitAxis("a/kernel", 0, "outgoing"),)),
            UnitGroup("a", 3, (UnitAxis("a/kernel", 1, "incoming"), UnitAxis("a/bias", 0, "bias"))),
            UnitGroup("b", 2, (UnitAxis("b/kernel", 0, "outgoing", 9),)),
        ),
        (Patch("patch_0", "b", (0, 2), (1,)),),
    )
    record = json.loads(json.dumps(checkpoint.units_to_json(units)))
    assert checkpoint.units_from_json(record) == units
    assert hash(checkpoint.units_from_json(record)) == hash(units)


# --- Real processes -------------------------------------------------------------------------------------------------

# It imports everything once and forks for every run, before JAX has started: each run is a process of its own.
PARENT = """
import os, signal, sys, warnings
import numpy as np
from pathlib import Path
from optax_structure.training import Config, checkpoint, load_data, run_growth

config = Config(
    widths=(24, 16), density=0.1, final_density=0.25, actions=("connections", "widen", "patches", "insert"), events=4,
    epochs=40, rewire_every=40, warmup=20, seed=3, placement="gradient",
)
data = load_data("digits")
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def run(folder, out, kill_step, kill_writing):
    writes, real = [], checkpoint._write

    def write(path, content):
        writes.append(path)
        if len(writes) == kill_writing:
            path.write_bytes(content[: len(content) // 2])
            die()
        real(path, content)

    def watch(progress, run):
        if progress.step == kill_step:
            die()

    checkpoint._write = write
    result = run_growth(config, data, folder=folder, resuming=True, checkpoint_every=50, watch=watch)
    events = [[event["action"], event["step"], event["nonzero_after"]] for event in result.events]
    final = [result.final[name] for name in ("test_accuracy", "nonzero", "retraces")]
    np.savez(out, loss=result.run.history.loss, nonzero=result.run.history.nonzero, events=np.array(events, str),
             final=np.array(final))

for line in sys.stdin:
    folder, out, kill_step, kill_writing = line.rstrip().split("|")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from Python 3.12 on it warns of threads: none of them runs yet
        child = os.fork()
    if not child:
        signal.alarm(300)
        run(Path(folder), out, int(kill_step), int(kill_writing))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def child() -> Iterator[Callable[..., int]]:
    """``(folder, out, kill_step, kill_writing) -> exit status`` of a run in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PARENT],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        stdin, stdout = parent.stdin, parent.stdout

        def run(folder: Path, out: Path, kill_step: int = 0, kill_writing: int = 0) -> int:
            print(folder, out, kill_step, kill_writing, sep="|", file=stdin, flush=True)
            status = int(stdout.readline())
            assert status in (0, -signal.SIGKILL), "see the captured output"
            return status

        yield run
        stdin.close()


@pytest.mark.slow
def test_killed_many_times_the_run_is_bit_identical(tmp_path: Path, child: Callable[..., int]) -> None:
    pytest.importorskip("sklearn")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    out = tmp_path / "killed.npz"
    assert child(whole, tmp_path / "whole.npz") == 0
    # Before the first checkpoint: the run starts again. Each checkpoint is two writes.
    assert child(killed, out, kill_step=20) != 0
    assert not checkpoint.exists(killed)
    # In the middle of the third checkpoint's arrays, which follows the first growth event.
    assert child(killed, out, kill_writing=5) != 0
    assert len(list(killed.glob("step-*"))) == 2 and list(killed.glob(".step-*"))
    # After three growths, one of them a change of shape; then once more in the middle of the JSON.
    assert child(killed, out, kill_step=110) != 0
    step = load(killed)[1]["step"]
    assert len(load(killed)[1]["host"]["events"]) >= 3 and step < 110
    assert child(killed, out, kill_writing=4) != 0
    assert child(killed, out) == 0
    with np.load(tmp_path / "whole.npz") as expected, np.load(out) as got:
        assert len(expected["loss"]) == 400 and len(expected["loss"]) - step > 100
        for name in ("loss", "nonzero", "events", "final"):
            assert expected[name].tobytes() == got[name].tobytes(), name
