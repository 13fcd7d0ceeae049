"""Gates in Flax models as they are: frozen layers leave the backward pass, without a line of the model changed."""

from __future__ import annotations

import functools
import operator
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.core import lift
from flax.linen.transforms import lift_direct_transform
from jax.extend.core import get_opaque_trace_state

from optax_structure._tree import align, leaves_by_path, map_with_path
from optax_structure.transforms.freezing.gates import OPEN, WEIGHTS, gated

Paths = tuple[str, ...]


def gate_model(
    model: nnx.Module | linen.Module,
    rest: Any = None,
    *,
    at: Sequence[str] | None = None,
    freeze_statistics: bool = True,
    return_rest: bool = False,
) -> Callable[..., Any]:
    """A function ``(params, gates, *inputs) -> outputs`` of an NNX or Linen model whose frozen layers skip their work.

    The outputs are the model's own. In the backward pass every *layer* (a module that owns parameters and is called:
    ``Linear``, ``Dense``, ``Conv``, ``LayerNorm``, ``BatchNorm``, ``Embed``, the sparse layers, yours) runs through
    ``optax_structure.gated`` with its part of the gates: the products behind a closed gate are branches that are not
    taken, at run time, and nothing is traced again when gates move. With gates that are Python ints they are not in the
    program at all. Gradients of what is open are the plain model's, those of what is closed are exactly 0: also of
    parameters that are read without a layer's call (tied embeddings, a class token), whose products are not saved.

    The function is pure: use it inside ``jax.jit``, ``jax.grad``, ``jax.vmap`` (right, and nothing is saved) or
    ``lax.scan``. Level 2, which ends the backward pass, counts where the model itself calls a layer, and in the first
    call of its parameters: in later calls, and inside ``remat``, ``scan`` or ``jit`` of a part of the model, it counts
    as 1, because the inputs there may come from an open layer. A block that is gated whole (``at``) has its gate
    outside, and saves all.

    Args:
      model: an NNX module (read once, here, for its structure and the state that is not ``nnx.Param``) or an unbound
        Linen module.
      rest: what the model needs beside its params, as ``nn.capture`` takes it. A call may pass another one as
        ``rest=``.
      at: regular expressions of module paths (``re.search`` on ``"encoder/blocks/0"``): those modules are gated whole,
        by the smallest level of all their parameters. In a transformer block attention's own products are then skipped
        at level 2 too. The outermost match counts; everything else is gated layer by layer.
      freeze_statistics: whether the running statistics (``nnx.BatchStat``, Linen's ``batch_stats``) of a module whose
        parameters are all behind closed gates stay as they are. A norm without parameters goes by the nearest module
        around it that has some.
      return_rest: whether the function returns ``(outputs, rest)``, the state after the call. Without it changes of
        that state are dropped (NNX) or raise (Linen).

    Returns:
      The function. ``gates`` is what ``optax_structure.gates`` returns: a tree of levels with the structure of params,
      or one level for all. Keyword arguments other than ``rest`` go to the model (Linen: to ``Module.apply``).

    Raises:
      ValueError: for an expression that matches no module with parameters (Linen: when called), naming those there are;
        when called, for gates of another structure or of other values than levels.
      TypeError: for a model of neither kind, and for ``at`` that is one string.

    Example:
      >>> import jax, jax.numpy as jnp, optax_structure as oxs
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> model = nn.MLP([8, 6, 4, 2], rngs=nnx.Rngs(0))
      >>> params, apply = nnx.state(model, nnx.Param), nn.gate_model(model)
      >>> depths = oxs.layer_depths(params, model.layer_names)
      >>> gates = oxs.gates(jax.tree.map(lambda depth: depth < 2, depths), depths)  # the first two of three frozen
      >>> grads = jax.grad(lambda params: apply(params, gates, jnp.ones((3, 8))).sum())(params)
      >>> {name: bool(grads[name]["kernel"][...].any()) for name in model.layer_names}
      {'hidden_1': False, 'hidden_2': False, 'head': True}
    """
    if isinstance(at, str):
        raise TypeError(f"at={at!r} must be a list of regular expressions, such as [{at!r}].")
    expressions = [re.compile(expression) for expression in at or ()]
    if isinstance(model, nnx.Module):
        call, bound = _nnx_call(model, expressions)
        default = bound if rest is None else rest
    elif isinstance(model, linen.Module):
        call, default = _linen_call(model, expressions, return_rest), {} if rest is None else rest
    else:
        raise TypeError(f"model must be a flax.nnx or flax.linen Module, got {type(model).__name__}.")

    def apply(params: Any, gates: Any, *args: Any, rest: Any = None, **kwargs: Any) -> Any:
        rest = default if rest is None else rest
        run = _Run(leaves_by_path(align(gates, params, "gates")))
        try:
            outputs, after, modules = call(run, run.shut(params), rest, args, kwargs)
            if not return_rest:
                return outputs
            return outputs, _keep_statistics(run.levels, modules, rest, after) if freeze_statistics else after
        finally:
            run.levels = {}  # the modules of a program that outlives the call hold no tracers

    return apply


