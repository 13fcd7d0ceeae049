"""What the control of a run did at a step, as scalars to be logged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_structure._tree import Params, PyTree, leaves_by_path
from optax_structure.transforms.feedback._control import FeedbackState
from optax_structure.transforms.freezing.gradients import FreezeState

# Field of the state -> key. What a state does not know (the rate, where only its scale is controlled) is None there.
_SCALARS = {
    "learning_rate": "lr",
    "scale": "lr_scale",
    "momentum": "momentum",
    "fast": "loss_ema",
    "skipped": "skipped",
}
_WEIGHTS = {"lr_weights": "w_lr", "momentum_weights": "w_momentum"}


def snapshot(state: optax.OptState, params: Params | None = None) -> dict[str, jax.Array]:
    """The learning rate, momentum, weights of the rules and share of frozen parameters that are in force.

    The states of ``feedback_sgd``, ``feedback_adam``, ``scale_by_feedback`` and ``freeze_on_small_gradients`` are found
    however deep they are nested. Nothing is fetched from the device, so that it may be called inside ``jax.jit`` and
    ``lax.scan``, and its result collected by ``training.logging.RollingLog``; the scalars are copies, which live on
    when the state is donated. The keys, of which those are there that the state says something about:

    - ``lr``: the learning rate; of ``scale_by_feedback``, which does not know it, only ``lr_scale``
    - ``lr_scale``: the factor on the base rate
    - ``momentum``: momentum, or Adam's b1
    - ``w_lr/<rule>``, ``w_momentum/<rule>``: the weights that the rules had in the last update
    - ``loss_ema``: the fast running mean of the loss
    - ``skipped``: updates that were left out because the loss or a gradient was not finite
    - ``share_frozen``, ``pct_frozen``: frozen parameters / all parameters, in [0, 1], and 100 times that

    Where a state holds several feedbacks, the keys of each begin with the labels of the ``optax.partition`` around it
    (``head/lr``), and, where two are under the same labels, their number there (``0/lr``, ``head/1/lr``). The keys of
    one with ``per_label=True`` begin with its own labels; under ``per_leaf``, with the path of the leaf. Parameters
    that are frozen without a state (``freeze_labels``) do not count as frozen. Before the first update there is no
    rate, and ``lr`` is 0.

    Args:
      state: the state of any chain, partition or wrapper with one of these in it.
      params: whose sizes weigh the flags of the leaves; shapes are enough (``jax.eval_shape``). Without them every flag
        counts once: right where every element has its own, but where a leaf has one, ``share_frozen`` is the share of
        leaves, and only of those that the freezing is applied to.

    Returns:
      Key -> float32 scalar.

    Raises:
      ValueError: when the state holds none of these, or ``params`` are not those of the state.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> tx, params = oxs.feedback_sgd(0.1, momentum=0.9), {"w": jnp.ones(2)}
      >>> _, state = tx.update({"w": jnp.ones(2)}, tx.init(params), params, value=2.0)
      >>> sorted(oxs.snapshot(state))
      ['loss_ema', 'lr', 'lr_scale', 'momentum', 'skipped', 'w_lr/grad_norm', 'w_lr/trend', 'w_lr/variance',
       'w_momentum/inverse', 'w_momentum/relative']
    """
    feedbacks: list[tuple[tuple[str, ...], FeedbackState]] = []
    freezings: list[PyTree] = []
    for labels, node in _states(state, ()):
        if isinstance(node, FeedbackState):
            feedbacks.append((labels, node))
        if isinstance(node, FreezeState):
            freezings.append(node.frozen)
    if not feedbacks and not freezings:
        raise ValueError(
            "nothing to report in this state: it is of no transformation with feedback_sgd, feedback_adam, "
            "scale_by_feedback or freeze_on_small_gradients."
        )
    report: dict[str, jax.Array] = {}
    for prefix, node in _prefixed(feedbacks):
        for key, value in _of_feedback(node):
            if prefix + key in report:
                raise ValueError(
                    f"two values would be called {prefix + key!r}: give the label {prefix!r} another name."
                )
            # A copy: outside jit the state's own buffer would go with it when it is donated.
            report[prefix + key] = jnp.array(value, jnp.float32)
    if freezings:
        share = _share_frozen(freezings, params)
        report |= {"share_frozen": share, "pct_frozen": 100 * share}
    return report


def _states(node: Any, labels: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every NamedTuple of a state with the labels of the partitions around it, the outer ones first."""
    if isinstance(node, optax.transforms.PartitionState):
        for label, inner in node.inner_states.items():
            yield from _states(inner, (*labels, str(label)))
        return
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        yield labels, node
    for child in jax.tree.leaves(node, is_leaf=lambda child: child is not node):
        if child is not node:
            yield from _states(child, labels)


