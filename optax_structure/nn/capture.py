"""The activations of any Flax model, for the statistics of dead and saturated units and for ``lsuv``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx, traverse_util
from jax import Array

Activation = Callable[[Array], Array]


def capture(
    model: nnx.Module | linen.Module,
    rest: Any = None,
    *,
    activation: Activation | Mapping[str, Activation] | None = jax.nn.relu,
    return_rest: bool = False,
) -> Callable[..., Any]:
    """A function ``(params, *inputs) -> (outputs, {layer: activations})`` of an NNX or Linen model.

    A *layer* is a module that owns a ``kernel`` (``Linear``, ``Dense``, ``Conv``, the sparse layers, yours). Its name
    is its path, so that ``"<layer>/kernel"`` is the path of its kernel in params; what is captured is what its call
    returns, put through ``activation``. The outputs are the model's own, unchanged. A layer that is called several
    times gives all its calls, joined along the batch.

    The function is pure: use it inside ``jax.jit``, ``jax.grad(..., has_aux=True)``, ``jax.vmap`` or ``lax.scan``;
    activations that the step does not use cost nothing.

    Args:
      model: an NNX module (read once, here, for its structure and the state that is not ``nnx.Param``) or an unbound
        Linen module.
      rest: what the model needs beside its params. NNX: the ``nnx.State`` of everything that is not ``nnx.Param``
        (default: as it is in ``model`` now). Linen: the other collections, such as
        ``{"masks": variables["masks"]}`` (default: none). A call may pass another one as ``rest=``: arrays that
        change while training, such as masks, should come that way, or the compiled step holds the old ones.
      activation: what turns a layer's output into the values that the statistics read: the non-linearity that follows
        the layer in the model. A mapping ``{layer: function}`` captures exactly the layers that it names. ``None``
        gives the outputs as they are (pre-activations, as ``lsuv`` wants).
      return_rest: whether the function returns a third value, the state after the call (batch statistics, key
        counters). Without it changes of that state are dropped (NNX) or raise (Linen).

    Returns:
      The function. Keyword arguments other than ``rest`` go to the model (Linen: to ``Module.apply``, so ``rngs=``
      and ``method=`` work).

    Raises:
      ValueError: when called, for a model without any such layer or a mapping that names an unknown one, listing
        those there are.
      TypeError: for a model of neither kind.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from optax_structure import nn
      >>> model = nn.MLP([8, 6, 4, 2], rngs=nnx.Rngs(0))
      >>> apply = nn.capture(model, activation={"hidden_1": nnx.relu, "hidden_2": nnx.relu})
      >>> logits, activations = apply(nnx.state(model, nnx.Param), jnp.ones((3, 8)))
      >>> {layer: value.shape for layer, value in activations.items()}
      {'hidden_1': (3, 6), 'hidden_2': (3, 4)}
    """
    if isinstance(model, nnx.Module):
        call, bound = _nnx_call(model)
        rest = bound if rest is None else rest
    elif isinstance(model, linen.Module):
        call, rest = _linen_call(model, return_rest), {} if rest is None else rest
    else:
        raise TypeError(f"model must be a flax.nnx or flax.linen Module, got {type(model).__name__}.")
    default = rest

    def apply(params: Any, *args: Any, rest: Any = None, **kwargs: Any) -> Any:
        outputs, layers, after = call(params, default if rest is None else rest, args, kwargs)
        activations = _activate(layers, activation)
        return (outputs, activations, after) if return_rest else (outputs, activations)

    return apply


def _activate(
    layers: Mapping[str, tuple[Array, ...]], activation: Activation | Mapping[str, Activation] | None
) -> dict[str, Array]:
    chosen = activation if isinstance(activation, Mapping) else dict.fromkeys(layers, activation)
    unknown = [name for name in chosen if name not in layers]
    if unknown or not layers:
        raise ValueError(f"activation: the model called no layer with a kernel named {unknown}; it has {list(layers)}.")
    joined = {name: calls[0] if len(calls) == 1 else jnp.concatenate(calls) for name, calls in layers.items()}
    return {name: joined[name] if function is None else function(joined[name]) for name, function in chosen.items()}


def _nnx_call(model: nnx.Module) -> tuple[Callable[..., Any], Any]:
    graphdef, _, bound = nnx.split(model, nnx.Param, ...)
    bound = jax.tree.map(lambda leaf: leaf, bound)  # as it is now, whatever becomes of the model's

    def call(params: Any, rest: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, tuple[Array, ...]], Any]:
        # Copies: a call that writes to a Variable (batch statistics) must not write to the caller's.
        merged = nnx.merge(graphdef, params, rest, copy=True)
        modules = nnx.iter_modules(merged)
        owners = {path for path, module in modules if isinstance(getattr(module, "kernel", None), nnx.Param)}
        outputs, captured = nnx.capture(merged, nnx.Intermediate, method_outputs=nnx.Intermediate)(*args, **kwargs)
        layers = {
            "/".join(map(str, path)): variable.get_value()
            for (*path, method), variable in nnx.to_flat_state(captured)
            if method == "__call__" and tuple(path) in owners
        }
        return outputs, layers, nnx.split(merged, nnx.Param, ...)[2]

    return call, bound


def _has_kernel(module: linen.Module, method: str) -> bool:
    return method == "__call__" and module.has_variable("params", "kernel")


def _linen_call(model: linen.Module, return_rest: bool) -> Callable[..., Any]:
    def call(params: Any, rest: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, tuple[Array, ...]], Any]:
        rest = {name: of for name, of in rest.items() if name != "params"}  # the whole of variables was passed
        mutable = ["intermediates", *(rest if return_rest else ())]
        outputs, after = model.apply(
            {"params": params, **rest}, *args, mutable=mutable, capture_intermediates=_has_kernel, **kwargs
        )
        after = dict(after)
        captured: Any = traverse_util.flatten_dict(after.pop("intermediates", {}))
        layers = {"/".join(path[:-1]): calls for path, calls in captured.items() if path[-1] == "__call__"}
        return outputs, layers, after

    return call
