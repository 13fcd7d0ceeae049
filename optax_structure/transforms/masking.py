"""Sparse training around any optimizer: gradients masked before it, updates masked after it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import Params, PyTree, align, is_traced, leaves_by_path
from optax_structure.state.cohorts import Cohorts, mark_absent
from optax_structure.state.markers import Masks
from optax_structure.transforms._extra import Rule, require, takes_extra_args, transformation
from optax_structure.transforms.rewiring._event import first_clock, rewire_if_due
from optax_structure.transforms.rewiring.rules import Rewiring


def _masked(values: PyTree, masks: PyTree) -> PyTree:
    # A scalar mask says that the leaf is not sparse: nothing to do, and nothing to compute.
    return jax.tree.map(lambda v, mask: jnp.where(mask, v, jnp.zeros_like(v)) if jnp.ndim(mask) else v, values, masks)


def mask_gradients() -> optax.GradientTransformationExtraArgs:
    """Set gradients off the mask to exactly 0, NaN included. Goes first.

    A dense gradient reaches connections that do not exist. Left in, it shrinks what a global-norm clip leaves of the
    living ones (4 to 7 times too much at 2 % density) and fills the moments of optimizers that mix entries.

    Returns:
      A stateless transformation that reads ``masks=``.

    Raises:
      ValueError: in ``update``, for missing ``masks=``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> tx = oxs.mask_gradients()
      >>> tx.update(jnp.array([1.0, jnp.nan]), tx.init(jnp.ones(2)), masks=jnp.array([True, False]))[0].tolist()
      [1.0, 0.0]
    """

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        masks: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        return _masked(updates, align(require(masks, "masks", "mask_gradients()"), updates, "masks")), state

    return transformation(lambda params: optax.EmptyState(), update_fn, Rule("mask_gradients"))


def _kept(update: jax.Array, mask: jax.Array, param: jax.Array) -> jax.Array:
    return jnp.where(mask, update, (-param).astype(update.dtype)) if jnp.ndim(mask) else update


def keep_masked() -> optax.GradientTransformationExtraArgs:
    """Drive every weight off the mask to exactly 0 and keep it there. Goes last.

    On the mask the update passes; off it the update is ``-param``: 0 for a weight that is 0, and a weight found off
    its mask ends at exactly 0, whatever weight decay, momentum or an average of parameters did to it before. (Updates
    keep the gradient's dtype: where that is narrower than the parameter's, 0 is reached within three updates.)

    Returns:
      A stateless transformation that reads ``masks=`` and ``params``.

    Raises:
      ValueError: in ``update``, for missing ``masks=`` or ``params``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx, params = oxs.keep_masked(), jnp.array([1.0, 0.3])
      >>> update, _ = tx.update(jnp.array([0.5, 0.5]), tx.init(params), params, masks=jnp.array([True, False]))
      >>> optax.apply_updates(params, update).tolist()
      [1.5, 0.0]
    """

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        masks: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        if params is None:
            raise ValueError("keep_masked() needs params: call tx.update(grads, state, params, masks=...).")
        aligned = align(require(masks, "masks", "keep_masked()"), updates, "masks")
        return jax.tree.map(_kept, updates, aligned, params), state

    return transformation(lambda params: optax.EmptyState(), update_fn, Rule("keep_masked"))


class SparseState(NamedTuple):
    """State of ``sparse``.

    Attributes:
      masks: bool, one array or scalar a leaf.
      inner_state: the inner optimizer's.
      rewiring: ``RewiringClock``; ``()`` where nothing is rewired.
    """

    masks: Masks
    inner_state: optax.OptState
    rewiring: Any = ()


def check_masks(masks: PyTree, params: Params) -> None:
    """Raise ``ValueError`` unless every mask is bool and has its leaf's shape or is a scalar, naming the leaf."""
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves_by_path(params).items()}
    for path, mask in leaves_by_path(masks).items():
        if jnp.result_type(mask) != jnp.bool_:
            raise ValueError(f"masks: {path!r} has dtype {jnp.result_type(mask)}; masks are bool (True: connected).")
        if jnp.ndim(mask) and jnp.shape(mask) != shapes[path]:
            raise ValueError(f"masks: {path!r} has shape {jnp.shape(mask)}, its parameter has shape {shapes[path]}.")
        if not jnp.ndim(mask) and not is_traced(mask) and not bool(mask):
            raise ValueError(f"masks: {path!r} is a scalar False; a leaf that is not sparse has True, others an array.")


def _mark_absent(state: optax.OptState, masks: PyTree) -> optax.OptState:
    """Take absent connections out of the cohorts of an initial state, whose transform could not know the masks."""

    def mark(node: Any) -> Any:
        return mark_absent(node, align(masks, node.cohort, "masks")) if isinstance(node, Cohorts) else node

    return jax.tree.map(mark, state, is_leaf=lambda node: isinstance(node, Cohorts))


