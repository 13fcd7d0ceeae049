"""One optimizer a leaf: every leaf owns its whole state, step counts included."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import Params, is_masked, leaves_by_path
from optax_structure.transforms._extra import Rule, takes_extra_args, transformation
from optax_structure.transforms._multiplier import inside
from optax_structure.transforms._two_steps import in_two_steps


def _template(inner: optax.GradientTransformation, params: Params) -> Any:
    """The structure of the inner state of one leaf; raises where it differs between leaves."""
    structures: dict[Any, str] = {}
    for path, leaf in leaves_by_path(params).items():
        structures.setdefault(jax.tree.structure(jax.eval_shape(inner.init, leaf)), path)
    if len(structures) > 1:
        first, second, *_ = structures.values()
        raise ValueError(
            f"per_leaf: the state of inner has another structure for the leaf {second!r} than for {first!r}; such an "
            "optimizer (muon, for one) keeps its own groups. Use it without per_leaf, in optax.partition by label."
        )
    if structures:
        return next(iter(structures))
    return jax.tree.structure(jax.eval_shape(inner.init, jnp.zeros(())))


def _run_if(live: Any, run: Callable[..., tuple[Any, Any]], leaf: Any, state: Any, param: Any) -> tuple[Any, Any]:
    """``run(leaf, state, param)``, or an update of 0 and the state as it was, which is a branch that costs nothing."""
    if live is True:
        return run(leaf, state, param)
    if live is False:
        return jnp.zeros_like(jax.eval_shape(run, leaf, state, param)[0]), state
    two = in_two_steps(run, leaf, state, param)
    # The state alone: it is changed in place, while an update out of a branch would be one more array.
    kept = jax.lax.cond(live, two.new_state, lambda: state)
    update = two.updates(kept)
    return jnp.where(live, update, jnp.zeros_like(update)), kept


def _by_leaf(value: Any, updates: optax.Updates) -> list[Any] | None:
    """The parts of an extra argument with the structure of params, one a leaf; None for any other argument."""
    treedef = jax.tree.structure(updates)
    if jax.tree.structure(value) == treedef:
        return treedef.flatten_up_to(value)
    # A group of optax.partition holds some of the params, while the argument still has a part for all of them.
    nodes, whole = jax.tree.flatten(updates, is_leaf=is_masked)
    if len(nodes) == treedef.num_leaves:
        return None
    try:
        parts = whole.flatten_up_to(value)
    except ValueError:
        return None
    mine = [part for node, part in zip(nodes, parts, strict=True) if not is_masked(node)]
    return mine if jax.tree_util.all_leaves(mine) else None


def per_leaf(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run ``inner`` on every leaf by itself, so that each leaf has its own step count.

    Adam keeps one count for all leaves. A leaf that is added later meets its zero moments with a mature count, and its
    updates come out 3.2 times too large, peaking at 6.6 times. Under ``per_leaf`` a new leaf starts its own bias
    correction, and everything else is as before: for leaf-wise optimizers (adam, adamw, sgd, lion, rmsprop ...) the
    updates are those of ``inner`` itself. What reads across leaves (``optax.clip_by_global_norm``) goes outside.

    The state has the layout of ``inner``'s, with a params-shaped tree at every place, scalars included:
    ``ScaleByAdamState(count={tree}, mu={tree}, nu={tree})``.

    Args:
      inner: the optimizer. Extra arguments that have the structure of params (``masks=``) reach it leaf by leaf,
        others whole.

    Returns:
      A transformation with the same updates and one state a leaf.

    Raises:
      ValueError: at ``init``, when the structure of ``inner``'s state depends on the leaf (``optax.contrib.muon``).

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.per_leaf(optax.scale_by_adam())
      >>> state = tx.init({"a": jnp.ones(2), "b": jnp.ones(3)})
      >>> {name: int(count) for name, count in state.count.items()}
      {'a': 0, 'b': 0}
    """
    inner = takes_extra_args(inner)

    def init_fn(params: optax.Params) -> optax.OptState:
        template = _template(inner, params)
        leaves, treedef = jax.tree.flatten(params)
        states = [jax.tree.leaves(inner.init(leaf)) for leaf in leaves]
        slots = [[state[slot] for state in states] for slot in range(template.num_leaves)]
        return jax.tree.unflatten(template, [jax.tree.unflatten(treedef, slot) for slot in slots])

    def update_where(
        live: list[Any], updates: optax.Updates, state: optax.OptState, params: optax.Params | None, extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        template = _template(inner, updates)
        leaves, treedef = jax.tree.flatten(updates)
        slots = [treedef.flatten_up_to(slot) for slot in template.flatten_up_to(state)]
        param_leaves = [None] * len(leaves) if params is None else treedef.flatten_up_to(params)
        parts = {name: _by_leaf(value, updates) for name, value in extra_args.items()}
        outputs, states = [], []
        for index, (path, leaf) in enumerate(leaves_by_path(updates).items()):
            param = param_leaves[index]
            extra = {name: extra_args[name] if of is None else of[index] for name, of in parts.items()}
            own = jax.tree.unflatten(template, [slot[index] for slot in slots])
            with inside(path):
                output, own = _run_if(live[index], functools.partial(inner.update, **extra), leaf, own, param)
            outputs.append(output)
            states.append(jax.tree.leaves(own))
        new_slots = [[own[slot] for own in states] for slot in range(template.num_leaves)]
        new_state = jax.tree.unflatten(template, [jax.tree.unflatten(treedef, slot) for slot in new_slots])
        return jax.tree.unflatten(treedef, outputs), new_state

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        return update_where([True] * len(jax.tree.leaves(updates)), updates, state, params, extra_args)

    cast(Any, update_fn).where = update_where
    return transformation(init_fn, update_fn, Rule("per_leaf", inner=(inner,)))
