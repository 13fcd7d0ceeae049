"""What every transformation here does alike: checks its arguments once, asks for extra args, and says what it is."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import optax

from optax_structure._tree import is_traced


class Rule(NamedTuple):
    """What a transformation is, for people: see ``describe``.

    Attributes:
      name: the name of its factory.
      numbers: argument -> value, in the order in which a reader wants them.
      state: what its state costs, in words: ``"4 B a leaf"``; empty for none.
      inner: the transformations that it wraps or hosts.
    """

    name: str
    numbers: Mapping[str, Any] = {}
    state: str = ""
    inner: tuple[optax.GradientTransformation, ...] = ()


class Described(optax.GradientTransformationExtraArgs):
    """A transformation that carries its rule. Optax's combinators unpack transformations: so the update holds it."""

    @property
    def rule(self) -> Rule:
        """What the transformation is."""
        return cast(Any, self.update).rule


def transformation(init: Callable[..., Any], update: Callable[..., Any], rule: Rule) -> Described:
    """``optax.GradientTransformationExtraArgs`` of functions that name the type of their state, with its rule."""
    cast(Any, update).rule = rule
    return Described(init, update)


def takes_extra_args(tx: Any) -> optax.GradientTransformationExtraArgs:
    """``optax.with_extra_args_support`` that does not take them from what has them.

    Optax goes by the type, and ``optax.MultiSteps`` (like its ``gradient_transformation()``) has another: its update
    hands extra arguments on, and would silently be given none.
    """
    if isinstance(tx, optax.GradientTransformationExtraArgs):
        return tx
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(tx.update).parameters.values()):
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)


def check_number(name: str, value: Any, *, low: float = 0.0, high: float = math.inf) -> None:
    """Raise ``ValueError`` unless ``low <= value <= high``; tracers and arrays of ``inject_hyperparams`` pass."""
    if is_traced(value):
        return
    if not (low <= float(value) <= high):
        raise ValueError(f"{name}={value!r} must lie in [{low}, {high}].")


def check_schedule(name: str, value: Any, *, of: str) -> None:
    """Raise ``ValueError`` unless ``value`` can be called."""
    if not callable(value):
        raise ValueError(f"{name}={value!r} must be a function of {of}, such as optax.linear_schedule(0, 1, 500).")


def require(value: Any, name: str, transform: str) -> Any:
    """The extra argument, or a ``ValueError`` that shows the call which passes it."""
    if value is None:
        raise ValueError(f"{transform} needs {name}=: call tx.update(grads, state, params, {name}=...).")
    return value


def require_params(params: Any) -> Any:
    """The parameters, or a ``ValueError`` that shows the call which passes them."""
    if params is None:
        raise ValueError("this needs params: call tx.update(grads, state, params).")
    return params
