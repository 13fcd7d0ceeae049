"""Freezing by small gradients: traced, reversible, with probes of what is frozen."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import PyTree, align, is_traced, put_together
from optax_structure.state import slots
from optax_structure.transforms._extra import Rule, check_number, require_params, takes_extra_args, transformation
from optax_structure.transforms.freezing._deciding import (
    Cell,
    Numbers,
    decide,
    decide_by_element,
    magnitude,
    read,
    root_mean_square_if,
)
from optax_structure.transforms.freezing._watching import Watch, first_watch, mean_loss, watched
from optax_structure.transforms.waiting import choose_state, observed_flags, update_where


class Readings(NamedTuple):
    """What the gradients of every leaf were. Trees of the structure of params.

    Attributes:
      mean: float32, scalar a leaf, or an array of its shape by element: running mean of the gradient's root mean
        square, times ``weight``.
      weight: float32 of the same shapes, what ``mean`` would be, had all readings been 1.
      seen: int32 scalar, readings so far.
      waited: int32 scalar, updates since the last one.
    """

    mean: PyTree
    weight: PyTree
    seen: PyTree
    waited: PyTree


class FreezeState(NamedTuple):
    """State of ``freeze_on_small_gradients``.

    Attributes:
      frozen: bool, scalar a leaf, or an array of its shape by element.
      streak: int32 of the same shapes: readings in a row below the threshold; of what is frozen, updates since then.
      readings: see ``Readings``.
      watch: see ``Watch``.
      inner_state: of the optimizer.
    """

    frozen: PyTree
    streak: PyTree
    readings: Readings
    watch: Watch
    inner_state: optax.OptState


def freeze_on_small_gradients(
    inner: optax.GradientTransformation,
    threshold: float = 1e-4,
    *,
    decay: float = 0.9,
    min_steps: int = 100,
    patience: int = 10,
    release: float = 2.0,
    min_dwell: int = 0,
    max_share: float = 1.0,
    per: Literal["leaf", "element"] = "leaf",
    groups: PyTree | None = None,
    moments: Literal["keep", "reset"] = "keep",
    probe_every: int = 100,
    alarm: float | None = 4.0,
) -> optax.GradientTransformationExtraArgs:
    """Freeze what has had small gradients for a while; thaw it when they come back.

    Of every leaf it keeps the running mean ``e`` of the root mean square of its gradient: ``norm / sqrt(size)``, so
    that one threshold fits all shapes (and densities: inside ``sparse`` only living connections count). A leaf freezes
    after ``patience`` readings in a row with ``e < threshold``, once it has had ``min_steps`` readings; it thaws with a
    reading that has ``e > release * threshold``. The gates of a step are those that ``frozen(state)`` showed before it,
    so what is decided in one step holds from the next. The update of a frozen leaf is exactly 0, weight decay and
    momentum included, and its part of the state waits (``skip_unobserved`` says what that means for a shared step
    count). Gates are data: nothing is traced again.

    **Saving the backward pass.** Read the gates before it, skip what they allow, and say what was observed::

        gates = oxs.gates(state, depths)                     # knows of probes
        loss, grads = jax.value_and_grad(loss_fn)(params, gates)         # layers are oxs.gated(...)
        updates, state = tx.update(grads, state, params, value=loss, observed=oxs.observed(gates))

    Around ``per_leaf(...)`` the optimizer's work on frozen leaves is saved too. (So keep what depends on the time, a
    schedule of the rate, outside: under ``per_leaf`` it would wait with the leaf.) A frozen leaf that nobody looks at
    could never thaw: so with every ``probe_every`` updates the gates open for one backward pass, and in the step after
    a loss that lies more than ``alarm`` standard deviations above its slow mean (``value=``; at most once in
    ``probe_every`` updates, unless it lies four times as far). Readings that were skipped leave ``e`` alone; the next
    one after ``k`` updates weighs ``1 - decay**k``. A gradient that is not finite, or comes with a loss that is not, is
    no reading and no pause: that leaf stays where it is in that step, moments included.

    The original sets ``requires_grad=False`` and hopes that gradients return, which they cannot; the threshold there
    is on the norm, which grows with the size of the leaf.

    Args:
      inner: the whole optimizer, the learning rate included.
      threshold: root mean square of a gradient, >= 0. Batches of other sizes have other gradients.
      decay: of the running mean, in [0, 1).
      min_steps: readings before a leaf may freeze, >= 0.
      patience: readings in a row, >= 1.
      release: >= 1; a leaf thaws above ``release * threshold``.
      min_dwell: updates that a leaf stays frozen at least, >= 0.
      max_share: of the parameters, in [0, 1]: more do not freeze. Those with the smallest means go first, and what is
        frozen already goes before them. By element: of every leaf.
      per: ``"leaf"``, or ``"element"``: every weight has a gate of its own (13 bytes a weight). That saves nothing in
        the backward pass; it regularises.
      groups: tree of labels or ints (such as ``layer_depths``) with the structure of params, a prefix, or a function:
        leaves of one value freeze together, by their greatest mean. Layer by layer saves most.
      moments: ``"keep"``, or ``"reset"``: what freezes has its part of the optimizer's state started again. Where there
        is a step count, each leaf needs its own (``per_leaf``), and by element nothing will do.
      probe_every: updates between two probes, >= 1.
      alarm: standard deviations, >= 0; ``None`` for none.

    Returns:
      A transformation; ``frozen(state)`` reads the gates. ``update`` reads ``observed=`` (see ``skip_unobserved``) and
      ``value=``; both may be absent. (A frozen leaf whose gradient is exactly 0 is then taken as not observed.)

    Raises:
      ValueError: for numbers out of range, ``groups`` with ``per="element"``, and at ``init`` for ``moments="reset"``
        around a shared step count and for ``groups`` of another tree.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.freeze_on_small_gradients(oxs.per_leaf(optax.adamw(0.1)), min_steps=0, patience=2)
      >>> params = {"body": jnp.ones(4), "head": jnp.ones(2)}
      >>> grads, state = {"body": jnp.full(4, 1e-5), "head": jnp.ones(2)}, tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(grads, state, params)
      >>> {name: bool(gate) for name, gate in oxs.frozen(state).items()}, float(updates["body"][0])
      ({'body': True, 'head': False}, 0.0)

    References:
      Liu et al., AutoFreeze, 2021; Wang et al., Egeria, 2023 (thaws too); Wen et al., GradES, 2025.
    """
    numbers = Numbers(threshold, min_steps, patience, release, min_dwell, max_share)
    _check(numbers, decay, per, groups, moments)
    check_number("probe_every", probe_every, low=1)
    if alarm is not None:
        check_number("alarm", alarm)
    inner = takes_extra_args(inner)
    by_element = per == "element"

    def cells(params: PyTree, value: Any, dtype: Any) -> PyTree:
        return jax.tree.map(lambda p: jnp.full(p.shape if by_element else (), value, dtype), params)

    def scalars(params: PyTree, dtype: Any) -> PyTree:
        return jax.tree.map(lambda _: jnp.zeros((), dtype), params)

    def init_fn(params: optax.Params) -> FreezeState:
        _groups(groups, params)  # groups of another tree are named now
        inner_state = inner.init(params)
        if moments == "reset":
            _check_counts(inner, inner_state, params, by_element)
        return FreezeState(
            cells(params, False, bool),
            cells(params, 0, jnp.int32),
            Readings(
                cells(params, 0, jnp.float32),
                cells(params, 0, jnp.float32),  # by element, since elements may be born later than their leaf
                scalars(params, jnp.int32),
                scalars(params, jnp.int32),
            ),
            first_watch(probe_every),
            inner_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: FreezeState,
        params: optax.Params | None = None,
        *,
        value: Any = None,
        observed: PyTree | None = None,
        masks: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FreezeState]:
        leaves, treedef = jax.tree.flatten(updates)
        extra_args |= {name: of for name, of in (("value", value), ("masks", masks)) if of is not None}
        loss = None if value is None else mean_loss(value)
        sound = jnp.ones((), bool) if loss is None else jnp.isfinite(loss)
        looked = observed_flags(observed, updates)
        living = treedef.flatten_up_to(align(True if masks is None else masks, updates, "masks"))
        columns = [treedef.flatten_up_to(tree) for tree in (state.frozen, state.streak, *state.readings)]
        before = [Cell(*of) for of in zip(*columns, strict=True)]
        size_of = magnitude if by_element else root_mean_square_if
        sizes = [size_of(leaf, flag, mask) for leaf, flag, mask in zip(leaves, looked, living, strict=True)]
        if observed is None:
            # Gated layers without `observed=`: a frozen leaf without any gradient was hardly looked at.
            looked = [~(jnp.all(c.frozen) & jnp.all(size == 0)) for c, size in zip(before, sizes, strict=True)]
        read_now = [
            read(cell, size, flag, sound, decay) for cell, size, flag in zip(before, sizes, looked, strict=True)
        ]
        if by_element:
            after = decide_by_element(read_now, numbers)
        else:
            after = decide(read_now, _groups(groups, updates), [leaf.size for leaf in leaves], numbers)
        # The gates of this step are those of the state, which the backward pass went by; what was decided just now
        # holds from the next step on. Otherwise no leaf could be updated before all gradients were there and read.
        # What is known before the program runs to be unobserved is left out of it.
        live = [
            False if flag is False else now.was_read & ~then.frozen
            for flag, now, then in zip(looked, after, before, strict=True)
        ]
        watch = watched(state.watch, loss, before, after, looked, probe_every, alarm)
        updates, inner_state = update_where(
            inner, treedef.unflatten(live), updates, state.inner_state, params, extra_args
        )
        if moments == "reset":
            fresh = inner.init(require_params(params))
            keeps = [~(now.frozen & ~then.frozen) for then, now in zip(before, after, strict=True)]
            inner_state = choose_state(inner, treedef.unflatten(keeps), updates, fresh, inner_state)
        gates, streak, *readings = (
            treedef.unflatten([cell[field] for cell in after]) for field in range(len(Cell._fields) - 1)
        )
        return updates, FreezeState(gates, streak, Readings(*readings), watch, inner_state)

    shown = {name: value for name, value in numbers._asdict().items()} | {"decay": decay, "per": per}
    cost = "13 B a weight" if by_element else "21 B a leaf"
    return transformation(init_fn, update_fn, Rule("freeze_on_small_gradients", shown, cost, (inner,)))


def _check(numbers: Numbers, decay: Any, per: str, groups: Any, moments: str) -> None:
    check_number("threshold", numbers.threshold)
    check_number("min_steps", numbers.min_steps)
    check_number("patience", numbers.patience, low=1)
    check_number("release", numbers.release, low=1)
    check_number("min_dwell", numbers.min_dwell)
    check_number("max_share", numbers.max_share, high=1.0)
    check_number("decay", decay, high=1.0)
    if not is_traced(decay) and float(decay) == 1:
        raise ValueError(f"decay={decay!r} must be below 1: at 1 the running mean never moves.")
    if per not in ("leaf", "element"):
        raise ValueError(f"per={per!r} must be 'leaf' or 'element'.")
    if per == "element" and groups is not None:
        raise ValueError("groups= are of whole leaves: leave them out with per='element'.")
    if moments not in ("keep", "reset"):
        raise ValueError(f"moments={moments!r} must be 'keep' or 'reset'.")


def _check_counts(inner: optax.GradientTransformation, state: optax.OptState, params: PyTree, by_element: bool) -> None:
    for entry in slots.read(inner, state, params):
        if not entry.moments or not jnp.issubdtype(entry.value.dtype, jnp.integer):
            continue
        if by_element or entry.path is None:
            whose, cure = ("an element", "Use moments='keep'") if by_element else ("a leaf", "Wrap it in per_leaf(...)")
            raise ValueError(
                f"moments='reset' needs a step count {whose}, and {entry.describe()} is shared: moments that start "
                f"again under it make updates several times too large. {cure}."
            )


def _groups(groups: PyTree | None, updates: optax.Updates) -> list[Any]:
    if groups is None:
        return list(range(len(jax.tree.leaves(updates))))
    leaves = jax.tree.leaves(align(groups, updates, "groups"))
    return [leaf.item() if isinstance(leaf, np.ndarray | jax.Array) else leaf for leaf in leaves]


def states_of(state: optax.OptState) -> list[FreezeState]:
    """The states of ``freeze_on_small_gradients`` in a state, outermost first."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, FreezeState))
    return [node for node in nodes if isinstance(node, FreezeState)]


