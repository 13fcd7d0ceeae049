"""One call of a gated model: the levels of its layers, which module is a layer, and which statistics stay."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state

from optax_structure._tree import leaves_by_path, map_with_path
from optax_structure.transforms.freezing.gates import OPEN, WEIGHTS, checked_level

Paths = tuple[str, ...]


class Run:
    """One call of a gated model. Its modules find in it their gates; they hold it as they hold a constant."""

    def __init__(self, levels: Mapping[str, Any]):
        for level in levels.values():
            checked_level(level)
        self.levels = levels
        self.arrays: dict[str, Any] = {}
        self.used: set[str] = set()
        self.whole: dict[str, Paths] = {}
        self.inside = False
        self.trace = get_opaque_trace_state(convention="flax")

    def shut(self, params: Any) -> Any:
        """Params without a gradient where the gate is closed, however they are read."""

        def shut(path: str, leaf: Any) -> Any:
            self.arrays[path] = _where(self.levels[path] > OPEN, jax.lax.stop_gradient(leaf), leaf)
            return self.arrays[path]

        return map_with_path(shut, params)

    def is_own(self, paths: Paths, leaf: Any) -> bool:
        """Whether what a layer has for a parameter is that parameter, and not something computed from others.

        In an inner trace (remat, scan, jit) all are new, and nobody can tell.
        """
        known = {id(self.arrays[path]) for path in paths}
        return self._is_inner() or all(id(array) in known for array in jax.tree.leaves(leaf))

    def gate(self, paths: Paths, *, shared: bool = False) -> list[Any]:
        """The levels of the parameters of one layer, in the call that is being made.

        ``shared``: what else reaches it may come from an open layer.
        """
        again = shared or not self.used.isdisjoint(paths) or self._is_inner()
        self.used.update(paths)
        levels = [self.levels[path] for path in paths]
        if not again:
            return levels
        # Inputs of a later call, or of one in a loop, may come from what is open.
        return [min(level, WEIGHTS) if isinstance(level, int) else jnp.minimum(level, WEIGHTS) for level in levels]

    def _is_inner(self) -> bool:
        return get_opaque_trace_state(convention="flax") != self.trace

    def check_called(self) -> None:
        """Raise for a module that was to be gated whole and was never called: its layers have no gates either."""
        for name, paths in self.whole.items():
            if self.used.isdisjoint(paths):
                raise ValueError(f"at: the model never calls {name!r} itself, so it has no gate; name what it calls.")

    def plainly(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call what is gated already: the layers in it have no gates of their own."""
        before, self.inside = self.inside, True
        try:
            return fn(*args, **kwargs)
        finally:
            self.inside = before


def _where(flag: Any, yes: Any, no: Any) -> Any:
    if isinstance(flag, bool | np.bool_):
        return yes if flag else no
    return jnp.where(flag, yes, no)


def under(path: str, paths: Iterable[str]) -> Paths:
    return tuple(leaf for leaf in paths if not path or leaf.startswith(f"{path}/"))


def keep_statistics(levels: Mapping[str, Any], modules: Mapping[str, str], before: Any, after: Any) -> Any:
    """``after`` with what stays of its statistics, each a path in it with the path of its module."""
    old = leaves_by_path(before)

    def kept(path: str, new: Any) -> Any:
        if path not in modules or path not in old:
            return new
        module = modules[path]
        while module and not under(module, levels):
            module = module.rpartition("/")[0]
        flags = [levels[leaf] > OPEN for leaf in under(module, levels)]
        return _where(functools.reduce(operator.and_, flags), old[path], new) if flags else new

    return map_with_path(kept, after)


def gated_modules(
    candidates: Mapping[str, Paths], expressions: Sequence[re.Pattern[str]]
) -> tuple[dict[str, Paths], dict[str, Paths]]:
    """Which modules are gated: the outermost that an expression matches (whole), and the innermost with parameters.

    Candidates are the paths of modules that may be called, each with its parameters.
    """
    whole: dict[str, Paths] = {}
    for expression in expressions:
        found = [path for path in candidates if expression.search(path)]
        if not found:
            raise ValueError(
                f"at: {expression.pattern!r} matches no module with parameters; there are {sorted(candidates)}."
            )
        whole |= {path: candidates[path] for path in found}
    whole = {path: of for path, of in whole.items() if not any(within(path, other) for other in whole)}
    rest = [path for path in candidates if path not in whole and not any(within(path, other) for other in whole)]
    return whole, {path: candidates[path] for path in rest if not any(within(other, path) for other in candidates)}


def within(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}/"))
