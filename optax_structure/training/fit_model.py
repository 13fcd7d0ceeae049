"""A model of any kind as pure functions: what ``fit`` trains, and how it is called in training and in validation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen, nnx

from optax_structure._tree import Params, PyTree

Capture = Callable[..., Any]

_MODES = {"train": True, "training": True, "is_training": True, "deterministic": False, "use_running_average": False}
"""The arguments by which Linen modules are told that they are trained, and their value when they are."""


class Model(NamedTuple):
    """A model without objects: everything that changes is an argument.

    Attributes:
      params: what is trained.
      rest: what else the model reads and writes: batch statistics, key counters, masks.
      train: ``(params, rest, x, key) -> (logits, activations or None, rest)``, in training mode.
      evaluate: ``(params, rest, x) -> logits``, in evaluation mode.
      rebuild: ``(params, rest) -> nnx.Module`` with these values, ``None`` for a model that is no NNX module.
    """

    params: Params
    rest: PyTree
    train: Callable[[Params, PyTree, jax.Array, jax.Array], tuple[jax.Array, Any, PyTree]]
    evaluate: Callable[[Params, PyTree, jax.Array], jax.Array]
    rebuild: Callable[[Params, PyTree], Any]


def as_model(model_or_apply: Any, params: Params | None = None, capture: Capture | None = None) -> Model:
    """The functions and the first values of an NNX module, a Linen module or a function ``apply(params, x)``.

    Args:
      model_or_apply: see ``fit``.
      params: see ``fit``.
      capture: see ``fit``.

    Returns:
      ``Model``. An NNX module that was given is only read.

    Raises:
      ValueError: for params where the model holds its own, none where it does not, or a model of no known kind.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_structure.training.fit_model import as_model
      >>> model = as_model(lambda params, x: x @ params["w"], {"w": jnp.ones((3, 2))})
      >>> model.evaluate(model.params, model.rest, jnp.ones((1, 3))).tolist(), model.rebuild(model.params, None)
      ([[3.0, 3.0]], None)
    """
    if isinstance(model_or_apply, nnx.Module):
        if params is not None:
            raise ValueError("params were given beside an nnx.Module, which holds its own: leave params= out.")
        return _nnx(model_or_apply, capture)
    if not callable(model_or_apply) and not isinstance(model_or_apply, linen.Module):
        kind = type(model_or_apply).__name__
        raise ValueError(f"model_or_apply={kind} must be an nnx.Module, a linen.Module or apply(params, x) -> logits.")
    if params is None:
        raise ValueError("params=None: a Linen module or a function holds no parameters; pass params=.")
    if isinstance(model_or_apply, linen.Module):
        return _linen(model_or_apply, params, capture)
    return _function(model_or_apply, params, capture)


def _nnx(model: nnx.Module, capture: Capture | None) -> Model:
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    training, evaluating = nnx.clone(model), nnx.clone(model)
    training.train()
    evaluating.eval()
    train_def, eval_def = nnx.graphdef(training), nnx.graphdef(evaluating)

    def train(params: Params, rest: PyTree, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any, PyTree]:
        del key
        if capture is not None:
            return _observed(capture(params, x, **({"rest": rest} if jax.tree.leaves(rest) else {})), rest)
        # Copies: what the call writes must not be written into the caller's variables.
        merged: Any = nnx.merge(train_def, params, rest, copy=True)
        logits = merged(x)
        return logits, None, nnx.split(merged, nnx.Param, ...)[2]

    def evaluate(params: Params, rest: PyTree, x: jax.Array) -> jax.Array:
        merged: Any = nnx.merge(eval_def, params, rest, copy=True)
        return merged(x)

    return Model(params, rest, train, evaluate, lambda params, rest: nnx.merge(graphdef, params, rest, copy=True))


def _linen(model: linen.Module, variables: Any, capture: Capture | None) -> Model:
    if "params" not in variables:
        variables = {"params": variables}
    rest = {name: collection for name, collection in variables.items() if name != "params"}
    named = inspect.signature(type(model).__call__).parameters
    training: dict[str, Any] = {name: value for name, value in _MODES.items() if name in named}
    evaluating: dict[str, Any] = {name: not value for name, value in training.items()}

    def train(params: Params, rest: PyTree, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any, PyTree]:
        rngs = {"dropout": key}
        if capture is not None:
            # A module without a mode has nothing random: its capture may be a plain function of two arguments.
            given = {**training, "rngs": rngs} if training else {}
            return _observed(capture(params, x, **({"rest": rest} if rest else {}), **given), rest)
        if not rest:
            logits: Any = model.apply({"params": params}, x, rngs=rngs, **training)
            return logits, None, rest
        logits, after = model.apply({"params": params, **rest}, x, rngs=rngs, mutable=list(rest), **training)
        return logits, None, {**rest, **after}

    def evaluate(params: Params, rest: PyTree, x: jax.Array) -> Any:
        return model.apply({"params": params, **rest}, x, **evaluating)

    return Model(variables["params"], rest, train, evaluate, lambda params, rest: None)


def _function(apply: Callable[..., Any], params: Params, capture: Capture | None) -> Model:
    def train(params: Params, rest: PyTree, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any, PyTree]:
        del key
        return (apply(params, x), None, rest) if capture is None else _observed(capture(params, x), rest)

    return Model(params, (), train, lambda params, rest, x: apply(params, x), lambda params, rest: None)


def _observed(out: Any, rest: PyTree) -> tuple[jax.Array, Any, PyTree]:
    stateful = bool(jax.tree.leaves(rest))
    if not isinstance(out, tuple) or len(out) != (3 if stateful else 2):
        # Else batch statistics would stand still, and every step would drop the same units.
        wanted = (
            "(logits, activations, rest), because the model has state beside its params: "
            "optax_structure.nn.capture(model, return_rest=True)"
            if stateful
            else "(logits, activations): optax_structure.nn.capture(model)"
        )
        found = f"{len(out)} values" if isinstance(out, tuple) else type(out).__name__
        raise ValueError(f"capture returned {found}; it must return {wanted}.")
    return (*out, rest) if len(out) == 2 else out