def _prefixed(feedbacks: list[tuple[tuple[str, ...], FeedbackState]]) -> Iterator[tuple[str, FeedbackState]]:
    """Each feedback with what its keys begin with: nothing where there is one."""
    all_labels = [labels for labels, _ in feedbacks]
    for place, (labels, node) in enumerate(feedbacks):
        alike = all_labels.count(labels) > 1
        parts = (*labels, str(all_labels[:place].count(labels))) if alike else labels
        yield "".join(f"{part}/" for part in parts) if len(feedbacks) > 1 else "", node


def _of_feedback(node: FeedbackState) -> Iterator[tuple[str, jax.Array]]:
    for field, key in _SCALARS.items():
        value = getattr(node, field)
        if isinstance(value, dict) and all(name.startswith(f"{field}/") for name in value):  # with per_label
            value = {name.removeprefix(f"{field}/"): leaf for name, leaf in value.items()}
        yield from _by_label(key, value)
    for field, key in _WEIGHTS.items():
        for name, weight in getattr(node, field).items():
            rule, _, label = name.removeprefix(f"{field}/").partition("/")  # with per_label
            yield from _by_label(f"{label}/{key}/{rule}".strip("/"), weight)


def _by_label(key: str, value: PyTree) -> Iterator[tuple[str, jax.Array]]:
    for label, leaf in leaves_by_path(value).items():
        yield f"{label}/{key}".strip("/"), leaf


def _share_frozen(freezings: list[PyTree], params: Params | None) -> jax.Array:
    """Frozen parameters / all parameters, float32: a parameter is frozen where any of the freezings says so."""
    if params is None:
        flags = [leaf for frozen in freezings for leaf in jax.tree.leaves(frozen)]
        sizes = [jnp.size(leaf) for leaf in flags]
    else:
        # By path: the optimizer of Flax NNX holds its state in nodes of its own, and a group of a partition has no leaf
        # where the leaves of the other groups are.
        shapes = {path: leaf.shape for path, leaf in leaves_by_path(params).items()}
        found: dict[str, Any] = dict.fromkeys(shapes, jnp.zeros((), bool))
        for path, flag in (pair for frozen in freezings for pair in leaves_by_path(frozen).items()):
            if path not in shapes or jnp.shape(flag) not in ((), shapes[path]):
                gate = f"where a gate has {jnp.shape(flag)}"
                here = f"{path!r} of shape {shapes[path]}, {gate}" if path in shapes else f"no {path!r}"
                raise ValueError(f"params are not those of the state: they have {here}.")
            found[path] |= flag
        flags, sizes = list(found.values()), [math.prod(shape) for shape in shapes.values()]
    if not sum(sizes):
        return jnp.zeros((), jnp.float32)
    # Counted as integers: a sum of ones in float32, taken one by one, stands still at 2**24.
    shares = [jnp.count_nonzero(flag).astype(jnp.float32) / max(jnp.size(flag), 1) for flag in flags]
    return jnp.minimum(jnp.sum(jnp.stack(shares) * np.asarray(sizes, np.float32)) / float(sum(sizes)), 1.0)
