"""The layers of an NNX model, with gates."""

from __future__ import annotations

import functools
import operator
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from optax_structure._tree import leaves_by_path
from optax_structure.nn.gating.run import Paths, Run, gated_modules, under, within
from optax_structure.transforms.freezing.gates import gated

_GATE = "_optax_structure_gate"


def nnx_call(model: nnx.Module, expressions: Sequence[re.Pattern[str]]) -> tuple[Callable[..., Any], Any]:
    graphdef, own, bound = nnx.split(model, nnx.Param, ...)
    bound = jax.tree.map(lambda leaf: leaf, bound)  # as it is now, whatever becomes of the model's
    leaves = list(leaves_by_path(own))
    # A parameter that several modules hold has one path, that of the first; one that is a tree has several.
    names = {id(leaf): "/".join(map(str, path)) for path, leaf in nnx.iter_graph(model) if isinstance(leaf, nnx.Param)}
    candidates = {}
    for path, module in nnx.iter_modules(model):
        params = [names[id(leaf)] for _, leaf in nnx.iter_graph(module) if isinstance(leaf, nnx.Param)]
        held = tuple(leaf for leaf in leaves if any(leaf == name or within(leaf, name) for name in params))
        if held and callable(module) and not isinstance(module, nnx.bridge.ToNNX):  # ToNNX reads all its attributes
            candidates["/".join(map(str, path))] = held
    whole, single = gated_modules(candidates, expressions)
    layers = whole | single

    def call(run: Run, params: Any, rest: Any, args: Any, kwargs: Any) -> tuple[Any, Any, dict[str, str]]:
        if nnx.state(rest, nnx.Param):
            raise ValueError("rest= holds parameters: pass nnx.state(model, nnx.Not(nnx.Param)).")
        run.whole = whole
        # Copies: a call that writes to a Variable (batch statistics) must not write to the caller's.
        merged = nnx.merge(graphdef, params, rest, copy=True)
        for path, module in list(nnx.iter_modules(merged)):
            name = "/".join(map(str, path))
            if name in layers:
                # A constant of the module's: it goes along into nnx.remat and nnx.scan.
                setattr(module, _GATE, _Gate(run, name, layers[name]))
                module.__class__ = _with_gate(type(module))
        outputs = merged(*args, **kwargs)
        after = nnx.state(merged, nnx.Not(nnx.Param))
        kinds = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(after)}
        modules = {path: path.rpartition("/")[0] for path, leaf in kinds.items() if isinstance(leaf, nnx.BatchStat)}
        return outputs, after, modules

    return call, bound


class _Gate:
    """What a module of a gated NNX model knows of its call. Equal to itself alone, so that no cache takes it over."""

    def __init__(self, run: Run, path: str, paths: Paths):
        self.run, self.paths = run, paths
        self.shared = under(path, paths) != paths


@functools.cache
def _with_gate(kind: type[nnx.Module]) -> type[nnx.Module]:
    """The class of modules with a gate: ``kind`` with another call."""

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = getattr(self, _GATE).run
        if run.inside or not run.levels:
            return kind.__call__(self, *args, **kwargs)
        return _call_gated(kind.__call__, self, args, kwargs)

    is_pytree = getattr(kind, "_pytree__is_pytree", True)
    options = {} if is_pytree else {"pytree": False}  # not every base class passes it on
    return types.new_class(kind.__name__, (kind,), options, lambda body: body.update(__call__=call))


def _call_gated(fn: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
    """``fn(module, ...)`` as a pure function of the module's parameters, of its other state and of the inputs."""
    gate: _Gate = getattr(module, _GATE)
    run = gate.run
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
    nodes = [leaf for leaf in leaves if _is_node(leaf)]  # such as the Rngs that a dropout is handed
    inputs = [None if _is_node(leaf) else leaf for leaf in leaves]
    graphdef, params, others = nnx.split(
        (module, nodes), lambda path, leaf: _is_own(path, leaf) and run.is_own(gate.paths, leaf), ...
    )
    computed = any(_is_own(path, leaf) for path, leaf in nnx.to_flat_state(others))

    writes: set[Any] | None = None  # what the call writes to; JAX may ask for it twice, and wants one answer

    def pure(params: Any, others: Any, inputs: list[Any]) -> Any:
        nonlocal writes
        before = {path: jax.tree.leaves(leaf) for path, leaf in nnx.to_flat_state(others)}
        module, nodes = nnx.merge(graphdef, params, others, copy=True)
        rest = iter(nodes)
        filled = [next(rest) if _is_node(leaf) else value for leaf, value in zip(leaves, inputs, strict=True)]
        args, kwargs = jax.tree.unflatten(treedef, filled)
        outputs = run.plainly(fn, module, *args, **kwargs)
        after = dict(nnx.to_flat_state(nnx.state((module, nodes), nnx.Not(_is_own))))
        if writes is None:
            writes = {path for path, leaf in after.items() if not _same(before.get(path), jax.tree.leaves(leaf))}
        return outputs, nnx.from_flat_state({path: after[path] for path in after if path in writes})

    outputs, written = gated(pure)(run.gate(gate.paths, shared=gate.shared or computed), params, others, inputs)
    if jax.tree.leaves(written):
        nnx.update((module, nodes), written)
    return outputs


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Pytree | nnx.Variable)


def _is_own(path: Any, leaf: Any) -> bool:
    """Of ``(module, nodes)``: the module's parameters."""
    return path[0] == 0 and isinstance(leaf, nnx.Param)


def _same(one: Any, other: list[Any]) -> bool:
    return one is not None and len(one) == len(other) and all(map(operator.is_, one, other))
