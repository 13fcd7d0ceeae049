"""Optimizer state through relabelling, growth and pruning, for arbitrary optax chains.

``transfer_state`` builds the state of the new optimizer on the new parameters from the old state. Nothing is guessed:
a moment is found by what it is (``slots``, ``planning``), its rows move as ``Growth.sources`` says (``moving``),
what is new starts as ``new_tx.init`` makes it, and what cannot be carried raises, naming the state.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import Params, PyTree, align, leaves_by_path, put_together
from optax_structure.state import slots
from optax_structure.state.carrying import arrays, carry, carry_in_place, masks_in, moved_sources, shapes, with_grads
from optax_structure.state.markers import Masks, RewiringClock
from optax_structure.state.moving import Change
from optax_structure.state.planning import Mixed, is_hyperparam
from optax_structure.state.slots import Entry
from optax_structure.structure import Growth


def transfer_state(
    old_tx: optax.GradientTransformation,
    old_state: optax.OptState,
    old_params: Params,
    new_tx: optax.GradientTransformation,
    new_params: Params,
    *,
    growth: Growth | None = None,
    grads: Params | None = None,
    restart: Collection[str] = (),
    mixed: Mixed = "error",
) -> optax.OptState:
    """The state of ``new_tx`` on ``new_params`` that goes on from the state of ``old_tx``.

    Every array of the new state is matched with the old array that is the same quantity of the same parameter: chain
    positions and partition labels do not matter, so relabelling, freezing, wrapping and going back are all one case.

    - A leaf that exists in both keeps its moments; rows move as ``growth.sources`` says; a renamed leaf is followed.
    - A new leaf is fresh, and so is a new element of a living leaf, except that second moments (Adam's ``nu`` and its
      kin) start at the mean of the living ones times ``max(1, g**2 / mean(g_living**2))``: zero would make the first
      updates 3.2 times too large, the plain mean as many times as its gradient is larger. Without ``grads`` the ratio
      is taken as 1. (Where more than the second moment hangs on a shared count, a new element of a living leaf is not
      bounded so well: with RAdam and MADGRAD it starts up to 6 times a fresh optimizer's, with AdaMax more slowly.)
    - A connection that left the mask loses its state; one that came in is fresh, with its birth and component entered
      in the cohorts of ``scale_by_connection``.
    - Masks come from ``growth`` where it is given, else from ``new_tx``; masks that rewire themselves go on as they are
      in the state, where a leaf keeps its shape. Schedules of ``scale_by_label`` start again
      for leaves whose label changed. Hyperparameters edited in the state survive, unless ``new_tx`` was built with
      another value.
    - One counter over leaves of different age is an error by default (see ``mixed``). A counter without moments at the
      root (a learning-rate schedule, ``MultiSteps``) is the clock of the run and always goes on. A partition group
      that empties keeps its counters; one that was empty takes those of the leaves that enter, or 0 for fresh ones.

    After a change of masks alone, pass the same transformation twice and go on in the old compiled step: the second
    such call compiles nothing.

    Args:
      old_tx, old_state, old_params: what trained until now. Of ``old_params`` only structure and shapes are read.
      new_tx, new_params: what goes on.
      growth: the record of the change of structure; needed when a shape or the place of a leaf changed.
      grads: gradients at ``new_params`` (dense ones: of absent connections too), read for fresh elements only.
      restart: paths, path prefixes, or labels (of ``growth.labels`` or of a partition) that start fresh.
      mixed: for one counter over leaves of different age: ``"error"`` names it, ``"carry"`` takes the group's own,
        ``"fresh"`` starts at 0.

    Returns:
      A state with the structure, shapes and dtypes of ``new_tx.init(new_params)``, placed as its parameters are.

    Raises:
      ValueError: naming the state, when an array of it cannot be carried, and the leaves, for a mixed counter.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.per_leaf(optax.adam(1e-3))
      >>> params = {"hidden": jnp.ones(3)}
      >>> _, state = tx.update({"hidden": jnp.ones(3)}, tx.init(params), params)
      >>> grown = {"hidden": jnp.ones(3), "head": jnp.ones(2)}
      >>> state = oxs.transfer_state(tx, state, params, tx, grown)
      >>> {name: int(count) for name, count in state[0].count.items()}
      {'head': 0, 'hidden': 1}

    References:
      Chen, Goodfellow & Shlens, Net2Net, 2016; Evci et al., Rigging the lottery, 2020 (which start at zero).
    """
    if mixed not in ("error", "carry", "fresh"):
        raise ValueError(f"mixed={mixed!r} must be 'error', 'carry' or 'fresh'.")
    if new_tx is old_tx and growth is not None and not (growth.rename or restart) and _same(old_params, new_params):
        return carry_in_place(new_tx, old_state, new_params, growth, grads)
    fresh_state = new_tx.init(new_params)
    old = slots.read(old_tx, old_state, old_params)
    new = slots.read(new_tx, fresh_state, new_params)
    leaves = leaves_by_path(new_params)
    rename = growth.rename if growth is not None else {}
    for path, origin in rename.items():
        if path not in leaves or origin not in shapes(old_params):
            raise ValueError(f"growth.rename: {path!r} from {origin!r} must lead from an old leaf to a new one.")
    labels = leaves_by_path(growth.labels) if growth is not None else {}
    before = masks_in(old)
    old_masks = {path: before[rename.get(path, path)] for path in leaves if rename.get(path, path) in before}
    new_masks = arrays(growth.masks) if growth is not None else masks_in(new)
    if growth is None and any(entry.kind is RewiringClock for entry in old):
        stays = [path for path, of in old_masks.items() if path in new_masks and new_masks[path].shape == of.shape]
        new_masks |= {path: old_masks[path] for path in stays}
    change = Change(
        sources=moved_sources(growth, shapes(old_params), leaves) if growth is not None else {},
        old_masks=old_masks,
        new_masks=new_masks,
        born=arrays(growth.born) if growth is not None else {},
    )
    return carry(
        old,
        new,
        jax.tree.structure(fresh_state),
        old_shapes=shapes(old_params),
        new_leaves=leaves,
        rename=rename,
        restarted=_restarted(restart, list(leaves), labels, new),
        labels=labels,
        mixed=mixed,
        built=_built(old_tx, old_params, new),
        change=with_grads(change, grads, new_params),
    )


def reset_state(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    params: Params,
    where: PyTree,
    *,
    grads: Params | None = None,
) -> optax.OptState:
    """Start the state of some leaves, or of some of their elements, again: after re-initialising those parameters.

    Args:
      tx: the transformation that ``state`` belongs to.
      state: its state.
      params: the parameters, with the re-initialised values in place.
      where: tree of the structure of ``params``. A scalar ``True`` resets the whole leaf, its own counters included
        (under ``per_leaf``); an array that broadcasts to the leaf's shape resets the elements where it is true. A
        whole unit is reset by a row, ``where[None, :]``. Masks stay; the connections' births start again.
      grads: gradients at ``params``. They bound the first updates of the elements that are reset; without them this
        holds for gradients no larger than the living ones.

    Returns:
      The state, of unchanged structure.

    Raises:
      ValueError: when a whole leaf is reset under a counter that other leaves share, naming both.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx, params = optax.trace(0.9), {"w": jnp.ones(2)}
      >>> _, state = tx.update({"w": jnp.ones(2)}, tx.init(params))
      >>> oxs.reset_state(tx, state, params, {"w": jnp.array([True, False])}).trace["w"].tolist()
      [0.0, 1.0]

    References:
      Sokar et al., The dormant neuron phenomenon in deep reinforcement learning, 2023 (ReDo).
    """
    fresh_state = tx.init(params)
    old = slots.read(tx, state, params)
    new = slots.read(tx, fresh_state, params)
    leaves = leaves_by_path(params)
    chosen = leaves_by_path(align(where, params, "where"))
    whole = frozenset(path for path, flag in chosen.items() if np.ndim(flag) == 0 and bool(flag))
    masks = masks_in(old)
    reset = {path: jnp.ones(np.shape(leaves[path]), bool) for path in whole}
    for path, flag in chosen.items():
        if np.ndim(flag):
            try:
                flags = jnp.broadcast_to(flag, leaves[path].shape)
            except ValueError as error:
                found = f"{np.shape(flag)}, its parameter {leaves[path].shape}"
                raise ValueError(f"where: {path!r} has shape {found}; it must broadcast to it.") from error
            reset[path] = flags
    return carry(
        old,
        new,
        jax.tree.structure(fresh_state),
        old_shapes=shapes(params),
        new_leaves=leaves,
        rename={},
        restarted=whole,
        labels={},
        mixed="error",
        built={},
        change=with_grads(Change(old_masks=masks, new_masks=masks, reset=reset), grads, params),
    )


def get_masks(state: optax.OptState) -> PyTree:
    """The masks that ``sparse`` holds in a state, however deep it is nested.

    Args:
      state: the state of any chain or partition with ``sparse`` in it; of an ``nnx.Optimizer``, its ``opt_state``.

    Returns:
      Tree of masks with the structure of params. Where several groups of a partition are sparse, their masks are put
      together; a leaf (or a subtree that got one label) in no sparse group has the scalar ``True``.

    Raises:
      ValueError: when nothing in the state is sparse.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.sparse(optax.sgd(0.1), {"kernel": jnp.eye(2, dtype=bool)})
      >>> oxs.get_masks(tx.init({"kernel": jnp.eye(2)}))["kernel"].tolist()
      [[True, False], [False, True]]
    """
    found = [
        node.masks
        for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Masks))
        if isinstance(node, Masks)
    ]
    if not found:
        raise ValueError(
            "no masks in this state: pass that of a transformation with sparse(inner, masks), as tx.init gave it (of "
            "nnx.Optimizer: optimizer.opt_state)."
        )

    return put_together(found, jnp.ones((), bool))


def hyperparams_by_label(state: optax.OptState, name: str = "learning_rate") -> dict[str, jax.Array]:
    """The current value of an injected hyperparameter in every group of a partition.

    Args:
      state: a state with ``optax.inject_hyperparams`` in it.
      name: the hyperparameter.

    Returns:
      Label -> value. Labels of nested partitions are joined with ``/``; outside any partition the label is ``all``.

    Raises:
      ValueError: when no group has it, naming those that exist, or one has it twice.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> adam = optax.inject_hyperparams(optax.adam)
      >>> tx = optax.partition({"new": adam(0.5), "scaffold": adam(0.25)}, {"a": "new", "b": "scaffold"})
      >>> values = oxs.hyperparams_by_label(tx.init({"a": jnp.ones(1), "b": jnp.ones(1)}))
      >>> {label: float(value) for label, value in values.items()}
      {'new': 0.5, 'scaffold': 0.25}
    """
    values: dict[str, jax.Array] = {}
    names: set[str] = set()

    def walk(node: Any, group: tuple[str, ...]) -> None:
        if isinstance(node, optax.transforms.PartitionState):
            for label, inner in node.inner_states.items():
                walk(inner, (*group, str(label)))
            return
        hyperparams = getattr(node, "hyperparams", None)
        if isinstance(hyperparams, Mapping):
            names.update(hyperparams)
            label = "/".join(group) or "all"
            if name in hyperparams and label in values:
                raise ValueError(
                    f"name={name!r} is injected twice in the group {label!r}: read it with optax.tree.get."
                )
            if name in hyperparams:
                values[label] = hyperparams[name]
        for child in jax.tree.leaves(node, is_leaf=lambda child: child is not node):
            if child is not node:
                walk(child, group)

    walk(state, ())
    if not values:
        raise ValueError(f"name={name!r} is not injected in this state; injected are {sorted(names) or 'none'}.")
    return values


def _same(old_params: Params, new_params: Params) -> bool:
    return jax.tree.structure(old_params) == jax.tree.structure(new_params) and shapes(old_params) == shapes(new_params)


def _restarted(
    restart: Collection[str], paths: list[str], labels: Mapping[str, str], entries: list[Entry]
) -> frozenset[str]:
    if isinstance(restart, str):
        raise ValueError(f"restart={restart!r} must be a collection of paths or labels: restart=({restart!r},).")
    chosen: set[str] = set()
    for name in restart:
        mine = {path for path in paths if path == name or path.startswith(f"{name}/")}
        mine |= {path for path, label in labels.items() if label == name}
        mine |= {entry.path for entry in entries if entry.path is not None and name in entry.group}
        if not mine:
            raise ValueError(f"restart: {name!r} is neither a label nor a path; the paths are {paths}.")
        chosen |= mine
    return frozenset(chosen)


def _built(tx: optax.GradientTransformation, params: Params, entries: list[Entry]) -> dict[Any, Any]:
    """The hyperparameters that ``tx`` was built with, read only when there are any."""
    if not any(is_hyperparam(entry) for entry in entries):
        return {}
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
    built = slots.read(tx, tx.init(zeros), zeros)
    return {(e.trail, e.index, e.group): e.value for e in built if is_hyperparam(e)}
