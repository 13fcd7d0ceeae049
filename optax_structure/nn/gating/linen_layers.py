"""The layers of a Linen model, with gates."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen
from flax.core import lift
from flax.linen.transforms import lift_direct_transform

from optax_structure._tree import leaves_by_path
from optax_structure.nn.gating.run import Paths, Run, gated_modules, under
from optax_structure.transforms.freezing.gates import gated


def linen_call(model: linen.Module, expressions: Sequence[re.Pattern[str]], return_rest: bool) -> Callable[..., Any]:
    def call(run: Run, params: Any, rest: Any, args: Any, kwargs: Any) -> tuple[Any, Any, dict[str, str]]:
        candidates = {}
        for leaf in run.levels:
            module = leaf
            while module:
                module = module.rpartition("/")[0]
                candidates[module] = under(module, run.levels)
        run.whole, single = gated_modules(candidates, expressions)
        layers = run.whole | single

        def interceptor(next_fun: Any, args: Any, kwargs: Any, context: linen.module.InterceptorContext) -> Any:
            module = context.module
            path = "/".join(module.path)
            if context.method_name != "__call__" or run.inside or path not in layers:
                return next_fun(*args, **kwargs)
            transform = functools.partial(_lifted, run, layers[path])
            return lift_direct_transform(transform, (type(module).__call__,), module, *args, **kwargs)

        if "mutable" in kwargs:
            raise ValueError("mutable= is not taken: with return_rest=True all of rest is mutable, and comes back.")
        rest = {name: of for name, of in rest.items() if name != "params"}  # the whole of variables was passed
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


def _lifted(run: Run, paths: Paths, fn: Callable[..., Any], scopes: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of a bound module through ``gated``, as Flax lifts ``jax.checkpoint``."""
    counters = [_copied(scope.rng_counters) for scope in scopes]

    def inner(scope_fn: Any, repack_fn: Any, variables: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        params, others = variables
        leaves, treedef = jax.tree.flatten(params)
        # None where the other list has the leaf: its own parameters, and what was computed in place of one.
        held = [leaf if run.is_own(paths, leaf) else None for leaf in leaves]
        computed = [leaf if mine is None else None for leaf, mine in zip(leaves, held, strict=True)]

        def pure(held: Any, computed: Any, others: Any, rngs: Any, args: Any, kwargs: Any) -> Any:
            both = [other if mine is None else mine for mine, other in zip(held, computed, strict=True)]
            own = scope_fn((treedef.unflatten(both), others), rngs)
            # JAX may call this twice, for the value and for the gradient: with the same keys.
            for scope, before in zip(own, counters, strict=True):
                scope.rng_counters = _copied(before)
            outputs = run.plainly(fn, own, *args, **kwargs)
            for scope, outer in zip(own, scopes, strict=True):
                _overwrite(outer.rng_counters, scope.rng_counters)
            return outputs, repack_fn(own)

        level = run.gate(paths, shared=any(leaf is not None for leaf in computed))
        return gated(pure)(level, held, computed, others, rngs, args, kwargs)

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
