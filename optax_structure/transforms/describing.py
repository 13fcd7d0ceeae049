"""What a transformation is, in words; and which rates are in force, in numbers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import Params, PyTree, align, leaves_by_path, map_with_path
from optax_structure.labels import LabelFn, Labels
from optax_structure.transforms._extra import takes_extra_args
from optax_structure.transforms._multiplier import recording


def describe(tx: optax.GradientTransformation, params: Params | None = None) -> str:
    """The rules of a transformation in their order, with their numbers and what the state of each costs.

    What stands inside another is indented. Optax's own transformations are listed as well, with the numbers that their
    closures hold; one that hides what it is made of is named and left at that.

    Args:
      tx: a transformation: one of these, a preset, or any ``optax.chain`` / ``partition`` / ``masked`` of them.
      params: with them (or their ``jax.ShapeDtypeStruct``) the cost of each state is its size in bytes; without, it is
        said by the leaf, connection or parameter.

    Returns:
      One line a rule.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> labels = {"backbone": "scaffold", "head": "new"}
      >>> by_label = oxs.scale_by_label({"scaffold": 0.1, "new": 1.0}, labels)
      >>> print(oxs.describe(optax.chain(optax.scale_by_adam(), by_label, optax.scale(-1e-3))))
      optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-08, eps_root=0.0, nesterov=False): 8 B a parameter
      scale_by_label(scaffold=0.1, new=1.0): 8 B a leaf
      optax.scale(step_size=-0.001)
    """
    return "\n".join("  " * depth + line for depth, line in _lines(tx, params, 0))


def _lines(tx: optax.GradientTransformation, params: Params | None, depth: int) -> Iterator[tuple[int, str]]:
    members = _members(tx)
    own = [(name, member) for name, member in members if member is not tx]
    rule = getattr(tx.update, "rule", None)
    if rule is None and len(own) > 1 and not any(name for name, _ in own):  # a chain is its members
        for _, member in own:
            yield from _lines(member, params, depth)
        return
    if rule is None and len(own) == 1 and _name(tx.update) in ("with_extra_args_support", "chain"):
        yield from _lines(own[0][1], params, depth)
        return
    name = rule.name if rule else f"optax.{_name(tx.update)}"
    numbers = rule.numbers if rule else _numbers(tx.update)
    cost = rule.state if rule else _cost_of_foreign(tx, bool(own))
    if params is not None:
        size = _bytes(tx, params)
        if (below := sum(_bytes(member, params) for _, member in own)) <= size:
            size -= below
        else:  # each member holds a part of the leaves only: its cost is said by the leaf
            params = None
        cost = f"{size:,} B" if size > 0 else ""
    arguments = ", ".join(f"{key}={_text(value)}" for key, value in numbers.items())
    yield depth, name + (f"({arguments})" if arguments else "") + (f": {cost}" if cost else "")
    for label, member in own:
        if label:
            yield depth + 1, f"{label}:"
        yield from _lines(member, params, depth + 1 + bool(label))


def _members(tx: optax.GradientTransformation) -> list[tuple[str, optax.GradientTransformation]]:
    """What a transformation is made of, with the label of each member of a partition."""
    rule = getattr(tx.update, "rule", None)
    if rule is not None:
        return [("", member) for member in rule.inner]
    inits, updates = (_held(fn) for fn in (tx.init, tx.update))
    # Optax's chain keeps the functions of its members, the others whole transformations.
    if "init_fns" in inits and "update_fns" in updates:
        pairs = zip(inits["init_fns"], updates["update_fns"], strict=True)
        return [("", optax.GradientTransformationExtraArgs(*pair)) for pair in pairs]
    for value in updates.values():
        if isinstance(value, optax.GradientTransformation):
            return [("", value)]
        if (
            isinstance(value, dict)
            and value
            and all(isinstance(v, optax.GradientTransformation) for v in value.values())
        ):
            return [(str(label), member) for label, member in value.items()]
    return []


def _held(fn: Callable[..., Any]) -> dict[str, Any]:
    """What the closure of a function holds; nothing for a bound method or a callable object."""
    held = {}
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True) if inspect.isfunction(fn) else ():
        with contextlib.suppress(ValueError):  # a variable that was never set
            held[name] = cell.cell_contents
    return held


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", type(fn).__qualname__).split(".")[0]


def _numbers(fn: Callable[..., Any]) -> dict[str, Any]:
    return {name: value for name, value in _held(fn).items() if isinstance(value, bool | int | float | str)}


def _text(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        return np.array2string(np.asarray(value), precision=4) if np.ndim(value) else f"{float(value):g}"
    if callable(value):
        name, numbers = _name(value), _numbers(value)
        return f"{name}({', '.join(f'{key}={number}' for key, number in numbers.items())})" if numbers else name
    return repr(value)


def _bytes(tx: optax.GradientTransformation, params: Params) -> int:
    state = jax.eval_shape(tx.init, params)
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _cost_of_foreign(tx: optax.GradientTransformation, has_members: bool) -> str:
    """What a state of optax's costs, tried on a matrix of 32 x 32."""
    if has_members:
        return ""
    try:
        size = _bytes(tx, jax.ShapeDtypeStruct((32, 32), jnp.float32))
    except Exception:  # it was made for other parameters (a tree of labels, a mask), and there are none here
        return ""
    return f"{size / 1024:.2g} B a parameter" if size >= 1024 else f"{size} B" if size else ""


