"""One rewiring: which connections go and come, and what that does to the optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from optax_structure._tree import Params, PyTree, is_masked, leaves_by_path, map_with_path
from optax_structure.sparsity.draws import top_k_at_random
from optax_structure.state.carrying import Renewal
from optax_structure.state.markers import RewiringClock
from optax_structure.transforms.rewiring.rules import Rewiring
from optax_structure.transforms.rewiring.scores import Score, ScoredLeaf

_GOLDEN = (math.sqrt(5) - 1) / 2
_SETTLED = 20
"""Updates after which the second moments of new connections are estimated by gradients that did not choose them."""

ByPath = Mapping[str, Array]


def first_clock(rule: Rewiring, masks: PyTree) -> RewiringClock:
    """Nothing counted."""
    grads = jax.tree.map(lambda mask: jnp.zeros(jnp.shape(mask), jnp.float32), masks) if rule.accumulate > 1 else ()
    return RewiringClock(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, masks), grads)


class Step(NamedTuple):
    """What an update goes on with."""

    changed: Array
    masks: PyTree
    inner_state: optax.OptState
    clock: RewiringClock


def rewire_if_due(
    rule: Rewiring,
    inner: optax.GradientTransformation,
    clock: RewiringClock,
    masks: PyTree,
    inner_state: optax.OptState,
    params: Params,
    grads: PyTree,
) -> Step:
    """The masks of this update, and the state in which new connections have no past; a branch that is rarely taken."""
    sparse = {path: mask for path, mask in leaves_by_path(masks).items() if jnp.ndim(mask)}
    count = jnp.asarray(optax.safe_increment(clock.count), jnp.int32)
    if not sparse:  # an empty group of optax.partition
        return Step(jnp.zeros((), bool), masks, inner_state, clock._replace(count=count))
    since = (count - rule.start) % rule.every
    due = rule.is_due(count)
    age = min(_SETTLED, rule.every // 2)
    # At most half a period later, so never together with the next.
    settles = rule.is_due(count - age) if age else jnp.zeros((), bool)
    raw = leaves_by_path(grads)
    sums = {}
    if rule.accumulate > 1:
        # The last updates before a rewiring and that of the rewiring itself; the others cost nothing. The first of them
        # writes over what there is: that the rewiring sets it to 0 would cost a copy in every step.
        begins = since == (1 - rule.accumulate) % rule.every

        def gathered(total: Array, grad: Array) -> Array:
            return jnp.where(begins, 0.0, total) + grad.astype(jnp.float32)

        gathers = (count > rule.start) & (since > rule.every - rule.accumulate) | due
        gathers = gathers if rule.stop is None else gathers & (count <= rule.stop)
        for path, total in leaves_by_path(clock.grads).items():
            if total.ndim:
                sums[path] = jax.lax.cond(gathers, gathered, lambda total, grad: total, total, raw[path])
    before = {path: of for path, of in leaves_by_path(clock.before).items() if path in sparse}
    choose = _Choice(rule, params, sparse, count)
    renewal = Renewal(inner, inner_state, params, sparse)
    arrays: dict[int, Array] = {}

    def event(masks: ByPath, before: ByPath, arrays: Mapping[int, Array]) -> Any:
        del before
        # Old masks are read while new ones are written. A branch that is never taken tells XLA to set them aside in
        # here; without it a copy of all masks is made in every step.
        masks = jax.lax.cond(count < 0, lambda of: jax.tree.map(jnp.logical_not, of), lambda of: of, masks)
        mine = _finite({path: raw[path] for path in masks})
        mean = _finite({path: sums[path] / rule.accumulate for path in masks}) if sums else mine
        new = choose(masks, mean)
        return new, masks, renewal.renewed(arrays, masks, new, mine)

    def settle(masks: ByPath, before: ByPath, arrays: Mapping[int, Array]) -> Any:
        return masks, before, renewal.settled(arrays, before, masks, _finite({path: raw[path] for path in masks}))

    def rare(*given: Any) -> Any:
        return jax.lax.cond(due, event, settle, *given) if age else event(*given)

    # A branch a leaf, so that no leaf's update has to wait for the gradients of all.
    for group in [list(sparse)] if rule.per == "tree" else [[path] for path in sparse]:
        given = (_part(sparse, group), _part(before, group), renewal.arrays(group))
        changed, old, renewed = jax.lax.cond(due | settles, rare, lambda *same: same, *given)
        sparse, before, arrays = sparse | changed, before | old, arrays | renewed
    clock = clock._replace(before=map_with_path(lambda path, of: before.get(path, of), clock.before))
    if rule.accumulate > 1:
        clock = clock._replace(grads=map_with_path(lambda path, of: sums.get(path, of), clock.grads))
    masks = map_with_path(lambda path, mask: sparse.get(path, mask), masks)
    return Step(due, masks, renewal.state(arrays), clock._replace(count=count))


def _finite(grads: ByPath) -> dict[str, Array]:
    """What is not finite says nothing: the inner optimizer may reject this step, but the masks change in it."""
    return {path: jnp.where(jnp.isfinite(of), of, jnp.zeros_like(of)) for path, of in grads.items()}


def _part(values: ByPath, paths: list[str]) -> dict[str, Array]:
    return {path: values[path] for path in paths}


class _Choice:
    """Who goes and who comes in one update."""

    def __init__(self, rule: Rewiring, params: Params, masks: ByPath, count: Array):
        shapes = {path: mask.shape for path, mask in masks.items()}
        self.rule, self.count = rule, count
        self.weights = leaves_by_path(params)
        # The place of a leaf in the whole tree, so that each draws its own: the leaves of other groups of
        # optax.partition count, names do not.
        self.places = {path: place for place, path in enumerate(leaves_by_path(params, is_leaf=is_masked))}
        self.cells = {path: rule.pattern.cells(shape) for path, shape in shapes.items()}
        self.targets = rule.budget.targets(params, shapes, self.cells)

    def __call__(self, masks: ByPath, grads: ByPath) -> dict[str, Array]:
        """The new masks of some leaves."""
        rule = self.rule
        counts = {path: rule.pattern.count(mask) for path, mask in masks.items()}
        targets = self.targets(counts, rule.progress(self.count))
        cells = {path: self.cells[path] for path in masks}
        if rule.per == "tree":
            counts, targets = ({"": sum(of.values(), jnp.int32(0))} for of in (counts, targets))
            cells = {"": sum(cells.values())}
        numbers = {path: self._numbers(counts[path], targets[path], cells[path]) for path in counts}
        absent = {path: ~mask for path, mask in masks.items()}
        gone = self._taken(rule.drop, self._leaves(masks, grads, 0), [of[0] for of in numbers.values()], masks, -1.0)
        born = self._taken(rule.grow, self._leaves(masks, grads, 1), [of[1] for of in numbers.values()], absent, 1.0)
        return {path: (mask & ~gone[path]) | born[path] for path, mask in masks.items()}

    def _numbers(self, number: Array, target: Array, cells: int) -> tuple[Array, Array]:
        """How many go and how many come."""
        fraction = self.rule.fraction_at(self.count)
        target = jnp.clip(target, 0, cells)
        stay, most = jnp.minimum(number, target), jnp.maximum(number, target)
        # What is left over in rounding down goes by turns, so that a leaf of three connections is rewired too.
        turn = (self.count // self.rule.every).astype(jnp.float32) * _GOLDEN % 1.0
        both = jnp.floor(fraction * stay + turn).astype(jnp.int32)
        both = jnp.where(fraction > 0, jnp.minimum(both, jnp.minimum(stay, cells - most)), 0)
        return number - stay + both, most - number + both

    def _leaves(self, masks: ByPath, grads: ByPath, salt: int) -> dict[str, ScoredLeaf]:
        key = jax.random.fold_in(self.rule.key(), self.count)
        keys = {path: jax.random.fold_in(key, 2 * self.places[path] + salt) for path in masks}
        return {path: ScoredLeaf(self.weights[path], grads[path], mask, keys[path]) for path, mask in masks.items()}

    def _taken(
        self, score: Score | None, leaves: Mapping[str, ScoredLeaf], numbers: list[Array], where: ByPath, sign: float
    ) -> dict[str, Array]:
        """So many cells that rank highest (``sign=-1``: lowest) among those of ``where``."""
        if score is None:
            return {path: jnp.zeros((), bool) for path in where}
        scores, keys = {}, {}
        for path, leaf in leaves.items():
            of = jnp.asarray(score(leaf), jnp.float32)
            if of.shape != leaf.weight.shape:
                name = getattr(score, "__name__", score)
                raise ValueError(f"score {name} has shape {of.shape} for {path!r}, whose shape is {leaf.weight.shape}.")
            scores[path], keys[path] = sign * of, jax.random.fold_in(leaf.key, 1)
        if self.rule.per == "tree":
            return top_k_at_random(scores, numbers[0], where, next(iter(keys.values())))
        parts = zip(scores.items(), numbers, strict=True)
        return {path: self.rule.pattern.top(of, number, where[path], keys[path]) for (path, of), number in parts}
