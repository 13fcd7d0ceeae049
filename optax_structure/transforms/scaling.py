"""Rates as multipliers on one base rate: by label, age and density (for depth see ``depth``).

All of these go *after* the moment-holding transform (``optax.scale_by_adam``), whose output does not depend on the
scale of its input, and before or after ``optax.scale_by_learning_rate``. Chained, their factors multiply.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from optax_structure._tree import PyTree, align, is_function
from optax_structure.labels import LabelFn, Labels
from optax_structure.state.markers import UNBORN, AgeClock, EventClock, LabelClock, first_clock
from optax_structure.transforms._extra import Rule, check_number, check_schedule, require
from optax_structure.transforms._multiplier import Factors, LeafGroup, Multiplier, aged, every_leaf, multiplier
from optax_structure.transforms.events import happened, required_event

Schedule = Callable[[Any], Any]


def label_code(label: str) -> int:
    """A label as a number that an optimizer state can hold: the CRC-32 of its text."""
    return zlib.crc32(label.encode())


def scale_by_label(scales: Mapping[str, float | Schedule], labels: Labels | LabelFn) -> Multiplier:
    """Multiply the update of every leaf by the scale of its label.

    ``u_leaf <- scales[label(leaf)] * u_leaf``. A schedule reads the leaf's own count of updates since it got its
    label, 0 at the first: ``optax.linear_schedule(0., 1., 500)`` under ``"new"`` warms up every new leaf from its own
    birth, and once more when a leaf gets that label again (``transfer_state`` compares labels).

    This equals ``optax.partition({label: chain(inner, scale(scales[label]))}, labels)`` for an ``inner`` that works
    leaf by leaf, at a cost that does not grow with the number of labels.

    Args:
      scales: label -> factor >= 0, or a schedule ``count -> factor``. 0 gives an update of exactly 0.
      labels: tree of labels with the structure of params, a prefix of it, or a function ``params -> labels``.

    Returns:
      A transformation whose state holds, a leaf, since when it has its label and the label's code (scalars).

    Raises:
      ValueError: for a negative scale, and for a label without a scale, naming it.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> params = {"backbone": jnp.ones(2), "head": jnp.ones(2)}
      >>> tx = oxs.scale_by_label({"pretrained": 0.1, "new": 1.0}, {"backbone": "pretrained", "head": "new"})
      >>> updates, _ = tx.update({"backbone": jnp.ones(2), "head": jnp.ones(2)}, tx.init(params))
      >>> [float(updates[name][0].round(3)) for name in ("backbone", "head")]
      [0.10000000149011612, 1.0]

    References:
      Howard & Ruder, Universal language model fine-tuning for text classification, 2018 (discriminative rates).
    """
    scales = dict(scales)
    for label, scale in scales.items():
        if not callable(scale):
            check_number(f"scales[{label!r}]", scale)

    def checked(labels: Labels) -> Labels:
        if odd := [label for label in jax.tree.leaves(labels) if not isinstance(label, str)]:
            raise ValueError(f"labels hold {odd[0]!r}; a label is a string.")
        missing = {label for label in jax.tree.leaves(labels) if label not in scales}
        if missing:
            raise ValueError(f"labels {sorted(missing)} have no scale; scales are given for {sorted(scales)}.")
        return labels

    if not is_function(labels):
        checked(labels)

    def init_fn(params: optax.Params) -> LabelClock:
        aligned = checked(align(labels, params, "labels"))
        return LabelClock(
            *first_clock(params),
            label=jax.tree.map(lambda label: jnp.asarray(label_code(label), jnp.uint32), aligned),
        )

    def factors_fn(
        updates: optax.Updates, state: LabelClock, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[Factors, LabelClock]:
        del params, extra_args
        leaves, since = jax.tree.leaves(align(labels, updates, "labels")), jax.tree.leaves(state.since)
        groups = []
        for label in dict.fromkeys(leaves):
            scale, places = scales[label], tuple(place for place, other in enumerate(leaves) if other == label)
            if callable(scale):
                groups.append(LeafGroup(places, ([since[place] for place in places],), aged(scale, state.count)))
            else:
                groups.append(LeafGroup(places, ([scale] * len(places),)))
        return Factors(tuple(groups)), state._replace(count=optax.safe_increment(state.count))

    return multiplier(init_fn, factors_fn, Rule("scale_by_label", scales, "8 B a leaf"))


def scale_by_age(schedule: Schedule, *, unit: Literal["steps", "events"] = "steps") -> Multiplier:
    """Multiply the update of every leaf by ``schedule(age)``: warm-up, or decay, from the leaf's own birth.

    A leaf's age is 0 at its first update. In steps it grows with every update; in events it grows by one with every
    update whose ``event=`` is true (a traced bool) or concerns any leaf (the distances of ``scale_on_event``), so that
    "ten times slower per growth phase" is ``age_decay(0.1)``. ``transfer_state`` carries ages over and starts new
    leaves at 0; the event that a leaf was born in, which its first update may carry, does not age it.

    Args:
      schedule: age (int32 scalar) -> factor.
      unit: what age counts.

    Returns:
      A transformation whose state holds one int32 scalar a leaf. In events, ``update`` needs ``event=``.

    Raises:
      ValueError: for an unknown ``unit`` or a schedule that is not callable; in ``update`` for a missing ``event=``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_structure as oxs
      >>> tx = oxs.scale_by_age(optax.linear_schedule(0.0, 1.0, 2))
      >>> state, factors = tx.init(jnp.ones(())), []
      >>> for _ in range(3):
      ...     update, state = tx.update(jnp.ones(()), state)
      ...     factors.append(float(update))
      >>> factors
      [0.0, 0.5, 1.0]
    """
    check_schedule("schedule", schedule, of="age")
    if unit not in ("steps", "events"):
        raise ValueError(f"unit={unit!r} must be 'steps' or 'events'.")

    def in_steps(
        updates: optax.Updates, state: AgeClock, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[Factors, AgeClock]:
        del params, extra_args
        factors = every_leaf(updates, state.since, of=aged(schedule, state.count))
        return factors, state._replace(count=optax.safe_increment(state.count))

    def in_events(
        updates: optax.Updates,
        state: EventClock,
        params: optax.Params | None = None,
        *,
        event: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[Factors, EventClock]:
        del params, extra_args
        passed = happened(required_event(event, updates, "scale_by_age(unit='events')")).astype(jnp.int32)
        after = state.count + passed

        def of(since: jax.Array) -> Any:
            return schedule(jnp.where(since == UNBORN, 0, state.count - since))

        born = jax.tree.map(lambda since: jnp.where(since == UNBORN, after, since), state.since)
        return every_leaf(updates, state.since, of=of), EventClock(after, born)

    rule = Rule("scale_by_age", {"schedule": schedule, "unit": unit}, "4 B a leaf")
    if unit == "steps":
        return multiplier(first_clock, in_steps, rule)
    return multiplier(lambda params: EventClock(*first_clock(params)), in_events, rule)


def scale_by_density(fn: Callable[[jax.Array], jax.Array], *, per: Literal["leaf", "unit"] = "leaf") -> Multiplier:
    """Multiply the update of every sparse leaf by a function of its density.

    Args:
      fn: density (float32, in 0..1) -> factor, elementwise. Thresholds are written in it:
        ``lambda d: jnp.where(d < 0.02, 2.0, jnp.where(d > 0.1, 0.5, 1.0))``.
      per: ``"leaf"`` reads one density a leaf; ``"unit"`` one an entry of the last axis (the incoming connections of
        one unit), so that a dense patch in a sparse leaf gets its own rate.

    Returns:
      A stateless transformation that reads ``masks=`` (``sparse`` passes them). A leaf that is not sparse (scalar
      mask) keeps its update.

    Raises:
      ValueError: for an unknown ``per`` or a ``fn`` that is not callable; in ``update`` for missing ``masks=``.

    Example:
      >>> import jax.numpy as jnp, optax_structure as oxs
      >>> params = jnp.ones((4, 2))
      >>> tx = oxs.scale_by_density(lambda density: 1.0 / density)
      >>> mask = jnp.array([[True, False]] * 4)
      >>> float(tx.update(params, tx.init(params), masks=mask)[0][0, 0])
      2.0
    """
    if not callable(fn):
        raise ValueError(f"fn={fn!r} must be a function of density.")
    if per not in ("leaf", "unit"):
        raise ValueError(f"per={per!r} must be 'leaf' or 'unit'.")

    def factors_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        masks: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[Factors, optax.EmptyState]:
        del params, extra_args
        masks = align(require(masks, "masks", "scale_by_density"), updates, "masks")
        sparse = {place: mask for place, mask in enumerate(jax.tree.leaves(masks)) if jnp.ndim(mask)}
        if per == "unit":
            return Factors(elements={place: fn(_density(mask, mask.ndim - 1)) for place, mask in sparse.items()}), state
        densities = [_density(mask, mask.ndim) for mask in sparse.values()]
        return Factors((LeafGroup(tuple(sparse), (densities,), fn),)), state

    rule = Rule("scale_by_density", {"fn": fn, "per": per})
    return multiplier(lambda params: optax.EmptyState(), factors_fn, rule)


def _density(mask: jax.Array, axes: int) -> jax.Array:
    """The share of connections along the first ``axes`` axes: float32."""
    return jnp.mean(mask, axis=tuple(range(axes)), dtype=jnp.float32)
