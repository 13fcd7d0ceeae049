"""What happens to the structure between two dispatches: growth and rewiring.

All of it is host-side: pure functions from one ``Net`` to a ``Growth``. Mask edits keep every shape, so the compiled
step goes on; ``widen`` and ``insert_layer`` do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_structure._tree import Params, PyTree, leaves_by_path
from optax_structure.extrema import Extrema
from optax_structure.growth import (
    add_connections,
    embed_patches,
    extrema_scores,
    insert_layer,
    prune_connections,
    widen,
)
from optax_structure.sparsity.masks import nonzero
from optax_structure.structure import NOT_BORN, Growth, Units
from optax_structure.training.config import Action, Config

WIDEN_SHARE = 8
"""A widened layer gets one unit more for every so many that it has."""


class Net(NamedTuple):
    """What growth actions take and give: params, labels, masks, units."""

    params: Params
    labels: PyTree
    masks: PyTree
    units: Units


class Evidence(NamedTuple):
    """What decides where capacity goes.

    Attributes:
      extrema: dead and saturated units, gathered inside the training step.
      gradients: the dense gradients of one batch at any params of any units.
    """

    extrema: Extrema
    gradients: Callable[[Params, Units], Params]


def net_of(growth: Growth) -> Net:
    """The network after a change."""
    return Net(growth.params, growth.labels, growth.masks, growth.units)


def scores_of(config: Config, net: Net, evidence: Evidence, key: jax.Array) -> PyTree | None:
    """What absent connections are ranked by; ``None`` is uniformly random.

    ``extrema``: the inputs of dead units and the outputs of saturated ones first. ``gradient``: in proportion to the
    absolute dense gradient of one batch, by Gumbel noise on its logarithm, where RigL takes the largest outright: the
    largest crowd in a few units.
    """
    if config.placement == "extrema":
        return extrema_scores(net.params, net.masks, net.units, evidence.extrema, key=key)
    if config.placement == "random":
        return None
    return _sampled(key, evidence.gradients(net.params, net.units))


@jax.jit
def _sampled(key: jax.Array, grads: Params) -> PyTree:
    leaves, treedef = jax.tree.flatten(grads)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        treedef,
        [0.5 * jnp.log(jnp.abs(g) + 1e-12) + jax.random.gumbel(k, g.shape) for g, k in zip(leaves, keys, strict=True)],
    )


def then(first: Growth, second: Growth) -> Growth:
    """Two mask-only changes as one: what either gave birth to, unless the second took it away."""

    def births(one: Any, two: Any, mask: Any) -> Any:
        if not np.ndim(one):
            return two
        return _merged(one, two, mask)

    return second._replace(born=jax.tree.map(births, first.born, second.born, second.masks))


@jax.jit
def _merged(one: jax.Array, two: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(two != NOT_BORN, two, jnp.where(mask, one, jnp.uint8(NOT_BORN)))


def rewire(config: Config, net: Net, evidence: Evidence, fraction: float, key: jax.Array) -> Growth | None:
    """The weakest ``fraction`` of the connections pruned and as many put elsewhere, as scaffold; None where none is."""
    count = int(fraction * nonzero(net.masks))
    if not count:
        return None
    keys = jax.random.split(key, 3)
    pruned = prune_connections(*net, count, key=keys[0])
    scores = scores_of(config, net, evidence, keys[1])
    return then(pruned, add_connections(*net_of(pruned), count, key=keys[2], scores=scores))


def grow(config: Config, net: Net, action: Action, target: int, evidence: Evidence, key: jax.Array) -> Iterator[Growth]:
    """One growth event, ending with exactly ``target`` connections; one ``Growth`` a change, to be transferred in turn.

    The action first; then missing connections are added by the run's placement, or the weakest pruned.
    """
    keys = jax.random.split(key, 2)
    room = target - nonzero(net.masks)
    if action == "patches" and room > 0:
        blocks = math.ceil(room / config.patch_size**2)
        extrema = _ends(config, net, evidence)
        embedded = embed_patches(*net, blocks, key=keys[0], size=config.patch_size, extrema=extrema, max_new=room)
        settled = _settle(config, net_of(embedded), target, evidence, keys[1])
        yield embedded if settled is None else then(embedded, settled)
        return
    if action in ("widen", "insert"):
        layer = _layer(config, net, evidence, keys[0])
        if action == "widen":
            changed = widen(*net, layer, max(1, net.units.group(layer).size // WIDEN_SHARE), key=keys[0])
        else:
            changed = insert_layer(*net, layer, key=keys[0])
        yield changed
        net = net_of(changed)
        # Statistics of the old shape say nothing of the new: this one choice is made at random.
        if config.placement == "extrema":
            config = config.replace(placement="random")
    settled = _settle(config, net, target, evidence, keys[1])
    if settled is not None:
        yield settled


def _settle(config: Config, net: Net, target: int, evidence: Evidence, key: jax.Array) -> Growth | None:
    missing = target - nonzero(net.masks)
    keys = jax.random.split(key, 2)
    if missing > 0:
        scores = scores_of(config, net, evidence, keys[0])
        return add_connections(*net, missing, key=keys[1], scores=scores, component="new")
    return prune_connections(*net, -missing, key=keys[1]) if missing else None


def _pull(net: Net, evidence: Evidence) -> dict[str, dict[str, np.ndarray]]:
    """Role -> hidden layer -> summed absolute gradient of each unit's absent connections on that side."""
    grads = leaves_by_path(evidence.gradients(net.params, net.units))
    masks = leaves_by_path(net.masks)
    pull: dict[str, dict[str, np.ndarray]] = {"incoming": {}, "outgoing": {}}
    for group in net.units.groups[1:-1]:
        for axis in group.axes:
            if axis.role in pull:
                absent = np.where(masks[axis.path], 0.0, np.abs(grads[axis.path]))
                pull[axis.role][group.layer] = absent.sum(axis=1 - axis.axis)
    return pull


def _ends(config: Config, net: Net, evidence: Evidence) -> Extrema | None:
    """Units that patches lead from (as saturated) and to (as dead), by placement; None: anywhere."""
    if config.placement == "extrema":
        return evidence.extrema
    if config.placement == "random":
        return None

    def strongest(pull: np.ndarray) -> jax.Array:
        return jnp.asarray(pull >= np.sort(pull)[-max(1, len(pull) // 8)])

    pull = _pull(net, evidence)
    return Extrema(
        dead={layer: strongest(values) for layer, values in pull["incoming"].items()},
        saturated={layer: strongest(values) for layer, values in pull["outgoing"].items()},
    )


def _layer(config: Config, net: Net, evidence: Evidence, key: jax.Array) -> str:
    """The hidden layer that is widened or followed by a new one, by placement."""
    hidden = net.units.layers[:-1]
    if config.placement == "random":
        return hidden[int(jax.random.randint(key, (), 0, len(hidden)))]
    if config.placement == "gradient":
        pull = _pull(net, evidence)["incoming"]
        return max(hidden, key=lambda layer: float(pull[layer].mean()))
    dead, saturated = evidence.extrema
    return max(hidden, key=lambda layer: float(jnp.mean(dead[layer] | saturated[layer])))
