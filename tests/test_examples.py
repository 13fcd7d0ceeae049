"""The examples run as the scripts that a reader starts: real processes, at tiny size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from common import child_environment

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Those that `--tiny` makes small; the others are small by themselves.
TINY = {path for path in EXAMPLES if "--tiny" in path.read_text()}


def test_there_are_examples() -> None:
    assert TINY
    assert set(EXAMPLES) > TINY


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, str(path), *(["--tiny"] if path in TINY else [])],
        cwd=tmp_path,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