def rates(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: Params,
    *,
    grads: optax.Updates | None = None,
    **extra_args: Any,
) -> PyTree:
    """The multiplier that every leaf's update gets at the next step.

    The product of all rate transformations here (``scale_by_label``, ``scale_on_event``, a preset ...), wherever they
    stand in ``tx``; a frozen leaf has 0, a leaf that none of them names 1. The base learning rate is no multiplier: it
    is left out, as is what an optimizer of optax's does to its update.

    One update is carried out and thrown away. For every step of a long run, wrap it: ``jax.jit(functools.partial(rates,
    tx))``; then ``tx`` must not hide a multiplier in a branch (``optax.apply_if_finite``, ``optax.MultiSteps``), which
    works without ``jit``.

    Args:
      tx: any transformation.
      state: its state.
      params: the parameters.
      grads: the gradients, for multipliers that read them (the trust ratio); zeros without them.
      **extra_args: what ``tx.update`` needs: ``value=``, ``masks=``, ``extrema=``, ``event=``.

    Returns:
      Tree of the structure of params: a float32 scalar a leaf, or an array of its shape where the rate differs between
      its connections (0 for absent ones).

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> params = {"backbone": jnp.ones(2), "head": jnp.ones(2)}
      >>> by_label = oxs.scale_by_label({"scaffold": 0.5, "new": 1.0}, {"backbone": "scaffold", "head": "new"})
      >>> tx = optax.chain(optax.scale_by_adam(), by_label, optax.scale_by_learning_rate(1e-3))
      >>> {path: float(rate) for path, rate in oxs.rates(tx, tx.init(params), params).items()}
      {'backbone': 0.5, 'head': 1.0}
    """
    given: Any = jax.tree.map(jnp.zeros_like, params) if grads is None else grads
    with recording() as product, jax.disable_jit():
        takes_extra_args(tx).update(given, state, params, **extra_args)
    return map_with_path(lambda path, leaf: _whole(product.get(path, jnp.ones((), jnp.float32)), leaf), params)


def _whole(rate: jax.Array, leaf: jax.Array) -> jax.Array:
    return jnp.broadcast_to(rate, leaf.shape) if jnp.ndim(rate) else rate


class Spread(NamedTuple):
    """The rates under one label: float32 scalars, over its parameters."""

    mean: jax.Array
    low: jax.Array
    high: jax.Array


def rates_by_label(rates: PyTree, labels: Labels | LabelFn, params: Params) -> dict[str, Spread]:
    """Mean, lowest and highest rate of the parameters under every label.

    Args:
      rates: what ``rates`` returns.
      labels: tree of labels, a prefix of it, or a function of params.
      params: the parameters. Those that are exactly 0 where rates differ within a leaf do not exist and do not count.

    Returns:
      Label -> ``Spread``, in the order of the leaves.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = {"backbone": jnp.ones(3), "neck": jnp.ones(1), "head": jnp.ones(2)}
      >>> labels = {"backbone": "scaffold", "neck": "scaffold", "head": "new"}
      >>> spread = oxs.rates_by_label({"backbone": 0.5, "neck": 0.1, "head": 1.0}, labels, params)["scaffold"]
      >>> [round(float(rate), 3) for rate in spread]
      [0.4, 0.1, 0.5]
    """
    found: dict[str, list[tuple[jax.Array, jax.Array]]] = {}
    leaves, every = leaves_by_path(params), leaves_by_path(rates)
    for path, label in leaves_by_path(align(labels, params, "labels")).items():
        rate, leaf = jnp.asarray(every[path], jnp.float32), leaves[path]
        present = (leaf != 0) | (rate != 0) if rate.ndim else jnp.ones(leaf.shape, bool)
        found.setdefault(label, []).append((jnp.broadcast_to(rate, leaf.shape), present))

    def spread(pairs: list[tuple[jax.Array, jax.Array]]) -> Spread:
        count = sum(jnp.sum(present) for _, present in pairs)
        total = sum(jnp.sum(rate, where=present) for rate, present in pairs)
        low = jnp.stack([jnp.min(rate, where=present, initial=jnp.inf) for rate, present in pairs])
        high = jnp.stack([jnp.max(rate, where=present, initial=0.0) for rate, present in pairs])
        return Spread(total / jnp.maximum(count, 1), jnp.min(low), jnp.max(high))

    return {label: spread(pairs) for label, pairs in found.items()}
