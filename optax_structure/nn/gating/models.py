"""Gates in Flax models as they are: frozen layers leave the backward pass, without a line of the model changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from flax import linen, nnx

from optax_structure._tree import align, leaves_by_path
from optax_structure.nn.gating.linen_layers import linen_call
from optax_structure.nn.gating.nnx_layers import nnx_call
from optax_structure.nn.gating.run import Run, keep_statistics


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
    outside, and saves all. What a layer has in place of a parameter of its own (a kernel plus a LoRA delta, a kernel
    that ``WeightNorm`` has scaled) is one of its inputs. Inside ``remat``, ``scan`` or ``jit`` of a part of the model
    it cannot be told from a parameter: gate such a layer whole there.

    Gradients by the model's *inputs* end behind a level 2 as well. Where the loss holds one (a gradient penalty, a
    physics-informed loss) or wants one (saliency, adversarial examples), make the gates without ``depths``.

    A module with parameters of its own that calls others with parameters (``nnx.LoRALinear``) is not gated itself: its
    own gradients are right, and not saved. Name it in ``at``.

    Args:
      model: an NNX module (read once, here, for its structure, its mode and the state that is not ``nnx.Param``) or an
        unbound Linen module.
      rest: what the model needs beside its params, as ``nn.capture`` takes it. A call may pass another one as
        ``rest=``.
      at: regular expressions of module paths (``re.search`` on ``"encoder/blocks/0"``): those modules are gated whole,
        by the smallest level of all their parameters. In a transformer block attention's own products are then skipped
        at level 2 too. The outermost match counts; everything else is gated layer by layer.
      freeze_statistics: whether the running statistics (``nnx.BatchStat``, Linen's ``batch_stats``) of a module whose
        parameters are all behind closed gates stay as they are. A norm without parameters goes by the nearest module
        around it that has some.
      return_rest: whether the function returns ``(outputs, rest)``, the state after the call. Without it changes of
        that state are dropped (NNX: a dropout then draws the same in every step) or raise (Linen).

    Returns:
      The function. ``gates`` is what ``optax_structure.gates`` returns: a tree of levels with the structure of params,
      or one level for all. Keyword arguments other than ``rest`` go to the model (Linen: to ``Module.apply``).
      Forward-mode derivatives (``jax.jvp``) are not to be had.

    Raises:
      ValueError: for an expression that matches no module with parameters (Linen: when called), naming those there are;
        when called, for gates of another structure or that are no levels, for a module of ``at`` that the model never
        calls, and for ``rest=`` with parameters in it (NNX) or ``mutable=`` (Linen).
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
        call, bound = nnx_call(model, expressions)
        default = bound if rest is None else rest
    elif isinstance(model, linen.Module):
        call, default = linen_call(model, expressions, return_rest), {} if rest is None else rest
    else:
        raise TypeError(f"model must be a flax.nnx or flax.linen Module, got {type(model).__name__}.")

    def apply(params: Any, gates: Any, *args: Any, rest: Any = None, **kwargs: Any) -> Any:
        rest = default if rest is None else rest
        run = Run(leaves_by_path(align(gates, params, "gates")))
        try:
            outputs, after, modules = call(run, run.shut(params), rest, args, kwargs)
            run.check_called()
            if not return_rest:
                return outputs
            return outputs, keep_statistics(run.levels, modules, rest, after) if freeze_statistics else after
        finally:
            run.levels = {}  # the modules of a program that outlives the call hold no tracers

    return apply
