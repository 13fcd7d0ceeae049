"""The layout of the package: who may import whom, what the core may import, how long a module may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "optax_structure"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A module imports its own part and the parts in the rows above; the parts of one row do not know each other.
ROWS = (
    {"_tree"},
    {"labels", "structure", "schedules", "extrema", "sparsity", "accounting"},
    {"state"},
    {"transforms"},
    {"presets"},
    {"growth"},
    {"nn"},
    {"training"},
    {"search"},
    {"cli"},
)
RANK = {part: rank for rank, row in enumerate(ROWS) for part in row} | {"__init__": 5.5, "__main__": len(ROWS)}
CORE = {"jax", "jaxlib", "numpy", "optax", "optax_structure"}
HEAVY_PARTS = {"nn", "training", "search", "cli", "__main__"}
HEAVY = ("flax", "rich", "matplotlib", "sklearn", "orbax", "ray")
MAX_LINES = 400


def part_of(module: Path) -> str:
    """The part of the package that a file belongs to."""
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(module: Path) -> Iterator[str]:
    """The dotted names that a file imports, wherever in the file, relative ones resolved."""
    package = ("optax_structure", *module.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*parents, *([node.module] if node.module else [])))
            # `from optax_structure import nn` names a part, `from optax_structure.nn import x` names it already.
            yield from (f"{base}.{alias.name}" for alias in node.names) if base == "optax_structure" else (base,)


def ids(module: Path) -> str:
    return str(module.relative_to(ROOT))


@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_imports_point_one_way(module: Path) -> None:
    part = part_of(module)
    assert part in RANK, f"{part} has no place in the order of the package: add it to ROWS"
    for name in imported(module):
        if not name.startswith("optax_structure."):
            continue
        other = name.split(".")[1]
        if other in RANK:
            assert other == part or RANK[other] < RANK[part], f"{ids(module)} imports {name}"
        else:
            # A public name of the root package: only what stands above the root may read it from there.
            assert RANK[part] > RANK["__init__"], f"{ids(module)} imports {name} from the root; name its module"


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) not in HEAVY_PARTS], ids=ids)
def test_core_imports_jax_optax_and_numpy_only(module: Path) -> None:
    tops = {name.split(".")[0] for name in imported(module)}
    assert tops - CORE - set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_modules_stay_short(module: Path) -> None:
    lines = len(module.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{ids(module)} has {lines} lines: split it"


def test_importing_the_package_loads_no_heavy_module() -> None:
    code = f"import sys, optax_structure; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_names_of_the_readme_exist() -> None:
    oxs = pytest.importorskip("optax_structure")
    pytest.importorskip("flax")
    pytest.importorskip("matplotlib")
    import optax_structure.nn
    import optax_structure.training  # noqa: F401  (the README names nn.* and training.*, which the root does not import)

    page = (ROOT / "README.md").read_text(encoding="utf-8")
    name = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
    rows = page.partition("## What there is")[2].partition("\n##")[0].splitlines()
    table = [row.split("|")[2] for row in rows if row.startswith("| ") and not row.startswith("| for ")]
    names = {*re.findall(rf"\boxs\.({name})", page), *re.findall(rf"`({name})`", " ".join(table))}
    assert len(names) > 20, "the table of what there is was not found"

    def exists(name: str) -> bool:
        found: object = oxs
        for attribute in name.split("."):
            found = getattr(found, attribute, None)
        return found is not None

    assert sorted(name for name in names if not exists(name)) == []
