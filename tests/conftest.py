"""What every test shares: two CPU devices, a compilation cache of its own, and the folder of the real data.

Imports nothing beyond JAX and pytest, so that the suite of the transformations runs in a bare environment.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path

# Read by JAX once, at its import. Two devices let the mesh tests run anywhere; a GPU is used where it is asked for. The
# suite compiles thousands of tiny programs and runs each for microseconds, so it does without XLA's costly passes: a
# third of the time. The commands of the README and the benchmarks run with all of them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
XLA_FLAGS = os.environ.get("XLA_FLAGS", "")
for flag in ("--xla_force_host_platform_device_count=2", "--xla_backend_optimization_level=0"):
    if flag.split("=")[0] not in XLA_FLAGS:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import pytest

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite on two processes where pytest-xdist is there; named files, and ``-n``, run as asked.

    Not under a debugger, and not with ``--cov``, which has looked for ``-n`` by now: give both.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    alone = config.getoption("usepdb") or config.getoption("cov_source", None)
    if whole and not alone and config.getoption("numprocesses", 0) is None:
        config.option.numprocesses = 2


def pytest_configure(config: pytest.Config) -> None:
    """Give the process a compilation cache: tests compile the same small programs anew, a hit costs a sixth.

    The folder is the process's own and goes with it, so that nothing stale or half-written is ever read.
    """
    folder = tempfile.mkdtemp(prefix="optax_structure_cache_")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


_ENDED = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Forget the compiled programs of the last hundred tests.

    Each holds memory maps, of which Linux gives a process 65,530: the process of a longer suite dies of it.
    """
    if next(_ENDED) % 100 == 0:
        jax.clear_caches()


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder of the four MNIST IDX files, gzipped or not; skips where OPTAX_STRUCTURE_DATA is not set."""
    named = os.environ.get("OPTAX_STRUCTURE_DATA")
    if not named:
        pytest.skip("set OPTAX_STRUCTURE_DATA to the folder that holds the MNIST IDX files")
    folder = Path(named).resolve()
    missing = [name for name in MNIST_FILES if not any((folder / (name + end)).is_file() for end in ("", ".gz"))]
    if missing:
        pytest.fail(f"OPTAX_STRUCTURE_DATA={named} lacks {missing}")
    return folder