class _Run:
    """One call of a gated model. Its modules find in it their gates; they hold it as they hold a constant."""

    def __init__(self, levels: Mapping[str, Any]):
        self.levels = levels
        self.used: set[str] = set()
        self.inside = False
        self.trace = get_opaque_trace_state(convention="flax")

    def shut(self, params: Any) -> Any:
        """Params without a gradient where the gate is closed, however they are read."""

        def shut(path: str, leaf: Any) -> Any:
            return _where(self.levels[path] > OPEN, jax.lax.stop_gradient(leaf), leaf)

        return map_with_path(shut, params)

    def gate(self, paths: Paths, *, shared: bool = False) -> list[Any]:
        """The levels of the parameters of one layer, in the call that is being made."""
        again = shared or not self.used.isdisjoint(paths) or get_opaque_trace_state(convention="flax") != self.trace
        self.used.update(paths)
        levels = [self.levels[path] for path in paths]
        if not again:
            return levels
        # Inputs of a later call, or of one in a loop, may come from what is open.
        return [min(level, WEIGHTS) if isinstance(level, int) else jnp.minimum(level, WEIGHTS) for level in levels]

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


def _under(path: str, paths: Iterable[str]) -> Paths:
    return tuple(leaf for leaf in paths if not path or leaf.startswith(f"{path}/"))


def _keep_statistics(levels: Mapping[str, Any], modules: Mapping[str, str], before: Any, after: Any) -> Any:
    """``after`` with what stays of its statistics, each a path in it with the path of its module."""
    old = leaves_by_path(before)

    def kept(path: str, new: Any) -> Any:
        if path not in modules or path not in old:
            return new
        module = modules[path]
        while module and not _under(module, levels):
            module = module.rpartition("/")[0]
        flags = [levels[leaf] > OPEN for leaf in _under(module, levels)]
        return _where(functools.reduce(operator.and_, flags), old[path], new) if flags else new

    return map_with_path(kept, after)


def _gated_modules(candidates: Mapping[str, Paths], expressions: Sequence[re.Pattern[str]]) -> dict[str, Paths]:
    """Which modules are gated: the outermost that an expression matches, then the innermost with parameters.

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
    whole = {path: of for path, of in whole.items() if not any(_within(path, other) for other in whole)}
    rest = [path for path in candidates if path not in whole and not any(_within(path, other) for other in whole)]
    return whole | {path: candidates[path] for path in rest if not any(_within(other, path) for other in candidates)}


def _within(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}/"))


# NNX

_GATE = "_optax_structure_gate"


def _nnx_call(model: nnx.Module, expressions: Sequence[re.Pattern[str]]) -> tuple[Callable[..., Any], Any]:
    graphdef, _, bound = nnx.split(model, nnx.Param, ...)
    # A parameter that several modules hold has one path, that of the first.
    names = {id(leaf): "/".join(map(str, path)) for path, leaf in nnx.iter_graph(model) if isinstance(leaf, nnx.Param)}
    candidates = {}
    for path, module in nnx.iter_modules(model):
        held = tuple(names[id(leaf)] for _, leaf in nnx.iter_graph(module) if isinstance(leaf, nnx.Param))
        if held and callable(module):
            candidates["/".join(map(str, path))] = held
    layers = _gated_modules(candidates, expressions)

    def call(run: _Run, params: Any, rest: Any, args: Any, kwargs: Any) -> tuple[Any, Any, dict[str, str]]:
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

    def __init__(self, run: _Run, path: str, paths: Paths):
        self.run, self.paths = run, paths
        self.shared = _under(path, paths) != paths


@functools.cache
def _with_gate(kind: type[nnx.Module]) -> type[nnx.Module]:
    """The class of modules with a gate: ``kind`` with another call."""

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = getattr(self, _GATE).run
        if run.inside or not run.levels:
            return kind.__call__(self, *args, **kwargs)
        return _call_gated(kind.__call__, self, args, kwargs)

    options = {"pytree": getattr(kind, "_pytree__is_pytree", True)}
    return types.new_class(kind.__name__, (kind,), options, lambda body: body.update(__call__=call))


def _call_gated(fn: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
    """``fn(module, ...)`` as a pure function of the module's parameters, of its other state and of the inputs."""
    gate: _Gate = getattr(module, _GATE)
    run = gate.run
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
    nodes = [leaf for leaf in leaves if _is_node(leaf)]  # such as the Rngs that a dropout is handed
    inputs = [None if _is_node(leaf) else leaf for leaf in leaves]
    graphdef, params, others = nnx.split((module, nodes), _is_own, ...)

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

    outputs, written = gated(pure)(run.gate(gate.paths, shared=gate.shared), params, others, inputs)
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


