"""Everything that the documentation shows is run: the README's Python blocks and the examples of all docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", "examples/migrating.md", "examples/from_jaxpruner.md")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "optax_structure").rglob("*.py")
    if path.name != "__main__.py"
)


def fenced(text: str, language: str) -> list[str]:
    """The fenced code blocks of one language, each padded with newlines so that tracebacks show the page's lines."""
    blocks = re.finditer(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return ["\n" * text.count("\n", 0, block.start(1)) + block.group(1) for block in blocks]


def load(name: str) -> ModuleType:
    """A module of the package; skips where it needs a package of an extra that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("optax_structure"):
            raise
        pytest.skip(f"{name} needs {error.name}")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order(page: str) -> None:
    if page.startswith("examples/"):
        pytest.importorskip("flax")
    blocks = fenced((ROOT / page).read_text(encoding="utf-8"), "python")
    assert blocks, f"{page} shows no Python"
    namespace: dict[str, object] = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


def test_readme_starts_with_the_two_commands() -> None:
    run, test = (block.strip() for block in fenced(README, "bash")[:2])
    for command in (run, test):
        assert "\n" not in command, "a reader copies one line"
        words = shlex.split(command)
        assert words[:4] == ["python3", "-m", "venv", ".venv"], "it needs nothing but Python and pip"
    assert "optax-structure grow" in run
    assert "pytest" in test


# Those whose examples train or compile the most.
SLOW = {
    f"optax_structure.{name}"
    for name in (
        "nn.fast", "presets.levels", "sparsity.patterns", "training.controls", "training.network", "training.prune",
        "transforms.rewiring.rules",
    )
}  # fmt: skip


def test_the_slow_examples_are_of_modules_that_exist() -> None:
    assert set(MODULES) >= SLOW


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODULES]
)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(load(name), optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples failed; see the captured output"


def public_functions() -> list[tuple[str, object]]:
    oxs = importlib.import_module("optax_structure")
    names = getattr(oxs, "__all__", [name for name in vars(oxs) if not name.startswith("_")])
    return [(name, getattr(oxs, name)) for name in names if inspect.isroutine(inspect.unwrap(getattr(oxs, name)))]


def test_public_functions_are_documented() -> None:
    lacking = {}
    for name, function in public_functions():
        doc = inspect.getdoc(function) or ""
        wanted = [">>>", *(["Args:"] if inspect.signature(function).parameters else [])]
        if any(part not in doc for part in wanted):
            lacking[name] = [part for part in wanted if part not in doc]
    assert lacking == {}