def sparse(
    inner: optax.GradientTransformation, masks: PyTree, *, rewire: Rewiring | None = None
) -> optax.GradientTransformationExtraArgs:
    """Train only the connections of ``masks``, with any optimizer.

    ``mask_gradients -> inner -> keep_masked``, with the masks in the state: they are values, not code, so a change of
    masks (``transfer_state`` after a growth action) goes on in the same compiled step. Every extra argument reaches
    ``inner``, and with them ``masks=`` and ``masks_changed=``; a ``grads=`` (see ``observe``) is masked as
    the gradients are.

    With ``rewire=`` the masks change by themselves, inside the compiled step: connections go and come (SET, RigL,
    pruning; see ``rewiring``), a new one starts at 0 and without a past in the optimizer's state (its second moment is
    what bounds its first updates, see ``transfer_state``), all others keep theirs bit for bit. The rule alone sees the
    dense gradient, which is the step's own. State that has no entry a connection (the factors of Adafactor, a norm a
    layer) stays as it is. Mask the params first (``apply_masks``).

    In a chain ``sparse`` goes last: what comes after it (a learning rate, weight decay, an average) changes the update
    that takes a weight off the mask to 0. What freezes goes around it, as ``freeze_labels(sparse(...))``: inside, a
    frozen leaf would lose connections and get none.

    Args:
      inner: the optimizer. It sees gradients that are 0 off the mask.
      masks: tree with the structure of params, or a function ``params -> masks``: bool arrays of the leaves' shapes,
        scalar ``True`` for a leaf that is not sparse (see ``random_masks``). Copied at ``init``.
      rewire: ``set_rewiring()``, ``rigl_rewiring()``, ``magnitude_pruning(...)`` and others, or ``rewiring(...)``.

    Returns:
      A transformation whose ``update`` needs ``params``. Its state costs one byte a weight of the sparse leaves, two
      with ``rewire=``, and four more where the rule accumulates gradients.

    Raises:
      ValueError: at ``init``, for masks of another structure, shape or dtype than the params, or without the pattern of
        the rule, naming the leaf.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_structure as oxs
      >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}
      >>> masks = oxs.random_masks(jax.random.key(0), params, 0.5)
      >>> params = oxs.apply_masks(params, masks)
      >>> tx = oxs.sparse(optax.adamw(1e-3), masks)
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
      >>> int(jnp.sum(updates["kernel"] != 0)), oxs.nonzero(oxs.get_masks(state))
      (8, 8)

    References:
      Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity, 2018.
    """
    inner = takes_extra_args(inner)
    if rewire is not None and not isinstance(rewire, Rewiring):
        raise ValueError(f"rewire={rewire!r} must be a rule, such as oxs.rigl_rewiring(): call it.")

    def init_fn(params: optax.Params) -> SparseState:
        aligned = align(masks, params, "masks")
        if jax.tree.leaves(params):
            check_masks(aligned, params)
        # A copy: the state is usually donated, and the caller's masks must survive that.
        copies = jax.tree.map(lambda mask: jnp.array(mask, dtype=bool, copy=True), aligned)
        if rewire is not None and jax.tree.leaves(params):
            rewire.check(params, aligned)
        clock = () if rewire is None else first_clock(rewire, copies)
        return SparseState(Masks(copies), _mark_absent(inner.init(params), copies), clock)

    def update_fn(
        updates: optax.Updates,
        state: SparseState,
        params: optax.Params | None = None,
        *,
        masks: PyTree | None = None,
        masks_changed: jax.Array | bool = False,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SparseState]:
        del masks  # an enclosing sparse() may pass its own; this one owns these leaves
        if params is None:
            raise ValueError("sparse(...) needs params: call tx.update(grads, state, params).")
        mine, inner_state, clock = state.masks.masks, state.inner_state, state.rewiring
        if rewire is not None:
            step = rewire_if_due(rewire, inner, clock, mine, inner_state, params, updates)
            mine, inner_state, clock = step.masks, step.inner_state, step.clock
            masks_changed = masks_changed | step.changed
        if extra_args.get("grads") is not None:  # of an enclosing observe()
            extra_args["grads"] = _masked(align(extra_args["grads"], updates, "grads"), mine)
        updates, inner_state = inner.update(
            _masked(updates, mine), inner_state, params, masks=mine, masks_changed=masks_changed, **extra_args
        )
        return jax.tree.map(_kept, updates, mine, params), SparseState(Masks(mine), inner_state, clock)

    cost = "1 B a connection" if rewire is None else f"{2 + 4 * (rewire.accumulate > 1)} B a connection"
    shown = {} if rewire is None else rewire.shown()
    return transformation(init_fn, update_fn, Rule("sparse", shown, cost, (inner,)))