# Linen


def _linen_call(model: linen.Module, expressions: Sequence[re.Pattern[str]], return_rest: bool) -> Callable[..., Any]:
    def call(run: _Run, params: Any, rest: Any, args: Any, kwargs: Any) -> tuple[Any, Any, dict[str, str]]:
        candidates = {}
        for leaf in run.levels:
            module = leaf
            while module:
                module = module.rpartition("/")[0]
                candidates[module] = _under(module, run.levels)
        layers = _gated_modules(candidates, expressions)

        def interceptor(next_fun: Any, args: Any, kwargs: Any, context: linen.module.InterceptorContext) -> Any:
            module = context.module
            path = "/".join(module.path)
            if context.method_name != "__call__" or run.inside or path not in layers:
                return next_fun(*args, **kwargs)
            transform = functools.partial(_lifted, run, layers[path])
            return lift_direct_transform(transform, (type(module).__call__,), module, *args, **kwargs)

        with linen.intercept_methods(interceptor):
            outputs = model.apply(
                {"params": params, **rest}, *args, mutable=[*rest] if return_rest else False, **kwargs
            )
        if not return_rest:
            return outputs, rest, {}
        outputs, after = outputs
        statistics = leaves_by_path(after.get("batch_stats", {}))
        return outputs, dict(after), {f"batch_stats/{path}": path.rpartition("/")[0] for path in statistics}

    return call


def _lifted(run: _Run, paths: Paths, fn: Callable[..., Any], scopes: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of a bound module through ``gated``, as Flax lifts ``jax.checkpoint``."""
    counters = [_copied(scope.rng_counters) for scope in scopes]

    def inner(scope_fn: Any, repack_fn: Any, variables: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        params, others = variables

        def pure(params: Any, others: Any, rngs: Any, args: Any, kwargs: Any) -> Any:
            own = scope_fn((params, others), rngs)
            # JAX may call this twice, for the value and for the gradient: with the same keys.
            for scope, before in zip(own, counters, strict=True):
                scope.rng_counters = _copied(before)
            outputs = run.plainly(fn, own, *args, **kwargs)
            for scope, outer in zip(own, scopes, strict=True):
                _overwrite(outer.rng_counters, scope.rng_counters)
            return outputs, repack_fn(own)

        return gated(pure)(run.gate(paths), params, others, rngs, args, kwargs)

    return lift.pack(inner, ("params", True), (True,), (True,), enable_kwargs=True)(scopes, *args, **kwargs)


def _copied(counters: Mapping[Any, Any]) -> dict[Any, Any]:
    """Flax's counts of the keys drawn from a scope and, nested in them, from the scopes in it."""
    return {name: _copied(count) if isinstance(count, dict) else count for name, count in counters.items()}


def _overwrite(old: dict[Any, Any], new: Mapping[Any, Any]) -> None:
    """In place: scopes that exist hold their part of the counts."""
    for name, count in new.items():
        if isinstance(count, dict) and name in old:
            _overwrite(old[name], count)
        else:
            old[name] = count