def frozen(state: optax.OptState) -> PyTree:
    """Which leaves are frozen now: the gates of ``freeze_on_small_gradients``, however deep it is nested.

    Args:
      state: the state of any chain or partition with it.

    Returns:
      Tree of the structure of params: a bool scalar a leaf, or an array of its shape with ``per="element"``. A leaf in
      no such group of a partition has ``False``.

    Raises:
      ValueError: for a state without it.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.freeze_on_small_gradients(optax.sgd(0.1))
      >>> oxs.frozen(tx.init({"w": jnp.ones(2)}))
      {'w': Array(False, dtype=bool)}
    """
    found = states_of(state)
    if not found:
        raise ValueError("nothing freezes in this state: it is not the state of freeze_on_small_gradients(inner).")
    return put_together([of.frozen for of in found], jnp.zeros((), bool))


def skippable(state: optax.OptState) -> PyTree:
    """``frozen(state)`` for the coming backward pass: nothing in a step that probes."""

    def closed(of: FreezeState) -> PyTree:
        probes = jax.tree.map(jnp.any, of.watch.probe)  # inside per_leaf there is one a leaf
        probe = jax.tree.reduce(jnp.logical_or, probes, jnp.zeros((), bool))
        return jax.tree.map(lambda gate: gate & ~probe, of.frozen)

    return put_together([closed(of) for of in states_of(state)], jnp.zeros((), bool))
